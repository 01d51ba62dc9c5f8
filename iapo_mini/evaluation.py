"""Pass@k, Length@k and Ratio@k = Pass@k / Length@k (paper, Section 5), with intervals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from iapo_mini.policy import Policy
from iapo_mini.rewards import score
from iapo_mini.run_folder import replace_text
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem, messages


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased Pass@k of one problem: 1 - C(n - c, k) / C(n, k).

    Args:
        n: completions sampled; c: how many of them are correct; k: at most n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; allowed are 1 to n = {n}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    num_generations: int = 8,
    max_completion_length: int = 224,
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    save_to: str | Path | None = None,
) -> dict:
    """Sample completions for every problem and report the paper's three metrics.

    Args:
        policy: the policy to judge.
        problems: at least one problem.
        ks: values of k, each at most ``num_generations``.
        num_generations: completions per problem.
        max_completion_length: tokens at which a completion is cut.
        temperature: sampling temperature.
        batch_size: completions sampled at once.
        seed: sampling seed.
        progress: show a progress bar.
        save_to: JSONL file of the completions, written batch by batch. If it holds some already,
            made by this policy on these problems with these settings (kept beside it in
            ``*.settings.json``), sampling goes on after the last whole batch, to the same numbers:
            every batch has a seed of its own.

    Returns:
        ``{"pass@k", "length@k", "ratio@k" for each k, "length" (mean tokens of all completions),
        "problems", "intervals": {metric: [low, high]}, "completions": [{"problem", "text",
        "correct", "tokens"}, ...]}``. Pass@k is the unbiased estimator; Length@k is the mean length
        of the first k; Ratio@k is per token. Intervals are 95%, by bootstrap over the problems.

    Raises:
        ValueError: for an empty problem list, a k outside 1..num_generations, or completions in
            ``save_to`` that were made with other settings.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to evaluate.")
    for k in ks:
        if not 1 <= k <= num_generations:
            raise ValueError(f"k is {k}; allowed are 1 to num_generations = {num_generations}.")
    size = max(1, batch_size // num_generations)
    completions: list[dict] = []
    if save_to is not None:
        settings = {
            "num_generations": num_generations,
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "batch_size": batch_size,
            "seed": seed,
            "number of problems": len(problems),
            "fingerprint of the problems": _fingerprint_of_problems(problems),
            "fingerprint of the policy": _fingerprint_of_policy(policy),
        }
        whole = [min(start, len(problems)) for start in range(0, len(problems) + size, size)]
        completions = _restore(Path(save_to), settings, [n * num_generations for n in whole])
    done = len(completions) // num_generations
    bar = tqdm(
        total=len(problems), initial=done, desc="evaluate", unit="problem", disable=not progress
    )
    with bar, open(save_to, "a") if save_to is not None else contextlib.nullcontext() as log:
        for start in range(done, len(problems), size):
            part = list(problems[start : start + size])
            rollouts = sample(
                policy, part,
                num_generations=num_generations,
                max_completion_length=max_completion_length,
                temperature=temperature,
                seed=seed * 1_000_003 + start,
            )  # fmt: skip
            rollouts = score(rollouts, policy.tokenizer, part)
            texts, lengths = rollouts.texts(policy.tokenizer), rollouts.lengths.tolist()
            batch = [
                {
                    "problem": start + i // num_generations,
                    "text": text,
                    "correct": bool(rollouts.correct[i]),
                    "tokens": lengths[i],
                }
                for i, text in enumerate(texts)
            ]
            completions += batch
            if log is not None:
                log.write("".join(json.dumps(completion) + "\n" for completion in batch))
                log.flush()
            bar.update(len(part))
    right = torch.tensor([c["correct"] for c in completions]).view(len(problems), -1)
    tokens = torch.tensor([c["tokens"] for c in completions], dtype=torch.float64)
    tokens = tokens.view(len(problems), -1)
    # One bootstrap of the problems serves all metrics, so their intervals belong together.
    generator = torch.Generator().manual_seed(0)
    resample = torch.randint(len(problems), (1000, len(problems)), generator=generator)
    result: dict = {"problems": len(problems), "intervals": {}}

    def report(name: str, top: torch.Tensor, bottom: torch.Tensor | None = None) -> None:
        bottom = torch.ones_like(top) if bottom is None else bottom
        result[name] = float(top.mean() / bottom.mean())
        draws = top[resample].mean(1) / bottom[resample].mean(1)
        quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
        result["intervals"][name] = torch.quantile(draws, quantiles).tolist()

    report("length", tokens.mean(1))
    for k in ks:
        passed = torch.tensor(
            [pass_at_k(num_generations, int(c), k) for c in right.sum(1)], dtype=torch.float64
        )
        length = tokens[:, :k].mean(1)
        report(f"pass@{k}", passed)
        report(f"length@{k}", length)
        report(f"ratio@{k}", passed, length)
    result["completions"] = completions
    return result


def _restore(path: Path, settings: dict, sizes: Sequence[int]) -> list[dict]:
    """Completions of the whole batches in a file; a batch that a kill cut short is dropped.

    ``sizes``: how many completions there are after 0, 1, 2, ... batches.
    """
    saved = path.with_suffix(".settings.json")
    found: list[dict] = []
    if path.is_file() and path.stat().st_size:
        before = json.loads(saved.read_text()) if saved.is_file() else {}
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}, but the completions in '{path}' were made with "
                    f"{before.get(name)!r}; go on with the same settings or name another file."
                )
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut short
                found.append(json.loads(line))
        found = found[: max(n for n in sizes if n <= len(found))]
    replace_text(saved, json.dumps(settings, indent=1) + "\n")
    replace_text(path, "".join(json.dumps(completion) + "\n" for completion in found))
    return found


def _fingerprint_of_problems(problems: Sequence[Problem]) -> str:
    told = json.dumps([[messages(problem), problem.answer] for problem in problems])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _fingerprint_of_policy(policy: Policy) -> str:
    """Of a thousand values of every weight: training changes them all, reading all takes long."""
    digest = hashlib.sha256()
    for name, weight in policy.model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
