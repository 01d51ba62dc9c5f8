"""Equality of answers: numbers, words, LaTeX, the traps, the time limit, real references."""

import json
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
from helpers import real_problems
from hypothesis import given
from hypothesis import strategies as st

from iapo_mini.problems import verify
from iapo_mini.problems.verify import as_number, equal_answers

SLOW = "(k+1)^{9999}"
"""sympy is busy with this for more than a minute."""


@pytest.fixture(scope="module")
def math500():
    path = real_problems("math500_test.json")
    return [row["answer"] for row in json.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("10,\\!080", 10080),
        ("11,\\! 111,\\! 111,\\! 100", 11111111100),
        ("\\$32,\\!348", 32348),
        ("$\\$18.90$", Fraction(189, 10)),
        ("-\\$5", -5),
        ("\N{MINUS SIGN}3", -3),
        ("+7", 7),
        (".0000672", Fraction(672, 10_000_000)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("\\frac43", Fraction(4, 3)),
        ("\\dfrac{17}{50}", Fraction(17, 50)),
        ("\\frac 59", Fraction(5, 9)),
        ("-\\frac{35}{9}", Fraction(-35, 9)),
        ("\\frac{-35}{9}", Fraction(-35, 9)),
        ("\\frac{270}7\\text{ degrees}", Fraction(270, 7)),
        ("1\\frac{4}{5}", Fraction(9, 5)),
        ("-1\\frac{4}{5}", Fraction(-9, 5)),
        ("137 \\frac{1}{2}", Fraction(275, 2)),
        ("90^\\circ", 90),
        ("90^{\\circ}", 90),
        ("864 \\mbox{ inches}^2", 864),
        ("x=5", 5),
        ("\\boxed{72}.", 72),
        ("\\(72\\)", 72),
        ("1{,}000", 1000),
        ("1 1/2", Fraction(3, 2)),
        ("-2 3/4", Fraction(-11, 4)),
        ("1e3", 1000),
        ("-1.5e-3", Fraction(-3, 2000)),
        ("1.5\\times 10^{3}", 1500),
        ("3 \\cdot 10^{-19}", Fraction(3, 10**19)),
        ("6.02x10^23", 602 * 10**21),
        ("**73**", 73),
        ("__73__", 73),
        ("`73`", 73),
        ("\\text{13}", 13),
        ("\\mathbf{13}", 13),
        ("(5)", 5),
        ("(-5)", -5),
        ("\N{EURO SIGN}5", 5),
        ("5 \N{EURO SIGN}", 5),
        ("\N{POUND SIGN}3.50", Fraction(7, 2)),
        ("72\\text{ apples}", 72),
        ("72\\text{ square feet}", 72),
        ("72\\mathrm{cm}", 72),
        # Several numbers, unfinished arithmetic, and words for scales.
        ("71 72", None),
        ("1, 234", None),
        ("3,5", None),
        ("1,23", None),
        ("2+3", None),
        ("5!", None),
        ("2^3", None),
        ("3 \\times 4", None),
        ("50%", None),
        ("50\\%", None),
        ("50\\text{ percent}", None),
        ("3\\text{ million}", None),
        ("5\\text{ or }6", None),
        ("72\\text{ or seventy-one}", None),
        ("72\\text{ or any other number}", None),
        ("72\\text{ but maybe less}", None),
        ("72\\mathrm{orelse}", None),
        ("72\\text{ OR 71}", None),
        ("72\\text{ Otherwise no}", None),
        ("72\\text{ perhaps}", None),
        ("72\\text{ at least}", None),
        ("72\\text{ plus one}", None),
        ("72\\text{ over two}", None),
        ("72\\text{ squared}", None),
        ("72\\text{ tenths}", None),
        ("72\\text{ and a half}", None),
        ("72\\text{ months}", 72),
        ("72\\text{ miles per hour}", 72),
        ("72\\text{ Oranges}", 72),
        ("3\\text{ dozen}", None),
        ("(5, 6)", None),
        ("1e9999", None),
        ("72 apples", None),
        ("52_8", None),
        ("1/0", None),
        ("\\frac{1}{0}", None),
        ("\\boxed{1},\\boxed{2}", None),
        ("\N{ARABIC-INDIC DIGIT SEVEN}", None),
        ("", None),
        ("$", None),
    ],
)
def test_numbers_in_usual_notations(text, value):
    assert as_number(text) == value


@given(st.integers(), st.integers(min_value=1, max_value=10**9))
def test_a_fraction_is_read_in_every_notation(over, under):
    value = Fraction(over, under)
    for text in (
        f"{over}/{under}",
        f"\\frac{{{over}}}{{{under}}}",
        f"$\\dfrac{{{over}}}{{{under}}}$",
    ):
        assert as_number(text) == value
    assert equal_answers(f"{over}/{under}", str(value))
    assert not equal_answers(f"{over + 1}/{under}", str(value))


@given(st.text(max_size=500) | st.text("0123456789.,$\\{}frac/-%^ x=", max_size=40))
def test_any_text_can_be_compared_with_a_number(text):
    assert equal_answers(text, "72") is (as_number(text.strip()) == 72)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Evelyn", "\\text{Evelyn}", True),
        ("\\textbf{Evelyn}", "Evelyn", True),
        ("Navin", "\\text{Evelyn}", False),
        ("nylevE", "Evelyn", False),  # as a product of letters they would be the same
        ("even.", "\\text{even}", True),
        ("7", "\\text{even}", False),
        ("C", "\\text{(C)}", True),
        ("(C)", "C", True),
        ("C.", "C", True),
        ("\\text{(C)}", "C", True),
        ("c", "C", False),
        ("D", "C", False),
        ("C or D", "C", False),
        ("bank", "A", False),
        ("Even", "\\text{even}", True),
        ("yes", "Yes", True),
        ("NO", "no", True),
        ("on", "no", False),  # as a product of letters they would be the same
        ("B. bank", "B", True),
        ("B) bank", "B", True),
        ("(B) the bank", "B", True),
        ("B", "B. bank", True),
        ("A. bank", "B", False),
        ("C", "c", False),
        ("k" * 401, "k" * 401, True),  # the reference itself, however long
    ],
)
def test_words_and_letters_are_compared_as_text(answer, reference, equal, monkeypatch):
    monkeypatch.setattr(verify, "_ask", None)  # math-verify is not asked
    assert equal_answers(answer, reference) is equal


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        # The same value in another form.
        ("13^{1/2} \\cdot 3", "3\\sqrt{13}", True),
        ("3*sqrt(13)", "3\\sqrt{13}", True),
        ("-5i + 6", "6 - 5i", True),
        ("k*2", "2k", True),
        ("-x**4 + x**5", "x^5 - x^4", True),
        ("2x + y = 0", "y = -2x", True),
        ("(36, 9) \\cup (0, 9)", "(0,9) \\cup (9,36)", False),
        ("(9,36)\\cup(0,9)", "(0,9) \\cup (9,36)", True),
        ("7, 5, 3", "3, 5, 7", True),
        ("\\{-2, 1+\\sqrt5, 1-\\sqrt5\\}", "\\{1\\pm\\sqrt{5},-2\\}", True),
        ("3 + 2\\sqrt2, 3 - 2\\sqrt2", "3 \\pm 2 \\sqrt{2}", True),
        ("[-2,7]", "x \\in [-2,7]", True),
        ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("1024", "2^{10}", True),
        ("4210_5", "4210_{5}", True),
        ("50.0\\%", "50\\%", True),
        ("x>2", "(2,\\infty)", True),
        ("x \\geq 3", "[3,\\infty)", True),
        ("-2\\le x\\le 7", "x\\in[-2,7]", True),
        ("\\frac{1+3i}{2}", "\\frac12+\\frac32 i", True),
        ("\\frac{2a+b}{4}", "\\frac{a}{2}+\\frac{b}{4}", True),
        ("pi/2", "\\frac{\\pi}{2}", True),
        ("12*pi", "12\\pi", True),
        ("2pi/3", "\\frac{2\\pi}{3}", True),
        ("\\sin 45^\\circ", "\\frac{\\sqrt{2}}{2}", True),
        ("\\cos 60^{\\circ} + k", "k + \\frac{1}{2}", True),
        # Another value.
        ("x>3", "(2,\\infty)", False),
        ("x\\ge 2", "(2,\\infty)", False),
        ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}", False),
        ("\\frac{\\sqrt{2}}{10^{20}}", "\\frac{\\sqrt{3}}{10^{20}}", False),
        ("(\\frac{1}{2^{98}}, 1)", "(\\frac{1}{2^{99}}, 1)", False),
        ("\\sin 45^\\circ", "\\sin 46^\\circ", False),
        ("k", "k\\text{ or }m", False),
        ("3\\sqrt{14}", "3\\sqrt{13}", False),
        ("q - p", "p - q", False),
        ("3, 5", "3, 5, 7", False),
        ("[3,4)", "(3,4]", False),
        ("(4,3]", "(3,4]", False),
        ("(6,-1)", "(-1,6)", False),
        ("5", "2k", False),
        # Traps: math-verify alone calls these equal.
        ("52_9", "52_8", False),
        ("52", "52_8", False),
        ("50", "50\\%", False),
        ("0.5", "50\\%", False),
        # Nothing sensible.
        ("\\frac{1}{", "2k", False),
        ("]]]((", "2k", False),
        ("\\begin{pmatrix} 1 \\\\", "2k", False),
    ],
)
def test_latex_is_compared_by_value(answer, reference, equal):
    """Also with the two swapped, unless the reference is a number, which allows no arithmetic."""
    assert equal_answers(answer, reference) is equal
    if as_number(answer) is None:
        assert equal_answers(reference, answer) is equal


@pytest.mark.parametrize(
    "answer", ["9**9**9", "9^{9^9}k", "9^9^9", "(9^9)^9k", "2^{100000}k", "k" * 401, "(" * 5000]
)
def test_towers_and_long_answers_are_not_even_tried(answer, monkeypatch):
    monkeypatch.setattr(verify, "_ask", None)
    assert equal_answers(answer, "2k") is False


def test_plain_powers_are_not_towers():
    assert equal_answers("x^5+x^{10}-(x-1)^2", "x^{10}+x^5-(x-1)^2")


WITHOUT_FORK = """
import os, runpy, sys
if hasattr(os, "fork"):
    del os.fork
runpy.run_path({file!r}, run_name="__main__")
"""


@pytest.fixture(params=[True, False], ids=["fork", "no fork"])
def forks(request, tmp_path, monkeypatch):
    """Run math-verify's process as on POSIX, and as on Windows."""
    if request.param and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    verify._stop()
    if not request.param:
        script = tmp_path / "without_fork.py"
        script.write_text(WITHOUT_FORK.format(file=verify.__file__), encoding="utf-8")
        monkeypatch.setattr(verify, "__file__", str(script))
    yield request.param
    verify._stop()


def test_a_comparison_that_takes_too_long_is_wrong_and_the_next_one_works(forks):
    assert equal_answers("k*2", "2k")
    before, began = verify._process.pid, time.perf_counter()
    assert equal_answers(SLOW, "2k") is False
    assert verify.TIME_LIMIT <= time.perf_counter() - began < verify.WALL_LIMIT + 30
    assert equal_answers("k*2", "2k")
    assert (verify._process.pid == before) is forks  # without, it ended itself and is another


def test_threads_get_their_own_answers_under_the_same_limit():
    told = {}

    def ask(n):
        answer = SLOW if n == 3 else f"{n}k"
        told[n] = equal_answers(answer, f"k*{n}" if n % 2 else "k*100")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {n: n % 2 == 1 and n != 3 for n in range(8)}


def test_an_interrupt_leaves_no_answer_for_the_next_question(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    assert equal_answers("k*2", "2k")
    real = verify._process
    stand_in = SimpleNamespace(
        stdin=real.stdin, stdout=SimpleNamespace(readline=interrupted, close=real.stdout.close),
        poll=real.poll, kill=real.kill, wait=real.wait,
    )  # fmt: skip
    monkeypatch.setattr(verify, "_process", stand_in)
    with pytest.raises(KeyboardInterrupt):
        equal_answers("k*2", "2k")
    assert equal_answers("k*3", "2k") is False
    assert real.poll() is not None


def test_a_process_that_died_is_started_again():
    assert equal_answers("k*2", "2k")
    verify._process.kill()
    verify._process.wait()
    assert equal_answers("k*2", "2k")


def test_without_math_verify_numbers_work_and_latex_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verify._stop()
    assert equal_answers("72.0", "72")
    with pytest.raises(RuntimeError, match="math-verify can't be started; pip install"):
        equal_answers("k*2", "2k")


def test_nothing_heavy_is_imported_and_no_process_started_before_it_is_needed():
    code = (
        "import sys, iapo_mini.problems.verify as v; from iapo_mini.rewards import reward;"
        "reward('<think>a</think><answer>3/4</answer>', '72');"
        "assert v._process is None;"
        "assert not {'math_verify', 'latex2sympy2_extended', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal 0 to ask for a process with")
def test_the_process_ends_with_its_parent():
    code = "import iapo_mini.problems.verify as v; assert v.equal_answers('k*2', '2k'); "
    code += "print(v._process.pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    with pytest.raises(OSError):
        os.kill(int(done.stdout), 0)


def test_every_math500_reference_equals_itself(math500):
    """Tested by the whole function, and by math-verify itself if equal texts end it early."""
    assert len(math500) == 500
    for answer in math500:
        assert equal_answers(f" ${answer}$ ", answer), answer
        assert equal_answers(f"\\boxed{{{answer}}}.", answer), answer
        text = verify._tidy(answer)
        if as_number(text) is None and verify._as_words(text) is None:
            assert verify._ask(text, text), answer


def test_near_misses_of_math500_references_are_wrong(math500):
    """Number + 1, another numerator, a reversed interval or point, an expression + 1."""
    seen = dict.fromkeys(("number", "fraction", "pair", "word", "other"), 0)
    for answer in math500:
        value = as_number(answer)
        text = verify._tidy(answer)
        if value is not None:
            kind = "number" if value.denominator == 1 else "fraction"
            misses = [str(value + 1), f"\\frac{{{value.numerator + 1}}}{{{value.denominator}}}"]
        elif verify._as_words(text):
            kind, misses = "word", ["Nobody", "(A)"]
        elif text[0] in "([" and text[-1] in ")]" and text.count(",") == 1:
            kind = "pair"
            left, right = text[1:-1].split(",")
            misses = [f"{text[0]}{right}, {left}{text[-1]}"]
            if "\\infty" in right:
                misses.append(f"[{left}, {right}{text[-1]}")
            else:
                misses.append(f"{text[0]}{left}, {right}{')' if text[-1] == ']' else ']'}")
        else:
            kind, misses = "other", [f"{text} + 1", f"2 \\cdot ({text})", "0"]
        seen[kind] += 1
        for miss in misses:
            assert not equal_answers(miss, answer), (answer, miss)
    assert seen["number"] > 300 and min(seen.values()) >= 8, seen


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="sessions are POSIX's")
def test_a_terminals_ctrl_c_does_not_reach_the_judge():
    """Ctrl-C is sent to a group of processes; an interrupted comparison would count as wrong."""
    assert equal_answers("k*2", "2k")
    assert os.getsid(verify._process.pid) != os.getsid(0)
    assert os.getpgid(verify._process.pid) != os.getpgid(0)
