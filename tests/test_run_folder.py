"""The folder of a run: what resuming holds on to beside the settings."""

import json
import os
import stat
from dataclasses import replace

import pytest
from helpers import content, run

from iapo_mini.policy import load_policy


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(2, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_goes_on_with_the_same_problems_under_another_spelling(
    config, questions, tmp_path, monkeypatch
):
    config = replace(config, data="gsm8k", data_file=str(questions), max_steps=2, save_steps=1)
    run(config, tmp_path / "whole")
    run(replace(config, max_steps=1), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    moved = replace(config, data_file="./questions.jsonl")
    run(moved, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_other_problems_under_the_same_name_are_refused(config, questions, tmp_path):
    config = replace(config, data="gsm8k", data_file=str(questions), max_steps=1)
    run(config, tmp_path / "run")
    questions.write_text(questions.read_text().replace("+ 1?", "+ 2?"))
    with pytest.raises(ValueError, match=r"data_file is .*, whose content is not that of"):
        run(replace(config, max_steps=2), tmp_path / "run", resume=True)


def test_a_model_that_can_not_be_loaded_leaves_a_folder_for_the_corrected_command(config, tmp_path):
    with pytest.raises(ValueError, match="model must be"):
        run(replace(config, model="./no-such-model"), tmp_path / "run")
    run(replace(config, max_steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "final").is_dir()


def test_a_tokenizer_with_several_chat_templates_is_saved_with_the_run(config, tmp_path):
    policy = load_policy(config.model, lora_rank=4)
    template = policy.tokenizer.chat_template
    policy.tokenizer.chat_template = {"default": template, "tool_use": template}
    run(replace(config, max_steps=1), tmp_path / "run", policy=policy)
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def test_fewer_steps_than_are_done_are_refused(config, tmp_path):
    """Those between the last checkpoint and the end of the run count as well."""
    run(replace(config, max_steps=3, save_steps=2), tmp_path / "run")
    before, settings = content(tmp_path / "run"), (tmp_path / "run" / "config.json").read_text()
    for fewer in (1, 2):
        message = rf"max_steps must be at least 3, the steps that .* has made, got {fewer}"
        with pytest.raises(ValueError, match=message):
            run(replace(config, max_steps=fewer, save_steps=2), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before
    assert (tmp_path / "run" / "config.json").read_text() == settings
    run(replace(config, max_steps=3, save_steps=2), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


@pytest.mark.skipif(os.name != "posix", reason="rights of files are POSIX's")
def test_weights_can_be_read_by_whom_other_files_can(config, tmp_path):
    run(replace(config, max_steps=1, save_steps=1), tmp_path / "run")
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    saved = [*(tmp_path / "run").glob("*/*.safetensors")]
    assert len(saved) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved} == {usual}
