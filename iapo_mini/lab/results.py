"""Where results go, what a results file holds, and how it is shown.

Every experiment trains its rows from the same start policy on the same prompts
(:mod:`iapo_mini.lab.runs`), judges each on the same stories and writes one results file.
``<preset>`` is in the name of a file unless it is ``full``; compare has it always.

    figures/results/compare_<preset>.json, table1.json
      seeds      [int, ...]
      methods    name -> {"length", "pass@k", "length@k", "ratio@k": [one per seed],
                          "intervals": [one per seed: metric -> [low, high] over problems],
                          "roles": role -> tokens per completion [one per seed],
                          "by_steps": operations of the story -> {"accuracy", "length": [per seed]},
                          "train_minutes": [one per seed],
                          "aggregation": mean of the loss, not of the start policy,
                          "on_the_way": step -> {"length", "pass@1": [one per seed]}, where judged}
      curves     name -> [one per seed: {"length", "accuracy", "entropy": [one per step]}]
      config     name -> training settings;  evaluation -> evaluation settings
      versions   package -> version
      wall_clock (table1) name -> [one per seed: seconds per 1,000 completions, one thread]
      story      (table1) {"question", "answers": name -> completion of the first seed's policy}
      area       (table1) name -> [per seed: mean length in training, over all steps]
      matched    (table1) tokens -> name -> [per seed: accuracy when completions first are so
                          short, null if they never are]

    figures/results/tuning.json
      trials     method -> [{"settings": TrainConfig fields, "pass@1", "pass@8", "length",
                             "ratio@1"}], on the tune stream
      start      the same of the start policy;  rule  how the choice was made
      chosen     method -> index of the trial that was chosen

    figures/results/ablation.json
      ratio      method -> [Ratio@k per seed], k the largest;  length, pass  the same
      gap        "iapo - iapo_ne", ... -> [mean, low, high] of the difference within a seed

    figures/results/sweeps.json
      alpha, beta   [{"value", "length", "pass@1", "pass@k", "entropy": [one per seed]}], entropy
                    in nats per token at the last training step
      fixed      {"alpha", "beta", ...}: what the other weight was
      means      method -> aggregation -> {"length", "pass@1", "pass@k", "entropy": [per seed],
                 "length_by_step": [one per seed: [one per step]]}, settings as tuned

    figures/results/theory.json, departures.json, starts.json    see the modules of these names
"""

from __future__ import annotations

from pathlib import Path

from iapo_mini import plots
from iapo_mini.errors import MOST_THREADS, check_number
from iapo_mini.files import writable_folder
from iapo_mini.intervals import format_interval


def results_path(figures: Path, experiment: str, preset: str) -> Path:
    """Where an experiment's results go."""
    return figures / "results" / f"{file_stem(experiment, preset)}.json"


def file_stem(experiment: str, preset: str) -> str:
    """Name of an experiment's files without their ending."""
    return experiment if preset == "full" else f"{experiment}_{preset}"


def check_options(out: Path, figures: Path, parallel: int | None) -> None:
    """Refuse what an experiment can't run with, before any long work.

    Raises:
        ValueError: for ``parallel`` out of range, or folders where nothing can be written.
    """
    if parallel is not None:
        check_number("parallel", parallel, 1, MOST_THREADS)
    writable_folder(figures / "results", "figures")
    writable_folder(out, "out")


def draw_comparison(results: dict, figures: Path, name: str) -> None:
    """Bars, training curves and composition by role."""
    ks = results["config"]["evaluation"]["ks"]
    for ending, figure in (
        ("", plots.comparison(results["methods"], max(ks))),
        ("_training", plots.training_curves(results["curves"])),
        ("_roles", plots.role_composition({m: r["roles"] for m, r in results["methods"].items()})),
    ):
        figure.savefig(figures / f"{name}{ending}.png", dpi=150)


def comparison_table(results: dict, metric: str = "") -> str:
    """A comparison as a Markdown table; mean and 95% interval.

    With several seeds the interval is over seeds (Student's t), with one it is over problems.

    Args:
        results: of ``compare`` or ``table1``.
        metric: ``"pass"``, ``"length"`` or ``"ratio"``, to show at every k; default Pass@k at the
            least k beside all three at the largest.
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
