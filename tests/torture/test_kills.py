"""SIGKILL at random moments and at every file operation does not change the result of a run.

Training runs in forked children of a server that has the libraries loaded, so twenty kills take one
minute and not ten.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import content

from iapo_mini.config import TrainConfig
from iapo_mini.run_folder import checkpoints
from iapo_mini.trainer import train

if not hasattr(os, "fork"):
    pytest.skip("needs fork and SIGKILL", allow_module_level=True)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["iapo_mini.trainer", "test_kills"])


def work(settings, folder, die_at=None, count_to=None):
    """Train or resume; ``die_at`` kills this process at its n-th file operation."""
    torch.set_num_threads(1)
    folder = Path(folder)
    if die_at is not None or count_to is not None:
        seen = itertools.count(1)
        names = ("open", "os.", "shutil.")

        def hook(event, args):
            if event.startswith(names) and args and str(args[0]).startswith(str(folder)):
                n = next(seen)
                if n == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if count_to is not None:
                    count_to.value = n

        sys.addaudithook(hook)
    resume = (folder / "config.json").is_file()
    train(TrainConfig(**settings), folder, resume=resume, progress=False)


def child(*args, **kwargs):
    process = CONTEXT.Process(target=work, args=args, kwargs=kwargs)
    process.start()
    return process


@pytest.fixture
def settings(config):
    return asdict(replace(config, max_steps=30, save_steps=1))


def finished(settings, folder):
    process = child(settings, str(folder))
    process.join()
    assert process.exitcode == 0
    return content(folder)


def test_twenty_kills_at_random_moments_and_while_a_checkpoint_is_written(settings, tmp_path):
    began = time.monotonic()
    whole = finished(settings, tmp_path / "whole")
    lasting = time.monotonic() - began
    rng, kills, while_writing, runs = random.Random(0), 0, 0, itertools.count()
    folder = tmp_path / f"run-{next(runs)}"
    while kills < 20:
        process = child(settings, str(folder))
        if kills % 2:  # while a checkpoint is being written
            while process.is_alive() and not list(folder.glob(".checkpoint-*.tmp")):
                pass
            time.sleep(rng.uniform(0, 0.004))
        else:
            process.join(rng.uniform(0, lasting))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the kill: take another run
            assert content(folder) == whole
            folder = tmp_path / f"run-{next(runs)}"
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        while_writing += bool(list(folder.glob(".checkpoint-*.tmp")))
    assert finished(settings, folder) == whole
    assert not list(folder.glob(".*"))
    print(f"{kills} kills in {next(runs)} runs, {while_writing} while a checkpoint was written")
    assert while_writing >= 3


def test_a_kill_at_each_file_operation(settings, tmp_path):
    """These are all moments at which the content of the disk can differ."""
    settings = settings | {"max_steps": 3}
    whole = finished(settings, tmp_path / "whole")
    count = CONTEXT.Value("i", 0)
    process = child(settings, str(tmp_path / "counted"), count_to=count)
    process.join()
    assert content(tmp_path / "counted") == whole
    points = range(1, count.value + 1)
    print(f"{len(points)} file operations")
    assert len(points) > 60
    for point in points:
        folder = tmp_path / f"point-{point}"
        process = child(settings, str(folder), die_at=point)
        process.join()
        assert process.exitcode == -signal.SIGKILL, point
        # Everything with the name of a checkpoint is complete.
        for checkpoint in checkpoints(folder):
            assert (checkpoint / "sha256.json").is_file(), point
        assert finished(settings, folder) == whole, point
        assert not list(folder.glob(".*")), point
