"""Masks and positions, as transformers' models take them."""

from __future__ import annotations

import torch
from transformers import DynamicCache


def model_mask(model, mask: torch.Tensor) -> torch.Tensor:
    """A bool 4-D attention mask in the form this model's attention takes.

    ``sdpa`` takes bool. ``eager`` adds the mask to the scores, where True would silently count 1.
    """
    if model.config._attn_implementation == "sdpa":
        return mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, lowest)


def sliding_window(config) -> int | None:
    """Tokens the narrowest attention layer looks back; None when all look back to the start."""
    layers = DynamicCache(config=config).layers
    return min((x.sliding_window for x in layers if hasattr(x, "sliding_window")), default=None)


def check_window(model, length: int) -> None:
    """Our 4-D masks look back to the start, so a shorter window would silently be ignored."""
    window = sliding_window(model.config)
    if window is not None and window < length:
        raise ValueError(
            f"the model's sliding window is {window} tokens, prompt and completion are up to "
            f"{length}; allowed are sequences within the window."
        )


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, (rows, width)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
