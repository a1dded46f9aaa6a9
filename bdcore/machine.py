"""What the machine tells of itself: its processor, and the peak memory of a stage."""

import contextlib
import ctypes
import platform
import resource
import sys
from functools import cache
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text("5")  # Linux: forget the process's highest resident size so far
        except OSError:
            return  # not permitted in some containers: the peak is then the process's own since its start


def peak_memory_bytes(device: torch.device) -> int:
    """The highest use since the reset: allocated on a GPU; resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def processor_name() -> str:
    """The CPU's name as its maker gives it, where the platform tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def return_freed_memory() -> None:
    """Let glibc hand back what was freed and kept, so that what is allocated next shows in the resident size."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch instead of handing it back to the system.

    A training step frees and allocates the same activations again and again. By default malloc returns blocks of
    megabytes to the kernel, which clears every page anew: a fifth of a WRN-16-1 step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not glibc
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)
