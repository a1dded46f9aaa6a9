"""One operator at one size: several contestants that must agree, each timed in a test of its own.

On a CPU a round is as many calls as fill some milliseconds, in one process with the same number of threads and the same
allocator for all. On a GPU a call only queues work, so the clock waits for the device before it is read, and a round is
long enough (see conftest.py) for that wait to be nothing beside it: what is measured is the time from call to call of
a loop, in which launches count as much as they do in training. Neither empties caches between calls, so sizes that fit
into a cache may beat the bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
OURS, EAGER, COMPILED, LIGER = "bdcore", "eager", "torch.compile", "Liger-Kernel"
PEERS = (EAGER, COMPILED, LIGER)

Function = Callable[..., Tensor]


@dataclass
class Contest:
    """What a benchmark calls; the fixture `contest` makes one for every test.

    Args:
        operator: the table's first column.
        device: where all contestants compute.
        benchmark: pytest-benchmark's fixture.
        bandwidth: bytes a second of a large copy, read and write counted, measured shortly before.
        launch: seconds of the smallest call there is, measured shortly before.
        unavailable: to which contestants that cannot run here are added.
    """

    operator: str
    device: torch.device
    benchmark: Any
    bandwidth: float
    launch: float
    unavailable: list[dict[str, Any]] = field(repr=False)

    def __call__(
        self,
        case: str,
        direction: str,
        contestant: str,
        functions: Mapping[str, Function],
        inputs: Callable[[], tuple[Tensor, ...]],
        *,
        cpu_bars: Mapping[str, float] | None = None,
        moved: int | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        """Check that a contestant's answer is that of eager PyTorch, then time it.

        Args:
            case: the table's second column.
            direction: FORWARD, without gradients, or BOTH: the gradients of all inputs that require one, for a fixed
                random gradient of the result where that is no scalar.
            contestant: which one.
            functions: by contestant; COMPILED is made from EAGER, with fixed shapes and no graph breaks.
            inputs: makes the functions' arguments, the same values at every call: a contestant may overwrite its own.
            cpu_bars: what bdcore has to reach on a CPU: times faster than a peer by its name, share of the "bound", or
                at most so many "seconds". Empty: it is judged on a GPU only, by `gpu_bars`; None: nowhere.
            moved: bytes that must move; None: each input read once and each result written once in the forward pass,
                and in the backward pass once more every input, the result's gradient, and every gradient written.
            tolerance: largest difference from eager PyTorch over its largest value; uint8 results may differ by 1.
        """
        with torch.set_grad_enabled(direction == BOTH):
            slope = self._slope(functions[EAGER](*inputs())) if direction == BOTH else None
            expected = _step(functions[EAGER], inputs(), direction, slope)()
            if moved is None:
                moved = bytes_moved(inputs(), expected)
            row = {"operator": self.operator, "case": case, "pass": direction, "contestant": contestant}
            bars = {} if cpu_bars is None else cpu_bars if self.device.type == "cpu" else gpu_bars(moved)
            row |= {"moved": moved, "bandwidth": self.bandwidth, "launch": self.launch, "bars": dict(bars)}
            step = _step(self._function(contestant, functions), inputs(), direction, slope)
            try:
                found = step()
            except Exception as error:
                if contestant not in (COMPILED, LIGER):
                    raise
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                self.unavailable.append({**row, "reason": reason})
                pytest.skip(f"{contestant} is not available on {self.device.type}: {reason}")
            agree(found, expected, tolerance)
            del found, expected
            self.benchmark.group = f"{self.operator}, {case}, {direction}"
            self.benchmark.extra_info = row
            self.benchmark(step)

    def _function(self, contestant: str, functions: Mapping[str, Function]) -> Function:
        if contestant != COMPILED:
            return functions[contestant]
        torch.compiler.reset()  # every size is compiled anew, as a training run of that size alone would do
        return torch.compile(functions[EAGER], fullgraph=True, dynamic=False)

    def _slope(self, result: Tensor) -> Tensor | None:
        """A gradient of the result, the same for all contestants; a scalar needs none."""
        if not result.ndim:
            return None
        generator = torch.Generator(self.device).manual_seed(1)
        noise = torch.randn(result.shape, generator=generator, device=self.device, dtype=result.dtype)
        return torch.empty_like(result, requires_grad=False).copy_(noise)


def _step(
    function: Function, inputs: tuple[Tensor, ...], direction: str, slope: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: one call, with its gradients if they are asked for."""
    if direction == FORWARD:
        return lambda: (function(*inputs),)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def both() -> tuple[Tensor, ...]:
        result = function(*inputs)
        return (result, *torch.autograd.grad(result, wanted, slope))

    return both


def bytes_moved(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> int:
    """Bytes of the tensors that a call reads and writes, the first result being that of the forward pass."""
    read, (value, *gradients) = size_of(*inputs), results
    forward = read + size_of(value)
    return forward + (read + size_of(value, *gradients) if gradients else 0)


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raise AssertionError where two contestants computed different things."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        which = "result" if number == 0 else f"gradient {number}"
        assert ours.shape == theirs.shape, f"{which}: shapes {list(ours.shape)} and {list(theirs.shape)}"
        assert ours.dtype == theirs.dtype, f"{which}: dtypes {ours.dtype} and {theirs.dtype}"
        if ours.dtype == torch.uint8:
            # The order of operations decides where a tie is rounded to.
            difference, allowed = (ours.short() - theirs.short()).abs().amax().item(), 1.0
        elif not ours.is_floating_point():
            difference, allowed = (ours != theirs).sum().item(), 0.0
        else:
            difference = (ours.detach().double() - theirs.detach().double()).abs().amax().item()
            allowed = tolerance * theirs.detach().abs().amax().item()
        assert difference <= allowed, f"{which}: differs from eager PyTorch by {difference:.3g}, {allowed:.3g} allowed"


def gpu_bars(moved: int) -> dict[str, float]:
    """What is asked on a GPU: most of the bandwidth where the work is large, a lead over the peers where it is not."""
    return {"bound": 0.85} if moved >= 2**27 else {COMPILED: 1.3, EAGER: 4.0}


def synchronised(device: torch.device) -> Callable[[], float]:
    """A clock that is read when the device has done its work."""
    if device.type == "cpu":
        return perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return clock


def seconds_of(function: Callable[[], object], device: torch.device, calls: int) -> float:
    """Median seconds of a call, over 9 rounds of so many calls each after one to warm up."""
    clock = synchronised(device)
    rounds: list[float] = []
    for _ in range(10):
        began = clock()
        for _ in range(calls):
            function()
        rounds.append((clock() - began) / calls)
    return median(rounds[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and write counted, of a copy far larger than any cache: 256 MiB, on a GPU 1 GiB."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * size_of(source) / seconds_of(lambda: target.copy_(source), device, 1 if device.type == "cpu" else 10)


def launch_seconds(device: torch.device) -> float:
    """Seconds of the smallest call there is: PyTorch negates one number into a new tensor."""
    one = torch.ones(1, device=device)
    return seconds_of(one.neg, device, 1000)
