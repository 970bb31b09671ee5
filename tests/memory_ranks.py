"""The SFT script with a memory that is full on rank 1 alone, for test_memory_ranks.py.

accelerate launch ... tests/memory_ranks.py probe|step LIMIT --config SFT.yaml
"""

import sys

import torch

from rlhf import callbacks, sft
from rlhf.config import DataConfig, PlanConfig
from rlhf.record import launch
from rlhf.startup import fit_batch

MODE, LIMIT = sys.argv[1], int(sys.argv[2])


def fill(trainer):
    """From the first step on, or the third one: no batch of more rows than LIMIT."""

    def full(embedding, inputs):
        late = MODE == "probe" or trainer.state.global_step >= 2
        if trainer.model.training and late and len(inputs[0]) > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    if trainer.args.process_index == 1:
        trainer.model.get_input_embeddings().register_forward_pre_hook(full)


def prepare_training(trainer):
    fill(trainer)
    fit_batch(trainer, probe=MODE == "probe")


if __name__ == "__main__":
    callbacks.prepare_training = prepare_training
    launch(sft.main, (DataConfig, PlanConfig, sft.SFTConfig, sft.ModelConfig), "sft", sys.argv[3:])
