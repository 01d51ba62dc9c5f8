"""A trained policy for others: folder, card, and a local stand-in of the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from iapo_mini.cli import main
from iapo_mini.config import TrainConfig
from iapo_mini.policy import load_policy
from iapo_mini.tools.sharing import check_repository, model_card, push
from iapo_mini.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    config = TrainConfig(method="iapo", max_steps=2, prompts_per_step=1, num_generations=2,
                         max_completion_length=16, learning_rate=5e-3, threads=1)  # fmt: skip
    train(config, folder, progress=False)
    return folder


@pytest.fixture
def evaluation(tmp_path):
    found = {
        "problems": 7, "pass@1": 0.5, "length@1": 40.0, "ratio@1": 0.0125,
        "intervals": {"pass@1": [0.4, 0.6], "length@1": [38.0, 42.0], "ratio@1": [0.01, 0.015]},
        "config": {"data": "stories", "split": "test", "k": [1]},
    }  # fmt: skip
    file = tmp_path / "results.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    return file


def test_a_card_tells_method_settings_numbers_and_how_to_load(run, evaluation):
    text = model_card(run / "final", "merged", "somebody/brief", evaluation)
    metadata = huggingface_hub.ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "transformers" and "iapo" in metadata["tags"]
    assert "# somebody/brief" in text and 'from_pretrained("somebody/brief")' in text
    for told in ("| method | iapo |", "| aggregation | token |", "| max_steps | 2 |", "2 steps;",
                 "7 problems of stories (test)", "| pass@1 | 0.500 [0.400, 0.600] |",
                 "| length@1 | 40.0 [38.0, 42.0] |", "torch "):  # fmt: skip
        assert told in text, told
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    mean = sum(row["length"] for row in rows) / 2
    assert f"| length | {mean:.3g} | {mean:.3g} |" in text
    adapter = model_card(run / "final", "adapter")
    assert huggingface_hub.ModelCard(adapter).data.library_name == "peft"
    assert "load_policy(adapter=" in adapter and "## Evaluation" not in adapter


def test_a_card_without_a_run_or_of_no_evaluation_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="has no run beside it"):
        model_card(tmp_path / "final", "merged")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json"):
        model_card(run / "final", "merged", "", tmp_path / "other.json")


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_either_kind_is_exported_and_is_the_trained_policy(run, kind, tmp_path, capsys):
    out = tmp_path / "shared"
    main(["export", "--adapter", str(run / "final"), "--out", str(out), "--as", kind, "--card"])
    assert ("Merged model" if kind == "merged" else "Adapter") in capsys.readouterr().out
    assert "## Training" in (out / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor([[5, 9, 2, 300]])
    trained = load_policy(adapter=run / "final").model(ids).logits
    if kind == "merged":
        found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    else:
        found = load_policy(adapter=out).model(ids).logits
    torch.testing.assert_close(found, trained, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["brief", "a/b/c", "", "/", "a b/c", "owner/", "-x/y", "a/b.git"])
def test_what_is_no_repository_is_refused_before_any_work(name):
    with pytest.raises(ValueError, match="push must be owner/name"):
        check_repository(name)


@pytest.fixture
def stand_in(monkeypatch):
    """The hub's API as far as an upload needs it; ``files`` is what it was given."""
    files, state = {}, {"allowed": True}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = {}
            if not state["allowed"]:
                self.send_response(403)
                self.end_headers()
                return
            if self.path == "/api/repos/create":
                state["create"] = json.loads(body)
                answer = {"url": f"{address}/somebody/brief", "name": "somebody/brief"}
            elif "/preupload/" in self.path:
                names = [f["path"] for f in json.loads(body)["files"]]
                answer = {"files": [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                ]}  # fmt: skip
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "header":
                        state["header"] = entry["value"]
                answer = {"success": True, "commitOid": "0" * 40,
                          "commitUrl": f"{address}/somebody/brief/commit/{'0' * 40}"}  # fmt: skip
            self.answer(answer)

        def do_GET(self):
            self.answer({"id": "somebody/brief", "sha": "0" * 40, "siblings": []})

        def answer(self, content):
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_for_the_stand_in")
        yield files, state
        server.shutdown()


def test_a_policy_is_pushed_whole_with_its_card(run, stand_in, tmp_path, capsys):
    files, state = stand_in
    out = tmp_path / "shared"
    main(["export", "--adapter", str(run / "final"), "--out", str(out),
          "--as", "adapter", "--push", "somebody/brief", "--private"])  # fmt: skip
    made = state["create"]
    assert made["name"] == "brief" and made["visibility"] == "private"
    assert {path.name for path in out.iterdir()} == set(files) - {".gitattributes"}
    for path in out.iterdir():
        assert files[path.name] == path.read_bytes()
    assert b"# somebody/brief" in files["README.md"]
    assert "/somebody/brief/commit/" in capsys.readouterr().out
    assert "iapo-mini" in state["header"]["summary"]


def test_a_hub_that_refuses_is_one_sentence_and_the_folder_stays(run, stand_in, tmp_path, capsys):
    _, state = stand_in
    state["allowed"] = False
    out = tmp_path / "shared"
    with pytest.raises(SystemExit) as ended:
        main(["export", "--adapter", str(run / "final"), "--out", str(out), "--as", "adapter",
              "--push", "somebody/brief"])  # fmt: skip
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert "the hub refused" in told and "hf auth login" in told and "\n" not in told
    assert (out / "README.md").is_file()
    with pytest.raises(ValueError, match="refused"):
        push(out, "somebody/brief")
