"""Places of the tokens of a block of completions in the flat lists of packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iapo_mini.rollouts import Rollouts


@dataclass
class Row:
    """Places of one completion in the flat lists.

    Attributes:
        number: its row in the rollouts.
        start: number of tokens of its prompt.
        length: number of tokens of prompt and completion.
        prompt, completion: slices of the trunk tokens; empty when keys and values are known.
        branches: slice of the branches.
        asked: (b,) long, the prefix lengths after which this row has a branch.
    """

    number: int
    start: int
    length: int
    prompt: slice
    completion: slice
    branches: slice
    asked: torch.Tensor


def lay_out(
    rollouts: Rollouts, rows: list[int], asked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[slice], list[Row]]:
    """Ids and positions of the trunk tokens to run, slices of the prompts, a ``Row`` per row."""
    layout, prompts = [], {}
    nothing = rollouts.completion_ids.new_empty(0)
    ids, positions = [nothing], [nothing]
    at = branch = 0

    def run(tokens: torch.Tensor, first: int) -> slice:
        nonlocal at
        if rollouts.cache is not None:
            return slice(0, 0)
        ids.append(tokens)
        positions.append(torch.arange(first, first + len(tokens), device=tokens.device))
        at += len(tokens)
        return slice(at - len(tokens), at)

    for i in rows:
        group = i // rollouts.num_generations
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        if group not in prompts:  # each prompt is run once
            prompts[group] = run(prompt, 0)
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        prefixes = asked[i].nonzero()[:, 0]
        layout.append(
            Row(
                number=i,
                start=len(prompt),
                length=len(prompt) + len(completion),
                prompt=prompts[group],
                completion=run(completion, len(prompt)),
                branches=slice(branch, branch + len(prefixes)),
                asked=prefixes,
            )
        )
        branch += len(prefixes)
    return torch.cat(ids), torch.cat(positions), list(prompts.values()), layout
