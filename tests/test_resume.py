"""SFT, reward and DPO that are killed at any moment end in the adapter, the log and the optimiser of one undisturbed run.

The script itself is killed, as a process forked behind the imports, which are most of a run's time.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from rlhf.checkpoints import last_valid
from rlhf.files import read_jsonl
from rlhf.record import read_record
from tests.test_ppo_resume import ENV, assert_equal, warm

ROOT = Path(__file__).parents[1]
KILLS = 10
LAST = 14
# 24 rows in fours, half of them accumulated: 6 steps an epoch, and the end is within the third one. Checkpoints at 4, 8
# and 12, at the end, and where an evaluation is the best so far; logs between them. Dropout draws random numbers.
KEYS = {
    "use_cpu": True, "seed": 3, "max_length": 256, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
    "learning_rate": 1e-2, "max_steps": LAST, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "save_total_limit": 2,
    "load_best_model_at_end": True, "report_to": "none", "disable_tqdm": True, "sample_steps": 5, "num_samples": 1,
    "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)


def script(stage, folder, keys, seconds=None):
    """Run the script from the last checkpoint in `folder`, and kill it so long after its training began.

    Returns:
        The seconds from there to its end, or None where it was killed.
    """
    checkpoint, damaged = last_valid(folder)
    folder.mkdir(exist_ok=True)
    config, said = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    config.write_text(yaml.safe_dump({**keys, "output_dir": str(folder)}))
    argv = [str(ROOT / "rlhf" / f"{stage}.py"), "--config", str(config)]
    argv += [f"--resume_from_checkpoint={checkpoint}"] if checkpoint else []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf.sft", "rlhf.reward", "rlhf.dpo"])
    process = context.Process(target=warm, args=(argv[0], argv, folder.parent, said))
    log = folder / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.is_file() else None
    process.start()
    while process.exitcode is None and (log.stat().st_mtime_ns if log.is_file() else None) == before:
        time.sleep(0.01)  # its training begins by writing the log anew
    began = time.monotonic()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    rows = log.read_bytes().count(b"\n") if log.is_file() else 0
    print(f"from {checkpoint and checkpoint.name}, left out {damaged}: {rows} rows, exit {process.exitcode}")
    assert process.exitcode in (0, -signal.SIGKILL), said.read_text()[-3000:]
    return time.monotonic() - began if process.exitcode == 0 else None


def rows(folder):
    """The log, but for times and the mean loss of the process, which are its own."""
    return [
        {key: value for key, value in row.items() if not key.startswith("train_") and "runtime" not in key
         and "per_second" not in key}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]  # fmt: skip


def check_same(folder, whole):
    for name in ("adapter_model.safetensors", "samples.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        saved = [torch.load(path / f"checkpoint-{LAST}" / name, weights_only=False) for path in (folder, whole)]
        assert_equal(*saved, name)
        if name == "optimizer.pt":
            assert {int(state["step"]) for state in saved[0]["state"].values()} == {LAST}  # optimiser steps, by Adam
    assert rows(folder) == rows(whole)
    assert [row["step"] for row in rows(folder) if "loss" in row] == sorted(
        {*range(2, LAST + 1, 2), *range(3, LAST, 3)}
    )
    records = [read_record(path) for path in (folder, whole)]
    assert all(record["status"] == "done" for record in records)
    assert len({record["result_hash"] for record in records}) == len({record["tokens"] for record in records}) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_ten_kills_at_random_moments(stage, request, tiny_llama, dataset, tmp_path):
    keys = {**KEYS, "model_name_or_path": str(tiny_llama), "dataset": str(dataset)}
    if stage == "dpo":
        keys["sft_adapter"] = str(request.getfixturevalue("sft_run").folder)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for _ in range(2):  # the first one starts the server too
        shutil.rmtree(whole, ignore_errors=True)
        seconds = script(stage, whole, keys)
        assert seconds is not None
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}, {seconds:.1f} s undisturbed")
    moments, killed = random.Random(seed), 0
    while killed < KILLS:
        if script(stage, folder, keys, seconds * moments.uniform(0, 1)) is not None:
            check_same(folder, whole)
            shutil.rmtree(folder)
        else:
            killed += 1
    if folder.is_dir():
        assert script(stage, folder, keys) is not None
        check_same(folder, whole)
