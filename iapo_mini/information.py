"""Token informativeness by early exit (work in progress)."""

from __future__ import annotations

import torch


def branch_inputs(trunk_mask, position_ids, ends, postfix) -> dict[str, torch.Tensor]:
    rows, n = ends.shape
    k, width = len(postfix), trunk_mask.shape[1]
    sees = trunk_mask[:, None] & (torch.arange(width) <= ends[:, :, None])  # (B, C, T)
    sees = sees.repeat_interleave(k, dim=1)
    branch = torch.arange(n * k) // k
    own = (branch[:, None] == branch) & torch.ones(n * k, n * k, dtype=torch.bool).tril()
    mask = torch.cat([sees, own.expand(rows, -1, -1)], dim=2)[:, None]
    positions = position_ids.gather(1, ends)[:, :, None] + 1 + torch.arange(k)
    return {
        "input_ids": postfix.repeat(rows, n),
        "attention_mask": mask,
        "position_ids": positions.flatten(1),
    }
