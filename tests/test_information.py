"""Measures of what a token tells: strides, sums along a completion, answers of several tokens."""

import itertools
import math
import random

import pytest
import torch
from helpers import TRIVIAL, explicit_entropies, forced_logits, make_rollouts, unpadded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iapo_mini.early_exit.prefixes import METHODS
from iapo_mini.information import (
    INFORMATION,
    answer_entropies,
    answer_surprisals,
    belief_shift,
    candidate_logprobs,
    encode_postfix,
    entropy,
    final_answers,
    head_entropy,
    informativeness,
    next_token_informativeness,
    sentence_ends,
)
from iapo_mini.logprobs import token_logprobs
from iapo_mini.problems.stories import chain_of_thought, stories
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import POSTFIX

BATCH = dict(prompts=[4, 9, 2], completions=[5, 1, 3, 6, 0, 9], group=2)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# Entropy


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0, 50))
def test_entropy_is_that_of_the_categorical_distribution(seed, scale):
    logits = scale * torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(seed))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected, atol=1e-5, rtol=1e-5)


def test_entropy_of_known_distributions():
    assert float(entropy(torch.full((1000,), 3.0))) == pytest.approx(math.log(1000), rel=1e-6)
    assert float(entropy(torch.tensor([1e4, 0.0, -1e4]))) == 0.0
    half = torch.tensor([5.0, 5.0, -1e4])
    assert float(entropy(half)) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("shape", [(50_000,), (2, 1, 50_000)])
def test_entropy_of_half_precision_logits_is_computed_in_full_precision(shape):
    found = entropy(torch.zeros(shape, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and found.shape == shape[:-1]
    assert found.flatten().tolist() == pytest.approx([math.log(50_000)] * found.numel(), rel=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 1024, 1025, 5000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_entropy_is_that_of_whole_logits(vocabulary, bias, dtype):
    """Blocks of the vocabulary, of all sizes of the last one; flat and peaked distributions."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, vocabulary, bias=bias).to(dtype)
    hidden = torch.cat([torch.randn(300, 2, 16), 40 * torch.randn(300, 2, 16)]).to(dtype)
    found = head_entropy(head, hidden)
    assert found.dtype == torch.float32 and found.shape == (600, 2)
    exact = torch.nn.functional.linear(hidden, head.weight, head.bias).double().log_softmax(-1)
    torch.testing.assert_close(found.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=2e-5)


def test_head_entropy_makes_no_whole_logits():
    head = torch.nn.Linear(8, 20_000)
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            shapes.extend(x.numel() for x in (out,) if isinstance(x, torch.Tensor))
            return out

    hidden = torch.randn(4_000, 8)
    with Shapes():
        head_entropy(head, hidden)
    assert max(shapes) <= max(2**19, head.weight.numel())


# Informativeness


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_informativeness_telescopes(lengths, seed):
    """Chain rule: what the tokens tell sums to what the whole completion tells."""
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
    """A token that makes the answer surer is informative; one that confuses counts negative."""
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


# Strides


def straight(values, asked, length):
    """Values at asked prefixes, straight lines between them, 0 past the length."""
    out = [0.0] * len(values)
    for t in range(length + 1):
        left = max(j for j in asked if j <= t)
        right = min(j for j in asked if j >= t)
        share = (t - left) / (right - left) if right > left else 0.0
        out[t] = values[left] + (values[right] - values[left]) * share
    return out


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 50])
def test_strided_is_exact_where_asked_and_straight_between(base_policy, stride):
    rollouts = make_rollouts(**BATCH, right=2)
    packed = answer_entropies(base_policy, rollouts)
    found = answer_entropies(base_policy, rollouts, method="strided", stride=stride)
    s = informativeness(found, rollouts.completion_mask)
    for i, n in enumerate(rollouts.lengths.tolist()):
        asked = sorted({*range(0, n + 1, stride), n})
        expected = straight(packed[i].tolist(), asked, n)
        assert found[i].tolist() == pytest.approx(expected, abs=1e-5)
        for left, right in itertools.pairwise(asked):
            drop = float(packed[i, left] - packed[i, right])
            assert float(s[i, left:right].sum()) == pytest.approx(drop, abs=1e-5)
            assert s[i, left:right].tolist() == pytest.approx(
                [drop / (right - left)] * (right - left), abs=1e-5
            )
    if stride == 1:
        close(found, packed, atol=1e-6)
    else:
        assert (found - packed).abs().max() > 0.01  # some prefixes were really left out


def test_the_default_stride_is_four(base_policy):
    rollouts = make_rollouts(**BATCH)
    four = answer_entropies(base_policy, rollouts, method="strided", stride=4)
    assert torch.equal(answer_entropies(base_policy, rollouts, method="strided"), four)


TEXT = "<think> Let me go on. 3 + 4 = 7. Hmm, this part\nis it</think><answer> 7"


def test_sentences_end_where_they_end(base_policy):
    rollouts = from_texts(base_policy, TRIVIAL, [TEXT, "7"])
    found = sentence_ends(base_policy, rollouts)
    tokens = base_policy.tokenizer
    for i in range(2):
        completion = unpadded(rollouts, i)[1].tolist()
        texts = [tokens.decode([t], skip_special_tokens=False).rstrip(" ") for t in completion]
        expected = [True] + [x.endswith((".", "!", "?", ">", "\n")) for x in texts]
        expected[-1] = True
        padding = [False] * (found.shape[1] - len(expected))
        assert found[i].tolist() == expected + padding
    pieces = [tokens.decode([t]) for t in unpadded(rollouts, 0)[1].tolist()]
    ends = found[0].nonzero()[:, 0].tolist()
    cut = ["".join(pieces[a:b]) for a, b in itertools.pairwise(ends)]
    assert cut[:5] == [
        "<think>",
        " Let me go on.",
        " 3 + 4 = 7.",
        " Hmm, this part\n",
        "is it</think>",
    ]


def test_strided_by_sentences(base_policy):
    rng = random.Random(0)
    problems = [p for p, _ in zip(stories("test"), range(3))]
    texts = ["".join(s.text for s in chain_of_thought(p, rng, wordiness=0.8)) for p in problems]
    rollouts = from_texts(base_policy, problems, texts)
    packed = answer_entropies(base_policy, rollouts)
    found = answer_entropies(base_policy, rollouts, method="strided", stride="sentence")
    ends = sentence_ends(base_policy, rollouts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        asked = ends[i].nonzero()[:, 0].tolist()
        assert len(asked) > 4 and asked[-1] == n
        assert found[i].tolist() == pytest.approx(straight(packed[i].tolist(), asked, n), abs=1e-5)


@pytest.mark.parametrize(("method", "estimator"), [("iapo", answer_entropies), ("iapo_pmi", None)])
@pytest.mark.parametrize("stride", [1, 3, "sentence"])
def test_what_training_reads_asks_at_the_stride(base_policy, method, estimator, stride):
    rollouts = from_texts(base_policy, TRIVIAL, [TEXT, "7</think><answer> 7</answer>"])
    estimator = estimator or answer_surprisals
    found = INFORMATION[method](base_policy, rollouts, 256.0, stride)
    potential = estimator(base_policy, rollouts, method="strided", stride=stride)
    close(found, informativeness(potential, rollouts.completion_mask), atol=1e-6)
    every_token = informativeness(estimator(base_policy, rollouts), rollouts.completion_mask)
    close(found.sum(1), every_token.sum(1), atol=1e-5)
    assert ((found - every_token).abs().max() > 0.01) == (stride != 1)


@pytest.mark.parametrize("stride", [0, -1, 2.5, True, "word", None])
def test_bad_strides_are_refused(base_policy, stride):
    rollouts = make_rollouts([4], [3, 2], group=2)
    with pytest.raises(ValueError, match=f"stride is {stride!r}"):
        answer_entropies(base_policy, rollouts, method="strided", stride=stride)


# Whole answers


def explicit_surprisal(policy, rollouts, i, t, answer, postfix=POSTFIX):
    """-log p(answer) token by token, each by a forward pass that ends just before it."""
    start, total = encode_postfix(policy, postfix).tolist(), 0.0
    tokens = policy.tokenizer.encode(answer)
    for j, token in enumerate(tokens):
        suffix = torch.tensor(start + tokens[:j])
        total -= float(forced_logits(policy, rollouts, i, t, suffix)[-1].log_softmax(-1)[token])
    return total


ANSWERS = [" 7 8", " 9", None, " 7 8</answer>", " 12", " 3 4 5 6"]


@pytest.mark.parametrize("method", METHODS)
def test_surprisals_are_those_of_teacher_forcing(base_policy, method):
    rollouts = make_rollouts(**BATCH, left=1, right=1)
    assert [len(base_policy.tokenizer.encode(a)) for a in ANSWERS if a] == [2, 1, 3, 1, 4]
    found = answer_surprisals(base_policy, rollouts, ANSWERS, method=method, chunk_size=5)
    assert found.dtype == torch.float32 and not found[2].any()
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert not found[i, n + 1 :].any()
        for t in range(n + 1 if ANSWERS[i] else 0):
            expected = explicit_surprisal(base_policy, rollouts, i, t, ANSWERS[i])
            assert float(found[i, t]) == pytest.approx(expected, abs=2e-4)


def test_surprisals_of_single_tokens(base_policy):
    """Equal rows, too: with one token each, rows may share prefixes, but not answers."""
    rollouts = make_rollouts([4, 9], [5, 5, 3, 6], group=2)
    rollouts.completion_ids[1] = rollouts.completion_ids[0]
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


@pytest.mark.parametrize("method", ["packed", "strided"])
def test_pointwise_information_telescopes(base_policy, method):
    rollouts = make_rollouts(**BATCH)
    found = answer_surprisals(base_policy, rollouts, ANSWERS, method=method, stride=2)
    s = informativeness(found, rollouts.completion_mask)
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert float(s[i].sum()) == pytest.approx(float(found[i, 0] - found[i, n]), abs=1e-4)
        if ANSWERS[i] and method == "strided":
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


def test_surprisals_are_about_the_final_answer_unless_told(base_policy):
    rollouts = from_texts(base_policy, TRIVIAL * 4, WRITTEN)
    found = answer_surprisals(base_policy, rollouts)
    assert torch.equal(found, answer_surprisals(base_policy, rollouts, READ))
    assert found[0].any() and not found[3].any()


def test_a_batch_without_answers_has_no_surprisals(base_policy):
    found = answer_surprisals(base_policy, make_rollouts([4], [3, 2], group=2), [None, None])
    assert found.shape == (2, 4) and not found.any()


@pytest.mark.parametrize(
    ("answers", "message"),
    [([" 7"], "answers has 1 entries"), ([" 7", ""], "without tokens")],
)
def test_bad_answers_are_refused(base_policy, answers, message):
    with pytest.raises(ValueError, match=message):
        answer_surprisals(base_policy, make_rollouts([4], [3, 2], group=2), answers)


# Candidates


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("candidates", [[" 7", " 9", " 12"], [" 7", " 7 8", " 9 1 2", " 5"]])
def test_candidates_by_explicit_passes(base_policy, candidates, method):
    rollouts = make_rollouts([4, 9], [5, 1, 3, 4], group=2, left=1, right=1)
    found = candidate_logprobs(base_policy, rollouts, candidates, method=method)
    uncertainty = entropy(found)
    for i, n in enumerate(rollouts.lengths.tolist()):
        for t in range(n + 1):
            scores = [-explicit_surprisal(base_policy, rollouts, i, t, c) for c in candidates]
            expected = torch.tensor(scores).log_softmax(0)
            close(found[i, t], expected, atol=5e-4)
            p = expected.exp().tolist()
            h = -sum(x * math.log(x) for x in p if x > 0)
            assert float(uncertainty[i, t]) == pytest.approx(h, abs=1e-3)
        close(found[i, n + 1 :].exp(), torch.full_like(found[i, n + 1 :], 1 / len(candidates)))


@pytest.mark.parametrize("candidates", [[], [" 7"], [" 7", " 7"], [" 7", ""]])
def test_bad_candidates_are_refused(base_policy, candidates):
    with pytest.raises(ValueError, match="candidates is"):
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
    """From one guess to another, equally unsure one: no drop of entropy, but a shift."""
    logs = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
    mask = torch.tensor([[True]])
    assert float(informativeness(entropy(logs), mask)) == pytest.approx(0, abs=1e-6)
    assert float(belief_shift(logs, mask)) == pytest.approx(0.8 * math.log(9), rel=1e-5)
