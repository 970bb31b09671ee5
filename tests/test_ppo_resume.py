"""PPO that is killed and resumed: the same adapter, critic, optimiser, log and state, to the bit.

The fast tests stop a trainer in this process, at each place where a kill may fall; the slow ones kill the script itself.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import TrainerCallback, TrainerState

import rlhf.ppo_trainer
from rlhf.callbacks import MetricsFile
from rlhf.checkpoints import Checkpoints, last_valid
from rlhf.config import ConfigError
from rlhf.files import read_jsonl
from rlhf.lora import role_hash, with_adapter
from rlhf.ppo_trainer import BEST_ADAPTER_FILE, VALUE_ADAPTER_FILE, VALUE_HEAD_FILE, PPOConfig, PPOTrainer
from rlhf.record import read_record
from rlhf.reward_watch import RewardWatch
from tests.ppo_ranks import Weights, make

ROOT = Path(__file__).parents[1]
# A rollout is 8 episodes, 4 optimiser steps and 8 micro-steps. The 24 prompts make 3 rollouts an epoch; training ends
# within the second one, after 5 rollouts and 20 steps.
ARGS = {
    "total_episodes": 40, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear",
    "response_length": 6, "kl_target": 0.1, "kl_horizon": 100, "normalize_rewards": True, "save_strategy": "steps",
    "save_steps": 4, "logging_steps": 3,
}  # fmt: skip
CRITICS = {"head": VALUE_HEAD_FILE, "adapter": VALUE_ADAPTER_FILE}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """A third of these tests' time; test_callbacks.py looks at them."""
    monkeypatch.setattr("rlhf.callbacks.plot_curves", lambda rows, path: None)


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def folders(tiny_llama, sft_run, reward_run, dataset):
    return {
        "base": str(tiny_llama),
        "sft": str(sft_run.folder),
        "reward": str(reward_run.folder),
        "data": str(dataset),
    }


def trainer_in(folder, folders, value_model="head", resume=None, **args):
    """A trainer with its log file and a watch, as the script has them."""
    args = {**ARGS, **args, "resume_from_checkpoint": str(resume) if resume else None}
    trainer = make(folders, folder, value_model, **args)
    trainer.add_callback(MetricsFile())
    trainer.add_callback(RewardWatch(trainer, Weights(), every=4))
    trainer.add_callback(Checkpoints(trainer, {}, save_minutes=None))
    return trainer


def train(folder, folders, value_model="head", resume=None, **args):
    folder.mkdir(parents=True, exist_ok=True)
    trainer_in(folder, folders, value_model, resume, **args).train(resume_from_checkpoint=resume and str(resume))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The folder of an uninterrupted training, by kind of critic; each is trained once."""
    made = {}

    def get(value_model="head"):
        if value_model not in made:
            made[value_model] = tmp_path_factory.mktemp("whole") / value_model
            train(made[value_model], folders, value_model)
        return made[value_model]

    return get


def killed_at(folder, source, *steps):
    """A folder with the log and these checkpoints of another one, and with a best adapter of a later step."""
    folder.mkdir()
    for name in ("metrics.jsonl", "best", *(f"checkpoint-{step}" for step in steps)):
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, folder / name)
    return folder


def rows(folder):
    """The log, but for times and the row of the end, which is theirs."""
    logged = [
        {k: v for k, v in row.items() if not (k.startswith("train_") or k == "rollout/tokens_per_second")}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    return [row for row in logged if row.keys() - {"step", "epoch", "episode", "skipped_steps"}]


def check_same(folder, source, critic, last=20):
    """Adapter, critic, optimiser, schedule, random numbers, best adapter, state of the callbacks, log up to there."""
    one, other = folder / f"checkpoint-{last}", source / f"checkpoint-{last}"
    for name in ("adapter_model.safetensors", critic, BEST_ADAPTER_FILE):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    # DeepSpeed keeps the optimiser in parts, one a rank.
    patterns = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "global_step*/*.pt")
    states = [str(path.relative_to(other)) for pattern in patterns for path in sorted(other.glob(pattern))]
    assert len(states) >= 3
    for name in states:
        saved = [torch.load(path / name, weights_only=False) for path in (one, other)]
        assert_equal(*saved, name)
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (one, other)]
    for state in states:
        for volatile in ("best_model_checkpoint", "log_history"):
            state.pop(volatile)
    assert states[0] == states[1] and {"PPOState", "RewardWatch"} <= states[0]["stateful_callbacks"].keys()
    assert rows(folder) == [row for row in rows(source) if row["step"] <= last]


def assert_equal(one, other, where):
    """Nested states, tensors to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{where}.{place}")
    elif hasattr(one, "shape"):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), where
    elif hasattr(one, "__dict__") and not callable(one):  # DeepSpeed's scaler of the loss
        assert_equal(vars(one), vars(other), where)
    else:
        assert one == other, where


class AskFor(TrainerCallback):
    """Ask for something at the end of a step."""

    def __init__(self, step, *what):
        self.step = step
        self.what = what

    def on_step_end(self, args, state, control, **kwargs):
        for name in self.what if state.global_step == self.step else ():
            setattr(control, name, True)


# Stopped in this process


def stop_after(trainer, micro_steps):
    """Kill the training before another micro-step."""
    own_step, taken = trainer.training_step, []

    def stop(*args, **kwargs):
        if len(taken) == micro_steps:
            raise Killed
        taken.append(1)
        return own_step(*args, **kwargs)

    trainer.training_step = stop


@pytest.mark.parametrize(("asked", "value_model"), [(13, "head"), (14, "head"), (15, "adapter"), (16, "head")])
def test_a_checkpoint_asked_for_within_a_rollout_is_that_of_its_end(
    asked, value_model, whole, folders, tmp_path, caplog
):
    """It goes on from the end of the first epoch, is asked at each step of a rollout, and is stopped in the next one."""
    source, folder = whole(value_model), tmp_path / "run"
    killed_at(folder, source, 12)
    trainer = trainer_in(folder, folders, value_model, folder / "checkpoint-12", save_strategy="no")
    trainer.add_callback(AskFor(asked, "should_save"))
    stop_after(trainer, 8)
    with caplog.at_level("WARNING", "rlhf.ppo_trainer"), pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-16"]
    said = f"`should_save` was asked for at step {asked}, within a rollout; it is done at the end of the rollout, at step 16"
    assert (said in caplog.text) == (asked != 16)
    check_same(folder, source, CRITICS[value_model], last=16)


@pytest.mark.parametrize(("value_model", "offsets"), [("head", range(8)), ("adapter", [5])])
def test_stopped_at_any_offset_within_a_rollout(value_model, offsets, whole, folders, tmp_path):
    """In the second epoch: stopped after each number of micro-steps in turn, each time from where it was stopped before,
    with what the process before has left in the folder."""
    source, folder = whole(value_model), tmp_path / "run"
    killed_at(folder, source, 16)
    for micro_steps in offsets:
        trainer = trainer_in(folder, folders, value_model, folder / "checkpoint-16")
        stop_after(trainer, micro_steps)
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-16"))
    train(folder, folders, value_model, folder / "checkpoint-16")
    check_same(folder, source, CRITICS[value_model])


def test_what_a_checkpoint_holds(whole, folders):
    """The policy loads as any adapter does, and the states that a resumed run needs did move."""
    source = whole()
    base = make(folders, source.parent / "unused").model.get_base_model()
    policy = PeftModel.from_pretrained(base, source / "checkpoint-20", adapter_name="loaded")
    assert any(parameter.abs().max() > 0 for name, parameter in policy.named_parameters() if "lora_B.loaded" in name)
    logged = rows(source)
    assert len({row["objective/kl_coef"] for row in logged if "objective/kl_coef" in row}) == 5
    assert len({row["eval_probe/weights"] for row in logged if "eval_probe/weights" in row}) == 6
    # Every third step, and with each checkpoint: no row's numbers are half before and half after one.
    assert [row["step"] for row in logged if "loss" in row] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]


def test_a_stop_and_an_evaluation_wait_too(folders, tmp_path):
    trainer = make(folders, tmp_path / "run", **ARGS)
    trainer.add_callback(AskFor(5, "should_training_stop", "should_evaluate"))
    evaluated = []

    def evaluate(*args, **kwargs):
        evaluated.append(trainer.state.global_step)
        trainer.control.should_evaluate = False
        return {}

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.global_step == 8 and evaluated == [8]


TORN = {
    "the best adapter": (rlhf.ppo_trainer, "write_bytes"),
    "the adapter": (PeftModel, "save_pretrained"),
    "the optimiser": (PPOTrainer, "_save_optimizer_and_scheduler"),
    "the random numbers": (PPOTrainer, "_save_rng_state"),
    "the state": (TrainerState, "save_to_json"),
}


@pytest.mark.parametrize("what", TORN)
def test_a_checkpoint_that_a_kill_left_half_written_is_none(what, whole, folders, tmp_path, monkeypatch):
    """A whole one of the same step was there, whose files must not complete it."""
    source, folder = whole(), tmp_path / "run"
    killed_at(folder, source, 12, 16)
    owner, name = TORN[what]
    own = getattr(owner, name)

    def kill(*args, **kwargs):
        path = args[0] if name == "write_bytes" else args[1]
        if "checkpoint-16" not in str(path):
            return own(*args, **kwargs)  # the watch saves its best adapter too
        if name == "write_bytes":
            path.with_name(f".{path.name}.1.tmp").write_bytes(args[1][:100])  # a kill leaves its temporary file
        if name == "save_to_json":
            Path(path).write_text('{"global_step": 16, ')
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, kill)
        train(folder, folders, resume=folder / "checkpoint-12")
    checkpoint, damaged = last_valid(folder)
    no_manifest = ["checkpoint-16 has no manifest.json that can be read, which is written last"]
    assert checkpoint.name == "checkpoint-12" and damaged == ([] if what == "the adapter" else no_manifest)
    with pytest.raises(ValueError, match="checkpoint-16 is not whole.*Name the checkpoint before"):
        train(folder, folders, resume=folder / "checkpoint-16")
    train(folder, folders, resume=checkpoint)
    check_same(folder, source, VALUE_HEAD_FILE)


def test_a_run_that_was_stopped_behind_its_last_checkpoint_takes_no_step_more(whole, folders, tmp_path):
    """The last checkpoint is within an epoch, of which the Trainer would begin another step."""
    source, folder = whole(), tmp_path / "run"
    killed_at(folder, source, 20)
    (folder / "checkpoint-20" / f".{BEST_ADAPTER_FILE}.1.tmp").write_bytes(b"torn")
    trainer = trainer_in(folder, folders, resume=folder / "checkpoint-20")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-20"))
    assert trainer.state.global_step == 20
    assert list(trainer.model.peft_config) == ["default", "reference"]  # the best one is no further role
    trainer.save_model(folder / "end")
    for name in ("adapter_model.safetensors", VALUE_HEAD_FILE):
        assert (folder / "end" / name).read_bytes() == (source / "checkpoint-20" / name).read_bytes()
    assert rows(folder) == rows(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "at step 12 .*checkpoint-12 had seen 24 episodes, .*it would be 12"),
        ({"num_ppo_epochs": 3}, "had seen 24 episodes, .*it would be 16, a rollout being 8 episodes and 6 steps"),
        ({}, "has the random numbers of 2 processes, and this launch has 1. Start as many"),
    ],
)
def test_a_checkpoint_of_other_rollouts_is_refused(change, message, whole, folders, tmp_path):
    killed_at(tmp_path / "run", whole(), 12)
    checkpoint = tmp_path / "run" / "checkpoint-12"
    if not change:
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_1.pth")
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    for named in (str(checkpoint), True):  # True is the last one in the folder
        trainer = trainer_in(tmp_path / "run", folders, **change, save_strategy="no")
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=named)


def test_what_would_cut_a_rollout_or_shard_the_base_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.TrainingArguments.__post_init__",
        lambda self: setattr(self, "deepspeed_plugin", type("Plugin", (), {"zero_stage": 3})),
    )
    with pytest.raises(ConfigError) as caught:
        PPOConfig(output_dir=str(tmp_path), enable_jit_checkpoint=True, ignore_data_skip=True)
    names = ["`enable_jit_checkpoint`", "`ignore_data_skip`", "DeepSpeed ZeRO-3"]
    assert all(problem.startswith(name) for problem, name in zip(caught.value.problems, names, strict=True))


# Killed as processes

WARM = "warm"  # a process forked behind the imports, which are most of a run's time
KEYS = {
    "use_cpu": True, "seed": 3, "max_length": 256, "learning_rate": 1e-2, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "num_ppo_epochs": 2, "num_mini_batches": 1, "response_length": 6,
    "kl_target": 0.1, "kl_horizon": 100, "normalize_rewards": True, "eval_strategy": "no", "save_steps": 2,
    "save_total_limit": 3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "sample_steps": 8,
    "num_samples": 1, "probe": "tests.ppo_ranks:Weights", "probe_steps": 4, "gradient_checkpointing": True,
}  # fmt: skip
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def last_step(folder):
    """Of the log, which a process begins by rewinding."""
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (folder / "metrics.jsonl").is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def warm(path, argv, folder, said):
    """Run a script as `python` does, in a process that has its imports already."""
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = argv
    runpy.run_path(path, run_name="__main__")


def start(program, argv, folder, said):
    """Start a script; its process id, and what tells how it ended, None while it runs."""
    if program == WARM:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rlhf.ppo", "evaluation.probes"])
        forked = context.Process(target=warm, args=(argv[0], argv, folder, said))
        forked.start()
        return forked.pid, lambda: forked.exitcode
    with said.open("w") as out:
        process = subprocess.Popen([*program, *argv], cwd=folder, stdout=out, stderr=out)
    return process.pid, process.poll


def script(folder, program, folders, keys, kill=None):
    """Run the script, from the last whole checkpoint in `folder`; whether it came to its end.

    `kill` is how many steps of the process are waited for and how many seconds more, before it is killed with all ranks.
    """
    checkpoint, damaged = last_valid(folder)
    values = {**keys, "output_dir": str(folder), "model_name_or_path": folders["base"], "dataset": folders["data"]}
    values |= {"sft_adapter": folders["sft"], "reward_adapter": folders["reward"]}
    folder.mkdir(exist_ok=True)
    config, said = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    config.write_text(yaml.safe_dump(values))
    argv = [str(ROOT / "rlhf" / "ppo.py"), "--config", str(config)]
    argv += [f"--resume_from_checkpoint={checkpoint}"] if checkpoint else []
    begin = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    pid, status = start(program, argv, folder.parent, said)
    begun, deadline = False, time.monotonic() + 1200
    try:
        while status() is None and time.monotonic() < deadline:
            begun = begun or last_step(folder) <= begin  # what is logged beyond it is of an earlier process
            if kill and begun and last_step(folder) >= begin + kill[0]:
                time.sleep(kill[1])
                break
            time.sleep(0.005)
    finally:
        if (ended := status()) is None:
            ranks = psutil.Process(pid).children(recursive=True)  # in sessions of their own
            os.kill(pid, signal.SIGKILL)
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
            psutil.wait_procs(ranks)
            while status() is None:
                time.sleep(0.005)
    print(f"from {checkpoint and checkpoint.name}, left out {damaged}, kill {kill}: step {last_step(folder)}, {ended}")
    assert ended == 0 or (kill and ended is None), said.read_text()[-3000:]
    return ended == 0


def kill_often(times, steps, program, folders, keys, tmp_path):
    """An uninterrupted run, and one that is killed so many times at random moments; where it ends early, another."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert script(whole, [sys.executable] if program == WARM else program, folders, keys)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    moments, killed = random.Random(seed), 0
    last = steps

    def check():
        check_same(folder, whole, VALUE_HEAD_FILE, last)
        for name in ("adapter_model.safetensors", VALUE_HEAD_FILE, "best/adapter_model.safetensors", "samples.jsonl"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
        assert read_record(folder)["status"] == "done"

    while killed < times:
        if script(folder, program, folders, keys, (moments.randrange(8), 0.5 * moments.random())):
            check()
            shutil.rmtree(folder)
        else:
            killed += 1
    assert folder.is_dir() and script(folder, program, folders, keys)
    check()
    return whole


@pytest.fixture
def environment(monkeypatch):
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_ten_kills_at_random_moments(folders, tmp_path):
    """24 prompts are 6 rollouts; 16 rollouts are 32 steps, into the third epoch of the data."""
    keys = {**KEYS, "total_episodes": 64}
    whole = kill_often(10, 32, WARM, folders, keys, tmp_path)
    assert read_record(whole)["hardware"]["processes"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_two_ranks_killed_at_random_moments(folders, tmp_path):
    """8 episodes a rollout of two ranks, 3 rollouts an epoch, 8 rollouts in all. MULTI_CPU would start one process."""
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1,
        "num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "main_training_function": "main",
    }  # fmt: skip
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml")]
    program += ["--main_process_port", "0"]
    whole = kill_often(3, 16, program, folders, {**KEYS, "total_episodes": 64}, tmp_path)
    assert read_record(whole)["hardware"]["processes"] == 2
    assert len(list((whole / "checkpoint-16").glob("rng_state_*.pth"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_under_zero_2_go_on_to_the_bit(folders, tmp_path, extensions, monkeypatch):
    """4 rollouts of 8 episodes, 8 steps, the last rollout in the second epoch; resumed by new processes from step 4."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    program = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / "two_t4_zero2.yaml"),
    ]
    program += ["--main_process_port", "0"]
    keys, whole, resumed = {**KEYS, "total_episodes": 32}, tmp_path / "whole", tmp_path / "resumed"
    assert script(whole, program, folders, keys)
    killed_at(resumed, whole, 4)
    shutil.copy(whole / "samples.jsonl", resumed)
    assert script(resumed, program, folders, keys)

    check_same(resumed, whole, VALUE_HEAD_FILE, last=8)
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors", "samples.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    model = make(folders, tmp_path / "unused").model
    with_adapter(model, folders["reward"], "reward")
    frozen = {name: role_hash(model, name)[:16] for name in ("reference", "reward")}
    for folder in (whole, resumed):
        record, said = read_record(folder), (folder / "training.log").read_text()
        assert record["status"] == "done" and record["hardware"]["processes"] == 2
        assert len(list(folder.glob("checkpoint-8/global_step*/*optim_states.pt"))) == 2  # ZeRO's parts
        assert said.count(f"hash of the frozen adapters at step 8: {frozen}") == 2  # at the last save, and at the end
