"""The explorer shows the library's numbers and follows its controls."""

import itertools

import pytest
import torch

from iapo_mini.advantages import grpo, iapo
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.problems.stories import stories
from iapo_mini.rewards import score
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem
from iapo_mini.tools.widgets import answers_html, bars_svg, explorer, forced_answers, tokens_html

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
    page = tokens_html(["<think>", " 3", " &"], [0.0, 1.5, -0.5], None, 2, "nats")
    assert "&lt;think&gt;" in page and "<think>" not in page and "&amp;" in page
    assert page.count("color:#999") == 1 and page.count("outline") == 1
    assert "+1.500 nats" in page and "full colour is 1.50 nats" in page


def test_bars_have_one_rectangle_for_each_token():
    assert bars_svg([0.5, -0.25, 0.1], 2, "s").count("<rect") == 3
    assert bars_svg([0.5, -0.25, 0.1], 2, "s").count("#dddddd") == 1
    assert bars_svg([], 0, "s").count("<rect") == 0


def test_answers_are_drawn_to_scale():
    page = answers_html([" 28", "</x>"], [0.75, 0.25], 0.56)
    assert "width:150px" in page and "width:50px" in page and "H = 0.56 nats" in page
    assert "&lt;/x&gt;" in page


def test_explorer_follows_its_controls(base_policy, problems, short):
    box = explorer(base_policy, problems, num_generations=3, seed=1)
    rollouts = score(
        short(base_policy, problems, num_generations=3, seed=1), base_policy.tokenizer, problems
    )
    tokens, answers = box.children[4], box.children[5].children[0]
    assert box.position.max == int(rollouts.lengths[0]) - int(rollouts.finished[0])
    before = answers.value
    box.position.value = 0
    assert answers.value != before and tokens.value.count("color:#999") == box.position.max
    forced = forced_answers(base_policy, rollouts)
    assert f"H = {float(forced.entropies[0, 0]):.2f} nats" in answers.value

    box.story.value = 1
    assert [i for _, i in box.completion.options] == [3, 4, 5]
    box.completion.value = 4
    drops = (forced.entropies[:, :-1] - forced.entropies[:, 1:]) * rollouts.completion_mask
    rollouts = rollouts.filled(informativeness=drops)
    box.color.value = "IAPO advantage"
    box.alpha.value = 0.7
    assert f"{float(iapo(rollouts, 0.7, 0.05)[4, 2]):+.3f} advantage" in tokens.value
    box.color.value = "GRPO advantage"
    assert f"{float(grpo(rollouts)[4, 2]):+.3f} advantage" in tokens.value


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
