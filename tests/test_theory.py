"""The theory, compared with brute force, autograd and finite differences; and the command."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo_mini.advantages import normalize
from iapo_mini.cli import main
from iapo_mini.information import informativeness
from iapo_mini.lab import exact, theory, theory_stories, worlds
from iapo_mini.lab.exact import every_string, strings_of
from iapo_mini.logprobs import token_logprobs
from iapo_mini.problems.stories import stories
from iapo_mini.sampling import sample

RESULTS = Path(__file__).parent.parent / "figures/results/theory.json"
COMPLETIONS = st.lists(
    st.lists(st.integers(0, 2), max_size=3).map(tuple), min_size=1, max_size=12, unique=True
)


def drawn(completions, seed=0, count=2, answers=3):
    """Worlds with the given completions: strings, ``count`` random logits, and answers."""
    strings = strings_of(completions, 3)
    generator = torch.Generator().manual_seed(seed)
    theta = worlds.random_logits(strings, count, generator)
    size = (count, len(completions), answers)
    return strings, theta, torch.rand(size, generator=generator, dtype=torch.float64).softmax(-1)


class Tree:
    """The same world as dictionaries: the tokens after each prefix, and their probabilities."""

    def __init__(self, completions, theta, answers, symbols=3):
        ended = [(*c, symbols) for c in completions]
        known = sorted({o[:t] for o in ended for t in range(len(o))}, key=lambda p: (len(p), p))
        self.policy = {}
        for n, prefix in enumerate(known):
            following = {o[len(prefix)] for o in ended if o[: len(prefix)] == prefix}
            total = sum(math.exp(theta[n, a]) for a in following)
            self.policy |= {(prefix, a): math.exp(theta[n, a]) / total for a in following}
        self.p = {o: math.prod(self.policy[o[:t], o[t]] for t in range(len(o))) for o in ended}
        self.answers = dict(zip(ended, answers.tolist()))

    def entropy(self, prefix):
        passing = [o for o in self.p if o[: len(prefix)] == prefix]
        total = sum(self.p[o] for o in passing)
        belief = [sum(self.p[o] * y for o, y in zip(passing, ys)) / total
                  for ys in zip(*(self.answers[o] for o in passing))]  # fmt: skip
        return -sum(b * math.log(b) for b in belief if b > 0)


@settings(max_examples=30)
@given(COMPLETIONS, st.integers(0, 99))
def test_probabilities_lengths_and_drops_by_brute_force(completions, seed):
    strings, theta, answers = drawn(completions, seed)
    logprobs = exact.string_logprobs(strings, theta)
    drops = exact.string_drops(strings, theta, answers)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert not drops[:, ~strings.mask].any()
    assert strings.lengths.tolist() == [len(c) + 1 for c in completions]
    for world in range(2):
        tree = Tree(completions, theta[world], answers[world])
        assert logprobs[world].exp().tolist() == pytest.approx(list(tree.p.values()))
        length = sum(p * len(o) for o, p in tree.p.items())
        assert float(theory.expected_length(strings, theta)[world]) == pytest.approx(length)
        for i, o in enumerate(tree.p):
            h = [tree.entropy(o[:t]) for t in range(len(o) + 1)]
            expected = [before - after for before, after in itertools.pairwise(h)]
            assert drops[world, i, : len(o)].tolist() == pytest.approx(expected, abs=1e-12)


def test_drops_are_information_on_average():
    strings, theta, answers = worlds.random_worlds(5, 0)
    p = exact.string_logprobs(strings, theta).exp()
    drops = exact.string_drops(strings, theta, answers)
    assert drops.min() < -0.05
    for n in range(strings.passes.shape[1]):  # mean over the token after a prefix: I >= 0
        here = (strings.prefixes == n) & strings.mask
        assert ((p[..., None] * drops * here).sum((-2, -1)) > -1e-12).all()


@pytest.mark.parametrize(
    ("completions", "symbols"), [([], 2), ([(0,), (0,)], 2), ([(2,)], 2), ([(-1,)], 2)]
)
def test_bad_completions_are_refused(completions, symbols):
    with pytest.raises(ValueError, match=r"completions must"):
        strings_of(completions, symbols)


@settings(max_examples=20)
@given(COMPLETIONS, st.integers(0, 99))
def test_policy_gradient_by_autograd(completions, seed):
    strings, theta, _ = drawn(completions, seed)
    weights = torch.randn(2, *strings.mask.shape, dtype=torch.float64)
    leaf = theta.clone().requires_grad_()
    logs = exact.log_policy(strings, leaf)[..., strings.prefixes, strings.tokens]
    logs = torch.where(strings.mask, logs, 0.0)
    p = exact.string_logprobs(strings, theta).exp()
    (expected,) = torch.autograd.grad((p[..., None] * weights * logs).sum(), leaf)
    found = exact.policy_gradient(strings, theta, weights)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert not found[:, ~strings.allowed].any()


@settings(max_examples=20)
@given(COMPLETIONS, st.integers(0, 99))
def test_added_score_and_change_of_length_by_finite_differences(completions, seed):
    strings, theta, _ = drawn(completions, seed)
    change, h = torch.randn_like(theta) * strings.allowed, 1e-5
    up, down = (exact.string_logprobs(strings, theta + x * change) for x in (h, -h))
    score = exact.added_score(strings, theta, change)
    torch.testing.assert_close(score, (up - down) / (2 * h), atol=1e-8, rtol=1e-6)
    p = exact.string_logprobs(strings, theta).exp()
    torch.testing.assert_close((p * score).sum(-1), torch.zeros(2).double())  # E[S] = 0
    _, predicted = theory.length_change(strings, theta, change)
    slope = theory.expected_length(strings, theta + h * change)
    slope = (slope - theory.expected_length(strings, theta - h * change)) / (2 * h)
    torch.testing.assert_close(predicted, slope, atol=1e-8, rtol=1e-6)


def test_directions_are_the_gradients_of_the_objectives():
    strings, theta, answers = worlds.random_worlds(3, 1)
    p = exact.string_logprobs(strings, theta).exp()
    right = answers[..., 0]
    mean = (p * right).sum(-1, keepdim=True)
    # An infinite group: each (completion, answer) pair has its probability as weight.
    std = (p * (right * (1 - mean) ** 2 + (1 - right) * mean**2)).sum(-1, keepdim=True).sqrt()
    advantage = (right * (1 - mean) - (1 - right) * mean) / std
    leaf = theta.clone().requires_grad_()
    objective = p * advantage / strings.lengths * exact.string_logprobs(strings, leaf)
    (expected,) = torch.autograd.grad(objective.sum(), leaf)
    found = theory.reward_direction(strings, theta, answers)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)

    values = theory.normalized_drops(strings, theta, answers)
    assert values.sum(-1).abs().max() < 1e-5  # norm: mean 0 within every completion
    drops = exact.string_drops(strings, theta, answers)
    row = normalize(drops[0, -1][strings.mask[-1]].float())
    torch.testing.assert_close(values[0, -1][strings.mask[-1]], row.double())
    found = theory.token_direction(strings, theta, values)
    expected = exact.policy_gradient(strings, theta, values / strings.lengths[:, None])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_theorem_error_halves_with_the_step(seed):
    strings, theta, answers = worlds.random_worlds(20, seed)
    added = theory.token_direction(strings, theta, theory.normalized_drops(strings, theta, answers))
    errors = []
    for eta in (0.1, 0.05, 0.025):
        measured, predicted = theory.length_change(strings, theta, eta * added)
        errors.append(float((measured - predicted).norm() / predicted.norm()))
    assert errors[0] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_agreement_finds_slope_and_order():
    def change(seed, eta):
        predicted = eta * torch.arange(1.0, 5.0, dtype=torch.float64)
        return predicted * (1 + 0.3 * eta**2), predicted

    found = theory.agreement(change, 3)
    for eta, slope, error in zip(theory.ETAS, found["slope"], found["error"]):
        assert slope == pytest.approx((1 + 0.3 * eta**2,) * 3)
        assert error == pytest.approx((0.3 * eta**2,) * 3)
    assert found["order"] == pytest.approx((2.0,) * 3)
    assert set(found["points"]) == {"0.1", "10.0"}


def test_clue_and_filler_worlds_by_hand():
    strings, theta, answers = worlds.clue_worlds(2, 0)
    even = torch.zeros_like(theta)
    even[..., 2] = -60  # hardly ever stops early, so the posterior is that of fair bits
    whole = exact.string_drops(strings, even, answers).sum(-1)
    m = strings.lengths - 1
    torch.testing.assert_close(whole, (m * math.log(2)).expand(2, -1), atol=1e-6, rtol=1e-6)
    assert answers.shape == (2, 31, 16) and torch.allclose(answers.sum(-1), torch.ones(()).double())

    strings, theta, answers = worlds.filler_worlds(2, 0)
    whole = exact.string_drops(strings, theta, answers).sum(-1)
    torch.testing.assert_close(whole, whole[:, :1].expand_as(whole))  # all tell the same
    assert strings.lengths.unique().tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_corollary_in_the_tables():
    found = theory.corollary_tables(theory.SIZES["quick"])
    assert found["filler"]["premise"][0] == found["filler"]["shorter"][0] == 1
    assert found["filler"]["change"][0] < 0 < found["clue"]["change"][0]
    assert found["clue"]["premise"][0] == 0 and found["clue"]["shorter"][0] < 0.1
    assert found["random"]["premise"][0] == 1 and found["random"]["covariance"][0] < 0


def test_statistics_within_stories():
    # The second of two stories is longer and more informative, which must not matter.
    lengths = torch.tensor([10, 20, 30, 110, 120, 130])
    information = torch.tensor([1.0, 1.0, 1.0, 11.0, 12.0, 13.0])
    steps = torch.tensor([2, 2, 2, 4, 4, 4])
    found = theory_stories.story_statistics(lengths, information, steps, 3)
    x = torch.tensor([-10.0, 0, 10, -10, 0, 10]).double()
    y = torch.tensor([0.1, 0.05, 1 / 30, 0.1, 0.1, 0.1]).double()
    y[:3] -= y[:3].mean()
    y[3:] -= 0.1
    assert found["covariance"] == pytest.approx(float((x * y).sum()) / 4)
    assert found["slope"] == pytest.approx(float((x * y).sum() / (x * x).sum()))
    assert found["by_steps"]["2"] < -0.9 and found["by_steps"]["4"] == pytest.approx(0, abs=1e-6)
    assert found["total"] == pytest.approx(math.sqrt(0.5))
    assert found["spread"] == pytest.approx(math.sqrt(2 / 4))


def test_seeds_become_intervals_of_shared_keys():
    found = theory_stories.over_seeds(
        [{"a": 1.0, "b": {"x": 1.0, "y": 2.0}}, {"a": 3.0, "b": {"x": 5.0}}]
    )
    assert found["a"][0] == 2.0 and found["b"]["x"][0] == 3.0 and set(found["b"]) == {"x"}


def test_direction_of_a_language_model_by_finite_differences(base_policy):
    problems = list(itertools.islice(stories("tune"), 2))
    rollouts = sample(base_policy, problems, num_generations=3, max_completion_length=12, seed=0)
    potential = torch.rand(6, rollouts.completion_ids.shape[1] + 1)
    s = informativeness(potential, rollouts.completion_mask)
    rollouts = rollouts.filled(informativeness=s)
    before = {name: p.clone() for name, p in base_policy.trainable().items()}
    direction = theory_stories.information_gradient(base_policy, rollouts)
    values = normalize(rollouts.informativeness, rollouts.completion_mask)

    def objective():
        logprobs, _ = token_logprobs(base_policy.model, rollouts)
        return float(((values * logprobs).sum(1) / rollouts.lengths).mean())

    norm = math.sqrt(sum(float(g.square().sum()) for g in direction.values()))
    h = 0.01 / norm
    up, down = (theory_stories.at(base_policy, direction, x, objective) for x in (h, -h))
    assert (up - down) / (2 * h) == pytest.approx(norm**2, rel=0.02)
    assert all(torch.equal(p, before[name]) for name, p in base_policy.trainable().items())


def test_predicted_change_of_a_language_model_is_its_covariance(stopping_policy):
    """Compared with a reweighting of the same completions by their new probabilities."""
    policy, problems = stopping_policy, list(itertools.islice(stories("tune"), 2))
    rollouts = sample(policy, problems, seed=5)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator) for name, p in policy.trainable().items()
    }
    _, predicted = theory_stories.policy_length_change(
        policy, direction, problems, rollouts, 5, nats=0.5
    )

    def logprobs():
        return token_logprobs(policy.model, rollouts)[0].double().sum(1)

    norm = math.sqrt(sum(float(g.square().sum()) for g in direction.values()))
    with torch.no_grad():
        now = logprobs()
    score = (theory_stories.at(policy, direction, 1e-3 / norm, logprobs) - now).view(2, 8)
    score = score - score.mean(1, keepdim=True)
    score = 0.5 * score / score.square().mean().sqrt()  # one step of 0.5 nats
    lengths = rollouts.lengths.double().view(2, 8)
    assert lengths.std() > 1
    expected = [torch.cov(torch.stack([s, n]))[0, 1] for s, n in zip(score, lengths)]
    assert predicted == pytest.approx(float(sum(expected) / 2), rel=0.05, abs=0.02)


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(2, 9), st.booleans())
def test_entropy_change_by_finite_differences(seed, choices, natural):
    generator = torch.Generator().manual_seed(seed)
    logits, advantages = torch.randn(2, 3, choices, generator=generator, dtype=torch.float64)
    h = 1e-5
    up, _ = theory.entropy_change(logits, advantages, h, natural)
    down, _ = theory.entropy_change(logits, advantages, -h, natural)
    _, predicted = theory.entropy_change(logits, advantages, 1.0, natural)
    torch.testing.assert_close((up - down) / (2 * h), predicted, atol=1e-8, rtol=1e-6)
    # The plain gradient of E[A] is the Fisher matrix times the natural step A.
    p = logits.softmax(-1)
    fisher = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    leaf = logits.clone().requires_grad_()
    (plain,) = torch.autograd.grad((leaf.softmax(-1) * advantages).sum(), leaf)
    torch.testing.assert_close((fisher @ advantages[..., None])[..., 0], plain)
    _, by_plain = theory.entropy_change(logits, plain, 1.0, natural=True)
    _, asked = theory.entropy_change(logits, advantages, 1.0, natural=False)
    torch.testing.assert_close(by_plain, asked)


@given(st.integers(0, 999), st.integers(2, 9))
def test_confidence_lowers_entropy_and_its_opposite_raises_it(seed, choices):
    logits = torch.randn(choices, generator=torch.Generator().manual_seed(seed)).double()
    p = logits.softmax(-1)
    _, falls = theory.entropy_change(logits, p, 0.01)
    _, rises = theory.entropy_change(logits, -p, 0.01)
    assert falls < 0 < rises


def test_entropy_of_completions_by_finite_differences():
    strings, theta, _ = worlds.random_worlds(4, 3)
    change, h = torch.randn_like(theta) * strings.allowed, 1e-5
    up, _ = theory.completion_entropy_change(strings, theta, h * change)
    down, _ = theory.completion_entropy_change(strings, theta, -h * change)
    _, predicted = theory.completion_entropy_change(strings, theta, change)
    torch.testing.assert_close((up - down) / (2 * h), predicted, atol=1e-8, rtol=1e-6)
    uniform = torch.zeros_like(theta)
    p = exact.string_logprobs(strings, uniform).exp()
    peaked = 40 * torch.nn.functional.one_hot(torch.tensor(2), 3).double().expand_as(theta)
    measured, _ = theory.completion_entropy_change(strings, uniform, peaked)
    torch.testing.assert_close(measured, -exact.entropy(p))  # all mass on ending at once


def test_every_string_counts():
    assert len(every_string(3, 2)) == 1 + 3 + 9 and every_string(2, 2, 2) == [
        (0, 0), (0, 1), (1, 0), (1, 1)
    ]  # fmt: skip


def test_command_writes_results_and_figures(tmp_path):
    arguments = ["--preset", "quick", "--figures", str(tmp_path), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "iapo_mini", "lab", "theory", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results/theory_quick.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    results = json.loads(text)
    assert results["preset"]["name"] == "quick" and results["versions"]["torch"]
    slope, low, high = results["theorem"]["informativeness"]["slope"][0]
    assert low <= slope <= high and slope == pytest.approx(1, abs=0.01)
    assert results["theorem"]["informativeness"]["order"][0] == pytest.approx(1, abs=0.1)
    assert results["exploration"]["plus"]["right_sign"][0] == 1
    assert results["corollary"]["stories"]["correlation"][0] < 0
    assert theory.summary(results) in done.stdout
    for name in ("theorem", "corollary", "exploration"):
        assert (tmp_path / f"theory_{name}_quick.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "huge"], "preset must be one of quick, full, got 'huge'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--figures", "file"], "figures must be a folder you may write to, got 'file/results'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as done:
        main(["lab", "theory", *arguments])
    stderr = capsys.readouterr().err
    assert done.value.code == 2
    assert stderr.startswith("iapo-mini: " + sentence) and stderr.count("\n") == 1


def test_committed_results_hold_what_they_promise():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["preset"]["name"] == "full" and results["preset"]["seeds"] == 5
    found = results["theorem"]
    for direction in ("informativeness", "control"):
        errors = [mean for mean, _, _ in found[direction]["error"]]
        assert errors == sorted(errors) and errors[0] < 1e-3
        assert found[direction]["slope"][0][0] == pytest.approx(1, abs=1e-3)
    low, high = found["informativeness"]["order"][1:]
    assert 0.95 < low < high < 1.05
    tables = results["corollary"]["tables"]
    assert tables["filler"]["change"][2] < 0 < tables["clue"]["change"][1]
    assert results["corollary"]["stories"]["correlation"][2] < 0
    assert len(theory.summary(results).splitlines()) > 20


def test_figures_are_drawn_from_the_committed_results(tmp_path):
    theory.draw(json.loads(RESULTS.read_text(encoding="utf-8")), tmp_path)
    assert len(list(tmp_path.glob("theory_*.png"))) == 3
