"""The sweeps of the two weights at their smallest."""

import pytest
from helpers import run_here

from iapo_mini.lab import runs, sweeps
from iapo_mini.recipes import RECIPES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, given = tmp_path_factory.mktemp("sweeps"), []

    def run_all(jobs, parallel=None, kept=None):
        given.append((jobs, kept))
        run_here(jobs)

    best = {name: {"method": name, "learning_rate": 1e-3} for name in RECIPES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "tuned", lambda *_: best)
        patch.setattr(sweeps, "run_all", run_all)
        patch.setattr(sweeps, "collect", lambda jobs, size, kept: runs.collect(jobs, size))
        options = {"out": folder / "runs", "figures": folder / "figures"}
        return sweeps.sweeps("quick", **options), given, folder


def test_every_run_has_the_loss_of_its_recipe_but_where_both_are_compared(made):
    results, _, _ = made
    losses = {name: config["aggregation"] for name, config in results["config"].items()
              if name.startswith(("alpha", "beta"))}  # fmt: skip
    assert losses and set(losses.values()) == {RECIPES["iapo"].aggregation} == {"token"}
    for means in results["means"].values():
        assert list(means) == ["sequence", "token"]
    sequence = results["config"]["mean-iapo-sequence"]
    assert sequence["aggregation"] == "sequence" and sequence["method"] == "iapo"


def test_finished_runs_are_kept_in_a_ledger(made):
    _, given, folder = made
    ((jobs, kept),) = given
    assert kept == folder / "figures/results/runs/sweeps_quick.jsonl"
    assert len({job["run"] for job in jobs}) == len(jobs)


def test_one_weight_is_varied_and_the_other_is_as_tuned(made):
    results, _, folder = made
    assert [point["value"] for point in results["alpha"]] == [1e-6, 0.4]
    assert [point["value"] for point in results["beta"]] == [1e-6, 1.0]
    assert results["config"]["alpha-0.4"]["beta"] == RECIPES["iapo"].beta
    for name in ("sweeps_quick", "sweeps_quick_means"):
        assert (folder / f"figures/{name}.png").stat().st_size > 10_000
