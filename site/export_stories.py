"""Write what the site's explorer shows: ``python site/export_stories.py --model FOLDER``.

The explorer of the site has no kernel, so everything a model is needed for is computed here, as
``iapo_mini.tools.widgets`` computes it for the explorer of the notebooks: completions, the policy's
probability of each token, and what it answers when it has to answer after each prefix. The
advantages are left to ``static/explorer.js``, because they follow the sliders.

**Which stories?** The first six test stories of seed 0 for which eight completions of the embedded
policy hold right and wrong ones, so that the rewards of the group say something. **Which
completions?** Of each group, the shortest right one and the longest wrong one. The question for the
real model is our own, in the style of GSM8K, and its answer has one digit, so that the first token
of an answer is all of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from iapo_mini.chat import token_texts
from iapo_mini.files import replace_text
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.stories import stories, token_roles
from iapo_mini.rewards import score
from iapo_mini.rollouts import Rollouts
from iapo_mini.sampling import sample
from iapo_mini.tasks import Problem
from iapo_mini.tools.widgets import ForcedAnswers, forced_answers

OUT = Path(__file__).parent / "static" / "explorer.json"
STORIES, GROUP, SHOWN, SEARCHED = 6, 8, 5, 100
"""Stories; completions of each; answers shown after a prefix; among how many the right one is
looked for."""

REAL = Problem(
    "Tom has 3 boxes with 2 pens in each box. He gives 2 pens to his sister. "
    "How many pens does he have left?",
    "4",
)


def choose(correct: list[bool], lengths: list[int]) -> list[int]:
    """The shortest right completion of a group and the longest wrong one; those there are."""
    right = [i for i, c in enumerate(correct) if c]
    wrong = [i for i, c in enumerate(correct) if not c]
    best = sorted(right, key=lambda i: lengths[i])[:1]
    return best + sorted(wrong, key=lambda i: -lengths[i])[:1]


def completion(
    policy: Policy, problem: Problem, rollouts: Rollouts, forced: ForcedAnswers, i: int
) -> dict[str, Any]:
    """Completion i of a group, as the explorer reads it.

    Returns:
        ``tokens`` and ``roles`` (None where no role is known): n texts, end of sequence left out.
        ``probabilities``: of the m = n or n + 1 tokens that the norms run over, end of sequence
        included. ``entropies``: m + 1, nats. ``answers``: n + 1 lists of pairs (text, probability),
        likeliest first.
        ``right``: n + 1 probabilities of the right answer, 0 where it is not among the likely.
        ``correct``: whether the completion's own answer is right. ``index``: its place in the
        group.
    """
    m = int(rollouts.lengths[i])
    n = m - int(rollouts.finished[i])
    ids = rollouts.completion_ids[i, :n].tolist()
    answers, right = [], []
    for t in range(n + 1):
        texts = [x.strip() for x in token_texts(policy.tokenizer, forced.ids[i, t].tolist())]
        likely = list(zip(texts, forced.probabilities[i, t].tolist()))
        answers.append([[text, round(p, 3)] for text, p in likely[:SHOWN] if p >= 0.0005])
        right.append(round(sum(p for text, p in likely if text == problem.answer), 3))
    return {
        "index": i,
        "correct": bool(rollouts.correct[i]),
        "tokens": token_texts(policy.tokenizer, ids),
        "roles": token_roles(policy.tokenizer, ids) if problem.steps else None,
        "probabilities": [round(x, 4) for x in rollouts.old_logprobs[i, :m].exp().tolist()],
        "entropies": [round(x, 4) for x in forced.entropies[i, : m + 1].tolist()],
        "answers": answers,
        "right": right,
    }


def export(policy: Policy, problem: Problem, model: str, limit: int = 224) -> dict[str, Any] | None:
    """One group of completions with those that are shown; None if all are right or all wrong.

    Args:
        policy: it writes the completions and is forced to answer.
        problem: what is asked.
        model: name of the policy, for the menu.
        limit: tokens at which a completion is cut.
    """
    rollouts = sample(policy, [problem], num_generations=GROUP, max_completion_length=limit, seed=0)
    rollouts = score(rollouts, policy.tokenizer, [problem])
    if bool(rollouts.correct.all()) or not bool(rollouts.correct.any()):
        return None
    forced = forced_answers(policy, rollouts, k=SEARCHED)
    # A completion that was cut says less about a policy than one that ended.
    lengths = (rollouts.lengths * rollouts.finished).tolist()
    return {
        "model": model,
        "question": problem.question,
        "answer": problem.answer,
        "rewards": [round(x, 4) for x in rollouts.rewards.tolist()],
        "completions": [
            completion(policy, problem, rollouts, forced, i)
            for i in choose(rollouts.correct.tolist(), lengths)
        ],
    }


def gather(scenes: Iterable[dict[str, Any] | None], count: int) -> list[dict[str, Any]]:
    """The first ``count`` scenes that are there."""
    return list(itertools.islice((scene for scene in scenes if scene is not None), count))


def main() -> None:
    """Read the options and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a pretrained model")
    parser.add_argument(
        "--name", default="Qwen2.5-Coder-0.5B-Instruct", help="its name in the menu"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embedded = load_policy("embedded", lora_rank=0, device="cpu")
    told = stories("test", seed=0)
    scenes = gather((export(embedded, p, "embedded policy") for p in told), STORIES)
    real = load_policy(args.model, lora_rank=0, device="cpu")
    scene = export(real, REAL, args.name, limit=80)
    if scene is None:
        parser.error("the model's completions are all right or all wrong; take another model")
    content = {
        "made_by": "python site/export_stories.py --model FOLDER",
        "scenes": [*scenes, scene],
    }
    replace_text(args.out, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
