"""Move the project to another address: ``python .ci/repository.py OWNER NAME`` (make repository).

The address stands in ``[project.urls]`` of pyproject.toml, and again wherever a link must be whole:
in badges, in notebooks that are opened alone, in their install cells, in docs and workflows. All of
these are rewritten and no other byte is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWNER = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}")
NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,100}(?<!\.git)")
# Colab and nbviewer lead to a repository by /github/OWNER/NAME, Binder by /gh/OWNER/NAME.
_BEFORE = rb"(?:\bgithub\.com[/:]|\braw\.githubusercontent\.com/|/github/|/gh/)"
_END = rb"(?![A-Za-z0-9_-]|\.(?!git\b)[A-Za-z0-9])"
"""What may follow a name: not more of a name, so a full stop or ``.git`` at most."""


def files(root: Path) -> list[Path]:
    """Text files of the project: those that git keeps, all of them where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else root.rglob("*")
    found = sorted(path for path in (root / name for name in names) if path.is_file())
    return [path for path in found if b"\0" not in path.read_bytes()]


def address(root: Path) -> tuple[str, str]:
    """Owner and name in ``[project.urls]``."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    url = tomllib.loads(text)["project"]["urls"]["Repository"]
    owner, name = url.removeprefix("https://github.com/").split("/")
    return owner, name


def patterns(owner: str, name: str) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """The repository's addresses, and that of its site."""
    a, b = re.escape(owner.encode()), re.escape(name.encode())
    return (
        re.compile(rb"(" + _BEFORE + rb")" + a + rb"/" + b + _END),
        re.compile(rb"(//)" + a + rb"\.github\.io/" + b + _END),
    )


def rewritten(content: bytes, old: tuple[str, str], new: tuple[str, str]) -> bytes:
    """A file's content with the new address in place of the old one."""
    repository, site = patterns(*old)
    owner, name = (part.encode() for part in new)
    content = repository.sub(lambda found: found[1] + owner + b"/" + name, content)
    return site.sub(lambda found: found[1] + owner + b".github.io/" + name, content)


def move(root: Path, new: tuple[str, str]) -> list[Path]:
    """Rewrite the files that hold the address; returns them.

    Raises:
        ValueError: for an owner or a name that GitHub does not allow, and for an address that the
            files name as another project's, from which there would be no way back.
    """
    for what, part, allowed in (("OWNER", new[0], OWNER), ("NAME", new[1], NAME)):
        if not allowed.fullmatch(part):
            raise ValueError(
                f"{what} must be one of GitHub (letters, digits, hyphens; in a name full stops and "
                f"underscores, too), got '{part}'"
            )
    old, changed = address(root), {}
    for path in files(root):
        content = path.read_bytes()
        if new != old and any(p.search(content) for p in patterns(*new)):
            raise ValueError(
                f"OWNER/NAME is '{'/'.join(new)}', which '{path.relative_to(root)}' names as "
                "another project; take another address"
            )
        if (after := rewritten(content, old, new)) != content:
            changed[path] = after
    for path, after in changed.items():
        path.write_bytes(after)
    return list(changed)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("repository: give the address as OWNER NAME; make repository OWNER=... NAME=...")
    try:
        written = move(ROOT, (sys.argv[1], sys.argv[2]))
    except ValueError as error:
        sys.exit(f"repository: {error}")
    print(f"{len(written)} files name https://github.com/{sys.argv[1]}/{sys.argv[2]}")
