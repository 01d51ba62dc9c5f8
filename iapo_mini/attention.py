"""Attention masks and position ids in the form that transformers' models take."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig


def model_mask(model: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """Convert a bool 4-D attention mask to the form that this model's attention takes.

    ``sdpa`` takes bool. ``eager`` adds the mask to the scores, so True would silently add 1.
    """
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        return mask
    dtype: Any = model.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Number of tokens that the narrowest attention layer sees; None when all see everything."""
    layers = DynamicCache(config=config).layers
    return min((x.sliding_window for x in layers if hasattr(x, "sliding_window")), default=None)


def check_window(model: torch.nn.Module, length: int) -> None:
    """Refuse sequences longer than the model's sliding window, which our 4-D masks would ignore."""
    config: Any = model.config
    window = sliding_window(config)
    if window is not None and window < length:
        raise ValueError(
            f"prompt and completion must be at most {window} tokens, the model's sliding window, "
            f"got up to {length}"
        )


def most_positions(model: torch.nn.Module) -> float:
    """Number of positions that a model has or was trained on; infinite if its config names none."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = rope.get("factor") if isinstance(rope, dict) else None
    return most * max(1.0, stretched or 1.0) if isinstance(most, int) and most > 0 else math.inf


def check_positions(model: torch.nn.Module, length: int) -> None:
    """Refuse sequences longer than :func:`most_positions`.

    Args:
        length: number of tokens of the longest prompt, completion and forced answer together.

    Raises:
        ValueError: naming both numbers.
    """
    most = most_positions(model)
    if most < length:
        raise ValueError(
            f"the model has {int(most)} positions, but prompt, completion and forced answer are "
            f"up to {length} tokens; lower max_completion_length, or take a model with more "
            "positions."
        )


def check_reach(model: torch.nn.Module, length: int) -> None:
    """Refuse sequences longer than the model's sliding window or its positions."""
    check_window(model, length)
    check_positions(model, length)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count only real tokens, (rows, width)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
