"""The study of early exit at inference: rules applied to chains, the control, files and figure."""

import itertools
import json

import pytest
import torch
from helpers import TRIVIAL, forced_logits, run_here

from iapo_mini.chat import continuation_ids
from iapo_mini.early_exit.question import Stopping
from iapo_mini.early_exit.reading import logits_entropy
from iapo_mini.early_exit.stopping import sample_until_sure
from iapo_mini.information import encode_postfix
from iapo_mini.lab import early_exit as study
from iapo_mini.lab.early_exit import (
    at_random,
    chains_of,
    chance_for,
    curve,
    early_exit_table,
    outcomes,
    read_everywhere,
)
from iapo_mini.lab.sizes import Size
from iapo_mini.lab.starts import STARTS
from iapo_mini.policies import EMBEDDED_CALIBRATED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.rewards import score
from iapo_mini.sampling import sample


@pytest.fixture(scope="module")
def policy(schooled_folder):
    return load_policy(schooled_folder, lora_rank=0)


def chain(**changes):
    """A wrong chain of 40 tokens, asked three times."""
    return {
        "story": 0, "correct": 0.0, "length": 40, "postfix": 2, "suffix": 5, "asked": [1, 10, 20],
        "entropy": [2.5, 0.9, 0.1], "answer": [7.0, 8.0, 8.0], "right": [0.1, 0.5, 0.75],
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("never", (0.0, 40.0, 0.0, False)),
        (3.0, (0.1, 6.0, 2.0, True)),
        (1.0, (0.5, 15.0, 4.0, True)),
        (0.9, (0.75, 25.0, 6.0, True)),
        (0.1, (0.0, 40.0, 6.0, False)),
        ("agree", (0.75, 25.0, 9.0, True)),
    ],
)
def test_a_rule_cuts_at_its_first_sure_question_and_pays_for_all_before(rule, expected):
    assert outcomes(chain(), rule) == expected


def test_answers_that_never_agree_leave_a_chain_whole():
    assert outcomes(chain(answer=[7.0, 8.0, 7.0]), "agree") == (0.0, 40.0, 9.0, False)
    assert outcomes(chain(asked=[], entropy=[], answer=[], right=[]), 2.0)[3] is False


def test_cutting_at_random_is_the_mean_over_all_places():
    p, right = 0.25, [0.1, 0.5, 0.75]
    weights = [p, p * (1 - p), p * (1 - p) ** 2, (1 - p) ** 3]
    found = at_random(chain(), p)
    assert found[0] == pytest.approx(sum(w * r for w, r in zip(weights, [*right, 0.0])))
    assert found[1] == pytest.approx(sum(w * n for w, n in zip(weights, [6, 15, 25, 40])))
    assert found[2] == pytest.approx(1 - (1 - p) ** 3)
    assert at_random(chain(), 0.0) == (0.0, 40.0, 0.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.66, 0.8])
def test_as_many_chains_are_cut_at_random_as_by_the_rule(share):
    empty = dict(asked=[], entropy=[], answer=[], right=[])
    chains = [chain(), chain(asked=[1, 2]), chain(asked=[3]), chain(), chain(**empty)]
    chance = chance_for(chains, share)
    cut = [1 - (1 - chance) ** len(c["asked"]) for c in chains]
    assert sum(cut) / 5 == pytest.approx(share, abs=1e-9)


def test_the_questions_are_those_of_plain_forward_passes(policy):
    problems = list(itertools.islice(stories("test"), 2))
    rollouts = score(sample(policy, problems, num_generations=2, seed=1, max_completion_length=12),
                     policy.tokenizer, problems)  # fmt: skip
    asked, values = read_everywhere(policy, rollouts)
    assert asked.any(1).all() and not asked[:, 0].any()
    for i, t in asked.nonzero().tolist():
        target = continuation_ids(policy.tokenizer, f" {rollouts.references[i]}</answer>")
        suffix = torch.cat([encode_postfix(policy), torch.tensor(target)])
        logits = forced_logits(policy, rollouts, i, t, suffix)[1:-1]
        log_p = torch.log_softmax(logits, -1)[torch.arange(2), target].sum()
        entropy, answer, right = values[i, t].tolist()
        assert entropy == pytest.approx(float(logits_entropy(logits[0])), abs=1e-4)
        assert answer == int(logits[0].argmax())
        assert right == pytest.approx(float(log_p.exp()), abs=1e-5)


def test_expected_accuracy_is_that_of_many_samples(policy):
    problems, group, rule = TRIVIAL[:1], 400, 1.3
    chains = chains_of(policy, problems, group, seed=0)
    rollouts, exits = sample_until_sure(
        policy, problems, Stopping(rule), num_generations=group, seed=0
    )
    rollouts = score(rollouts, policy.tokenizer, problems)
    right, _, asking, cut = map(torch.tensor, zip(*(outcomes(c, rule) for c in chains)))
    assert cut.tolist() == exits.cut.tolist() and cut.any()
    assert asking.tolist() == exits.tokens.tolist()
    found, expected = rollouts.correct[cut].double(), right[cut].double()
    error = (expected * (1 - expected)).sum().sqrt() / len(found)
    assert abs(found.mean() - expected.mean()) < 5 * error + 1e-3


@pytest.mark.parametrize("name", ["uncalibrated", "calibrated"])
def test_the_study_has_the_cuts_and_the_tokens_of_sampling_with_early_exit(name):
    """The shipped policies write every answer as one token, which the study relies on."""
    policy = load_policy(STARTS[name], lora_rank=0)
    problems = list(itertools.islice(stories("test"), 2))
    chains = chains_of(policy, problems, 3)
    for rule in (0.5, "agree"):
        rollouts, exits = sample_until_sure(policy, problems, Stopping(rule), num_generations=3)
        _, tokens, asking, cut = map(torch.tensor, zip(*(outcomes(c, rule) for c in chains)))
        assert cut.tolist() == exits.cut.tolist() and cut.any()
        assert asking.tolist() == exits.tokens.tolist()
        assert tokens.tolist() == rollouts.lengths.tolist()


SMALL = (Size((0,), 1, 2, prompts_per_step=1, num_generations=2, ks=(1, 2)), 3, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The study at the smallest size, with the shipped policies and one that was trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "run_all", run_here)
        patch.setitem(study.SIZES, "quick", SMALL)
        patch.setattr(study, "STARTS", {"calibrated": EMBEDDED_CALIBRATED})
        folder = tmp_path_factory.mktemp("early_exit")
        found = study.early_exit("quick", out=folder / "runs", figures=folder / "figures")
        yield found, folder


def test_the_study_writes_its_results_and_its_figure(results):
    found, folder = results
    kept = json.loads((folder / "figures/results/early_exit_quick.json").read_text("utf-8"))
    assert kept == json.loads(json.dumps(found))
    assert (folder / "figures/early_exit_quick.png").stat().st_size > 10_000
    assert set(found["policies"]) == {"calibrated", "iapo"} and found["seeds"] == [0]
    for rows in found["policies"].values():
        assert [row["rule"] for row in rows] == list(study.RULES)
        never, *numbers, _ = rows
        assert never["cut"] == never["asking"][0] == 0 and never["random"] is None
        lengths = [row["length"][0] for row in numbers]
        assert lengths == sorted(lengths, reverse=True) and lengths[-1] < never["length"][0]
        for row in rows:
            mean, low, high = row["pass@1"]
            assert -1e-9 <= low <= mean + 1e-9 and mean <= high + 1e-9 <= 1 + 2e-9
    table = early_exit_table(found)
    assert table.count("\n") == 1 + 2 * len(study.RULES)
    assert "| embedded, trained by IAPO | below 0.05 nats |" in table and "| agree |" in table


def test_finished_policies_are_not_measured_again(results, monkeypatch):
    found, folder = results
    monkeypatch.setitem(study.SIZES, "quick", SMALL)
    monkeypatch.setattr(study, "STARTS", {"calibrated": EMBEDDED_CALIBRATED})
    monkeypatch.setattr(study, "chains_of", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(study, "run_all", lambda *args: None)
    again = study.early_exit("quick", out=folder / "runs", figures=folder / "figures")
    assert again == found
    adapter = str(folder / "runs/quick/early_exit/iapo-0/train/final")
    given = study.early_exit(
        "quick", out=folder / "runs", figures=folder / "figures", adapter=adapter
    )
    assert given["policies"] == found["policies"] and given["seeds"] == []
    none = study.early_exit("quick", out=folder / "runs", figures=folder / "other", untrained=True)
    assert set(none["policies"]) == {"calibrated"}


def test_another_model_is_run_once_for_each_rule(results, schooled_folder, monkeypatch):
    _, folder = results
    monkeypatch.setitem(study.SIZES, "quick", SMALL)
    monkeypatch.setattr(study, "STARTS", {"calibrated": EMBEDDED_CALIBRATED})
    found = study.early_exit(
        "quick", out=folder / "runs", figures=folder / "other", untrained=True,
        model=schooled_folder,
    )  # fmt: skip
    assert [row["rule"] for row in found["real"]] == list(study.RULES_OF_A_MODEL)
    assert found["real"][0]["asking"] == [0.0, 0.0, 0.0]
    assert found["real"][1]["asking"][0] > 0
    assert "/" not in found["model"] and f"| {found['model']} | never |" in early_exit_table(found)


def test_another_model_is_asked_problems_of_a_file(results, schooled_folder, monkeypatch):
    _, folder = results
    monkeypatch.setitem(study.SIZES, "quick", SMALL)
    monkeypatch.setattr(study, "STARTS", {})
    monkeypatch.setattr(study, "OF_A_MODEL", (2, 3))
    monkeypatch.setattr(study, "RULES_OF_A_MODEL", ("never", 0.5, "agree"))
    asked, plain = [], study.evaluate
    monkeypatch.setattr(study, "evaluate", lambda *a, **b: asked.append((a, b)) or plain(*a, **b))
    path = folder / "own.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"So #### {n + 1}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    study.early_exit(
        "quick", out=folder / "file", figures=folder / "other", untrained=True,
        model=schooled_folder, data_file=str(path),
    )  # fmt: skip
    (_, problems), options = asked[0]
    assert [p.question for p in problems] == ["What is 0 + 1?", "What is 1 + 1?"]
    assert options["num_generations"] == min(SMALL[2], 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fast"}, "preset must be one of quick, full"),
        ({"adapter": "runs/x", "untrained": True}, "adapter must be empty with untrained"),
        ({"parallel": 0}, "parallel must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(study, "load_policy", lambda *args, **kwargs: pytest.fail("work"))
    with pytest.raises(ValueError, match=message):
        study.early_exit(**{"out": tmp_path / "o", "figures": tmp_path / "f"} | options)


def test_a_curve_has_intervals_over_stories():
    chains = [
        chain(story=s, correct=float(s % 2), right=[0.0, 0.0, float(s < 2)]) for s in range(4)
    ]
    rows = {row["rule"]: row for row in curve(chains)}
    assert rows["never"]["pass@1"][0] == 0.5 and rows[0.2]["pass@1"][0] == 0.5
    assert rows[0.2]["cut"] == 1 and rows[0.05]["cut"] == 0
    low, high = rows[0.2]["pass@1"][1:]
    assert 0 <= low < 0.5 < high <= 1
    assert rows[0.05]["random"]["pass@1"][0] == pytest.approx(0.5, abs=1e-6)
