"""The study that trains a real model, on the embedded policy at its smallest size."""

import json
import shutil

import pytest
from helpers import run_here
from hypothesis import given
from hypothesis import strategies as st

from iapo_mini.cli import main
from iapo_mini.lab import real_training as module
from iapo_mini.lab import warm_start
from iapo_mini.lab.ledger import content_of
from iapo_mini.lab.pace import duration, forward_speed
from iapo_mini.lab.real_training import (
    ROWS,
    SCALES,
    WANTED,
    chosen_levels,
    expected_seconds,
    real_training,
    real_training_table,
)
from iapo_mini.problems.datasets import load_problems

pytest.importorskip("accelerate", reason="transformers' trainer needs accelerate")


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    options = {"out": folder / "runs", "figures": folder / "figures"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_all", run_here)
        results = real_training("quick", **options)
        made = [p.stat().st_mtime_ns for p in sorted(folder.rglob("*.safetensors"))]
        assert real_training("quick", **options) == results  # nothing is made again
        assert made == [p.stat().st_mtime_ns for p in sorted(folder.rglob("*.safetensors"))]
    return folder, results


def test_the_results_are_those_of_table_1_with_their_costs(study):
    folder, results = study
    path = folder / "figures/results/real_training_quick.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert list(results["methods"]) == ["start", *ROWS] and list(results["curves"]) == list(ROWS)
    for name, row in results["methods"].items():
        for metric in ("length", "pass@1", "pass@2", "length@2", "ratio@1", "train_minutes"):
            assert len(row[metric]) == 1, (name, metric)
    for name in ROWS:
        length = results["curves"][name][0]["length"]
        assert results["tokens"][name] == [round(8 * sum(length))]
    assert results["start"]["minutes"] > 0 and len(results["levels"]) == 2


def test_every_row_has_the_same_start_prompts_and_settings(study):
    folder, results = study
    start = folder / "runs/quick/real_training/start"
    own = {"method", "estimator_stride", "alpha", "beta", "aggregation", "epsilon_high", "kl_coef"}
    rows = [results["config"][name] for name in ROWS]
    assert {row["model"] for row in rows} == {(start / "model").as_posix()}
    assert (start / "adapter" / "adapter_model.safetensors").is_file()
    for row in rows:
        assert {k: v for k, v in row.items() if k not in own} == {
            k: v for k, v in rows[0].items() if k not in own
        }


def test_training_and_test_problems_are_disjoint_and_of_the_chosen_levels(study):
    folder, results = study
    data = folder / "runs/quick/real_training/data"
    train, test = (
        load_problems("gsm8k", "all", str(data / f"{name}.jsonl")) for name in ("train", "test")
    )
    assert len(test) == SCALES["quick"].runs.problems and len(train) == 1000
    assert not {p.question for p in train} & {p.question for p in test}
    assert set(results["chosen"]) <= {0, 1} and results["chosen"]


def test_another_machine_continues_from_the_start_that_is_kept(study, tmp_path, monkeypatch):
    folder, _ = study
    shutil.copytree(folder / "figures", tmp_path / "figures")
    for owner, name in ((warm_start, "_train"), (module, "_measure")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("it was made again"))
    jobs = []

    def run_all(given, *_):
        jobs.extend(given)
        raise Stop

    monkeypatch.setattr(module, "run_all", run_all)
    with pytest.raises(Stop):
        real_training("quick", out=tmp_path / "runs", figures=tmp_path / "figures")
    here = folder / "runs/quick/real_training"
    # Start policy and problems are the same to the last bit; the start is not trained.
    files = (str(here / "data" / f"{name}.jsonl") for name in ("test", "train"))
    content = content_of(str(here / "start/model"), *files)
    assert [job["content"] for job in jobs] == [content[:2]] + [content] * len(ROWS)


def test_the_table_has_costs(study):
    lines = real_training_table(study[1]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3 + len(ROWS) and len({line.count("|") for line in rows}) == 1
    assert "training (1000 tokens)" in rows[0]
    assert ("outside of the wanted ranges" in lines[-1]) != study[1]["within"]


def level(accuracy, solved, formed=1.0):
    return {"format": formed, "pass@1": accuracy, "pass@32": solved}


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ([level(0.5, 0.7)], [0]),
        # Neither alone is in the ranges; both together are in their middle.
        ([level(0.9, 1.0), level(0.1, 0.4)], [0, 1]),
        # All but the one that is too hard.
        ([level(0.5, 0.7), level(0.5, 0.7), level(0.0, 0.0)], [0, 1]),
        # A level with a bad format is left out although its answers are as wanted.
        ([level(0.5, 0.7), level(0.5, 0.7, formed=0.5)], [0]),
        # Nothing fits: the nearest.
        ([level(1.0, 1.0), level(0.8, 1.0)], [1]),
    ],
)
def test_levels_are_chosen_by_what_the_start_can_do(measured, chosen):
    assert chosen_levels(measured) == chosen


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4))
def test_no_single_level_suits_better_than_the_chosen_ones(pairs):
    measured = [level(*sorted(pair)) for pair in pairs]
    found = module._mean_of(measured, chosen_levels(measured))
    assert set(found) == set(WANTED)
    for row in measured:
        assert module._distance(found) <= module._distance(row) + 1e-8


def test_the_estimate_of_time_grows_with_the_work(base_policy, monkeypatch):
    assert forward_speed(base_policy) > 0
    monkeypatch.setattr(module, "forward_speed", lambda policy: 500.0)
    quick, full, card = (
        expected_seconds(base_policy, SCALES[name].runs, SCALES[name])
        for name in ("quick", "full", "card")
    )
    assert quick < 300 < 3 * 3600 < full < 24 * 3600
    assert full < card  # more worked stories


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "about 1 seconds"), (40, "about 40 seconds"), (300, "about 5 minutes"),
     (9000, "about 2.5 hours")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--preset", "large"], "preset must be one of quick, full, card, got 'large'"),
        (["--seeds", "-1"], "seeds must be at least 0, got -1"),
        (["--so-far"], "settings.json"),
        (["--learning-rate", "0"], "learning_rate must be above 0, got 0"),
        (["--parallel", "0"], "parallel must be at least 1, got 0"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, options, sentence):
    where = ["--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    with pytest.raises(SystemExit) as ended:
        main(["lab", "real-training", *where, *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line and not list(tmp_path.rglob("*.safetensors"))


def test_another_study_in_the_same_folder_is_refused(study):
    folder, _ = study
    with pytest.raises(ValueError, match=r"learning_rate is 0.5, but the study in .* with 0.0003"):
        real_training("quick", out=folder / "runs", figures=folder / "figures", learning_rate=0.5)


def test_a_finished_study_can_be_told_as_far_as_it_is(study, capsys):
    folder, results = study
    where = ["--out", str(folder / "runs"), "--figures", str(folder / "figures")]
    main(["lab", "real-training", "--preset", "quick", "--so-far", *where])
    path = folder / "figures/results/real_training_so_far_quick.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    assert list(told["runs"]) == list(ROWS) and told["common"] == 1
    assert {name: told[name] for name in ("model", "device", "start", "levels", "chosen")} == {
        name: results[name] for name in ("model", "device", "start", "levels", "chosen")
    }
    for row, (one,) in told["runs"].items():
        curve = results["curves"][row][0]
        assert one["length"] == curve["length"] and one["accuracy"] == curve["accuracy"]
        assert one["judged"]["problems"] == SCALES["quick"].runs.problems
        assert one["judged"]["pass@1"] == pytest.approx(results["methods"][row]["pass@1"][0])
        start = results["methods"]["start"]["length"][0]
        assert one["judged"]["start length"] == pytest.approx(start)
    assert path.name in capsys.readouterr().out
    assert (folder / "figures" / f"{path.stem}.png").is_file()


def test_a_study_that_was_stopped_before_its_runs_has_nothing_to_tell(study, tmp_path, capsys):
    folder, _ = study
    here = tmp_path / "quick" / "real_training"
    shutil.copytree(folder / "runs/quick/real_training", here)
    shutil.rmtree(here / "data")
    for name in (f"{row}-0" for row in ROWS):
        shutil.rmtree(here / name)
    where = ["--out", str(tmp_path), "--figures", str(folder / "figures")]
    with pytest.raises(SystemExit):
        main(["lab", "real-training", "--preset", "quick", "--so-far", *where])
    assert "no run has finished a step" in capsys.readouterr().err
