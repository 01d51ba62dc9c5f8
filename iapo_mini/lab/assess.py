"""Judge a pretrained policy, as the last step of ``python -m iapo_mini.lab.pretrain``."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from iapo_mini.calibration import exit_calibration
from iapo_mini.files import write_json
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.metrics import logged
from iapo_mini.plots import reliability
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import chain_of_thought, stories, token_roles
from iapo_mini.rewards import parse_answer, score
from iapo_mini.sampling import from_texts, sample


def assess(
    folder: str | Path, figures: str | Path = "figures", n_stories: int = 1000
) -> dict[str, Any]:
    """Judge a pretrained policy on the test stream: its accuracy, and the calibration of its exits.

    Writes ``figures/results/policy.json`` and the reliability diagram ``figures/calibration.png``.
    Early answers are forced at every tenth of the chain. There are three calibration errors:

    * ``ece``: on chains written by the world, against the true answer;
    * ``ece_sampled``: on the policy's own samples, against the answer at the end of the completion,
      which is the y of the paper's I(y; o_t | q, o_<t) (without ill-formed completions);
    * ``ece_sampled_truth``: on the same samples against the true answer, which shows the effect of
      mistakes in a chain on the forced answer.

    ``*_by_tenth`` is the error at each tenth. Entropies are on the world's chains.

    Args:
        folder: folder of the policy, with the log of its pretraining.
        figures: folder for results and diagram.
        n_stories: number of stories of the test stream.

    Returns:
        The content of ``policy.json``: numbers, and lists with one number for each tenth.

    Raises:
        ValueError: when no policy can be loaded from ``folder``, or it holds no log.
    """
    folder, figures = Path(folder), Path(figures)
    log = [row for _, row in logged(folder / "pretrain_log.jsonl") if "minutes" in row]
    if not log:
        raise ValueError(f"folder must hold the log of pretraining, got '{folder}'")
    policy = load_policy(str(folder), lora_rank=0)
    problems = list(itertools.islice(stories("test", seed=0), n_stories))
    rng = random.Random("report")
    texts = ["".join(s.text for s in chain_of_thought(p, rng)) for p in problems]
    written = from_texts(policy, problems, texts)
    exits = exit_calibration(policy, written, [p.answer for p in problems])
    own = score(sample(policy, problems, num_generations=4, seed=0), policy.tokenizer, problems)
    ends = [parse_answer(text) for text in own.texts(policy.tokenizer)]
    whole = torch.tensor([answer is not None for answer in ends])
    own_exits = exit_calibration(policy, own, [answer or "0" for answer in ends])
    truth_exits = exit_calibration(policy, own, [p.answer for p in problems for _ in range(4)])
    own_exits = {name: values[whole] for name, values in own_exits.items()}
    roles: Counter[str] = Counter()
    for ids, mask in zip(own.completion_ids, own.completion_mask):
        roles.update(token_roles(policy.tokenizer, ids[mask].tolist()))

    def error(e: dict[str, torch.Tensor], at: int | slice = slice(None)) -> float:
        confidence, correct = e["confidence"][:, at], e["correct"][:, at]
        return expected_calibration_error(confidence.flatten(), correct.flatten())

    tenths = range(exits["entropy"].shape[1])
    result = {
        "ece": error(exits),
        "ece_by_tenth": [error(exits, t) for t in tenths],
        "ece_sampled": error(own_exits),
        "ece_sampled_by_tenth": [error(own_exits, t) for t in tenths],
        "ece_sampled_truth": error(truth_exits),
        "entropy_start_nats": float(exits["entropy"][:, 0].mean()),
        "entropy_end_nats": float(exits["entropy"][:, -1].mean()),
        "entropy_end_sampled_nats": float(own_exits["entropy"][:, -1].mean()),
        "accuracy": float(own.correct.float().mean()),
        "mean_length": float(own.lengths.float().mean()),
        "share_not_compute": 1 - roles["compute"] / sum(roles.values()),
        "megabytes": sum(f.stat().st_size for f in folder.iterdir()) / 1e6,
        "train_minutes": log[-1]["minutes"],
        "stories": n_stories,
    }
    write_json(figures / "results" / "policy.json", result)
    sets = {"world's chains, true answer": exits, "own chains, own final answer": own_exits}
    reliability(sets).savefig(figures / "calibration.png", dpi=150)
    return result
