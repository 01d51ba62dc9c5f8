"""Worlds of completions that the theory is tried in: which there are, how the answer hangs on them.

Every function here draws many worlds of one kind: the completions are the same in all of them
(:class:`iapo_mini.lab.exact.Strings`), the policies, and with them the lengths, are random.
"""

from __future__ import annotations

import torch

from iapo_mini.lab.exact import Strings, every_string, strings_of


def random_worlds(count: int, seed: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """All strings of up to four of two symbols; the answer (of three) hangs on the whole string.

    What is told in all, H(y) - H(y | o), is the same for every completion (chain rule), so the
    premise of Corollary 4.2 holds here by itself.

    Returns:
        The strings, logits (count, N, V + 1) and p(y | o) (count, S, 3), one answer in ten drawn
        at random; answer 0 is the correct one.
    """
    strings = strings_of(every_string(2, 4), 2)
    generator = torch.Generator().manual_seed(seed)
    read = torch.randint(3, (count, len(strings.mask)), generator=generator)
    answers = 0.9 * torch.nn.functional.one_hot(read, 3).double() + 0.1 / 3
    return strings, random_logits(strings, count, generator), answers


def filler_worlds(count: int, seed: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """Talk, then the answer: up to six times a symbol that says nothing, then one of three answers.

    Every completion tells all there is to tell, so a longer one tells less per token: the premise
    of Corollary 4.2 holds. Returns as :func:`random_worlds`.
    """
    strings = strings_of([(3,) * m + (a,) for m in range(7) for a in range(3)], 4)
    answers = torch.eye(3, dtype=torch.float64).repeat(7, 1).expand(count, -1, -1)
    theta = random_logits(strings, count, torch.Generator().manual_seed(seed))
    theta[..., 3] += 2  # a talker
    return strings, theta, answers


def clue_worlds(count: int, seed: int) -> tuple[Strings, torch.Tensor, torch.Tensor]:
    """One clue or more: the answer has four bits, every symbol tells one, the rest is guessed.

    m clues and the end-of-sequence token tell m ln 2 nats in m + 1 tokens (with even odds), more
    per token the longer the completion: the premise fails. Returns as :func:`random_worlds`.
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
