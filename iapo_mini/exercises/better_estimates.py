"""Cases for notebook 04b."""

from __future__ import annotations

import torch

from iapo_mini.tools.course import Case


def shifts(seed: int = 0) -> list[Case]:
    """Beliefs over 2 to 5 answers, after 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for tokens, answers in ((1, 4), (6, 2), (3, 5)):
        log_p = (2 * torch.randn(tokens + 1, answers, generator=generator).double()).log_softmax(-1)
        after, before = torch.distributions.Categorical(logits=log_p[1:]), log_p[:-1]
        moved = torch.distributions.kl_divergence(
            after, torch.distributions.Categorical(logits=before)
        )
        cases.append(((log_p,), moved))
    return cases


def hidden_by_first_digit(seed: int = 0) -> list[Case]:
    """Distributions over numbers of one, two and three digits."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for size in (10, 37, 140):
        p = torch.rand(size, generator=generator).double() ** 3
        p = p / p.sum()
        # The chain rule: the mean entropy within the numbers that share a first digit.
        within = 0.0
        for digit in "0123456789":
            inside = p[[str(number)[0] == digit for number in range(size)]]
            if inside.numel():
                own = torch.distributions.Categorical(inside / inside.sum()).entropy()
                within += float(inside.sum() * own)
        cases.append(((p,), within))
    return cases


def drift(seed: int = 0) -> list[Case]:
    """Beliefs of few and many chains over 2 to 6 answers, at 2 to 5 exits."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[Case] = []
    for chains, exits, answers in ((3, 4, 2), (1, 2, 5), (8, 5, 6)):
        beliefs = (2 * torch.randn(chains, exits, answers, generator=generator).double()).softmax(2)
        changes = []
        for j in range(exits - 1):
            gone = 0.0
            for now, then in zip(beliefs[:, j].tolist(), beliefs[:, j + 1].tolist()):
                guess = now.index(max(now))
                gone += then[guess] - now[guess]
            changes.append(gone / chains)
        cases.append(((beliefs,), changes))
    return cases


def share_of_truth(seed: int = 0) -> list[Case]:
    """Few and many exits; the truth's part is followed from the last exit to the first."""
    del seed  # nothing is drawn
    cases: list[Case] = []
    for exits, weight in ((4, 0.3), (1, 0.6), (7, 0.05), (3, 1.0)):
        shares = [1.0]
        for _ in range(exits - 1):
            shares.insert(0, weight * shares[0])  # the other part is the next forecast's
        cases.append(((exits, weight), shares))
    return cases
