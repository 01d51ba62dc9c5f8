"""The folder of a run: the checks of a resume besides those of the settings."""

import itertools
import json
import os
import shutil
import stat
from dataclasses import replace

import pytest
from helpers import content, metrics, perturb_lora, run
from safetensors.torch import load_file, save_file

from iapo_mini.callbacks import Callback
from iapo_mini.metrics import whole_log
from iapo_mini.policy import load_policy
from iapo_mini.problems.datasets import cut
from iapo_mini.tasks import Problem


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(2, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_run_resumes_with_the_same_problems_under_another_path(
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
    questions.write_text(
        questions.read_text(encoding="utf-8").replace("+ 1?", "+ 2?"), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"data_file is .*, whose content differs from"):
        run(replace(config, max_steps=2), tmp_path / "run", resume=True)


@pytest.mark.parametrize("split", ["train", "tune"])
def test_a_question_that_is_too_long_is_found_before_the_run(config, tmp_path, split):
    """Wherever it stands, among the training problems or those of the evaluations."""
    questions = [f"What is {n} + 1?" for n in range(60)]
    for n in itertools.count(60):  # the hash of a question decides its split
        longest = f"What is {'nearly ' * 2000}{n} + 1?"
        parts = [Problem(question, "1") for question in [*questions, longest]]
        if longest in [problem.question for problem in cut(parts, split)]:
            break
    path = tmp_path / "questions.jsonl"
    rows = [{"question": question, "answer": "#### 1"} for question in [*questions, longest]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(config, data="gsm8k", data_file=str(path), max_steps=1, eval_every=1)
    config = replace(config, eval_problems=len(cut(parts, "tune")))
    with pytest.raises(ValueError, match=r"the model has \d+ positions, but prompt"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_after_a_failed_load_the_corrected_command_can_use_the_folder(config, tmp_path):
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
    """Steps after the last checkpoint count as well."""
    run(replace(config, max_steps=3, save_steps=2), tmp_path / "run")
    before, settings = (
        content(tmp_path / "run"),
        (tmp_path / "run" / "config.json").read_text(encoding="utf-8"),
    )
    for fewer in (1, 2):
        message = rf"max_steps must be at least 3, the number of steps of .*, got {fewer}"
        with pytest.raises(ValueError, match=message):
            run(replace(config, max_steps=fewer, save_steps=2), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before
    assert (tmp_path / "run" / "config.json").read_text(encoding="utf-8") == settings
    run(replace(config, max_steps=3, save_steps=2), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


@pytest.mark.skipif(os.name != "posix", reason="rights of files are POSIX's")
def test_weights_are_readable_like_other_files(config, tmp_path):
    run(replace(config, max_steps=1, save_steps=1), tmp_path / "run")
    (tmp_path / "usual").write_text("", encoding="utf-8")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    saved = [*(tmp_path / "run").glob("*/*.safetensors")]
    assert len(saved) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved} == {usual}


@pytest.mark.parametrize("lora_rank", [4, 0])
@pytest.mark.parametrize(
    "part", ["embed_tokens", "layers.1.mlp.up_proj", "layers.0.input_layernorm"]
)
def test_other_weights_under_the_same_name_are_refused(config, tmp_path, part, lora_rank):
    shutil.copytree(config.model, tmp_path / "model")
    config = replace(config, model=str(tmp_path / "model"), lora_rank=lora_rank, max_steps=2)
    config = replace(config, save_steps=1, learning_rate=1e-3)
    run(replace(config, max_steps=1), tmp_path / "run")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[f"model.{part}.weight"] *= 1.0001
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model is .*, whose weights or adapter are not those"):
        run(config, tmp_path / "run", resume=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(before)
    run(config, tmp_path / "run", resume=True)
    run(config, tmp_path / "whole")
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_the_reference_of_a_run_is_the_adapter_that_it_starts_from(config, tmp_path):
    """Before the first update the KL divergence is zero; from the base model it is not."""
    config = replace(config, kl_coef=1.0, max_steps=2, save_steps=1)

    def start(seed=1):
        return perturb_lora(load_policy(config.model, lora_rank=4), seed=seed)

    run(config, tmp_path / "whole", policy=start())
    kl = [step["kl"] for step in metrics(tmp_path / "whole")]
    assert abs(kl[0]) < 1e-6 < kl[1]
    run(replace(config, max_steps=1), tmp_path / "run", policy=start())
    with pytest.raises(ValueError, match="whose weights or adapter are not those"):
        run(config, tmp_path / "run", policy=start(seed=2), resume=True)
    run(config, tmp_path / "run", policy=start(), resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("other", [{"lora_alpha": 64}, {"lora_rank": 8}, {"seed": 5}])
def test_another_adapter_is_refused_if_it_would_change_the_run(config, tmp_path, other):
    """Another seed changes only where a new adapter started, which the checkpoint overrides."""
    config = replace(config, max_steps=2, save_steps=1)
    run(replace(config, max_steps=1), tmp_path / "run")
    policy = load_policy(config.model, **{"lora_rank": 4, **other})
    if "seed" in other:
        run(config, tmp_path / "run", policy=policy, resume=True)
        return
    with pytest.raises(ValueError, match="whose weights or adapter are not those"):
        run(config, tmp_path / "run", policy=policy, resume=True)


@pytest.mark.parametrize(
    "other",
    [None, [Problem("1 + 2?", "3")], [Problem("1 + 1?", "3")], [Problem("1 + 1?", "2")] * 2],
)
def test_a_run_on_given_problems_resumes_with_the_same_problems(config, tmp_path, other):
    config, given = replace(config, max_steps=2, save_steps=1), [Problem("1 + 1?", "2")]
    run(replace(config, max_steps=1), tmp_path / "run", problems=given)
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"problems are not those that the run in .* was started"):
        run(config, tmp_path / "run", resume=True, problems=other)
    assert content(tmp_path / "run") == before
    run(config, tmp_path / "run", resume=True, problems=list(given))


def test_a_run_of_a_version_without_fingerprints_resumes(config, tmp_path):
    run(replace(config, max_steps=1, save_steps=1), tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told.pop("model_fingerprint")["dtype"] == "torch.float32"
    assert told.pop("problems_fingerprint") == ""
    file.write_text(json.dumps(told), encoding="utf-8")
    run(replace(config, max_steps=2, save_steps=1), tmp_path / "run", resume=True)


@pytest.fixture
def stopped(config, tmp_path):
    """A run of six steps that ended after the fifth: checkpoints 2 and 4, five lines of log."""

    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(replace(config, max_steps=6), tmp_path / "run", callbacks=[Callback(stop)])
    return tmp_path / "run"


def changed(log, at, how):
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[at - 1 : at] = how(lines[at - 1])
    log.write_text("".join(lines), encoding="utf-8")


DAMAGE = {
    "half a line": lambda line: [line[:40] + "\n"],
    "no line": lambda line: [],
    "twice": lambda line: [line, line],
    "a digit": lambda line: [line.replace("0", "1", 1)],
    "zeros": lambda line: ["\0" * len(line) + "\n"],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_steps_after_the_damage_in_a_log_are_repeated(config, stopped, tmp_path, damage):
    changed(stopped / "metrics.jsonl", 4 if damage != "twice" else 3, DAMAGE[damage])
    with pytest.warns(UserWarning, match=r"metrics.jsonl' is damaged: .* after 'checkpoint-2' are"):
        run(replace(config, max_steps=6), stopped, resume=True)
    run(replace(config, max_steps=6), tmp_path / "whole")
    assert content(stopped) == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", [*DAMAGE, "gone", "empty"])
def test_a_log_damaged_before_every_checkpoint_is_refused_and_nothing_changes(
    config, stopped, damage
):
    log = stopped / "metrics.jsonl"
    if damage == "gone":
        log.unlink()
    elif damage == "empty":
        log.write_text("", encoding="utf-8")
    else:
        changed(log, 1, DAMAGE[damage])
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    line = "lines 1 to 2" if damage == "a digit" else f"line {2 if damage == 'twice' else 1} "
    with pytest.raises(ValueError, match=rf"metrics.jsonl' is damaged: .*{line}.*; restore the"):
        run(replace(config, max_steps=6), stopped, resume=True)
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before


def test_a_log_without_checksums_is_read_in_order(config, stopped):
    for checkpoint in stopped.glob("checkpoint-*"):
        sums = json.loads((checkpoint / "sha256.json").read_text(encoding="utf-8"))
        del sums["metrics.jsonl"]
        (checkpoint / "sha256.json").write_text(json.dumps(sums), encoding="utf-8")
    run(replace(config, max_steps=6), stopped, resume=True)
    assert [row["step"] for row in whole_log(stopped / "metrics.jsonl", 6)] == [1, 2, 3, 4, 5, 6]
