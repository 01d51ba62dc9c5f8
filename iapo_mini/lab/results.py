"""Results files: their paths, their contents, and tables of them.

Every experiment trains its rows from the same start policy on the same prompts
(:mod:`iapo_mini.lab.runs`), judges each on the same stories and writes one results file.
The name of a file contains ``<preset>`` unless it is ``full``; files of compare always contain it.

    figures/results/compare_<preset>.json, table1.json
      seeds      [int, ...]
      methods    name -> {"length", "pass@k", "length@k", "ratio@k": [one per seed],
                          "intervals": [one per seed: metric -> [low, high] over problems],
                          "roles": role -> tokens per completion [one per seed],
                          "by_steps": operations of the story -> {"accuracy", "length": [per seed]},
                          "train_minutes": [one per seed],
                          "aggregation": mean of the loss (not for the start policy),
                          "on_the_way": step -> {"length", "pass@1": [one per seed]}, if judged}
      curves     name -> [one per seed: {"length", "accuracy", "entropy": [one per step]}]
      config     name -> training settings;  evaluation -> evaluation settings
      versions   package -> version
      wall_clock (table1) name -> [one per seed: seconds per 1,000 completions, one thread]
      story      (table1) {"question", "answers": name -> completion of the first seed's policy}
      area       (table1) name -> [per seed: mean length in training, over all steps]
      matched    (table1) tokens -> name -> [per seed: accuracy when completions first have at most
                          this length, or null if they never do]

    figures/results/tuning.json
      trials     method -> [{"settings": TrainConfig fields, "pass@1", "pass@8", "length",
                             "ratio@1"}], on the tune stream
      start      the same for the start policy;  rule  how the choice was made
      chosen     method -> index of the trial that was chosen

    figures/results/ablation.json
      ratio      method -> [Ratio@k per seed] at the largest k;  length, pass  the same
      gap        "iapo - iapo_ne", ... -> [mean, low, high] of the difference within a seed

    figures/results/sweeps.json
      alpha, beta   [{"value", "length", "pass@1", "pass@k", "entropy": [one per seed]}], entropy
                    in nats per token at the last training step
      fixed      {"alpha", "beta", ...}: the value of the other weight
      means      method -> aggregation -> {"length", "pass@1", "pass@k", "entropy": [per seed],
                 "length_by_step": [one per seed: [one per step]]}, settings as tuned

    figures/results/theory.json, departures.json, starts.json, early_exit.json
      see the modules with these names
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iapo_mini import plots
from iapo_mini.errors import MOST_THREADS, check_number
from iapo_mini.files import read_json, writable_folder, write_json
from iapo_mini.intervals import format_interval


def kept(path: Path, settings: dict, make: Callable[[], Any]) -> Any:
    """The value in a file if it was made with these settings; else make it and keep it there."""
    found = read_json(path, {})
    if found.get("settings") != settings or "value" not in found:
        found = {"settings": settings, "value": make()}
        write_json(path, found)
    return found["value"]


def results_path(figures: Path, experiment: str, preset: str) -> Path:
    """Path of an experiment's results file."""
    return figures / "results" / f"{file_stem(experiment, preset)}.json"


def file_stem(experiment: str, preset: str) -> str:
    """Name of an experiment's files, without the ending."""
    return experiment if preset == "full" else f"{experiment}_{preset}"


def check_options(out: Path, figures: Path, parallel: int | None) -> None:
    """Refuse options that an experiment can't run with, before any long work.

    Raises:
        ValueError: for ``parallel`` out of range, or folders where nothing can be written.
    """
    if parallel is not None:
        check_number("parallel", parallel, 1, MOST_THREADS)
    writable_folder(figures / "results", "figures")
    writable_folder(out, "out")


def draw_comparison(results: dict, figures: Path, name: str) -> None:
    """Draw the bars, the training curves and the composition by role."""
    ks = results["config"]["evaluation"]["ks"]
    for ending, figure in (
        ("", plots.comparison(results["methods"], max(ks))),
        ("_training", plots.training_curves(results["curves"])),
        ("_roles", plots.role_composition({m: r["roles"] for m, r in results["methods"].items()})),
    ):
        figure.savefig(figures / f"{name}{ending}.png", dpi=150)


def comparison_table(results: dict, metric: str = "") -> str:
    """A comparison as a Markdown table with means and 95% intervals.

    The interval is over seeds (Student's t) if there are several, otherwise over problems.

    Args:
        results: results of ``compare`` or ``table1``.
        metric: ``"pass"``, ``"length"`` or ``"ratio"``, to show at every k; default is Pass@k at
            the smallest k, and all three metrics at the largest.
    """
    of = results["config"]["evaluation"]["ks"]
    columns = [f"pass@{of[0]}", f"pass@{of[-1]}", f"length@{of[-1]}", f"ratio@{of[-1]}"]
    if metric:
        columns = [f"{metric}@{k}" for k in of]
    units = {"length": " (tokens)", "ratio": " (1/1000 tokens)"}
    titles = [c.capitalize() + units.get(c.split("@")[0], "") for c in columns]
    lines = ["| method | loss | " + " | ".join(titles) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, result in results["methods"].items():
        cells = [f"{result['aggregation']} mean" if "aggregation" in result else ""]
        for column in columns:
            mean, low, high = plots.interval_of(result, column)
            if column.startswith("ratio"):
                mean, low, high = 1000 * mean, 1000 * low, 1000 * high
            digits = 1 if column.startswith("length") else 3 if column.startswith("pass") else 2
            cells.append(format_interval((mean, low, high), digits))
        lines.append(f"| {plots.LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
