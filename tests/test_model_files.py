"""Damaged, quantised or unsuitable model folders are refused with one sentence."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import redraw, tiny_policy
from safetensors.torch import load_file, save_file

from iapo_mini.chat import end_of_turn
from iapo_mini.cli import main
from iapo_mini.evaluation import evaluate
from iapo_mini.model_files import check_forward
from iapo_mini.policy import load_policy
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def change(folder, how):
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda w: w.pop(NAME), f"lacks the weight '{NAME}'"),
        (lambda w: w.update({NAME: torch.zeros(3, 3)}), f"in another shape the weight '{NAME}'"),
        (lambda w: w.update({"model.extra.weight": torch.zeros(3)}), "'model.extra.weight'"),
        (
            lambda w: [w.pop(n) for n in list(w) if "layers.0" in n],
            "lacks the weight 'model.layers.0.input_layernorm.weight' and 11 more",
        ),
    ],
    ids=["missing", "shape", "unexpected", "a whole layer"],
)
def test_a_tensor_that_does_not_fit_is_named(folder, how, named, four_bit):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    change(folder, how)
    with pytest.raises(ValueError, match=r"model is '.*'") as refused:
        load_policy(str(folder), four_bit=four_bit)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(t["id"] for t in told["added_tokens"])
    for n in range(1, 200):
        told["added_tokens"].append(
            {**told["added_tokens"][-1], "id": last + n, "content": f"<more {n}>"}
        )
    (folder / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a tokenizer that fits its embedding, got .* tokens"):
        load_policy(str(folder))


def test_a_whole_model_loads(folder):
    policy = load_policy(str(folder), lora_rank=0)
    rollouts = sample(policy, [Problem("1 + 1?", "2")], max_completion_length=3)
    assert len(rollouts.lengths) == 8


def test_an_adapter_given_as_a_model_is_refused_with_the_right_option(tiny_folder, tmp_path):
    load_policy(tiny_folder, lora_rank=2).save(tmp_path / "final")
    with pytest.raises(ValueError, match=r"which is an adapter; use --adapter '.*final'"):
        load_policy(str(tmp_path / "final"))


def refusal(folder, **settings):
    """The one sentence with which a folder is refused."""
    with pytest.raises(ValueError, match=r"\Amodel (is|must be) '") as refused:
        load_policy(str(folder), **settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def set_in(file, **changes):
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(told | changes), encoding="utf-8")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "new"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_weights_that_were_saved_quantised_are_refused_with_the_remedy(folder, method, four_bit):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    set_in(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    told = refusal(folder, four_bit=four_bit)
    assert f"quantization_config: {method}" in told and "--four-bit" in told


def test_weights_in_eight_bits_of_bitsandbytes_are_refused(folder):
    how = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    set_in(folder / "config.json", quantization_config=how)
    assert "quantization_config: bitsandbytes" in refusal(folder)


def test_weights_that_were_saved_in_four_bits_are_loaded_in_four_bits_alone(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(tiny_folder, lora_rank=0, four_bit=True)
    policy.save(tmp_path / "four")
    assert "four_bit=True (--four-bit" in refusal(tmp_path / "four")
    again = load_policy(str(tmp_path / "four"), lora_rank=0, four_bit=True)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, policy.model(ids).logits)


def test_a_config_that_calls_plain_weights_four_bit_is_refused(folder):
    pytest.importorskip("bitsandbytes")
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    set_in(folder / "config.json", quantization_config=how)
    assert "says that its weights are in 4 bits" in refusal(folder, four_bit=True)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"[1]", b"null", b'{"a": "\xff"}'])
def test_damaged_settings_are_refused_by_the_name_of_their_file(folder, name, content):
    (folder / name).write_bytes(content)
    assert f"whose {name} is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"hidden_size": "64"}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"quantization_config": "gptq"}),
        ("config.json", {"_attn_implementation": "flash_attention_2"}),
        ("config.json", {"hidden_act": "none such"}),
        ("config.json", {"pad_token_id": 10**9}),
        ("config.json", {"model_type": "t5"}),
        ("config.json", {"model_type": "none such"}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"eos_token": [1]}),
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer.json", {"model": {"type": "none such"}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ("generation_config.json", {"pad_token_id": "x"}),
    ],
)
def test_meaningless_settings_are_one_sentence(folder, name, changes):
    set_in(folder / name, **changes)
    refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert "whose tokenizer has no tokens" in refusal(folder)
    (folder / "tokenizer_config.json").unlink()
    assert "which holds no tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 500, b"version https://git-lfs.github.com/spec"]
)
def test_weights_that_are_not_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refusal(folder)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (
            {"weight_map": {NAME: "model-2.safetensors"}},
            "names 'model-2.safetensors', which is not",
        ),
        ({"weight_map": {NAME: 3}}, "names '3', which is not a safetensors"),
        ({"weight_map": [1]}, "can't be loaded"),
        ({}, "can't be loaded"),
        ([1], "is damaged"),
    ],
)
def test_an_index_that_names_no_file_is_refused(folder, index, told):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    told = told.replace("which is not", "which is missing") if "model-2" in told else told
    assert told in refusal(folder)


def test_weights_that_give_nan_are_refused(folder):
    change(folder, lambda w: w.update({NAME: w[NAME] * float("nan")}))
    assert "whose weights give NaN" in refusal(folder)


OTHERS = {
    "encoder": ("bert", {}, "not a causal language model"),
    "positions from a mask": ("bloom", {"n_layer": 2, "n_head": 4}, "(bloom) can't be run"),
    "state": ("mamba", {"state_size": 8}, "(mamba) can't be run"),
    "another state": (
        "mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1},
        "(mamba2) gives other logits",
    ),
    "windows and states": (
        "recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 32},
        "(recurrent_gemma) gives other logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_that_can_not_be_sampled_from_is_refused(folder, kind):
    name, changes, told = OTHERS[kind]
    sizes = dict(vocab_size=864, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.AutoConfig.for_model(name, **(sizes | changes))
    model = redraw(transformers.AutoModelForCausalLM.from_config(config))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    assert told in refusal(folder)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma", "mistral", "phi3", "gpt_neox", "mpt"])
def test_decoders_with_attention_in_every_layer_are_accepted(tokenizer, name):
    if name == "mpt":
        config = transformers.MptConfig(vocab_size=864, d_model=64, n_heads=4, n_layers=2)
        model = redraw(transformers.AutoModelForCausalLM.from_config(config))
    else:
        model = tiny_policy(name, tokenizer).model
    for dtype in (torch.float32, torch.bfloat16):
        check_forward(name, model.to(dtype).eval())


def test_a_model_with_keys_wider_than_values_is_sampled_from(tokenizer):
    policy = tiny_policy(
        "deepseek_v3", tokenizer, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    rollouts = sample(policy, [Problem("1 + 1?", "2")], max_completion_length=40)
    assert rollouts.lengths.max() == 40


def test_too_few_positions_are_reported_before_the_work(tokenizer, tmp_path, capsys):
    policy = tiny_policy("gpt2", tokenizer, max_position_embeddings=48)
    problems = [Problem("1 + 1?", "2"), Problem("1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1?", "9")]
    with pytest.raises(ValueError, match=r"the model has 48 positions, .* are up to \d+ tokens"):
        evaluate(policy, problems, max_completion_length=30, save_to=tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())
    policy.save(tmp_path / "model")
    for command in (
        ["train", "--out", str(tmp_path / "run"), "--max-completion-length", "30"],
        ["explain", "1 + 1?", "--out", str(tmp_path / "x.png")],
    ):
        with pytest.raises(SystemExit):
            main([*command, "--model", str(tmp_path / "model")])
        assert "the model has 48 positions" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())  # the corrected command finds it empty


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1 / 0 }}", "can't write a question (division by zero)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "can't write a question (maximum"),
        ({"tool": "x", "rag": "y"}, "can't write a question (This model has multiple chat"),
        ("Hello!", "leaves out the question"),
        ("{{ messages[-1].content * 100000 }}", "makes 600,000 characters of the question"),
        ("{{ messages[-1].nothing.at.all }}", "can't write a question"),
    ],
)
def test_a_template_that_writes_no_question_is_one_sentence(folder, template, told):
    policy = load_policy(str(folder), lora_rank=0)
    policy.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"whose chat template") as refused:
        end_of_turn(policy.tokenizer)
    assert told in str(refused.value) and "\n" not in str(refused.value)
