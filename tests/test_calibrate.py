"""The fine-tuning that calibrates forced early answers, and its loss."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from helpers import (
    TRIVIAL,
    assert_close_in_fp32,
    forced_logits,
    make_rollouts,
    perturb_lora,
    tiny_policy,
    unpadded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from iapo_mini import exit_training
from iapo_mini.calibration import calibrate
from iapo_mini.exit_training import Trunk, anchor_loss, exit_loss, forecast_targets
from iapo_mini.information import encode_postfix
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import chain_of_thought, stories
from iapo_mini.sampling import from_texts
from iapo_mini.tasks import Problem

# The exit loss


def trunk_of(policy, rollouts):
    """Prompts and completions, processed in one padded pass."""
    tokens = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    policy.model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return Trunk(cache, mask, positions)


def loss_of_whole_sequences(model, rollouts, after, postfix, answers):
    """The exit loss from one plain pass for each exit, with gradients through all of it."""
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
        found = exit_loss(policy.model, trunk, ends, postfix, answers)
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
    trunk = trunk_of(policy, rollouts)
    layers = trunk.cache.layers
    leaves = [x for layer in layers for x in (layer.keys, layer.values)]
    assert all(x.requires_grad for x in leaves)
    for x in leaves:
        x.retain_grad()
    sizes = [x.shape for x in leaves]
    after = torch.tensor([[0, 2], [1, 3]])
    ends = rollouts.prompt_ids.shape[1] - 1 + after
    answers = torch.tensor([11, 22])
    exit_loss(model, trunk, ends, postfix, answers).backward()
    assert all(x.grad is None for x in leaves)
    assert [x.shape for layer in layers for x in (layer.keys, layer.values)] == sizes
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
        cache = DynamicCache([(x.keys.clone(), x.values.clone()) for x in layers])
        held = replace(trunk, cache=cache)
        direction = gradient / gradient.norm()
        sides = []
        for sign in (1, -1):
            weight += sign * 1e-3 * direction
            sides.append(float(exit_loss(model, held, ends, postfix, answers)))
            weight -= sign * 1e-3 * direction
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_exit_loss_into_the_trunk_is_backpropagation_through_whole_sequences(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=0)
    model, postfix = policy.model, encode_postfix(policy)
    rollouts, answers = make_rollouts([4, 7], [5, 3], 1), torch.tensor([11, 22])
    after = torch.tensor([[0, 2], [1, 3]])
    ends = rollouts.prompt_ids.shape[1] - 1 + after
    trunk = trunk_of(policy, rollouts)
    exit_loss(model, trunk, ends, postfix, answers, into_trunk=True).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss_of_whole_sequences(model, rollouts, after, postfix, answers).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def losses_and_gradients(policy, td_lambda):
    """Both losses of a step of calibration after the weights have moved, and their gradients."""
    model = policy.model
    before = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    rollouts = make_rollouts([4, 7, 5], [5, 3, 9], 1)
    anchor, trunk = anchor_loss(model, before, rollouts)
    ends = rollouts.prompt_ids.shape[1] - 1 + torch.tensor([[0, 2], [1, 3], [5, 5]])
    early = exit_loss(
        model, trunk, ends, encode_postfix(policy), torch.tensor([11, 22, 33]),
        td_lambda=td_lambda, into_trunk=True,
    )  # fmt: skip
    model.zero_grad()
    (anchor + early).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return anchor.detach(), early.detach(), gradients


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("td_lambda", [1.0, 0.3])
def test_a_vocabulary_in_chunks_changes_nothing(tokenizer, monkeypatch, name, td_lambda):
    """With room for the logits of one row only, as a large vocabulary would have."""
    policy = tiny_policy(name, tokenizer, "eager" if name == "gemma2" else "sdpa")
    whole = losses_and_gradients(policy, td_lambda)
    monkeypatch.setattr(exit_training, "LOGITS_MB", 1e-6)
    chunked = losses_and_gradients(policy, td_lambda)
    for one, other in zip(whole[:2], chunked[:2]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for parameter, gradient in whole[2].items():
        assert_close_in_fp32(chunked[2][parameter], gradient)


def test_the_head_sees_only_what_fits(tokenizer, monkeypatch):
    """The logits of the prompts and of padding are never computed, the others row by row."""
    policy, seen = tiny_policy("llama", tokenizer), []
    policy.model(torch.tensor([[1, 2]]))  # so that what follows is only of the losses
    policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:-1].numel())
    )
    losses_and_gradients(policy, 0.3)
    probe = 2  # tokens of the pass that finds out whether the head stands alone
    assert max(seen) == 17 and sum(seen) == probe + 2 * 17 + 6  # old, new, and two exits a row
    seen.clear()
    monkeypatch.setattr(exit_training, "LOGITS_MB", 1e-6)
    losses_and_gradients(policy, 0.3)
    assert max(seen) == 2


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


def test_with_lambda_one_only_the_true_answer_counts(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=0)
    rollouts, postfix = make_rollouts([4, 7], [5, 3], 1), encode_postfix(policy)
    ends = rollouts.prompt_ids.shape[1] - 1 + torch.tensor([[0, 2, 4], [1, 2, 3]])
    answers = torch.tensor([11, 22])
    losses = [
        exit_loss(
            policy.model, trunk_of(policy, rollouts), ends, postfix, answers, td_lambda=td_lambda
        ).detach()
        for td_lambda in (1.0, 1.0 - 1e-6, 0.1)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)
    assert abs(float(losses[0] - losses[2])) > 0.01


def test_a_forecast_that_agrees_with_the_next_gets_no_gradient():
    """With a small lambda, only the last of three exits after one prefix gets a gradient."""
    logits = torch.randn(1, 1, 7).expand(1, 3, 7).clone().requires_grad_()
    targets = forecast_targets(logits, torch.tensor([2]), 1e-6)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)).backward()
    assert logits.grad[:, :2].abs().max() < 1e-5 < 0.01 < logits.grad[:, 2].abs().max()


# The fine-tune


def chains(n, seed=0):
    return list(itertools.islice(stories("train", seed=seed, max_steps=2), n))


def mean_exit_loss(policy, problems):
    """Loss of the true answer after prefixes spread over the chain, from plain passes."""
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


class Stop(Exception):
    pass


def until(problems, count):
    """The first problems, then an error, as when a process is stopped."""
    yield from problems[:count]
    raise Stop


def test_a_stopped_calibration_continues_to_the_same_numbers(tiny_folder, tmp_path):
    problems = chains(12)
    how = {"steps": 4, "batch_size": 3, "exits": 2, "progress": False}
    whole, stopped, resumed = (load_policy(tiny_folder, lora_rank=4) for _ in range(3))
    history = calibrate(whole, problems, **how)
    how |= {"folder": tmp_path / "calibration", "save_every": 2}
    with pytest.raises(Stop):
        calibrate(stopped, until(problems, 9), **how)
    assert calibrate(resumed, problems, **how) == history
    for name, parameter in whole.trainable().items():
        assert torch.equal(resumed.trainable()[name], parameter), name
    # A finished one is only read back.
    again = load_policy(tiny_folder, lora_rank=4)
    assert calibrate(again, problems, **how) == history
    assert torch.equal(*(next(iter(p.trainable().values())) for p in (again, whole)))


def test_a_folder_with_another_calibration_is_refused(tiny_folder, tmp_path):
    how = {"steps": 1, "batch_size": 2, "exits": 1, "folder": tmp_path, "progress": False}
    calibrate(load_policy(tiny_folder, lora_rank=4), chains(2), **how)
    with pytest.raises(ValueError, match=r"exits is 3, but the calibration in .* started with 1"):
        calibrate(load_policy(tiny_folder, lora_rank=4), chains(2), **(how | {"exits": 3}))


def test_a_folder_with_a_calibration_of_another_start_or_other_problems_is_refused(
    tiny_folder, tmp_path
):
    def again(adapter, told):
        start = perturb_lora(load_policy(tiny_folder, lora_rank=4), seed=adapter)
        return calibrate(
            start, stories("train", seed=told), steps=2, batch_size=2, folder=tmp_path,
            progress=False,
        )  # fmt: skip

    first = again(1, 0)
    assert again(1, 0) == first
    for adapter, told, named in ((7, 0, "weights"), (1, 9, "problems")):
        with pytest.raises(ValueError, match=f"{named} is .* but the calibration in"):
            again(adapter, told)


@pytest.mark.parametrize("model", ["gpt2", "mistral"])
def test_a_chain_that_the_model_can_not_read_is_refused(tokenizer, model):
    sizes = {"gpt2": {"n_positions": 200}, "mistral": {"sliding_window": 200}}[model]
    policy = tiny_policy(model, tokenizer, **sizes)
    texts = ["<think>" + " 1 + 1 = 2." * 40 + "</think><answer> 2</answer>"]
    with pytest.raises(ValueError, match=r"200 positions|at most 200 tokens"):
        calibrate(
            policy, [Problem("1 + 1?", "2")], texts=texts, steps=1, batch_size=1, progress=False
        )


def test_the_anchor_keeps_the_policy_close(schooled_folder):
    """A stronger anchor keeps the policy closer to its start."""
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
    with pytest.raises(ValueError, match=r"problems must be .* ran out at step 1 of 2"):
        calibrate(
            lora_policy, problems, steps=2, batch_size=2, exits=1, progress=False, texts=texts
        )


@pytest.mark.parametrize("td_lambda", [0, -0.5, 1.5])
def test_a_lambda_out_of_range_is_refused(lora_policy, td_lambda):
    with pytest.raises(ValueError, match=f"td_lambda must be .*, got {td_lambda}"):
        calibrate(lora_policy, chains(2), steps=1, batch_size=2, td_lambda=td_lambda)


def test_problems_without_a_chain_are_refused(lora_policy):
    problems = [Problem("1 + 1?", "2")] * 4
    with pytest.raises(ValueError, match="not stories, but texts is None"):
        calibrate(lora_policy, problems, steps=1, batch_size=2, exits=1, progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 0), ("exits", 0), ("save_every", 0), ("anchor", -1.0),
     ("learning_rate", float("nan")), ("learning_rate", 0.0), ("td_lambda", 0.0)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_before_any_step(base_policy, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        calibrate(base_policy, stories("train", seed=0), progress=False, **{name: value})


def test_a_policy_with_gradient_checkpointing_is_refused(tiny_folder):
    policy = load_policy(tiny_folder, lora_rank=4, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        calibrate(policy, stories("train", seed=0), steps=1, progress=False)


def test_a_loss_that_is_not_finite_makes_no_update(tiny_folder, monkeypatch):
    policy = load_policy(tiny_folder, lora_rank=4)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    broken = lambda *_, **__: torch.tensor(float("nan"), requires_grad=True)  # noqa: E731
    monkeypatch.setattr("iapo_mini.calibration.exit_loss", broken)
    with pytest.raises(FloatingPointError, match="not made"):
        calibrate(policy, stories("train", seed=0), steps=1, batch_size=2, progress=False)
    assert all(torch.equal(before[name], p) for name, p in policy.trainable().items())
