"""The DPO script: what moves, what it is measured against, and its held-out perplexity."""

import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.data.columns import load_rows, preference_columns
from rlhf.model import load_tokenizer


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def runs(request, train, dataset, tmp_path):
    """An SFT training and a DPO training from it."""
    if request.param == "tiny_llama":
        return request.getfixturevalue("sft_run"), request.getfixturevalue("dpo_run")
    shared = {"model_name_or_path": request.getfixturevalue(request.param), "dataset": dataset}
    sft = train("sft", tmp_path / "sft", max_steps=2, **shared)
    return sft, train("dpo", tmp_path / "dpo", sft_adapter=sft.folder, **shared)


def test_the_policy_moves_and_the_reference_does_not(runs):
    sft, dpo = runs
    trainable = {name for name, p in dpo.trainer.model.named_parameters() if p.requires_grad}
    assert dpo.moved() == trainable and all(".default." in name for name in trainable)
    start = load_file(sft.folder / "adapter_model.safetensors")
    now = dict(dpo.trainer.model.named_parameters())
    for adapter, parameters in (("default", dpo.before), ("ref", now)):
        for name, tensor in start.items():
            stem, weight = name.rsplit(".", 1)
            assert torch.equal(parameters[f"{stem}.{adapter}.{weight}"], tensor), name


def test_margin_grows_from_zero(dpo_run):
    rows = [row for row in dpo_run.rows("metrics.jsonl") if "rewards/margins" in row]
    assert rows[0]["step"] == 1 and abs(rows[0]["rewards/margins"]) < 1e-5  # float32 noise
    assert rows[-1]["rewards/margins"] > 0.01


def test_another_reference_is_noticed_before_the_first_step(train, tiny_llama, dataset, sft_run, tmp_path):
    def break_reference(trainer):
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if ".ref." in name:
                    parameter += 0.3 * torch.randn_like(parameter)

    shared = {"model_name_or_path": tiny_llama, "dataset": dataset, "sft_adapter": sft_run.folder}
    with pytest.raises(RuntimeError, match="margin must be 0"):
        train("dpo", tmp_path / "dpo", break_reference, **shared)


def test_eval_perplexity_of_the_chosen_replies(dpo_run, tiny_llama, dataset):
    """By transformers and torch alone, over all tokens of all chosen replies; the last batch of 4 holds one row."""
    tokenizer = load_tokenizer(str(tiny_llama))
    columns = preference_columns(load_rows(dataset / "preferences_heldout.jsonl"), tokenizer, 256)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), dpo_run.folder).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in columns:
            ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
            total -= logprobs[len(row["prompt_ids"]) - 1 :].sum().item()
            tokens += len(row["chosen_ids"])
    best = dpo_run.trainer.state.best_global_step
    (measured,) = [
        row["eval_perplexity"]
        for row in dpo_run.rows("metrics.jsonl")
        if "eval_perplexity" in row and row["step"] == best
    ]
    assert measured == pytest.approx(math.exp(total / tokens), rel=1e-4)  # float32, other batches
