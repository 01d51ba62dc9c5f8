"""Adapters: their base is found and checked, and a merge gives the same model."""

import json
import os
import shutil
import subprocess
import sys

import peft.import_utils
import pytest
import torch
from helpers import PATIENCE, perturb_lora, redraw, tiny_policy
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from iapo_mini.adapters import (
    base_of,
    base_weights,
    check_merge,
    is_plain_lora,
    some_weights,
)
from iapo_mini.cli import main
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import Policy, load_policy

IDS = torch.tensor([[5, 9, 2, 300, 41, 7]])

# Kinds of adapters besides the plain one that people train with peft.
KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "saved module": {"modules_to_save": ["lm_head"]},
    "token indices": {"trainable_token_indices": [5, 9]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


def trained(kind, tokenizer, **changes):
    """A policy with an adapter of this kind in which every trained weight has changed."""
    base = tiny_policy("qwen2", tokenizer, tie_word_embeddings=False, **changes).model
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], **KINDS[kind]}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Policy(model.eval(), tokenizer, name="made here")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_equals_model_and_adapter_for_every_kind(kind, tokenizer):
    policy = trained(kind, tokenizer)
    with torch.no_grad():
        expected = policy.model(IDS).logits
        with policy.model.disable_adapter():
            assert (policy.model(IDS).logits - expected).abs().max() > 0.1  # it matters
        merged = policy.merged()
        assert not hasattr(merged, "peft_config") or not merged.peft_config
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(policy.model(IDS).logits, expected)  # untouched itself
        sampled_from = policy.for_inference()
        torch.testing.assert_close(sampled_from(IDS).logits, expected, atol=1e-3, rtol=1e-4)
    weights = dict(policy.merged_weights())
    plain = merged.state_dict()
    assert weights.keys() >= {n for n in plain if "rotary" not in n} - {"lm_head.weight"}
    for name, value in weights.items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-5)


def test_only_products_on_linear_layers_are_plain(tokenizer):
    plain = {kind for kind in KINDS if is_plain_lora(trained(kind, tokenizer).model)}
    assert plain == {"plain", "rank-stabilised", "head", "some layers"}


@pytest.mark.parametrize("kind", [LoHaConfig, IA3Config])
def test_an_adapter_of_another_family_is_sampled_from_and_kept(kind, tokenizer):
    base = tiny_policy("qwen2", tokenizer)
    before = set(base_weights(base.model))
    settings = {"feedforward_modules": []} if kind is IA3Config else {}
    model = get_peft_model(
        base.model, kind(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    )
    policy = Policy(redraw(model).eval(), tokenizer)
    with torch.no_grad():
        start = policy.model(IDS).logits
        torch.testing.assert_close(policy.for_inference()(IDS).logits, start, atol=1e-3, rtol=1e-4)
        policy.keep_reference()
        for parameter in policy.trainable().values():
            parameter.mul_(2)
        assert (policy.model(IDS).logits - start).abs().max() > 1e-3
        with policy.reference() as reference:
            torch.testing.assert_close(reference(IDS).logits, start)
    assert set(base_weights(policy.model)) == before


def test_an_adapter_on_a_head_that_is_the_embedding_too_does_not_change_the_embedding(tokenizer):
    """The first copy is made while the adapter adds zero, and is refreshed after an update."""
    base = tiny_policy("qwen2", tokenizer, tie_word_embeddings=True).model
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"]))
    policy = Policy(model.eval(), tokenizer)
    policy.for_inference()
    perturb_lora(policy)
    with torch.no_grad():
        expected = policy.model(IDS).logits
        torch.testing.assert_close(policy.for_inference()(IDS).logits, expected)


def test_a_merge_that_is_another_model_is_refused(tokenizer):
    policy = trained("plain", tokenizer)
    merged = policy.merged()
    check_merge(policy.model, merged, torch.float32)
    with torch.no_grad():
        merged.get_output_embeddings().weight[7] *= 1.1
    with pytest.raises(ValueError, match=r"merged model's logits differ by .* can't be merged"):
        check_merge(policy.model, merged, torch.float32)


def test_a_kind_that_can_not_be_merged_is_refused_but_works_unmerged(tokenizer):
    policy = trained("bias of B", tokenizer)
    base = tiny_policy("qwen2", tokenizer).model
    config = LoraConfig(r=4, target_modules=["down_proj"], lora_bias=True, task_type="CAUSAL_LM")
    policy = Policy(get_peft_model(base, config), tokenizer)
    with pytest.raises(ValueError, match=r"adapter can't be merged into its model \(.*\); use it"):
        policy.merged()
    assert policy.for_inference() is policy.model


@pytest.mark.parametrize("kind", ["plain", "DoRA", "saved module", "token indices", "embedding"])
def test_an_exported_model_equals_the_policy(kind, tokenizer, tmp_path, capsys):
    policy = trained(kind, tokenizer)
    base = tmp_path / "base"
    policy.model.get_base_model()
    plain = tiny_policy("qwen2", tokenizer, tie_word_embeddings=False)
    plain.model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    policy.name = str(base)
    policy.save(tmp_path / "adapter")
    main(["export", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    found = load_policy(str(tmp_path / "merged"), lora_rank=0)
    with torch.no_grad():
        torch.testing.assert_close(
            found.model(IDS).logits, policy.model(IDS).logits, atol=1e-3, rtol=1e-4
        )


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    policy = load_policy(tiny_folder, lora_rank=4)
    policy.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_finds_its_base(adapter, tiny_folder):
    assert base_of(adapter) == {"model": tiny_folder}
    policy = load_policy(adapter=adapter)
    assert policy.name == tiny_folder and isinstance(policy.model, PeftModel)


def test_an_adapter_of_the_embedded_policy_names_it_and_no_folder_of_this_machine(tmp_path):
    load_policy(lora_rank=2).save(tmp_path)
    assert base_of(tmp_path) == {"model": EMBEDDED}
    assert json.loads((tmp_path / "base.json").read_text(encoding="utf-8"))["model"] == EMBEDDED


def test_another_base_is_refused(adapter, tiny_folder, tmp_path):
    """This holds also under the same path and with equal shapes."""
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({n: w + 0.01 for n, w in weights.items()}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"was trained on, .*other weights"):
        load_policy(str(other), adapter=adapter)
    load_policy(tiny_folder, adapter=adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same(adapter, tiny_folder, dtype):
    load_policy(tiny_folder, adapter=adapter, dtype=dtype)


def test_the_same_base_in_4_bits_is_the_same(adapter, tiny_folder):
    pytest.importorskip("bitsandbytes")
    load_policy(tiny_folder, adapter=adapter, four_bit=True)


def test_the_base_of_a_foreign_adapter_is_found_by_pefts_entry(adapter, tiny_folder):
    """Without base.json the weights are not known, so no model is refused."""
    (adapter / "base.json").unlink()
    assert base_of(adapter) == {"model": tiny_folder}
    load_policy(adapter=adapter)


@pytest.mark.parametrize("name", ["base.json", "adapter_config.json"])
def test_a_damaged_file_about_the_base_is_named(adapter, tiny_folder, name):
    (adapter / "base.json").unlink()
    (adapter / name).write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}"):
        load_policy(adapter=adapter)
    with pytest.raises(ValueError, match=r"base.json' can't be used|adapter must be "):
        load_policy(tiny_folder, adapter=adapter)


def test_some_weights_distinguish_models(tokenizer):
    one, other = (tiny_policy("qwen2", tokenizer).model for _ in range(2))
    assert some_weights(one) == some_weights(other) and len(some_weights(one)) > 20
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    assert some_weights(one) != some_weights(other)


BESIDE_OLD_TORCHAO = """
import importlib.metadata, torch
from iapo_mini.policy import load_policy

assert importlib.metadata.version("torchao") == "0.10.0"
policy = load_policy(lora_rank=4)
policy.save("adapter")
ids = torch.tensor([[5, 9, 2]])
again = load_policy(adapter="adapter")
assert torch.equal(policy.model(ids).logits, again.model(ids).logits)
again.model(ids).logits.sum().backward()
again.merged()
"""


def test_lora_works_beside_a_torchao_that_peft_refuses(tmp_path):
    """Colab has such a torchao. It is never imported; the one in this test is empty."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("", encoding="utf-8")
    facts = tmp_path / "torchao-0.10.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_OLD_TORCHAO], cwd=tmp_path, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_peft_itself_refuses_an_old_torchao(monkeypatch):
    """This is the reason for the guard. When this test fails, the guard can be removed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("peft.import_utils.importlib_metadata.version", lambda name: "0.10.0")
    with pytest.raises(ImportError, match="incompatible version of torchao"):
        peft.import_utils.is_torchao_available.__wrapped__()  # past its cache
