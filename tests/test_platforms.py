"""Windows and macOS, simulated where this system differs: files, encodings, processes, signals."""

import ast
import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import PATIENCE
from safetensors.torch import load_file

import iapo_mini
from iapo_mini import files, run_folder
from iapo_mini.evaluation import read_completions
from iapo_mini.lab import runs
from iapo_mini.metrics import LOG, logged, sum_of_log, trim_log, whole_log
from iapo_mini.model_files import of_repository
from iapo_mini.options import print_any_text
from iapo_mini.policies import looks_local
from iapo_mini.problems import verify

PACKAGE = Path(iapo_mini.__file__).parent
ROOT = PACKAGE.parent
SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("iapo_mini", "tests", "benchmarks", "examples", "notebooks", ".ci", "site")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def python(code, *arguments, **environment):
    """What a Python process prints that runs ``code``; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True,
        timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("ascii").split()


# Text files: Python reads and writes them in the encoding of the system unless told otherwise.

ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}
"""A locale that knows even less than Windows' cp1252: it refuses every character but ASCII."""


NO_TEXT = ("tarfile", "os", "Image")
"""Modules whose ``open`` opens no text file."""


def text_files(tree):
    """Calls that open a text file: (line, mode, names of the arguments that are given)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        given = {k.arg: k.value for k in node.keywords}
        if name in ("read_text", "write_text"):
            place = 0 if name == "read_text" else 1  # of the encoding
            names = set(given) | ({"encoding"} if len(node.args) > place else set())
            yield node.lineno, name[0], names
        elif name == "open" and not (method and ast.unparse(node.func.value) in NO_TEXT):
            place = 0 if method else 1
            mode = node.args[place] if len(node.args) > place else given.get("mode")
            mode = mode.value if isinstance(mode, ast.Constant) else "r"
            if "b" not in mode:
                nowhere = "os.devnull" in ast.unparse(node)
                yield node.lineno, mode, set(given) | ({"newline"} if nowhere else set())


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_text_files_are_utf8_and_of_one_kind_of_line_on_every_system(path):
    for line, mode, given in text_files(tree_of(path)):
        assert "encoding" in given, f"{path}:{line}"
        if path.parts[0] == "iapo_mini" and mode != "r":
            assert "newline" in given, f"{path}:{line} ends lines as the system does"


def test_the_check_above_sees_every_way_to_open_a_text_file():
    code = (
        "open(a)\nopen(a, 'w')\np.open()\np.open('a')\np.read_text()\np.write_text(t)\n"
        "open(a, mode='x')\nopen(a, 'rb')\np.open('ab+')\np.read_bytes()\ntarfile.open(a)"
    )
    seen = list(text_files(ast.parse(code)))
    assert sorted(line for line, _, _ in seen) == [1, 2, 3, 4, 5, 6, 7]
    assert not any(given - {"mode"} for _, _, given in seen)


def test_texts_go_there_and_back_where_the_locale_knows_ascii_alone(tmp_path):
    data = tmp_path / "data.jsonl"
    row = {"question": "Zoë has 3 €. How many €?", "answer": "3"}
    data.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    code = """
        import locale, sys
        from pathlib import Path
        assert locale.getpreferredencoding(False).upper() in ("ANSI_X3.4-1968", "ASCII", "US-ASCII")
        from iapo_mini.files import read_json, replace_text, write_json
        from iapo_mini.problems.datasets import load_problems
        (problem,) = load_problems("gsm8k", "all", sys.argv[1])
        folder = Path(sys.argv[2])
        write_json(folder / "a.json", {"question": problem.question})
        replace_text(folder / "a.txt", problem.question)
        assert read_json(folder / "a.json")["question"] == problem.question
    """
    python(code, data, tmp_path, **ASCII)
    assert (tmp_path / "a.txt").read_bytes().decode() == row["question"]


def test_a_command_prints_what_the_locale_can_show(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from iapo_mini.advantages import grpo\nfrom iapo_mini.recipes import Recipe\n"
        "RECIPES = {'mine': Recipe(grpo, label='Zoë', what='A → ∞')}\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    code = "from iapo_mini.cli import main; main(['methods', '--methods', 'mine'])"
    assert "Zo?" in " ".join(python(code, **{**ASCII, "PYTHONPATH": path}))


def test_a_pipe_on_windows_shows_what_cp1252_knows(monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="cp1252"))
    with pytest.raises(UnicodeEncodeError):
        print("→ 7 ✓ é", flush=True)
    print_any_text()
    print("→ 7 ✓ é", end="", flush=True)
    assert pipe.getvalue() == b"? 7 ? \xe9"


def test_a_stdout_that_is_no_file_is_left_alone(monkeypatch):
    """As in a notebook, or where there is none at all (pythonw on Windows)."""
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        print_any_text()


def test_a_log_whose_lines_end_as_on_windows_is_the_same_log(tmp_path):
    rows = "".join(json.dumps({"step": n, "reward": n / 2}) + "\n" for n in (1, 2, 3))
    here, there = tmp_path / LOG, tmp_path / f"windows-{LOG}"
    here.write_bytes(rows.encode())
    there.write_bytes(rows.replace("\n", "\r\n").encode())
    assert sum_of_log(here, 2) == sum_of_log(there, 2)
    assert whole_log(there, 3, sum_of_log(here, 3)) == whole_log(here, 3)
    assert [row for _, row in logged(there)] == [row for _, row in logged(here)]
    trim_log(there, 2)
    assert there.read_bytes() == "".join(rows.splitlines(keepends=True)[:2]).encode()


def test_completions_whose_lines_end_as_on_windows_are_read(tmp_path):
    rows = [{"problem": n, "text": "a", "correct": True, "tokens": 1} for n in range(2)]
    (tmp_path / "c.jsonl").write_bytes("".join(json.dumps(r) + "\r\n" for r in rows).encode())
    assert read_completions(tmp_path / "c.jsonl", 1) == rows


# Files and folders: Windows refuses to rename or remove what is open, mapped or looked at.


class Held:
    """``os.replace`` as on Windows while another program holds the file, ``times`` calls long."""

    def __init__(self, times):
        self.times, self.calls, self.replace = times, 0, os.replace

    def __call__(self, path, target):
        self.calls += 1
        if self.calls <= self.times:
            raise PermissionError(13, "The process cannot access the file", str(path))
        self.replace(path, target)


def held(monkeypatch, times, patience):
    monkeypatch.setattr(files, "HELD", patience)
    stand_in = Held(times)
    monkeypatch.setattr(os, "replace", stand_in)
    return stand_in


def test_a_file_that_is_held_for_a_moment_is_renamed_after_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    stand_in = held(monkeypatch, times=3, patience=60)
    files.replace_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new" and stand_in.calls == 4


@pytest.mark.parametrize("patience", [0.0, 0.2])
def test_a_file_that_is_held_for_good_stays_and_the_system_is_quoted(
    tmp_path, monkeypatch, patience
):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    stand_in, began = held(monkeypatch, times=10**9, patience=patience), time.monotonic()
    with pytest.raises(PermissionError, match="cannot access the file"):
        files.replace_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    assert time.monotonic() - began >= patience and (stand_in.calls == 1) == (patience == 0)


def test_a_folder_with_an_open_file_stays_whole_and_is_replaced_later(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"

    def write(number):
        return lambda to: (to / "a.txt").write_text(str(number), encoding="utf-8")

    files.replace_folder(folder, write(1))
    with monkeypatch.context() as patch:
        held(patch, times=10**9, patience=0.0)
        with pytest.raises(PermissionError):
            files.replace_folder(folder, write(2))
    assert (folder / "a.txt").read_text(encoding="utf-8") == "1"
    files.replace_folder(folder, write(3))
    assert (folder / "a.txt").read_text(encoding="utf-8") == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_resumed_run_holds_on_to_no_file_of_its_checkpoint(tmp_path, monkeypatch):
    """Tensors that safetensors loads are the file itself, mapped; it has to be removable."""
    weight = torch.nn.Parameter(torch.randn(50))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    policy = SimpleNamespace(trainable=lambda: {"weight": weight})
    (tmp_path / LOG).write_bytes(b'{"step": 1}\n')
    run_folder.save_checkpoint(tmp_path, 1, policy, optimizer)
    loaded = []

    def load(path):
        loaded.extend((tensors := load_file(path)).values())
        return tensors

    monkeypatch.setattr(run_folder, "load_file", load)
    assert run_folder.restore_checkpoint(tmp_path, policy, optimizer) == 1
    moments = optimizer.state[weight].values()
    kept = {tensor.untyped_storage().data_ptr() for tensor in (weight, *moments)}
    assert len(loaded) == 4 and len(kept) == 4
    assert not kept & {tensor.untyped_storage().data_ptr() for tensor in loaded}


@pytest.mark.parametrize(
    ("subfolder", "told"),
    [(r"a\b", "a/b"), ("a/b", "a/b"), ("a", "a"), ("a b", "a b")],
)
def test_a_subfolder_is_written_with_either_slash(tmp_path, subfolder, told):
    assert of_repository("someone/iapo", subfolder, None) == ("someone/iapo", {"subfolder": told})
    assert of_repository(str(tmp_path), subfolder, None)[0] == str(tmp_path.joinpath(told))


@pytest.mark.parametrize("subfolder", [r"..\x", r"a\..\..\x", r"C:\x", "C:x", r"\x", "/x", "../x"])
def test_no_subfolder_leads_out_of_its_repository(tmp_path, subfolder):
    for model in (str(tmp_path), "someone/iapo"):
        with pytest.raises(ValueError, match=r"subfolder is .*; it must be the path of a folder"):
            of_repository(model, subfolder, None)


@pytest.mark.parametrize("name", [r"C:\models\qwen", r"models\qwen", r".\qwen", r"\\server\qwen"])
def test_a_path_of_windows_is_not_looked_up_on_the_hub(name):
    assert looks_local(name) and not looks_local("someone/qwen")


# Processes and signals: Windows has neither fork nor SIGHUP, and can't send SIGTERM to another.

NEEDS_POSIX = {
    "fork", "forkpty", "wait4", "WIFEXITED", "geteuid", "getuid", "getpgid", "getsid", "setsid",
    "killpg", "nice", "mkfifo", "SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "setitimer", "alarm",
}  # fmt: skip
MODULES_OF_POSIX = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "multiprocessing"}
"""multiprocessing starts its processes in another way on every system."""


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.parts[0] == "iapo_mini"], ids=str)
def test_what_posix_alone_has_is_used_where_there_is_another_way(path):
    nodes = list(ast.walk(tree_of(path)))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    imported |= {(node.module or "").split(".")[0] for node in nodes
                 if isinstance(node, ast.ImportFrom)}  # fmt: skip
    assert not imported & MODULES_OF_POSIX
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)
            and getattr(node.value, "id", "") in ("os", "signal")}  # fmt: skip
    # test_verify.py tries the verifier without fork.
    known = {"fork", "wait4", "WIFEXITED", "setitimer"} if path.name == "verify.py" else set()
    assert used & NEEDS_POSIX == known


def test_without_sighup_the_other_signals_ask_a_run_to_end():
    code = """
        import signal
        if hasattr(signal, "SIGHUP"):
            del signal.SIGHUP
        from iapo_mini.signals import asked_to_end
        for name in ("SIGINT", "SIGTERM"):
            number = getattr(signal, name)
            before = signal.signal(number, signal.SIG_DFL)
            with asked_to_end() as asked:
                signal.raise_signal(number)
                print(name, asked.is_set())
    """
    assert python(code) == ["SIGINT", "True", "SIGTERM", "True"]


RUN = """
import sys, time
from pathlib import Path
from iapo_mini.lab.runs import _jobs_of_parent
from iapo_mini.signals import asked_to_end
log = Path(sys.argv[1])
for _ in _jobs_of_parent("the first"):
    with asked_to_end() as asked:
        log.write_bytes(b"ready")
        while not asked.is_set():
            time.sleep(0.01)
        log.write_bytes(b"saved")
        break
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A process as an experiment starts one for a run, which is only waiting to be asked to end."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    popen = subprocess.Popen

    def stand_in(command, **how):
        return popen([*command[:-3], "-c", RUN, str(tmp_path / "log.txt")], **how)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", stand_in)
        process = runs._give({"run": str(tmp_path)}, None)
    end = time.monotonic() + PATIENCE
    while runs._last_line(tmp_path) != "ready":
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


def test_a_run_is_asked_to_end_in_a_way_that_every_system_has(started, tmp_path, monkeypatch):
    process = started
    monkeypatch.setattr(process, "terminate", None)  # on Windows it ends a process at once
    runs._ask_to_end([process])
    assert process.returncode == 0
    assert runs._last_line(tmp_path) == "saved"


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="asks POSIX for a process's group")
def test_a_terminals_ctrl_c_does_not_reach_the_runs_beside_their_command(started):
    """It would be a second request to end, which does not wait for the step."""
    assert os.getpgid(started.pid) != os.getpgid(0)


def test_a_group_of_its_own_is_asked_for_in_windows_word_too(tmp_path, monkeypatch):
    asked = []

    def popen(command, **how):
        asked.append(how)
        raise OSError("not here")

    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(verify, "_process", None)
    for start in (lambda: runs._give({"run": str(tmp_path)}, None), verify._started):
        with pytest.raises(OSError, match="not here"):
            start()
    assert [how["creationflags"] for how in asked] == [0x200, 0x200]
    assert all(how["start_new_session"] for how in asked)


@pytest.mark.skipif(os.name != "posix", reason="simulates Windows' make")
def test_make_finds_python_where_windows_keeps_it():
    command = ["make", "--no-print-directory", "-n", "full", "OS=Windows_NT"]
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no make here")
    assert told.splitlines()[-1].startswith(".venv/Scripts/python -m iapo_mini compare")
