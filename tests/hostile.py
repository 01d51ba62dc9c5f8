"""Seeded completions that try to break a parser or to fool a reward."""

import os
import random
import re
import time

import psutil

from iapo_mini.problems import verify
from iapo_mini.rewards import parse_answer, reward

PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<THINK>", "<think", "think>", "</ answer>",
    "<answer/>", "<<answer>>", "&lt;answer&gt;", "72", " 72", "71", "\n", "\t", "\r\n", "\x00",
    "\x1b[31m", "\x7f", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800", "\U0001f600", "\u00e9",
    "e\u0301\u0301\u0301", "\uff17\uff12", "\u0667\u0662", "\u00b2", "\u00bd", "\u221272",
    "{", "}", "{{", "}}", "\\", "\\\\", "$", "$$",
    "\\boxed{", "\\boxed{72}", "\\frac{", "\\frac{1}{0}", "\\sqrt[", "\\left(", "\\right.",
    "\\begin{matrix}", "\\end{matrix}", "^{^{^", "_{_{_", "9**9**9", "9^{9^{9}}", "10^{10^{10}}",
    "99999!", "((9!)!)!", "\\binom{10^9}{10^8}", "\\sum_{i=1}^{10^{12}} i",
    "\\prod_{k=1}^{99999} k", "\\int_0^\\infty e^{-x^x} dx", "(k+1)^{9999}",
    "\\lim_{x \\to 0} \\frac{\\sin x}{x}",
    "\\sqrt{" * 20 + "2" + "}" * 20, "1/0", "0/0", "1e999999999", "nan", "inf", "-inf", "0x48",
    "7_2", "7 2", "72.", "72.0", "72%", "None", "True", "__import__('os').system('true')",
    "'; DROP TABLE", "%s%s%n", "{0.__class__}", "<|im_end|>", "<|endoftext|>", "</s>",
]  # fmt: skip

BOMBS = [
    "9**9**9", "9^{9^{9}}", "9^{9^9}", "(9^9)^{9^9}", "99999!", "((9!)!)!", "(k+1)^{9999}",
    "\\binom{10^9}{10^8}", "\\sum_{i=1}^{10^{12}} i", "\\prod_{k=1}^{99999} k", "2^{99999}",
    "\\int_0^\\infty e^{-x^x} dx", "\\sqrt[99999]{2^{9999}}", "\\frac{1}{" * 40 + "2" + "}" * 40,
    "\\sqrt{" * 60 + "2" + "}" * 60, "(" * 150 + "1" + ")" * 150, "{" * 190 + "1" + "}" * 190,
    "$" * 300, "x" + "^{x" * 60 + "}" * 60, "1" + "+1" * 190, "\\frac" * 70, "x_{" * 90,
    "\\begin{pmatrix}" * 20, "\\left(" * 60, "|" * 300, "\\{1,2,3\\}\\cup" * 20, "\\log" * 90,
    "\\sin(" * 60 + "x" + ")" * 60, "(x+y+z+w)^{60}", "(a+b)^{40}(c+d)^{40}(e+f)^{40}",
    "123456789123456789!", "\\pi^{\\pi^{\\pi^{\\pi}}}", "e^{e^{e^{e^{e}}}}", "10^{-99999}",
    "\\lim_{n \\to \\infty} (1+\\frac{1}{n})^n", "x=1,x=2,x=3," * 25, "\\dots" * 60, "1..2..3" * 40,
]  # fmt: skip


def completion(rng: random.Random) -> str:
    """One text; about half of them are well-formed, so their answers are judged."""
    kind = rng.random()
    if kind < 0.02:  # 100 kB
        piece = rng.choice([*PIECES, "</think><answer>", "</answer>x", "<think>" + " " * 50])
        tail = rng.choice(["", "</answer>x" * 2000, "<answer>72</answer>", "</think>"])
        return rng.choice(["", "<think>"]) + (piece * (100_000 // len(piece)))[:100_000] + tail
    if kind < 0.45:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 40)))
    thought = "".join(rng.choices(PIECES[11:], k=rng.randint(0, 8)))
    if kind < 0.6:
        answer = rng.choice(BOMBS)
    elif kind < 0.7:
        answer = str(rng.randint(-(10**9), 10**9)) * rng.randint(1, 2000)
    else:
        answer = "".join(rng.choices(PIECES[11:], k=rng.randint(0, 6)))
    return f"<think>{thought}</think><answer>{answer}</answer>"


def completions(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [completion(rng) for _ in range(count)]


RIGHT = re.compile(r"[^0-9A-Za-z%-]*(?:\\boxed)?[^0-9A-Za-z%-]*72(?:\.0+)?[^0-9A-Za-z%-]*")
"""Every answer that may be rewarded if 72 is the reference."""
_SIZES = re.compile(r"\\(?:left|right)(?![a-z])")  # the size of brackets has no meaning


def judge_all(texts: list[str], reference: str) -> float:
    """Reward every text and return the longest time of one, in processor seconds.

    The time includes math-verify's process. Fails if a wrong text is rewarded. If the reference is
    not 72, every text is wrong.
    """
    verify.equal_answers("x+1", "1+x+0")  # starts math-verify
    worst = 0.0
    for text in texts:
        began = _spent()
        value, correct = reward(text, reference)
        worst = max(worst, _spent() - began)
        answer = parse_answer(text)
        assert value == (-1.5 if answer is None else 1.5 if correct else -0.5)
        if correct:
            assert reference == "72" and RIGHT.fullmatch(_SIZES.sub("", answer)), text
    return worst


def _spent() -> float:
    """Processor seconds of this process and of math-verify's processes, also of ended ones."""
    others = os.times()
    running = verify._process
    seconds = time.process_time() + others.children_user + others.children_system
    if running is not None and running.poll() is None:
        seconds += sum(psutil.Process(running.pid).cpu_times()[:4])  # its forks' as well
    return seconds
