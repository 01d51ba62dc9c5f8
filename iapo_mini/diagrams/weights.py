"""Diagrams of weights and processes: LoRA, four bits, what is gathered."""

from __future__ import annotations

import math
from statistics import NormalDist

from matplotlib.figure import Figure

from iapo_mini.diagrams.drawing import (
    BLUE,
    DEEP_BLUE,
    DEEP_ORANGE,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    QUIET,
    SMALL,
    YELLOW,
    arrow,
    box,
    canvas,
    cell,
    panels,
    write,
)  # fmt: skip

EDGE = 0.9677083
"""NF4's outermost quantile: halfway between 1 - 1/32 and 1 - 1/30."""


def nf4_levels() -> list[float]:
    """The 16 levels of NF4: 8 quantiles above zero, 7 below, and zero, scaled to end at 1."""
    top = NormalDist().inv_cdf(EDGE)

    def side(count: int) -> list[float]:
        step = (EDGE - 0.5) / count
        return [NormalDist().inv_cdf(EDGE - step * k) / top for k in range(count)]

    return sorted([*side(8), 0.0, *(-x for x in side(7))])


def four_bits() -> Figure:
    """NF4's sixteen levels on a bell curve, and one weight that is rounded."""
    levels = nf4_levels()
    weight, scale = 0.021, 0.08
    index = min(range(16), key=lambda k: abs(levels[k] - weight / scale))
    top = NormalDist().inv_cdf(EDGE)
    fig, (ax,) = panels(10, 3.6, 1, (
        "A bell curve of weights, divided by the largest of their block, with sixteen vertical "
        "lines: the levels of NF4, numbered in four bits from 0000 at minus 1 to 1111 at plus 1, "
        "with an exact zero at 0111. The lines are "
        f"closest in the middle, where most weights are ({levels[8] - levels[7]:.2f} apart), and "
        f"widest at the ends ({levels[1] - levels[0]:.2f} on the left, "
        f"{levels[15] - levels[14]:.2f} on the right). An example: the weight {weight} in a block "
        f"with scale {scale} lies at {weight / scale:.4f}; the nearest level is "
        f"{levels[index]:.4f}, number {index}, in bits {index:04b}. It is stored as these bits and "
        f"read back as {levels[index] * scale:.4f}."
    ))  # fmt: skip
    x = [k / 100 for k in range(-115, 116)]
    bell = [math.exp(-((v * top) ** 2) / 2) for v in x]
    ax.fill_between(x, bell, color=BLUE, lw=0)
    ax.plot(x, bell, color=INK, lw=1.2)
    for k, level in enumerate(levels):
        chosen = k == index
        high = math.exp(-((level * top) ** 2) / 2)
        ax.plot([level] * 2, [0, high], color=DEEP_ORANGE if chosen else DEEP_BLUE,
                lw=2.6 if chosen else 1.3, ls="-" if chosen else "--")  # fmt: skip
        ax.text(level, high + 0.03, f"{k:04b}", rotation=90, ha="center", va="bottom", fontsize=8,
                weight="bold" if chosen else "normal")  # fmt: skip
    ax.annotate(
        f"weight {weight} / scale {scale} = {weight / scale:.4f}\nnearest level "
        f"{levels[index]:.4f}, stored as {index:04b}\nread back as {levels[index]:.4f} · {scale} = "
        f"{levels[index] * scale:.4f}",
        (levels[index], 1.08), (0.42, 1.27), fontsize=SMALL, va="center",
        arrowprops={"arrowstyle": "-|>", "color": INK},
    )  # fmt: skip
    ax.set_xlim(-1.15, 1.15)
    ax.set_ylim(0, 1.45)
    ax.set_yticks([])
    ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    ax.set_xlabel("weight / largest absolute weight of its block", fontsize=SMALL)
    ax.set_ylabel("how many weights", fontsize=SMALL)
    return fig


def lora() -> Figure:
    """LoRA's two thin matrices beside a frozen weight in four bits."""
    inputs, outputs, rank, bits = 896, 4864, 16, 4 + 8 / 64 + 32 / (64 * 256)
    frozen, trained = inputs * outputs, rank * (inputs + outputs)
    fig, ax = canvas(10, 3.7, (
        f"The input x takes two ways. Below, through the frozen weight W, {outputs} by {inputs}: "
        f"{frozen:,} numbers of {bits:.3f} bits. Above, through two thin matrices: A, {rank} by "
        f"{inputs}, random at first, and B, {outputs} by {rank}, zero at first, together "
        f"{trained:,} trained numbers, {100 * trained / frozen:.1f} percent of W. The result of B "
        "is multiplied by alpha over r, and both ways are added to the output y. Gradients flow "
        "only into A and B. Without the upper way the layer computes what it did before training: "
        "the reference policy."
    ))  # fmt: skip
    box(ax, (0.25, 1.55, 1.0, 0.6), f"$x$\n{inputs} numbers", PAPER, SMALL)
    arrow(ax, (1.25, 1.95), (2.2, 2.75))
    arrow(ax, (1.25, 1.7), (3.0, 0.95))
    cell(ax, (2.25, 2.55, 1.75, 0.42), rf"$A$   {rank} $\times$ {inputs}", GREEN, 10)
    write(ax, 3.12, 3.2, "random at first", SMALL)
    arrow(ax, (4.0, 2.76), (4.85, 2.76))
    write(ax, 4.42, 2.95, f"{rank}", SMALL)
    cell(ax, (4.9, 2.15, 0.42, 1.2), "", GREEN)
    write(ax, 5.11, 2.75, rf"$B$   {outputs} $\times$ {rank}", 10, rotation=90)
    write(ax, 5.11, 3.52, "zero at first", SMALL)
    arrow(ax, (5.32, 2.75), (5.95, 2.75))
    box(ax, (6.0, 2.5, 0.8, 0.5), r"$\times\ \alpha / r$", PAPER)
    cell(
        ax,
        (3.05, 0.3, 1.75, 1.25),
        f"$W$\n{outputs} $\\times$ {inputs}\n4 bits, frozen",
        "#d5d5d5",
        10,
    )
    arrow(ax, (4.8, 0.92), (7.2, 1.65))
    arrow(ax, (6.8, 2.7), (7.3, 2.05))
    box(ax, (7.2, 1.6, 0.45, 0.45), "+", PAPER, 13)
    arrow(ax, (7.65, 1.82), (8.2, 1.82))
    box(ax, (8.25, 1.5, 1.1, 0.65), f"$y$\n{outputs} numbers", PAPER, SMALL)
    write(ax, 8.45, 3.05, f"trained: {trained:,} numbers\n({100 * trained / frozen:.1f}% of $W$)",
          SMALL)  # fmt: skip
    write(ax, 6.95, 0.62, f"frozen: {frozen:,} numbers of {bits:.3f} bits", SMALL)
    write(ax, 6.95, 0.3, "without the upper way: the reference policy", SMALL)
    return fig


def gathering() -> Figure:
    """What two processes exchange in a step, and what stays on each."""
    size, share = 4, 6
    fig, ax = canvas(10, 3.9, (
        "Two processes, rank 0 and rank 1, with six of twelve completions each, in groups of four: "
        "rank 0 holds group 0 and half of group 1, rank 1 the other half of group 1 and group 2. "
        "Four quantities in rows below them. The rewards cross the border between the ranks, since "
        "group 1 can only be normalised with all four of its rewards. The token terms, norm of s "
        "and norm of c, stay on their rank, since each is normalised in one completion. The token "
        "counts cross if the loss is a mean over tokens. The gradients cross: they are averaged "
        "before the update."
    ))  # fmt: skip
    looks = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."))
    for rank, left in enumerate((2.3, 6.4)):
        box(ax, (left - 0.15, 0.25, 3.45, 3.45), "", "white", ec=QUIET)
        write(ax, left + 1.57, 3.48, f"rank {rank}", weight="bold")
        for k in range(share):
            number = share * rank + k
            color, hatch = looks[number // size]
            cell(ax, (left + 0.53 * k, 2.75, 0.48, 0.42), "", color, hatch=hatch, ec="#777777")
            write(ax, left + 0.53 * k + 0.24, 2.96, f"$o_{{{number}}}$",
                  bbox={"fc": color, "ec": "none", "pad": 1})  # fmt: skip
    for y, name, text, crosses in (
        (2.15, "rewards", "normalise in groups", "gathered"),
        (1.6, "norm(s), norm(c)", "in one completion each", ""),
        (1.05, "token counts", "for a mean over tokens", "gathered"),
        (0.5, "gradients", "of its own rows", "averaged"),
    ):  # fmt: skip
        write(ax, 1.98, y, name, ha="right", weight="bold")
        for left in (3.2, 6.4):
            box(ax, (left, y - 0.18, 2.25, 0.36), text, YELLOW if crosses else PAPER, SMALL)
        if crosses:
            arrow(ax, (5.48, y), (6.37, y), arrowstyle="<|-|>")
            write(ax, 5.925, y + 0.16, crosses, SMALL)
        else:
            write(ax, 5.925, y, "stays", SMALL)
    write(ax, 1.98, 3.08, "completions", ha="right", weight="bold")
    write(ax, 1.98, 2.8, "3 groups of 4", SMALL, ha="right", color=QUIET)
    return fig
