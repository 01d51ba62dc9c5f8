"""The device that a model runs on, and the dtype that is fast there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from iapo_mini.errors import AUTO, check_device

# Sampling and the estimator run about twice as fast on a second, merged copy of the weights as
# through the adapter's extra layers. The copy may have this many parameters on a CPU (2.4 GB in
# fp32), and on a GPU, which has less memory to spare, this share of its memory.
COPY_LIMIT = 600_000_000
COPY_SHARE = 0.05


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


def has_room_for_copy(device: torch.device, parameters: int) -> bool:
    """Whether a device has room for a second copy in fp32 of so many parameters."""
    if device.type == "cpu":
        return parameters <= COPY_LIMIT
    return 4 * parameters <= COPY_SHARE * torch.cuda.get_device_properties(device).total_memory


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, even where a user allows TF32 or bf16 for them.

    Checks that compare two ways of computing the same logits need it: TF32 has three digits.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
