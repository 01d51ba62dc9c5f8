"""Whether forced early answers can be trusted, and the fine-tune that makes them so."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from helpers import TRIVIAL, explicit_entropies, forced_logits, make_rollouts, tiny_policy, unpadded
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from iapo_mini import calibration as module
from iapo_mini.calibration import (
    calibrate,
    calibration,
    exit_calibration,
    exit_loss,
    forecast_targets,
)
from iapo_mini.information import encode_postfix
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import chain_of_thought, stories
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import Problem

# Calibration error


@pytest.mark.parametrize(
    ("confidence", "correct", "error"),
    [
        ([1.0] * 4, [1, 1, 1, 1], 0.0),
        ([0.0] * 4, [0, 0, 0, 0], 0.0),
        ([0.8] * 5, [1, 1, 1, 1, 0], 0.0),
        ([1.0] * 4, [1, 0, 1, 0], 0.5),
        ([0.5] * 4, [1, 1, 1, 1], 0.5),
        # Two bins: three at 0.9 with 1/3 right (gap 17/30), one at 0.1 that is right (gap 0.9).
        ([0.9, 0.9, 0.9, 0.1], [1, 0, 0, 1], 0.75 * (0.9 - 1 / 3) + 0.25 * 0.9),
        # Gaps of opposite sign in two bins do not cancel.
        ([0.75, 0.25], [0, 1], 0.75),
    ],
)
def test_calibration_error_by_hand(confidence, correct, error):
    found = expected_calibration_error(torch.tensor(confidence), torch.tensor(correct).bool())
    assert found == pytest.approx(error, abs=1e-6)


def test_calibration_error_with_one_bin_is_the_overall_gap():
    confidence, correct = torch.tensor([0.75, 0.25]), torch.tensor([False, True])
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.0)


# Forced answers along the chain


@pytest.mark.parametrize("parts", [1, 4])
def test_exit_calibration_asks_after_equal_parts(schooled_folder, parts):
    """Against explicit forwards, with references that the policy gives at some of the exits."""
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = sample(policy, TRIVIAL, num_generations=4, max_completion_length=12)
    answers = ["4", "5", "6", "7"] * 2
    found = exit_calibration(policy, rollouts, answers, parts=parts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        truth = policy.tokenizer.encode(f" {answers[i]}")
        for part in range(parts + 1):
            t = round(n * part / parts)  # halves go to the even neighbour, as in torch
            p = forced_logits(policy, rollouts, i, t, encode_postfix(policy))[-1].softmax(-1)
            h = float(torch.distributions.Categorical(p).entropy())
            assert float(found["confidence"][i, part]) == pytest.approx(float(p.max()), abs=1e-4)
            assert float(found["entropy"][i, part]) == pytest.approx(h, abs=1e-4)
            assert bool(found["correct"][i, part]) == ([int(p.argmax())] == truth)
    assert 0 < found["correct"].float().mean() < 1


def test_exits_of_short_completions(base_policy):
    """More parts than tokens: several exits follow the same prefix."""
    rollouts = make_rollouts([4, 9], [0, 1, 2, 6], group=2)
    found = exit_calibration(base_policy, rollouts, ["5"] * 4, parts=5)
    entropies = explicit_entropies(base_policy, rollouts)
    for i, n in enumerate(rollouts.lengths.tolist()):
        at = [round(n * part / 5) for part in range(6)]
        assert found["entropy"][i].tolist() == pytest.approx(entropies[i, at].tolist(), abs=1e-4)


@pytest.mark.parametrize("against", ["final", "truth"])
def test_calibration_judges_every_part_of_the_chain(schooled_folder, against):
    """Three completions to a prompt, with answers of their own and one without."""
    policy = load_policy(schooled_folder, lora_rank=0)
    problems = [*TRIVIAL, *itertools.islice(stories("test"), 3)]
    texts = [f"<think> {n}.</think><answer> {n}</answer>" for n in (4, 5, 6, 7)]
    texts = [*texts, texts[0].removesuffix("</answer>")] * 3
    rollouts = from_texts(policy, [p for p in problems for _ in range(3)], texts)
    rollouts = replace(rollouts, num_generations=3)
    found = calibration(policy, problems, rollouts=rollouts, against=against, parts=4)
    answers, kept = [p.answer for p in problems for _ in range(3)], list(range(15))
    if against == "final":
        answers = ["4", "5", "6", "7", "0"] * 3
        kept = [i for i in range(15) if i % 5 < 4]
    exits = exit_calibration(policy, rollouts, answers, parts=4)
    for name, values in found.exits.items():
        assert values.shape == (len(kept), 5)
        assert torch.equal(values, exits[name][kept])
    confidence, correct = (exits[name][kept] for name in ("confidence", "correct"))
    assert correct.any() and not correct.all()
    for t in range(5):
        error = expected_calibration_error(confidence[:, t], correct[:, t])
        assert found.ece_by_part[t] == pytest.approx(error)
        mean = float(exits["entropy"][kept, t].mean())
        assert found.entropy_by_part[t] == pytest.approx(mean, abs=1e-6)
    whole = expected_calibration_error(confidence.flatten(), correct.flatten())
    assert found.ece == pytest.approx(whole) and len(found.ece_by_part) == 5


def test_an_odd_answer_changes_nothing_for_other_rows(schooled_folder):
    policy = load_policy(schooled_folder, lora_rank=0)
    rollouts = from_texts(policy, TRIVIAL * 2, ["<think> 5."] * 4)
    plain = exit_calibration(policy, rollouts, ["4", "5", "6", "7"], parts=2)
    odd = exit_calibration(policy, rollouts, ["4", "5", "6", "3 1/2"], parts=2)
    assert plain["correct"][:3].any()
    for name, values in plain.items():
        assert torch.equal(odd[name][:3], values[:3]), name


def test_calibration_samples_when_given_no_completions(schooled_folder):
    policy = load_policy(schooled_folder, lora_rank=0)
    found = calibration(policy, TRIVIAL * 3, against="truth", parts=2, seed=1)
    rollouts = sample(policy, TRIVIAL * 3, num_generations=1, seed=1)
    again = calibration(policy, TRIVIAL * 3, rollouts=rollouts, against="truth", parts=2)
    assert found.exits["confidence"].shape == (6, 3)
    assert torch.equal(found.exits["confidence"], again.exits["confidence"])


@pytest.mark.parametrize(
    ("confidence", "accuracy", "advice"),
    [
        (0.95, 0.25, "sure of answers it does not know (by 0.70 on average)"),
        (0.25, 0.95, "doubts answers it does know (by 0.70 on average)"),
        (0.5, 0.5, "can be trusted"),
        (0.55, 0.5, "can be trusted"),
    ],
)
def test_advice(base_policy, monkeypatch, confidence, accuracy, advice):
    shape = (20, 3)

    def exits(policy, rollouts, answers, parts):
        correct = torch.arange(20)[:, None].expand(shape) < round(20 * accuracy)
        confidences = torch.full(shape, confidence)
        return {"confidence": confidences, "correct": correct, "entropy": torch.ones(shape)}

    monkeypatch.setattr(module, "exit_calibration", exits)
    rollouts = make_rollouts([3] * 20, [2] * 20, 1)
    found = calibration(base_policy, TRIVIAL * 10, rollouts=rollouts, against="truth", parts=2)
    assert advice in found.advice
    assert found.ece == pytest.approx(abs(confidence - accuracy), abs=1e-6)
    assert found.ece_by_part == pytest.approx([found.ece] * 3)
    assert found.entropy_by_part == [1.0] * 3
    assert ("calibrate()" in found.advice) == ("trusted" not in found.advice)


def test_calibration_draws_a_figure(base_policy):
    rollouts = from_texts(
        base_policy, TRIVIAL, [f"<think> hm</think><answer> {n}</answer>" for n in (5, 6)]
    )
    figure = calibration(base_policy, TRIVIAL, rollouts=rollouts, parts=2).figure()
    assert figure.axes


def test_bad_calibration_arguments_are_refused(base_policy):
    rollouts = from_texts(base_policy, TRIVIAL, ["hm", "well"])
    with pytest.raises(ValueError, match="against is 'both'"):
        calibration(base_policy, TRIVIAL, rollouts=rollouts, against="both")
    with pytest.raises(ValueError, match="no completion gives an answer"):
        calibration(base_policy, TRIVIAL, rollouts=rollouts)


# The exit loss


def trunk_of(policy, rollouts):
    """Cache, mask and positions of prompts and completions by one padded pass."""
    tokens = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    policy.model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache, mask, positions


def loss_of_whole_sequences(model, rollouts, after, postfix, answers):
    """The exit loss, one plain pass for each exit, gradients through all of it."""
    losses = []
    for i, row in enumerate(after.tolist()):
        prompt, completion = unpadded(rollouts, i)
        for t in row:
            ids = torch.cat([prompt, completion[:t], postfix])
            losses.append(-model(ids[None]).logits[0, -1].log_softmax(-1)[answers[i]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("name", "attention"), [("qwen2", "sdpa"), ("gpt2", "eager")])
def test_exit_loss_by_explicit_passes(tokenizer, name, attention):
    policy = tiny_policy(name, tokenizer, attention)
    rollouts = make_rollouts([4, 7], [5, 3], 1, left=1)
    width, after = rollouts.prompt_ids.shape[1], [[0, 2, 5], [1, 3, 3]]
    answers, postfix = torch.tensor([11, 22]), encode_postfix(policy)
    with torch.no_grad():
        ends = width - 1 + torch.tensor(after)
        trunk = trunk_of(policy, rollouts)
        found = exit_loss(policy.model, *trunk, ends, postfix, answers)
    losses = [
        -float(forced_logits(policy, rollouts, i, t, postfix)[-1].log_softmax(-1)[answers[i]])
        for i in range(2)
        for t in after[i]
    ]
    assert float(found) == pytest.approx(sum(losses) / 6, abs=1e-3)


def test_exit_loss_sends_no_gradient_into_the_trunk(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=0)
    model, postfix = policy.model, encode_postfix(policy)
    rollouts = make_rollouts([4, 7], [5, 3], 1)
    cache, mask, positions = trunk_of(policy, rollouts)
    leaves = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert all(x.requires_grad for x in leaves)
    for x in leaves:
        x.retain_grad()
    sizes = [x.shape for x in leaves]
    after = torch.tensor([[0, 2], [1, 3]])
    ends = rollouts.prompt_ids.shape[1] - 1 + after
    answers = torch.tensor([11, 22])
    exit_loss(model, cache, mask, positions, ends, postfix, answers).backward()
    assert all(x.grad is None for x in leaves)
    assert [x.shape for layer in cache.layers for x in (layer.keys, layer.values)] == sizes
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    # Backpropagation through whole sequences gives keys and values another gradient.
    model.zero_grad()
    loss_of_whole_sequences(model, rollouts, after, postfix, answers).backward()
    whole = {n: p.grad for n, p in model.named_parameters()}
    names = [n for n in found if n.endswith(("k_proj.weight", "v_proj.weight"))]
    assert len(names) == 4
    for name in names:
        assert found[name].any()
        assert (found[name] - whole[name]).norm() > 0.1 * whole[name].norm()
    # With the trunk's cache held constant, numerical derivatives agree with the gradient.
    weight = model.get_decoder().layers[0].self_attn.v_proj.weight
    gradient = found["model.layers.0.self_attn.v_proj.weight"]
    with torch.no_grad():
        held = DynamicCache([(x.keys.clone(), x.values.clone()) for x in cache.layers])
        direction = gradient / gradient.norm()
        sides = []
        for sign in (1, -1):
            weight += sign * 1e-3 * direction
            sides.append(float(exit_loss(model, held, mask, positions, ends, postfix, answers)))
            weight -= sign * 1e-3 * direction
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_exit_loss_into_the_trunk_is_backpropagation_through_whole_sequences(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=0)
    model, postfix = policy.model, encode_postfix(policy)
    rollouts, answers = make_rollouts([4, 7], [5, 3], 1), torch.tensor([11, 22])
    after = torch.tensor([[0, 2], [1, 3]])
    ends = rollouts.prompt_ids.shape[1] - 1 + after
    trunk = trunk_of(policy, rollouts)
    exit_loss(model, *trunk, ends, postfix, answers, into_trunk=True).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss_of_whole_sequences(model, rollouts, after, postfix, answers).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0.01, 1.0), st.integers(0, 99))
def test_forecast_targets_are_mixtures_of_what_comes_later(exits, td_lambda, seed):
    """G_j = sum_n (1 - lambda) lambda^(n-1) p_{j+n}, the rest of the weight on the truth."""
    torch.manual_seed(seed)
    logits, answers = 3 * torch.randn(2, exits, 5), torch.tensor([1, 4])
    found, p = forecast_targets(logits, answers, td_lambda), logits.softmax(-1)
    for b, j in itertools.product(range(2), range(exits)):
        later = range(1, exits - j)
        expected = sum((1 - td_lambda) * td_lambda ** (n - 1) * p[b, j + n] for n in later)
        truth = torch.eye(5)[answers[b]] * td_lambda ** len(later)
        torch.testing.assert_close(found[b, j], truth + expected)
    assert torch.equal(found[:, -1], torch.eye(5)[answers])
    torch.testing.assert_close(found.sum(-1), torch.ones(2, exits))


def test_with_lambda_one_only_the_truth_counts(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=0)
    rollouts, postfix = make_rollouts([4, 7], [5, 3], 1), encode_postfix(policy)
    ends = rollouts.prompt_ids.shape[1] - 1 + torch.tensor([[0, 2, 4], [1, 2, 3]])
    answers = torch.tensor([11, 22])
    losses = [
        exit_loss(
            policy.model, *trunk_of(policy, rollouts), ends, postfix, answers, td_lambda
        ).detach()
        for td_lambda in (1.0, 1.0 - 1e-6, 0.1)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)
    assert abs(float(losses[0] - losses[2])) > 0.01


def test_a_forecast_that_agrees_with_the_next_is_left_alone():
    """Only the last of three exits after the same prefix feels the truth when lambda is small."""
    logits = torch.randn(1, 1, 7).expand(1, 3, 7).clone().requires_grad_()
    targets = forecast_targets(logits, torch.tensor([2]), 1e-6)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)).backward()
    assert logits.grad[:, :2].abs().max() < 1e-5 < 0.01 < logits.grad[:, 2].abs().max()


# The fine-tune


def chains(n, seed=0):
    return list(itertools.islice(stories("train", seed=seed, max_steps=2), n))


def mean_exit_loss(policy, problems):
    """Loss of the true answer after prefixes spread over the chain, by plain passes."""
    rng, total = random.Random(1), []
    texts = ["".join(s.text for s in chain_of_thought(p, rng, 0.0)) for p in problems]
    rollouts = from_texts(policy, problems, texts)
    for i, problem in enumerate(problems):
        (answer,) = policy.tokenizer.encode(f" {problem.answer}")
        n = int(rollouts.lengths[i])
        for t in (0, n // 2, n):
            logits = forced_logits(policy, rollouts, i, t, encode_postfix(policy))[-1]
            total.append(-float(logits.log_softmax(-1)[answer]))
    return sum(total) / len(total)


def test_calibrating_lowers_the_exit_loss(schooled_folder):
    policy = load_policy(schooled_folder, lora_rank=0)
    problems = chains(12, seed=5)
    before = mean_exit_loss(policy, problems)
    history = calibrate(
        policy, stories("train", max_steps=2), steps=30, batch_size=4, exits=4,
        learning_rate=3e-3, progress=False,
    )  # fmt: skip
    assert [set(step) for step in history] == [{"kl", "exit_loss"}] * 30
    first, last = (sum(s["exit_loss"] for s in part) for part in (history[:5], history[-5:]))
    assert last < 0.8 * first
    assert mean_exit_loss(policy, problems) < 0.8 * before
    assert not policy.model.training


def test_only_the_adapter_moves(lora_policy):
    before = {n: p.detach().clone() for n, p in lora_policy.model.named_parameters()}
    calibrate(lora_policy, chains(8), steps=2, batch_size=4, exits=2, progress=False)
    moved = {n for n, p in lora_policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= set(lora_policy.trainable())
    assert all("lora_" in n for n in moved)


def test_equal_seeds_calibrate_alike(tiny_folder):
    runs = []
    for seed in (0, 0, 1):
        policy = load_policy(tiny_folder, lora_rank=4)
        runs.append(
            calibrate(policy, chains(6), steps=2, batch_size=3, exits=2, seed=seed, progress=False)
        )
    assert runs[0] == runs[1] != runs[2]


def test_the_anchor_holds(schooled_folder):
    """The stronger, the nearer the policy stays to what it was."""
    drift = []
    for anchor in (0.0, 100.0):
        policy = load_policy(schooled_folder, lora_rank=0)
        history = calibrate(
            policy, stories("train", max_steps=2), steps=20, batch_size=4, exits=2,
            learning_rate=1e-3, anchor=anchor, progress=False,
        )  # fmt: skip
        assert history[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # nothing has moved yet
        drift.append(history[-1]["kl"])
    assert 0 < drift[1] < 0.5 * drift[0], drift


def test_the_losses_of_a_step_by_explicit_passes(tiny_folder):
    text = "<think> 3.</think><answer> 5</answer>"
    problems = [TRIVIAL[0], next(stories("train"))]
    settings = {"batch_size": 2, "exits": 12, "seed": 4, "progress": False, "learning_rate": 0.05}
    before, now, goes_on = (load_policy(tiny_folder, lora_rank=0) for _ in range(3))
    (first,) = calibrate(now, problems, steps=1, texts=[text] * 2, **settings)
    # The second step of a longer run begins where the shorter one ended.
    second = calibrate(goes_on, problems * 2, steps=2, texts=[text] * 4, **settings)[1]

    rollouts = from_texts(before, problems, [text] * 2)
    kl = []
    for i in range(2):
        prompt, completion = unpadded(rollouts, i)
        with torch.no_grad():
            p, q = (
                policy.model(torch.cat([prompt, completion])[None]).logits[0].log_softmax(-1)
                for policy in (before, now)
            )
        at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        kl += (p.exp() * (p - q)).sum(-1)[at].tolist()
    assert second["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3) and second["kl"] > 1e-3
    rng, exits = random.Random(4), []
    for i, problem in enumerate(problems):
        (answer,) = before.tokenizer.encode(f" {problem.answer}")
        for _ in range(12):
            t = rng.randint(0, int(rollouts.lengths[i]))
            logits = forced_logits(before, rollouts, i, t, encode_postfix(before))[-1]
            exits.append(-float(logits.log_softmax(-1)[answer]))
    assert first["exit_loss"] == pytest.approx(sum(exits) / 24, abs=1e-3)


@pytest.mark.parametrize("texts", [None, ["<answer> 5</answer>"] * 3])
def test_running_out_of_problems_is_refused(lora_policy, texts):
    problems = chains(3) if texts is None else chains(4)
    with pytest.raises(ValueError, match="problems ran out at step 1 of 2"):
        calibrate(
            lora_policy, problems, steps=2, batch_size=2, exits=1, progress=False, texts=texts
        )


@pytest.mark.parametrize("td_lambda", [0, -0.5, 1.5])
def test_a_lambda_out_of_range_is_refused(lora_policy, td_lambda):
    with pytest.raises(ValueError, match=f"td_lambda is {td_lambda}; allowed are numbers above 0"):
        calibrate(lora_policy, chains(2), steps=1, batch_size=2, td_lambda=td_lambda)


def test_problems_without_a_chain_are_refused(lora_policy):
    problems = [Problem("1 + 1?", "2")] * 4
    with pytest.raises(ValueError, match="no stories and texts is None"):
        calibrate(lora_policy, problems, steps=1, batch_size=2, exits=1, progress=False)
