"""PPO on recorded rollouts, for test_ppo_ranks.py: in one process by `on_recorded`, on two ranks as a program.

accelerate launch ... tests/ppo_ranks.py SETTINGS.json
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from rlhf.callbacks import RanksAgree
from rlhf.data.columns import load_rows, prompt_columns
from rlhf.lora import with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.nonfinite import NonFiniteError
from rlhf.ppo_trainer import PPOConfig, PPOTrainer
from rlhf.roles import critic_parameters
from rlhf.rollouts import Rollout

# SGD, whose steps are in proportion to the gradients; AdamW's first ones would make much of a difference in rounding.
ARGS = {
    "use_cpu": True, "seed": 3, "report_to": "none", "response_length": 12, "logging_steps": 1, "learning_rate": 0.3,
    "gradient_checkpointing": False, "save_strategy": "no", "lr_scheduler_type": "constant", "disable_tqdm": True,
    "optim": "sgd", "num_ppo_epochs": 2, "num_mini_batches": 2, "gradient_accumulation_steps": 2, "total_episodes": 16,
    "per_device_train_batch_size": 2,
}  # fmt: skip


def letters(prompts, completions, **columns):
    return [completion.count("e") - 0.1 * len(completion) for completion in completions]


class Weights:
    """A probe that costs nothing and moves with the policy."""

    def __init__(self, *args):
        pass

    def __call__(self, model, tokenizer):
        weights = [parameter for name, parameter in model.named_parameters() if ".default." in name]
        return {"weights": [torch.sigmoid(20 * weight.sum()).item() for weight in weights[-3:]]}


def make(folders, output_dir, value_model="head", max_skipped_steps=3, **args):
    """A trainer whose policy has left the reference."""
    tokenizer = load_tokenizer(folders["base"])
    base = load_base(ModelConfig(model_name_or_path=folders["base"]), tokenizer)
    add_score_head(base)
    model = with_adapter(base, folders["sft"], "default", trainable=True)
    model = with_adapter(model, folders["sft"], "reference")
    if value_model == "adapter":
        with_adapter(model, folders["reward"], "critic")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter += 0.05 * torch.randn_like(parameter)
    trainer = PPOTrainer(
        model=model,
        args=PPOConfig(output_dir=str(output_dir), value_model=value_model, **{**ARGS, **args}),
        reward_functions=[letters],
        train_dataset=prompt_columns(load_rows(Path(folders["data"]) / "prompts_train.jsonl"), tokenizer, 256),
        processing_class=tokenizer,
        max_skipped_steps=max_skipped_steps,
    )
    stop = tokenizer.eos_token_id  # frequent, so that lengths differ
    trainer.generation_config.suppress_tokens = [id for id in range(len(tokenizer)) if id % 40 and id != stop]
    return trainer


def on_recorded(trainer, path):
    """Let the trainer learn from the rollout in `path`, of which each rank takes its equal part."""
    rank, size = trainer.args.process_index, trainer.args.local_rollout_size
    rows = torch.arange(rank * size, (rank + 1) * size)
    rollout = Rollout(**load_file(path)).take(rows)
    trainer.rollout = lambda rows, log: rollout
    return trainer


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def learn(out, folders, path):
    """Both kinds of critic on the recorded rollout; what each step logged, and what is said when a critic drifts."""
    logged = {"drift": {}}
    for value_model in ("head", "adapter"):
        checkpointing = value_model == "adapter"
        trainer = make(folders, out / value_model, value_model, gradient_checkpointing=checkpointing)
        on_recorded(trainer, path).train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        save_file(trained(trainer), out / f"{value_model}_{trainer.args.process_index}.safetensors")
        logged[value_model] = [row for row in trainer.state.log_history if "loss/policy_avg" in row]
        RanksAgree().on_save(trainer.args, trainer.state, trainer.control, model=trainer.model)
        with torch.no_grad():
            list(critic_parameters(trainer.model).values())[-1] += trainer.args.process_index * 1e-6
        try:
            RanksAgree().on_save(trainer.args, trainer.state, trainer.control, model=trainer.model)
        except RuntimeError as error:
            logged["drift"][value_model] = str(error)
    return logged


def sample(out, folders):
    """A rollout of this rank's own, to prompts that are the same on both; held-out rows of which rank 0's have a reference."""
    trainer = make(
        folders, out / "sampled", kl_target=1e-6, kl_horizon=100, normalize_rewards=True, whiten_rewards=True
    )
    torch.manual_seed(2)
    torch.nn.init.normal_(trainer.model.get_base_model().value_head.weight)
    trainer._seed()
    log = {}
    rollout = trainer.rollout([trainer.train_dataset[index] for index in range(8)], log)
    tensors = {name: tensor.contiguous() for name, tensor in vars(rollout).items()}
    save_file(tensors, out / f"sampled_{trainer.args.process_index}.safetensors")
    rows = load_rows(Path(folders["data"]) / "prompts_heldout.jsonl")[:4]
    for row in rows[1::2]:
        row.pop("reference", None)
    held_out = trainer.evaluate(prompt_columns(rows, trainer.processing_class, 256))
    state = trainer.ppo_state
    return {"log": log, "held_out": held_out, "kl_coef": state.kl_coef, "scale": vars(state.scales["letters"])}


def main(settings):
    """Train, break, and write what came out of this rank."""
    out, folders, path = Path(settings["out"]), settings["folders"], settings["rollout"]
    report = {} if settings["deepspeed"] else {**learn(out, folders, path), "sampled": sample(out, folders)}

    # One micro-batch of rank 1 is broken: the first of two in step 1, the second of two in steps 2 and 3.
    trainer = make(folders, out / "broken", max_skipped_steps=2, optim="adamw_torch", weight_decay=0.1)
    rank = trainer.args.process_index
    assert trainer.args.world_size == dist.get_world_size() == 2
    assert trainer.is_deepspeed_enabled == settings["deepspeed"]
    on_recorded(trainer, path)
    weights, begin = [], trainer._begin_step

    def begin_and_break(inputs):
        weights.append(trained(trainer))
        begin(inputs)
        step = trainer.state.global_step
        if rank == 1 and step in settings["broken"]:
            trainer._minibatch.returns[0 if step == 1 else -1] = torch.nan

    trainer._begin_step = begin_and_break
    try:
        trainer.train()
        report["error"] = None
    except NonFiniteError as error:
        report["error"] = str(error)
    weights.append(trained(trainer))
    report["same"] = [
        all(torch.equal(before[name], after[name]) for name in before) for before, after in itertools.pairwise(weights)
    ]
    report["skipped"] = [row["skipped_steps"] for row in trainer.state.log_history if "loss" in row]
    save_file(weights[-1], out / f"broken_{rank}.safetensors")
    (out / f"report_{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
