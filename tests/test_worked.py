"""Worked solutions: their text without the calculator's notes, and the kinds of their tokens."""

import json

import pytest
from helpers import real_problems

from iapo_mini.problems.worked import (
    KINDS,
    character_kinds,
    read_solution,
    token_kinds,
    worked_solutions,
)

LETTER = dict(zip("rnowp", KINDS))
"""r: result, n: operand, o: operator, w: word, p: punctuation."""


def letters(kinds):
    return "".join(k for kind in kinds for k, name in LETTER.items() if name == kind)


def test_notes_are_left_out_and_mark_the_results():
    text, kinds = read_solution(
        "He ate 3*2=<<3*2=6>>6 eggs.\nAll 6 + 4 is <<6+4=10>>10 now\n#### 10"
    )
    assert text == "He ate 3*2=6 eggs.\nAll 6 + 4 is 10 now"
    assert letters(kinds) == "wwpwwwpnonorpwwwwppwwwpnpopnpwwprrpwww"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9 * 2 = $18", "npopnpopprr"),
        ("= 1,250 left", "oprrrrrpwwww"),
        ("cost 1,250, not", "wwwwpnnnnnppwww"),
        ("2.50=2.5", "nnnnorrr"),
        ("50%=.5", "nnoorr"),
        ("a well-known 4-year", "wpwwwwpwwwwwpnpwwww"),
        ("3 x 4 boxes", "npopnpwwwww"),
        ("3x4=12", "nonorr"),
        ("2 x $3", "npoppn"),
        ("6 \u00f7 2", "npopn"),
        ("x = 7", "wpopr"),
        ("10/2 = 5.", "nnonpoprp"),
        ("so 7 - 3=4!", "wwpnpopnorp"),
        ("=-3", "oor"),
        ("", ""),
        ("...", "ppp"),
    ],
)
def test_the_kind_of_each_character(text, expected):
    assert letters(character_kinds(text)) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["3", "*", "2", "=", "1", "2", " eggs", ".", "\n"], "nonorrwpp"),
        (["3*", "2", "=12", " eggs.\n"], "nnow"),
        ([" ", " so", " 4", "."], "pwnp"),
        (["4", " more than the text"], "nw"),
    ],
)
def test_a_token_has_the_kind_of_its_first_character(tokens, expected):
    text = "".join(tokens)
    assert letters(token_kinds(tokens, character_kinds(text))) == expected


def test_tokens_beyond_the_text_are_punctuation():
    assert token_kinds(["ab", "<end>"], character_kinds("ab")) == ["word", "punctuation"]


def test_solutions_stand_beside_their_problems(tmp_path):
    answers = ["0+1=<<0+1=1>>1\n#### 1", "1+1=<<1+1=2>>2\n#### 2", "2+1=<<2+1=3>>3\n#### 3"]
    rows = [{"question": f"What is {n}?", "answer": answer} for n, answer in enumerate(answers)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = worked_solutions(str(path))
    assert [s.problem.answer for s in found] == ["1", "2", "3"]
    assert [s.text for s in found] == ["0+1=1", "1+1=2", "2+1=3"]
    assert all(letters(s.kinds) == "nonor" for s in found)


def test_a_file_without_answers_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a"}', encoding="utf-8")
    with pytest.raises(ValueError, match="answer"):
        worked_solutions(str(path))


def test_gsm8ks_own_solutions():
    found = worked_solutions(str(real_problems("gsm8k_test.jsonl")))
    assert len(found) > 1000
    assert not any("<<" in s.text or "####" in s.text for s in found)
    assert sum("result" in s.kinds for s in found) / len(found) > 0.98
    assert all(len(s.text) == len(s.kinds) and set(s.kinds) <= set(KINDS) for s in found)
