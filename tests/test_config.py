"""Settings: recipes of methods, given values that replace them, and wrong values."""

import dataclasses
import json

import pytest
import torch
from helpers import make_rollouts, run

from iapo_mini import config, objective
from iapo_mini.advantages import ADVANTAGES, COUNTED
from iapo_mini.config import CARDS, TrainConfig, with_defaults
from iapo_mini.engines.vllm import sampler_of
from iapo_mini.information import INFORMATION
from iapo_mini.recipes import FROM_RECIPE, RECIPES
from iapo_mini.rewards import JUDGES

# Settings in the source of each method: mean of the loss, clip range below and above, weights.
SOURCES = {
    "grpo": ("sequence", 0.2, 0.2, 0.0, 0.0),
    "dapo": ("token", 0.2, 0.28, 0.0, 0.0),
    "gfpo": ("token", 0.2, 0.2, 0.75, 0.0),
    "gtpo": ("token", 0.2, 0.28, 0.1, 0.0),
    "gtpo_iapo": ("token", 0.2, 0.2, 0.1, 0.0),
    "sgrpo": ("sequence", 0.2, 0.2, 1.0, 0.0),
    "iapo": ("token", 0.2, 0.28, 0.2, 0.05),
    "iapo_ni": ("token", 0.2, 0.28, 0.0, 0.05),
    "iapo_ne": ("token", 0.2, 0.28, 0.2, 0.05),
    "iapo_pmi": ("token", 0.2, 0.28, 0.2, 0.05),
    "grpo_kimi": ("sequence", 0.2, 0.2, 0.5, 0.0),
    "grpo_efficient": ("sequence", 0.2, 0.2, 0.4, 0.0),
}


@pytest.mark.parametrize("method", RECIPES)
def test_training_with_defaults_uses_what_the_methods_source_uses(
    method, monkeypatch, config, tmp_path
):
    """Checked at the two places that use them: the weights of the rule, and the loss."""
    aggregation, low, high, alpha, beta = SOURCES[method]
    seen, rule = [], RECIPES[method].rule
    plain, loss = ADVANTAGES[rule], objective.policy_loss

    def weigh(rollouts, *weights):
        seen.append(weights)
        return plain(rollouts, *weights)

    def lose(*args, **kwargs):
        seen.append((kwargs["aggregation"], kwargs["epsilon"], kwargs["epsilon_high"]))
        return loss(*args, **kwargs)

    monkeypatch.setitem(ADVANTAGES, rule, weigh)
    monkeypatch.setattr("iapo_mini.trainer.policy_loss", lose)
    run(dataclasses.replace(config, method=method, max_steps=1), tmp_path / "run")
    assert set(seen) == {(alpha, beta), (aggregation, low, high)}
    saved = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (saved["aggregation"], saved["epsilon"], saved["epsilon_high"]) == (
        aggregation,
        low,
        high,
    )
    assert (saved["alpha"], saved["beta"]) == (alpha, beta)
    assert saved["from_recipe"] == list(FROM_RECIPE)


def test_every_recipe_names_a_rule_an_information_and_its_source():
    assert RECIPES.keys() == SOURCES.keys()
    for recipe in RECIPES.values():
        assert recipe.rule in ADVANTAGES and recipe.information in (None, *INFORMATION)
        assert recipe.counted in (None, *COUNTED)
        assert recipe.label and recipe.what and recipe.source


@pytest.mark.parametrize("method", RECIPES)
def test_what_is_given_comes_before_the_recipe(method):
    given = {"alpha": 0.7, "beta": 0.6, "aggregation": "token", "epsilon": 0.11,
             "epsilon_high": 0.33, "kl_coef": 0.5}  # fmt: skip
    for name, value in given.items():
        settings = TrainConfig(method=method, **{name: value}).settings()
        assert settings[name] == value
        others = set(FROM_RECIPE) - {name, "epsilon_high"}
        assert all(settings[n] == getattr(RECIPES[method], n) for n in others)
        assert set(TrainConfig(method=method, **{name: value}).from_recipe()) == (
            set(FROM_RECIPE) - {name}
        )


def test_a_symmetric_clip_range_stays_symmetric():
    assert TrainConfig(method="grpo", epsilon=0.1).recipe().epsilon_high == 0.1
    assert TrainConfig(method="dapo", epsilon=0.1).recipe().epsilon_high == 0.28


def test_another_method_brings_its_own_settings():
    """A field that was not given comes from the recipe, also after ``replace``."""
    changed = dataclasses.replace(TrainConfig(method="dapo"), method="gtpo")
    assert changed.settings() == TrainConfig(method="gtpo").settings()


@pytest.mark.parametrize("method", RECIPES)
def test_settings_that_were_saved_can_be_given_again(method):
    saved = json.loads(json.dumps(TrainConfig(method=method).settings() | {"from_recipe": []}))
    assert with_defaults(saved) == TrainConfig(method=method).settings()
    again = TrainConfig(**with_defaults(saved))
    assert again.settings() == TrainConfig(method=method).settings()


def test_settings_from_before_a_field_existed_are_completed():
    saved = TrainConfig(method="dapo").settings()
    del saved["engine"], saved["aggregation"]
    assert with_defaults(saved) == TrainConfig(method="dapo").settings()


def test_choices_are_those_of_the_modules_that_use_them():
    """They are listed twice, because settings must not import torch."""
    assert config_choices() == (objective.AGGREGATIONS, ("native", "vllm"), tuple(JUDGES))
    mask = make_rollouts([3], [2, 1], group=2).completion_mask
    for how in config.AGGREGATIONS:
        assert objective.aggregate(mask.float(), mask, how) == pytest.approx(1.0)
    assert all(sampler_of("native", "embedded") for _ in config.ENGINES)
    assert torch.is_tensor(mask)


def config_choices():
    return config.AGGREGATIONS, config.ENGINES, config.REWARDS


@pytest.mark.parametrize("card", CARDS)
def test_settings_of_a_card_are_valid(card):
    assert TrainConfig(**CARDS[card]).four_bit
