"""Verdicts, choices and the numbers behind them, on results made by hand."""

import math
import os
import subprocess
import sys

import pytest
from helpers import PATIENCE

from iapo_mini.config import TrainConfig
from iapo_mini.lab import claims
from iapo_mini.lab.sizes import PRESETS
from iapo_mini.lab.tuning import OTHER_WEIGHTS, ROWS, choose, first_trials, last_trials


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.2, 0.1, 0.3), "holds"),
        ((-0.2, -0.3, -0.1), "does not hold"),
        ((0.0, -0.1, 0.1), "cannot tell"),
        ((0.2, math.nan, math.nan), "cannot tell"),
    ],
)
def test_verdict_above_zero(interval, expected):
    assert claims.verdict(interval, low=0.0) == expected


def test_verdict_within_a_range():
    assert claims.verdict((1.0, 0.97, 1.03), 0.95, 1.05) == "holds"
    assert claims.verdict((0.5, 0.4, 0.6), 0.95, 1.05) == "does not hold"
    assert claims.verdict((0.9, 0.8, 1.0), 0.95, 1.05) == "cannot tell"


def test_slope_is_per_decade():
    points = [{"value": 10.0**e, "length": [5.0 - 2 * e, 1.0 - 2 * e]} for e in (-6, -4, -2, 0)]
    assert claims._slope(points, "length") == pytest.approx((-2.0, -2.0, -2.0))


def test_talk_is_summed_within_each_seed():
    counts = {"compute": 20.0, "restate": 1.0, "plan": 2.0, "check": 3.0, "hedge": 4.0,
              "conclude": 5.0, "format": 6.0}  # fmt: skip
    roles = {role: [n, 2 * n] for role, n in counts.items()}
    assert claims._talk({"roles": roles}) == [15.0, 30.0]


def trial(passed, length):
    return {"pass@1": passed, "length": length, "ratio@1": passed / length}


def test_choice_is_the_best_ratio_among_those_that_keep_accuracy():
    trials = [trial(0.8, 60), trial(0.7, 30), trial(0.5, 10)]
    assert choose(trials, floor=0.6) == 1
    assert choose(trials, floor=0.75) == 0
    assert choose(trials, floor=0.9) == 0  # none keeps it: the most accurate
    assert choose(trials, floor=0.0) == 2


def test_every_row_gets_as_many_different_valid_trials():
    assert set(OTHER_WEIGHTS) < set(ROWS)
    for row in ROWS:
        trials = first_trials(row)
        trials += last_trials(row, trials[2])
        assert len(trials) == 7 and len({str(t) for t in trials}) == 7
        for settings in trials:
            config = TrainConfig(**settings)
            # As many completions a step for every row.
            assert config.prompts_per_step * config.num_generations == 96


def test_last_trials_lie_on_both_sides_of_the_usual_weight():
    for row, (one, other) in OTHER_WEIGHTS.items():
        (name,) = one
        usual = getattr(TrainConfig(**ROWS[row]).recipe(), name)
        assert min(one[name], other[name]) < usual < max(one[name], other[name]), row


def test_trials_and_reported_runs_share_no_seed():
    for preset in PRESETS.values():
        assert not set(preset.tuning.seeds) & set(preset.table1.seeds)
        assert not set(preset.tuning.seeds) & set(preset.sweeps.seeds)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "iapo_mini", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_claims_runs_every_experiment_and_judges_every_claim(tmp_path):
    """All experiments at tiny size, in one command."""
    command = ["lab", "claims", "--preset", "quick"]
    command += ["--out", tmp_path / "runs", "--figures", tmp_path / "figures"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "figures/claims_quick.md").read_text()
    assert text.strip() in done.stdout
    for section in ("Table 1", "Fig. 5", "Fig. 6", "Theory", "released code"):
        assert section in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "claim |" not in line]
    assert len(rows) > 30
    for row in rows:
        assert row.count("|") == 5
        assert any(f"**{v}**" in row for v in ("holds", "does not hold", "cannot tell")), row
    for name in ("tuning", "table1", "ablation", "sweeps", "departures", "theory"):
        assert (tmp_path / f"figures/results/{name}_quick.json").is_file()
    for name in ("table1", "table1_quick_tradeoff", "ablation", "sweeps", "departures"):
        name = name if "quick" in name else f"{name}_quick"
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 10_000
    # Again: no run is made, the text is the same.
    runs = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}
    again = run(*command)
    assert again.returncode == 0 and (tmp_path / "figures/claims_quick.md").read_text() == text
    assert runs == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}
