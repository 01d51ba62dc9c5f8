"""Rewards: format (+0.5 / -0.5) plus correctness (+1 / -1)."""

import pytest
import torch
from helpers import written
from hypothesis import given
from hypothesis import strategies as st

from iapo_mini.problems.verify import equal_answers
from iapo_mini.rewards import (
    lenient_answer,
    lenient_correct,
    parse_answer,
    released_reward,
    reward,
    score,
)
from iapo_mini.tasks import Problem

RIGHT, WRONG, ILL_FORMED = (1.5, True), (-0.5, False), (-1.5, False)
PIECES = ["<think>", "</think>", "<answer>", "</answer>", " 72", "72.0", "$", ",", ".", "-", "\n"]
TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from(PIECES) | st.text(max_size=4), max_size=12
).map("".join)


def said(answer):
    return f"<think> so it is.</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (said(" 72"), RIGHT),
        (said("72"), RIGHT),
        (said("\n72\n"), RIGHT),
        (said(" 71"), WRONG),
        (said(" -72"), WRONG),
        (said(""), WRONG),
        (said(" "), WRONG),
        (said(" seventy-two"), WRONG),
        (said(" 72 apples"), WRONG),
        (said(" 71 72"), WRONG),
        (said(" 70 + 2"), WRONG),
        (said(" 72%"), WRONG),
        # Space and line breaks between the parts, before and after.
        ("<think>a</think>\n<answer>72</answer>", RIGHT),
        ("<think>a</think> \n\t <answer>72</answer>", RIGHT),
        ("\n <think>a</think><answer>72</answer> \n", RIGHT),
        ("<think>a\nb</think><answer>72</answer>", RIGHT),
        ("<think></think><answer>72</answer>", RIGHT),
        # Anything else around or between the parts.
        ("Sure! <think>a</think><answer>72</answer>", ILL_FORMED),
        ("<think>a</think> So: <answer>72</answer>", ILL_FORMED),
        ("<think>a</think><answer>72</answer> Done.", ILL_FORMED),
        # Order and number of the parts.
        ("<answer>72</answer><think>a</think>", ILL_FORMED),
        ("<think>a</think><answer>72</answer><answer>72</answer>", ILL_FORMED),
        ("<think>a</think><answer>71</answer><answer>72</answer>", ILL_FORMED),
        ("<think>a</think><think>b</think><answer>72</answer>", ILL_FORMED),
        # One inside the other.
        ("<think>a<answer>72</answer></think>", ILL_FORMED),
        ("<think>a<answer>72</answer></think><answer>72</answer>", ILL_FORMED),
        ("<think><think>a</think></think><answer>72</answer>", ILL_FORMED),
        ("<think>a</think><answer><think>72</think></answer>", ILL_FORMED),
        ("<think>a</think><answer><answer>72</answer></answer>", ILL_FORMED),
        # Missing tags.
        ("", ILL_FORMED),
        ("72", ILL_FORMED),
        ("<answer>72</answer>", ILL_FORMED),
        ("<think>a</think>", ILL_FORMED),
        ("<think>a</think>72", ILL_FORMED),
        ("<think>a</think><answer>72", ILL_FORMED),
        ("<think>a</think>72</answer>", ILL_FORMED),
        ("a</think><answer>72</answer>", ILL_FORMED),
        ("<think>a<answer>72</answer>", ILL_FORMED),
        ("<THINK>a</THINK><ANSWER>72</ANSWER>", ILL_FORMED),
    ],
)
def test_reward_of_a_completion(completion, expected):
    assert reward(completion, "72") == expected


@pytest.mark.parametrize(
    ("given", "reference", "equal"),
    [
        ("72", "72", True),
        ("72.0", "72", True),
        ("72", "72.00", True),
        ("072", "72", True),
        (" 72 ", "72", True),
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("$5", "5", True),
        ("$ 5", "5", True),
        ("$1,234.50", "1234.5", True),
        ("-3", "-3", True),
        ("-0", "0", True),
        ("72.5", "72", False),
        ("72", "73", False),
        ("7", "72", False),
        ("72", "7", False),
        ("0.1", "0.10000000000000001", False),
        # Exact far beyond what a float can hold.
        ("9" * 30, "9" * 30, True),
        ("9" * 30, "9" * 29 + "8", False),
        ("9" * 30 + ".0", "9" * 30, True),
        ("9" * 200, "9" * 200, True),
        ("9" * 200, "9" * 199 + "8", False),
        # These are not numbers: nothing is evaluated, and Python's number words are only words.
        ("2+3", "5", False),
        ("1e1", "10", True),
        ("1_0", "10", False),
        ("0x10", "16", False),
        ("nan", "nan", True),
        ("inf", "5", False),
        ("5", "inf", False),
        ("50%", "50", False),
        ("Paris", "Paris", True),
        ("Paris", "paris", True),
        ("Paris", "72", False),
        ("", "72", False),
        ("", "", False),
        (" ", " ", False),
        ("$", "72", False),
        (",", "", False),
    ],
)
def test_equal_answers(given, reference, equal):
    assert equal_answers(given, reference) is equal


@given(TEXT, st.sampled_from(["72", "5", "", "Paris"]))
def test_any_text_has_a_reward_and_only_equal_answers_are_right(text, reference):
    value, correct = reward(text, reference)
    answer = parse_answer(text)
    if answer is None:
        assert (value, correct) == ILL_FORMED
    else:
        assert correct is equal_answers(answer, reference)
        assert value == (1.5 if correct else -0.5)


@given(st.text(max_size=20), st.text(max_size=20))
def test_tags_around_any_text_make_it_well_formed(thought, answer):
    """Any answer without tags is returned unchanged."""
    assert parse_answer(f"<think>{thought}</think><answer>{answer}</answer>") == answer.strip()


@given(st.integers(), st.integers())
def test_integers_are_right_when_equal(a, b):
    assert reward(said(f" {a}"), str(b))[1] is (a == b)
    assert reward(said(f" {a:,}"), str(a)) == RIGHT


def test_long_hostile_text_is_judged_quickly():
    """A policy may write such text at its length limit; a pattern that backtracks would hang."""
    for text in ("<think>" * 500, "<think></think><answer>" * 300, said("9" * 5000), "<" * 5000):
        assert reward(text, "72")[1] is False


def test_score_gives_each_row_the_answer_of_its_own_problem(tokenizer):
    texts = [said(" 5"), said(" 7"), said(" 7"), "7"]
    ids = [[*tokenizer.encode(t), tokenizer.eos_token_id] for t in texts]
    rollouts = written(ids, group=2, pad=tokenizer.pad_token_id)
    scored = score(rollouts, tokenizer, [Problem("a", "5"), Problem("b", "7")])
    assert scored.rewards.tolist() == [1.5, -0.5, 1.5, -1.5]
    assert scored.rewards.dtype == torch.float32
    assert scored.correct.tolist() == [True, False, True, False]
    assert scored.correct.dtype == torch.bool
    assert not rollouts.known


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think>\n<answer>72</answer>", (1.5, True)),
        ("<think>a</think>\n<answer>71</answer>", (-0.5, False)),
        # A right answer in a bad format earns half a point: no line break, one too many, text.
        ("<think>a</think><answer>72</answer>", (0.5, True)),
        ("<think>a\nb</think>\n<answer>72</answer>", (0.5, True)),
        ("<think>a</think>\n<answer>72</answer> Done.", (0.5, True)),
        ("<answer>72</answer>", (0.5, True)),
        ("<think>a</think>\n<answer>72", (0.5, True)),
        ("72", (0.5, True)),
        # The text after the last <answer> counts, and a box in it is opened.
        ("<answer>71</answer><answer>72</answer>", (0.5, True)),
        ("<think>a</think>\n<answer>\\boxed{72}</answer>", (1.5, True)),
        # Text before the thought does not spoil the format.
        ("Sure! <think>a</think>\n<answer>72</answer>", (1.5, True)),
        ("", (-1.5, False)),
        ("no idea", (-1.5, False)),
    ],
)
def test_reward_of_the_released_code(completion, expected):
    assert released_reward(completion, "72") == expected


def test_score_by_the_released_reward(tokenizer):
    text = "<think> so it is.</think><answer> 7</answer>"
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    problems = [Problem("q", "7")]
    strict = score(written([ids, ids], group=2), tokenizer, problems)
    released = score(written([ids, ids], group=2), tokenizer, problems, "released")
    assert strict.rewards.tolist() == [1.5, 1.5] and released.rewards.tolist() == [0.5, 0.5]
    assert released.correct.all() and released.references == ("7", "7")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1 + 1 = 2.</think><answer>2</answer>", "2"),
        ("<answer>3</answer> no, <answer> 4 </answer>", "4"),
        ("So <answer>12", "12"),  # cut at the limit
        ("<answer></answer> it is 9", "9"),
        (r"The area is \boxed{\frac{1}{2}}, not 7.", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed {5}", "5"),
        ("He pays $1,234.50 in all.", "1,234.50"),
        ("It is -7 degrees", "-7"),
        ("a share of 3/4.", "3/4"),
        ("5 apples and 6 pears make 11 fruits.", "11"),
        ("no number here", None),
        ("", None),
    ],
)
def test_a_lenient_reading_takes_the_last_answer_in_whatever_format(text, answer):
    assert lenient_answer(text) == answer


def test_lenient_and_strict_tell_skill_and_format_apart():
    assert lenient_correct("The answer is 72.", "72") and not reward("The answer is 72.", "72")[1]
    assert not lenient_correct("The answer is 71.", "72")
    assert not lenient_correct("nothing", "72")
    right = "<think>x</think><answer>72</answer>"
    assert lenient_correct(right, "72") and reward(right, "72")[1]
