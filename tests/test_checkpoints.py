"""Checkpoints: the manifest that makes one, rotation, saves by time, full disks, what is refused."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from transformers import TrainerCallback

from rlhf import checkpoints, session
from rlhf.checkpoints import (
    MANIFEST,
    Checkpoints,
    continue_from,
    fault,
    last_valid,
    rotate,
    write_manifest,
)
from rlhf.files import read_jsonl, write_json
from rlhf.record import RunError, read_record
from rlhf.session import ENDS, SessionEnded

KEYS = {"save_total_limit": None, "sample_steps": 6, "num_samples": 1}


def write_checkpoint(folder, step, manifest=True):
    """As four files of the Trainer's and one of DeepSpeed's, with contents that tell the step."""
    checkpoint = folder / f"checkpoint-{step}"
    names = ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "global_step1/bf16_zero.pt")
    for name in names:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(f"{name} of {step}")
    if manifest:
        write_manifest(checkpoint, {"stage": "sft"})
    return checkpoint


def steps(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


# What is a checkpoint


def test_manifest_has_size_and_hash_of_every_file(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 2)
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted(files) == sorted(
        ["adapter_model.safetensors", "global_step1/bf16_zero.pt", "optimizer.pt", "trainer_state.json"]
    )
    told = subprocess.run(
        ["sha256sum", checkpoint / "optimizer.pt"], capture_output=True, text=True, check=True
    ).stdout
    assert files["optimizer.pt"] == {"bytes": len("optimizer.pt of 2"), "sha256": told.split()[0]}
    assert fault(checkpoint) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    """A bit that neither the size nor the structure of a file shows."""
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("optimizer.pt", cut, "has a damaged optimizer.pt"),
        ("adapter_model.safetensors", flip, "has a damaged adapter_model.safetensors"),
        ("global_step1/bf16_zero.pt", os.unlink, "has no global_step1/bf16_zero.pt"),
        (MANIFEST, os.unlink, "has no manifest.json that can be read, which is written last"),
        (MANIFEST, cut, "has no manifest.json that can be read, which is written last"),
    ],
)
def test_the_newest_one_that_is_whole_is_found(name, spoil, said, tmp_path):
    for step in (2, 10):  # by number, not by name
        write_checkpoint(tmp_path, step)
    assert last_valid(tmp_path) == (tmp_path / "checkpoint-10", [])
    if name == MANIFEST and spoil is cut:
        (tmp_path / "checkpoint-10" / name).write_text('{"files": {"optimizer.pt"')
    else:
        spoil(tmp_path / "checkpoint-10" / name)
    assert last_valid(tmp_path) == (tmp_path / "checkpoint-2", [f"checkpoint-10 {said}"])


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [2, 4, 6, 8, 10]), (2, None, [8, 10]), (2, 4, [4, 10]), (1, 4, [4, 10]), (1, 10, [10]), (3, 4, [4, 8, 10])],
)  # fmt: skip
def test_rotation_keeps_the_newest_and_the_best(limit, best, kept, tmp_path):
    """As transformers' own: the best one counts among `save_total_limit`. What is no checkpoint goes in any case."""
    for step in (2, 4, 6, 8, 10):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 5, manifest=False)
    (tmp_path / "checkpoint-notes").mkdir()
    rotate(tmp_path, limit, best and f"/elsewhere/checkpoint-{best}")
    (tmp_path / "checkpoint-notes").rmdir()
    assert steps(tmp_path) == kept


# In trainings


@pytest.fixture
def sft(train, tiny_llama, dataset, tmp_path):
    def run(name="sft", tamper=lambda trainer: None, **values):
        keys = {**KEYS, "load_best_model_at_end": False, **values}
        return train(
            "sft", tmp_path / name, tamper, model_name_or_path=tiny_llama, dataset=dataset, **keys
        )  # fmt: skip

    return run


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_every_stage_writes_them(stage, request):
    """Of trainings that ended, with the limit of 1 that their tests have: the newest and the best one."""
    folder = request.getfixturevalue(f"{stage}_run").folder
    assert 1 <= len(steps(folder)) <= 2
    for step in steps(folder):
        assert fault(folder / f"checkpoint-{step}") is None
        manifest = json.loads((folder / f"checkpoint-{step}" / MANIFEST).read_text())
        assert manifest["stage"] == stage and manifest["processes"] == 1
        assert {name: link["hash"] for name, link in read_record(folder)["parents"].items()} == manifest["parents"]
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= manifest["files"].keys()
        assert (stage == "ppo") == ("value_head.safetensors" in manifest["files"])


class AtStep(TrainerCallback):
    def __init__(self, step, what, event="on_step_end"):
        self.step = step
        setattr(self, event, self._do)
        self.what = what

    def _do(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


class Clock:
    """In place of the session's: it moves when a step ends, as far as it is told."""

    def __init__(self, monkeypatch, seconds_of_step):
        self.time, self.seconds_of_step = 1000.0, dict(seconds_of_step)
        monkeypatch.setattr(session, "now", lambda: self.time)
        monkeypatch.setattr(checkpoints, "now", lambda: self.time)

    def tick(self, trainer):
        clock = self

        class Tick(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.time += clock.seconds_of_step.get(state.global_step + 1, 1.0)

        trainer.add_callback(Tick())


@pytest.mark.slow
def test_saves_by_time_beside_those_by_step(sft, monkeypatch):
    """Half a minute is over in step 2, in step 5 (three steps of 11 s), and not before the save by step at 6."""
    clock = Clock(monkeypatch, {2: 31.0, 3: 11.0, 4: 11.0, 5: 11.0})
    run = sft(tamper=clock.tick, save_minutes=0.5, save_steps=6, eval_steps=6)
    assert steps(run.folder) == [2, 5, 6]
    sparse = sft("sparse", save_minutes=None, save_steps=6, eval_steps=6, logging_steps=6)
    assert steps(sparse.folder) == [6]
    name = "adapter_model.safetensors"
    assert (run.folder / name).read_bytes() == (sparse.folder / name).read_bytes()


@pytest.mark.slow
def test_a_save_between_evaluations_does_not_choose_the_best(sft, monkeypatch):
    """Evaluated after each step, saved by step at 4 and 6 alone; the best, by turned-round loss, is of a step between."""
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
            "eval_steps": 1, "save_steps": 3, "learning_rate": 3e-2}  # fmt: skip
    plain = sft("plain", save_minutes=None, **keys)
    clock = Clock(monkeypatch, dict.fromkeys(range(1, 7), 61.0))
    timed = sft("timed", clock.tick, save_minutes=1.0, **keys)
    losses = {row["step"]: row["eval_loss"] for row in plain.rows("metrics.jsonl") if "eval_loss" in row}
    best = max(losses, key=losses.get)
    assert plain.trainer.state.best_global_step == timed.trainer.state.best_global_step == best
    assert {3, 6, best} <= set(steps(plain.folder)) < set(steps(timed.folder)) == set(range(1, 7))
    name = "adapter_model.safetensors"
    kept = (plain.folder / f"checkpoint-{best}" / name).read_bytes()
    assert (plain.folder / name).read_bytes() == (timed.folder / name).read_bytes()
    assert torch.equal(
        *(torch.tensor(list(x)) for x in ((timed.folder / f"checkpoint-{best}" / name).read_bytes(), kept))
    )


@pytest.mark.slow
def test_the_session_ends_behind_a_checkpoint(sft, monkeypatch):
    """A step is 10 s and a save nothing: of 45 s, the fourth step is the last one that another would fit behind."""
    clock = Clock(monkeypatch, dict.fromkeys(range(1, 7), 10.0))
    monkeypatch.setattr(checkpoints, "DISK_BYTES_PER_SECOND", 1e18)
    monkeypatch.setenv(ENDS, str(clock.time + 45))
    whole = sft("whole")  # without the clock's ticks
    with pytest.raises(SessionEnded, match="step 4 of 6, and checkpoint-4 is kept"):
        sft("stopped", clock.tick, save_steps=6)
    folder = whole.folder.with_name("stopped")
    record = read_record(folder)
    assert record["status"] == "stopped" and record["stopped"].startswith("the session ends")
    assert steps(folder) == [4] and not (folder / "adapter_model.safetensors").exists()
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    monkeypatch.delenv(ENDS)
    resumed = sft("stopped", save_steps=6, resume_from_checkpoint=folder / "checkpoint-4")
    for name in ("adapter_model.safetensors", "checkpoint-6/optimizer.pt"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    counted = [[row["num_tokens"] for row in run.rows("metrics.jsonl") if "loss" in row] for run in (resumed, whole)]
    assert counted[0] == counted[1] and resumed.metadata()["tokens"] == whole.metadata()["tokens"]


def test_from_the_last_step_within_an_epoch_none_is_taken(sft):
    """24 rows in fours are 6 steps an epoch; transformers would begin a ninth step of 8."""
    whole = sft("whole", max_steps=8)
    resumed = sft("resumed", max_steps=8, resume_from_checkpoint=whole.folder / "checkpoint-8")
    assert resumed.trainer.state.global_step == 8
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.slow
def test_the_best_one_is_found_where_the_run_lies_now(sft, tmp_path):
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
            "learning_rate": 3e-2}  # fmt: skip
    whole = sft("whole", **keys)
    best = whole.trainer.state.best_global_step
    assert best < 6, "the losses of this seed tell nothing"
    expected = (whole.folder / "adapter_model.safetensors").read_bytes()
    moved = whole.folder.rename(tmp_path / "moved")
    again = sft("moved", **keys, resume_from_checkpoint=moved / "checkpoint-6")
    assert (again.folder / "adapter_model.safetensors").read_bytes() == expected
    flip(moved / f"checkpoint-{best}" / "adapter_model.safetensors")
    last = (moved / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    again = sft("moved", **keys, resume_from_checkpoint=moved / "checkpoint-6")
    log = (moved / "training.log").read_text()
    assert f"checkpoint-{best} has a damaged adapter_model.safetensors" in log
    assert (again.folder / "adapter_model.safetensors").read_bytes() == last


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "another"}, "it was made with the base 'another', and this is"),
        ({"stage": "dpo"}, "it was made with the stage 'dpo', and this is 'sft'"),
        (
            {"parents": {"prepare": "0" * 64}},
            "it was made from another 'prepare' .'000000000000'. than the one now there",
        ),
        ({"processes": 2}, "random numbers of 2 processes, and this launch has 1; start as many"),
    ],
)
def test_a_checkpoint_of_another_make_is_refused(change, said, sft_run, sft, tmp_path):
    checkpoint = shutil.copytree(sft_run.folder / "checkpoint-6", tmp_path / "checkpoint-6")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    write_json(checkpoint / MANIFEST, {**manifest, **change})
    with pytest.raises(RunError, match=said):
        sft(resume_from_checkpoint=checkpoint)


def test_a_damaged_checkpoint_is_refused_by_the_script(sft_run, sft, tmp_path):
    checkpoint = shutil.copytree(sft_run.folder / "checkpoint-6", tmp_path / "checkpoint-6")
    flip(checkpoint / "scheduler.pt")
    with pytest.raises(RunError, match="checkpoint-6 has a damaged scheduler.pt. Name the checkpoint before"):
        sft(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
def test_later_checkpoints_are_taken_away(sft, tmp_path):
    """A part of one that a kill left, and those of a training that is gone over again."""
    whole = sft("run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6" / "trainer_state.json", ignore_errors=True)
    (tmp_path / "run" / "checkpoint-6" / MANIFEST).unlink()
    sft("run", resume_from_checkpoint=whole.folder / "checkpoint-2", save_strategy="no", eval_strategy="no")
    assert steps(tmp_path / "run") == [2]
    log = (tmp_path / "run" / "training.log").read_text()
    assert "checkpoint-6 has no manifest.json that can be read" in log
    assert "checkpoint-4 is of an earlier training; it is taken away, and step 3 is next" in log


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_before_a_save(sft, small_disk, monkeypatch):
    """Filled after the second checkpoint; with room again, it ends as it would have."""
    whole = sft("whole")
    monkeypatch.setattr(checkpoints, "RESERVE_BYTES", 0)
    filler = small_disk / "filler"
    full = AtStep(5, lambda: filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000)))
    with pytest.raises(RunError) as told:
        sft("disk/sft", lambda trainer: trainer.add_callback(full))
    folder = small_disk / "sft"
    needed = sum(path.stat().st_size for path in (folder / "checkpoint-4").rglob("*"))
    for word in (f"the disk of {folder} is full", "bytes are free", f"a checkpoint needs {needed:,}", "Make room",
                 "goes on from checkpoint-4, which is as it was"):  # fmt: skip
        assert word in str(told.value)
    assert last_valid(folder) == (folder / "checkpoint-4", []) and steps(folder) == [2, 4]
    assert read_record(folder)["status"] == "failed"
    filler.unlink()
    again = sft("disk/sft", resume_from_checkpoint=folder / "checkpoint-4")
    name = "adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_while_a_checkpoint_is_written(file, sft, small_disk, monkeypatch):
    monkeypatch.setattr(checkpoints, "RESERVE_BYTES", 0)
    filler, own = small_disk / "filler", Checkpoints._check_space

    def passed_and_then_filled(self):
        own(self)
        if self.trainer.state.global_step == 4:
            left = 20_000 if file == "adapter_model.safetensors" else 60_000
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    monkeypatch.setattr(Checkpoints, "_check_space", passed_and_then_filled)
    with pytest.raises(RunError, match="is full: .*goes on from checkpoint-2, which is as it was") as told:
        sft("disk/sft")
    print(repr(told.value.__cause__))
    folder = small_disk / "sft"
    assert steps(folder) == [2] and last_valid(folder) == (folder / "checkpoint-2", [])
    assert read_record(folder)["status"] == "failed"
    monkeypatch.setattr(Checkpoints, "_check_space", own)
    filler.unlink()
    again = sft("disk/sft", resume_from_checkpoint=folder / "checkpoint-2")
    assert again.metadata()["status"] == "done" and steps(folder) == [2, 4, 6]


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_training_is_over(sft, small_disk, monkeypatch):
    """The adapter itself does not fit; no step is taken again when it does."""
    monkeypatch.setattr(checkpoints, "RESERVE_BYTES", 0)
    filler = small_disk / "filler"
    full = AtStep(6, lambda: filler.write_bytes(bytes(shutil.disk_usage(small_disk).free)), "on_train_end")
    with pytest.raises(RunError, match="is full: .*goes on from what was whole"):
        sft("disk/sft", lambda trainer: trainer.add_callback(full))
    folder = small_disk / "sft"
    filler.unlink()
    assert read_record(folder)["status"] in ("running", "failed") and last_valid(folder)[0].name == "checkpoint-6"
    again = sft("disk/sft", resume_from_checkpoint=folder / "checkpoint-6")
    assert again.metadata()["status"] == "done" and again.trainer.state.global_step == 6
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (folder / "checkpoint-6" / name).read_bytes()


def test_no_room_for_the_first_checkpoint_is_told_at_the_start(sft, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "RESERVE_BYTES", 10**18)
    with pytest.raises(RunError, match="begins anew; there was no checkpoint yet"):
        sft()
    assert not steps(tmp_path / "sft") and not read_jsonl(tmp_path / "sft" / "metrics.jsonl")


# A run of another session


def write_run(folder):
    """A finished stage, one that was stopped with its best checkpoint before the last one, and what is not needed."""
    for stage, status in (("prepare", "done"), ("sft", "done"), ("reward", "stopped"), ("sft.previous", "done")):
        write_json(folder / stage / "metadata.json", {"stage": stage, "status": status, "parents": {}})
    (folder / "sft" / "adapter_model.safetensors").write_text("weights")
    write_checkpoint(folder / "sft", 4)
    for step in (2, 4, 6, 8):
        checkpoint = write_checkpoint(folder / "reward", step)
        write_json(checkpoint / "trainer_state.json", {"best_global_step": 4})
        write_manifest(checkpoint, {})
    flip(folder / "reward" / "checkpoint-8" / "optimizer.pt")
    (folder / "reward" / ".metadata.json.7.tmp").write_text("{")
    (folder / "report").mkdir()
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_taken_from_another_session(tmp_path):
    source, target = write_run(tmp_path / "input" / "run"), tmp_path / "runs" / "mine"
    before = files_of(source)
    for path in [source, *source.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    target.mkdir(parents=True)  # empty
    assert continue_from(source, target)
    taken = files_of(target)
    checkpoint = [
        name.removeprefix("reward/checkpoint-2/") for name in before if name.startswith("reward/checkpoint-2/")
    ]
    assert taken == sorted(
        ["continued_from.json", "prepare/metadata.json", "reward/metadata.json", "sft/adapter_model.safetensors",
         "sft/metadata.json", *(f"reward/checkpoint-{step}/{name}" for step in (4, 6) for name in checkpoint)]
    )  # fmt: skip
    assert last_valid(target / "reward") == (target / "reward" / "checkpoint-6", [])
    assert files_of(source) == before
    (target / "sft" / "adapter_model.safetensors").write_text("newer")  # may be written
    assert not continue_from(source, target)  # the same command again
    assert (target / "sft" / "adapter_model.safetensors").read_text() == "newer"


def test_what_is_not_taken(tmp_path, monkeypatch):
    source = write_run(tmp_path / "input" / "run")
    for held in ("sft/metadata.json", "notes.txt"):
        target = tmp_path / held.replace("/", "-")
        write_json(target / held, {})
        with pytest.raises(RunError, match="holds another run already.*name another --output_dir"):
            continue_from(source, target)
        assert files_of(target) == [held]
    with pytest.raises(RunError, match=f"is not the folder of a run.*There are runs in {source}"):
        continue_from(tmp_path / "input", tmp_path / "new")
    with pytest.raises(RunError, match="Name the folder that `rlhf run` wrote"):
        continue_from(tmp_path / "nowhere", tmp_path / "new")
    monkeypatch.setattr(checkpoints, "RESERVE_BYTES", 10**18)
    with pytest.raises(RunError, match="bytes free, and .* needs 1,000"):
        continue_from(source, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
