"""How an operator is registered: twice with one schema, once to be computed natively and once as its reference.

`bdcore::NAME` runs the compiled kernel of its device where there is one, and its PyTorch reference elsewhere;
`bdcore_reference::NAME` always runs the reference. Both have the same fake kernel and the same gradient formula.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdcore.errors import UsageError, unknown_name
from bdcore.ops.native import load

NATIVE, REFERENCE = "bdcore", "bdcore_reference"
_CHOICES = ("native", "reference")
registered: list[str] = []
"""Names of all operators, without a namespace, in the order of registration."""


def operators(tensor: Tensor) -> Any:
    """The namespace to call an operator on `tensor` in: `torch.ops.bdcore`, or `torch.ops.bdcore_reference`.

    Chosen at every call by BDCORE_OPS: unset, compiled kernels run where there are some; `reference` never uses them;
    `native` refuses to go without. A function that torch.compile has compiled keeps the choice of that moment.

    Raises:
        UsageError: BDCORE_OPS is something else, or asks for kernels that are not there.
    """
    choice = os.environ.get("BDCORE_OPS")
    if not choice:
        return torch.ops.bdcore
    return torch.ops.bdcore if implementation(tensor.device.type) == "native" else torch.ops.bdcore_reference


def implementation(device: str) -> str:
    """What operators run as on a device ("cpu" or "cuda") now: "native" or "reference".

    Raises:
        UsageError: BDCORE_OPS is neither, or asks for kernels that are not there.
    """
    choice = os.environ.get("BDCORE_OPS")
    if choice and choice not in _CHOICES:
        raise UsageError(unknown_name("BDCORE_OPS", choice, _CHOICES))
    status = load()[device]
    if choice == "native" and not status.loaded:
        raise UsageError(f"BDCORE_OPS=native, but the kernels for {device} are not there: {status.detail}")
    return "native" if status.loaded and choice != "reference" else "reference"


def register(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
) -> None:
    """Register an operator in both namespaces.

    Args:
        name: without a namespace.
        schema: "(arguments) -> result", as torch.library takes it.
        reference: computes it with PyTorch, on every device.
        fake: makes tensors of the result's shape, dtype and strides without computing.
        setup_context: keeps what the gradient needs, as torch.library.register_autograd says.
        gradients: called with the namespace that the operator was called in (in which the backward operator is to be
            called), ctx and the gradients of the results; None: a gradient through this operator is an error.
    """
    registered.append(name)
    for namespace in (NATIVE, REFERENCE):
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Under this key (CompositeExplicitAutograd) kernels of the CPU and of CUDA take precedence.
        torch.library.impl(qualified, "default", reference)
        torch.library.register_fake(qualified, fake)
        formula = partial(gradients, getattr(torch.ops, namespace)) if gradients else partial(_refuse, name)
        torch.library.register_autograd(qualified, formula, setup_context=setup_context)


def _refuse(name: str, ctx: Any, *grads: Tensor | None) -> None:
    """Without this, gradients would silently be dropped."""
    what = "second derivatives" if name.endswith("_backward") else "gradient"
    raise NotImplementedError(f"{name.removesuffix('_backward')} has no {what}")
