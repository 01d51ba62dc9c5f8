"""What an unfinished training study says: runs of different lengths, compared on equal prompts."""

import json

import pytest

from iapo_mini.intervals import mean_interval
from iapo_mini.lab.real_progress import WINDOW, compare, progress_table, runs_of, so_far


def write_lines(path, rows, cut=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut, encoding="utf-8")


def write_run(folder, name, lengths, cut=""):
    rows = [{"length": n, "accuracy": 1 - n / 1000, "reward": 0.0} for n in lengths]
    write_lines(folder / name / "train" / "metrics.jsonl", rows, cut)


@pytest.fixture
def study(tmp_path):
    write_run(tmp_path, "grpo-0", range(100, 130))
    write_run(tmp_path, "grpo-1", [50] * 20)
    write_run(tmp_path, "iapo-0", range(98, 123), cut='{"length": 3')  # a line still being written
    write_run(tmp_path, "iapo-10", [40] * 12)  # its GRPO run has not begun
    write_run(tmp_path, "iapo_sentence-0", [])
    return tmp_path


ROWS = ("grpo", "grpo_efficient", "iapo", "iapo_sentence")


def test_rows_of_a_seed_are_compared_at_the_last_steps_that_every_run_has_made(study):
    runs = runs_of(study, ROWS)
    assert list(runs) == ["grpo", "iapo"]
    assert [one["seed"] for one in runs["iapo"]] == [0, 10]
    assert len(runs["iapo"][0]["length"]) == 25  # whole lines only
    assert compare(runs) == 12
    mean, low, high = runs["iapo"][0]["against"]["length"]
    assert mean == low == high == pytest.approx(-2)
    assert runs["iapo"][1]["against"] is None
    assert runs["grpo"][1]["against"]["accuracy"] == pytest.approx((0, 0, 0))


def test_the_interval_is_over_the_steps_of_the_window(tmp_path):
    differences = [9, 9, 9, 1, -4, 2, 5, -3, 0, 2, 2, 1, 4]
    write_run(tmp_path, "grpo-3", [100] * 13)
    write_run(tmp_path, "iapo-3", [100 + d for d in differences])
    runs = runs_of(tmp_path, ROWS)
    assert compare(runs) == 13
    expected = mean_interval(differences[-WINDOW:])
    assert runs["iapo"][0]["against"]["length"] == pytest.approx(expected)


def test_a_finished_run_of_another_machine_counts_like_one_made_here(study):
    def entry(result, lengths=()):
        curve = {"length": list(lengths), "accuracy": [0.5] * len(lengths), "entropy": []}
        return {"job": {}, "result": {"problems": 4} | result, "curve": curve if lengths else None}

    entries = {
        "start-0": entry({"pass@1": 0.4, "length": 90.0}),
        "iapo_sentence-0": entry({"pass@1": 0.6, "length": 70.0}, [80.0] * 30),
        "iapo_sentence-1": entry({"pass@1": 0.7, "length": 60.0}, [40.0] * 30),
    }
    runs = runs_of(study, ROWS, entries)
    assert list(runs) == ["grpo", "iapo", "iapo_sentence"]
    first, second = runs["iapo_sentence"]
    assert first["length"] == [80.0] * 30 and first["judged"] == {
        "problems": 4, "pass@1": 0.6, "length": 70.0, "start pass@1": 0.4, "start length": 90.0,
    }  # fmt: skip
    assert second["seed"] == 1 and second["judged"] is None  # its start policy is not judged yet
    compare(runs)
    assert second["against"]["length"] == pytest.approx((-10, -10, -10))


def test_a_judgement_is_compared_with_the_start_on_the_same_problems(study):
    def judged(problem, correct, tokens):
        return {"problem": problem, "text": "", "correct": correct, "tokens": tokens}

    write_lines(study / "start-0" / "completions.jsonl",
                [judged(0, True, 80), judged(0, False, 60), judged(1, True, 900)])  # fmt: skip
    write_lines(study / "iapo-0" / "completions.jsonl",
                [judged(0, True, 30), judged(0, True, 50)], cut='{"problem"')  # fmt: skip
    runs = runs_of(study, ROWS)
    assert runs["iapo"][0]["judged"] == {
        "problems": 1, "pass@1": 1.0, "length": 40, "start pass@1": 0.5, "start length": 70,
    }  # fmt: skip
    assert runs["grpo"][0]["judged"] is None


def test_the_table_has_a_line_for_each_run(study):
    results = so_far(study, ROWS, {"model": "m"})
    assert results["model"] == "m" and results["device"] == "unknown" and results["common"] == 12
    lines = progress_table(results).splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    assert "steps 3 to 12" in lines[0] and "| -2.0 [-2.0, -2.0] |" in lines[4]


def test_a_study_without_a_finished_step_has_nothing_to_tell(tmp_path):
    write_run(tmp_path, "grpo-0", [])
    with pytest.raises(ValueError, match="no run has finished a step"):
        so_far(tmp_path, ROWS, {})
