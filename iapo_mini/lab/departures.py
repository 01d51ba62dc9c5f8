"""Departures of the authors' released code from the paper, and the effect of each.

Nothing in the library depends on this module. It adds methods as a user would (docs/methods.md):
one for each departure that changes the advantage, and one with all of them. Each is trained like
``iapo`` and compared with it on the same rollouts. All ask for early answers after every token,
whatever the stride. Files and lines are those of the released code, commit c00f0c9.
docs/released_code.md has the whole list and says what the library does instead.

    figures/results/departures.json
      rows      name -> {"what": sentence, "correlation", "terms", "sign_flips", "token_term",
                         "length", "pass@1", "pass@k", "ratio@k": [one per seed]}
      iapo      the same outcomes for the paper's rule;  k, config, seeds, versions

``correlation`` is Pearson's correlation of all token advantages with the paper's, on rollouts of
the start policy. ``terms`` is the same for the token terms alone. ``sign_flips`` is the share of
tokens whose advantage changes sign. ``token_term`` is the root mean square of the token terms,
divided by that of the paper's.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DynamicCache

from iapo_mini.advantages import ADVANTAGES, exploration, grpo, iapo, normalize
from iapo_mini.config import TrainConfig
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.files import versions, write_json
from iapo_mini.information import answer_entropies, encode_postfix, inform, informativeness
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.figures import methods
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import collect, make_jobs, run_all
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.tuning import tuned
from iapo_mini.logprobs import trunk_blocks
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.recipes import RECIPES as LIBRARY
from iapo_mini.recipes import Recipe
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample

EPS = 1e-8
CHUNK = 16
"""Number of positions that share a padded cache (``g2rpo_trainer.py``, lines 1132 to 1137, sets it
for each model; 16 is one of its values)."""


def smoothed(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Departure 1: s_t + s_{t-1} / 2, the token's drop plus half of the previous token's drop.

    The released code has E_i = H(y | q, o_<i) at position i and s_i = (E_i + E_{i-1}) / 2 - E_{i+1}
    (``g2rpo_trainer.py``, lines 1300 to 1304). E_i is the entropy *before* token i, so s_i is
    (E_i - E_{i+1}) + (E_{i-1} - E_i) / 2. Entropies outside the batch are 0 there: the one before
    the first position, and the one after the last token of the longest completion.

    Args:
        entropies: (B, L + 1) nats, column t after t tokens; mask: (B, L) bool.

    Returns:
        (B, L) nats; padding 0.
    """
    at = entropies[:, :-1]
    before = torch.nn.functional.pad(at[:, :-1], (1, 0))
    after = torch.nn.functional.pad(at[:, 1:], (0, 1))
    return ((at + before) / 2 - after) * mask


def bracketless(values: torch.Tensor) -> torch.Tensor:
    """Departure 2: x - mean / (std + eps) with padding, divided by the L2 norm of the row.

    So a value is about 1 / sqrt(row length), whatever its unit. At weight 1 the token term is about
    an eighth of the one with the paper's norm (``g2rpo_trainer.py``, lines 2025 and 2039 to 2043).

    Args:
        values: (B, L), zeros at padding (where the released code has other values).
    """
    out = values - values.mean(1, keepdim=True) / (values.std(1, keepdim=True) + EPS)
    return out / (out.norm(dim=1, keepdim=True) + EPS)


def confidence(rollouts: Rollouts) -> torch.Tensor:
    """Departure 3: the next-token entropy, with minus if right and plus if wrong; (B, L) nats.

    The released code subtracts sign(reward) times the entropy (``g2rpo_trainer.py``, lines 2048 to
    2050). So confident tokens of a right completion are rewarded, as by the paper's +pi_old.
    """
    sign = torch.where(rollouts.rewards > 0, 1.0, -1.0)[:, None]
    return -sign * rollouts.token_entropies * rollouts.completion_mask


@torch.no_grad()
def misplaced_entropies(policy: Policy, rollouts: Rollouts, chunk: int = CHUNK) -> torch.Tensor:
    """Departure 4: answer entropies with the postfix at wrong positions; (B, L + 1) nats.

    The caches of a chunk of prefixes are padded to the longest prefix, and the rotary positions of
    the postfix begin at its end. The left padding of the prompt is attended to, since the mask is
    all ones up to the end of the prefix (``g2rpo_trainer.py``, lines 1140 to 1205). Positions count
    the padding in both trunk and postfix, which cancels.
    """
    model, suffix = policy.for_inference(), encode_postfix(policy)
    width, k = rollouts.prompt_ids.shape[1], len(suffix)
    longest = rollouts.completion_ids.shape[1]
    device = policy.device
    out = torch.zeros(len(rollouts.lengths), longest + 1, device=device)
    for trunk in trunk_blocks(model, rollouts, 1, need_logits=False):
        i = int(trunk.rows)
        padding = width - int(rollouts.prompt_mask[i].sum())
        for t in torch.arange(int(rollouts.lengths[i]) + 1).split(chunk):
            end, n = width + int(t[-1]), len(t)
            place = width - padding + max(int(t[-1]), min(int(t[0]) + chunk, longest) - 1)
            cache = DynamicCache(
                [
                    tuple(x[:, :, :end].repeat_interleave(n, 0) for x in (y.keys, y.values))
                    for y in trunk.cache.layers
                ]
            )
            seen = (torch.arange(end) < (width + t)[:, None])[:, None].expand(-1, k, -1)
            own = torch.ones(k, k, dtype=torch.bool).tril().expand(n, -1, -1)
            mask = torch.cat([seen, own], dim=2)[:, None].to(device)
            logits = model(
                suffix.expand(n, -1),
                attention_mask=mask,
                position_ids=(place + torch.arange(k, device=device)).expand(n, -1),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            out[i, t] = logits_entropy(logits)
    return out


def _smoothed(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return smoothed(answer_entropies(policy, rollouts), rollouts.completion_mask)


def _misplaced(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return informativeness(misplaced_entropies(policy, rollouts), rollouts.completion_mask)


def _released(policy: Policy, rollouts: Rollouts, how: EarlyExit) -> torch.Tensor:
    return smoothed(misplaced_entropies(policy, rollouts), rollouts.completion_mask)


def _bracket(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    mask = rollouts.completion_mask
    terms = alpha * bracketless(rollouts.informativeness * mask)
    return (grpo(rollouts) + terms + beta * bracketless(exploration(rollouts))) * mask


def _entropy_c(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    term = normalize(confidence(rollouts), rollouts.completion_mask)
    return iapo(rollouts, alpha, 0.0) + beta * term


def _all(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    mask = rollouts.completion_mask
    sign = torch.where(rollouts.rewards > 0, 1.0, -1.0)[:, None]
    # The sign is outside their norm, which is not an odd function.
    terms = alpha * bracketless(rollouts.informativeness * mask)
    terms -= beta * sign * bracketless(rollouts.token_entropies * mask)
    return (grpo(rollouts) + terms) * mask


_IAPO = LIBRARY["iapo"]
RECIPES = {
    "departure_s": replace(_IAPO, information=_smoothed),
    "departure_norm": replace(_IAPO, rule=_bracket),
    "departure_c": replace(_IAPO, rule=_entropy_c),
    "departure_positions": replace(_IAPO, information=_misplaced),
    "departure_reward": _IAPO,
    "departure_all": replace(_IAPO, rule=_all, information=_released),
}
CHANGES = {
    "departure_reward": {"reward": "released"},
    "departure_all": {"reward": "released"},
}
"""Settings that a departure changes besides its recipe."""
WHAT = {
    "departure_s": "s is s_t + s_{t-1} / 2",
    "departure_norm": "norm misses a bracket, counts padding and divides by the row's L2 norm",
    "departure_c": "c is minus the next-token entropy if right, plus it if wrong",
    "departure_positions": "the postfix stands where its chunk's longest prefix ends, left "
    "padding is attended",
    "departure_reward": "format and answer are judged apart, a thought of two lines has a bad "
    "format",
    "departure_all": "all five",
}


def effect(policy: Policy, alpha: float, beta: float, prompts: int, seed: int) -> dict[str, dict]:
    """The effect of each departure on the advantages of one batch of the policy's rollouts.

    Args:
        policy: the policy that samples and gives early answers.
        alpha, beta: weights of the paper's terms.
        prompts: number of stories of the tune stream, with eight completions each.
        seed: sampling seed.

    Returns:
        name -> ``{"correlation", "terms", "sign_flips", "token_term"}`` as at the head of this
        module.
    """
    problems = list(itertools.islice(stories("tune", seed=seed), prompts))
    sampled = sample(policy, problems, seed=seed)
    mask = sampled.completion_mask

    def weighed(recipe: Recipe, reward: str = "strict") -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages of the real tokens, and the token terms in them."""
        assert recipe.information is not None  # all of them are variants of IAPO
        rollouts = score(sampled, policy.tokenizer, problems, reward)
        informed = inform(policy, rollouts, recipe.information, EVERY_PREFIX)
        rule = ADVANTAGES[recipe.rule] if isinstance(recipe.rule, str) else recipe.rule
        advantages = rule(informed, alpha, beta)
        return advantages[mask], (advantages - grpo(rollouts))[mask]

    ours, our_terms = weighed(_IAPO)
    out = {}
    for name, recipe in RECIPES.items():
        theirs, terms = weighed(recipe, **CHANGES.get(name, {}))
        out[name] = {
            "correlation": float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]),
            "terms": float(torch.corrcoef(torch.stack([our_terms, terms]))[0, 1]),
            "sign_flips": float((ours * theirs < 0).float().mean()),
            "token_term": float((terms.square().mean() / our_terms.square().mean()).sqrt()),
        }
    return out


def departures(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Train IAPO with each departure switched on; write results file and figure.

    Arguments and errors are those of :func:`iapo_mini.lab.table1.table1`, which tunes IAPO.
    """
    size, out, figures = preset_of(preset).sweeps, Path(out), Path(figures)
    check_options(out, figures, parallel)
    recipe = tuned(preset, out, figures, parallel, ("iapo",))["iapo"]
    recipes = {"iapo": recipe} | {
        name: recipe | {"method": name} | CHANGES.get(name, {}) for name in RECIPES
    }
    jobs = make_jobs(size, out / preset / "departures", recipes, methods=__name__)
    kept = ledger_path(figures, file_stem("departures", preset))
    run_all(jobs, parallel, kept)
    found, k = collect(jobs, size, kept), max(size.ks)
    start = load_policy(lora_rank=0)
    prompts = size.prompts_per_step
    alpha, beta = (getattr(TrainConfig(**recipe).recipe(), name) for name in ("alpha", "beta"))
    effects = [effect(start, alpha, beta, prompts, seed) for seed in range(5)]
    outcomes = ("length", "pass@1", f"pass@{k}", f"ratio@{k}")
    results = {
        "k": k,
        "iapo": {metric: found["methods"]["iapo"][metric] for metric in outcomes},
        "rows": {
            name: {"what": what}
            | {m: [seed[name][m] for seed in effects] for m in effects[0][name]}
            | {metric: found["methods"][name][metric] for metric in outcomes}
            for name, what in WHAT.items()
        },
        "config": found["config"], "seeds": found["seeds"], "versions": versions(),
    }  # fmt: skip
    path = results_path(figures, "departures", preset)
    write_json(path, results)
    methods.departures(results).savefig(figures / f"{path.stem}.png", dpi=150)
    return results


def departures_table(results: dict) -> str:
    """Results of :func:`departures` as a Markdown table, with 95% intervals over seeds."""
    columns = {
        "correlation": ("correlation of the advantages", 2),
        "terms": ("correlation of the token terms", 3), "sign_flips": ("signs changed", 3),
        "token_term": ("size of the token terms", 2), "length": ("length (tokens)", 1),
        "pass@1": ("Pass@1", 3),
    }  # fmt: skip
    lines = ["| departure | " + " | ".join(title for title, _ in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    for row in ({"what": "none: the paper's rule"} | results["iapo"], *results["rows"].values()):
        cells = [row["what"]]
        for metric, (_, digits) in columns.items():
            cells.append(
                format_interval(mean_interval(row[metric]), digits) if metric in row else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
