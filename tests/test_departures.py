"""The released code's departures, compared with plain loops and forward passes."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from helpers import make_rollouts, unpadded

from iapo_mini import config
from iapo_mini.advantages import grpo, iapo
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import answer_entropies, encode_postfix, inform
from iapo_mini.lab import departures
from iapo_mini.policy import load_policy
from iapo_mini.recipes import RECIPES


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=0)


def test_the_released_s_is_the_own_drop_plus_half_of_the_previous_one():
    """E_i of the released code is the entropy before token i; the alignment is checked by hand."""
    h = torch.tensor([[4.0, 3.0, 1.0, 0.5], [2.0, 1.0, 0.9, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = departures.smoothed(h, mask)
    expected = [
        # (E_0 + 0) / 2 - E_1, (E_1 + E_0) / 2 - E_2, and E_3 is outside the batch.
        [4.0 / 2 - 3.0, (3.0 + 4.0) / 2 - 1.0, (1.0 + 3.0) / 2 - 0.0],
        [2.0 / 2 - 1.0, (1.0 + 2.0) / 2 - 0.9, 0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    # In the paper's terms, for a token with neighbours on both sides: s_t + s_{t-1} / 2.
    drops = -h.diff(dim=1)
    assert float(found[0, 1]) == pytest.approx(float(drops[0, 1] + drops[0, 0] / 2))


def test_a_drop_counts_at_its_own_token_and_by_half_at_the_next():
    h = torch.tensor([[2.0, 2.0, 2.0, 0.0, 0.0, 0.0]])
    found = departures.smoothed(h, torch.ones(1, 5, dtype=torch.bool))
    assert found[0, 1:].tolist() == [0.0, 2.0, 1.0, 0.0]


def test_bracketless_by_hand():
    x = torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    mean, std = 1.0, (2 * 1.0 + 4.0) ** 0.5 / 3**0.5
    y = [v - mean / std for v in (3, 1, 0, 0)]
    norm = sum(v * v for v in y) ** 0.5
    torch.testing.assert_close(departures.bracketless(x), torch.tensor([[v / norm for v in y]]))
    # Padding counts here, so one more column of it changes the numbers.
    wider = departures.bracketless(torch.nn.functional.pad(x, (0, 1)))[:, :4]
    assert not torch.allclose(wider, departures.bracketless(x), atol=1e-3)


def surely_and_not():
    """A right and a wrong completion, each with a confident and an unsure token."""
    rollouts = make_rollouts([3], [2, 2], 2)
    return replace(
        rollouts.filled(
            rewards=torch.tensor([1.5, -0.5]), correct=torch.tensor([True, False]),
            token_entropies=torch.tensor([[0.1, 0.9], [0.1, 0.9]]),
            informativeness=torch.zeros(2, 2),
        ),
        old_logprobs=torch.tensor([[0.9, 0.2], [0.9, 0.2]]).log(),
    )  # fmt: skip


def test_the_released_c_is_minus_the_entropy_if_right():
    found = departures.confidence(surely_and_not())
    torch.testing.assert_close(found, torch.tensor([[-0.1, -0.9], [0.1, 0.9]]))


def test_a_confident_token_gains_if_right_and_loses_if_wrong_in_both_rules():
    rollouts = surely_and_not()
    for rule in (iapo, departures._entropy_c, departures._all):
        term = rule(rollouts, 0.0, 1.0) - grpo(rollouts)
        assert term[0, 0] > term[0, 1] and term[1, 0] < term[1, 1]
    ours, theirs = iapo(rollouts, 0.0, 1.0), departures._entropy_c(rollouts, 0.0, 1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_misplaced_entropies_follow_their_description(policy):
    """Computed prefix by prefix, with visible padding and positions of the chunk's end."""
    rollouts = make_rollouts([5, 3], [6, 4], 1, left=1)
    found = departures.misplaced_entropies(policy, rollouts, chunk=3)
    suffix = encode_postfix(policy)
    width, k = rollouts.prompt_ids.shape[1], len(suffix)
    longest = rollouts.completion_ids.shape[1]
    for i, n in enumerate(rollouts.lengths.tolist()):
        prompt, completion = unpadded(rollouts, i)
        pads = width - len(prompt)
        for t in range(n + 1):
            trunk = torch.cat([prompt, completion[:t]])
            ids = torch.cat([rollouts.prompt_ids[i, :pads], trunk])
            real = torch.arange(len(ids)) >= pads
            positions = (real.long().cumsum(0) - 1).clamp(min=0)
            # A chunk's longest prefix ends with its third token, or the batch's last but one.
            end = max(t if t == n and n == longest else 0, min(t // 3 * 3 + 3, longest) - 1)
            with torch.no_grad():
                cache = policy.model(
                    ids[None], attention_mask=real[None].long(), position_ids=positions[None]
                ).past_key_values
                mask = torch.ones(k, len(ids) + k).bool().tril(len(ids))
                logits = policy.model(
                    suffix[None], attention_mask=mask[None, None], past_key_values=cache,
                    position_ids=(len(prompt) + end + torch.arange(k))[None],
                ).logits[0, -1]  # fmt: skip
            p = logits.double().softmax(-1)
            expected = float(-(p * p.log()).sum())
            assert float(found[i, t]) == pytest.approx(expected, abs=2e-3), (i, t)
        assert not found[i, n + 1 :].any()


def test_the_longest_prefix_of_a_chunk_without_padding_is_asked_correctly(policy):
    rollouts = make_rollouts([5], [7], 1)
    found, right = (
        departures.misplaced_entropies(policy, rollouts, 3),
        answer_entropies(policy, rollouts),
    )
    same = [2, 5]  # the last of the first two chunks
    torch.testing.assert_close(found[0, same], right[0, same], atol=2e-3, rtol=0)


def test_misplaced_differs_from_the_definition(policy):
    rollouts = make_rollouts([5, 3], [6, 4], 1)
    right = answer_entropies(policy, rollouts)
    assert (departures.misplaced_entropies(policy, rollouts) - right).abs().max() > 0.05


def test_the_papers_own_rule_has_no_effect(policy, monkeypatch):
    monkeypatch.setattr(departures, "RECIPES", {"same": RECIPES["iapo"]})
    found = departures.effect(policy, 0.4, 0.05, prompts=2, seed=0)["same"]
    assert found["correlation"] == pytest.approx(1.0) and found["sign_flips"] == 0
    assert found["token_term"] == pytest.approx(1.0)


def test_every_departure_has_its_rule_estimate_and_sentence():
    assert departures.RECIPES.keys() == departures.WHAT.keys()
    for name, recipe in departures.RECIPES.items():
        # Everything else is as in IAPO's recipe.
        changed = recipe.rule != "iapo" or recipe.information != "answer_entropy"
        assert changed or name in departures.CHANGES
        assert (
            dataclasses.replace(recipe, rule="iapo", information="answer_entropy")
            == RECIPES["iapo"]
        )
        config.TrainConfig(**departures.CHANGES.get(name, {}))


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
