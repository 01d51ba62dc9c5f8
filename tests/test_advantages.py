"""Token advantages, compared with plain Python loops and the statistics module."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import check, example, norm, plain_grpo, plain_iapo, rollouts

from iapo_mini.advantages import (
    ADVANTAGES,
    exploration,
    group_advantage,
    grpo,
    iapo,
    iapo_ni,
    normalize,
)
from iapo_mini.information import INFORMATION
from iapo_mini.recipes import RECIPES


def test_grpo_by_hand():
    """Two rewards 1.5 and -0.5: mean 0.5, sample deviation sqrt(2)."""
    a = 1 / (math.sqrt(2) + 1e-4)
    b = 1.5 / (1.5 * math.sqrt(2) + 1e-4)
    expected = [[a] * 3 + [0], [-a] * 2 + [0] * 2, [-b] * 4, [b] + [0] * 3]
    torch.testing.assert_close(grpo(example()), torch.tensor(expected))


def test_iapo_by_hand():
    r = example()
    check(iapo(r, 0.0, 0.0), plain_grpo(r))
    check(iapo(r, 1.0, 0.1), plain_iapo(r, 1.0, 0.1))
    # One number computed by hand: row 1, token 0, with s = 0.2, 0.4 and c = -0.2, -0.8.
    s = -0.1 / (0.1 * math.sqrt(2) + 1e-4)
    c = 0.3 / (0.3 * math.sqrt(2) + 1e-4)
    a = -1 / (math.sqrt(2) + 1e-4)
    assert float(iapo(r, 2.0, 0.5)[1, 0]) == pytest.approx(a + 2 * s + 0.5 * c, rel=1e-4)


@settings(max_examples=60)
@given(rollouts(), st.sampled_from([0.0, 1e-4, 0.3, 2.0]), st.sampled_from([0.0, 0.1, 1.0]))
def test_advantages_equal_the_plain_reference(r, alpha, beta):
    check(grpo(r), plain_grpo(r))
    check(iapo(r, alpha, beta), plain_iapo(r, alpha, beta))


@settings(max_examples=60)
@given(rollouts(), st.sampled_from([0.0, 0.1, 1.0]))
def test_without_informativeness_its_term_is_zero(r, beta):
    check(iapo_ni(r, 3.0, beta), plain_iapo(r, 0.0, beta))


@settings(max_examples=60)
@given(rollouts())
def test_without_extra_terms_iapo_is_grpo_to_the_last_bit(r):
    assert torch.equal(iapo(r, 0.0, 0.0), grpo(r))


def test_padding_is_in_no_norm():
    """More columns of padding, with arbitrary numbers in them, change nothing."""
    expected = iapo(example(), 1.0, 1.0)
    for right, junk in [(3, 0.0), (0, 9.0), (2, -9.0)]:
        found = iapo(example(right=right, junk=junk), 1.0, 1.0)
        torch.testing.assert_close(found[:, :4], expected)
        assert not found[:, 4:].any()


def test_equal_rewards_give_no_advantage():
    # 0.1 is not a binary fraction, so its mean is rounded.
    for value in (1.5, -1.5, 0.1):
        found = grpo(example(rewards=[value] * 4))
        assert torch.equal(found, torch.zeros_like(found))


def test_constant_rows_give_no_information_term():
    information = [[0.1] * 3, [0.3] * 2, [-0.7] * 4, [0.7]]
    r = example(informativeness=information)
    assert torch.equal(iapo(r, 5.0, 0.0), grpo(r))


def test_constant_confidence_gives_no_exploration_term():
    r = example(old_probabilities=[[0.3] * 3, [0.7] * 2, [1.0] * 4, [0.1]])
    assert torch.equal(iapo(r, 0.0, 5.0), grpo(r))


def test_single_tokens_get_the_group_advantage_alone():
    r = example(
        lengths=[1] * 4, informativeness=[[2.0], [1.0], [3.0], [0.0]], old_probabilities=[[0.5]] * 4
    )
    found = iapo(r, 3.0, 3.0)
    assert found.isfinite().all()
    assert torch.equal(found, grpo(r))


def test_exploration_is_signed_by_correctness():
    """+pi_old in correct completions, -pi_old in the others, nothing at padding."""
    expected = [
        [0.9, 0.1, 0.5, 0],
        [-0.2, -0.8, 0, 0],
        [-0.5, -0.25, -0.5, -1.0],
        [0.3, 0, 0, 0],
    ]
    torch.testing.assert_close(exploration(example()), torch.tensor(expected))


def test_exploration_reinforces_confidence_when_right_and_punishes_it_when_wrong():
    r = example()
    term = iapo(r, 0.0, 1.0) - grpo(r)
    assert term[0, 0] > term[0, 2] > term[0, 1]  # correct, probabilities 0.9, 0.5, 0.1
    assert term[1, 0] > term[1, 1]  # wrong, probabilities 0.2, 0.8


def test_informative_tokens_get_more():
    r = example()
    term = iapo(r, 1.0, 0.0) - grpo(r)
    assert term[0, 0] > term[0, 1] > term[0, 2]
    # A normalised term moves credit between the tokens of a completion; its sum is 0.
    torch.testing.assert_close(term.sum(1), torch.zeros(4), atol=1e-5, rtol=0)


def test_group_advantage_stays_within_the_group():
    """A third group's rewards do not move the first two."""
    r = example()
    before = group_advantage(r)
    after = group_advantage(r.filled(rewards=torch.tensor([1.5, -0.5, 1.5, -0.5])))
    assert torch.equal(after[:2], before[:2])
    assert not torch.equal(after[2:], before[2:])


@settings(max_examples=60)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=8), st.integers(0, 3))
def test_normalize(values, masked):
    numbers = torch.tensor([*values, *[77] * masked]) / 8
    mask = torch.arange(len(numbers)) < len(values)
    expected = norm([v / 8 for v in values])
    found = normalize(numbers, mask)
    assert found[: len(values)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not found[len(values) :].any()


def test_normalize_of_nothing_is_zero():
    values = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    mask = torch.tensor([[False, False], [True, False]])
    assert torch.equal(normalize(values, mask), torch.zeros(2, 2))


def test_methods_by_name():
    r = example()
    assert torch.equal(ADVANTAGES["grpo"](r, 1.0, 1.0), grpo(r))
    assert torch.equal(ADVANTAGES["iapo"](r, 1.0, 1.0), iapo(r, 1.0, 1.0))
    # GRPO runs must neither need the estimate nor spend time on it.
    r = replace(r, known={name: x for name, x in r.known.items() if name != "informativeness"})
    informed = {name for name, recipe in RECIPES.items() if recipe.information is not None}
    assert informed == {"iapo", "iapo_ne", "iapo_pmi"}
    for name, recipe in RECIPES.items():
        rule = ADVANTAGES[recipe.rule]
        if name in informed:
            assert recipe.information in INFORMATION
            with pytest.raises(ValueError, match="no informativeness yet"):
                rule(r, 1.0, 1.0)
            continue
        found = rule(r, 1.0, 1.0)
        assert found.shape == r.completion_ids.shape and found.dtype == torch.float32
        assert not found[~r.completion_mask].any()


@pytest.mark.parametrize("module", ["advantages", "objective", "rollouts"])
def test_mathematical_modules_import_no_models_and_no_data(module):
    program = f"import sys, iapo_mini.{module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    imported = done.stdout.split()
    assert f"iapo_mini.{module}" in imported, done.stderr
    assert not {"transformers", "peft", "datasets"} & set(imported)
