"""Controls: the replacements of s, and the tokens at which s is paid."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import run_here, written

from iapo_mini.advantages import grpo, normalize
from iapo_mini.chat import token_texts
from iapo_mini.config import TrainConfig
from iapo_mini.early_exit.question import EVERY_PREFIX
from iapo_mini.lab import controls
from iapo_mini.lab.sizes import Size
from iapo_mini.lab.verdicts import judge
from iapo_mini.policy import load_policy
from iapo_mini.recipes import RECIPES as LIBRARY
from iapo_mini.recipes import use_methods

CHAIN = "<think> That makes 14 + 7 = 21 stamps. Check: 21 - 7 = 14, good.</think><answer> 21"
TINY = Size(seeds=(0, 1), max_steps=1, problems=2, prompts_per_step=1, num_generations=2, ks=(1, 2))


@pytest.fixture(scope="module")
def policy():
    return load_policy(lora_rank=0)


@pytest.fixture(scope="module")
def rollouts(policy):
    """Two completions, the second one shorter."""
    ids = policy.tokenizer.encode(CHAIN, add_special_tokens=False)
    found = written([[*ids, int(policy.eos_ids[0])], ids[:12]], group=2)
    right = torch.tensor([True, False])
    found = found.filled(rewards=torch.tensor([1.5, -0.5]), correct=right)
    return replace(found, references=("21", "21"))


def shown(policy, rollouts, row=0):
    return token_texts(policy.tokenizer, rollouts.completion_ids[row].tolist())


def test_shuffling_keeps_the_values_of_a_completion_and_moves_them(policy, rollouts):
    s = controls.estimated(policy, rollouts, EVERY_PREFIX)
    found = controls.shuffled(policy, rollouts, EVERY_PREFIX)
    for i, n in enumerate(rollouts.lengths.tolist()):
        assert sorted(found[i, :n].tolist()) == sorted(s[i, :n].tolist())
        assert not torch.equal(found[i, :n], s[i, :n]) and not found[i, n:].any()
    assert torch.equal(found, controls.shuffled(policy, rollouts, EVERY_PREFIX))


def test_noise_is_drawn_from_the_tokens_of_the_batch(policy, rollouts):
    found = controls.noise(policy, rollouts, EVERY_PREFIX)
    assert torch.equal(found, controls.noise(policy, rollouts, EVERY_PREFIX))
    assert not found[~rollouts.completion_mask].any()
    other = replace(rollouts, completion_ids=rollouts.completion_ids + 1)
    assert not torch.equal(found, controls.noise(policy, other, EVERY_PREFIX))
    # After norm it has the same variance as any s.
    mask = rollouts.completion_mask
    assert float(normalize(found, mask)[0][mask[0]].std()) == pytest.approx(1.0, abs=1e-3)


def test_numbers_and_roles_come_from_the_text(policy, rollouts):
    texts = shown(policy, rollouts)
    numbers = controls.numeric(policy, rollouts, EVERY_PREFIX)[0]
    assert [t.strip() for t, x in zip(texts, numbers) if x] == ("14 7 21 21 7 14 21".split())
    computing = controls.roles(policy, rollouts, EVERY_PREFIX)[0]
    assert "".join(t for t, x in zip(texts, computing) if x) == " That makes 14 + 7 = 21 stamps."


def test_the_reference_answer_counts_not_the_completions_own(policy, rollouts):
    right = controls.reference(policy, rollouts, EVERY_PREFIX)
    wrong = replace(rollouts, references=("14", "14"))
    other = controls.reference(policy, wrong, EVERY_PREFIX)
    # The sum is the change from before the first token to after the last, where 21 is likely.
    assert float(right[0].sum()) > float(other[0].sum()) + 1


SENTENCES = [[0, 1, 1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 0, 0, 0, 0]]


@pytest.fixture
def told(policy, monkeypatch):
    """Rows of 8 and 4 tokens in the sentences above, with values that are powers of two."""
    rollouts = written([[1] * 8, [1] * 4], group=2)
    monkeypatch.setattr(controls, "_sentences", lambda *_: torch.tensor(SENTENCES))
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 99, 99, 99, 99]])
    return rollouts, values


def test_spread_gives_every_token_an_equal_part_of_its_sentence(policy, told):
    found = controls.spread(policy, *told)
    assert found[0].tolist() == pytest.approx([1, *[14 / 3] * 3, 24, 24, 96, 96])
    assert found[1].tolist() == [1, 3, 3, 8, 0, 0, 0, 0]


def test_first_puts_the_sum_at_the_start_of_a_sentence(policy, told):
    found = controls.first(policy, *told)
    assert found.tolist() == [[1, 14, 0, 0, 48, 0, 192, 0], [1, 6, 0, 8, 0, 0, 0, 0]]


def test_reward_to_go_is_discounted(policy, told):
    rollouts, values = told
    found = controls.to_go(policy, rollouts, values)
    for i, n in enumerate((8, 4)):
        for t in range(n):
            expected = sum(0.8 ** (k - t) * float(values[i, k]) for k in range(t, n))
            assert float(found[i, t]) == pytest.approx(expected, rel=1e-5)
        assert not found[i, n:].any()


def test_sentences_begin_after_stops_and_tags(policy, rollouts):
    numbers = controls._sentences(policy, rollouts)[0].tolist()
    texts = shown(policy, rollouts)
    parts = ["".join(t for t, k in zip(texts, numbers) if k == j) for j in range(5)]
    assert parts == [
        "<think>", " That makes 14 + 7 = 21 stamps.", " Check: 21 - 7 = 14, good.",
        "</think>", "<answer>",
    ]  # fmt: skip


def test_the_constant_is_on_every_token(rollouts):
    found = controls._constant(rollouts, 0.2, 0.05) - grpo(rollouts)
    expected = controls.CONSTANT * rollouts.completion_mask
    torch.testing.assert_close(found, expected.float())


def test_every_row_is_iapo_with_one_thing_replaced():
    use_methods("iapo_mini.lab.controls")
    try:
        tuned = {
            name: {"method": name, "learning_rate": rate}
            for rate, name in enumerate(("iapo", "iapo_ne", "grpo_kimi", "grpo_efficient"), 1)
        }
        tuned["iapo_sequence"] = {"method": "iapo", "aggregation": "sequence", "learning_rate": 9}
        rows = controls.rows_of(tuned)
        for name, settings in rows.items():
            config = TrainConfig(**settings)
            how = "sequence" if name.endswith("-sequence") else "token"
            assert config.recipe().aggregation == how
            of_its_own = settings["method"] in ("iapo_ne", "grpo_kimi", "grpo_efficient")
            if not of_its_own:
                assert settings["learning_rate"] == (9 if how == "sequence" else 1)
        assert len(rows) == 2 * len(controls.CONTROLS) + len(controls.PAYMENTS)
    finally:
        for name in controls.RECIPES:
            LIBRARY.pop(name, None)


def test_the_experiment_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "run_all", run_here)
    monkeypatch.setattr(controls, "SIZES", {"quick": TINY})
    monkeypatch.setattr(controls, "CONTROLS", ("grpo", "constant", "roles", "iapo"))
    monkeypatch.setattr(controls, "PAYMENTS", ("first", "roles_first"))
    settings = {"iapo": {"method": "iapo"}, "iapo_sequence": {"method": "iapo"}}
    monkeypatch.setattr(controls, "tuned", lambda *_: settings)
    options = {"out": tmp_path / "runs", "figures": tmp_path / "figures"}
    found = controls.controls("quick", **options)
    saved = json.loads(
        (tmp_path / "figures/results/controls_quick.json").read_text(encoding="utf-8")
    )
    assert saved == json.loads(json.dumps(found))
    for row in found["rows"].values():
        assert row.keys() == {"token", "sequence"}
        assert all(len(values["length"]) == 2 for values in row.values())
    gap = found["difference"]["constant"]["token"]["iapo"][0]
    means = [sum(found["rows"][name]["token"]["length"]) / 2 for name in ("constant", "iapo")]
    assert gap == pytest.approx(means[0] - means[1])
    lines = controls.controls_table(found).splitlines()
    assert len(lines) == 2 + 2 * 4 + 3 and all(line.count("|") == 7 for line in lines)
    assert (tmp_path / "figures/controls_quick.png").stat().st_size > 10_000
    for name in controls.RECIPES:
        LIBRARY.pop(name, None)


def test_every_control_is_judged_by_whether_iapo_is_shorter():
    assert set(controls.WHAT) == set(controls.CONTROLS) - {"iapo"}
    same = {"length": [30.0, 31.0, 32.0], "pass@1": [0.8, 0.8, 0.8]}
    longer = {"length": [60.0, 61.5, 62.0], "pass@1": [0.7, 0.7, 0.7]}
    shorter = {"length": [20.0, 20.5, 22.5], "pass@1": [0.8, 0.8, 0.8]}
    rows = {name: {"token": longer, "sequence": same} for name in controls.CONTROLS}
    rows["iapo"] = {"token": same, "sequence": same}
    rows["roles"] = {"token": same, "sequence": shorter}
    judged = {
        row[0].split(" gives")[0]: row[2:] for row in judge(controls.control_claims({"rows": rows}))
    }
    told, verdict = judged["token mean: s shuffled within the completion"]
    assert told.startswith("30.2 [") and told.endswith("; -0.100 [-0.100, -0.100]")
    assert verdict == "holds"
    assert judged["token mean: s from the known roles"][1] == "cannot tell"
    assert judged["sequence mean: s from the known roles"][1] == "does not hold"
    assert len(judged) == 2 * len(controls.WHAT)
