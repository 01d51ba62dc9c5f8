"""The smoke test of the science, a file of its own because it takes minutes."""

import os
import subprocess
import sys

import pytest


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "iapo_mini", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(1200)
def test_claims_runs_every_experiment_and_judges_every_claim(tmp_path):
    """All experiments at tiny size, in one command."""
    command = ["claims", "--preset", "quick"]
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
