"""Completions that a run keeps: the file, and what is read from it."""

import pyarrow.parquet
import pytest
import torch

from iapo_mini.cli import main
from iapo_mini.config import TrainConfig
from iapo_mini.errors import MOST_STEPS
from iapo_mini.policy import load_policy
from iapo_mini.tools.look import group_text, kept_rows, kept_steps
from iapo_mini.trainer import train

CONFIG = TrainConfig(method="iapo", max_steps=4, prompts_per_step=2, num_generations=2,
                     max_completion_length=24, device="cpu", threads=1)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, folder, keep_completions=2, progress=False)
    return folder


def test_every_nth_step_is_kept_under_trls_names(run):
    assert kept_steps(run) == [2, 4]
    names = sorted(path.name for path in (run / "completions").iterdir())
    assert names == ["completions_00002.parquet", "completions_00004.parquet"]
    columns = pyarrow.parquet.read_table(run / "completions" / names[0]).column_names
    assert columns[:3] == ["step", "prompt", "completion"] and "advantage" in columns


def test_a_row_is_what_was_trained_on(run):
    rows = kept_rows(run, 2)
    assert len(rows) == 4 and {row["step"] for row in rows} == {2}
    for row in rows:
        lengths = {len(row[name]) for name in
                   ("tokens", "token_advantages", "informativeness", "old_logprobs")}  # fmt: skip
        assert lengths == {row["length"]}
        assert row["advantage"] == pytest.approx(sum(row["token_advantages"]) / row["length"])
        assert all(value <= 0 for value in row["old_logprobs"])
        assert row["answer"] and row["reward"] in (1.5, -0.5, -1.5)
        assert row["correct"] == (row["reward"] == 1.5)
        # The text is that of the tokens, but for the one that ended it.
        assert "".join(row["tokens"]).startswith(row["completion"][:10])
    assert [rows[0]["prompt"]] * 2 == [row["prompt"] for row in rows[:2]]


def test_keeping_changes_nothing_in_training(run, tmp_path):
    train(CONFIG, tmp_path / "plain", progress=False)
    one, other = (load_policy(adapter=folder / "final") for folder in (run, tmp_path / "plain"))
    ids = torch.tensor([[5, 9, 2, 300]])
    assert torch.equal(one.model(ids).logits, other.model(ids).logits)
    assert not (tmp_path / "plain/completions").exists()


def test_a_method_without_informativeness_keeps_none_and_shows_advantages(tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "method": "grpo", "max_steps": 1})
    train(config, tmp_path / "run", keep_completions=1, progress=False)
    assert all(row["informativeness"] is None for row in kept_rows(tmp_path / "run"))
    assert "Tokens show advantage" in group_text(tmp_path / "run", color=False)


def test_look_prints_a_group_best_reward_first(run, capsys):
    main(["look", str(run), "--step", "2", "--group", "1", "--color", "never"])
    told = capsys.readouterr().out
    rows = [row for row in kept_rows(run, 2)][2:]
    assert "Step 2, prompt 1 of 2" in told and rows[0]["answer"] in told
    rewards = [f"reward {row['reward']:+.1f}" for row in sorted(rows, key=lambda r: -r["reward"])]
    assert told.index(rewards[0]) <= told.rindex(rewards[1])
    colored = group_text(run, 2, 1, "advantage")
    assert "\x1b[" in colored and "Tokens show advantage" in colored


@pytest.mark.parametrize(
    ("step", "group", "told"),
    [(3, 0, "step must be one of 2, 4, got 3"), (2, 2, "group must be at most 1, got 2"),
     (2, -1, "group must be at least 0, got -1")],
)  # fmt: skip
def test_what_was_not_kept_is_refused(run, step, group, told):
    with pytest.raises(ValueError, match=told):
        group_text(run, step, group)


def test_a_run_without_completions_and_a_damaged_file_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"has kept no completions; train with --keep-comp"):
        kept_rows(tmp_path)
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions/completions_00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"completions_00001\.parquet' is damaged"):
        kept_rows(tmp_path)


@pytest.mark.parametrize("value", [-1, MOST_STEPS + 1])
def test_how_often_is_checked_before_anything_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="keep_completions must be at"):
        train(CONFIG, tmp_path / "run", keep_completions=value)
    assert not (tmp_path / "run").exists()
