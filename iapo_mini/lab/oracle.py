"""Informativeness and value from real continuations, which the paper only approximates.

After every sentence of a completion the policy writes ``K`` continuations. Their final answers are
a sample of p(y | q, o_<=t), without forcing an answer early. They give two quantities:

* the drop of the answer's entropy over a sentence, the realised value of the paper's
  I(y; o_t | q, o_<t);
* the share of right answers, which is the value of a prefix (VinePPO, arXiv 2410.01679). Its gain
  over a sentence is the true credit of the sentence.

:func:`agreement` compares early exits with the first one. :func:`oracle` trains with both:
``oracle`` is IAPO with the s of continuations, and ``vine`` gives each token the gain in value.

    figures/results/oracle.json
      agreement   policy -> {"correlation", "rank", "bias": [mean, low, high] over stories,
                             "by_place": [[place, early exit, continuations] in nats]}
      training    "oracle", "vine", "iapo", "grpo" -> {"length", "pass@1", "ratio@1": [per seed]}
      continuations, seeds, config, versions
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from iapo_mini.adapters import fingerprint_of_weights
from iapo_mini.attention import most_positions
from iapo_mini.chat import token_texts
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.early_exit.strides import sentence_ends, spread
from iapo_mini.files import read_json, versions, write_json
from iapo_mini.information import (
    answer_entropies,
    answer_in,
    final_answers,
    informativeness,
)
from iapo_mini.intervals import (
    bootstrap_interval,
    format_interval,
    mean_interval,
    share_interval,
    spearman,
)
from iapo_mini.lab.figures import oracle as drawn
from iapo_mini.lab.figures.controls import label
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, kept, results_path
from iapo_mini.lab.runs import collect, make_jobs, run_all
from iapo_mini.lab.sizes import SHORT, Size, preset_of
from iapo_mini.lab.starts import STARTS
from iapo_mini.lab.tuning import tuned
from iapo_mini.lab.verdicts import Claim
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.problems.verify import equal_answers
from iapo_mini.recipes import RECIPES as LIBRARY
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample, sample_after

CONTINUATIONS = {"training": 8, "agreement": 64}
"""K, the number of continuations after each sentence."""
_PREFIXES = 48
"""Number of prefixes whose continuations are sampled together."""
_LONGEST = 224


def continuations(
    policy: Policy, rollouts: Rollouts, k: int, seed: int
) -> tuple[torch.Tensor, list[list[list[str | None]]]]:
    """Sample k continuations after each sentence of each completion and return their answers.

    Args:
        policy: the policy that writes the continuations.
        rollouts: B completions.
        k: continuations of a prefix; a finished completion has only itself.
        seed: sampling seed.

    Returns:
        ``(asked, answers)``: (B, L + 1) bool, the prefixes that were continued; and for each row
        and each of its prefixes in order the answers, None for a continuation without an answer.
    """
    asked = _asked(policy, rollouts)
    whole = final_answers(policy, rollouts)
    prompts = [ids[mask] for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask)]
    answers: list[list[list[str | None]]] = []
    todo: list[tuple[int, int, torch.Tensor]] = []
    for i, n in enumerate(rollouts.lengths.tolist()):
        ends = asked[i].nonzero()[:, 0].tolist()
        answers.append([[whole[i]] for _ in ends])
        todo += [(i, j, rollouts.completion_ids[i, :t]) for j, t in enumerate(ends) if t < n]
    todo.sort(key=lambda item: len(prompts[item[0]]) + len(item[2]))  # to save padding
    for number, start in enumerate(range(0, len(todo), _PREFIXES)):
        part = todo[start : start + _PREFIXES]
        prefixes = [torch.cat([prompts[i], written]) for i, _, written in part]
        width = max(map(len, prefixes))
        real = torch.stack([torch.arange(width) >= width - len(ids) for ids in prefixes])
        ids = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in prefixes])
        # A completion that was cut at its limit leaves fewer positions than that.
        room = int(max(1, min(_LONGEST, most_positions(policy.model) - width)))
        found = sample_after(
            policy, ids, real.to(ids.device), num_generations=k, max_completion_length=room,
            seed=seed + number,
        )  # fmt: skip
        texts = found.texts(policy.tokenizer)
        for row, (i, j, written) in enumerate(part):
            before = str(policy.tokenizer.decode(written, skip_special_tokens=False))
            answers[i][j] = [_answer(before + text) for text in texts[row * k : (row + 1) * k]]
    return asked, answers


def _asked(policy: Policy, rollouts: Rollouts) -> torch.Tensor:
    """(B, L + 1) bool: the first and last prefix, and those at the end of a sentence.

    Ends of tags are left out: there is no thought between ``</think>`` and the answer, so a few
    continuations would only measure noise there.
    """
    asked = sentence_ends(policy, rollouts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        texts = token_texts(policy.tokenizer, rollouts.completion_ids[i, : n - 1].tolist())
        tags = torch.tensor([text.endswith(">") for text in texts], dtype=torch.bool)
        asked[i, 1:n] &= ~tags.to(asked.device)
    return asked


def _answer(text: str) -> str | None:
    answer = answer_in(text)
    return None if answer is None else answer.strip()


def entropy_of(answers: list[str | None]) -> float:
    """Entropy in nats of the distribution that the answers are drawn from (Miller and Madow).

    The entropy of the observed shares is on average too low by about (distinct - 1) / 2k. This
    correction is added.
    """
    counts = torch.tensor([answers.count(x) for x in set(answers)], dtype=torch.float)
    p = counts / counts.sum()
    return float(-(p * p.log()).sum() + (len(counts) - 1) / (2 * len(answers)))


def _per_prefix(
    asked: torch.Tensor, values: list[list[float]], lengths: torch.Tensor
) -> torch.Tensor:
    """(B, L + 1): values at the asked prefixes, linear interpolation between them, then 0."""
    out = torch.zeros(asked.shape)
    for i, own in enumerate(values):
        out[i, asked[i].cpu()] = torch.tensor(own)
    t = torch.arange(out.shape[1])
    within = t <= lengths.cpu()[:, None]
    return (spread(out, asked.cpu() & within) * within).to(asked.device)


def continuation_information(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """s from continuations, (B, L) nats: the drop over a sentence, spread over its tokens."""
    k = CONTINUATIONS["training"]
    asked, answers = continuations(policy, rollouts, k, rollouts.seed())
    entropies = [[entropy_of(own) for own in row] for row in answers]
    potential = _per_prefix(asked, entropies, rollouts.lengths)
    return informativeness(potential, rollouts.completion_mask)


def value_gain(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """Gain in V over the sentence of each token, (B, L); V is the share of right answers."""
    k = CONTINUATIONS["training"]
    asked, answers = continuations(policy, rollouts, k, rollouts.seed())
    values = [
        [sum(a is not None and equal_answers(a, right) for a in own) / len(own) for own in row]
        for row, right in zip(answers, rollouts.references)
    ]
    out = torch.zeros(rollouts.completion_mask.shape)
    for i, own in enumerate(values):
        ends = asked[i].nonzero()[:, 0].tolist()
        for (a, b), (before, after) in zip(itertools.pairwise(ends), itertools.pairwise(own)):
            out[i, a:b] = after - before
    return out.to(asked.device)


def _vine(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    """The gain in value at each token, divided by its standard deviation in the batch."""
    gain, mask = rollouts.informativeness, rollouts.completion_mask
    return gain / (gain[mask].std() + 1e-4)


_IAPO = LIBRARY["iapo"]
RECIPES = {
    "oracle": replace(_IAPO, information=continuation_information),
    "vine": replace(_IAPO, rule=_vine, information=value_gain),
    "oracle_grpo": replace(_IAPO, rule="grpo", information=None),
}
METRICS = ("length", "pass@1", "ratio@1")
SIZES = {
    "quick": Size((0,), 1, 2, 1, num_generations=2, ks=(1, 2), max_completion_length=SHORT),
    "full": Size(seeds=(0, 1, 2), max_steps=22, problems=200),
}
STORIES = {"quick": 2, "full": 60}
"""Number of stories of :func:`agreement`."""


def agreement(policy: Policy, n_stories: int, k: int) -> dict:
    """Compare the answer entropy of early exits with that of real continuations.

    Args:
        policy: the policy that writes one completion of each story, continues it, and is asked.
        n_stories: number of tune stories.
        k: continuations of each prefix.

    Returns:
        ``correlation`` and ``rank`` (Spearman) of the drops over sentences, ``bias`` (nats): early
        exit minus continuations, all ``[mean, low, high]`` by bootstrap over stories; ``by_place``:
        ``[share of the completion, mean entropy of early exits, of continuations]``.
    """
    problems = list(itertools.islice(stories("tune", seed=2), n_stories))
    rollouts = score(
        sample(policy, problems, num_generations=1, seed=2), policy.tokenizer, problems
    )
    asked, answers = continuations(policy, rollouts, k, seed=2)
    exits = answer_entropies(policy, rollouts)
    places, entropies = [], []
    for i, own in enumerate(answers):
        ends = asked[i].nonzero()[:, 0]
        # The last prefix is the whole completion, whose answer is known.
        real = np.array([entropy_of(a) for a in own[:-1]])
        places.append((ends[:-1] / ends[-1]).cpu().numpy())
        entropies.append((exits[i, ends[:-1]].cpu().numpy(), real))
    drops = [(-np.diff(early), -np.diff(real)) for early, real in entropies]
    place, (early, real) = np.concatenate(places), map(np.concatenate, zip(*entropies))
    by_place = []
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (place >= low) & (place < low + 0.2)
        if inside.any():
            by_place.append([low + 0.1, float(early[inside].mean()), float(real[inside].mean())])
    return {
        "correlation": bootstrap_interval(lambda a, b: float(np.corrcoef(a, b)[0, 1]), drops),
        "rank": bootstrap_interval(spearman, drops),
        "bias": bootstrap_interval(lambda a, b: float((a - b).mean()), entropies),
        "by_place": by_place,
    }


def _agreements(preset: str, out: Path) -> dict[str, dict]:
    """The agreement of every start policy; what ``out`` holds is not measured again."""
    count, k = STORIES[preset], CONTINUATIONS["agreement"] if preset == "full" else 4
    found = {}
    for name, model in tqdm(STARTS.items(), desc="agreement", unit="policy"):
        policy = load_policy(model, lora_rank=0)
        weights = fingerprint_of_weights(policy.model.named_parameters())
        found[name] = kept(
            out / preset / "oracle" / f"agreement-{name}.json",
            {"policy": weights, "stories": count, "continuations": k},
            functools.partial(agreement, policy, count, k),
        )
    return found


def oracle(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Measure agreement for every start policy, train with both oracles; write file and figure.

    Arguments and errors are those of :func:`iapo_mini.lab.table1.table1`, which tunes the settings.
    """
    preset_of(preset)  # refuses an unknown preset
    size, out, figures = SIZES[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    best = tuned(preset, out, figures, parallel, ("iapo",))["iapo"]
    methods = {"oracle": "oracle", "vine": "vine", "iapo": "iapo", "grpo": "oracle_grpo"}
    recipes = {name: {**best, "method": method} for name, method in methods.items()}
    jobs = make_jobs(size, out / preset / "oracle", recipes, methods=__name__)
    ledger = ledger_path(figures, file_stem("oracle", preset))
    run_all(jobs, parallel, ledger)
    found = collect(jobs, size, ledger)
    results = {
        "agreement": _agreements(preset, out),
        "training": {
            name: {metric: found["methods"][name][metric] for metric in METRICS} for name in recipes
        },
        "continuations": CONTINUATIONS,
        "seeds": found["seeds"], "config": found["config"], "versions": versions(),
    }  # fmt: skip
    path = results_path(figures, "oracle", preset)
    write_json(path, results)
    drawn.agreement(results).savefig(figures / f"{path.stem}.png", dpi=150)
    if preset == "full":
        draw_quality(figures, figures)
    return results


def by_quality(controls: Mapping, starts: Mapping, oracle: Mapping) -> dict[str, Mapping]:
    """Results of training with an s of rising quality: name -> metric -> one value per seed.

    All rows use the settings tuned for IAPO, the token mean and the embedded policy unless named
    otherwise. The arguments are results of the studies with these names.
    """
    token = {name: row["token"] for name, row in controls["rows"].items()}
    trained = starts["starts"]
    return {
        "no token term": token["grpo"],
        "estimate, shuffled": token["shuffled"],
        "estimate, uncalibrated policy": trained["uncalibrated"]["iapo"],
        drawn.ESTIMATE: trained["embedded"]["iapo"],
        "estimate, calibrated policy": trained["calibrated"]["iapo"],
        "estimate by sentence, embedded policy": trained["embedded"]["iapo_sentence"],
        "estimate by sentence, calibrated policy": trained["calibrated"]["iapo_sentence"],
        "continuations": oracle["training"]["oracle"],
        "known roles": token["roles"],
    }


def draw_quality(figures: Path, out: Path) -> None:
    """Draw :func:`by_quality` into ``out``, if ``figures`` has the results of all three studies."""
    paths = [results_path(figures, name, "full") for name in ("controls", "starts", "oracle")]
    if all(path.is_file() for path in paths):
        drawn.quality(by_quality(*map(read_json, paths))).savefig(out / "quality.png", dpi=150)


def oracle_table(results: Mapping) -> str:
    """Both parts of :func:`oracle` as Markdown tables, with means and 95% intervals."""
    lines = ["| policy | correlation of the drops | rank correlation | bias (nats) |",
             "|---" * 4 + "|"]  # fmt: skip
    for name, row in results["agreement"].items():
        cells = [format_interval(row[m], 2) for m in ("correlation", "rank", "bias")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| trained with | each seed | length (tokens) | Pass@1 |", "|---" * 4 + "|"]
    for name, row in results["training"].items():
        lines.append(
            f"| {label(name)} | {', '.join(f'{x:.0f}' for x in row['length'])} "
            f"| {format_interval(mean_interval(row['length']), 1)} "
            f"| {format_interval(share_interval(mean_interval(row['pass@1'])))} |"
        )
    return "\n".join(lines)


def oracle_claims(results: Mapping) -> list[Claim]:
    """Whether better information than IAPO's estimate trains better, to be judged together."""
    claims, trained = [], results["training"]
    for name, what in (("oracle", "the distribution of real continuations"),
                       ("vine", "the value of prefixes (VinePPO)")):  # fmt: skip
        fewer, gained = (
            [sign * (a - b) for a, b in zip(trained["iapo"][metric], trained[name][metric])]
            for metric, sign in (("length", 1), ("ratio@1", -1000))
        )
        claims += [
            Claim(f"with {what} instead of the estimate completions are shorter (tokens)", "-",
                  format_interval(mean_interval(fewer), 1), fewer, low=0.0),
            Claim(f"with {what} instead of the estimate Ratio@1 is higher (per 1,000 tokens)", "-",
                  format_interval(mean_interval(gained), 2), gained, low=0.0),
        ]  # fmt: skip
    return claims
