"""The scripts as real processes on the CPU: `accelerate launch`, two ranks, another working directory, DeepSpeed."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rlhf import launching
from rlhf.checkpoints import MANIFEST, last_valid
from rlhf.record import read_record
from rlhf.session import ENDS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"
KEYS = {
    "use_cpu": True, "seed": 3, "max_length": 256, "lora_r": 4, "max_steps": 4, "learning_rate": 1e-2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2,
    "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True, "gradient_checkpointing": True,
}  # fmt: skip
PPO = {"total_episodes": 16, "num_ppo_epochs": 2, "response_length": 6}
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
slow = pytest.mark.slow


def accelerate(config_file, *arguments):
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file), *arguments]


def finish(commands, cwd, env, status=0):
    """Run the commands side by side to their ends; what each wrote to stderr."""
    processes = [
        subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **ENV, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                # The ranks too, which would wait for ever; they are in sessions of their own.
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == status, text[-3000:]
    return said


@pytest.fixture
def launch(request, tiny_llama, dataset, tmp_path):
    """Start a script through accelerate, in a folder that is not the repository's; its output folder and stderr.

    `agents` are the further arguments of each agent, of which there are two where there are two nodes.
    """

    def start(stage, config_file, env=None, status=0, agents=((),), **keys):
        values = {
            **KEYS,
            "model_name_or_path": str(tiny_llama),
            "dataset": str(dataset),
            "output_dir": f"runs/{stage}",
        }
        if stage == "ppo":
            values = {key: value for key, value in values.items() if key != "max_steps"} | PPO
            values["reward_adapter"] = str(request.getfixturevalue("reward_run").folder)
        if stage in ("dpo", "ppo"):
            values["sft_adapter"] = str(request.getfixturevalue("sft_run").folder)
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump({**values, **keys}))
        if "two_t4" in config_file.name:
            agents = [("--main_process_port", "0")]
        script = [str(ROOT / "rlhf" / f"{stage}.py"), "--config", f"{stage}.yaml"]
        commands = [accelerate(config_file, *arguments, *script) for arguments in agents]
        said = finish(commands, tmp_path, env or {}, status)
        return tmp_path / "runs" / stage, "".join(said)

    return start


def hashes(folder):
    """Hash of the trainable weights on each rank, at each save and at the end."""
    found = re.findall(r"hash of the trainable weights, by rank: (.*)", (folder / "training.log").read_text())
    return [line.split() for line in found]


def check_two_ranks(folder):
    record = read_record(folder)
    assert record["status"] == "done" and record["hardware"]["processes"] == 2
    by_rank = hashes(folder)
    assert len(by_rank) >= 3  # at least two saves and the end
    assert all(len(ranks) == 2 and ranks[0] == ranks[1] for ranks in by_rank)
    assert by_rank[0] != by_rank[1], "nothing was learnt between the saves"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]  # one rank alone writes
    assert (folder / "adapter_model.safetensors").is_file()
    return rows


@pytest.mark.parametrize("stage", ["sft", *(pytest.param(stage, marks=slow) for stage in ("reward", "dpo", "ppo"))])
def test_two_ranks(stage, launch):
    """two_t4.yaml on the CPU: MULTI_CPU would start one process, silently."""
    folder, _ = launch(stage, CONFIGS / "two_t4.yaml")
    rows = check_two_ranks(folder)
    if stage == "ppo":
        # 2 episodes x 2 micro-batches x 2 ranks a rollout; 16 episodes
        assert [row["episode"] for row in rows if "loss" in row] == [0, 8, 8, 16]
        for row in rows:
            if "objective/kl" in row:
                penalty = -0.05 * row["objective/kl"]
                assert row["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-5, abs=1e-9)


@slow
def test_two_ranks_as_rlhf_run_starts_them(tiny_llama, dataset, tmp_path, monkeypatch):
    """What it does on two GPUs, on the CPU: the check of the ranks, then the stage."""
    monkeypatch.chdir(tmp_path)
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    keys = {**KEYS, "model_name_or_path": tiny_llama, "dataset": dataset, "output_dir": "runs/sft"}
    script = [str(ROOT / "rlhf" / "sft.py"), *(f"--{key}={value}" for key, value in keys.items())]
    assert launching.start(script, 2) == 0
    check_two_ranks(tmp_path / "runs" / "sft")


def test_a_failure_in_mid_training_is_a_message(tiny_llama, dataset, tmp_path):
    keys = {**KEYS, "model_name_or_path": tiny_llama, "dataset": dataset, "output_dir": "sft", "max_steps": 1}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_foo", "eval_steps": 1, "save_steps": 1}
    command = [sys.executable, str(ROOT / "rlhf" / "sft.py"), *(f"--{key}={value}" for key, value in keys.items())]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **ENV}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and ended.stderr.count("Traceback") == 0
    error, where = ended.stderr.splitlines()[-2:]
    assert error.startswith("error: KeyError") and "eval_foo" in error
    assert where == "The traceback is in sft/training.log."
    assert (tmp_path / "sft" / "training.log").read_text().count("Traceback (most recent call last)") == 2  # its cause


@slow
@pytest.mark.parametrize("name", ["cpu", "one_gpu"])
def test_one_process(name, launch):
    folder, _ = launch("sft", CONFIGS / f"{name}.yaml")
    assert read_record(folder)["hardware"]["processes"] == 1
    assert all(len(ranks) == 1 for ranks in hashes(folder))


@slow
def test_a_rank_without_the_others_is_refused(launch):
    """Two processes are announced, and there is one: it neither trains alone nor waits for ever.

    Where each of several ranks believes to be alone, `rlhf.record.check_world_size` refuses (test_record.py).
    """
    folder, said = launch("sft", CONFIGS / "cpu.yaml", env={"WORLD_SIZE": "2"}, status=1)
    assert "error: the configuration has 1 problem" in said and "MASTER_ADDR" in said and not folder.exists()


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_nodes(stage, launch):
    """Two agents on this machine, each with its own rank, meet at an address and a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    agents = [("--machine_rank", rank, "--main_process_port", port) for rank in ("0", "1")]
    folder, _ = launch(stage, CONFIGS / "two_nodes.yaml", agents=agents)
    check_two_ranks(folder)


def test_every_configuration_is_here_and_says_how_it_is_launched():
    names = {"cpu", "one_gpu", "two_t4", "two_t4_zero2", "two_nodes"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == names
    for name in names:
        text = (CONFIGS / f"{name}.yaml").read_text()
        head = [line for line in text.splitlines() if line.startswith("#")]
        assert any(f"accelerate launch --config_file accelerate_configs/{name}.yaml " in line for line in head)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@needs_deepspeed
@pytest.mark.parametrize(("fp16", "bf16"), [(False, False), (True, False), (False, True)], ids=["CPU", "T4", "A100"])
def test_zero_2_follows_the_precision_that_the_script_chose(fp16, bf16, monkeypatch):
    """As the Trainer fills what DeepSpeed's settings leave open; the machines are faked."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    args = TrainingArguments(use_cpu=True, report_to="none", gradient_accumulation_steps=4, max_grad_norm=0.7)
    args.fp16, args.bf16 = fp16, bf16
    text = yaml.safe_load((CONFIGS / "two_t4_zero2.yaml").read_text())["deepspeed_config"]["deepspeed_config_file"]
    settings = HfTrainerDeepSpeedConfig(text)
    settings.trainer_config_process(args)
    filled = settings.config
    assert (filled["fp16"]["enabled"], filled["bf16"]["enabled"]) == (fp16, bf16)
    assert 12 <= filled["fp16"]["initial_scale_power"] <= 16  # DeepSpeed's default of 16 loses steps on a T4
    assert filled["zero_optimization"]["stage"] == 2 and filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 0.7


@slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_deepspeed_zero_2(stage, launch, extensions):
    env = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions)}
    folder, _ = launch(stage, CONFIGS / "two_t4_zero2.yaml", env=env)
    check_two_ranks(folder)


@slow
@pytest.mark.parametrize("kind", ["two_t4", pytest.param("two_t4_zero2", marks=needs_deepspeed)])
def test_ranks_stop_together_when_the_session_ends(kind, launch, extensions):
    """The first step is the last one of a session that is over; each rank's files are in the manifest, and it goes on."""
    file, env = CONFIGS / f"{kind}.yaml", {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions)}
    folder, _ = launch("sft", file, env=env)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    launch("sft", file, env={**env, ENDS: str(time.time())})
    assert read_record(folder)["status"] == "stopped" and not (folder / "adapter_model.safetensors").exists()
    checkpoint, damaged = last_valid(folder)
    assert checkpoint.name == "checkpoint-1" and not damaged
    files = json.loads((checkpoint / MANIFEST).read_text())["files"].keys()
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= files
    shards = [name for name in files if name.startswith("global_step1/")]
    assert len([name for name in shards if "optim_states" in name]) == (2 if kind == "two_t4_zero2" else 0)
    launch("sft", file, env=env, resume_from_checkpoint=str(checkpoint))
    check_two_ranks(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
