"""What is asked after a prefix, and how: two small values that travel together.

Nothing heavier than dataclasses is imported here, so that settings can be checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iapo_mini.errors import MOST_REAL, MOST_TOKENS, check_choice, check_number, shown
from iapo_mini.tasks import POSTFIX

if TYPE_CHECKING:
    import torch

    Read = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ReadHidden = Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor]

WAYS = ("packed", "cached", "naive")
"""How every prefix can be asked; they agree up to rounding (:mod:`iapo_mini.early_exit`)."""


def check_stride(stride: object, name: str = "stride") -> None:
    """Refuse a stride that is neither a number of tokens nor ``"sentence"``.

    Raises:
        ValueError: with the argument's ``name``, its value and what is allowed.
    """
    whole = isinstance(stride, int) and not isinstance(stride, bool) and 1 <= stride <= MOST_TOKENS
    if not whole and stride != "sentence":
        raise ValueError(f"{name} must be 1 to {MOST_TOKENS} or 'sentence', got {shown(stride)}")


@dataclass(frozen=True)
class EarlyExit:
    """How a policy is made to answer early: with which words, after which tokens, in what way.

    Attributes:
        postfix: text that forces an answer.
        stride: ask after every so many tokens (1: after each, as in the paper) or at
            ``"sentence"`` ends. The drop between two questions is exact and is spread evenly over
            the tokens between them.
        way: ``"packed"`` (one trunk pass, all branches behind its keys and values), ``"cached"`` (a
            copy of the cache for each prefix, as the paper describes) or ``"naive"`` (the
            definition, running each prefix again). Results do not depend on it.
        memory_mb: memory beside the model that asking may take, MiB; results do not depend on it.
        chunk_size: branches at a time instead of what ``memory_mb`` allows. Where packing serves
            (:func:`iapo_mini.early_exit.flat.walkable`) and the vocabulary head is a plain matrix
            there are no chunks: :func:`iapo_mini.early_exit.reading.head_entropy` needs 2 MiB at a
            time on a CPU, 64 on a card.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
    """

    postfix: str = POSTFIX
    stride: int | str = 1
    way: str = "packed"
    memory_mb: float = 256.0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_stride(self.stride)
        check_choice("way", self.way, WAYS)
        check_number("memory_mb", self.memory_mb, above=0, most=MOST_REAL)
        if self.chunk_size is not None:
            check_number("chunk_size", self.chunk_size, 1, MOST_TOKENS)


EVERY_PREFIX = EarlyExit()
"""The paper's way to ask: after every token, with its postfix."""


@dataclass(frozen=True)
class Question:
    """A suffix to append after a prefix, and what to keep of the prediction at its end.

    Attributes:
        suffix: (K,) or (B, K) long; a row's suffix may be padded on the right.
        read: (row numbers (N,), logits (N, keep, V)) -> what to keep of them, (N, r) fp32.
        keep: at how many of the suffix's last positions to make logits.
        read_hidden: (vocabulary head, what enters it (N, keep, d)) -> the same as ``read``. It
            does its work before the head, where flat packing runs and the head is a plain matrix,
            so that no logits are needed.
        by_row: whether ``read`` looks at the row numbers. If not, prefixes that completions of a
            group have in common are asked once.
    """

    suffix: torch.Tensor
    read: Read
    keep: int = 1
    read_hidden: ReadHidden | None = None
    by_row: bool = False
