"""What an unfinished study of real training says so far: ``lab real-training --so-far``.

All rows of a seed see the same prompts at the same step. So a row is compared with GRPO step by
step, and prompts that happen to be hard, which make every curve jump, cancel out. The comparison is
over the last :data:`WINDOW` steps that every run has made. Its interval is over these steps, within
one run; it says nothing of other seeds.

    figures/results/real_training_so_far.json   (real_training_so_far_card.json for that preset)
      model, device, versions, learning_rate
      start, levels, chosen, expected, within   as in real_training.json
      common    number of steps that every run has made
      runs      row -> [one per seed: {"seed", "length", "accuracy": per step; "against": {"length",
                "accuracy": [mean, low, high] of row minus GRPO}; "judged": null, or what the test
                problems judged so far say: {"problems", "pass@1", "length", and of the start policy
                on the same problems "start pass@1", "start length"}}]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from iapo_mini import plots
from iapo_mini.files import read_json, whole_records
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.runs import START
from iapo_mini.metrics import LOG

BASE = "grpo"
"""The row that the others are compared with."""
WINDOW = 10
"""Number of steps of the comparison."""
METRICS = ("length", "accuracy")

Entries = Mapping[str, Mapping[str, Any]]
"""Name -> record of a finished run (:mod:`iapo_mini.lab.ledger`)."""
NO_ENTRIES: Entries = MappingProxyType({})


def runs_of(
    folder: Path, rows: Sequence[str], entries: Entries = NO_ENTRIES
) -> dict[str, list[dict[str, Any]]]:
    """Curves and judgements of the runs that have begun, by row.

    Args:
        folder: folder of the study; the run of a row and a seed is in ``folder/<row>-<seed>``.
        rows: names of rows.
        entries: records of finished runs, which may have been made on another machine.
    """
    names = {path.name for path in folder.glob("*-*")} | set(entries)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        seeds = sorted(int(name.rpartition("-")[2]) for name in names if name.startswith(f"{row}-"))
        for seed in seeds:
            name, start = f"{row}-{seed}", f"{START}-{seed}"
            one: dict[str, Any] = {"seed": seed}
            if entry := entries.get(name):
                one |= {m: entry["curve"][m] for m in METRICS}
                one["judged"] = _judged_of(entry, entries.get(start))
            elif steps := whole_records(folder / name / "train" / LOG):
                one |= {m: [round(s[m], 5) for s in steps] for m in METRICS}
                one["judged"] = _judged(folder / name, folder / start)
            else:
                continue
            found.setdefault(row, []).append(one)
    return found


def _judged_of(entry: Mapping, start: Mapping | None) -> dict[str, float] | None:
    """The final judgement of a finished run beside that of the start policy."""
    if start is None:
        return None
    told: dict[str, float] = {"problems": entry["result"]["problems"]}
    for name, one in (("", entry), ("start ", start)):
        told |= {f"{name}{m}": one["result"][m] for m in ("pass@1", "length")}
    return told


def _judged(run: Path, start: Path) -> dict[str, float] | None:
    own, before = (whole_records(x / "completions.jsonl") for x in (run, start))
    problems = {c["problem"] for c in own}
    before = [c for c in before if c["problem"] in problems]
    if not own or not before:
        return None
    told: dict[str, float] = {"problems": len(problems)}
    for name, some in (("", own), ("start ", before)):
        told[f"{name}pass@1"] = statistics.fmean(c["correct"] for c in some)
        told[f"{name}length"] = statistics.fmean(c["tokens"] for c in some)
    return told


def compare(runs: Mapping[str, Sequence[dict[str, Any]]]) -> int:
    """Add ``against`` to every run whose seed has a run of GRPO; return the common steps."""
    common = min((len(one["length"]) for some in runs.values() for one in some), default=0)
    base = {one["seed"]: one for one in runs.get(BASE, ())}
    window = slice(max(0, common - WINDOW), common)
    for some in runs.values():
        for one in some:
            other = base.get(one["seed"])
            one["against"] = other and {
                m: mean_interval([a - b for a, b in zip(one[m][window], other[m][window])])
                for m in METRICS
            }
    return common


def so_far(
    folder: Path, rows: Sequence[str], study: Mapping[str, Any], entries: Entries = NO_ENTRIES
) -> dict[str, Any]:
    """Content of the results file.

    Args:
        folder: folder of the study.
        rows: names of its rows.
        study: what the study knows beside its runs.
        entries: records of finished runs.

    Raises:
        ValueError: when no run has finished a step.
    """
    runs = runs_of(folder, rows, entries)
    common = compare(runs)
    if not common:
        raise ValueError(f"out holds '{folder}', in which no run has finished a step.")
    machine = read_json(folder / "machine.json", {"device": "unknown", "versions": {}})
    return {**machine, **study, "common": common, "runs": runs}


def progress_table(results: Mapping[str, Any]) -> str:
    """The runs as a Markdown table, a line for each row and seed."""
    last = f"steps {max(1, results['common'] - WINDOW + 1)} to {results['common']}"
    lines = [
        f"| method | seed | steps | length minus GRPO's (tokens), {last} | accuracy minus GRPO's | "
        "test problems judged | Pass@1 (start) | length (start) |",
        "|---" * 8 + "|",
    ]
    for row, some in results["runs"].items():
        for one in some:
            cells = [plots.LABELS.get(row, row), str(one["seed"]), str(len(one["length"]))]
            against = one["against"] if row != BASE else None
            cells += [
                format_interval(against[m], digits) if against else ""
                for m, digits in zip(METRICS, (1, 3))
            ]
            judged = one["judged"]
            cells += ["0", "", ""] if judged is None else [
                str(judged["problems"]),
                *(f"{judged[m]:.{d}f} ({judged['start ' + m]:.{d}f})"
                  for m, d in (("pass@1", 3), ("length", 1))),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
