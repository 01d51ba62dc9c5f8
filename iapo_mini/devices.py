"""The device that a model runs on, and the dtype that is fast there."""

from __future__ import annotations

import torch

from iapo_mini.errors import AUTO, check_device


def chosen_device(device: str) -> str:
    """Resolve the name of a device; ``"auto"`` is the first CUDA device, else the CPU.

    Raises:
        ValueError: for an invalid name, or a CUDA device that this machine does not have.
    """
    check_device(device)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == AUTO:
        return "cuda" if cards else "cpu"
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and index >= cards:
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(cards))])
        raise ValueError(f"device must be one of this machine's ({there}), got '{device}'")
    return device


def compute_dtype(device: str | torch.device) -> torch.dtype:
    """Dtype for computing with 4-bit weights: bf16 if the GPU has it, else fp16; fp32 on a CPU.

    A T4 reports support for bf16 because CUDA emulates it slowly, so emulation is excluded here.
    """
    if torch.device(device).type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
