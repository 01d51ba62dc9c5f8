"""The length penalty as an option: the same terms as its own methods, for every method it fits."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import metrics, run, weights
from scored import check, plain_grpo, plain_iapo, scored

from iapo_mini import advantages
from iapo_mini.advantages import ADVANTAGES, grpo, iapo, length_penalised
from iapo_mini.cli import main
from iapo_mini.config import TrainConfig
from iapo_mini.config_file import read_settings
from iapo_mini.recipes import LENGTH_PENALTIES, NO_LENGTH_PENALTY, RECIPES, Recipe

FITS = [m for m, recipe in RECIPES.items() if recipe.rule not in NO_LENGTH_PENALTY]


@pytest.fixture
def three_right():
    """A group of four: three right completions of lengths 3, 2 and 1, and a wrong one of 4."""
    return scored(
        [3, 2, 4, 1], 4, [1.5, 1.5, -0.5, 1.5],
        [[1.0, 0.0, -0.5], [0.2, 0.4], [0.0, 0.0, 0.0, 2.0], [0.7]],
        [[0.9, 0.1, 0.5], [0.2, 0.8], [0.5, 0.25, 0.5, 1.0], [0.3]],
    )  # fmt: skip


def test_kimi_pays_by_hand(three_right):
    # Half for the shortest, minus half for the longest; a wrong completion gets no bonus.
    paid = length_penalised(three_right, "kimi", 0.6).rewards
    expected = [1.5 + 0.6 * (0.5 - 2 / 3), 1.5 + 0.6 * (0.5 - 1 / 3), -0.5 - 0.3, 1.5 + 0.3]
    assert paid.tolist() == pytest.approx(expected)


def test_efficient_pays_by_hand(three_right):
    # Right lengths 3, 2, 1 have mean 2 and deviation 1; the wrong completion loses nothing.
    paid = length_penalised(three_right, "efficient", 0.4).rewards
    loss = torch.sigmoid(torch.tensor([1.0, 0.0, -1.0]) / (1 + advantages.EPS)).tolist()
    expected = [1.5 - 0.4 * loss[0], 1.5 - 0.4 * loss[1], -0.5, 1.5 - 0.4 * loss[2]]
    assert paid.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_token_terms_of_iapo_stay(three_right):
    paid = length_penalised(three_right, "kimi", 0.5)
    check(iapo(paid, 0.2, 0.05), plain_iapo(paid, 0.2, 0.05))
    check(grpo(paid), plain_grpo(paid))


@pytest.mark.parametrize("form", LENGTH_PENALTIES)
@pytest.mark.parametrize("method", FITS)
def test_it_changes_the_advantages_of_every_method_that_may_have_it(method, form, three_right):
    recipe = TrainConfig(method=method, length_penalty=form).recipe()
    before, after = (
        ADVANTAGES[recipe.rule](r, recipe.alpha, recipe.beta)
        for r in (three_right, length_penalised(three_right, form, 0.5))
    )
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("form", LENGTH_PENALTIES)
@pytest.mark.parametrize("method", sorted(set(RECIPES) - set(FITS)))
def test_other_methods_are_refused_with_the_reason(method, form, three_right):
    why = "(does not use the rewards|has a length penalty)"
    sentence = f"length_penalty must be 'none' with method '{method}', which {why}.*got '{form}'"
    with pytest.raises(ValueError, match=sentence) as told:
        TrainConfig(method=method, length_penalty=form)
    assert "\n" not in str(told.value)


def test_a_rule_without_use_for_rewards_is_unchanged_by_it(three_right):
    gtpo = ADVANTAGES["gtpo"]
    assert torch.equal(gtpo(three_right), gtpo(length_penalised(three_right, "kimi", 0.5)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"length_penalty": "kimmi"}, "length_penalty must be one of none, kimi, efficient.*kimi"),
        ({"length_penalty_weight": 0.5}, "one of kimi, efficient with length_penalty_weight 0.5"),
        ({"length_penalty": "kimi", "length_penalty_weight": 0.0}, "length_penalty_weight must"),
        ({"length_penalty": "kimi", "length_penalty_weight": -1.0}, "must be above 0"),
    ],
)
def test_bad_values_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**wrong)


def test_the_default_weight_is_that_of_the_methods():
    for form in ("kimi", "efficient"):
        weight = TrainConfig(length_penalty=form).penalty_weight()
        assert weight == RECIPES[f"grpo_{form}"].alpha
    given = TrainConfig(length_penalty="kimi", length_penalty_weight=0.3)
    assert given.penalty_weight() == 0.3 and TrainConfig().penalty_weight() == 0
    assert set(LENGTH_PENALTIES) == set(advantages.LENGTH_PENALTIES)


@pytest.mark.parametrize("form", LENGTH_PENALTIES)
def test_grpo_with_it_is_the_method_of_the_same_name(config, tmp_path, form):
    config = replace(config, num_generations=4)
    run(replace(config, method="grpo", length_penalty=form), tmp_path / "option")
    run(replace(config, method=f"grpo_{form}"), tmp_path / "method")
    assert metrics(tmp_path / "option") == metrics(tmp_path / "method")
    assert weights(tmp_path / "option") == weights(tmp_path / "method")


def test_a_rule_of_ones_own_gets_the_penalised_rewards(config, tmp_path, monkeypatch):
    seen = []

    def own(rollouts, alpha, beta):
        seen.append(rollouts.rewards)
        return grpo(rollouts)

    monkeypatch.setitem(RECIPES, "own", Recipe(own, alpha=0.0, beta=0.0))
    config = replace(config, method="own", max_steps=1, num_generations=4)
    run(config, tmp_path / "plain")
    run(replace(config, length_penalty="kimi"), tmp_path / "penalised")
    plain, penalised = seen
    assert not torch.equal(plain, penalised)
    # The log keeps the reward of format and answer, so runs can be compared.
    assert metrics(tmp_path / "penalised")[0]["reward"] == pytest.approx(float(plain.mean()))


def test_command_line_and_settings_file(tmp_path, config, capsys):
    file = tmp_path / "run.yaml"
    text = "method: grpo\nlength_penalty: efficient\nlength_penalty_weight: 2e-1\n"
    file.write_text(text, encoding="utf-8")
    assert TrainConfig(**read_settings(file)).penalty_weight() == 0.2
    small = ["--model", config.model, "--max-steps", "1", "--prompts-per-step", "1",
             "--num-generations", "2", "--max-completion-length", "8"]  # fmt: skip
    main(["train", "--config", str(file), "--length-penalty-weight", "0.3", "--out",
          str(tmp_path / "run"), *small])  # fmt: skip
    kept = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (kept["length_penalty"], kept["length_penalty_weight"]) == ("efficient", 0.3)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--method", "gtpo", "--length-penalty", "kimi", "--out",
              str(tmp_path / "other")])  # fmt: skip
    assert ended.value.code == 2 and not (tmp_path / "other").exists()
    assert capsys.readouterr().err.startswith("iapo-mini: length_penalty must be 'none'")
