"""What is killed goes on, and what is shared by processes is one: batches, a system's settings, real kills and ranks."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from evaluation.batches import PROGRESS, RESULTS, begin, finish, in_batches, processes
from rlhf.record import RunError, read_record

ROOT = Path(__file__).parents[1]
WORDS = ["a", "ccccc", "bb", "ddd", "eeee"]


def test_batches_are_of_like_length_and_results_in_order(tmp_path):
    asked = []

    def shout(batch, first):
        asked.append((first, batch))
        return [word.upper() for word in batch]

    assert in_batches(tmp_path, 2, "shout", WORDS, len, shout) == [word.upper() for word in WORDS]
    assert asked == [(0, ["ccccc", "eeee"]), (2, ["ddd", "bb"]), (4, ["a"])]
    assert in_batches(tmp_path, 2, "shout", [], len, shout) == []


def test_what_is_there_is_not_computed_again(tmp_path):
    asked = []

    def dies(batch, first):
        if first == 2:
            raise KeyboardInterrupt
        asked.append(first)
        return list(map(len, batch))

    with pytest.raises(KeyboardInterrupt):
        in_batches(tmp_path, 2, "length", WORDS, len, dies)
    assert asked == [0]
    assert in_batches(tmp_path, 2, "length", WORDS, len, lambda batch, first: asked.append(first) or [0] * len(batch)) == [
        0, 5, 0, 0, 4,
    ]  # fmt: skip
    assert asked == [0, 2, 4]
    assert in_batches(tmp_path, 2, "another", WORDS, len, lambda batch, _: batch) == WORDS


def test_results_are_numbers_of_json(tmp_path):
    third = 1 / 3
    assert in_batches(tmp_path, 1, "exact", [3], lambda _: 0, lambda batch, _: [third]) == [third]
    with pytest.raises(ValueError, match="not JSON compliant"):
        in_batches(tmp_path, 1, "infinite", [3], lambda _: 0, lambda batch, _: [float("inf")])
    assert not list(tmp_path.glob("infinite*"))


def test_a_system_is_finished_from_its_settings_alone(tmp_path, caplog):
    folder, settings = tmp_path / "sft", {"seed": 1, "turns": (0, 3)}  # JSON has no tuples
    caplog.set_level(logging.INFO)
    assert not begin(folder, settings) and not caplog.text
    in_batches(folder / PROGRESS, 2, "length", WORDS, len, lambda batch, _: list(map(len, batch)))
    assert not begin(folder, settings) and len(list((folder / PROGRESS).iterdir())) == 3
    (folder / "replies.jsonl").write_text("{}\n")
    finish(folder, {"metrics": {}})
    assert begin(folder, settings) and "is finished from these settings" in caplog.text
    assert not (folder / PROGRESS).exists()
    caplog.clear()
    assert not begin(folder, {**settings, "seed": 2})
    assert "sft starts anew: seed: 1 -> 2" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_results_of_unknown_settings_make_room(tmp_path):
    (tmp_path / RESULTS).write_text("{}")
    assert not begin(tmp_path, {"seed": 1}) and not (tmp_path / RESULTS).exists()


def test_ranks_that_do_not_know_each_other_are_refused(monkeypatch):
    assert processes().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="started 2 processes .* a world of 1"):
        processes()


# -- real processes ----------------------------------------------------------------------------------------------------

slow = pytest.mark.slow
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LAUNCH = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]


@pytest.fixture(scope="module")
def command(tiny_llama, dataset, sft_run):
    """The command line of an evaluation in seconds, of four batches or more a task."""

    def make(folder, *launcher, seed=1):
        keys = {
            "dataset": dataset, "output_dir": folder, "model_name_or_path": tiny_llama, "max_new_tokens": 8,
            "max_length": 256, "distinct_tokens": 20, "batch_size": 3, "seed": seed, "bots": "[silence]",
            "systems": json.dumps({"base": None, "sft": str(sft_run.folder)}),
        }  # fmt: skip
        argv = ["-m", "evaluation", "run", *(f"--{key}={value}" for key, value in keys.items())]
        return [sys.executable, *launcher, *argv]

    return make


def start(command, folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "said").open("ab") as said:
        return subprocess.Popen(command, env={**os.environ, **ENV}, stdout=said, stderr=said, start_new_session=True)


def run(command, folder):
    code = start(command, folder).wait(600)
    assert code == 0, (folder.parent / "said").read_text()[-3000:]


def made(folder):
    """Every file of the systems, results without the date."""
    files = {
        path.relative_to(folder): path.read_text()
        for name in ("base", "sft", "silence")
        for path in (folder / name).rglob("*")
    }
    for path, text in files.items():
        if path.name == RESULTS:
            results = json.loads(text)
            del results["run"]["date"]
            files[path] = json.dumps(results)
    return files


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "evaluate"
    run(command(folder), folder)
    return made(folder)


def batches(folder):
    """Finished batches, and finished systems, by the time they were written."""
    return {path: path.stat().st_mtime_ns for path in [*folder.rglob("progress/*.json"), *folder.rglob(RESULTS)]}


@slow
def test_killed_at_any_moment(command, undisturbed, tmp_path):
    """Killed four times, after random numbers of batches and milliseconds, it goes on and ends with the same bytes."""
    folder, draw = tmp_path / "evaluate", random.Random(time.time_ns())
    for attempt in range(4):
        before, wanted = batches(folder), draw.randint(1, 8)
        process = start(command(folder), folder)
        while process.poll() is None and len(batches(folder).keys() - before.keys()) < wanted:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        assert process.poll() is None, f"it ended before it was killed for the {attempt + 1}th time"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = batches(folder)
        # Nothing was written again; the batches of a system go only when its results are there.
        assert all(after[path] == at for path, at in before.items() if path in after)
        assert all((path.parents[1] / RESULTS) in after for path in before.keys() - after.keys())
        assert read_record(folder)["status"] == "running"
    run(command(folder), folder)
    assert made(folder) == undisturbed
    said = (tmp_path / "said").read_text()
    assert " goes on: " in said and "starts anew" not in said
    run(command(folder, seed=2), folder)
    assert "sft starts anew: seed: 1 -> 2" in (tmp_path / "said").read_text() and made(folder) != undisturbed


@slow
def test_two_processes_give_the_numbers_of_one(command, undisturbed, tmp_path):
    """two_t4.yaml on the CPU starts two ranks, and both work."""
    folder = tmp_path / "evaluate"
    run(command(folder, *LAUNCH, str(ROOT / "accelerate_configs" / "two_t4.yaml")), folder)
    assert read_record(folder)["hardware"]["processes"] == 2
    assert made(folder) == undisturbed


@slow
def test_two_processes_go_on_for_one(command, undisturbed, tmp_path):
    folder = tmp_path / "evaluate"
    process = start(command(folder, *LAUNCH, str(ROOT / "accelerate_configs" / "two_t4.yaml")), folder)
    while process.poll() is None and len(batches(folder)) < 9:
        time.sleep(0.005)
    ranks = psutil.Process(process.pid).children(recursive=True)  # of sessions of their own
    for each in (process, *ranks):
        each.kill()
    process.wait()
    psutil.wait_procs(ranks)
    assert read_record(folder)["hardware"]["processes"] == 2 and read_record(folder)["status"] == "running"
    run(command(folder), folder)
    assert made(folder) == undisturbed and " goes on: " in (tmp_path / "said").read_text()
