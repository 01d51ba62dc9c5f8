"""Diagrams of learning: GRPO's loop, the clipped ratio, the advantage, means, Pass@k."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iapo_mini.diagrams.drawing import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    QUIET,
    SMALL,
    YELLOW,
    arrow,
    box,
    brace,
    canvas,
    cell,
    panels,
    row,
    signed,
    write,
)  # fmt: skip

REWARDS = (1.5, -0.5, 1.5, -1.5)
"""The rewards of one group in the diagrams: right, wrong, right, and wrong in a wrong format."""


def norm(values: Sequence[float]) -> list[float]:
    """``(x - mean) / std`` with the sample's standard deviation."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return [(x - mean) / spread for x in values]


def clipped(ratio: float, advantage: float, epsilon: float = 0.2) -> float:
    """GRPO's surrogate of one token."""
    return min(ratio * advantage, min(max(ratio, 1 - epsilon), 1 + epsilon) * advantage)


def grpo_loop() -> Figure:
    """The loop of GRPO: prompts, group, rewards, advantages, update."""
    mean, spread = statistics.fmean(REWARDS), statistics.stdev(REWARDS)
    advantages = norm(REWARDS)
    fig, ax = canvas(10, 3.7, (
        "Flow chart of one step of GRPO, from left to right. The policy gets a prompt q and "
        "samples a group of four completions o1 to o4 of different lengths. Each gets one reward: "
        + ", ".join(signed(r, 1) for r in REWARDS)
        + f". From the rewards, mean {mean:.2f} and standard deviation {spread:.2f}, follow the "
        "advantages (r minus mean) divided by the standard deviation: "
        + ", ".join(signed(a) for a in advantages)
        + ". The update makes the tokens of completions with a positive advantage more likely and "
        "those of completions with a negative one less likely. An arrow leads back to the policy: "
        "the next step samples with the new weights."
    ))  # fmt: skip
    heads = ((0.85, "1  prompt"), (3.55, "2  group"), (5.85, "3  rewards"), (7.35, "4  advantages"),
             (9.05, "5  update"))  # fmt: skip
    for x, text in heads:
        write(ax, x, 3.45, text, weight="bold")
    box(ax, (0.2, 2.35, 1.3, 0.55), "question q", PAPER)
    box(ax, (0.2, 1.15, 1.3, 0.65), "policy\n$\\pi_\\theta$", BLUE)
    arrow(ax, (0.85, 2.35), (0.85, 1.82))
    for i, (reward, advantage, tokens) in enumerate(zip(REWARDS, advantages, (6, 10, 8, 11))):
        y = 2.75 - 0.55 * i
        arrow(ax, (1.5, 1.5), (2.2, y + 0.14), lw=0.9)
        write(ax, 2.4, y + 0.14, f"$o_{i + 1}$")
        row(ax, 2.62, y, [""] * tokens, BLUE, width=0.21, height=0.28)
        arrow(ax, (2.68 + 0.21 * tokens, y + 0.14), (5.4, y + 0.14), lw=0.9)
        color, hatch = (GREEN, "") if advantage > 0 else (ORANGE, "//")
        write(ax, 5.85, y + 0.14, signed(reward, 1))
        arrow(ax, (6.3, y + 0.14), (6.8, y + 0.14), lw=0.9)
        cell(ax, (6.9, y, 0.9, 0.28), "", color, hatch=hatch, ec="#b0b0b0")
        write(ax, 7.35, y + 0.14, signed(advantage), bbox={"fc": color, "ec": "none", "pad": 1.5})
        arrow(ax, (7.85, y + 0.14), (8.2, 1.95 + 0.1 * (1.5 - i)), lw=0.9)
    box(ax, (8.25, 1.5, 1.6, 1.0), "each token of $o_i$:\n$A_i > 0$: more likely\n"
        "$A_i < 0$: less likely", PAPER, SMALL)  # fmt: skip
    ax.plot([9.05, 9.05, 0.85], [1.5, 0.55, 0.55], color=INK, lw=1.2)
    arrow(ax, (0.85, 0.55), (0.85, 1.13))
    write(ax, 4.95, 0.36, "new weights; the next step samples with them")
    return fig


def reward_to_ratio() -> Figure:
    """From a reward to the clipped ratio of a token, in three cases."""
    advantages = norm(REWARDS)
    told = []
    for i, old, new in ((0, 0.20, 0.22), (0, 0.20, 0.30), (3, 0.20, 0.10)):
        ratio, value = new / old, clipped(new / old, advantages[i])
        moves = math.isclose(value, ratio * advantages[i])
        told.append((REWARDS[i], advantages[i], old, new, ratio, value, moves))
    fig, ax = canvas(10, 3.0, (
        "Table with three tokens as rows, from the reward of their completion to the clipped "
        f"surrogate. In their group the rewards have mean {statistics.fmean(REWARDS):.2f} and "
        f"standard deviation {statistics.stdev(REWARDS):.2f}. "
        + " ".join(
            f"Token {i}: reward {signed(r, 1)}, advantage {signed(a)}, probability {old:.2f} when "
            f"sampled and {new:.2f} now, ratio {ratio:.2f}, surrogate {signed(value)}: "
            + ("inside the clip range of 0.8 to 1.2, so the token is still pushed."
               if moves else "the clip has cut it off, so the token is pushed no further.")
            for i, (r, a, old, new, ratio, value, moves) in enumerate(told, 1)
        )
    ))  # fmt: skip
    heads = ((0.6, "reward\n$r$"), (1.85, "advantage\n$A$"),
             (3.5, "probability\nsampled → now"), (5.15, "ratio\n$\\rho$ = now / sampled"),
             (6.95, "surrogate\nmin($\\rho A$, clip($\\rho$) $A$)"),
             (8.95, "the gradient\nof this token"))  # fmt: skip
    for x, text in heads:
        write(ax, x, 2.62, text, SMALL, weight="bold")
    for i, (reward, advantage, old, new, ratio, value, moves) in enumerate(told):
        y = 1.8 - 0.7 * i
        box(ax, (0.2, y - 0.2, 0.8, 0.4), signed(reward, 1), PAPER)
        box(ax, (1.4, y - 0.2, 0.9, 0.4), signed(advantage), GREEN if advantage > 0 else ORANGE)
        box(ax, (2.75, y - 0.2, 1.5, 0.4), f"{old:.2f} → {new:.2f}", BLUE)
        box(ax, (4.7, y - 0.2, 0.9, 0.4), f"{ratio:.2f}", PAPER)
        text = signed(value) if moves else f"{signed(value)}  (clipped)"
        box(ax, (6.15, y - 0.2, 1.6, 0.4), text, PAPER if moves else YELLOW)
        limit = "above 1.2" if advantage > 0 else "below 0.8"
        write(
            ax, 8.95, y, "pushes it further up" if moves else f"zero: the ratio is {limit}", SMALL
        )
        for start, end in ((1.0, 1.4), (2.3, 2.75), (4.25, 4.7), (5.6, 6.15), (7.75, 8.05)):
            arrow(ax, (start + 0.03, y), (end - 0.03, y), lw=1)
    return fig


TOLD, EXPLORED = "#674CD5", "#954B3D"
"""Colours of the terms of informativeness and exploration, as in notebook 05."""


def _beside(
    ax: Axes, x: float, ends: tuple[float, float], text: str, above: bool, **style: Any
) -> None:
    """The number of a bar, above or below it."""
    y, va = (max(ends) + 0.06, "bottom") if above else (min(ends) - 0.06, "top")
    ax.text(x, y, text, ha="center", va=va, fontsize=SMALL, **style)


def three_terms() -> Figure:
    """The three terms of IAPO's advantage, added up on three tokens."""
    alpha, beta = 0.2, 0.05  # the library's defaults
    cases = (
        ("a result, right completion", 0.83, 4.0, 0.8),
        ("talk, right completion", 0.83, -0.3, -1.6),
        ("a wrong result, wrong completion", -1.17, 4.0, -0.8),
    )
    sums = [r + alpha * s + beta * c for _, r, s, c in cases]
    fig, axes = panels(10, 3.2, 3, (
        f"Three small charts of bars that add up, with alpha {alpha} and beta {beta}. In each, the "
        "first bar is norm(r), the second alpha norm(s), the third beta norm(c); each starts where "
        "the one before ends, and the last bar is their sum, the advantage A. "
        + " ".join(
            f"{name[0].upper()}{name[1:]}: {signed(r)}, {signed(alpha * s)}, {signed(beta * c)}, "
            f"sum {signed(total)}."
            for (name, r, s, c), total in zip(cases, sums)
        )
        + " The informative token of the right completion is pushed up most, the talk beside it "
        "less, and the wrong result is pushed down far less than its reward alone would do."
    ), sharey=True)  # fmt: skip
    looks = (("#9a9a9a", ""), (TOLD, "//"), (EXPLORED, ".."), ("white", ""))
    names = ("norm(r)", f"{alpha} norm(s)", f"{beta} norm(c)", "A")
    for ax, (name, r, s, c), total in zip(axes, cases, sums):
        start = 0.0
        for x, part in enumerate((r, alpha * s, beta * c)):
            color, hatch = looks[x]
            ax.bar(x, part, 0.6, start, color=color, hatch=hatch, edgecolor="white", lw=0)
            ax.plot([x - 0.3, x + 1.3], [start + part] * 2, color=QUIET, lw=0.8, ls=":")
            _beside(ax, x, (start, start + part), signed(part), total > 0)
            start += part
        ax.bar(3, total, 0.6, color="white", edgecolor=INK, lw=1.5)
        _beside(ax, 3, (0, total), signed(total), total > 0, weight="bold")
        ax.axhline(0, color=INK, lw=0.8)
        ax.set_title(name, fontsize=10)
        ax.set_xticks(range(4), [n.replace(" ", "\n") for n in names])
        ax.set_ylim(-1.5, 2.3)
    axes[0].set_ylabel("advantage of the token\n(standard deviations)", fontsize=SMALL)
    return fig


def normalization() -> Figure:
    """What ``norm`` does to the tokens of two completions."""
    varied = [0.0, 0.1, 1.6, 0.1, -0.2, 2.0]
    flat = [round(0.02 * x + 0.03, 3) for x in (-1, 1, 0, 2, -2, 1.5)]
    fig, axes = panels(10, 2.9, 2, (
        "Two dot plots of two completions with six tokens each. Left, informativeness s in nats: "
        f"the tokens of the first range from {signed(min(varied), 1)} to {signed(max(varied), 1)}, "
        f"with mean {statistics.fmean(varied):.2f} and standard deviation "
        f"{statistics.stdev(varied):.2f}; those of the second lie together near "
        f"{statistics.fmean(flat):.2f}, with standard deviation {statistics.stdev(flat):.2f}. "
        f"Right, after norm: the first ranges from {signed(min(norm(varied)))} to "
        f"{signed(max(norm(varied)))} and the second from {signed(min(norm(flat)))} to "
        f"{signed(max(norm(flat)))}. Both now have mean 0 and standard deviation 1, so the small "
        "differences of the second count as much as the large ones of the first."
    ))  # fmt: skip
    rows = (
        ("varied completion", varied, "o"),
        ("flat completion", flat, "D"),
    )
    for ax, normalized in zip(axes, (False, True)):
        for y, (_, values, marker) in zip((1, 0), rows):
            shown = norm(values) if normalized else values
            mean, spread = statistics.fmean(shown), statistics.stdev(shown)
            ax.plot([mean - spread, mean + spread], [y] * 2, color="#bdbdbd", lw=9, zorder=1,
                    solid_capstyle="butt")  # fmt: skip
            ax.plot([mean] * 2, [y - 0.22, y + 0.22], color=INK, lw=1.5, zorder=2)
            ax.plot(shown, [y] * len(shown), marker, color=TOLD, ms=7, alpha=0.85, mec="white")
        ax.set_ylim(-0.6, 1.6)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks([1, 0], [name.replace(" ", "\n") for name, *_ in rows])
    axes[1].set_yticks([])
    axes[0].set_xlabel("$s$ of its tokens (nats)", fontsize=SMALL)
    axes[1].set_xlabel("norm($s$) = ($s - $ mean) / std", fontsize=SMALL)
    axes[0].set_title("before: grey is mean ± std", fontsize=10)
    axes[1].set_title("after: mean 0 and std 1 in both", fontsize=10)
    return fig


def two_means() -> Figure:
    """The sequence mean and the token mean: how much each token of two completions counts."""
    lengths = (2, 8)
    ways = (
        ("sequence mean", [1 / (len(lengths) * n) for n in lengths]),
        ("token mean", [1 / sum(lengths)] * 2),
    )
    fig, ax = canvas(10, 3.3, (
        "Two completions, one of 2 and one of 8 tokens, drawn twice; the height of a token is its "
        "weight in the loss, so the area of a completion is its share. Left, sequence mean: each "
        "token of the short one weighs 1/4, each of the long one 1/16, and both completions have a "
        "share of 1/2. Right, token mean: every token weighs 1/10, so the short completion has a "
        "share of 2/10 and the long one of 8/10."
    ))  # fmt: skip
    for left, (name, weights) in zip((0.5, 5.4), ways):
        write(ax, left + 2.05, 3.05, name, weight="bold")
        x = left
        for length, weight, color, hatch in zip(lengths, weights, (BLUE, ORANGE), ("", "//")):
            start = x
            for _ in range(length):
                cell(ax, (x, 0.85, 0.37, 6.8 * weight), "", color, hatch=hatch, ec="#777777")
                x += 0.37
            name = "short" if length == 2 else "long"
            write(ax, (start + x) / 2, 0.85 + 6.8 * weight + 0.14,
                  f"1/{round(1 / weight)} each", SMALL)  # fmt: skip
            brace(ax, (start, x), 0.72, f"{name}: {length} tokens\nshare {length * weight:.1f}",
                  size=SMALL)  # fmt: skip
            x += 0.4
    write(ax, 0.22, 1.9, "weight of a token", SMALL, rotation=90)
    return fig


def constant_per_token() -> Figure:
    """What a constant pay for every token does to length under each mean."""
    short, long = 5, 20
    fig, ax = canvas(10, 3.6, (
        f"A policy has to choose at one token: answer now, which makes a completion of {short} "
        f"tokens, or talk on, which makes one of {long}. Every token gets the same constant "
        "advantage b. With the sequence mean the choice is weighted by one over the length of its "
        f"completion: b/{short} = {1 / short:.2f} b for answering now, b/{long} = {1 / long:.2f} b "
        "for talking on. A positive b thus favours the short completion, a negative b the long "
        f"one. With the token mean both weigh b/{short + long} = {1 / (short + long):.2f} b: equal "
        "pay for both choices, which changes nothing on average."
    ))  # fmt: skip
    write(ax, 6.95, 3.35, "sequence mean", weight="bold")
    write(ax, 8.95, 3.35, "token mean", weight="bold")
    write(ax, 1.85, 3.35, "the same advantage b for every token", weight="bold")
    box(ax, (0.2, 1.75, 0.95, 0.6), "choice", PAPER)
    for y, words, color, hatch, count in (
        (2.55, "answer now", GREEN, "", short), (1.05, "talk on", ORANGE, "//", long),
    ):  # fmt: skip
        arrow(ax, (1.15, 2.05), (1.75, y + 0.14))
        write(ax, 1.95, y + 0.46, f"{words}: {count} tokens", ha="left")
        row(ax, 1.8, y, [""] * count, color, width=0.19, height=0.28, hatch=hatch, ec="#777777")
        cell(ax, (1.8, y, 0.19, 0.28), "", "none", lw=2.2)
        for x, share in ((6.95, count), (8.95, short + long)):
            box(ax, (x - 0.75, y - 0.08, 1.5, 0.44), f"b/{share} = {1 / share:.2f} b", PAPER)
    write(ax, 6.95, 1.93, "b > 0 favours the short,\nb < 0 the long completion", SMALL)
    write(ax, 8.95, 1.93, "equal pay:\nno effect on average", SMALL)
    arrow(ax, (2.2, 0.55), (1.92, 1.0), lw=1)
    write(ax, 2.28, 0.5, "the outlined token is the choice; on the right stands its pay", SMALL,
          ha="left")  # fmt: skip
    return fig


def pass_at_k() -> Figure:
    """Pass@2 from eight completions, three of them right, by counting pairs."""
    n, right = 8, (1, 4, 5)
    pairs = list(itertools.combinations(range(n), 2))
    with_right = [p for p in pairs if set(p) & set(right)]
    estimate = 1 - math.comb(n - len(right), 2) / math.comb(n, 2)
    fig, ax = canvas(10, 3.5, (
        "Eight completions of one problem, three of them right (numbers 2, 5 and 6), as the rows "
        f"and columns of a table of their {len(pairs)} pairs. {len(with_right)} pairs contain a "
        f"right one and are marked; {len(pairs) - len(with_right)} contain only wrong ones. So "
        f"Pass@2, the chance that two drawn at random contain a right one, is "
        f"{len(with_right)}/{len(pairs)} = {estimate:.2f}. Pass@1 is 3/8 = {3 / 8:.2f}."
    ))  # fmt: skip
    side, left, top = 0.34, 1.0, 2.85
    for i in range(n):
        mark = "✓" if i in right else "✗"
        write(ax, left + side * (i + 0.5), top + 0.2, f"{i + 1}{mark}", SMALL)
        write(ax, left - 0.25, top - side * (i + 0.5), f"{i + 1}{mark}", SMALL)
    for i, j in pairs:
        hit = (i, j) in with_right
        place = (left + side * j, top - side * (i + 1), side, side)
        cell(ax, place, "✓" if hit else "", GREEN if hit else ORANGE, hatch="" if hit else "//",
             ec="#777777")  # fmt: skip
    write(ax, left - 0.72, top - 4 * side, "first of the pair", SMALL, rotation=90)
    write(ax, left + 4 * side, top + 0.48, "second of the pair", SMALL)
    cell(ax, (4.6, 2.3, side, side), "✓", GREEN, ec="#777777")
    write(ax, 5.1, 2.47, f"{len(with_right)} pairs with a right completion", ha="left")
    cell(ax, (4.6, 1.75, side, side), "", ORANGE, hatch="//", ec="#777777")
    write(ax, 5.1, 1.92, f"{len(pairs) - len(with_right)} pairs with none", ha="left")
    write(ax, 4.6, 1.05, r"Pass@2 $= 1 - \binom{5}{2} / \binom{8}{2} = 1 - 10/28 = "
          + f"{estimate:.2f}$", 12, ha="left")  # fmt: skip
    write(ax, 4.6, 0.55, f"Pass@1 $= 3/8 = {3 / 8:.2f}$", 12, ha="left")
    return fig
