"""The task for lm-evaluation-harness reads completions as training does."""

import re
from pathlib import Path

import pytest
import yaml

from iapo_mini.rewards import lenient_answer, parse_answer
from iapo_mini.tasks import SYSTEM_PROMPT_INTEGER

TASK = Path(__file__).parent.parent / "examples" / "lm_eval" / "gsm8k_iapo.yaml"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load(TASK.read_text(encoding="utf-8"))


def read(task, name, completion):
    """What the harness's regex filter finds, or None: the last match of flexible-extract."""
    (filters,) = [f["filter"] for f in task["filter_list"] if f["name"] == name]
    found = re.findall(filters[0]["regex_pattern"], completion)
    if not found:
        return None
    chosen = found[filters[0].get("group_select", 0)]
    return chosen if isinstance(chosen, str) else next(part for part in chosen if part)


GOOD = [
    "<think>2 + 2 = 4.</think><answer>4</answer>",
    "<think>\nSo it is\n4.\n</think>\n<answer> 4 </answer>\n",
    "  <think></think> <answer>-1,234</answer>",
    "<think>a < b and b > c</think>\n<answer>7</answer>",
    "<think>x</think><answer>\n72\n</answer>",
]
BAD = [
    "4", "", "The answer is 4.", "#### 4", "<answer>4</answer>", "<think>4</think>",
    "<think>4</think><answer>4", "<think>4<answer>4</answer>", "4</think><answer>4</answer>",
    "<think>4</think><answer>4</answer> Done.", "Well, <think>4</think><answer>4</answer>",
    "<think>4</think> so <answer>4</answer>",
    "<think>4</think><answer>4</answer><answer>4</answer>",
    "<think><think>4</think><answer>4</answer>", "<think>4</think><answer>4</answer></think>",
    "<think>4</think><answer><think>4</answer>", "<answer>4</answer><think>4</think>",
]  # fmt: skip


@pytest.mark.parametrize("completion", GOOD + BAD)
def test_its_strict_answer_is_that_of_training(task, completion):
    assert read(task, "strict", completion) == parse_answer(completion)
    assert (parse_answer(completion) is None) == (completion in BAD)


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_that_is_missing_or_doubled_is_no_answer(task, tag):
    for changed in (GOOD[0].replace(tag, ""), GOOD[0].replace(tag, tag + tag)):
        assert read(task, "strict", changed) is None and parse_answer(changed) is None


def test_the_last_number_is_found_in_any_format(task):
    for completion in ("It is 4 and then 72.", "#### 72", "<think>4</think><answer>72</answer>"):
        assert read(task, "flexible-extract", completion).rstrip(".") == "72"
        assert lenient_answer(completion) == "72"


def test_its_prompt_is_that_of_training(task):
    assert task["description"] == SYSTEM_PROMPT_INTEGER
    assert task["doc_to_text"] == "{{question}}" and task["num_fewshot"] == 0
