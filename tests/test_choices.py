"""How much a term favours computing over talk at the start of a sentence."""

import itertools
import json

import pytest
import torch
from helpers import written

from iapo_mini.lab import choices
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories

COMPUTES = "<think> 14 + 7 = 21.</think><answer> 21</answer>"
TALKS = "<think> Let me check. 14 + 7 = 21.</think><answer> 21</answer>"


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=0)


@pytest.fixture(scope="module")
def rollouts(policy):
    """Two completions that differ from their first sentence on, where the policy is unsure."""
    rows = [policy.tokenizer.encode(text, add_special_tokens=False) for text in (COMPUTES, TALKS)]
    found = written([[*row, int(policy.eos_ids[0])] for row in rows], group=2)
    entropies = torch.zeros(found.completion_mask.shape)
    entropies[:, 1] = 0.6
    return found.filled(token_entropies=entropies)


def test_a_choice_is_where_a_sentence_begins_and_the_policy_is_unsure(policy, rollouts):
    (place,) = choices.openers(policy, rollouts).items()
    (group, prefix), chosen = place
    assert group == 0 and policy.tokenizer.decode(list(prefix)) == "<think>"
    assert sorted(chosen) == [(0, 1, True), (1, 1, False)]
    sure = rollouts.filled(token_entropies=torch.full_like(rollouts.token_entropies, 0.4))
    assert not choices.openers(policy, sure)


def test_pay_is_computing_minus_talk_in_standard_deviations(policy, rollouts, monkeypatch):
    monkeypatch.setattr(choices, "sample", lambda *_, **__: rollouts)
    monkeypatch.setattr(choices, "score", lambda found, *_: found)
    pay = torch.zeros(rollouts.completion_mask.shape)
    pay[0, 1], pay[1, 1] = 3.0, 1.0
    n = rollouts.lengths.float()
    terms = {
        "told": lambda *_: pay,
        "constant": lambda *_: rollouts.completion_mask.float(),
    }
    found, places = choices.paid_at_choices(policy, [next(stories("tune"))], terms, 2)
    assert places == 1
    mask = rollouts.completion_mask
    assert found["told"]["token"][0] == pytest.approx(2.0 / float(pay[mask].std()), rel=1e-5)
    by_length = pay / n[:, None]
    expected = (3.0 / n[0] - 1.0 / n[1]) / by_length[mask].std()
    assert found["told"]["sequence"][0] == pytest.approx(float(expected), rel=1e-5)
    # At a choice a constant gives 0 with the token mean; the sequence mean favours shorter rows.
    assert found["constant"]["token"] == [0.0, 0.0, 0.0]
    assert n[0] < n[1] and found["constant"]["sequence"][0] > 0.5


def test_the_study_at_its_smallest(tmp_path):
    found = choices.choices("quick", out=tmp_path / "runs", figures=tmp_path / "figures")
    saved = json.loads(
        (tmp_path / "figures/results/choices_quick.json").read_text(encoding="utf-8")
    )
    assert saved == json.loads(json.dumps(found)) and found["terms"].keys() == choices.TERMS.keys()
    lines = choices.choices_table(found).splitlines()
    assert len(lines) == 2 + len(choices.TERMS)
    assert list(found["starts"]) == ["uncalibrated", "calibrated"]
    for row in found["starts"].values():
        assert tuple(row["terms"]) == choices.ESTIMATED and row["places"] >= 0
    by_start = choices.choices_by_start(found).splitlines()[2:]
    assert [line.split(" | ")[0] for line in by_start] == [f"| {name}" for name in choices.STARTS]
    own = found["starts"]["calibrated"]["terms"]["iapo_ne"]["token"]
    assert choices.format_interval(own, 2) in by_start[2]
    own = found["terms"]["iapo_ne"]["token"]
    assert choices.format_interval(own, 2) in by_start[1]
    assert (tmp_path / "figures/choices_quick.png").stat().st_size > 10_000


def test_terms_pay_real_tokens_alone(policy):
    problems = list(itertools.islice(stories("tune", seed=3), 1))
    rollouts = choices.score(
        choices.sample(policy, problems, num_generations=4, seed=0), policy.tokenizer, problems
    )
    for name, term in choices.TERMS.items():
        pay = term(policy, rollouts, choices.EVERY_PREFIX)
        assert pay.shape == rollouts.completion_mask.shape and pay.isfinite().all(), name
        assert not pay[~rollouts.completion_mask].any(), name
