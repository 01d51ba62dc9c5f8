"""Asking after some prefixes only: exact there, and interpolated between them."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from helpers import BATCH, TRIVIAL, close, make_rollouts, unpadded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.early_exit.strides import prefixes_asked, sentence_ends, spread
from iapo_mini.information import answer_entropies, informativeness
from iapo_mini.problems.stories import chain_of_thought, stories
from iapo_mini.sampling import from_texts


def straight(values, asked, length):
    """Values at asked prefixes, linear interpolation between them, 0 past the length."""
    out = [0.0] * len(values)
    for t in range(length + 1):
        left = max(j for j in asked if j <= t)
        right = min(j for j in asked if j >= t)
        share = (t - left) / (right - left) if right > left else 0.0
        out[t] = values[left] + (values[right] - values[left]) * share
    return out


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 50])
def test_strided_is_exact_where_asked_and_linear_between(base_policy, stride):
    rollouts = make_rollouts(**BATCH, right=2)
    packed = answer_entropies(base_policy, rollouts)
    found = answer_entropies(base_policy, rollouts, EarlyExit(stride=stride))
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


def test_every_token_is_asked_about_by_default(base_policy):
    rollouts = make_rollouts(**BATCH)
    every = answer_entropies(base_policy, rollouts, EarlyExit(stride=1))
    assert torch.equal(answer_entropies(base_policy, rollouts), every)


def test_prefixes_asked_by_hand(base_policy):
    """Every third prefix and the last one, in rows of 5, 1, 3, 6, 0 and 9 tokens."""
    asked = prefixes_asked(base_policy, make_rollouts(**BATCH), 3)
    found = [row.nonzero()[:, 0].tolist() for row in asked]
    ends = [5, 1, 3, 6, 0, 9]
    assert found == [sorted({0, 3, 6, 9, n}) for n in ends]


def test_spread_by_hand():
    values = torch.tensor([[4.0, 9.0, 9.0, 1.0, 9.0], [2.0, 3.0, 9.0, 9.0, 9.0]])
    asked = torch.tensor([[True, False, False, True, False], [True, True, False, False, False]])
    found = spread(values, asked)
    # After the last question its value is kept.
    assert found.tolist() == [[4.0, 3.0, 2.0, 1.0, 1.0], [2.0, 3.0, 3.0, 3.0, 3.0]]


TEXT = "<think> Let me go on. 3 + 4 = 7. Hmm, this part\nis it</think><answer> 7"


def test_sentence_ends_are_found(base_policy):
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


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It costs $2.50 each. So 3*2.5=7.5.", ["It costs $2.50 each.", " So 3*2.5=7.5."]),
        ("Pi is 3.14159. Done", ["Pi is 3.14159.", " Done"]),
        ("e.g. one! Is it? Yes", ["e.g.", " one!", " Is it?", " Yes"]),
        ("a 12.\n13. b", ["a 12.", "\n", "13.", " b"]),
        ("Wait...no. x", ["Wait...no.", " x"]),
        ("1.2.3", ["1.2.3"]),
        ("U.S. law", ["U.S.", " law"]),
    ],
)  # fmt: skip
def test_a_point_within_a_number_or_a_word_ends_no_sentence(base_policy, text, sentences):
    """The tokenizer here writes byte by byte, as those of real models write numbers."""
    policy, rollouts = written_with(base_policy, text)
    ends = sentence_ends(policy, rollouts)[0].nonzero()[:, 0].tolist()
    assert [text[a:b] for a, b in itertools.pairwise(ends)] == sentences


def written_with(base_policy, text, *merged):
    """A policy whose tokenizer has a token per byte and for each of ``merged``, and a row of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>"]
    )
    tokenizer.train_from_iterator(["a"], trainer)
    tokenizer.add_tokens(list(merged))
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    ids = torch.tensor([letters.encode(text)])
    rollouts = make_rollouts(prompts=[1], completions=[ids.shape[1]], group=1)
    policy = replace(base_policy, tokenizer=letters)
    return policy, replace(rollouts, completion_ids=ids)


@pytest.mark.parametrize("stride", ["sentence", 3])
@pytest.mark.parametrize(
    ("text", "merged", "left"),
    [
        ("<think>One. Two.</think><answer>7</answer>", (), "<think>One. Two."),
        ("<think>One.\n</think>\n<answer>7</answer>\n", ("think", "answer"), "<think>One.\n"),
        ("<think>One. Two.</think><answer>7", (".</", "><"), "<think>One. Two"),
        ("<think>One. Two.</think>", (), "<think>One. Two."),
        ("<think>One. Two. <answer>7</answer>", (), None),
        ("One. Two.</think><answer>7</answer>", ("</think>", "<answer>"), None),
    ],
)
def test_no_question_stands_within_tags_of_several_tokens(base_policy, text, merged, left, stride):
    """There the text that forces an answer would stand twice, and the jump would be spread."""
    policy, rollouts = written_with(base_policy, text, *merged)
    n = int(rollouts.lengths[0])
    before = prefixes_asked(policy, rollouts, stride, ahead=False)[0].tolist()
    asked = prefixes_asked(policy, rollouts, stride)[0].tolist()
    tokens = [policy.tokenizer.decode([t]) for t in rollouts.completion_ids[0].tolist()]
    end = n if left is None else next(t for t in range(n) if "".join(tokens[:t]) == left)
    assert asked == before[: end + 1] + [False] * (n - end - 1) + [True] * (end < n)
    assert left is None or asked != before or "".join(tokens[end:]) == "</think>"


def test_strided_by_sentences(base_policy):
    rng = random.Random(0)
    problems = [p for p, _ in zip(stories("test"), range(3))]
    texts = ["".join(s.text for s in chain_of_thought(p, rng, wordiness=0.8)) for p in problems]
    rollouts = from_texts(base_policy, problems, texts)
    packed = answer_entropies(base_policy, rollouts)
    found = answer_entropies(base_policy, rollouts, EarlyExit(stride="sentence"))
    ends = sentence_ends(base_policy, rollouts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        asked = ends[i].nonzero()[:, 0].tolist()
        assert len(asked) > 4 and asked[-1] == n
        assert found[i].tolist() == pytest.approx(straight(packed[i].tolist(), asked, n), abs=1e-5)
