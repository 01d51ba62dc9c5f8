"""Explain one completion: its tokens, how much each says about the answer, and their roles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from iapo_mini.chat import token_texts
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.plots import token_heatmap
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import token_roles
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem


@dataclass(frozen=True)
class Explained:
    """A completion token by token.

    Attributes:
        problem: the problem that was asked.
        tokens: n token texts, without end-of-sequence.
        informativeness: n values s_t, nats.
        entropies: n + 1 answer entropies H(y | q, o_<=t), nats.
        roles: n roles by the story world's grammar; None for other problems.
    """

    problem: Problem
    tokens: list[str]
    informativeness: list[float]
    entropies: list[float]
    roles: list[str] | None

    def figure(self) -> Figure:
        """Plot a heat map of informativeness over the text (paper, Fig. 14)."""
        title = textwrap.fill(f"Question: {self.problem.question}", 110)
        return token_heatmap(self.tokens, self.informativeness, self.roles, title)


def explain(
    policy: Policy,
    problem: Problem,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Explained:
    """Sample one completion and estimate the informativeness of each of its tokens.

    Args:
        policy: the policy to explain.
        problem: the problem that it is asked.
        temperature: sampling temperature; 0 is greedy.
        seed: sampling seed.
        progress: show the number of tokens while sampling.

    Raises:
        ValueError: for a temperature out of range.
    """
    with tqdm(desc="explain", unit="token", leave=False, disable=not progress) as bar:
        rollouts = sample(
            policy, [problem], num_generations=1, temperature=temperature, seed=seed,
            on_token=lambda *_: bar.update(),
        )  # fmt: skip
    entropies = answer_entropies(policy, rollouts)
    s = informativeness(entropies, rollouts.completion_mask)[0]
    n = int(rollouts.lengths[0]) - int(rollouts.finished[0])
    ids = rollouts.completion_ids[0, :n].tolist()
    return Explained(
        problem,
        token_texts(policy.tokenizer, ids),
        s[:n].tolist(),
        entropies[0, : n + 1].tolist(),
        token_roles(policy.tokenizer, ids) if problem.steps else None,
    )


def check_figure(out: str | Path) -> None:
    """Refuse a figure file of a wrong type or one that would overwrite something else.

    Raises:
        ValueError: for an ending other than .png, .pdf or .svg, or an existing file that is not a
            figure.
    """
    path = Path(out)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out must be a .png, .pdf or .svg file, got '{out}'")
    # matplotlib writes its name into files of all three types.
    if path.is_dir() or (path.is_file() and b"atplotlib" not in path.read_bytes()):
        raise ValueError(f"out is '{out}', which exists and is not a figure; name another file")


def terminal_text(explained: Explained, color: bool = True) -> str:
    """The completion as text for a terminal, with coloured tokens or with nats in brackets."""
    text, limit = colored_tokens(explained.tokens, explained.informativeness, color)
    if not color:
        return text
    legend = f"blue lowers the answer entropy, red raises it; full colour is {limit:.2f} nats"
    return f"{text}\n\n{legend}"


def colored_tokens(
    tokens: Sequence[str], values: Sequence[float], color: bool = True, limit: float = 0.0
) -> tuple[str, float]:
    """Tokens with a background from red (lowest value) to blue (highest value).

    Args:
        tokens, values: one value for each token.
        color: False writes values of at least 0.1 in brackets after their token.
        limit: value of the full colour; default is the largest value, at least 0.1.

    Returns:
        The text and the limit.
    """
    if not color:
        marked = (f"{t}[{v:+.2f}]" if abs(v) >= 0.1 else t for t, v in zip(tokens, values))
        return "".join(marked), limit
    limit = limit or max(0.1, *(abs(v) for v in values), 0.1)
    out = []
    for token, value in zip(tokens, values):
        r, g, b, _ = colormaps["RdBu"](0.5 + 0.5 * value / limit)
        ink = "97" if r + g + b < 1.6 else "30"
        ground = ";".join(str(round(255 * v)) for v in (r, g, b))
        out.append(f"\x1b[{ink};48;2;{ground}m{token}\x1b[0m")
    return "".join(out), limit
