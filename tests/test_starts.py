"""The experiment on start policies at its smallest: one start, one step."""

import json
from pathlib import Path

import pytest

from iapo_mini.intervals import holm, p_above
from iapo_mini.lab import starts as module
from iapo_mini.lab.sizes import SHORT, Size
from iapo_mini.lab.starts import METRICS, PAIRS, TRAINED, starts, starts_table
from iapo_mini.recipes import RECIPES

RESULTS = Path(__file__).parent.parent / "figures/results"
TINY = Size((0, 1), 1, 2, 1, num_generations=4, ks=(1, 4), max_completion_length=SHORT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SIZES", {"quick": TINY})
        patch.setattr(module, "STARTS", {"calibrated": module.EMBEDDED_CALIBRATED})
        patch.setattr(module, "tuned", lambda *_: {m: {"method": m} for m in RECIPES})
        options = {"out": folder / "runs", "figures": folder / "figures"}
        found = starts("quick", **options)
        made = [p.stat().st_mtime_ns for p in sorted(folder.rglob("result.json"))]
        assert found == starts("quick", **options)  # nothing is run again
        assert made == [p.stat().st_mtime_ns for p in sorted(folder.rglob("result.json"))]
    saved = json.loads((folder / "figures/results/starts_quick.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(found))
    assert (folder / "figures/starts_quick.png").stat().st_size > 10_000
    return saved


def test_every_row_is_trained_from_the_start_policy(results):
    assert list(results["starts"]) == ["calibrated"]
    row = results["starts"]["calibrated"]
    assert list(row) == ["start", *TRAINED]
    for name, (method, changes) in TRAINED.items():
        settings = results["config"][f"calibrated-{name}"]
        assert settings["model"] == module.EMBEDDED_CALIBRATED
        assert settings["method"] == method
        assert settings["estimator_stride"] == changes.get("estimator_stride", 1)
        assert all(len(row[name][metric]) == 2 for metric in METRICS)


def test_differences_are_taken_within_a_seed(results):
    row = results["starts"]["calibrated"]
    for pair, metrics in results["difference"]["calibrated"].items():
        one, other = pair.split(" - ")
        for metric, (mean, low, high) in metrics.items():
            gaps = [a - b for a, b in zip(row[one][metric], row[other][metric], strict=True)]
            assert mean == pytest.approx(sum(gaps) / 2)
            # Student's t with one degree of freedom, for two values.
            assert high - mean == pytest.approx(12.7062 * abs(gaps[0] - gaps[1]) / 2, rel=1e-4)
            assert mean - low == pytest.approx(high - mean)


def test_the_table_has_a_line_for_each(results):
    lines = starts_table(results).splitlines()
    assert len(lines) == 2 + 1 + len(TRAINED)
    assert all(line.count("|") == 7 for line in lines)
    assert f"{results['starts']['calibrated']['start']['length']:.1f}" in lines[2]


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of .*, got 'tiny'"):
        starts("tiny")


def test_what_holds_of_better_starts_after_the_correction_is_what_the_docs_say():
    results = json.loads((RESULTS / "starts.json").read_text(encoding="utf-8"))
    found = {
        (name, *pair, metric): [a - b for a, b in zip(*(row[m][metric] for m in pair))]
        for name, row in results["starts"].items()
        for pair in PAIRS
        for metric in METRICS
    }
    p = [2 * min(p_above(d, 0), p_above([-x for x in d], 0)) for d in found.values()]
    assert len(p) == 27
    stand = {name for name, holds in zip(found, holm(p, 0.05)) if holds}
    start = "uncalibrated"
    assert stand == {(start, "iapo", "grpo", "length"), (start, "iapo", "grpo", "ratio@1"),
                     (start, "iapo", "iapo_ne", "ratio@1")}  # fmt: skip
