"""The study of a pretrained model, here on the embedded policy and three small problems."""

import json
import shutil

import numpy as np
import pytest
import torch

from iapo_mini.early_exit.strides import sentence_ends
from iapo_mini.files import replace_text
from iapo_mini.information import answer_entropies, answer_surprisals
from iapo_mini.lab import real as study
from iapo_mini.lab import real_chains
from iapo_mini.lab.real import own_chains, real, real_table, thought_of
from iapo_mini.lab.real_chains import (
    ESTIMATORS,
    VARIANTS,
    Chain,
    as_rollouts,
    candidates,
    measure,
)
from iapo_mini.lab.real_statistics import summary, within_share
from iapo_mini.policies import SHIPPED
from iapo_mini.policy import load_policy
from iapo_mini.problems.worked import character_kinds, worked_solutions
from iapo_mini.tasks import Problem

ROWS = [
    ("Tom has 3 apples. He buys 4 apples. How many apples does Tom have?",
     "Tom has 3 apples. He buys 4. 3 + 4 = <<3+4=7>>7. So it is 7.\n#### 7"),
    ("Mia has 9 pens. She loses 2 pens. How many pens does Mia have?",
     "She has 9 pens.\nShe loses 2 so 9 - 2 = <<9-2=7>>7 pens.\n#### 7"),
    ("Ben has 5 coins. He finds 6 coins. How many coins does Ben have?",
     "Let me see. 5 + 6 = <<5+6=11>>11\n#### 11"),
]  # fmt: skip


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [json.dumps({"question": q, "answer": a}) for q, a in ROWS]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=0, device="cpu")


@pytest.fixture(scope="module")
def chain(data_file):
    problem, text, kinds = worked_solutions(data_file)[0]
    return Chain(problem, text, kinds, problem.answer, True)


@pytest.fixture(scope="module")
def record(policy, chain):
    torch.set_num_threads(1)
    return measure(policy, chain)


def test_every_token_has_its_values(policy, chain, record):
    n = len(record["tokens"])
    assert "".join(record["tokens"]) == "<think>" + chain.text
    assert record["kinds"][0] == "tag" and "result" in record["kinds"]
    assert set(record["scores"]) == set(ESTIMATORS)
    assert all(len(values) == n for values in record["scores"].values())
    assert json.loads(json.dumps(record)) == record
    rollouts = as_rollouts(policy, chain)
    entropies = answer_entropies(policy, rollouts)[0]
    drops = (entropies[:-1] - entropies[1:]).tolist()
    assert record["scores"]["entropy"] == pytest.approx(drops, abs=2e-5)
    surprisals = answer_surprisals(policy, rollouts, ["7</"])[0]
    found = (surprisals[:-1] - surprisals[1:]).tolist()
    assert record["scores"]["pointwise"] == pytest.approx(found, abs=1e-3)


def test_sentences_and_whole_answers_stand_at_the_same_places(policy, chain, record):
    ends = sentence_ends(policy, as_rollouts(policy, chain))[0].nonzero()[:, 0].tolist()
    whole = record["whole"]
    assert whole["asked"] == ends and record["sentences"][0] == 0
    assert record["sentences"] == sorted(record["sentences"])
    for low, high, left in zip(whole["entropy"], whole["most"], whole["left"]):
        assert low <= high + 1e-6 and -1e-6 <= left <= 1
    first = np.cumsum([0, *record["scores"]["entropy"]])[ends]
    assert [whole["first"][0] - x for x in whole["first"]] == pytest.approx(first, abs=1e-3)


def test_the_variants_ask_in_their_own_way(record):
    variants = record["variants"]
    assert list(variants) == list(VARIANTS)
    assert variants["sentence"]["tokens"] < variants["paper"]["tokens"]
    assert variants["natural"]["tokens"] > variants["paper"]["tokens"]
    assert variants["line_break"]["entropy"] != variants["paper"]["entropy"]
    for found in variants.values():
        assert len(found["entropy"]) == len(record["tokens"]) + 1
        assert len(found["forced"]) == real_chains.PARTS + 1
        assert all(0 <= p <= 1 for p, _ in found["forced"])
    ends = record["whole"]["asked"]
    spread, paper = (np.array(variants[name]["entropy"]) for name in ("sentence", "paper"))
    assert spread[ends] == pytest.approx(paper[ends], abs=1e-4)


@pytest.mark.parametrize(
    ("question", "text", "answer", "expected"),
    [
        ("2 and 3?", "2 + 3 = 5", "5", ["5", "3", "2"]),
        ("2 and 3?", "no numbers", "5", ["5", "3", "2"]),
        ("none", "none", "5", ["5", "1", "2"]),
        ("none", "1,250. then 7", "7", ["7", "1250", "1"]),
        ("1", "1.0 and 1", "1", ["1", "2", "3"]),
    ],
)
def test_candidates_are_different_numbers_of_the_text(question, text, answer, expected):
    chain = Chain(Problem(question, answer), text, character_kinds(text), answer, True)
    assert candidates(chain) == expected


@pytest.mark.parametrize(
    ("completion", "thought"),
    [
        ("<think> a </think><answer>1</answer>", "a"),
        ("<think>\na\n</think>", "a"),
        ("<think>a", None),
        ("a</think>", None),
        ("<think> </think>", None),
        ("", None),
    ],
)
def test_the_thought_of_a_completion(completion, thought):
    assert thought_of(completion) == thought


def test_variance_within_sentences_by_hand():
    first = np.array([1.0, 3.0]), np.array([0, 0])
    second = np.array([5.0, 5.0]), np.array([0, 1])
    # Means 2, 5, 5; overall mean 3.5; within (1 + 1), in all 6.25 + 0.25 + 2.25 + 2.25.
    assert within_share([first, second]) == pytest.approx(2 / 11)
    alone = np.array([1.0, 2.0]), np.array([0, 1])
    assert within_share([alone]) == 0


def records_of(scores, kinds, sentences):
    n = len(kinds)
    found = {
        "entropy": [float(x) for x in range(n, -1, -1)], "tokens": 3,
        "forced": [[0.5, True]] * 11,
    }  # fmt: skip
    whole = {"asked": [0, 2, n], "entropy": [3.0, 2.0, 1.0], "first": [1.0, 1.5, 0.5],
             "most": [3.0] * 3, "left": [0.0, 0.1, 0.2]}  # fmt: skip
    return [
        {"kinds": kinds, "sentences": sentences, "right": True, "whole": whole,
         "scores": dict.fromkeys(ESTIMATORS, scores), "variants": {"paper": found}}
    ] * 2  # fmt: skip


def test_statistics_by_hand():
    kinds = ["tag", "word", "word", "operand", "result"]
    found = summary(records_of([9.0, 1.0, 3.0, 0.0, 2.0], kinds, [0, 0, 0, 1, 1]))
    token = found["token"]["entropy"]
    assert token["auc"][0] == pytest.approx(2 / 3)  # 2 is above 1 and 0, and below 3
    assert token["result_mean"] == 2 and token["words_sd"] == 1
    assert token["kinds"]["punctuation"]["count"] == 0
    sentence = found["sentence"]["entropy"]
    assert sentence["computing"]["mean"] == 2 and sentence["other"]["mean"] == 4
    assert sentence["auc"][0] == 0
    assert found["ece"] == pytest.approx(0.5) and found["accuracy_by_tenth"] == [1.0] * 11
    assert found["whole"]["drop_sign"] == pytest.approx(0.5)
    assert found["whole"]["start"] == {"first": 1.0, "whole": 3.0}
    assert found["whole"]["left"] == pytest.approx(0.1)
    assert found["postfix"]["paper"]["cost"] == 1


def test_a_stopped_study_goes_on_to_the_same_numbers(data_file, tmp_path, monkeypatch):
    options = dict(problems=3, longest=96, weights="ours", name="embedded")
    first = real("embedded", data_file, out=tmp_path / "a", figures=tmp_path / "fa", **options)
    assert first["weights"] == "ours" and first["problems"]["worked"] == 3
    assert set(first["token"]) == set(ESTIMATORS)
    assert (tmp_path / "fa" / "real_estimator_embedded.png").stat().st_size > 10_000
    assert (tmp_path / "fa" / "real_estimator_embedded_exits.png").is_file()
    assert (tmp_path / "fa" / "real_estimator_embedded_maps.png").stat().st_size > 10_000
    titles = [one["title"] for one in first["maps"]]
    assert titles == [
        "the embedded policy, token by token", "the embedded policy, sentence by sentence",
        "embedded, token by token", "embedded, sentence by sentence",
    ]  # fmt: skip
    assert first["maps"][0]["values"] == first["maps"][2]["values"]  # the same policy twice
    assert len({"".join(one["tokens"]) for one in first["maps"]}) == 1
    assert real_table(first).count("\n") == len(ESTIMATORS) + 1
    # A stop has cut the second line, and no chain of the model's own is measured yet.
    stopped = tmp_path / "b" / "embedded"
    stopped.mkdir(parents=True)
    lines = (tmp_path / "a" / "embedded" / "worked.jsonl").read_text(encoding="utf-8").splitlines()
    (stopped / "worked.jsonl").write_text(lines[0] + "\n" + lines[1][:50], encoding="utf-8")
    measured = []

    def watched(policy, chain):
        measured.append(chain)
        return measure(policy, chain)

    with pytest.raises(ValueError, match=r"out holds 1 measured solutions .*without --so-far"):
        real("embedded", data_file, out=tmp_path / "b", figures=tmp_path / "fb", unfinished=True,
             **options)  # fmt: skip

    monkeypatch.setattr(study, "measure", watched)
    second = real("embedded", data_file, out=tmp_path / "b", figures=tmp_path / "fb", **options)
    assert len(measured) == 2 + first["problems"]["own"]
    kept = tmp_path / "fb" / "results" / "real_estimator_embedded.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == json.loads(
        (tmp_path / "fa" / "results" / "real_estimator_embedded.json").read_text(encoding="utf-8")
    )
    assert second == first
    # What is measured can be told at any time, and nothing is measured for it.
    measured.clear()
    (stopped / "own.jsonl").unlink()
    (stopped / "worked.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    options["unfinished"] = True
    told = real("embedded", data_file, out=tmp_path / "b", figures=tmp_path / "fb", **options)
    assert told["problems"] == {"worked": 2, "own": 0} and told["own"] is None and not measured
    assert told["sampled"] == first["sampled"] and told["maps"] == first["maps"]
    # A model of the same name with other weights does not go on with these chains.
    other = tmp_path / "other" / "embedded"
    shutil.copytree(SHIPPED["embedded-uncalibrated"], other)
    with pytest.raises(ValueError, match=r"fingerprint of the model is .*was started with"):
        real(str(other), data_file, out=tmp_path / "b", figures=tmp_path / "fb", **options)


def test_fewer_problems_lose_no_measured_chain(data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "measure", lambda policy, chain: pytest.fail("measured again"))
    path = tmp_path / "worked.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(5)) + '{"n"', encoding="utf-8")
    assert study._measured(None, [None] * 2, path) == [{"n": 0}, {"n": 1}]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


def test_solutions_without_a_result_are_not_counted(data_file, tmp_path):
    path = tmp_path / "words.jsonl"
    words = [{"question": f"Which number? {n}", "answer": f"It is so.\n#### {n}"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in words), encoding="utf-8")
    with pytest.raises(ValueError, match=r"problems is 2, but .* holds 0 with a result"):
        real("embedded", str(path), problems=2, out=tmp_path, figures=tmp_path)


def test_a_model_that_hardly_ever_writes_a_thought_is_not_asked_further(
    policy, data_file, tmp_path
):
    """With a limit of three tokens no thought ends: one batch is enough to see it."""
    path = tmp_path / "completions.jsonl"
    solutions = worked_solutions(data_file)
    sampled = own_chains(policy, solutions, 2, path, longest=3)
    assert 2 <= sampled < study.TRIES * 2
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == sampled and all(row["text"] is None for row in rows)
    assert own_chains(policy, solutions, 2, path, longest=3) == sampled


def test_a_model_that_writes_a_thought_now_and_then_is_asked_on(policy, data_file, tmp_path):
    """One of 16 has a thought, which is not too rare."""
    path = tmp_path / "completions.jsonl"
    row = {"problem": 0, "text": None, "answer": None}
    replace_text(path, "".join(json.dumps(x) + "\n" for x in [row | {"text": "so"}, *[row] * 15]))
    sampled = own_chains(policy, worked_solutions(data_file), 2, path, longest=3)
    # Then two of 32 would be enough, but one of 32 is too rare.
    assert sampled == 32


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (dict(problems=1), "problems must be at least 2"),
        (dict(problems=4), "problems is 4, but .* holds 3 with a result .* ask for fewer"),
        (dict(longest=0), "longest must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    data_file, tmp_path, monkeypatch, option, told
):
    monkeypatch.setattr(study, "load_policy", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=told):
        real("embedded", data_file, out=tmp_path, figures=tmp_path, **option)
