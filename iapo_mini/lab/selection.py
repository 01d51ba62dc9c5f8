"""Selection effects: the bias of a number by which a checkpoint was chosen.

The authors' files choose a checkpoint in two steps (docs/how_it_was_measured.md). They keep the
five checkpoints with the best accuracy on the evaluation set. Of these they report the one with the
best Ratio@k on 15 problems of this set, with its numbers on the same 15 problems. This study
repeats the procedure in the story world, where further stories show the true value of the choice.

IAPO is trained from several seeds. Every checkpoint of a run is a candidate and answers a pool of
tune stories and a pool of test stories. After that nothing is sampled. Each draw splits the test
pool at random into an evaluation set and a held-out half, takes n stories of the evaluation set as
the reported ones, and chooses a checkpoint by each rule (:mod:`iapo_mini.lab.best_of`):

* ``test``: the authors' rule, on the evaluation set and the reported stories;
* ``tune``: the same rule on the tune pool and n stories of it;
* ``tune_pool``: the same rule with the Ratio@k of the whole tune pool;
* ``last``: the last checkpoint, without a choice.

The bias is the number on the reported stories minus the number on the held-out half, which is not
used in any choice. For ``last`` the bias of means is 0, and that of the ratio is small (a ratio of
two means is not the mean of ratios). Any further bias of the other rules is due to the choice.

The second part is an ablation without tuning. One side is the best of K runs, each at its chosen
checkpoint. The other side is a further run of the *same* method at its last checkpoint. So the
apparent gain of the first side is not due to a better method. A part of it is real, because a
choice does find better policies, and the rest is bias.

Intervals are over runs (Student's t, or jackknife if runs are compared) and hold for these stories.
Six runs of 60 steps with twelve candidates each, 100 tune and 200 test stories and eight
completions took an hour on two cores that did other work, too.
``figures/results/runs/selection.jsonl`` holds the finished runs with the length of every completion
(about a megabyte), so the statistics can be repeated on any machine.

    figures/results/selection.json
      rules       k -> rule -> "pass", "length", "ratio" -> {"reported", "value" (held-out), "bias",
                  "share": [mean, low, high] over runs, "spread": [low, high]}; share and spread are
                  relative to the value, and 95% of the draws are within the spread
      problems    n -> rule -> share of Ratio@k at the largest k: [mean, low, high]
      candidates  m -> rule -> the same, when Ratio@k alone chooses among the last m checkpoints
      ablation    K -> rule -> {"apparent", "true", "bias": [mean, low, high]}, gain in Ratio@k
                  relative to the mean value of the last checkpoints
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
from iapo_mini.intervals import format_interval, share_interval
from iapo_mini.lab.best_of import METRICS, RULES, Reports, bias_of, measures, repeat, untuned
from iapo_mini.lab.figures import selection as drawn
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import finished, make_jobs, run_all
from iapo_mini.lab.sizes import SHORT, Size, preset_of
from iapo_mini.lab.tuning import tuned

FINALISTS = 5
"""Number of checkpoints with the best accuracy, among which Ratio@k decides."""


@dataclass(frozen=True)
class Study:
    """Size of the study.

    Attributes:
        size: size of training, and the pools on which its checkpoints are judged.
        problems: numbers n of reported stories; the first one is used in every other part.
        candidates: numbers m of candidates.
        trials: numbers K of runs of which the best is taken, at most the number of runs minus two.
        turns: number of random orders of the test pool (:func:`~iapo_mini.lab.best_of.repeat`).
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
            max_completion_length=SHORT,
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
    """All numbers of the results file that are computed from the candidates' completions.

    Args:
        tests: for each run ``(right, tokens)`` of its candidates on the test pool, as for
            :func:`measures`.
        tunes: the same on the tune pool.
        plan: size of the study.
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
    """Train the candidates and choose among them by every rule; write results file and figure.

    Arguments and errors are those of :func:`iapo_mini.lab.table1.table1`, which tunes the settings.
    """
    preset_of(preset)  # refuses an unknown preset
    plan, out, figures = SIZES[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    best = tuned(preset, out, figures, parallel, ("iapo",))["iapo"]
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
                means = [row[name] for name in ("reported", "value")]
                if metric == "pass":
                    means = list(map(share_interval, means))
                cells = [format_interval([unit * x for x in mean], digits) for mean in means]
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
