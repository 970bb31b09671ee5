"""Two ranks (gloo, CPU, `accelerate launch`), of which one alone runs out of memory: they agree, or all of them end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rlhf.out_of_memory import EXIT_STATUS, FILE
from rlhf.record import read_record

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # two processes import torch, transformers and TRL
KEYS = {
    "use_cpu": True, "seed": 3, "max_length": 256, "lora_r": 4, "max_steps": 4, "learning_rate": 1e-2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 2, "logging_steps": 1,
    "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": True, "output_dir": "sft",
}  # fmt: skip


@pytest.fixture
def start(tiny_llama, dataset, tmp_path):
    """Run tests/memory_ranks.py on two ranks; its status, seconds and stderr. Its processes are gone afterwards."""

    def start(*words, config="two_t4", **keys):
        values = {**KEYS, "model_name_or_path": str(tiny_llama), "dataset": str(dataset), **keys}
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--main_process_port", "0"]
        command += [str(ROOT / "tests" / "memory_ranks.py"), *words, "--config", "sft.yaml"]
        env = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        children = []
        began = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - began < 500:
                children = psutil.Process(process.pid).children(recursive=True) or children
                time.sleep(0.5)
            _, said = process.communicate(timeout=30)
        finally:
            left = [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
            for each in [*left, *([process] if process.poll() is None else [])]:
                each.kill()
        assert not left, "a rank outlived the launcher"
        return process.returncode, said

    return start


def test_both_take_the_batch_that_fits_on_the_smaller(start, tmp_path):
    status, said = start("probe", "1")
    assert status == 0, said[-3000:]
    record = read_record(tmp_path / "sft")
    assert record["status"] == "done" and record["hardware"]["processes"] == 2
    fitted = json.loads((tmp_path / "sft" / FILE).read_text())
    assert (
        fitted["in_use"]["per_device_train_batch_size"] == 1 and fitted["in_use"]["gradient_accumulation_steps"] == 2
    )
    found = re.findall(
        r"hash of the trainable weights, by rank: (\w+) (\w+)", (tmp_path / "sft" / "training.log").read_text()
    )
    assert len(found) >= 2 and all(one == other for one, other in found)
    rows = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_all_end_and_the_next_start_goes_on(start, tmp_path):
    status, said = start("step", "1")
    assert status != 0 and f"exitcode  : {EXIT_STATUS}" in said and "it takes `per_device_train_batch_size` 1" in said
    state = json.loads((tmp_path / "sft" / FILE).read_text())
    assert state["out_of_memory"] == {"key": "per_device_train_batch_size", "rank": 1}
    assert state["in_use"]["per_device_train_batch_size"] == 2
    checkpoint = tmp_path / "sft" / "checkpoint-2"
    assert (checkpoint / "trainer_state.json").is_file()
    status, said = start("step", "1", resume_from_checkpoint=str(checkpoint))
    assert status == 0, said[-3000:]
    assert json.loads((tmp_path / "sft" / FILE).read_text())["in_use"]["per_device_train_batch_size"] == 1
    rows = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert read_record(tmp_path / "sft")["status"] == "done"
