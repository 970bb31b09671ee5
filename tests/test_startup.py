"""The probes before step 1: what they find, what they name, and that they leave nothing behind."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import callbacks, startup
from rlhf.config import ConfigError, parse
from rlhf.model import load_tokenizer
from rlhf.out_of_memory import FILE, take_report
from rlhf.pipeline import config_classes
from rlhf.rewards import pool_by_mask
from rlhf.startup import StartError, check_start, fit_batch, longest_rows, row_lengths

IDS = list(range(10, 40))
ASKED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture
def probed(tiny_llama):
    """What `check_start` needs of a trainer, around a model of which the output head is trained."""

    def make(model=None, rows=({"input_ids": IDS},)):
        model = model or AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.requires_grad_(False)
        for head in (getattr(model, name, None) for name in ("lm_head", "score")):
            if head is not None:
                head.requires_grad_(True)
        accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=torch.enable_grad)
        args = SimpleNamespace(device=torch.device("cpu"), fp16=False, bf16=False)
        return SimpleNamespace(model=model, accelerator=accelerator, args=args, train_dataset=Dataset.from_list(list(rows)),
                               processing_class=load_tokenizer(str(tiny_llama)))  # fmt: skip

    return make


# Does it compute right?


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def test_models_that_compute_right_pass(name, request, probed):
    check_start(probed(AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))))


def test_a_model_with_a_score_head_passes(probed, tiny_llama):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    pool_by_mask(model)
    check_start(probed(model, rows=[{"chosen_ids": IDS, "rejected_ids": IDS[:9]}]))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_padding_that_is_attended_to_is_found(name, request, probed, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))
    for parameter in model.parameters():
        parameter.data.mul_(3)  # at their initial size these weights make all logits alike
    forward = model.forward

    def deaf(attention_mask=None, **kwargs):
        return forward(attention_mask=torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(model, "forward", deaf)
    with pytest.raises(StartError, match="Padding on the left.*off by.*limit 0.001 in torch.float32"):
        check_start(probed(model))


def test_positions_that_count_the_padding_are_found(probed, tiny_gpt2, monkeypatch):
    """GPT-2 knows absolute positions: with those of the columns a padded row reads elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **kwargs: forward(
        position_ids=torch.arange(position_ids.shape[1])[None], **kwargs))  # fmt: skip
    with pytest.raises(StartError, match="Padding on the left"):
        check_start(probed(model))


def test_the_first_layer_that_overflows_is_named(probed):
    trainer = probed()
    trainer.model.model.layers[1].mlp.up_proj.weight.data[3] = float("inf")
    with pytest.raises(StartError, match=r"`model.layers.1.mlp.up_proj` is not finite.*weights are damaged"):
        check_start(trainer)


def test_what_is_not_finite_without_padding_alone_is_named_too(probed):
    """As an attention kernel that is taken for batches without a mask alone."""
    trainer = probed()
    mlp = trainer.model.model.layers[1].mlp
    mlp.register_forward_hook(lambda module, args, output: output * torch.nan if len(output) == 1 else output)
    with pytest.raises(StartError, match=r"The output of `model.layers.1.mlp` is not finite"):
        check_start(trainer)


def test_a_gradient_that_is_not_finite_is_named(probed):
    trainer = probed()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: Broken.apply(output))
    with pytest.raises(StartError, match="The loss is finite, and the gradients of 1 of 1.*`lm_head.weight`"):
        check_start(trainer)


@pytest.mark.parametrize(
    ("family", "attention", "remedy", "warned"),
    [
        ("gemma", "sdpa", "known to overflow in float16 .*gemma_pytorch/issues/24.*: set `dtype: float32`", True),
        ("qwen2", "eager", "with `attn_implementation: eager` .*pull/33317.*: set it to sdpa", True),
        ("qwen2", "sdpa", "with `attn_implementation: eager` alone .*, and this is sdpa: set `dtype: float32`", False),
        ("llama", "sdpa", "Nothing is known here of the family 'llama' in float16", False),
    ],
)
def test_the_remedy_goes_by_the_family(family, attention, remedy, warned, probed, caplog):
    trainer = probed()
    trainer.model.half()
    trainer.model.set_attn_implementation(attention)
    trainer.model.config.model_type = family
    mlp = trainer.model.model.layers[0].mlp
    mlp.up_proj.weight.data.mul_(1000)
    mlp.down_proj.weight.data.fill_(60000.0)  # a number of float16, while its products are larger than 65504
    with caplog.at_level(logging.WARNING), pytest.raises(StartError, match=remedy) as caught:
        check_start(trainer)
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    assert ("known to overflow" in caplog.text) == warned


def test_the_limit_goes_by_what_is_computed_in(probed):
    """Weights in float32 under autocast: the products are float16, and so is the remedy."""
    trainer = probed()
    trainer.args.fp16 = True
    assert startup._computes_in(trainer) is torch.float16
    trainer.model.model.layers[0].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(StartError, match="set `fp16: false`, which is slower"):
        check_start(trainer)


def test_half_precision_is_within_its_limit(probed):
    for dtype in (torch.float16, torch.bfloat16):
        trainer = probed()
        trainer.model.to(dtype)
        check_start(trainer)


# Which batch fits?


def test_row_lengths():
    assert row_lengths(Dataset.from_list([{"input_ids": [1, 2]}, {"input_ids": [1]}])) == [2, 1]
    pairs = [{"prompt_ids": [1] * 5, "chosen_ids": [2], "rejected_ids": [3] * 4},
             {"prompt_ids": [1], "chosen_ids": [2] * 6, "rejected_ids": None}]  # fmt: skip
    assert row_lengths(Dataset.from_list(pairs)) == [9, 7]
    assert row_lengths(Dataset.from_list([{"prompt_ids": [1] * 3, "row": "{}"}])) == [3]


def full_above(trainer, tokens):
    """A memory in which a batch of more tokens than these has no place; the sizes that were tried."""
    tried = []

    def hook(embedding, inputs):
        tried.append(tuple(inputs[0].shape))
        if inputs[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return tried, trainer.model.get_input_embeddings().register_forward_pre_hook(hook)


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=pytest.mark.slow),
                                   pytest.param("dpo", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.slow)])  # fmt: skip
def test_the_probes_leave_nothing_behind(stage, train, parents, request, tmp_path, monkeypatch):
    """A training with the one probe and a training with the other are the same, bit for bit."""
    usual = request.getfixturevalue(f"{stage}_run")  # with `check_start`
    called = []

    def other(trainer):
        before = [(n, p.requires_grad, p.grad) for n, p in trainer.model.named_parameters()]
        fit_batch(trainer, probe=True)
        assert [(n, p.requires_grad, p.grad) for n, p in trainer.model.named_parameters()] == before
        called.append(stage)

    monkeypatch.setattr(callbacks, "prepare_training", other)
    run = train(stage, tmp_path / stage, **parents(stage))
    assert called == [stage] and not (tmp_path / stage / FILE).exists()
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (usual.folder, run.folder)]
    assert weights[0] == weights[1]
    timed = ("samples_per_second", "steps_per_second", "tokens_per_second", "runtime")
    rows = [[{k: v for k, v in row.items() if not k.endswith(timed)} for row in r.rows("metrics.jsonl")]
            for r in (usual, run)]  # fmt: skip
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "stage",
    ["sft", pytest.param("reward", marks=pytest.mark.slow), pytest.param("dpo", marks=pytest.mark.slow), "ppo"],
)
def test_the_longest_rows_decide_the_batch(stage, train, parents, request, tmp_path):
    """Room for two of the longest rows, asked for four: half the batch, twice the accumulation, the same steps."""
    seen = {}

    def tamper(trainer):
        lengths = sorted(row_lengths(trainer.train_dataset), reverse=True)
        rows = longest_rows(trainer, 2)
        width = lengths[0] + (trainer.args.response_length if stage == "ppo" else 0)
        sides = 2 if stage in ("reward", "dpo") else 1
        tried, handle = full_above(trainer, 2 * sides * width)
        rng = torch.get_rng_state()
        fit_batch(trainer, probe=True)
        handle.remove()
        assert torch.equal(torch.get_rng_state(), rng) and len(rows) == 2
        seen["tried"] = [shape for shape in tried if shape[0] in (4 * sides, 2 * sides)]
        seen["width"] = width
        seen["sizes"] = (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps)

    keys = {"total_episodes": 8} if stage == "ppo" else {"max_steps": 2}
    run = train(stage, tmp_path / stage, tamper=tamper, **parents(stage), **keys)
    sides = 2 if stage in ("reward", "dpo") else 1
    assert seen["tried"][:2] == [(4 * sides, seen["width"]), (2 * sides, seen["width"])]
    assert seen["sizes"] == (2, 2) and (tmp_path / stage / FILE).exists()
    assert run.trainer.state.global_step == (4 if stage == "ppo" else 2)
    losses = [row["loss"] for row in run.rows("metrics.jsonl") if "loss" in row]
    usual = [row["loss"] for row in request.getfixturevalue(f"{stage}_run").rows("metrics.jsonl") if "loss" in row]
    # The same rows in the same step, summed in another order; a reward or DPO loss is a mean of means of equal parts.
    assert losses[0] == pytest.approx(usual[0], rel=1e-4, abs=1e-5)


def test_no_batch_fits(train, tiny_llama, dataset, tmp_path):
    def tamper(trainer):
        full_above(trainer, 0)
        fit_batch(trainer, probe=True)

    with pytest.raises(torch.OutOfMemoryError, match="Even a batch of one") as caught:
        train("sft", tmp_path / "sft", tamper=tamper, model_name_or_path=tiny_llama, dataset=dataset)
    # `rlhf run` does not start it again, since the batch is remembered to be 1 already
    assert "`per_device_train_batch_size: 1`, `gradient_accumulation_steps: 4`" in caught.value.__notes__[0]
    assert take_report(tmp_path / "sft", {**ASKED, "per_device_eval_batch_size": 4}) is None


def test_another_error_is_not_taken_for_a_full_memory(train, tiny_llama, dataset, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(startup, "_loss", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train("sft", tmp_path / "sft", tamper=lambda trainer: fit_batch(trainer, probe=True),
              model_name_or_path=tiny_llama, dataset=dataset)  # fmt: skip
    assert not (tmp_path / "sft" / FILE).exists()


def test_on_a_cpu_nothing_is_tried(train, tiny_llama, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "_fits", lambda *args: pytest.fail("the longest rows were tried"))
    train("sft", tmp_path / "sft", model_name_or_path=tiny_llama, dataset=dataset, max_steps=1)


# Packing


def shifted_nll(model, ids, labels):
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_packed_samples_do_not_see_each_other(attention, train, tiny_llama, dataset, tmp_path):
    """The loss of a packed row is that of its samples alone, by transformers and torch."""
    seen = {}

    def tamper(trainer):
        rows = [trainer.train_dataset[index] for index in range(2)]
        assert any(len(row["seq_lengths"]) > 1 for row in rows), "nothing was packed"
        model = trainer.model.eval()
        with torch.no_grad():
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            packed = trainer.compute_loss(model, batch).item()
            total, tokens = 0.0, 0
            for row in rows:
                start = 0
                for length in row["seq_lengths"]:
                    part = slice(start, start + length)
                    total += shifted_nll(model.base_model.model, row["input_ids"][part], row["labels"][part]).item()
                    tokens += sum(label != -100 for label in row["labels"][part][1:])
                    start += length
        seen.update(packed=packed, alone=total / tokens)

    train("sft", tmp_path / "sft", tamper=tamper, model_name_or_path=tiny_llama, dataset=dataset, packing=True,
          attn_implementation=attention, max_steps=1)  # fmt: skip
    assert seen["packed"] == pytest.approx(seen["alone"], rel=1e-5)


def test_packing_that_mixes_samples_is_refused(tiny_llama, dataset, tmp_path):
    keys = {
        "output_dir": tmp_path,
        "dataset": dataset,
        "model_name_or_path": tiny_llama,
        "use_cpu": True,
        "packing": True,
    }
    words = [f"--{key}={value}" for key, value in keys.items()]
    for key, value in {"packing_strategy": "wrapped", "padding_free": "true"}.items():
        with pytest.raises(ConfigError, match=f"`{key}`"):
            parse(config_classes("sft"), [*words, f"--{key}={value}"], "sft")
