"""The diagnosis of a run of TRL's trainer: one made by TRL, and ones that are ill in one way."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from iapo_mini.cli import main
from iapo_mini.tools.diagnose import diagnose, findings_text

COMMITTED = Path(__file__).parent.parent / "figures/results/trl_run.json"

HEALTHY = {
    "loss": 0.0, "completions/mean_length": 60.0, "completions/clipped_ratio": 0.0,
    "frac_reward_zero_std": 0.2, "clip_ratio/region_mean": 0.0, "grad_norm": 0.3, "kl": 0.01,
    "entropy": 0.4, "rewards/accuracy_reward/mean": 0.5, "rewards/accuracy_reward/std": 0.4,
}  # fmt: skip


def write(folder, steps=30, state="trainer_state.json", **changes):
    """A run whose reward rises, with some metrics set otherwise."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": 2 * step, "reward": 0.02 * step + 0.01 * (step % 3), **HEALTHY, **changes}
        rows.append({k: v(step) if callable(v) else v for k, v in row.items() if v is not None})
    rows.append({"step": 2 * steps, "train_runtime": 3.0, "train_loss": 0.0})
    path = folder / state
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"global_step": 2 * steps, "log_history": rows}), encoding="utf-8")
    return folder


def looks(found):
    return [finding.what for finding in found if finding.look]


def test_a_run_that_trl_made_is_read(tmp_path, capsys):
    shutil.copy(COMMITTED, tmp_path / "trainer_state.json")
    main(["diagnose", str(tmp_path)])
    told = capsys.readouterr().out
    assert "(completions" not in told and "policy entropy" in told
    rows = [
        row
        for row in json.loads(COMMITTED.read_text(encoding="utf-8"))["log_history"]
        if "reward" in row
    ]
    mean = sum(row["entropy"] for row in rows[-10:]) / 10
    assert f"{mean:.3g}  (healthy" in told


def test_a_healthy_run_needs_no_look(tmp_path):
    assert not looks(diagnose(write(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "what", "advice"),
    [
        ({"completions/clipped_ratio": 0.3}, "truncated", "max_completion_length"),
        ({"frac_reward_zero_std": 1.0}, "zero_variance_groups", "num_generations"),
        ({"grad_norm": 0.0}, "grad_norm", "nothing is learnt"),
        ({"kl": 3.0}, "kl", "or raise beta"),
        ({"entropy": 0.001}, "entropy", "iapo_alpha"),
        ({"clip_ratio/region_mean": 0.5}, "clip_ratio", "learning_rate"),
        ({"rewards/format_reward/mean": -0.3}, "format", "supervised"),
        ({"rewards/accuracy_reward/std": 0.0}, "reward functions", "match the model's answers"),
        ({"reward": lambda step: -0.02 * step}, "reward, end", "iapo_alpha and iapo_beta"),
        ({"loss": lambda step: float("nan") if step == 7 else 0.0}, "finite", "step 7"),
    ],
)
def test_each_illness_is_seen_alone_and_advised_in_trls_names(tmp_path, changes, what, advice):
    found = diagnose(write(tmp_path, **changes))
    (ill,) = looks(found)
    assert what in ill
    assert advice in findings_text(found) and "kl_coef" not in findings_text(found)


def test_without_beta_trl_logs_no_kl_and_nothing_is_missing(tmp_path):
    found = diagnose(write(tmp_path, kl=None))
    assert not looks(found) and "kl" not in findings_text(found)


def test_the_newest_checkpoint_of_a_running_run_is_read(tmp_path):
    write(tmp_path, 5, "checkpoint-90/trainer_state.json", entropy=0.9)
    write(tmp_path, 9, "checkpoint-100/trainer_state.json", entropy=0.7)
    assert "0.7  (healthy" in findings_text(diagnose(tmp_path))
    write(tmp_path, 9, entropy=0.6)  # a finished one has its own
    assert "0.6  (healthy" in findings_text(diagnose(tmp_path))


def test_a_run_that_went_on_after_its_end_is_read_to_its_newest_step(tmp_path):
    write(tmp_path, 9, entropy=0.6)
    write(tmp_path, 20, "checkpoint-40/trainer_state.json", entropy=0.5)
    assert "0.5  (healthy" in findings_text(diagnose(tmp_path))


def test_an_adapter_at_zero_is_seen(tmp_path):
    write(tmp_path, 9, "checkpoint-100/trainer_state.json")
    file = tmp_path / "checkpoint-100/adapter_model.safetensors"
    save_file({"x.lora_B.weight": torch.zeros(2, 2)}, file)
    (ill,) = looks(diagnose(tmp_path))
    assert "B matrices" in ill


@pytest.mark.parametrize(
    ("texts", "ill"),
    [(["a", "b", "c", "d"], False), (["a", "a", "a", "d"], False), (["a"] * 8, True)],
)
def test_completions_that_are_all_the_same_are_seen(tmp_path, texts, ill):
    write(tmp_path)
    (tmp_path / "completions").mkdir()
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    table = pa.table({"step": [1] * len(texts), "prompt": ["q"] * len(texts), "completion": chats})
    pyarrow.parquet.write_table(table, tmp_path / "completions/completions_00001.parquet")
    assert bool(looks(diagnose(tmp_path))) == ill


def test_what_can_not_be_read_is_one_sentence(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="trainer_state"):
        diagnose(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 3}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds no logged step"):
        diagnose(tmp_path)
    write(tmp_path)
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions/completions_00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"completions_00001\.parquet can't be read"):
        diagnose(tmp_path)
