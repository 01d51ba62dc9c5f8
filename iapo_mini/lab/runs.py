"""Training runs in processes of their own: what a run is told, what it leaves, how it goes on.

Every (recipe, seed) is a process with one thread, so two run side by side on two cores. A run that
is there already is not made again; one that was interrupted goes on, in training and in evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from iapo_mini.config import TrainConfig, use_methods, with_defaults
from iapo_mini.files import read_json, replace_folder, versions, write_json
from iapo_mini.lab import ledger
from iapo_mini.lab.judging import PRIMARY, judge, judge_on_the_way, way_path
from iapo_mini.lab.sizes import Size
from iapo_mini.metrics import LOG, whole_log
from iapo_mini.policy import load_policy
from iapo_mini.signals import end_with_parent
from iapo_mini.trainer import start_policy, train

_CHILD = "IAPO_MINI_CHILD"
"""Environment variable of a process that is to end with the one that started it."""

START = "start"
"""Name of the row of the start policy, which no run trains."""


def make_jobs(
    size: Size,
    out: Path,
    recipes: Mapping[str, Mapping | None],
    split: str = "test",
    methods: str | None = None,
) -> list[dict]:
    """One job for each seed and recipe.

    Args:
        size: of training and evaluation.
        out: folder of the runs; a run goes to ``out/<recipe>-<seed>``.
        recipes: name -> fields of TrainConfig, None for the start policy.
        split: stream of the evaluation.
        methods: module with methods beside the library's own, for :func:`use_methods`.

    Returns:
        Jobs ``{"run": folder, "config": TrainConfig fields or None, "seed", "split", "methods",
        "evaluation": {"problems", "num_generations", "ks", "primary", "on_the_way", "pools"}}``.
    """
    if methods:
        use_methods(methods)
    jobs = []
    for seed, (name, recipe) in itertools.product(size.seeds, recipes.items()):
        config = None
        if recipe is not None:
            settings = {
                "max_steps": size.max_steps,
                "prompts_per_step": size.prompts_per_step,
                "seed": seed,
                "threads": 1,
            }
            config = TrainConfig(**settings | recipe).settings()
        measured = ("problems", "num_generations", "ks", "primary", "on_the_way", "pools")
        job = {
            "run": str(out / f"{name}-{seed}"),
            "config": config,
            "seed": seed,
            "split": split,
            "methods": methods,
            "evaluation": {field: getattr(size, field) for field in measured},
        }
        jobs.append(json.loads(json.dumps(job)))  # as it will be read back
    return jobs


def run_job(job: dict) -> None:
    """Train (unless the method is the start policy), evaluate, write ``result.json`` in the run."""
    torch.set_num_threads(1)
    if job["methods"]:
        use_methods(job["methods"])
    run, size = Path(job["run"]), job["evaluation"]
    run.mkdir(parents=True, exist_ok=True)
    if job["config"] is None:
        judge(load_policy(), job)
        return
    folder, config = run / "train", TrainConfig(**job["config"])
    policy = start_policy(config)
    primary = size["primary"] or config.max_steps

    def on_step(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] in size["on_the_way"]:
            judge_on_the_way(policy, job, metrics["step"])
        if metrics["step"] == primary < config.max_steps:
            judge(policy, job)
            replace_folder(run / PRIMARY, policy.save)

    resume = (folder / "config.json").is_file()
    # A run of a command that was killed ends with its step; this one goes on from there.
    train(config, folder, resume=resume, policy=policy, progress=False, wait=120.0, on_step=on_step)
    if not (run / "primary.json").is_file():
        judge(policy, job)
    way = {step: read_json(way_path(run, step)) for step in size["on_the_way"]}
    seconds = sum(
        value
        for row in whole_log(folder / LOG, config.max_steps)
        for name, value in row.items()
        if name.startswith("seconds_")
    )
    found = read_json(run / "primary.json")
    write_json(run / "result.json", found | {"on_the_way": way, "train_minutes": seconds / 60})


def _found(job: Mapping) -> dict | None:
    """``{"result", "curve"}`` of a run from its folder; None if it is not finished there.

    Raises:
        ValueError: for a file of it that is damaged.
    """
    path = Path(job["run"]) / "result.json"
    if not path.is_file():
        return None
    ks = job["evaluation"]["ks"]
    metrics = [f"{name}@{k}" for name in ("pass", "length", "ratio") for k in ks]
    needs = ("length", *metrics, "intervals", "roles", "by_steps", "train_minutes")
    result, curve = read_json(path, needs=needs), None
    if job["config"] is not None:
        rows = whole_log(path.parent / "train" / LOG, job["config"]["max_steps"])
        curve = {name: [round(row[name], 5) for row in rows] for name in ledger.CURVES}
    return {"result": result, "curve": curve}


def run_all(jobs: Sequence[dict], parallel: int | None = None, kept: Path | None = None) -> None:
    """Run the jobs that have no result yet, ``parallel`` processes at a time.

    Args:
        jobs: from :func:`make_jobs`.
        parallel: default one per core.
        kept: file of finished runs (:mod:`iapo_mini.lab.ledger`): those in it are not made again,
            and each that finishes is added.

    Raises:
        ValueError: when a run's folder holds one of other settings.
        RuntimeError: when a run fails; the message holds its last line.
    """
    parallel = parallel or os.cpu_count() or 1
    waiting, entries = [], ledger.read(kept)
    for job in jobs:
        run = Path(job["run"])
        entry = entries.get(run.name)
        if entry is not None and _as_now(entry["job"] | {"run": job["run"]}, job["run"]) == job:
            continue
        saved = run / "job.json"
        before = read_json(saved, {}, needs=("config",))
        same = bool(before) and _as_now(before, job["run"]) == job
        if same and (found := _found(job)) is not None:  # a damaged one is told before others run
            if kept is not None:
                ledger.append(kept, job, found)
            continue
        if saved.is_file() and not same:
            raise ValueError(
                f"out holds '{run}', made with other settings; name a new folder or remove it."
            )
        write_json(saved, job)
        waiting.append(job)
    sizes = {Path(j["run"]): (j["config"] or {"max_steps": 1})["max_steps"] for j in waiting}
    bar = tqdm(
        total=sum(sizes.values()), unit="step", desc=f"{len(waiting)} runs", disable=not waiting
    )
    told = {Path(job["run"]): job for job in waiting}
    running: dict[subprocess.Popen, Path] = {}
    counted: dict[Path, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                run = Path(waiting.pop(0)["run"])
                running[_started(run)] = run
            time.sleep(0.5)
            for process, run in list(running.items()):
                metrics = run / "train" / LOG
                done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
                bar.update(done - counted.get(run, 0))
                counted[run] = done
                if process.poll() is None:
                    continue
                del running[process]
                bar.update(sizes[run] - done)  # the start policy trains nothing
                if process.returncode != 0:
                    raise RuntimeError(f"the run in '{run}' failed: {_last_line(run)}")
                found = _found(told[run])
                if kept is not None and found is not None:
                    ledger.append(kept, told[run], found)
    finally:
        _ask_to_end(running)
        bar.close()


def _started(run: Path) -> subprocess.Popen:
    """The process of a run, whose messages go to ``log.txt``.

    It has a group of its own: a terminal's Ctrl-C would ask it to end a second time, which does not
    wait for the step. It ends when its stdin is closed (:func:`end_with_parent`).
    """
    # One thread for each process: two processes beat two threads on models this small.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", _CHILD: "1"}
    with (run / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-X", "utf8", "-m", "iapo_mini.lab.runs", str(run / "job.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def _last_line(run: Path) -> str:
    """What a run said last."""
    text = (run / "log.txt").read_text(encoding="utf-8", errors="replace")
    return (text.strip().splitlines() or ["no message"])[-1]


def _ask_to_end(processes: Collection[subprocess.Popen]) -> None:
    """Let each finish its step and save. A signal would do that on POSIX alone."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=120)


def _as_now(saved: dict, run: str) -> dict:
    """A job as written before, as :func:`make_jobs` would write it today.

    Its folder may have been moved, or be named in another way.
    """
    config = saved["config"] and with_defaults(saved["config"])
    evaluation = {"primary": 0, "on_the_way": [], "pools": []} | saved["evaluation"]
    return saved | {"run": run, "config": config, "evaluation": evaluation}


def finished(jobs: Sequence[dict], kept: Path | None = None) -> list[dict]:
    """``{"result", "curve"}`` of every job, from its folder or else from ``kept``.

    Args:
        jobs: finished by :func:`run_all`; kept: as there.
    """
    entries = ledger.read(kept)
    return [_found(job) or entries[Path(job["run"]).name] for job in jobs]


def collect(jobs: Sequence[dict], size: Size, kept: Path | None = None) -> dict:
    """Gather finished jobs into the common part of a results file (``lab.results``).

    Args:
        jobs: from :func:`make_jobs`, finished by :func:`run_all`; size: theirs.
        kept: file of finished runs, where those without a folder are looked up.
    """
    methods: dict[str, dict] = {}
    curves: dict[str, list] = {}
    configs: dict[str, dict] = {}
    metrics = ["length"]
    metrics += [f"{name}@{k}" for k in size.ks for name in ("pass", "length", "ratio")]
    by_name: dict[str, list[tuple[dict, dict]]] = defaultdict(list)
    for job, pair in zip(jobs, finished(jobs, kept)):
        by_name[Path(job["run"]).name.rsplit("-", 1)[0]].append((job, pair))
    for name, rows in by_name.items():
        own, pairs = zip(*rows)
        found = [pair["result"] for pair in pairs]
        methods[name] = {metric: [result[metric] for result in found] for metric in metrics}
        methods[name]["intervals"] = [result["intervals"] for result in found]
        methods[name]["roles"] = {
            role: [result["roles"][role] for result in found] for role in found[0]["roles"]
        }
        methods[name]["by_steps"] = {
            steps: {
                metric: [result["by_steps"][steps][metric] for result in found]
                for metric in ("accuracy", "length")
            }
            for steps in found[0]["by_steps"]
        }
        methods[name]["train_minutes"] = [result["train_minutes"] for result in found]
        if own[0]["config"] is None:
            continue
        if size.on_the_way:
            methods[name]["on_the_way"] = {
                str(step): {
                    metric: [
                        result["on_the_way"][str(step)][metric]
                        for result in found
                        if str(step) in result["on_the_way"]  # some runs end before it
                    ]
                    for metric in ("length", "pass@1")
                }
                for step in size.on_the_way
            }
        methods[name]["aggregation"] = own[0]["config"]["aggregation"]
        configs[name] = {k: v for k, v in own[0]["config"].items() if k != "seed"}
        curves[name] = [pair["curve"] for pair in pairs]
    evaluation = dataclasses.asdict(size) | {"split": jobs[0]["split"], "temperature": 1.0}
    return {
        "seeds": list(size.seeds),
        "methods": methods,
        "curves": curves,
        "config": {**configs, "evaluation": evaluation},
        "versions": versions(),
    }


if __name__ == "__main__":
    if os.environ.get(_CHILD):
        end_with_parent()
    run_job(read_json(Path(sys.argv[1])))
