"""The supervised start of a real model, on the embedded policy."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from iapo_mini.chat import render_prompt
from iapo_mini.information import encode_postfix
from iapo_mini.lab import warm_start as module
from iapo_mini.lab.school import LEVELS, Worked, worked_stories
from iapo_mini.lab.warm_start import WarmStart, completion_tokens, warm_start
from iapo_mini.policies import EMBEDDED, SHIPPED
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


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    how = WarmStart(EMBEDDED, learning_rate=5e-3, **HOW)
    made = warm_start(folder / "here", how, folder / "results")
    return folder, how, made


def test_another_machine_gets_the_same_start_without_training(kept, tmp_path, monkeypatch):
    folder, how, made = kept
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("it was trained again"))
    assert warm_start(tmp_path / "there", how, folder / "results") == made
    here, there = weights_of(folder / "here"), weights_of(tmp_path / "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())
    plain = load_policy(EMBEDDED, lora_rank=0).model.state_dict()
    assert any(not torch.equal(weight, plain[name]) for name, weight in here.items())


def test_what_is_kept_is_small_and_names_no_folder_of_this_machine(kept):
    folder, _, _ = kept
    files = {path.name: path for path in (folder / "results").iterdir()}
    assert set(files) == {
        "adapter_model.safetensors", "adapter_config.json", "base.json", "warm_start.json"
    }  # fmt: skip
    weights = load_file(files.pop("adapter_model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for path in files.values():
        assert str(SHIPPED[EMBEDDED].parent) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("change", [{"steps": 1}, {"seed": 1}, {"model": "another"}])
def test_a_start_with_other_settings_or_weights_is_not_used_and_is_replaced(
    kept, tmp_path, change, tiny_folder
):
    folder, how, made = kept
    shutil.copytree(folder / "results", tmp_path / "results")
    if "model" in change:  # a folder whose name is that of the first model
        shutil.copytree(tiny_folder, tmp_path / how.model)
        change = {"model": str(tmp_path / how.model)}
    other = dataclasses.replace(how, **change)
    found = warm_start(tmp_path / "there", other, tmp_path / "results")
    assert found["loss"] != made["loss"]
    told = json.loads((tmp_path / "results/warm_start.json").read_text(encoding="utf-8"))
    assert told["loss"] == found["loss"]
    own = load_file(tmp_path / "results/adapter_model.safetensors")
    assert all(
        torch.equal(weight, own[name])
        for name, weight in load_file(tmp_path / "there/adapter/adapter_model.safetensors").items()
    )


@given(st.permutations(range(4)), st.integers(0, 2**16))
@settings(max_examples=20)
def test_the_exact_merge_does_not_depend_on_the_order_of_its_sums(tiny_folder, order, seed):
    """Machines add in different orders, and a sum in fp32 would depend on it."""
    policy = load_policy(tiny_folder, lora_rank=4)
    torch.manual_seed(seed)
    for weight in policy.trainable().values():
        weight.data = torch.randn(weight.shape).bfloat16().float()
    before = module.exactly_merged(policy).state_dict()
    for name, weight in policy.trainable().items():
        weight.data = weight.data[order] if ".lora_A." in name else weight.data[:, order]
    after = module.exactly_merged(policy).state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    naive = policy.merged().state_dict()
    assert all(torch.allclose(w, naive[name], atol=1e-4) for name, w in before.items())
