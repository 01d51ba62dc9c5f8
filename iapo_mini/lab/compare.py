"""Compare GRPO and IAPO from one start policy, as a first experiment."""

from __future__ import annotations

from pathlib import Path

from iapo_mini.errors import check_choice
from iapo_mini.files import write_json
from iapo_mini.lab.results import check_options, draw_comparison
from iapo_mini.lab.runs import START, collect, make_jobs, run_all
from iapo_mini.lab.sizes import COMPARE, COMPARED


def compare(
    preset: str = "demo",
    *,
    out: str | Path = "runs/compare",
    figures: str | Path = "figures",
    parallel: int | None = None,
    split: str = "test",
    recipes: dict[str, dict] | None = None,
) -> dict:
    """Train and judge GRPO and IAPO; write the results file and the figures.

    Args:
        preset: a key of ``COMPARE``.
        out: folder of the runs.
        figures: folder of the figures; results go to ``figures/results``.
        parallel: number of processes at a time, default one per core.
        split: stream of the evaluation; use ``"tune"`` to look for a recipe.
        recipes: rows to run, name -> TrainConfig fields; default ``COMPARED``.

    Returns:
        The content of the results file, as described at the head of :mod:`iapo_mini.lab.results`.

    Raises:
        ValueError: for an unknown preset, or runs in ``out`` made with other settings.
        RuntimeError: when a run fails; the message holds the last line of its output.
    """
    check_choice("preset", preset, COMPARE)
    size, out, figures = COMPARE[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    jobs = make_jobs(size, out / preset, {START: None, **(recipes or COMPARED)}, split)
    run_all(jobs, parallel)
    results = collect(jobs, size)
    write_json(figures / "results" / f"compare_{preset}.json", results)
    draw_comparison(results, figures, f"compare_{preset}")
    return results
