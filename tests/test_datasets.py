"""Loaders: rows to problems, files and the hub, splits, the training stream."""

import itertools
import json
from decimal import Decimal

import pytest
from helpers import real_problems
from hypothesis import given
from hypothesis import strategies as st

from iapo_mini.problems.datasets import (
    DAPO_PREFIX,
    DAPO_SUFFIX,
    DATA,
    SOURCES,
    check_data,
    cut,
    fingerprint,
    load_problems,
    training_problems,
)
from iapo_mini.problems.stories import stories
from iapo_mini.problems.verify import as_number, equal_answers
from iapo_mini.tasks import Problem, messages


def gsm8k(n, answer="she has 2 + 3 = <<2+3=5>>5\n#### {}"):
    return [{"question": f"Question {i}?", "answer": answer.format(i)} for i in range(n)]


ROWS = {
    "gsm8k": {"question": " What? ", "answer": "It is 1,200 + 34.\n#### 1,234"},
    "math500": {"problem": "Find $x$.", "answer": "\\frac{1}{2}", "level": 2},
    "dapo_math": {"prompt": "What is 2+2?", "solution": "4"},
    "commonsense_qa": {
        "question": "Where is money?",
        "choices": {"label": ["A", "B"], "text": ["bank", "tree"]},
        "answerKey": "A",
    },
}
EXPECTED = {
    "gsm8k": ("What?", "1234"),
    "math500": ("Find $x$.", "\\frac{1}{2}"),
    "dapo_math": ("What is 2+2?", "4"),
    "commonsense_qa": (
        "Where is money?\nA. bank\nB. tree\nAnswer with the letter of one choice.",
        "A",
    ),
}


def write(path, rows):
    """Write a file of rows in the format of its ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("data", list(SOURCES))
def test_a_row_becomes_a_problem_from_every_kind_of_file(data, ending, tmp_path):
    (problem,) = load_problems(data, "all", write(tmp_path / f"a{ending}", [ROWS[data]]))
    assert (problem.question, problem.answer) == EXPECTED[data]
    assert problem.steps == ()


@pytest.mark.parametrize("data", list(SOURCES))
def test_the_integer_sentence_is_only_in_the_prompts_that_the_paper_names(data, tmp_path):
    (problem,) = load_problems(data, "all", write(tmp_path / "a.jsonl", [ROWS[data]]))
    system, user = messages(problem)
    integer = "The answer must be a single integer." in system["content"]
    assert integer is (data in ("gsm8k", "dapo_math"))
    assert system["content"].endswith("</think>\n<answer>4</answer>")
    assert user == {"role": "user", "content": EXPECTED[data][0]}
    assert messages(next(stories("train")))[0]["content"].count("single integer") == 1


def test_dapo_is_stripped_of_its_instructions_in_both_forms(tmp_path):
    wrapped = f"{DAPO_PREFIX}What is 2+2?{DAPO_SUFFIX}"
    rows = [
        {"prompt": [{"role": "user", "content": wrapped}], "reward_model": {"ground_truth": "4"}},
        {"prompt": wrapped.replace("2+2", "2+3"), "solution": "5"},
        {"prompt": "What is 2+4?", "solution": "6"},
    ]
    problems = load_problems("dapo_math", "all", write(tmp_path / "a.jsonl", rows))
    assert [p.question for p in problems] == [f"What is 2+{n}?" for n in (2, 3, 4)]
    assert [p.answer for p in problems] == ["4", "5", "6"]


def test_dapo_is_its_first_7000_different_problems(tmp_path):
    rows = [{"prompt": f"What is {n} + 0?", "solution": str(n)} for n in range(7005)]
    rows.insert(1, rows[0])
    problems = load_problems("dapo_math", "all", write(tmp_path / "a.parquet", rows))
    assert len(problems) == 7000
    assert [p.answer for p in problems] == [str(n) for n in range(7000)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("#### 1,234", "1234"),
        ("a #### b\n#### -3", "-3"),
        ("####5.50", "5.50"),
        ("#### $18", "18"),
        ("72.0", "72"),
        (72, "72"),
    ],
)
def test_gsm8k_answers_are_normalised(answer, expected, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": answer}])
    assert load_problems("gsm8k", "all", path)[0].answer == expected


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in gsm8k(9)]
    lines[1] = '{"question": "cut sho'
    lines[3] = ""  # an empty line is not a row
    lines[4] = '{"question": "What?"}'
    lines[5] = '["What?", "5"]'
    lines[6] = '{"question": "What?", "answer": "#### five"}'
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        load_problems("gsm8k", "all", str(path))
    message = str(raised.value)
    assert "4 of 8 rows can't be used" in message and str(path) in message
    assert "line 2 (not valid JSON)" in message and "line 5 (no text under 'answer')" in message
    assert "line 6 (no text under 'question')" in message
    assert "line 7 (the answer 'five' is not a number)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "row", "reason"),
    [
        ("math500", {"problem": "p", "answer": " "}, "no text under 'answer'"),
        ("dapo_math", {"prompt": DAPO_PREFIX + DAPO_SUFFIX, "solution": "4"}, "no question"),
        ("dapo_math", {"prompt": "p", "solution": "x"}, "'x' is not a number"),
        ("dapo_math", {"prompt": [{"content": "p"}]}, "no text under 'ground_truth'"),
        ("commonsense_qa", {**ROWS["commonsense_qa"], "answerKey": ""}, "under 'answerKey'"),
        ("commonsense_qa", {**ROWS["commonsense_qa"], "answerKey": "E"}, "not one of the choices"),
        ("commonsense_qa", {**ROWS["commonsense_qa"], "choices": ["a"]}, "under 'choices'"),
        ("gsm8k", {"question": True, "answer": "5"}, "no text under 'question'"),
    ],
)
def test_the_fault_of_a_row_is_named(data, row, reason, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 1 rows.*row 1 \(.*" + reason):
        load_problems(data, "all", write(tmp_path / "a.json", [row]))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"question": "q",\n', "not valid JSON.*line 2"),
        ("a.json", b'{"question": "q"}', "has no list"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8 text"),
        ("a.jsonl", b"\n\n", "there are no problems"),
        ("a.json", b"[]", "there are no problems"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data_file .*{name}.*{reason}"):
        load_problems("gsm8k", "all", str(tmp_path / name))


def test_byte_order_marks_and_line_separators_within_strings_are_accepted(tmp_path):
    row = {"question": "One\u2028two?", "answer": "#### 5"}
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_problems("gsm8k", "all", str(path))[0].question == "One\u2028two?"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("trivia", "train"), "data must be one of stories, gsm8k"),
        (("gsm8k", "tune"), "split must be one of train, test for gsm8k from the hub"),
        (("math500", "train"), "split must be one of test for math500 from the hub"),
        (("dapo_math", "dev"), "split must be one of train, tune, test, all, got 'dev'"),
        (("stories", "all"), "split must be one of train, tune, test, got 'all'"),
        (("stories", "train", "a.jsonl"), "data is 'stories'"),
        (("gsm8k", "train", "a.csv"), "data_file must be a file of type .jsonl, .json, .parquet"),
        (("gsm8k", "train", "none.jsonl"), "data_file is 'none.jsonl', which is not a file"),
    ],
)
def test_settings_that_name_no_problems_are_refused(arguments, named):
    with pytest.raises(ValueError) as raised:
        check_data(*arguments)
    assert named in str(raised.value)
    with pytest.raises(ValueError):
        training_problems(arguments[0], 0, (*arguments, "")[2], arguments[1])


def test_the_hub_is_asked_for_the_right_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, config, split):
        asked.append((repository, config, split))
        name = next(name for name, source in SOURCES.items() if source.hub[0] == repository)
        rows = [ROWS[name] | {"prompt": f"{i}?", "question": f"{i}?"} for i in range(20)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for data, split in (("gsm8k", "train"), ("gsm8k", "test"), ("math500", "test")):
        assert len(load_problems(data, split)) == 20
    assert len(load_problems("commonsense_qa", "test")) == 20
    assert len(load_problems("dapo_math", "train")) == 16
    assert len(load_problems("dapo_math", "all")) == 20
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", "default", "test"),
        ("tau/commonsense_qa", "default", "validation"),
        ("open-r1/DAPO-Math-17k-Processed", "all", "train"),
        ("open-r1/DAPO-Math-17k-Processed", "all", "train"),
    ]


def test_without_a_network_one_sentence_names_the_local_file():
    with pytest.raises(ValueError) as raised:
        load_problems("gsm8k", "train")
    message = str(raised.value)
    assert "'openai/gsm8k' can't be loaded from the hub" in message and "--data-file" in message
    assert "\n" not in message


@given(st.lists(st.integers(0, 60), min_size=3, max_size=80), st.randoms())
def test_a_cut_is_disjoint_complete_and_does_not_depend_on_the_order(numbers, rng):
    problems = [Problem(f"{n}?", str(n)) for n in numbers]
    different = len(set(numbers))
    if different < 3:
        with pytest.raises(ValueError, match=f"three different questions .*, got {different};"):
            cut(problems, "train")
        return
    parts = {split: cut(problems, split) for split in ("train", "tune", "test")}
    questions = [{p.question for p in part} for part in parts.values()]
    assert sum(map(len, questions)) == different == len(set.union(*questions))
    assert len(questions[1]) == len(questions[2]) == max(1, different // 10)
    assert sum(map(len, parts.values())) == len(problems)
    assert all(
        [p for p in problems if p in part] == part for part in parts.values()
    )  # order is kept
    shuffled = rng.sample(problems, len(problems))
    assert {p.question for p in cut(shuffled, "test")} == questions[2]


def test_the_training_stream_is_seeded_covers_everything_and_never_touches_the_test(tmp_path):
    path = write(tmp_path / "a.jsonl", gsm8k(30))
    passes = 3

    def draw(seed, split="train", n=24 * passes):
        return list(itertools.islice(training_problems("gsm8k", seed, path, split), n))

    first = draw(0)
    assert first == draw(0) and first != draw(1)
    orders = [[p.question for p in first[i : i + 24]] for i in range(0, 24 * passes, 24)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(orders[0])) == 24 and len(set(map(tuple, orders))) == passes
    test = {p.question for p in load_problems("gsm8k", "test", path)}
    assert len(test) == 3 and not test & set(orders[0])
    assert {p.question for p in draw(0, "all", 30)} == {row["question"] for row in gsm8k(30)}


def test_the_training_stream_of_stories_is_unchanged():
    drawn = list(itertools.islice(training_problems("stories", 3), 5))
    assert drawn == list(itertools.islice(stories("train", 3), 5))
    assert DATA[0] == "stories"


def test_no_torch_and_no_datasets_are_needed_to_read_a_file(tmp_path):
    import subprocess
    import sys

    path = write(tmp_path / "a.jsonl", gsm8k(3))
    code = (
        "import sys; from iapo_mini.problems.datasets import load_problems;"
        f"assert len(load_problems('gsm8k', 'all', {path!r})) == 3;"
        "assert not {'torch', 'datasets', 'sympy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_gsm8k_test_problem_is_read_and_verifies_against_itself():
    path = real_problems("gsm8k_test.jsonl")
    problems = load_problems("gsm8k", "all", str(path))
    assert len(problems) == 1319
    for problem in problems:
        value = as_number(problem.answer)
        assert value is not None and str(int(value)) == problem.answer
        assert equal_answers(f"{int(value):,}", problem.answer)
        assert equal_answers(f"${value}.00$", problem.answer)
        for miss in (value + 1, -value or 1, f"{value}5", f"{value}/7", f"{value}%"):
            assert not equal_answers(str(miss), problem.answer)


def test_every_math500_problem_is_read():
    path = real_problems("math500_test.json")
    problems = load_problems("math500", "all", str(path))
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert len(problems) == 500
    assert [(p.question, p.answer) for p in problems] == [
        (row["problem"].strip(), row["answer"].strip()) for row in raw
    ]


CHAT = [
    {"role": "system", "content": "You are a mathematician."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "Do you want a proof?"},
    {"role": "user", "content": "What is 2 + {n}?"},
]


def chat(n):
    return [{**turn, "content": turn["content"].format(n=n)} for turn in CHAT]


@pytest.mark.parametrize("kept_as", [list, json.dumps])
def test_the_question_of_a_chat_is_its_last_user_turn(tmp_path, kept_as):
    """If the first turn counted, all problems would be the same system text."""
    rows = [
        {"prompt": kept_as(chat(n)), "reward_model": {"ground_truth": str(2 + n)}} for n in range(5)
    ]
    problems = load_problems("dapo_math", "all", str(write(tmp_path / "d.jsonl", rows)))
    assert [p.question for p in problems] == [f"What is 2 + {n}?" for n in range(5)]


def test_a_chat_without_a_user_turn_is_refused(tmp_path):
    rows = [{"prompt": CHAT[:1], "reward_model": {"ground_truth": "3"}}]
    with pytest.raises(ValueError, match="no user turn"):
        load_problems("dapo_math", "all", str(write(tmp_path / "d.jsonl", rows)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(72, "72"), (72.0, "72"), (-3.0, "-3"), (0.5, "0.5"), (1e3, "1000"), (1e-7, "0.0000001"),
     (Decimal("72.00"), "72"), (Decimal("0.50"), "0.5")],
    ids=str,
)  # fmt: skip
def test_answers_that_are_numbers_are_read_as_people_write_them(tmp_path, value, text):
    rows = [{"question": "How many?", "answer": value}]
    kinds = [tmp_path / "n.parquet"] if isinstance(value, Decimal) else [
        tmp_path / "n.parquet", tmp_path / "n.jsonl"
    ]  # fmt: skip
    for path in kinds:
        (problem,) = load_problems("gsm8k", "all", str(write(path, rows)))
        assert problem.answer == text and as_number(problem.answer) is not None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "true", "null", "[5]"])
def test_answers_that_are_not_numbers_are_refused(tmp_path, value):
    path = tmp_path / "n.jsonl"
    path.write_text('{"question": "How many?", "answer": ' + value + "}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 1 rows can't be used: line 1"):
        load_problems("gsm8k", "all", str(path))


def test_commonsense_qa_is_read_in_its_first_format(tmp_path):
    row = {
        "answerKey": "A", "id": "1",
        "question": {
            "stem": "Where is money?",
            "choices": [{"label": "A", "text": "bank"}, {"label": "B", "text": "tree"}],
        },
    }  # fmt: skip
    (problem,) = load_problems("commonsense_qa", "all", str(write(tmp_path / "c.jsonl", [row])))
    assert (problem.question, problem.answer) == EXPECTED["commonsense_qa"]


@pytest.mark.parametrize("text", [None, "", 7, "half \ud800 a letter"])
def test_a_choice_that_is_not_text_is_refused(tmp_path, text):
    choices = {"label": ["A", "B"], "text": ["bank", text]}
    path = tmp_path / "c.jsonl"
    path.write_text(
        json.dumps({**ROWS["commonsense_qa"], "choices": choices}) + "\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"line 1 \((no|broken) text under 'choices'\)"):
        load_problems("commonsense_qa", "all", str(path))


def test_a_fingerprint_follows_from_the_content_alone(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for path in (one, other):
        write(path, gsm8k(3))
    assert fingerprint(str(one)) == fingerprint(str(other)) != fingerprint("")
    write(other, gsm8k(4))
    assert fingerprint(str(one)) != fingerprint(str(other))
