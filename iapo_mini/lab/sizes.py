"""Sizes of experiments: seeds, steps, problems."""

from __future__ import annotations

from dataclasses import dataclass

from iapo_mini.errors import check_choice

WAY_PROBLEMS = 200
"""Number of stories on which a policy is judged during training, with eight completions each."""


@dataclass(frozen=True)
class Size:
    """Size of an experiment.

    Attributes:
        seeds: seeds; there is one training run per recipe and seed.
        max_steps: training steps.
        prompts_per_step: prompts per training step, eight completions each.
        problems: stories of the evaluation, the same for every run.
        num_generations: completions per story of the evaluation.
        ks: values of k.
        primary: the step whose policy is evaluated; 0 is the last one.
        on_the_way: steps at which the policy is also judged, on ``WAY_PROBLEMS`` stories with
            eight completions each, or on ``problems`` if these are fewer.
        pools: pairs ``(stream, stories)``. If given, the policy is judged at those steps on these
            stories instead, with ``num_generations`` completions each, and the correctness and
            length of every completion are kept. One stream must be that of the evaluation.
        together: stories of the evaluation that are sampled at once, with all their completions.
            Wider batches are faster on a CPU, but other batches mean other random numbers.
        max_completion_length: number of tokens at which completions are cut, in training and
            evaluation.
    """

    seeds: tuple[int, ...]
    max_steps: int
    problems: int
    prompts_per_step: int = 12
    num_generations: int = 8
    ks: tuple[int, ...] = (1, 2, 4, 8)
    primary: int = 0
    on_the_way: tuple[int, ...] = ()
    pools: tuple[tuple[str, int], ...] = ()
    together: int = 16
    max_completion_length: int = 224

    def __post_init__(self) -> None:
        if max(self.ks) > self.num_generations:
            raise ValueError(
                f"ks must be at most num_generations = {self.num_generations}, got {self.ks}"
            )


COMPARE: dict[str, Size] = {
    "quick": Size(seeds=(0,), max_steps=2, problems=4, prompts_per_step=2),
    "demo": Size(seeds=(0, 1, 2), max_steps=22, problems=200),
    "full": Size(seeds=(0, 1, 2, 3, 4), max_steps=22, problems=300),
    "long": Size(seeds=(0, 1, 2), max_steps=60, problems=300),
}
"""Sizes of ``compare``."""
COMPARED: dict[str, dict] = {
    "grpo": {"method": "grpo", "learning_rate": 2.8e-3},
    "iapo": {"method": "iapo", "learning_rate": 2.8e-3},
}
"""Rows of ``compare`` -> TrainConfig fields: the best of each method's trials, of which both had as
many, on other stories (docs/methods.md; a test compares them with the trials)."""


@dataclass(frozen=True)
class Preset:
    """Sizes of the experiments behind the paper's tables and figures.

    Attributes:
        trials: how many of the seven trials of each row are made: all, or only the first.
        tuning: size of the trials, on the tune stream.
        table1: size of Table 1 and the ablation, whose runs go on after the primary step.
        more_seeds: further seeds of every row; their runs end at the primary step.
        deciding_seeds: the same for the rows that decide.
        sweeps: size of the runs for each weight, and of the departures.
        timed: number of stories of the wall-clock measurement, with eight completions each.
    """

    trials: int
    tuning: Size
    table1: Size
    more_seeds: tuple[int, ...]
    deciding_seeds: tuple[int, ...]
    sweeps: Size
    timed: int


_KS = (1, 2, 4, 8, 16, 32)
SHORT = 40
"""Number of tokens at which a test run of an experiment cuts completions."""
PRESETS = {
    "quick": Preset(
        trials=1,
        tuning=Size((100,), 1, 2, 1, max_completion_length=SHORT),
        table1=Size(
            (0,), 2, 2, 1, 4, (1, 4), primary=1, on_the_way=(1, 2), max_completion_length=SHORT
        ),
        more_seeds=(1,),
        deciding_seeds=(),
        sweeps=Size((0,), 1, 2, 1, 4, (1, 4), max_completion_length=SHORT),
        timed=2,
    ),
    "full": Preset(
        trials=7,
        tuning=Size(seeds=(100, 101), max_steps=22, problems=100),
        table1=Size((0, 1, 2), 60, 500, 12, 32, _KS, primary=22, on_the_way=(22, 40, 60)),
        more_seeds=(3, 4),
        deciding_seeds=(5, 6, 7, 8, 9),
        sweeps=Size((0, 1, 2), 22, 100, 12, 32, _KS),
        timed=100,
    ),
}


def preset_of(name: str) -> Preset:
    """The preset with this name.

    Raises:
        ValueError: for an unknown name.
    """
    check_choice("preset", name, PRESETS)
    return PRESETS[name]
