"""What every training writes and watches: its run folder, checkpoints, precision, checkpointing, ranks."""

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import rlhf.callbacks
import rlhf.generate
from rlhf.callbacks import (
    MetricsFile,
    PrecisionGuard,
    Progress,
    RanksAgree,
    Samples,
    _rewind,
    plot_curves,
    sample_table,
)
from rlhf.config import load_yaml
from rlhf.files import folder_hash, read_jsonl, write_json, write_jsonl
from rlhf.model import load_base
from rlhf.persona import Persona, render_prompt
from rlhf.ppo_trainer import VALUE_HEAD_FILE

STAGES = ("sft", "reward", "dpo", "ppo")


@pytest.fixture(params=STAGES)
def run(request):
    return request.getfixturevalue(f"{request.param}_run")


# The run folder


def test_run_folder(run):
    record, stage = run.metadata(), run.metadata()["stage"]
    assert record["status"] == "done" and record["seed"] == 3
    assert record["trainable_parameters"] == sum(p.numel() for p in run.trainer.model.parameters() if p.requires_grad)
    assert record["num_examples"] == 24
    assert load_yaml(run.folder / "config.yaml")[0]["lora_r"] == 4
    weights = load_file(run.folder / "adapter_model.safetensors")
    assert ("score" in {name.split(".")[-2] for name in weights}) == (stage == "reward")
    with Image.open(run.folder / "curves.png") as image:
        assert image.width >= 500
    log = (run.folder / "training.log").read_text().splitlines()
    stamped = [line for line in log if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) ", line)]
    assert len(stamped) > 20 and any("samples at step 0" in line for line in log)
    assert any(re.search(r"step=\d+ .*loss=", line) for line in log)
    assert "adapter on" in (run.folder / "MODEL_CARD.md").read_text()


def test_metrics_and_samples(run):
    steps = 12 if run.metadata()["stage"] == "ppo" else 6
    rows = run.rows("metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    evaluated = [row["step"] for row in rows if "eval_loss" in row]
    assert evaluated[: steps // 2] == list(range(2, steps + 1, 2))
    samples = run.rows("samples.jsonl")
    assert sorted({row["step"] for row in samples}) == list(range(0, steps + 1, 3))
    assert all(
        row["persona"] and row["messages"] and isinstance(row["response"], str) and row["reference"] for row in samples
    )
    if run.metadata()["stage"] == "ppo":
        assert all(list(row["rewards"]) == ["reward"] for row in samples)


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_and_the_last_checkpoints_stay(stage, train, parents, tmp_path):
    """ "Best" is turned round here, so that it is not the last one."""
    run = train(
        stage, tmp_path / stage, **parents(stage), save_total_limit=2, metric_for_best_model="eval_loss",
        greater_is_better=True, **({"learning_rate": 3e-2} if stage != "reward" else {}),
    )  # fmt: skip
    rows = [row for row in run.rows("metrics.jsonl") if "eval_loss" in row]
    last = run.trainer.state.max_steps
    best = max((row for row in rows if row["step"] <= last), key=lambda row: row["eval_loss"])["step"]
    assert best < last, "the losses of this seed tell nothing"
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{last}"}
    kept, final = (load_file(f / "adapter_model.safetensors") for f in (run.folder / f"checkpoint-{best}", run.folder))
    assert kept.keys() == final.keys() and all(torch.equal(kept[name], final[name]) for name in kept)
    newest = load_file(run.folder / f"checkpoint-{last}" / "adapter_model.safetensors")
    assert any(not torch.equal(newest[name], final[name]) for name in final)
    now = dict(run.trainer.model.named_parameters())
    for name, old in run.before.items():
        if ".ref." in name or ".reference." in name or ".reward." in name:
            assert torch.equal(now[name], old), name
    if stage == "ppo":
        head = load_file(run.folder / f"checkpoint-{best}" / VALUE_HEAD_FILE)
        assert torch.equal(run.trainer.model.get_base_model().value_head.weight, head["weight"])


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_resumed_training_is_bit_identical(stage, train, parents, tmp_path):
    keys = {**parents(stage), "load_best_model_at_end": False, "save_total_limit": None}
    whole = train(stage, tmp_path / "whole", **keys)
    folder = tmp_path / "resumed"
    (whole.folder / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    resumed = train(stage, folder, **keys, resume_from_checkpoint=tmp_path / "checkpoint-4")
    weights, expected = (load_file(run.folder / "adapter_model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert resumed.metadata()["tokens"] == whole.metadata()["tokens"]  # of the whole training, not of its last piece
    state = json.loads((whole.folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert 0 < state["num_input_tokens_seen"] < whole.metadata()["tokens"]


# Files of a resumed run


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2])])
def test_rows_beyond_the_checkpoint_are_dropped(step, kept, tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_jsonl(tmp_path / name, [{"step": number} for number in (1, 2, 3)])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    history = [{"step": number} for number in range(1, step + 1)]
    state = TrainerState(global_step=step, log_history=history, is_world_process_zero=True)
    MetricsFile().on_train_begin(args, state, TrainerControl())
    Samples(lambda: [{"messages": [], "response": "new"}], every=10).on_train_begin(args, state, TrainerControl())
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == kept
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == (kept or [0])


def test_a_number_that_json_lacks_is_null(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=3, is_world_process_zero=True)
    logs = {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.5, "note": "text"}
    MetricsFile().on_log(args, state, TrainerControl(), logs=logs)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 3, "loss": None, "grad_norm": None, "learning_rate": 0.5, "note": "text"}


def test_curves(tmp_path):
    plot_curves([{"step": 1, "learning_rate": 0.1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    plot_curves([{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}], tmp_path / "one.png")
    plot_curves([{"step": 1, "loss": 1.0, "objective/scores": 1.0, "objective/kl": 0.1}], tmp_path / "three.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "three.png") as three:
        assert three.width == 3 * one.width


# Samples as a table, and the progress bar

ROWS = [
    {"messages": [{"role": "user", "content": "so you have a cat , right ?"}], "response": "no , i have a dog .",
     "rewards": {"reward": 2.125, "persona_rule": 1.0}},
    {"messages": [], "response": "[red]a\x1b[31m\n" + "very " * 30 + "long reply", "rewards": {"reward": -0.5}},
]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_table_of_samples(width):
    lines = sample_table(ROWS, width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["prompt", "reply", "reward", "persona_rule"]
    text = " ".join(" ".join(lines).split())
    assert "so you have a cat" in text and text.count("very") == 30  # folded, and not cut off
    assert "2.12" in text and "-0.5" in text  # 2.125 to three digits, half to even
    assert "[red]a\ufffd[31m" in text and "\x1b" not in text  # neither markup nor a terminal's control


def test_samples_of_a_reward_model_show_its_score():
    rows = [{"messages": [{"role": "user", "content": "hi"}], "response": "hello", "score": 0.25}]
    assert sample_table(rows, 80).splitlines()[0].split() == ["prompt", "reply", "score"]


def test_samples_that_do_not_fit_are_left_out(train, parents, tmp_path, monkeypatch, caplog):
    """The training and its batch are those of a run whose samples fit, and other errors are raised."""
    keys = {**parents("sft"), "max_steps": 3, "sample_steps": 1, "per_device_train_batch_size": 2}
    whole = train("sft", tmp_path / "whole", **keys)
    generate, failing = rlhf.generate.sample_ids, iter([False, True, True, False])
    error = torch.OutOfMemoryError("CUDA out of memory.")

    def sample(*args, **kwargs):
        if next(failing):
            raise error
        return generate(*args, **kwargs)

    monkeypatch.setattr(rlhf.generate, "sample_ids", sample)
    run = train("sft", tmp_path / "run", **keys)
    assert {row["step"] for row in run.rows("samples.jsonl")} == {0, 3}
    told = [r for r in caplog.records if r.message.startswith("no samples at step")]
    assert [(r.levelname, "lower `num_samples`" in r.message) for r in told] == [("WARNING", True), ("INFO", False)]
    name = "adapter_model.safetensors"
    assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert not (run.folder / "fitted_batch.json").exists()
    error, failing = RuntimeError("another"), iter([True])
    with pytest.raises(RuntimeError, match="another"):
        train("sft", tmp_path / "other", **keys)


class TensorBoardCallback(TrainerCallback):
    """A writer's place; `_track_samples` goes by the name of the class."""

    def __init__(self):
        self.tb_writer, self.texts = self, []

    def add_text(self, *given):
        self.texts.append(given)


class WandbCallback(TrainerCallback):
    def __init__(self):
        self._wandb, self.logged = self, []

    def Table(self, columns, data):
        return columns, data

    def log(self, row):
        self.logged.append(row)


def test_samples_reach_the_trackers(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    board, wandb = TensorBoardCallback(), WandbCallback()
    samples = Samples(lambda: [{**ROWS[0], "response": "a | b"}], 10, [board, wandb])
    samples.on_step_end(args, TrainerState(global_step=10, is_world_process_zero=True), TrainerControl())
    samples.on_step_end(args, TrainerState(global_step=20, is_world_process_zero=False), TrainerControl())
    ((name, text, step),) = board.texts
    assert (name, step) == ("samples", 10)
    head, rule, row = text.splitlines()
    assert head == "| prompt | reply | reward | persona_rule |" and rule == "| --- | --- | --- | --- |"
    assert row == "| so you have a cat , right ? | a \\| b | 2.12 | 1 |"
    ((columns, data),) = [row["samples"] for row in wandb.logged]
    assert columns == ["prompt", "reply", "reward", "persona_rule"] and data[0][2:] == [2.125, 1.0]
    assert wandb.logged[0]["train/global_step"] == 10


def test_progress_bar_shows_reward_and_kl(tmp_path, capsys):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=0, max_steps=10, is_world_process_zero=True)
    progress, log = Progress(), logging.getLogger("progress")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("SAID %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        progress.on_train_begin(args, state, TrainerControl())
        logs = {"objective/scores": 1.2345, "objective/kl": 2.5, "loss": 0.1}
        progress.on_log(args, state, TrainerControl(), logs=logs)
        assert "reward 1.23, KL 2.5" in str(progress.training_bar) and "loss" not in str(progress.training_bar)
        progress.on_log(args, state, TrainerControl(), logs={"eval_probe/right": 0.5})
        assert "reward 1.23, KL 2.5" in str(progress.training_bar)  # until there is another one
        log.warning("above")
        progress.on_log(args, state, TrainerControl(), logs={"loss": 0.25})
        assert "loss 0.25" in str(progress.training_bar)
        progress.on_train_end(args, state, TrainerControl())
        assert handler in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(handler)
    assert "SAID above\n" in re.sub(".*\r", "", capsys.readouterr().err)  # on a line of its own, the bar being wiped


# Precision: a 4-bit base on a T4, as far as a CPU can show it


class FourBit:
    """`load_base` whose half-precision model says that it is quantised; the casts of TRL ask for nothing more."""

    def __call__(self, *args, **kwargs):
        model = load_base(*args, **kwargs)
        assert model.dtype is torch.float16
        model.is_loaded_in_4bit = True
        return model


@pytest.fixture
def four_bit(monkeypatch):
    def patch(stage, cast=True):
        module = __import__(f"rlhf.{stage}", fromlist=["main"])
        seen = {}
        trainable_to_fp32 = module.trainable_to_fp32

        def spy(model):
            seen["before"] = {p.dtype for p in model.parameters() if p.requires_grad}
            model.get_base_model().is_loaded_in_4bit = (
                False  # else the Trainer's count of operations wants bitsandbytes
            )
            number = trainable_to_fp32(model) if cast else 0
            seen["after"] = {p.dtype for p in model.parameters() if p.requires_grad}
            return number

        monkeypatch.setattr(module, "load_base", FourBit())
        monkeypatch.setattr(module, "trainable_to_fp32", spy)
        return seen

    return patch


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_adapters_of_a_4bit_base_are_trained_in_float32(stage, train, parents, four_bit, tmp_path):
    seen = four_bit(stage)
    run = train(stage, tmp_path / stage, **parents(stage), dtype="float16", max_steps=2)
    assert torch.bfloat16 in seen["before"], "TRL casts no longer: `trainable_to_fp32` can go"
    assert seen["after"] == {torch.float32}
    assert run.moved() == {name for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    # Embeddings, norms and head are not upcast, as `prepare_model_for_kbit_training` would do
    frozen = [n for n, p in run.trainer.model.named_parameters() if not p.requires_grad and "lora_" not in n]
    assert any("embed_tokens" in n for n in frozen) and {run.before[n].dtype for n in frozen} == {torch.float16}
    weights = load_file(run.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_precision_guard(stage, train, parents, four_bit, tmp_path):
    four_bit(stage, cast=False)
    with pytest.raises(TypeError, match="trainable parameters are not float32.*bfloat16.*trainable_to_fp32"):
        train(stage, tmp_path / stage, **parents(stage), dtype="float16", max_steps=2)


def test_deepspeed_has_float32_copies_of_its_own():
    half = torch.nn.Linear(2, 2, dtype=torch.float16)
    for plugin in (None, object()):
        args = SimpleNamespace(deepspeed_plugin=plugin)
        with contextlib.nullcontext() if plugin else pytest.raises(TypeError, match="2 trainable.*float16"):
            PrecisionGuard().on_train_begin(args, TrainerState(), TrainerControl(), model=half)


def test_ppo_trains_in_float32_on_a_half_precision_base(train, parents, tmp_path):
    run = train("ppo", tmp_path / "ppo", **parents("ppo"), dtype="float16")
    trainable = {name: p.dtype for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert any("lora" in name for name in trainable) and any("value_head" in name for name in trainable)
    added = ("lora_", "score", "value_head")
    frozen = {n: p.dtype for n, p in run.trainer.model.named_parameters() if not any(part in n for part in added)}
    assert any("embed_tokens" in n for n in frozen) and set(frozen.values()) == {torch.float16}
    assert run.moved() == set(trainable)


# Gradient checkpointing


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing(stage, train, parents, tmp_path):
    """It is the non-reentrant one, and the first step's weights are those of a training without it."""
    runs = []
    for checkpointing in (True, False):
        keys = {"gradient_checkpointing": checkpointing, "lora_dropout": 0.0, "load_best_model_at_end": False}
        length = {"total_episodes": 8} if stage == "ppo" else {"max_steps": 2}
        runs.append(train(stage, tmp_path / str(checkpointing), **parents(stage), **keys, **length))
    layers = [[m for m in run.trainer.model.modules() if getattr(m, "gradient_checkpointing", False)] for run in runs]
    assert layers[0] and not layers[1]
    for layer in layers[0]:
        assert layer._gradient_checkpointing_func.keywords.get("use_reentrant") is False
    with_, without = ([row["grad_norm"] for row in run.rows("metrics.jsonl") if "grad_norm" in row] for run in runs)
    assert with_ == pytest.approx(without, rel=1e-5) and len(with_) >= 2
    now = dict(runs[1].trainer.model.named_parameters())
    for name in runs[0].moved():
        parameter = dict(runs[0].trainer.model.named_parameters())[name]
        torch.testing.assert_close(parameter, now[name], rtol=0, atol=1e-5)  # Adam's steps of 1e-2


# Ranks


def test_ranks_that_drifted_apart(monkeypatch, caplog):
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    told = {"args": None, "state": TrainerState(), "control": TrainerControl(), "model": model}
    caplog.set_level(logging.INFO)
    RanksAgree().on_save(**told)
    before = caplog.messages[-1]
    model.bias += 1
    RanksAgree().on_train_end(**told)
    assert caplog.messages[-1] == before  # the frozen weights are not looked at
    with torch.no_grad():
        model.weight += 1e-7
    RanksAgree().on_train_end(**told)
    assert caplog.messages[-1] != before
    monkeypatch.setattr(rlhf.callbacks, "gather_object", lambda mine: [*mine, "another"])
    with pytest.raises(RuntimeError, match="drifted apart.*another"):
        RanksAgree().on_save(**told)


def test_half_a_line_that_a_kill_left_is_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 2, "a": "\xc3\xa9"}\n{"step": 4}\n{"step": 6}\n{"step": 4, "respo')
    _rewind(path, 4)
    assert read_jsonl(path) == [{"step": 2, "a": "é"}, {"step": 4}]


def test_what_was_logged_behind_the_last_checkpoint_at_its_step_is_dropped(tmp_path):
    rows = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}, {"step": 4, "train_runtime": 9.0}]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=4, log_history=rows[:2], is_world_process_zero=True)
    MetricsFile().on_train_begin(args, state, TrainerControl())
    assert read_jsonl(tmp_path / "metrics.jsonl") == rows[:2]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_samples_of_rows_in_text_and_without_persona(stage, parents, train, dataset, tmp_path):
    folder = Path(shutil.copytree(dataset, tmp_path / "prepare"))
    path = folder / ("dialogues_heldout.jsonl" if stage == "sft" else "preferences_heldout.jsonl")
    rows = read_jsonl(path)
    for place, row in enumerate(rows):
        persona = row.pop("persona")
        if stage != "sft":
            row |= {key: row[key][0]["content"] for key in ("chosen", "rejected")}
            if place % 2:
                row["prompt"] = render_prompt(Persona(tuple(persona)), row["prompt"])
    write_jsonl(path, rows)
    record = json.loads((folder / "metadata.json").read_text())
    write_json(folder / "metadata.json", {**record, "result_hash": folder_hash(folder)})
    run = train(stage, tmp_path / stage, max_steps=1, **{**parents(stage), "dataset": folder})
    samples = run.rows("samples.jsonl")
    first, second = samples[:2]
    assert first["persona"] == [] and all(message["role"] != "system" for message in first["messages"])
    if stage == "sft":
        assert first["reference"] == rows[0]["messages"][-1]["content"]
    else:
        assert second["persona"] == ["i have a cat .", "i like soup ."] and second["reference"] == rows[1]["chosen"]
