"""The folder of a training run, and how nothing in it is lost to a fault.

* What is written has another name until it is whole, so a kill leaves the old or the new.
* A checkpoint carries the checksums of its files; one that does not match is passed over.
* A folder belongs to one process at a time; the system takes the lock from one that was killed.
* A full or read-only disk ends in one sentence that names the last whole checkpoint.
* Ctrl-C asks for the end of the step; only a second one interrupts at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iapo_mini.policy import Policy

_LOCK = ".lock"


def is_leftover(path: Path) -> bool:
    """Whether this is what a killed run leaves: its lock, or something it had not yet renamed."""
    return path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


@contextlib.contextmanager
def claimed(run: Path, resume: bool) -> Iterator[None]:
    """The run folder, made if need be, for this process alone; a kill gives it free again."""
    if resume and not (run / "config.json").is_file():
        raise ValueError(f"output_dir is '{run}', which holds no run to resume (no config.json).")
    writable_folder(run, "output_dir")
    lock = filelock.FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"output_dir is '{run}', where another process is training; wait for its end or name "
            "a new folder."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps an open file; a read-only disk keeps all
            os.unlink(run / _LOCK)
        lock.release()


def writable_folder(folder: Path, name: str) -> None:
    """Make a folder and make sure that something can be written there, before any long work.

    Raises:
        ValueError: naming the argument ``name`` and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} is '{folder}', where nothing can be written ({error.strerror}); "
            "allowed is a folder you may write to."
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename, so that it is whole or as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of what a number depends on."""
    packages = ("torch", "transformers", "peft", "tokenizers", "iapo-mini")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def write_json(path: Path, content: dict) -> None:
    """Write JSON whole or not at all (temporary name, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then rename, so that it is whole or absent."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())  # the rename must not reach the disk before what it names
    except BaseException:
        remove(temporary)  # a full disk gets its room back
        raise
    remove(folder)
    os.replace(temporary, folder)


def remove(path: Path) -> None:
    """Remove a file or folder, if there; a folder first loses its name, so that none is half."""
    if path.is_dir():
        doomed = path.with_name(f".{path.name.strip('.')}.old.tmp")
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turn a failed write into one sentence that says what is safe and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        whole = checkpoints(run)
        safe = f"'{whole[-1].name}' is whole" if whole else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"output_dir is '{run}', where writing failed ({reason}); {safe}. Make room or make it "
            "writable, then resume: --resume (resume=True)."
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors of a checkpoint, by file name."""
    out = {}
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        with (folder / name).open("rb") as file:
            out[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def save_checkpoint(run: Path, step: int, policy: Policy, optimizer) -> None:
    """Checkpoint of trained weights and optimizer moments; the two newest are kept."""

    def write(folder: Path) -> None:
        save_file({k: v.detach().contiguous() for k, v in policy.trainable().items()},
                  folder / "trainable.safetensors")  # fmt: skip
        moments = {
            f"{i}/{key}": value.contiguous()
            for i, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "sha256.json").write_text(json.dumps(_sums(folder), indent=1) + "\n")

    replace_folder(run / f"checkpoint-{step}", write)
    for old in checkpoints(run)[:-2]:
        if _step_of(old) != step:  # damaged newer ones may be left from before a resume
            remove(old)


def restore_checkpoint(run: Path, policy: Policy, optimizer) -> int:
    """Load the newest checkpoint that is whole; return the steps done, 0 without one."""
    for checkpoint in reversed(checkpoints(run)):
        try:
            if _sums(checkpoint) != json.loads((checkpoint / "sha256.json").read_text()):
                raise ValueError("its files do not match their checksums")
            weights = load_file(checkpoint / "trainable.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            warnings.warn(
                f"'{checkpoint}' is damaged ({error}) and is not used; the one before it is, or "
                "the run starts anew.",
                stacklevel=2,
            )
            continue
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                parameter.copy_(weights[name])
        state = optimizer.state_dict()
        for name, value in moments.items():
            index, key = name.split("/")
            state["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(state)
        return _step_of(checkpoint)
    return 0


def logged(log: Path) -> list[tuple[str, dict]]:
    """Lines of a run's log and the metrics in them; a line that a kill cut short is passed over."""
    found = []
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append((line, row))
    return found


def trim_log(log: Path, done: int) -> None:
    """Drop metrics of steps that will be made again, and a line that a kill cut short."""
    kept = [line + "\n" for line, row in logged(log) if row["step"] <= done]
    replace_text(log, "".join(kept))


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts at once, as it always does."""
    asked = threading.Event()
    # Another handler, or none (a job in the background), is somebody's decision: leave it alone.
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )

    def ask(number, frame) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(RuntimeError):  # in the middle of another write
            print("\nThis step will be finished and saved; Ctrl-C again does not wait.",
                  file=sys.stderr, flush=True)  # fmt: skip

    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
