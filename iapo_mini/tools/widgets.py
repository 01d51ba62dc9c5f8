"""An explorer for notebooks: step through a completion and watch the answer sharpen.

Pick a story and a completion, move through its tokens, and see what the policy would answer if it
had to answer now, what each token told about the answer, and the advantage that GRPO and IAPO give
it, recoloured live by sliders for alpha and beta. All pictures are HTML and SVG, so a move costs
milliseconds; the model is asked once, when the explorer is made. Needs ipywidgets
(``pip install 'iapo-mini[notebooks]'``; Colab has it).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex

from iapo_mini.advantages import grpo, iapo
from iapo_mini.early_exit import prefixes
from iapo_mini.information import encode_postfix, entropy, informativeness
from iapo_mini.plots import COLORS
from iapo_mini.policy import Policy
from iapo_mini.problems.stories import token_roles
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem

_PAGE = "font-family:monospace;background:white;color:black;padding:6px;line-height:1.9"


@dataclass(frozen=True)
class ForcedAnswers:
    """What the policy answers after every prefix when it has to answer now.

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
        raise ValueError(f"k is {k}; allowed are 1 to {vocabulary}, the size of the vocabulary.")

    def read(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        p, ids = torch.softmax(logits[:, 0].float(), dim=-1).topk(k)
        return torch.cat([entropy(logits), p, ids.float()], dim=1)  # ids below 2**24 stay exact

    found = prefixes.ask(policy.for_inference(), rollouts, encode_postfix(policy), read)
    return ForcedAnswers(found[..., 0], found[..., 1 : k + 1], found[..., k + 1 :].long())


def tokens_html(
    tokens: Sequence[str], values: Sequence[float], roles: Sequence[str] | None, at: int, unit: str
) -> str:
    """The completion as text: colour by value, a line by role, what is not yet read in grey.

    Args:
        tokens: n texts; values: n numbers, for the ground and the tooltip; roles: n, or None.
        at: tokens read so far, 0 to n; the last of them is framed.
        unit: of the values, for the tooltip.
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
    """Bars of the most likely forced answers, and the entropy over all of them."""
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
    """One bar a token; those not yet read in grey, the last read one with a dark edge."""
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


def explorer(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    num_generations: int = 8,
    alpha: float = 0.2,
    beta: float = 0.05,
    seed: int = 0,
):
    """Controls and pictures of completions, as one widget.

    Args:
        policy: it samples the completions and is forced to answer.
        problems: stories or other problems to choose from, at least one.
        num_generations: completions of each, G, at least 2 for the advantages to have a group.
        alpha, beta: where the sliders stand at first.
        seed: for sampling.

    Returns:
        An ``ipywidgets.VBox``. ``story``, ``completion``, ``position``, ``color``, ``alpha`` and
        ``beta`` are its controls, as attributes.

    Raises:
        ValueError: for no problems, or fewer than two completions of each.
    """
    if not problems:
        raise ValueError("problems is empty; at least one problem is needed to explore.")
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}; allowed are 2 and above.")
    import ipywidgets as w

    problems = list(problems)
    rollouts = sample(policy, problems, num_generations=num_generations, seed=seed)
    rollouts = score(rollouts, policy.tokenizer, problems)
    forced = forced_answers(policy, rollouts)
    rollouts.informativeness = informativeness(forced.entropies, rollouts.completion_mask)
    lengths = (rollouts.lengths - rollouts.finished.long()).tolist()  # without end of sequence

    def text(i: int) -> str:
        return policy.tokenizer.decode([i], skip_special_tokens=False)

    titles = [p.question if len(p.question) < 80 else p.question[:77] + "..." for p in problems]
    story = w.Dropdown(
        options=list(zip(titles, range(len(problems)))),
        description="story",
        layout=w.Layout(width="480px"),
    )
    completion = w.Dropdown(description="completion")
    position = w.IntSlider(min=0, description="tokens read", layout=w.Layout(width="480px"))
    color = w.ToggleButtons(options=["information", "IAPO advantage", "GRPO advantage"])
    wide = w.Layout(width="380px")
    sliders = [
        w.FloatSlider(value=value, min=0, max=1, step=0.01, description=name, layout=wide)
        for name, value in (("alpha", alpha), ("beta", beta))
    ]
    question, tokens, answers, bars = (w.HTML() for _ in range(4))
    busy = [False]

    def choose_story(_=None) -> None:
        first = story.value * num_generations
        options = [
            (f"{lengths[i]} tokens, {'right' if rollouts.correct[i] else 'wrong'}", i)
            for i in range(first, first + num_generations)
        ]
        busy[0] = True  # the assignments below would each draw everything
        completion.options, completion.value = options, first
        question.value = f"<b>{html.escape(problems[story.value].question)}</b>"
        busy[0] = False
        choose_completion()

    def choose_completion(_=None) -> None:
        if busy[0]:
            return
        busy[0] = True
        position.max = lengths[completion.value]
        position.value = position.max
        busy[0] = False
        draw()

    def draw(_=None) -> None:
        if busy[0]:
            return
        i, at = completion.value, position.value
        n = lengths[i]
        if color.value == "information":
            values, unit = rollouts.informativeness, "nats"
        elif color.value == "IAPO advantage":
            values, unit = iapo(rollouts, *(s.value for s in sliders)), "advantage"
        else:
            values, unit = grpo(rollouts), "advantage"
        values, ids = values[i, :n].tolist(), rollouts.completion_ids[i, :n].tolist()
        is_story = bool(problems[i // num_generations].steps)
        roles = token_roles(policy.tokenizer, ids) if is_story else None
        tokens.value = tokens_html([text(j) for j in ids], values, roles, at, unit)
        likely = [text(j) for j in forced.ids[i, at].tolist()]
        p, nats = forced.probabilities[i, at].tolist(), float(forced.entropies[i, at])
        answers.value = answers_html(likely, p, nats)
        label = f"{color.value} of each token" + (" (nats)" if unit == "nats" else "")
        bars.value = bars_svg(values, at, label)

    story.observe(choose_story, "value")
    completion.observe(choose_completion, "value")
    for control in (position, color, *sliders):
        control.observe(draw, "value")
    choose_story()
    box = w.VBox(
        [
            w.HBox([story, completion]),
            w.HBox([position, color]),
            w.HBox(sliders),
            question,
            tokens,
            w.HBox([answers, bars]),
        ]
    )
    box.story, box.completion, box.position, box.color = story, completion, position, color
    box.alpha, box.beta = sliders
    return box
