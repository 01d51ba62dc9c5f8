"""The study that calibrates a real model, on the embedded policy at its smallest size."""

import itertools
import json

import numpy as np
import pytest
import torch

from iapo_mini.calibration import exit_calibration
from iapo_mini.cli import main
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.lab import real_calibration as module
from iapo_mini.lab.real_calibration import (
    SCALES,
    _lessons,
    judged,
    real_calibration,
    real_calibration_table,
    splits_of,
    tokens_of,
)
from iapo_mini.lab.school import Worked, worked_stories, write_worked
from iapo_mini.policy import load_policy
from iapo_mini.sampling import from_texts
from iapo_mini.tasks import Problem

PIECES = ["<", "think", ">", "Ida", " has", " $", "3", "0", ".", "\n", "3", "0", "-", "1", "4",
          " =", " $", "1", "6", ".", " Done", "</", "think", "><", "answer", ">", "1", "6", "</",
          "answer", ">"]  # fmt: skip


def test_kinds_of_tokens():
    known = tokens_of(PIECES)
    assert "".join(PIECES[i] for i in known.inside) == "Ida has $30.\n30-14 = $16. Done"
    named = {
        "computes": [PIECES[i] for i, x in zip(known.inside, known.computes) if x],
        "words": [PIECES[i] for i, x in zip(known.inside, known.words) if x],
    }
    assert named == {"computes": ["1", "6"], "words": ["Ida", " has", " Done"]}
    first, *others = (known.inside[known.sentence == n].tolist() for n in range(3))
    assert first == list(range(3, 10))
    assert ["".join(PIECES[i] for i in some) for some in others] == ["30-14 = $16.", " Done"]


@pytest.mark.parametrize(
    ("thought", "results"),
    [
        ("48/2 = 24 clips.", {"24"}),
        ("So 5*60=300 and 300-212 = 88.", {"300", "88"}),
        ("He pays 3 * $1,200.50 = $3,601.50 in all", {"3,601.50"}),
        ("That is 4 - 9 = -5 degrees", {"5"}),  # the sign is an operator
        ("It has 5 cars.", set()),
    ],
)
def test_numbers_after_an_equals_sign_compute(thought, results):
    texts = ["<think>", *thought, "</think>", "<answer>1 = 7</answer>"]
    known = tokens_of(texts)
    runs = itertools.groupby(zip(known.inside, known.computes), key=lambda pair: bool(pair[1]))
    found = {"".join(texts[i] for i, _ in run) for computes, run in runs if computes}
    assert found == results


@pytest.fixture
def data_file(tmp_path):
    """Thirty worked stories, so three are test problems; some sentences compute, others do not."""
    path = tmp_path / "worked.jsonl"
    write_worked(path, list(itertools.islice(worked_stories("train", 0, [(2, 60), (4, 60)]), 30)))
    return str(path)


def test_splits_share_no_question_and_lessons_come_from_one(data_file):
    train, test = splits_of(data_file)
    assert (len(train), len(test)) == (24, 3)
    asked = {w.problem.question for w in test}
    lessons = _lessons(train, 60)
    assert len(lessons) == 60 and not asked & {w.problem.question for w in lessons}
    for start in (0, 24):  # every pass has all of them, in another order
        assert sorted(lessons[start : start + 24], key=str) == sorted(train, key=str)
    assert lessons[:24] != lessons[24:48] and lessons == _lessons(train, 60)


def test_what_is_judged(base_policy, data_file, tmp_path):
    """Compared with the parts that it is made of, on one batch without blocks."""
    test = splits_of(data_file)[1]
    scale = SCALES["quick"]
    found = judged(base_policy, test, scale, tmp_path / "own")
    problems, texts = [w.problem for w in test], [w.text() for w in test]
    rollouts = from_texts(base_policy, problems, texts)
    exits = exit_calibration(base_policy, rollouts, [p.answer for p in problems])
    expected = expected_calibration_error(exits["confidence"].flatten(), exits["correct"].flatten())
    assert found["ece"] == pytest.approx(expected, abs=1e-6) and len(found["ece_by_tenth"]) == 11
    s = informativeness(answer_entropies(base_policy, rollouts), rollouts.completion_mask)
    words = []
    for row, ids in zip(s, rollouts.completion_ids):
        for value, token in zip(row.tolist(), ids.tolist()):
            text = base_policy.tokenizer.decode([token])
            letters = text.strip(" .,:").isalpha()
            if letters and text not in ("think", "answer"):
                words.append(value)
    assert found["words_sd"] == pytest.approx(np.std(words), rel=0.02)
    assert 0 <= found["auc"][1] <= found["auc"][0] <= found["auc"][2] <= 1
    assert found["solution_nats"] > 0 and set(found["intervals"]) >= {"pass@1", "lenient pass@1"}


def test_the_study_is_made_once_and_continues(data_file, tmp_path, monkeypatch):
    options = {"data_file": data_file, "out": tmp_path / "out", "figures": tmp_path / "figures"}
    with monkeypatch.context() as patch:  # a process that is stopped before the last part
        patch.setattr(module, "replace_folder", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            real_calibration("quick", **options, threads=1)
    results = real_calibration("quick", **options, threads=1)
    assert real_calibration("quick", **options, threads=1) == results
    path = tmp_path / "figures/results/real_calibration_quick.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert results["problems"] == 3 and len(results["losses"]) == results["steps"] == 2
    assert results["before"]["solution_nats"] != results["after"]["solution_nats"]
    adapted = load_policy(adapter=tmp_path / "out/quick/real_calibration/calibrated")
    assert any(p.abs().sum() > 0 for n, p in adapted.trainable().items() if "lora_B" in n)
    lines = real_calibration_table(results).splitlines()
    assert all(line.count("|") == 4 for line in lines[:9]) and "3 test problems" in lines[-1]


def test_another_file_in_the_same_folder_is_refused(data_file, tmp_path):
    options = {"out": tmp_path / "out", "figures": tmp_path / "figures", "threads": 1}
    real_calibration("quick", data_file=data_file, **options)
    other = tmp_path / "other.jsonl"
    write_worked(other, list(itertools.islice(worked_stories("train", 1, [(2, 60)]), 30)))
    with pytest.raises(ValueError, match=r"data is '\w+', but the study in .* was started with"):
        real_calibration("quick", data_file=str(other), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--preset", "huge"], "preset must be one of quick, full, got 'huge'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--data-file", "no.jsonl"], "data_file is 'no.jsonl', which is not a file"),
        (["--data-file", "README.md"], "data_file must be a file of type .jsonl"),
    ],
)
def test_bad_options_are_refused(tmp_path, data_file, capsys, options, sentence):
    where = ["--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    with pytest.raises(SystemExit) as ended:
        main(["lab", "real-calibration", "--data-file", data_file, *where, *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line


def test_a_file_without_solutions_is_refused(tmp_path):
    path = tmp_path / "worked.jsonl"
    write_worked(path, [Worked(Problem(f"{n}?", "1"), "") for n in range(4)])
    with pytest.raises(ValueError, match="no worked solution"):
        real_calibration("quick", data_file=str(path), out=tmp_path, figures=tmp_path)
    assert torch.is_grad_enabled()
