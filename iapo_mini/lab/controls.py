"""Controls: IAPO with its informativeness replaced by something else, or paid at other tokens.

Nothing in the library depends on this module. Its methods are IAPO with another s, trained with the
settings that were tuned for IAPO and with both means of the loss. If a control has the same effect
as IAPO, then informativeness is not the cause of that effect.

* ``constant``: the same amount on every token, without s and c;
* ``shuffled``: s in a random order within its completion;
* ``random``: independent normal numbers, which after ``norm`` have the same variance as s;
* ``numeric``: 1 on numbers, 0 on everything else;
* ``roles``: 1 on tokens of computing sentences, known from the world: an oracle of usefulness;
* ``reference``: the gain in log-likelihood of the *reference* answer (arXiv 2510.14967), so a wrong
  chain gets nothing for leading to its own answer;
* ``grpo``, ``iapo``, ``iapo_ne`` and the two length-penalised methods, unchanged.

The second part, ``payment``, compares the tokens at which the information of a sentence is paid:
at the token itself, spread evenly over the sentence, in one sum at the sentence's first token, or
as a discounted reward to go. It uses the token mean, once with the estimated s and once with the
roles (``roles_...``).

    figures/results/controls.json
      rows        control -> aggregation -> {"length", "pass@1", "ratio@1": [one per seed]}
      difference  control -> aggregation -> {"iapo", "grpo": [mean, low, high]} of length minus that
                  of IAPO or GRPO
      payment     name -> {"length", "pass@1", "ratio@1": [one per seed]}
      seeds, config, versions

Controls under the token mean have more seeds than those under the sequence mean and the payments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from iapo_mini.advantages import grpo
from iapo_mini.chat import token_texts
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.early_exit.strides import sentence_ends
from iapo_mini.files import versions, write_json
from iapo_mini.information import INFORMATION, Information, answer_surprisals, informativeness
from iapo_mini.intervals import format_interval, mean_interval, share_interval
from iapo_mini.lab.figures import controls as drawn
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import collect, make_jobs, run_all
from iapo_mini.lab.sizes import Size, preset_of
from iapo_mini.lab.tuning import tuned
from iapo_mini.lab.verdicts import Claim
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import token_roles
from iapo_mini.recipes import RECIPES as LIBRARY
from iapo_mini.rollouts import Rollouts

CONSTANT = 0.4
"""Advantage that the control ``constant`` adds to every token. It is twice IAPO's usual alpha, and
about the mean size of IAPO's term on tokens where the term is positive."""
DISCOUNT = 0.8
"""Discount of the reward to go, per token."""


def estimated(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """The paper's s, (B, L) nats."""
    return INFORMATION["answer_entropy"](policy, rollouts, how)


def _generator(rollouts: Rollouts) -> torch.Generator:
    return torch.Generator().manual_seed(rollouts.seed())


def noise(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """Independent standard normal numbers, (B, L)."""
    mask = rollouts.completion_mask
    return torch.randn(mask.shape, generator=_generator(rollouts)).to(mask.device) * mask


def shuffled(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """The values of s in a random order within each completion, (B, L) nats."""
    s, mask = estimated(policy, rollouts, how), rollouts.completion_mask
    keys = torch.rand(mask.shape, generator=_generator(rollouts)).to(mask.device)
    # Real tokens come first in the order, so each of them gets the value of a real token.
    return s.gather(1, keys.masked_fill(~mask, 2.0).argsort(dim=1)) * mask


def numeric(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """1 on tokens that are numbers, (B, L)."""
    out = torch.zeros(rollouts.completion_mask.shape, device=rollouts.completion_mask.device)
    rows = zip(rollouts.completion_ids.tolist(), rollouts.lengths.tolist())
    for i, (ids, n) in enumerate(rows):
        texts = token_texts(policy.tokenizer, ids[:n])
        out[i, :n] = torch.tensor([float(text.strip().isdigit()) for text in texts])
    return out


def roles(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """1 on tokens of computing sentences, by the world's roles, (B, L)."""
    out = torch.zeros(rollouts.completion_mask.shape, device=rollouts.completion_mask.device)
    rows = zip(rollouts.completion_ids.tolist(), rollouts.lengths.tolist())
    for i, (ids, n) in enumerate(rows):
        found = token_roles(policy.tokenizer, ids[:n])
        out[i, :n] = torch.tensor([float(role == "compute") for role in found])
    return out


def reference(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    """log p(y* | q, o_<=t) - log p(y* | q, o_<t) of the reference answer y*, (B, L) nats."""
    answers = [f" {answer}" for answer in rollouts.references]
    surprisals = answer_surprisals(policy, rollouts, answers, how)
    return informativeness(surprisals, rollouts.completion_mask)


def _sentences(policy: Policy, rollouts: Rollouts) -> torch.Tensor:
    """(B, L) long: number of the sentence that each token belongs to, from 0."""
    ends = sentence_ends(policy, rollouts)[:, :-1]  # column t: whether token t begins a sentence
    return ends.long().cumsum(1) - 1


def _sums(values: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
    """(B, L): the sum of ``values`` over the sentence of each token."""
    totals = torch.zeros_like(values).scatter_add_(1, sentence, values)
    return totals.gather(1, sentence)


def spread(policy: Policy, rollouts: Rollouts, values: torch.Tensor) -> torch.Tensor:
    """Each sentence's sum, divided equally among its tokens."""
    mask, sentence = rollouts.completion_mask, _sentences(policy, rollouts)
    count = _sums(mask.float(), sentence)
    return _sums(values * mask, sentence) / count.clamp(min=1) * mask


def first(policy: Policy, rollouts: Rollouts, values: torch.Tensor) -> torch.Tensor:
    """Each sentence's sum at its first token, 0 at the others."""
    mask, sentence = rollouts.completion_mask, _sentences(policy, rollouts)
    begins = torch.diff(sentence, dim=1, prepend=sentence.new_full((len(sentence), 1), -1)) > 0
    return _sums(values * mask, sentence) * (begins & mask)


def to_go(policy: Policy, rollouts: Rollouts, values: torch.Tensor) -> torch.Tensor:
    """sum_{k >= t} DISCOUNT^(k - t) values_k at token t."""
    out = torch.zeros_like(values)
    later = torch.zeros(len(values), device=values.device)
    for t in reversed(range(values.shape[1])):
        later = values[:, t] * rollouts.completion_mask[:, t] + DISCOUNT * later
        out[:, t] = later
    return out * rollouts.completion_mask


def paid(source: Information, payment: Callable[..., torch.Tensor]) -> Information:
    """The estimate of ``source``, moved to other tokens by ``payment``."""
    return lambda policy, rollouts, how: payment(policy, rollouts, source(policy, rollouts, how))


def _constant(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    return grpo(rollouts) + CONSTANT * rollouts.completion_mask


_IAPO = LIBRARY["iapo"]
_PAYMENTS = {"spread": spread, "first": first, "to_go": to_go}
RECIPES = {
    "control_constant": replace(_IAPO, rule=_constant, information=None),
    "control_shuffled": replace(_IAPO, information=shuffled),
    "control_random": replace(_IAPO, information=noise),
    "control_numeric": replace(_IAPO, information=numeric),
    "control_roles": replace(_IAPO, information=roles),
    "control_reference": replace(_IAPO, information=reference),
    "control_grpo": replace(_IAPO, rule="grpo", information=None),
} | {
    f"payment_{prefix}{name}": replace(_IAPO, information=paid(source, payment))
    for prefix, source in (("", estimated), ("roles_", roles))
    for name, payment in _PAYMENTS.items()
}
CONTROLS = (
    "grpo", "constant", "shuffled", "random", "numeric", "roles", "reference", "iapo", "iapo_ne",
    "grpo_kimi", "grpo_efficient",
)  # fmt: skip
NEEDED = ("iapo", "iapo_sequence", "iapo_ne", "grpo_kimi", "grpo_efficient")
"""Rows of Table 1 whose tuned settings are used."""
AGGREGATIONS = ("token", "sequence")
PAYMENTS = ("spread", "first", "to_go", "roles_spread", "roles_first", "roles_to_go")
METRICS = ("length", "pass@1", "ratio@1")
SIZES = {
    "quick": preset_of("quick").sweeps,
    "full": Size(seeds=(0, 1, 2), max_steps=22, problems=200),
}
MORE_SEEDS = {"quick": (), "full": (3, 4)}
"""Further seeds of the controls under the token mean, the loss of the paper's authors."""


def rows_of(settings: Mapping[str, Mapping]) -> dict[str, dict]:
    """Name of a run -> TrainConfig fields, from the tuned settings of Table 1's rows."""
    rows: dict[str, dict] = {}
    for how, name in itertools.product(AGGREGATIONS, CONTROLS):
        base = settings["iapo" if how == "token" else "iapo_sequence"]
        if name in LIBRARY and name not in ("grpo", "iapo"):
            base = settings[name]
        own = name if name in LIBRARY and name != "grpo" else f"control_{name}"
        rows[f"{name}-{how}"] = {**base, "method": own, "aggregation": how}
    for name in PAYMENTS:
        rows[f"payment_{name}"] = {**settings["iapo"], "method": f"payment_{name}"}
    return rows


def _gap(rows: Mapping[str, Mapping], name: str, other: str, how: str, metric: str) -> list[float]:
    """The metric of one control minus that of another, one number for each seed."""
    return [a - b for a, b in zip(rows[name][how][metric], rows[other][how][metric])]


def controls(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Train every control with both means, and every kind of payment; write file and figure.

    Arguments and errors are those of :func:`iapo_mini.lab.table1.table1`, which tunes the settings.
    """
    preset_of(preset)  # refuses an unknown preset
    size, out, figures = SIZES[preset], Path(out), Path(figures)
    check_options(out, figures, parallel)
    recipes = rows_of(tuned(preset, out, figures, parallel, NEEDED))
    runs = out / preset / "controls"
    further = replace(size, seeds=MORE_SEEDS[preset])
    with_token_mean = {name: recipe for name, recipe in recipes.items() if name.endswith("-token")}
    jobs = make_jobs(size, runs, recipes, methods=__name__)
    jobs += make_jobs(further, runs, with_token_mean, methods=__name__)
    kept = ledger_path(figures, file_stem("controls", preset))
    run_all(jobs, parallel, kept)
    found = collect(jobs, size, kept)
    measured = {
        name: {metric: found["methods"][name][metric] for metric in METRICS} for name in recipes
    }
    rows = {name: {how: measured[f"{name}-{how}"] for how in AGGREGATIONS} for name in CONTROLS}
    results = {
        "rows": rows,
        "difference": {
            name: {
                how: {
                    other: mean_interval(_gap(rows, name, other, how, "length"))
                    for other in ("iapo", "grpo")
                }
                for how in AGGREGATIONS
            }
            for name in rows
        },
        "payment": {name: measured[f"payment_{name}"] for name in PAYMENTS}
        | {"token": rows["iapo"]["token"], "roles_token": rows["roles"]["token"]},
        "seeds": found["seeds"], "config": found["config"], "versions": versions(),
    }  # fmt: skip
    path = results_path(figures, "controls", preset)
    write_json(path, results)
    drawn.controls(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def controls_table(results: Mapping) -> str:
    """Results of :func:`controls` as a Markdown table, with means and 95% intervals over seeds.

    The length of every seed is shown too, since the seeds of many rows fall into two groups.
    """
    lines = [
        "| control | loss | length (tokens) | each seed | minus IAPO's | Pass@1 |",
        "|---" * 6 + "|",
    ]

    def line(what: str, how: str, values: Mapping, difference: str = "") -> str:
        cells = (
            what, f"{how} mean", format_interval(mean_interval(values["length"]), 1),
            ", ".join(f"{length:.0f}" for length in values["length"]), difference,
            format_interval(share_interval(mean_interval(values["pass@1"]))),
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"

    for how in AGGREGATIONS:
        for name, row in results["rows"].items():
            gap = format_interval(results["difference"][name][how]["iapo"], 1)
            lines.append(line(drawn.label(name), how, row[how], "" if name == "iapo" else gap))
    for name, values in results["payment"].items():
        if name != "token":  # IAPO itself
            lines.append(line(drawn.label(name), "token", values))
    return "\n".join(lines)


WHAT = {
    "grpo": "GRPO with the same settings",
    "constant": "a constant on every token",
    "shuffled": "s shuffled within the completion",
    "random": "s from random numbers",
    "numeric": "s = 1 on numbers",
    "roles": "s from the known roles",
    "reference": "s from the gain of the reference answer",
    "iapo_ne": "IAPO-NE",
    "grpo_kimi": "GRPO with Kimi's length penalty",
    "grpo_efficient": "GRPO with the length penalty of Arora and Zanette",
}


def control_claims(results: Mapping) -> list[Claim]:
    """Whether IAPO writes fewer tokens than each control, to be judged together."""
    claims = []
    for (name, what), how in itertools.product(WHAT.items(), AGGREGATIONS):
        more, right = (
            _gap(results["rows"], name, "iapo", how, metric) for metric in ("length", "pass@1")
        )
        told = f"{format_interval(mean_interval(more), 1)}; {format_interval(mean_interval(right))}"
        claims.append(Claim(
            f"{how} mean: {what} gives longer completions than IAPO (difference in tokens; "
            "difference of Pass@1)", "-", told, more, low=0.0,
        ))  # fmt: skip
    return claims
