"""The same number of trials for every method, on the tune stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from iapo_mini import plots
from iapo_mini.config import RECIPES, TrainConfig
from iapo_mini.files import read_json, versions, write_json
from iapo_mini.lab.results import check_options, results_path
from iapo_mini.lab.runs import START, collect, make_jobs, run_all
from iapo_mini.lab.sizes import preset_of

_WEIGHTS: dict[str, Sequence[dict]] = {
    "gtpo": ({"alpha": 0.1}, {"alpha": 0.4}),
    # S-GRPO's thresholds belong to completions of 178 tokens (the paper's 7B model on GSM8K); the
    # start policy writes about 60, a factor of 0.35. The other trial cuts deeper.
    "sgrpo": ({"alpha": 0.35}, {"alpha": 0.2}),
    "iapo_ni": ({"beta": 0.05}, {"beta": 0.2}),
    "iapo_ne": ({"alpha": 0.2, "beta": 0.05}, {"alpha": 0.4, "beta": 0.05}),
    "iapo": ({"alpha": 0.2, "beta": 0.05}, {"alpha": 0.4, "beta": 0.05}),
    "iapo_pmi": ({"alpha": 0.2, "beta": 0.05}, {"alpha": 0.4, "beta": 0.05}),
}


def trials_of(method: str) -> list[dict]:
    """The three settings that are tried for a method.

    A method with weights: two of them, and the first again at twice the learning rate. One without:
    three learning rates.
    """
    if method in _WEIGHTS:
        first, second = _WEIGHTS[method]
        tried = [(7e-4, first), (7e-4, second), (1.4e-3, first)]
    else:
        tried = [(rate, {}) for rate in (3.5e-4, 7e-4, 1.4e-3)]
    return [{"method": method, "learning_rate": rate} | weights for rate, weights in tried]


def _tried(preset: str) -> dict[str, list[dict]]:
    return {method: trials_of(method)[: preset_of(preset).trials] for method in RECIPES}


RULE = (
    "highest Ratio@1 (Pass@1 over mean length) among the trials whose Pass@1 is at least that of "
    "the start policy; if there is none, the highest Pass@1 (Problem 1 of the paper: most right "
    "answers per token, accuracy kept)"
)


def choose(trials: Sequence[Mapping], floor: float) -> int:
    """Index of the best trial by ``RULE``; ``floor`` is the start policy's Pass@1."""
    kept = [i for i, trial in enumerate(trials) if trial["pass@1"] >= floor]
    if kept:
        return max(kept, key=lambda i: trials[i]["ratio@1"])
    return max(range(len(trials)), key=lambda i: trials[i]["pass@1"])


def tune(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """The same number of trials for every method on the tune stream; write ``tuning.json``.

    The seed of the trials (100) is none of the reported runs'. Arguments, errors and the results
    file as for :func:`compare`; presets are those of ``PRESETS``.
    """
    size, out, figures = preset_of(preset).tuning, Path(out), Path(figures)
    check_options(out, figures, parallel)
    tried = _tried(preset)
    recipes: dict[str, dict | None] = {START: None}
    for method, rows in tried.items():
        recipes |= {f"{method}-trial{i}": settings for i, settings in enumerate(rows)}
    jobs = make_jobs(size, out / preset / "tuning", recipes, split="tune")
    run_all(jobs, parallel)
    found = collect(jobs, size)

    def measured(name: str) -> dict:
        metrics = ("pass@1", f"pass@{max(size.ks)}", "length", "ratio@1")
        return {metric: found["methods"][name][metric][0] for metric in metrics}

    start = measured(START)
    trials = {
        method: [
            {"settings": settings} | measured(f"{method}-trial{i}")
            for i, settings in enumerate(rows)
        ]
        for method, rows in tried.items()
    }
    chosen = {method: choose(rows, start["pass@1"]) for method, rows in trials.items()}
    results = {
        "trials": trials, "start": start, "rule": RULE, "chosen": chosen,
        "config": {"evaluation": found["config"]["evaluation"]}, "versions": versions(),
    }  # fmt: skip
    write_json(results_path(figures, "tuning", preset), results)
    return results


def tuning_table(results: dict) -> str:
    """The trials of :func:`tune` as a Markdown table; what was chosen is in bold."""
    lines = ["| method | learning rate | alpha | beta | length (tokens) | Pass@1 | Ratio@1 (1/1000 "
             "tokens) |", "|---" * 7 + "|"]  # fmt: skip
    for method, rows in results["trials"].items():
        for i, row in enumerate(rows):
            settings = row["settings"]
            cells = [
                plots.LABELS[method], f"{settings['learning_rate']:g}",
                *(f"{settings[w]:g}" if w in settings else "" for w in ("alpha", "beta")),
                f"{row['length']:.1f}", f"{row['pass@1']:.3f}", f"{1000 * row['ratio@1']:.2f}",
            ]  # fmt: skip
            if i == results["chosen"][method]:
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _whole(tried: Mapping[str, Sequence[Mapping]]) -> dict[str, list[dict]]:
    """Trials with every setting filled in: what a recipe brings need not be written out."""
    return {
        method: [TrainConfig(**settings).settings() for settings in rows]
        for method, rows in tried.items()
    }


def tuned(preset: str, out: Path, figures: Path, parallel: int | None) -> dict[str, dict]:
    """Method -> the settings that :func:`tune` chose; from its file if that has these trials."""
    path = results_path(figures, "tuning", preset)
    results = read_json(path, {"trials": None, "chosen": None}, needs=("trials", "chosen"))
    before = {
        method: [trial["settings"] for trial in rows]
        for method, rows in (results["trials"] or {}).items()
    }
    if _whole(before) != _whole(_tried(preset)):
        results = tune(preset, out=out, figures=figures, parallel=parallel)
    return {
        method: results["trials"][method][index]["settings"]
        for method, index in results["chosen"].items()
    }
