"""An explorer for notebooks: step through a completion and watch the answer become certain.

Choose a story and a completion and move through its tokens. The explorer shows what the policy
would answer if it had to answer now, how much each token says about the answer, and the advantages
of GRPO and IAPO, which follow the sliders for alpha and beta. All pictures are HTML and SVG, so a
move takes milliseconds. The model runs only once, when the explorer is made. Needs ipywidgets
(``pip install 'iapo-mini[notebooks]'``; Colab has it).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex

from iapo_mini.advantages import grpo, iapo
from iapo_mini.chat import token_texts
from iapo_mini.early_exit.prefixes import ask
from iapo_mini.early_exit.question import Question
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.errors import MOST_ROWS, check_number
from iapo_mini.information import encode_postfix, informativeness
from iapo_mini.plots import COLORS
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import token_roles
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem

if TYPE_CHECKING:
    import ipywidgets

_PAGE = "font-family:monospace;background:white;color:black;padding:6px;line-height:1.9"


@dataclass(frozen=True)
class ForcedAnswers:
    """The forced answers of a policy after every prefix.

    Attributes:
        entropies: (B, L + 1) fp32 nats, H(y | q, o_<=t).
        probabilities: (B, L + 1, k) fp32, of the k most likely first tokens of the answer.
        ids: (B, L + 1, k) long, those tokens.
    """

    entropies: torch.Tensor
    probabilities: torch.Tensor
    ids: torch.Tensor


def forced_answers(policy: Policy, rollouts: Rollouts, k: int = 6) -> ForcedAnswers:
    """The k most likely forced answers after every prefix, and their entropy, in one pass.

    Raises:
        ValueError: when k is not between 1 and the size of the vocabulary.
    """
    vocabulary = policy.model.config.get_text_config().vocab_size
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be 1 to {vocabulary}, the size of the vocabulary, got {k}")

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        p, ids = torch.softmax(logits[:, 0].float(), dim=-1).topk(k)
        # Ids below 2**24 are exact in fp32.
        return torch.cat([logits_entropy(logits), p, ids.float()], dim=1)

    found = ask(policy.for_inference(), rollouts, Question(encode_postfix(policy), read))
    return ForcedAnswers(found[..., 0], found[..., 1 : k + 1], found[..., k + 1 :].long())


def tokens_html(
    tokens: Sequence[str], values: Sequence[float], roles: Sequence[str] | None, at: int, unit: str
) -> str:
    """HTML of a completion, with colours by value, lines by role, and tokens not yet read in grey.

    Args:
        tokens: n texts.
        values: n numbers, for background and tooltip.
        roles: n roles, or None.
        at: number of tokens read so far, 0 to n; the last of them is framed.
        unit: unit of the values, for the tooltip.
    """
    limit = max(0.1, *(abs(v) for v in values)) if values else 0.1
    out = []
    for i, (token, value) in enumerate(zip(tokens, values)):
        r, g, b, _ = colormaps["RdBu"](0.5 + 0.5 * value / limit)
        style = f"background:{to_hex((r, g, b))};color:{'white' if r + g + b < 1.6 else 'black'}"
        if i >= at:
            style = "color:#999"
        if roles is not None:
            style += f";border-bottom:3px solid {COLORS[roles[i]]}"
        if i == at - 1:
            style += ";outline:2px solid black"
        tip = f"{value:+.3f} {unit}" + (f", {roles[i]}" if roles is not None else "")
        text = html.escape(token).replace(" ", "&nbsp;").replace("\n", "<br>")
        out.append(f'<span title="{tip}" style="{style}">{text}</span><wbr>')
    legend = f"blue is positive, red negative; full colour is {limit:.2f} {unit}"
    if roles is not None:
        legend += ". Line below: " + ", ".join(
            f'<span style="border-bottom:3px solid {COLORS[r]}">{r}</span>'
            for r in COLORS if r in set(roles)
        )  # fmt: skip
    return f'<div style="{_PAGE}">{"".join(out)}<br><small>{legend}</small></div>'


def answers_html(answers: Sequence[str], probabilities: Sequence[float], nats: float) -> str:
    """HTML bars of the most likely forced answers, and the entropy over all answers."""
    rows = [
        f'<div><span style="display:inline-block;min-width:5em;text-align:right">'
        f"{html.escape(a).replace(' ', '&nbsp;')}</span>"
        f'<span style="display:inline-block;height:12px;background:#0072B2;margin:0 6px;'
        f'width:{200 * p:.0f}px"></span>{p:.2f}</div>'
        for a, p in zip(answers, probabilities)
    ]
    head = f"<b>answer, if forced now</b>: H = {nats:.2f} nats"
    return f'<div style="{_PAGE};width:330px">{head}{"".join(rows)}</div>'


def bars_svg(values: Sequence[float], at: int, label: str) -> str:
    """SVG with one bar per token: grey if not yet read, with a dark edge for the last one read."""
    limit, n = max(0.1, *(abs(v) for v in values)) if values else 0.1, max(1, len(values))
    width, half = 420, 60
    step = width / n
    bars = []
    for i, value in enumerate(values):
        h = half * abs(value) / limit
        color = "#dddddd" if i >= at else "#2166ac" if value > 0 else "#b2182b"
        edge = ' stroke="black" stroke-width="1.5"' if i == at - 1 else ""
        y = half - h if value > 0 else half
        bars.append(
            f'<rect x="{i * step:.1f}" y="{y:.1f}" width="{0.9 * step:.1f}" height="{h:.1f}" '
            f'fill="{color}"{edge}/>'
        )
    axis = f'<line x1="0" x2="{width}" y1="{half}" y2="{half}" stroke="black" stroke-width="0.5"/>'
    return (
        f'<div style="{_PAGE}"><b>{html.escape(label)}</b> (axis: {-limit:.2f} to {limit:.2f})'
        f'<br><svg width="{width}" height="{2 * half}">{axis}{"".join(bars)}</svg></div>'
    )


@dataclass(frozen=True)
class _Scene:
    """The data of the explorer: B completions, G of each problem, and everything about them."""

    policy: Policy
    problems: list[Problem]
    rollouts: Rollouts
    forced: ForcedAnswers

    def length(self, i: int) -> int:
        """Number of tokens of completion i, without end of sequence."""
        return int(self.rollouts.lengths[i]) - int(self.rollouts.finished[i])

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token when it follows another, including special tokens."""
        return token_texts(self.policy.tokenizer, ids)

    def completions(self, problem: int) -> list[tuple[str, int]]:
        """Title and index of each completion of a problem, for a menu."""
        group = self.rollouts.num_generations
        return [
            (f"{self.length(i)} tokens, {'right' if self.rollouts.correct[i] else 'wrong'}", i)
            for i in range(problem * group, (problem + 1) * group)
        ]

    def values(self, i: int, color: str, alpha: float, beta: float) -> tuple[list[float], str]:
        """One number for each token of completion i, and their unit."""
        if color == "information":
            values, unit = self.rollouts.informativeness, "nats"
        elif color == "IAPO advantage":
            values, unit = iapo(self.rollouts, alpha, beta), "advantage"
        else:
            values, unit = grpo(self.rollouts), "advantage"
        return values[i, : self.length(i)].tolist(), unit

    def completion_html(self, i: int, at: int, values: list[float], unit: str) -> str:
        """HTML of completion i with ``at`` tokens read; only tokens of stories have roles."""
        ids = self.rollouts.completion_ids[i, : self.length(i)].tolist()
        is_story = bool(self.problems[i // self.rollouts.num_generations].steps)
        roles = token_roles(self.policy.tokenizer, ids) if is_story else None
        return tokens_html(self.texts(ids), values, roles, at, unit)

    def forced_html(self, i: int, at: int) -> str:
        """HTML of the forced answers after ``at`` tokens of completion i."""
        likely = self.texts(self.forced.ids[i, at].tolist())
        p, nats = self.forced.probabilities[i, at].tolist(), float(self.forced.entropies[i, at])
        return answers_html(likely, p, nats)


class _Controls:
    """The explorer's controls and pictures. Moving a control draws the pictures again."""

    def __init__(self, scene: _Scene, alpha: float, beta: float) -> None:
        import ipywidgets as w

        self.scene = scene
        titles = [
            p.question if len(p.question) < 80 else p.question[:77] + "..." for p in scene.problems
        ]
        self.story = w.Dropdown(
            options=list(zip(titles, range(len(titles)))),
            description="story",
            layout=w.Layout(width="480px"),
        )
        self.completion = w.Dropdown(description="completion")
        self.position = w.IntSlider(
            min=0, description="tokens read", layout=w.Layout(width="480px")
        )
        self.color = w.ToggleButtons(options=["information", "IAPO advantage", "GRPO advantage"])
        wide = w.Layout(width="380px")
        self.alpha, self.beta = (
            w.FloatSlider(value=value, min=0, max=1, step=0.01, description=name, layout=wide)
            for name, value in (("alpha", alpha), ("beta", beta))
        )
        self.question, self.tokens, self.answers, self.bars = (w.HTML() for _ in range(4))
        self.busy = False  # True while controls set each other, when nothing is drawn
        self.story.observe(self.choose_story, "value")
        self.completion.observe(self.choose_completion, "value")
        for control in (self.position, self.color, self.alpha, self.beta):
            control.observe(self.draw, "value")
        self.choose_story()

    def choose_story(self, _: object = None) -> None:
        options = self.scene.completions(self.story.value)
        self.busy = True  # otherwise each assignment below would draw everything
        self.completion.options, self.completion.value = options, options[0][1]
        asked = self.scene.problems[self.story.value].question
        self.question.value = f"<b>{html.escape(asked)}</b>"
        self.busy = False
        self.choose_completion()

    def choose_completion(self, _: object = None) -> None:
        if self.busy:
            return
        self.busy = True
        self.position.max = self.scene.length(self.completion.value)
        self.position.value = self.position.max
        self.busy = False
        self.draw()

    def draw(self, _: object = None) -> None:
        if self.busy:
            return
        i, at, color = self.completion.value, self.position.value, self.color.value
        values, unit = self.scene.values(i, color, self.alpha.value, self.beta.value)
        self.tokens.value = self.scene.completion_html(i, at, values, unit)
        self.answers.value = self.scene.forced_html(i, at)
        label = f"{color} of each token" + (" (nats)" if unit == "nats" else "")
        self.bars.value = bars_svg(values, at, label)


def explorer(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    num_generations: int = 8,
    alpha: float = 0.2,
    beta: float = 0.05,
    seed: int = 0,
) -> ipywidgets.VBox:
    """Make the explorer, a widget of controls and pictures.

    Args:
        policy: the policy that writes the completions and is forced to answer.
        problems: stories or other problems to choose from, at least one.
        num_generations: completions per problem, G; advantages need at least 2.
        alpha, beta: first values of the sliders.
        seed: seed of sampling.

    Returns:
        An ``ipywidgets.VBox``. ``story``, ``completion``, ``position``, ``color``, ``alpha`` and
        ``beta`` are its controls, as attributes.

    Raises:
        ValueError: for no problems, or fewer than two completions of each.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to explore.")
    check_number("num_generations", num_generations, 2, MOST_ROWS)
    import ipywidgets as w

    problems = list(problems)
    rollouts = sample(policy, problems, num_generations=num_generations, seed=seed)
    rollouts = score(rollouts, policy.tokenizer, problems)
    forced = forced_answers(policy, rollouts)
    known = informativeness(forced.entropies, rollouts.completion_mask)
    scene = _Scene(policy, problems, rollouts.filled(informativeness=known), forced)
    c = _Controls(scene, alpha, beta)
    box = w.VBox(
        [
            w.HBox([c.story, c.completion]),
            w.HBox([c.position, c.color]),
            w.HBox([c.alpha, c.beta]),
            c.question,
            c.tokens,
            w.HBox([c.answers, c.bars]),
        ]
    )
    box.story, box.completion, box.position, box.color = c.story, c.completion, c.position, c.color
    box.alpha, box.beta = c.alpha, c.beta
    return box
