"""Worlds for testing the theory: their completions, policies and answers.

Every function here draws many worlds of one kind. The possible completions are the same in all of
them (:class:`iapo_mini.lab.exact.Strings`); the policies, and so the lengths, are random.
"""

from __future__ import annotations

import torch

from iapo_mini.lab.exact import Strings, every_string, strings_of


def random_worlds(count: int, seed: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """All strings of up to four out of two symbols, with one of three answers for each string.

    The whole information H(y) - H(y | o) is the same for every completion (chain rule), so the
    premise of Corollary 4.2 always holds here.

    Returns:
        The strings, logits (count, N, V + 1) and p(y | o) (count, S, 3), with one answer in ten
        drawn at random; answer 0 is the correct one.
    """
    strings = strings_of(every_string(2, 4), 2)
    generator = torch.Generator().manual_seed(seed)
    read = torch.randint(3, (count, len(strings.mask)), generator=generator)
    answers = 0.9 * torch.nn.functional.one_hot(read, 3).double() + 0.1 / 3
    return strings, random_logits(strings, count, generator), answers


def filler_worlds(count: int, seed: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """Worlds of talk: up to six symbols without information, then one of three answers.

    Every completion has the same information, so longer ones have less per token, and the premise
    of Corollary 4.2 holds. Returns the same as :func:`random_worlds`.
    """
    strings = strings_of([(3,) * m + (a,) for m in range(7) for a in range(3)], 4)
    answers = torch.eye(3, dtype=torch.float64).repeat(7, 1).expand(count, -1, -1)
    theta = random_logits(strings, count, torch.Generator().manual_seed(seed))
    theta[..., 3] += 2  # makes talk likely
    return strings, theta, answers


def clue_worlds(count: int, seed: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """Worlds of clues: the answer has four bits, every symbol gives one, and the rest is guessed.

    With even odds, m clues and the end-of-sequence token give m ln 2 nats in m + 1 tokens. Longer
    completions have more per token, so the premise fails. Returns the same as
    :func:`random_worlds`.
    """
    told = every_string(2, 4)
    answers = torch.tensor(
        [[float(leaf[: len(o)] == o) for leaf in every_string(2, 4, 4)] for o in told]
    ).double()
    answers = (answers / answers.sum(1, keepdim=True)).expand(count, -1, -1)
    strings = strings_of(told, 2)
    return strings, random_logits(strings, count, torch.Generator().manual_seed(seed)), answers


WORLDS = {"random": random_worlds, "filler": filler_worlds, "clue": clue_worlds}


def random_logits(strings: Strings, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, N, V + 1) fp64, normal with standard deviation 1."""
    size = (count, *strings.allowed.shape)
    return torch.randn(size, generator=generator, dtype=torch.float64)
