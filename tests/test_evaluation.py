"""Pass@k, Length@k, Ratio@k and their intervals."""

import io
import itertools
import json
import math
import re
import statistics

import pytest
import torch
from helpers import TRIVIAL, perturb_lora
from tqdm import tqdm

from iapo_mini import evaluation, progress
from iapo_mini.evaluation import (
    check_out,
    evaluate,
    evaluation_table,
    pass_at_k,
    ratio_at_k,
    summary,
)
from iapo_mini.policy import load_policy
from iapo_mini.rewards import lenient_correct, reward
from iapo_mini.tasks import Problem


@pytest.fixture(scope="module")
def policy(schooled_folder):
    return load_policy(schooled_folder, lora_rank=0)


def run(policy, **changes):
    options = dict(ks=(1, 2, 4), num_generations=4, max_completion_length=12, progress=False)
    return evaluate(policy, [*TRIVIAL, TRIVIAL[0]], **{**options, **changes})


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_completion():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                passed = sum(any(i < c for i in subset) for subset in subsets)
                assert pass_at_k(n, c, k) == pytest.approx(passed / len(subsets)), (n, c, k)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_pass_at_k_beyond_the_sample_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be 1 to n = .*, got {k}"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(
    ("passed", "length", "ratio"), [(0.5, 200.0, 0.0025), (0.0, 3.0, 0.0), (1.0, 0.5, 2.0)]
)
def test_ratio_at_k_is_right_answers_per_token(passed, length, ratio):
    assert ratio_at_k(passed, length) == ratio


@pytest.mark.parametrize("length", [0, 0.0, -1.5, math.nan])
def test_ratio_at_k_of_no_length_is_refused(length):
    with pytest.raises(ValueError, match=f"length_at_k must be above 0, got {length}"):
        ratio_at_k(0.5, length)


def test_summary_by_hand():
    """One problem has two right answers of 10 and 30 tokens, one has two wrong of 20 and 60."""
    tokens = torch.tensor([[10.0, 30.0], [20.0, 60.0]], dtype=torch.float64)
    found = summary([2, 0], tokens, ks=(1, 2))
    intervals = found.pop("intervals")
    assert found == {
        "problems": 2, "length": 30.0,
        "pass@1": 0.5, "length@1": 15.0, "ratio@1": 0.5 / 15,
        "pass@2": 0.5, "length@2": 30.0, "ratio@2": 0.5 / 30,
    }  # fmt: skip
    # With two problems the bootstrap draws one of them twice, or both.
    assert intervals["length"] == [20.0, 40.0] and intervals["length@1"] == [10.0, 20.0]
    assert intervals["pass@1"] == intervals["pass@2"] == [0.0, 1.0]
    assert intervals["ratio@1"] == [0.0, 0.1] and intervals["ratio@2"] == [0.0, 0.05]


def test_metrics_follow_from_the_completions(policy):
    """Recomputes every reported number from the listed completions."""
    result = run(policy)
    assert result["problems"] == 3
    completions = result["completions"]
    assert [c["problem"] for c in completions] == [0] * 4 + [1] * 4 + [2] * 4
    for c in completions:
        assert c["correct"] is reward(c["text"], "5")[1]
        assert 1 <= c["tokens"] <= 12
    rows = [completions[i : i + 4] for i in (0, 4, 8)]
    assert result["length"] == pytest.approx(statistics.fmean(c["tokens"] for c in completions))
    for k in (1, 2, 4):
        passed = [
            statistics.fmean(
                any(c["correct"] for c in subset) for subset in itertools.combinations(row, k)
            )
            for row in rows
        ]
        lengths = [c["tokens"] for row in rows for c in row[:k]]
        assert result[f"pass@{k}"] == pytest.approx(statistics.fmean(passed))
        assert result[f"length@{k}"] == pytest.approx(statistics.fmean(lengths))
        ratio = statistics.fmean(passed) / statistics.fmean(lengths)
        assert result[f"ratio@{k}"] == pytest.approx(ratio)
        assert result[f"ratio@{k}"] == ratio_at_k(result[f"pass@{k}"], result[f"length@{k}"])
    # Some answers must be right and some wrong for a meaningful test.
    assert 0 < result["pass@1"] < 1 and result["pass@1"] < result["pass@4"]


def test_tokens_count_the_end_of_the_sequence(policy):
    for c in run(policy, max_completion_length=60)["completions"]:
        ids = policy.tokenizer.encode(c["text"])
        assert c["tokens"] == len(ids) + 1


def test_lenient_judges_the_same_completions_by_their_last_answer(policy):
    strict, both = run(policy), run(policy, lenient=True)
    assert {k: v for k, v in both.items() if not k.startswith("lenient")} == {
        **strict, "intervals": both["intervals"]
    }  # fmt: skip
    problems = [*TRIVIAL, TRIVIAL[0]]
    right = [lenient_correct(c["text"], problems[c["problem"]].answer) for c in both["completions"]]
    assert both["lenient pass@1"] == pytest.approx(sum(right) / len(right))
    low, high = both["intervals"]["lenient pass@4"]
    assert low <= both["lenient pass@4"] <= high
    assert "| k | Pass@k |" in evaluation_table(strict, [1])
    assert "any format" in evaluation_table(both, [1]) and "any" not in evaluation_table(
        strict, [1]
    )


def test_equal_seeds_give_equal_results(policy):
    assert run(policy, seed=1) == run(policy, seed=1)
    assert run(policy, seed=1)["completions"] != run(policy, seed=2)["completions"]


def test_batches_draw_different_completions(policy):
    """Each batch has its own seed, so equal problems in two batches get different samples."""
    result = evaluate(
        policy, [TRIVIAL[0]] * 2, ks=(1,), num_generations=16, batch_size=16,
        max_completion_length=12, progress=False,
    )  # fmt: skip
    texts = [c["text"] for c in result["completions"]]
    assert texts[:16] != texts[16:]
    assert result["problems"] == 2 and len(texts) == 32


def test_a_batch_smaller_than_a_group_still_holds_one_problem(policy):
    assert len(run(policy, batch_size=1)["completions"]) == 12


@pytest.mark.parametrize("k", [0, -1, 5])
def test_bad_k_is_refused(policy, k):
    with pytest.raises(ValueError, match=f"k must be 1 to num_generations = 4, got {k}"):
        run(policy, ks=(1, k))


def test_no_problems_are_refused(policy):
    with pytest.raises(ValueError, match="problems is empty"):
        evaluate(policy, [])


def test_a_policy_that_is_never_right_scores_zero(base_policy):
    result = evaluate(
        base_policy, [Problem("1 + 1?", "2")], ks=(1, 2), num_generations=2,
        max_completion_length=4, progress=False,
    )  # fmt: skip
    assert result["pass@2"] == result["ratio@2"] == 0.0


def test_the_bar_shows_the_tokens_of_the_running_batch(policy, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run(policy, progress=True, batch_size=4)
    told = re.findall(r"token (\d+) of (\d+) running", capsys.readouterr().err)
    assert told[0] == ("1", "4")
    assert {int(tokens) for tokens, _ in told} >= {1, 2, 3}
    assert all(int(rows) <= 4 for _, rows in told)


def test_a_bar_is_restored_after_a_batch(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with tqdm(total=1, file=io.StringIO()) as bar:
        bar.set_postfix(reward=1)
        with progress.tokens_shown(bar) as show:
            show(7, 3)
            assert bar.postfix == "reward=1, token 7 of 3 running completions"
        assert bar.postfix == "reward=1"
    with tqdm(total=1, disable=True) as silent, progress.tokens_shown(silent) as show:
        show(1, 1)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def interrupted(policy, tmp_path, monkeypatch):
    """A file of completions that remains after an interrupt in the second of three batches."""
    calls = []

    def sample(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluation_sample(*args, **kwargs)

    evaluation_sample = evaluation.sample
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "sample", sample)
        with pytest.raises(KeyboardInterrupt):
            run(policy, batch_size=4, save_to=tmp_path / "c.jsonl")
    return tmp_path / "c.jsonl"


def test_completions_are_saved_as_they_are_reported(policy, tmp_path):
    saved = run(policy, save_to=tmp_path / "c.jsonl")
    assert saved == run(policy)
    assert lines(tmp_path / "c.jsonl") == saved["completions"]


def test_an_interrupted_evaluation_continues_to_the_same_numbers(policy, interrupted, monkeypatch):
    kept = lines(interrupted)
    assert [c["problem"] for c in kept] == [0] * 4
    starts = []
    sample = evaluation.sample
    monkeypatch.setattr(
        evaluation, "sample", lambda *a, **k: starts.append(k["seed"]) or sample(*a, **k)
    )
    result = run(policy, batch_size=4, save_to=interrupted)
    assert starts == [1, 2]  # the first batch is not sampled again
    assert result == run(policy, batch_size=4)
    assert lines(interrupted) == result["completions"] and result["completions"][:4] == kept
    starts.clear()
    assert run(policy, batch_size=4, save_to=interrupted) == result and starts == []


@pytest.mark.parametrize("left", [0, 1, 60, 400])
def test_a_batch_that_a_kill_cut_short_is_sampled_again(policy, left, tmp_path):
    path = tmp_path / "c.jsonl"
    whole = run(policy, batch_size=8, save_to=path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:left], encoding="utf-8")
    assert run(policy, batch_size=8, save_to=path) == whole
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed is 1, but"),
        ({"temperature": 0.5}, "temperature is 0.5, but"),
        ({"max_completion_length": 13}, "max_completion_length is 13, but"),
        ({"batch_size": 8}, "batch_size is 8, but"),
        ({"num_generations": 5}, "num_generations is 5, but"),
    ],
)
def test_completions_of_other_settings_are_refused(policy, interrupted, change, named):
    before = interrupted.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        run(policy, **{"batch_size": 4, "save_to": interrupted} | change)
    assert interrupted.read_text(encoding="utf-8") == before


def test_completions_of_other_problems_or_another_policy_are_refused(
    policy, schooled_folder, interrupted
):
    options = dict(num_generations=4, max_completion_length=12, batch_size=4, progress=False)
    options |= dict(ks=(1,), save_to=interrupted)
    with pytest.raises(ValueError, match="number of problems is 2, but"):
        evaluate(policy, TRIVIAL, **options)
    with pytest.raises(ValueError, match="fingerprint of the problems is"):
        evaluate(policy, [*TRIVIAL, Problem("How many?", "5")], **options)
    trained = perturb_lora(load_policy(schooled_folder, lora_rank=4), scale=1e-3)
    with pytest.raises(ValueError, match="fingerprint of the policy is"):
        run(trained, batch_size=4, save_to=interrupted)
    (interrupted.parent / "c.settings.json").unlink()
    with pytest.raises(ValueError, match=r"but the completions in .* were made with None"):
        run(policy, batch_size=4, save_to=interrupted)


def test_fewer_values_of_k_use_the_same_completions(policy, tmp_path):
    whole = run(policy, save_to=tmp_path / "c.jsonl")
    part = run(policy, ks=(2,), save_to=tmp_path / "c.jsonl")
    assert part["pass@2"] == whole["pass@2"] and "pass@4" not in part


@pytest.mark.parametrize(
    ("name", "message"),
    [("folder", "must be a .json file"), ("e.jsonl", "must be a .json file"),
     ("data.json", "would overwrite data_file"), ("config.json", "does not hold results"),
     ("text.json", "does not hold results"), ("result.json", "does not hold results"),
     ("metrics.json", "metrics.jsonl' does not hold completions"),
     ("mine.json", "mine.settings.json' does not hold the settings"),
     ("chats.json", "chats.jsonl' does not hold completions")],
)  # fmt: skip
def test_results_overwrite_no_other_files(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.json").write_text("[]", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"method": "iapo"}', encoding="utf-8")
    (tmp_path / "text.json").write_text("not JSON", encoding="utf-8")
    (tmp_path / "result.json").write_text('{"intervals": {}, "train_minutes": 3}', encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}', encoding="utf-8")
    (tmp_path / "mine.settings.json").write_text('{"editor": "vi"}', encoding="utf-8")
    (tmp_path / "chats.jsonl").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        check_out(tmp_path / name, str(tmp_path / "data.json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_earlier_results_may_be_overwritten(policy, tmp_path):
    result = run(policy, save_to=tmp_path / "e.jsonl")
    check_out(tmp_path / "e.json")  # as a kill before the results leaves it
    (tmp_path / "e.json").write_text(json.dumps(result | {"config": {}}), encoding="utf-8")
    check_out(tmp_path / "e.json")
    check_out(tmp_path / "new.json", str(tmp_path / "data.jsonl"))


def test_completions_do_not_overwrite_the_data(tmp_path):
    with pytest.raises(ValueError, match="would overwrite data_file"):
        check_out(tmp_path / "data.json", str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize(
    "line",
    ["{", "", "[1]", '{"problem": 0}', "\0" * 30,
     '{"problem": 2, "text": "x", "correct": true, "tokens": 3}',
     '{"problem": 1, "text": "x", "correct": "yes", "tokens": 3}',
     '{"problem": 1, "text": "x", "correct": true, "tokens": null}'],
    ids=["half", "empty", "a list", "fields", "zeros", "another problem", "a word", "null"],
)  # fmt: skip
def test_a_damaged_line_of_completions_is_refused_and_left_alone(policy, tmp_path, line):
    file = tmp_path / "x.jsonl"
    run(policy, save_to=file)
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[5] = line
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"x.jsonl' is damaged: line 6 .* of problem 1; restore"):
        run(policy, save_to=file)
    assert file.read_bytes() == before


def test_a_missing_line_of_completions_is_refused(policy, tmp_path):
    file = tmp_path / "x.jsonl"
    run(policy, save_to=file)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]), encoding="utf-8")
    with pytest.raises(ValueError, match="line 4 does not hold a completion of problem 0"):
        run(policy, save_to=file)


def test_damaged_settings_of_completions_are_named(policy, tmp_path):
    run(policy, save_to=tmp_path / "x.jsonl")
    (tmp_path / "x.settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x.settings.json' can't be used .*; restore it"):
        run(policy, save_to=tmp_path / "x.jsonl")
