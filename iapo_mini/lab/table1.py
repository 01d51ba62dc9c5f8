"""Table 1: every method and the start policy, with equal budgets.

Training of the first seeds continues after the reported step, and policies are judged along the
way. The runs of other seeds end at the reported step; the rows that decide have most of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from iapo_mini.chat import token_texts
from iapo_mini.files import read_json, write_json
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.lab.curves import of_curves
from iapo_mini.lab.figures import methods as drawn
from iapo_mini.lab.judging import policy_of
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, draw_comparison, file_stem, results_path
from iapo_mini.lab.runs import START, collect, finished, make_jobs, run_all
from iapo_mini.lab.sizes import Preset, preset_of
from iapo_mini.lab.tuning import ROWS, tuned
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import Problem

DECIDING = ("grpo", "dapo", "iapo", "iapo_ne", "grpo_kimi", "grpo_efficient")
"""Rows that decide one of our verdicts."""
OURS = ("iapo_sequence", "iapo_ni", "iapo_pmi")
"""IAPO's other forms, which the ablation compares."""
WATCHED = (START, "grpo", "iapo")
"""Rows whose policies are timed and whose answers are plotted with their informativeness."""


def table1(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Make Table 1: train and judge every method with equal budgets; write results and figures.

    Arguments, errors and the results file are those of :func:`compare`; presets are those of
    ``PRESETS``. Methods are tuned first, unless ``tuning.json`` exists.
    """
    sizes, out, figures = preset_of(preset), Path(out), Path(figures)
    check_options(out, figures, parallel)
    kept = ledger_path(figures, file_stem("table1", preset))
    path, results = results_path(figures, "table1", preset), {}
    # All takes half a day, so the first rows are told before.
    for rows in (DECIDING, DECIDING + OURS, tuple(ROWS)):
        recipes = tuned(preset, out, figures, parallel, rows)
        jobs = _jobs(sizes, out / preset / "table1", {START: None, **recipes})
        run_all(jobs, parallel, kept)
        before = read_json(path, {"methods": {}}, needs=("methods",))
        if set(before["methods"]) > {START, *rows}:
            continue  # the file has all rows already
        results = collect(jobs, sizes.table1, kept)
        results |= of_curves(results)
        own = _of(jobs, WATCHED, sizes.table1.seeds)
        if "wall_clock" in before and _watched(before) == _watched(results):
            results["wall_clock"] = before["wall_clock"]
        else:
            run_all(own, parallel)  # repeats runs that only the ledger has, for their weights
            results["wall_clock"] = wall_clock(own, WATCHED, sizes.timed)
        question, texts = answers_to_one_story(jobs, kept)
        results["story"] = {"question": question, "answers": texts}
        write_json(path, results)
        draw(results, figures, preset)
        shown = {name: texts[name] for name in WATCHED if name in texts}
        run_all(_of(jobs, WATCHED, sizes.table1.seeds[:1]), parallel)
        drawn.heat_maps(question, _informed(jobs, question, shown)).savefig(
            figures / f"{file_stem('heat_maps', preset)}.png", dpi=150
        )
    return results


def _watched(results: Mapping) -> dict[str, dict]:
    """The rows whose policies are timed."""
    return {name: results["methods"].get(name) for name in WATCHED}


def draw(results: dict, figures: Path, preset: str = "full") -> None:
    """Draw every figure of Table 1 that needs only its results file."""
    name, rows = file_stem("table1", preset), results["methods"]
    draw_comparison(results, figures, name)
    tokenizer = load_policy(lora_rank=0).tokenizer
    for stem, figure in (
        (f"{name}_tradeoff", drawn.tradeoff(rows, results["config"]["evaluation"]["ks"])),
        (f"{name}_steps", drawn.by_steps(rows)),
        (file_stem("case_study", preset),
         drawn.case_study(results["story"]["question"], results["story"]["answers"], tokenizer)),
    ):  # fmt: skip
        figure.savefig(figures / f"{stem}.png", dpi=150)


def _jobs(sizes: Preset, out: Path, recipes: Mapping[str, dict | None]) -> list[dict]:
    """The long runs of every row, then its other seeds, then further seeds of deciding rows."""
    size = sizes.table1
    to_primary = tuple(step for step in size.on_the_way if step <= size.primary)
    shorter = replace(size, max_steps=size.primary, primary=0, on_the_way=to_primary)
    deciding = {name: recipe for name, recipe in recipes.items() if name in DECIDING}
    return [
        *make_jobs(size, out, recipes),
        *make_jobs(replace(shorter, seeds=sizes.more_seeds), out, recipes),
        *make_jobs(replace(shorter, seeds=sizes.deciding_seeds), out, deciding),
    ]


def _of(jobs: Sequence[dict], names: Sequence[str], seeds: Sequence[int]) -> list[dict]:
    """The jobs of these rows and seeds."""
    wanted = {f"{name}-{seed}" for name in names for seed in seeds}
    return [job for job in jobs if Path(job["run"]).name in wanted]


def wall_clock(jobs: Sequence[dict], names: Sequence[str], problems: int) -> dict[str, list]:
    """Seconds to sample 1,000 completions with one thread, by name and seed.

    The names are timed in turn.

    Args:
        jobs: finished jobs.
        names: rows to time.
        problems: number of test stories, with eight completions each.
    """
    asked = list(itertools.islice(stories("test", seed=0), problems))
    out: dict[str, list[float]] = {name: [] for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in sorted({job["seed"] for job in jobs}):
        for name in names:
            (job,) = [j for j in jobs if Path(j["run"]).name == f"{name}-{seed}"]
            policy = policy_of(job)
            sample(policy, asked[:1], num_generations=8, seed=seed)  # warm up
            began = time.perf_counter()
            for start in range(0, problems, 16):
                sample(policy, asked[start : start + 16], num_generations=8, seed=seed + start)
            seconds = time.perf_counter() - began
            out[name].append(1000 * seconds / (8 * problems))
    torch.set_num_threads(threads)
    return out


def answers_to_one_story(
    jobs: Sequence[dict], kept: Path | None = None
) -> tuple[str, dict[str, str]]:
    """One test story and the answer of each policy of the first seed (paper, Fig. 7 and 14).

    The story is the first one with at least four operations that every policy answers right at
    least once, among the stories for which runs keep an answer. The answer of a policy is its right
    completion of median length. ``(sentence, {})`` if there is no such story.

    Args:
        jobs: finished jobs.
        kept: file of finished runs, for jobs without a folder.
    """
    first = [job for job in jobs if job["seed"] == jobs[0]["seed"]]
    answers = {
        Path(job["run"]).name.rsplit("-", 1)[0]: pair["result"]["answers"]
        for job, pair in zip(first, finished(first, kept))
    }
    common = set.intersection(*(set(row) for row in answers.values()))
    if not common:
        return "No story was answered right by every policy.", {}
    asked = min(common, key=int)
    problem = next(itertools.islice(stories("test", seed=0), int(asked), None))
    return problem.question, {name: row[asked] for name, row in answers.items()}


def _informed(jobs: Sequence[dict], question: str, texts: dict[str, str]) -> dict[str, tuple]:
    """Method -> token texts and informativeness (nats) of its completion, by its own policy."""
    out = {}
    for name, text in texts.items():
        (job,) = [j for j in jobs if Path(j["run"]).name == f"{name}-{jobs[0]['seed']}"]
        policy = policy_of(job)
        rollouts = from_texts(policy, [Problem(question, "")], [text])
        s = informativeness(answer_entropies(policy, rollouts), rollouts.completion_mask)[0]
        ids = rollouts.completion_ids[0].tolist()[:-1]  # without the end of the sequence
        out[name] = token_texts(policy.tokenizer, ids), s.tolist()[:-1]
    return out
