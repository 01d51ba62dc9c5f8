"""Training of a real model: a warm start, then four methods on the same prompts.

The question is whether the result of the story world carries over to a published model, whose
numbers have several tokens and whose words were learned elsewhere. In the story world the start
policy solves every problem within 32 tries, so a method can't lose there what the policy could do
before. Here the difficulty is chosen so that it can: between half and nine tenths of the problems
are solved within 32 tries.

The parts, each of which continues after a break:

1. ``start``: a warm start (:mod:`iapo_mini.lab.warm_start`). Its adapter is kept beside the
   results, so that another machine continues the study from the same start.
2. ``levels``: Pass@1 and Pass@32 of the start by level, on the tune stream. They choose the levels
   of training and test (:func:`chosen_levels`).
3. The runs of :data:`ROWS`, and the judgement of each on the test stream.

The preset ``full`` is for a CPU: a short warm start, and stories of one or two operations. The
preset ``card`` has a longer warm start and stories of up to four operations, and judges more
completions at once. The command measures the speed of the machine and tells how long it will take
before it begins.

    figures/results/real_training.json
      everything that table1.json has (iapo_mini.lab.results): seeds, methods, curves, config,
      versions; and
      model     name of the model
      start     {"minutes", "loss": [[step, nats per token]], "settings"} of the warm start
      levels    [{"level": [operations, largest value], "format", "pass@1", "pass@32"}]
      chosen    numbers of the chosen levels;  expected  their means
      within    whether format, Pass@1 and Pass@32 of the start lie in the wanted ranges
      tokens    name -> [one per seed: tokens sampled in training]
    figures/results/runs/real_start/   the start's adapter, warm_start.json, and levels.json
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iapo_mini.errors import MOST_REAL, MOST_SEED, check_choice, check_number
from iapo_mini.evaluation import evaluate
from iapo_mini.files import read_json, same_settings, versions, write_json
from iapo_mini.lab import ledger
from iapo_mini.lab.figures.real import progress
from iapo_mini.lab.pace import LEARN, REFER, SAMPLE, duration, forward_speed
from iapo_mini.lab.real_progress import BASE, progress_table, so_far
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import START, collect, finished, make_jobs, run_all
from iapo_mini.lab.school import LEVELS, SHORT_LEVELS, Level, worked_stories, write_worked
from iapo_mini.lab.sizes import Size
from iapo_mini.lab.warm_start import WarmStart, warm_start
from iapo_mini.policies import EMBEDDED, shown_name
from iapo_mini.policy import Policy, load_policy
from iapo_mini.rewards import parse_answer

ROWS: dict[str, dict] = {
    "grpo": {"method": "grpo"},
    "grpo_efficient": {"method": "grpo_efficient"},
    "iapo": {"method": "iapo"},
    "iapo_sentence": {"method": "iapo", "estimator_stride": "sentence"},
}
"""Row -> fields of TrainConfig. Everything else is equal, or comes from the method's recipe."""

WANTED = {"format": (0.9, 1.0), "pass@1": (0.3, 0.7), "pass@32": (0.5, 0.9)}
"""Ranges in which the start policy should lie."""

_KS = (1, 2, 4, 8, 16, 32)
_TRIES = 32  # completions by which a level is judged
_TRAIN_PROBLEMS = 1000
_TRAIN, _TEST = "data/train.jsonl", "data/test.jsonl"
_PROMPT = 160  # mean tokens of a prompt in SmolLM2, for the estimate of time


@dataclass(frozen=True)
class Scale:
    """Sizes of the parts of the study.

    Attributes:
        runs: size of training and judgement.
        warm_steps: steps of the warm start.
        warm_batch: worked stories in each of them;  warm_rate: its peak learning rate;
            warm_rank: rank of its adapter.
        per_level: tune problems by which a level is judged.
        levels: levels of difficulty to choose from.
        tokens: mean tokens of a solution, for the estimate of time.
    """

    runs: Size
    warm_steps: int
    warm_batch: int
    per_level: int
    warm_rate: float = 1e-3
    warm_rank: int = 32
    levels: tuple[Level, ...] = LEVELS
    tokens: int = 90


SCALES = {
    "quick": Scale(
        Size((0,), 1, 2, 1, 2, (1, 2)), warm_steps=2, warm_batch=8, per_level=1, levels=LEVELS[:2],
    ),
    "full": Scale(
        Size((0, 1), 30, 32, 4, 32, _KS),
        warm_steps=130, warm_batch=16, warm_rank=8, per_level=8, levels=SHORT_LEVELS,
        tokens=60,
    ),
    "card": Scale(
        Size((0, 1), 30, 32, 4, 32, _KS, together=8),
        warm_steps=160, warm_batch=64, per_level=8,
    ),
}  # fmt: skip
"""Preset -> sizes."""


def real_training(
    preset: str = "full",
    *,
    model: str = EMBEDDED,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
    seeds: int = 0,
    learning_rate: float = 3e-4,
    unfinished: bool = False,
) -> dict:
    """Warm-start a model, train it with every method of :data:`ROWS`, and judge the results.

    Args:
        preset: a key of :data:`SCALES`.
        model: folder or hub id of a model.
        out: folder of the runs. What is finished there, or in the ledger, is not made again.
        figures: folder of the results file and the ledger.
        parallel: number of processes; default one per core.
        seeds: number of seeds, from 0 on; 0 is the preset's number. More can be added later.
        learning_rate: peak learning rate of every run.
        unfinished: make nothing, and tell what the runs of an unfinished study say
            (:mod:`iapo_mini.lab.real_progress`).

    Returns:
        The content of the results file.

    Raises:
        ValueError: for an argument out of range, or a folder with another study.
    """
    check_choice("preset", preset, SCALES)
    check_number("seeds", seeds, 0, MOST_SEED)
    check_number("learning_rate", learning_rate, above=0, most=MOST_REAL)
    out, figures = Path(out), Path(figures)
    check_options(out, figures, parallel)
    scale = SCALES[preset]
    size = replace(scale.runs, seeds=tuple(range(seeds))) if seeds else scale.runs
    folder = out / preset / "real_training"
    if unfinished:
        return _told_so_far(folder, scale, figures, preset)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": model, "learning_rate": learning_rate, "preset": preset}
    same_settings(folder / "settings.json", "study", settings)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"device": device, "versions": versions()}
    write_json(folder / "machine.json", machine)
    told = expected_seconds(load_policy(model, lora_rank=0), size, scale)
    print(f"All of it takes {duration(told)} on this machine as fast as it is now; the same "
          "command continues after a break.", flush=True)  # fmt: skip
    kept = ledger.ledger_path(figures, file_stem("real_training", preset))
    kept_start = kept.with_name(file_stem("real_start", preset))
    made = warm_start(folder / "start", warm_settings(model, scale), kept_start)
    start = folder / "start" / "model"
    measured = levels_of(start, folder / "levels", scale, kept_start)
    chosen = chosen_levels(measured)
    train_file, test_file = _files(folder, [scale.levels[i] for i in chosen], size)
    shared = {
        "model": start.as_posix(), "data": "gsm8k", "data_file": train_file.as_posix(),
        "split": "all", "learning_rate": learning_rate, "micro_batch_size": 4, "save_steps": 10,
    }  # fmt: skip
    recipes: dict[str, dict | None] = {START: None}
    recipes |= {name: shared | row for name, row in ROWS.items()}
    jobs = make_jobs(
        size, folder, recipes, split="all", start=start.as_posix(), test_file=test_file.as_posix()
    )
    run_all(jobs, parallel, kept)
    results = collect(jobs, size, kept) | _about(model, made, measured) | _costs(jobs, kept)
    results["device"] = device
    write_json(results_path(figures, "real_training", preset), results)
    return results


def _about(model: str, made: Mapping, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a study knows beside its runs; a model in a folder is called by the folder's name."""
    name = shown_name(model)
    chosen = chosen_levels(measured)
    expected = _mean_of(measured, chosen)
    return {
        "model": name, "start": {**made, "settings": {**made["settings"], "model": name}},
        "levels": list(measured), "chosen": chosen, "expected": expected,
        "within": _distance(expected) == 0,
    }  # fmt: skip


def _told_so_far(folder: Path, scale: Scale, figures: Path, preset: str) -> dict:
    settings = read_json(folder / "settings.json", needs=("model", "learning_rate"))
    made = read_json(folder / "start" / "warm_start.json", needs=("settings", "minutes", "loss"))
    measured = read_json(folder / "levels" / "levels.json", needs=("levels",))["levels"]
    study = _about(settings["model"], made, measured)
    study["learning_rate"] = settings["learning_rate"]
    entries = {}
    if (folder / _TEST).is_file():  # a study that was stopped before has no runs
        content = ledger.content_of((folder / "start" / "model").as_posix(), str(folder / _TEST))
        kept = ledger.read(ledger.ledger_path(figures, file_stem("real_training", preset)))
        entries = {
            name: entry for name, entry in kept.items()
            if entry["job"].get("content", [])[: len(content)] == content
        }  # fmt: skip
    results = so_far(folder, tuple(ROWS), study, entries)
    path = results_path(figures, "real_training_so_far", preset)
    write_json(path, results)
    if BASE in results["runs"]:
        progress(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def warm_settings(model: str, scale: Scale) -> WarmStart:
    """The warm start of a study."""
    return WarmStart(
        model, scale.warm_steps, scale.warm_batch, scale.warm_rate, scale.warm_rank,
        levels=scale.levels, save_every=max(10, scale.warm_steps // 4),
    )  # fmt: skip


def expected_seconds(policy: Policy, size: Size, scale: Scale) -> float:
    """Seconds of the whole study, from the speed of one pass (:mod:`iapo_mini.lab.pace`)."""
    group, tokens = 8, scale.tokens
    rows = size.prompts_per_step * group
    warm = scale.warm_steps * scale.warm_batch * (_PROMPT + tokens) * LEARN
    levels = len(scale.levels) * scale.per_level * _TRIES * tokens * SAMPLE
    step = rows * tokens * (SAMPLE + LEARN + REFER)
    step += size.prompts_per_step * _PROMPT * (1 + LEARN + REFER)
    # The text that forces an answer has about five tokens, and a sentence has about fifteen.
    asking = rows * tokens * (5 + 5 / 15)
    judging = size.problems * size.num_generations * tokens * SAMPLE
    training = size.max_steps * (len(ROWS) * step + asking) + (len(ROWS) + 1) * judging
    return (warm + levels + len(size.seeds) * training) / forward_speed(policy)


def levels_of(start: Path, folder: Path, scale: Scale, kept: Path) -> list[dict[str, Any]]:
    """Format, Pass@1, Pass@32 and length of the start policy on tune problems of every level.

    They are measured in ``folder``, and kept beside the start's adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, saved = folder / "levels.json", kept / "levels.json"
    if not path.is_file() and saved.is_file():
        shutil.copy(saved, path)
    if not path.is_file():
        _measure(start, path, scale)
    if not saved.is_file():
        shutil.copy(path, saved)
    return read_json(path, needs=("levels",))["levels"]


def _measure(start: Path, path: Path, scale: Scale) -> None:
    count = scale.per_level * len(scale.levels)
    problems = [w.problem for w in itertools.islice(worked_stories("tune", 0, scale.levels), count)]
    policy = load_policy(str(start), lora_rank=0)
    result = evaluate(
        policy, problems, ks=(1, _TRIES), num_generations=_TRIES,
        batch_size=_TRIES * (8 if policy.device.type == "cpu" else 64),
        save_to=path.with_name("completions.jsonl"),
    )  # fmt: skip
    write_json(path, {"levels": [
        {"level": list(level)} | _of_level(result["completions"], number, len(scale.levels))
        for number, level in enumerate(scale.levels)
    ]})  # fmt: skip


def _of_level(completions: Sequence[Mapping], number: int, levels: int) -> dict[str, float]:
    """Metrics of one level; the problems are of each level in turn."""
    own = [c for c in completions if c["problem"] % levels == number]
    solved = {c["problem"]: False for c in own}
    for c in own:
        solved[c["problem"]] |= c["correct"]
    return {
        "format": statistics.fmean(parse_answer(c["text"]) is not None for c in own),
        "pass@1": statistics.fmean(c["correct"] for c in own),
        f"pass@{_TRIES}": statistics.fmean(solved.values()),
        "length": statistics.fmean(c["tokens"] for c in own),
    }


def _mean_of(measured: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> dict[str, float]:
    return {name: statistics.fmean(measured[i][name] for i in chosen) for name in WANTED}


def _distance(found: Mapping[str, float]) -> float:
    """How far a start policy is outside the wanted ranges; 0 inside them."""
    return sum(
        max(low - found[name], found[name] - high, 0.0) for name, (low, high) in WANTED.items()
    )


def chosen_levels(measured: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the levels whose problems, equally many of each, suit the start policy best.

    Best is the set of levels whose means are least outside of :data:`WANTED`; then the one nearest
    to the middle of the ranges of Pass@1 and Pass@32.
    """

    def badness(chosen: Sequence[int]) -> tuple[float, float]:
        found = _mean_of(measured, chosen)
        middle = {name: sum(WANTED[name]) / 2 for name in ("pass@1", "pass@32")}
        off = sum(abs(found[name] - value) for name, value in middle.items())
        return round(_distance(found), 9), round(off, 9)

    sets: list[tuple[int, ...]] = []
    for size in range(len(measured), 0, -1):
        sets += itertools.combinations(range(len(measured)), size)
    best = min(sets, key=badness)
    return list(best)


def _files(folder: Path, levels: Sequence[Level], size: Size) -> tuple[Path, Path]:
    """Files of train and test problems, in GSM8K's format, made again if they are missing."""
    paths = folder / _TRAIN, folder / _TEST
    # The warm start has seen the train stream of seed 0.
    for path, split, seed, count in (
        (paths[0], "train", 1, _TRAIN_PROBLEMS), (paths[1], "test", 0, size.problems),
    ):  # fmt: skip
        if not path.is_file():
            write_worked(path, list(itertools.islice(worked_stories(split, seed, levels), count)))
    return paths


def _costs(jobs: Sequence[dict], kept: Path) -> dict[str, dict[str, list]]:
    """Tokens sampled in training, by row and seed. The minutes are in the rows themselves."""
    tokens: dict[str, list[float]] = {}
    for job, pair in zip(jobs, finished(jobs, kept)):
        if job["config"] is not None:
            name = Path(job["run"]).name.rsplit("-", 1)[0]
            rows = job["config"]["prompts_per_step"] * job["config"]["num_generations"]
            tokens.setdefault(name, []).append(round(rows * sum(pair["curve"]["length"])))
    return {"tokens": tokens}


def real_training_table(results: Mapping) -> str:
    """The rows as :func:`iapo_mini.lab.results.comparison_table` shows them, with their costs.

    Of an unfinished study: :func:`iapo_mini.lab.real_progress.progress_table`.
    """
    from iapo_mini.lab.results import comparison_table

    if "runs" in results:
        return progress_table(results)
    lines = comparison_table(dict(results)).splitlines()
    lines[0] += " training (minutes) | training (1000 tokens) |"
    lines[1] += "---|---|"
    for i, (name, row) in enumerate(results["methods"].items(), start=2):
        minutes = statistics.fmean(row["train_minutes"])
        sampled = statistics.fmean(results["tokens"].get(name, [0]))
        lines[i] += f" {minutes:.0f} | {sampled / 1000:.0f} |"
    if not results["within"]:
        told = ", ".join(f"{name} {value:.2f}" for name, value in results["expected"].items())
        lines.append(f"\nThe start policy is outside of the wanted ranges: {told}.")
    return "\n".join(lines)
