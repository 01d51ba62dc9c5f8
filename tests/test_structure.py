"""The structure of the package: allowed imports, length of files, and late imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

import iapo_mini

ROOT = Path(iapo_mini.__file__).parent
FILES = {
    ".".join(("iapo_mini", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
}

METHOD = (
    "tasks problems policies memory files signals chat model_files adapters four_bit policy "
    "rollouts attention sampling logprobs rewards early_exit information intervals advantages "
    "objective config metrics run_folder trainer evaluation exit_training calibration plots "
    "alt_text diagrams"
).split()
"""The rooms of the method; the wings tools, engines, lab and exercises look into them."""


def imports_of(path, late=True):
    """Modules of the package that a file imports; ``late`` includes imports inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if late else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("iapo_mini"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
            found |= {f"{name}.__init__" for name in names if f"{name}.__init__" in FILES}
    return {name.removesuffix(".__init__") for name in found}


GRAPH = {
    name.removesuffix(".__init__"): imports_of(path, late=False) for name, path in FILES.items()
}


def test_no_imports_are_circular():
    state = {}

    def visit(name, way):
        assert state.get(name) != "open", " -> ".join([*way, name])
        if name in state or name not in GRAPH:
            return
        state[name] = "open"
        for other in sorted(GRAPH[name]):
            visit(other, [*way, name])
        state[name] = "done"

    for name in GRAPH:
        visit(name, [])


def wing(module):
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("module", [m for m in GRAPH if wing(m) in METHOD])
def test_the_method_imports_no_wing(module):
    allowed = {"iapo_mini.engines.vllm"} if module == "iapo_mini.trainer" else set()
    looks = {m for m in imports_of(FILES.get(module) or FILES[f"{module}.__init__"])
             if wing(m) in ("tools", "lab", "engines", "exercises")}  # fmt: skip
    assert looks <= allowed


def test_only_exercises_import_exercises():
    for module, path in FILES.items():
        if wing(module) != "exercises":
            assert not [m for m in imports_of(path) if wing(m) == "exercises"], module


def test_tools_and_engines_do_not_import_the_lab():
    for module, path in FILES.items():
        if wing(module) in ("tools", "engines"):
            assert not [m for m in imports_of(path) if wing(m) == "lab"], module


def test_advantages_and_objective_import_only_torch_and_rollouts():
    for name in ("advantages", "objective"):
        assert GRAPH[f"iapo_mini.{name}"] <= {"iapo_mini.rollouts"}


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_fit_on_a_few_screens(module):
    text = FILES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{module}.{node.name}"
            assert node.end_lineno - node.lineno < 80, where
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            assert len([n for n in names if n not in ("self", "cls")]) <= 6, where


def test_public_names_are_loaded_on_first_use():
    code = (
        "import sys, iapo_mini; assert 'torch' not in sys.modules; "
        "assert iapo_mini.TrainConfig().method == 'iapo'; assert 'torch' not in sys.modules; "
        "assert len(iapo_mini.__all__) == 10; "
        "assert all(getattr(iapo_mini, name) for name in iapo_mini.__all__); "
        "assert set(iapo_mini.__all__) <= set(dir(iapo_mini))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        iapo_mini.nothing  # noqa: B018
