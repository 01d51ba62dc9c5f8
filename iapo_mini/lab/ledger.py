"""A small file of finished runs, so an experiment can continue without the folders of its runs.

A run's folder holds weights and completions, a few megabytes. The part that an experiment's results
need is a few kilobytes, and is kept in

    figures/results/runs/<experiment>.jsonl   a line per run: {"name", "job", "result", "curve"}

``name`` is the name of the run's folder, ``job`` the job (``lab.runs.make_jobs``), ``result`` its
``result.json`` and ``curve`` its length, accuracy and entropy by step. A run that has a line is not
repeated on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iapo_mini.config import with_defaults
from iapo_mini.policies import EMBEDDED, SHIPPED
from iapo_mini.problems.datasets import fingerprint

CURVES = ("length", "accuracy", "entropy")
"""Metrics that are kept for every training step; the run's metrics.jsonl has more."""


def ledger_path(figures: Path, experiment: str) -> Path:
    """Path of the file with the finished runs of an experiment."""
    return figures / "results" / "runs" / f"{experiment}.jsonl"


def read(path: Path | None) -> dict[str, dict[str, Any]]:
    """Name -> record of every finished run; if a name occurs twice, the later record counts.

    Raises:
        ValueError: naming a line that is not a record.
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
                f"line {number} of '{path}' is not a record of a run; remove the line, and the run "
                "is repeated."
            ) from error
    return entries


def append(path: Path, job: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Add a finished run; ``found`` holds its ``result`` and ``curve``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Path(job["run"])
    told = {name: value for name, value in job.items() if name != "run"}
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"name": run.name, "job": told, **found}) + "\n")
        file.flush()


def content_of(start: str, *files: str) -> list[str]:
    """Fingerprints of a start policy that we do not ship, and of problems in files.

    A path says too little: another study may write another model or other problems to it.
    """
    weights = sorted(Path(start).glob("*.safetensors")) if start and start not in SHIPPED else []
    return [fingerprint(str(path)) for path in [*weights, *files] if str(path)]


def as_now(saved: dict, run: str) -> dict:
    """A saved job in the form that :func:`make_jobs` gives now.

    Its folder may have been moved, or may be named in another way.
    """
    config = saved["config"] and with_defaults(saved["config"])
    since_then = {
        "primary": 0, "on_the_way": [], "pools": [], "together": 16, "max_completion_length": 224,
    }  # fmt: skip
    evaluation = since_then | saved["evaluation"]
    since = {"start": EMBEDDED, "test_file": "", "content": []}
    return since | saved | {"run": run, "config": config, "evaluation": evaluation}


def is_of(entry: Mapping, job: Mapping) -> bool:
    """Whether a record of the ledger is of this job."""
    return as_now(entry["job"] | {"run": job["run"]}, job["run"]) == job
