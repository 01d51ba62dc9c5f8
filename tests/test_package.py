"""The package without its repository: the contents of wheel and sdist, and that they work."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import PATIENCE
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def run(*command, cwd, **environment):
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True,
        timeout=PATIENCE, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a copy of the tracked files, and the output of building it."""
    folder = tmp_path_factory.mktemp("built")
    listed = run("git", "ls-files", "-z", cwd=ROOT)
    if listed.returncode:
        pytest.skip("needs the git repository: it knows which files are part of the project")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    code = (
        "import setuptools.build_meta as b; "
        "print(b.build_sdist('../dist')); print(b.build_wheel('../dist'))"
    )
    (folder / "dist").mkdir()
    done = run(sys.executable, "-W", "default", "-c", code, cwd=folder / "tree")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def wheel(built):
    (path,) = (built[0] / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(built):
    """Folder with the installed wheel, to put on the path."""
    site = built[0] / "site"
    with zipfile.ZipFile(wheel(built)) as archive:
        archive.extractall(site)
    return site


def test_setuptools_gives_no_warnings(built):
    # Of a clean tree it remarks that there was nothing to leave out.
    usual = "byte-compiling is disabled|no previously-included"
    said = [line for line in built[1].splitlines() if not re.search(usual, line)]
    bad = [line for line in said if re.search("warning|deprecat|absent", line, re.IGNORECASE)]
    assert not bad, bad


def test_wheel_holds_every_module_the_policies_and_the_results(built):
    names = set(zipfile.ZipFile(wheel(built)).namelist())
    for path in (ROOT / "iapo_mini").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "figures/results").glob("*.json"):
        assert f"iapo_mini/results/{path.name}" in names
    for policy in ("embedded", "embedded_calibrated", "embedded_uncalibrated"):
        assert f"iapo_mini/policies/{policy}/model.safetensors" in names
    assert "iapo_mini/py.typed" in names
    assert not any(name.startswith(("tests/", "notebooks/")) for name in names)


def test_the_sdist_holds_everything_that_its_tests_need(built):
    (path,) = (built[0] / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "notebooks", "docs", "figures", "examples", "benchmarks"):
        tracked = run("git", "ls-files", folder, cwd=ROOT).stdout.split("\n")
        kept = {n for n in tracked if n and "results/runs" not in n and (ROOT / n).is_file()}
        assert kept and kept <= names, sorted(kept - names)
    assert {"Makefile", "requirements.txt", "LICENSE", "tests/conftest.py"} <= names


def test_metadata_for_the_package_index_is_complete(built):
    with zipfile.ZipFile(wheel(built)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(archive.read(name).decode())
    assert told["Name"] == "iapo-mini" and told["Author"] and told["License-Expression"] == "MIT"
    assert told["Keywords"] and "Programming Language :: Python :: 3.13" in told.get_all(
        "Classifier"
    )
    assert any("Repository" in url for url in told.get_all("Project-URL"))
    assert told.get_payload().startswith("# iapo-mini")
    # On the page of the package index relative links do not work.
    for target in re.findall(r"\]\(([^)]+)\)", told.get_payload()):
        assert re.match(r"https://|#", target), target


def test_it_is_imported_in_an_empty_folder(installed, tmp_path):
    code = "import iapo_mini, iapo_mini.tools.course as c; print(iapo_mini.__file__); "
    code += "print(len(c.committed_result('table1.json')['methods']) > 3)"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout and done.stdout.endswith("True\n")


def test_compare_runs_in_an_empty_folder(installed, tmp_path):
    done = run(
        sys.executable, "-m", "iapo_mini", "compare", "--preset", "quick", cwd=tmp_path,
        PYTHONPATH=str(installed), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| IAPO |" in done.stdout
    assert (tmp_path / "figures/results/compare_quick.json").is_file()


def test_dependency_ranges_allow_colabs_versions():
    """Installing the library there must change no package; .ci/colab tries it for real."""
    lines = (ROOT / ".ci/colab.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    brought = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    met = {need.name for need in map(Requirement, asked) if need.name in brought}
    assert met >= {"torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "ipywidgets"}
    for need in map(Requirement, asked):
        if need.name in brought:
            assert need.specifier.contains(brought[need.name]), need
