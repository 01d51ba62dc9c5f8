"""Early exit at inference: accuracy against tokens when sure thoughts are cut, without training.

Every chain is sampled once. After every sentence the policy is asked for its answer, in one packed
pass that reads three things: the entropy of the forced answer, the most probable answer, and the
probability that the policy would write the right one. So every rule can be applied afterwards to
the same chains, and the accuracy of a cut chain is an exact expectation and not one more draw.

* ``never``: the chains as they are;
* a number of nats: cut where the entropy of the forced answer is first below it;
* ``agree``: cut where the most probable answer is the same twice in a row;
* *at random*, beside each rule: cut after any sentence with one fixed probability, chosen so that
  as many chains are cut as by the rule. What the rule gains over it is what asking is worth.

The policies are those of :mod:`iapo_mini.lab.starts`, which differ in calibration, and policies
that IAPO has trained from the embedded one with the settings of ``compare``. The curve of a trained
policy begins at what training alone gives (``never``) and shows training and early exit together.

The table assumes what holds for the embedded policies: an answer is written in one way, with a
space before it and ``</answer>`` after it. Any other model (``model``) is run with
:func:`iapo_mini.evaluation.evaluate` once for each rule instead.

    figures/results/early_exit.json
      policies   name -> [one per rule: {"rule": "never" | nats | "agree",
                          "pass@1", "length", "asking": [mean, low, high], "cut": share of chains,
                          "random": {"pass@1", "length": [mean, low, high]} or null}]
                 length and asking are tokens per completion: those written, and those forwarded
                 for asking; intervals are 95%, by bootstrap over stories
      real       the same for ``model``, without "random", on at most OF_A_MODEL's problems, and
                 "lenient pass@1", of answers in any format; null without a model
      stories, num_generations, seeds (of the trained policies), model, versions
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from iapo_mini.adapters import fingerprint_of_weights
from iapo_mini.chat import continuation_ids
from iapo_mini.early_exit import prefixes
from iapo_mini.early_exit.question import AGREE, EVERY_PREFIX, Question, Stopping
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.early_exit.stopping import prefixes_to_ask
from iapo_mini.evaluation import evaluate
from iapo_mini.files import versions, write_json
from iapo_mini.information import encode_postfix
from iapo_mini.intervals import bootstrap_interval, format_interval
from iapo_mini.lab.figures import early_exit as drawn
from iapo_mini.lab.results import check_options, kept, results_path
from iapo_mini.lab.runs import make_jobs, run_all
from iapo_mini.lab.sizes import COMPARED, Size, preset_of
from iapo_mini.lab.starts import STARTS
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.datasets import load_problems
from iapo_mini.problems.stories import stories
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem

NEVER = "never"
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Nats."""
RULES: tuple[str | float, ...] = (NEVER, *THRESHOLDS, AGREE)
RULES_OF_A_MODEL: tuple[str | float, ...] = (NEVER, 0.1, 0.5, 1.0, AGREE)
"""Rules with which another model is run."""
OF_A_MODEL = (50, 4)
"""Largest number of problems, and of completions of each, for another model."""
SIZES = {
    "quick": (preset_of("quick").sweeps, 3, 2),
    "full": (Size(seeds=(0, 1, 2), max_steps=22, problems=200), 200, 8),
}
"""Size of the training runs, and stories and completions of each on which policies are judged."""

Chain = dict[str, Any]
"""One completion: "story", "correct", "length" (tokens) of the whole chain; "suffix", the tokens
that a forced answer adds; "postfix", the tokens of a question; and one number for each question:
"asked" (tokens before it), "entropy" (nats), "answer" (token), "right" (probability)."""


def read_everywhere(
    policy: Policy, rollouts: Rollouts, stride: int | str = "sentence"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask for the answer after every prefix where early exit would ask.

    Args:
        policy: the policy that wrote the completions, whose answers have one token.
        rollouts: B scored completions.
        stride: as in :class:`~iapo_mini.early_exit.question.Stopping`.

    Returns:
        (B, L + 1) bool, the prefixes, and (B, L + 1, 3) fp32: entropy in nats, most probable token,
        and the probability of writing the reference answer and its closing tag.
    """
    postfix = encode_postfix(policy)
    ids = [
        continuation_ids(policy.tokenizer, f" {answer}</answer>") for answer in rollouts.references
    ]
    if len({len(x) for x in ids}) > 1:
        raise ValueError("references must have equal numbers of tokens, as those of stories have")
    targets = torch.tensor(ids, device=postfix.device)
    suffix = torch.cat([postfix.expand(len(ids), -1), targets[:, :-1]], dim=1)

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, targets[rows][..., None])
        first = logits[:, 0]
        return torch.stack(
            [logits_entropy(first), first.argmax(-1).float(), log_p.sum((1, 2)).exp()], dim=1
        )

    question = Question(suffix, read, keep=targets.shape[1], by_row=True)
    asked = prefixes_to_ask(policy, rollouts, stride)
    if not asked.any():
        return asked, asked[..., None].expand(-1, -1, 3).float()
    return asked, prefixes.ask(policy.for_inference(), rollouts, question, EVERY_PREFIX, asked)


def chains_of(
    policy: Policy,
    problems: Sequence[Problem],
    num_generations: int,
    seed: int = 0,
    progress: bool = True,
) -> list[Chain]:
    """Sample completions and ask after every sentence of each; one entry for each completion."""
    found: list[Chain] = []
    starts = range(0, len(problems), 16)
    for start in tqdm(starts, desc="early exit", unit="batch", disable=not progress):
        part = list(problems[start : start + 16])
        drawn_now = sample(policy, part, num_generations=num_generations, seed=seed + start)
        rollouts = score(drawn_now, policy.tokenizer, part)
        asked, values = read_everywhere(policy, rollouts)
        postfix = len(encode_postfix(policy))
        lengths, correct = rollouts.lengths.tolist(), rollouts.correct.tolist()
        for i, places in enumerate(asked):
            entropy, answer, right = values[i, places].T.tolist()
            found.append({
                "story": start + i // num_generations, "correct": float(correct[i]),
                # The answer, its closing tag and the end of the turn follow the postfix.
                "length": lengths[i], "postfix": postfix, "suffix": postfix + 3,
                "asked": places.nonzero()[:, 0].tolist(),
                "entropy": entropy, "answer": answer, "right": right,
            })  # fmt: skip
    return found


def outcomes(chain: Mapping, rule: float | str) -> tuple[float, float, float, bool]:
    """What becomes of a chain: ``(probability of being right, tokens, tokens to ask, cut)``.

    A question costs the postfix; ``"agree"`` also reads the trial answer's one token.
    """
    if rule == NEVER:
        return chain["correct"], float(chain["length"]), 0.0, False
    cost = chain["postfix"] + (rule == AGREE)
    before = None
    questions = zip(chain["asked"], chain["entropy"], chain["answer"], chain["right"])
    for n, (t, entropy, answer, right) in enumerate(questions, start=1):
        if (answer == before) if isinstance(rule, str) else (entropy < rule):
            return right, float(t + chain["suffix"]), float(n * cost), True
        before = answer
    return chain["correct"], float(chain["length"]), float(cost * len(chain["asked"])), False


def at_random(chain: Mapping, chance: float) -> tuple[float, float, float]:
    """The same for a chain that is cut after each question's place with probability ``chance``.

    Returns:
        ``(probability of being right, expected tokens, probability of being cut)``, exactly.
    """
    goes_on = (1 - chance) ** np.arange(len(chain["asked"]))
    stops = chance * goes_on
    whole = 1 - stops.sum()
    right = stops @ np.array(chain["right"]) + whole * chain["correct"]
    tokens = stops @ (np.array(chain["asked"]) + chain["suffix"]) + whole * chain["length"]
    return float(right), float(tokens), float(stops.sum())


def chance_for(chains: Sequence[Mapping], share: float) -> float:
    """The probability after each sentence with which this share of the chains is cut."""
    counts = np.array([len(chain["asked"]) for chain in chains])
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if np.mean(1 - (1 - middle) ** counts) < share:
            low = middle
        else:
            high = middle
    return high


def _by_story(chains: Sequence[Mapping], values: Sequence[float]) -> list[float]:
    """The mean of the values and its bootstrap interval over stories."""
    groups: dict[float, list[float]] = {}
    for chain, value in zip(chains, values):
        groups.setdefault(chain["story"], []).append(value)
    return bootstrap_interval(
        lambda x: float(x.mean()), [(np.array(own),) for own in groups.values()]
    )


def curve(chains: Sequence[Mapping]) -> list[dict]:
    """One entry for each of ``RULES``, as in the results file."""
    rows = []
    for rule in RULES:
        right, tokens, asking, cut = zip(*(outcomes(chain, rule) for chain in chains))
        share = float(np.mean(cut))
        beside = None
        if rule != NEVER:
            chance = chance_for(chains, share)
            its_right, its_tokens, _ = zip(*(at_random(chain, chance) for chain in chains))
            beside = {
                "pass@1": _by_story(chains, its_right), "length": _by_story(chains, its_tokens)
            }  # fmt: skip
        rows.append({
            "rule": rule, "pass@1": _by_story(chains, right), "length": _by_story(chains, tokens),
            "asking": _by_story(chains, asking), "cut": share, "random": beside,
        })  # fmt: skip
    return rows


def _kept_chains(
    path: Path, policy: Policy, problems: Sequence[Problem], num_generations: int
) -> list[Chain]:
    """The chains in a file if they are of this policy and size; else make and keep them."""
    settings = {
        "policy": fingerprint_of_weights(policy.model.named_parameters()),
        "stories": len(problems), "num_generations": num_generations,
    }  # fmt: skip
    return kept(path, settings, lambda: chains_of(policy, problems, num_generations))


def _of_model(model: str, problems: Sequence[Problem], group: int, folder: Path) -> list[dict]:
    """The rows of another model, which is run once for each rule."""
    policy = load_policy(model, lora_rank=0)
    most, largest_group = OF_A_MODEL
    problems, group = problems[:most], min(group, largest_group)
    nothing: dict[str, Any] = {"asking": 0.0, "cut": 0.0, "intervals": {"asking": [0.0, 0.0]}}
    rows = []
    for rule in RULES_OF_A_MODEL:
        found = evaluate(
            policy, problems, ks=(1,), num_generations=group, save_to=folder / f"{rule}.jsonl",
            early_exit=None if rule == NEVER else Stopping(rule), lenient=True,
        )  # fmt: skip
        of = {**nothing, **found, "intervals": {**nothing["intervals"], **found["intervals"]}}
        names = ("pass@1", "lenient pass@1", "length", "asking")
        rows.append(
            {"rule": rule, "cut": of["cut"], "random": None}
            | {name: [of[name], *of["intervals"][name]] for name in names}
        )
    return rows


def early_exit(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
    adapter: str = "",
    untrained: bool = False,
    model: str = "",
    data_file: str = "",
) -> dict:
    """Measure every rule on every policy; train what is missing; write results file and figure.

    Args:
        adapter: folder of an adapter trained by IAPO, in place of training.
        untrained: leave the trained policies out.
        model: another model (folder or hub id) to run as well.
        data_file: its problems, in GSM8K's form; default the first stories.

    The other arguments, and the errors, are those of :func:`iapo_mini.lab.table1.table1`.
    """
    preset_of(preset)  # refuses an unknown preset
    if adapter and untrained:
        raise ValueError(f"adapter must be empty with untrained, got '{adapter}'")
    if data_file and not model:
        raise ValueError(f"model must be given with data_file, which is '{data_file}'")
    (size, n_stories, group), out, figures = SIZES[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    if adapter:
        load_policy(adapter=adapter)  # refuses what is no adapter
    if model:
        load_policy(model, lora_rank=0)  # refuses what is no model, before hours of work
    problems = list(itertools.islice(stories("test", seed=0), n_stories))
    asked = load_problems("gsm8k", "all", data_file) if data_file else problems
    folder = out / preset / "early_exit"
    adapters = [adapter] if adapter else []
    if not adapters and not untrained:
        jobs = make_jobs(size, folder, {"iapo": COMPARED["iapo"]})
        run_all(jobs, parallel)
        adapters = [str(Path(job["run"]) / "train" / "final") for job in jobs]
    policies = {}
    for name, shipped in STARTS.items():
        policy = load_policy(shipped, lora_rank=0)
        policies[name] = curve(_kept_chains(folder / f"{name}.json", policy, problems, group))
    if adapters:
        trained = [
            _kept_chains(folder / f"trained-{i}.json", load_policy(adapter=x), problems, group)
            for i, x in enumerate(adapters)
        ]
        policies["iapo"] = curve([chain for own in trained for chain in own])
    results = {
        "policies": policies,
        "real": _of_model(model, asked, group, folder / Path(model).name) if model else None,
        "stories": n_stories, "num_generations": group,
        "seeds": [] if untrained or adapter else list(size.seeds),
        "model": Path(model).name, "versions": versions(),
    }  # fmt: skip
    path = results_path(figures, "early_exit", preset)
    write_json(path, results)
    drawn.early_exit(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def _told(rule: str | float) -> str:
    return rule if isinstance(rule, str) else f"below {rule:g} nats"


def early_exit_table(results: Mapping) -> str:
    """The results of :func:`early_exit` as one Markdown table, or two if a model was run."""
    lines = ["| policy | rule | chains cut | Pass@1 | tokens written | tokens to ask "
             "| Pass@1, cut at random | tokens, cut at random |", "|---" * 8 + "|"]  # fmt: skip
    for name, rows in results["policies"].items():
        for row in rows:
            beside = row["random"] or {}
            cells = [
                drawn.LABELS.get(name, name), _told(row["rule"]), f"{row['cut']:.2f}",
                format_interval(row["pass@1"]), format_interval(row["length"], 1),
                f"{row['asking'][0]:.1f}",
                format_interval(beside["pass@1"]) if beside else "",
                f"{beside['length'][0]:.1f}" if beside else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    if not results["real"]:
        return "\n".join(lines)
    lines += ["", "| model | rule | chains cut | Pass@1 | Pass@1, any format | tokens written "
              "| tokens to ask |", "|---" * 7 + "|"]  # fmt: skip
    for row in results["real"]:
        cells = [
            results["model"], _told(row["rule"]), f"{row['cut']:.2f}",
            format_interval(row["pass@1"]), format_interval(row["lenient pass@1"]),
            format_interval(row["length"], 1), f"{row['asking'][0]:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
