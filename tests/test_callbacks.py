"""Who watches a run: what is called when, reporters with stand-ins of their packages."""

import json
import sys
import types
from pathlib import Path

import pytest

from iapo_mini.callbacks import Callback, harmless, together
from iapo_mini.config import TrainConfig
from iapo_mini.engines import reporting
from iapo_mini.engines.reporting import REPORTERS, check_reporters, numbers_of, reporters
from iapo_mini.trainer import train

CONFIG = TrainConfig(method="grpo", max_steps=2, prompts_per_step=1, num_generations=2,
                     max_completion_length=8, device="cpu", threads=1)  # fmt: skip


def test_a_run_tells_each_step_and_its_end_once(tmp_path):
    told = []
    watcher = Callback(lambda row: told.append(row["step"]), on_end=lambda: told.append("end"))
    train(CONFIG, tmp_path / "run", callbacks=[watcher, Callback()], progress=False)
    assert told == [1, 2, "end"]


def test_the_end_is_told_of_a_run_that_fails(tmp_path):
    told = []

    def fail(row):
        raise RuntimeError("seen enough")

    watchers = [Callback(fail), Callback(on_end=lambda: told.append("end"))]
    with pytest.raises(RuntimeError, match="seen enough"):
        train(CONFIG, tmp_path / "run", callbacks=watchers, progress=False)
    assert told == ["end"]


def test_any_object_with_the_three_methods_watches(tmp_path):
    class Watcher:
        def __init__(self):
            self.told = []

        def on_step(self, metrics):
            self.told.append(metrics["length"])

        def on_evaluate(self, found):
            pass

        def on_end(self):
            self.told.append("end")

    watcher = Watcher()
    train(CONFIG, tmp_path / "run", callbacks=[watcher], progress=False)
    rows = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert watcher.told == [*(json.loads(row)["length"] for row in rows), "end"]


def test_watchers_are_called_in_order():
    told = []
    first, second = Callback(lambda row: told.append(1)), Callback(lambda row: told.append(2))
    together([first, second]).on_step({"step": 1})
    assert told == [1, 2]


def test_a_reporter_that_fails_is_told_no_more_and_the_run_goes_on(tmp_path):
    calls = []

    def fail(row):
        calls.append(row["step"])
        raise ConnectionError("no route to host")

    watcher = harmless(Callback(fail, on_end=lambda: calls.append("end")), "wandb")
    with pytest.warns(UserWarning, match=r"wandb failed \(no route to host\)"):
        train(CONFIG, tmp_path / "run", callbacks=[watcher], progress=False)
    assert calls == [1]
    assert len((tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_numbers_of_a_line():
    row = {"step": 3, "loss": 0.5, "flag": True, "none": None, "word": "x", "count": 2}
    assert numbers_of(row) == {"loss": 0.5, "count": 2.0}
    assert numbers_of(row, "evaluation/") == {"evaluation/loss": 0.5, "evaluation/count": 2.0}


class StandIn(types.ModuleType):
    """Takes the calls of trackio and wandb, and of TensorBoard's writer."""

    def __init__(self, name):
        super().__init__(name)
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.opened.append(settings)
        if "dir" in settings:  # as wandb and TensorBoard do at once
            Path(settings["dir"]).mkdir(parents=True, exist_ok=True)
            (Path(settings["dir"]) / "events").write_text("", encoding="utf-8")
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1

    def SummaryWriter(self, folder):
        return self.init(dir=folder)

    def add_text(self, *told):
        pass

    def add_scalar(self, name, value, step):
        self.logged.append((step, {name: value}))

    def flush(self):
        pass

    close = finish


@pytest.fixture
def installed(monkeypatch):
    found = {name: StandIn(name) for name in ("trackio", "wandb", "tensorboard")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", found["tensorboard"])
    return found


@pytest.mark.parametrize("name", REPORTERS)
def test_each_reporter_repeats_every_number_of_every_step(name, installed, tmp_path):
    folder = tmp_path / "run"
    watchers = reporters([name], folder, CONFIG.settings())
    train(CONFIG, folder, callbacks=watchers, progress=False)
    module = installed[name]
    rows = [
        json.loads(row)
        for row in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    expected = [(r["step"], key, value) for r in rows for key, value in numbers_of(r).items()]
    found = [(step, key, value) for step, row in module.logged for key, value in row.items()]
    assert found == expected and module.finished == 1
    watchers[0].on_evaluate({"step": 2, "pass@1": 0.5})
    assert module.logged[-1] == (2, {"evaluation/pass@1": 0.5})


@pytest.mark.parametrize("name", REPORTERS)
def test_a_run_that_is_refused_leaves_no_file_of_a_reporter(name, installed, tmp_path):
    folder = tmp_path / "run"
    (watcher,) = reporters([name], folder, {})
    with pytest.raises(ValueError, match="resume"):
        train(CONFIG, folder, resume=True, callbacks=[watcher], progress=False)
    assert not list(tmp_path.rglob("*"))
    # Nor does it touch the run that is shown for this folder.
    assert not installed[name].opened and installed[name].finished == 0


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_resumed_run_goes_on_under_its_name_and_another_folder_has_another(
    name, installed, tmp_path
):
    for folder in ("a", "a", "b"):
        (watcher,) = reporters([name], tmp_path / folder, {})
        watcher.on_step({"step": 1, "reward": 0.0})
    names = [str(opened.get("id", opened["name"])) for opened in installed[name].opened]
    assert names[0] == names[1] != names[2]
    assert all(opened["resume"] == "allow" for opened in installed[name].opened)


def test_what_is_unknown_or_not_installed_is_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match=r"report_to must be one of .*, got 'wandbb'; did you"):
        check_reporters(["wandbb"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"pip install 'iapo-mini\[trackio\]'"):
        check_reporters(["trackio"])


def test_every_reporter_has_an_extra_of_its_name():
    import tomllib

    project = tomllib.loads(
        (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    )
    assert set(REPORTERS) <= set(project["project"]["optional-dependencies"])
    assert reporting.PROJECT == "iapo-mini"
