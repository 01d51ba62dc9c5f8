"""Finished runs in one small file, so that an experiment goes on where its runs are not at hand.

A run's folder holds weights and completions, some megabytes. What an experiment's results are made
of is a few kilobytes, and stands in

    figures/results/runs/<experiment>.jsonl   a line per run: {"name", "job", "result", "curve"}

``name`` is that of the run's folder, ``job`` is what the run was told (``lab.runs.make_jobs``),
``result`` its ``result.json`` and ``curve`` its length, accuracy and entropy by step. A run whose
line is there is not made again, on whatever machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CURVES = ("length", "accuracy", "entropy")
"""What is kept of every training step; more is in the run's own metrics.jsonl."""


def ledger_path(figures: Path, experiment: str) -> Path:
    """Where the finished runs of an experiment are kept."""
    return figures / "results" / "runs" / f"{experiment}.jsonl"


def read(path: Path | None) -> dict[str, dict[str, Any]]:
    """Name -> line of every finished run; of two lines with one name the later counts.

    Raises:
        ValueError: for a line that is no record, naming it.
    """
    if path is None or not path.is_file():
        return {}
    entries = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            entries[entry["name"]] = {part: entry[part] for part in ("job", "result", "curve")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of '{path}' is no record of a run; remove the line, and the run is "
                "made again."
            ) from error
    return entries


def append(path: Path, job: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Add a finished run: ``found`` has its ``result`` and ``curve``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Path(job["run"])
    told = {name: value for name, value in job.items() if name != "run"}
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"name": run.name, "job": told, **found}) + "\n")
        file.flush()
