"""The recipe of the embedded policy: resumable, and its loss is what it claims to be."""

import json
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from iapo_mini.pretrain import (
    LOG,
    build_model,
    build_tokenizer,
    next_token_loss,
    pretrain,
    sample_batches,
    teach_exits,
)

SMALL = {"steps": 12, "batch_size": 4, "hidden": 32, "layers": 1, "threads": 1}


def test_killed_pretraining_resumes_to_the_same_weights(tmp_path):
    whole = pretrain(tmp_path / "whole", **SMALL, checkpoint_every=2)
    # Slowed down after each checkpoint, so that the kill lands in the middle of the run.
    code = (
        "import time; from iapo_mini import pretrain as p; torch_save = p.torch.save\n"
        "def slow(*a):\n    torch_save(*a); time.sleep(0.3)\n"
        "p.torch.save = slow; "
        f"p.pretrain({str(tmp_path / 'killed')!r}, **{SMALL!r}, checkpoint_every=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    limit = time.time() + 120
    while not checkpoint.exists() and process.poll() is None and time.time() < limit:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    killed = pretrain(tmp_path / "killed", **SMALL, checkpoint_every=2)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (killed / "checkpoint.pt").exists()


def test_finished_pretraining_is_left_alone_and_goes_on_to_early_answers(tmp_path):
    folder = pretrain(tmp_path / "first", **SMALL)
    saved = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(folder, **SMALL) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == saved
    out = teach_exits(folder, tmp_path / "second", steps=3, batch_size=2, exits=2, threads=1)
    a, b = (load_file(f / "model.safetensors") for f in (folder, out))
    assert a.keys() == b.keys() and not all(torch.equal(a[name], b[name]) for name in a)
    rows = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [12, 15]
    assert set(rows[1]) == {"step", "kl", "exit_loss", "minutes"}
    assert rows[1]["minutes"] >= rows[0]["minutes"]


def test_loss_equals_a_row_by_row_run():
    tokenizer = build_tokenizer(n_stories=200)
    model = build_model(tokenizer, seed=0, hidden=32, layers=2)
    batch = next(sample_batches(tokenizer, seed=0, batch_size=3))
    expected = []
    for ids, labels in zip(batch["ids"], batch["labels"]):
        log_p = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        for t in (labels != -100).nonzero()[:, 0].tolist():
            expected.append(-log_p[t - 1, labels[t]])
    assert torch.allclose(next_token_loss(model, batch), torch.stack(expected).mean(), atol=1e-5)
