"""Cases for notebook 07."""

from __future__ import annotations

import random

import torch

from iapo_mini.tools.course import Case


def lora_numbers(seed: int = 0) -> list[Case]:
    """The numbers of the two matrices, counted."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for _ in range(4):
        inputs, outputs, rank = (rng.randint(1, 99) for _ in range(3))
        A, B = torch.empty(rank, inputs), torch.empty(outputs, rank)
        cases.append(((inputs, outputs, rank), A.numel() + B.numel()))
    return cases


def bits_per_weight(seed: int = 0) -> list[Case]:
    """The bits of a large layer, divided by its weights; other groups of scales, too."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for block, outer in ((32, 128), (64, 1024), (4096, 16)):
        weights = block * outer * 10
        scales = weights // block
        double = 4 * weights + 8 * scales + 32 * (scales // outer)
        cases.append(((block, outer, True), double / weights))
        cases.append(((block, outer, False), (4 * weights + 32 * scales) / weights))
    return cases


def nf4_levels() -> torch.Tensor:
    """(16,) fp32 levels of NF4: quantiles of the normal distribution, scaled to -1 and 1."""
    ends = [torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    above, below = map(torch.special.ndtri, ends)
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values
    return (levels / levels.max()).float()


def rounding_error(seed: int = 0) -> list[Case]:
    """Weights of several sizes and tails, in blocks of 16 to 256."""
    levels = nf4_levels()
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for block, power in ((16, 1), (256, 1), (64, 3)):
        w = 0.1 * torch.randn(32, 128, generator=generator) ** power
        blocks = w.reshape(-1, block)
        scale = blocks.abs().amax(1, keepdim=True)
        # The level on either side of each weight, and the nearer of them.
        upper = torch.searchsorted(levels, blocks / scale).clamp(1, 15)
        either = torch.stack([levels[upper - 1], levels[upper]], -1) * scale[..., None]
        error = (either - blocks[..., None]).abs().amin(-1)
        cases.append(((w, block), float(error.norm() / w.norm())))
    return cases


def rank_needed(seed: int = 0) -> list[Case]:
    """Wide and tall changes with known singular values, and shares between two ranks."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for shape, values, share, rank in (
        ((6, 4), (4.0, 3.0, 2.0, 1.0), 0.8, 2),
        ((4, 7), (5.0, 5.0, 1.0, 1.0), 0.95, 2),
        ((4, 7), (5.0, 5.0, 1.0, 1.0), 0.97, 3),
        ((5, 5), (3.0, 2.9, 2.8, 2.7, 2.6), 0.9, 5),
    ):
        u, _ = torch.linalg.qr(torch.randn(shape[0], len(values), generator=generator).double())
        v, _ = torch.linalg.qr(torch.randn(shape[1], len(values), generator=generator).double())
        cases.append((((u * torch.tensor(values)) @ v.T, share), rank))
    return cases
