"""Runs lose nothing: damaged checkpoints, full disks, locks, Ctrl-C, numbers that are not finite.

torture/ has the long version, with kills at random moments and at every file operation.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, content, run
from safetensors.torch import load_file

from iapo_mini import run_folder, trainer
from iapo_mini.callbacks import Callback
from iapo_mini.cli import main
from iapo_mini.information import INFORMATION
from iapo_mini.policy import load_policy

ROOT = str(Path(trainer.__file__).parents[1])
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")


@pytest.fixture
def config(config):
    return replace(config, max_steps=5)


def stopped_at(config, folder, step):
    """A run that was interrupted right after this step was logged."""

    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, folder, callbacks=[Callback(stop)])


@pytest.fixture
def whole(config, tmp_path):
    run(config, tmp_path / "whole")
    return content(tmp_path / "whole")


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def one_bit(file):
    data = bytearray(file.read_bytes())
    data[-50] ^= 1  # among the numbers: safetensors itself can't see it
    file.write_bytes(data)


def emptied(file):
    file.write_bytes(b"")


def garbage(file):
    file.write_bytes(b"\xff" * 300)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(
            ("trainable.safetensors", "optimizer.safetensors", "sha256.json"),
            (cut_short, garbage, emptied, Path.unlink),
        ),
        ("trainable.safetensors", one_bit),
        ("optimizer.safetensors", one_bit),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    config, tmp_path, whole, name, damage
):
    folder = tmp_path / "run"
    stopped_at(config, folder, 5)
    damage(folder / "checkpoint-4" / name)
    seen = []
    with pytest.warns(UserWarning, match=r"checkpoint-4' is damaged .* is not used"):
        watcher = Callback(lambda line: seen.append(line["step"]))
        run(config, folder, resume=True, callbacks=[watcher])
    assert seen == [3, 4, 5]  # from checkpoint-2
    assert content(folder) == whole
    # The damaged checkpoint was written again, and is used next time without a warning.
    assert run_folder._sums(folder / "checkpoint-4")


def test_with_all_checkpoints_damaged_the_run_starts_again(config, tmp_path, whole):
    folder = tmp_path / "run"
    stopped_at(config, folder, 5)
    for checkpoint in (folder / "checkpoint-2", folder / "checkpoint-4"):
        garbage(checkpoint / "trainable.safetensors")
    with pytest.warns(UserWarning, match="damaged"):
        run(config, folder, resume=True)
    assert content(folder) == whole


def test_a_folder_that_only_looks_like_a_checkpoint_is_left_alone(config, tmp_path, whole):
    folder = tmp_path / "run"
    stopped_at(config, folder, 3)
    (folder / "checkpoint-best").mkdir()
    run(config, folder, resume=True)
    assert content(folder) == whole and (folder / "checkpoint-best").is_dir()


def test_a_damaged_config_is_refused_in_one_sentence(config, tmp_path):
    folder = tmp_path / "run"
    stopped_at(config, folder, 3)
    for text in ('{"method": ', "[1]"):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"output_dir is .* config.json is damaged"):
            run(config, folder, resume=True)


HOLD = """
import json, sys, time
from iapo_mini.callbacks import Callback
from iapo_mini.trainer import TrainConfig, train

def hold(line):
    print(line["step"], flush=True)
    time.sleep(float(sys.argv[3]))

train(TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=False,
      callbacks=[Callback(hold)])
"""


def start(config, folder, pause, **options):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, json.dumps(asdict(config)), str(folder), str(pause)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


def test_a_second_process_on_a_run_is_refused_until_the_first_is_dead(config, tmp_path, whole):
    folder = tmp_path / "run"
    process = start(config, folder, pause=60)
    try:
        assert process.stdout.readline().strip() == "1"
        for resume in (True, False):
            with pytest.raises(ValueError, match="another process is training"):
                run(config, folder, resume=resume)
    finally:
        process.kill()
        process.communicate()
    run(config, folder, resume=True)  # a kill leaves the lock's file, not the lock
    assert content(folder) == whole
    assert not list(folder.glob(".*"))


def test_two_threads_of_one_process_can_not_share_a_run(config, tmp_path):
    def step(line):
        with pytest.raises(ValueError, match="another process is training"):
            run(config, tmp_path / "run", resume=True)

    run(replace(config, max_steps=1), tmp_path / "run", callbacks=[Callback(step)])


@pytest.fixture
def foreground():
    """Make Ctrl-C work as in a terminal, because a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    others = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in {signal.SIGINT: before, **others}.items():
        signal.signal(number, handler)


@POSIX
@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_continue(config, tmp_path, whole, name):
    """A real signal in the middle of a step, between two checkpoints: Ctrl-C, a cluster's time
    limit, a closed terminal."""
    folder = tmp_path / "run"

    def interrupt(line):
        if line["step"] == 3:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(KeyboardInterrupt, match=r"step 3 is saved in .*--resume"):
        run(config, folder, callbacks=[Callback(interrupt)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (folder / "checkpoint-3").is_dir() and not (folder / "final").exists()
    seen = []
    run(config, folder, resume=True, callbacks=[Callback(lambda line: seen.append(line["step"]))])
    assert seen == [4, 5] and content(folder) == whole


@POSIX
@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_does_not_wait(config, tmp_path, whole):
    folder, reached = tmp_path / "run", []

    def interrupt(line):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        run(config, folder, callbacks=[Callback(interrupt)])
    assert reached == ["first"] and not list(folder.glob("checkpoint-*"))
    run(config, folder, resume=True)
    assert content(folder) == whole


@POSIX
@pytest.mark.usefixtures("foreground")
def test_ctrl_c_on_the_command_line_ends_with_one_sentence(config, tmp_path, whole):
    folder = tmp_path / "run"
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(config).items()
        if not isinstance(value, bool) and value not in (None, "")
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "iapo_mini", "train", "--out", str(folder), *options],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=PATIENCE)[1]
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 1 and "Traceback" not in told
    assert "is saved in" in told and "--resume" in told
    run(config, folder, resume=True)
    assert content(folder) == whole


def test_training_in_another_thread_leaves_signals_alone(config, tmp_path):
    before, failed = signal.getsignal(signal.SIGINT), []

    def work():
        try:
            run(replace(config, max_steps=1), tmp_path / "run")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGINT) is before


def at_step(step, values):
    """Replace the estimate of one step."""
    calls = itertools.count(1)

    def estimate(*args):
        found = plain(*args)
        return found * values if next(calls) == step else found

    plain = INFORMATION["answer_entropy"]
    return estimate


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_informativeness_that_is_not_finite_stops_before_the_update(
    config, tmp_path, whole, poison, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setitem(INFORMATION, "answer_entropy", at_step(3, poison))
        with pytest.raises(FloatingPointError, match=r"step 3: the informativeness of \d of 4"):
            run(config, folder)
    kept = load_file(folder / "failed-step-3" / "rollouts.safetensors")
    assert not kept["informativeness"].isfinite().all()
    assert kept["completion_ids"].shape == kept["old_logprobs"].shape
    assert kept["rewards"].shape == (4,)
    texts = json.loads((folder / "failed-step-3" / "completions.json").read_text(encoding="utf-8"))
    assert len(texts) == 4 and any("<think>" in text for text in texts)
    # Without the cause the run continues as if nothing had happened.
    run(config, folder, resume=True)
    assert content(folder) == whole


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(config, tmp_path, poison, monkeypatch):
    plain, calls = trainer.policy_loss, itertools.count(1)

    def loss(*args, **kwargs):
        value, stats = plain(*args, **kwargs)
        return (value * poison if next(calls) == 2 else value), stats

    monkeypatch.setattr(trainer, "policy_loss", loss)
    policy = load_policy(config.model, lora_rank=4)
    before = {k: v.detach().clone() for k, v in policy.trainable().items()}
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is (nan|-?inf); .*failed-step"):
        run(config, tmp_path / "run", policy=policy)
    for name, weight in policy.trainable().items():
        assert torch.equal(weight, before[name]) and weight.grad is None
    assert (tmp_path / "run" / "failed-step-1" / "rollouts.safetensors").is_file()


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(config, tmp_path, monkeypatch):
    policy = load_policy(config.model, lora_rank=4)
    weight = next(iter(policy.trainable().values()))
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient norm is (nan|inf)"):
        run(config, tmp_path / "run", policy=policy)
    assert torch.equal(weight, before)


def test_weights_that_are_not_finite_are_found_when_sampling(config, tmp_path):
    policy = load_policy(config.model, lora_rank=4)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="log-probabilities of the sampled tokens"):
        run(config, tmp_path / "run", policy=policy)


LIMIT = """
import json, resource, signal, sys
from iapo_mini.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@POSIX
def test_a_checkpoint_that_does_not_fit_keeps_the_previous_one(config, tmp_path, whole):
    """A limit on the size of files gives the same error as a full disk."""
    folder = tmp_path / "run"
    stopped_at(config, folder, 3)
    size = (folder / "checkpoint-2" / "optimizer.safetensors").stat().st_size
    command = ["train", "--out", str(folder), "--resume"]
    command += [
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(config).items()
        if not isinstance(value, bool) and value not in (None, "")
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMIT, str(size - 1000), *command], capture_output=True, text=True,
        timeout=PATIENCE, env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("iapo-mini: output_dir is") and "File too large" in line
    assert "'checkpoint-2' is whole" in line and "--resume" in line
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-2", "config.json", "metrics.jsonl",
    ]  # fmt: skip
    run(config, folder, resume=True)
    assert content(folder) == whole


def test_a_full_disk_at_the_log_is_reported_in_one_sentence(config, tmp_path, monkeypatch, capsys):
    def full(metrics):
        raise OSError(28, "No space left on device")

    plain = Path.open

    def opened(path, mode="r", *args, **kwargs):
        if path.name == "metrics.jsonl" and mode == "a":
            full(None)
        return plain(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match=r"^output_dir is .*No space left.*no checkpoint yet"):
        run(config, tmp_path / "run")


def test_the_command_reports_a_failed_step_in_one_sentence(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(INFORMATION, "answer_entropy", at_step(1, math.nan))
    command = ["train", "--out", str(tmp_path / "run"), "--model", config.model]
    command += ["--max-completion-length=12", "--prompts-per-step=2", "--threads=1"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "iapo-mini: step 1: the informativeness" in capsys.readouterr().err


def test_a_checkpoint_that_can_not_be_read_ends_the_command_and_is_kept(
    config, tmp_path, whole, monkeypatch
):
    """It may belong to another user, or be on a missing share, and so may be undamaged."""
    folder = tmp_path / "run"
    run(replace(config, max_steps=2), folder)
    before = sorted(p.name for p in folder.iterdir())
    with monkeypatch.context() as patch:

        def refused(folder):
            raise PermissionError(13, "Permission denied")

        patch.setattr(run_folder, "_sums", refused)
        with pytest.raises(ValueError, match=r"'checkpoint-2' can't be read \(Permission denied\)"):
            run(config, folder, resume=True)
    assert sorted(p.name for p in folder.iterdir()) == before
    run(config, folder, resume=True)
    assert content(folder) == whole


def test_weights_that_the_last_update_made_infinite_are_not_saved(config, tmp_path):
    config = replace(config, max_steps=1, save_steps=1, warmup_steps=0)
    object.__setattr__(config, "learning_rate", 1e308)  # more than the settings take
    with pytest.raises(FloatingPointError, match=r"after step 1 the weight '.*' is not finite"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
