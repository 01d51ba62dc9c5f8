"""The authors' checkpoints, here a folder of the same layout with models of our own."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

from iapo_mini.lab import released as module
from iapo_mini.lab.released import (
    CHECKPOINTS,
    held_out,
    released,
    released_page,
    released_table,
    rows,
)
from iapo_mini.policies import EMBEDDED, EMBEDDED_CALIBRATED
from iapo_mini.policy import load_policy
from iapo_mini.tasks import Problem

ROOT = Path(__file__).parent.parent
SETTINGS = dict(num_generations=2, max_completion_length=8, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A base model, and checkpoints as subfolders of one folder."""
    folder = tmp_path_factory.mktemp("hub")
    base, other = (load_policy(name, lora_rank=0) for name in (EMBEDDED, EMBEDDED_CALIBRATED))
    targets = {folder / "base-0.5B": base} | {
        folder / "iapo" / found.subfolder: other for found in CHECKPOINTS if found.size == "0.5B"
    }
    for target, policy in targets.items():
        policy.model.save_pretrained(target)
        policy.tokenizer.save_pretrained(target)
    gsm8k = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(17)]
    math = [{"problem": f"Find {n} + 2.", "answer": str(n + 2)} for n in range(10)]
    for name, lines in (("gsm8k", gsm8k), ("math", math)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def arguments(hub):
    return dict(
        repository=str(hub / "iapo"), base=str(hub / "base-{size}"),
        data_files=(str(hub / "gsm8k.jsonl"), str(hub / "math.jsonl")),
    )  # fmt: skip


def test_a_checkpoint_whose_weights_are_next_to_nothing_is_grpo():
    kinds = {(found.size, found.data): found.kind for found in CHECKPOINTS}
    assert sorted(key for key, kind in kinds.items() if kind == "GRPO-like") == [
        ("1.5B", "math500"), ("7B", "dapo_math"), ("7B", "math500"),
    ]  # fmt: skip
    assert CHECKPOINTS[0].subfolder == "Qwen2.5-0.5B-Instruct_GSM8K"


def test_the_held_out_problems_are_those_of_the_authors_shuffle():
    problems = [Problem(str(n), "1") for n in range(500)]
    random.seed(42)  # as their set_seed and get_dataset do
    order = list(range(500))
    random.shuffle(order)
    assert [int(p.question) for p in held_out(problems)] == order[400:]


def test_every_model_is_judged_on_whole_sets_and_on_the_first_fifteen(hub, tmp_path):
    results = released(["0.5B"], **arguments(hub), **SETTINGS, out=tmp_path / "o", figures=tmp_path)
    assert list(results["rows"]) == list(rows(["0.5B"]))
    for name, row in results["rows"].items():
        assert row["metrics"]["problems"] == (2 if row["data"] == "math500" else 17), name
        assert row["fifteen"]["problems"] == (2 if row["data"] == "math500" else 15)
        assert {"pass@1", "lenient pass@1", "length", "ratio@1"} <= set(row["metrics"])
    assert results["rows"]["IAPO 0.5B, GSM8K"]["model"] == "Qwen2.5-0.5B-Instruct_GSM8K"
    kept = json.loads((tmp_path / "results" / "released.json").read_text(encoding="utf-8"))
    assert kept == results
    page = (tmp_path / "released.md").read_text(encoding="utf-8")
    assert page == released_page(results) and page.count("not yet") == 5 * (
        len(rows(module.SIZES)) - 5
    )


def test_a_stopped_command_goes_on_with_the_next_model(hub, tmp_path, monkeypatch):
    given = arguments(hub) | SETTINGS
    whole = released(["0.5B"], **given, out=tmp_path / "o", figures=tmp_path / "a")
    loaded = []

    def stopping(*args, **kwargs):
        if len(loaded) == 2:
            raise KeyboardInterrupt
        loaded.append(kwargs["subfolder"])
        return load_policy(*args, **kwargs)

    options = dict(**given, out=tmp_path / "p", figures=tmp_path / "b")
    monkeypatch.setattr(module, "load_policy", stopping)
    with pytest.raises(KeyboardInterrupt):
        released(["0.5B"], **options)
    monkeypatch.setattr(module, "load_policy", load_policy)
    again = released(["0.5B"], **options)
    assert again["rows"] == whole["rows"]
    for name, value in (("num_generations", 3), ("base", "./b-{size}"), ("repository", "./x")):
        with pytest.raises(ValueError, match=rf"{name} is .*was made with .*name other folders"):
            released(["0.5B"], **{**options, name: value})


def test_the_command_prints_the_table(hub, tmp_path):
    gsm8k, math = arguments(hub)["data_files"]
    done = subprocess.run(
        [sys.executable, "-m", "iapo_mini", "lab", "released", "--repository", hub / "iapo",
         "--base", str(hub / "base-{size}"), "--data-files", gsm8k, math, "--num-generations", "2",
         "--max-completion-length", "8", "--out", tmp_path / "o", "--figures", tmp_path,
         "--device", "cpu"],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "released.json").read_text(encoding="utf-8"))
    assert released_table(results) in done.stdout


@pytest.mark.parametrize(
    ("sizes", "option", "told"),
    [
        (["3B"], {}, "sizes must be .*got '3B'"),
        (["0.5B"], dict(num_generations=0), "num_generations must be at least 1"),
        (["0.5B"], dict(max_completion_length=0), "max_completion_length must be at least 1"),
        (["0.5B"], dict(repository="{}/none"), "model must be .*none"),
    ],
)
def test_bad_options_are_refused(hub, tmp_path, sizes, option, told):
    option = {k: v.format(hub) if isinstance(v, str) else v for k, v in option.items()}
    options = arguments(hub) | SETTINGS | option
    with pytest.raises(ValueError, match=told):
        released(sizes, **options, out=tmp_path, figures=tmp_path)


def test_the_committed_table_is_that_of_the_committed_results():
    path = ROOT / "figures/results/released.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    page = (ROOT / "figures/released.md").read_text(encoding="utf-8")
    assert page == released_page(results)
