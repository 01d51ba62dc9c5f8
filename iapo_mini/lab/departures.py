"""Where the authors' released code departs from the paper, and what each departure does.

Nothing in the library depends on this module: it is a user of it, with methods of its own
(docs/methods.md), one for each departure that touches the advantage and one with all of them. Each
is trained as ``iapo`` is, and held against it on the same rollouts. All ask after every token,
whatever the stride.


    figures/results/departures.json
      rows      name -> {"what": sentence, "correlation", "sign_flips", "token_term",
                         "length", "pass@1", "pass@k", "ratio@k": [one per seed]}
      iapo      the same three outcomes of the paper's rule;  k, config, seeds, versions

``correlation`` is Pearson's, of all token advantages with the paper's on rollouts of the start
policy; ``sign_flips`` the share of tokens whose advantage changes sign; ``token_term`` the root
mean square of what the token terms add, over that of the paper's.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DynamicCache

from iapo_mini.advantages import ADVANTAGES, exploration, grpo, iapo, normalize
from iapo_mini.config import RECIPES as LIBRARY
from iapo_mini.config import Recipe
from iapo_mini.early_exit.question import EVERY_PREFIX, EarlyExit
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.files import versions, write_json
from iapo_mini.information import answer_entropies, encode_postfix, inform, informativeness
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.figures import methods
from iapo_mini.lab.results import check_options, results_path
from iapo_mini.lab.runs import collect, make_jobs, run_all
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.tuning import tuned
from iapo_mini.logprobs import trunk_blocks
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample

EPS = 1e-4
CHUNK = 16
"""Positions that share a padded cache; the released code sets it per model, 16 among them."""


def smoothed(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Departure 1: s_t = (H_t + H_{t-1}) / 2 - H_{t+1} in place of H_{t-1} - H_t.

    Args:
        entropies: (B, L + 1) nats, column t after t tokens; mask: (B, L) bool.

    Returns:
        (B, L) nats. After a row's last token H_{t+1} is H_t, since nothing follows.
    """
    lengths = mask.sum(1, keepdim=True)
    after = torch.arange(1, entropies.shape[1], device=mask.device)
    following = entropies.gather(1, torch.minimum(after + 1, lengths))
    return ((entropies[:, 1:] + entropies[:, :-1]) / 2 - following) * mask


def bracketless(values: torch.Tensor) -> torch.Tensor:
    """Departure 2: x - mean / (std + eps), padding included, divided by the row's L2 norm.

    Args:
        values: (B, L), zeros at padding. Returns (B, L).
    """
    out = values - values.mean(1, keepdim=True) / (values.std(1, keepdim=True) + EPS)
    return out / out.norm(dim=1, keepdim=True).clamp(min=1e-12)


def entropy_as_confidence(rollouts: Rollouts) -> torch.Tensor:
    """Departure 3: c is the token's next-token entropy, signed by the reward, not pi_old(o_t)."""
    sign = torch.where(rollouts.rewards > 0, 1.0, -1.0)[:, None]
    return sign * rollouts.token_entropies * rollouts.completion_mask


@torch.no_grad()
def misplaced_entropies(policy: Policy, rollouts: Rollouts, chunk: int = CHUNK) -> torch.Tensor:
    """Departure 4: answer entropies with the postfix in the wrong place; (B, L + 1) nats.

    The postfix goes behind a cache padded to the longest prefix of its chunk, so its rotary
    positions are those of that prefix; left padding of the prompt counts as position and is
    attended; and the cache holds one token less than the prefix it stands for.
    """
    model, suffix = policy.for_inference(), encode_postfix(policy)
    width, k = rollouts.prompt_ids.shape[1], len(suffix)
    out = torch.zeros(len(rollouts.lengths), rollouts.completion_ids.shape[1] + 1)
    for trunk in trunk_blocks(model, rollouts, 1, need_logits=False):
        i = int(trunk.rows)
        for t in torch.arange(int(rollouts.lengths[i]) + 1).split(chunk):
            longest, n = width + int(t[-1]), len(t)
            cache = DynamicCache(
                [
                    tuple(x[:, :, :longest].repeat_interleave(n, 0) for x in (y.keys, y.values))
                    for y in trunk.cache.layers
                ]
            )
            seen = (torch.arange(longest) < (width + t - 1)[:, None])[:, None].expand(-1, k, -1)
            own = torch.ones(k, k, dtype=torch.bool).tril().expand(n, -1, -1)
            logits = model(
                suffix.expand(n, -1),
                attention_mask=torch.cat([seen, own], dim=2)[:, None],
                position_ids=(longest + torch.arange(k)).expand(n, -1),
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


def _bracketless_terms(
    rollouts: Rollouts, alpha: float, beta: float, c: torch.Tensor
) -> torch.Tensor:
    mask = rollouts.completion_mask
    terms = alpha * bracketless(rollouts.informativeness * mask) + beta * bracketless(c)
    return (grpo(rollouts) + terms) * mask


def _bracket(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    return _bracketless_terms(rollouts, alpha, beta, exploration(rollouts))


def _entropy_c(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    term = normalize(entropy_as_confidence(rollouts), rollouts.completion_mask)
    return iapo(rollouts, alpha, 0.0) + beta * term


def _all(rollouts: Rollouts, alpha: float, beta: float) -> torch.Tensor:
    return _bracketless_terms(rollouts, alpha, beta, entropy_as_confidence(rollouts))


_IAPO = LIBRARY["iapo"]
RECIPES = {
    "departure_s": replace(_IAPO, information=_smoothed),
    "departure_norm": replace(_IAPO, rule=_bracket),
    "departure_c": replace(_IAPO, rule=_entropy_c),
    "departure_positions": replace(_IAPO, information=_misplaced),
    "departure_all": replace(_IAPO, rule=_all, information=_released),
}
WHAT = {
    "departure_s": "s is (H_t + H_{t-1}) / 2 - H_{t+1}",
    "departure_norm": "norm misses a bracket, counts padding and divides by the row's L2 norm",
    "departure_c": "c is the next-token entropy, signed by the reward",
    "departure_positions": "postfix at wrong positions, left padding attended, cache one short",
    "departure_all": "all four",
}


def effect(policy: Policy, alpha: float, beta: float, prompts: int, seed: int) -> dict[str, dict]:
    """What each departure does to the advantages of one batch of the policy's rollouts.

    Args:
        policy: who samples and is asked.
        alpha, beta: weights of the paper's terms.
        prompts: stories of the tune stream, eight completions each; seed: for sampling.

    Returns:
        name -> ``{"correlation", "sign_flips", "token_term"}`` as at the head of this module.
    """
    problems = list(itertools.islice(stories("tune", seed=seed), prompts))
    rollouts = score(sample(policy, problems, seed=seed), policy.tokenizer, problems)
    mask, base = rollouts.completion_mask, grpo(rollouts)

    def weighed(recipe: Recipe) -> torch.Tensor:
        assert recipe.information is not None  # all of them are IAPO with something changed
        informed = inform(policy, rollouts, recipe.information, EVERY_PREFIX)
        rule = ADVANTAGES[recipe.rule] if isinstance(recipe.rule, str) else recipe.rule
        return rule(informed, alpha, beta)

    ours = weighed(_IAPO)
    out = {}
    for name, recipe in RECIPES.items():
        theirs = weighed(recipe)
        pair = torch.stack([ours[mask], theirs[mask]])
        size = ((theirs - base)[mask].square().mean() / (ours - base)[mask].square().mean()).sqrt()
        out[name] = {
            "correlation": float(torch.corrcoef(pair)[0, 1]),
            "sign_flips": float((pair[0] * pair[1] < 0).float().mean()),
            "token_term": float(size),
        }
    return out


def departures(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Train IAPO with each departure switched on; results file and figure.

    Arguments and errors as for :func:`iapo_mini.lab.table1.table1`, which tunes IAPO's settings.
    """
    size, out, figures = preset_of(preset).sweeps, Path(out), Path(figures)
    check_options(out, figures, parallel)
    recipe = tuned(preset, out, figures, parallel)["iapo"]
    recipes = {"iapo": recipe} | {name: recipe | {"method": name} for name in RECIPES}
    jobs = make_jobs(size, out / preset / "departures", recipes, methods=__name__)
    run_all(jobs, parallel)
    found, k = collect(jobs, size), max(size.ks)
    start = load_policy(lora_rank=0)
    prompts = size.prompts_per_step
    effects = [effect(start, recipe["alpha"], recipe["beta"], prompts, seed) for seed in range(5)]
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
    """The rows of :func:`departures` as a Markdown table; mean and 95% interval over seeds."""
    columns = {
        "correlation": ("correlation of the advantages", 2), "sign_flips": ("signs changed", 3),
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
