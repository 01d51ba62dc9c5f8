"""Weights that do not fit the architecture are refused: transformers would draw new ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from iapo_mini.policy import load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def change(folder, how):
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda w: w.pop(NAME), f"lacks the weight '{NAME}'"),
        (lambda w: w.update({NAME: torch.zeros(3, 3)}), f"in another shape the weight '{NAME}'"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(3)}), "'model.extra.weight'"),
        (
            lambda w: [w.pop(n) for n in list(w) if "layers.0" in n],
            "lacks the weight 'model.layers.0.input_layernorm.weight' and 11 more",
        ),
    ],
    ids=["missing", "shape", "unexpected", "a whole layer"],
)
def test_a_tensor_that_does_not_fit_is_named(folder, how, named, four_bit):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    change(folder, how)
    with pytest.raises(ValueError, match=r"model is '.*'") as refused:
        load_policy(str(folder), four_bit=four_bit)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    told = json.loads((folder / "tokenizer.json").read_text())
    last = max(t["id"] for t in told["added_tokens"])
    for n in range(1, 200):
        told["added_tokens"].append(
            {**told["added_tokens"][-1], "id": last + n, "content": f"<more {n}>"}
        )
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="a tokenizer that fits its embedding"):
        load_policy(str(folder))


def test_a_whole_model_loads(folder):
    policy = load_policy(str(folder), lora_rank=0)
    rollouts = sample(policy, [Problem("1 + 1?", "2")], max_completion_length=3)
    assert len(rollouts.lengths) == 8


def test_an_adapter_given_as_a_model_says_what_to_say_instead(tiny_folder, tmp_path):
    load_policy(tiny_folder, lora_rank=2).save(tmp_path / "final")
    with pytest.raises(ValueError, match=r"which is an adapter; say --adapter '.*final'"):
        load_policy(str(tmp_path / "final"))
