"""Draw the committed figures again from the committed results, without measuring anything.

After a change of colours or shapes this brings every figure up to date that needs nothing but its
results file. The others need a policy (``calibration``, ``estimator_calibration``, ``explain``) or
trained weights (``heat_maps``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from iapo_mini.files import read_json
from iapo_mini.lab import ablation, estimators, real, sweeps, table1, theory
from iapo_mini.lab.figures import controls, early_exit, methods, oracle, selection
from iapo_mini.lab.figures import real as real_figures
from iapo_mini.lab.oracle import draw_quality
from iapo_mini.lab.results import draw_comparison


def _single(name: str, draw: Callable) -> Callable[[dict, Path], None]:
    return lambda results, out: draw(results).savefig(out / f"{name}.png", dpi=150)


DRAWN: Sequence[tuple[str, Callable[[dict, Path], None]]] = (
    ("compare_full", lambda results, out: draw_comparison(results, out, "compare_full")),
    ("compare_long", lambda results, out: draw_comparison(results, out, "compare_long")),
    ("table1", table1.draw),
    ("table1", ablation.draw),
    ("sweeps", sweeps.draw),
    ("theory", theory.draw),
    ("estimator", estimators.draw),
    ("departures", _single("departures", methods.departures)),
    ("starts", _single("starts", methods.starts)),
    ("choices", _single("choices", controls.choices)),
    ("controls", _single("controls", controls.controls)),
    ("oracle", _single("oracle", oracle.agreement)),
    ("selection", _single("selection", selection.selection)),
    ("early_exit", _single("early_exit", early_exit.early_exit)),
    ("real_estimator", real.draw),
    (
        "real_estimator_warm_start",
        lambda results, out: real.draw(results, out, "real_estimator_warm_start"),
    ),
    ("real_training_so_far", _single("real_training_so_far", real_figures.progress)),
    ("real_training_so_far_card", _single("real_training_so_far_card", real_figures.progress)),
)
"""Results files, and how figures are drawn from them into a folder."""


def redraw(figures: str | Path = "figures", out: str | Path = "") -> list[Path]:
    """Draw again every figure whose results file is in ``figures/results``.

    Args:
        figures: folder of the figures; results are read from ``figures/results``.
        out: folder to draw into; empty for ``figures`` itself.

    Returns:
        The paths of the figures that were drawn.

    Raises:
        ValueError: for a results file that is damaged.
    """
    figures = Path(figures)
    out = Path(out) if str(out) else figures
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    for name, draw in DRAWN:
        path = figures / "results" / f"{name}.json"
        if path.is_file():
            draw(read_json(path), out)
    draw_quality(figures, out)
    return [p for p in sorted(out.glob("*.png")) if p.stat().st_mtime_ns != before.get(p)]
