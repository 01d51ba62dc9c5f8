"""Study whether IAPO gains from a better estimate, by training from policies of different quality.

The estimate of informativeness depends on the early answers of the trained policy. Here GRPO, IAPO
and the control IAPO-NE (which uses no early answers) are trained from three policies whose early
answers differ: *uncalibrated* repeats the last number, *embedded* is calibrated but unsteady, and
*calibrated* is also steady (docs/estimators.md). A fourth row is IAPO that asks only at sentence
ends. This is cheaper, and sums over sentences separate computing from talk better than single
tokens do. The settings are those that ``tune`` chose for the embedded policy.

    figures/results/starts.json
      starts      name -> {"start": metrics of the policy before training,
                           "grpo", "iapo_ne", "iapo", "iapo_sentence": metrics after it,
                           [one per seed]}
                  metrics are "length", "pass@1", "ratio@1"
      difference  name -> "iapo - grpo", "iapo - iapo_ne", "iapo_sentence - iapo" -> metric ->
                  [mean, low, high], 95% interval of the difference within a seed
      seeds, config, versions
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from iapo_mini import plots
from iapo_mini.evaluation import evaluate
from iapo_mini.files import versions, write_json
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.figures import methods
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import START, collect, make_jobs, run_all
from iapo_mini.lab.sizes import Size, preset_of
from iapo_mini.lab.tuning import tuned
from iapo_mini.policies import EMBEDDED, EMBEDDED_CALIBRATED, EMBEDDED_UNCALIBRATED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories

STARTS = {
    "uncalibrated": EMBEDDED_UNCALIBRATED,
    "embedded": EMBEDDED,
    "calibrated": EMBEDDED_CALIBRATED,
}
TRAINED: dict[str, tuple[str, dict]] = {
    "grpo": ("grpo", {}),
    "iapo_ne": ("iapo_ne", {}),
    "iapo": ("iapo", {}),
    "iapo_sentence": ("iapo", {"estimator_stride": "sentence"}),
}
"""Row -> the method whose tuned settings it uses, and its changes to them."""
PAIRS = (("iapo", "grpo"), ("iapo", "iapo_ne"), ("iapo_sentence", "iapo"))
METRICS = ("length", "pass@1", "ratio@1")
SIZES = {
    "quick": preset_of("quick").sweeps,
    "full": Size(seeds=(0, 1, 2, 3, 4), max_steps=22, problems=200),
}


def starts(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Train :data:`TRAINED` from each of :data:`STARTS`; write results file and figure.

    Arguments and errors are those of :func:`iapo_mini.lab.table1.table1`, which tunes the settings.
    """
    preset_of(preset)  # refuses an unknown preset
    size, out, figures = SIZES[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    settings = tuned(preset, out, figures, parallel, ("grpo", "iapo_ne", "iapo"))
    folder = out / preset / "starts"
    recipes = {
        f"{name}-{row}": settings[method] | {"model": model} | changes
        for (name, model), (row, (method, changes)) in itertools.product(
            STARTS.items(), TRAINED.items()
        )
    }
    jobs = make_jobs(size, folder, recipes)
    kept = ledger_path(figures, file_stem("starts", preset))
    run_all(jobs, parallel, kept)
    found = collect(jobs, size, kept)
    problems = list(itertools.islice(stories("test", seed=0), size.problems))
    rows = {}
    for name, model in STARTS.items():
        before = evaluate(
            load_policy(model, lora_rank=0), problems,
            ks=size.ks, num_generations=size.num_generations, seed=0,
            max_completion_length=size.max_completion_length,
            save_to=folder / f"{name}-{START}.jsonl",
        )  # fmt: skip
        rows[name] = {START: {metric: before[metric] for metric in METRICS}} | {
            method: {metric: found["methods"][f"{name}-{method}"][metric] for metric in METRICS}
            for method in TRAINED
        }
    gaps = {
        name: {f"{one} - {other}": _differences(row[one], row[other]) for one, other in PAIRS}
        for name, row in rows.items()
    }
    results = {
        "starts": rows, "difference": gaps,
        "seeds": found["seeds"], "config": found["config"], "versions": versions(),
    }  # fmt: skip
    path = results_path(figures, "starts", preset)
    write_json(path, results)
    methods.starts(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def _differences(ours: Mapping, theirs: Mapping) -> dict[str, tuple[float, float, float]]:
    """Metric -> mean and 95% interval of ours minus theirs, paired by seed."""
    return {
        metric: mean_interval([a - b for a, b in zip(ours[metric], theirs[metric], strict=True)])
        for metric in METRICS
    }


def starts_table(results: Mapping) -> str:
    """Results of :func:`starts` as a Markdown table, with means and 95% intervals over seeds."""
    titles = ("start policy", "method", "loss", "length (tokens)", "Pass@1",
              "Ratio@1 (1/1000 tokens)")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, row in results["starts"].items():
        before = row[START]
        lines.append(
            f"| {name} | before training | | {before['length']:.1f} | {before['pass@1']:.3f} "
            f"| {1000 * before['ratio@1']:.1f} |"
        )
        for method in TRAINED:
            per_thousand = [1000 * ratio for ratio in row[method]["ratio@1"]]
            cells = (
                format_interval(mean_interval(row[method]["length"]), 1),
                format_interval(mean_interval(row[method]["pass@1"])),
                format_interval(mean_interval(per_thousand), 1),
            )
            loss = f"{results['config'][f'{name}-{method}']['aggregation']} mean"
            lines.append(
                f"| {name} | {plots.LABELS[method]} | {loss} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)
