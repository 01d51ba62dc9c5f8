"""The hub: an unreachable hub is reported within seconds, and cached files load without it."""

import shutil
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from iapo_mini import hub
from iapo_mini.cli import main
from iapo_mini.policy import load_policy
from iapo_mini.problems.datasets import load_problems
from iapo_mini.tools.planner import shape

SOON = 2 * hub.PATIENCE + 2


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Set the hub's address, with an empty cache, and ask it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def at(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        return address

    return at


@pytest.fixture
def silent():
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def speaking(request):
    """An address that answers every request with the same status."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


REFUSING = "http://127.0.0.1:1"


@pytest.mark.parametrize("where", ["silent", "refusing", "nameless"])
def test_an_unreachable_hub_is_reported_soon(where, endpoint, silent):
    address = {"silent": silent, "refusing": REFUSING, "nameless": "http://no-such.invalid"}[where]
    endpoint(address)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"got 'x/y', .*{address} does not answer"):
        load_policy("x/y")
    assert time.monotonic() - began < SOON
    assert not constants.HF_HUB_OFFLINE  # the next model is asked for again


def test_an_endless_name_lookup_is_given_up(endpoint, monkeypatch):
    endpoint("http://slow.invalid")
    waited = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: waited.wait(30))
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    began = time.monotonic()
    assert not hub.answers()
    assert time.monotonic() - began < 5
    waited.set()


@pytest.mark.parametrize(("speaking", "there"), [(200, True), (404, True), (503, False)],
                         indirect=["speaking"])  # fmt: skip
def test_a_hub_with_errors_counts_as_unreachable(speaking, there, endpoint):
    endpoint(speaking)
    assert hub.answers() == there


def test_data_and_shapes_from_an_unreachable_hub_are_reported_soon(endpoint):
    endpoint(REFUSING)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{REFUSING} does not answer.*--data-file"):
        load_problems("gsm8k", "test")
    with pytest.raises(ValueError, match=f"got 'x/y', .*{REFUSING} does not answer"):
        shape("x/y")
    assert time.monotonic() - began < SOON


def test_cached_models_load_without_the_hub(endpoint, tiny_folder, tmp_path, silent, monkeypatch):
    endpoint(silent)
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    model = tmp_path / "cache" / "models--some--model"
    shutil.copytree(tiny_folder, model / "snapshots" / "0" / "")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0", encoding="utf-8")
    began = time.monotonic()
    assert load_policy("some/model", lora_rank=0).name == "some/model"
    assert time.monotonic() - began < SOON
    shape("some/model")


def test_the_hub_is_not_asked_for_folders_or_offline(endpoint, tiny_folder, monkeypatch):
    endpoint(REFUSING)
    monkeypatch.setattr(hub, "answers", lambda: pytest.fail("the hub was asked"))
    load_policy(tiny_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="got 'x/y', which can't be loaded"):
        load_policy("x/y")


COMMANDS_WITH_MODELS = {
    "evaluate": [],
    "explain": ["-"],
    "train": ["--out", "run"],
    "export": ["--adapter", "adapter", "--out", "merged"],
}


@pytest.mark.parametrize("command", COMMANDS_WITH_MODELS)
def test_commands_ask_the_hub_before_slow_imports(command, endpoint, monkeypatch, tmp_path, capsys):
    endpoint(REFUSING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "iapo_mini.policy")  # to be imported again, which fails
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as ended:
        main([command, *COMMANDS_WITH_MODELS[command], "--model", "nobody/no-such-model"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"got 'nobody/no-such-model', which can't be loaded ({REFUSING} does not" in told
    assert not any(tmp_path.iterdir())


def test_cached_models_are_checked_only_when_loaded(endpoint, tmp_path):
    endpoint(REFUSING)
    (tmp_path / "cache" / "models--some--model").mkdir(parents=True)
    hub.check_in_reach("some/model")
    for local in ("embedded", str(tmp_path), "./nowhere", None):
        hub.check_in_reach(local)
    with pytest.raises(ValueError, match="got 'other/model'"):
        hub.check_in_reach("other/model")
