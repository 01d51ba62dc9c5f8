"""What a visitor meets first: workflows, templates, citation, changelog, the project's address."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import load_script

import iapo_mini

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PINNED = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), re.M))


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets():
    """Public targets of the Makefile."""
    (names,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE, re.M)
    return names.replace("\\\n", " ").split()


def commands(workflow):
    """What the steps of a workflow run."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"]
            if "run" in step]  # fmt: skip


def test_there_are_workflows_for_tests_package_notebooks_and_colab():
    assert {path.stem for path in WORKFLOWS} >= {"tests", "package", "notebooks", "colab"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_whole(path):
    workflow = read(path)
    assert workflow["name"] and workflow[True], "'on' is true in YAML"
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there(path):
    text = "\n".join(commands(read(path)))
    for target in re.findall(r"\bmake ([a-z]+)", text):
        assert target in targets(), target
    for script in re.findall(r"(?:^|\s)((?:\.ci|site|notebooks|benchmarks)/[\w./-]+)", text):
        assert (ROOT / script).is_file(), script
        if script.startswith(".ci/") and not script.endswith(".py") and os.name == "posix":
            assert os.access(ROOT / script, os.X_OK), script
    installed = PINNED | set(" ".join(re.findall(r"pip install ([\w ]+)", text)).split())
    for asked in re.findall(r"(?:-r|--requirement) (\S+)", text):
        installed |= set(re.findall(r"^([\w-]+)", (ROOT / asked).read_text("utf-8"), re.M))
    for module in re.findall(r"python -m (\w+)", text):
        assert module in installed | {"pip", "venv"}, module


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_needs_no_server_but_public_ones(path):
    hosts = set(re.findall(r"https?://([^/\s]+)", path.read_text(encoding="utf-8")))
    assert hosts <= {"download.pytorch.org", "github.com"}


def test_tests_run_on_every_system_and_python_that_is_promised():
    matrix = read(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    promised = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if " :: Python :: 3." in c]
    assert matrix["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_tests_run_what_make_test_runs():
    told = " ".join(commands(read(ROOT / ".github/workflows/tests.yml")))
    for target in ("style", "types", "test"):
        (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
        for command in re.findall(r"\$\(RUN\) (.+)", recipe):
            assert f"python -m {command}" in told, command


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_whole(path):
    form = read(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_a_report_of_a_fault_brings_what_is_needed_to_find_it():
    text = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8")
    for part in ("iapo-mini --version", "config.json", "metrics.jsonl", "iapo-mini diagnose"):
        assert part in text


def test_the_citation_names_this_version_and_the_paper():
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"]
    assert cited["authors"] and cited["license"] == PROJECT["license"]
    assert cited["version"] == iapo_mini.__version__
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    paper = cited["preferred-citation"]
    assert paper["url"] == "https://arxiv.org/abs/2602.19049" and paper["year"] == 2026
    names = " ".join(author["family-names"] for author in paper["authors"])
    assert names == "He Zhu Shi Zheng Su Wang Guo Li"


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## \[([^]]+)\]", text, re.M)
    assert iapo_mini.__version__ in entries[:2]  # below what is not yet in a version
    assert f"\n[{iapo_mini.__version__}]: https://" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_help_lists_every_target_and_what_it_does():
    told = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dict(re.findall(r"^make (\w+) +(\S.*)$", told.stdout, re.M))
    assert sorted(lines) == sorted(targets())
    assert lines["torture"] == "test with kills, full disks and hostile input (a few minutes)"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_alone_is_the_demo():
    told = subprocess.run(
        ["make", "--no-print-directory", "-n"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines()[-1].endswith("iapo_mini compare --preset demo")


def test_a_commit_is_held_to_the_pinned_ruff_and_mypy():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook["entry"].split() for hook in repository["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "mypy"}
    assert all(entry[:2] == ["python", "-m"] and entry[2] in PINNED for entry in hooks.values())


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md"])
def test_links_and_names_of_files_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`((?:tests|benchmarks|examples|figures)/[\w./]+)`", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`make ([a-z]+)", text):
        assert target in targets(), target


def test_every_committed_result_has_the_command_that_remakes_it():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (ROOT / "figures/results").glob("*.json"):
        assert f"`{path.name}`" in text or re.search(r"_(quick|demo)$", path.stem), path.name


# The repository's address.


@pytest.fixture(scope="module")
def repository():
    return load_script(ROOT / ".ci/repository.py")


@pytest.fixture(scope="module")
def texts(repository):
    """Text files of the project: path -> content."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository: it knows which files are part of the project")
    return {path.relative_to(ROOT): path.read_bytes() for path in repository.files(ROOT)}


@pytest.fixture
def tree(texts, tmp_path):
    """A copy of the project's text files."""
    for name, content in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def contents(tree):
    return {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


ADDRESS = re.compile(
    rb"(?:\bgithub\.com[/:]|githubusercontent\.com/|/github/|/gh/)([\w-]+)/([\w-]+)"
)
SITE = re.compile(rb"//([\w-]+)\.github\.io/([\w-]+)")


def addresses(content):
    found = [*ADDRESS.findall(content), *SITE.findall(content)]
    return [(owner.decode(), name.decode()) for owner, name in found]


def test_every_address_of_ours_is_that_of_pyproject(repository, texts):
    ours = repository.address(ROOT)
    where = {path: addresses(content) for path, content in texts.items()}
    for path, found in where.items():
        for owner, name in found:
            mine = owner == ours[0] or name in (ours[1], PROJECT["name"])
            assert not mine or (owner, name) == ours, path
    notebooks = [path for path in where if path.suffix == ".ipynb"]
    assert notebooks and all(ours in where[path] for path in notebooks)  # they are opened alone
    for url in PROJECT["urls"].values():
        assert addresses(url.encode()) == [ours]


@pytest.mark.parametrize(
    "new", [("someone", "iapo"), ("A-b-1", "iapo-mini"), ("iapo-mini", "x_y.z")]
)
def test_there_and_back_are_the_same_bytes(repository, tree, new):
    old, before = repository.address(tree), contents(tree)
    changed = repository.move(tree, new)
    after = contents(tree)
    assert {path.relative_to(tree) for path in changed} == {
        p for p in after if after[p] != before[p]
    }
    assert repository.address(tree) == new
    for path, content in after.items():
        assert not any(p.search(content) for p in repository.patterns(*old)), path
        if path.suffix == ".ipynb":
            assert "/".join(new) in json.dumps(json.loads(content))
    repository.move(tree, old)
    assert contents(tree) == before


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("https://github.com/{}/{}", True),
        ("See https://github.com/{}/{}.", True),
        ("[x](https://github.com/{}/{}/blob/main/README.md#start)", True),
        ("pip install git+https://github.com/{}/{}.git@v1", True),
        ("git@github.com:{}/{}.git", True),
        ("https://raw.githubusercontent.com/{}/{}/main/a.png", True),
        ("https://colab.research.google.com/github/{}/{}/blob/main/a.ipynb", True),
        ("https://mybinder.org/v2/gh/{}/{}/HEAD", True),
        ("https://{}.github.io/{}/", True),
        ("https://github.com/{}/{}-data", False),
        ("https://github.com/{}/{}.js", False),
        ("https://github.com/x{}/{}", False),
        ("https://x{}.github.io/{}/", False),
        ("https://notgithub.com/{}/{}", False),
        ("{}/{}", False),
    ],
)
def test_an_address_is_known_in_every_form_and_nothing_else_is(repository, text, changes):
    old, new = ("a-b", "c-d"), ("e", "f.g")
    found = repository.rewritten(text.format(*old).encode(), old, new).decode()
    assert found == text.format(*(new if changes else old))


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (("", "x"), "OWNER must be one of GitHub"),
        (("a b", "x"), "OWNER must be .* got 'a b'"),
        (("-a", "x"), "OWNER must be"),
        (("a" * 41, "x"), "OWNER must be"),
        (("a", ""), "NAME must be one of GitHub"),
        (("a", "x/y"), "NAME must be .* got 'x/y'"),
        (("a", ".."), "NAME must be"),
        (("a", "x.git"), "NAME must be"),
        (("huggingface", "Math-Verify"), "names as another project"),
    ],
)
def test_what_can_be_no_address_is_refused_and_nothing_is_changed(repository, tree, new, told):
    before = contents(tree)
    with pytest.raises(ValueError, match=told):
        repository.move(tree, new)
    assert contents(tree) == before
