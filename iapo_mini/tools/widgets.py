"""An explorer for notebooks: step through a completion and watch the answer become certain.

Choose a story and a completion and move through its tokens, or press Play. The explorer opens
before the first token, so that a class can guess which one settles the answer. It shows what the
policy would answer if it had to answer now, how much each token says about the answer, and the
advantages of GRPO and IAPO, which follow the sliders for alpha and beta. All pictures are HTML and
SVG, so a move takes milliseconds. The model runs only once, when the explorer is made. Needs
ipywidgets (``pip install 'iapo-mini[notebooks]'``; Colab has it).
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
UNREAD = "#5c5c5c"
"""Colour of the text of tokens that are not yet read, 6.7 to 1 on the white page."""
LIMITS = {"information": 2.0, "IAPO advantage": 3.0, "GRPO advantage": 3.0}
"""Value of the full colour, the same for every completion, alpha and beta, so that colours can be
compared. Values beyond have the full colour."""
SHOWN = 6
"""Forced answers that are shown after a prefix."""


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


def colors(value: float, limit: float) -> tuple[str, str]:
    """Colour of a value and of the text on it: blue above zero, red below, white at zero.

    The text is black or white, whichever differs more: at least 4.5 to 1 on any ground.
    """
    rgb = colormaps["RdBu"](0.5 + 0.5 * max(-1.0, min(1.0, value / limit)))[:3]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    light = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    return to_hex(rgb), "black" if light > 0.179 else "white"


def tokens_html(
    tokens: Sequence[str],
    values: Sequence[float],
    roles: Sequence[str] | None,
    at: int,
    unit: str,
    limit: float,
) -> str:
    """HTML of a completion, with colours by value, lines by role, and tokens not yet read in grey.

    Args:
        tokens: n texts.
        values: n numbers, for background and tooltip.
        roles: n roles, or None.
        at: number of tokens read so far, 0 to n; the last of them is framed.
        unit: unit of the values, for the tooltip.
        limit: value of the full colour.
    """
    out = []
    for i, (token, value) in enumerate(zip(tokens, values)):
        ground, text = colors(value, limit)
        style = f"background:{ground};color:{text}" if i < at else f"color:{UNREAD}"
        if roles is not None:
            style += f";border-bottom:3px solid {COLORS[roles[i]]}"
        if i == at - 1:
            style += ";outline:2px solid black"
        tip = f"{value:+.3f} {unit}" + (f", {roles[i]}" if roles is not None else "")
        shown = html.escape(token).replace(" ", "&nbsp;").replace("\n", "<br>")
        out.append(f'<span title="{tip}" style="{style}">{shown}</span><wbr>')
    legend = f"blue is positive, red negative; full colour is {limit:.2f} {unit} and more"
    if at == 0:
        legend = f"No token is read yet. Which one will settle the answer?<br>{legend}"
    if roles is not None:
        legend += ". Line below: " + ", ".join(
            f'<span style="border-bottom:3px solid {COLORS[r]}">{r}</span>'
            for r in COLORS if r in set(roles)
        )  # fmt: skip
    return f'<div style="{_PAGE}">{"".join(out)}<br><small>{legend}</small></div>'


def answers_html(
    answers: Sequence[str], probabilities: Sequence[float], nats: float, right: Sequence[bool] = ()
) -> str:
    """HTML bars of the most likely forced answers, and the entropy over all answers.

    Args:
        answers, probabilities: n texts and their probabilities.
        nats: the entropy.
        right: n marks of the right answer, by a tick, bold text and another colour; none if empty.
    """
    rows = []
    for answer, p, is_right in zip(answers, probabilities, right or [False] * len(answers)):
        share = f"{p:.2f}" if p >= 0.005 else "&lt;0.01"
        mark, weight = ("&nbsp;&#10003; right", "bold") if is_right else ("", "normal")
        rows.append(
            f'<div style="font-weight:{weight}">'
            f'<span style="display:inline-block;min-width:5em;text-align:right">'
            f"{html.escape(answer).replace(' ', '&nbsp;')}</span>"
            f'<span style="display:inline-block;height:12px;margin:0 6px;'
            f"background:{'#00735a' if is_right else '#0072B2'};"
            f'width:{200 * p:.0f}px"></span>{share}{mark}</div>'
        )
    head = f"<b>answer, if forced now</b>: H = {nats:.2f} nats"
    return f'<div style="{_PAGE};width:390px">{head}{"".join(rows)}</div>'


def bars_svg(values: Sequence[float], at: int, label: str, limit: float) -> str:
    """SVG with one bar per token: grey if not yet read, with a dark edge for the last one read.

    The axis goes from -limit to limit; bars of larger values end there.
    """
    n, width, half = max(1, len(values)), 420, 60
    step = width / n
    bars = []
    for i, value in enumerate(values):
        h = half * min(1.0, abs(value) / limit)
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
        f'<br><svg width="{width}" height="{2 * half}" role="img" '
        f'aria-label="{html.escape(label)}">'
        f"{axis}{''.join(bars)}</svg></div>"
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

    def completion_html(self, i: int, at: int, values: list[float], unit: str, limit: float) -> str:
        """HTML of completion i with ``at`` tokens read; only tokens of stories have roles."""
        ids = self.rollouts.completion_ids[i, : self.length(i)].tolist()
        is_story = bool(self.problems[i // self.rollouts.num_generations].steps)
        roles = token_roles(self.policy.tokenizer, ids) if is_story else None
        return tokens_html(self.texts(ids), values, roles, at, unit, limit)

    def forced_html(self, i: int, at: int) -> str:
        """HTML of the forced answers after ``at`` tokens of completion i, the right one marked.

        A right answer that is not among those shown gets a line of its own. In the story world an
        answer is one token; elsewhere the token that begins the right answer is marked.
        """
        likely = self.texts(self.forced.ids[i, at].tolist())
        p, nats = self.forced.probabilities[i, at].tolist(), float(self.forced.entropies[i, at])
        problem = self.problems[i // self.rollouts.num_generations]
        texts = [text.strip() for text in likely]
        right = [
            text == problem.answer
            if problem.steps
            else text != "" and problem.answer.startswith(text)
            for text in texts
        ]
        shown = [j for j in range(len(likely)) if j < SHOWN or right[j]]
        rows = [(likely[j], p[j], right[j]) for j in shown]
        if problem.steps and not any(right):
            rows.append((f" {problem.answer}", 0.0, True))
        answers, shares, marks = zip(*rows)
        return answers_html(answers, shares, nats, marks)


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
            min=0, description="tokens read", readout=False, layout=w.Layout(width="400px")
        )
        self.play = w.Play(min=0, interval=450, description="Play")
        self.color = w.ToggleButtons(options=["information", "IAPO advantage", "GRPO advantage"])
        wide = w.Layout(width="380px")
        self.alpha, self.beta = (
            w.FloatSlider(
                value=value, min=0, max=1, step=0.01, description=name, readout=False, layout=wide
            )
            for name, value in (("alpha", alpha), ("beta", beta))
        )
        # ipywidgets gives the handle of a slider no accessible name. A number field has its label.
        short = w.Layout(width="210px")
        self.number = w.BoundedIntText(min=0, description="token number", layout=short)
        self.weights = [
            w.BoundedFloatText(
                value=slider.value, min=0, max=1, step=0.01, description=name, layout=short
            )
            for name, slider in (("alpha value", self.alpha), ("beta value", self.beta))
        ]
        for control in (self.play, self.number, *self.weights):
            control.style.description_width = "initial"
        self.question, self.tokens, self.answers, self.bars = (w.HTML() for _ in range(4))
        for name in ("max", "value"):
            w.link((self.position, name), (self.play, name))
            w.link((self.position, name), (self.number, name))
        for slider, field in zip((self.alpha, self.beta), self.weights):
            w.link((slider, "value"), (field, "value"))
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
        self.play.playing = False
        self.position.value = 0
        self.position.max = self.scene.length(self.completion.value)
        self.busy = False
        self.draw()

    def draw(self, _: object = None) -> None:
        if self.busy:
            return
        i, at, color = self.completion.value, self.position.value, self.color.value
        values, unit = self.scene.values(i, color, self.alpha.value, self.beta.value)
        limit = LIMITS[color]
        self.tokens.value = self.scene.completion_html(i, at, values, unit, limit)
        self.answers.value = self.scene.forced_html(i, at)
        label = f"{color} of each token" + (" (nats)" if unit == "nats" else "")
        self.bars.value = bars_svg(values, at, label, limit)


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
        An ``ipywidgets.VBox``, with no token read yet. ``story``, ``completion``, ``position``,
        ``play``, ``color``, ``alpha`` and ``beta`` are its controls, as attributes.

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
    size = policy.model.config.get_text_config().vocab_size
    forced = forced_answers(policy, rollouts, k=min(20, size))
    known = informativeness(forced.entropies, rollouts.completion_mask)
    scene = _Scene(policy, problems, rollouts.filled(informativeness=known), forced)
    c = _Controls(scene, alpha, beta)
    box = w.VBox(
        [
            w.HBox([c.story, c.completion]),
            w.HBox([c.play, c.position, c.number, c.color]),
            w.HBox([c.alpha, c.weights[0], c.beta, c.weights[1]]),
            c.question,
            c.tokens,
            w.HBox([c.answers, c.bars]),
        ]
    )
    box.story, box.completion, box.position, box.color = c.story, c.completion, c.position, c.color
    box.alpha, box.beta, box.play = c.alpha, c.beta, c.play
    return box
