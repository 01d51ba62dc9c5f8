"""Diagrams that explain the method: each is a function that returns a figure with an alt text.

``from iapo_mini import diagrams``, then ``diagrams.grpo_loop()`` as the last line of a cell.
"""

from iapo_mini.diagrams.information import (
    cache_reuse,
    calibrated_answers,
    chain_rule,
    early_exit_rule,
    entropy_areas,
    forced_answer,
    names_on_a_line,
    packed_branches,
)
from iapo_mini.diagrams.learning import (
    constant_per_token,
    grpo_loop,
    normalization,
    pass_at_k,
    reward_to_ratio,
    three_terms,
    two_means,
)
from iapo_mini.diagrams.weights import four_bits, gathering, lora

DIAGRAMS = (
    grpo_loop, reward_to_ratio, names_on_a_line, forced_answer, packed_branches, cache_reuse,
    three_terms, normalization, two_means, constant_per_token, entropy_areas, chain_rule, lora,
    four_bits, gathering, pass_at_k, calibrated_answers, early_exit_rule,
)  # fmt: skip

__all__ = ["DIAGRAMS", *(diagram.__name__ for diagram in DIAGRAMS)]
