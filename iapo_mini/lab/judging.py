"""Judging the policy of a run: the reported evaluation, and shorter ones during training."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from iapo_mini.evaluation import evaluate
from iapo_mini.files import write_json
from iapo_mini.lab.sizes import WAY_PROBLEMS
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.datasets import ALL, load_problems
from iapo_mini.problems.stories import ROLES, stories, token_roles
from iapo_mini.tasks import Problem

PRIMARY = "primary"
"""Folder of a run with the adapter of the reported step, if training continues after it."""

_WAY_BATCH = 512
"""Completions that are sampled at once during training."""

SHOWN = 12
"""Number of stories for which a run's result keeps one right completion, for display."""
SHOWN_OPERATIONS = 4
"""Smallest number of operations of such a story."""


def way_path(run: Path, step: int) -> Path:
    """File with the results after this step."""
    return run / f"step-{step}.json"


def judge_on_the_way(policy: Policy, job: Mapping, step: int) -> None:
    """Write length and Pass@1 after a step to ``step-<n>.json``, unless the file exists.

    With pools it also holds ``{"right", "tokens"}`` for each stream: G numbers for each story.
    """
    path, pools = way_path(Path(job["run"]), step), job["evaluation"]["pools"]
    if path.is_file():
        return
    group = job["evaluation"]["num_generations"] if pools else 8
    longest = job["evaluation"]["max_completion_length"]
    found = {
        split: evaluate(
            policy, list(itertools.islice(stories(split, seed=0), n)),
            ks=(1,), num_generations=group, seed=job["seed"], progress=False,
            max_completion_length=longest, batch_size=_WAY_BATCH,
        )
        for split, n in pools or [(job["split"], min(WAY_PROBLEMS, job["evaluation"]["problems"]))]
    }  # fmt: skip
    result = {metric: found[job["split"]][metric] for metric in ("length", "pass@1")}
    if pools:
        result["pools"] = {split: _by_story(row["completions"]) for split, row in found.items()}
    write_json(path, result)


def _by_story(completions: Sequence[Mapping]) -> dict[str, list[list[int]]]:
    rows: dict[str, dict[int, list[int]]] = {
        "right": defaultdict(list), "tokens": defaultdict(list),
    }  # fmt: skip
    for completion in completions:
        rows["right"][completion["problem"]].append(int(completion["correct"]))
        rows["tokens"][completion["problem"]].append(completion["tokens"])
    return {name: list(row.values()) for name, row in rows.items()}


def problems_of(job: Mapping) -> list[Problem]:
    """The problems on which a job's policy is judged: those of its test file, or else stories."""
    count = job["evaluation"]["problems"]
    if job["test_file"]:
        return load_problems("gsm8k", ALL, job["test_file"])[:count]
    return list(itertools.islice(stories(job["split"], seed=0), count))


def judge(policy: Policy, job: Mapping) -> None:
    """Make the reported evaluation; write result.json (start policy) or primary.json (others)."""
    run, size = Path(job["run"]), job["evaluation"]
    path = run / ("result.json" if job["config"] is None else "primary.json")
    if path.is_file():
        return
    problems = problems_of(job)
    result = evaluate(
        policy, problems,
        ks=size["ks"], num_generations=size["num_generations"], seed=job["seed"], progress=False,
        max_completion_length=size["max_completion_length"],
        batch_size=size["together"] * size["num_generations"], save_to=run / "completions.jsonl",
    )  # fmt: skip
    completions = result.pop("completions")
    counts: Counter[str] = Counter()
    by_steps: dict[int, list[dict]] = defaultdict(list)
    for completion in completions:
        ids = policy.tokenizer.encode(completion["text"], add_special_tokens=False)
        counts.update(token_roles(policy.tokenizer, ids))
        by_steps[len(problems[completion["problem"]].steps)].append(completion)
    result["roles"] = {
        role: counts[role] / len(completions) for role in (*ROLES, "format", "other")
    }
    result["by_steps"] = {
        str(steps): {
            "accuracy": sum(c["correct"] for c in some) / len(some),
            "length": sum(c["tokens"] for c in some) / len(some),
        }
        for steps, some in sorted(by_steps.items())
    }
    long = [i for i, problem in enumerate(problems) if len(problem.steps) >= SHOWN_OPERATIONS]
    result["answers"] = _answers(completions, long[:SHOWN])
    if job["config"] is None:
        result |= {"on_the_way": {}, "train_minutes": 0.0}
    write_json(path, result)


def _answers(completions: Sequence[Mapping], problems: Sequence[int]) -> dict[str, str]:
    """Problem -> its right completion of median length, for problems with a right completion."""
    answers = {}
    for asked in problems:
        right = [c for c in completions if c["problem"] == asked and c["correct"]]
        if right:
            right.sort(key=lambda c: c["tokens"])
            answers[str(asked)] = right[len(right) // 2]["text"]
    return answers


def policy_of(job: Mapping) -> Policy:
    """Load the policy that a finished job reports on; its folder must exist."""
    if job["config"] is None:
        return load_policy(job["start"], lora_rank=0)
    run = Path(job["run"])
    kept = run / PRIMARY
    return load_policy(adapter=kept if kept.is_dir() else run / "train" / "final", lora_rank=0)
