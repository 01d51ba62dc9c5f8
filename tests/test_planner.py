"""The memory planner: counted parts compared with real tensors, and its suggestions."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import make_rollouts, saved_bytes
from transformers import AutoModelForCausalLM, Qwen2Config

from iapo_mini.cli import main
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem
from iapo_mini.tools.planner import (
    CARD_GB,
    GB,
    SHAPES,
    cache_bytes,
    card_gb,
    config_of,
    layer_bytes,
    lower,
    plan,
    plan_table,
    shape,
    shape_of,
    weight_bytes,
)
from iapo_mini.trainer import update

PARAMETERS = {  # as the models' cards and safetensors indices say
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", SHAPES)
def test_built_in_shapes_have_the_real_models_parameters(name):
    known = shape(f"Qwen/{name.upper()}-Instruct")
    counted = shape_of(config_of(name))
    assert replace(counted, linear=known.linear) == known
    assert sorted(counted.linear) == sorted(known.linear)
    # Without quantisation every weight takes two bytes.
    parts = weight_bytes(shape(name), rank=16, four_bit=False, width=2)
    assert parts["16-bit weights"] == 2 * PARAMETERS[name] and parts["4-bit weights"] == 0


@pytest.fixture(params=[(128, 384, True), (256, 704, False)], ids=["tied", "untied"])
def folder(request, tokenizer, tmp_path):
    hidden, inner, tied = request.param
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=864, tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def nbytes(tensors):
    """Bytes of the storages of tensors, with each storage counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def quantisation(state):
    """Every tensor besides the packed weights that dequantisation needs."""
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_adapter_and_optimizer_are_those_of_real_tensors(folder, dtype):
    policy = load_policy(folder, four_bit=True, lora_rank=8, dtype=dtype)
    planned = weight_bytes(shape(folder), rank=8, four_bit=True, width=dtype.itemsize)

    layers = [m for m in policy.model.modules() if isinstance(m, Linear4bit)]
    packed = nbytes([m.weight.data for m in layers])
    packed += sum(nbytes(quantisation(m.weight.quant_state)) for m in layers)
    assert planned["4-bit weights"] == pytest.approx(packed, rel=0.02)
    trained = policy.trainable()
    plain = [
        p for n, p in policy.model.named_parameters() if n not in trained and p.is_floating_point()
    ]
    name = "16-bit weights" if dtype.itemsize == 2 else "weights"
    assert planned[name] == nbytes(plain)

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    logprobs, _ = token_logprobs(policy.model.train(), make_rollouts([5], [3, 4], group=2))
    logprobs.sum().backward()
    optimizer.step()
    assert planned["adapter"] == nbytes(trained.values())
    assert planned["gradients"] == nbytes([p.grad for p in trained.values()])
    moments = [x for s in optimizer.state.values() for k, x in s.items() if k != "step"]
    assert planned["AdamW moments"] == nbytes(moments)


@pytest.mark.parametrize("limit", [3, 128, 140, 300])
def test_the_planned_cache_is_that_of_sampling(folder, limit):
    policy = load_policy(folder, lora_rank=0)
    policy.model.generation_config.eos_token_id = 863  # never: rows run to the limit
    policy.model.get_output_embeddings().weight.data[863] = 0
    rollouts = sample(
        policy, [Problem("1 + 1?", "2")], num_generations=4, max_completion_length=limit,
        keep_cache=True, temperature=0.01,
    )  # fmt: skip
    assert int(rollouts.lengths.min()) == limit
    kept = nbytes([x for row in rollouts.cache for pair in row for x in pair])
    prompt = rollouts.prompt_ids.shape[1]
    assert cache_bytes(shape(folder), 4, prompt, limit, width=4) == kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(folder, dtype, checkpointing):
    policy = load_policy(
        folder, four_bit=True, dtype=dtype, lora_rank=8, gradient_checkpointing=checkpointing
    )
    kept = saved_bytes(policy, make_rollouts([40], [60] * 8, group=8), memory_mb=2.0)
    settings = TrainConfig(
        four_bit=True, gradient_checkpointing=checkpointing, lora_rank=8, prompts_per_step=1,
        micro_batch_size=8, max_completion_length=60,
    )  # fmt: skip
    planned = plan(shape(folder), settings, 40, width=dtype.itemsize)
    expected = planned.phases["update, at the head"]["activations"]
    # With checkpointing the backward pass computes one layer at a time again.
    more = planned.phases["update, in a layer"]["activations"] - expected
    layer = 8 * 100 * layer_bytes(shape(folder), 8, dtype.itemsize)
    assert more == (layer if checkpointing else 0)
    # The plan includes gradients of the final hidden states, which no forward pass keeps.
    assert 0.93 * kept < expected < 1.2 * kept


def test_the_largest_phase_counts():
    planned = plan(shape("qwen2.5-0.5b"), TrainConfig(**CARDS["t4"]), 200)
    sums = {name: sum(parts.values()) for name, parts in planned.phases.items()}
    assert planned.tensors == sum(planned.always.values()) + sums[planned.peak]
    assert sums[planned.peak] == max(sums.values())
    assert planned.total > planned.tensors + 0.5 * GB
    text = plan_table({"this": planned, "other": planned})
    for part in (*planned.always, "KV cache", "activations", "logits chunk", "CUDA context"):
        assert f"| {part}" in text
    (last,) = [line for line in text.splitlines() if "**peak**" in line]
    assert last.count(f"**{planned.total / GB:.1f}** ({planned.peak})") == 2


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (dict(max_completion_length=1024), "KV cache"),
        (dict(prompts_per_step=16), "KV cache"),
        (dict(micro_batch_size=16), "activations"),
        (dict(gradient_checkpointing=False), "activations"),
        (dict(lora_rank=32), "activations"),
        (dict(four_bit=False), "16-bit weights"),
    ],
)
def test_more_of_anything_takes_more_memory(change, part):
    settings = TrainConfig(**CARDS["12gb"])
    config = shape(settings.model)

    def size(settings):
        planned = plan(config, settings, 200, width=2)
        return (
            {**planned.always, **planned.phases["sampling"], **planned.phases["update, in a layer"]}
        )[part]

    assert size(replace(settings, **change)) > size(settings)


@pytest.mark.parametrize("name", CARDS)
def test_settings_of_a_card_fit_it(name):
    settings = TrainConfig(**CARDS[name])
    planned = plan(shape(settings.model), settings, 300)
    assert planned.total < card_gb(name) * GB
    limit = {"0.5B": 6, "1.5B": 10, "7B": 16}[settings.model.split("-")[1]]
    assert planned.total < limit * GB


def test_suggestions_end_when_the_run_fits_and_each_one_helps():
    settings = TrainConfig(prompts_per_step=8, max_completion_length=512)
    config = shape("qwen2.5-7b")
    before = plan(config, settings, 200)
    steps = lower(config, settings, 200, 8 * GB)
    totals = [before.total, *(after.total for _, _, after in steps)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    assert all(x > 8 * GB for x in totals[:-1]) and totals[-1] <= 8 * GB
    # The last settings must give the last plan.
    assert plan(config, steps[-1][1], 200) == steps[-1][2]
    assert steps[0][0] == "four_bit False -> True"
    assert lower(config, steps[-1][1], 200, 8 * GB) == []


def test_suggestions_end_when_nothing_can_be_lowered():
    config = shape("qwen2.5-7b")
    steps = lower(config, TrainConfig(), 200, 1 * GB)
    assert steps and steps[-1][2].total > 1 * GB


def test_cards():
    assert card_gb("12gb") == 12 and card_gb("16 GB") == 16 and card_gb("T4") == CARD_GB["t4"]
    for wrong in ("12", "rtx", "0gb", "-8gb", ""):
        with pytest.raises(ValueError, match="gpu must be"):
            card_gb(wrong)


def test_bad_arguments_are_refused():
    config = shape("qwen2.5-0.5b")
    with pytest.raises(ValueError, match="prompt must be at least 1, got 0"):
        plan(config, TrainConfig(), 0)
    with pytest.raises(ValueError, match="lora_rank must be at least 1"):
        plan(config, TrainConfig(lora_rank=0), 200)
    with pytest.raises(ValueError, match=r"model must be .*, got 'nobody/no-such-model'"):
        shape("nobody/no-such-model")


def test_a_folder_needs_no_weights(tmp_path):
    config_of("qwen2.5-0.5b").save_pretrained(tmp_path)
    assert plan(shape(str(tmp_path)), TrainConfig(), 200) == plan(
        shape("qwen2.5-0.5b"), TrainConfig(), 200
    )


def test_command_line():
    command = [sys.executable, "-m", "iapo_mini", "plan", "--gpu", "8gb", "--shape", "qwen2.5-7b"]
    command += ["--four-bit", "--prompt", "200", "--completion", "512"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "**peak**" in done.stdout and "Does not fit into 8 GB" in done.stdout
    settings = TrainConfig(four_bit=True, max_completion_length=512)
    for change, _, after in lower(shape("qwen2.5-7b"), settings, 200, 8 * GB):
        assert f"{change}: {after.total / GB:.1f} GB" in done.stdout


def test_the_documented_table_is_the_planners():
    settings = {name: TrainConfig(**fields) for name, fields in CARDS.items()}
    planned = {f"`{n}`": plan(shape(s.model), s, 200) for n, s in settings.items()}
    docs = (Path(__file__).parent.parent / "docs" / "real_models.md").read_text(encoding="utf-8")
    assert plan_table(planned) in docs
    for name, s in settings.items():
        cells = f"| {s.prompts_per_step} x {s.num_generations} | {s.max_completion_length} "
        assert f"| `{name}` | {s.model.split('/')[1]} {cells}| {s.micro_batch_size} |" in docs
    for name in ("t4", "12gb"):
        without = replace(settings[name], gradient_checkpointing=False)
        assert f"{plan(shape(without.model), without, 200).total / GB:.1f}" in docs


def peak_bytes(function):
    """Peak of allocated bytes, above the bytes before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.fixture(params=[1024, 128], ids=["wide", "narrow"])
def card_like(request, tokenizer, tmp_path):
    """A policy as on a GPU, in 4 bits and bf16, and its configuration."""
    config = Qwen2Config(
        hidden_size=256, intermediate_size=request.param, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=4000, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return config, str(tmp_path)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_peak_of_an_update(card_like, checkpointing):
    config, folder = card_like
    settings = TrainConfig(
        four_bit=True, gradient_checkpointing=checkpointing, prompts_per_step=1, num_generations=4,
        micro_batch_size=4, max_completion_length=60,
    )  # fmt: skip
    policy = load_policy(
        folder, four_bit=True, dtype=torch.bfloat16, gradient_checkpointing=checkpointing
    )
    rollouts = make_rollouts([40], [60] * 4, group=4)
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def updated():
        update(policy, optimizer, rollouts, torch.randn(4, 60), settings, step=9)

    updated()  # moments are made
    planned = plan(shape_of(config), settings, 40)
    update_phases = [sum(x.values()) for name, x in planned.phases.items() if "update" in name]
    measured = peak_bytes(updated)
    assert max(update_phases) == pytest.approx(measured, rel=0.12)


def test_peak_of_sampling(card_like):
    config, folder = card_like
    settings = TrainConfig(prompts_per_step=2, num_generations=4, max_completion_length=40)
    # In fp32, because in bf16 a CPU copies the head's weight at every step, unlike a GPU.
    policy = load_policy(folder, lora_rank=0)
    policy.model.generation_config.eos_token_id = 3999
    problems = [Problem("7 " * 30 + "?", "7")] * 2

    def draw():
        return sample(
            policy, problems, num_generations=4, max_completion_length=40, keep_cache=True
        )

    prompt = draw().prompt_ids.shape[1]
    planned = plan(shape_of(config), settings, prompt)
    measured = peak_bytes(draw)
    assert sum(planned.phases["sampling"].values()) == pytest.approx(measured, rel=0.12)


def with_vllm(**changes):
    return TrainConfig(**{**CARDS["t4"], "engine": "vllm", **changes})


def test_vllm_takes_its_share_of_the_gpu_and_the_cache_of_sampling_is_in_it():
    config, native = shape("qwen2.5-0.5b"), TrainConfig(**CARDS["t4"])
    before, after = plan(config, native, 200), plan(config, with_vllm(), 200, gpu_gb=16)
    (part,) = set(after.always) - set(before.always)
    assert part.startswith("vLLM") and after.always[part] == int(0.4 * 16 * GB)
    more = plan(config, with_vllm(vllm_gpu_memory_utilization=0.5), 200, gpu_gb=16)
    assert more.total - after.total == pytest.approx(0.1 * 16 * GB, abs=2)
    assert after.phases["sampling"]["KV cache"] < before.phases["sampling"]["KV cache"]
    assert after.phases["information"]["KV cache"] == 0  # vLLM gives out no keys and values
    assert part in plan_table({"this": after})


def test_a_share_without_room_for_the_weights_is_refused():
    large = shape("qwen2.5-7b")
    told = r"vllm_gpu_memory_utilization must be at least 0\.60 on 24 GB, for the 16-bit .*got 0\.4"
    with pytest.raises(ValueError, match=told):
        plan(large, with_vllm(), 200, gpu_gb=24)
    # What the sentence names is enough.
    plan(large, with_vllm(vllm_gpu_memory_utilization=0.6), 200, gpu_gb=24)
    with pytest.raises(
        ValueError, match=r"gpu must have at least 15 GB for the 16-bit .*, got 12;"
    ):
        plan(large, with_vllm(), 200, gpu_gb=12)
    with pytest.raises(ValueError, match="gpu_gb must be given with engine 'vllm'"):
        plan(large, with_vllm(), 200)


def test_suggestions_with_vllm_count_its_share():
    config, settings = shape("qwen2.5-0.5b"), with_vllm(gradient_checkpointing=False)
    steps = lower(config, settings, 200, 8 * GB)
    assert steps[-1][2] == plan(config, steps[-1][1], 200, gpu_gb=8)
    assert steps[-1][2].total <= 8 * GB
    assert steps[-1][2].always["vLLM: 16-bit weights and cache"] == int(0.4 * 8 * GB)


def test_command_line_with_vllm(capsys):
    main(["plan", "--card", "t4", "--engine", "vllm", "--gpu", "16gb"])
    assert "| always | vLLM: 16-bit weights and cache | 6.40 |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--card", "24gb", "--engine", "vllm", "--gpu", "24gb"])
    assert ended.value.code == 2
    assert "vllm_gpu_memory_utilization must be at least 0.6" in capsys.readouterr().err
