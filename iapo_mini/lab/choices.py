"""How much each token term favours computing over talk where the policy makes a choice.

Most tokens of a completion are hardly a choice: once a sentence has begun, the rest follows. The
length is decided where a sentence begins. So this study looks at the first tokens of sentences
where the policy is unsure (next-token entropy above ``UNSURE``) and compares completions with the
*same* prefix there. It measures how much more a term gives to the first tokens of computing
sentences than to those of talk. The unit is the term's standard deviation over all tokens.

With the sequence mean, a token's term is divided by the length of its completion, and this is taken
into account. A constant has no effect with the token mean, but it favours shorter completions with
the sequence mean.

    figures/results/choices.json
      terms      term -> aggregation -> [mean, low, high], 95% bootstrap interval over stories
      places     number of prefixes at which completions with both kinds of openers were found
      starts     other start policy -> {"terms": the same for ``ESTIMATED``, "places"}
      stories, num_generations, versions
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from iapo_mini.advantages import exploration, normalize
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit
from iapo_mini.early_exit.strides import sentence_ends
from iapo_mini.files import versions, write_json
from iapo_mini.information import INFORMATION, Information
from iapo_mini.intervals import bootstrap_interval, format_interval
from iapo_mini.lab import controls
from iapo_mini.lab.figures import controls as drawn
from iapo_mini.lab.results import check_options, results_path
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.starts import STARTS
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories, token_roles
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem

UNSURE = 0.5
"""Next-token entropy in nats above which the start of a sentence counts as a choice."""
AGGREGATIONS = ("token", "sequence")
SIZES = {"quick": (3, 8), "full": (120, 32)}
"""Number of stories, and of completions for each."""


def _normed(source: Information) -> Information:
    return lambda policy, rollouts, how: normalize(
        source(policy, rollouts, how), rollouts.completion_mask
    )


def _constant(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return rollouts.completion_mask.float()


def _by_sentence(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return INFORMATION["answer_entropy"](policy, rollouts, EarlyExit(stride="sentence"))


def _confidence(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return exploration(rollouts)


TERMS: dict[str, Information] = {
    "iapo": _normed(controls.estimated),
    "iapo_sentence": _normed(_by_sentence),
    "iapo_ne": _normed(INFORMATION["next_token_entropy"]),
    "iapo_pmi": _normed(INFORMATION["answer_surprisal"]),
    "iapo_ni": _normed(_confidence),
    "constant": _constant,
    "shuffled": _normed(controls.shuffled),
    "roles": _normed(controls.roles),
    "first": _normed(controls.paid(controls.estimated, controls.first)),
    "to_go": _normed(controls.paid(controls.estimated, controls.to_go)),
}
"""The values of each term, (B, L), without its weight; ``iapo_ni`` is the exploration term."""
ESTIMATED = ("iapo", "iapo_sentence", "iapo_ne", "shuffled")
"""Terms that are also measured with the start policies of :mod:`iapo_mini.lab.starts`."""


def openers(policy: Policy, rollouts: Rollouts) -> dict[tuple, list[tuple[int, int, bool]]]:
    """Places where the policy chooses how to continue, and its choices there.

    Returns:
        (group, prefix tokens) -> (row, token, whether the sentence computes), for the first tokens
        of sentences with an entropy above ``UNSURE``.
    """
    begins = sentence_ends(policy, rollouts)[:, :-1] & rollouts.completion_mask
    unsure = rollouts.token_entropies > UNSURE
    places: dict[tuple, list[tuple[int, int, bool]]] = defaultdict(list)
    for i, n in enumerate(rollouts.lengths.tolist()):
        ids = rollouts.completion_ids[i, :n].tolist()
        roles = token_roles(policy.tokenizer, ids)
        for t in (begins[i] & unsure[i]).nonzero()[:, 0].tolist():
            if roles[t] != "format":  # a tag ends the thought and does not begin a sentence
                key = (i // rollouts.num_generations, tuple(ids[:t]))
                places[key].append((i, t, roles[t] == "compute"))
    return places


def paid_at_choices(
    policy: Policy,
    problems: Sequence[Problem],
    terms: Mapping[str, Callable[..., torch.Tensor]],
    num_generations: int,
    seed: int = 0,
    *,
    progress: bool = True,
) -> tuple[dict[str, dict[str, list[float]]], int]:
    """How much each term favours computing over talk at choices.

    Args:
        policy: the policy that samples; it also gives early answers if a term needs them.
        problems: stories.
        terms: as ``TERMS``.
        num_generations: completions of each story.
        seed: sampling seed.
        progress: show a progress bar.

    Returns:
        Term -> aggregation -> ``[mean, low, high]`` in standard deviations of the term (bootstrap
        over stories), and the number of places found.
    """
    found: dict[tuple[str, str], list[tuple[np.ndarray, ...]]] = defaultdict(list)
    spread: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    count = 0
    starts = range(0, len(problems), 4)
    for start in tqdm(starts, desc="choices", unit="batch", disable=not progress):
        batch = list(problems[start : start + 4])
        drawn_now = sample(policy, batch, num_generations=num_generations, seed=seed + start)
        rollouts = score(drawn_now, policy.tokenizer, batch)
        places = openers(policy, rollouts)
        mask, lengths = rollouts.completion_mask, rollouts.lengths[:, None].float()
        for name, term in terms.items():
            pay = term(policy, rollouts, EVERY_PREFIX)
            for how, values in zip(AGGREGATIONS, (pay, pay / lengths)):
                spread[name, how].append(values[mask])
                gaps: dict[int, list[float]] = defaultdict(list)  # story -> differences
                for (group, _), chosen in places.items():
                    both = [
                        [float(values[i, t]) for i, t, computes in chosen if computes == kind]
                        for kind in (True, False)
                    ]
                    if all(both):
                        gaps[group].append(float(np.mean(both[0]) - np.mean(both[1])))
                found[name, how] += [(np.array(own),) for own in gaps.values()]
        count += sum(len({computes for *_, computes in chosen}) == 2 for chosen in places.values())
    out: dict[str, dict[str, list[float]]] = {name: {} for name in terms}
    for (name, how), groups in found.items():
        deviation = float(torch.cat(spread[name, how]).std())
        unit = deviation if deviation > 1e-6 else 1.0  # a constant has no deviation
        interval = bootstrap_interval(lambda gaps: float(gaps.mean()), groups)
        out[name][how] = [value / unit for value in interval]
    return out, count


def choices(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Measure every term of :data:`TERMS` at choices of the start policy; write file and figure.

    Nothing is trained. Arguments and errors are those of :func:`iapo_mini.lab.table1.table1`.
    """
    preset_of(preset)  # refuses an unknown preset
    figures = Path(figures)
    check_options(Path(out), figures, parallel)
    n_stories, num_generations = SIZES[preset]
    problems = list(itertools.islice(stories("tune", seed=3), n_stories))

    def measured(model: str, terms: Mapping[str, Information]) -> dict:
        paid, places = paid_at_choices(
            load_policy(model, lora_rank=0), problems, terms, num_generations
        )
        return {"terms": paid, "places": places}

    estimated = {name: TERMS[name] for name in ESTIMATED}
    results = measured(EMBEDDED, TERMS) | {
        "starts": {
            name: measured(model, estimated) for name, model in STARTS.items() if model != EMBEDDED
        },
        "stories": n_stories, "num_generations": num_generations, "versions": versions(),
    }  # fmt: skip
    path = results_path(figures, "choices", preset)
    write_json(path, results)
    drawn.choices(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def choices_table(results: Mapping) -> str:
    """The results of :func:`choices` for the embedded policy as a Markdown table."""
    lines = ["| term | token mean | sequence mean |", "|---" * 3 + "|"]
    for name, row in results["terms"].items():
        cells = [format_interval(row[how], 2) if how in row else "" for how in AGGREGATIONS]
        lines.append(f"| {drawn.label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def choices_by_start(results: Mapping) -> str:
    """What :data:`ESTIMATED` pay with each start policy, token mean, as a Markdown table."""
    titles = ("start policy", *map(drawn.label, ESTIMATED))
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for start, model in STARTS.items():
        terms = results["terms"] if model == EMBEDDED else results["starts"][start]["terms"]
        cells = [format_interval(terms[name]["token"], 2) for name in ESTIMATED]
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
