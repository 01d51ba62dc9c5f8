"""Pretraining of the embedded policy: its two losses, and resuming."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from iapo_mini.lab import pretrain as module
from iapo_mini.lab.assess import assess
from iapo_mini.lab.pretrain import Settings, calibrated, losses, main, pretrain, sample_batches
from iapo_mini.lab.story_model import build_model, build_tokenizer
from iapo_mini.policy import load_policy
from iapo_mini.tasks import POSTFIX

SMALL = {
    "steps": 12, "batch_size": 4, "exits": 2, "hidden": 32, "layers": 1, "threads": 1,
    "checkpoint_every": 2,
}  # fmt: skip


def test_killed_pretraining_resumes_to_the_same_weights(tmp_path):
    whole = pretrain(tmp_path / "whole", Settings(**SMALL))
    # The run pauses after each checkpoint, so the kill comes in the middle of the run.
    code = (
        "import time; from iapo_mini.lab import pretrain as p; torch_save = p.torch.save\n"
        "def slow(*a):\n    torch_save(*a); time.sleep(0.3)\n"
        "p.torch.save = slow; "
        f"p.pretrain({str(tmp_path / 'killed')!r}, p.Settings(**{SMALL!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    limit = time.time() + 120
    while not checkpoint.exists() and process.poll() is None and time.time() < limit:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    killed = pretrain(tmp_path / "killed", Settings(**SMALL))
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (killed / "checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path, Settings(**SMALL))
    monkeypatch.undo()
    for other in ({"seed": 7}, {"exits": 0}, {"lr": 1e-4}, {"steps": 20}):
        with pytest.raises(ValueError, match=f"{next(iter(other))} is .* the pretraining in"):
            pretrain(tmp_path, Settings(**SMALL | other))
    pretrain(tmp_path, Settings(**SMALL | {"checkpoint_every": 5}))


def test_losses_equal_a_row_by_row_run():
    tokenizer = build_tokenizer(n_stories=200)
    model = build_model(tokenizer, seed=0, hidden=32, layers=2)
    batch = next(sample_batches(tokenizer, seed=0, batch_size=3, exits=4))
    postfix = torch.tensor(tokenizer.encode(POSTFIX))
    lm, early = losses(model, batch, postfix)
    token_losses, exit_losses = [], []
    for ids, labels, ends, answer in zip(*(batch[k] for k in ("ids", "labels", "ends", "answers"))):
        log_p = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        for t in (labels != -100).nonzero()[:, 0].tolist():
            token_losses.append(-log_p[t - 1, labels[t]])
        for end in ends.tolist():
            forced = model(torch.cat([ids[: end + 1], postfix])[None]).logits[0, -1]
            exit_losses.append(-torch.log_softmax(forced, dim=-1)[answer])
    assert torch.allclose(lm, torch.stack(token_losses).mean(), atol=1e-5)
    assert torch.allclose(early, torch.stack(exit_losses).mean(), atol=1e-5)


def test_exit_loss_does_not_train_the_policy_to_stop_early():
    """Branch tokens are never next-token targets; the labels are only those of the chain."""
    tokenizer = build_tokenizer(n_stories=200)
    batch = next(sample_batches(tokenizer, seed=0, batch_size=4, exits=3))
    close = tokenizer.encode("</think>")[0]
    for labels in batch["labels"]:
        assert int((labels == close).sum()) == 1


def test_the_calibrated_policy_is_a_retrained_embedded_one(tmp_path):
    """After two steps weights have changed, the log has both losses, and the folder loads."""
    folder = calibrated(tmp_path / "calibrated", steps=2, threads=1)
    rows = [
        json.loads(line)
        for line in (folder / "calibrate_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [set(row) for row in rows] == [{"step", "kl", "exit_loss"}] and rows[0]["step"] == 2
    before, after = load_policy(lora_rank=0), load_policy(str(folder), lora_rank=0)
    moved = [
        (p - q).abs().max()
        for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.1
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    weights = load_file(folder / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}


def test_a_pretrained_policy_is_assessed_on_its_own_and_the_worlds_chains(tmp_path, monkeypatch):
    """Runs the whole command at a small size: a policy, its log, the numbers and the diagram."""
    monkeypatch.setattr(module, "assess", lambda out, figures: assess(out, figures, n_stories=4))
    small = ["--steps=2", "--batch-size=2", "--exits=1", "--hidden=32", "--layers=1", "--threads=1"]
    main([f"--out={tmp_path / 'out'}", f"--figures={tmp_path / 'figures'}", *small])
    result = json.loads((tmp_path / "figures/results/policy.json").read_text(encoding="utf-8"))
    assert result["stories"] == 4 and result["accuracy"] == 0
    assert len(result["ece_by_tenth"]) == len(result["ece_sampled_by_tenth"]) == 11
    assert result["entropy_start_nats"] > 0
    assert (tmp_path / "figures/calibration.png").is_file()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", "0", "steps must be at least 1, got 0"),
        ("batch-size", "0", "batch_size must be at least 1, got 0"),
        ("exits", "-1", "exits must be at least 0, got -1"),
        ("exit-weight", "-0.5", "exit_weight must be at least 0, got -0.5"),
        ("lr", "0", "lr must be above 0, got 0.0"),
        ("lr", "nan", "lr must be above 0, got nan"),
        ("hidden", "48", "hidden must be a multiple of 32, got 48"),
        ("hidden", "0", "hidden must be at least 32, got 0"),
        ("layers", "-2", "layers must be at least 1, got -2"),
        ("threads", "0", "threads must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("doing", [[], ["--report-only"], ["--calibrate"]])
def test_values_out_of_range_end_the_command_before_any_work(
    tmp_path, capsys, option, value, message, doing
):
    with pytest.raises(SystemExit) as ended:
        main([f"--out={tmp_path / 'out'}", f"--{option}={value}", *doing])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"pretrain: {message}\n"
    assert not (tmp_path / "out").exists()


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "iapo_mini.lab.pretrain", "--hidden", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "pretrain: hidden must be a multiple of 32, got 100\n"
