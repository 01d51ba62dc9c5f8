"""The metrics of a step, compared with the same numbers from plain loops."""

from dataclasses import replace

import pytest
import torch
from helpers import make_rollouts

from iapo_mini.metrics import Stopwatch, role_metrics, step_metrics
from iapo_mini.problems.stories import ROLES, stories, token_roles
from iapo_mini.rewards import JUDGES, score
from iapo_mini.sampling import from_texts
from iapo_mini.tasks import Problem

STATS = {"loss": 0.1, "entropy": 0.5, "kl": 0.01, "clip_ratio": 0.2, "grad_norm": 1.5}


def watched():
    watch = Stopwatch()
    for name in ("sampling", "information", "update"):
        watch.lap(name)
    return watch


def test_the_parts_of_a_step_add_up_to_its_time():
    watch = watched()
    assert list(watch.seconds) == ["sampling", "information", "update"]
    assert all(seconds >= 0 for seconds in watch.seconds.values())


def test_numbers_of_a_step_by_hand():
    rollouts = make_rollouts([3, 4], [2, 4, 1, 3], group=2).filled(
        rewards=torch.tensor([1.5, -0.5, -1.5, -1.5]),
        correct=torch.tensor([True, False, False, False]),
    )
    watch = watched()
    found = step_metrics(rollouts, torch.zeros(4, 4), STATS, watch)
    assert found["reward"] == pytest.approx(-0.5) and found["accuracy"] == 0.25
    assert found["format"] == 0.5 and found["length"] == 2.5 and found["truncated"] == 0
    assert found["zero_variance_groups"] == 0.5  # the second group's rewards are all equal
    assert found["informativeness"] is None
    assert found["tokens_per_second"] == pytest.approx(10 / sum(watch.seconds.values()))
    assert {name: found[name] for name in STATS} == STATS


@pytest.mark.parametrize("how", list(JUDGES))
def test_format_is_told_under_every_reward(base_policy, how):
    problem = Problem("2 + 2?", "4")
    formed = [f"<think>so</think>\n<answer>{answer}</answer>" for answer in (4, 5)]
    texts = [*formed, "<answer>4</answer>", "<answer>5</answer>"]
    rollouts = from_texts(base_policy, [problem] * 4, texts)
    rollouts = replace(
        score(rollouts, base_policy.tokenizer, [problem] * 4, how), num_generations=2
    )
    found = step_metrics(rollouts, torch.zeros(rollouts.completion_ids.shape), STATS, watched())
    assert found["format"] == 0.5
    assert found["accuracy"] == (0.5 if how == "released" else 0.25)


def test_informativeness_is_the_mean_over_real_tokens():
    rollouts = make_rollouts([3], [2, 1], group=2).filled(
        rewards=torch.zeros(2), correct=torch.zeros(2, dtype=torch.bool),
        informativeness=torch.tensor([[1.0, 2.0], [6.0, 99.0]]),
    )  # fmt: skip
    found = step_metrics(rollouts, torch.zeros(2, 2), STATS, watched())
    assert found["informativeness"] == pytest.approx(3.0)


def test_numbers_by_role_by_a_loop(base_policy):
    problem = next(stories("train"))
    text = "<think> 2 + 3 = 5. Hmm, this part needs some care.</think><answer> 5</answer>"
    rollouts = from_texts(base_policy, [problem], [text])
    generator = torch.Generator().manual_seed(0)
    advantages, s = torch.randn(2, *rollouts.completion_ids.shape, generator=generator)
    rollouts = rollouts.filled(informativeness=s)
    found = role_metrics(rollouts, advantages, base_policy.tokenizer, [problem])
    roles = token_roles(base_policy.tokenizer, rollouts.completion_ids[0].tolist())
    for role in ROLES:
        at = [t for t, r in enumerate(roles) if r == role]
        assert found[f"tokens/{role}"] == len(at)
        for name, values in (("advantage", advantages), ("informativeness", s)):
            mean = sum(float(values[0, t]) for t in at) / len(at) if at else None
            assert found[f"{name}/{role}"] == (pytest.approx(mean) if at else None)
    assert found["tokens/compute"] > 0 and found["tokens/hedge"] > 0


def test_problems_that_are_not_stories_have_no_roles(base_policy):
    rollouts = from_texts(base_policy, [Problem("2 + 2?", "4")], ["<think> 4.</think>"])
    advantages = torch.zeros(rollouts.completion_ids.shape)
    assert role_metrics(rollouts, advantages, base_policy.tokenizer, [Problem("?", "4")]) == {}
