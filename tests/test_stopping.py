"""Early exit at inference: the rules, and sampling that stops when the forced answer is sure."""

import itertools
import json

import pytest
import torch
from helpers import TRIVIAL, perturb_lora, tiny_policy, unpadded

from iapo_mini.chat import continuation_ids
from iapo_mini.early_exit import stopping
from iapo_mini.early_exit.question import EarlyExit, Stopping
from iapo_mini.early_exit.stopping import (
    Exits,
    exits_text,
    first_sure,
    is_sure,
    may_end,
    prefixes_to_ask,
    room_to_ask,
    sample_until_sure,
)
from iapo_mini.evaluation import evaluate
from iapo_mini.information import answer_entropies, encode_postfix
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import check_length, encode_prompts, sample

PROBLEMS = [*TRIVIAL, *itertools.islice(stories("test"), 2)]  # of different lengths


@pytest.fixture(scope="module")
def policy(schooled_folder):
    return load_policy(schooled_folder, lora_rank=0)


@pytest.mark.parametrize(
    ("rule", "entropy", "answer", "before", "sure"),
    [
        (0.3, 0.29, "", "", True), (0.3, 0.3, "", "", False), (0.3, 0.31, "5", "5", False),
        ("agree", 9.0, "5", "5", True), ("agree", 0.0, "5", "6", False),
        ("agree", 0.0, "5", "", False), ("agree", 0.0, "", "", False),
    ],
)  # fmt: skip
def test_an_answer_is_sure_below_the_threshold_or_when_it_is_repeated(
    rule, entropy, answer, before, sure
):
    assert is_sure(rule, entropy, answer, before) is sure


def test_a_thought_is_cut_at_its_first_sure_answer_that_is_asked_for():
    sure = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    asked = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert first_sure(sure, asked).tolist() == [3, -1, 2, -1]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", False), ("  \n", False), ("<think>", True), ("<think> 2 + 2 = 4.", True),
        ("<think>4.</think>", False), ("4 <answer>", False), ("We have 4", True),
        ("<thi", False), ("<think>4.</", False), ("<think> 3 <", False), ("3 < 4", True),
        ("<think>4.</think><answer> 4</answer>", False),
    ],
)  # fmt: skip
def test_a_thought_may_end_once_it_has_begun_and_between_tags(text, ends):
    assert may_end(text) is ends


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": 0}, "early_exit must be above 0, got 0"),
        ({"rule": -1.5}, "early_exit must be above 0, got -1.5"),
        ({"rule": float("nan")}, "early_exit must be above 0, got nan"),
        ({"rule": float("inf")}, "early_exit must be at most"),
        ({"rule": "agreed"}, "early_exit must be a number of nats above 0, or 'agree', got 'ag"),
        ({"rule": ""}, "early_exit must be a number of nats above 0, or 'agree', got ''"),
        ({"rule": 1, "stride": 0}, "early_exit_stride must be 1 to"),
        ({"rule": 1, "stride": "word"}, "early_exit_stride must be 1 to .* or 'sentence', got 'w"),
        ({"rule": "agree", "stride": True}, "early_exit_stride must be"),
    ],
)
def test_bad_rules_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        Stopping(**settings)


def test_a_postfix_without_tokens_is_refused(policy):
    assert room_to_ask(policy, None) == 0
    assert room_to_ask(policy, Stopping(1)) == 2 + stopping.LONGEST_ANSWER
    with pytest.raises(ValueError, match="postfix must be text of at least one token"):
        room_to_ask(policy, Stopping(1, postfix=""))


def entropy_where(policy, problems, stride, **options):
    """Completions without early exit, and their entropies where early exit would ask, else inf."""
    rollouts = sample(policy, problems, **options)
    found = answer_entropies(policy, rollouts, EarlyExit(stride=stride))
    asked = prefixes_to_ask(policy, rollouts, stride)
    return rollouts, found.masked_fill(~asked, float("inf"))


def between(values):
    """A threshold in the widest gap among the middle half of the values, safe from rounding."""
    sorted_ = values.sort().values
    middle = sorted_[len(sorted_) // 4 : 3 * len(sorted_) // 4 + 1]
    widest = int(middle.diff().argmax())
    assert middle[widest + 1] - middle[widest] > 1e-3
    return float(middle[widest : widest + 2].mean())


def assert_cut_by_the_estimator(policy, problems, stride, **options):
    """Sampling with early exit cuts where the estimator's entropies of whole chains say."""
    whole, entropies = entropy_where(policy, problems, stride, **options)
    asked = entropies.isfinite()
    rule = between(entropies[asked])
    rollouts, exits = sample_until_sure(policy, problems, Stopping(rule, stride), **options)
    expected = first_sure(entropies < rule, asked)
    assert exits.prefix.tolist() == expected.tolist() and exits.cut.any()
    postfix = encode_postfix(policy).tolist()
    for i, cut in enumerate(expected.tolist()):
        _, before = unpadded(whole, i)
        _, after = unpadded(rollouts, i)
        assert int(exits.tokens[i]) == len(postfix) * int(exits.questions[i])
        if cut < 0:
            assert after.tolist() == before.tolist()
            assert exits.questions[i] == asked[i].sum()
            continue
        assert after[:cut].tolist() == before[:cut].tolist()
        assert after[cut : cut + 2].tolist() == postfix[: len(after) - cut]
        assert exits.questions[i] == asked[i, : cut + 1].sum()


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cuts_are_those_of_the_estimators_entropies(base_policy, stride, temperature, monkeypatch):
    monkeypatch.setattr(stopping, "may_end", lambda text: text != "")  # it writes tags at random
    assert_cut_by_the_estimator(
        base_policy, PROBLEMS, stride, num_generations=3, max_completion_length=24,
        temperature=temperature, seed=5,
    )  # fmt: skip


def test_cuts_at_sentence_ends_are_those_of_the_estimators_entropies(policy):
    assert_cut_by_the_estimator(
        policy, PROBLEMS, "sentence", num_generations=6, max_completion_length=12, seed=4
    )


def greedy_answer(policy, prompt, completion):
    """The trial answer by whole forward passes: the text up to the next tag, and tokens read."""
    ids, written = torch.cat([prompt, completion, encode_postfix(policy)]), []
    while True:
        with torch.no_grad():
            token = policy.model(ids[None]).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
        written.append(int(token))
        text = policy.tokenizer.decode(written)
        if "<" in text or written[-1] in policy.eos_ids.tolist():
            return text.partition("<")[0].strip(), len(written) - 1
        if len(written) == stopping.LONGEST_ANSWER:
            return text.strip(), len(written) - 1


def test_agreement_cuts_at_the_second_equal_answer(policy):
    options = dict(num_generations=4, max_completion_length=12, seed=1)
    problems = PROBLEMS[:2]
    whole = sample(policy, problems, **options)
    _, exits = sample_until_sure(policy, problems, Stopping("agree", 1), **options)
    asked = prefixes_to_ask(policy, whole, 1)
    for i in range(len(whole.lengths)):
        prompt, completion = unpadded(whole, i)
        before, cut, tokens = "", -1, 0
        for t in asked[i].nonzero()[:, 0].tolist():
            answer, read = greedy_answer(policy, prompt, completion[:t])
            tokens += 2 + read
            if is_sure("agree", 0.0, answer, before):
                cut = t
                break
            before = answer
        assert (int(exits.prefix[i]), int(exits.tokens[i])) == (cut, tokens)
    assert exits.cut.any()


def test_a_threshold_that_is_never_reached_changes_nothing(policy):
    options = dict(num_generations=4, max_completion_length=12, seed=3)
    plain = sample(policy, PROBLEMS, **options)
    rollouts, exits = sample_until_sure(policy, PROBLEMS, Stopping(1e-9), **options)
    assert torch.equal(rollouts.completion_ids, plain.completion_ids)
    assert torch.equal(rollouts.finished, plain.finished)
    assert not exits.cut.any() and (exits.questions > 0).any()


def test_memory_for_the_copies_changes_nothing(policy):
    options = dict(num_generations=4, max_completion_length=12, seed=2)
    for rule in (1.0, "agree"):
        one, of_one = sample_until_sure(policy, PROBLEMS, Stopping(rule, 2), **options)
        other, of_other = sample_until_sure(
            policy, PROBLEMS, Stopping(rule, 2), memory_mb=1e-3, **options
        )
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(of_one.prefix, of_other.prefix)
        assert torch.equal(of_one.tokens, of_other.tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_models_are_asked_as_well(tokenizer, attention, monkeypatch):
    monkeypatch.setattr(stopping, "may_end", lambda text: text != "")
    policy = tiny_policy("gpt2", tokenizer, attention)
    assert_cut_by_the_estimator(
        policy, TRIVIAL, 2, num_generations=3, max_completion_length=10, seed=0
    )


def test_an_adapter_is_asked_with_its_weights(lora_policy, monkeypatch):
    monkeypatch.setattr(stopping, "may_end", lambda text: text != "")
    perturb_lora(lora_policy, scale=0.3)
    assert_cut_by_the_estimator(
        lora_policy, TRIVIAL, 2, num_generations=3, max_completion_length=10, seed=0
    )


def test_a_cut_at_the_limit_leaves_a_part_of_the_postfix(policy):
    options = dict(num_generations=2, max_completion_length=2, seed=0)
    rollouts, exits = sample_until_sure(policy, TRIVIAL, Stopping(1e9, 1), **options)
    (tag, _) = continuation_ids(policy.tokenizer, "</think><answer>")
    assert exits.prefix.tolist() == [1] * len(rollouts.lengths)
    assert rollouts.completion_ids[:, 1].tolist() == [tag] * len(rollouts.lengths)
    assert not rollouts.finished.any()


def run(policy, **changes):
    options = dict(ks=(1, 2), num_generations=4, max_completion_length=12, progress=False)
    options |= dict(early_exit=Stopping("agree", 1), batch_size=4)
    return evaluate(policy, [*TRIVIAL, TRIVIAL[0]], **{**options, **changes})


def test_evaluate_reports_cuts_and_the_cost_of_asking(policy):
    found = run(policy)
    rows = found["completions"]
    assert found["cut"] == pytest.approx(sum(c["cut"] for c in rows) / 12) and found["cut"] > 0
    assert found["asking"] == pytest.approx(sum(c["asking"] for c in rows) / 12)
    for name in ("cut", "asking", "length"):
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    assert "asking" not in run(policy, early_exit=None)
    told = exits_text(found, Stopping("agree", 1), 12)
    assert f"(the forced answer agrees twice): {sum(c['cut'] for c in rows)} of 12" in told
    assert "is below 0.3 nats" in exits_text(found, Stopping(0.3), 12)


def test_an_evaluation_continues_only_with_its_own_rule(policy, tmp_path):
    path = tmp_path / "c.jsonl"
    whole = run(policy, save_to=path)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:6]), encoding="utf-8")
    assert run(policy, save_to=path) == whole
    assert path.read_text(encoding="utf-8") == text
    for other in (None, Stopping(0.3, 1), Stopping("agree")):
        with pytest.raises(ValueError, match=r"early_exit is .*, but the completions in"):
            run(policy, save_to=path, early_exit=other)
    row = json.loads(lines[2])
    del row["asking"]
    path.write_text("".join([*lines[:2], json.dumps(row) + "\n", *lines[3:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged: line 3 does not hold a completion"):
        run(policy, save_to=path)


def test_completions_of_earlier_versions_continue_without_early_exit(policy, tmp_path):
    """Their settings do not name early exit."""
    path, settings = tmp_path / "c.jsonl", tmp_path / "c.settings.json"
    whole = run(policy, early_exit=None, save_to=path)
    kept = json.loads(settings.read_text(encoding="utf-8"))
    del kept["early_exit"]
    settings.write_text(json.dumps(kept), encoding="utf-8")
    assert run(policy, early_exit=None, save_to=path) == whole
    settings.write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ValueError, match=r"early_exit is .*'rule': 'agree'.*, but"):
        run(policy, save_to=path)


def test_a_model_with_too_few_positions_for_the_question_is_refused(tokenizer):
    short = tiny_policy("qwen2", tokenizer, max_position_embeddings=200)
    longest = 200 - encode_prompts(short, TRIVIAL[:1])[0].shape[1]
    check_length(short, TRIVIAL[:1], longest)
    with pytest.raises(ValueError, match="the model has 200 positions"):
        evaluate(
            short, TRIVIAL[:1], ks=(1,), num_generations=1, max_completion_length=longest,
            early_exit=Stopping(1), progress=False,
        )  # fmt: skip


def test_a_question_beyond_the_sliding_window_is_refused_before_any_work(tokenizer):
    narrow = tiny_policy("mistral", tokenizer, sliding_window=200)
    longest = 200 - encode_prompts(narrow, TRIVIAL[:1])[0].shape[1]
    check_length(narrow, TRIVIAL[:1], longest, asked=50)  # they are asked by whole passes
    for tokens, early_exit in ((longest + 1, None), (longest, Stopping(1))):
        with pytest.raises(ValueError, match="at most 200 tokens, the model's sliding window"):
            evaluate(
                narrow, TRIVIAL[:1], ks=(1,), num_generations=1, max_completion_length=tokens,
                early_exit=early_exit, progress=False,
            )  # fmt: skip


def test_exits_are_recorded_one_by_one():
    exits = Exits(torch.tensor([-1, 3]), torch.tensor([0, 2]), torch.tensor([0, 4]))
    assert exits.records() == [{"asking": 0, "cut": False}, {"asking": 4, "cut": True}]
