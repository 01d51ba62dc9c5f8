"""Study of the estimators of information, against the ground truth of the story world.

The world writes its chains of thought itself, so two facts are known that no benchmark of real text
has: which tokens compute, and how far the posterior of the answer really falls at each step
(:mod:`iapo_mini.lab.exact`). :func:`estimator_study` compares every estimator with both. It does so
for four policies: the embedded policy, whose early exits were trained along with its chains; the
same after calibration; a policy trained on whole chains only; and that one after calibration.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from iapo_mini import plots
from iapo_mini.calibration import calibrate, calibration, exit_calibration
from iapo_mini.chat import token_texts
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.files import read_json, versions, write_json
from iapo_mini.information import (
    answer_entropies,
    answer_surprisals,
    belief_shift,
    candidate_logprobs,
    informativeness,
    next_token_informativeness,
)
from iapo_mini.intervals import auc, bootstrap_interval, expected_calibration_error, spearman
from iapo_mini.lab.exact import true_drops
from iapo_mini.lab.figures import estimators as drawn
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policies import EMBEDDED, EMBEDDED_CALIBRATED, EMBEDDED_UNCALIBRATED
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import MAX_VALUE, Segment, chain_of_thought, stories
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import from_texts
from iapo_mini.tasks import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POLICIES = ("calibrated", "embedded", "uncalibrated", "recalibrated")
"""The embedded policy after ``calibrate`` (shipped) and before; and the policy trained on whole
chains only, before ``calibrate`` and after it (calibrated here)."""

_MODELS = {
    "calibrated": EMBEDDED_CALIBRATED, "embedded": EMBEDDED, "uncalibrated": EMBEDDED_UNCALIBRATED,
}  # fmt: skip

ESTIMATORS = ("entropy", "pmi", "candidates", "belief_shift", "next_token")


def token_segments(
    tokenizer: PreTrainedTokenizerBase, segments: list[Segment], ids: list[int]
) -> list[int]:
    """Number of the segment in which each token begins; tokens after the text get the last one."""
    ends = list(itertools.accumulate(len(s.text) for s in segments))
    out, position, current = [], 0, 0
    for text in token_texts(tokenizer, ids):
        while current < len(ends) - 1 and position >= ends[current]:
            current += 1
        out.append(current)
        position += len(text)
    return out


def token_scores(
    policy: Policy, problems: list[Problem], chains: list[list[Segment]]
) -> tuple[Rollouts, dict[str, np.ndarray]]:
    """Values in nats of every estimator for every token of the given chains, each (N, L)."""
    rollouts = from_texts(policy, problems, ["".join(s.text for s in c) for c in chains])
    mask = rollouts.completion_mask
    answers = [f" {n}" for n in range(MAX_VALUE + 1)]
    beliefs = candidate_logprobs(policy, rollouts, answers)
    with torch.no_grad():
        _, following = token_logprobs(policy.for_inference(), rollouts)
    scores = {
        "entropy": informativeness(answer_entropies(policy, rollouts), mask),
        "pmi": informativeness(
            answer_surprisals(policy, rollouts, [f" {p.answer}" for p in problems]), mask
        ),
        "candidates": informativeness(logits_entropy(beliefs), mask),
        "belief_shift": belief_shift(beliefs, mask),
        "next_token": next_token_informativeness(following, mask),
    }
    return rollouts, {name: value.double().cpu().numpy() for name, value in scores.items()}


def judge(policy: Policy, problems: list[Problem], chains: list[list[Segment]]) -> dict:
    """AUC for compute tokens and rank correlation with the exact posterior, by estimator.

    Tokens of the answer and its tags are left out, because an estimator should distinguish
    computing from talk. ``sentence`` spreads the sum of a segment evenly over its tokens (as
    ``stride="sentence"`` does), and ``token`` uses every token by itself.

    Returns:
        ``auc`` and ``auc_token``: estimator -> ``[value, low, high]``; ``auc_by_steps``: number of
        operations -> estimator -> value; ``spearman``: estimator -> ``[value, low, high]`` between
        segment sums and the true drops.
    """
    rollouts, scores = token_scores(policy, problems, chains)
    names = ("role", "steps", *scores, *(f"{n}/sentence" for n in scores))
    whole: dict[str, list] = {name: [] for name in names}
    segment_sums: dict[str, list] = {name: [] for name in ("true", *scores)}
    for i, (problem, chain) in enumerate(zip(problems, chains)):
        n = int(rollouts.lengths[i])
        index = np.array(
            token_segments(policy.tokenizer, chain, rollouts.completion_ids[i, :n].tolist())
        )
        talk = np.array([s.role != "format" for s in chain])
        counts = np.bincount(index, minlength=len(chain))
        kept = talk[index]
        whole["role"].append(np.array([s.role == "compute" for s in chain])[index][kept])
        whole["steps"].append(len(problem.steps))
        segment_sums["true"].append(np.array(true_drops(problem, chain))[talk])
        for name, values in scores.items():
            sums = np.bincount(index, weights=values[i, :n], minlength=len(chain))
            whole[name].append(values[i, :n][kept])
            whole[f"{name}/sentence"].append((sums / counts.clip(1))[index][kept])
            segment_sums[name].append(sums[talk])
    pairs = {name: list(zip(whole[name], whole["role"])) for name in whole}
    steps = sorted(set(whole["steps"]))
    return {
        "auc": {n: bootstrap_interval(auc, pairs[f"{n}/sentence"]) for n in scores},
        "auc_token": {n: bootstrap_interval(auc, pairs[n]) for n in scores},
        "auc_by_steps": {
            str(k): {
                n: auc(*(np.concatenate(x) for x in zip(*itertools.compress(
                    pairs[f"{n}/sentence"], [s == k for s in whole["steps"]]))))
                for n in scores
            }
            for k in steps
        },
        "spearman": {
            n: bootstrap_interval(spearman, list(zip(segment_sums[n], segment_sums["true"])))
            for n in scores
        },
    }  # fmt: skip


def ceiling(problems: list[Problem], chains: list[list[Segment]]) -> dict:
    """AUC for the entropy drop of the exact posterior, overall and by number of operations.

    The posterior is that of a reader who follows the chain and does not look ahead."""
    groups, steps = [], []
    for problem, chain in zip(problems, chains):
        talk = [s for s in chain if s.role != "format"]
        drops = [d for d, s in zip(true_drops(problem, chain), chain) if s.role != "format"]
        words = [len(s.text.split()) for s in talk]
        values = np.repeat(np.array(drops) / np.array(words), words)
        groups.append((values, np.repeat(np.array([s.role == "compute" for s in talk]), words)))
        steps.append(len(problem.steps))
    by_steps = {
        str(k): auc(*(np.concatenate(x) for x in zip(*itertools.compress(
            groups, [s == k for s in steps]))))
        for k in sorted(set(steps))
    }  # fmt: skip
    return {"auc": bootstrap_interval(auc, groups), "by_steps": by_steps}


def estimator_study(figures: str | Path = "figures", n_stories: int = 300) -> dict:
    """Judge all estimators on the test stream; write results and figures.

    Adds ``auc`` and the other parts of this study to ``results/estimator.json``, keeps the speed
    ratios that ``benchmarks/estimator.py`` has written there, and draws ``estimator_*.png``.
    """
    figures = Path(figures)
    path = figures / "results" / "estimator.json"
    results = read_json(path, {})
    problems = list(itertools.islice(stories("test", seed=3), n_stories))
    rng = random.Random("estimator")
    chains = [chain_of_thought(p, rng) for p in problems]
    sections = ("auc", "auc_token", "auc_by_steps", "spearman", "ece", "ece_own", "entropy_nats")
    results |= {name: {} for name in sections}
    exits = {}
    for name in tqdm(POLICIES, desc="policies", unit="policy"):
        if name == "recalibrated":
            policy = load_policy(EMBEDDED_UNCALIBRATED, lora_rank=64)
            calibrate(policy, stories("train", seed=11))
        else:
            policy = load_policy(_MODELS[name], lora_rank=0)
        for section, values in judge(policy, problems, chains).items():
            results[section][name] = values
        texts = ["".join(s.text for s in c) for c in chains]
        written = from_texts(policy, problems, texts)
        exits[name] = exit_calibration(policy, written, [p.answer for p in problems])
        results["ece"][name] = expected_calibration_error(
            exits[name]["confidence"].flatten(), exits[name]["correct"].flatten()
        )
        results["ece_own"][name] = calibration(policy, problems).ece
        results["entropy_nats"][name] = exits[name]["entropy"].mean(0).tolist()
    results["ceiling"] = ceiling(problems, chains)
    results["stories"] = n_stories
    results["versions"] = versions()
    write_json(path, results)
    draw(results, figures)
    plots.reliability(exits).savefig(figures / "estimator_calibration.png", dpi=150)
    return results


def draw(results: dict, figures: Path) -> None:
    """Draw every figure that needs only ``results/estimator.json``."""
    drawn.estimator_auc(results).savefig(figures / "estimator_auc.png", dpi=150)
    drawn.estimator_steps(results).savefig(figures / "estimator_steps.png", dpi=150)
    if "growth" in results:
        drawn.estimator_growth(results["growth"]).savefig(figures / "estimator_growth.png", dpi=150)
    if "tiny" in results and "qwen05b" in results:
        drawn.estimator_speed(results).savefig(figures / "estimator_speed.png", dpi=150)


def _cell(values: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def study_table(results: dict) -> str:
    """Markdown table of AUC and rank correlation for every estimator and policy."""
    head = [*(f"AUC, {p}" for p in POLICIES), "rank correlation, calibrated"]
    lines = ["| estimator | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in ESTIMATORS:
        cells = [_cell(results["auc"][p][name]) for p in POLICIES]
        cells.append(_cell(results["spearman"]["calibrated"][name]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(results: dict) -> str:
    """Markdown table of the ratios of ``benchmarks/estimator.py``."""
    rows = {
        "packed_over_cached_time": "packed over the authors' way, time",
        "packed_over_cached_memory": "packed over the authors' way, extra memory",
        "packed_over_forward_time": "packed over one padded forward of as many tokens, time",
        "iapo_step_over_grpo_step": "training step, IAPO over GRPO",
    }
    lines = ["| ratio | embedded policy | Qwen2.5-0.5B shape |", "|---|---|---|"]
    for key, label in rows.items():
        lines.append(f"| {label} | {results['tiny'][key]:.2f} | {results['qwen05b'][key]:.2f} |")
    return "\n".join(lines)
