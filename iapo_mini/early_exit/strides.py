"""Asking after some prefixes only: how they are chosen, and the values of those between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from iapo_mini.chat import token_texts
from iapo_mini.policy import Policy
from iapo_mini.rollouts import Rollouts

CLOSING = "</think>"
"""The tag that ends a thought."""


def ends_sentence(text: str) -> bool:
    """Whether this text ends a sentence: with one of ``. ! ? >`` or a line break, then spaces."""
    return text.rstrip(" ").endswith((".", "!", "?", ">", "\n"))


def _texts(policy: Policy, rollouts: Rollouts) -> list[list[str]]:
    """The text of each token of each completion, without padding."""
    return [
        token_texts(policy.tokenizer, ids[:n].tolist())
        for ids, n in zip(rollouts.completion_ids, rollouts.lengths.tolist())
    ]


def sentence_ends(policy: Policy, rollouts: Rollouts, ahead: bool = True) -> torch.Tensor:
    """(B, L + 1) bool: the first and last prefix, and those that end a sentence, a line or a tag.

    A token ends a sentence when its text does (:func:`ends_sentence`). A point that a letter, a
    digit or a point follows at once does not, as in ``2.50`` or ``e.g.``. With ``ahead`` False it
    does, as while a completion is sampled, when the next token is not known.
    """
    return _sentence_ends(_texts(policy, rollouts), rollouts, ahead)


def _sentence_ends(rows: list[list[str]], rollouts: Rollouts, ahead: bool) -> torch.Tensor:
    out = torch.zeros_like(rollouts.completion_mask)
    for row, texts in enumerate(rows):
        for t, (text, following) in enumerate(zip(texts, [*texts[1:], ""])):
            inside = text[-1:] == "." and (following[:1].isalnum() or following[:1] == ".")
            inside = inside and ahead
            out[row, t] = ends_sentence(text) and not inside
    out = torch.nn.functional.pad(out, (1, 0), value=True)
    return out.scatter_(1, rollouts.lengths[:, None], True)


def end_of_thought(texts: Sequence[str]) -> int:
    """Number of tokens before the one in which ``</think>`` begins.

    It is the number of all tokens if the thought is not closed, or if the tag is a token of its own
    and so takes the change that it makes upon itself.
    """
    at = "".join(texts).find(CLOSING)
    if at < 0 or CLOSING in (text.strip() for text in texts):
        return len(texts)
    ends = itertools.accumulate(len(text) for text in texts)
    return next(number for number, end in enumerate(ends) if end > at)


def prefixes_asked(
    policy: Policy, rollouts: Rollouts, stride: int | str, ahead: bool = True
) -> torch.Tensor:
    """(B, L + 1) bool: every ``stride``-th prefix or the sentence ends, and each row's last.

    Where tags have several tokens, no question is asked behind the thought, except after the last
    token. A question there has the text that forces an answer twice, which no policy has seen, and
    the entropy of its answer jumps. :func:`spread` would charge the token that ends the thought
    with a share of the jump. (Asking after every token puts it on the last token of a tag, which is
    certain anyway.) With ``ahead`` False such questions are asked, as while a completion is
    sampled.
    """
    rows = _texts(policy, rollouts) if isinstance(stride, str) or ahead else []
    if isinstance(stride, str):
        asked = _sentence_ends(rows, rollouts, ahead)
    else:
        t = torch.arange(rollouts.completion_ids.shape[1] + 1, device=rollouts.lengths.device)
        asked = (t % stride == 0) | (t == rollouts.lengths[:, None])
    for row, texts in enumerate(rows if ahead else ()):
        asked[row, end_of_thought(texts) + 1 : len(texts)] = False
    return asked


def spread(values: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Interpolate linearly between the values of the prefixes that were asked.

    The drop over a segment is then exact, and every token of the segment gets an equal share.
    """
    t = torch.arange(values.shape[1], device=values.device).expand_as(values)
    before = torch.where(asked, t, -1).cummax(1).values.clamp(min=0)
    after = torch.where(asked, t, values.shape[1]).flip(1).cummin(1).values.flip(1)
    after = torch.where(after < values.shape[1], after, before)
    share = (t - before) / (after - before).clamp(min=1)
    left, right = values.gather(1, before), values.gather(1, after)
    return torch.where(asked, values, left + (right - left) * share)
