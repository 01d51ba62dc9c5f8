"""IAPO on TRL: the loss equals ours, the terms are the paper's, any number of processes agrees."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the extra [trl] is not installed")

from helpers import PATIENCE, TRIVIAL, explicit_entropies, perturb_lora
from trl import GRPOConfig, GRPOTrainer

from iapo_mini.advantages import ADVANTAGES, COUNTED, iapo
from iapo_mini.early_exit.question import EVERY_PREFIX
from iapo_mini.engines import trl
from iapo_mini.engines.trl import IAPOConfig, IAPOTrainer, answer_reward
from iapo_mini.information import answer_entropies, inform, informativeness
from iapo_mini.logprobs import token_logprobs
from iapo_mini.objective import policy_loss
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import stories
from iapo_mini.recipes import RECIPES
from iapo_mini.rollouts import Rollouts

CPU = dict(
    use_cpu=True, bf16=False, report_to=[], save_strategy="no", gradient_checkpointing=False,
    dataloader_pin_memory=False, disable_tqdm=True, logging_steps=1, shuffle_dataset=False,
    per_device_train_batch_size=8, num_generations=4, max_completion_length=12, max_steps=1,
    learning_rate=5e-3, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9,
)  # fmt: skip


@pytest.fixture
def trainer(schooled_folder, tmp_path):
    """Make a trainer with the schooled policy; ``kind`` is TRL's trainer or ours."""

    def make(kind=IAPOTrainer, policy=None, problems=TRIVIAL, **settings):
        policy = policy or load_policy(schooled_folder, lora_rank=0)
        config = IAPOConfig if kind is IAPOTrainer else GRPOConfig
        return kind(
            policy.model, answer_reward,
            args=config(str(tmp_path / "trl"), **{**CPU, **settings}),
            train_dataset=trl.dataset(problems),
            processing_class=policy.tokenizer,
        )  # fmt: skip

    return make


def batch_of(trainer):
    """The batch from which TRL computes its loss, for the first prompts of its data set."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def as_rollouts(batch, **fields):
    masks = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    return Rollouts(
        prompt_ids=batch["prompt_ids"], prompt_mask=masks[0],
        completion_ids=batch["completion_ids"], completion_mask=masks[1],
        old_logprobs=fields.pop("old_logprobs", torch.zeros(masks[1].shape)),
        num_generations=4, finished=masks[1].any(1), known=fields,
    )  # fmt: skip


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


SHARED_LOSSES = {"grpo": "sequence", "bnpo": "token", "dapo": "token"}
"""TRL's loss types that ours are, with one process and one step to a batch of completions."""


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("high", [None, 0.28])
@pytest.mark.parametrize("loss_type", SHARED_LOSSES)
def test_our_loss_and_gradients_are_those_of_trl(trainer, loss_type, high, kl):
    """The policy differs from the old policy (so ratios are clipped) and from the reference."""
    theirs = trainer(
        GRPOTrainer, loss_type=loss_type, epsilon_high=high, beta=kl, temperature=0.9,
        use_bias_correction_kl=False,
    )  # fmt: skip
    batch = batch_of(theirs)
    generator = torch.Generator().manual_seed(1)
    shape = batch["completion_mask"].shape

    def noise(scale):
        return scale * torch.randn(shape, generator=generator)

    rollouts = as_rollouts(batch)
    with torch.no_grad():
        logprobs, _ = token_logprobs(theirs.model, rollouts, 0.9)
    batch["old_per_token_logps"] = logprobs + noise(0.3)
    rollouts = replace(rollouts, old_logprobs=batch["old_per_token_logps"])
    batch["ref_per_token_logps"] = logprobs + noise(0.3)
    batch["advantages"] = noise(1.0)
    loss = theirs._compute_loss(theirs.model, batch)
    loss.backward()
    expected = gradients(theirs.model)
    theirs.model.zero_grad()

    logprobs, _ = token_logprobs(theirs.model, rollouts, 0.9)
    ours, stats = policy_loss(
        logprobs, rollouts.old_logprobs, batch["advantages"], rollouts.completion_mask,
        ref_logprobs=batch["ref_per_token_logps"] if kl else None, kl_coef=kl,
        epsilon=0.2, epsilon_high=high, aggregation=SHARED_LOSSES[loss_type],
    )  # fmt: skip
    ours.backward()
    assert abs(float(ours - loss)) < 1e-5
    assert stats["clip_ratio"] > 0.05 and len(set(rollouts.lengths.tolist())) > 1
    found = gradients(theirs.model)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in found.items():
        size = max(1.0, float(expected[name].abs().max()))
        assert float((gradient - expected[name]).abs().max()) < 1e-5 * size, name
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_advantages_are_the_papers(trainer, schooled_folder, lora_rank):
    """Compared with A_{i,t} by the library's rule, with entropies by the definition."""
    policy = load_policy(schooled_folder, lora_rank=lora_rank)
    perturb_lora(policy)
    ours = trainer(policy=policy, iapo_alpha=0.7, iapo_beta=0.3)
    batch = batch_of(ours)
    assert ours.model.training  # as TRL left it: the estimator's eval() is not for the update
    rewards = ours._rewards[:, 0]
    assert len(set(rewards.tolist())) > 1
    rollouts = as_rollouts(batch, rewards=rewards, correct=rewards == 1.5)
    policy.model.eval()
    entropies = explicit_entropies(policy, rollouts)
    s = informativeness(entropies, rollouts.completion_mask)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy.model, rollouts)
    rollouts = replace(rollouts, old_logprobs=logprobs).filled(informativeness=s)
    torch.testing.assert_close(batch["advantages"], iapo(rollouts, 0.7, 0.3), atol=2e-4, rtol=0)
    (logged,) = ours._metrics["train"]["informativeness"]
    expected = rollouts.informativeness[rollouts.completion_mask].mean()
    assert logged == pytest.approx(float(expected), abs=1e-5)


def priced(rollouts, alpha, beta):
    """A rule of a user's own that looks at the references and at the information."""
    known = torch.tensor([float(len(x)) for x in rollouts.references])[:, None]
    return (alpha * known + beta * rollouts.informativeness) * rollouts.completion_mask


@pytest.fixture
def own_rule(monkeypatch):
    recipe = replace(RECIPES["iapo"], rule=priced, alpha=0.5, beta=2.0)
    monkeypatch.setitem(RECIPES, "priced", recipe)


RULES = sorted({*RECIPES, "priced"} - {"iapo"})


@pytest.mark.parametrize("method", RULES)
def test_any_rule_has_our_advantages_our_loss_and_our_gradient(
    trainer, schooled_folder, method, own_rule
):
    """The batch that TRL scores, weighed by the library; the loss leaves out the same tokens."""
    policy = perturb_lora(load_policy(schooled_folder, lora_rank=4))
    theirs = trainer(policy=policy, iapo_method=method, temperature=1.0, max_completion_length=10)
    recipe, args = RECIPES[method], theirs.args
    assert (args.iapo_alpha, args.iapo_beta) == (recipe.alpha, recipe.beta)
    assert (args.epsilon, args.epsilon_high) == (recipe.epsilon, recipe.epsilon_high)
    assert SHARED_LOSSES[args.loss_type] == recipe.aggregation and args.beta == recipe.kl_coef
    batch = batch_of(theirs)
    rewards = theirs._rewards[:, 0]
    rollouts = as_rollouts(batch, rewards=rewards, correct=rewards > 0)
    ends = rollouts.completion_ids.gather(1, rollouts.lengths[:, None] - 1)[:, 0]
    rollouts = replace(
        rollouts, limit=10, finished=torch.isin(ends, policy.eos_ids),
        references=tuple(problem.answer for problem in TRIVIAL for _ in range(4)),
    )  # fmt: skip
    policy.model.eval()
    with torch.no_grad():
        logprobs, entropies = token_logprobs(policy.model, rollouts)
    rollouts = replace(rollouts, old_logprobs=logprobs).filled(token_entropies=entropies)
    if recipe.information is not None:
        rollouts = inform(policy, rollouts, recipe.information, EVERY_PREFIX)
    weigh = ADVANTAGES[recipe.rule] if isinstance(recipe.rule, str) else recipe.rule
    expected = weigh(rollouts, recipe.alpha, recipe.beta)
    # GTPO divides by entropies, some of which are near 0.
    atol, rtol = (3e-3, 1e-2) if method.startswith("gtpo") else (3e-4, 1e-4)
    torch.testing.assert_close(batch["advantages"], expected, atol=atol, rtol=rtol)

    mask = rollouts.completion_mask
    if recipe.counted is not None:
        mask = COUNTED[recipe.counted](rollouts, recipe.alpha)
        assert 0 < mask.sum() < rollouts.completion_mask.sum() or method == "sgrpo"
    theirs.model.zero_grad()
    loss = theirs._compute_loss(theirs.model.train(), batch)
    loss.backward()
    found = gradients(theirs.model)
    theirs.model.zero_grad()
    with torch.no_grad(), policy.reference() as reference:
        ref_logprobs, _ = token_logprobs(reference, rollouts)
    logprobs, _ = token_logprobs(policy.model.train(), rollouts)
    ours, _ = policy_loss(
        logprobs, logprobs.detach(), expected, mask, kl_coef=recipe.kl_coef,
        ref_logprobs=ref_logprobs if recipe.kl_coef else None, epsilon=recipe.epsilon,
        epsilon_high=recipe.epsilon_high, aggregation=recipe.aggregation,
    )  # fmt: skip
    ours.backward()
    assert abs(float((ours - loss).detach())) < 10 * atol
    for name, gradient in gradients(policy.model).items():
        size = max(1.0, float(gradient.abs().max()))
        assert float((gradient - found[name]).abs().max()) < 10 * atol * size, name


@pytest.mark.parametrize("method", RULES)
def test_a_short_run_of_every_rule(trainer, schooled_folder, method, own_rule):
    policy = load_policy(schooled_folder, lora_rank=4)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    logs, weights = steps_of(trainer(policy=policy, iapo_method=method, learning_rate=1e-2), 2)
    assert [row["step"] for row in logs if "reward" in row] == [1, 2]
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert ("informativeness" in logs[0]) == (RECIPES[method].information is not None)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)


def test_an_unknown_method_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match=r"iapo_method must be one of .*did you mean 'gtpo'"):
        IAPOConfig(str(tmp_path), use_cpu=True, bf16=False, iapo_method="gtpp")


def test_what_is_given_takes_precedence_over_the_recipe(tmp_path):
    config = IAPOConfig(str(tmp_path), use_cpu=True, bf16=False, iapo_method="gtpo",
                        loss_type="grpo", epsilon_high=0.4, beta=0.0, iapo_alpha=0.0)  # fmt: skip
    assert (config.loss_type, config.epsilon_high, config.beta) == ("grpo", 0.4, 0.0)
    assert config.iapo_alpha == 0.0 and config.epsilon == RECIPES["gtpo"].epsilon


def test_trl_still_takes_an_advantage_for_every_token(trainer):
    """The one thing that this engine needs of TRL."""
    plain = trainer(GRPOTrainer)
    batch = batch_of(plain)
    with torch.no_grad():
        one = plain._compute_loss(plain.model, batch)
        spread = batch["advantages"][:, None].expand(batch["completion_mask"].shape)
        try:
            many = plain._compute_loss(plain.model, batch | {"advantages": spread.clone()})
        except (RuntimeError, ValueError, IndexError) as error:
            many, told = torch.tensor(float("nan")), str(error)
        else:
            told = f"the loss is {float(many):.6f} where it was {float(one):.6f}"
    if not torch.allclose(one, many, atol=1e-6):
        pytest.fail(
            f"TRL no longer takes (B, T) advantages ({told}). Look at what its _compute_loss does "
            'with inputs["advantages"]; until engines/trl.py follows, keep trl below this version '
            "in pyproject.toml and requirements.txt."
        )


@pytest.mark.parametrize("stride", [4, "4", "sentence"])
def test_early_answers_at_a_stride(trainer, monkeypatch, stride):
    ours, asked = trainer(iapo_stride=stride), []

    def spy(policy, rollouts, how):
        asked.append(how)
        return answer_entropies(policy, rollouts, how)

    monkeypatch.setattr("iapo_mini.information.answer_entropies", spy)
    batch_of(ours)
    (how,) = asked
    assert how.way == "packed"
    assert how.stride == ("sentence" if stride == "sentence" else 4)


def test_token_terms_skip_unrewarded_rows_and_tokens_of_tools(trainer, monkeypatch):
    """These are rows without a reward, truncated rows, and tokens that a tool wrote."""
    ours = trainer(iapo_alpha=0.7, iapo_beta=0.3, mask_truncated_completions=True)
    plain = GRPOTrainer._generate_and_score_completions

    def with_tool(self, inputs):
        batch = plain(self, inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 1] = 0
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_tool)
    ours.reward_funcs[0] = lambda completions, **kw: [None, *range(len(completions) - 1)]
    batch = batch_of(ours)
    advantages, mask = batch["advantages"], batch["completion_mask"].bool()
    assert not advantages[0].any()
    assert not advantages[:, 1].any()
    assert not advantages[~mask].any()
    assert advantages[1:, 2].any()


@pytest.mark.parametrize("method", ["gfpo", "grpo_kimi", "grpo_efficient"])
def test_a_truncated_row_that_trl_masks_does_not_count_as_the_shortest(
    trainer, schooled_folder, method
):
    """The other rows have the advantages that they have without the option."""
    found, rewards = [], [float(i % 3) for i in range(64)]
    for masked in (False, True):
        ours = trainer(
            policy=perturb_lora(load_policy(schooled_folder, lora_rank=4)), iapo_method=method,
            max_completion_length=10, temperature=2.0, mask_truncated_completions=masked,
        )  # fmt: skip
        ours.reward_funcs[0] = lambda completions, **kw: rewards[: len(completions)]
        torch.manual_seed(0)
        found.append(batch_of(ours))
    plain, batch = found
    assert torch.equal(plain["completion_ids"], batch["completion_ids"])
    kept = batch["completion_mask"].bool().any(1)
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(batch["advantages"][kept], plain["advantages"][kept])
    assert not batch["advantages"][~kept].any() and batch["advantages"][kept].any()


def steps_of(trainer, steps=3):
    torch.manual_seed(3)
    trainer.args.max_steps = steps
    trainer.train()
    logs = [
        {k: v for k, v in row.items() if "time" not in k and "per_second" not in k}
        for row in trainer.state.log_history
    ]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "beta": 0.0},
        {"loss_type": "grpo", "beta": 0.04},
        {"loss_type": "cispo", "beta": 0.0, "steps_per_generation": 2, "num_iterations": 2},
    ],
    ids=["dapo", "grpo with KL", "cispo off policy"],
)
def test_without_its_terms_every_step_is_that_of_grpo(trainer, settings):
    """With alpha = beta = 0 the advantages have our shape, (B, T), and the same values."""
    # Two off-policy batches count as one. TRL's clip range is symmetric, IAPO's is not.
    settings = settings | {
        "problems": [*TRIVIAL, *TRIVIAL],
        "epsilon_high": RECIPES["iapo"].epsilon_high,
    }
    logs, weights = steps_of(trainer(iapo_alpha=0.0, iapo_beta=0.0, **settings))
    expected_logs, expected = steps_of(trainer(GRPOTrainer, **settings))
    assert logs == expected_logs
    assert any(row.get("grad_norm", 0) > 1e-3 for row in logs)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_its_terms_change_the_update(trainer):
    _, plain = steps_of(trainer(iapo_alpha=0.0, iapo_beta=0.0), 1)
    for terms in ({"iapo_alpha": 0.5, "iapo_beta": 0.0}, {"iapo_alpha": 0.0, "iapo_beta": 0.5}):
        _, weights = steps_of(trainer(**terms), 1)
        assert any(not torch.equal(w, plain[n]) for n, w in weights.items())


SCRIPT = Path(__file__).parent / "trl_process.py"


@pytest.mark.parametrize("method", ["iapo", "gfpo"])
@pytest.mark.skipif(os.name != "posix", reason="gloo by torchrun")
def test_two_processes_make_the_update_of_one(schooled_folder, tmp_path, method):
    """With ``accelerate launch``, groups of four are split over two batches of six."""
    found = {}
    for processes, batch in ((1, 12), (2, 6)):
        out = tmp_path / f"{processes}.pt"
        launch = ["--num_processes", str(processes), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        launch += ["--multi_gpu"] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *launch, str(SCRIPT),
             schooled_folder, str(batch), str(out), method],
            capture_output=True, text=True, timeout=PATIENCE,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = torch.load(out, weights_only=True)
    one, two = found[1], found[2]
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    start = one.pop("start"), two.pop("start")
    moved = 0.0
    for name, weight in one["end"].items():
        assert torch.equal(start[0][name], start[1][name])
        assert torch.allclose(weight, two["end"][name], atol=1e-6, rtol=0), name
        moved = max(moved, float((weight - start[0][name]).abs().max()))
    assert moved > 1e-3
    assert one["reward"] == pytest.approx(two["reward"], abs=1e-6)
    if method == "iapo":
        assert one["informativeness"] == pytest.approx(two["informativeness"], abs=1e-5)


def test_a_short_run_learns(trainer, schooled_folder):
    """Trains on two problems with the same answer, with LoRA, Adam and the token terms."""
    policy = load_policy(schooled_folder, lora_rank=8)
    ours = trainer(
        policy=policy, max_steps=20, optim="adamw_torch", learning_rate=1e-2, iapo_alpha=0.1,
        per_device_train_batch_size=16, num_generations=8, loss_type="dapo", beta=0.0,
    )  # fmt: skip
    logs, _ = steps_of(ours, 20)
    rewards = [row["reward"] for row in logs if "reward" in row]
    assert len(rewards) == 20
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.5
    assert all("informativeness" in row for row in logs if "reward" in row)


def test_mixed_precision_runs(trainer):
    """TRL's default on GPUs is bf16 by autocast; the estimator uses the dtype of the weights."""
    logs, _ = steps_of(trainer(bf16=True), 1)
    assert 0 < logs[0]["grad_norm"] < 100 and abs(logs[0]["informativeness"]) < 10


def test_a_checkpoint_of_trl_resumes(trainer, tmp_path):
    """Features of TRL still work, here its checkpoints."""
    settings = dict(save_strategy="steps", save_steps=2, max_steps=3)
    whole = trainer(**settings)
    whole.train()
    again = trainer(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


def test_the_reward_is_the_librarys():
    right = "<think> 2 + 3 = 5.</think><answer> 5</answer>"
    chat = [{"role": "assistant", "content": right}]
    assert answer_reward([right, chat, "5"], answer=["5", "6", "5"]) == [1.5, -0.5, -1.5]


def test_the_dataset_holds_chats_and_answers():
    problems = list(itertools.islice(stories("train"), 3))
    data = trl.dataset(problems)
    assert data["answer"] == [p.answer for p in problems]
    assert data[0]["prompt"][-1] == {"role": "user", "content": problems[0].question}
    with pytest.raises(ValueError, match="problems is empty"):
        trl.dataset([])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iapo_alpha", -0.1),
        ("iapo_beta", float("nan")),
        ("iapo_memory_mb", 0),
        ("iapo_stride", "0"),
    ],
)
def test_bad_settings_are_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"{field} must be .*, got"):
        IAPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{field: value})


def test_defaults_are_those_of_the_recipe(tmp_path):
    recipe = RECIPES["iapo"]
    config = IAPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (config.iapo_alpha, config.iapo_beta) == (recipe.alpha, recipe.beta)
    assert (config.epsilon, config.epsilon_high) == (recipe.epsilon, recipe.epsilon_high)
    assert config.beta == recipe.kl_coef
    assert SHARED_LOSSES[config.loss_type] == recipe.aggregation


def test_an_empty_postfix_is_refused(trainer):
    with pytest.raises(ValueError, match=r"postfix must be .*, got ''"):
        trainer(iapo_postfix="")


def test_nothing_else_imports_it():
    code = "import sys, iapo_mini.cli, iapo_mini.lab.table1, iapo_mini.trainer; "
    code += "sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    library = Path(trl.__file__).parent.parent
    for file in set(library.rglob("*.py")) - {Path(trl.__file__)}:
        assert "trl import" not in file.read_text(encoding="utf-8"), file


def test_configs_for_eight_gpus_can_be_read(tmp_path):
    """accelerate and TRL parse them; nothing is started."""
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).parent.parent / "examples"
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(folder / "deepspeed_8gpu.yaml"))
    assert str(launch.distributed_type.value) == "DEEPSPEED" and launch.num_processes == 8
    sharded = load_config_from_file(str(folder / "fsdp_8gpu.yaml"))
    assert str(sharded.distributed_type.value) == "FSDP" and sharded.num_processes == 8
    settings = yaml.safe_load((folder / "gsm8k_8gpu.yaml").read_text(encoding="utf-8"))
    known = set(IAPOConfig.__dataclass_fields__)
    assert set(settings) - known == {"model", "data", "problems"}
    steps = 2 * settings["problems"] / 12  # two epochs, 12 prompts a step
    assert settings["max_steps"] == int(steps)
    assert settings["use_vllm"] and settings["iapo_alpha"] > 0
    batch = settings["per_device_train_batch_size"] * launch.num_processes
    assert batch * settings["gradient_accumulation_steps"] % settings["num_generations"] == 0


def test_the_example_trains(tmp_path):
    """Runs examples/train_trl.py on stories with the embedded policy and settings for a CPU."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3, 9)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = Path(__file__).parent.parent / "examples" / "train_trl.py"
    options = {
        "output_dir": tmp_path / "out", "model": "embedded", "data": "gsm8k", "data_file": file,
        "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 16, "report_to": "none", "bf16": "false", "use_cpu": "true",
        "gradient_checkpointing": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), *[x for k, v in options.items() for x in (f"--{k}", str(v))]],
        capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file() or list(
        (tmp_path / "out").glob("*.safetensors")
    )
