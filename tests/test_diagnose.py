"""The diagnosis of runs: healthy ones, and ones with a single problem each."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from iapo_mini.cli import main
from iapo_mini.config import TrainConfig
from iapo_mini.tools.diagnose import CHECKS, diagnose, findings_text, read_log
from iapo_mini.trainer import train

HEALTHY = {
    "loss": 0.0, "format": 1.0, "truncated": 0.0, "zero_variance_groups": 0.2, "grad_norm": 0.3,
    "kl": 0.02, "clip_ratio": 0.0, "entropy": 0.3, "informativeness": 0.05, "length": 60.0,
    "sampler_ratio_above_2": 0.001,
}  # fmt: skip


def write(folder, steps=30, **changes):
    """Write a run with a rising reward and some changed metrics: values, or functions of step."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for step in range(1, steps + 1):
            row = {"step": step, "reward": 0.02 * step + 0.01 * (step % 3), **HEALTHY, **changes}
            row = {k: v(step) if callable(v) else v for k, v in row.items()}
            log.write(json.dumps(row) + "\n")
    return folder


def looks(found):
    return [finding.what for finding in found if finding.look]


def test_a_healthy_run_needs_no_look(tmp_path):
    found = diagnose(write(tmp_path))
    assert not looks(found) and len(found) == len(CHECKS) + 3
    assert not any(finding.advice for finding in found)


@pytest.mark.parametrize(
    ("changes", "what", "advice"),
    [
        ({"format": 0.5}, "format", "read some completions"),
        ({"truncated": 0.4}, "truncated", "max_completion_length"),
        ({"zero_variance_groups": 0.9}, "zero_variance_groups", "num_generations"),
        ({"grad_norm": 0.0}, "grad_norm", "nothing is learnt"),
        ({"grad_norm": 50.0}, "grad_norm", "learning_rate"),
        ({"kl": 2.0}, "kl", "kl_coef"),
        ({"clip_ratio": 0.5}, "clip_ratio", "num_iterations"),
        ({"entropy": 0.001}, "entropy", "nearly equal"),
        ({"informativeness": 0.0001}, "informativeness", "calibrate"),
        ({"sampler_ratio_above_2": 0.1}, "sampler_ratio_above_2", "dtype"),
        ({"reward": lambda step: -0.02 * step}, "reward", "worse"),
        ({"loss": lambda step: float("nan") if step == 7 else 0.0}, "finite", "step 7"),
    ],
)
def test_each_problem_is_found_alone_with_advice(tmp_path, changes, what, advice):
    found = diagnose(write(tmp_path, **changes))
    (ill,) = looks(found)
    assert what in ill
    (finding,) = [f for f in found if f.look]
    assert advice in finding.advice and finding.advice in findings_text(found)


def test_only_the_last_steps_are_averaged(tmp_path):
    early = write(tmp_path, format=lambda step: 0.0 if step <= 20 else 1.0)
    assert not looks(diagnose(early)) and looks(diagnose(early, last=15))


def test_noise_and_too_few_steps_are_not_called_a_trend(tmp_path):
    flat = diagnose(write(tmp_path, reward=lambda step: 0.5 + 0.1 * (-1) ** step))
    (reward,) = [f for f in flat if f.what.startswith("reward")]
    assert "within the noise" in reward.value and not reward.look and "loss" in reward.advice
    (reward,) = [f for f in diagnose(write(tmp_path, steps=5)) if f.what.startswith("reward")]
    assert "too few" in reward.value and not reward.look


def test_a_method_without_information_is_not_asked_for_it(tmp_path):
    assert len(diagnose(write(tmp_path, informativeness=None))) == len(CHECKS) + 2


def test_an_incomplete_last_line_is_skipped(tmp_path):
    path = write(tmp_path) / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 31, "los', encoding="utf-8")
    assert read_log(tmp_path, 10).steps == 30 and not looks(diagnose(tmp_path))


@pytest.mark.parametrize("norm", [0.0, 2.0])
def test_newest_adapter_is_looked_at(tmp_path, norm):
    write(tmp_path)
    for step, value in ((9, 1.0 - bool(norm)), (20, norm)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        weights = {"x.lora_A": torch.ones(4, 4), "x.lora_B": torch.full((4, 4), value / 4)}
        save_file(weights, tmp_path / f"checkpoint-{step}" / "trainable.safetensors")
    last = diagnose(tmp_path)[-1]
    assert "checkpoint-20" in last.what and float(last.value) == norm and last.look == (norm == 0)


def test_full_finetuning_has_no_adapter_to_look_at(tmp_path):
    (write(tmp_path) / "checkpoint-9").mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "checkpoint-9" / "trainable.safetensors")
    assert len(diagnose(tmp_path)) == len(CHECKS) + 3


def test_command_on_a_run_that_was_trained(tmp_path, capsys):
    train(
        TrainConfig(max_steps=2, prompts_per_step=1, num_generations=2, threads=1),
        tmp_path / "run", progress=False,
    )  # fmt: skip
    main(["diagnose", str(tmp_path / "run")])
    told = capsys.readouterr().out.splitlines()
    assert all(line[:4].strip() in ("ok", "look", "") for line in told)
    assert any("(final)" in line and line.startswith("ok") for line in told)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "run is 'nowhere', which holds no step of a training run"),
        (["nowhere", "--last", "0"], "last must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["diagnose", *arguments])
    assert sentence in capsys.readouterr().err


def damage(path, at, line):
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[at - 1 : at] = line
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [["{"], [], [""], ["[1]"], ['{"step": "7"}'], ['{"step": 9}'], ["\0" * 40], ["x" * 10**6],
     ["[" * 10**5], ['{"step": 7}', '{"step": 7}']],
    ids=["half", "gone", "empty", "a list", "text", "another", "zeros", "long", "nested", "twice"],
)  # fmt: skip
def test_a_damaged_line_is_reported_with_its_number(tmp_path, line):
    damage(write(tmp_path) / "metrics.jsonl", 7, line)
    (finding,) = [f for f in diagnose(tmp_path) if f.look]
    assert "can't be read or are out of order" in finding.what
    assert f"the first is line {8 if len(line) == 2 else 7}" in finding.advice


def test_missing_numbers_are_reported_and_left_out_of_averages(tmp_path):
    for value in (None, "0.3", [1], True):
        found = diagnose(write(tmp_path, kl=value, reward=value))
        assert [f.value for f in found if f.look] == ["not in the log"] * 2
    half = diagnose(write(tmp_path, kl=lambda step: 0.1 if step % 2 else None))
    assert not looks(half) and "0.1" in [f.value for f in half]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, 10**400])
def test_numbers_that_are_not_finite_deserve_a_look(tmp_path, value):
    found = diagnose(write(tmp_path, kl=value, reward=value, length=value))
    assert len([f for f in found if f.look and f.value in ("nan", "inf", "-inf")]) >= 1
    assert [f.value for f in found[-2:]] == ["not finite"] * 2
    assert all(f.look for f in found[-2:])


def test_the_log_of_another_tool_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 3.2, "_runtime": 7}\n' * 9, encoding="utf-8"
    )
    found = diagnose(tmp_path)
    assert sum(f.value == "not in the log" for f in found) == sum(c.always for c in CHECKS) + 2
    for text in ("", "epoch,loss\n1,3.2\n", '{"epoch": 1}\n', "\0" * 99):
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="holds no step of a training run"):
            diagnose(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 90, b"\2\0\0\0\0\0\0\0{", None])
def test_weights_that_can_not_be_read_are_a_row(tmp_path, content):
    (write(tmp_path) / "final").mkdir()
    file = tmp_path / "final" / "adapter_model.safetensors"
    save_file({"x.lora_B": torch.ones(9)}, file)
    file.write_bytes(content or file.read_bytes()[:-4])
    last = diagnose(tmp_path)[-1]
    assert last.look and last.value.startswith("can't be read (") and "(final)" in last.what


def test_an_adapter_that_is_not_finite_deserves_a_look(tmp_path):
    (write(tmp_path) / "final").mkdir()
    weights = {"x.lora_B": torch.tensor([1.0, float("nan")])}
    save_file(weights, tmp_path / "final" / "adapter_model.safetensors")
    assert diagnose(tmp_path)[-1].look


def test_a_long_log_is_read_fast_and_line_by_line(tmp_path):
    resource = pytest.importorskip("resource")
    more = {f"tokens/role {n}": 1 / (n + 3) for n in range(15)}
    write(tmp_path, steps=20_000, reward=lambda step: step / 20_000, **more)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert not looks(diagnose(tmp_path))
    assert time.process_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
