"""LoRA on 4-bit weights: trained for real on a CPU, where bitsandbytes runs as well."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

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

from iapo_mini import policy as policy_module
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.information import answer_entropies
from iapo_mini.lab.pretrain import build_model
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import compute_dtype, load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem
from iapo_mini.trainer import train

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

    Where the CPU lacks it the flag is off anyway, and this looks at less.
    """
    layers = [m for m in policy.model.modules() if isinstance(m, Linear4bit)]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)
    before = gradients(policy)
    packed = [m.weight.data.clone() for m in layers]
    logits(policy.model.eval())  # the forward that would repack
    assert all(torch.equal(m.weight.data, w) for m, w in zip(layers, packed))
    after = gradients(policy)
    assert all(torch.equal(g, after[n]) for n, g in before.items())


def test_the_repacking_is_still_there_to_be_kept_off():
    """When bitsandbytes drops the flag, so can we."""
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")


def test_train_and_eval_logits_are_equal_and_gradients_repeat(policy):
    assert torch.equal(logits(policy.model.eval()), logits(policy.model.train()))
    one, other = gradients(policy), gradients(policy)
    assert all(torch.equal(g, other[n]) and g.abs().max() > 0 for n, g in one.items())


def test_quantising_costs_what_nf4_costs(policy, base_policy):
    """A weight is off by at most half the widest gap of NF4, 0.15 of the largest of its block."""
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
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
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


def test_export_of_a_run(tmp_path, schooled_folder):
    config = TrainConfig(
        model=schooled_folder, four_bit=True, max_steps=2, prompts_per_step=2, num_generations=2,
        max_completion_length=8, lora_rank=4, learning_rate=0.05, warmup_steps=0, threads=1,
    )  # fmt: skip
    trained = train(config, tmp_path / "run", progress=False)
    command = [sys.executable, "-m", "iapo_mini", "export", "--adapter", tmp_path / "run/final"]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = load_policy(str(tmp_path / "out"), lora_rank=0)
    assert_close_in_fp32(logits(loaded.model), logits(trained.model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [False, True])
def test_the_estimator_asks_the_quantised_policy(policy, way, kept, monkeypatch):
    """Through the adapter layer by layer, as for a model too large to be merged."""
    monkeypatch.setattr(policy_module, "_MERGED_COPY_LIMIT", 0)
    assert policy.for_inference() is policy.model
    problems = [Problem("1 + 1?", "2"), Problem("How many fingers?", "5")]
    rollouts = sample(policy, problems, num_generations=2, max_completion_length=6, keep_cache=kept)
    rollouts.cache = rollouts.cache if way == "flat" else None
    naive = answer_entropies(policy, rollouts, method="naive")
    assert naive.max() > 0.1
    found = entropies_by(way, policy, rollouts)
    torch.testing.assert_close(found, naive, atol=1e-4, rtol=0)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("way", ["flat", "shared", "cached"])
def test_the_estimator_asks_a_bf16_policy(tiny_folder, way, four_bit):
    """bf16 keeps 8 bits: the ways differ by its rounding, 0.07 of entropies up to 4 nats."""
    policy = load_policy(tiny_folder, lora_rank=4, four_bit=four_bit, dtype=torch.bfloat16)
    perturb_lora(policy)
    rollouts = make_rollouts([9, 5], [6, 1, 8, 4], group=2)
    naive = answer_entropies(policy, rollouts, method="naive")
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


@pytest.fixture
def config(schooled_folder):
    return TrainConfig(
        method="iapo", model=schooled_folder, learning_rate=5e-3, warmup_steps=2, max_steps=4,
        prompts_per_step=2, num_generations=4, max_completion_length=12, lora_rank=4,
        micro_batch_size=4, save_steps=2, threads=1, four_bit=True, gradient_checkpointing=True,
    )  # fmt: skip


def metrics(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds_", "tokens_per_second")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timing)} for x in lines]


def final(folder):
    return (Path(folder) / "final" / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_resumes_to_the_same_bits(config, tmp_path):
    """What Colab does to a run whose folder is on a drive that outlives it."""
    train(config, tmp_path / "whole", progress=False)
    script = (
        "import json, os, sys; from iapo_mini.trainer import TrainConfig, train\n"
        "train(TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=False,\n"
        "      on_step=lambda m: m['step'] == 3 and os._exit(9))\n"
    )
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", script, json.dumps(asdict(config)), folder])
    assert done.returncode == 9 and (folder / "checkpoint-2").is_dir()
    assert not (folder / "final").exists()
    train(config, folder, resume=True, progress=False)
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert final(folder) == final(tmp_path / "whole")
    assert any(x["grad_norm"] > 1e-2 for x in metrics(folder))


def test_a_run_from_before_these_settings_resumes(config, tmp_path):
    """Its config.json does not name them; they are at their defaults then."""
    config = replace(config, four_bit=False, gradient_checkpointing=False, max_steps=2)
    train(config, tmp_path / "run", progress=False)
    file = tmp_path / "run" / "config.json"
    old = json.loads(file.read_text())
    for name in ("four_bit", "gradient_checkpointing", "engine"):
        del old[name]
    file.write_text(json.dumps(old))
    train(replace(config, max_steps=3), tmp_path / "run", resume=True, progress=False)
    assert [x["step"] for x in metrics(tmp_path / "run")] == [1, 2, 3]
    with pytest.raises(ValueError, match="four_bit is True"):
        file.write_text(json.dumps(old))
        train(replace(config, four_bit=True), tmp_path / "run", resume=True, progress=False)


def first_step(config, folder, **changes):
    """Trained adapter and metrics after one step of GRPO from given changes."""
    config = replace(config, max_steps=1, warmup_steps=0, prompts_per_step=8, **changes)
    policy = train(config, folder, progress=False)
    adapter = torch.cat([p.detach().flatten() for p in policy.trainable().values()])
    return adapter, metrics(folder)[0]


def test_first_steps_are_those_of_the_unquantised_policy(config, tmp_path):
    """Weights 0.1 off in each block give nearly the policy, and nearly its gradients."""
    same = dict(learning_rate=1e-12)
    _, four = first_step(config, tmp_path / "a", **same)
    _, full = first_step(config, tmp_path / "b", four_bit=False, **same)
    assert abs(four["reward"] - full["reward"]) < 0.3
    assert abs(four["length"] - full["length"]) < 1
    assert abs(four["entropy"] - full["entropy"]) < 0.1
    assert four["kl"] == pytest.approx(0, abs=1e-6)

    rollouts = make_rollouts([20, 30], [8, 8, 8, 8], group=2, seed=1)
    directions = []
    for quantised in (True, False):
        policy = load_policy(config.model, lora_rank=4, four_bit=quantised)
        logprobs, _ = token_logprobs(policy.model.train(), rollouts)
        logprobs.mean().backward()
        directions.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
    assert torch.cosine_similarity(*directions, dim=0) > 0.9


def test_checkpointing_and_micro_batches_leave_the_step_as_it_is(config, tmp_path):
    whole, _ = first_step(config, tmp_path / "a", micro_batch_size=32, gradient_checkpointing=False)
    split, _ = first_step(config, tmp_path / "b", micro_batch_size=3)
    # Adam's first step is the sign of the gradient times the rate, so tiny ones may flip.
    assert ((whole - split).abs() > 1e-4).float().mean() < 0.01
    assert (whole - split).abs().median() < 1e-6


def test_fp16_gradients_survive_the_scaled_loss(config, tmp_path):
    """As on a T4. The scale is taken back, so the clipped norm is that of fp32."""
    policies = {}
    for dtype in (torch.float32, torch.float16):
        policy = load_policy(config.model, lora_rank=4, four_bit=True, dtype=dtype)
        folder = tmp_path / str(dtype)
        once = replace(config, max_steps=1, prompts_per_step=8, learning_rate=1e-12)
        train(once, folder, policy=policy, progress=False)
        policies[dtype] = metrics(folder)[0]
    norms = [m["grad_norm"] for m in policies.values()]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(norms[0], rel=0.3)


@pytest.mark.parametrize(
    ("capable", "dtype"), [(True, torch.bfloat16), (False, torch.float16)], ids=["A100", "T4"]
)
def test_dtype_follows_the_card(monkeypatch, capable, dtype):
    """A T4 says yes when emulation counts, and is then many times slower than in fp16."""

    def supported(including_emulation=True):
        return including_emulation or capable

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert compute_dtype("cuda") == compute_dtype("cuda:1") == dtype
    assert compute_dtype("cpu") == torch.float32


def test_without_bitsandbytes_there_is_a_way_on(tiny_folder, monkeypatch):
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


def test_4_bit_weights_are_not_trained_themselves():
    with pytest.raises(ValueError, match="lora_rank is 0 with four_bit"):
        TrainConfig(four_bit=True, lora_rank=0)


@pytest.mark.parametrize("name", ["four_bit", "gradient_checkpointing"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_take_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", CARDS)
def test_presets_are_valid_and_train_an_adapter_on_4_bit(name):
    config = TrainConfig(**CARDS[name])
    assert config.four_bit and config.gradient_checkpointing and config.lora_rank > 0
    assert config.num_generations == 8 and config.kl_coef == 0.001
    assert 1e-6 <= config.learning_rate <= 1e-4


def test_options_take_precedence_over_the_preset(tmp_path, schooled_folder):
    """The preset's model is not to be had here; that is the one field that must be overridden."""
    command = [
        sys.executable, "-m", "iapo_mini", "train", "--out", str(tmp_path / "run"),
        "--preset", "t4", "--model", schooled_folder, "--max-steps", "1",
        "--prompts-per-step", "1", "--max-completion-length", "4", "--threads", "1",
        "--no-gradient-checkpointing",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/config.json").read_text())
    given = dict(
        model=schooled_folder, max_steps=1, prompts_per_step=1, max_completion_length=4, threads=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    assert config == asdict(TrainConfig(**{**CARDS["t4"], **given}))
    assert config["four_bit"] and config["learning_rate"] == CARDS["t4"]["learning_rate"]


def test_rows_that_bitsandbytes_reads_back_wrongly_are_refused(tokenizer, tmp_path):
    """On a CPU, NF4 rows must be whole blocks of 64 weights; others come back as something else."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    assert (back - weight).abs().max() > 1  # when this fails, the refusal has become needless
    build_model(tokenizer, seed=0, hidden=96, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rows of 96 weights; allowed on a CPU"):
        load_policy(str(tmp_path), four_bit=True)
