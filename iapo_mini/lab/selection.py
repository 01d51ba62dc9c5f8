"""Selection effects: how far a number is too good when a checkpoint was chosen by it.

The authors' files choose a checkpoint in two steps (docs/how_it_was_measured.md). The five with
the best accuracy on the evaluation set are kept, and of these the one with the best Ratio@k on 15
problems of this set is reported, with its numbers on the same 15 problems. This study repeats that
in the story world, where other stories tell what the chosen policy is really worth.

IAPO is trained from several seeds. Every checkpoint of a run is a candidate and answers a pool of
tune stories and a pool of test stories. After that nothing is sampled: each draw splits the test
pool at random into an evaluation set and a held-out half, takes n stories of the evaluation set as
the reported ones, and chooses a checkpoint by each rule (:mod:`iapo_mini.lab.best_of`):

* ``test``: the authors' way, on the evaluation set and the reported stories;
* ``tune``: the same choice on the tune pool and n stories of it;
* ``tune_pool``: the same choice with the Ratio@k of the whole tune pool;
* ``last``: the last checkpoint, without a choice.

The bias is the number on the reported stories minus the number on the held-out half, which had no
part in any choice. For ``last`` it is 0 for means, and small for the ratio (a ratio of two means is
not the mean of ratios); what the other rules have beyond it comes from the choice.

The second part is the ablation that was not tuned. One side is the best of K runs, each at its
chosen checkpoint; the other side is a further run of the *same* method at its last checkpoint. What
the first side appears to gain is no merit of a method. A part of it is real, since a choice does
find better policies, and the rest is bias.

Intervals are over runs (Student's t; jackknife where runs are compared) and hold for these stories.
Six runs of 60 steps with twelve candidates each, 100 tune and 200 test stories with eight
completions: about 36 minutes of two cores at 5 s a training step and 70 completions a second and
core. Finished runs are in ``figures/results/runs/selection.jsonl`` with every completion's length
(about a megabyte), so the statistics can be made again anywhere.

    figures/results/selection.json
      rules       k -> rule -> "pass", "length", "ratio" -> {"reported", "value" (held-out), "bias",
                  "share": [mean, low, high] over runs, "spread": [low, high]}; share and spread are
                  parts of the value, and 95% of the draws are reported within the spread
      problems    n -> rule -> share of Ratio@k, k the largest: [mean, low, high]
      candidates  m -> rule -> the same, when Ratio@k alone chooses among the last m checkpoints
      ablation    K -> rule -> {"apparent", "true", "bias": [mean, low, high]}, gain in Ratio@k as a
                  part of the mean value of the last checkpoints
      steps, runs [one per seed: {"length", "pass@1": [one per step]} on the whole test pool]
      seeds, config, versions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iapo_mini.files import versions, write_json
from iapo_mini.intervals import format_interval
from iapo_mini.lab.best_of import METRICS, RULES, Reports, bias_of, measures, repeat, untuned
from iapo_mini.lab.figures import selection as drawn
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import finished, make_jobs, run_all
from iapo_mini.lab.sizes import Size, preset_of
from iapo_mini.lab.tuning import tuned

FINALISTS = 5
"""Checkpoints with the best accuracy, among which Ratio@k decides."""


@dataclass(frozen=True)
class Study:
    """Size of the study.

    Attributes:
        size: of training, and the pools on which its checkpoints are judged.
        problems: numbers n of reported stories; the first one is that of every other part.
        candidates: numbers m of candidates.
        trials: numbers K of runs of which the best is taken; two more runs must be there.
        turns: random orders of the test pool, as for :func:`~iapo_mini.lab.best_of.repeat`.
    """

    size: Size
    problems: tuple[int, ...]
    candidates: tuple[int, ...]
    trials: tuple[int, ...]
    turns: int


SIZES = {
    "quick": Study(
        Size(
            seeds=(0, 1, 2), max_steps=2, problems=2, prompts_per_step=1, num_generations=2,
            ks=(1, 2), on_the_way=(1, 2), pools=(("tune", 4), ("test", 8)),
        ),
        problems=(2, 4), candidates=(1, 2), trials=(1,), turns=10,
    ),
    "full": Study(
        Size(
            seeds=tuple(range(6)), max_steps=60, problems=50, ks=(1, 8),
            on_the_way=tuple(range(5, 61, 5)), pools=(("tune", 100), ("test", 200)),
        ),
        problems=(15, 50, 100), candidates=(1, 2, 5, 12), trials=(1, 2, 4), turns=20,
    ),
}  # fmt: skip


def study(tests: Sequence[tuple], tunes: Sequence[tuple], plan: Study) -> dict:
    """All numbers of the results file that follow from the candidates' completions.

    Args:
        tests: for each run ``(right, tokens)`` of its candidates on the test pool, as for
            :func:`measures`; tunes: the same on the tune pool.
        plan: how they are drawn.
    """

    def reports(k: int, n: int, last: int, finalists: int) -> list[Reports]:
        pools = [
            [measures(right[-last:], tokens[-last:], k) for right, tokens in run]
            for run in zip(tests, tunes)
        ]
        return [repeat(test, tune, n, finalists, plan.turns) for test, tune in pools]

    (first, *_), most = plan.problems, max(plan.size.ks)
    every = len(tests[0][0])
    usual = {k: reports(k, first, every, FINALISTS) for k in plan.size.ks}
    by_problems = {n: reports(most, n, every, FINALISTS) for n in plan.problems}
    by_candidates = {m: reports(most, first, m, m) for m in plan.candidates}

    def shares(rows: Mapping[int, list[Reports]]) -> dict:
        return {
            str(n): {rule: bias_of(runs, rule, "ratio")["share"] for rule in RULES}
            for n, runs in rows.items()
        }

    return {
        "rules": {
            str(k): {rule: {m: bias_of(runs, rule, m) for m in METRICS} for rule in RULES}
            for k, runs in usual.items()
        },
        "problems": shares(by_problems),
        "candidates": shares(by_candidates),
        "ablation": {
            str(n): {rule: untuned(usual[most], rule, n) for rule in RULES} for n in plan.trials
        },
    }


def selection(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Train the candidates, choose among them by every rule; results file and figure.

    Arguments and errors as for :func:`iapo_mini.lab.table1.table1`, which tunes the settings.
    """
    preset_of(preset)  # refuses an unknown one
    plan, out, figures = SIZES[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    best = tuned(preset, out, figures, parallel)["iapo"]
    jobs = make_jobs(plan.size, out / preset / "selection", {"iapo": best})
    kept = ledger_path(figures, file_stem("selection", preset))
    run_all(jobs, parallel, kept)
    ways = [pair["result"]["on_the_way"] for pair in finished(jobs, kept)]
    steps = list(plan.size.on_the_way)
    tests, tunes = (
        [
            tuple(
                np.array([way[str(step)]["pools"][split][part] for step in steps])
                for part in ("right", "tokens")
            )
            for way in ways
        ]
        for split in ("test", "tune")
    )
    results = study(tests, tunes, plan) | {
        "steps": steps,
        "runs": [
            {metric: [way[str(step)][metric] for step in steps] for metric in ("length", "pass@1")}
            for way in ways
        ],
        "seeds": list(plan.size.seeds),
        "config": {"iapo": best, "study": dataclasses.asdict(plan), "finalists": FINALISTS},
        "versions": versions(),
    }
    path = results_path(figures, "selection", preset)
    write_json(path, results)
    drawn.selection(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def selection_table(results: Mapping) -> str:
    """Both parts of :func:`selection` as Markdown tables, in percent of the held-out value."""

    def percent(interval: Sequence[float]) -> str:
        return format_interval([100 * x for x in interval], 1)

    lines = ["| chosen on | metric | reported | held out | bias (%) | 95% of draws (%) |",
             "|---" * 6 + "|"]  # fmt: skip
    for k, rules in results["rules"].items():
        for rule, metrics in rules.items():
            for metric, row in metrics.items():
                unit, digits = {"pass": (1, 3), "length": (1, 1), "ratio": (1000, 2)}[metric]
                cells = [
                    format_interval([unit * x for x in row[name]], digits)
                    for name in ("reported", "value")
                ]
                low, high = (f"{100 * x:.1f}" for x in row["spread"])
                name = f"{metric.capitalize()}@{k}" + (" (1/1000 tokens)" if unit > 1 else "")
                cells += [percent(row["share"]), f"{low} to {high}"]
                lines.append(f"| {drawn.NAMES[rule]} | {name} | " + " | ".join(cells) + " |")
    lines += ["", "| best of | chosen on | apparent gain (%) | real gain (%) | bias (%) |",
              "|---" * 5 + "|"]  # fmt: skip
    for trials, rows in results["ablation"].items():
        for rule, row in rows.items():
            cells = [percent(row[name]) for name in ("apparent", "true", "bias")]
            name = drawn.NAMES[rule] if rule != "last" else "the reported stories, last checkpoints"
            lines.append(f"| {trials} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
