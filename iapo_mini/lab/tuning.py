"""Tuning of every row of Table 1 with the same number of trials, on the tune stream.

The first five trials are learning rates with the usual weight of the row. The last two are other
weights with the best learning rate; a row without a weight tries two learning rates next to the
best one instead. Every trial is run with each of the tuning seeds, which no reported run uses, and
judged by their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from iapo_mini import plots
from iapo_mini.config import TrainConfig
from iapo_mini.files import read_json, versions, write_json
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.ledger import read as read_ledger
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import START, collect, make_jobs, run_all
from iapo_mini.lab.sizes import Size, preset_of

RATES = (3.5e-4, 7e-4, 1.4e-3, 2.8e-3, 5.6e-3)
"""Learning rates of the first five trials."""

ROWS: dict[str, dict] = {
    "grpo": {"method": "grpo"},
    "dapo": {"method": "dapo"},
    "gfpo": {"method": "gfpo"},
    # GFPO's authors keep 8 of 24. With 4 prompts per step the number of completions is the same.
    "gfpo_24": {"method": "gfpo", "alpha": 1 / 3, "num_generations": 24, "prompts_per_step": 4},
    "gtpo": {"method": "gtpo"},
    "gtpo_iapo": {"method": "gtpo_iapo"},
    # S-GRPO's thresholds are for completions of 178 tokens (the paper's 7B model on GSM8K). The
    # start policy writes about 60 tokens, hence the factor of 0.35.
    "sgrpo": {"method": "sgrpo", "alpha": 0.35},
    "grpo_kimi": {"method": "grpo_kimi"},
    "grpo_efficient": {"method": "grpo_efficient"},
    "iapo": {"method": "iapo"},
    "iapo_sequence": {"method": "iapo", "aggregation": "sequence"},
    "iapo_ni": {"method": "iapo_ni"},
    "iapo_ne": {"method": "iapo_ne"},
    "iapo_pmi": {"method": "iapo_pmi"},
}
"""Rows of Table 1 -> TrainConfig fields, without the tuned ones."""

_IAPO_WEIGHTS = ({"alpha": 0.1}, {"alpha": 0.4})
OTHER_WEIGHTS: dict[str, tuple[dict, dict]] = {
    "gfpo": ({"alpha": 0.5}, {"alpha": 0.875}),
    "gfpo_24": ({"alpha": 0.5}, {"alpha": 1 / 6}),
    "gtpo": ({"alpha": 0.05}, {"alpha": 0.4}),
    "gtpo_iapo": ({"alpha": 0.05}, {"alpha": 0.4}),
    "sgrpo": ({"alpha": 0.2}, {"alpha": 0.5}),
    "grpo_kimi": ({"alpha": 0.25}, {"alpha": 1.0}),
    "grpo_efficient": ({"alpha": 0.2}, {"alpha": 0.8}),
    "iapo": _IAPO_WEIGHTS,
    "iapo_sequence": _IAPO_WEIGHTS,
    "iapo_ni": ({"beta": 0.025}, {"beta": 0.2}),
    "iapo_ne": _IAPO_WEIGHTS,
    "iapo_pmi": _IAPO_WEIGHTS,
}
"""The weights of the last two trials, one below and one above the usual weight."""

RULE = (
    "highest Ratio@1 (Pass@1 over mean length) among the trials whose Pass@1 is at least that of "
    "the start policy; if there is none, the highest Pass@1 (Problem 1 of the paper: most right "
    "answers per token, accuracy kept)"
)


def first_trials(row: str) -> list[dict]:
    """The trials of learning rates, as TrainConfig fields."""
    return [ROWS[row] | {"learning_rate": rate} for rate in RATES]


def last_trials(row: str, best: Mapping) -> list[dict]:
    """The last two trials, given the best learning rate."""
    if row in OTHER_WEIGHTS:
        return [{**best, **weights} for weights in OTHER_WEIGHTS[row]]
    beside = (best["learning_rate"] / math.sqrt(2), best["learning_rate"] * math.sqrt(2))
    return [{**best, "learning_rate": float(f"{rate:.2g}")} for rate in beside]


def choose(trials: Sequence[Mapping], floor: float) -> int:
    """Index of the best trial by ``RULE``; ``floor`` is the start policy's Pass@1."""
    kept = [i for i, trial in enumerate(trials) if trial["pass@1"] >= floor]
    if kept:
        return max(kept, key=lambda i: trials[i]["ratio@1"])
    return max(range(len(trials)), key=lambda i: trials[i]["pass@1"])


def _tried(
    recipes: Mapping[str, dict | None], size: Size, out: Path, kept: Path, parallel: int | None
) -> dict[str, dict]:
    """Name -> metrics of runs on the tune stream: means over the tuning seeds, and each value."""
    jobs = make_jobs(size, out, recipes, split="tune")
    run_all(jobs, parallel, kept)
    found = collect(jobs, size, kept)["methods"]
    metrics = ("pass@1", f"pass@{max(size.ks)}", "length", "ratio@1")
    return {
        name: {metric: sum(found[name][metric]) / len(size.seeds) for metric in metrics}
        | {"seeds": {metric: found[name][metric] for metric in metrics}}
        for name in recipes
    }


def tune(
    preset: str = "full",
    *,
    rows: Sequence[str] = tuple(ROWS),
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Make the trials of every row of :data:`ROWS` on the tune stream; write ``tuning.json``.

    No reported run uses the seeds of the trials. Other arguments, errors and the results file are
    those of :func:`compare`; presets are those of ``PRESETS``.

    Args:
        rows: rows to tune. Trials of a part of the rows are kept as finished runs, and only those
            of all rows are written to ``tuning.json``.
    """
    sizes, out, figures = preset_of(preset), Path(out), Path(figures)
    check_options(out, figures, parallel)
    size, folder, kept = (
        sizes.tuning,
        out / preset / "tuning",
        ledger_path(figures, file_stem("tuning", preset)),
    )
    start = _tried({START: None}, size, folder, kept, parallel)[START]
    trials: dict[str, list[dict]] = {row: [] for row in rows}

    def chosen() -> dict[str, int]:
        return {row: choose(found, start["pass@1"]) for row, found in trials.items()}

    def make(further: Mapping[str, Sequence[dict]]) -> None:
        named = {
            f"{row}-trial{i}": recipe
            for row, recipes in further.items()
            for i, recipe in enumerate(recipes, len(trials[row]))
        }
        found = _tried(named, size, folder, kept, parallel)
        for name, recipe in named.items():
            trials[name.rsplit("-trial", 1)[0]].append({"settings": recipe} | found[name])

    if sizes.trials > 1:
        make({row: first_trials(row) for row in rows})
        make({row: last_trials(row, trials[row][i]["settings"]) for row, i in chosen().items()})
    else:
        make({row: first_trials(row)[:1] for row in rows})
    results = {
        "trials": trials, "start": start, "rule": RULE, "chosen": chosen(),
        "config": {"evaluation": {"problems": size.problems, "seeds": list(size.seeds)}},
        "versions": versions(),
    }  # fmt: skip
    if set(rows) == set(ROWS):
        write_json(results_path(figures, "tuning", preset), results)
    return results


TUNED = ("method", "aggregation", "learning_rate", "alpha", "beta")
"""Fields of TrainConfig by which trials differ."""


def finished_trials(kept: Path, size: Size) -> dict[str, dict]:
    """The rows whose trials are all in the ledger: ``trials`` and ``chosen`` as in the results.

    Args:
        kept: file of finished runs; size: of the trials.
    """
    entries = read_ledger(kept)
    start = _mean_of([entries[f"{START}-{seed}"]["result"] for seed in size.seeds])
    trials = {}
    for row in ROWS:
        names = [f"{row}-trial{i}" for i in range(len(RATES) + 2)]
        runs = [[entries.get(f"{name}-{seed}") for seed in size.seeds] for name in names]
        found = [[run for run in of_seeds if run is not None] for of_seeds in runs]
        if all(len(of_seeds) == len(size.seeds) for of_seeds in found):
            trials[row] = [
                {"settings": {field: of_seeds[0]["job"]["config"][field] for field in TUNED}}
                | _mean_of([run["result"] for run in of_seeds])
                for of_seeds in found
            ]
    chosen = {row: choose(rows, start["pass@1"]) for row, rows in trials.items()}
    return {"trials": trials, "chosen": chosen}


def _mean_of(results: Sequence[Mapping]) -> dict[str, float]:
    metrics = ("pass@1", "length", "ratio@1")
    return {m: sum(result[m] for result in results) / len(results) for m in metrics}


def tuning_table(results: dict) -> str:
    """The trials of :func:`tune` as a Markdown table, with the chosen ones in bold."""
    lines = ["| row | loss | learning rate | alpha | beta | length (tokens) | Pass@1 | Ratio@1 "
             "(1/1000 tokens) |", "|---" * 8 + "|"]  # fmt: skip
    for name, rows in results["trials"].items():
        for i, row in enumerate(rows):
            settings = row["settings"]
            recipe = TrainConfig(**settings).recipe()
            cells = [
                plots.LABELS.get(name, name), f"{recipe.aggregation} mean",
                f"{settings['learning_rate']:g}",
                *(f"{getattr(recipe, w):.3g}" if getattr(recipe, w) else "" for w in
                  ("alpha", "beta")),
                f"{row['length']:.1f}", f"{row['pass@1']:.3f}", f"{1000 * row['ratio@1']:.2f}",
            ]  # fmt: skip
            if i == results["chosen"][name]:
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuned(
    preset: str,
    out: Path,
    figures: Path,
    parallel: int | None,
    rows: Sequence[str] = tuple(ROWS),
) -> dict[str, dict]:
    """Row -> the settings that :func:`tune` chose, from its file if it holds these rows.

    Only the rows that a study needs are tuned for it.
    """
    path = results_path(figures, "tuning", preset)
    results = read_json(path, {"trials": {}, "chosen": {}}, needs=("trials", "chosen"))
    first = {row: results["trials"].get(row, [{}])[0].get("settings") for row in rows}
    if first != {row: first_trials(row)[0] for row in rows}:
        results = tune(preset, rows=rows, out=out, figures=figures, parallel=parallel)
    return {row: results["trials"][row][results["chosen"][row]]["settings"] for row in rows}
