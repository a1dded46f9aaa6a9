"""A training step recorded as a CUDA graph and replayed, so that the host does not launch its kernels one by one.

A step of a small network is hundreds of kernels of a few microseconds, which a host launches more slowly than a fast
GPU computes them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bdcore.context import Context
from bdcore.training.batches import Batch

# In these, libraries load kernels, compilers compile, optimisers make their states: nothing that a graph may hold.
_WARM_UP = 3


class CapturedStep:
    """`step`, recorded for every size of batch that has come up some times, and from then on replayed.

    All steps are steps of the training, those to warm up too; recording computes nothing. So the result is that of
    calling `step`, as far as the optimisers' arithmetic is: a learning rate that a graph can read is a float32.

    Args:
        step: one update from a batch, which returns figures. It depends on the device's tensors alone: on no number of
            the host, on no shape that follows from data.
        optimizers: those that it steps; from here on their learning rates are tensors, to be filled.
        context: a CUDA device, and the meter, which counts replays as well.
    """

    def __init__(
        self,
        step: Callable[[Batch], dict[str, Tensor]],
        optimizers: Sequence[torch.optim.Optimizer],
        context: Context,
    ) -> None:
        self._step = step
        self._optimizers = optimizers
        self._context = context
        self._seen: Counter[int] = Counter()
        self._recorded: dict[int, _Recorded] = {}
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = torch.tensor(group["lr"], device=context.device)
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One update; the figures are the caller's own."""
        size = len(batch["index"])
        recorded = self._recorded.get(size)
        if recorded is not None:
            self._context.meter.images += recorded.images
        elif self._seen[size] < _WARM_UP:
            self._seen[size] += 1
            return self._run_aside(batch)
        else:
            recorded = self._recorded[size] = self._record(batch)
        for name, tensor in batch.items():
            recorded.batch[name].copy_(tensor)
        recorded.graph.replay()
        return {name: value.clone() for name, value in recorded.figures.items()}

    def _run_aside(self, batch: Batch) -> dict[str, Tensor]:
        """A plain step on the stream of the recording, to which workspaces and the gradients' nodes belong."""
        current, stream = torch.cuda.current_stream(self._context.device), _stream(self._context.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            figures = self._step(batch)
        current.wait_stream(stream)
        return figures

    def _record(self, batch: Batch) -> "_Recorded":
        kept = {name: tensor.clone() for name, tensor in batch.items()}
        before = self._context.meter.images
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=_stream(self._context.device)):
                figures = self._step(kept)
        except RuntimeError as error:
            error.add_note(
                "The loss was said to be capturable: then it must not read a value back, move tensors between devices, "
                "draw on the CPU, or have shapes that follow from data."
            )
            raise
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)  # the recorded gradients are the graph's alone
        return _Recorded(graph, kept, figures, self._context.meter.images - before)


@dataclass(frozen=True)
class _Recorded:
    """A graph, the tensors that it reads and writes, and how many images its models count in a step."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    figures: dict[str, Tensor]
    images: int


@cache  # one for all trainings: libraries keep a workspace for every stream that they have run on
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
