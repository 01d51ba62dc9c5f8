"""What a training curve says beside its end: how soon it gets short, how right it is when it is.

Length and accuracy of a step are those of its training completions, 96 of them, averaged over
``WINDOW`` steps where one moment is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iapo_mini import plots
from iapo_mini.intervals import format_interval, mean_interval

WINDOW = 5
"""Steps of a trailing mean."""
MATCHED = (50, 40, 35)
"""Lengths in tokens at which accuracies are compared."""


def area(curve: Mapping[str, Sequence[float]]) -> float:
    """Area under the length curve over its steps: the mean tokens of a completion in training."""
    return sum(curve["length"]) / len(curve["length"])


def accuracy_at(curve: Mapping[str, Sequence[float]], tokens: float) -> float | None:
    """Accuracy when completions first have at most so many tokens, by trailing means.

    Returns:
        None for a curve that never gets there.
    """
    for end in range(WINDOW, len(curve["length"]) + 1):
        window = slice(end - WINDOW, end)
        if sum(curve["length"][window]) / WINDOW <= tokens:
            return sum(curve["accuracy"][window]) / WINDOW
    return None


def of_curves(results: Mapping) -> dict[str, dict]:
    """The parts of a results file that follow from its curves, of runs to the last step alone.

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
    """Area and matched accuracies as a Markdown table; in brackets how many seeds got there."""
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
