"""Loading, LoRA, the reference policy, the merged copy for inference, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_close_in_fp32, perturb_lora, redraw, tiny_policy
from transformers import AutoModelForCausalLM

from iapo_mini.lab.story_model import build_model
from iapo_mini.policy import Policy, load_policy

IDS = torch.tensor([[5, 17, 300, 42, 8, 99]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def perturbed(lora_policy):
    return perturb_lora(lora_policy)


def copied(folder, target):
    shutil.copytree(folder, target)
    return Path(target)


def refusal(model, **kwargs):
    """The message with which loading is refused: one sentence that names the given value."""
    with pytest.raises(ValueError) as caught:
        load_policy(str(model), **kwargs)
    message = str(caught.value)
    assert "\n" not in message and (" must " in message or message.endswith("."))
    return message


def test_a_folder_loads_to_the_weights_that_were_saved(tiny_folder, base_policy):
    saved = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    assert torch.equal(logits(base_policy.model), logits(saved))
    assert not base_policy.uses_lora
    assert base_policy.tokenizer.padding_side == "left"
    assert base_policy.tokenizer.pad_token_id is not None


def test_full_fine_tuning_trains_everything_and_lora_only_the_adapter(base_policy, lora_policy):
    everything = {n for n, _ in base_policy.model.named_parameters()}
    assert set(base_policy.trainable()) == everything
    assert lora_policy.uses_lora
    assert all("lora_" in n for n in lora_policy.trainable())
    # Both matrices on each of the 7 linear layers of 2 blocks.
    assert len(lora_policy.trainable()) == 2 * 7 * 2
    assert {p.shape[0] for n, p in lora_policy.trainable().items() if "lora_A" in n} == {4}


def test_a_new_adapter_changes_nothing(lora_policy, base_policy):
    assert torch.equal(logits(lora_policy.model.eval()), logits(base_policy.model))


def test_lora_initialisation_follows_the_seed_alone(tiny_folder):
    torch.manual_seed(1)
    one = load_policy(tiny_folder, seed=0).trainable()
    torch.manual_seed(2)
    again, other = load_policy(tiny_folder, seed=0), load_policy(tiny_folder, seed=3)
    assert all(torch.equal(p, again.trainable()[n]) for n, p in one.items())
    assert not all(torch.equal(p, other.trainable()[n]) for n, p in one.items())


def test_lora_alpha_scales_the_adapter(tiny_folder, base_policy):
    policies = [load_policy(tiny_folder, lora_rank=4, lora_alpha=a) for a in (8, None, 0)]
    double, default, none = (logits(perturb_lora(p).model.eval()) for p in policies)
    assert torch.equal(double, default)
    assert not torch.allclose(double, none, atol=0.1)
    assert torch.equal(none, logits(base_policy.model))


def test_reference_is_the_base_with_the_adapter_off(perturbed, base_policy):
    adapted = logits(perturbed.model.eval())
    base = logits(base_policy.model)
    assert not torch.allclose(adapted, base, atol=0.1)
    with perturbed.reference() as reference:
        assert torch.equal(logits(reference), base)
    # Afterwards the adapter is on again.
    assert torch.equal(logits(perturbed.model), adapted)


def test_the_reference_can_be_a_trained_adapter(perturbed):
    """As after `calibrate`, or when training continues from an adapter."""
    start = logits(perturbed.model.eval())
    perturbed.keep_reference()
    perturb_lora(perturbed, seed=2)
    changed = logits(perturbed.model)
    assert not torch.allclose(changed, start, atol=0.1)
    with pytest.raises(KeyError), perturbed.reference() as reference:
        assert torch.equal(logits(reference), start)
        raise KeyError  # whatever happens meanwhile, the policy gets its own weights back
    assert torch.equal(logits(perturbed.model), changed)


def test_a_new_adapter_needs_no_copy_for_the_reference(lora_policy, base_policy):
    lora_policy.keep_reference()
    assert not lora_policy.start
    with pytest.raises(ValueError, match="keep_reference=True"):
        base_policy.keep_reference()


def test_the_reference_of_full_fine_tuning_can_be_the_present_weights(tiny_folder):
    """As when a policy is trained twice: the second run starts where the first ended."""
    policy = load_policy(tiny_folder, lora_rank=0, keep_reference=True)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.mul_(1.1)
    policy.keep_reference()
    with policy.reference() as reference:
        assert reference is not policy.model
        assert torch.equal(logits(reference), logits(policy.model))


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_of_a_completion(tiny_folder, tmp_path):
    """As those of GPT-2 and Llama are published."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    kept["pad_token"] = None
    settings.write_text(json.dumps(kept), encoding="utf-8")
    policy = load_policy(str(tmp_path / "model"))
    assert policy.tokenizer.pad_token == policy.tokenizer.eos_token


def test_reference_of_full_fine_tuning_is_a_frozen_copy(tiny_folder, base_policy):
    policy = load_policy(tiny_folder, lora_rank=0, keep_reference=True)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.mul_(1.1)
    base = logits(base_policy.model)
    assert not torch.allclose(logits(policy.model), base, atol=0.1)
    with policy.reference() as reference:
        assert torch.equal(logits(reference), base)
        assert not any(p.requires_grad for p in reference.parameters())


def test_a_missing_reference_is_refused(base_policy):
    with pytest.raises(ValueError, match="keep_reference=True"), base_policy.reference():
        pass


def test_inference_equals_the_adapters_forward_and_follows_its_weights(perturbed):
    """The merged copy must be refreshed, or sampling would use the last step's policy."""
    before = logits(perturbed.for_inference())
    assert_close_in_fp32(before, logits(perturbed.model))
    perturb_lora(perturbed, seed=2)
    after = logits(perturbed.for_inference())
    assert_close_in_fp32(after, logits(perturbed.model))
    assert not torch.allclose(before, after, atol=0.1)


def test_the_merged_copy_is_made_again_only_when_the_adapter_has_changed(perturbed, monkeypatch):
    made, merge = [], Policy.merged_weights

    def counted(self, **how):
        made.append(how)
        return merge(self, **how)

    monkeypatch.setattr(Policy, "merged_weights", counted)
    perturbed.for_inference()
    count = len(made)
    assert perturbed.for_inference() is perturbed.for_inference()
    assert len(made) == count
    layer = next(m for m in perturbed.model.modules() if hasattr(m, "get_delta_weight"))
    b = layer.lora_B["default"].weight

    def by_scale():
        layer.scaling["default"] *= 2

    def unseen_by_autograd():
        b.data.mul_(1.5)

    def of_one_number():
        with torch.no_grad():
            b.view(-1)[-1] += 0.5

    for change in (by_scale, unseen_by_autograd, of_one_number):
        before = logits(perturbed.for_inference())
        change()
        after = logits(perturbed.for_inference())
        assert_close_in_fp32(after, logits(perturbed.model))
        assert not torch.equal(before, after)
    perturbed.keep_reference()
    with torch.no_grad():
        b.mul_(0)
    own = logits(perturbed.for_inference())
    with perturbed.reference() as reference:
        assert_close_in_fp32(logits(perturbed.for_inference()), logits(reference))
    assert torch.equal(logits(perturbed.for_inference()), own)


def test_inference_leaves_the_policy_as_it_was(perturbed):
    weights = {n: p.clone() for n, p in perturbed.model.named_parameters()}
    merged = perturbed.for_inference()
    assert not merged.training and not any(p.requires_grad for p in merged.parameters())
    for name, p in perturbed.model.named_parameters():
        assert torch.equal(p, weights[name]), name
    assert perturbed.trainable()


def test_inference_without_lora_is_the_model_itself(base_policy):
    assert base_policy.for_inference() is base_policy.model


def test_adapter_round_trip_is_exact(perturbed, tiny_folder, tmp_path):
    perturbed.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    loaded = load_policy(tiny_folder, adapter=tmp_path / "adapter")
    assert set(loaded.trainable()) == set(perturbed.trainable())
    for name, p in perturbed.trainable().items():
        assert torch.equal(loaded.trainable()[name], p), name
    assert torch.equal(logits(loaded.model.eval()), logits(perturbed.model.eval()))


def test_full_model_round_trip_is_exact(tiny_folder, tmp_path):
    policy = load_policy(tiny_folder, lora_rank=0)
    redraw(policy.model, seed=5)
    policy.save(tmp_path / "full")
    loaded = load_policy(str(tmp_path / "full"), lora_rank=0)
    assert torch.equal(logits(loaded.model), logits(policy.model))
    text = "<think> Mia has 12 apples.</think>"
    assert loaded.tokenizer.encode(text) == policy.tokenizer.encode(text)


def test_stop_tokens_are_the_end_of_a_turn_and_those_of_the_generation_config(lora_policy):
    eos = lora_policy.tokenizer.eos_token_id
    assert lora_policy.eos_ids.tolist() == [eos]
    lora_policy.model.generation_config.eos_token_id = [3, eos]
    assert lora_policy.eos_ids.tolist() == [eos, 3]
    lora_policy.model.generation_config.eos_token_id = None
    assert lora_policy.eos_ids.tolist() == [eos]


def test_a_folder_that_is_missing_is_refused(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert f"got '{tmp_path / 'nowhere'}'" in message and "config.json" in message


def test_a_relative_folder_that_is_missing_is_refused():
    assert "model must be 'embedded', a folder" in refusal("./nowhere")


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert "config.json" in refusal(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "model must be" in refusal(tmp_path / "file")


def test_a_folder_without_weights_is_refused(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(folder)


def test_pickled_weights_are_never_read(tiny_folder, tmp_path):
    """Unpickling runs code from the file, so even a valid pickle is refused."""
    folder = copied(tiny_folder, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    message = refusal(folder)
    assert str(folder) in message and "pickled weights are never loaded" in message


def test_truncated_weights_are_refused(tiny_folder, tmp_path):
    """A broken download or a full disk can leave such files."""
    folder = copied(tiny_folder, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    assert f"got '{folder}'" in refusal(folder)


def test_a_broken_config_is_refused(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "qwen2",', encoding="utf-8")
    assert f"'{folder}', whose config.json is damaged" in refusal(folder)


def test_a_model_that_is_not_a_causal_lm_is_refused(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    assert f"got '{folder}'" in refusal(folder)


def test_an_unknown_hub_id_is_refused():
    assert "got 'nobody/no-such-model'" in refusal("nobody/no-such-model")


def test_a_missing_adapter_is_refused(tiny_folder, tmp_path):
    message = refusal(tiny_folder, adapter=tmp_path / "none")
    assert f"got '{tmp_path / 'none'}'" in message
    assert "adapter_model.safetensors" in message


def test_a_pickled_adapter_is_refused(tiny_folder, perturbed, tmp_path):
    perturbed.save(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "a" / "adapter_model.bin")
    assert "adapter must be" in refusal(tiny_folder, adapter=tmp_path / "a")


def test_an_adapter_without_config_is_refused(tiny_folder, perturbed, tmp_path):
    perturbed.save(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert f"got '{tmp_path / 'a'}'" in refusal(tiny_folder, adapter=tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(tokenizer, perturbed, tmp_path):
    perturbed.save(tmp_path / "a")
    build_model(tokenizer, seed=0, hidden=32, layers=2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert "adapter '" in refusal(tmp_path / "other", adapter=tmp_path / "a")


@pytest.mark.parametrize("rank", [-1, -8])
def test_a_negative_rank_is_refused(tiny_folder, rank):
    assert f"lora_rank must be at least 0, got {rank}" in refusal(tiny_folder, lora_rank=rank)


@pytest.mark.parametrize(
    ("name", "dropout"),
    [("gpt2", {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}),
     ("qwen2", {"attention_dropout": 0.2}), ("opt", {"dropout": 0.2, "attention_dropout": 0.2})],
)  # fmt: skip
def test_a_loaded_model_has_no_dropout(name, dropout, tokenizer, tmp_path):
    saved = tiny_policy(name, tokenizer, **dropout)
    saved.save(tmp_path / "model")
    model = load_policy(str(tmp_path / "model"), lora_rank=4).model.train()
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(model.eval()))


def test_a_loaded_adapter_has_no_dropout(perturbed, tiny_folder, tmp_path):
    perturbed.save(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"lora_dropout": 0.3}), encoding="utf-8")
    model = load_policy(tiny_folder, adapter=tmp_path / "adapter").model.train()
    assert torch.equal(logits(model), logits(model.eval()))
