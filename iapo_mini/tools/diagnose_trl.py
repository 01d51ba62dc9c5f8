"""Read a run of TRL's GRPOTrainer for ``diagnose``, with advice in TRL's names.

TRL writes its log to ``trainer_state.json`` in the run's folder and in every checkpoint. With
``log_completions=True`` it writes completions to ``completions/*.parquet``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iapo_mini.errors import first_line
from iapo_mini.files import read_json

STATE = "trainer_state.json"

NAMES = {
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "zero_variance_groups",
    "clip_ratio/region_mean": "clip_ratio",
    "reward": "reward",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "entropy": "entropy",
    "informativeness": "informativeness",
}
"""TRL's name of a metric -> our name."""

ARGUMENTS = {
    "kl_coef": "beta", "alpha and beta": "iapo_alpha and iapo_beta", "alpha": "iapo_alpha",
    "prompts_per_step": "prompts per generation batch",
}  # fmt: skip
"""Our name of a setting -> TRL's name, longest first; other names are the same."""

FORMAT = "format"
"""Word in the names of reward functions that judge the format."""


def state_of(run: Path) -> Path | None:
    """The newest ``trainer_state.json`` of a run, or None if there is none."""
    found = [path for path in (run / STATE, *run.glob(f"checkpoint-*/{STATE}")) if path.is_file()]
    return max(found, key=lambda path: (_step_of(path), path.parent == run), default=None)


def _step_of(state: Path) -> float:
    """The step of a state. One that is damaged counts as the last, so that this is reported."""
    try:
        return float(read_json(state, needs=("global_step",))["global_step"])
    except (ValueError, TypeError):
        return math.inf


def rows_of_trl(state: Path) -> list[dict[str, Any]]:
    """One mapping for each logged step, with our names and a ``step`` that counts from 1.

    Raises:
        ValueError: for a damaged file.
    """
    rows: list[dict[str, Any]] = []
    for entry in read_json(state, needs=("log_history",))["log_history"]:
        if not isinstance(entry, Mapping) or "reward" not in entry:
            continue  # the summary at the end, or an evaluation
        row = {ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry}
        judges = [n for n in entry if n.startswith("rewards/") and n.endswith("/mean")]
        formats = [entry[n] for n in judges if FORMAT in n.lower()]
        if formats:
            row["format_reward"] = formats[0]
        row["flat_rewards"] = sorted(
            name.split("/")[1] for name in judges if entry.get(name[:-4] + "std") == 0
        )
        rows.append({"step": len(rows) + 1, **row})
    return rows


def lines_of_trl(rows: list[dict[str, Any]]) -> list[bytes]:
    """The rows as lines of a log in our format."""
    numbers = [{k: v for k, v in row.items() if k != "flat_rewards"} for row in rows]
    return [json.dumps(row).encode() + b"\n" for row in numbers]


def flat_rewards(rows: list[dict[str, Any]], last: int) -> list[str]:
    """Reward functions that gave all completions equal rewards in each of the last steps."""
    ending = [set(row["flat_rewards"]) for row in rows[-last:]]
    return sorted(set.intersection(*ending)) if ending else []


def repeated(run: Path) -> float | None:
    """Share of the newest kept completions that equal another completion of the same prompt.

    Returns:
        The share, or None if no completions were kept.

    Raises:
        ValueError: for a damaged file.
    """
    files = sorted((run / "completions").glob("*.parquet"))
    if not files:
        return None
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(files[-1], columns=["prompt", "completion"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"run is '{run}', whose {files[-1].name} can't be read ({first_line(error)})."
        ) from error
    pairs = [json.dumps(row, sort_keys=True, default=str) for row in table.to_pylist()]
    return 1 - len(set(pairs)) / len(pairs) if pairs else None


def in_trl_names(advice: str) -> str:
    """Advice with TRL's names of the settings."""
    words = "|".join(ARGUMENTS)
    return re.sub(rf"\b(?:{words})\b", lambda found: ARGUMENTS[found[0]], advice)
