"""Preparing that was killed ends in the same bytes when it runs again, wherever it was.

What is killed is a child of a server process that has imported everything (`forkserver`): it starts in milliseconds, and
begins as a fresh process does.
"""

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml

import rlhf.files
from rlhf.pipeline import run
from rlhf.prepare import PrepareConfig, prepare
from rlhf.record import read_record

MOMENTS = 10
SIZES = {f"{side}_{kind}": 40 for side in ("train", "heldout") for kind in ("dialogues", "pairs", "prompts")}


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf.pipeline", "rlhf.prepare", "sklearn.linear_model"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])  # the children import this file
        yield context


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """60 conversations in the format of Synthetic-Persona-Chat, some with placeholders, unreadable or near-duplicates."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 8))) for _ in range(2000)]

    def sentence(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    path = tmp_path_factory.mktemp("data") / "chat.csv"
    lines: list[str] = []
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("user 1 personas", "user 2 personas", "Best Generated Conversation"))
        for number in range(60):
            personas = ["\n".join(f"I {verb} {sentence(1, 2)}." for verb in ("have", "like", "love")) for _ in "12"]
            again = lines if number % 10 == 5 else []
            lines = [f"User {1 + turn % 2}: {sentence(3, 12)}." for turn in range(8)]
            lines[2:4] = [line.replace("a", "e", 1) for line in again[2:4]] or lines[2:4]
            if number % 20 == 3:
                lines[0] = "User 1: Hello, I am [User 1's name]."
            if number == 7:
                lines[4] = "At the gym"
            table.writerow((*personas, "\n".join(lines)))
    return path


def config(folder: Path, data: Path, source: str = "synthetic_persona_chat") -> PrepareConfig:
    if source == "world":
        return PrepareConfig(str(folder), "world", probe_characters=4, **SIZES)
    return PrepareConfig(str(folder), "synthetic_persona_chat", path=str(data), max_turns=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare_and_die(config: PrepareConfig, writes: int) -> None:
    """Prepare, and be killed in the course of the write after so many: all is written, and not yet renamed."""
    left = iter(range(writes))

    def fsync(_: int) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    rlhf.files.os.fsync = fsync
    prepare(config)


def finished(process) -> int:
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_killed_at_random_moments(processes, data, tmp_path):
    whole = tmp_path / "whole"
    for _ in range(2):  # the first one starts the server too
        began = time.perf_counter()
        assert finished(processes.Process(target=prepare, args=(config(whole, data),))) == 0
        seconds = time.perf_counter() - began
    expected = contents(whole)
    reasons = {json.loads(line)["reason"] for line in expected["rejected.jsonl"].split(b"\n") if line}
    assert reasons >= {"near-duplicate", "placeholder", "unparseable line"}

    rng = random.Random(1)
    files_left = []
    for number in range(MOMENTS):
        folder = tmp_path / f"killed-{number}"
        moment = seconds * (number + rng.random()) / MOMENTS  # one in each tenth
        killed = False
        while not killed:
            process = processes.Process(target=prepare, args=(config(folder, data),))
            process.start()
            time.sleep(moment)
            process.kill()
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            moment *= 0.9  # where it was through before that
        files_left.append(len(contents(folder)) if folder.is_dir() else 0)
        assert finished(processes.Process(target=prepare, args=(config(folder, data),))) == 0
        assert contents(folder) == expected
    assert min(files_left) == 0 < max(files_left)  # some before the first file, some after


@pytest.mark.parametrize("source", ["file", "world"])
def test_killed_in_every_write(processes, data, tmp_path, source):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    prepare(config(whole, data, source))
    expected = contents(whole)
    for writes in range(len(expected)):
        assert (
            finished(processes.Process(target=prepare_and_die, args=(config(folder, data, source), writes)))
            == -signal.SIGKILL
        )
        temporary = [name for name in contents(folder) if name not in expected]
        assert len(temporary) == 1 and temporary[0].endswith(".tmp")
    assert finished(processes.Process(target=prepare, args=(config(folder, data, source),))) == 0
    assert contents(folder) == expected


def test_run_goes_on_after_a_kill(processes, data, tmp_path):
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "recipe.yaml").write_text("seed: 42\n")
    keys = {"extends": "recipe.yaml", "output_dir": "runs/recipe/prepare", "source": "synthetic_persona_chat",
            "path": str(data), "max_turns": 4}  # fmt: skip
    (recipe / "prepare.yaml").write_text(yaml.safe_dump(keys))
    said: list[str] = []

    def arguments(name: str, **keys) -> dict:
        return {"recipe": recipe, "until": "prepare", "output_dir": tmp_path / name, **keys}

    run(**arguments("whole", say=said.append))
    whole, folder = tmp_path / "whole" / "prepare", tmp_path / "killed" / "prepare"

    process = processes.Process(target=run, kwargs=arguments("killed"))
    process.start()
    while not (folder / "dialogues_train.jsonl").exists():  # the first of the stage's files
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_record(folder)["status"] == "running"
    assert not (folder / "statistics.json").exists()

    said.clear()
    run(**arguments("killed", say=said.append))
    assert "runs again: it stopped" in said[0]
    record, expected = read_record(folder), read_record(whole)
    assert record["status"] == "done"
    assert record["result_hash"] == expected["result_hash"]
    made, wanted = contents(folder), contents(whole)
    assert made.keys() == wanted.keys()
    of_the_run = {"training.log", "metadata.json", "config.yaml"}  # times and the folder's name
    assert all(made[name] == wanted[name] for name in wanted.keys() - of_the_run)

    said.clear()
    run(**arguments("killed", say=said.append))
    assert said[0].startswith("prepare   done:")
