"""Run the benchmarks with a tiny shape on a CPU, to know that they work."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, load_script

from iapo_mini.callbacks import Callback
from iapo_mini.cli import _parser
from iapo_mini.policy import load_policy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_memory_benchmark_runs_on_a_tiny_shape(tmp_path):
    out = tmp_path / "memory.json"
    done = run("memory.py", "--tiny", "--device", "cpu", "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["shape"] == "tiny" and row["device"] == "cpu" and row["prompt"] == 200
    assert row["peak_gb"] is None  # nothing is measured on a CPU, so nothing is said
    assert 0 < row["planned_tensors_gb"] < row["planned_gb"]
    assert row["iapo_step_over_grpo_step"] > 0
    for method in ("grpo", "iapo"):
        assert set(row["seconds"][method]) == {"sampling", "information", "update"}
        assert row["seconds"][method]["update"] > 0
    assert row["settings"]["four_bit"] and row["settings"]["num_generations"] == 8
    assert 12 < row["length"] <= 16 and row["steps"] == {"grpo": 2, "iapo": 2}


def test_a_stopped_memory_benchmark_keeps_what_it_measured_and_goes_on(tmp_path, monkeypatch):
    """Ctrl-C in the first step of IAPO: the step is finished and counts, the rest is made later."""
    memory = load_script(BENCHMARKS / "memory.py")
    out, tiny = tmp_path / "memory.json", ["--tiny", "--device", "cpu", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *tiny, "--out", str(out)])
    trained, real = [], memory.train

    def stopped(config, folder, *, callbacks, **options):
        trained.append(config.method)

        def interrupt(line):
            if config.method == "iapo" and len(trained) == 2:
                signal.raise_signal(signal.SIGINT)

        return real(config, folder, callbacks=[*callbacks, Callback(interrupt)], **options)

    monkeypatch.setattr(memory, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        memory.main()
    (cut,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert cut["steps"] == {"grpo": 2, "iapo": 1} and cut["seconds"]["iapo"]["update"] > 0
    memory.main()
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert trained == ["grpo", "iapo", "iapo"] and row["steps"] == {"grpo": 2, "iapo": 2}
    assert row["seconds"]["grpo"] == cut["seconds"]["grpo"]


def test_the_sampling_benchmark_runs_on_a_tiny_shape(tmp_path):
    out = tmp_path / "sampling.json"
    done = run("sampling.py", "--tiny", "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {(r["weights"], r["way"]) for r in rows} == {
        (weights, way)
        for weights in ("4-bit", "merged")
        for way in ("native", "generate", "static")
    }
    assert all(r["tokens_per_second"] > 0 and r["tokens"] > 100 for r in rows), rows
    assert [r["left"] for r in rows] == [5, 4, 3, 2, 1, 0]


def test_a_stopped_sampling_benchmark_measures_only_the_ways_that_are_left(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sampling = load_script(BENCHMARKS / "sampling.py")
    out = tmp_path / "sampling.json"
    monkeypatch.setattr(sys, "argv", ["", "--tiny", "--device", "cpu", "--out", str(out)])
    asked = []

    def measure(policy, problems, length, way, cuda):
        asked.append(way)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"tokens_per_second": 1.0, "tokens": 9, "seconds": 9.0}

    monkeypatch.setattr(sampling, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        sampling.main()
    kept = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["way"] for row in kept] == ["native", "generate"]
    sampling.main()
    assert asked[2:] == ["static", "static", "native", "generate", "static"]
    assert json.loads(out.read_text(encoding="utf-8"))["rows"][:2] == kept
    sampling.main()  # a finished one is measured anew
    assert len(asked) == 3 + 4 + 6 and len(json.loads(out.read_text(encoding="utf-8"))["rows"]) == 6


def test_the_benchmark_of_watching_runs_on_a_few_completions_and_judges(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
    out = tmp_path / "watching.json"
    sizes = ("--turns", 1, "--prompts", 2, "--problems", 4, "--limit", 16)
    done = run("watching.py", *sizes, "--out", out)
    assert done.returncode in (0, 1), done.stderr  # 1: a step of so few completions is short
    results = json.loads(out.read_text(encoding="utf-8"))
    assert all(len(values) == 1 for values in results["seconds"].values())
    assert results["share"]["evaluate every 10 steps"] > results["share"]["evaluate every 50 steps"]
    results["share"]["keep"] = 0.2
    out.write_text(json.dumps(results), encoding="utf-8")
    refused = run("watching.py", "--check", "--out", out)
    assert refused.returncode == 1 and "more than 3% of a step" in refused.stderr


def test_the_trl_benchmark_runs_on_a_few_completions(tmp_path):
    pytest.importorskip("trl", reason="the extra [trl] is not installed")
    out = tmp_path / "trl.json"
    sizes = ("--repeats", 1, "--prompts", 2, "--group", 2, "--limit", 16)
    done = run("trl.py", *sizes, "--out", out)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert done.returncode in (0, 1), done.stderr  # 1: so few completions say nothing of the ratio
    assert 0 <= results["max_loss_difference"] < 1e-5
    median = results["median_seconds"]
    assert results["our_step_over_trl_step"] == median["ours"] / median["trl"] > 0
    assert len(results["seconds"]["ours"]) == len(results["seconds"]["trl"]) == 1
    assert 0 < results["mean_length"]["ours"] <= 16 and 0 < results["mean_length"]["trl"] <= 16


def test_the_trl_benchmark_has_a_row_for_a_rule_and_keeps_the_other_results(tmp_path):
    pytest.importorskip("trl", reason="the extra [trl] is not installed")
    out = tmp_path / "trl.json"
    out.write_text('{"max_loss_difference": 0.0, "our_step_over_trl_step": 0.4}', encoding="utf-8")
    sizes = ("--repeats", 1, "--prompts", 2, "--group", 4, "--limit", 16)
    done = run("trl.py", "--rules", "--methods", "grpo", "iapo", "sgrpo", *sizes, "--out", out)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["our_step_over_trl_step"] == 0.4
    rules = results["rules"]
    assert list(rules) == ["trl", "grpo", "iapo", "sgrpo"]
    for name in ("grpo", "iapo", "sgrpo"):
        for what in ("advantage", "loss", "gradient"):
            assert 0 <= rules[name][f"{what}_difference"] < 2e-3, (name, what)
        assert len(rules[name]["seconds"]) == 1 and 0 < rules[name]["mean_length"] <= 16
    assert done.stdout.count("| ") > 3 * 4 and "| S-GRPO |" in done.stdout


def test_the_benchmark_of_a_real_model_runs_on_the_embedded_policy(tmp_path):
    pytest.importorskip("trl", reason="the extra [trl] is not installed")
    out = tmp_path / "real_speed.json"
    done = run("real_speed.py", "embedded", "--tiny", "--threads", 1, "--out", out)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert done.returncode in (0, 1), done.stderr  # 1: so few tokens say nothing of the ratios
    seconds = results["median_seconds"]
    for ratio, part, one, other in (
        ("our_step_over_trl_step", "step", "ours", "trl"),
        ("sampling_over_generate", "sampling_per_token", "ours", "generate"),
        ("sampling_over_generate_merged", "sampling_per_token", "ours", "generate_merged"),
        ("sentence_estimator_over_forward", "estimator", "sentence", "forward"),
        ("iapo_sentence_step_over_grpo_step", "train", "iapo_sentence", "grpo"),
    ):
        assert results[ratio] == seconds[part][one] / seconds[part][other] > 0
    assert results["processor"] and results["model"] == "embedded"
    assert results["phases"]["grpo"]["seconds_sampling"] > 0
    judged = run("real_speed.py", "--check", "--out", out)
    assert judged.returncode == done.returncode and done.stdout.endswith(judged.stdout)


def test_the_benchmark_of_a_real_model_asks_for_one():
    done = run("real_speed.py")
    assert done.returncode == 2 and "name a model" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only without a CUDA device")
@pytest.mark.parametrize("script", ["memory.py", "sampling.py"])
def test_without_a_gpu_they_say_so(script):
    done = run(script)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(script) and "CUDA device" in line


@pytest.fixture(scope="module")
def one_gpu():
    return load_script(BENCHMARKS / "one_gpu.py")


def test_what_one_gpu_has_begun_it_continues_until_everything_is_finished(
    one_gpu, tmp_path, monkeypatch, capsys
):
    """The first call has no time for a step of the two runs; the second makes all of them."""
    solved = {"question": "Ann has 3 figs and buys 4. How many?", "answer": "3 + 4 = 7\n#### 7"}
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps(solved) + "\n", encoding="utf-8")
    folders = ("--out", tmp_path / "runs", "--figures", tmp_path / "figures")
    sizes = ("--tiny", "--device", "cpu", "--model", "embedded", "--steps", 2)
    options = (*sizes, *folders, "--data-file", data, "--parts", "gsm8k")

    def called(*more):
        monkeypatch.setattr(sys, "argv", ["one_gpu.py", *map(str, (*options, *more))])
        with pytest.raises(SystemExit) as ended:
            one_gpu.main()
        return ended.value.code, capsys.readouterr().out

    code, told = called()
    assert code == 3 and "waits for the start policy" in told
    load_policy(lora_rank=0).save(tmp_path / "runs/quick/real_training/start/model")
    code, told = called("--minutes", 0.02)
    assert code == 3 and '{"finished": false}' in told
    code, told = called()
    assert code == 0 and '{"finished": true}' in told and "| GRPO |" in told
    path = tmp_path / "figures" / "results" / "one_gpu.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert {row: len(one["length"]) for row, (one,) in runs.items()} == {"grpo": 2, "iapo": 2}
    # Both methods begin with the same policy, prompts and random numbers.
    assert runs["grpo"][0]["length"][0] == runs["iapo"][0]["length"][0]


def test_the_study_of_one_gpu_is_the_command_for_its_model(one_gpu, tmp_path):
    args = argparse.Namespace(
        tiny=False, model="some/model", out=tmp_path, figures=tmp_path, parallel=3, device="cpu"
    )
    python, _, _, *given = one_gpu.study_command(args)
    told = _parser().parse_args(given)
    assert python == sys.executable and told.experiment == "real-training"
    assert (told.preset, told.model, told.parallel) == ("card", "some/model", 3)
    assert one_gpu.start_of(args) == tmp_path / "card" / "real_training" / "start" / "model"
    path = tmp_path / "results" / "real_training_card.json"
    path.parent.mkdir()
    path.write_text("{}", encoding="utf-8")
    assert one_gpu.commands_of("study", args) == []


def test_a_part_that_takes_too_long_is_asked_to_stop(one_gpu, tmp_path):
    saved = tmp_path / "saved"
    patient = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_): pathlib.Path({str(saved)!r}).touch(); sys.exit(0)\n"
        "for name in ('SIGINT', 'SIGTERM'): signal.signal(getattr(signal, name), stop)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    assert not one_gpu.together([[sys.executable, "-c", patient]], began + 3)
    assert time.monotonic() - began < 30
    if sys.platform != "win32":
        assert saved.is_file()
    assert one_gpu.together([[sys.executable, "-c", "pass"]], time.monotonic() + 60)
    assert not one_gpu.together(
        [[sys.executable, "-c", "raise SystemExit(1)"]], time.monotonic() + 60
    )


def test_only_shapes_that_this_device_has_not_measured_are_left(one_gpu, tmp_path):
    path = tmp_path / "results" / "memory.json"
    path.parent.mkdir()
    row = {"shape": "tiny", "device": "cpu", "settings": {"max_steps": 3}}
    other = row | {"shape": "qwen2.5-7b", "device": "another card", "steps": {}}
    for steps in ({}, {"grpo": 3}, {"grpo": 3, "iapo": 1}):
        path.write_text(json.dumps({"rows": [row | {"steps": steps}, other]}), encoding="utf-8")
        assert not one_gpu.measured(path, "tiny", "cpu"), steps
    rows = [row | {"steps": {"grpo": 3, "iapo": 3}}, other]
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    assert one_gpu.measured(path, "tiny", "cpu")
    assert not one_gpu.measured(path, "qwen2.5-7b", "cpu")
    assert not one_gpu.measured(tmp_path / "none.json", "tiny", "cpu")
    args = argparse.Namespace(tiny=True, device="cpu", figures=tmp_path)
    assert one_gpu.commands_of("memory", args) == []
    path = tmp_path / "results" / "sampling.json"
    rows = [{"shape": "tiny", "device": "cpu", "weights": "4-bit", "way": "native", "left": n}
            for n in (5, 0)]  # fmt: skip
    for made in ([], rows[:1]):
        path.write_text(json.dumps({"rows": made}), encoding="utf-8")
        (((*_, out),),) = one_gpu.commands_of("sampling", args)
        assert out == str(path)
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    assert one_gpu.commands_of("sampling", args) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "device is cuda, but real shapes need a CUDA device"),
        (("--tiny", "--device", "cpu", "--minutes", "0"), "must be above 0, got 0 and 200"),
        (("--tiny", "--device", "cpu", "--steps", "0"), "must be above 0, got 25 and 0"),
        (("--parts", "speed"), "invalid choice: 'speed'"),
    ],
)
def test_one_gpu_refuses_what_it_can_not_do(one_gpu, monkeypatch, capsys, options, sentence):
    monkeypatch.setattr(sys, "argv", ["one_gpu.py", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        one_gpu.main()
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and sentence in error and not out
