"""Which runs, which seeds, where results go.

``compare`` trains every method from the same start policy on the same prompts, judges each on the
test stream and writes one results file:

    figures/results/compare_<preset>.json
      seeds      [int, ...]
      methods    name -> {"length", "pass@k", "length@k", "ratio@k": [one per seed],
                          "intervals": [one per seed: metric -> [low, high] over problems],
                          "roles": role -> tokens per completion, mean over seeds,
                          "train_minutes": [one per seed]}
      curves     name -> [one per seed: {"length", "accuracy", "entropy": [one per step]}]
      config     name -> training settings;  evaluation -> evaluation settings
      versions   package -> version

Every (method, seed) is a process of its own with one thread, so two run side by side on two cores.
A run that is there already is not made again; one that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from iapo_mini import plots
from iapo_mini.evaluation import evaluate
from iapo_mini.policy import load_policy
from iapo_mini.run_folder import replace_text, writable_folder
from iapo_mini.tasks import ROLES, stories, token_roles
from iapo_mini.trainer import TrainConfig, train

RECIPES: dict[str, dict] = {
    "grpo": {"method": "grpo"},
    "iapo": {"method": "iapo"},
}
"""Settings of each row of the comparison; found on the tune stream (figures/recipe_search.md)."""


@dataclass(frozen=True)
class Preset:
    """Size of a comparison.

    Attributes:
        seeds: one training run per method and seed.
        max_steps: training steps.
        alpha: weight of IAPO's informativeness term; longer runs are stable only at a smaller one.
        prompts_per_step: prompts per training step, eight completions each.
        problems: test stories, the same for every run.
        num_generations: completions per test story.
        ks: values of k.
    """

    seeds: tuple[int, ...]
    max_steps: int
    alpha: float
    problems: int
    prompts_per_step: int = 12
    num_generations: int = 8
    ks: tuple[int, ...] = (1, 2, 4, 8)


PRESETS = {
    "quick": Preset(seeds=(0,), max_steps=2, alpha=0.4, problems=4, prompts_per_step=2),
    "demo": Preset(seeds=(0, 1, 2), max_steps=22, alpha=0.4, problems=200),
    "full": Preset(seeds=(0, 1, 2, 3, 4), max_steps=22, alpha=0.4, problems=300),
    "long": Preset(seeds=(0, 1, 2), max_steps=60, alpha=0.2, problems=300),
}
START = "start"


def versions() -> dict[str, str]:
    """Versions of what a number depends on."""
    packages = ("torch", "transformers", "peft", "tokenizers", "iapo-mini")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_json(path: Path, content: dict) -> None:
    """Write JSON whole or not at all (temporary name, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")


def run_job(job: dict) -> None:
    """Train (unless the method is the start policy), evaluate on the test stream, write results.

    ``job``: ``{"run": folder, "config": TrainConfig fields or None, "seed": int, "split": str,
    "preset": Preset fields}``.
    """
    torch.set_num_threads(1)
    run, preset, seed = Path(job["run"]), job["preset"], job["seed"]
    run.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if job["config"] is None:
        policy = load_policy()
    else:
        folder = run / "train"
        config = TrainConfig(**job["config"])
        resume = (folder / "config.json").is_file()
        policy = train(config, folder, resume=resume, progress=False)
    minutes = (time.perf_counter() - began) / 60
    problems = list(itertools.islice(stories(job["split"], seed=0), preset["problems"]))
    result = evaluate(
        policy, problems,
        ks=preset["ks"], num_generations=preset["num_generations"], seed=seed, progress=False,
    )  # fmt: skip
    completions = result.pop("completions")
    counts: Counter[str] = Counter()
    for completion in completions:
        ids = policy.tokenizer.encode(completion["text"], add_special_tokens=False)
        counts.update(token_roles(policy.tokenizer, ids))
    roles = {role: counts[role] / len(completions) for role in (*ROLES, "format", "other")}
    lines = "".join(json.dumps(completion) + "\n" for completion in completions)
    (run / "completions.jsonl").write_text(lines)
    write_json(run / "result.json", {**result, "roles": roles, "train_minutes": minutes})


def _jobs(preset: Preset, out: Path, split: str, recipes: dict[str, dict]) -> list[dict]:
    jobs = []
    for seed in preset.seeds:
        for name, recipe in {START: None, **recipes}.items():
            config = None
            if recipe is not None:
                settings = {
                    "max_steps": preset.max_steps,
                    "alpha": preset.alpha,
                    "prompts_per_step": preset.prompts_per_step,
                    "seed": seed,
                    "threads": 1,
                } | recipe
                config = dataclasses.asdict(TrainConfig(**settings))
            jobs.append(
                {
                    "run": str(out / f"{name}-{seed}"),
                    "config": config,
                    "seed": seed,
                    "split": split,
                    "preset": dataclasses.asdict(preset),
                }
            )
    return jobs


def _run_all(jobs: list[dict], parallel: int) -> None:
    """Run the jobs that have no result yet, ``parallel`` processes at a time."""
    waiting = []
    for job in jobs:
        run = Path(job["run"])
        saved = run / "job.json"
        if (run / "result.json").is_file() and json.loads(saved.read_text()) == _plain(job):
            continue
        if saved.is_file() and json.loads(saved.read_text()) != _plain(job):
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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                run = Path(waiting.pop(0)["run"])
                with (run / "log.txt").open("a") as log:
                    command = [sys.executable, "-m", "iapo_mini.experiments", str(run / "job.json")]
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                running[process] = run
            time.sleep(0.5)
            for process, run in list(running.items()):
                metrics = run / "train" / "metrics.jsonl"
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
        bar.close()


def _plain(job: dict) -> dict:
    return json.loads(json.dumps(job))


def compare(
    preset: str = "demo",
    *,
    out: str | Path = "runs/compare",
    figures: str | Path = "figures",
    parallel: int | None = None,
    split: str = "test",
    recipes: dict[str, dict] | None = None,
) -> dict:
    """Train and judge every recipe; write the results file and the figures.

    Args:
        preset: a key of ``PRESETS``.
        out: folder of the runs.
        figures: results go to ``figures/results``, figures beside.
        parallel: processes at a time, default one per core.
        split: stream of the evaluation; ``"tune"`` when looking for a recipe.
        recipes: rows to run, default ``RECIPES``.

    Returns:
        The content of the results file, as described at the head of this module.

    Raises:
        ValueError: for an unknown preset, or runs in ``out`` made with other settings.
        RuntimeError: when a run fails; the message holds its last line.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; allowed are {', '.join(PRESETS)}.")
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel is {parallel}; allowed are 1 and above.")
    sizes, figures = PRESETS[preset], Path(figures)
    recipes = RECIPES if recipes is None else recipes
    writable_folder(figures / "results", "figures")
    writable_folder(Path(out), "out")
    jobs = _jobs(sizes, Path(out) / preset, split, recipes)
    _run_all(jobs, parallel or os.cpu_count() or 1)
    results = collect(jobs, sizes, split, [START, *recipes])
    write_json(figures / "results" / f"compare_{preset}.json", results)
    plots.training_curves(results["curves"]).savefig(
        figures / f"compare_{preset}_training.png", dpi=150
    )
    plots.comparison(results["methods"], max(sizes.ks)).savefig(
        figures / f"compare_{preset}.png", dpi=150
    )
    plots.role_composition({m: r["roles"] for m, r in results["methods"].items()}).savefig(
        figures / f"compare_{preset}_roles.png", dpi=150
    )
    return results


def collect(jobs: list[dict], preset: Preset, split: str, names: list[str]) -> dict:
    """Gather the results of finished jobs into the content of a results file."""
    methods: dict[str, dict] = {}
    curves: dict[str, list] = {}
    configs: dict[str, dict] = {}
    metrics = ["length"]
    metrics += [f"{name}@{k}" for k in preset.ks for name in ("pass", "length", "ratio")]
    for name in names:
        own = [job for job in jobs if Path(job["run"]).name.rsplit("-", 1)[0] == name]
        found = [json.loads((Path(job["run"]) / "result.json").read_text()) for job in own]
        methods[name] = {metric: [result[metric] for result in found] for metric in metrics}
        methods[name]["intervals"] = [result["intervals"] for result in found]
        methods[name]["roles"] = {
            role: sum(result["roles"][role] for result in found) / len(found)
            for role in found[0]["roles"]
        }
        methods[name]["train_minutes"] = [result["train_minutes"] for result in found]
        if name == START:
            continue
        configs[name] = {k: v for k, v in own[0]["config"].items() if k != "seed"}
        curves[name] = []
        for job in own:
            lines = (Path(job["run"]) / "train" / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            names_of = ("length", "accuracy", "entropy")
            curves[name].append({k: [round(row[k], 5) for row in rows] for k in names_of})
    evaluation = dataclasses.asdict(preset) | {"split": split, "temperature": 1.0}
    return {
        "seeds": list(preset.seeds),
        "methods": methods,
        "curves": curves,
        "config": {**configs, "evaluation": evaluation},
        "versions": versions(),
    }


def table(results: dict) -> str:
    """The comparison as a Markdown table; mean and 95% interval.

    With several seeds the interval is over seeds (Student's t), with one it is over problems.
    """
    ks = results["config"]["evaluation"]["ks"]
    columns = [f"pass@{ks[0]}", f"pass@{ks[-1]}", f"length@{ks[-1]}", f"ratio@{ks[-1]}"]
    titles = [c.capitalize() for c in columns]
    titles[2] += " (tokens)"
    titles[3] += " (1/1000 tokens)"
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, result in results["methods"].items():
        cells = []
        for column in columns:
            mean, low, high = plots.interval_of(result, column)
            if column.startswith("ratio"):
                mean, low, high = 1000 * mean, 1000 * low, 1000 * high
            digits = 1 if column.startswith("length") else 3 if column.startswith("pass") else 2
            cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        lines.append(f"| {plots.LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(json.loads(Path(sys.argv[1]).read_text()))
