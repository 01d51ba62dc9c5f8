"""Settings from a file: names, precedence, what a run's own file brings back."""

import json
from pathlib import Path

import pytest
import yaml

from iapo_mini.cli import main
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.config_file import OF_A_RUN, read_settings

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def written(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_a_file_names_fields_of_trainconfig(written):
    file = written("method: grpo\nmax_steps: 7\nfour_bit: true\nestimator_stride: sentence\n")
    config = TrainConfig(**read_settings(file))
    assert (config.method, config.max_steps, config.four_bit) == ("grpo", 7, True)
    assert config.estimator_stride == "sentence"


@pytest.mark.parametrize("name", ["🙂", "Zoë/三", "a\tb"])
def test_json_is_read_as_json(written, name):
    """With tabs between the entries, and characters outside ASCII as json.dumps writes them."""
    file = written(json.dumps({"model": name, "max_steps": 7}, indent="\t"), "run.json")
    assert read_settings(file) == {"model": name, "max_steps": 7}
    with pytest.raises(ValueError, match="is damaged"):
        read_settings(written("method: iapo", "run.json"))


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_a_number_is_a_number_however_it_is_written(written, number):
    """In YAML 1e-5 is text."""
    assert TrainConfig(**read_settings(written(f"learning_rate: {number}"))).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning-rate: 1e-3", "got 'learning-rate'; did you mean 'learning_rate'"),
        ("metod: iapo", "did you mean 'method'"),
        ("lr: 0.1", "a name in config must be one of .*, got 'lr'"),
        ("card: t5", "card must be one of t4, 12gb, 24gb, got 't5'"),
        ("- method", "lines of the form"),
        ("", "lines of the form"),
        ("method", "lines of the form"),
        ("a: [", "is damaged"),
        ("from_recipe: 5", "from_recipe must be a list of names in config, got 5"),
        ("from_recipe: alpha", "from_recipe must be a list of names"),
        ("!!python/object/apply:os.system ['true']", "is damaged"),
    ],
)
def test_what_is_no_settings_is_one_sentence(written, text, told):
    with pytest.raises(ValueError, match=told):
        read_settings(written(text))


@pytest.mark.parametrize("value", ["fast", "true", "[1]", "1e400", ".nan", "-1"])
def test_values_are_checked_as_those_of_options_are(written, value):
    with pytest.raises(ValueError, match="learning_rate must be"):
        TrainConfig(**read_settings(written(f"learning_rate: {value}")))


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path, written):
    with pytest.raises(ValueError, match="can't be read"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="can't be read"):
        (tmp_path / "folder.yaml").mkdir()
        read_settings(tmp_path / "folder.yaml")
    with pytest.raises(ValueError, match=r"must be a \.yaml or \.json file"):
        read_settings(written("method: iapo", "run.toml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged"):
        read_settings(tmp_path / "bytes.yaml")


def test_what_is_nearer_takes_precedence(written, monkeypatch):
    """The card's settings, then the file's, then the options'."""
    seen = {}
    monkeypatch.setattr("iapo_mini.trainer.train", lambda config, *a, **k: seen.update(x=config))
    file = written("card: t4\nmodel: embedded\nmax_steps: 7\nseed: 3\n")
    main(["train", "--config", str(file), "--seed", "5", "--out", "unused"])
    config = seen["x"]
    assert (config.model, config.max_steps, config.seed) == ("embedded", 7, 5)
    assert config.max_completion_length == CARDS["t4"]["max_completion_length"]


def test_a_runs_own_file_trains_the_same_run_again(tmp_path):
    asked = TrainConfig(method="iapo", max_steps=2, prompts_per_step=1, device="cpu", threads=1)
    told = asked.settings() | {"from_recipe": asked.from_recipe(), "data_fingerprint": ""}
    told["model_fingerprint"] = {"dtype": "torch.float32", "weights": "0"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(told), encoding="utf-8")
    assert TrainConfig(**read_settings(file)).settings() == asked.settings()
    # Another method brings its own recipe, not that of the run.
    other = TrainConfig(**{**read_settings(file), "method": "grpo"})
    assert other.settings() == TrainConfig(**{**vars(asked), "method": "grpo"}).settings()


def test_what_a_run_writes_beside_its_settings_is_known(tmp_path):
    main(["train", "--out", str(tmp_path / "run"), "--max-steps", "1", "--prompts-per-step", "1",
          "--num-generations", "2", "--max-completion-length", "8"])  # fmt: skip
    kept = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert set(kept) - set(vars(TrainConfig())) == set(OF_A_RUN)
    assert read_settings(tmp_path / "run" / "config.json")["max_steps"] == 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_are_read(path):
    if path.stem.endswith("8gpu"):  # of TRL and accelerate
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
        return
    config = TrainConfig(**read_settings(path))
    assert config.method == "iapo"
    assert f"--config examples/{path.name}" in path.read_text(encoding="utf-8")


def test_the_example_for_eight_cards_has_the_papers_batch_loss_and_clip():
    found = yaml.safe_load((EXAMPLES / "gsm8k_8gpu.yaml").read_text(encoding="utf-8"))
    rows = 8 * found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
    assert rows == 12 * found["num_generations"] == 96
    assert found["loss_type"] == "bnpo"  # the token mean; one step to a batch
    assert (found["epsilon"], found["epsilon_high"]) == (0.2, 0.28)
