"""How an operator is registered: twice with one schema, once to be computed natively and once as its reference.

`bdcore::NAME` runs the compiled kernel of its device where there is one, and its PyTorch reference elsewhere;
`bdcore_reference::NAME` always runs the reference. Both have the same fake kernel and the same gradient formula.
"""

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bdcore.errors import UsageError, unknown_name
from bdcore.ops.native import load

NATIVE, REFERENCE = "bdcore", "bdcore_reference"
_CHOICES = ("native", "reference")
registered: list[str] = []
"""Names of all operators, without a namespace, in the order of registration."""
_direct = {NATIVE: SimpleNamespace(), REFERENCE: SimpleNamespace()}
# Neither is public, but torch.library itself is written with them.
transforms_active = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
"""Whether this is called within a transform of torch.func, as vmap."""
_BelowAutograd = torch._C._AutoDispatchBelowAutograd  # pyright: ignore[reportPrivateUsage]


def operators(tensor: Tensor) -> Any:
    """The namespace to call an operator on `tensor` in, native or reference; its attributes are the operators.

    Chosen at every call by BDCORE_OPS: unset, compiled kernels run where there are some; `reference` never uses them;
    `native` refuses to go without. A function that torch.compile has compiled keeps the choice of that moment.

    Raises:
        UsageError: BDCORE_OPS is something else, or asks for kernels that are not there.
    """
    choice = os.environ.get("BDCORE_OPS")
    chosen = implementation(tensor.device.type) if choice else "native"
    namespace = NATIVE if chosen == "native" else REFERENCE
    if torch.compiler.is_compiling() or transforms_active():
        return getattr(torch.ops, namespace)
    return _direct[namespace]


@torch.compiler.assume_constant_result  # for tracing: it reads the environment and what was loaded
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
        direct = partial(gradients, _direct[namespace]) if gradients else formula
        operator = getattr(getattr(torch.ops, namespace), name).default
        setattr(_direct[namespace], name, _call_directly(operator, setup_context, direct))


def _call_directly(
    operator: Callable[..., Any], setup_context: Callable[..., None] | None, formula: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that does what calling the operator does, gradient included, 20 microseconds sooner.

    What torch.library.register_autograd registers is for tracing as well, and is reached through the dispatcher and
    Python twice for each call; at small sizes that takes longer than computing.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with _BelowAutograd():
                output = operator(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return formula(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Direct.apply(*inputs)
        with _BelowAutograd():
            return operator(*inputs)

    return call


def _refuse(name: str, ctx: Any, *grads: Tensor | None) -> None:
    """Without this, gradients would silently be dropped."""
    what = "second derivatives" if name.endswith("_backward") else "gradient"
    raise NotImplementedError(f"{name.removesuffix('_backward')} has no {what}")
