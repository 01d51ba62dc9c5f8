"""How the embedded policy was made: ``python -m iapo_mini.lab.pretrain`` remakes it from nothing.

A Qwen2-architecture model learns to continue stories of the train stream with the world's own
chains of thought. Two losses, one trunk pass:

* next-token cross-entropy on the completion, and
* **early exits**: at ``exits`` random prefixes of every chain a branch ``</think><answer>`` is
  appended (all branches of a row packed behind its KV cache) and the branch must predict the true
  answer. Only the answer is a target, so the policy does not learn to stop early.

Without the second loss a policy that is forced to answer early copies the last number it saw, its
answer entropy is near zero everywhere, and the estimator of the paper measures noise.

``python -m iapo_mini.lab.pretrain --calibrate`` makes ``embedded-calibrated`` from the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import AddedToken
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from iapo_mini.calibration import calibrate, exit_calibration, exit_loss
from iapo_mini.intervals import expected_calibration_error
from iapo_mini.plots import reliability
from iapo_mini.policies import EMBEDDED
from iapo_mini.policy import load_policy
from iapo_mini.problems.stories import MAX_VALUE, chain_of_thought, stories, token_roles
from iapo_mini.rewards import parse_answer, score
from iapo_mini.sampling import from_texts, sample
from iapo_mini.tasks import POSTFIX, render_prompt

# ChatML without a system turn: the embedded policy needs no instructions.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def build_tokenizer(n_stories: int = 6000) -> Qwen2Tokenizer:
    """Byte-level Qwen2 tokenizer trained on the story world; `` 0`` to `` 99`` are one token each.

    Qwen2-compatible on purpose: with ``model_type: qwen2`` transformers always loads
    ``Qwen2Tokenizer`` and would replace any other pre-tokenizer.
    """
    rng = random.Random(0)
    texts = []
    for problem in itertools.islice(stories("train", seed=0), n_stories):
        chain = "".join(s.text for s in chain_of_thought(problem, rng) if s.role != "format")
        texts += [problem.question, chain, "user\n", "assistant\n"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=4000, show_progress=False
    )
    tokenizer.add_tokens([f" {n}" for n in range(100)])
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, seed: int, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """Randomly initialised tiny Qwen2: tied embeddings, heads of 32, a KV head per query head."""
    torch.manual_seed(seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        # The usual 0.02 suits widths in the thousands. At this one it starts names and items almost
        # equal, and the model takes thousands of steps to tell them apart.
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    return model


def sample_batches(tokenizer, seed: int, batch_size: int, exits: int, skip: int = 0):
    """Endless batches of right-padded (ids, completion start, length, exit positions, answers).

    Rows of similar length share a batch. Exit positions index the last trunk token a branch sees:
    from the prompt's last token (no reasoning yet) to the closing ``<|im_end|>`` itself, so that
    every prefix a rollout can contain has been practised.
    """
    rng = random.Random(f"pretrain/{seed}")
    problems = stories("train", seed=seed + 1)
    answers = {str(n): tokenizer.encode(f" {n}")[0] for n in range(MAX_VALUE + 1)}
    emitted = 0
    while True:
        rows = []
        for problem in itertools.islice(problems, 8 * batch_size):
            prompt = tokenizer.encode(render_prompt(tokenizer, problem))
            chain = "".join(s.text for s in chain_of_thought(problem, rng))
            completion = tokenizer.encode(chain + tokenizer.eos_token)
            rows.append((prompt, completion, answers[problem.answer]))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            cuts = []
            for prompt, completion, _ in batch:
                first, last = len(prompt) - 1, len(prompt) + len(completion) - 1
                cuts.append(sorted(rng.randint(first, last) for _ in range(exits)))
            emitted += 1
            if emitted > skip:
                yield _collate(batch, cuts, tokenizer.pad_token_id)


def _collate(batch, cuts, pad: int) -> dict[str, torch.Tensor]:
    width = max(len(p) + len(c) for p, c, _ in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for i, (prompt, completion, _) in enumerate(batch):
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    answers = torch.tensor([a for _, _, a in batch])
    ends = torch.tensor(cuts, dtype=torch.long)
    return {"ids": ids, "labels": labels, "ends": ends, "answers": answers}


def losses(model, batch: dict[str, torch.Tensor], postfix: torch.Tensor):
    """Completion cross-entropy and early-exit cross-entropy (both nats per target, fp32).

    ``batch`` as from :func:`sample_batches`; ``postfix`` (K,) token ids. Without exits in the batch
    the second is 0: a policy that only ever sees whole chains.
    """
    ids, ends = batch["ids"], batch["ends"]
    # Right padding and a causal mask: real tokens never see padding, so no mask is needed.
    trunk = model(ids, use_cache=True)
    lm = torch.nn.functional.cross_entropy(
        trunk.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten()
    )
    if not ends.shape[1]:
        return lm, torch.zeros(())
    mask = torch.ones_like(ids, dtype=torch.bool)
    position_ids = torch.arange(ids.shape[1]).expand_as(ids)
    early = exit_loss(
        model, trunk.past_key_values, mask, position_ids, ends, postfix, batch["answers"]
    )
    return lm, early


def build_optimizers(model: Qwen2ForCausalLM, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases.

    Muon reached AdamW's loss in two thirds of the steps here (figures/recipe_search.md).
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "layers" in name
        (matrices if inner else rest).append(parameter)
    muon_lr = 10 * lr  # Muon's steps have unit spectral norm, AdamW's unit entries
    return {
        "adamw": torch.optim.AdamW(
            [{"params": rest, "peak": lr}], lr=lr, betas=(0.9, 0.98), weight_decay=0.0
        ),
        "muon": torch.optim.Muon(
            [{"params": matrices, "peak": muon_lr}], lr=muon_lr, weight_decay=0.01
        ),
    }


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(
    out: str | Path,
    steps: int = 1600,
    batch_size: int = 48,
    exits: int = 8,
    exit_weight: float = 0.5,
    lr: float = 2e-3,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
    checkpoint_every: int = 500,
    threads: int = 2,
) -> Path:
    """Train the embedded policy and save it with its tokenizer to ``out`` (transformers format).

    Checkpoints go to ``out/checkpoint.pt`` (written to a temporary name and renamed); a killed run
    started again with the same arguments goes on where it was. The log, ``out/pretrain_log.jsonl``,
    has one line per 50 steps with both losses (nats), learning rate, tokens/s and minutes.
    """
    torch.set_num_threads(threads)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed, hidden, layers)
    optimizers = build_optimizers(model, lr)
    postfix = torch.tensor(tokenizer.encode(POSTFIX))
    checkpoint, log = out / "checkpoint.pt", out / "pretrain_log.jsonl"
    start, minutes = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        start, minutes = state["step"], state["minutes"]
        lines = log.read_text().splitlines() if log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        log.write_text("".join(line + "\n" for line in kept))
    elif log.exists():
        log.unlink()
    batches = sample_batches(tokenizer, seed, batch_size, exits, skip=start)
    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", desc="pretrain")
    began, seen, totals = time.perf_counter(), 0, torch.zeros(2)
    for step in bar:
        batch = next(batches)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps)
        lm, early = losses(model, batch, postfix)
        model.zero_grad()
        (lm + exit_weight * early).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        seen += batch["ids"].numel()
        totals += torch.stack([lm.detach(), early.detach()])
        if (step + 1) % 50 == 0 or step + 1 == steps:
            elapsed = time.perf_counter() - began
            mean = (totals / ((step % 50) + 1)).tolist()
            row = {
                "step": step + 1,
                "lm_loss": round(mean[0], 4),
                "exit_loss": round(mean[1], 4),
                "learning_rate": lr * schedule(step, steps),
                "tokens_per_second": round(seen / elapsed),
                "minutes": round(minutes + elapsed / 60, 2),
            }
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bar.set_postfix(lm=f"{mean[0]:.3f}", exit=f"{mean[1]:.3f}")
            totals.zero_()
        if (step + 1) % checkpoint_every == 0:
            state = {
                "model": model.state_dict(),
                "step": step + 1,
                "minutes": minutes + (time.perf_counter() - began) / 60,
            } | {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(state, temporary)
            os.replace(temporary, checkpoint)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    checkpoint.unlink(missing_ok=True)
    return out


def calibrated(out: str | Path, steps: int = 700, threads: int = 2) -> Path:
    """Calibrate the embedded policy and save it, merged and in bf16, to ``out``.

    An adapter of rank 64 learns by ``calibration.calibrate`` from stories of the train stream. The
    log, ``out/calibrate_log.jsonl``, has one line per 50 steps: means of both losses, nats.
    """
    torch.set_num_threads(threads)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    policy = load_policy(EMBEDDED, lora_rank=64)
    history = calibrate(policy, stories("train", seed=11), steps=steps)
    with (out / "calibrate_log.jsonl").open("w") as log:
        for i in range(0, steps, 50):
            part = history[i : i + 50]
            means = {k: round(sum(x[k] for x in part) / len(part), 5) for k in part[0]}
            log.write(json.dumps({"step": i + len(part)} | means) + "\n")
    policy.merged("cpu").to(torch.bfloat16).save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return out


def report(folder: str | Path, figures: str | Path = "figures", n_stories: int = 1000) -> dict:
    """Judge a pretrained policy on the test stream: is it a fair start, are its exits calibrated?

    Writes ``figures/results/policy.json`` and the reliability diagram ``figures/calibration.png``.
    Early exits are asked at every tenth of the chain:

    * ``ece``: on chains written by the world, against the true answer;
    * ``ece_sampled``: on the policy's own samples, against the answer that the completion ends
      with, which is the y of the paper's I(y; o_t | q, o_<t) (ill-formed completions left out);
    * ``ece_sampled_truth``: the same samples against the true answer: what a chain with a mistake
      in it does to the forced answer.

    ``*_by_tenth`` is the error at each tenth alone, entropies are on the world's chains.
    """
    folder, figures = Path(folder), Path(figures)
    policy = load_policy(str(folder), lora_rank=0)
    problems = list(itertools.islice(stories("test", seed=0), n_stories))
    rng = random.Random("report")
    texts = ["".join(s.text for s in chain_of_thought(p, rng)) for p in problems]
    written = from_texts(policy, problems, texts)
    exits = exit_calibration(policy, written, [p.answer for p in problems])
    own = score(sample(policy, problems, num_generations=4, seed=0), policy.tokenizer, problems)
    ends = [parse_answer(text) for text in own.texts(policy.tokenizer)]
    whole = torch.tensor([answer is not None for answer in ends])
    own_exits = exit_calibration(policy, own, [answer or "0" for answer in ends])
    truth_exits = exit_calibration(policy, own, [p.answer for p in problems for _ in range(4)])
    own_exits = {name: values[whole] for name, values in own_exits.items()}
    roles: Counter[str] = Counter()
    for ids, mask in zip(own.completion_ids, own.completion_mask):
        roles.update(token_roles(policy.tokenizer, ids[mask].tolist()))

    def error(e: dict, at=slice(None)) -> float:
        confidence, correct = e["confidence"][:, at], e["correct"][:, at]
        return expected_calibration_error(confidence.flatten(), correct.flatten())

    log = [json.loads(line) for line in (folder / "pretrain_log.jsonl").read_text().splitlines()]
    tenths = range(exits["entropy"].shape[1])
    result = {
        "ece": error(exits),
        "ece_by_tenth": [error(exits, t) for t in tenths],
        "ece_sampled": error(own_exits),
        "ece_sampled_by_tenth": [error(own_exits, t) for t in tenths],
        "ece_sampled_truth": error(truth_exits),
        "entropy_start_nats": float(exits["entropy"][:, 0].mean()),
        "entropy_end_nats": float(exits["entropy"][:, -1].mean()),
        "entropy_end_sampled_nats": float(own_exits["entropy"][:, -1].mean()),
        "accuracy": float(own.correct.float().mean()),
        "mean_length": float(own.lengths.float().mean()),
        "share_not_compute": 1 - roles["compute"] / sum(roles.values()),
        "megabytes": sum(f.stat().st_size for f in folder.iterdir()) / 1e6,
        "train_minutes": log[-1]["minutes"],
        "stories": n_stories,
    }
    (figures / "results").mkdir(parents=True, exist_ok=True)
    (figures / "results" / "policy.json").write_text(json.dumps(result, indent=1) + "\n")
    sets = {"world's chains, true answer": exits, "own chains, own final answer": own_exits}
    reliability(sets).savefig(figures / "calibration.png", dpi=150)
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line of ``python -m iapo_mini.lab.pretrain``."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="runs/pretrain", help="folder for the policy and its log")
    parser.add_argument("--steps", type=int, default=1600, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=48, help="stories per step")
    parser.add_argument("--exits", type=int, default=8, help="early exits per story; 0: none")
    parser.add_argument("--exit-weight", type=float, default=0.5, help="weight of the exit loss")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size (multiple of 32)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--report-only", action="store_true", help="judge the policy in --out, train nothing"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="train nothing new; calibrate the embedded policy and save that, 700 steps",
    )
    parser.add_argument("--figures", default="figures", help="where the report goes")
    options = vars(parser.parse_args(argv))
    if options.pop("calibrate"):
        calibrated(options["out"], threads=options["threads"])
        return
    report_only, figures = options.pop("report_only"), options.pop("figures")
    if not report_only:
        pretrain(**options)
    torch.set_num_threads(options["threads"])
    print(json.dumps(report(options["out"], figures), indent=1))


if __name__ == "__main__":
    main()
