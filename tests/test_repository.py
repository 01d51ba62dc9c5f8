"""Several models in one repository, with a subfolder for each, like the authors' models."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import PATIENCE, tiny_policy

from iapo_mini.model_files import of_repository
from iapo_mini.policy import load_policy

IDS = torch.tensor([[5, 9, 2, 300, 41, 7]])
HIDDEN = {"Qwen2.5-0.5B-Instruct_GSM8K": 32, "math/Qwen2.5-0.5B-Instruct_MATH-500": 64}
NAMES = list(HIDDEN)


@pytest.fixture(scope="module")
def repository(tokenizer, tmp_path_factory):
    """A folder without a model at its top, but with two models of different width below it."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "README.md").write_text("Two models.", encoding="utf-8")
    for name, hidden in HIDDEN.items():
        policy = tiny_policy("qwen2", tokenizer, hidden_size=hidden)
        policy.model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def hub_home(repository, tmp_path_factory):
    """The same repository in the cache of the hub's client, at two revisions, for offline use."""
    home = tmp_path_factory.mktemp("home")
    kept = home / "hub" / "models--someone--iapo"
    (kept / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("second", "b" * 40)):
        (kept / "refs" / name).write_text(commit, encoding="utf-8")
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / ("b" * 40)).symlink_to(repository)
    # The first revision held one of the models under another name.
    first = kept / "snapshots" / ("a" * 40)
    first.mkdir()
    (first / "early").symlink_to(repository / NAMES[0])
    return home


def python(code, home, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
        timeout=PATIENCE, env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_named_model_of_a_folder_is_loaded(repository, name):
    policy = load_policy(str(repository), subfolder=name, lora_rank=0)
    assert policy.model.config.hidden_size == HIDDEN[name]
    alone = load_policy(str(repository / name), lora_rank=0)
    assert torch.equal(policy.model(IDS).logits, alone.model(IDS).logits)


def test_a_named_model_of_a_folder_loads_in_4_bits(repository):
    pytest.importorskip("bitsandbytes", reason="the extra [four-bit] is not installed")
    policy = load_policy(str(repository), subfolder=NAMES[1], four_bit=True)
    assert policy.model.config.hidden_size == HIDDEN[NAMES[1]]


LOADS = """
import json, sys
from iapo_mini.adapters import base_of
from iapo_mini.policy import load_policy
cases, four_bit, out = json.loads(sys.argv[1]), bool(sys.argv[2]), sys.argv[3]
for asked in cases:
    policy = load_policy("someone/iapo", **asked, four_bit=four_bit, lora_rank=2)
    policy.save(out)
    again = load_policy(adapter=out, four_bit=four_bit)
    widths = [p.model.config.hidden_size for p in (policy, again)]
    print(json.dumps([widths, base_of(out)]))
"""


@pytest.mark.parametrize("four_bit", ["", "yes"], ids=["fp32", "4-bit"])
def test_subfolder_and_revision_reach_the_hub_and_an_adapter_keeps_them(
    hub_home, tmp_path, four_bit
):
    if four_bit:
        pytest.importorskip("bitsandbytes", reason="the extra [four-bit] is not installed")
    cases = [
        {"subfolder": "early"},
        {"subfolder": NAMES[0], "revision": "second"},
        {"subfolder": NAMES[1], "revision": "b" * 40},
    ]
    told = python(LOADS, hub_home, json.dumps(cases), four_bit, tmp_path).splitlines()
    for case, line in zip(cases, told, strict=True):
        width = HIDDEN.get(case["subfolder"], HIDDEN[NAMES[0]])
        assert json.loads(line) == [[width, width], {"model": "someone/iapo", **case}]


def evaluate(*arguments, home):
    return subprocess.run(
        [sys.executable, "-m", "iapo_mini", "evaluate", *map(str, arguments), "--problems", "2",
         "--k", "1", "--max-completion-length", "4", "--threads", "1"],
        capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_evaluate_takes_a_model_of_a_repository(repository, hub_home, tmp_path):
    results = {}
    for kind, model in (
        ("folder", [repository]),
        ("hub", ["someone/iapo", "--revision", "second"]),
    ):
        out = tmp_path / f"{kind}.json"
        done = evaluate("--model", *model, "--subfolder", NAMES[0], "--out", out, home=hub_home)
        assert done.returncode == 0, done.stderr
        results[kind] = json.loads(out.read_text(encoding="utf-8"))
        assert results[kind]["config"]["subfolder"] == NAMES[0]
    assert results["folder"]["length"] == results["hub"]["length"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"subfolder": "GSM8K"}, r"not a model folder \(it has no config.json\)"),
        ({"subfolder": "../other"}, "subfolder is '../other'; it must be the path of a folder in"),
        ({"subfolder": "/tmp"}, "subfolder is '/tmp'; it must be the path of a folder inside"),
        ({"revision": "main"}, "revision is 'main', but model is .* only hub ids have revisions"),
        ({"model": "embedded", "subfolder": "x"}, "'embedded', which has no subfolders"),
        ({"model": "embedded", "revision": "x"}, "'embedded'; only hub ids have revisions"),
    ],
    ids=str,
)
def test_a_missing_subfolder_of_a_folder_is_one_sentence(repository, asked, told):
    with pytest.raises(ValueError, match=told):
        load_policy(**{"model": str(repository), **asked})


@pytest.mark.parametrize(
    ("option", "value"), [("subfolder", "late"), ("revision", "third")], ids=str
)
def test_a_missing_subfolder_of_the_hub_is_one_sentence(hub_home, tmp_path, option, value):
    out = tmp_path / "e.json"
    done = evaluate("--model", "someone/iapo", f"--{option}", value, "--out", out, home=hub_home)
    assert done.returncode == 2 and not out.exists()
    (line,) = done.stderr.strip().splitlines()
    assert f"got 'someone/iapo', {option} '{value}', which can't be loaded" in line


def test_the_hub_is_asked_only_for_given_settings():
    assert of_repository("someone/iapo", "", None) == ("someone/iapo", {})
    assert of_repository("someone/iapo", "a", None) == ("someone/iapo", {"subfolder": "a"})
