"""Plain re-computations that the tests compare the library with. Slow and simple on purpose."""

import torch

from iapo_mini.rollouts import Rollouts
from iapo_mini.tasks import Problem

TRIVIAL = [
    Problem("How many sides has a pentagon?", "5"),
    Problem("How many fingers are on one hand?", "5"),
]


def redraw(model, seed=0):
    """Draw new weights, so large that mistakes in masks and positions show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                std = 0.4 if "embed" in name or "lm_head" in name else 0.15
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return model.eval()


def perturb_lora(policy, seed=1, scale=0.1):
    """Make the adapter matter: a new adapter has lora_B = 0 and changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if "lora_B" in name:
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return policy


def make_rollouts(prompts, completions, group, vocabulary=800, pad=0, seed=0, left=0, right=0):
    """Rollouts of random tokens.

    ``prompts``: length of each group's prompt; ``completions``: length of each row. ``left`` and
    ``right`` add that many columns of padding on top of what raggedness needs; the tokens are the
    same whatever the padding.
    """
    assert len(completions) == group * len(prompts)
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(1, vocabulary, (n,), generator=generator)

    p, c = max(prompts) + left, max(1, *completions) + right
    rows = len(completions)
    prompt_ids, completion_ids = torch.full((rows, p), pad), torch.full((rows, c), pad)
    prompt_mask = torch.zeros(rows, p, dtype=torch.bool)
    completion_mask = torch.zeros(rows, c, dtype=torch.bool)
    for j, n in enumerate(prompts):
        tokens = draw(n)
        for i in range(j * group, (j + 1) * group):
            prompt_ids[i, p - n :] = tokens
            prompt_mask[i, p - n :] = True
    for i, n in enumerate(completions):
        completion_ids[i, :n] = draw(n)
        completion_mask[i, :n] = True
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        old_logprobs=-torch.rand(rows, c, generator=generator) * completion_mask,
        num_generations=group,
        finished=torch.ones(rows, dtype=torch.bool),
    )


def unpadded(rollouts, i):
    """Prompt and completion of row i without padding."""
    prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
    return prompt, rollouts.completion_ids[i][rollouts.completion_mask[i]]


def plain_log_softmax(model, rollouts, i, temperature=1.0):
    """(length, V) log-probabilities of row i by one forward pass on its own, nothing padded."""
    prompt, completion = unpadded(rollouts, i)
    logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)


def plain_logprobs(model, rollouts, temperature=1.0):
    """(B, L) log-probabilities of the completion tokens, row by row; 0 at padding."""
    rows = []
    for i in range(len(rollouts.completion_ids)):
        completion = unpadded(rollouts, i)[1]
        log_p = plain_log_softmax(model, rollouts, i, temperature)
        chosen = log_p.gather(1, completion[:, None])[:, 0]
        pad = rollouts.completion_ids.shape[1] - len(completion)
        rows.append(torch.nn.functional.pad(chosen, (0, pad)))
    return torch.stack(rows)
