"""Devices: their names, the devices of a machine, and plots of tensors from any device."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import iapo_mini
from iapo_mini.cli import main
from iapo_mini.config import TrainConfig
from iapo_mini.devices import chosen_device, full_precision, has_room_for_copy
from iapo_mini.policy import load_policy


@pytest.fixture
def cards(monkeypatch):
    """Sets how many CUDA devices the machine seems to have."""

    def seem(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return seem


@pytest.mark.parametrize(
    ("count", "asked", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (1, "auto", "cuda"),
        (1, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (1, "cuda:0", "cuda:0"),
        (8, "cuda:7", "cuda:7"),
    ],
)
def test_a_named_device_is_used(cards, count, asked, device):
    cards(count)
    assert chosen_device(asked) == device


@pytest.mark.parametrize(
    ("count", "asked", "there"),
    [(0, "cuda", "cpu"), (0, "cuda:1", "cpu"), (2, "cuda:2", "cpu, cuda:0, cuda:1")],
)
def test_a_missing_gpu_is_refused_and_the_existing_devices_are_named(cards, count, asked, there):
    cards(count)
    with pytest.raises(ValueError, match=rf"machine's \({there}\), got '{asked}'"):
        load_policy(device=asked)


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "meta"])
def test_a_name_that_is_not_a_device_is_refused(name):
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:<number>, got"):
        TrainConfig(device=name)
    with pytest.raises(ValueError, match="device must be auto"):
        load_policy(device=name)


@pytest.mark.parametrize("command", [["evaluate"], ["explain", "-"], ["train", "--out", "run"]])
def test_commands_refuse_it_at_once(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--device", "gpu"])
    assert ended.value.code == 2 and "device must be auto" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_every_array_is_made_from_a_cpu_tensor():
    """``numpy()`` raises for a tensor on a GPU, so ``cpu()`` must come before each call of it."""
    found = 0
    for path in Path(iapo_mini.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "numpy":
                before = node.func.value
                moved = isinstance(before, ast.Call) and isinstance(before.func, ast.Attribute)
                assert moved and before.func.attr == "cpu", f"{path.name}, line {node.lineno}"
                found += 1
    assert found >= 3


def test_checks_of_a_model_multiply_in_fp32_even_where_a_user_allows_tf32(tiny_folder, monkeypatch):
    """With TF32 two right ways to compute the same logits differ by more than the checks allow."""
    used = []
    forward = torch.nn.functional.linear

    def recorded(*given):
        used.append(torch.get_float32_matmul_precision())
        return forward(*given)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        monkeypatch.setattr(torch.nn.functional, "linear", recorded)
        load_policy(tiny_folder, lora_rank=4).merged()
        assert used and set(used) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(RuntimeError), full_precision():
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("memory_gb", "parameters", "room"),
    [(16, 135e6, True), (16, 494e6, False), (80, 494e6, True), (80, 1.5e9, False)],
)
def test_a_card_has_room_for_a_merged_copy_of_a_twentieth_of_its_memory(
    monkeypatch, memory_gb, parameters, room
):
    card = SimpleNamespace(total_memory=memory_gb * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert has_room_for_copy(torch.device("cuda:0"), int(parameters)) is room
    assert has_room_for_copy(torch.device("cpu"), 500_000_000)
    assert not has_room_for_copy(torch.device("cpu"), 700_000_000)
