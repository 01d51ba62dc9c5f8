"""Which experiments there are, how large, and where their results go.

Every experiment trains its rows from the same start policy on the same prompts (``runs.py``),
judges each on the same stories and writes one results file. ``<preset>`` is in the name of a file
unless it is ``full``; compare has it always.

    figures/results/compare_<preset>.json, table1.json
      seeds      [int, ...]
      methods    name -> {"length", "pass@k", "length@k", "ratio@k": [one per seed],
                          "intervals": [one per seed: metric -> [low, high] over problems],
                          "roles": role -> tokens per completion [one per seed],
                          "by_steps": operations of the story -> {"accuracy", "length": [per seed]},
                          "train_minutes": [one per seed]}
      curves     name -> [one per seed: {"length", "accuracy", "entropy": [one per step]}]
      config     name -> training settings;  evaluation -> evaluation settings
      versions   package -> version
      wall_clock (table1) name -> [one per seed: seconds per 1,000 completions, one thread]
      story      (table1) {"question", "answers": name -> completion of the first seed's policy}

    figures/results/tuning.json
      trials     method -> [{"settings": TrainConfig fields, "pass@1", "pass@8", "length",
                             "ratio@1"}], on the tune stream
      start      the same of the start policy;  rule  how the choice was made
      chosen     method -> index of the trial that was chosen

    figures/results/ablation.json
      ratio      method -> [Ratio@k per seed], k the largest;  length, pass  the same
      gap        "iapo - iapo_ne", ... -> [mean, low, high] of the difference within a seed

    figures/results/sweeps.json
      alpha, beta   [{"value", "length", "pass@1", "pass@k", "entropy": [one per seed]}], entropy
                    in nats per token at the last training step
      fixed      {"alpha", "beta", ...}: what the other weight was
      means      method -> aggregation -> {"length", "pass@1", "pass@k", "entropy": [per seed],
                 "length_by_step": [one per seed: [one per step]]}, settings as tuned

    figures/results/theory.json, departures.json, starts.json    see the modules of these names
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from iapo_mini import plots, plots_methods
from iapo_mini.evaluation import mean_interval, with_interval
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.policy import load_policy
from iapo_mini.rollouts import from_texts, sample
from iapo_mini.run_folder import writable_folder
from iapo_mini.runs import START, Size, collect, make_jobs, run_all, versions, write_json
from iapo_mini.tasks import Problem, stories

RECIPES: dict[str, dict] = {
    "grpo": {"method": "grpo"},
    "dapo": {"method": "dapo", "aggregation": "token", "epsilon": 0.2, "epsilon_high": 0.28},
    "gfpo": {"method": "gfpo"},
    "gtpo": {"method": "gtpo", "alpha": 0.1},
    "sgrpo": {"method": "sgrpo"},
    "iapo_ni": {"method": "iapo_ni"},
    "iapo_ne": {"method": "iapo_ne"},
    "iapo": {"method": "iapo"},
    "iapo_pmi": {"method": "iapo_pmi"},
}
"""What makes each row of Table 1 the method it is; learning rate and weights are tuned."""

COMPARED: dict[str, Size] = {
    "quick": Size(seeds=(0,), max_steps=2, problems=4, prompts_per_step=2),
    "demo": Size(seeds=(0, 1, 2), max_steps=22, problems=200),
    "full": Size(seeds=(0, 1, 2, 3, 4), max_steps=22, problems=300),
    "long": Size(seeds=(0, 1, 2), max_steps=60, problems=300),
}
"""Sizes of ``compare``."""
COMPARED_ALPHA = {"long": 0.2}
"""Weight of IAPO's informativeness term in ``compare`` where it is not 0.4: longer runs are stable
only at a smaller one (figures/recipe_search.md)."""

_WEIGHTS: dict[str, Sequence[dict]] = {
    "gtpo": ({"alpha": 0.1}, {"alpha": 0.4}),
    # S-GRPO's thresholds belong to completions of 178 tokens (the paper's 7B model on GSM8K); the
    # start policy writes about 60, a factor of 0.35. The other trial cuts deeper.
    "sgrpo": ({"alpha": 0.35}, {"alpha": 0.2}),
    "iapo_ni": ({"beta": 0.05}, {"beta": 0.2}),
    "iapo_ne": ({"alpha": 0.2, "beta": 0.05}, {"alpha": 0.4, "beta": 0.05}),
    "iapo": ({"alpha": 0.2, "beta": 0.05}, {"alpha": 0.4, "beta": 0.05}),
    "iapo_pmi": ({"alpha": 0.2, "beta": 0.05}, {"alpha": 0.4, "beta": 0.05}),
}


def trials_of(method: str) -> list[dict]:
    """The three settings that are tried for a method.

    A method with weights: two of them, and the first again at twice the learning rate. One without:
    three learning rates.
    """
    if method in _WEIGHTS:
        first, second = _WEIGHTS[method]
        tried = [(7e-4, first), (7e-4, second), (1.4e-3, first)]
    else:
        tried = [(rate, {}) for rate in (3.5e-4, 7e-4, 1.4e-3)]
    return [RECIPES[method] | {"learning_rate": rate} | weights for rate, weights in tried]


def _tried(preset: str) -> dict[str, list[dict]]:
    return {method: trials_of(method)[: preset_of(preset).trials] for method in RECIPES}


@dataclass(frozen=True)
class Preset:
    """Sizes of the experiments behind the paper's tables and figures.

    Attributes:
        trials: how many of each method's three trials are made.
        tuning: one run for each trial, on the tune stream.
        table1: Table 1 and the ablation.
        sweeps: one run for each weight; departures are of this size too.
        timed: stories of the wall-clock measurement, eight completions each.
    """

    trials: int
    tuning: Size
    table1: Size
    sweeps: Size
    timed: int


_KS = (1, 2, 4, 8, 16, 32)
PRESETS = {
    "quick": Preset(
        trials=1,
        tuning=Size(seeds=(100,), max_steps=1, problems=2, prompts_per_step=1),
        table1=Size((0,), 2, 4, 2, 4, (1, 4)),
        sweeps=Size((0,), 1, 2, 1, 4, (1, 4)),
        timed=2,
    ),
    "full": Preset(
        trials=3,
        tuning=Size(seeds=(100,), max_steps=22, problems=100),
        table1=Size((0, 1, 2, 3, 4), 22, 500, 12, 32, _KS),
        sweeps=Size((0, 1, 2), 22, 100, 12, 32, _KS),
        timed=100,
    ),
}
SWEPT = {
    "alpha": (1e-6, 1e-4, 1e-2, 0.1, 0.2, 0.4, 1.0),
    "beta": (1e-6, 1e-4, 1e-2, 0.05, 0.2, 1.0),
}
"""The paper's four values each (Fig. 6) and finer ones where lengths change."""
AVERAGED = ("iapo", "iapo_ne")
"""Methods that are run with both means of the loss: over the tokens of each completion first, as
the paper has it ("sequence"), or over all tokens at once ("token")."""
ABLATED = ("grpo", "iapo_ni", "iapo_ne", "iapo", "iapo_pmi")


def preset_of(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: when there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed are {', '.join(PRESETS)}.")
    return PRESETS[name]


def results_path(figures: Path, experiment: str, preset: str) -> Path:
    """Where an experiment's results go."""
    return figures / "results" / f"{_name(experiment, preset)}.json"


def _name(experiment: str, preset: str) -> str:
    return experiment if preset == "full" else f"{experiment}_{preset}"


def check_options(out: Path, figures: Path, parallel: int | None) -> None:
    """Refuse what an experiment can't run with, before any long work.

    Raises:
        ValueError: for ``parallel`` below 1, or folders where nothing can be written.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel is {parallel}; allowed are 1 and above.")
    writable_folder(figures / "results", "figures")
    writable_folder(out, "out")


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
        preset: a key of ``COMPARED``.
        out: folder of the runs.
        figures: results go to ``figures/results``, figures beside.
        parallel: processes at a time, default one per core.
        split: stream of the evaluation; ``"tune"`` when looking for a recipe.
        recipes: rows to run, name -> TrainConfig fields; default GRPO and IAPO.

    Returns:
        The content of the results file, as described at the head of this module.

    Raises:
        ValueError: for an unknown preset, or runs in ``out`` made with other settings.
        RuntimeError: when a run fails; the message holds its last line.
    """
    if preset not in COMPARED:
        raise ValueError(f"preset is {preset!r}; allowed are {', '.join(COMPARED)}.")
    size, out, figures = COMPARED[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    alpha = COMPARED_ALPHA.get(preset, 0.4)
    recipes = recipes or {"grpo": {"method": "grpo"}, "iapo": {"method": "iapo", "alpha": alpha}}
    jobs = make_jobs(size, out / preset, {START: None, **recipes}, split)
    run_all(jobs, parallel)
    results = collect(jobs, size)
    write_json(figures / "results" / f"compare_{preset}.json", results)
    _draw(results, figures, f"compare_{preset}")
    return results


def _draw(results: dict, figures: Path, name: str) -> None:
    """Bars, training curves and composition by role."""
    ks = results["config"]["evaluation"]["ks"]
    for ending, figure in (
        ("", plots.comparison(results["methods"], max(ks))),
        ("_training", plots.training_curves(results["curves"])),
        ("_roles", plots.role_composition({m: r["roles"] for m, r in results["methods"].items()})),
    ):
        figure.savefig(figures / f"{name}{ending}.png", dpi=150)


RULE = (
    "highest Ratio@1 (Pass@1 over mean length) among the trials whose Pass@1 is at least that of "
    "the start policy; if there is none, the highest Pass@1 (Problem 1 of the paper: most right "
    "answers per token, accuracy kept)"
)


def choose(trials: Sequence[Mapping], floor: float) -> int:
    """Index of the best trial by ``RULE``; ``floor`` is the start policy's Pass@1."""
    kept = [i for i, trial in enumerate(trials) if trial["pass@1"] >= floor]
    if kept:
        return max(kept, key=lambda i: trials[i]["ratio@1"])
    return max(range(len(trials)), key=lambda i: trials[i]["pass@1"])


def tune(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """The same number of trials for every method on the tune stream; write ``tuning.json``.

    The seed of the trials (100) is none of the reported runs'. Arguments, errors and the results
    file as for :func:`compare`; presets are those of ``PRESETS``.
    """
    size, out, figures = preset_of(preset).tuning, Path(out), Path(figures)
    check_options(out, figures, parallel)
    tried = _tried(preset)
    recipes: dict[str, dict | None] = {START: None}
    for method, rows in tried.items():
        recipes |= {f"{method}-trial{i}": settings for i, settings in enumerate(rows)}
    jobs = make_jobs(size, out / preset / "tuning", recipes, split="tune")
    run_all(jobs, parallel)
    found = collect(jobs, size)

    def measured(name: str) -> dict:
        metrics = ("pass@1", f"pass@{max(size.ks)}", "length", "ratio@1")
        return {metric: found["methods"][name][metric][0] for metric in metrics}

    start = measured(START)
    trials = {
        method: [
            {"settings": settings} | measured(f"{method}-trial{i}")
            for i, settings in enumerate(rows)
        ]
        for method, rows in tried.items()
    }
    chosen = {method: choose(rows, start["pass@1"]) for method, rows in trials.items()}
    results = {
        "trials": trials, "start": start, "rule": RULE, "chosen": chosen,
        "config": {"evaluation": found["config"]["evaluation"]}, "versions": versions(),
    }  # fmt: skip
    write_json(results_path(figures, "tuning", preset), results)
    return results


def tuning_table(results: dict) -> str:
    """The trials of :func:`tune` as a Markdown table; what was chosen is in bold."""
    lines = ["| method | learning rate | alpha | beta | length (tokens) | Pass@1 | Ratio@1 (1/1000 "
             "tokens) |", "|---" * 7 + "|"]  # fmt: skip
    for method, rows in results["trials"].items():
        for i, row in enumerate(rows):
            settings = row["settings"]
            cells = [
                plots.LABELS[method], f"{settings['learning_rate']:g}",
                *(f"{settings[w]:g}" if w in settings else "" for w in ("alpha", "beta")),
                f"{row['length']:.1f}", f"{row['pass@1']:.3f}", f"{1000 * row['ratio@1']:.2f}",
            ]  # fmt: skip
            if i == results["chosen"][method]:
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuned(preset: str, out: Path, figures: Path, parallel: int | None) -> dict[str, dict]:
    """Method -> the settings that :func:`tune` chose; from its file if that has these trials."""
    path = results_path(figures, "tuning", preset)
    results = json.loads(path.read_text()) if path.is_file() else {"trials": None}
    settings = {
        method: [trial["settings"] for trial in rows]
        for method, rows in (results["trials"] or {}).items()
    }
    if settings != _tried(preset):
        results = tune(preset, out=out, figures=figures, parallel=parallel)
    return {
        method: results["trials"][method][index]["settings"]
        for method, index in results["chosen"].items()
    }


def table1(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Table 1: every method against the start policy, equal budget; results and figures.

    Arguments, errors and the results file as for :func:`compare`; presets are those of
    ``PRESETS``. Methods are tuned first, unless ``tuning.json`` is there.
    """
    sizes, out, figures = preset_of(preset), Path(out), Path(figures)
    check_options(out, figures, parallel)
    recipes = tuned(preset, out, figures, parallel)
    jobs = make_jobs(sizes.table1, out / preset / "table1", {START: None, **recipes})
    run_all(jobs, parallel)
    results = collect(jobs, sizes.table1)
    path = results_path(figures, "table1", preset)
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("methods") == results["methods"] and "wall_clock" in before:
        results["wall_clock"] = before["wall_clock"]
    else:
        results["wall_clock"] = wall_clock(jobs, (START, "grpo", "iapo"), sizes.timed)
    question, texts = answers_to_one_story(jobs)
    results["story"] = {"question": question, "answers": texts}
    write_json(path, results)
    name = _name("table1", preset)
    _draw(results, figures, name)
    plots_methods.tradeoff(results["methods"], sizes.table1.ks).savefig(
        figures / f"{name}_tradeoff.png", dpi=150
    )
    plots_methods.by_steps(results["methods"]).savefig(figures / f"{name}_steps.png", dpi=150)
    tokenizer = load_policy(lora_rank=0).tokenizer
    plots_methods.case_study(question, texts, tokenizer).savefig(
        figures / f"{_name('case_study', preset)}.png", dpi=150
    )
    shown = {name: texts[name] for name in (START, "grpo", "iapo") if name in texts}
    plots_methods.heat_maps(question, _informed(jobs, question, shown)).savefig(
        figures / f"{_name('heat_maps', preset)}.png", dpi=150
    )
    return results


def wall_clock(jobs: Sequence[dict], names: Sequence[str], problems: int) -> dict[str, list]:
    """Seconds to sample 1,000 completions, by name and seed, one thread, names taken in turn.

    Args:
        jobs: finished jobs; names: rows to time.
        problems: test stories, eight completions each.
    """
    asked = list(itertools.islice(stories("test", seed=0), problems))
    out: dict[str, list[float]] = {name: [] for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in sorted({job["seed"] for job in jobs}):
        for name in names:
            (job,) = [j for j in jobs if Path(j["run"]).name == f"{name}-{seed}"]
            policy = _policy_of(job)
            sample(policy, asked[:1], num_generations=8, seed=seed)  # warm up
            began = time.perf_counter()
            for start in range(0, problems, 16):
                sample(policy, asked[start : start + 16], num_generations=8, seed=seed + start)
            seconds = time.perf_counter() - began
            out[name].append(1000 * seconds / (8 * problems))
    torch.set_num_threads(threads)
    return out


def _policy_of(job: dict):
    if job["config"] is None:
        return load_policy()
    return load_policy(adapter=str(Path(job["run"]) / "train" / "final"), lora_rank=0)


def answers_to_one_story(jobs: Sequence[dict]) -> tuple[str, dict[str, str]]:
    """One test story and how each policy of the first seed answers it (paper, Fig. 7 and 14).

    The story is the first with at least four operations that every policy answers right at least
    once (failing that, the first that they do); each policy shows its right completion of median
    length. ``(sentence, {})`` when there is no such story.
    """
    problems = list(itertools.islice(stories("test", seed=0), jobs[0]["evaluation"]["problems"]))
    right: dict[str, dict[int, list[dict]]] = {}
    for job in jobs:
        if job["seed"] != jobs[0]["seed"]:
            continue
        lines = (Path(job["run"]) / "completions.jsonl").read_text().splitlines()
        rows = right.setdefault(Path(job["run"]).name.rsplit("-", 1)[0], {})
        for completion in map(json.loads, lines):
            if completion["correct"]:
                rows.setdefault(completion["problem"], []).append(completion)
    common = set.intersection(*(set(rows) for rows in right.values()))
    if not common:
        return "No story was answered right by every policy.", {}
    asked = min(common, key=lambda i: (len(problems[i].steps) < 4, i))
    texts = {}
    for name, rows in right.items():
        found = sorted(rows[asked], key=lambda c: c["tokens"])
        texts[name] = found[len(found) // 2]["text"]
    return problems[asked].question, texts


def _informed(jobs: Sequence[dict], question: str, texts: dict[str, str]) -> dict[str, tuple]:
    """Method -> token texts and informativeness (nats) of its completion, by its own policy."""
    out = {}
    for name, text in texts.items():
        (job,) = [j for j in jobs if Path(j["run"]).name == f"{name}-{jobs[0]['seed']}"]
        policy = _policy_of(job)
        rollouts = from_texts(policy, [Problem(question, "")], [text])
        s = informativeness(answer_entropies(policy, rollouts), rollouts.completion_mask)[0]
        ids = rollouts.completion_ids[0].tolist()[:-1]  # without the end of the sequence
        out[name] = [policy.tokenizer.decode([i]) for i in ids], s.tolist()[:-1]
    return out


def ablation(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """The paper's Fig. 5, from the runs of Table 1: what each part of the advantage is worth."""
    results = table1(preset, out=out, figures=figures, parallel=parallel)
    figures, k = Path(figures), max(results["config"]["evaluation"]["ks"])
    rows = {name: results["methods"][name] for name in ABLATED}
    gaps = {}
    for one, other in (
        ("iapo", "iapo_ne"), ("iapo_ne", "iapo_ni"), ("iapo", "iapo_ni"), ("iapo_pmi", "iapo"),
    ):  # fmt: skip
        pairs = zip(rows[one][f"ratio@{k}"], rows[other][f"ratio@{k}"])
        gaps[f"{one} - {other}"] = list(mean_interval([a - b for a, b in pairs]))
    found = {
        "k": k,
        **{metric: {m: r[f"{metric}@{k}"] for m, r in rows.items()}
           for metric in ("ratio", "length", "pass")},
        "gap": gaps,
        "config": {m: results["config"][m] for m in ABLATED}
        | {"evaluation": results["config"]["evaluation"]},
        "versions": results["versions"],
    }  # fmt: skip
    write_json(results_path(figures, "ablation", preset), found)
    plots.comparison(rows, k).savefig(figures / f"{_name('ablation', preset)}.png", dpi=150)
    return found


def sweeps(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """The paper's Fig. 6: one weight of IAPO varied, the other as tuned. And the loss's mean."""
    size, out, figures = preset_of(preset).sweeps, Path(out), Path(figures)
    check_options(out, figures, parallel)
    best = tuned(preset, out, figures, parallel)
    base = best["iapo"]
    recipes: dict[str, dict] = {}

    def planned(name: str, recipe: dict) -> str:
        """The name of the run with these settings, which an earlier one may have had."""
        recipe = {"aggregation": "sequence"} | recipe
        same = next((n for n, settings in recipes.items() if settings == recipe), name)
        recipes.setdefault(same, recipe)
        return same

    points = {
        (weight, value): planned(f"{weight}-{value:g}", base | {weight: value})
        for weight, values in SWEPT.items()
        for value in (values if preset == "full" else values[::5])
    }
    means = {
        (method, how): planned(f"mean-{method}-{how}", best[method] | {"aggregation": how})
        for method in AVERAGED
        for how in ("sequence", "token")
    }
    jobs = make_jobs(size, out / preset / "sweeps", recipes)
    run_all(jobs, parallel)
    found = collect(jobs, size)
    k = max(size.ks)

    def outcome(name: str) -> dict:
        judged, curves = found["methods"][name], found["curves"][name]
        measured = {m: judged[m] for m in ("length", "pass@1", f"pass@{k}")}
        return measured | {"entropy": [run["entropy"][-1] for run in curves]}

    results: dict = {"k": k, "fixed": base, **{weight: [] for weight in SWEPT}}
    for (weight, value), name in points.items():
        results[weight].append({"value": value} | outcome(name))
    results["means"] = {method: {} for method in AVERAGED}
    for (method, how), name in means.items():
        by_step = [run["length"] for run in found["curves"][name]]
        results["means"][method][how] = outcome(name) | {"length_by_step": by_step}
    results |= {"config": found["config"], "seeds": found["seeds"], "versions": versions()}
    write_json(results_path(figures, "sweeps", preset), results)
    name = _name("sweeps", preset)
    plots_methods.sweeps(results).savefig(figures / f"{name}.png", dpi=150)
    plots_methods.means(results).savefig(figures / f"{name}_means.png", dpi=150)
    return results


def table(results: dict, metric: str = "") -> str:
    """A comparison as a Markdown table; mean and 95% interval.

    With several seeds the interval is over seeds (Student's t), with one it is over problems.

    Args:
        results: of :func:`compare` or :func:`table1`.
        metric: ``"pass"``, ``"length"`` or ``"ratio"``, to show at every k; default Pass@k at the
            least k beside all three at the largest.
    """
    of = results["config"]["evaluation"]["ks"]
    columns = [f"pass@{of[0]}", f"pass@{of[-1]}", f"length@{of[-1]}", f"ratio@{of[-1]}"]
    if metric:
        columns = [f"{metric}@{k}" for k in of]
    units = {"length": " (tokens)", "ratio": " (1/1000 tokens)"}
    titles = [c.capitalize() + units.get(c.split("@")[0], "") for c in columns]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, result in results["methods"].items():
        cells = []
        for column in columns:
            mean, low, high = plots.interval_of(result, column)
            if column.startswith("ratio"):
                mean, low, high = 1000 * mean, 1000 * low, 1000 * high
            digits = 1 if column.startswith("length") else 3 if column.startswith("pass") else 2
            cells.append(with_interval((mean, low, high), digits))
        lines.append(f"| {plots.LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
