"""Statistics of the chains that :mod:`iapo_mini.lab.real` has measured.

All intervals are 95% bootstrap intervals over chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from iapo_mini.intervals import auc, bootstrap_interval, expected_calibration_error
from iapo_mini.lab.real_chains import ESTIMATORS, PARTS
from iapo_mini.problems.worked import KINDS

Records = Sequence[dict[str, Any]]
Values = Sequence[float] | np.ndarray


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """AUC; 0.5 where one of the two classes is empty, since nothing can be told apart then."""
    if positive.all() or not positive.any():
        return 0.5
    return auc(scores, positive)


def _moments(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"mean": float("nan"), "sd": float("nan"), "count": 0}
    return {"mean": float(values.mean()), "sd": float(values.std()), "count": len(values)}


def _inside(record: dict[str, Any]) -> np.ndarray:
    """(L,) bool: the tokens of the thought, without its tag."""
    return np.array([kind in KINDS for kind in record["kinds"]])


def _of_tokens(record: dict[str, Any], values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Values of the thought's tokens, and which of them are digits of a result."""
    inside = _inside(record)
    return np.array(values)[inside], np.array(record["kinds"])[inside] == "result"


def _of_sentences(record: dict[str, Any], values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the sentences of a thought, and which of them compute (hold a result)."""
    inside, number = _inside(record), np.array(record["sentences"])
    kinds = np.array(record["kinds"])
    sums, computes = [], []
    for n in np.unique(number[inside]):
        here = inside & (number == n)
        sums.append(np.array(values)[here].sum())
        computes.append((kinds[here] == "result").any())
    return np.array(sums), np.array(computes)


def within_share(record_values: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Share of the variance of token values that lies within sentences.

    Args:
        record_values: for each chain the values of its tokens, and the number of their sentences.
    """
    means, values = [], []
    for of_tokens, number in record_values:
        for n in np.unique(number):
            here = of_tokens[number == n]
            means.append(np.full(len(here), here.mean()))
            values.append(here)
    every = np.concatenate(values)
    total = ((every - every.mean()) ** 2).sum()
    return float(((every - np.concatenate(means)) ** 2).sum() / total) if total else float("nan")


def _drops(entropies: Values) -> np.ndarray:
    return -np.diff(np.array(entropies))


def _token_part(records: Records, name: str) -> dict[str, Any]:
    groups = [_of_tokens(r, r["scores"][name]) for r in records]
    kinds = np.concatenate([np.array(r["kinds"])[_inside(r)] for r in records])
    values = np.concatenate([g[0] for g in groups])
    of_kind = {kind: _moments(values[kinds == kind]) for kind in KINDS}
    numbers = [np.array(r["sentences"])[_inside(r)] for r in records]
    return {
        "auc": bootstrap_interval(_auc, groups), "words_sd": of_kind["word"]["sd"],
        "result_mean": of_kind["result"]["mean"], "kinds": of_kind,
        "within": within_share([(g[0], n) for g, n in zip(groups, numbers)]),
    }  # fmt: skip


def _sentence_part(records: Records, name: str) -> dict[str, Any]:
    groups = [_of_sentences(r, r["scores"][name]) for r in records]
    sums, computes = (np.concatenate(x) for x in zip(*groups))
    return {
        "auc": bootstrap_interval(_auc, groups), "computing": _moments(sums[computes]),
        "other": _moments(sums[~computes]),
    }  # fmt: skip


def _calibration(records: Records, variant: str) -> dict[str, Any]:
    forced = np.array([r["variants"][variant]["forced"] for r in records], dtype=float)
    confidence, right = forced[..., 0], forced[..., 1]

    def error(part: slice) -> float:
        return expected_calibration_error(
            torch.tensor(confidence[:, part].flatten()), torch.tensor(right[:, part].flatten())
        )

    places = [slice(part, part + 1) for part in range(PARTS + 1)]
    return {
        "ece": error(slice(None)), "ece_by_tenth": [error(place) for place in places],
        "accuracy_by_tenth": right.mean(0).tolist(),
        "confidence_by_tenth": confidence.mean(0).tolist(),
    }  # fmt: skip


def _whole_part(records: Records) -> dict[str, Any]:
    """The drop of the whole answer's entropy over sentences, beside that of its first token."""
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"entropy": [], "first": []}
    signs, left = [], []
    for record in records:
        whole, kinds = record["whole"], np.array(record["kinds"])
        sentences = [slice(a, b) for a, b in pairwise(whole["asked"])]
        kept = [_inside(record)[sentence].any() for sentence in sentences]
        computes = np.array([(kinds[sentence] == "result").any() for sentence in sentences])[kept]
        drops = {part: _drops(whole[part])[kept] for part in groups}
        for part, values in drops.items():
            groups[part].append((values, computes))
        signs.append(np.sign(drops["entropy"]) != np.sign(drops["first"]))
        left += whole["left"]

    def mean(part: str, place: int) -> float:
        return float(np.mean([record["whole"][part][place] for record in records]))

    return {
        "auc": bootstrap_interval(_auc, groups["entropy"]),
        "first_auc": bootstrap_interval(_auc, groups["first"]),
        "start": {"first": mean("first", 0), "whole": mean("entropy", 0)},
        "end": {"first": mean("first", -1), "whole": mean("entropy", -1)},
        "left": float(np.mean(left)), "drop_sign": float(np.concatenate(signs).mean()),
    }  # fmt: skip


def _postfix_part(records: Records) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in records[0]["variants"]:
        of = [r["variants"][name] for r in records]
        drops = [_drops(x["entropy"]) for x in of]
        out[name] = {
            "auc": bootstrap_interval(_auc, [_of_tokens(r, d) for r, d in zip(records, drops)]),
            "auc_sentence": bootstrap_interval(
                _auc, [_of_sentences(r, d) for r, d in zip(records, drops)]
            ),
            "ece": _calibration(records, name)["ece"],
            "accuracy_at_end": float(np.mean([x["forced"][-1][1] for x in of])),
            "tokens": float(np.mean([x["tokens"] for x in of])),
        }  # fmt: skip
    for name in out:
        out[name]["cost"] = out[name]["tokens"] / out["paper"]["tokens"]
    return out


def summary(records: Records) -> dict[str, Any]:
    """All statistics of a set of chains; :mod:`iapo_mini.lab.real` describes the parts."""
    return {
        "token": {name: _token_part(records, name) for name in ESTIMATORS},
        "sentence": {name: _sentence_part(records, name) for name in ESTIMATORS},
        **_calibration(records, "paper"),
        "whole": _whole_part(records),
        "postfix": _postfix_part(records),
        "right": float(np.mean([r["right"] for r in records])),
    }
