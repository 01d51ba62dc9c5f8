"""Measure what it costs to watch a run: reporting, keeping completions, evaluating on the way.

    python benchmarks/watching.py             # three minutes; embedded policy, CPU, one thread
    python benchmarks/watching.py --check     # judge the committed results without measuring

Every turn makes a training step of IAPO, writes the completions of such a step as Parquet, reports
its metrics to TensorBoard, and makes a held-out evaluation of the usual size. Medians of the
processor time over the turns are compared, which other programs on the machine hardly change. A
difference of a few per cent between runs with and without a part would be lost in the variation of
their steps, so each part is timed on its own.

Writes figures/results/watching.json: "share" of each part in a step, for reporting and keeping at
every step, and for an evaluation at every tenth and every fiftieth step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iapo_mini.advantages import iapo
from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.engines.reporting import reporters
from iapo_mini.files import versions, write_json
from iapo_mini.held_out import HeldOut, held_out_problems
from iapo_mini.information import inform
from iapo_mini.kept_completions import keep
from iapo_mini.problems.stories import stories
from iapo_mini.rewards import score
from iapo_mini.sampling import sample
from iapo_mini.trainer import start_policy, train

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "watching.json"
LIMIT = 0.03
"""Largest share of a step that reporting and keeping at every step may cost together."""


def timed(work: Callable[..., object], *args: Any, **options: Any) -> float:
    """Processor seconds of a call of ``work`` with these arguments."""
    began = time.process_time()
    work(*args, **options)
    return time.process_time() - began


def measured(turns: int, prompts: int, problems: int, limit: int) -> dict[str, list[float]]:
    """Processor seconds of a step and of each part, one for each turn after an untimed one.

    Args:
        turns: timed turns.
        prompts: prompts of a step, eight completions each.
        problems: problems of an evaluation, four completions each.
        limit: length limit in tokens.
    """
    seconds: dict[str, list[float]] = {"step": [], "report": [], "keep": [], "evaluate": []}
    config = TrainConfig(
        method="iapo", max_steps=1, prompts_per_step=prompts, max_completion_length=limit,
        threads=1, eval_every=1, eval_problems=problems,
    )  # fmt: skip
    policy, recipe = start_policy(config), config.recipe()
    asked = list(itertools.islice(stories("train"), prompts))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (report,) = reporters(["tensorboard"], root / "board", config.settings())
        judge = HeldOut(root, config, held_out_problems(config), 0)
        drawn = sample(policy, asked, max_completion_length=limit)
        rollouts = inform(
            policy, score(drawn, policy.tokenizer, asked), recipe.information,
            config.early_exit(),
        )  # fmt: skip
        weights = iapo(rollouts, recipe.alpha, recipe.beta)
        lines: list[dict] = []
        one = TrainConfig(**config.settings() | {"eval_every": 0})
        for turn in range(turns + 1):
            fresh = start_policy(one)
            told = [Callback(on_step=lines.append)]
            made = timed(
                train, one, root / f"run-{turn}", policy=fresh, progress=False, callbacks=told
            )
            seconds["step"].append(made)
            seconds["report"].append(timed(report.on_step, lines[-1]))
            kept = timed(keep, root, turn + 1, rollouts, weights, policy.tokenizer)
            seconds["keep"].append(kept)
            seconds["evaluate"].append(timed(judge, turn + 1, policy))
        report.on_end()
    return {name: values[1:] for name, values in seconds.items()}


def shares(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Part -> its share of a step, by medians."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "report": median["report"] / median["step"],
        "keep": median["keep"] / median["step"],
        "evaluate every 10 steps": median["evaluate"] / median["step"] / 10,
        "evaluate every 50 steps": median["evaluate"] / median["step"] / 50,
    }


def main() -> None:
    """Measure, write and judge the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=9, help="timed turns (%(default)s)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts per step (%(default)s)")
    parser.add_argument("--problems", type=int, default=64, help="of an evaluation (%(default)s)")
    parser.add_argument("--limit", type=int, default=224, help="length limit, tokens (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results (%(default)s)")
    parser.add_argument("--check", action="store_true", help="judge the committed results only")
    options = parser.parse_args()
    if options.check and not options.out.is_file():
        parser.error(f"out is '{options.out}', where there are no results to check")
    if not options.check:
        torch.set_num_threads(1)
        sizes = {name: getattr(options, name) for name in ("prompts", "problems", "limit")}
        seconds = measured(options.turns, **sizes)
        write_json(
            options.out,
            {"share": shares(seconds), "seconds": seconds, "settings": sizes | {"threads": 1},
             "versions": versions()},
        )  # fmt: skip
    share = json.loads(options.out.read_text(encoding="utf-8"))["share"]
    for name, value in share.items():
        print(f"{name}: {value:.2%} of a step")
    if share["report"] + share["keep"] > LIMIT:
        sys.exit(f"Reporting and keeping cost more than {LIMIT:.0%} of a step.")


if __name__ == "__main__":
    main()
