"""Steps that are not finite: skipped on all ranks, counted, explained; weights, averages of AdamW and checkpoints kept."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, TrainerCallback

import rlhf.sft
from rlhf.callbacks import MetricsFile
from rlhf.config import load_yaml
from rlhf.nonfinite import CollapseError, NonFiniteError, NonFiniteGuard
from tests.nonfinite_ranks import (
    At,
    make,
    no_number_in_a_gradient,
    no_number_in_a_weight,
    no_number_in_an_output,
    no_number_in_the_loss,
    same,
)

ROOT = Path(__file__).parents[1]
slow = pytest.mark.slow
BREAKS = (no_number_in_a_weight, no_number_in_an_output, no_number_in_a_gradient, no_number_in_the_loss)


def guard_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, NonFiniteGuard))


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if "loss" in row]


# Skipped


@pytest.mark.parametrize("break_", BREAKS[1:])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_averages(break_, tmp_path, caplog):
    trainer = make(tmp_path, save_strategy="no", max_skipped_steps=1)  # not in a row
    at = At(trainer, {1, 3}, break_)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert at.changed() == [(True, True), (False, False), (True, True), (False, False), (True, True), (True, True)]
    assert logged(trainer, "skipped_steps") == [0, 1, 1, 2, 2, 2]
    finite = [torch.tensor(loss).isfinite().item() for loss in logged(trainer, "loss")]
    gradient_alone = break_ is no_number_in_a_gradient
    assert finite == [True, gradient_alone, True, gradient_alone, True, True]  # the log shows it, and then goes on
    assert [r.getMessage().split(";")[0] for r in caplog.records if r.name == "rlhf.nonfinite"] == [
        f"The {'gradient' if gradient_alone else 'loss'} of step {step} is not finite" for step in (1, 3)
    ]


def test_a_batch_that_meets_a_broken_weight_is_skipped(tmp_path):
    """Token 7 is in the second of the two micro-batches of step 1 alone."""
    trainer = make(tmp_path, save_strategy="no")
    at = At(trainer, set(range(6)), no_number_in_a_weight)
    trainer.train()
    assert [weights for weights, _ in at.changed()] == [True, False, True, True, True, True]


def test_a_training_without_faults_is_the_same_bit_for_bit(tmp_path):
    with_guard, without = (make(tmp_path, save_strategy="no", guarded=guarded) for guarded in (True, False))
    for trainer in (with_guard, without):
        trainer.train()
    assert same([*with_guard.model.parameters()], [*without.model.parameters()])
    assert logged(with_guard, "loss") == logged(without, "loss")


def test_the_scripts_train_as_without_it(sft_run, train, tiny_llama, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.sft, "NonFiniteGuard", lambda *args: None)
    bare = train("sft", tmp_path / "sft", model_name_or_path=tiny_llama, dataset=dataset)
    guarded, alone = (load_file(run.folder / "adapter_model.safetensors") for run in (sft_run, bare))
    assert guarded.keys() == alone.keys() and all(torch.equal(guarded[name], alone[name]) for name in alone)
    assert [row["skipped_steps"] for row in sft_run.rows("metrics.jsonl") if "loss" in row] == [0] * 6
    settings, _ = load_yaml(sft_run.folder / "config.yaml")
    assert settings["logging_nan_inf_filter"] is False and settings["max_skipped_steps"] == 3  # what is really done


def test_the_counts_are_in_a_log_file_that_was_there_before_the_guard(tmp_path):
    """A callback takes the log as those before it left it."""
    trainer = make(tmp_path, guarded=False, save_strategy="no", max_steps=2)
    trainer.callback_handler.callbacks.insert(0, MetricsFile())
    NonFiniteGuard(trainer)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows if "loss" in row] == [0, 0]


def test_counts_go_on_after_a_resume(tmp_path):
    trainer = make(tmp_path, max_skipped_steps=2)
    At(trainer, {1, 3}, no_number_in_the_loss)
    trainer.train()
    resumed = make(tmp_path, max_skipped_steps=1)
    at = At(resumed, {4}, no_number_in_the_loss)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):  # step 3 of the first run was the one before
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert guard_of(resumed).skipped == 3 and len(at.weights) == 1


# Stopped, and explained


EXPLAINED = {
    no_number_in_a_weight: r"The weight `embed.weight` is not finite.*file of the base is damaged",
    no_number_in_an_output: r"in the output of `below` .*lower `learning_rate` \(now 0.01\)",
    no_number_in_a_gradient: r"gradient that is not is that of `above.weight`.*lower `learning_rate`",
    no_number_in_the_loss: r"outputs of all layers are finite, the loss .*is not",
}


@pytest.mark.parametrize("break_", BREAKS)
def test_too_many_in_a_row_name_layer_batch_and_checkpoint(break_, tmp_path):
    rows = [{"input_ids": [7, i], "attention_mask": [1, 1], "labels": [1.0, 2.0]} for i in range(48)]
    trainer = make(tmp_path, rows, max_skipped_steps=2)
    at = At(trainer, {2, 3, 4}, break_)
    with pytest.raises(NonFiniteError, match=EXPLAINED[break_]) as raised:
        trainer.train()
    assert len(at.weights) == 5  # the third of them, step 4, is one too many
    said, path = str(raised.value), tmp_path / "nonfinite_batch_0.safetensors"
    assert said.startswith("3 steps in a row") and f"{path}" in said
    assert said.endswith(f"The last checkpoint is {tmp_path / 'checkpoint-4'}.")
    assert "rows 16, 17 of the training data" in said  # step 4 begins at row 4 x 2 x 2
    assert load_file(path)["input_ids"].tolist() == [[7, 16], [7, 17]]
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(saved[n], p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert torch.equal(at.weights[2][0], saved["below.weight"])  # as it was before the first of them


def test_the_layer_whose_gradient_is_not_finite_is_named(tmp_path):
    """Below it the gradients of weights are infinite too, and are not the first."""

    def break_(trainer):
        def infinite(module, args, output):
            output.register_hook(lambda gradient: gradient * torch.inf)

        return trainer.model.below.register_forward_hook(infinite).remove

    trainer = make(tmp_path, max_skipped_steps=0)
    At(trainer, {0}, break_)
    with pytest.raises(NonFiniteError, match="first gradient that is not is that of `below` "):
        trainer.train()


def test_the_row_of_a_batch_is_named(tmp_path):
    trainer = make(tmp_path, max_skipped_steps=0)
    At(trainer, {0}, lambda trainer: no_number_in_an_output(trainer, rows=1))
    with pytest.raises(NonFiniteError, match="is of rows 1 of the training data"):
        trainer.train()


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=slow), pytest.param("dpo", marks=slow)])
def test_the_scripts_stop_and_keep_the_last_adapter(stage, request, train, tiny_llama, dataset, tmp_path):
    parents = {"sft_adapter": request.getfixturevalue("sft_run").folder} if stage == "dpo" else {}
    trainers = []

    def tamper(trainer):
        layer = trainer.model.get_base_model().model.layers[1].mlp
        At(trainer, range(2, 9), lambda _: layer.register_forward_hook(lambda m, a, out: out * torch.nan).remove)
        trainers.append(trainer)

    keys = {
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "gradient_checkpointing": True,
        "sample_steps": 100,
    }
    keys |= {"model_name_or_path": tiny_llama, "dataset": dataset, "max_skipped_steps": 1, **parents}
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp`.*rows \d.*learning_rate.*checkpoint-2\.") as raised:
        train(stage, tmp_path, tamper=tamper, **keys)
    assert trainers[0].state.global_step == 3  # steps 2 and 3 are broken, one may be skipped
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, False, True] and rows[-1]["skipped_steps"] == 1
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    record = json.loads((tmp_path / "metadata.json").read_text())
    assert record["status"] == "failed" and record["error"].startswith("NonFiniteError: 2 steps")
    assert str(tmp_path / "nonfinite_batch_0.safetensors") in str(raised.value)


# Weights


def test_a_base_that_is_not_finite_is_refused_before_the_first_step(tmp_path):
    trainer = make(tmp_path)
    trainer.model.embed.weight.data[3, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="Before the first step 1 weights.*embed.weight.*file of the base"):
        trainer.train()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = make(tmp_path, save_steps=2)

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.model.below.bias.data[0] = torch.inf

    trainer.add_callback(Overflow())
    with pytest.raises(NonFiniteError, match=r"After step 4.*`below.bias`; no checkpoint.*checkpoint-2\."):
        trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}


def test_nor_are_they_at_the_end(tmp_path):
    trainer = make(tmp_path, save_strategy="no")
    At(trainer, {5}, lambda trainer: lambda: trainer.model.below.bias.data.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match="After step 6.*no adapter is written.*There is no checkpoint yet"):
        trainer.train()


# The fp16 scaler, torch's own, on the CPU


class Fp16(TrainerCallback):
    """After the model is prepared, which would cast its forward pass: as accelerate is under fp16."""

    def __init__(self, trainer, scale):
        self.accelerator = trainer.accelerator
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2000)
        trainer.add_callback(self)

    def on_train_begin(self, *args, **kwargs):
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"

    def on_train_end(self, *args, **kwargs):
        self.accelerator.state._mixed_precision = "no"  # the state is everyone's in this process


@pytest.fixture
def fp16():
    made = []

    def with_scaler(trainer, scale):
        made.append(Fp16(trainer, scale))
        return trainer

    yield with_scaler
    for callback in made:
        callback.on_train_end()


def overflow_above(scale):
    def break_(trainer):
        """The gradient is infinite as long as it is scaled by more than this, as float16's would be."""
        scaler = trainer.accelerator.scaler
        return trainer.model.above.weight.register_hook(
            lambda gradient: gradient * torch.inf if scaler.get_scale() > scale else gradient
        ).remove

    return break_


def test_what_the_scaler_skips_is_no_divergence(fp16, tmp_path):
    trainer = fp16(make(tmp_path, save_strategy="no", max_skipped_steps=1), 2.0**16)
    at = At(trainer, range(6), overflow_above(2.0**12))
    trainer.train()
    assert [weights for weights, _ in at.changed()] == [False] * 4 + [True] * 2
    assert logged(trainer, "overflowed_steps") == [1, 2, 3, 4, 4, 4] and guard_of(trainer).skipped == 0
    assert logged(trainer, "loss_scale") == [2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**12, 2.0**12]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])  # without clipping nothing has unscaled the gradients yet
def test_a_scale_that_cannot_fall_further_is_divergence(max_grad_norm, fp16, tmp_path):
    trainer = fp16(make(tmp_path, save_strategy="no", max_skipped_steps=1, max_grad_norm=max_grad_norm), 4.0)
    At(trainer, range(6), overflow_above(0.0))
    with pytest.raises(NonFiniteError, match="2 steps in a row had a gradient"):
        trainer.train()
    assert guard_of(trainer).overflowed == 2 and guard_of(trainer).skipped == 2  # at 4 and 2; at 1 and a half


def test_a_loss_that_is_not_finite_is_divergence_under_a_scaler(fp16, tmp_path):
    trainer = fp16(make(tmp_path, save_strategy="no", max_skipped_steps=1), 2.0**16)
    at = At(trainer, {1, 2}, no_number_in_an_output)
    with pytest.raises(NonFiniteError, match="2 steps in a row had a loss"):
        trainer.train()
    assert guard_of(trainer).overflowed == 0 and at.changed() == [(True, True), (False, False), (False, False)]


def test_the_remedy_in_float16_goes_by_the_family(fp16, tmp_path):
    """By the same table as the probe before step 1."""
    trainer = fp16(make(tmp_path, save_strategy="no", max_skipped_steps=0), 2.0**16)
    trainer.args.fp16 = True
    trainer.model.config = Qwen2Config(attn_implementation="eager")
    At(trainer, {0}, no_number_in_an_output)
    with pytest.raises(
        NonFiniteError, match="'qwen2' are known to overflow .*: set it to sdpa.*If the loss rose before"
    ):
        trainer.train()


# Collapsed


NOTHING = [{"input_ids": [i, i], "attention_mask": [1, 1], "labels": [-100.0, -100.0]} for i in range(48)]


def test_labels_of_nothing_stop(tmp_path):
    trainer = make(tmp_path, NOTHING, max_skipped_steps=2)
    with pytest.raises(CollapseError, match=r"exactly 0 for 3 steps.*rows 8, 9 of.*labels are -100.*checkpoint-2\."):
        trainer.train()


def test_where_a_loss_may_be_zero_it_is_warned_of_once(tmp_path, caplog):
    trainer = make(tmp_path, NOTHING, max_skipped_steps=2, zero_is_healthy=True, save_strategy="no")
    trainer.train()
    assert [r.getMessage() for r in caplog.records if "exactly 0" in r.getMessage()] == [
        "Loss and gradient were exactly 0 for 3 steps in a row, up to step 2: nothing was learnt from them."
    ]


def test_a_loss_that_is_nearly_zero_is_warned_of_and_trained_on(tmp_path, caplog):
    rows = [{**row, "labels": [0.0, 0.0]} for row in NOTHING]
    trainer = make(tmp_path, rows, max_skipped_steps=0, save_strategy="no")
    trainer.model.above.weight.data *= 1e-5
    trainer.model.above.bias.data.fill_(1e-5)
    trainer.args.learning_rate = 1e-8
    trainer.train()
    assert all(0 < loss < 1e-6 for loss in logged(trainer, "loss")) and guard_of(trainer).zero_in_a_row == 0
    assert sum("below 1e-06 for 3 logs" in r.getMessage() for r in caplog.records) == 1


@slow
def test_sft_on_labels_of_nothing_stops(train, tiny_llama, dataset, tmp_path):
    """TRL divides by one token then, and the loss is a clean 0."""

    def tamper(trainer):
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {
            **(batch := collate(rows)),
            "labels": torch.full_like(batch["labels"], -100),
        }

    with pytest.raises(CollapseError, match="exactly 0 for 4 steps.*labels are -100"):
        train("sft", tmp_path, tamper=tamper, model_name_or_path=tiny_llama, dataset=dataset, eval_strategy="no",
              load_best_model_at_end=False)  # fmt: skip


# Two ranks


def launch(out, config, env=None):
    """Run tests/nonfinite_ranks.py on two ranks; the report of each."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "nonfinite_ranks.py"), str(out)]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        command, env={**os.environ, **shared, **(env or {})}, capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in (0, 1)]


def check_ranks(reports):
    """Steps 1, 3 and 4 are broken on rank 1, and one in a row may be skipped."""
    for name, where in (
        ("no_number_in_the_loss", "the loss made of them"),
        ("no_number_in_an_output", "in the output of `below` (rank 1)"),
        ("no_number_in_a_gradient", "is that of `above.weight` (rank 1)"),
    ):
        first, second = (report[name] for report in reports)
        assert first == second  # error, counts, weights: all alike
        moved, kept = [True, True], [False, False]
        assert first["changed"] == [moved, kept, moved, kept, kept]
        assert first["skipped"] == [0, 1, 1, 2]
        assert first["error"].startswith("2 steps in a row") and where in first["error"]
        assert "nonfinite_batch_1" in first["error"]


@slow
def test_what_one_rank_finds_all_skip(tmp_path):
    check_ranks(launch(tmp_path, ROOT / "accelerate_configs" / "two_t4.yaml"))


@slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_under_zero_2_too(tmp_path, extensions):
    """DeepSpeed steps within its backward pass; its own way of dropping an overflow is taken there."""
    env = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions)}
    check_ranks(launch(tmp_path, ROOT / "accelerate_configs" / "two_t4_zero2.yaml", env))
