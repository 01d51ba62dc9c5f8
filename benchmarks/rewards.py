"""Compare our verifier with the string normalisation of the MATH benchmark.

    python benchmarks/rewards.py --data-file ../shared/data/math500_test.json

The authors' code compares answers like the MATH benchmark: as strings, after a list of replacements
(:func:`normalised` is our own version of it). Here both judge the same pairs: each reference of a
MATH-500 file with right variants of it, and with near misses that are wrong. Rules make the pairs,
so the right verdicts are known. Writes figures/results/rewards.json.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from iapo_mini.files import versions, write_json
from iapo_mini.problems.datasets import load_problems
from iapo_mini.problems.verify import as_number, equal_answers

RESULTS = Path(__file__).parent.parent / "figures" / "results" / "rewards.json"


def normalised(answer: str) -> str:
    """An answer after the replacements of the MATH benchmark, which compares such strings."""
    text = answer.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace(r"\left", "").replace(r"\right", "")
    text = text.replace(r"^{\circ}", "").replace(r"^\circ", "").replace(r"\$", "")
    text = text.split(r"\text{ ")[0]  # a unit
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # x = 5
        text = sides[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])(\{)", r"\\frac{\1}\2", text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def bare(answer: str) -> str:
    """An answer without delimiters, which both judges get without them."""
    answer = answer.strip()
    for start, end in (("$", "$"), ("\\boxed{", "}")):
        if answer.startswith(start) and answer.endswith(end):
            return answer[len(start) : -len(end)]
    return answer


def by_strings(given: str, reference: str) -> bool:
    """Whether two answers are equal after string normalisation."""
    return normalised(bare(given)) == normalised(reference)


def _decimal(value: Fraction) -> str | None:
    """The exact decimal of a fraction, or None if it is not short."""
    scaled = value * 10**6
    return None if scaled.denominator > 1 else f"{float(value):.6f}".rstrip("0")


def right(reference: str) -> Iterator[tuple[str, str]]:
    """Pairs ``(variant, text)`` of right answers: the reference written in other ways."""
    yield "as written", reference
    yield "in dollars", f"${reference}$"
    yield "boxed", f"\\boxed{{{reference}}}"
    yield "full stop", f"{reference}."
    if "frac" in reference:
        small = reference.replace(r"\dfrac", r"\frac")
        yield r"\dfrac", small.replace(r"\frac", r"\dfrac")
        yield r"\tfrac", small.replace(r"\frac", r"\tfrac")
    if re.fullmatch(r"[(\[].*[)\]]", reference) and not re.search(r"left|cup|\)\(", reference):
        yield r"\left \right", f"\\left{reference[:-1]}\\right{reference[-1]}"
    if r"\text{" not in reference and re.search(r"[-+,=]", reference[1:]):
        spaced = re.sub(r"(?<=[\w}]) ?([+=]|(?<!e)-|,(?!\\)) ?", r" \1 ", reference)
        if as_number(reference) is None:
            yield "spaces", spaced
    word = re.fullmatch(r"\\text\{(.*)\}", reference)
    if word:
        yield "word without \\text", word[1]
    if re.fullmatch(r"[^()\[\]{}\\]+(, ?[^()\[\]{}\\]+)+", reference) and not as_number(reference):
        yield "list turned round", ", ".join(reversed(re.split(r", ?", reference)))
    value = as_number(reference)
    if value is None:
        return
    if "=" not in reference:
        yield "x =", f"x = {reference}"
    if value.denominator == 1:
        yield "72.0", f"{value}.0"
        yield "unit and separators dropped", str(value)
        if abs(value) >= 1000:
            yield "1,234", f"{int(value):,}"
    else:
        yield "3/4", f"{value.numerator}/{value.denominator}"
        if _decimal(value):
            yield "0.75", _decimal(value)


def wrong(reference: str) -> Iterator[tuple[str, str]]:
    """Pairs ``(variant, text)`` of wrong answers: near misses of the reference."""
    value = as_number(reference)
    if value is not None:
        yield "number + 1", str(value + 1)
        yield "minus", str(-value) if value else "1"
        yield "percent", f"{reference}\\%"
        yield "sum left undone", f"{value - 1} + 1"
        return
    if re.fullmatch(r"[(\[][^,()\[\]]+,[^,()\[\]]+[)\]]", reference):
        left, other = reference[1:-1].split(",")
        yield "pair turned round", f"{reference[0]}{other.strip()},{left.strip()}{reference[-1]}"
    if "\\text" not in reference:
        yield "+ 1", f"{reference} + 1"
        yield (
            "digit changed",
            re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), reference, count=1),
        )


def measure(references: list[str]) -> dict:
    """Judge every pair both ways and return the content of the results file."""
    rows: dict[str, dict] = {}
    differ, began = [], time.perf_counter()
    for reference in references:
        pairs = [(*pair, True) for pair in right(reference)]
        pairs += [(*pair, False) for pair in wrong(reference) if pair[1] != reference]
        for name, given, truth in pairs:
            ours, strings = equal_answers(given, reference), by_strings(given, reference)
            row = rows.setdefault(
                name, {"right": truth, "pairs": 0, "ours": 0, "strings": 0, "agree": 0}
            )
            row["pairs"] += 1
            row["ours"] += ours == truth
            row["strings"] += strings == truth
            row["agree"] += ours == strings
            if ours != truth:
                differ.append({"given": given, "reference": reference, "right": truth})
    total = sum(row["pairs"] for row in rows.values())
    return {
        "references": len(references),
        "pairs": total,
        "agreement": sum(row["agree"] for row in rows.values()) / total,
        "accuracy": {
            judge: sum(row[judge] for row in rows.values()) / total for judge in ("ours", "strings")
        },
        "variants": rows,
        "judged_wrongly_by_ours": differ,
        "milliseconds_per_pair": 1000 * (time.perf_counter() - began) / total,
    }


def verdict_table(results: dict) -> str:
    """Markdown table with the number of rightly judged pairs of each variant."""
    lines = ["| variant | pairs | ours | strings | agree |", "|---|---|---|---|---|"]
    for truth, title in ((True, "right"), (False, "wrong")):
        for name, row in results["variants"].items():
            if row["right"] is truth:
                counts = f"{row['ours']} | {row['strings']} | {row['agree']}"
                lines.append(f"| {title}: `{name}` | {row['pairs']} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line that the head of this file describes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-file", required=True, help="MATH-500 as .json, .jsonl or .parquet")
    problems = load_problems("math500", "all", parser.parse_args().data_file)
    packages = {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}
    results = measure([problem.answer for problem in problems])
    write_json(RESULTS, {**results, "versions": versions() | packages})
    print(verdict_table(results))
    print(f"\nAgreement {results['agreement']:.3f} on {results['pairs']} pairs. Judged rightly: "
          f"ours {results['accuracy']['ours']:.3f}, strings "
          f"{results['accuracy']['strings']:.3f}.\nEvery number: {RESULTS}")  # fmt: skip


if __name__ == "__main__":
    main()
