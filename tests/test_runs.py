"""Runs in processes: contents of a job, a user's own methods, continuing after a stop."""

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE

from iapo_mini.files import write_json
from iapo_mini.lab import ledger, table1
from iapo_mini.lab.figures import methods
from iapo_mini.lab.judging import SHOWN_OPERATIONS, _answers, policy_of
from iapo_mini.lab.runs import START, collect, make_jobs, run_all, run_job
from iapo_mini.lab.sizes import SHORT, Size
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.recipes import RECIPES, Recipe, use_methods

TINY = Size(seeds=(0, 1), max_steps=1, problems=2, prompts_per_step=1, num_generations=2, ks=(1, 2))

MODULE = """
from iapo_mini.advantages import grpo
from iapo_mini.recipes import Recipe

def priced(rollouts, alpha, beta):
    return grpo(rollouts) - alpha * (rollouts.informativeness < beta) * rollouts.completion_mask

def estimate(policy, rollouts, how):
    return rollouts.token_entropies

RECIPES = {"priced": Recipe(priced, estimate, alpha=0.3)}
"""


@pytest.fixture
def own_methods(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = dict(RECIPES)
    yield "my_methods"
    sys.modules.pop("my_methods", None)
    RECIPES.clear()
    RECIPES.update(before)


def test_methods_of_a_module_are_added_once(own_methods):
    use_methods(own_methods)
    use_methods(own_methods)
    assert isinstance(RECIPES["priced"], Recipe) and RECIPES["priced"].alpha == 0.3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "can't be imported"),
        ("X = 1", "no dictionary RECIPES"),
        ("RECIPES = {'mine': len}", "no dictionary RECIPES"),
        (
            "from iapo_mini.recipes import Recipe\nRECIPES = {'grpo': Recipe('grpo')}",
            "'grpo' exists already",
        ),
    ],
)
def test_bad_modules_are_refused(own_methods, tmp_path, text, named):
    if text is not None:
        (tmp_path / "bad_methods.py").write_text(text, encoding="utf-8")
    sys.modules.pop("bad_methods", None)
    with pytest.raises(ValueError, match=named):
        use_methods("bad_methods")


def test_one_job_for_each_seed_and_recipe(tmp_path):
    jobs = make_jobs(TINY, tmp_path, {START: None, "a": {"method": "gfpo"}}, split="tune")
    names = [Path(job["run"]).name for job in jobs]
    assert names == ["start-0", "a-0", "start-1", "a-1"]
    assert jobs[0]["config"] is None and jobs[3]["config"]["method"] == "gfpo"
    assert [job["seed"] for job in jobs] == [0, 0, 1, 1] and jobs[3]["config"]["seed"] == 1
    assert all(job["config"]["max_steps"] == 1 for job in jobs if job["config"])
    assert json.loads(json.dumps(jobs)) == jobs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    jobs = make_jobs(TINY, out, {START: None, "gtpo": {"method": "gtpo"}})
    run_all(jobs, parallel=2)
    return jobs


def test_results_hold_every_metric_of_every_seed(finished):
    results = collect(finished, TINY)
    for name in (START, "gtpo"):
        row = results["methods"][name]
        for metric in ("length", "pass@1", "pass@2", "length@2", "ratio@1", "train_minutes"):
            assert len(row[metric]) == 2, metric
        assert all(len(counts) == 2 for counts in row["roles"].values())
        assert row["by_steps"] and all(len(x["length"]) == 2 for x in row["by_steps"].values())
    assert [len(run["length"]) for run in results["curves"]["gtpo"]] == [1, 1]
    assert results["config"]["gtpo"]["method"] == "gtpo" and START not in results["config"]
    assert results["config"]["evaluation"]["split"] == "test"


def test_roles_and_steps_add_up(finished):
    for job in finished:
        result = json.loads((Path(job["run"]) / "result.json").read_text(encoding="utf-8"))
        lines = (Path(job["run"]) / "completions.jsonl").read_text(encoding="utf-8").splitlines()
        tokens = [json.loads(line)["tokens"] for line in lines]
        assert len(tokens) == 4 and result["length"] == pytest.approx(sum(tokens) / 4)
        # The end-of-sequence token has no role, every other token has one.
        assert sum(result["roles"].values()) == pytest.approx(result["length"] - 1)


def test_finished_runs_are_found_under_another_path(finished, tmp_path):
    (tmp_path / "moved").symlink_to(Path(finished[0]["run"]).parent)
    moved = [job | {"run": str(tmp_path / "moved" / Path(job["run"]).name)} for job in finished]
    before = [(Path(job["run"]) / "result.json").stat().st_mtime_ns for job in finished]
    run_all(moved, parallel=1)
    assert before == [(Path(job["run"]) / "result.json").stat().st_mtime_ns for job in finished]


def test_runs_from_before_a_setting_existed_are_found(finished):
    jobs = [Path(job["run"]) / "job.json" for job in finished]
    for job in jobs:
        saved = json.loads(job.read_text(encoding="utf-8"))
        if saved["config"]:
            del saved["config"]["estimator_stride"]
        job.write_text(json.dumps(saved), encoding="utf-8")
    before = [(job.parent / "result.json").stat().st_mtime_ns for job in jobs]
    run_all(finished, parallel=1)
    assert before == [(job.parent / "result.json").stat().st_mtime_ns for job in jobs]


def test_finished_runs_are_not_repeated_but_a_lost_one_is(finished):
    paths = [Path(job["run"]) / "result.json" for job in finished]
    before = [(p.stat().st_mtime_ns, json.loads(p.read_text(encoding="utf-8"))) for p in paths]
    paths[1].unlink()
    run_all(finished, parallel=1)
    after = [(p.stat().st_mtime_ns, json.loads(p.read_text(encoding="utf-8"))) for p in paths]
    for i, (old, new) in enumerate(zip(before, after)):
        assert (old[0] == new[0]) == (i != 1)
        assert {k: v for k, v in old[1].items() if k != "train_minutes"} == {
            k: v for k, v in new[1].items() if k != "train_minutes"
        }


def test_a_run_of_the_ledger_is_not_taken_from_a_folder_with_other_settings(finished, tmp_path):
    kept = tmp_path / "kept.jsonl"
    run_all(finished, parallel=1, kept=kept)  # writes the records of finished runs
    others = make_jobs(TINY, tmp_path / "runs", {START: None}, split="tune")
    for job in others:
        shutil.copytree(Path(finished[0]["run"]), job["run"])
        write_json(Path(job["run"]) / "job.json", job)
        result = Path(job["run"]) / "result.json"
        write_json(result, json.loads(result.read_text(encoding="utf-8")) | {"length": 111.0})
    own = make_jobs(TINY, tmp_path / "runs", {START: None})
    run_all(own, parallel=1, kept=kept)
    assert (
        collect(own, TINY, kept)["methods"][START]["length"]
        == (collect(finished, TINY)["methods"][START]["length"])
    )


def test_a_job_knows_its_start_policy_and_its_problems_by_their_content(tmp_path):
    """A study of another model, or at other levels, writes them to the same paths."""
    start, test_file = tmp_path / "start", tmp_path / "test.jsonl"
    start.mkdir()
    given = dict(start=str(start), test_file=str(test_file))

    def jobs(weights, rows):
        (start / "model.safetensors").write_bytes(weights)
        test_file.write_text(rows, encoding="utf-8")
        recipe = {"method": "gfpo", "data": "gsm8k", "data_file": str(test_file), "split": "all"}
        return make_jobs(TINY, tmp_path, {START: None, "a": recipe}, **given)

    first = jobs(b"1", "a")
    assert jobs(b"1", "a") == first
    for other in (jobs(b"2", "a"), jobs(b"1", "b")):
        assert all(x != y for x, y in zip(first, other))


def test_runs_in_the_ledger_need_no_folder(finished, tmp_path):
    """An experiment's results are computed from the lines of the ledger alone."""
    kept = tmp_path / "results" / "runs" / "table1.jsonl"
    run_all(finished, parallel=1, kept=kept)
    assert len(kept.read_text(encoding="utf-8").splitlines()) == len(finished)
    elsewhere = [job | {"run": str(tmp_path / "no" / Path(job["run"]).name)} for job in finished]
    run_all(elsewhere, parallel=1, kept=kept)
    assert not (tmp_path / "no").exists()
    assert collect(elsewhere, TINY, kept) == collect(finished, TINY)
    other = elsewhere[1] | {"config": {**elsewhere[1]["config"], "model": "no/such"}}
    with pytest.raises(RuntimeError, match="failed"):  # its settings are others, so it is made
        run_all([other], 1, kept)


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "a"}', "3"])
def test_a_damaged_line_of_the_ledger_is_named(tmp_path, line):
    kept = tmp_path / "table1.jsonl"
    kept.write_text(
        json.dumps({"name": "a", "job": {}, "result": {}, "curve": None}) + "\n" + line,
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"line 2 of .* is not a record of a run"):
        ledger.read(kept)


def test_judging_on_the_way_does_not_change_training(tmp_path, monkeypatch):
    """Judging at a step does not change training, and the primary step is reported."""
    monkeypatch.setattr("iapo_mini.lab.judging.WAY_PROBLEMS", 2)
    recipes = {"grpo": {"method": "grpo", "learning_rate": 5e-3}}
    sizes = [replace(TINY, seeds=(0,), max_steps=n) for n in (1, 3)]
    sizes.append(replace(sizes[1], primary=1, on_the_way=(1, 3)))
    results, policies = [], []
    for i, size in enumerate(sizes):
        (job,) = make_jobs(size, tmp_path / str(i), recipes)
        run_job(job)
        results.append(collect([job], size))
        policies.append(dict(policy_of(job).merged_weights()))
    short, long, both = (found["methods"]["grpo"] for found in results)
    assert results[1]["curves"] == results[2]["curves"]
    assert both["length"] == short["length"] and both["pass@2"] == short["pass@2"]
    assert both["on_the_way"].keys() == {"1", "3"} and both["aggregation"] == "sequence"
    assert "on_the_way" not in long
    # The reported policy is kept as well as the last one.
    assert all(torch.equal(policies[0][name], policies[2][name]) for name in policies[0])
    assert not all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


def completion(problem, correct, tokens):
    return {"problem": problem, "correct": correct, "tokens": tokens, "text": f"{tokens} tokens"}


def test_the_right_completion_of_median_length_is_kept_for_each_story():
    rows = [completion(3, True, n) for n in (9, 2, 5)] + [completion(3, False, 4)]
    rows += [completion(7, False, 1), completion(8, True, 6), completion(8, True, 3)]
    assert _answers(rows, [3, 7, 8]) == {"3": "5 tokens", "8": "6 tokens"}
    assert _answers(rows, []) == {}


@pytest.mark.parametrize("content", ["{", "", "[]", '{"length": 3.0}'])
@pytest.mark.parametrize("name", ["result.json", "job.json"])
def test_a_damaged_file_of_a_run_is_named_before_another_run_begins(finished, name, content):
    file = Path(finished[-1]["run"]) / name
    before = file.read_text(encoding="utf-8")
    file.write_text(content, encoding="utf-8")
    try:
        with pytest.raises(ValueError, match=rf"-1/{name}' can't be used .*; restore it, or"):
            run_all(finished, parallel=1)
    finally:
        file.write_text(before, encoding="utf-8")


def test_a_damaged_log_of_a_run_is_named(finished):
    file = Path(finished[-1]["run"]) / "train" / "metrics.jsonl"
    before = file.read_text(encoding="utf-8")
    file.write_text(before[:50] + "\n", encoding="utf-8")
    try:
        with pytest.raises(ValueError, match=r"metrics.jsonl' is damaged: line 1 does not hold"):
            collect(finished, TINY)
    finally:
        file.write_text(before, encoding="utf-8")


def test_a_run_is_the_same_whatever_its_process_did_before(tmp_path):
    """A process does one job after the other, so imports are needed only once."""
    size = replace(TINY, seeds=(0,), max_steps=2)
    recipes = {"iapo": {"method": "iapo", "seed": 4}, "grpo": {"method": "grpo", "seed": 7}}
    both = make_jobs(size, tmp_path / "both", recipes)
    (alone,) = make_jobs(size, tmp_path / "alone", {"grpo": recipes["grpo"]})
    run_all(both, parallel=1)
    run_all([alone], parallel=1)
    assert "log.txt" in {p.name for p in Path(both[1]["run"]).iterdir()}
    second, first = (collect([job], size)["methods"]["grpo"] for job in (both[1], alone))
    assert all(second[name] == first[name] for name in first if name != "train_minutes")
    weights = [dict(policy_of(job).merged_weights()) for job in (both[1], alone)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_job_that_fails_after_others_in_its_process_is_named(tmp_path):
    recipes = {"good": {"method": "grpo"}, "bad": {"method": "grpo", "model": "no-such/model"}}
    jobs = make_jobs(replace(TINY, seeds=(0,)), tmp_path, recipes)
    with pytest.raises(RuntimeError, match=r"the run in .*bad-0' failed: .*no-such/model"):
        run_all(jobs, parallel=1)
    assert (tmp_path / "good-0" / "result.json").is_file()


def test_a_failed_run_does_not_stop_those_beside_it(tmp_path):
    """What is in work is finished, and nothing else is begun."""
    bad = {"method": "grpo", "model": "no-such/model"}
    slow = {"method": "grpo", "max_steps": 15, "max_completion_length": SHORT}
    recipes = {"good": slow, "bad": bad, "later": {"method": "grpo"}}
    jobs = make_jobs(replace(TINY, seeds=(0,)), tmp_path, recipes)
    with pytest.raises(RuntimeError, match=r"^the run in .*bad-0' failed: .*no-such/model"):
        run_all(jobs, parallel=2)
    assert (tmp_path / "good-0" / "result.json").is_file()
    assert not (tmp_path / "later-0" / "log.txt").is_file()


def test_other_settings_in_the_same_folder_are_refused(finished):
    out = Path(finished[0]["run"]).parent
    jobs = make_jobs(TINY, out, {"gtpo": {"method": "gtpo", "alpha": 0.3}})
    with pytest.raises(ValueError, match="made with other settings"):
        run_all(jobs)


def test_a_failing_run_is_named_with_its_last_line(tmp_path):
    jobs = make_jobs(TINY, tmp_path, {"a": {"method": "grpo", "model": "no-such-folder/model"}})
    with pytest.raises(RuntimeError, match=r"the run in .*a-0' failed"):
        run_all(jobs[:1], parallel=1)


def test_a_users_own_method_trains_in_a_process(own_methods, tmp_path):
    recipes = {"mine": {"method": "priced"}}
    jobs = make_jobs(TINY, tmp_path / "out", recipes, methods=own_methods)[:1]
    run_all(jobs, parallel=1)
    log = (
        (tmp_path / "out" / "mine-0" / "train" / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert json.loads(log[0])["informativeness"] > 0
    settings = json.loads(
        (tmp_path / "out" / "mine-0" / "train" / "config.json").read_text(encoding="utf-8")
    )
    assert settings["alpha"] == 0.3 and settings["method"] == "priced"


def test_wall_clock_times_every_row_and_seed(finished):
    found = table1.wall_clock(finished, (START, "gtpo"), problems=1)
    assert all(len(v) == 2 and min(v) > 0 for v in found.values())
    assert torch.get_num_threads() >= 1


def test_one_story_is_answered_right_by_every_policy_shown(finished, tmp_path):
    """The story is also found if runs are only in the ledger."""
    kept = tmp_path / "table1.jsonl"
    first = finished[:2]
    answers = [{"1": "of start", "0": "x"}, {"1": "of gtpo", "4": "y"}]
    for job, answer in zip(first, answers):
        pair = json.loads((Path(job["run"]) / "result.json").read_text(encoding="utf-8"))
        ledger.append(kept, job, {"result": pair | {"answers": answer}, "curve": None})
    elsewhere = [job | {"run": str(tmp_path / "no" / Path(job["run"]).name)} for job in first]
    question, texts = table1.answers_to_one_story(elsewhere, kept)
    assert question == list(itertools.islice(stories("test", seed=0), 2))[1].question
    assert texts == {START: "of start", "gtpo": "of gtpo"}
    kept.unlink()
    ledger.append(kept, first[0], {"result": pair | {"answers": {"1": "x"}}, "curve": None})
    ledger.append(kept, first[1], {"result": pair | {"answers": {"2": "x"}}, "curve": None})
    assert table1.answers_to_one_story(elsewhere, kept)[1] == {}


def test_answers_are_drawn_by_role_and_by_information(finished):
    problem = next(p for p in stories("test", seed=0) if len(p.steps) >= SHOWN_OPERATIONS)
    texts = dict.fromkeys((START, "gtpo"), "<think>1 + 1 = 2.</think><answer>2</answer>")
    figure = methods.case_study(problem.question, texts, load_policy(lora_rank=0).tokenizer)
    shown = [t.get_text() for t in figure.axes[0].texts]
    assert sum(": " in t and t.endswith("tokens") for t in shown) == 2
    informed = table1._informed(finished, problem.question, texts)
    figure = methods.heat_maps(problem.question, informed)
    assert sum("nats in all" in t.get_text() for t in figure.axes[0].texts) == 2


PARENT = """
import sys
from pathlib import Path
from iapo_mini.lab.runs import make_jobs, run_all
from iapo_mini.lab.sizes import Size

if __name__ == "__main__":
    size = Size(seeds=(0,), max_steps=int(sys.argv[2]), problems=2, prompts_per_step=1,
                num_generations=2, ks=(1, 2))
    run_all(make_jobs(size, Path(sys.argv[1]), {"grpo": {"method": "grpo", "save_steps": 1}}), 1)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_runs_end_with_their_command_and_continue_with_the_next_one(tmp_path):
    script, out = tmp_path / "parent.py", tmp_path / "out"
    script.write_text(PARENT, encoding="utf-8")
    command = [sys.executable, str(script), str(out), "400"]
    log = out / "grpo-0" / "train" / "metrics.jsonl"

    def children():
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if str(out).encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + PATIENCE
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") >= 2):
        assert parent.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while children():
        assert time.monotonic() < limit
        time.sleep(0.05)
    done = log.read_text(encoding="utf-8").count("\n")
    assert done < 400  # it did not run to its end
    assert (out / "grpo-0" / "train" / f"checkpoint-{done}").is_dir()
    # The same command is not refused and continues from there.
    again = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while log.read_text(encoding="utf-8").count("\n") <= done + 1:
        assert again.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    again.kill()
    again.wait()
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps[: done + 2] == list(range(1, done + 3))
