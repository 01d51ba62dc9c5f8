"""Diagrams of what a token tells: names, forced answers, caches, entropies, calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iapo_mini.diagrams.drawing import (
    BLUE,
    DEEP_BLUE,
    DEEP_GREEN,
    DEEP_ORANGE,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    QUIET,
    SMALL,
    YELLOW,
    arrow,
    brace,
    canvas,
    cell,
    panels,
    row,
    signed,
    write,
)  # fmt: skip

QUESTION = "Tom has 12 coins . He finds 5 . How many ?".split()
CHAIN = "12 + 5 = 17 . 17 - 3 = 14 .".split()


def entropy(p: Sequence[float]) -> float:
    """Nats."""
    return -sum(x * math.log(x) for x in p if x > 0)


def names_on_a_line() -> Figure:
    """The symbols q, o, y and the tokens of a completion on one line."""
    words = "<think> 12 + 5 = 17 . </think> <answer> 17 </answer>".split()
    chance = 0.8
    fig, ax = canvas(10, 2.9, (
        f"One line of tokens. First the prompt q: {' '.join(QUESTION)}. Then the completion o with "
        f"{len(words)} tokens: {' '.join(words)}. The sixth token, 17, is marked as o_t; the five "
        "before it are o before t. The number between the answer tags is the answer y. Below o_t "
        f"stands its probability under the policy, given q and all tokens before it: {chance}, "
        f"whose logarithm is {signed(math.log(chance))} nats."
    ))  # fmt: skip
    y = 1.45
    asked = row(ax, 0.3, y, QUESTION, PAPER)
    fills = [BLUE] * 5 + [YELLOW] + [BLUE] * 3 + [GREEN] + [BLUE]
    written = row(ax, asked[-1][1] + 0.25, y, words, fills)
    brace(ax, (asked[0][0], asked[-1][1]), y - 0.2, "prompt $q$: the question, read")
    brace(ax, (written[0][0], written[-1][1]), y + 1.0,
          r"completion $o$: $|o| = 11$ tokens, written one after another", below=False)  # fmt: skip
    brace(ax, (written[0][0], written[4][1]), y + 0.48, "$o_{<t}$: before", below=False)
    write(ax, sum(written[5]) / 2, y + 0.6, "$o_t$")
    arrow(ax, (sum(written[5]) / 2, y + 0.5), (sum(written[5]) / 2, y + 0.32), lw=1)
    write(ax, sum(written[9]) / 2, y + 0.6, "answer $y$")
    arrow(ax, (sum(written[9]) / 2, y + 0.5), (sum(written[9]) / 2, y + 0.32), lw=1)
    arrow(ax, (sum(written[5]) / 2, y - 0.02), (sum(written[5]) / 2, y - 0.42), lw=1)
    write(ax, sum(written[5]) / 2, 0.72,
          rf"policy: $\pi(o_t \mid q, o_{{<t}}) = {chance:.2f}$" "\n"
          rf"log-probability: $\log {chance:.2f} = {math.log(chance):.2f}$ nats")  # fmt: skip
    return fig


def _distribution(ax: Axes, x: float, y: float, answers: Sequence[str], p: Sequence[float]) -> None:
    """Small horizontal bars of a forced answer."""
    for k, (answer, share) in enumerate(zip(answers, p)):
        top = y - 0.22 * k
        write(ax, x, top, answer, SMALL, ha="right")
        cell(ax, (x + 0.08, top - 0.08, 1.3 * share, 0.16), "", DEEP_BLUE, lw=0)
        write(ax, x + 0.14 + 1.3 * share, top, f"{share:.2f}", SMALL, ha="left")


def forced_answer() -> Figure:
    """A chain that is cut after t tokens and closed, so that the policy has to answer."""
    answers = ("14", "17", "20", "9")
    before, after = (0.40, 0.30, 0.20, 0.10), (0.92, 0.04, 0.03, 0.01)
    fig, ax = canvas(10, 3.7, (
        f"A chain of thought, {' '.join(CHAIN)}, is cut at two places. Upper row: it is cut after "
        f"{' '.join(CHAIN[:10])}, the rest is dropped, and the two tokens </think> and <answer> "
        "are put behind it. The policy's next-token distribution is its forced answer: "
        + ", ".join(f"{a} with {p:.2f}" for a, p in zip(answers, before))
        + f", entropy {entropy(before):.2f} nats. Lower row: cut one token later, after 14: "
        + ", ".join(f"{a} with {p:.2f}" for a, p in zip(answers, after))
        + f", entropy {entropy(after):.2f} nats. The informativeness of the token 14 is the "
        f"difference, {entropy(before) - entropy(after):.2f} nats."
    ))  # fmt: skip
    for y, t, p in ((2.55, 10, before), (0.95, 11, after)):
        write(ax, 0.55, y + 0.15, "$q$", 11)
        cell(ax, (0.3, y, 0.5, 0.3), "", "none")
        kept = row(ax, 0.85, y, CHAIN[:t], BLUE)
        x = kept[-1][1]
        ax.plot([x + 0.09] * 2, [y - 0.14, y + 0.44], color=INK, lw=1.6, ls="--")
        write(ax, x + 0.09, y + 0.56, f"cut after {t} tokens", SMALL)
        write(ax, x + 0.09, y - 0.28, f"dropped: “{' '.join(CHAIN[t:])}”", SMALL, color=QUIET)
        forced = row(ax, x + 0.2, y, ["</think>", "<answer>"], YELLOW)
        arrow(ax, (forced[-1][1] + 0.05, y + 0.15), (7.3, y + 0.15))
        _distribution(ax, 7.75, y + 0.48, answers, p)
        write(ax, 8.5, y - 0.5, rf"$H = {entropy(p):.2f}$ nats")
    arrow(ax, (9.5, 2.0), (9.5, 0.5), bend=-0.35)
    write(ax, 5.0, 0.3, r"informativeness of the token 14:  $s_{11} = "
          rf"{entropy(before):.2f} - {entropy(after):.2f} = {entropy(before) - entropy(after):.2f}$"
          " nats", 11)  # fmt: skip
    return fig


def packed_positions(prompt: int, ends: Sequence[int], postfix: int) -> list[int]:
    """Positions of all branch tokens, for branches after ``ends`` completion tokens."""
    return [prompt + t + k for t in ends for k in range(postfix)]


def packed_mask(prompt: int, length: int, ends: Sequence[int], postfix: int) -> list[list[bool]]:
    """Which trunk and branch tokens (columns) each branch token (row) may attend to."""
    mine = [(b, k) for b in range(len(ends)) for k in range(postfix)]
    return [
        [j < prompt + ends[b] for j in range(prompt + length)]
        + [other == b and at <= k for other, at in mine]
        for b, k in mine
    ]


def packed_branches() -> Figure:
    """Trunk and branches, packed in one row, with their attention mask and positions."""
    prompt, length, ends, postfix = 2, 4, (1, 3, 4), 2
    mask = packed_mask(prompt, length, ends, postfix)
    positions = packed_positions(prompt, ends, postfix)
    fig, ax = canvas(10, 3.9, (
        "Left, a tree. The trunk has two prompt tokens q and four completion tokens o1 to o4 at "
        "positions 0 to 5. Three branches of two tokens p1 p2 (</think> and <answer>) leave it "
        "after 1, 3 and 4 completion tokens. Each goes on counting where its prefix ends: "
        "positions 3 and 4, 5 and 6, 6 and 7. Right, the same packed in one row of twelve columns, "
        "with the attention mask of the six branch tokens: a branch token attends to the trunk up "
        "to the end of its own prefix, to the tokens of its own branch up to itself, and to no "
        "other branch. So branch 1 sees three trunk tokens, branch 2 five and branch 3 all six."
    ))  # fmt: skip
    side, left, top = 0.4, 0.35, 2.95
    names = ["$q_1$", "$q_2$"] + [f"$o_{t}$" for t in range(1, length + 1)]
    write(ax, 2.0, 3.68, "the tree: a place is a position", weight="bold")
    for k in range(prompt + length + postfix):
        write(ax, left + side * (k + 0.5), top + 0.48, str(k), SMALL, color=QUIET)
    row(ax, left, top, names, [PAPER] * prompt + [BLUE] * length, width=side)
    for b, t in enumerate(ends):
        x, y = left + side * (prompt + t), top - 0.6 * (len(ends) - b)
        row(ax, x, y, ["$p_1$", "$p_2$"], YELLOW, width=side)
        ax.plot([x, x], [top, y + 0.3], color=INK, lw=1.6)
        write(ax, x + 2 * side + 0.08, y + 0.15, f"branch {b + 1}", SMALL, ha="left")
    write(ax, 2.0, 0.55, "$p_1 p_2$ = </think><answer>;\nnumbers on top are positions", SMALL)
    left, top, side = 5.3, 2.6, 0.36
    write(ax, 7.45, 3.68, "the same in one row, and its mask", weight="bold")
    heads = names + ["$p_1$", "$p_2$"] * len(ends)
    numbers = [*range(prompt + length), *positions]
    for j, (name, number) in enumerate(zip(heads, numbers)):
        x = left + side * j + (0.12 if j >= prompt + length else 0)
        fill = PAPER if j < prompt else BLUE if j < prompt + length else YELLOW
        cell(ax, (x, top + 0.1, side, 0.3), name, fill)
        write(ax, x + side / 2, top + 0.55, str(number), SMALL, color=QUIET)
        for i, seen in enumerate(mask):
            place = (x, top - 0.06 - 0.3 * (i + 1), side, 0.3)
            cell(ax, place, "•" if seen[j] else "", "#6d8fb5" if seen[j] else "white",
                 ec="#999999", ink="white")  # fmt: skip
    write(ax, left - 0.12, top + 0.55, "position", SMALL, ha="right", color=QUIET)
    for b in range(len(ends)):
        for k in range(postfix):
            y = top - 0.06 - 0.3 * (2 * b + k + 0.5)
            write(ax, left - 0.12, y, f"branch {b + 1}, $p_{k + 1}$", SMALL, ha="right")
    write(ax, 7.45, 0.4, "dark with a dot: the token of the row may attend to the column", SMALL)
    return fig


def cache_reuse() -> Figure:
    """What is computed for all forced answers, without and with a cache of the trunk."""
    prompt, length, postfix = 3, 5, 2
    naive = sum(prompt + t + postfix for t in range(length + 1))
    cached = prompt + length + (length + 1) * postfix
    fig, ax = canvas(10, 3.6, (
        f"Two tables of cells for a prompt of {prompt}, a completion of {length} and a postfix of "
        f"{postfix} tokens; dark cells go through the model, white ones come from the cache. Left, "
        f"without a cache: six rows, one for each prefix length 0 to {length}; in each the prompt, "
        f"the prefix and the postfix are dark, together {naive} tokens. Right, with a cache: one "
        f"dark row for prompt and completion, then six rows in which only the {postfix} postfix "
        f"tokens are dark, together {cached} tokens."
    ))  # fmt: skip
    side = 0.3
    for left, cache in ((1.05, False), (6.1, True)):
        name = f"keys and values kept: {cached}" if cache else f"every prefix again: {naive}"
        write(ax, left + 1.5, 3.38, f"{name} tokens", weight="bold")
        for t in range(-1 if cache else 0, length + 1):
            trunk = prompt + (length if t < 0 else t)
            y = 2.45 - 0.33 * t
            for k in range(trunk + (postfix if t >= 0 else 0)):
                added = k >= trunk
                done = added or t < 0 or not cache
                color = ("#8a7a2a" if added else "#3b6ea5") if done else "white"
                cell(ax, (left + side * k, y, side, 0.26), "", color, hatch="..." if added else "",
                     ec="white" if done else "#888888")  # fmt: skip
            label = "trunk, once" if t < 0 else f"t = {t}"
            write(ax, left - 0.1, y + 0.13, label, SMALL, ha="right")
    for x, color, hatch, text in (
        (1.0, "#3b6ea5", "", "prompt and completion, computed"),
        (4.3, "#8a7a2a", "...", "postfix, computed"),
        (6.7, "white", "", "from the cache"),
    ):  # fmt: skip
        cell(ax, (x, 0.17, side, 0.24), "", color, hatch=hatch, ec="#888888")
        write(ax, x + 0.4, 0.29, text, SMALL, ha="left")
    return fig


def entropy_areas() -> Figure:
    """Entropy as an area, before and after a token; the drop is what the token tells."""
    before, after = (0.4, 0.3, 0.2, 0.1), (0.85, 0.05, 0.05, 0.05)
    drop = entropy(before) - entropy(after)
    fig, axes = panels(10, 3.3, 2, (
        "Two charts of four answers A to D as rectangles side by side: a rectangle is as wide as "
        "the probability p of its answer and as high as its surprise, minus log p, so that its "
        "area is its part of the entropy. Left, before the token, probabilities "
        f"{', '.join(map(str, before))}: the areas add up to {entropy(before):.2f} nats. Right, "
        f"after it, {', '.join(map(str, after))}: one wide, very low rectangle and three narrow, "
        f"high ones, together {entropy(after):.2f} nats. The token told the difference, {drop:.2f} "
        "nats."
    ), sharey=True)  # fmt: skip
    looks = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (YELLOW, "xx"))
    for ax, p, when in zip(axes, (before, after), ("before the token", "after the token")):
        left = 0.0
        for answer, share, (color, hatch) in zip("ABCD", p, looks):
            high = -math.log(share)
            ax.bar(left, high, share, align="edge", color=color, hatch=hatch, edgecolor="#666666")
            ax.text(left + share / 2, high + 0.07, answer, ha="center", va="bottom", fontsize=10)
            left += share
        ax.set_title(f"{when}: area $H = {entropy(p):.2f}$ nats", fontsize=10)
        ax.set_xlabel("probability $p$ (width)", fontsize=SMALL)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 3.6)
    axes[0].set_ylabel("surprise $-\\log p$ (nats, height)", fontsize=SMALL)
    axes[1].text(0.42, 1.6, f"told: $s = {entropy(before):.2f} - {entropy(after):.2f} = "
                 f"{drop:.2f}$ nats", ha="center", fontsize=10)  # fmt: skip
    return fig


def chain_rule() -> Figure:
    """The chain rule as a staircase: the drops add up to the whole descent."""
    left = (2.0, 1.6, 1.75, 0.9, 0.1)
    drops = [a - b for a, b in itertools.pairwise(left)]
    fig, (ax,) = panels(8.5, 3.5, 1, (
        "A staircase. Its height is the entropy of the answer in nats, its steps are the tokens. "
        f"It starts at {left[0]:.1f} nats. "
        + " ".join(
            f"Token {t} takes it from {a:.2f} to {b:.2f}, a drop of {signed(d)}."
            for t, (a, b, d) in enumerate(zip(left, left[1:], drops), 1)
        )
        + " The second drop is negative: the staircase goes up there. A bracket beside the stairs "
        f"spans the whole descent, {sum(drops):.2f} nats, which is the sum of all drops."
    ))  # fmt: skip
    for t, height in enumerate(left):
        ax.plot([t, t + 1], [height] * 2, color=INK, lw=2.5)
        ax.fill_between([t, t + 1], height, color=BLUE, lw=0)
    for t, drop in enumerate(drops, 1):
        color = DEEP_BLUE if drop > 0 else DEEP_ORANGE
        ax.annotate("", (t, left[t]), (t, left[t - 1]),
                    arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.2})  # fmt: skip
        middle = (left[t] + left[t - 1]) / 2
        ax.text(t + 0.07, middle + (0.22 if drop < 0 else 0.0), f"$s_{t}$ = {signed(drop)}",
                va="center", fontsize=10, color=INK)  # fmt: skip
    ax.plot([5.15, 5.25, 5.25, 5.15], [left[0], left[0], left[-1], left[-1]], color=INK, lw=1.2)
    ax.text(
        5.35, 1.05, f"$s_1 + s_2 + s_3 + s_4$\n= {sum(drops):.2f} nats", va="center", fontsize=10
    )
    ax.set_xlim(0, 6.6)
    ax.set_ylim(0, 2.3)
    ax.set_xticks([t + 0.5 for t in range(5)], ["nothing yet"] + [f"$o_{t}$" for t in range(1, 5)])
    ax.set_xlabel("last token that was read", fontsize=SMALL)
    ax.set_ylabel("entropy of the answer (nats)", fontsize=SMALL)
    return fig


def calibrated_answers() -> Figure:
    """Ten forced answers of a calibrated policy and ten of one that is too sure."""
    policies = (("calibrated", 0.7, 7), ("too sure", 0.9, 4))
    fig, ax = canvas(10, 2.7, (
        "Two rows of ten forced answers each, marked right or wrong. "
        + " ".join(
            f"The {name} policy has confidence {sure} in each of its ten answers, and {right} of "
            f"the ten are right: a gap of {abs(sure - right / 10):.1f}."
            for name, sure, right in policies
        )
        + " The calibration error is such gaps, averaged over all levels of confidence."
    ))  # fmt: skip
    for y, (name, sure, right) in zip((1.5, 0.4), policies):
        write(ax, 0.75, y + 0.2, f"{name}\npolicy")
        for k in range(10):
            good = k < right
            mark, color = ("✓", GREEN) if good else ("✗", ORANGE)
            cell(ax, (1.6 + 0.38 * k, y, 0.34, 0.4), mark, color, 10)
        for level, share, color, hatch in (
            (y + 0.23, sure, "#9a9a9a", ""), (y - 0.03, right / 10, DEEP_GREEN, "//"),
        ):  # fmt: skip
            cell(ax, (7.0, level, 1.6 * share, 0.2), "", color, hatch=hatch, ec="white")
        write(ax, 6.9, y + 0.33, "confidence", SMALL, ha="right")
        write(ax, 6.9, y + 0.07, "right", SMALL, ha="right")
        write(ax, 7.08 + 1.6 * sure, y + 0.33, f"{sure:.1f}", SMALL, ha="left")
        write(ax, 7.08 + 1.6 * right / 10, y + 0.07, f"{right / 10:.1f}", SMALL, ha="left")
        write(ax, 9.3, y + 0.2, f"gap {abs(sure - right / 10):.1f}", weight="bold")
    write(ax, 3.5, 2.4, "ten forced answers of equal confidence", weight="bold")
    return fig


def early_exit_rule() -> Figure:
    """Early exit at inference: stop thinking when the forced answer is sure."""
    entropies, tokens, limit = (1.9, 1.4, 0.9, 0.2, 0.15, 0.1), (9, 11, 8, 9, 12, 7), 0.3
    stop = next(k for k, h in enumerate(entropies) if h < limit)
    unwritten = sum(tokens[stop + 1 :])
    fig, (ax,) = panels(9.5, 3.3, 1, (
        "Bars: the entropy of the forced answer after each of six sentences, "
        + ", ".join(map(str, entropies))
        + f" nats, with a dashed line at the threshold of {limit} nats. The rule asks after every "
        f"sentence and goes on while the bar is above the line. Sentence {stop + 1} is the first "
        "below it: the policy stops there and answers. The remaining "
        f"{len(entropies) - stop - 1} sentences, {unwritten} of {sum(tokens)} tokens, are not "
        "written."
    ))  # fmt: skip
    for k, high in enumerate(entropies):
        written = k <= stop
        ax.bar(k, high, 0.6, color=DEEP_BLUE if written else "white", hatch="" if written else "//",
               edgecolor="white" if written else "#777777")  # fmt: skip
        ax.text(k, max(high, limit) + 0.05, f"{high}", ha="center", va="bottom", fontsize=SMALL)
    ax.axhline(limit, color=DEEP_ORANGE, ls="--", lw=1.6)
    ax.text(-0.42, limit + 0.05, f"threshold {limit}", fontsize=SMALL, va="bottom", ha="right",
            color=INK)  # fmt: skip
    ax.annotate("stop here and answer", (stop, 0.52), (stop, 1.25), ha="center", fontsize=10,
                arrowprops={"arrowstyle": "-|>", "color": INK})  # fmt: skip
    ax.text(4.5, 0.75, f"never written:\n{unwritten} of {sum(tokens)} tokens", ha="center",
            fontsize=10)  # fmt: skip
    ax.text(1.0, 1.75, "above the line: think on", fontsize=10, ha="left")
    ax.set_xlim(-1.3, 5.6)
    ax.set_ylim(0, 2.2)
    ax.set_xticks(range(6), [f"sentence {k + 1}\n{n} tokens" for k, n in enumerate(tokens)])
    ax.set_ylabel("entropy of the\nforced answer (nats)", fontsize=SMALL)
    return fig
