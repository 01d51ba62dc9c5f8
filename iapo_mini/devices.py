"""Where a model runs, and what arithmetic is fast there."""

from __future__ import annotations

import torch

from iapo_mini.errors import AUTO, check_device


def chosen_device(device: str) -> str:
    """The device of this name; ``"auto"`` is the first CUDA device, else the CPU.

    Raises:
        ValueError: for a name that is none, or a CUDA device that this machine does not have.
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
    """What 4-bit weights are computed with: bf16 where the card has it, else fp16; fp32 on a CPU.

    A T4 answers that it supports bf16 because CUDA emulates it, slowly; hence the question without
    emulation.
    """
    if torch.device(device).type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
