"""The command line as a process: its output, its files, and its errors for bad input."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import PATIENCE

from iapo_mini.cli import COMMANDS, main
from iapo_mini.recipes import RECIPES
from iapo_mini.tools.methods import recipe_line

SMALL = ["--max-steps", "1", "--prompts-per-step", "2", "--num-generations", "2", "--threads", "1"]


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "iapo_mini", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One `compare --preset quick`, shared by the tests of its results."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["compare", "--preset", "quick", "--out", folder / "runs"]
    arguments += ["--figures", folder / "figures", "--parallel", "2"]
    return folder, arguments, run(*arguments)


def test_compare_prints_the_table_and_writes_the_files_it_names(compared):
    folder, _, done = compared
    assert done.returncode == 0, done.stderr
    for row in ("| start policy |", "| GRPO |", "| IAPO |", "Pass@8", "Length@8", "Ratio@8"):
        assert row in done.stdout
    results = json.loads(
        (folder / "figures/results/compare_quick.json").read_text(encoding="utf-8")
    )
    assert results["seeds"] == [0]
    for method in ("start", "grpo", "iapo"):
        for metric in ("length", "pass@1", "pass@8", "ratio@8"):
            assert len(results["methods"][method][metric]) == 1
    assert results["config"]["iapo"]["alpha"] > 0
    assert results["versions"]["torch"]
    for name in ("", "_training", "_roles"):
        assert (folder / f"figures/compare_quick{name}.png").stat().st_size > 10_000
    assert (folder / "runs/quick/iapo-0/train/final/adapter_model.safetensors").is_file()


def test_compare_again_keeps_finished_runs(compared):
    folder, arguments, _ = compared
    results = folder / "figures/results/compare_quick.json"
    before = results.read_text(encoding="utf-8")
    made = (folder / "runs/quick/grpo-0/result.json").stat().st_mtime_ns
    results.unlink()
    assert run(*arguments).returncode == 0
    assert (folder / "runs/quick/grpo-0/result.json").stat().st_mtime_ns == made
    assert results.read_text(encoding="utf-8") == before


def test_evaluate_reads_the_trained_adapter(compared, tmp_path):
    folder, _, _ = compared
    adapter = folder / "runs/quick/iapo-0/train/final"
    done = run("evaluate", "--adapter", adapter, "--problems", 3, "--k", 1, 2, "--threads", 1,
               "--out", tmp_path / "e.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Ratio@k" in done.stdout
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert result["length@2"] > 0 and len(result["intervals"]["pass@1"]) == 2
    lines = (tmp_path / "e.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["text"].startswith("<think>")


def test_train_then_resume(tmp_path):
    out = tmp_path / "run"
    assert run("train", "--out", out, *SMALL, "--save-steps", 1).returncode == 0
    more = [*SMALL, "--save-steps", "1"]
    more[1] = "2"
    done = run("train", "--out", out, *more, "--resume")
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line)["step"]
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert steps == [1, 2]


@pytest.fixture
def questions(tmp_path):
    """A file of a dozen problems in GSM8K's format."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
        for n in range(1, 13)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_train_and_evaluate_on_a_local_file(tiny_folder, questions, tmp_path):
    out, data = tmp_path / "run", ["--data", "gsm8k", "--data-file", questions]
    small = [*SMALL, "--model", tiny_folder, "--max-completion-length", "6", *data]
    small[1] = "2"
    done = run("train", "--out", out, *small)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["data"] == "gsm8k"
    metrics = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [m["step"] for m in metrics] == [1, 2] and "tokens/compute" not in metrics[0]

    results = tmp_path / "e.json"
    judge = ["evaluate", "--model", tiny_folder, "--adapter", out / "final", *data, "--k", 1, 2]
    judge += ["--split", "all", "--problems", 5, "--batch-size", 4, "--threads", 1]
    judge += ["--max-completion-length", 6, "--out", results]
    done = run(*judge)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # the libraries are kept quiet
    assert "5 of 12 problems of gsm8k (all)" in done.stdout
    whole, text = (
        results.read_text(encoding="utf-8"),
        results.with_suffix(".jsonl").read_text(encoding="utf-8"),
    )
    assert text.count("\n") == 10
    # The state after a kill: no results, and one and a half batches.
    results.unlink()
    results.with_suffix(".jsonl").write_text(
        "".join(text.splitlines(keepends=True)[:5]) + '{"pro', encoding="utf-8"
    )
    assert run(*judge).returncode == 0
    assert (
        results.read_text(encoding="utf-8"),
        results.with_suffix(".jsonl").read_text(encoding="utf-8"),
    ) == (whole, text)
    other = run(*judge, "--seed", 1)
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].startswith("iapo-mini: seed is 1, but")


def test_evaluate_names_its_results_after_the_settings(tiny_folder, tmp_path):
    command = ["evaluate", "--model", tiny_folder, "--problems", 1, "--k", 1, "--threads", 1]
    command += ["--max-completion-length", 4]
    for seed in (0, 1, 1):
        assert run(*command, "--seed", seed, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "runs/evaluate").glob("stories-test-*.jsonl"))) == 2


def test_explain_prints_tokens_and_saves_the_heat_map(tmp_path):
    story = "Mia has 12 apples. She buys 5 more. How many apples does Mia have now?"
    done = run("explain", story, "--out", tmp_path / "h.png", "--color", "never")
    assert done.returncode == 0, done.stderr
    assert story in done.stdout and "<think>" in done.stdout and "nats" in done.stdout
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    colored = run("explain", story, "--out", tmp_path / "h.png", "--color", "always")
    assert "\x1b[" in colored.stdout


@pytest.mark.parametrize(
    "command",
    [
        "compare",
        "train",
        "evaluate",
        "explain",
        "plan",
        "export",
        "lab theory",
        "lab table1",
        "lab claims",
        "diagnose",
        "methods",
    ],
)
def test_help_names_defaults(command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert "default" in done.stdout or "(" in done.stdout


BAD = [
    (["train", "--out", "x", "--method", "ppo"], "method"),
    (["train", "--out", "x", "--alpha", "-1"], "alpha"),
    (["train", "--out", "x", "--num-generations", "1"], "num_generations"),
    (["train", "--out", "x", "--learning-rate", "nan"], "learning_rate"),
    (["train", "--out", "x", "--model", "."], "model"),
    (["train", "--out", "x", "--resume"], "output_dir"),
    (["train", "--out", "x", "--four-bit", "--lora-rank", "0"], "lora_rank"),
    (["plan", "--gpu", "big"], "gpu must be one of"),
    (["plan", "--shape", "qwen9"], "shape must be one of"),
    (["plan", "--prompt", "0"], "prompt must be at least 1"),
    (["export", "--adapter", ".", "--out", "x"], "adapter"),
    (["export", "--adapter", ".", "--out", "."], "out must be a new folder, got '.'"),
    (["train", "--out", "file/x"], "output_dir"),
    (["compare", "--preset", "huge"], "preset"),
    (["lab", "table1", "--preset", "huge"], "preset"),
    (["lab", "claims", "--preset", "huge"], "preset"),
    (["lab", "sweeps", "--preset", "quick", "--parallel", "0"], "parallel"),
    (["lab", "departures", "--preset", "quick", "--figures", "file"], "figures"),
    (["lab", "departures", "--preset", "quick", "--parallel", "0"], "parallel"),
    (["lab", "starts", "--preset", "tiny"], "preset"),
    (["train", "--out", "run", "--estimator-stride", "word"], "estimator_stride"),
    (["train", "--out", "x", "--methods", "no_such_module"], "got 'no_such_module'"),
    (["compare", "--preset", "quick", "--parallel", "0"], "parallel"),
    (["compare", "--preset", "quick", "--figures", "file"], "figures"),
    (["evaluate", "--problems", "0"], "problems"),
    (["evaluate", "--k", "0"], "k must be at least 1, got 0"),
    (["evaluate", "--split", "dev"], "split"),
    (["evaluate", "--adapter", "."], "adapter"),
    (["explain", "  "], "story"),
    (["explain", "How many?", "--out", "file/h.png"], "out"),
    (["evaluate", "--out", "file/e.json"], "out"),
    (["evaluate", "--out", "e.jsonl"], "out must be a .json file"),
    (["evaluate", "--batch-size", "0"], "batch_size"),
    (["evaluate", "--max-completion-length", "0"], "max_completion_length"),
    (["evaluate", "--data", "gsm8k"], "--data-file"),
    (["evaluate", "--data", "gsm8k", "--data-file", "file"], "data_file must be a file of type"),
    (["evaluate", "--data", "gsm8k", "--data-file", "bad.jsonl"], "line 1 (not valid JSON)"),
    (["evaluate", "--early-exit", "0"], "early_exit must be above 0, got 0.0"),
    (["evaluate", "--early-exit", "nan"], "early_exit must be above 0, got nan"),
    (["evaluate", "--early-exit", "sure"], "early_exit must be a number of nats above 0, or"),
    (["evaluate", "--early-exit", "1", "--early-exit-stride", "0"], "early_exit_stride must be 1"),
    (["evaluate", "--early-exit-stride", "5"], "early_exit must be given with early_exit_stride"),
    (["lab", "early-exit", "--adapter", "x", "--untrained"], "adapter must be empty with"),
    (["lab", "early-exit", "--data-file", "x"], "model must be given with data_file, which is 'x'"),
    (["train", "--out", "x", "--data", "gsm8k"], "--data-file"),
    (["train", "--out", "x", "--data", "trivia"], "data must be one of"),
    (["train", "--out", "x", "--data", "math500"], "split must be one of"),
    (["train", "--out", "x", "--data", "gsm8k", "--data-file", "no.jsonl"], "no.jsonl"),
    (["train", "--out", "x", "--data-file", "bad.jsonl"], "data is 'stories'"),
]


def one_sentence(status, stderr, named, folder):
    lines = stderr.strip().splitlines()
    assert status == 2 and len(lines) == 1, stderr
    assert lines[0].startswith("iapo-mini: ") and named in lines[0]
    assert not (folder / "x" / "metrics.jsonl").exists()
    assert not list((folder / "runs").rglob("*.json*"))


def bad_files(folder):
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "bad.jsonl").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("arguments, named", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_status_two(arguments, named, tmp_path, monkeypatch, capfd):
    """Called in this process, since importing torch for each would take most of the time."""
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    one_sentence(ended.value.code, capfd.readouterr().err, named, tmp_path)


@pytest.mark.parametrize("number", [0, BAD.index((["explain", "  "], "story")), len(BAD) - 1])
def test_bad_input_ends_a_process_likewise(number, tmp_path):
    bad_files(tmp_path)
    arguments, named = BAD[number]
    done = run(*arguments, cwd=tmp_path)
    one_sentence(done.returncode, done.stderr, named, tmp_path)


def test_help_comes_at_once():
    """It takes less than a second of processor time, since commands import libraries late."""
    began = os.times()
    done = run("--help")
    spent = os.times()
    assert done.returncode == 0
    used = spent.children_user + spent.children_system
    assert used - began.children_user - began.children_system < 1.0
    order = [done.stdout.index(f"    {name} ") for name in COMMANDS]
    assert order == sorted(order) and done.stdout.index("    lab ") > order[-1]


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["plan", "--shape", "qwen2.5-7b", "--gpu", "12gb"], ["diagnose", "run"],
     ["methods"], ["train", "--help"], ["lab", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_commands_without_a_model_import_no_model_code(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    line = {"step": 1, "loss": 0.0, "reward": 1.0, "format": 1.0, "truncated": 0.0, "length": 9.0,
            "zero_variance_groups": 0.0, "grad_norm": 1.0, "kl": 0.0, "clip_ratio": 0.0,
            "entropy": 0.5, "informativeness": 0.1}  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    code = (
        "import sys\nfrom iapo_mini.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'transformers', 'peft', 'datasets', 'iapo_mini.policy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["train", "--out", "x", "--k", "8"], ["train", "--out", "x", "--learn", "1"],
     ["evaluate", "--prob", "3"], ["compare", "--pre", "quick"], ["lab", "tune", "--pre", "quick"]],
    ids=" ".join,
)  # fmt: skip
def test_options_are_not_abbreviated(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr
    assert not list(tmp_path.iterdir())


def test_methods_lists_every_methods_source_and_settings():
    done = run("methods")
    assert done.returncode == 0
    told = re.sub(r"\s+", " ", done.stdout)
    for name, recipe in RECIPES.items():
        assert f"{name} " in told and recipe.source in told and recipe.what in told
        assert recipe_line(recipe) in told


def test_train_prints_the_settings_from_the_recipe(tmp_path, schooled_folder):
    command = ["train", "--out", tmp_path / "run", "--model", schooled_folder, *SMALL]
    done = run(*command, "--max-completion-length", 12, "--method", "dapo", "--epsilon", "0.1")
    assert done.returncode == 0, done.stderr
    taken = "alpha 0.0, beta 0.0, aggregation token, epsilon_high 0.28, kl_coef 0.0"
    assert f"From the recipe of dapo: {taken}." in done.stdout
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (settings["epsilon"], settings["epsilon_high"]) == (0.1, 0.28)
    assert "epsilon" not in settings["from_recipe"] and "aggregation" in settings["from_recipe"]


def test_explain_leaves_committed_figures_alone(tmp_path, schooled_folder):
    done = run("explain", "2 + 2?", "--model", schooled_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
