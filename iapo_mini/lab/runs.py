"""Training runs in separate processes: jobs, the work of a process, and collecting results.

Every (recipe, seed) is a run in a process with one thread, so two run side by side on two cores. A
process that has finished a run takes the next one. A finished run is not repeated. An interrupted
run continues, both in training and in evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.files import read_json, replace_folder, versions, write_json
from iapo_mini.lab import ledger
from iapo_mini.lab.judging import PRIMARY, judge, judge_on_the_way, way_path
from iapo_mini.lab.sizes import Size
from iapo_mini.metrics import LOG, whole_log
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import load_policy
from iapo_mini.recipes import use_methods
from iapo_mini.trainer import start_policy, train

_CHILD = "IAPO_MINI_CHILD"
"""Environment variable of a process that must end when its parent process ends."""

START = "start"
"""Name of the row of the start policy, which is not trained."""


def make_jobs(
    size: Size,
    out: Path,
    recipes: Mapping[str, Mapping | None],
    split: str = "test",
    methods: str | None = None,
    *,
    start: str = EMBEDDED,
    test_file: str = "",
) -> list[dict]:
    """One job for each seed and recipe.

    Args:
        size: size of training and evaluation.
        out: folder of the runs; a run goes to ``out/<recipe>-<seed>``.
        recipes: name -> fields of TrainConfig, or None for the start policy.
        split: stream of the evaluation.
        methods: module with further methods, for :func:`use_methods`.
        start: model of the start policy.
        test_file: file of problems in GSM8K's format to judge on, instead of stories.

    Returns:
        One dict for each job, with ``run`` (a folder), ``config`` (fields of TrainConfig, or None),
        ``seed``, ``split``, ``methods``, ``start``, ``test_file``, ``content`` (fingerprints of
        files) and ``evaluation`` (a dict with ``problems``, ``num_generations``, ``ks``,
        ``primary``, ``on_the_way``, ``pools``, ``together`` and ``max_completion_length``).
    """
    if methods:
        use_methods(methods)
    jobs, shared = [], ledger.content_of(start, test_file)
    for seed, (name, recipe) in itertools.product(size.seeds, recipes.items()):
        config = None
        if recipe is not None:
            settings = {
                "max_steps": size.max_steps,
                "prompts_per_step": size.prompts_per_step,
                "seed": seed,
                "threads": 1,
                "max_completion_length": size.max_completion_length,
            }
            config = TrainConfig(**settings | recipe).settings()
        measured = (
            "problems", "num_generations", "ks", "primary", "on_the_way", "pools", "together",
            "max_completion_length",
        )  # fmt: skip
        job = {
            "run": str(out / f"{name}-{seed}"),
            "config": config,
            "seed": seed,
            "split": split,
            "methods": methods,
            "start": start,
            "test_file": test_file,
            "evaluation": {field: getattr(size, field) for field in measured},
        }
        job["content"] = shared + ledger.content_of("", (config or {}).get("data_file", ""))
        jobs.append(json.loads(json.dumps(job)))  # the same types as after reading it back
    return jobs


def run_job(job: dict) -> None:
    """Train (except for the start policy), evaluate, and write ``result.json`` in the run."""
    torch.set_num_threads(1)
    if job["methods"]:
        use_methods(job["methods"])
    run, size = Path(job["run"]), job["evaluation"]
    run.mkdir(parents=True, exist_ok=True)
    if job["config"] is None:
        judge(load_policy(job["start"], lora_rank=0), job)
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
    # If the command was killed, its run ends after the current step; this one continues from there.
    train(
        config,
        folder,
        resume=resume,
        policy=policy,
        progress=False,
        wait=120.0,
        callbacks=[Callback(on_step)],
    )
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
    """``{"result", "curve"}`` of a run from its folder, or None if the run is not finished.

    Raises:
        ValueError: for a damaged file.
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
        parallel: number of processes; default one per core.
        kept: file of finished runs (:mod:`iapo_mini.lab.ledger`). Runs in it are not repeated, and
            each run that finishes is added.

    Raises:
        ValueError: when a run's folder holds a run with other settings.
        RuntimeError: when runs fail; the message holds the last line of each one's output. Runs
            that were in work beside them are finished first, and no other is begun.
    """
    parallel = parallel or os.cpu_count() or 1
    waiting, entries = [], ledger.read(kept)
    for job in jobs:
        run = Path(job["run"])
        entry = entries.get(run.name)
        if entry is not None and ledger.is_of(entry, job):
            continue
        saved = run / "job.json"
        before = read_json(saved, {}, needs=("config",))
        same = bool(before) and ledger.as_now(before, job["run"]) == job
        if same and (found := _found(job)) is not None:  # raises for damage before others run
            if kept is not None:
                ledger.append(kept, job, found)
            continue
        if saved.is_file() and not same:
            raise ValueError(
                f"out holds '{run}', made with other settings; name a new folder, or remove it."
            )
        write_json(saved, job)
        waiting.append(job)
    _run(waiting, parallel, kept)


def _run(waiting: list[dict], parallel: int, kept: Path | None) -> None:
    """Give the jobs to processes; each takes another job when it has finished one."""
    bar = tqdm(
        total=sum(map(_steps, waiting)), unit="step", desc=f"{len(waiting)} runs",
        disable=not waiting,
    )  # fmt: skip
    busy: dict[subprocess.Popen, dict] = {}
    idle: list[subprocess.Popen] = []
    counted: dict[str, int] = defaultdict(int)
    failed: list[str] = []
    try:
        while busy or (waiting and not failed):
            while waiting and not failed and len(busy) < parallel:
                job = waiting.pop(0)
                busy[_give(job, idle.pop() if idle else None)] = job
            time.sleep(0.2)
            for process, job in list(busy.items()):
                run = Path(job["run"])
                metrics = run / "train" / LOG
                done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
                bar.update(done - counted[job["run"]])
                counted[job["run"]] = done
                ended_well = (run / "result.json").is_file()
                if not ended_well and process.poll() is None:
                    continue
                del busy[process]
                if not ended_well:  # for lack of memory perhaps, so others may succeed
                    failed.append(f"the run in '{run}' failed: {_last_line(run)}")
                    bar.write(f"{failed[-1]}\n{len(busy)} others are finished first", sys.stderr)
                    continue
                idle.append(process)
                bar.update(_steps(job) - done)  # the start policy has no steps
                found = _found(job)
                if kept is not None and found is not None:
                    ledger.append(kept, job, found)
    finally:
        _ask_to_end([*busy, *idle])
        bar.close()
    if failed:
        raise RuntimeError("; ".join(failed))


def _last_line(run: Path) -> str:
    """The last line of a run's output."""
    log = run / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return (text.strip().splitlines() or ["no message"])[-1]


def _ask_to_end(processes: Sequence[subprocess.Popen]) -> None:
    """Let each finish its step and save: its stdin is closed, since Windows can't send SIGTERM."""
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it has died
                process.stdin.close()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=120)


def _steps(job: Mapping) -> int:
    return job["config"]["max_steps"] if job["config"] else 1


def _give(job: Mapping, process: subprocess.Popen | None) -> subprocess.Popen:
    """Give this job to a waiting process, whose imports are done, or start a new process."""
    path = str(Path(job["run"]) / "job.json")
    if process is not None:
        with contextlib.suppress(OSError):  # it has died, which is reported later
            print(path, file=process.stdin, flush=True)
        return process
    # One thread per process: for such small models two processes are faster than two threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", _CHILD: "1"}
    # In a group of its own: a terminal's Ctrl-C would be a second request, which does not wait.
    return subprocess.Popen(
        [sys.executable, "-X", "utf8", "-m", "iapo_mini.lab.runs", path],
        stdin=subprocess.PIPE, encoding="utf-8", env=environment, start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )  # fmt: skip


def finished(jobs: Sequence[dict], kept: Path | None = None) -> list[dict]:
    """``{"result", "curve"}`` of every job, from ``kept`` or else from its folder.

    The folder may hold a run with other settings, which :func:`run_all` does not look at if
    ``kept`` has this job.

    Args:
        jobs: jobs that :func:`run_all` has finished.
        kept: file of finished runs, as in :func:`run_all`.
    """
    entries = ledger.read(kept)
    own = [entries.get(Path(job["run"]).name) for job in jobs]
    return [
        entry if entry is not None and ledger.is_of(entry, job) else cast(dict, _found(job))
        for job, entry in zip(jobs, own)
    ]


def collect(jobs: Sequence[dict], size: Size, kept: Path | None = None) -> dict:
    """Gather finished jobs into the common part of a results file (``lab.results``).

    Args:
        jobs: from :func:`make_jobs`, finished by :func:`run_all`.
        size: size of these jobs.
        kept: file of finished runs, for those without a folder.
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
                        if str(step) in result["on_the_way"]  # some runs end before this step
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


def _jobs_of_parent(first: str) -> Iterator[str]:
    """The job that this process was started for, then the jobs whose paths the parent writes.

    If the parent ends, its pipe closes, and this process ends as after a signal.
    """
    paths: queue.SimpleQueue[str] = queue.SimpleQueue()
    paths.put(first)

    def listen() -> None:
        for line in sys.stdin:
            paths.put(line.strip())
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield paths.get()


def _work(path: Path) -> None:
    """Do the job in this file; its output goes to the log of its run."""
    with (path.parent / "log.txt").open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    run_job(read_json(path))


if __name__ == "__main__":
    if os.environ.get(_CHILD):
        for name in _jobs_of_parent(sys.argv[1]):
            _work(Path(name))
    else:
        run_job(read_json(Path(sys.argv[1])))
