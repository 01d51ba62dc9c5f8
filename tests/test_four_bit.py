"""LoRA on 4-bit weights, on a CPU, where bitsandbytes also works."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from helpers import (
    WAYS,
    assert_close_in_fp32,
    entropies_by,
    make_rollouts,
    perturb_lora,
    plain_logprobs,
    tiny_policy,
)
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from iapo_mini import devices
from iapo_mini.devices import compute_dtype
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.four_bit import reads_back
from iapo_mini.information import answer_entropies
from iapo_mini.lab.story_model import build_model
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem

IDS = torch.tensor([[5, 17, 300, 42, 8, 99], [3, 1, 4, 1, 5, 9]])
SIZES = dict(prompts=[5, 9], completions=[4, 1, 6, 3], group=2)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def policy(tiny_folder):
    return perturb_lora(load_policy(tiny_folder, lora_rank=4, four_bit=True))


def gradients(policy):
    policy.model.train().zero_grad()
    policy.model(IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in policy.trainable().items()}


def test_every_linear_layer_but_the_head_is_in_nf4_twice_quantised(policy, base_policy):
    base = policy.model.get_base_model()
    quantised = {n for n, m in base.named_modules() if isinstance(m, Linear4bit)}
    linear = {
        f"{n}.base_layer"
        for n, m in base_policy.model.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    assert quantised == linear and len(linear) == 14
    for name in quantised:
        state = base.get_submodule(name).weight.quant_state
        assert state.quant_type == "nf4" and state.nested
    assert policy.dtype == torch.float32
    assert all("lora_" in n for n in policy.trainable()) and len(policy.trainable()) == 28


def test_no_layer_repacks_its_weights_for_inference(policy):
    """bitsandbytes' kernel for CPUs with AVX512-BF16 has no backward pass; it must stay off.

    On a CPU without AVX512-BF16 the flag is always off, and this test checks less.
    """
    layers = [m for m in policy.model.modules() if isinstance(m, Linear4bit)]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)
    before = gradients(policy)
    packed = [m.weight.data.clone() for m in layers]
    logits(policy.model.eval())  # the forward that would repack
    assert all(torch.equal(m.weight.data, w) for m, w in zip(layers, packed))
    after = gradients(policy)
    assert all(torch.equal(g, after[n]) for n, g in before.items())


def test_bitsandbytes_still_has_the_flag_that_is_switched_off():
    """When bitsandbytes removes the flag, we can remove our setting of it."""
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")


def test_train_and_eval_logits_are_equal_and_gradients_repeat(policy):
    assert torch.equal(logits(policy.model.eval()), logits(policy.model.train()))
    one, other = gradients(policy), gradients(policy)
    assert all(torch.equal(g, other[n]) and g.abs().max() > 0 for n, g in one.items())


def test_quantising_costs_what_nf4_costs(policy, base_policy):
    """A weight is off by at most half NF4's widest gap, 0.15 of the block's largest weight."""
    for name, module in policy.model.get_base_model().named_modules():
        if isinstance(module, Linear4bit):
            plain = base_policy.model.get_submodule(name.removesuffix(".base_layer")).weight
            error = (dequantize_module_weight(module) - plain).abs().view(-1, 64)
            largest = plain.detach().abs().view(-1, 64).max(1).values
            assert (error.max(1).values <= 0.16 * largest).all()
            assert error.max() > 0


def test_the_reference_is_the_quantised_base(policy, tiny_folder):
    base = load_policy(tiny_folder, lora_rank=0, four_bit=True)
    with policy.reference() as reference:
        assert torch.equal(logits(reference), logits(base.model))
    assert not torch.allclose(logits(policy.model), logits(base.model), atol=0.1)


def test_the_copy_for_inference_equals_the_adapters_forward(policy):
    for seed in (1, 2):
        plain = policy.for_inference()
        assert not [m for m in plain.modules() if isinstance(m, Linear4bit)]
        assert_close_in_fp32(logits(plain), logits(policy.model))
        perturb_lora(policy, seed=seed)
    assert not torch.allclose(logits(plain), logits(policy.model), atol=0.1)  # until refreshed


def test_merging_leaves_the_quantised_weights_as_they_are(policy):
    parameters = dict(policy.model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    policy.merged()
    for name, p in policy.model.named_parameters():
        assert p is parameters[name] and torch.equal(p, before[name]), name


def test_16_bit_policies_are_not_merged_for_inference(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=4, four_bit=True, dtype=torch.bfloat16)
    assert policy.for_inference() is policy.model


def test_adapters_round_trip_exactly(policy, tiny_folder, tmp_path):
    policy.save(tmp_path / "a")
    loaded = load_policy(tiny_folder, adapter=tmp_path / "a", four_bit=True)
    assert set(loaded.trainable()) == set(policy.trainable())
    assert all(torch.equal(loaded.trainable()[n], p) for n, p in policy.trainable().items())
    assert torch.equal(logits(loaded.model.eval()), logits(policy.model.eval()))


def test_merged_model_saves_and_loads_without_peft_or_bitsandbytes(policy, tmp_path):
    merged = policy.merged("cpu")
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads(
        (tmp_path / "config.json").read_text(encoding="utf-8")
    )
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(merged))
    assert_close_in_fp32(logits(loaded), logits(policy.model.eval()))
    assert loaded.generation_config.eos_token_id == policy.model.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_merging_names_the_weights_as_the_architecture_does(tokenizer, tmp_path, name):
    # Rows in whole blocks of 64 weights, the heads' 4 x 24 of Qwen3 included.
    sizes = {"head_dim": 32} if name == "qwen3" else {}
    sizes |= {"intermediate_size": 128} if name != "gpt2" else {}
    made = tiny_policy(name, tokenizer, **sizes)
    made.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = perturb_lora(load_policy(str(tmp_path), lora_rank=4, four_bit=name != "gpt2"))
    assert_close_in_fp32(logits(policy.merged()), logits(policy.model.eval()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [False, True])
def test_the_estimator_asks_the_quantised_policy(policy, way, kept, monkeypatch):
    """It goes through the adapter's layers, as for a model that is too large to be merged."""
    monkeypatch.setattr(devices, "COPY_LIMIT", 0)
    assert policy.for_inference() is policy.model
    problems = [Problem("1 + 1?", "2"), Problem("How many fingers?", "5")]
    rollouts = sample(policy, problems, num_generations=2, max_completion_length=6, keep_cache=kept)
    if way != "flat":
        rollouts = replace(rollouts, cache=None)
    naive = answer_entropies(policy, rollouts, EarlyExit(way="naive"))
    assert naive.max() > 0.1
    found = entropies_by(way, policy, rollouts)
    torch.testing.assert_close(found, naive, atol=1e-4, rtol=0)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("way", ["flat", "shared", "cached"])
def test_the_estimator_asks_a_bf16_policy(tiny_folder, way, four_bit):
    """bf16 has 8 bits, so the ways differ by up to 0.07 in entropies of up to 4 nats."""
    policy = load_policy(tiny_folder, lora_rank=4, four_bit=four_bit, dtype=torch.bfloat16)
    perturb_lora(policy)
    rollouts = make_rollouts([9, 5], [6, 1, 8, 4], group=2)
    naive = answer_entropies(policy, rollouts, EarlyExit(way="naive"))
    found = entropies_by(way, policy, rollouts)
    assert found.dtype == torch.float32 and naive.max() > 3
    torch.testing.assert_close(found, naive, atol=0.12, rtol=0)
    assert (found - naive).abs().max() > 1e-5  # bf16 it was


def test_logprobs_of_the_quantised_policy(policy):
    rollouts = make_rollouts(**SIZES)
    with torch.no_grad():
        for memory_mb in (512, 0.08):
            found, _ = token_logprobs(policy.model, rollouts, memory_mb=memory_mb)
            plain = plain_logprobs(policy.model, rollouts)
            torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("capable", "dtype"), [(True, torch.bfloat16), (False, torch.float16)], ids=["A100", "T4"]
)
def test_dtype_follows_the_card(monkeypatch, capable, dtype):
    """A T4 emulates bf16, which is many times slower than fp16."""

    def supported(including_emulation=True):
        return including_emulation or capable

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert compute_dtype("cuda") == compute_dtype("cuda:1") == dtype
    assert compute_dtype("cpu") == torch.float32


def test_a_missing_bitsandbytes_is_reported_with_the_remedy(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import fails
    with pytest.raises(ValueError) as caught:
        load_policy(tiny_folder, four_bit=True)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for part in ("four_bit is True", "bitsandbytes", "iapo-mini[four-bit]", "--no-four-bit"):
        assert part in message


def test_a_bitsandbytes_that_does_not_work_is_found_before_the_model_is_read(monkeypatch):
    import bitsandbytes

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA setup failed\ndespite a GPU")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(ValueError, match="CUDA setup failed"):
        load_policy("nobody/no-such-model", four_bit=True)


# Rows that are not a whole number of blocks

REFUSAL = (
    "has a layer with rows of 96 weights, which bitsandbytes reads back wrongly on this processor "
    "unless they are a multiple of 64"
)


@pytest.fixture
def odd_folder(tokenizer, tmp_path):
    """A policy with rows of 96 and 288 weights, which are 1.5 and 4.5 blocks."""
    build_model(tokenizer, seed=0, hidden=96, layers=1).save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    return str(tmp_path / "odd")


def dequantised(packed, state, by_row):
    """NF4 by its definition, with blocks counted along the memory (right) or in each row (wrong).

    bitsandbytes (0.50) is wrong in this way with AVX512, if 16 divides the length of rows.
    """
    levels = state.code[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()]
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    width, at = state.shape[-1], torch.arange(state.shape.numel())
    block = at // 64
    if by_row:
        block = at // width * (width // 64) + at % width // 64
    return (levels[: len(at)] * scales[block]).view(state.shape).to(state.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [16, 48, 80, 96, 288, 1008, 4000])
def test_wrong_dequantisation_is_detected(monkeypatch, length, dtype):
    for by_row in (False, True):
        back = partial(dequantised, by_row=by_row)
        monkeypatch.setattr(functional, "dequantize_4bit", back)
        assert reads_back(length, dtype) is not by_row


def test_policies_with_rows_that_are_read_back_wrongly_are_refused(
    odd_folder, tiny_folder, monkeypatch
):
    """Rows of whole blocks are read rightly, because both ways to count agree there."""
    monkeypatch.setattr(functional, "dequantize_4bit", partial(dequantised, by_row=True))
    with pytest.raises(ValueError) as caught:
        load_policy(odd_folder, four_bit=True)
    assert str(caught.value) == f"four_bit is True, but '{odd_folder}' {REFUSAL}"
    assert reads_back(128, torch.float32)
    load_policy(tiny_folder, four_bit=True)


def test_the_result_of_bitsandbytes_on_this_machine_decides(odd_folder, tmp_path):
    """If it reads such rows rightly, the policy and its gradients equal the dequantised model's.

    Random normal weights then have errors up to 0.46; with the scales of other blocks, up to 1.9.
    """
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    if (functional.dequantize_4bit(packed, state) - weight).abs().max() > 1:
        with pytest.raises(ValueError, match="rows of 96 weights, which bitsandbytes reads back"):
            load_policy(odd_folder, four_bit=True)
        return
    policy = perturb_lora(load_policy(odd_folder, lora_rank=4, four_bit=True))
    # The same adapter on a model with dequantised weights.
    model = load_policy(odd_folder, lora_rank=0).model
    for name, module in policy.model.get_base_model().named_modules():
        if isinstance(module, Linear4bit):
            plain = model.get_submodule(name.removesuffix(".base_layer")).weight
            found = dequantised(module.weight.data, module.weight.quant_state, by_row=False)
            assert (found - plain).abs().max() < 0.16 * plain.abs().max()
            plain.data = found
    model.save_pretrained(tmp_path / "plain")
    policy.tokenizer.save_pretrained(tmp_path / "plain")
    other = perturb_lora(load_policy(str(tmp_path / "plain"), lora_rank=4))
    assert_close_in_fp32(logits(policy.model.eval()), logits(other.model.eval()))
    assert_close_in_fp32(logits(policy.merged()), logits(other.model))
    rollouts = make_rollouts(**SIZES)
    for a, b in zip(*(token_logprobs(p.model, rollouts) for p in (policy, other))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    expected = gradients(other)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)
        assert gradient.any()
