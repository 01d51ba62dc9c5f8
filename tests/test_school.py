"""Worked problems for real models: levels of difficulty, and files in GSM8K's format."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo_mini.lab.school import LEVELS, Worked, read_worked, worked_stories, write_worked
from iapo_mini.problems.stories import MAX_VALUE, SPLITS, operands, split_of, stories
from iapo_mini.rewards import reward
from iapo_mini.tasks import Problem


def first(n, *args):
    return list(itertools.islice(worked_stories(*args), n))


def arithmetic(problem):
    return problem.steps[0].before, [(s.op, s.operand) for s in problem.steps]


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_its_operations_and_numbers(level):
    operations, largest = level
    for problem, thought in first(30, "train", 0, [level]):
        assert len(problem.steps) == operations
        values = [problem.steps[0].before, *(step.result for step in problem.steps)]
        assert all(1 <= value <= largest for value in values)
        assert "<" not in thought and thought == thought.strip()
    assert max(int(w.problem.answer) for w in first(200, "train", 0, [level])) > largest / 3


def test_levels_take_turns():
    levels = [(1, 99), (3, 999)]
    counts = [len(w.problem.steps) for w in first(6, "tune", 0, levels)]
    assert counts == [1, 3, 1, 3, 1, 3]


def test_streams_are_seeded_and_share_no_arithmetic():
    assert first(20, "train", 0, LEVELS) == first(20, "train", 0, LEVELS)
    assert first(20, "train", 0, LEVELS) != first(20, "train", 1, LEVELS)
    for split in SPLITS:
        assert {split_of(*arithmetic(w.problem)) for w in first(60, split, 0, LEVELS)} == {split}


def test_a_worked_story_earns_the_full_reward():
    for worked in first(40, "test", 0, LEVELS):
        assert reward(worked.text(), worked.problem.answer) == (1.5, True)
        assert worked.text().startswith(f"<think>{worked.thought[0]}")


@given(st.integers(1, 9999), st.sampled_from([60, 99, 999, 9999]))
def test_operands_keep_values_in_range(value, largest):
    value = min(value, largest)
    for op, numbers in operands(value, largest).items():
        for n in (numbers[0], numbers[-1]):
            result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
            assert 1 <= result <= largest and (op != "/" or result * n == value)


def test_the_embedded_policys_stories_are_as_they_were():
    """Numbers up to 60 give the stream that it was trained on."""
    assert MAX_VALUE == 60
    assert operands(10)["+"] == operands(10, 60)["+"] == [2, 3, 4, 5, 6, 7, 8, 9]
    plain, named = (next(stories("train", 5, **more)) for more in ({}, {"largest": 60}))
    assert plain == named


@pytest.mark.parametrize("largest", [0, 19, -5])
def test_a_world_without_room_is_refused(largest):
    with pytest.raises(ValueError, match=f"largest must be at least 20, got {largest}"):
        stories("train", largest=largest)


def test_files_are_read_back(tmp_path):
    path = tmp_path / "data" / "worked.jsonl"
    written = first(12, "train", 0, LEVELS)
    write_worked(path, written)
    found = read_worked(str(path))
    assert [w.thought for w in found] == [w.thought for w in written]
    for one, other in zip(found, written, strict=True):
        assert one.problem.question == other.problem.question
        assert one.problem.answer == other.problem.answer
    assert [p.name for p in path.parent.iterdir()] == ["worked.jsonl"]


def test_notes_for_a_calculator_are_removed(tmp_path):
    path = tmp_path / "gsm8k.json"
    row = {"question": "A?", "answer": "He has 48/2 = <<48/2=24>>24.\nSo 24.\n#### 1,024"}
    path.write_text(json.dumps([row]), encoding="utf-8")
    (found,) = read_worked(str(path))
    assert found == Worked(Problem("A?", "1024"), "He has 48/2 = 24.\nSo 24.")


@pytest.mark.parametrize("answer", ["24", 24, "#### 24", "  \n#### 24"])
def test_answers_without_a_solution_are_refused(tmp_path, answer):
    path = tmp_path / "answers.jsonl"
    good = json.dumps({"question": "A?", "answer": "1 + 1 = 2.\n#### 2"})
    path.write_text(
        good + "\n" + json.dumps({"question": "B?", "answer": answer}) + "\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"answers.jsonl', where line 2 has no worked solution"):
        read_worked(str(path))
