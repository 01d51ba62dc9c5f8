"""The paper's Fig. 6 on the weights alpha and beta, and a comparison of two means of the loss."""

from __future__ import annotations

from pathlib import Path

from iapo_mini.files import versions, write_json
from iapo_mini.lab.figures import methods as drawn
from iapo_mini.lab.ledger import ledger_path
from iapo_mini.lab.results import check_options, file_stem, results_path
from iapo_mini.lab.runs import collect, make_jobs, run_all
from iapo_mini.lab.sizes import preset_of
from iapo_mini.lab.tuning import tuned
from iapo_mini.recipes import RECIPES

SWEPT = {
    "alpha": (1e-6, 1e-4, 1e-2, 0.1, 0.2, 0.4, 1.0),
    "beta": (1e-6, 1e-4, 1e-2, 0.05, 0.2, 1.0),
}
"""The paper's four values of each weight (Fig. 6), and further values where lengths change."""
AVERAGED = ("iapo", "iapo_ne")
"""Methods that are run with both means of the loss: over the tokens of each completion first, as in
the paper's equation ("sequence"), or over all tokens at once ("token")."""


def sweeps(
    preset: str = "full",
    *,
    out: str | Path = "runs/science",
    figures: str | Path = "figures",
    parallel: int | None = None,
) -> dict:
    """Remake the paper's Fig. 6, where one weight varies, and compare the two means of the loss."""
    size, out, figures = preset_of(preset).sweeps, Path(out), Path(figures)
    check_options(out, figures, parallel)
    best = tuned(preset, out, figures, parallel, AVERAGED)
    base = best["iapo"]
    recipes: dict[str, dict] = {}

    def planned(name: str, recipe: dict) -> str:
        """The name of the run with these settings; equal settings share one run."""
        recipe = {"aggregation": RECIPES[recipe["method"]].aggregation} | recipe
        same = next((n for n, settings in recipes.items() if settings == recipe), name)
        recipes.setdefault(same, recipe)
        return same

    points = {
        (weight, value): planned(f"{weight}-{value:g}", base | {weight: value})
        for weight, values in SWEPT.items()
        for value in (values if preset == "full" else values[::5])
    }
    means = {
        (method, how): planned(f"mean-{method}-{how}", best[method] | {"aggregation": how})
        for method in AVERAGED
        for how in ("sequence", "token")
    }
    jobs = make_jobs(size, out / preset / "sweeps", recipes)
    kept = ledger_path(figures, file_stem("sweeps", preset))
    run_all(jobs, parallel, kept)
    found = collect(jobs, size, kept)
    k = max(size.ks)

    def outcome(name: str) -> dict:
        judged, curves = found["methods"][name], found["curves"][name]
        measured = {m: judged[m] for m in ("length", "pass@1", f"pass@{k}")}
        return measured | {"entropy": [run["entropy"][-1] for run in curves]}

    results: dict = {"k": k, "fixed": base, **{weight: [] for weight in SWEPT}}
    for (weight, value), name in points.items():
        results[weight].append({"value": value} | outcome(name))
    results["means"] = {method: {} for method in AVERAGED}
    for (method, how), name in means.items():
        by_step = [run["length"] for run in found["curves"][name]]
        results["means"][method][how] = outcome(name) | {"length_by_step": by_step}
    results |= {"config": found["config"], "seeds": found["seeds"], "versions": versions()}
    write_json(results_path(figures, "sweeps", preset), results)
    draw(results, figures, preset)
    return results


def draw(results: dict, figures: Path, preset: str = "full") -> None:
    """Draw the weights and the two means of the loss from the content of ``sweeps.json``."""
    name = file_stem("sweeps", preset)
    drawn.sweeps(results).savefig(figures / f"{name}.png", dpi=150)
    drawn.means(results).savefig(figures / f"{name}_means.png", dpi=150)
