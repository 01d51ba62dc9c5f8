"""Train with IAPO on TRL's engine; takes every option of TRL's GRPOConfig and of IAPOConfig.

    accelerate launch --config_file examples/deepspeed_8gpu.yaml \\
        examples/train_trl.py --config examples/gsm8k_8gpu.yaml

On a laptop (docs/scaleout.md): --model embedded --data stories --use_cpu true --bf16 false.
"""

import itertools
from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import AutoTokenizer
from trl import TrlParser

from iapo_mini.engines import trl
from iapo_mini.model_files import model_source
from iapo_mini.problems.datasets import check_data, training_problems


@dataclass
class Source:
    """The model and the problems.

    Attributes:
        model: "embedded", a model folder or a hub id.
        data: stories, gsm8k, math500, dapo_math or commonsense_qa.
        data_file: local file with the problems; if empty, the data is loaded from the hub.
        problems: number of problems, from the start of the training stream.
        lora_rank: rank of the adapter on all linear layers; 0 trains every weight.
    """

    model: str = field(default="embedded", metadata={"help": "embedded, a folder or a hub id"})
    data: str = field(default="stories", metadata={"help": "stories, gsm8k, ..."})
    data_file: str = field(default="", metadata={"help": "local file; empty uses the hub"})
    problems: int = field(default=7000, metadata={"help": "training problems"})
    lora_rank: int = field(default=0, metadata={"help": "rank of the adapter; 0 for no adapter"})


if __name__ == "__main__":
    parser = TrlParser((Source, trl.IAPOConfig))
    source, config = parser.parse_args_and_config()
    check_data(source.data, "train", source.data_file)
    model = model_source(source.model)
    lora = LoraConfig(
        r=source.lora_rank, lora_alpha=2 * source.lora_rank, target_modules="all-linear",
        task_type="CAUSAL_LM",
    ) if source.lora_rank else None  # fmt: skip
    problems = training_problems(source.data, config.seed, source.data_file, "train")
    trainer = trl.IAPOTrainer(
        model, trl.answer_reward,
        args=config,
        train_dataset=trl.dataset(itertools.islice(problems, source.problems)),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # writes the log to trainer_state.json
    trainer.accelerator.end_training()  # else a process may abort while it exits
