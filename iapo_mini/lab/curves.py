"""Properties of training curves: how soon completions get short, and their accuracy at that time.

Length and accuracy of a step are those of its 96 training completions. For a single moment they
are averaged over ``WINDOW`` steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iapo_mini import plots
from iapo_mini.intervals import format_interval, mean_interval

WINDOW = 5
"""Number of steps of a trailing mean."""
MATCHED = (50, 40, 35)
"""Lengths in tokens at which accuracies are compared."""


def area(curve: Mapping[str, Sequence[float]]) -> float:
    """Area under the length curve divided by its steps: mean tokens per completion in training."""
    return sum(curve["length"]) / len(curve["length"])


def accuracy_at(curve: Mapping[str, Sequence[float]], tokens: float) -> float | None:
    """Accuracy when completions first have at most ``tokens`` tokens, by trailing means.

    Returns:
        The accuracy, or None for a curve that never gets that short.
    """
    for end in range(WINDOW, len(curve["length"]) + 1):
        window = slice(end - WINDOW, end)
        if sum(curve["length"][window]) / WINDOW <= tokens:
            return sum(curve["accuracy"][window]) / WINDOW
    return None


def of_curves(results: Mapping) -> dict[str, dict]:
    """The parts of a results file that follow from curves, only of runs that reach the last step.

    Returns:
        ``{"area": name -> [per seed], "matched": tokens -> name -> [per seed, None if never]}``.
    """
    steps = results["config"]["evaluation"]["max_steps"]
    whole = {
        name: [curve for curve in curves if len(curve["length"]) == steps]
        for name, curves in results["curves"].items()
    }
    return {
        "area": {name: [area(curve) for curve in curves] for name, curves in whole.items()},
        "matched": {
            str(tokens): {
                name: [accuracy_at(curve, tokens) for curve in curves]
                for name, curves in whole.items()
            }
            for tokens in MATCHED
        },
    }


def curves_table(results: Mapping) -> str:
    """Area and matched accuracies as a Markdown table, with the number of seeds in brackets."""
    titles = [f"accuracy at {tokens} tokens" for tokens in results["matched"]]
    lines = ["| method | mean length in training (tokens) | " + " | ".join(titles) + " |"]
    lines.append("|---" * (len(titles) + 2) + "|")
    for name, areas in results["area"].items():
        cells = [format_interval(mean_interval(areas), 1)]
        for rows in results["matched"].values():
            there = [value for value in rows[name] if value is not None]
            told = f"{sum(there) / len(there):.3f} " if there else ""
            cells.append(f"{told}({len(there)} of {len(areas)})")
        lines.append(f"| {plots.LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_table(results: Mapping) -> str:
    """Policies judged along the way, as a Markdown table: tokens of each seed, and mean Pass@1.

    Only runs that reach the last step are shown. They are the first ones of each row.
    """
    rows = {name: row["on_the_way"] for name, row in results["methods"].items()
            if "on_the_way" in row}  # fmt: skip
    steps = next(iter(rows.values()))
    titles = [f"{what} at {step}" for what in ("tokens", "Pass@1") for step in steps]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, judged in rows.items():
        whole = min(len(found["length"]) for found in judged.values())
        cells = [", ".join(f"{x:.0f}" for x in judged[step]["length"][:whole]) for step in steps]
        cells += [f"{sum(judged[step]['pass@1'][:whole]) / whole:.3f}" for step in steps]
        lines.append(f"| {plots.LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
