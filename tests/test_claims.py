"""Verdicts, choices and their numbers, on results made by hand."""

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import PATIENCE, run_here

from iapo_mini.config import TrainConfig
from iapo_mini.files import read_json
from iapo_mini.lab import ablation, claims, table1
from iapo_mini.lab.results import results_path
from iapo_mini.lab.runs import START
from iapo_mini.lab.sizes import PRESETS, Size
from iapo_mini.lab.tuning import OTHER_WEIGHTS, ROWS, choose, first_trials, last_trials
from iapo_mini.lab.verdicts import Claim, judge

FIGURES = Path(__file__).parent.parent / "figures"


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
    assert claims._slope(points, "length") == pytest.approx([-2.0, -2.0])
    assert claims._slope(points[:1], "length") == []


def claim(values, low=-math.inf, high=math.inf, testable=True):
    return Claim("text", "paper", "ours", values, low, high, testable)


def words(*section):
    return [row[3] for row in judge(section)]


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (claim([0.2, 0.3, 0.4], low=0.0), "holds"),
        (claim([-0.2, -0.3, -0.4], low=0.0), "does not hold"),
        (claim([-0.2, -0.3, -0.4], high=0.0), "holds"),
        (claim([-0.1, 0.2, 0.3], low=0.0), "cannot tell"),
        (claim([0.99, 1.0, 1.01], 0.95, 1.05), "holds"),
        (claim([1.19, 1.2, 1.21], 0.95, 1.05), "does not hold"),
        (claim([0.79, 0.8, 0.81], 0.95, 1.05), "does not hold"),
        (claim([0.9, 1.0, 1.1], 0.95, 1.05), "cannot tell"),
        (claim([0.3], low=0.0), "cannot tell"),
        (claim([], low=0.0), "cannot tell"),
        (claim([0.0, 0.0, 0.0], low=-0.02, testable=False), "cannot be tested"),
    ],
)
def test_verdict_over_seeds(of, expected):
    assert words(of) == [expected]


def test_a_claim_beside_others_needs_more_than_a_claim_alone():
    """2, 3, 4 above 0: t = 5.20, p = 0.0176, between 0.025 / 2 and 0.025."""
    one, weak, strong = claim([2, 3, 4], 0.0), claim([-1, 1, 1], 0.0), claim([2, 2.01, 2.02], 0.0)
    assert words(one) == ["holds"]
    assert words(one, weak) == ["cannot tell", "cannot tell"]
    assert words(one, strong) == ["holds", "holds"]  # the strong one has taken the stricter level
    assert words(one, claim([0, 0, 0], -1.0, testable=False)) == ["holds", "cannot be tested"]


def point(value, length, passed):
    return {"value": value, "length": [length] * 2, "pass@1": [passed] * 2}


def test_a_sweep_is_used_until_training_collapses():
    points = [point(0.1, 40, 0.8), point(0.2, 30, 0.41), point(0.4, 90, 0.39), point(1, 30, 0.8)]
    kept, told = claims._trained(points, "alpha")
    assert kept == points[:2]
    assert told == (
        "; for alpha up to 0.2, because training collapses at 0.4 (90 tokens, Pass@1 0.390), "
        "1 (30 tokens, Pass@1 0.800)"
    )
    assert claims._trained(points[:2], "alpha") == (points[:2], "; for alpha up to 0.2")


def test_equal_accuracy_is_testable_only_if_the_start_policy_is_less_accurate():
    def table(start):
        rows = {"start": start, "iapo": [0.97, 0.98], "grpo": [0.98, 0.99]}
        return {"methods": {name: {"pass@8": values} for name, values in rows.items()}}

    assert not claims._as_accurate(table([1.0, 0.98]), "pass@8", "grpo", "-").testable
    assert claims._as_accurate(table([1.0, 0.97]), "pass@8", "grpo", "-").testable


def test_an_untrained_departure_shows_only_its_correlations():
    rows = {
        "a": {"what": "A", "correlation": [0.98, 0.98], "terms": [0.9, 0.9]},
        "b": {"what": "B", "correlation": [0.5, 0.5], "length": [30.0, 31.0], "pass@1": [0.5, 0.5]},
    }
    rule = {"length": [30.0, 31.0], "pass@1": [0.6, 0.6]}
    one, other = judge(claims._of_departures({"rows": rows, "iapo": rule}))
    assert one[2:] == (
        "not trained yet; correlation of the advantages 0.98 [0.98, 0.98]; "
        "correlation of the token terms 0.90 [0.90, 0.90]", "cannot tell",
    )  # fmt: skip
    assert "1.000 [1.000, 1.000]; -0.100 [-0.100, -0.100]" in other[2] and other[3] == "holds"
    (row, _) = judge(claims._of_departures({"rows": rows, "iapo": {}}))
    assert row[3] == "cannot tell"


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
            # Every row has the same number of completions per step.
            assert config.prompts_per_step * config.num_generations == 96


def test_last_trials_lie_on_both_sides_of_the_usual_weight():
    for row, (one, other) in OTHER_WEIGHTS.items():
        (name,) = one
        usual = getattr(TrainConfig(**ROWS[row]).recipe(), name)
        assert min(one[name], other[name]) < usual < max(one[name], other[name]), row


def test_trials_and_reported_runs_share_no_seed():
    for preset in PRESETS.values():
        reported = {*preset.table1.seeds, *preset.more_seeds, *preset.deciding_seeds}
        reported |= set(preset.sweeps.seeds)
        assert not set(preset.tuning.seeds) & reported


def test_rows_that_decide_have_ten_seeds_and_the_first_seeds_are_trained_longer(tmp_path):
    jobs = table1._jobs(PRESETS["full"], tmp_path, {START: None, "sgrpo": {}, "iapo": {}})
    seeds, steps = defaultdict(list), defaultdict(list)
    for job in jobs:
        name = Path(job["run"]).name.rsplit("-", 1)[0]
        seeds[name].append(job["seed"])
        if job["config"]:
            steps[name].append((job["config"]["max_steps"], job["evaluation"]["primary"]))
    # Rows are paired by the order of their seeds.
    assert seeds == {START: [*range(5)], "sgrpo": [*range(5)], "iapo": [*range(10)]}
    assert steps["sgrpo"] == [(60, 22)] * 3 + [(22, 0)] * 2
    assert steps["iapo"] == [(60, 22)] * 3 + [(22, 0)] * 7
    assert jobs[-1]["evaluation"]["on_the_way"] == [22]
    assert jobs[0]["evaluation"]["on_the_way"] == [22, 40, 60]


def test_rows_that_decide_are_tuned_and_trained_before_the_others(tmp_path, monkeypatch):
    done = []

    def tuned(preset, out, figures, parallel, rows):
        done.append(("tuned", set(rows)))
        return {row: {} for row in rows}

    def run_all(jobs, parallel, kept):
        done.append(("trained", {Path(job["run"]).name.rsplit("-", 1)[0] for job in jobs}))
        if len(done) == 6:
            raise InterruptedError

    few, every = set(table1.DECIDING), set(ROWS)
    ours = few | {"iapo_sequence", "iapo_ni", "iapo_pmi"}
    told = tmp_path / "figures/results/table1_quick.json"
    told.parent.mkdir(parents=True)
    told.write_text(json.dumps({"methods": dict.fromkeys(every | {START})}), encoding="utf-8")
    monkeypatch.setattr(table1, "tuned", tuned)
    monkeypatch.setattr(table1, "run_all", run_all)
    with pytest.raises(InterruptedError):
        table1.table1("quick", out=tmp_path / "runs", figures=tmp_path / "figures")
    assert done == [
        (what, rows | ({START} if what == "trained" else set()))
        for rows in (few, ours, every)
        for what in ("tuned", "trained")
    ]


def test_rows_that_decide_are_told_before_the_others_are_trained(tmp_path, monkeypatch):
    figures, trained = tmp_path / "figures", []
    path = figures / "results/table1_quick.json"

    def run_all(jobs, parallel, kept=None):
        if any(Path(job["run"]).name == "dapo-0" for job in jobs):
            trained.append(path.read_bytes())
            if len(trained) == 1:
                raise InterruptedError
        run_here(jobs)

    monkeypatch.setattr(table1, "DECIDING", ("grpo", "iapo"))
    monkeypatch.setattr(table1, "OURS", ("dapo",))
    monkeypatch.setattr(table1, "ROWS", {"grpo": {}, "iapo": {}, "dapo": {}})
    monkeypatch.setattr(table1, "tuned", lambda *options: {r: {"method": r} for r in options[-1]})
    monkeypatch.setattr(table1, "run_all", run_all)
    with pytest.raises(InterruptedError):
        table1.table1("quick", out=tmp_path / "runs", figures=figures)
    first = json.loads(trained[0])
    assert list(first["methods"]) == [START, "grpo", "iapo"] and first["wall_clock"]["iapo"]
    told = [claim.text for claim in claims.of_table1(first)]
    assert any("GRPO" in text for text in told) and not any("DAPO" in text for text in told)
    found = table1.table1("quick", out=tmp_path / "runs", figures=figures)
    assert list(found["methods"]) == [START, "grpo", "iapo", "dapo"]
    assert found["methods"]["iapo"] == first["methods"]["iapo"]
    assert found["wall_clock"] == first["wall_clock"]  # measured once
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(found))


def test_the_ablation_has_the_rows_that_the_table_has():
    table = read_json(results_path(FIGURES, "table1", "full"))
    table["methods"].pop("iapo_pmi", None)
    table["methods"].pop("iapo_ni", None)
    found = ablation.of_parts(table)
    assert list(found["ratio"]) == ["grpo", "iapo_ne", "iapo"]
    assert list(found["gap"]) == ["iapo - iapo_ne"]
    (claim,) = claims.of_ablation(found)
    assert claim.text.startswith("Ratio@32 of IAPO is above that of IAPO-NE")
    pairs = zip(table["methods"]["iapo"]["ratio@32"], table["methods"]["iapo_ne"]["ratio@32"])
    assert claim.values == [a - b for a, b in pairs]


def test_the_page_tells_which_mean_of_the_loss_a_row_has():
    rows = {START: {}, "grpo": {"aggregation": "sequence"}, "iapo": {"aggregation": "token"},
            "dapo": {"aggregation": "token"}}  # fmt: skip
    told = claims._losses({"methods": rows})
    assert told.endswith("*sequence mean* for GRPO; *token mean* for IAPO, DAPO.")
    runs = {"alpha-0.1": {"aggregation": "token"}, "mean-iapo": {"aggregation": "sequence"}}
    assert claims._mean_of(runs | {"evaluation": {}}) == "*token mean*"


def test_a_size_asks_for_no_more_completions_than_it_samples():
    with pytest.raises(ValueError, match=r"ks must be at most num_generations = 2, got \(1, 4\)"):
        Size((0,), 1, problems=2, num_generations=2, ks=(1, 4))


def cut(results):
    """Results of the first seed only, without any right answers."""
    if isinstance(results, dict):
        return {k: [0.0] if k.startswith("pass@") else cut(v) for k, v in results.items()}
    if isinstance(results, list):
        each = results if results and isinstance(results[0], dict) else results[:1]
        return [cut(x) for x in each]
    return results


def test_one_seed_without_a_right_answer_gives_no_verdict():
    found = {name: read_json(results_path(FIGURES, name, "full")) for name in claims.FILES}
    one = {name: results if name == "theory" else cut(results) for name, results in found.items()}
    one["table1"]["config"] = found["table1"]["config"]
    text = claims.report(one, "quick")
    for section in text.split("\n## ")[1:]:
        found = re.findall(r"\*\*(.+?)\*\* \|\n", section)
        assert len(found) >= (1 if section.startswith("What each part is worth") else 3)
        if section.startswith("Theory"):
            assert "holds" in found
        else:
            assert set(found) == {"cannot tell"}, section
    assert "(one seed)" in text


def test_a_study_that_was_run_adds_its_section():
    files = {name: read_json(results_path(FIGURES, name, "full")) for name in claims.FILES}
    without = claims.report(files)
    controls = {"controls": read_json(results_path(FIGURES, "controls", "full"))}
    text = claims.report(files | controls)
    assert "Controls" not in without and without.startswith(text.split("\n\nFurther studies")[0])
    assert "the controls with at least 3 seeds and 200 test stories of 8 completions." in text
    (section,) = (part for part in text.split("\n## ") if part.startswith("Controls"))
    assert section.count("gives longer completions than IAPO") == 20


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "iapo_mini", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_claims_runs_every_experiment_and_judges_every_claim(tmp_path):
    """One command makes all experiments at a tiny size."""
    command = ["lab", "claims", "--preset", "quick"]
    command += ["--out", tmp_path / "runs", "--figures", tmp_path / "figures"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "figures/claims_quick.md").read_text(encoding="utf-8")
    assert text.strip() in done.stdout
    for section in ("Table 1", "Fig. 5", "Fig. 6", "Theory", "released code"):
        assert section in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "claim |" not in line]
    assert len(rows) > 30
    for row in rows:
        assert row.count("|") == 5
        verdicts = ("holds", "does not hold", "cannot tell", "cannot be tested")
        assert any(f"**{v}**" in row for v in verdicts), row
    for name in ("tuning", *claims.FILES):
        assert (tmp_path / f"figures/results/{name}_quick.json").is_file()
    for name in ("table1", "table1_quick_tradeoff", "ablation", "sweeps", "departures"):
        name = name if "quick" in name else f"{name}_quick"
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 10_000
    # A second call makes no runs and gives the same text.
    runs = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}
    again = run(*command)
    assert (
        again.returncode == 0
        and (tmp_path / "figures/claims_quick.md").read_text(encoding="utf-8") == text
    )
    assert runs == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}
