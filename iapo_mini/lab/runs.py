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
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from iapo_mini.config import TrainConfig, use_methods, with_defaults
from iapo_mini.evaluation import evaluate
from iapo_mini.files import read_json, versions, write_json
from iapo_mini.lab.sizes import Size
from iapo_mini.metrics import LOG, whole_log
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import ROLES, stories, token_roles
from iapo_mini.trainer import train

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
        "evaluation": {"problems", "num_generations", "ks"}}``.
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
        measured = ("problems", "num_generations", "ks")
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
    began = time.perf_counter()
    if job["config"] is None:
        policy = load_policy()
    else:
        folder = run / "train"
        config = TrainConfig(**job["config"])
        resume = (folder / "config.json").is_file()
        # A run of a command that was killed ends with its step; this one goes on from there.
        policy = train(config, folder, resume=resume, progress=False, wait=120.0)
    minutes = (time.perf_counter() - began) / 60
    problems = list(itertools.islice(stories(job["split"], seed=0), size["problems"]))
    result = evaluate(
        policy, problems,
        ks=size["ks"], num_generations=size["num_generations"], seed=job["seed"], progress=False,
        save_to=run / "completions.jsonl",
    )  # fmt: skip
    completions = result.pop("completions")
    counts: Counter[str] = Counter()
    by_steps: dict[int, list[dict]] = defaultdict(list)
    for completion in completions:
        ids = policy.tokenizer.encode(completion["text"], add_special_tokens=False)
        counts.update(token_roles(policy.tokenizer, ids))
        by_steps[len(problems[completion["problem"]].steps)].append(completion)
    result["roles"] = {
        role: counts[role] / len(completions) for role in (*ROLES, "format", "other")
    }
    result["by_steps"] = {
        str(steps): {
            "accuracy": sum(c["correct"] for c in some) / len(some),
            "length": sum(c["tokens"] for c in some) / len(some),
        }
        for steps, some in sorted(by_steps.items())
    }
    write_json(run / "result.json", {**result, "train_minutes": minutes})


def run_all(jobs: Sequence[dict], parallel: int | None = None) -> None:
    """Run the jobs that have no result yet, ``parallel`` processes at a time.

    Args:
        jobs: from :func:`make_jobs`.
        parallel: default one per core.

    Raises:
        ValueError: when a run's folder holds one of other settings.
        RuntimeError: when a run fails; the message holds its last line.
    """
    parallel = parallel or os.cpu_count() or 1
    waiting = []
    for job in jobs:
        run = Path(job["run"])
        saved = run / "job.json"
        before = read_json(saved, {}, needs=("config",))
        same = bool(before) and _as_now(before, job["run"]) == job
        if same and (run / "result.json").is_file():
            _result(job)  # a damaged one is told before the others have run
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
    running: dict[subprocess.Popen, Path] = {}
    counted: dict[Path, int] = {}
    # One thread for each process: two processes beat two threads on models this small.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", _CHILD: "1"}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                run = Path(waiting.pop(0)["run"])
                with (run / "log.txt").open("a") as log:
                    command = [sys.executable, "-m", "iapo_mini.lab.runs", str(run / "job.json")]
                    process = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
                    )
                running[process] = run
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
                    lines = (run / "log.txt").read_text().strip().splitlines() or ["no message"]
                    raise RuntimeError(f"the run in '{run}' failed: {lines[-1]}")
    finally:
        for process in running:
            process.terminate()
        for process in running:  # each finishes its step and saves
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=120)
        bar.close()


def _as_now(saved: dict, run: str) -> dict:
    """A job as written before, as :func:`make_jobs` would write it today.

    Its folder may have been moved, or be named in another way.
    """
    config = saved["config"] and with_defaults(saved["config"])
    return saved | {"run": run, "config": config}


def _result(job: Mapping) -> dict:
    """What a finished run has left; ValueError for a file that is damaged."""
    ks = job["evaluation"]["ks"]
    metrics = [f"{name}@{k}" for name in ("pass", "length", "ratio") for k in ks]
    needs = ("length", *metrics, "intervals", "roles", "by_steps", "train_minutes")
    return read_json(Path(job["run"]) / "result.json", needs=needs)


def collect(jobs: Sequence[dict], size: Size) -> dict:
    """Gather finished jobs into the common part of a results file (``lab.results``)."""
    methods: dict[str, dict] = {}
    curves: dict[str, list] = {}
    configs: dict[str, dict] = {}
    metrics = ["length"]
    metrics += [f"{name}@{k}" for k in size.ks for name in ("pass", "length", "ratio")]
    by_name: dict[str, list[dict]] = defaultdict(list)
    for job in jobs:
        by_name[Path(job["run"]).name.rsplit("-", 1)[0]].append(job)
    for name, own in by_name.items():
        found = [_result(job) for job in own]
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
        configs[name] = {k: v for k, v in own[0]["config"].items() if k != "seed"}
        curves[name] = []
        for job in own:
            rows = whole_log(Path(job["run"]) / "train" / LOG, job["config"]["max_steps"])
            names_of = ("length", "accuracy", "entropy")
            curves[name].append({k: [round(row[k], 5) for row in rows] for k in names_of})
    evaluation = dataclasses.asdict(size) | {"split": jobs[0]["split"], "temperature": 1.0}
    return {
        "seeds": list(size.seeds),
        "methods": methods,
        "curves": curves,
        "config": {**configs, "evaluation": evaluation},
        "versions": versions(),
    }


def _end_with_parent() -> None:
    """End as if asked to when the process that started this one is gone, and its pipe with it."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if os.environ.get(_CHILD):
        _end_with_parent()
    run_job(read_json(Path(sys.argv[1])))
