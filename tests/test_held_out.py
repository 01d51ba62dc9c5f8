"""Judging during training: what is kept, which policy is best, when training stops."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import PATIENCE
from safetensors import SafetensorError

from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.held_out import better, exhausted, held_out_problems
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.tasks import Problem
from iapo_mini.trainer import train

CONFIG = TrainConfig(
    method="grpo", max_steps=6, prompts_per_step=1, num_generations=2, max_completion_length=16,
    learning_rate=5e-3, device="cpu", threads=1, eval_every=2, eval_problems=3, save_steps=2,
)  # fmt: skip


def rows(values, name="ratio@1"):
    return [{"step": i, name: value} for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "patience", "ends"),
    [
        ([], 1, False),
        ([1], 1, False),
        ([1, 2], 1, False),
        ([1, 1], 1, True),  # as good is not better
        ([2, 1], 1, True),
        ([2, 1], 2, False),
        ([2, 1, 1], 2, True),
        ([2, 1, 3], 2, False),
        ([2, 1, 3, 1, 1], 2, True),
        ([2, 1, 1, 1, 1], 0, False),
    ],
)
def test_patience_counts_evaluations_without_a_better_one(values, patience, ends):
    assert exhausted(rows(values), "ratio@1", patience) == ends
    shorter = rows([-value for value in values], "length")
    assert exhausted(shorter, "length", patience) == ends


def test_shorter_is_better_and_of_equal_ones_the_earlier_stays():
    assert better({"length": 30}, {"length": 40}, "length")
    assert better({"pass@1": 0.5}, None, "pass@1")
    assert not better({"pass@1": 0.5}, {"pass@1": 0.5}, "pass@1")


def test_a_run_on_problems_of_ones_own_is_not_judged_on_stories(tmp_path):
    with pytest.raises(ValueError, match="eval_every must be 0 with problems that are not those"):
        train(CONFIG, tmp_path / "run", problems=[Problem("1 + 1?", "2")], progress=False)


def test_data_without_a_stream_for_it_is_told_with_its_setting():
    with pytest.raises(ValueError, match=r"eval_every must be 0 if the tune stream .*gsm8k"):
        held_out_problems(replace(CONFIG, data="gsm8k"))


def test_a_full_disk_while_the_best_policy_is_saved_is_one_sentence(tmp_path, monkeypatch):
    def full(policy, folder):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("iapo_mini.policy.Policy.save", full)
    with pytest.raises(OSError, match=r"writing failed \(No space left.*checkpoint-2' is whole"):
        train(replace(CONFIG, eval_every=3), tmp_path / "run", progress=False)


def test_problems_are_of_a_stream_that_is_not_trained_on():
    found = [problem.question for problem in held_out_problems(CONFIG)]
    assert len(found) == 3
    for split in ("train", "test"):
        seen = {problem.question for problem, _ in zip(stories(split), range(2000))}
        assert not seen & set(found)
    assert held_out_problems(replace(CONFIG, eval_every=0)) == []


@pytest.mark.parametrize("split", ["tune", "all"])
def test_a_run_on_that_stream_is_refused(split, tmp_path):
    if split == "all":
        pytest.skip("stories have no split 'all'; a local file has")
    with pytest.raises(ValueError, match="split must be train or test with eval_every, got 'tune'"):
        train(replace(CONFIG, split=split), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("eval_every", -1), ("eval_problems", 0), ("patience", -1)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        TrainConfig(**{name: value})
    with pytest.raises(ValueError, match=r"best_by must be one of .*, got 'ratio'; did you mean"):
        TrainConfig(best_by="ratio")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    told = []
    train(CONFIG, folder, callbacks=[Callback(on_evaluate=told.append)], progress=False)
    return folder, told


def lines(folder):
    text = (folder / "evaluations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def weights(folder):
    return dict(load_policy(adapter=folder).merged_weights())


def test_every_evaluation_is_written_and_told(run):
    folder, told = run
    assert [row["step"] for row in told] == [2, 4, 6] and lines(folder) == told
    for row in told:
        assert set(row) == {"step", "pass@1", "length", "ratio@1"} and row["length"] > 0


def test_the_best_policy_is_kept_and_is_that_of_its_step(run, tmp_path):
    folder, told = run
    best = json.loads((folder / "best/evaluation.json").read_text(encoding="utf-8"))
    top = max(told, key=lambda row: (row["ratio@1"], -row["step"]))
    assert best == top
    train(replace(CONFIG, max_steps=best["step"], eval_every=0), tmp_path / "short", progress=False)
    one, other = weights(folder / "best"), weights(tmp_path / "short/final")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_judging_changes_nothing_in_training(run, tmp_path):
    train(replace(CONFIG, eval_every=0), tmp_path / "plain", progress=False)
    one, other = weights(run[0] / "final"), weights(tmp_path / "plain/final")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain/best").exists()


SCRIPT = """
import json, os, sys
from iapo_mini.callbacks import Callback
from iapo_mini.config import TrainConfig
from iapo_mini.trainer import train

train(TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=False,
      callbacks=[Callback(lambda row: row["step"] == 5 and os._exit(9))])
"""


def test_a_killed_run_resumes_to_the_same_evaluations_and_best(run, tmp_path):
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(vars(CONFIG)), str(folder)], timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 9 and [row["step"] for row in lines(folder)] == [2, 4]
    with (folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "pass@1": 9, "ratio@1": 9, "length": 1}\n{"step": 8, "pa')
    train(CONFIG, folder, resume=True, progress=False)
    assert lines(folder) == run[1]
    for name in ("best", "final"):
        one, other = weights(folder / name), weights(run[0] / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_stops_when_patience_ends_and_stays_ended(tmp_path, monkeypatch):
    found = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(
        "iapo_mini.held_out.evaluate",
        lambda *a, **k: {"pass@1": 0.5, "length": 10.0, "ratio@1": next(found)},
    )
    config, steps = replace(CONFIG, patience=2, max_steps=20), []
    watcher = Callback(lambda row: steps.append(row["step"]))
    train(config, tmp_path / "run", callbacks=[watcher], progress=False)
    assert steps == [1, 2, 3, 4, 5, 6]
    best = json.loads((tmp_path / "run/best/evaluation.json").read_text(encoding="utf-8"))
    assert best["step"] == 2 and (tmp_path / "run/final").is_dir()
    train(config, tmp_path / "run", resume=True, callbacks=[watcher], progress=False)
    assert steps == [1, 2, 3, 4, 5, 6]
