"""Ten thousand hostile completions through parsing and rewards."""

import pytest
from hostile import BOMBS, completions, judge_all


def test_ten_thousand_completions():
    """None crashes, none takes more than one second, and no wrong one is rewarded."""
    texts = completions(10_000)
    worst = judge_all(texts, "72")
    right = sum("72" in text for text in texts)
    print(f"{right} of {len(texts)} hold the answer; the slowest took {1000 * worst:.1f} ms")
    assert worst < 1.0 and right > 1000


@pytest.mark.parametrize(
    ("reference", "form"),
    [("\\frac{\\sqrt{2}}{2}", "{}"), ("(3, \\frac{\\pi}{2})", "\\frac{{{}}}{{2}}")],
)
def test_latex_that_explodes(reference, form):
    """Tests every bomb, alone and in a fraction, as reference for math-verify."""
    texts = [f"<think>a</think><answer>{form.format(x)}</answer>" for x in BOMBS]
    worst = judge_all(texts, reference)
    print(f"the slowest of {len(texts)} took {worst:.3f} s")
    assert worst < 1.0
