"""Ten thousand hostile completions through parsing and rewards."""

import pytest
from hostile import BOMBS, completions, judge_all


def test_ten_thousand_completions():
    """No crash, none over one second, none rewarded that is not right."""
    texts = completions(10_000)
    worst = judge_all(texts, "72")
    right = sum("72" in text for text in texts)
    print(f"{right} of {len(texts)} hold the answer; the slowest took {worst:.3f} s")
    assert worst < 1.0 and right > 1000


@pytest.mark.parametrize("reference", ["\\frac{\\sqrt{2}}{2}", "(3, \\frac{\\pi}{2})"])
def test_latex_that_explodes(reference):
    """References that need math-verify: every bomb, bare and dressed."""
    bombs = [form.format(x) for x in BOMBS for form in ("{}", "\\frac{{{}}}{{2}}")]
    worst = judge_all([f"<think>a</think><answer>{x}</answer>" for x in bombs], reference)
    print(f"the slowest of {len(bombs)} took {worst:.3f} s")
    assert worst < 1.0
