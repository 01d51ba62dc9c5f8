"""The explorer shows the library's numbers and follows its controls."""

import itertools

import pytest
import torch
from matplotlib.colors import to_rgb

from iapo_mini.advantages import grpo, iapo
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.problems.stories import stories
from iapo_mini.rewards import score
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem
from iapo_mini.tools.widgets import (
    UNREAD,
    answers_html,
    bars_svg,
    colors,
    explorer,
    forced_answers,
    tokens_html,
)

pytest.importorskip("ipywidgets")


@pytest.fixture
def problems():
    return list(itertools.islice(stories("test", seed=5), 2))


@pytest.fixture
def short(monkeypatch):
    """Cut completions early, because the random policy never ends them by itself."""
    from iapo_mini.tools import widgets

    def cut(*args, **options):
        return sample(*args, max_completion_length=12, **options)

    monkeypatch.setattr(widgets, "sample", cut)
    return cut


def test_forced_answers_are_those_of_a_plain_forward_pass(stopping_policy, problems):
    policy = stopping_policy
    rollouts = sample(policy, problems, num_generations=2, max_completion_length=9)
    forced = forced_answers(policy, rollouts, k=3)
    torch.testing.assert_close(forced.entropies, answer_entropies(policy, rollouts))
    postfix = encode_postfix(policy)
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        for t in range(n + 1):
            ids = torch.cat([prompt, rollouts.completion_ids[i, :t], postfix])
            with torch.no_grad():
                p = policy.model(ids[None]).logits[0, -1].softmax(-1)
            values, likely = p.topk(3)
            torch.testing.assert_close(forced.probabilities[i, t], values, atol=1e-5, rtol=0)
            assert forced.ids[i, t].tolist() == likely.tolist()


def test_forced_answers_refuse_more_than_the_vocabulary(base_policy, problems):
    rollouts = sample(base_policy, problems, num_generations=1, max_completion_length=2)
    with pytest.raises(ValueError, match=r"k must be 1 to"):
        forced_answers(base_policy, rollouts, k=0)


def test_tokens_are_escaped_and_greyed_after_the_position():
    page = tokens_html(["<think>", " 3", " &"], [0.0, 1.5, -0.5], None, 2, "nats", 2.0)
    assert "&lt;think&gt;" in page and "<think>" not in page and "&amp;" in page
    assert page.count(f"color:{UNREAD}") == 1 and page.count("outline") == 1
    assert "+1.500 nats" in page and "full colour is 2.00 nats" in page
    assert "No token is read yet" not in page


def contrast(one, other):
    """WCAG 2's contrast of two colours, as matplotlib names them."""

    def light(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_read_and_unread_tokens_have_enough_contrast():
    # The page is white whatever the theme of the notebook is.
    assert "background:white;color:black" in tokens_html([], [], None, 0, "nats", 2.0)
    assert contrast(UNREAD, "white") >= 4.5
    for value in torch.linspace(-4, 4, 161).tolist():
        ground, text = colors(value, 3.0)
        assert contrast(ground, text) >= 4.5, value


def test_one_value_has_one_colour_whatever_the_other_values_are():
    alone = tokens_html([" a"], [0.5], None, 1, "nats", 2.0)
    beside = tokens_html([" a", " b"], [0.5, 9.0], None, 1, "nats", 2.0)
    ground, _ = colors(0.5, 2.0)
    assert f"background:{ground}" in alone and f"background:{ground}" in beside
    assert colors(9.0, 2.0) == colors(2.0, 2.0) != colors(-9.0, 2.0)


def test_bars_have_one_rectangle_for_each_token():
    drawn = bars_svg([0.5, -0.25, 9.0], 2, "s", 1.0)
    assert drawn.count("<rect") == 3 and drawn.count("#dddddd") == 1
    assert 'height="30.0"' in drawn and 'height="60.0"' in drawn  # half of the axis, and its end
    assert bars_svg([], 0, "s", 1.0).count("<rect") == 0


def test_answers_are_drawn_to_scale():
    page = answers_html([" 28", "</x>"], [0.75, 0.25], 0.56)
    assert "width:150px" in page and "width:50px" in page and "H = 0.56 nats" in page
    assert "&lt;/x&gt;" in page and "right" not in page.replace("text-align:right", "")


def test_the_right_answer_is_marked_by_more_than_a_colour():
    page = answers_html([" 28", " 7"], [0.001, 0.25], 0.56, [False, True])
    assert page.count("&#10003; right") == 1 and page.count("font-weight:bold") == 1
    assert page.index("0.25&nbsp;&#10003;") > page.index("&lt;0.01</div>")


def test_explorer_follows_its_controls(base_policy, problems, short):
    box = explorer(base_policy, problems, num_generations=3, seed=1)
    rollouts = score(
        short(base_policy, problems, num_generations=3, seed=1), base_policy.tokenizer, problems
    )
    tokens, answers = box.children[4], box.children[5].children[0]
    assert box.position.max == int(rollouts.lengths[0]) - int(rollouts.finished[0])
    # It opens before the first token.
    assert box.position.value == 0 and "No token is read yet" in tokens.value
    assert tokens.value.count(f"color:{UNREAD}") == box.position.max
    forced = forced_answers(base_policy, rollouts)
    assert f"H = {float(forced.entropies[0, 0]):.2f} nats" in answers.value
    assert answers.value.count("&#10003; right") == 1
    before = answers.value
    box.play.value = box.play.max  # as Play does
    assert (
        box.position.value
        == box.position.max
        == int(rollouts.lengths[0]) - int(rollouts.finished[0])
    )
    assert answers.value != before and "No token is read yet" not in tokens.value
    assert f"color:{UNREAD}" not in tokens.value

    box.story.value = 1
    assert [i for _, i in box.completion.options] == [3, 4, 5]
    box.completion.value = 4
    drops = (forced.entropies[:, :-1] - forced.entropies[:, 1:]) * rollouts.completion_mask
    rollouts = rollouts.filled(informativeness=drops)
    box.color.value = "IAPO advantage"
    legend = tokens.value.partition("<small>")[2]
    box.alpha.value = 0.7
    assert tokens.value.partition("<small>")[2] == legend  # one scale whatever alpha is
    assert box.position.value == 0 and "full colour is 3.00 advantage" in legend
    assert f"{float(iapo(rollouts, 0.7, 0.05)[4, 2]):+.3f} advantage" in tokens.value
    box.color.value = "GRPO advantage"
    assert f"{float(grpo(rollouts)[4, 2]):+.3f} advantage" in tokens.value


def test_every_control_has_a_name_of_its_own(base_policy, problems, short):
    box = explorer(base_policy, problems[:1], num_generations=2)
    fields = [c for row in box.children[1:3] for c in row.children if hasattr(c, "step")]
    named = [c.description for c in fields]
    assert all(named) and len(set(named)) == len(named)
    # The handle of a slider has no name in ipywidgets, so a labelled field holds the same number.
    numbers = {c.description: c for c in fields}
    numbers["token number"].value = 3
    numbers["alpha value"].value = 0.5
    assert box.position.value == 3 and box.alpha.value == 0.5


def test_explorer_takes_problems_without_roles(base_policy, short):
    box = explorer(base_policy, [Problem("What is 1 + 1?", "2")], num_generations=2)
    assert "Line below" not in box.children[4].value


@pytest.mark.parametrize(
    "change, message",
    [
        ({"problems": []}, "problems is empty"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
    ],
)
def test_explorer_refuses_bad_arguments(base_policy, problems, change, message):
    with pytest.raises(ValueError, match=message):
        explorer(base_policy, **({"problems": problems} | change))
