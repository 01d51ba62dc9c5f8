"""The checks of exercises, and the common form of all notebooks of the course."""

import json
import re
from pathlib import Path

import pytest
import torch

from iapo_mini.tools.course import check, committed_result

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = ROOT / "notebooks" / "solutions"


def twice(x):
    return 2 * x


def unwritten(x):
    raise NotImplementedError


def returns_nothing(x):
    return None


def breaks(x):
    return 1 / 0


def talks(x):
    return "four"


@pytest.mark.parametrize(
    "attempt, expected, says",
    [
        (twice, 4, "twice: right"),
        (twice, 4.0000001, "twice: right"),
        (twice, 5, "twice: not yet, off by up to 1"),
        (twice, [4, 4], r"twice: not yet, shape () instead of (2,)"),
        (unwritten, 4, "unwritten: not yet, it is still to be written"),
        (returns_nothing, 4, "returns_nothing: not yet, it is still to be written"),
        (breaks, 4, "breaks: not yet, it raised ZeroDivisionError: division by zero"),
        (talks, 4, "talks: not yet, it returned str instead of numbers"),
    ],
)
def test_check_says_what_is_wrong_and_never_raises(attempt, expected, says, capsys):
    check(attempt, ((2,), expected))
    assert capsys.readouterr().out.strip() == says


def test_check_takes_tensors_and_every_case_counts(capsys):
    check(twice, ((torch.ones(2),), torch.tensor([2.0, 2.0])), ((3,), 7))
    assert capsys.readouterr().out.strip() == "twice: not yet, off by up to 1"


def test_committed_result_is_the_file_or_names_what_is_missing():
    here = json.loads((ROOT / "figures/results/estimator.json").read_text(encoding="utf-8"))
    assert committed_result("estimator.json") == here
    with pytest.raises(ValueError, match=r"name must be .*, got 'nothing\.json'"):
        committed_result("nothing.json")


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


def printed(path):
    return "".join(
        "".join(output.get("text", ""))
        for cell in cells(path)
        for output in cell.get("outputs", [])
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_badge_aims_time_and_installation(path):
    first = text(cells(path)[0])
    assert re.match(rf"# {path.name[:2]} · ", first)
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
