"""One step of IAPOTrainer, as one of several processes. Arguments: model folder, batch, output,
method.

Completions are determined by prompt and row, so they do not depend on the number of processes.
"""

import sys

import torch
from helpers import TRIVIAL

from iapo_mini.engines import trl
from iapo_mini.policy import load_policy

folder, batch, out, method = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
policy = load_policy(folder, lora_rank=0)
encode = policy.tokenizer.encode


def rollout(prompts, trainer):
    """Completion of each row, determined by the row's number over all processes."""
    first = trainer.accelerator.process_index * len(prompts)
    chats = trainer.processing_class.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    ids = []
    for row in range(first, first + len(prompts)):
        words = " it is" * (row % 3)
        text = f"<think>{words} {3 + row % 4}.</think><answer> {3 + row % 4}</answer>"
        ids.append([*encode(text), policy.tokenizer.eos_token_id])
    return {"prompt_ids": chats, "completion_ids": ids, "logprobs": [[0.0] * len(x) for x in ids]}


trainer = trl.IAPOTrainer(
    policy.model, trl.answer_reward,
    args=trl.IAPOConfig(
        out + ".run", use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True,
        logging_steps=1, shuffle_dataset=False, per_device_train_batch_size=batch,
        num_generations=4, max_completion_length=16, max_steps=1, learning_rate=1e-2,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, loss_type="dapo",
        iapo_method=method, iapo_alpha=0.5, iapo_beta=0.5,
    ),
    train_dataset=trl.dataset([*TRIVIAL, TRIVIAL[0]]),
    processing_class=policy.tokenizer,
    rollout_func=rollout,
)  # fmt: skip
start = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
trainer.train()
if trainer.accelerator.is_main_process:
    log = trainer.state.log_history[0]
    end = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    told = {key: log[key] for key in ("reward", "informativeness") if key in log}
    processes = trainer.accelerator.num_processes
    torch.save({"start": start, "end": end, "processes": processes, **told}, out)
# Without it, gloo's threads may touch tensors while the interpreter ends, which aborts the process.
trainer.accelerator.end_training()
