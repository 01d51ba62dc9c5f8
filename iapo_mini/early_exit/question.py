"""The question that is asked after a prefix, and the settings of how to ask it.

Nothing heavier than dataclasses is imported here, so settings can be checked without torch.
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
"""The ways to ask after every prefix. They agree up to rounding (:mod:`iapo_mini.early_exit`)."""


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
    """Settings of early exit: the text that forces an answer, the prefixes, and the way to ask.

    Attributes:
        postfix: text that forces an answer.
        stride: ask after every ``stride`` tokens (1: after each token, as in the paper), or
            ``"sentence"`` to ask at the ends of sentences. The drop in entropy between two
            questions is exact and is spread evenly over the tokens between them.
        way: ``"packed"`` (one pass over the trunk, with all branches behind its keys and values),
            ``"cached"`` (a copy of the cache for each prefix, as the paper describes) or
            ``"naive"`` (the definition, which runs each prefix again). All give the same results.
        memory_mb: memory in MiB, beside the model, for asking. It does not change the results.
        chunk_size: number of branches at a time, in place of what ``memory_mb`` allows. There are
            no chunks when flat packing can be used (:func:`iapo_mini.early_exit.flat.walkable`) and
            the vocabulary head is a plain matrix. Then
            :func:`iapo_mini.early_exit.reading.head_entropy` needs 2 MiB at a time on a CPU and 64
            MiB on a GPU.

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
"""The paper's settings: ask after every token, with the paper's postfix."""


AGREE = "agree"
"""Rule of :class:`Stopping`: the same forced answer twice in a row."""


@dataclass(frozen=True)
class Stopping:
    """When to stop thinking at inference (dynamic early exit, arXiv 2504.15895).

    Attributes:
        rule: a number of nats: stop when the entropy of the forced answer's first token is below
            it. Or ``"agree"``: stop when the most probable forced answer is the same twice in a
            row. For a model that writes numbers digit by digit, the first token is only the first
            digit, so ``"agree"`` is the safer rule there.
        stride: ask after every ``stride`` tokens, or ``"sentence"`` to ask at ends of sentences.
        postfix: text that ends the thought and forces an answer.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
    """

    rule: float | str
    stride: int | str = "sentence"
    postfix: str = POSTFIX

    def __post_init__(self) -> None:
        if isinstance(self.rule, str):
            if self.rule != AGREE:
                raise ValueError(
                    f"early_exit must be a number of nats above 0, or '{AGREE}', got "
                    f"{shown(self.rule)}"
                )
        else:
            check_number("early_exit", self.rule, above=0, most=MOST_REAL)
        check_stride(self.stride, "early_exit_stride")


@dataclass(frozen=True)
class Question:
    """A suffix to append after a prefix, and the values to compute from the predictions at its end.

    Attributes:
        suffix: (K,) or (B, K) long; a row's suffix may be padded on the right.
        read: (row numbers (N,), logits (N, keep, V)) -> values to keep, (N, r) fp32.
        keep: number of last positions of the suffix at which logits are computed.
        read_hidden: (vocabulary head, its input (N, keep, d)) -> the same values as ``read``, but
            without logits. It is used with flat packing if the head is a plain matrix.
        by_row: whether ``read`` uses the row numbers. If not, prefixes that completions of a group
            share are asked once.
    """

    suffix: torch.Tensor
    read: Read
    keep: int = 1
    read_hidden: ReadHidden | None = None
    by_row: bool = False
