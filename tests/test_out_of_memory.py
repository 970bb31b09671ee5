"""A stage that runs out of memory: what is written, how `rlhf run` goes on, and what it advises in the end."""

import importlib
import json
import re

import pytest
import torch
import yaml

import rlhf
from rlhf import launching, pipeline
from rlhf.config import values_of
from rlhf.out_of_memory import FILE, advice, is_out_of_memory, remembered, report, sizes_of, smaller, take_report
from rlhf.pairs import PERSON
from rlhf.pipeline import run_step
from rlhf.record import RunError, read_record
from rlhf.record import stage as run_inside

ASKED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8}
TRAINING = {
    "use_cpu": True, "seed": 3, "lora_r": 4, "lora_alpha": 8, "max_length": 256, "learning_rate": 1e-2,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 2,
    "report_to": "none", "disable_tqdm": True,
    "gradient_checkpointing": False, "num_samples": 2,
}  # fmt: skip


def raised(name, error):
    """The error, raised in a function of that name."""

    def function():
        raise error

    function.__code__ = function.__code__.replace(co_name=name)
    try:
        function()
    except type(error) as caught:
        return caught


# Sizes


@pytest.mark.parametrize(
    ("sizes", "after"),
    [((8, 1), (4, 2)), ((6, 2), (3, 4)), ((3, 4), (1, 12)), ((5, 1), (1, 5)), ((9, 2), (3, 6)), ((12, 1), (6, 2))],
)
def test_the_effective_batch_stays(sizes, after):
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert smaller(dict(zip(keys, sizes, strict=True))) == dict(zip(keys, after, strict=True))


def test_other_sizes_are_halved_alone():
    assert smaller(ASKED, "per_device_eval_batch_size") == {**ASKED, "per_device_eval_batch_size": 4}
    assert smaller({**ASKED, "per_device_train_batch_size": 1}) is None


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("HIP out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Connection closed by peer"), False),
        (MemoryError("out of memory."), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_meant(error, known):
    assert is_out_of_memory(error) is known


# What is written


def test_a_report_is_taken_once(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    for rank in (0, 1):  # both ranks ran out: the batch is halved once
        report(tmp_path, {**ASKED, "max_length": 64}, error, rank)
    assert "`per_device_train_batch_size` 2 instead of 4" in error.__notes__[0]
    assert remembered(tmp_path, ASKED) == ASKED  # nothing is changed under a rank that still reads
    assert "`gradient_accumulation_steps` 4 instead of 2" in take_report(tmp_path, ASKED)
    assert take_report(tmp_path, ASKED) is None
    now = {**ASKED, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert remembered(tmp_path, ASKED) == now
    assert json.loads((tmp_path / FILE).read_text())["history"] == [
        {"reason": "rank 1 ran out of memory", "in_use": now}
    ]


def test_what_fitted_other_settings_is_not_taken(tmp_path):
    report(tmp_path, ASKED, torch.OutOfMemoryError(), 0)
    take_report(tmp_path, ASKED)
    other = {**ASKED, "gradient_accumulation_steps": 1}
    assert remembered(tmp_path, other) == other


def test_the_part_of_the_stage_decides_what_is_halved(tmp_path):
    values = {**ASKED, "generation_batch_size": 64}
    for function, key in {"evaluation_loop": "per_device_eval_batch_size", "sample_replies": "generation_batch_size",
                          "training_step": "per_device_train_batch_size"}.items():  # fmt: skip
        report(tmp_path, values, raised(function, torch.OutOfMemoryError()), 0)
        assert json.loads((tmp_path / FILE).read_text())["out_of_memory"]["key"] == key


def test_the_functions_that_are_looked_for_exist():
    from transformers import Trainer

    from rlhf import ppo_trainer

    assert Trainer.evaluation_loop and ppo_trainer.sample_replies


def test_a_stage_without_a_train_batch_reports_nothing(tmp_path):
    error = torch.OutOfMemoryError()
    report(tmp_path, {"max_length": 64, "batch_size": 8}, error, 0)  # as `base`, whose batch decides what it learns
    assert not (tmp_path / FILE).exists() and not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("stage", "keys", "named"),
    [
        ("pairs", {}, ["batch_size: 32", "max_length: 512", "num_generations: 2"]),
        ("pairs", {"batch_size": 1, "num_generations": 3}, ["max_length: 512", "num_generations: 2"]),
        ("pairs", {"num_generations": 2}, ["batch_size: 32", "max_length: 512"]),
        ("evaluate", {"max_length": 64}, ["batch_size: 32", "max_length: 32"]),
    ],
)
def test_a_stage_that_replies_names_what_to_lower(stage, keys, named, tmp_path):
    """In the error and in training.log, which the message of a stage with a process of its own points to."""
    given = {"sft_adapter": "nowhere", "judge": PERSON} if stage == "pairs" else {"systems": {"base": None}}
    config = pipeline.config_classes(stage)[0](output_dir=str(tmp_path / stage), dataset="nowhere", **given, **keys)
    with pytest.raises(torch.OutOfMemoryError) as caught, run_inside(stage, tmp_path / stage, [config], seed=0):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    told = caught.value.__notes__[0]
    assert re.findall(r"^- `(\w+: \d+)`", told, re.MULTILINE) == named
    assert told in (tmp_path / stage / "training.log").read_text()


def test_advice_when_nothing_is_left(tmp_path):
    asked = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    values = {
        **asked,
        "max_length": 1024,
        "response_length": 53,
        "gradient_checkpointing": True,
        "load_in_4bit": False,
    }
    error = torch.OutOfMemoryError()
    report(tmp_path, values, error, 0)
    (told,) = error.__notes__
    order = ["`per_device_train_batch_size: 1`, `gradient_accumulation_steps: 8`", "`load_in_4bit: true`",
             "`max_length: 512` (now 1024)", "`response_length: 26` (now 53)",
             "`gradient_accumulation_steps: 4` (now 8)", "`model_name_or_path`"]  # fmt: skip
    places = [told.index(text) for text in order]
    assert places == sorted(places) and "gradient_checkpointing" not in told
    assert "gradient_checkpointing: true" in advice({**values, "gradient_checkpointing": False}, asked)
    assert take_report(tmp_path, asked) is None


# `rlhf run`


@pytest.fixture
def recipe(tmp_path, tiny_llama, dataset):
    """A recipe of one training stage on finished data."""

    def write(stage, **keys):
        folder = tmp_path / "recipe"
        folder.mkdir()
        values = {**TRAINING, "model_name_or_path": str(tiny_llama), "dataset": str(dataset), **keys}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump({"output_dir": f"runs/recipe/{stage}", **values}))
        return folder

    return write


@pytest.fixture
def memory(monkeypatch):
    """From step `at` on a training forward pass of more than `limit` rows runs out of memory."""

    def install(stage, limit, at, training=True):
        module = importlib.import_module(f"rlhf.{stage}")
        watch = module.watch

        def watched(trainer, *args):
            watch(trainer, *args)

            def full(embedding, inputs):
                step = trainer.state.global_step
                if trainer.model.training is training and len(inputs[0]) > limit and step >= at:
                    raise torch.OutOfMemoryError("CUDA out of memory.")

            trainer.model.get_input_embeddings().register_forward_pre_hook(full)

        monkeypatch.setattr(module, "watch", watched)

    return install


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {k: v for k, v in row.items() if k in ("loss", "grad_norm", "objective/kl")}
            for row in rows if "loss" in row}  # fmt: skip


def test_sft_goes_on_with_half_the_batch(recipe, memory, train, tiny_llama, dataset, tmp_path, monkeypatch):
    folder = recipe("sft", max_steps=6)
    memory("sft", limit=1, at=3)
    said = []
    rlhf.run(folder, output_dir=tmp_path / "run", say=said.append)
    ran_out = [line for line in said if "ran out of memory" in line]
    assert len(ran_out) == 2 and all("goes on from checkpoint-2" in line for line in ran_out)
    assert "`per_device_train_batch_size` 1 instead of 2" in ran_out[1]
    run = tmp_path / "run" / "sft"
    assert read_record(run)["status"] == "done" and list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert "The stage ran out of memory before" not in (run / "training.log").read_text()  # `rlhf run` took the report
    assert yaml.safe_load((run / "config.yaml").read_text())["per_device_train_batch_size"] == 4  # as it was asked for
    # By a run that has the small batch from the checkpoint on.
    monkeypatch.undo()
    keys = {
        **TRAINING,
        "eval_strategy": "no",
        "eval_steps": None,
        "load_best_model_at_end": False,
        "sample_steps": 100,
    }
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    reference = train("sft", tmp_path / "reference", model_name_or_path=tiny_llama, dataset=dataset,
                      **{**keys, **small, "max_steps": 6, "resume_from_checkpoint": run / "checkpoint-2"})  # fmt: skip
    expected = losses(reference.folder)
    assert {step: losses(run)[step] for step in expected} == expected and list(expected) == [3, 4, 5, 6]
    assert (run / "adapter_model.safetensors").read_bytes() == (
        reference.folder / "adapter_model.safetensors"
    ).read_bytes()
    # These settings are done; others begin with the batch that they ask for.
    again = []
    rlhf.run(folder, output_dir=tmp_path / "run", say=again.append)
    assert len(again) == 1 and "done" in again[0]


def test_what_fits_is_remembered_by_a_later_command(recipe, memory, tmp_path, monkeypatch):
    folder = recipe("sft", max_steps=4)
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "take_report", lambda *args: None)  # as if it was killed there
        memory("sft", limit=2, at=3)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            rlhf.run(folder, output_dir=tmp_path / "run", say=lambda line: None)
    assert any("it takes `per_device_train_batch_size` 2 instead of 4" in note for note in caught.value.__notes__)
    said = []
    rlhf.run(folder, output_dir=tmp_path / "run", say=said.append)
    assert "goes on from checkpoint-2" in said[0]  # not anew: the settings are the same
    log = (tmp_path / "run" / "sft" / "training.log").read_text()
    assert "The stage ran out of memory before, so it takes `per_device_train_batch_size` 2 instead of 4" in log


def test_it_ends_with_advice(recipe, memory, tmp_path):
    memory("sft", limit=0, at=1)
    said = []
    with pytest.raises(torch.OutOfMemoryError) as caught:
        rlhf.run(recipe("sft", max_steps=2), output_dir=tmp_path / "run", say=said.append)
    assert sum("ran out of memory" in line for line in said) == 2  # 4 -> 2 -> 1
    told = "\n".join(caught.value.__notes__)
    assert "`per_device_train_batch_size: 1`, `gradient_accumulation_steps: 4`" in told and "`max_length: 128`" in told


@pytest.mark.slow
@pytest.mark.parametrize("part", ["update", "rollout"])
def test_ppo_keeps_its_rollouts(part, recipe, memory, train, tiny_llama, dataset, sft_run, reward_run, tmp_path,
                                monkeypatch):  # fmt: skip
    parents = {"sft_adapter": str(sft_run.folder), "reward_adapter": str(reward_run.folder)}
    keys = {"total_episodes": 16, "num_ppo_epochs": 2, "response_length": 6, "save_steps": 2, "kl_coef": 0.1}
    memory("ppo", limit=2, at=5 if part == "update" else 4, training=part == "update")
    said = []
    if part == "rollout":
        keys["generation_batch_size"] = 4
    rlhf.run(recipe("ppo", **parents, **keys), output_dir=tmp_path / "run", say=said.append)
    run = tmp_path / "run" / "ppo"
    fitted = json.loads((run / FILE).read_text())["in_use"]
    assert list(losses(run)) == list(range(1, 9))  # 4 rollouts of 4 episodes, 2 steps each
    if part == "rollout":
        assert fitted["generation_batch_size"] == 2
        return
    assert fitted["generation_batch_size"] == 64 and fitted["per_device_train_batch_size"] == 2
    monkeypatch.undo()
    common = {**TRAINING, "eval_strategy": "no", "eval_steps": None, "load_best_model_at_end": False,
              "sample_steps": 100, "max_steps": None}  # fmt: skip
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    reference = train("ppo", tmp_path / "reference", model_name_or_path=tiny_llama, dataset=dataset, **parents,
                      **{**common, **keys, **small, "resume_from_checkpoint": run / "checkpoint-4"})  # fmt: skip
    expected = losses(reference.folder)
    assert {step: losses(run)[step] for step in expected} == expected and list(expected) == [5, 6, 7, 8]


def test_a_stage_in_a_process_of_its_own(recipe, tmp_path, monkeypatch):
    """With GPUs a stage is a process: it leaves a report and a status, which the launcher makes another."""
    folder = recipe("sft", max_steps=2)
    (step,) = pipeline.plan(folder, False, None, tmp_path / "run", {})
    started = []

    def start(script, num_processes):
        started.append(script)
        step.folder.mkdir(parents=True, exist_ok=True)
        sizes = sizes_of(values_of(step.configs))
        if len(started) == 1:
            (step.folder / "metadata.json").write_text(
                json.dumps({"stage": "sft", "status": "running", "parents": {}})
            )
            report(step.folder, sizes, torch.OutOfMemoryError(), 1)
        return 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla T4")
    monkeypatch.setattr(launching, "start", start)
    monkeypatch.setattr(pipeline, "_state", lambda step: ("runs: nothing was made yet", None))
    said = []
    with pytest.raises(RunError, match="failed"):  # of the second start, which reports nothing: it is not tried again
        run_step(step, said.append)
    assert len(started) == 2 and "`per_device_train_batch_size` 2 instead of 4" in said[1]
