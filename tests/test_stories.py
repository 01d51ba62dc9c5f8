"""The story world: streams, arithmetic, labelled chains, tokenizer, prompt."""

import itertools
import operator
import random
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo_mini.problems.stories import (
    MAX_VALUE,
    ROLES,
    SPLITS,
    chain_of_thought,
    label_roles,
    stories,
    token_roles,
)
from iapo_mini.rewards import parse_answer

ARITHMETIC = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
TEXT = st.text(max_size=60)
# Words of the grammar, mixed with arbitrary text.
TAGGED = st.lists(
    st.sampled_from(
        "<think>~</think>~<answer>~</answer>~<|im_end|>~ After she goes,~ 1 + 2.~ So~ Check~. ~ The"
        "~,~<~|>~\n".split("~")
    )
    | st.text(max_size=8),
    max_size=12,
).map("".join)


def take(n, *args, **kwargs):
    return list(itertools.islice(stories(*args, **kwargs), n))


def skeleton(problem):
    """The arithmetic of a story without its words."""
    return problem.steps[0].before, tuple((s.op, s.operand) for s in problem.steps)


def chains(n, wordiness=None, seed=0):
    rng = random.Random(seed)
    return [(p, chain_of_thought(p, rng, wordiness)) for p in take(n, "train", seed=seed)]


def by_character(segments):
    return [s.role for s in segments for _ in s.text]


def test_no_arithmetic_is_in_two_splits():
    keys = {
        split: {skeleton(p) for seed in range(3) for p in take(1000, split, seed)}
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not keys[a] & keys[b]


def test_short_arithmetic_recurs_so_that_only_the_split_rule_keeps_it_apart():
    """Two seeds of one split share short stories, so the test above is meaningful."""
    one, two = ({skeleton(p) for p in take(1000, "test", s, max_steps=2)} for s in (0, 1))
    assert one & two


@pytest.mark.parametrize("split", SPLITS)
def test_equal_seeds_give_equal_streams(split):
    assert take(50, split, 3) == take(50, split, 3)
    assert take(50, split, 3) != take(50, split, 4)


def test_a_stream_is_endless():
    assert sum(1 for _ in itertools.islice(stories("train"), 20_000)) == 20_000


def test_stories_use_every_number_of_steps_and_every_operation():
    problems = take(2000, "train")
    assert {len(p.steps) for p in problems} == {2, 3, 4, 5, 6}
    counts = {op: 0 for op in ARITHMETIC}
    for problem in problems:
        for step in problem.steps:
            counts[step.op] += 1
    # Each operation has at least a twentieth of all steps.
    assert all(20 * n > sum(counts.values()) for n in counts.values()), counts
    assert {len(p.steps) for p in take(100, "train", min_steps=3, max_steps=3)} == {3}


def test_answers_follow_from_the_steps():
    for problem in take(1000, "train", seed=5):
        value = problem.steps[0].before
        for step in problem.steps:
            assert step.before == value
            if step.op == "/":
                assert value % step.operand == 0
            value = ARITHMETIC[step.op](value, step.operand)
            assert step.result == value
            assert 1 <= step.before <= MAX_VALUE and 1 <= value <= MAX_VALUE
        assert problem.answer == str(value)


def test_the_question_contains_all_the_arithmetic():
    """The answer can be computed from the question alone."""
    for problem in take(500, "train", seed=6):
        assert f"has {problem.steps[0].before} {problem.items}." in problem.question
        position = 0
        for step in problem.steps:
            sentence = step.text[0].upper() + step.text[1:] + "."
            assert sentence in problem.question[position:]
            position = problem.question.index(sentence, position) + len(sentence)
            implied = re.search(r"doubles|as many again|half", step.text)
            assert implied or re.search(rf"\b(one of )?{step.operand}\b", step.text)


def test_some_stories_have_distractors_and_some_have_none():
    extra = [p.question.count(". ") - len(p.steps) - 1 for p in take(500, "train")]
    assert set(extra) == {0, 1, 2}


@pytest.mark.parametrize("wordiness", [None, 0.0, 0.5, 1.0])
def test_labels_from_text_equal_the_writers_labels(wordiness):
    for _, segments in chains(200, wordiness):
        text = "".join(s.text for s in segments)
        assert by_character(label_roles(text)) == by_character(segments)


@pytest.mark.parametrize("wordiness", [None, 0.0, 1.0])
def test_chains_are_well_formed_and_right(wordiness):
    for problem, segments in chains(200, wordiness):
        assert parse_answer("".join(s.text for s in segments)) == problem.answer


def test_chains_have_every_role():
    assert {s.role for _, c in chains(200) for s in c} == {*ROLES, "format"}


def test_chains_compute_every_step():
    """Even a terse chain states the result of each step, in order, in a compute segment."""
    for problem, segments in chains(100, 0.0) + chains(100, 1.0):
        computed = [s.text for s in segments if s.role == "compute"]
        assert len(computed) == len(problem.steps)
        for step, text in zip(problem.steps, computed):
            assert str(step.result) in re.findall(r"\d+", text)


def test_equal_generators_give_equal_chains():
    assert chains(20, seed=1) == chains(20, seed=1)


def test_token_roles_follow_the_writers_labels(tokenizer):
    """A token has the role of its first character."""
    for _, segments in chains(100):
        text = "".join(s.text for s in segments)
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected, position = [], 0
        for piece in (tokenizer.decode([i]) for i in ids):
            expected.append(by_character(segments)[position])
            position += len(piece)
        roles = token_roles(tokenizer, ids)
        assert roles == expected
        assert set(roles) <= {*ROLES, "format"}


def test_end_of_sequence_token_is_format(tokenizer):
    ids = [*tokenizer.encode(" 7.</think><answer> 7</answer>"), tokenizer.eos_token_id]
    assert token_roles(tokenizer, ids)[-1] == "format"


def test_token_roles_of_arbitrary_ids(tokenizer):
    """A policy may write anything, even parts of characters, and each id gets one role."""
    rng = random.Random(0)
    for n in (0, 1, 2, 50):
        ids = [rng.randrange(len(tokenizer)) for _ in range(n)]
        roles = token_roles(tokenizer, ids)
        assert len(roles) == n
        assert set(roles) <= {*ROLES, "format", "other"}


def test_most_tokens_of_a_chain_do_not_compute(tokenizer):
    """So a policy can drop at least half of the tokens."""
    roles = []
    for _, segments in chains(200):
        roles += token_roles(tokenizer, tokenizer.encode("".join(s.text for s in segments)))
    assert sum(r != "compute" for r in roles) >= 0.5 * len(roles)


def test_wordiness_lengthens_chains(tokenizer):
    def mean_length(w):
        texts = ["".join(s.text for s in c) for _, c in chains(100, w)]
        return sum(len(tokenizer.encode(t)) for t in texts) / len(texts)

    short, middle, long = (mean_length(w) for w in (0.0, 0.5, 1.0))
    assert 1.3 * short < middle and 1.3 * middle < long


@given(TEXT | TAGGED)
def test_labelled_segments_join_to_the_text(text):
    assert "".join(s.text for s in label_roles(text)) == text


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("<think> 5 apples.</think>", ["format", "compute", "format"]),
        ("<answer> So 5.</answer> So 5.", ["format", "format", "format", "conclude"]),
        (" After she naps, 1 + 1 = 2.", ["restate", "compute"]),
        (" After.", ["other"]),
        (" The cat. Blah blah.", ["restate", "other"]),
    ],
)
def test_labels_of_text_outside_the_grammar(text, roles):
    assert [s.role for s in label_roles(text)] == roles


def test_tokenizer_round_trips_what_the_world_writes(tokenizer):
    for problem, segments in chains(200):
        for text in (problem.question, "".join(s.text for s in segments)):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT | TAGGED)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    # Qwen2 tokenizers compose characters (NFC) before anything else.
    text = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_small_numbers_are_one_token(tokenizer):
    for number in range(100):
        (token,) = tokenizer.encode(f" {number}", add_special_tokens=False)
        # This must also hold in a sentence, so that forced answers and written numbers agree.
        assert token in tokenizer.encode(f"has {number} apples", add_special_tokens=False)


def test_tags_are_single_tokens_that_decoding_keeps(tokenizer):
    text = "<think></think><answer></answer>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("split", ["validation", "", "Train"])
def test_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match=f"split must be one of train, tune, test, got '{split}'"):
        stories(split)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (4, 3), (-1, -1)])
def test_empty_range_of_steps_is_refused(low, high):
    with pytest.raises(
        ValueError, match=f"min_steps must be 1 to max_steps, got {low} with a max_steps of {high}"
    ):
        stories("train", min_steps=low, max_steps=high)
