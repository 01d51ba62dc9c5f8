"""Writing files and folders completely or not at all, and the versions of packages."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iapo_mini.errors import first_line

HELD = 2.0 if os.name == "nt" else 0.0
"""Seconds for which another program (an indexer, a virus scanner) may hold a file on Windows, which
then refuses to rename it. Elsewhere a file that is open can be renamed."""


def writable_folder(folder: Path, name: str) -> None:
    """Create a folder and check, before any long work, that it can be written to.

    Raises:
        ValueError: naming the argument ``name`` and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder you may write to, got '{folder}' ({error.strerror})"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so it is never left incomplete.

    The bytes are the same on every system: UTF-8, lines that end in a line feed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    rename(temporary, path)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder, replacing an existing file.

    Raises:
        OSError: when the system refuses; on Windows after ``HELD`` seconds of attempts.
    """
    end = time.monotonic() + HELD
    while True:
        try:
            os.replace(path, target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = ("torch", "transformers", "peft", "tokenizers", "iapo-mini")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file under a temporary name and rename it, so it is never incomplete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file completely or not at all (temporary name, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, default: dict | None = None, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        default: result if the file does not exist; without it the file must exist.
        needs: keys that the object must have.

    Raises:
        ValueError: naming a file that is damaged, and why.
    """
    if default is not None and not path.exists():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lacking = [key for key in needs if key not in found] if isinstance(found, dict) else []
        reason = None if isinstance(found, dict) else "it holds no JSON object"
        reason = f"it lacks '{lacking[0]}'" if lacking else reason
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    if reason:
        raise ValueError(f"'{path}' can't be used ({reason}); restore it, or remove it.")
    return dict(found)


def whole_records(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one on each line, up to a line that a stop has cut; [] if none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def same_settings(path: Path, what: str, settings: dict[str, Any]) -> None:
    """Keep the settings of long work in a JSON file, so only the same work continues.

    Args:
        path: the file, in the folder of the work.
        what: name of the work in messages.
        settings: values that JSON can hold.

    Raises:
        ValueError: naming the first setting that differs from those in the file.
    """
    now = json.loads(json.dumps(settings))  # the same types as after reading it back
    before = read_json(path, now)
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but the {what} in '{path.parent}' was started with "
                f"{before.get(name)!r}; use the same settings, or name another folder."
            )
    write_json(path, now)


def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name and rename it, so it is never left incomplete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        usual = 0o666 & ~_umask()
        for file in filter(Path.is_file, temporary.rglob("*")):
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())  # the content must reach the disk before the rename
            file.chmod(usual)  # safetensors gives rights to the owner alone
    except BaseException:
        remove(temporary)  # frees the space on a full disk
        raise
    remove(folder)
    rename(temporary, folder)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; a folder is renamed first, so no part of it stays."""
    if path.is_dir():
        doomed = path.with_name(f".{path.name.strip('.')}.old.tmp")
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
