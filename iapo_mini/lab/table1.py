"""Table 1: every method against the start policy, equal budget."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from iapo_mini.chat import token_texts
from iapo_mini.evaluation import read_completions
from iapo_mini.files import read_json, write_json
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.lab.figures import methods as drawn
from iapo_mini.lab.results import check_options, draw_comparison, file_stem, results_path
from iapo_mini.lab.runs import START, collect, make_jobs, run_all
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.tuning import tuned
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import Problem


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
    before = read_json(path, {})
    if before.get("methods") == results["methods"] and "wall_clock" in before:
        results["wall_clock"] = before["wall_clock"]
    else:
        results["wall_clock"] = wall_clock(jobs, (START, "grpo", "iapo"), sizes.timed)
    question, texts = answers_to_one_story(jobs)
    results["story"] = {"question": question, "answers": texts}
    write_json(path, results)
    name = file_stem("table1", preset)
    draw_comparison(results, figures, name)
    drawn.tradeoff(results["methods"], sizes.table1.ks).savefig(
        figures / f"{name}_tradeoff.png", dpi=150
    )
    drawn.by_steps(results["methods"]).savefig(figures / f"{name}_steps.png", dpi=150)
    tokenizer = load_policy(lora_rank=0).tokenizer
    drawn.case_study(question, texts, tokenizer).savefig(
        figures / f"{file_stem('case_study', preset)}.png", dpi=150
    )
    shown = {name: texts[name] for name in (START, "grpo", "iapo") if name in texts}
    drawn.heat_maps(question, _informed(jobs, question, shown)).savefig(
        figures / f"{file_stem('heat_maps', preset)}.png", dpi=150
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


def _policy_of(job: dict) -> Policy:
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
        rows = right.setdefault(Path(job["run"]).name.rsplit("-", 1)[0], {})
        file, group = Path(job["run"]) / "completions.jsonl", job["evaluation"]["num_generations"]
        for completion in read_completions(file, group):
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
        out[name] = token_texts(policy.tokenizer, ids), s.tolist()[:-1]
    return out
