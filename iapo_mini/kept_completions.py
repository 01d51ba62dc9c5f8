"""The completions of a step as a Parquet file, with TRL's columns and numbers for every token.

RUN/completions/completions_00020.parquet has a row for each completion:
  step, prompt, completion     as TRL writes them with log_completions=True; texts
  reward, advantage            of the completion; advantage is the mean over its tokens
  correct, answer, length      whether it is right; the reference answer; number of tokens
  tokens                       the text of every token
  token_advantages             the advantage of every token in training
  informativeness              s of every token, nats; null if the method does not use it
  old_logprobs                 log pi_old of every token, nats
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from iapo_mini.chat import token_texts
from iapo_mini.files import replace_file
from iapo_mini.rollouts import Rollouts
from iapo_mini.run_folder import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "completions"


def path_of(run: Path, step: int) -> Path:
    """Path of the file of a step."""
    return run / FOLDER / f"completions_{step:05d}.parquet"


def keep(
    run: Path,
    step: int,
    rollouts: Rollouts,
    advantages: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the file of a step completely or not at all.

    Args:
        run: folder of the run.
        step: number of the step, from 1.
        rollouts: B scored completions.
        advantages: (B, L).
        tokenizer: the policy's tokenizer.
    """
    import pyarrow
    import pyarrow.parquet

    prompts = [
        tokenizer.decode(ids[mask], skip_special_tokens=False)
        for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask)
    ]
    s = rollouts.known.get("informativeness")
    lengths = rollouts.lengths.tolist()

    def by_token(values: torch.Tensor) -> list[list[float]]:
        return [row[:n] for row, n in zip(values.float().tolist(), lengths)]

    own = by_token(advantages)
    table = pyarrow.table(
        {
            "step": [step] * len(lengths),
            "prompt": prompts,
            "completion": rollouts.texts(tokenizer),
            "reward": rollouts.rewards.tolist(),
            "advantage": [sum(row) / max(1, len(row)) for row in own],
            "correct": rollouts.correct.tolist(),
            "answer": list(rollouts.references),
            "length": lengths,
            "tokens": [
                token_texts(tokenizer, row[:n])
                for row, n in zip(rollouts.completion_ids.tolist(), lengths)
            ],
            "token_advantages": own,
            "informativeness": pyarrow.nulls(len(lengths), pyarrow.list_(pyarrow.float64()))
            if s is None
            else by_token(s),
            "old_logprobs": by_token(rollouts.old_logprobs),
        }
    )
    path = path_of(run, step)
    with writing(run):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))
