"""Training with LoRA on 4-bit weights: resuming, micro-batches, export, settings of cards."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close_in_fp32, make_rollouts

from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.logprobs import token_logprobs
from iapo_mini.policy import load_policy
from iapo_mini.trainer import train


@pytest.fixture
def config(schooled_folder):
    return TrainConfig(
        method="iapo", model=schooled_folder, learning_rate=5e-3, warmup_steps=2, max_steps=4,
        prompts_per_step=2, num_generations=4, max_completion_length=12, lora_rank=4,
        micro_batch_size=4, save_steps=2, threads=1, four_bit=True, gradient_checkpointing=True,
    )  # fmt: skip


def metrics(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timing = ("seconds_", "tokens_per_second")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timing)} for x in lines]


def final(folder):
    return (Path(folder) / "final" / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_resumes_to_the_same_bits(config, tmp_path):
    """This happens on Colab to a run whose folder is on a permanent drive."""
    train(config, tmp_path / "whole", progress=False)
    script = (
        "import json, os, sys; from iapo_mini.trainer import TrainConfig, train\n"
        "from iapo_mini.callbacks import Callback\n"
        "train(TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=False,\n"
        "      callbacks=[Callback(lambda m: m['step'] == 3 and os._exit(9))])\n"
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
    """Its config.json lacks them, so they get their defaults."""
    config = replace(config, four_bit=False, gradient_checkpointing=False, max_steps=2)
    train(config, tmp_path / "run", progress=False)
    file = tmp_path / "run" / "config.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    for name in ("four_bit", "gradient_checkpointing", "engine"):
        del old[name]
    file.write_text(json.dumps(old), encoding="utf-8")
    train(replace(config, max_steps=3), tmp_path / "run", resume=True, progress=False)
    assert [x["step"] for x in metrics(tmp_path / "run")] == [1, 2, 3]
    with pytest.raises(ValueError, match="four_bit is True"):
        file.write_text(json.dumps(old), encoding="utf-8")
        train(replace(config, four_bit=True), tmp_path / "run", resume=True, progress=False)


def first_step(config, folder, **changes):
    """Trained adapter and metrics after one step of GRPO with changed settings."""
    config = replace(config, max_steps=1, warmup_steps=0, prompts_per_step=8, **changes)
    policy = train(config, folder, progress=False)
    adapter = torch.cat([p.detach().flatten() for p in policy.trainable().values()])
    return adapter, metrics(folder)[0]


def test_first_steps_are_those_of_the_unquantised_policy(config, tmp_path):
    """Weights with errors of 0.1 in each block give nearly the same policy and gradients."""
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


def test_checkpointing_and_micro_batches_do_not_change_the_step(config, tmp_path):
    whole, _ = first_step(config, tmp_path / "a", micro_batch_size=32, gradient_checkpointing=False)
    split, _ = first_step(config, tmp_path / "b", micro_batch_size=3)
    # Adam's first step is the sign of the gradient times the rate, so tiny ones may flip.
    assert ((whole - split).abs() > 1e-4).float().mean() < 0.01
    assert (whole - split).abs().median() < 1e-6


def test_fp16_gradients_survive_the_scaled_loss(config, tmp_path):
    """This is the case on a T4. Gradients are divided by the scale before they are clipped."""
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
    ids = torch.tensor([[5, 17, 300, 42, 8, 99], [3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        assert_close_in_fp32(loaded.model(ids).logits, trained.model(ids).logits)


def test_4_bit_weights_are_not_trained_without_an_adapter():
    with pytest.raises(ValueError, match="lora_rank must be at least 1 with four_bit"):
        TrainConfig(four_bit=True, lora_rank=0)


@pytest.mark.parametrize("name", ["four_bit", "gradient_checkpointing"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_take_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", CARDS)
def test_presets_are_valid_and_train_an_adapter_on_4_bit(name):
    config = TrainConfig(**CARDS[name])
    assert config.four_bit and config.gradient_checkpointing and config.lora_rank > 0
    assert config.num_generations == 8 and config.kl_coef == 0.001
    assert 1e-6 <= config.learning_rate <= 1e-4


def test_options_take_precedence_over_the_preset(tmp_path, schooled_folder):
    """The preset's model is not available here, so the test must override this field."""
    command = [
        sys.executable, "-m", "iapo_mini", "train", "--out", str(tmp_path / "run"),
        "--card", "t4", "--model", schooled_folder, "--max-steps", "1",
        "--prompts-per-step", "1", "--max-completion-length", "4", "--threads", "1",
        "--no-gradient-checkpointing",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    given = dict(
        model=schooled_folder, max_steps=1, prompts_per_step=1, max_completion_length=4, threads=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    expected = TrainConfig(**{**CARDS["t4"], **given}).settings()
    assert {name: config[name] for name in expected} == expected
    assert config["four_bit"] and config["learning_rate"] == CARDS["t4"]["learning_rate"]
