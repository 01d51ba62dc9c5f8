"""A full and a read-only disk, made with a small tmpfs. Needs the right to mount."""

import contextlib
import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from helpers import content, run

from iapo_mini.callbacks import Callback
from iapo_mini.run_folder import _sums, checkpoints


def mount(*arguments):
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"can't mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def config(config):
    return replace(config, max_steps=6)


def fill(disk, leave):
    """Fill the disk except for ``leave`` bytes."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"x" * max(0, free - leave))


@pytest.mark.parametrize("leave", [0, 4096, 8192, 20000, 40000])
@pytest.mark.parametrize("step", [3, 6])
def test_a_full_disk(config, small_disk, tmp_path, leave, step):
    """The disk fills up between two checkpoints, fully or almost, or before the last step."""
    run(config, tmp_path / "whole")
    folder = small_disk / "run"

    def filling(line):
        if line["step"] == step:
            fill(small_disk, leave)

    with pytest.raises(OSError, match=r"output_dir is .*No space left.*is whole.*--resume"):
        run(config, folder, callbacks=[Callback(filling)])
    last = checkpoints(folder)[-1]
    assert _sums(last) == json.loads((last / "sha256.json").read_text(encoding="utf-8"))
    assert last.name == f"checkpoint-{step - 1 if step == 3 else 4}"
    if leave == 0:  # still full: said before anything is done
        with pytest.raises(OSError, match="No space left"):
            run(config, folder, resume=True)
    (small_disk / "filler").unlink()
    run(config, folder, resume=True)
    assert content(folder) == content(tmp_path / "whole")


def test_a_disk_that_becomes_read_only(config, small_disk, tmp_path):
    run(config, tmp_path / "whole")
    folder = small_disk / "run"

    def freeze(line):
        if line["step"] == 3:  # a read-only view on top: the run's own lock keeps the disk busy
            mount("--bind", str(small_disk), str(small_disk))
            mount("-o", "remount,bind,ro", str(small_disk))

    with pytest.raises(OSError, match=r"output_dir is .*Read-only.*'checkpoint-2' is whole"):
        run(config, folder, callbacks=[Callback(freeze)])
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"output_dir is .*nothing can be written"):
            run(config, folder, resume=resume)
    subprocess.run(["umount", str(small_disk)], check=True)
    run(config, folder, resume=True)
    assert content(folder) == content(tmp_path / "whole")


def test_a_disk_too_small_from_the_start(config, small_disk):
    fill(small_disk, 0)
    with pytest.raises((OSError, ValueError), match=r"output_dir is .*No space left"):
        run(replace(config, max_steps=1), small_disk / "run")
    with contextlib.suppress(FileNotFoundError):
        assert not list((small_disk / "run").glob("checkpoint-*"))
