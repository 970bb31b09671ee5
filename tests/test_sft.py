"""The SFT script: what a training moves, and its held-out perplexity."""

import math

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rlhf.data.columns import load_rows, sft_columns
from rlhf.model import load_tokenizer


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def run(request, train, dataset, tmp_path):
    if request.param == "tiny_llama":
        return request.getfixturevalue("sft_run")
    return train("sft", tmp_path / "sft", model_name_or_path=request.getfixturevalue(request.param), dataset=dataset)


def test_lora_moves_and_the_base_does_not(run):
    trainable = {name for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert run.moved() == trainable and all("lora_" in name for name in trainable)
    zero = [name for name, old in run.before.items() if "lora_B" in name and not old.any()]
    assert len(zero) == len(trainable) / 2  # every B begins at zero, and all of them moved


def test_loss_falls(run):
    losses = [row["eval_loss"] for row in run.rows("metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]


def test_eval_perplexity_is_the_exponent_of_the_mean_over_tokens(sft_run, tiny_llama, dataset):
    """By transformers and torch alone. 9 rows in batches of 4: a mean over batches would weigh the last one double."""
    tokenizer = load_tokenizer(str(tiny_llama))
    columns = sft_columns(load_rows(dataset / "dialogues_heldout.jsonl"), tokenizer, 256)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), sft_run.folder).eval()
    total, tokens, means = 0.0, 0, []
    with torch.no_grad():
        for row in columns:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            nll = cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            count = int((labels != -100).sum())
            total, tokens, means = total + nll, tokens + count, [*means, nll / count]
    # the best checkpoint was loaded at the end, so it is the lowest of all
    measured = min(row["eval_perplexity"] for row in sft_run.rows("metrics.jsonl") if "eval_perplexity" in row)
    assert measured == pytest.approx(math.exp(total / tokens), rel=1e-4)  # float32, other batches
    assert measured != pytest.approx(math.exp(sum(means) / len(means)), rel=1e-3)
