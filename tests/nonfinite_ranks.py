"""A model of two layers under the guard, for test_nonfinite.py: in one process, and on two ranks as a program.

accelerate launch ... tests/nonfinite_ranks.py OUTPUT_DIR
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from rlhf.checkpoints import Checkpoints
from rlhf.nonfinite import NonFiniteError, NonFiniteGuard

ARGS = {
    "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "max_steps": 6, "logging_steps": 1, "save_steps": 1, "learning_rate": 0.01, "lr_scheduler_type": "constant",
    "weight_decay": 0.1, "disable_tqdm": True, "remove_unused_columns": False, "train_sampling_strategy": "sequential",
}  # fmt: skip
ROWS = 48


class TwoLayers(nn.Module):
    """Frozen embeddings, a layer below and one above; the loss is a squared error over the labels that are not -100."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(ROWS, 4).requires_grad_(False)
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, input_ids, attention_mask, labels):
        outputs = self.above(torch.tanh(self.below(self.embed(input_ids)))).squeeze(-1)
        errors = (outputs - labels) ** 2 * (labels != -100)
        return {"loss": errors.sum() / (labels != -100).sum().clamp(min=1), "logits": outputs}


class At(TrainerCallback):
    """Call `do` before these steps, and what it returns after them; `weights` has the trained ones before each step."""

    def __init__(self, trainer, steps, do):
        self.trainer, self.steps, self.do = trainer, steps, do
        self.undo, self.weights, self.moments = (lambda: None), [], []
        trainer.add_callback(self)

    def look(self):
        self.weights.append([p.detach().clone() for p in self.trainer.model.parameters() if p.requires_grad])
        states = inner(self.trainer.optimizer).state.values()
        self.moments.append([state["exp_avg"].clone() for state in states if "exp_avg" in state])

    def on_step_begin(self, args, state, control, **kwargs):
        self.look()
        if state.global_step in self.steps:
            self.undo = self.do(self.trainer) or (lambda: None)

    def on_step_end(self, args, state, control, **kwargs):
        self.undo()
        self.undo = lambda: None

    def changed(self):
        """Whether a step moved a weight, and whether it moved an average of AdamW, for each step."""
        self.look()
        pairs = zip(itertools.pairwise(self.weights), itertools.pairwise(self.moments), strict=True)
        return [(not same(*weights), not same(*moments)) for weights, moments in pairs]


def inner(optimizer):
    """The optimiser of torch within those of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def same(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


def no_number_in_a_weight(trainer):
    """The embedding of the last row's token, which stands in the second micro-batch of the first step alone."""
    weight, row = trainer.model.embed.weight.data, 7
    kept = weight[row].clone()
    weight[row] = torch.nan
    return lambda: weight[row].copy_(kept)


def no_number_in_an_output(trainer, rows=slice(None)):
    def break_(module, args, output):
        output = output.clone()
        output[rows] = torch.nan
        return output

    return trainer.model.below.register_forward_hook(break_).remove


def no_number_in_a_gradient(trainer):
    return trainer.model.above.weight.register_hook(lambda gradient: gradient * torch.inf).remove


def no_number_in_the_loss(trainer):
    """A constant, so that the gradients are finite."""
    guard = next(c for c in trainer.callback_handler.callbacks if isinstance(c, NonFiniteGuard))
    compute_loss = guard._compute_loss
    guard._compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) + torch.nan
    return lambda: setattr(guard, "_compute_loss", compute_loss)


def make(folder, rows=None, max_skipped_steps=3, zero_is_healthy=False, guarded=True, **args):
    rows = rows or [{"input_ids": [i, i], "attention_mask": [1, 1], "labels": [1.0, 2.0]} for i in range(ROWS)]
    trainer = Trainer(
        model=TwoLayers(),
        args=TrainingArguments(output_dir=str(folder), **{**ARGS, **args}),
        train_dataset=Dataset.from_list(rows),
    )
    if guarded:
        NonFiniteGuard(trainer, max_skipped_steps, zero_is_healthy)
    trainer.add_callback(Checkpoints(trainer, {}, None))  # as `rlhf.checkpoints.train` has it
    return trainer


def main(out):
    """Each way of breaking on rank 1 alone: what each step changed, the log, and the error of the last."""
    report = {}
    for break_ in (no_number_in_the_loss, no_number_in_an_output, no_number_in_a_gradient):
        trainer = make(out / break_.__name__, max_skipped_steps=1, save_strategy="no", max_grad_norm=1.0)
        assert trainer.args.world_size == dist.get_world_size() == 2
        rank = trainer.args.process_index
        at = At(trainer, {1, 3, 4} if rank == 1 else (), break_)
        try:
            trainer.train()
            error = None
        except NonFiniteError as raised:
            error = str(raised)
        skipped = [row["skipped_steps"] for row in trainer.state.log_history if "loss" in row]
        weights = [weight.tolist() for weight in at.weights[-1]]
        report[break_.__name__] = {"changed": at.changed(), "skipped": skipped, "error": error, "weights": weights}
    (out / f"report_{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
