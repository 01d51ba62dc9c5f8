"""The plan for many cards: its rules by hand, and the table in the docs."""

import json
from pathlib import Path

import pytest

from iapo_mini.cli import main
from iapo_mini.tools import scale
from iapo_mini.tools.planner import GB, SHAPES
from iapo_mini.tools.scale import full_gb, parameters, scale_row, scale_table

ROOT = Path(__file__).parent.parent
SMALL, LARGE = SHAPES["qwen2.5-0.5b"], SHAPES["qwen2.5-7b"]


def test_the_table_in_the_docs_is_the_plans(capsys):
    assert scale_table() in (ROOT / "docs/scaleout.md").read_text(encoding="utf-8")
    main(["plan", "--scale"])
    told = capsys.readouterr().out
    assert told.startswith(scale_table()) and "a plan, not a measurement" in told


def test_the_measured_share_of_the_estimator_is_the_committed_one():
    measured = json.loads((ROOT / "figures/results/estimator.json").read_text(encoding="utf-8"))
    steps = measured["qwen05b"]["steps"]
    assert round(steps["information"] / steps["update"], 2) == scale.INFORMATION_OVER_UPDATE


def test_zero_divides_what_it_should():
    n = parameters(LARGE)
    assert n == 7_615_616_512
    one, eight = full_gb(LARGE, 1, 2, 1), full_gb(LARGE, 8, 2, 1)
    # Stage 2 divides gradients, fp32 weights and moments: 14 of the 16 bytes of a parameter.
    assert one - eight == pytest.approx(1.05 * 14 * n * 7 / 8 / GB)
    # Stage 3 also divides the 16-bit weights, which helps only where the update needs most memory:
    # sampling and the estimator gather them.
    assert full_gb(LARGE, 8, 3, 8) < full_gb(LARGE, 8, 2, 8)
    assert full_gb(LARGE, 8, 3, 1) > eight
    assert one > 16 * n / GB + scale.VLLM_SHARE * scale.CARD_MEMORY
    assert full_gb(LARGE, 8, 2, 2) > eight


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"])
@pytest.mark.parametrize("cards", [1, 8, 64])
def test_every_row_fits_its_card_and_trains_whole_groups(name, cards):
    row = scale_row(SHAPES[name], cards)
    assert row.gb <= scale.FILLED * scale.CARD_MEMORY
    assert row.completions == max(96, 8 * cards) and row.completions % scale.GROUP == 0
    assert row.micro <= row.completions // cards
    assert all(seconds > 0 for phase, seconds in row.seconds.items() if phase != "exchange")
    assert (row.seconds["exchange"] > 0) == (cards > 1)
    steps = -(-2 * 7473 // (row.completions // 8))
    assert row.hours == pytest.approx(steps * sum(row.seconds.values()) / 3600)


def test_only_the_larger_models_on_one_card_are_trained_by_an_adapter():
    ways = {(n, c): scale_row(SHAPES[n], c).way for n in SHAPES for c in (1, 8, 64)}
    assert [
        key for key, way in ways.items() if way.startswith("LoRA") and key[0] != "qwen2.5-3b"
    ] == [("qwen2.5-7b", 1)]


def test_more_cards_or_a_smaller_model_take_less_time_for_the_same_step():
    work = [scale_row(LARGE, 8), scale_row(SMALL, 8), scale_row(SMALL, 1)]
    updates = [row.seconds["update"] for row in work]
    assert updates[1] < updates[0] and updates[1] == pytest.approx(updates[2] / 8)
