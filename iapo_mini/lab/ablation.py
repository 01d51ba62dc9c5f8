"""The paper's Fig. 5: the effect of each part of the advantage."""

from __future__ import annotations

from pathlib import Path

from iapo_mini import plots
from iapo_mini.files import write_json
from iapo_mini.intervals import mean_interval
from iapo_mini.lab.results import file_stem, results_path
from iapo_mini.lab.table1 import table1

ABLATED = ("grpo", "iapo_ni", "iapo_ne", "iapo", "iapo_pmi")


def ablation(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Remake the paper's Fig. 5, the effect of each part of the advantage, from Table 1's runs."""
    results = table1(preset, out=out, figures=figures, parallel=parallel)
    found = of_parts(results)
    write_json(results_path(Path(figures), "ablation", preset), found)
    draw(results, Path(figures), preset)
    return found


def of_parts(results: dict) -> dict:
    """The content of ``ablation.json`` from that of ``table1.json``, for the rows that it has."""
    k = max(results["config"]["evaluation"]["ks"])
    rows = {name: results["methods"][name] for name in ABLATED if name in results["methods"]}
    gaps = {}
    for one, other in (
        ("iapo", "iapo_ne"), ("iapo_ne", "iapo_ni"), ("iapo", "iapo_ni"), ("iapo_pmi", "iapo"),
    ):  # fmt: skip
        if one in rows and other in rows:
            pairs = zip(rows[one][f"ratio@{k}"], rows[other][f"ratio@{k}"])
            gaps[f"{one} - {other}"] = list(mean_interval([a - b for a, b in pairs]))
    return {
        "k": k,
        **{metric: {m: r[f"{metric}@{k}"] for m, r in rows.items()}
           for metric in ("ratio", "length", "pass")},
        "gap": gaps,
        "config": {m: results["config"][m] for m in rows}
        | {"evaluation": results["config"]["evaluation"]},
        "versions": results["versions"],
    }  # fmt: skip


def draw(results: dict, figures: Path, preset: str = "full") -> None:
    """Draw the parts of the advantage from the content of ``table1.json``."""
    found = results["methods"]
    rows = {name: found[name] for name in ABLATED if name in found}
    figure = plots.comparison(rows, max(results["config"]["evaluation"]["ks"]))
    figure.savefig(figures / f"{file_stem('ablation', preset)}.png", dpi=150)
