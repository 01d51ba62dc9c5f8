"""The supervised start of a real model, on the embedded policy."""

import itertools

import pytest
import torch

from iapo_mini.chat import render_prompt
from iapo_mini.information import encode_postfix
from iapo_mini.lab import warm_start as module
from iapo_mini.lab.school import LEVELS, Worked, worked_stories
from iapo_mini.lab.warm_start import WarmStart, completion_tokens, warm_start
from iapo_mini.policy import load_policy
from iapo_mini.tasks import Problem

pytest.importorskip("accelerate", reason="transformers' trainer needs accelerate")

HOW = {"steps": 4, "batch_size": 2, "lora_rank": 4, "levels": LEVELS[:1], "save_every": 2}


def test_the_closing_tags_are_those_that_force_an_answer(base_policy):
    ids = completion_tokens(base_policy, Worked(Problem("1 + 1?", "2"), "1 + 1 = 2."))
    tags = encode_postfix(base_policy).tolist()
    starts = [i for i in range(len(ids)) if ids[i : i + len(tags)] == tags]
    assert len(starts) == 1 and ids[-1] == int(base_policy.eos_ids[0])
    text = base_policy.tokenizer.decode(ids[:-1])
    assert text == "<think>1 + 1 = 2.</think><answer>2</answer>"


def test_it_learns_and_is_made_once(schooled_folder, tmp_path):
    how = WarmStart(schooled_folder, learning_rate=5e-3, **(HOW | {"steps": 30}))
    found = warm_start(tmp_path / "start", how)
    losses = [loss for _, loss in found["loss"]]
    assert [step for step, _ in found["loss"]] == [10, 20, 30] and losses[-1] < 0.9 * losses[0]
    assert found["minutes"] > 0 and found["settings"]["steps"] == 30
    merged = load_policy(str(tmp_path / "start" / "model"), lora_rank=0)
    adapted = load_policy(adapter=tmp_path / "start" / "adapter")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        found_logits, expected = (policy.model.eval()(ids).logits for policy in (merged, adapted))
        base = load_policy(schooled_folder, lora_rank=0).model(ids).logits
    torch.testing.assert_close(found_logits, expected, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(found_logits, base, atol=0.1)
    made = (tmp_path / "start" / "model" / "config.json").stat().st_mtime_ns
    assert warm_start(tmp_path / "start", how) == found
    assert (tmp_path / "start" / "model" / "config.json").stat().st_mtime_ns == made


class Stop(Exception):
    pass


def test_a_stopped_one_continues_to_the_same_weights(tiny_folder, tmp_path, monkeypatch):
    how = WarmStart(tiny_folder, **HOW)
    warm_start(tmp_path / "whole", how)
    step = module._Supervised.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stop
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module._Supervised, "training_step", stopping)
        with pytest.raises(Stop):
            warm_start(tmp_path / "stopped", how)
    # A kill while a checkpoint is written leaves one without its state.
    (tmp_path / "stopped" / "checkpoints" / "checkpoint-3").mkdir()
    warm_start(tmp_path / "stopped", how)
    one, other = (
        load_policy(adapter=tmp_path / name / "adapter").trainable()
        for name in ("whole", "stopped")
    )
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name


def test_other_settings_are_refused(tmp_path, tiny_folder):
    warm_start(tmp_path, WarmStart(tiny_folder, **(HOW | {"steps": 1})))
    with pytest.raises(ValueError, match=r"steps is 2, but the warm start in .* started with 1"):
        warm_start(tmp_path, WarmStart(tiny_folder, **(HOW | {"steps": 2})))


def test_a_loss_is_that_of_the_completions_alone(base_policy):
    worked = list(itertools.islice(worked_stories("train", 0, LEVELS[:2]), 2))
    expected, count = 0.0, 0
    for row in worked:
        prompt = base_policy.tokenizer.encode(render_prompt(base_policy.tokenizer, row.problem))
        ids = completion_tokens(base_policy, row)
        log_p = base_policy.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        expected -= sum(float(log_p[i, token]) for i, token in zip(at, ids))
        count += len(ids)
    batch = module.collated(base_policy, worked)
    loss = module.supervised_loss(base_policy.model, batch)
    assert float(loss) == pytest.approx(expected / count, abs=1e-4)
