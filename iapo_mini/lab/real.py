"""What the estimators say on a pretrained language model, token by token and sentence by sentence.

Two sets of chains are measured: the worked solutions of GSM8K, in which the digits of results are
known, and completions of the model itself, right and wrong ones. One line per chain is kept in
``<out>/<set>.jsonl``, so that a stopped study goes on where it was.

    figures/results/real_estimator.json (or real_estimator_<name>.json)
      model, weights   its name, and what its weights are
      problems         number of chains of each set;  sampled  completions that were sampled
      token            estimator -> {"auc": [value, low, high] of result digits against all other
                       tokens, "words_sd", "result_mean": nats, "within": share of the variance
                       within sentences, "kinds": kind -> {"mean", "sd", "count"}}
      sentence         estimator -> {"auc" of sentences that compute against others, "computing",
                       "other": {"mean", "sd", "count"}} of the sum over a sentence
      ece              calibration error of the forced answer;  ece_by_tenth, accuracy_by_tenth
      whole            entropy of whole answers beside that of their first token: "auc", "first_auc"
                       of sentences, "start" and "end" (nats before and after the chain), "left"
                       (mean probability not expanded), "drop_sign" (share of sentences in which the
                       two drops have different signs)
      postfix          variant -> {"auc", "auc_sentence", "ece", "tokens" per chain, "cost": of the
                       paper's tokens}
      own              token, sentence, ece, whole and postfix of the model's own completions, with
                       "right": the share of right ones
      maps             the same story as the embedded policy and the model read it
      versions
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from iapo_mini.adapters import fingerprint_of_weights
from iapo_mini.errors import MOST_PROBLEMS, MOST_TOKENS, check_number
from iapo_mini.files import replace_text, same_settings, versions, whole_records, write_json
from iapo_mini.lab.figures import real as drawn
from iapo_mini.lab.real_chains import Chain, heat_maps, measure
from iapo_mini.lab.real_statistics import summary
from iapo_mini.lab.results import check_options
from iapo_mini.policies import shown_name
from iapo_mini.policy import Policy, load_policy
from iapo_mini.problems.datasets import fingerprint
from iapo_mini.problems.verify import equal_answers
from iapo_mini.problems.worked import Solution, character_kinds, worked_solutions
from iapo_mini.rewards import lenient_answer
from iapo_mini.sampling import sample

SETS = ("worked", "own")
COMPLETIONS = "completions.jsonl"
"""File of the completions that the model has written."""
TRIES = 20
"""Largest number of completions that are sampled for each chain of the model's own. A model of
which fewer have a thought and an answer, among as many completions as chains are wanted, is not
asked further."""
_BATCH = 16


def thought_of(completion: str) -> str | None:
    """The thought of a completion that has one between its tags, or None."""
    _, opened, rest = completion.partition("<think>")
    thought, closed, _ = rest.partition("</think>")
    return thought.strip() if opened and closed and thought.strip() else None


def own_chains(
    policy: Policy, solutions: list[Solution], wanted: int, path: Path, longest: int
) -> int:
    """Sample completions until ``wanted`` have a thought and an answer; keep them in a file.

    A problem is asked again only when every problem was asked as often. Returns the number of
    completions that were sampled.
    """
    found = whole_records(path)
    with tqdm(total=wanted, desc="completions", unit="chain") as bar:
        while True:
            kept = [row for row in found if row["text"] is not None]
            bar.update(min(len(kept), wanted) - bar.n)
            rare = len(found) >= wanted and TRIES * len(kept) < len(found)
            if len(kept) >= wanted or len(found) >= TRIES * wanted or rare:
                return len(found)
            at = [n % len(solutions) for n in range(len(found), len(found) + _BATCH)]
            problems = [solutions[n].problem for n in at]
            rollouts = sample(
                policy, problems, num_generations=1, max_completion_length=longest, seed=len(found)
            )
            for n, text in zip(at, rollouts.texts(policy.tokenizer)):
                thought, answer = thought_of(text), lenient_answer(text)
                whole = thought is not None and answer is not None and "<answer>" in text
                found.append({"problem": n, "text": thought if whole else None, "answer": answer})
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(json.dumps(row) + "\n" for row in found))


def _own(solutions: list[Solution], path: Path, wanted: int) -> list[Chain]:
    rows = [row for row in whole_records(path) if row["text"] is not None][:wanted]
    return [
        Chain(
            (problem := solutions[row["problem"]].problem), row["text"],
            character_kinds(row["text"]), row["answer"],
            equal_answers(row["answer"], problem.answer),
        )
        for row in rows
    ]  # fmt: skip


def _measured(policy: Policy, chains: list[Chain], path: Path) -> list[dict[str, Any]]:
    """Records of all chains; those that the file holds are not measured again."""
    kept = whole_records(path)
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    found = kept[: len(chains)]
    for chain in tqdm(
        chains[len(found) :], initial=len(found), total=len(chains), desc=path.stem, unit="chain"
    ):
        found.append(measure(policy, chain))
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(found[-1]) + "\n")
    return found


def _all_records(
    policy: Policy, solutions: list[Solution], wanted: int, folder: Path, longest: int
) -> dict[str, list[dict[str, Any]]]:
    """Measure what is not measured yet, of both sets."""
    asked = solutions[:wanted]
    worked = [Chain(s.problem, s.text, s.kinds, s.problem.answer, True) for s in asked]
    records = {"worked": _measured(policy, worked, folder / "worked.jsonl")}
    kept = folder / COMPLETIONS
    own_chains(policy, asked, wanted, kept, longest)
    records["own"] = _measured(policy, _own(solutions, kept, wanted), folder / "own.jsonl")
    return records


def _shuffled_solutions(data_file: str, wanted: int) -> list[Solution]:
    """The worked solutions of a file in a fixed order; only those in which a result is known."""
    solutions = worked_solutions(data_file)
    random.Random("real").shuffle(solutions)
    solutions = [s for s in solutions if "result" in s.kinds]
    if len(solutions) < wanted:
        raise ValueError(
            f"problems is {wanted}, but '{data_file}' holds {len(solutions)} with a result such "
            "as '3 + 4 = 7' in the solution; ask for fewer."
        )
    return solutions


def _told_so_far(folder: Path, problems: int) -> dict[str, list[dict[str, Any]]]:
    """Records of the chains that an unfinished study has measured."""
    records = {part: whole_records(folder / f"{part}.jsonl")[:problems] for part in SETS}
    if len(records["worked"]) < 2:
        raise ValueError(
            f"out holds {len(records['worked'])} measured solutions in '{folder}', and two are the "
            "least that can be told; run the same command without --so-far first."
        )
    return records


def real(
    model: str,
    data_file: str,
    *,
    problems: int = 100,
    weights: str = "as published",
    name: str = "",
    longest: int = 256,
    out: str | Path = "runs/real",
    figures: str | Path = "figures",
    unfinished: bool = False,
) -> dict:
    """Measure all estimators on worked solutions and on the model's own completions.

    Args:
        model: a folder or hub id.
        data_file: problems with worked solutions, in GSM8K's form.
        problems: number of chains of each set, drawn from the file with a fixed seed.
        weights: what the weights are, for the results file.
        name: ending of the results file and of its figures; none by default.
        longest: length limit of the model's own completions, tokens.
        out: folder in which measured chains are kept.
        figures: folder of figures and results.
        unfinished: measure nothing, and tell what the chains say that are measured already.

    Raises:
        ValueError: for an option out of range, files that can't be read or written, or a model that
            can't be loaded.
    """
    check_number("problems", problems, 2, MOST_PROBLEMS)
    check_number("longest", longest, 1, MOST_TOKENS)
    figures, out = Path(figures), Path(out)
    check_options(out, figures, None)
    solutions = _shuffled_solutions(data_file, problems)
    folder = out / (name or Path(model).name)
    told = _told_so_far(folder, problems) if unfinished else None
    policy = load_policy(model, lora_rank=0)
    folder.mkdir(parents=True, exist_ok=True)
    same_settings(folder / "settings.json", "measurement", {
        "fingerprint of the model": fingerprint_of_weights(policy.model.named_parameters()),
        "fingerprint of the data": fingerprint(data_file), "longest": longest,
    })  # fmt: skip
    records = told or _all_records(policy, solutions, problems, folder, longest)
    shown = shown_name(model)
    results = {
        "model": shown, "weights": weights,
        "problems": {part: len(records[part]) for part in SETS},
        "sampled": len(whole_records(folder / COMPLETIONS)),
        **summary(records["worked"]),
        "own": summary(records["own"]) if len(records["own"]) > 1 else None,
        "maps": heat_maps({"the embedded policy": load_policy(lora_rank=0), shown: policy}),
        "versions": versions(),
    }  # fmt: skip
    stem = f"real_estimator_{name}" if name else "real_estimator"
    write_json(figures / "results" / f"{stem}.json", results)
    draw(results, figures, stem)
    return results


def draw(results: dict, figures: Path, stem: str = "real_estimator") -> None:
    """Draw the figures of a results file of :func:`real`."""
    drawn.estimator(results).savefig(figures / f"{stem}.png", dpi=150)
    drawn.exits(results).savefig(figures / f"{stem}_exits.png", dpi=150)
    drawn.heat_maps(results["maps"]).savefig(figures / f"{stem}_maps.png", dpi=150)


def real_table(results: dict) -> str:
    """The estimators as a Markdown table, by token and by sentence."""
    lines = [
        "| estimator | AUC, tokens | AUC, sentences | result digits (nats) | words, sd (nats) | "
        "variance within sentences |",
        "|---" * 6 + "|",
    ]
    for name, token in results["token"].items():
        sentence = results["sentence"][name]
        cells = [
            *("{:.2f} [{:.2f}, {:.2f}]".format(*part["auc"]) for part in (token, sentence)),
            f"{token['result_mean']:.2f}", f"{token['words_sd']:.2f}", f"{token['within']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
