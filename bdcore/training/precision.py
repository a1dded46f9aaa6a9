"""Which arithmetic a device computes natively."""

from typing import Literal

import torch

from bdcore.errors import UsageError

Precision = Literal["fp32", "bf16"]


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware (Ampere and later; AVX512-BF16, AMX or Arm's bf16 on CPUs)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 where the device computes it natively, else fp32."""
    if asked == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return "bf16" if asked == "bf16" else "fp32"


def choose_device(asked: str) -> torch.device:
    """Resolve auto, cpu or cuda[:N]. Raises UsageError where there is no such device."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"device {asked!r} is not here: this machine has {count} usable CUDA devices. Use --device cpu, or see "
                "`bdcore doctor` for the reason."
            )
    return device
