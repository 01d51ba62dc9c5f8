"""The study of the estimators: its statistics, its bookkeeping, its figures."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iapo_mini.lab import estimators
from iapo_mini.lab.exact import true_drops
from iapo_mini.lab.figures import estimators as figures
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import chain_of_thought, stories, token_roles

RESULTS = Path(__file__).parent.parent / "figures/results/estimator.json"


@pytest.fixture(scope="module")
def told():
    problems = list(itertools.islice(stories("tune", seed=7), 6))
    rng = random.Random(0)
    return problems, [chain_of_thought(p, rng) for p in problems]


def test_segments_of_tokens_have_the_roles_of_tokens(told):
    policy = load_policy(lora_rank=0)
    for chain in told[1]:
        ids = [*policy.tokenizer.encode("".join(s.text for s in chain)), int(policy.eos_ids[0])]
        index = estimators.token_segments(policy.tokenizer, chain, ids)
        assert index == sorted(index) and index[-1] == len(chain) - 1
        assert [chain[i].role for i in index] == token_roles(policy.tokenizer, ids)


def test_judging_the_embedded_policy(told):
    problems, chains = told
    found = estimators.judge(load_policy(lora_rank=0), problems, chains)
    assert set(found) == {"auc", "auc_token", "auc_by_steps", "spearman"}
    for section in ("auc", "auc_token", "spearman"):
        for name in estimators.ESTIMATORS:
            value, low, high = found[section][name]
            assert low <= value <= high
    # The estimators differ enough for six stories to show their order.
    auc = {name: found["auc"][name][0] for name in estimators.ESTIMATORS}
    assert auc["belief_shift"] > auc["entropy"] > 0.6 > auc["next_token"]


def test_scores_telescope(told):
    problems, chains = told
    rollouts, scores = estimators.token_scores(load_policy(lora_rank=0), problems, chains)
    assert set(scores) == set(estimators.ESTIMATORS)
    assert all(not v[~rollouts.completion_mask.numpy()].any() for v in scores.values())
    assert (scores["belief_shift"] >= -1e-6).all()
    assert scores["entropy"].sum(1).mean() > 1  # the answer is open before and settled after


def test_ceiling_is_the_auc_of_the_true_drops(told):
    problems, chains = told
    found = estimators.ceiling(problems, chains)
    drops = [d for p, c in zip(problems, chains) for d in true_drops(p, c)]
    assert 0.5 < found["auc"][0] <= 1.0 and min(drops) < max(drops)
    assert set(found["by_steps"]) == {str(len(p.steps)) for p in problems}


def test_figures_are_drawn_from_the_committed_results(tmp_path):
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    estimators.draw(results, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"estimator_{x}.png" for x in ("auc", "steps", "growth", "speed")}
    labels = [t.get_text() for t in figures.estimator_auc(results).axes[0].get_xticklabels()]
    assert labels == list(figures.ESTIMATOR_LABELS.values())


def test_command_refuses_too_few_stories():
    run = [sys.executable, "-m", "iapo_mini", "lab", "figures", "estimator", "--stories", "1"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "iapo-mini: stories must be at least 2, got 1\n"


def test_the_uncalibrated_policy_is_certain_where_the_embedded_one_is_not(told):
    problems, chains = told
    entropies = {}
    for name in ("embedded", "embedded-uncalibrated"):
        _, scores = estimators.token_scores(load_policy(name, lora_rank=0), problems, chains)
        entropies[name] = torch.tensor(scores["entropy"].sum(1)).mean()
    assert entropies["embedded"] > 2 * entropies["embedded-uncalibrated"]
