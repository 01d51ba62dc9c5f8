"""Real continuations of a prefix: their sampling, and the quantities computed from them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import run_here, written

from iapo_mini.early_exit.question import EVERY_PREFIX
from iapo_mini.intervals import mean_interval
from iapo_mini.lab import oracle
from iapo_mini.lab.sizes import SHORT, Size
from iapo_mini.lab.verdicts import judge
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.recipes import RECIPES as LIBRARY
from iapo_mini.sampling import encode_prompts, from_texts, sample, sample_after

CHAIN = "<think> That makes 14 + 7 = 21 stamps. 21 / 3 = 7.</think><answer> 7</answer>"
RESULTS = Path(__file__).parent.parent / "figures/results"
TINY = Size(seeds=(0, 1), max_steps=1, problems=2, prompts_per_step=1, num_generations=2, ks=(1, 2))


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=0)


@pytest.fixture(scope="module")
def problem():
    return next(stories("tune", seed=0))


def test_sampling_after_the_prompt_is_sampling(policy, problem):
    plain = sample(policy, [problem], num_generations=3, seed=5, max_completion_length=20)
    found = sample_after(
        policy, *encode_prompts(policy, [problem]), num_generations=3, seed=5,
        max_completion_length=20,
    )  # fmt: skip
    assert torch.equal(plain.completion_ids, found.completion_ids)


def test_entropy_of_answers_by_hand():
    assert oracle.entropy_of(["7"] * 8) == 0.0
    # Shares 3/4 and 1/4, plus the correction (2 - 1) / 8.
    plain = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert oracle.entropy_of(["7", "7", "7", None]) == pytest.approx(plain + 1 / 8)


def test_the_correction_takes_most_of_the_bias_away():
    """Draws eight answers from four equally likely ones, many times."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(4, (2000, 8), generator=generator).tolist()
    found = sum(oracle.entropy_of([str(x) for x in draw]) for draw in draws) / 2000

    def plain(draw):
        return -sum(c / 8 * math.log(c / 8) for c in map(draw.count, set(draw)))

    uncorrected = sum(map(plain, draws)) / 2000
    assert abs(found - math.log(4)) < 0.5 * abs(uncorrected - math.log(4))


def test_prefixes_are_continued_after_sentences_and_not_after_tags(policy, problem):
    rollouts = from_texts(policy, [problem], [CHAIN])
    asked, answers = oracle.continuations(policy, rollouts, k=3, seed=0)
    ends = asked[0].nonzero()[:, 0]
    texts = [policy.tokenizer.decode(rollouts.completion_ids[0, :t]) for t in ends]
    assert [text.strip()[-10:] for text in texts[:-1]] == ["", "21 stamps.", "21 / 3 = 7."[-10:]]
    assert [len(own) for own in answers[0]] == [3, 3, 3, 1]
    assert answers[0][-1][0].strip() == "7"
    # After the result is written, nearly all continuations end with it.
    assert answers[0][2].count("7") >= 2


def test_continuations_are_those_of_the_prefix(policy, problem):
    """Continuations of the prompt alone are ordinary completions, and repeat exactly."""
    n, nothing = 96, from_texts(policy, [problem], ["<think>"])
    _, answers = oracle.continuations(policy, nothing, k=n, seed=3)
    assert answers == oracle.continuations(policy, nothing, k=n, seed=3)[1]
    whole = sample(policy, [problem], num_generations=n, seed=9)
    plain = [oracle._answer(text) for text in whole.texts(policy.tokenizer)]
    shares = [sum(a == problem.answer for a in some) / n for some in (plain, answers[0][0])]
    assert abs(shares[0] - shares[1]) < 4 * math.sqrt(2 * 0.25 / n)


@pytest.mark.parametrize("sentences", [50, 70])
def test_a_prefix_near_the_models_last_position_is_continued_as_far_as_that(
    policy, problem, sentences
):
    """A completion that was cut at its limit of 224 tokens has such prefixes."""
    rollouts = from_texts(policy, [problem], ["<think>" + " It is cold." * sentences])
    asked, answers = oracle.continuations(policy, rollouts, k=2, seed=0)
    width = int(rollouts.prompt_mask.sum() + asked[0].nonzero()[-2, 0])
    assert width + oracle._LONGEST > policy.model.config.max_position_embeddings > width
    assert len(answers[0]) == sentences + 2 and answers[0][-1] == [None]


def told(monkeypatch, answers):
    """A row of 6 tokens in sentences of 2, 1 and 3, with given answers after each."""
    asked = torch.tensor([[True, False, True, True, False, False, True]])
    monkeypatch.setattr(oracle, "continuations", lambda *_: (asked, [answers]))
    return replace(written([[1] * 6], group=1), references=("7",))


def test_a_sentence_gets_the_drop_of_entropy_in_equal_parts(policy, monkeypatch):
    unsure, half = ["1", "2", "3", "4"], ["7", "7", "1", "1"]
    rollouts = told(monkeypatch, [unsure, unsure, half, ["7"]])
    found = oracle.continuation_information(policy, rollouts, EVERY_PREFIX)[0].tolist()
    high, low = (oracle.entropy_of(own) for own in (unsure, half))
    assert found == pytest.approx([0, 0, high - low, *[low / 3] * 3], abs=1e-6)


def test_a_token_gets_the_gain_in_value_of_its_sentence(policy, monkeypatch):
    rollouts = told(monkeypatch, [["7", "1", "1", None], ["7", "7", "1", "1"], ["1"] * 4, ["7"]])
    found = oracle.value_gain(policy, rollouts, EVERY_PREFIX)[0]
    assert found.tolist() == pytest.approx([0.25, 0.25, -0.5, 1, 1, 1])
    rollouts = rollouts.filled(informativeness=found[None])
    expected = found / (found.std() + 1e-4)
    torch.testing.assert_close(oracle._vine(rollouts, 0, 0)[0], expected)


def test_an_estimate_agrees_with_itself(policy, monkeypatch):
    """The early exits' entropies are used in place of those of continuations."""
    exits, plain = [], oracle.answer_entropies

    def watched(policy, rollouts):
        exits.append((plain(policy, rollouts), oracle._asked(policy, rollouts)))
        return exits[-1][0]

    monkeypatch.setattr(oracle, "answer_entropies", watched)
    first = oracle.agreement(policy, 3, 2)
    assert -1 <= first["correlation"][0] <= 1 and first["by_place"]
    entropies, asked = exits[0]
    own = iter([
        float(entropies[i, t])
        for i, row in enumerate(asked)
        for t in row.nonzero()[:-1, 0].tolist()
    ])  # fmt: skip
    monkeypatch.setattr(oracle, "entropy_of", lambda answers: next(own))
    again = oracle.agreement(policy, 3, 2)
    assert again["correlation"][0] == pytest.approx(1.0, abs=1e-5)
    assert again["rank"][0] == pytest.approx(1.0) and again["bias"][0] == pytest.approx(0, abs=1e-6)


def test_the_experiment_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "run_all", run_here)
    monkeypatch.setattr(oracle, "SIZES", {"quick": TINY})
    monkeypatch.setattr(oracle, "_LONGEST", SHORT)
    monkeypatch.setattr(oracle, "STARTS", {"embedded": EMBEDDED, "again": EMBEDDED})
    monkeypatch.setattr(oracle, "tuned", lambda *_: {"iapo": {"method": "iapo"}})
    found = oracle.oracle("quick", out=tmp_path / "runs", figures=tmp_path / "figures")
    saved = json.loads((tmp_path / "figures/results/oracle_quick.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(found))
    assert found["agreement"].keys() == {"embedded", "again"}
    assert found["agreement"]["embedded"] == found["agreement"]["again"]
    monkeypatch.setattr(oracle, "agreement", lambda *_: pytest.fail("it was measured again"))
    assert oracle._agreements("quick", tmp_path / "runs") == found["agreement"]
    assert found["training"].keys() == {"oracle", "vine", "iapo", "grpo"}
    assert len(oracle.oracle_table(found).splitlines()) == 4 + 3 + 4
    assert (tmp_path / "figures/oracle_quick.png").stat().st_size > 10_000
    for name in oracle.RECIPES:
        LIBRARY.pop(name, None)


def test_better_information_is_judged_by_length_and_by_right_answers_per_token():
    estimate = {"length": [32.0, 33.0, 34.0], "ratio@1": [0.025, 0.025, 0.026]}
    better = {"length": [30.0, 31.1, 32.0], "ratio@1": [0.025, 0.025, 0.026]}
    rows = {
        "iapo": estimate,
        "oracle": better,
        "vine": {**estimate, "ratio@1": [0.02, 0.021, 0.021]},
    }
    found = judge(oracle.oracle_claims({"training": rows}))
    assert [row[3] for row in found] == ["holds", "cannot tell", "cannot tell", "does not hold"]
    assert found[0][2].startswith("2.0 [") and found[3][2].startswith("-4.67 [")


def test_rows_by_quality_come_from_three_studies():
    """Every value says where it comes from: start policy, row and metric."""

    def told(*where):
        return {metric: [*where, metric] for metric in ("length", "pass@1")}

    token = ("grpo", "shuffled", "roles")
    found = {
        "controls": {"rows": {name: {"token": told(name), "sequence": {}} for name in token}},
        "starts": {"starts": {
            start: {row: told(start, row) for row in ("iapo", "iapo_sentence")}
            for start in oracle.STARTS
        }},
        "oracle": {"training": {"oracle": told("oracle")}},
    }  # fmt: skip
    rows = oracle.by_quality(**found)
    assert [row["length"][:-1] for row in rows.values()] == [
        ["grpo"], ["shuffled"], ["uncalibrated", "iapo"], ["embedded", "iapo"],
        ["calibrated", "iapo"], ["embedded", "iapo_sentence"], ["calibrated", "iapo_sentence"],
        ["oracle"], ["roles"],
    ]  # fmt: skip


def test_rows_by_quality_are_drawn_once_all_three_studies_are_there(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("controls", "oracle", "starts"):
        oracle.draw_quality(tmp_path, tmp_path)
        assert not (tmp_path / "quality.png").exists()
        shutil.copy(RESULTS / f"{name}.json", tmp_path / "results")
    oracle.draw_quality(tmp_path, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_rows_by_quality_end_within_a_token_as_the_docs_say():
    names = ("controls", "starts", "oracle")
    found = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    rows = oracle.by_quality(*found)
    others = {"no token term", "estimate, shuffled", "known roles"}
    assert others < set(rows)
    measured = [row for name, row in rows.items() if name not in others]
    lengths = [sum(row["length"]) / len(row["length"]) for row in measured]
    right = [mean_interval(row["pass@1"]) for row in measured]
    assert len(measured) == 6 and max(lengths) - min(lengths) < 1
    assert {round(n) for n in lengths} == {30, 31}  # the README says so too
    assert {round(mean, 2) for mean, _, _ in right} <= {n / 100 for n in range(77, 85)}
    assert max(low for _, low, _ in right) < min(high for _, _, high in right)
