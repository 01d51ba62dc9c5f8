"""The released code's departures, against plain loops and forward passes."""

import dataclasses

import pytest
import torch
from helpers import make_rollouts, unpadded

from iapo_mini.advantages import iapo
from iapo_mini.config import RECIPES
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import answer_entropies, encode_postfix, inform
from iapo_mini.lab import departures
from iapo_mini.policy import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=0)


def test_smoothed_by_hand():
    h = torch.tensor([[4.0, 3.0, 1.0, 0.5], [2.0, 1.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = departures.smoothed(h, mask)
    expected = [[3.5 - 1.0, 2.0 - 0.5, 0.75 - 0.5], [1.5 - 1.0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_bracketless_by_hand():
    x = torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    mean, std = 1.0, (2 * 1.0 + 4.0) ** 0.5 / 3**0.5
    y = [v - mean / (std + 1e-4) for v in (3, 1, 0, 0)]
    norm = sum(v * v for v in y) ** 0.5
    torch.testing.assert_close(departures.bracketless(x), torch.tensor([[v / norm for v in y]]))
    # Padding takes part: one more column of it changes the numbers.
    wider = departures.bracketless(torch.nn.functional.pad(x, (0, 1)))[:, :4]
    assert not torch.allclose(wider, departures.bracketless(x), atol=1e-3)


def test_entropy_as_confidence_is_signed_by_the_reward():
    rollouts = make_rollouts([3], [2, 2], 2)
    rollouts = rollouts.filled(
        rewards=torch.tensor([1.5, -0.5]),
        token_entropies=torch.tensor([[0.1, 0.2], [0.3, 0.4]]),
    )
    found = departures.entropy_as_confidence(rollouts)
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.2], [-0.3, -0.4]]))


def test_misplaced_entropies_are_what_the_sentence_says(policy):
    """Prefix by prefix, from a plain trunk: positions of the chunk's end, last token hidden."""
    rollouts = make_rollouts([5, 3], [6, 4], 1, left=1)
    found = departures.misplaced_entropies(policy, rollouts, chunk=3)
    suffix = encode_postfix(policy)
    width, k = rollouts.prompt_ids.shape[1], len(suffix)
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt, completion = unpadded(rollouts, i)
        pads = width - len(prompt)
        for t in range(n + 1):
            trunk = torch.cat([prompt, completion[: min(n, t // 3 * 3 + 2)]])
            ids = torch.cat([rollouts.prompt_ids[i, :pads], trunk])
            real = torch.arange(len(ids)) >= pads
            positions = (real.long().cumsum(0) - 1).clamp(min=0)
            # The trunk as it should be, padding hidden; then the postfix: it sees columns 0 to
            # width + t - 2, padding included, from positions that go on after all columns.
            seen = torch.cat([torch.arange(len(ids)) < width + t - 1, torch.ones(k).bool()])
            with torch.no_grad():
                cache = policy.model(
                    ids[None], attention_mask=real[None].long(), position_ids=positions[None]
                ).past_key_values
                mask = seen.expand(k, -1).tril(len(ids))
                logits = policy.model(
                    suffix[None], attention_mask=mask[None, None], past_key_values=cache,
                    position_ids=(len(ids) + torch.arange(k))[None],
                ).logits[0, -1]  # fmt: skip
            p = logits.double().softmax(-1)
            expected = float(-(p * p.log()).sum())
            assert float(found[i, t]) == pytest.approx(expected, abs=2e-3), (i, t)
        assert not found[i, n + 1 :].any()


def test_misplaced_differs_from_the_definition(policy):
    rollouts = make_rollouts([5, 3], [6, 4], 1)
    right = answer_entropies(policy, rollouts)
    assert (departures.misplaced_entropies(policy, rollouts) - right).abs().max() > 0.05


def test_effect_is_none_for_the_paper_itself(policy, monkeypatch):
    monkeypatch.setattr(departures, "RECIPES", {"same": RECIPES["iapo"]})
    found = departures.effect(policy, 0.4, 0.05, prompts=2, seed=0)["same"]
    assert found["correlation"] == pytest.approx(1.0) and found["sign_flips"] == 0
    assert found["token_term"] == pytest.approx(1.0)


def test_every_departure_has_its_rule_estimate_and_sentence():
    assert departures.RECIPES.keys() == departures.WHAT.keys()
    for recipe in departures.RECIPES.values():  # a departure, all else as IAPO's recipe has it
        changed = recipe.rule != "iapo" or recipe.information != "answer_entropy"
        assert (
            changed
            and dataclasses.replace(recipe, rule="iapo", information="answer_entropy")
            == RECIPES["iapo"]
        )


def test_advantages_of_departures_are_finite_and_masked(policy):
    rollouts = make_rollouts([3], [4, 2], 2, right=1)
    rollouts = rollouts.filled(
        rewards=torch.tensor([1.5, -0.5]), correct=torch.tensor([True, False]),
        token_entropies=torch.rand(2, 5) * rollouts.completion_mask,
    )  # fmt: skip
    for name, recipe in departures.RECIPES.items():
        informed = inform(policy, rollouts, recipe.information, EarlyExit(memory_mb=64.0))
        rule = iapo if recipe.rule == "iapo" else recipe.rule
        found = rule(informed, 0.4, 0.05)
        assert found.isfinite().all() and not found[~rollouts.completion_mask].any(), name
