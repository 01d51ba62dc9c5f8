"""Evaluation during training, on problems that are neither trained on nor reported.

Every ``eval_every`` steps the policy answers problems of the *tune* stream. The result is a line of
``evaluations.jsonl``, the best policy so far is kept in ``best/``, and training can stop when it no
longer improves. If the best checkpoint were chosen on the reported problems, its numbers would be
too good (docs/how_it_was_measured.md).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iapo_mini.evaluation import evaluate
from iapo_mini.files import replace_folder, replace_text, write_json
from iapo_mini.metrics import logged
from iapo_mini.problems.datasets import load_problems
from iapo_mini.problems.stories import stories
from iapo_mini.run_folder import writing

if TYPE_CHECKING:
    from iapo_mini.config import TrainConfig
    from iapo_mini.policy import Policy
    from iapo_mini.tasks import Problem

EVALUATIONS = "evaluations.jsonl"
"""Name of the file in a run's folder: a line of JSON for each evaluation."""
BEST = "best"
"""Folder of the best policy so far, with ``evaluation.json`` beside its weights."""
STREAM = "tune"
GROUP = 4
"""Number of completions of each problem."""


def held_out_problems(config: TrainConfig) -> list[Problem]:
    """The problems on which a run is evaluated; empty if ``eval_every`` is 0.

    Raises:
        ValueError: when the run trains on the same stream, or its data has too few problems.
    """
    if config.eval_every == 0:
        return []
    if config.split in (STREAM, "all"):
        raise ValueError(
            f"split must be train or test with eval_every, got '{config.split}': the policy is "
            f"judged on the {STREAM} stream, which it must not be trained on"
        )
    if config.data == "stories":
        return list(itertools.islice(stories(STREAM), config.eval_problems))
    try:
        problems = load_problems(config.data, STREAM, config.data_file)
    except ValueError as error:
        raise ValueError(
            f"eval_every must be 0 if the {STREAM} stream can't be read: {error}"
        ) from error
    if len(problems) < config.eval_problems:
        raise ValueError(
            f"eval_problems must be at most {len(problems)}, the {STREAM} stream of {config.data}, "
            f"got {config.eval_problems}"
        )
    return problems[: config.eval_problems]


def better(found: Mapping[str, Any], than: Mapping[str, Any] | None, by: str) -> bool:
    """Whether an evaluation is better than another one; equal ones are not."""
    if than is None:
        return True
    sign = -1 if by == "length" else 1
    return sign * found[by] > sign * than[by]


def exhausted(rows: Sequence[Mapping[str, Any]], by: str, patience: int) -> bool:
    """Whether none of the last ``patience`` evaluations is the best so far; False if it is 0."""
    if patience == 0 or len(rows) <= patience:
        return False
    best = None
    for row in rows[:-patience]:
        best = row if better(row, best, by) else best
    return not any(better(row, best, by) for row in rows[-patience:])


class HeldOut:
    """The evaluations of one run; a resumed run continues them.

    Args:
        folder: folder of the run.
        config: settings of the run.
        problems: from :func:`held_out_problems`.
        done: number of steps that the run has already made. Later lines are dropped, because those
            steps and their evaluations are repeated with the same numbers.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, problems: list[Problem], done: int
    ) -> None:
        self.folder, self.config, self.problems = folder, config, problems
        path = folder / EVALUATIONS
        kept = [(line, row) for line, row in logged(path) if row["step"] <= done]
        self.rows = [row for _, row in kept]
        if path.is_file():
            with writing(folder):
                replace_text(path, "".join(line + "\n" for line, _ in kept))

    @property
    def ended(self) -> bool:
        """Whether training should stop."""
        return exhausted(self.rows, self.config.best_by, self.config.patience)

    def __call__(self, step: int, policy: Policy) -> dict[str, Any] | None:
        """Evaluate after this step if due; keep the result, and the policy if it is the best."""
        if self.config.eval_every == 0 or step % self.config.eval_every:
            return None
        found = evaluate(
            policy, self.problems, ks=(1,), num_generations=GROUP, seed=self.config.seed,
            max_completion_length=self.config.max_completion_length,
            temperature=self.config.temperature, progress=False,
        )  # fmt: skip
        row = {"step": step} | {name: found[name] for name in ("pass@1", "length", "ratio@1")}
        best = None
        for before in self.rows:
            best = before if better(before, best, self.config.best_by) else best
        if better(row, best, self.config.best_by):

            def write(folder: Path) -> None:
                policy.save(folder)
                write_json(folder / "evaluation.json", row)

            with writing(self.folder):
                replace_folder(self.folder / BEST, write)
        self.rows.append(row)
        log = self.folder / EVALUATIONS
        with writing(self.folder), log.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
        return row
