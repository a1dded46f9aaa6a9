"""Put emulated CUDA kernels into the place of the CPU's, so that bdcore's public functions run through them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bdcore.ops import OPERATORS

NAMESPACE = "bdcore_emulated"


@contextmanager
def emulated(library: Path) -> Iterator[list[str]]:
    """Inside, every operator that this library, or one loaded before, has kernels for runs them on CPU tensors.

    Gradients included.

    Yields:
        The names of these operators, without a namespace.
    """
    torch.ops.load_library(library)
    names = [name.removeprefix("bdcore::") for name in OPERATORS]
    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as definitions:
        for name in names:
            definitions.define(name + str(getattr(torch.ops.bdcore, name).default._schema).partition(name)[2])
        found = [name for name in names if _has_kernel(f"{NAMESPACE}::{name}")]
        with torch.library._scoped_library("bdcore", "IMPL") as kernels:
            for name in found:
                kernels.impl(name, getattr(getattr(torch.ops, NAMESPACE), name).default, "CPU")
            yield found


def _has_kernel(operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")
