"""The training loop: exactly repeatable, resumable after a kill, strict about inputs."""

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, TRIVIAL, metrics, perturb_lora, run, weights

import iapo_mini
from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import ROLES, stories

# Argument 1: the settings as JSON; 2: the run folder. The pause after each step leaves the test
# time to see that the step is logged and to kill the process before the run is over.
SCRIPT = """
import json, sys, time
from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.trainer import train

if __name__ == "__main__":
    config, pause = TrainConfig(**json.loads(sys.argv[1])), Callback(lambda _: time.sleep(0.5))
    train(config, sys.argv[2], progress=False, callbacks=[pause])
"""


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    assert weights(one) == weights(other)


def interrupt(config, folder, step):
    """Train and stop right after this step is logged, before it can be saved."""

    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, folder, callbacks=[Callback(stop)])


def wait_for_lines(file, n, process):
    give_up = time.monotonic() + PATIENCE
    while not file.exists() or len(file.read_text(encoding="utf-8").splitlines()) < n:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < give_up, "the run logged too little in time"
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["grpo", "iapo"])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_two_runs_are_identical(config, tmp_path, method, lora_rank):
    config = replace(config, method=method, lora_rank=lora_rank)
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)  # whatever the state of the global generator
        run(config, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    # The runs are meaningful: rewards varied and changed the weights.
    lines = metrics(tmp_path / "a")
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    assert any(x["grad_norm"] > 1e-2 for x in lines)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(x["kl"] > 1e-6 for x in lines[2:])


def test_two_runs_on_two_threads_are_identical(tmp_path):
    """The batch is large enough for two threads; backward sums keep their order."""
    config = TrainConfig(max_steps=2, prompts_per_step=4, warmup_steps=0, threads=2)
    for name in ("a", "b"):
        run(config, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(config, tmp_path):
    run(config, tmp_path / "a")
    run(replace(config, seed=1), tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["length"] != metrics(tmp_path / "b")[0]["length"]
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_killed_run_resumes_to_the_same_numbers(config, tmp_path):
    """After a real kill no handler runs, and nothing is flushed or closed."""
    config = replace(config, max_steps=8)
    run(config, tmp_path / "whole")

    script, killed = tmp_path / "script.py", tmp_path / "killed"
    script.write_text(SCRIPT, encoding="utf-8")
    path = [str(Path(iapo_mini.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(asdict(config)), str(killed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_lines(killed / "metrics.jsonl", 5, process)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    assert not (killed / "final").exists()
    # The steps before the kill equal those of the whole run.
    before = metrics(killed)
    assert before == metrics(tmp_path / "whole")[: len(before)] and 5 <= len(before) < 8

    run(config, killed, resume=True)
    assert_same_run(killed, tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_interrupted_run_resumes_to_the_same_numbers(config, tmp_path, step, lora_rank):
    """The run stops before the first checkpoint, just before one is written, or after it."""
    config = replace(config, lora_rank=lora_rank)
    run(config, tmp_path / "whole")
    interrupt(config, tmp_path / "stopped", step)
    run(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_run_with_given_problems_resumes_where_it_was_in_them(config, tmp_path):
    problems = list(itertools.islice(stories("train", seed=3), 3))  # no multiple of a step's two
    run(config, tmp_path / "whole", problems=problems)
    run(replace(config, max_steps=2), tmp_path / "short", problems=problems)
    run(config, tmp_path / "short", problems=problems, resume=True)
    assert_same_run(tmp_path / "short", tmp_path / "whole")


def test_run_on_a_local_file_resumes_where_it_was_in_it(config, tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3, 8)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(config, data="gsm8k", data_file=str(file))
    run(config, tmp_path / "whole")  # three training problems, two a step: passes cross steps
    run(replace(config, max_steps=2), tmp_path / "short")
    run(config, tmp_path / "short", resume=True)
    assert_same_run(tmp_path / "short", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "trivia"}, "data must be one of"),
        ({"data": "gsm8k", "data_file": "none.jsonl"}, "data_file is 'none.jsonl'"),
        ({"data_file": "none.jsonl"}, "data is 'stories'"),
        ({"split": "all"}, "split must be one of"),
        ({"data_file": None}, "data_file must be of type str, got None"),
    ],
)
def test_impossible_data_settings_are_refused_early(changes, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**changes)


def test_data_that_cannot_be_read_leaves_no_folder_behind(config, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    config = replace(config, data="gsm8k", data_file=str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match=r"line 1 .not valid JSON"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_written_files_after_a_kill_are_dropped(config, tmp_path):
    run(config, tmp_path / "whole")
    folder = tmp_path / "stopped"
    interrupt(config, folder, 3)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 4, "lo')
    # A checkpoint is written under a temporary name; a kill leaves it there, incomplete.
    (folder / ".checkpoint-4.tmp").mkdir()
    (folder / ".checkpoint-4.tmp" / "trainable.safetensors").write_bytes(b"half")
    run(config, folder, resume=True)
    assert_same_run(folder, tmp_path / "whole")
    assert not list(folder.glob(".*.tmp"))


def test_resuming_a_finished_run_changes_nothing(config, tmp_path):
    run(config, tmp_path / "a")
    before = metrics(tmp_path / "a"), weights(tmp_path / "a")
    run(config, tmp_path / "a", resume=True)
    assert (metrics(tmp_path / "a"), weights(tmp_path / "a")) == before


def test_checkpoints_come_every_save_steps_and_two_are_kept(config, tmp_path):
    run(replace(config, max_steps=7), tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint-4",
        "checkpoint-6",
        "final",
    }


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_final_folder_loads_to_the_trained_policy(config, tmp_path, lora_rank):
    trained = run(replace(config, lora_rank=lora_rank), tmp_path / "a")
    final = str(tmp_path / "a" / "final")
    if lora_rank:
        loaded = load_policy(config.model, adapter=final)
    else:
        loaded = load_policy(final, lora_rank=0)
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.no_grad():
        expected = trained.for_inference()(ids).logits
        assert torch.equal(loaded.for_inference()(ids).logits, expected)
        start = load_policy(config.model, lora_rank=0).model(ids).logits
    assert not torch.allclose(expected, start, atol=1e-3)
    assert not trained.model.training


def test_a_given_policy_is_trained_in_place(config, tmp_path):
    policy = load_policy(config.model, lora_rank=4)
    before = {n: p.clone() for n, p in policy.trainable().items()}
    assert run(config, tmp_path / "a", policy=policy) is policy
    assert any(not torch.equal(p, before[n]) for n, p in policy.trainable().items())


def test_the_base_weights_do_not_change(config, tmp_path):
    """LoRA trains only the adapter, because the reference policy needs the base weights."""
    policy = load_policy(config.model, lora_rank=4)
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    run(config, tmp_path / "a", policy=policy)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())


def test_iapo_without_its_terms_is_grpo(config, tmp_path):
    run(replace(config, method="iapo", alpha=0.0, beta=0.0), tmp_path / "iapo")
    loss = {"aggregation": "token", "epsilon_high": 0.28}  # IAPO's, which is not GRPO's
    run(replace(config, method="grpo", **loss), tmp_path / "grpo")
    run(replace(config, method="iapo", alpha=1.0, beta=0.0), tmp_path / "alpha")
    run(replace(config, method="iapo", alpha=0.0, beta=1.0), tmp_path / "beta")
    assert weights(tmp_path / "iapo") == weights(tmp_path / "grpo")
    assert weights(tmp_path / "alpha") != weights(tmp_path / "grpo")
    assert weights(tmp_path / "beta") != weights(tmp_path / "grpo")


@pytest.mark.parametrize("method", ["grpo", "iapo"])
def test_reward_rises(config, tmp_path, method):
    """On two problems with the same answer a policy that guesses learns to be right."""
    config = replace(
        config, method=method, alpha=0.1, max_steps=12, num_generations=8, micro_batch_size=16
    )
    run(config, tmp_path / "a", problems=TRIVIAL)
    rewards = [x["reward"] for x in metrics(tmp_path / "a")]
    assert statistics.fmean(rewards[-3:]) > statistics.fmean(rewards[:3]) + 0.5


def test_metrics_agree_with_each_other(config, tmp_path):
    seen = []
    config = replace(config, num_generations=4)
    run(config, tmp_path / "a", callbacks=[Callback(seen.append)])
    lines = (tmp_path / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(x) for x in lines] == seen
    for x in seen:
        # -1.5 ill-formed, -0.5 well-formed but wrong, 1.5 right.
        assert x["reward"] == pytest.approx(-1.5 + x["format"] + 2 * x["accuracy"], abs=1e-6)
        assert 1 <= x["length"] <= config.max_completion_length
        assert 0 <= x["truncated"] <= 1 and 0 <= x["zero_variance_groups"] <= 1
        assert 0 < x["entropy"] < math.log(900)
        assert x["informativeness"] is not None
        counted = sum(x[f"tokens/{role}"] for role in ROLES)
        assert 0 < counted < x["length"]  # the tags have a role of their own
        assert all(f"advantage/{role}" in x for role in ROLES)
        assert all(value > 0 for name, value in x.items() if name.startswith("seconds_"))
    assert {x["format"] for x in seen} != {0.0}


def test_grpo_runs_do_not_estimate_information(config, tmp_path):
    run(replace(config, method="grpo"), tmp_path / "a")
    for x in metrics(tmp_path / "a"):
        assert x["informativeness"] is None
        assert not any(name.startswith("informativeness/") for name in x)


def test_problems_that_are_not_stories_have_no_roles(config, tmp_path):
    run(config, tmp_path / "a", problems=TRIVIAL)
    assert not any("/" in name for x in metrics(tmp_path / "a") for name in x)


@pytest.mark.parametrize(
    "names", [("loss", "grad_norm"), ("kl", "entropy")], ids=["update", "report"]
)
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_micro_batches_do_not_change_a_step(config, tmp_path, monkeypatch, aggregation, names):
    """Compares a whole step with one in parts, with an adapter that the reference has not.

    Micro-batches only save memory: neither the update nor its metrics (nats per token) may depend
    on them.
    """
    # A run's reference is its start, so the KL term of a first step would be zero.
    monkeypatch.setattr("iapo_mini.policy.Policy.keep_reference", lambda policy: None)
    found = []
    for size in (2, 100):
        policy = perturb_lora(load_policy(config.model, lora_rank=4), scale=0.3)
        setting = replace(
            config,
            micro_batch_size=size,
            prompts_per_step=4,
            max_steps=1,
            kl_coef=0.5,
            aggregation=aggregation,
        )
        run(setting, tmp_path / str(size), policy=policy)
        found += metrics(tmp_path / str(size))
    parts, whole = found
    assert whole["kl"] > 1e-3 and whole["grad_norm"] > 1e-2
    for name in names:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_later_passes_over_a_batch_use_the_updated_policy(config, tmp_path):
    """The second of two passes uses the policy after the first, which is not the reference."""
    config = replace(config, max_steps=1, num_generations=8, warmup_steps=0)
    run(config, tmp_path / "one")
    run(replace(config, num_iterations=2), tmp_path / "two")
    assert metrics(tmp_path / "one")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics(tmp_path / "two")[0]["kl"] > 1e-6


def test_the_token_mean_trains_differently_from_the_sequence_mean(config, tmp_path):
    run(replace(config, aggregation="sequence"), tmp_path / "a")
    run(replace(config, aggregation="token"), tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_a_gradient_that_is_not_finite_stops_the_run(config, tmp_path):
    policy = load_policy(config.model, lora_rank=4)
    with torch.no_grad():
        next(iter(policy.trainable().values())).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        run(config, tmp_path / "a", policy=policy)
    assert not (tmp_path / "a" / "final").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "ppo"),
        ("aggregation", "mean"),
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("beta", -1),
        ("beta", math.nan),
        ("kl_coef", -0.001),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("max_grad_norm", 0),
        ("epsilon", 0),
        ("epsilon", math.nan),
        ("epsilon_high", 0),
        ("num_generations", 1),
        ("num_generations", 2.5),
        ("num_generations", math.nan),
        ("prompts_per_step", 0),
        ("max_steps", 0),
        ("num_iterations", 0),
        ("max_completion_length", 0),
        ("micro_batch_size", 0),
        ("warmup_steps", -1),
        ("lora_rank", -1),
        ("save_steps", 0),
        ("threads", 0),
        ("estimator_stride", 0),
        ("estimator_stride", "word"),
        ("estimator_stride", 2.0),
        ("estimator_stride", True),
    ],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{field: value})
    message = str(caught.value)
    assert re.fullmatch(f"{field} must be .*, got {re.escape(repr(value))}(: .*)?", message)


def test_limits_themselves_are_allowed():
    TrainConfig(alpha=0, beta=0, kl_coef=0, warmup_steps=0, lora_rank=0, num_generations=2)
    TrainConfig(epsilon_high=0.28)
    TrainConfig(estimator_stride="sentence")


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.1), ("seed", 7), ("alpha", 0.0), ("method", "grpo"), ("threads", 2)],
)
def test_resume_with_another_setting_is_refused(config, tmp_path, field, value):
    run(config, tmp_path / "a")
    before = metrics(tmp_path / "a"), weights(tmp_path / "a")
    message = rf"{field} is {value!r}, but .* {config.settings()[field]!r}"
    with pytest.raises(ValueError, match=message):
        run(replace(config, **{field: value}), tmp_path / "a", resume=True)
    assert (metrics(tmp_path / "a"), weights(tmp_path / "a")) == before


def test_resume_of_nothing_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"output_dir is .* no run to resume"):
        run(config, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_in_use_is_refused(config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"output_dir is .* not empty"):
        run(config, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_as_folder_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="output_dir must be a folder you may write to"):
            run(config, folder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_read_only_place_is_refused(config, tmp_path):
    tmp_path.chmod(0o500)
    try:
        for folder in (tmp_path, tmp_path / "a"):
            with pytest.raises(ValueError, match="output_dir must be a folder you may write to"):
                run(config, folder)
    finally:
        tmp_path.chmod(0o700)


def test_no_problems_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="problems is empty"):
        run(config, tmp_path / "a", problems=[])
    assert not (tmp_path / "a").exists()
