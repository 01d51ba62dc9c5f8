"""The rollouts that a step uses, and the tokens that are in its loss."""

from dataclasses import replace

import pytest
import torch
from helpers import content, make_rollouts, metrics, run

from iapo_mini import trainer
from iapo_mini.advantages import sgrpo, sgrpo_tokens
from iapo_mini.callbacks import Callback
from iapo_mini.objective import policy_loss
from iapo_mini.policy import load_policy
from iapo_mini.recipes import RECIPES, Recipe
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem
from iapo_mini.trainer import collect

GROUP = 2


def outcomes(monkeypatch, config, rounds, *right):
    """Run ``collect`` on batches of groups with given numbers of right completions."""
    asked = []

    def drawn(policy, batch, **how):
        asked.append(([problem.question for problem in batch], how["seed"]))
        return make_rollouts([3] * len(batch), [2 + len(asked)] * GROUP * len(batch), GROUP)

    def judged(rollouts, tokenizer, batch, how):
        counts = right[len(asked) - 1]
        correct = torch.tensor([j < n for n in counts for j in range(GROUP)])
        rollouts = replace(
            rollouts, references=tuple(p.answer for p in batch for _ in range(GROUP))
        )
        return rollouts.filled(correct=correct, rewards=correct.float())

    class Anyone:
        tokenizer = None

    monkeypatch.setattr(trainer, "score", judged)
    monkeypatch.setitem(RECIPES, "mine", Recipe("grpo", sampling_rounds=rounds))
    config = replace(config, method="mine", prompts_per_step=3, num_generations=GROUP)
    problems = [Problem(f"q{i}", f"a{i}") for i in range(3 * rounds)]
    rollouts, kept, sampled = collect(Anyone(), problems, drawn, config, step=4)
    assert len({seed for _, seed in asked}) == len(asked)  # no round repeats another
    assert [q for questions, _ in asked for q in questions] == [
        f"q{i}" for i in range(3 * len(asked))
    ]
    assert len(rollouts.rewards) == GROUP * len(kept)
    assert rollouts.references == tuple(p.answer for p in kept for _ in range(GROUP))
    return [p.question for p in kept], sampled, rollouts


def test_without_dynamic_sampling_every_group_is_taken(monkeypatch, config):
    names, sampled, _ = outcomes(monkeypatch, config, 1, [0, 2, 1])
    assert names == ["q0", "q1", "q2"] and sampled == 6


def test_groups_that_are_all_right_or_all_wrong_are_replaced(monkeypatch, config):
    names, sampled, rollouts = outcomes(monkeypatch, config, 3, [1, 0, 1], [2, 1, 1])
    assert names == ["q0", "q2", "q4"] and sampled == 12
    assert rollouts.lengths.tolist() == [3, 3, 3, 3, 4, 4]


def test_sampling_ends_with_the_last_round(monkeypatch, config):
    names, sampled, _ = outcomes(monkeypatch, config, 2, [0, 0, 1], [2, 2, 2])
    assert names == ["q2"] and sampled == 12


def test_if_no_group_is_mixed_the_last_round_is_used(monkeypatch, config):
    names, sampled, _ = outcomes(monkeypatch, config, 2, [0, 0, 2], [2, 2, 2])
    assert names == ["q3", "q4", "q5"] and sampled == 12


def test_a_run_with_dynamic_sampling_resumes_to_the_same_numbers(config, tmp_path):
    config = replace(config, method="dapo", max_steps=4, save_steps=1)
    run(config, tmp_path / "whole")
    assert all(row["sampled"] >= 4 for row in metrics(tmp_path / "whole"))
    assert any(row["sampled"] > 4 for row in metrics(tmp_path / "whole"))

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", callbacks=[Callback(stop)])
    run(config, tmp_path / "cut", resume=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("micro_batch_size", [2, 100])
def test_tokens_that_are_not_counted_are_in_no_denominator(
    base_policy, config, monkeypatch, aggregation, micro_batch_size
):
    """The loss of a step equals its definition over the counted tokens alone."""
    problems = [Problem("What is 2 + 2?", "4"), Problem("What is 3 + 2?", "5")]
    rollouts = sample(base_policy, problems, num_generations=2, max_completion_length=9, seed=1)
    right = torch.tensor([True, False, True, False])
    rollouts = rollouts.filled(correct=right, rewards=right.float())
    alpha = 0.02  # three tokens always count, those up to the seventh by a coin
    advantages, counted = sgrpo(rollouts, alpha), sgrpo_tokens(rollouts, alpha)
    assert 0 < int(counted.sum()) < int(rollouts.completion_mask.sum())
    config = replace(
        config, method="sgrpo", alpha=alpha, aggregation=aggregation, kl_coef=0.0,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip
    # The old policy differs, so the ratio is not 1 and the loss is not the mean advantage.
    rollouts = replace(rollouts, old_logprobs=rollouts.old_logprobs - 0.1 * right[:, None])
    logprobs, _ = trainer.token_logprobs(base_policy.model, rollouts)
    ratio = (logprobs - rollouts.old_logprobs).exp().detach()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    rows = [surrogate[i][counted[i]] for i in range(4)]
    expected = torch.stack([row.mean() for row in rows]).mean()
    if aggregation == "token":
        expected = torch.cat(rows).mean()
    found = trainer._gradient(base_policy, rollouts, advantages, config)
    assert found["loss"] == pytest.approx(-float(expected), rel=1e-4)
    whole, _ = policy_loss(
        logprobs, rollouts.old_logprobs, advantages, rollouts.completion_mask,
        aggregation=aggregation,
    )  # fmt: skip
    assert found["loss"] != pytest.approx(float(whole.detach()), rel=1e-2)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_reference_of_a_part_that_begins_within_a_group_sees_its_own_prompts(
    tiny_folder, config, gradient_checkpointing
):
    """Before the first update the policy is the reference, so KL is 0 however rows are split."""
    policy = load_policy(
        tiny_folder, lora_rank=0, keep_reference=True, gradient_checkpointing=gradient_checkpointing
    )
    problems = [Problem("What is 2 + 2?", "4"), Problem("Ann has 3 apples and buys 2.", "5")]
    rollouts = sample(policy, problems, num_generations=6, max_completion_length=6, seed=1)
    rollouts = rollouts.filled(correct=torch.ones(12, dtype=torch.bool), rewards=torch.ones(12))
    config = replace(
        config, method="grpo", lora_rank=0, num_generations=6, micro_batch_size=4, kl_coef=0.1,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    advantages = torch.zeros(rollouts.completion_mask.shape)
    assert trainer._gradient(policy, rollouts, advantages, config)["kl"] == pytest.approx(
        0, abs=1e-6
    )
