"""The paper's theory compared with measurements: Theorem 4.1, Corollary 4.2, exploration.

:func:`theory` writes ``figures/results/theory.json`` and ``figures/theory_*.png``. An *interval* is
``[mean, low, high]``, 95% by Student's t over seeds; a *curve* is one interval per step size.

    theorem      etas, and for informativeness and for a random direction ("control"):
                 slope (curve of measured on predicted change of length, through the origin),
                 error (curve of |measured - predicted| over |predicted|), order (interval, order
                 of the error in eta for small steps), points (predicted and measured, one seed)
    corollary    tables: random, filler, clue -> premise (share of worlds in which informativeness
                 per token falls with length), shorter and shorter_raw (share in which the step
                 shortens completions, with s normalised within the completion and without),
                 covariance (of length and informativeness per token, nats), change (of length per
                 unit step, tokens), by_length (tokens -> interval, nats per token);
                 paths: filler, clue -> grpo, iapo (curve of expected length over updates)
                 stories: correlation, covariance (nats), slope (nats per token, per additional
                 token), total (correlation of the whole information with length), spread (standard
                 deviation of the whole information within a story, nats), by_steps (correlation),
                 by_length (length over the story's mean -> interval, nats per token)
    policy       the theorem on the embedded policy: predicted and measured change of length
                 (tokens), their difference, nats (rms of S)
    exploration  etas, plus and minus -> slope, error, order as above, right_sign, right_sign_plain
                 (share of policies whose entropy moves as the paper says, with natural or plain
                 gradient), points; strings -> right_sign (share of worlds, with the term of IAPO,
                 which is normalised within the completion)
    preset, versions

In tabular worlds everything is exact: groups are infinite (mean and standard deviation of the
reward are those of the policy), all completions are enumerated in fp64, and the posterior of the
answer follows from Bayes' rule. The reward is 1 if correct and 0 if not; alpha and beta are 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from iapo_mini.advantages import normalize
from iapo_mini.errors import check_choice
from iapo_mini.files import versions, writable_folder, write_json
from iapo_mini.intervals import format_interval, mean_interval
from iapo_mini.lab.exact import (
    Strings,
    added_score,
    covariance,
    entropy,
    log_policy,
    policy_gradient,
    string_drops,
    string_logprobs,
)
from iapo_mini.lab.figures import theory as drawn
from iapo_mini.lab.results import results_path
from iapo_mini.lab.theory_stories import story_experiments
from iapo_mini.lab.worlds import WORLDS, random_worlds

ETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Step sizes. The order of the error is fitted to those up to 0.3."""

Interval = tuple[float, float, float]
Pair = tuple[torch.Tensor, torch.Tensor]
"""Measured and predicted change, (...,) each."""


@dataclass(frozen=True)
class TheorySize:
    """Size of the experiments.

    Attributes:
        seeds: number of draws of worlds, stories and completions; intervals are over them.
        worlds: tabular worlds or policies per seed.
        stories: test stories per seed, an even number, with eight completions each.
        updates: number of updates of the paths.
    """

    seeds: int
    worlds: int
    stories: int
    updates: int


SIZES = {
    "quick": TheorySize(seeds=2, worlds=10, stories=2, updates=5),
    "full": TheorySize(seeds=5, worlds=200, stories=60, updates=60),
}


def share(values: Sequence[float]) -> Interval:
    """Mean and interval of shares, cut to 0..1, which Student's t-interval may leave."""
    mean, low, high = mean_interval(values)
    return mean, max(low, 0.0), min(high, 1.0)


# Theorem 4.1


def reward_direction(strings: Strings, theta: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """GRPO's ascent direction E[1/|o| sum_t norm(r) grad log pi(o_t)], (..., N, V + 1).

    Args:
        theta: (..., N, V + 1) logits; answers: (..., S, Y), p(y | o); y = 0 is correct.
    """
    right = answers[..., 0]
    mean = (string_logprobs(strings, theta).exp() * right).sum(-1, keepdim=True)
    advantage = (right - mean) / (mean * (1 - mean)).sqrt()
    return token_direction(strings, theta, advantage[..., None] * strings.mask)


def token_direction(strings: Strings, theta: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Ascent direction of a token term: E[1/|o| sum_t values(o, t) grad log pi(o_t)].

    Args:
        theta: (..., N, V + 1); values: (..., S, L), such as norm(s_t, s) within the completion.
    """
    return policy_gradient(strings, theta, values / strings.lengths[:, None])


def normalized_drops(strings: Strings, theta: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """norm(s_t, s) over the tokens of each completion, as in training, (..., S, L)."""
    return normalize(string_drops(strings, theta, answers), strings.mask).double()


def expected_length(strings: Strings, theta: torch.Tensor) -> torch.Tensor:
    """E[|o|], (...,) tokens."""
    return string_logprobs(strings, theta).exp() @ strings.lengths


def length_change(strings: Strings, theta: torch.Tensor, change: torch.Tensor) -> Pair:
    """Theorem 4.1: ``(measured, predicted)`` change of the expected length, (...,) tokens each.

    Args:
        theta: (..., N, V + 1), theta_GRPO; change: the change of theta, including eta.

    Returns:
        E[|o|] after the change minus E[|o|] before it, and Cov(|o|, S(o)) under theta_GRPO.
    """
    measured = expected_length(strings, theta + change) - expected_length(strings, theta)
    p = string_logprobs(strings, theta).exp()
    return measured, covariance(p, strings.lengths, added_score(strings, theta, change))


def agreement(
    change: Callable[[int, float], Pair],
    seeds: int,
    etas: Sequence[float] = ETAS,
) -> dict:
    """Slope and relative error of measured on predicted change by step size, and the error's order.

    Args:
        change: (seed, eta) -> (measured, predicted), (count,) each.
        seeds: number of seeds; etas: step sizes, at least two of them up to 0.3.

    Returns:
        ``slope``, ``error`` (one interval per step size), ``order``, and ``points`` of seed 0 at
        the step sizes 0.1 and 10 if they are among them: ``[predicted, measured]`` lists.
    """
    slopes, errors, orders, points = [], [], [], {}
    small = [eta for eta in etas if eta <= 0.3]
    for seed in range(seeds):
        pairs = [change(seed, eta) for eta in etas]
        slopes.append([float((m * p).sum() / (p * p).sum()) for m, p in pairs])
        errors.append([float((m - p).norm() / p.norm()) for m, p in pairs])
        x = torch.tensor(small).double().log()
        y = torch.tensor(errors[-1][: len(small)]).double().log()
        orders.append(float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()))
        if seed == 0:
            points = {
                str(eta): [p.tolist(), m.tolist()]
                for eta, (m, p) in zip(etas, pairs)
                if eta in (0.1, 10.0)
            }
    return {
        "slope": [mean_interval(x) for x in zip(*slopes)],
        "error": [mean_interval(x) for x in zip(*errors)],
        "order": mean_interval(orders),
        "points": points,
    }


def theorem(preset: TheorySize) -> dict:
    """Test Theorem 4.1 in random worlds, for the informativeness term and a random direction."""

    def change(seed: int, eta: float, random: bool = False) -> Pair:
        strings, theta, answers = random_worlds(preset.worlds, seed)
        added = token_direction(strings, theta, normalized_drops(strings, theta, answers))
        if random:
            other = torch.randn(added.shape, generator=torch.Generator().manual_seed(seed)).double()
            other = other * strings.allowed
            added = other * added.norm(dim=(-2, -1), keepdim=True)
            added = added / other.norm(dim=(-2, -1), keepdim=True)
        theta = theta + eta * reward_direction(strings, theta, answers)
        return length_change(strings, theta, eta * added)

    return {
        "etas": list(ETAS),
        "informativeness": agreement(change, preset.seeds),
        "control": agreement(lambda seed, eta: change(seed, eta, True), preset.seeds),
    }


# Corollary 4.2


def corollary_tables(preset: TheorySize, eta: float = 0.01) -> dict:
    """Test premise and conclusion of Corollary 4.2 by a small step in three kinds of worlds."""
    out: dict[str, dict] = {}
    for name, draw in WORLDS.items():
        found: dict[str, list] = {}
        by_length: dict[int, list] = {}
        for seed in range(preset.seeds):
            strings, theta, answers = draw(preset.worlds, seed)
            p, lengths = string_logprobs(strings, theta).exp(), strings.lengths
            drops = string_drops(strings, theta, answers)
            per_token = drops.sum(-1) / lengths
            cov = covariance(p, lengths, per_token)
            changes = []
            for values in (normalized_drops(strings, theta, answers), drops):
                step = eta * token_direction(strings, theta, values)
                grpo = theta + eta * reward_direction(strings, theta, answers)
                changes.append(length_change(strings, grpo, step)[0] / eta)
            for key, value in (
                ("premise", cov < 0), ("shorter", changes[0] < 0), ("shorter_raw", changes[1] < 0),
                ("covariance", cov), ("change", changes[0]),
            ):  # fmt: skip
                found.setdefault(key, []).append(float(value.double().mean()))
            for n in lengths.unique().tolist():
                here = p * (lengths == n)
                mean = (here * per_token).sum(-1) / here.sum(-1)
                by_length.setdefault(int(n), []).append(float(mean.mean()))
        shares = ("premise", "shorter", "shorter_raw")
        out[name] = {k: (share if k in shares else mean_interval)(v) for k, v in found.items()}
        out[name]["by_length"] = {str(n): mean_interval(v) for n, v in by_length.items()}
    return out


def corollary_paths(preset: TheorySize, eta: float = 1.0) -> dict:
    """Expected length over many updates of GRPO and of IAPO, in filler and clue worlds."""
    out = {}
    for name in ("filler", "clue"):
        runs: dict[str, list] = {"grpo": [], "iapo": []}
        for seed, method in itertools.product(range(preset.seeds), runs):
            strings, theta, answers = WORLDS[name](min(preset.worlds, 20), seed)
            path = [float(expected_length(strings, theta).mean())]
            for _ in range(preset.updates):
                step = reward_direction(strings, theta, answers)
                if method == "iapo":
                    values = normalized_drops(strings, theta, answers)
                    step = step + token_direction(strings, theta, values)
                theta = theta + eta * step
                path.append(float(expected_length(strings, theta).mean()))
            runs[method].append(path)
        out[name] = {m: [mean_interval(x) for x in zip(*paths)] for m, paths in runs.items()}
    return out


# Exploration


def entropy_change(
    logits: torch.Tensor, advantages: torch.Tensor, eta: float, natural: bool = True
) -> Pair:
    """``(measured, predicted)`` change of a policy's entropy by one step, (...,) nats each.

    H(pi_new) - H(pi_0) ~ -eta Cov_{o~pi_0}(log pi_0(o), A(o)) (paper, exploration) holds for the
    natural gradient of E[A], which adds eta A to the logits: pi_new ~ pi_0 exp(eta A). The plain
    gradient adds eta pi_0 (A - E[A]) instead; the formula then holds with this in place of A.

    Args:
        logits: (..., V) fp64; advantages: (..., V), A of every choice; eta: step size.
        natural: whether to use the natural gradient.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = (p * advantages).sum(-1, keepdim=True)
    step = eta * (advantages if natural else p * (advantages - mean))
    measured = entropy((logits + step).softmax(-1)) - entropy(p)
    return measured, -covariance(p, log_p, step)


def completion_entropy_change(strings: Strings, theta: torch.Tensor, change: torch.Tensor) -> Pair:
    """The same for whole completions: change of H(p(o)) and -Cov(log p(o), S(o)), (...,) nats."""
    before, after = (string_logprobs(strings, x) for x in (theta, theta + change))
    measured = (before.exp() * before).sum(-1) - (after.exp() * after).sum(-1)
    return measured, -covariance(before.exp(), before, added_score(strings, theta, change))


def exploration(preset: TheorySize, choices: int = 8, eta: float = 0.01) -> dict:
    """Test entropy after A = +pi_0 and A = -pi_0, for random policies over ``choices`` tokens."""

    def logits(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 1.5 * torch.randn(preset.worlds, choices, generator=generator, dtype=torch.float64)

    def right(sign: int, measured: torch.Tensor) -> float:
        return float((sign * measured < 0).double().mean())

    out: dict = {"etas": list(ETAS), "choices": choices, "strings": {}}
    for name, sign in (("plus", 1), ("minus", -1)):

        def change(seed: int, eta: float, natural: bool = True, sign: int = sign) -> Pair:
            drawn = logits(seed)
            return entropy_change(drawn, sign * drawn.softmax(-1), eta, natural)

        seeds = range(preset.seeds)
        out[name] = agreement(change, preset.seeds) | {
            "right_sign": share([right(sign, change(s, eta)[0]) for s in seeds]),
            "right_sign_plain": share([right(sign, change(s, eta, False)[0]) for s in seeds]),
        }
        shares = []
        for seed in seeds:
            strings, theta, _ = random_worlds(preset.worlds, seed)
            chosen = log_policy(strings, theta).exp()[..., strings.prefixes, strings.tokens]
            values = normalize(sign * chosen, strings.mask).double()
            step = eta * token_direction(strings, theta, values)
            shares.append(right(sign, completion_entropy_change(strings, theta, step)[0]))
        out["strings"][name] = share(shares)
    return out


def theory(preset: str = "full", figures: str | Path = "figures", progress: bool = True) -> dict:
    """Run every experiment, write ``results/theory.json`` and the figures.

    Files are written only at the end, so a run that is stopped changes nothing.

    Args:
        preset: a key of ``SIZES``; figures: folder of figures; progress: show progress bars.

    Returns:
        The content of the results file, as described at the head of this module.

    Raises:
        ValueError: for an unknown preset, or a folder where nothing can be written.
    """
    check_choice("preset", preset, SIZES)
    figures, sizes = Path(figures), SIZES[preset]
    writable_folder(figures / "results", "figures")
    results: dict = {"preset": {"name": preset} | asdict(sizes), "versions": versions()}
    results["theorem"] = theorem(sizes)
    results["exploration"] = exploration(sizes)
    results["corollary"] = {"tables": corollary_tables(sizes), "paths": corollary_paths(sizes)}
    results["corollary"]["stories"], results["policy"] = story_experiments(
        sizes.seeds, sizes.stories, progress
    )
    write_json(results_path(figures, "theory", preset), results)
    draw(results, figures)
    return results


def draw(results: dict, figures: Path) -> None:
    """Draw every figure from the content of ``results/theory.json``."""
    ending = "" if results["preset"]["name"] == "full" else f"_{results['preset']['name']}"
    for name in ("theorem", "corollary", "exploration"):
        figure = getattr(drawn, f"theory_{name}")(results[name])
        figure.savefig(figures / f"theory_{name}{ending}.png", dpi=150)


def summary(results: dict) -> str:
    """Markdown table with a line for each claim: the paper's number and ours."""
    theorem, exploration = results["theorem"], results["exploration"]
    tables, told = results["corollary"]["tables"], results["corollary"]["stories"]
    policy = results["policy"]
    rows = [
        ("Theorem 4.1, slope of measured on predicted at the smallest step", "1",
         format_interval(theorem["informativeness"]["slope"][0], 5)),
        ("the same for a random direction", "1",
         format_interval(theorem["control"]["slope"][0], 5)),
        ("order of the relative error in the step", "1",
         format_interval(theorem["informativeness"]["order"])),
        ("embedded policy, a step's change of length (tokens)",
         format_interval(policy["predicted"], 1), format_interval(policy["measured"], 1)),
        ("Corollary 4.2, stories: correlation of informativeness per token with length", "negative",
         format_interval(told["correlation"])),
    ]  # fmt: skip
    for name, says in (("random", "1"), ("filler", "1"), ("clue", "0")):
        rows += [
            (f"{name} worlds: share in which informativeness per token falls with length", says,
             format_interval(tables[name]["premise"])),
            (f"{name} worlds: share in which the step shortens", says,
             format_interval(tables[name]["shorter"])),
            ("the same, s not normalised", says, format_interval(tables[name]["shorter_raw"])),
        ]  # fmt: skip
    for name, says in (("plus", "falls"), ("minus", "rises")):
        rows += [
            (f"exploration, A = {'+' if name == 'plus' else '-'}pi: slope", "1",
             format_interval(exploration[name]["slope"][0], 5)),
            (f"share of policies whose entropy {says}, natural gradient", "1",
             format_interval(exploration[name]["right_sign"])),
            ("the same, plain gradient", "",
             format_interval(exploration[name]["right_sign_plain"])),
            ("the same, completions, term normalised within each", "",
             format_interval(exploration["strings"][name])),
        ]  # fmt: skip
    lines = ["| claim | theory | found (95% interval over seeds) |", "|---|---|---|"]
    return "\n".join(lines + [f"| {a} | {b} | {c} |" for a, b, c in rows])
