"""Masks and positions, as transformers' models take them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig


def model_mask(model: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """A bool 4-D attention mask in the form this model's attention takes.

    ``sdpa`` takes bool. ``eager`` adds the mask to the scores, where True would silently count 1.
    """
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        return mask
    dtype: Any = model.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens the narrowest attention layer looks back; None when all look back to the start."""
    layers = DynamicCache(config=config).layers
    return min((x.sliding_window for x in layers if hasattr(x, "sliding_window")), default=None)


def check_window(model: torch.nn.Module, length: int) -> None:
    """Our 4-D masks look back to the start, so a shorter window would silently be ignored."""
    config: Any = model.config
    window = sliding_window(config)
    if window is not None and window < length:
        raise ValueError(
            f"prompt and completion must be at most {window} tokens, the model's sliding window, "
            f"got up to {length}"
        )


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, (rows, width)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
