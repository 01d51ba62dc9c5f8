"""The checks of exercises, and the common form of all notebooks of the course."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from iapo_mini.tools.course import check, committed_result, passes

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = ROOT / "notebooks" / "solutions"


def twice(x):
    return 2 * x


def unwritten(x):
    raise NotImplementedError


def breaks(x):
    return 1 / 0


def leaves(x):
    raise SystemExit(3)


def fails_deep(x):
    return torch.zeros(2, 3) @ torch.zeros(2)


def counts(x):
    yield x


def giving(value):
    """A function that gives a value whatever it is asked."""

    def gives(*given):
        return value

    return gives


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "attempt, expected, fault",
    [
        (twice, 4, None),
        (twice, 4.0000001, None),
        (giving(torch.tensor(4.0, requires_grad=True)), 4.0, None),
        (giving(np.float32(4)), 4.0, None),
        (giving([torch.tensor(1.0), 2]), [1.0, 2.0], None),
        (giving(NAN), NAN, None),
        (twice, 5, "gave 4, wanted 5"),
        (giving(0.5), 0.25, "gave 0.5, wanted 0.25"),
        (giving(0.1234561), 0.12344, "gave 0.1235, wanted 0.1234"),
        (giving(1.00005), 1.0, "gave 1.00005, wanted 1"),
        (giving(NAN), 0.5, "gave nan, wanted 0.5"),
        (giving(0.5), NAN, "gave 0.5, wanted nan"),
        (giving(-INF), 0.5, "gave -inf, wanted 0.5"),
        (giving([1.0, NAN, 3.0]), [1.0, 2.0, 3.0],
         "gave nan, wanted 2 at place 1 (1 of 3 are wrong)"),
        (giving(torch.ones(2, 2)), [[1.0, 1.0], [0.0, 2.0]],
         "gave 1, wanted 0 at place (1, 0) (2 of 4 are wrong)"),
        (twice, [4, 4], "gave a single number, wanted shape (2,)"),
        (giving([[4.0]]), 4.0, "gave shape (1, 1), wanted a single number"),
        (giving([]), [4.0], "gave shape (0,), wanted shape (1,)"),
        (giving(True), 1.0, "gave True, wanted a number"),
        (giving(1.0), True, "gave 1.0, wanted True or False"),
        (giving(0), False, "gave 0, wanted True or False"),
        (giving([1, 0]), [True, False],
         "gave torch.int64 values, wanted a bool for each entry"),
        (giving(48.0), 48, "gave 48.0, wanted a whole number (int)"),
        (giving(torch.ones(2)), [1, 1],
         "gave torch.float32 values, wanted whole numbers (an integer dtype)"),
        (giving(1j), 1.0, "gave complex, wanted a number"),
        (giving("four"), 4, "gave 'four', wanted a whole number (int)"),
        (giving({"a": 1}), 4.0, "gave {'a': 1}, wanted a number"),
        (giving([1.0, "b"]), [1.0, 2.0], "gave [1.0, 'b'], wanted numbers"),
        (giving([[1.0], [1.0, 2.0]]), [1.0], "gave [[1.0], [1.0, 2.0]], wanted numbers"),
        (giving(10**30), 4, "gave 1000000000000000000000000000000, wanted a whole number (int)"),
        (counts, [2.0], "gave generator, wanted numbers"),
        (giving(None), 4, "gave None; is a return missing?"),
        (breaks, 4, "raised ZeroDivisionError: division by zero, in the line: return 1 / 0"),
        (leaves, 4, "raised SystemExit: 3, in the line: raise SystemExit(3)"),
        (fails_deep, 4, "raised RuntimeError: "),
        (lambda: 4, 4, "raised TypeError: "),
    ],
)  # fmt: skip
def test_check_says_what_was_got_and_wanted_and_never_raises(attempt, expected, fault, capsys):
    check(attempt, ((2,), expected))
    said = " ".join(capsys.readouterr().out.split())
    name = attempt.__name__
    assert passes(attempt, ((2,), expected)) == (fault is None)
    if fault is None:
        assert said == f"{name}: right"
    elif fault.endswith(": "):
        assert said.startswith(f"{name}: not yet, case 1 of 1: {name}(2) {fault}")
    else:
        assert said == f"{name}: not yet, case 1 of 1: {name}(2) {fault}"


def test_check_takes_tensors_and_every_case_counts(capsys):
    check(twice, ((torch.ones(2),), torch.tensor([2.0, 2.0])), ((3,), 7))
    assert capsys.readouterr().out == "twice: not yet, case 2 of 2: twice(3) gave 6, wanted 7\n"


def test_an_exercise_that_is_not_begun_is_still_to_be_written(capsys):
    check(unwritten, ((2,), 4))
    assert capsys.readouterr().out == "unwritten: not yet, it is still to be written\n"
    assert not passes(unwritten, ((2,), 4))


def test_a_call_without_a_function_or_without_cases_is_told(capsys):
    check(4, ((2,), 4))
    assert "its first argument must be a function, got 4" in capsys.readouterr().out
    check(twice)
    assert "not yet, there is no case to try it on" in capsys.readouterr().out


def absent(x):
    raise NotImplementedError("Could not run 'aten::x'")


def test_an_operation_that_pytorch_lacks_is_no_unwritten_exercise(capsys):
    check(absent, ((2,), 4))
    assert "raised NotImplementedError: Could not run 'aten::x'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument", [torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]), [1.0, 2.0]]
)  # fmt: skip
def test_a_function_that_changes_its_argument_is_refused_and_the_next_one_is_not(argument, capsys):
    def first(values):
        values[0] = 5.0
        return 5.0

    check(first, ((argument,), 5.0))
    said = " ".join(capsys.readouterr().out.split())
    assert "changed its argument [1.0, 2.0]; return a new value instead" in said
    assert float(argument[0]) == 1.0


def test_long_arguments_are_told_by_their_size(capsys):
    check(giving(1.0), ((torch.ones(30, 4), [1.5] * 80), 2.0))
    assert "gives(Tensor of shape (30, 4), list of 80) gave" in " ".join(
        capsys.readouterr().out.split()
    )


QUIZ = (ROOT / "docs" / "quiz.md").read_text(encoding="utf-8")


def test_the_quiz_explains_every_option_and_any_letter_may_be_right():
    questions = re.split(r"^## \d+\. ", QUIZ, flags=re.MULTILINE)[1:]
    right = []
    for question in questions:
        asked, answer = question.split("<details>")
        assert re.findall(r"^- \*\*([A-D])\.\*\* \S", asked, re.MULTILINE) == list("ABCD")
        told = re.findall(r"^- \*\*([A-D]) is (right|wrong)\.\*\* \S.{10,}", answer, re.MULTILINE)
        assert [letter for letter, _ in told] == list("ABCD")
        right += [letter for letter, verdict in told if verdict == "right"]
    assert len(questions) == len(right) == 20
    assert {right.count(letter) for letter in "ABCD"} == {5}


def test_the_lecturer_finds_the_quiz_and_the_page_of_troubles():
    for page in ("docs/syllabus.md", "site/course.md", "site/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "quiz" in text and "in_class" in text, page


def test_committed_result_is_the_file_or_names_what_is_missing():
    here = json.loads((ROOT / "figures/results/estimator.json").read_text(encoding="utf-8"))
    assert committed_result("estimator.json") == here
    with pytest.raises(ValueError, match=r"name must be .*, got 'nothing\.json'"):
        committed_result("nothing.json")


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


def number_of(path):
    """What a notebook is called: ``03``, ``00b``."""
    return path.name.partition("_")[0]


def printed(path):
    return "".join(
        "".join(output.get("text", ""))
        for cell in cells(path)
        for output in cell.get("outputs", [])
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_badge_aims_time_and_installation(path):
    first = text(cells(path)[0])
    assert first.startswith(f"# {number_of(path)} · ")
    assert f"colab.research.google.com/github/iapo-mini/iapo-mini/blob/main/notebooks/{path.name}" \
        in first  # fmt: skip
    assert all(f"\n{n}. " in first for n in (1, 2, 3)) and "\n4. " not in first
    assert "**Time and hardware:**" in first
    install = next(text(c) for c in cells(path) if c["cell_type"] == "code")
    assert "find_spec" in install and "%pip install" in install and "torch" not in install


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_lesson_keeps_the_form_of_the_course(path):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    prose = [text(c) for c in cells(path) if c["cell_type"] == "markdown"]
    assert max(len(text(c).splitlines()) for c in code) <= 25
    assert any("$$" in p for p in prose)
    assert sum("image/png" in o.get("data", {}) for c in code for o in c["outputs"]) >= 2
    exercises = [p for p in prose if re.match(r"### Exercise \d", p)]
    assert 3 <= len(exercises) <= 5
    assert all("<details><summary>Hint</summary>" in p for p in exercises)
    assert printed(path).count(": not yet, it is still to be written") == len(exercises)
    widgets = [c for c in code if "application/vnd.jupyter.widget-view+json" in str(c["outputs"])]
    assert all("nbval-ignore-output" in c["metadata"].get("tags", []) for c in widgets)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_has_a_solution_that_passes(path):
    solution = SOLUTIONS / path.name
    asked = re.findall(r"^(\w+): not yet", printed(path), re.MULTILINE)
    assert sorted(re.findall(r"^(\w+): right", printed(solution), re.MULTILINE)) == sorted(asked)
    assert "not yet" not in printed(solution)


@pytest.mark.parametrize("number", ["00b", "01", "03", "04", "04b", "05", "06", "08"])
def test_a_lesson_trains_or_measures_with_the_readers_function_and_draws(number):
    (path,) = (p for p in NOTEBOOKS if number_of(p) == number)
    for notebook in (path, SOLUTIONS / path.name):
        waiting = [text(c) for c in cells(notebook) if "\nif passes(" in text(c)]
        assert waiting and all("plt.show()" in t and len(t.splitlines()) <= 24 for t in waiting)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_names_the_paper_and_links_it(path):
    prose = "".join(text(c) for c in cells(path) if c["cell_type"] == "markdown")
    assert "IAPO" in prose and "](https://arxiv.org/abs/2602.19049)" in prose


def minutes_in_table(page, path):
    """The minutes in the row of a notebook, in the README or the syllabus."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith("|") and f"{path.name})" in line)
    return int(re.findall(r"\| (\d+) \|", row)[-1])  # the first number is that of the sitting


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_time_of_a_sitting_is_the_same_wherever_it_is_told(path):
    told = re.findall(
        r"\*\*Time and hardware:\*\* (\d+) minutes to read and try", text(cells(path)[0])
    )
    assert [int(t) for t in told] == [minutes_in_table("docs/syllabus.md", path)]
    assert minutes_in_table("README.md", path) == int(told[0])


def test_tables_name_every_notebook_with_its_badge():
    for path in NOTEBOOKS:
        for page in ("README.md", "docs/syllabus.md"):
            assert f"notebooks/{path.name})" in (ROOT / page).read_text(encoding="utf-8"), (
                path.name,
                page,
            )
    badges = re.findall(
        r"blob/main/notebooks/(\S+?\.ipynb)", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert {p.name for p in NOTEBOOKS} <= set(badges)
