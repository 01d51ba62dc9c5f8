"""Measures of the information in a token: sums over a completion, whole answers, candidates."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    BATCH,
    TRIVIAL,
    close,
    explicit_entropies,
    forced_logits,
    make_rollouts,
    tiny_policy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini.early_exit import prefixes
from iapo_mini.early_exit.question import EVERY_PREFIX, WAYS, EarlyExit
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.information import (
    INFORMATION,
    answer_entropies,
    answer_surprisals,
    belief_shift,
    candidate_logprobs,
    encode_postfix,
    final_answers,
    inform,
    informativeness,
    next_token_informativeness,
)
from iapo_mini.logprobs import token_logprobs
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import POSTFIX


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_informativeness_telescopes(lengths, seed):
    """Chain rule: the information of the tokens sums to that of the whole completion."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *lengths)
    entropies = 5 * torch.rand(len(lengths), width + 1, generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    s = informativeness(entropies, mask)
    assert s.shape == mask.shape and not s[~mask].any()
    for i, n in enumerate(lengths):
        for t in range(n):
            assert float(s[i, t]) == pytest.approx(float(entropies[i, t] - entropies[i, t + 1]))
        whole = float(entropies[i, 0] - entropies[i, n])
        assert float(s[i].sum()) == pytest.approx(whole, abs=1e-5)


def test_informativeness_sign():
    """A token that makes the answer more certain is positive, and one that confuses is negative."""
    s = informativeness(torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([[True, True]]))
    assert s.tolist() == [[1.5, -0.5]]


def test_sampled_rollouts(stopping_policy):
    rollouts = sample(stopping_policy, TRIVIAL, num_generations=4, max_completion_length=12)
    found = answer_entropies(stopping_policy, rollouts)
    close(found, explicit_entropies(stopping_policy, rollouts))


def test_next_token_informativeness_by_hand():
    entropies = torch.tensor([[2.0, 0.5, 1.0, 7.0], [3.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = next_token_informativeness(entropies, mask)
    assert found.tolist() == [[1.5, -0.5, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0]]


def test_next_token_informativeness_telescopes_to_the_first_entropy(base_policy):
    rollouts = make_rollouts(**BATCH)
    with torch.no_grad():
        _, entropies = token_logprobs(base_policy.model, rollouts)
    found = next_token_informativeness(entropies, rollouts.completion_mask)
    close(found.sum(1), entropies[:, 0])
    assert entropies[0, 0] > 0.1


def test_an_empty_postfix_is_refused(base_policy):
    with pytest.raises(ValueError, match="postfix must be text of at least one token, got ''"):
        answer_entropies(base_policy, make_rollouts([4], [3, 2], group=2), EarlyExit(postfix=""))


# What training asks for by name


POTENTIALS = {
    "answer_entropy": answer_entropies,
    "answer_surprisal": lambda policy, rollouts, how: answer_surprisals(policy, rollouts, how=how),
}
TEXTS = [
    "<think> Let me go on. 3 + 4 = 7. Hmm, this part\nis it</think><answer> 7",
    "7</think><answer> 7</answer>",
]


@pytest.mark.parametrize("name", POTENTIALS)
@pytest.mark.parametrize("stride", [1, 3, "sentence"])
def test_training_asks_at_the_stride(base_policy, name, stride):
    rollouts, how = from_texts(base_policy, TRIVIAL, TEXTS), EarlyExit(stride=stride)
    found = INFORMATION[name](base_policy, rollouts, how)
    potential = POTENTIALS[name](base_policy, rollouts, how)
    close(found, informativeness(potential, rollouts.completion_mask), atol=1e-6)
    every_token = POTENTIALS[name](base_policy, rollouts, EVERY_PREFIX)
    every_token = informativeness(every_token, rollouts.completion_mask)
    close(found.sum(1), every_token.sum(1), atol=1e-5)
    assert ((found - every_token).abs().max() > 0.01) == (stride != 1)


def test_next_token_entropy_needs_no_early_answers(base_policy):
    rollouts = make_rollouts(**BATCH)
    with pytest.raises(ValueError, match="no token_entropies yet"):
        INFORMATION["next_token_entropy"](None, rollouts, EVERY_PREFIX)
    entropies = torch.rand(rollouts.completion_ids.shape)
    found = INFORMATION["next_token_entropy"](
        None, rollouts.filled(token_entropies=entropies), EVERY_PREFIX
    )
    assert torch.equal(found, next_token_informativeness(entropies, rollouts.completion_mask))


@pytest.mark.parametrize("information", INFORMATION)
def test_informed_rollouts_have_informativeness_and_no_cache(base_policy, information):
    rollouts = sample(
        base_policy, TRIVIAL, num_generations=2, max_completion_length=5, keep_cache=True
    )
    how = EarlyExit(stride=2)
    informed = inform(base_policy, rollouts, information, how)
    expected = INFORMATION[information](base_policy, rollouts, how)
    assert torch.equal(informed.informativeness, expected)
    assert informed.cache is None and "informativeness" not in rollouts.known
    assert informed.token_entropies is rollouts.token_entropies
    assert rollouts.cache is not None


def test_a_users_own_function_can_inform(base_policy):
    rollouts, how = make_rollouts(**BATCH), EarlyExit(stride=3)

    def by_position(policy, rollouts, how):
        t = torch.arange(float(rollouts.completion_ids.shape[1]))
        return t // how.stride * rollouts.completion_mask

    informed = inform(base_policy, rollouts, by_position, how)
    assert informed.informativeness[5].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


# Whole answers


def explicit_surprisal(policy, rollouts, i, t, answer, postfix=POSTFIX):
    """-log p(answer), token by token, from forward passes that end just before each token."""
    start, total = encode_postfix(policy, postfix).tolist(), 0.0
    tokens = policy.tokenizer.encode(answer)
    for j, token in enumerate(tokens):
        suffix = torch.tensor(start + tokens[:j])
        total -= float(forced_logits(policy, rollouts, i, t, suffix)[-1].log_softmax(-1)[token])
    return total


ANSWERS = [" 7 8", " 9", None, " 7 8</answer>", " 12", " 3 4 5 6"]


@pytest.mark.parametrize("way", WAYS)
def test_surprisals_are_those_of_teacher_forcing(base_policy, way):
    rollouts = make_rollouts(**BATCH, left=1, right=1)
    assert [len(base_policy.tokenizer.encode(a)) for a in ANSWERS if a] == [2, 1, 3, 1, 4]
    how = EarlyExit(way=way, chunk_size=5)
    found = answer_surprisals(base_policy, rollouts, ANSWERS, how)
    assert found.dtype == torch.float32 and not found[2].any()
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert not found[i, n + 1 :].any()
        for t in range(n + 1 if ANSWERS[i] else 0):
            expected = explicit_surprisal(base_policy, rollouts, i, t, ANSWERS[i])
            assert float(found[i, t]) == pytest.approx(expected, abs=2e-4)


MIXED = [" 7 8", " 1 2 3" * 6, None, " 4" * 9, " 12", " 3 4 5 6" * 10]


@pytest.mark.parametrize("way", ["packed", "cached"])
def test_answers_of_very_different_lengths(base_policy, way):
    rollouts = make_rollouts(**BATCH, left=1, right=1)
    found = answer_surprisals(base_policy, rollouts, MIXED, EarlyExit(way=way))
    assert not found[2].any()
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert not found[i, n + 1 :].any()
        for t in (0, n) if MIXED[i] else ():
            expected = explicit_surprisal(base_policy, rollouts, i, t, MIXED[i])
            assert float(found[i, t]) == pytest.approx(expected, abs=2e-3)


def test_a_long_answer_makes_no_other_row_ask_longer(base_policy, monkeypatch):
    rollouts, suffixes = make_rollouts(**BATCH), {}

    def ask(model, rollouts, question, how, asked):
        for i in asked.any(1).nonzero()[:, 0].tolist():
            assert i not in suffixes  # no row is asked twice
            suffixes[i] = question.suffix.shape[1]
        return really(model, rollouts, question, how, asked)

    really = prefixes.ask
    monkeypatch.setattr(prefixes, "ask", ask)
    answer_surprisals(base_policy, rollouts, MIXED)
    postfix = len(encode_postfix(base_policy))
    longest = {i: n - postfix + 1 for i, n in suffixes.items()}
    # Up to 8 tokens together, then 9 to 16, 17 to 32, 33 to 64; a row without an answer is spared.
    assert longest == {0: 2, 4: 2, 3: 9, 1: 18, 5: 40}


def test_surprisals_of_single_tokens(base_policy):
    """Includes equal rows: answers of one token must not be shared along with prefixes."""
    rollouts = make_rollouts([4, 9], [5, 5, 3, 6], group=2)
    ids = rollouts.completion_ids.clone()
    ids[1] = ids[0]
    rollouts = replace(rollouts, completion_ids=ids)
    answers = [" 7", " 9", None, " 3"]
    found = answer_surprisals(base_policy, rollouts, answers)
    suffix = encode_postfix(base_policy)
    for i, answer in enumerate(answers):
        if answer is None:
            assert not found[i].any()
            continue
        (token,) = base_policy.tokenizer.encode(answer)
        for t in range(int(rollouts.lengths[i]) + 1):
            log_p = forced_logits(base_policy, rollouts, i, t, suffix)[-1].log_softmax(-1)
            assert float(found[i, t]) == pytest.approx(-float(log_p[token]), abs=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_information_telescopes(base_policy, stride):
    rollouts = make_rollouts(**BATCH)
    found = answer_surprisals(base_policy, rollouts, ANSWERS, EarlyExit(stride=stride))
    s = informativeness(found, rollouts.completion_mask)
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert float(s[i].sum()) == pytest.approx(float(found[i, 0] - found[i, n]), abs=1e-4)
        if ANSWERS[i] and stride > 1:
            first = explicit_surprisal(base_policy, rollouts, i, 0, ANSWERS[i])
            last = explicit_surprisal(base_policy, rollouts, i, n, ANSWERS[i])
            assert float(s[i].sum()) == pytest.approx(first - last, abs=5e-4)


WRITTEN = [
    "<think> 3.</think><answer> 7</answer>",
    "<think> 3.</think><answer> 7 8</answer>",
    "<answer> 1</answer> no<answer> 2</answer>",
    "<think> 3.</think><answer> 7",
    "<think> 3.</think>",
    "<answer> </answer>",
    "<answer> 4</answer><answer> 5",
    "<answer>6</answer>",
]
READ = [" 7", " 7 8", " 2", None, None, None, None, "6"]


def test_final_answers(base_policy):
    rollouts = from_texts(base_policy, TRIVIAL * 4, WRITTEN)
    assert final_answers(base_policy, rollouts) == READ


def test_surprisals_are_of_the_final_answer_by_default(base_policy):
    rollouts = from_texts(base_policy, TRIVIAL * 4, WRITTEN)
    found = answer_surprisals(base_policy, rollouts)
    assert torch.equal(found, answer_surprisals(base_policy, rollouts, READ))
    assert found[0].any() and not found[3].any()


def test_of_an_answer_that_the_model_has_no_positions_for_the_first_tokens_count(tokenizer):
    """The policy may write an answer of any length into the last tag of a completion."""
    text = "<think> 4.</think><answer>" + " 12" * 60 + "</answer>"
    rollouts = from_texts(tiny_policy("qwen2", tokenizer), TRIVIAL[:1], [text])
    longest = int(rollouts.prompt_mask.sum() + rollouts.lengths[0])
    small = tiny_policy("qwen2", tokenizer, max_position_embeddings=longest + 12)
    room = 12 - len(encode_postfix(small)) + 1
    first = small.tokenizer.decode(small.tokenizer.encode(" 12" * 60)[:room])
    assert len(small.tokenizer.encode(first)) == room
    found = answer_surprisals(small, rollouts)
    torch.testing.assert_close(found, answer_surprisals(small, rollouts, [first]))


def test_a_batch_without_answers_has_no_surprisals(base_policy):
    found = answer_surprisals(base_policy, make_rollouts([4], [3, 2], group=2), [None, None])
    assert found.shape == (2, 4) and not found.any()


@pytest.mark.parametrize(
    ("answers", "message"),
    [([" 7"], "answers must be one for each of"), ([" 7", ""], "without tokens")],
)
def test_bad_answers_are_refused(base_policy, answers, message):
    with pytest.raises(ValueError, match=message):
        answer_surprisals(base_policy, make_rollouts([4], [3, 2], group=2), answers)


# Candidates


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("candidates", [[" 7", " 9", " 12"], [" 7", " 7 8", " 9 1 2", " 5"]])
def test_candidates_by_explicit_passes(base_policy, candidates, way):
    rollouts = make_rollouts([4, 9], [5, 1, 3, 4], group=2, left=1, right=1)
    found = candidate_logprobs(base_policy, rollouts, candidates, EarlyExit(way=way))
    uncertainty = logits_entropy(found)
    for i, n in enumerate(rollouts.lengths.tolist()):
        for t in range(n + 1):
            scores = [-explicit_surprisal(base_policy, rollouts, i, t, c) for c in candidates]
            expected = torch.tensor(scores).log_softmax(0)
            close(found[i, t], expected, atol=5e-4)
            p = expected.exp().tolist()
            h = -sum(x * math.log(x) for x in p if x > 0)
            assert float(uncertainty[i, t]) == pytest.approx(h, abs=1e-3)
        close(found[i, n + 1 :].exp(), torch.full_like(found[i, n + 1 :], 1 / len(candidates)))


@pytest.mark.parametrize("candidates", [[" 7", " 9"], [" 7", " 7 8"]])
def test_candidates_are_asked_about_after_every_token(base_policy, candidates):
    rollouts = make_rollouts(**BATCH)
    found = candidate_logprobs(base_policy, rollouts, candidates, EarlyExit(stride=3))
    assert torch.equal(found, candidate_logprobs(base_policy, rollouts, candidates))


@pytest.mark.parametrize("candidates", [[], [" 7"], [" 7", " 7"], [" 7", ""]])
def test_bad_candidates_are_refused(base_policy, candidates):
    with pytest.raises(ValueError, match="candidates must be"):
        candidate_logprobs(base_policy, make_rollouts([4], [3, 2], group=2), candidates)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), scale=st.floats(0, 5))
def test_belief_shift_is_a_divergence(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logprobs = (scale * torch.randn(3, 5, 4, generator=generator)).log_softmax(-1)
    mask = torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
    found = belief_shift(logprobs, mask)
    assert found.shape == mask.shape and not found[~mask].any()
    assert found.min() > -1e-6
    for i, t in mask.nonzero().tolist():
        expected = torch.nn.functional.kl_div(
            logprobs[i, t], logprobs[i, t + 1], log_target=True, reduction="sum"
        )
        assert float(found[i, t]) == pytest.approx(float(expected), abs=1e-5)


def test_belief_shift_sees_a_change_of_mind():
    """Another, equally uncertain guess gives no drop of entropy, but a shift."""
    logs = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
    mask = torch.tensor([[True]])
    assert float(informativeness(logits_entropy(logs), mask)) == pytest.approx(0, abs=1e-6)
    assert float(belief_shift(logs, mask)) == pytest.approx(0.8 * math.log(9), rel=1e-5)
