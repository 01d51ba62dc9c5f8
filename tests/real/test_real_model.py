"""A real, pretrained model, end to end: ``make real MODEL=...``, a folder or a hub id.

The other tests make their own tiny models. These tests need a published model: its tokenizer and
chat template, weights of the usual size, a vocabulary of many thousand tokens, and answers of
several tokens. They print what they measure.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    PATIENCE,
    REAL_DATA,
    assert_close_in_fp32,
    metrics,
    plain_logprobs,
    real_model,
    unpadded,
    weights,
)

from iapo_mini.advantages import ADVANTAGES
from iapo_mini.chat import continuation_ids, token_texts
from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.early_exit.question import EarlyExit
from iapo_mini.information import answer_entropies, encode_postfix, inform
from iapo_mini.logprobs import token_logprobs
from iapo_mini.objective import policy_loss
from iapo_mini.policy import load_policy
from iapo_mini.rewards import score
from iapo_mini.sampling import encode_prompts, from_ids, from_texts, sample
from iapo_mini.tasks import POSTFIX, Problem
from iapo_mini.trainer import update

THREADS = torch.get_num_threads()
"""As torch found it when this was imported; OMP_NUM_THREADS sets it."""
NATS = 1e-3
"""Largest difference of an answer entropy from a plain forward, in fp32."""
LENGTH = 32
"""Length limit of completions in training and evaluation here, since a CPU samples only about a
hundred tokens per second from such models."""


class Worked(NamedTuple):
    """A problem and its worked solution."""

    problem: Problem
    chain: str

    def completion(self, answer=None):
        """The solution in the format that earns the full reward, optionally with another answer."""
        answer = self.problem.answer if answer is None else answer
        return f"<think>\n{self.chain}\n</think>\n<answer>{answer}</answer>"


OUR_OWN = [
    ("A box holds 12 pens. How many pens are in 4 boxes?", "4*12 = 48 pens are in 4 boxes.", "48"),
    ("Ida has $30. She buys two books of $7 each. How much is left?",
     "The books cost 2*7 = $14.\nSo 30-14 = $16 are left.", "16"),
    ("A train has 5 cars of 60 seats. 212 seats are taken. How many are free?",
     "There are 5*60 = 300 seats.\n300-212 = 88 are free.", "88"),
]  # fmt: skip


def processor_seconds():
    """Processor seconds of this process and of ended children, which a busy machine keeps equal."""
    return sum(os.times()[:4])


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(THREADS)
    began = processor_seconds()
    yield
    print(f"processor time {processor_seconds() - began:.0f} s")


@pytest.fixture(scope="module")
def model():
    return real_model()


@pytest.fixture(scope="module")
def policy(model):
    """The model without an adapter in fp32. It is shared, so tests never train it."""
    torch.set_num_threads(THREADS)
    return load_policy(model, lora_rank=0)


@pytest.fixture(scope="module")
def worked(model):
    """Three short worked solutions, from GSM8K if its file exists, else our own."""
    file = Path(os.environ.get(REAL_DATA, "")) / "gsm8k_test.jsonl"
    if not file.is_file():
        return [Worked(Problem(question, answer), chain) for question, chain, answer in OUR_OWN]
    found = []
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        chain, _, answer = re.sub("<<.*?>>", "", row["answer"]).partition("####")
        found.append(Worked(Problem(row["question"], answer.strip()), chain.strip()))
    found.sort(key=lambda w: len(w.problem.question) + 2 * len(w.chain))
    return found[:3]


@pytest.fixture(scope="module")
def data_file(worked, tmp_path_factory):
    """The same problems as a file in GSM8K's format."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [
        {"question": w.problem.question, "answer": f"{w.chain}\n#### {w.problem.answer}"}
        for w in worked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chains(policy, worked):
    """Rollouts that stop in the middle of a worked solution, two rows."""
    prompts = encode_prompts(policy, [w.problem for w in worked[:2]])
    ids = [continuation_ids(policy.tokenizer, f"<think>\n{w.chain}") for w in worked[:2]]
    return from_ids(policy, *prompts, [row[:LENGTH] for row in ids], 1)


@pytest.fixture(scope="module")
def entropies(policy, chains):
    torch.set_num_threads(THREADS)
    return answer_entropies(policy, chains)


def test_a_perfect_completion_earns_the_full_reward_and_ends_its_row(policy, worked):
    problems = [w.problem for w in worked]
    rollouts = from_texts(policy, problems, [w.completion() for w in worked])
    rollouts = score(rollouts, policy.tokenizer, problems)
    assert rollouts.texts(policy.tokenizer) == [w.completion() for w in worked]
    assert rollouts.rewards.tolist() == [1.5] * len(worked)
    stops = torch.isin(rollouts.completion_ids, policy.eos_ids) & rollouts.completion_mask
    assert rollouts.finished.all() and (stops.sum(1) == 1).all()
    wrong = from_texts(policy, problems, [w.completion("123456") for w in worked])
    assert score(wrong, policy.tokenizer, problems).rewards.tolist() == [-0.5] * len(worked)


def test_sampled_rows_end_where_their_turn_does(policy, worked):
    """A model that has learnt to end its turns also does so here."""
    question = Problem("Answer with the single word yes.", "1", system="You answer in one word.")
    rollouts = sample(policy, [question], num_generations=2, max_completion_length=LENGTH,
                      temperature=0.0)  # fmt: skip
    print(f"a word was asked for: {rollouts.texts(policy.tokenizer)[0]!r}")
    assert rollouts.finished.all()
    last = rollouts.completion_ids[torch.arange(2), rollouts.lengths - 1]
    assert torch.isin(last, policy.eos_ids).all()


def test_the_postfix_goes_on_where_a_chain_stops(policy, worked):
    tokenizer, postfix = policy.tokenizer, encode_postfix(policy).tolist()
    assert "".join(token_texts(tokenizer, postfix)) == POSTFIX
    print(f"the postfix is {len(postfix)} tokens: {token_texts(tokenizer, postfix)}")
    for text in (w.completion().partition("\n</think>")[0] for w in worked):
        ids = continuation_ids(tokenizer, text)
        for end in range(1, len(ids)):  # after every token, in the middle of a word too
            before = tokenizer.decode(ids[:end], skip_special_tokens=False)
            whole = tokenizer.decode(ids[:end] + postfix, skip_special_tokens=False)
            assert whole == before + POSTFIX


@torch.no_grad()
def plain_entropy(policy, prefix):
    """Answer entropy after a prefix from one forward pass, without sharing or padding."""
    ids = torch.cat([prefix, encode_postfix(policy)])[None]
    logits = policy.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum()


def test_the_packed_estimator_is_a_plain_forward_for_each_prefix(policy, chains, entropies):
    errors = []
    for i, length in enumerate(chains.lengths.tolist()):
        prompt, completion = unpadded(chains, i)
        for t in {*range(0, length, 3), length}:  # each would cost a large model minutes
            plain = plain_entropy(policy, torch.cat([prompt, completion[:t]]))
            errors.append(float((entropies[i, t] - plain).abs()))
    spread = float(entropies[0, : chains.lengths[0] + 1].std())
    print(f"largest difference {max(errors):.2g} nats over {len(errors)} prefixes; "
          f"entropies vary by {spread:.2f}")  # fmt: skip
    assert max(errors) < NATS < 0.05 < spread


def test_the_padding_of_other_rows_changes_nothing(policy, chains, entropies):
    alone = answer_entropies(policy, chains.rows(1, 2))
    assert float((alone[0] - entropies[1, : alone.shape[1]]).abs().max()) < NATS


def test_bf16_is_stated(policy, chains):
    """Tests only a few prefixes, because bf16 is ten times slower on processors without it."""
    how = EarlyExit(stride=8)
    half = replace(policy, model=copy.deepcopy(policy.model).to(torch.bfloat16))
    row = chains.rows(0, 1)
    exact, found = (answer_entropies(p, row, how)[0, ::8] for p in (policy, half))
    error = (found - exact).abs()
    print(f"bf16 differs by {float(error.mean()):.3f} nats on average, {float(error.max()):.3f} "
          f"at most; the entropies are {[round(x, 2) for x in exact.tolist()]}")  # fmt: skip
    assert 0 < float(error.mean()) < 0.2 and float(error.max()) < 0.6


@torch.no_grad()
def test_log_probabilities_are_those_of_a_plain_forward(policy, chains):
    found, _ = token_logprobs(policy.model, chains)
    error = float((found - plain_logprobs(policy.model, chains)).abs().max())
    print(f"largest difference {error:.2g} nats")
    assert error < NATS
    # The same when they are read in chunks, as for long batches.
    chunked, _ = token_logprobs(policy.model, chains, memory_mb=8)
    assert float((chunked - found).abs().max()) < NATS


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "4-bit"])
def test_one_step_of_an_adapter_lowers_the_loss_of_its_batch(model, worked, four_bit):
    """By about the predicted amount: Adam's first step is the rate times the gradient's sign."""
    if four_bit:
        pytest.importorskip("bitsandbytes", reason="the extra [four-bit] is not installed")
    trained = load_policy(model, lora_rank=8, four_bit=four_bit)
    config = TrainConfig(
        model=model, learning_rate=CARDS["t4"]["learning_rate"], warmup_steps=0, kl_coef=0.0,
        max_grad_norm=1e9, num_generations=2, micro_batch_size=2, threads=THREADS,
    )  # fmt: skip
    recipe, problems = config.recipe(), [w.problem for w in worked[:2]]
    pairs = [text for w in worked[:2] for text in (w.completion(), w.completion("123456"))]
    alone = from_texts(trained, [p for p in problems for _ in range(2)], pairs)
    rollouts = score(replace(alone, num_generations=2), trained.tokenizer, problems)
    assert rollouts.rewards.tolist() == [1.5, -0.5] * 2
    with torch.no_grad():
        rollouts = replace(rollouts, old_logprobs=token_logprobs(trained.model, rollouts)[0])
    rollouts = inform(trained, rollouts, "answer_entropy", config.early_exit())
    advantages = ADVANTAGES["iapo"](rollouts, recipe.alpha, recipe.beta)

    @torch.no_grad()
    def loss():
        logprobs, _ = token_logprobs(trained.model, rollouts)
        value, _ = policy_loss(logprobs, rollouts.old_logprobs, advantages,
                               rollouts.completion_mask)  # fmt: skip
        return float(value)

    parameters, slope = list(trained.trainable().values()), []
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: slope.append(float(sum(p.grad.abs().sum() for p in parameters)))
    )
    before = loss()
    update(trained, optimizer, rollouts, advantages, config, 0)
    fall, expected = before - loss(), config.learning_rate * slope[0]
    print(f"the loss fell by {fall:.2g}; the gradient says {expected:.2g}")
    assert abs(before) < 1e-6 < 0.3 * expected < fall < 1.3 * expected


def command(*arguments):
    """Run the command line as a process, check that it succeeds, and return its output."""
    began = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "iapo_mini", *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(f"{arguments[0]}: processor time {processor_seconds() - began:.0f} s")
    return done.stdout


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder that is emptied afterwards, because a merged model takes gigabytes."""
    folder = tmp_path_factory.mktemp("real")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def training(model, data_file):
    """Options of a run of three steps."""
    return [
        "--model", model, "--data", "gsm8k", "--data-file", data_file, "--split", "all",
        "--max-steps", 3, "--prompts-per-step", 1, "--num-generations", 2, "--lora-rank", 8,
        "--max-completion-length", LENGTH, "--learning-rate", 1e-3, "--warmup-steps", 0,
        "--micro-batch-size", 2, "--save-steps", 1, "--threads", THREADS,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(training, scratch):
    """A finished run."""
    command("train", "--out", scratch / "whole", *training)
    return scratch / "whole"


def test_a_killed_run_resumes_to_the_same_bits(run, training, scratch):
    folder = scratch / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "iapo_mini", *map(str, ["train", "--out", folder, *training])],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        log, give_up = folder / "metrics.jsonl", time.monotonic() + PATIENCE
        while not log.exists() or len(log.read_text(encoding="utf-8").splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "final").exists() and len(metrics(folder)) == 2
    command("train", "--out", folder, *training, "--resume")
    assert metrics(folder) == metrics(run)
    assert weights(folder) == weights(run)
    assert all(line["grad_norm"] > 1e-3 for line in metrics(run))


@torch.no_grad()
def test_an_exported_model_computes_what_model_and_adapter_do(policy, chains, run, scratch):
    command("export", "--adapter", run / "final", "--out", scratch / "merged")
    ids = torch.cat(unpadded(chains, 0))[None]
    base = policy.model(ids).logits
    adapted = load_policy(adapter=run / "final").model.eval()(ids).logits
    merged = load_policy(str(scratch / "merged"), lora_rank=0).model(ids).logits
    error, moved = (float((x - adapted).abs().max()) for x in (merged, base))
    print(f"merged logits differ by {error:.2g}; the adapter moved them by {moved:.2g}")
    assert_close_in_fp32(merged, adapted)
    assert moved > 100 * error


def test_evaluate_finds_the_adapters_model(run, data_file, scratch):
    told = command(
        "evaluate", "--adapter", run / "final", "--data", "gsm8k", "--data-file", data_file,
        "--split", "all", "--problems", 2, "--k", 1, 2, "--max-completion-length", LENGTH,
        "--threads", THREADS, "--out", scratch / "e.json",
    )  # fmt: skip
    assert "2 of 3 problems of gsm8k (all)" in told
    result = json.loads((scratch / "e.json").read_text(encoding="utf-8"))
    assert 0 < result["length@2"] <= LENGTH and 0 <= result["pass@2"] <= 1


def test_explain_shows_words(model, worked, scratch):
    question = worked[0].problem.question
    told = command("explain", question, "--model", model, "--temperature", 0,
                   "--color", "never", "--out", scratch / "h.png")  # fmt: skip
    assert question in told and "nats" in told
    assert (scratch / "h.png").read_bytes().startswith(b"\x89PNG")
    completion = told.partition(question)[2]
    assert completion.count(" ") > 10 and "\u0120" not in completion and "\u2581" not in completion


def test_plan_counts_the_model(model, policy):
    told = command("plan", "--model", model, "--gpu", "12gb", "--four-bit")
    assert "4-bit weights" in told and "peak" in told


def test_diagnose_reads_the_run(run):
    told = command("diagnose", run)
    assert "gradient norm" in told and "format" in told
