"""Checkpoints that are whole or are none: a manifest of hashes, rotation, saves by time, the end of a session.

The Trainer writes a checkpoint in place, file after file, and deletes older ones before anybody can check it. Here
`manifest.json`, with the size and hash of every file, is written last, when all processes have written theirs; what has
no manifest is no checkpoint; and older ones go when the new one is whole.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from rlhf.files import is_disk_full, write_json
from rlhf.record import RunError, read_record, without_machine_paths
from rlhf.session import Pace, SessionEnded, now, seconds_left

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONTINUED = "continued_from.json"
RESERVE_BYTES = 16 * 2**20  # of a checkpoint beside the weights, before the first one was measured: the tokenizer
DISK_BYTES_PER_SECOND = 50e6  # of a slow disk, before the first save was measured


def train(trainer: Trainer, record: dict[str, Any], save_minutes: float | None) -> None:
    """`trainer.train()`, from the checkpoint that its arguments name, with checkpoints that are whole or none.

    Args:
        trainer: With all its other callbacks: those that write into a checkpoint must come before the manifest.
        record: Of the stage; a checkpoint says what it was made from, and one of another make is refused.
        save_minutes: Longest time between two checkpoints, on the clock of the first process; None saves by step alone.

    Raises:
        RunError: if the checkpoint cannot be gone on from, or the disk is full.
        SessionEnded: when the session ends before the training does, behind a checkpoint.
    """
    args = trainer.args
    made_from = {
        "stage": record["stage"],
        "base": record.get("base_hash") or record.get("model_name_or_path"),
        "parents": {name: parent["hash"] for name, parent in record["parents"].items()},
    }
    if args.resume_from_checkpoint:
        _check(Path(args.resume_from_checkpoint), made_from, args.world_size)
    checkpoints = Checkpoints(trainer, made_from, save_minutes)
    trainer.add_callback(checkpoints)
    trainer._run_epoch = functools.partial(run_epoch_unless_done, trainer)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not checkpoints.disk_is_full(error):
            raise
        raise RunError(checkpoints.no_space()) from error


def run_epoch_unless_done(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """`Trainer._run_epoch`, but that of transformers 5.23 trains a step more from a checkpoint of the last one.

    It does where that checkpoint is within an epoch. No trainer of TRL 1.16 has an own `_run_epoch`; PPOTrainer has this
    one, since it is also used without [`train`].
    """
    if trainer.state.global_step < trainer.state.max_steps:
        Trainer._run_epoch(trainer, *args, **kwargs)


class Checkpoints(TrainerCallback):
    """See the module's words. The last one of a trainer's callbacks, since it closes what the others write.

    Args:
        trainer: Before it trains; `save_total_limit` is taken from its arguments, and keeps its meaning here.
        made_from: What a checkpoint's manifest says of its make.
        save_minutes: See [`train`].
    """

    def __init__(self, trainer: Trainer, made_from: Mapping[str, Any], save_minutes: float | None) -> None:
        self.trainer = trainer
        self.made_from = made_from
        self.save_minutes = save_minutes
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.folder = Path(trainer.args.output_dir)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self.needed = 12 * trainable + RESERVE_BYTES  # weights and the two moments of Adam, in float32
        self.pace = Pace(self.needed / DISK_BYTES_PER_SECOND)
        self.saved_at = now()
        self.began: float | None = None  # a save, which is not finished yet
        self.ending = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.load_best_model_at_end and state.best_global_step:
            self._find_best(state)
        if state.is_world_process_zero:
            self._take_away_later_ones(state)
        if args.resume_from_checkpoint:
            self.needed = _size(Path(args.resume_from_checkpoint))
        self.saved_at = now()
        if args.save_strategy != SaveStrategy.NO:
            self._check_space()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # PPO's rollout is in no checkpoint, so that its end is the only place to stop.
        if state.global_step % getattr(args, "steps_per_rollout", 1) == 0 and state.global_step < state.max_steps:
            save, self.ending = self._decide(args)
            control.should_save |= save or self.ending
        self._before_save(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._before_save(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics=None, **kwargs
    ) -> None:
        """Save whatever is the best so far, also between two of `save_steps`.

        Else a save by time that falls on an evaluation would decide which checkpoint can be loaded as the best.
        """
        if not (self.trainer.is_in_train and state.global_step and args.load_best_model_at_end):
            return
        value = (metrics or {}).get(f"eval_{args.metric_for_best_model.removeprefix('eval_')}")
        if value is not None:
            best = state.best_metric
            control.should_save |= best is None or (value > best if args.greater_is_better else value < best)
            self._before_save(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        self.trainer.accelerator.wait_for_everyone()  # each process has its own files in it
        if state.is_world_process_zero:
            without_machine_paths(checkpoint)  # now, since nothing may change after the manifest
            began = now()
            write_manifest(checkpoint, {**self.made_from, "processes": args.world_size})
            logger.info(
                "%s is whole: %.1f MB, hashed in %.2f s", checkpoint.name, _size(checkpoint) / 1e6, now() - began
            )
            rotate(self.folder, self.limit, state.best_model_checkpoint)
        self.trainer.accelerator.wait_for_everyone()  # a process that ends early may take the others with it
        self.needed = _size(checkpoint)
        self.saved_at = now()
        self.pace.save_seconds = self.saved_at - (self.saved_at if self.began is None else self.began)
        self.began = None
        if self.ending:
            raise SessionEnded(
                f"the session ends; it stopped at step {state.global_step} of {state.max_steps}, and {checkpoint.name} "
                "is kept"
            )

    def disk_is_full(self, error: BaseException) -> bool:
        """Whether an error that came up in the training is of a full disk; what it left of a checkpoint is removed."""
        if isinstance(error, RunError | SessionEnded | torch.OutOfMemoryError):
            return False
        # torch says no more than that it could not write.
        full = is_disk_full(error) or self.began is not None and shutil.disk_usage(self.folder).free < self.needed
        if full and self.trainer.is_world_process_zero():
            for checkpoint in checkpoints_in(self.folder):
                if not (checkpoint / MANIFEST).is_file():
                    shutil.rmtree(checkpoint, ignore_errors=True)
        return full

    def no_space(self) -> str:
        """What is said of a full disk."""
        last = next((c.name for c in reversed(checkpoints_in(self.folder)) if (c / MANIFEST).is_file()), None)
        goes_on = f"goes on from {last}, which is as it was" if last else "begins anew; there was no checkpoint yet"
        return (
            f"`output_dir`: the disk of {self.folder} is full: {shutil.disk_usage(self.folder).free:,} bytes are free, "
            f"and a checkpoint needs {self.needed:,}. Make room there (older runs, *.previous), or set "
            f"`save_total_limit` lower, and run the same command again: it {goes_on}."
        )

    def _decide(self, args: TrainingArguments) -> tuple[bool, bool]:
        """Whether to save now, and whether to stop then: by the clock of the first process, for all of them."""
        decision = [False, False]
        if self.save_minutes is not None and args.save_strategy != SaveStrategy.NO:
            decision[0] = now() - self.saved_at >= 60 * self.save_minutes
        decision[1] = self.pace.over()
        timed = self.save_minutes is not None or seconds_left() < float("inf")
        if timed and args.world_size > 1:
            broadcast_object_list(decision)
        return decision[0], decision[1]

    def _before_save(self, control: TrainerControl) -> None:
        # Means since the last log are in no checkpoint: without a log a resumed run would have half of them. What is
        # evaluated may be the best so far, and saved for it.
        control.should_log |= control.should_save or control.should_evaluate
        if control.should_save:
            self.began = now()
            self._check_space()

    def _check_space(self) -> None:
        if self.trainer.is_world_process_zero():
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < self.needed:
                raise RunError(self.no_space())

    def _find_best(self, state: TrainerState) -> None:
        """The best checkpoint, wherever the run lies now; where it is damaged, the next best evaluation counts."""
        best = self.folder / f"checkpoint-{state.best_global_step}"
        if not best.is_dir() and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint)  # of a run in another folder
        found = fault(best)
        state.best_model_checkpoint = str(best)
        if found:
            logger.warning(
                "The best checkpoint so far cannot be loaded: %s %s. The best one is chosen among the evaluations from "
                "here on.", best.name, found,
            )  # fmt: skip
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None

    def _take_away_later_ones(self, state: TrainerState) -> None:
        """Checkpoints beyond the one gone on from: damaged, or of a training that is done anew from here."""
        for checkpoint in checkpoints_in(self.folder):
            if step_of(checkpoint) > state.global_step:
                found = fault(checkpoint) or "is of an earlier training"
                logger.warning(
                    "%s %s; it is taken away, and step %d is next", checkpoint.name, found, state.global_step + 1
                )
                _remove(checkpoint)


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be gone on from, and what is wrong with those after it."""
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        found = fault(checkpoint)
        if found is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name} {found}")
    return None, damaged


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None. All of it is read."""
    manifest = _read_manifest(checkpoint)
    if manifest is None:
        return f"has no {MANIFEST} that can be read, which is written last"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"has no {name}"
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"has a damaged {name}"
    return None


def write_manifest(checkpoint: Path, made_from: Mapping[str, Any]) -> None:
    """Make a checkpoint valid as it is now."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_json(checkpoint / MANIFEST, {**made_from, "files": files})


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete what is no checkpoint, and of the valid ones the oldest beyond `limit`; the newest and the best one stay."""
    whole = [path for path in checkpoints_in(folder) if (path / MANIFEST).is_file()]
    keep = {path for path in whole if best is not None and path.name == Path(best).name} | set(whole[-1:])
    for checkpoint in reversed(whole):
        if limit is None or len(keep) < limit:
            keep.add(checkpoint)
    for checkpoint in checkpoints_in(folder):
        if checkpoint not in keep:
            _remove(checkpoint)


def continue_from(source: Path, target: Path) -> bool:
    """Take the state of a run from a folder that may be read-only; whether something was taken, or it was there already.

    Finished stages are taken without their checkpoints, others with the last valid one and with the best one.

    Raises:
        RunError: if `source` is no run, `target` holds something else, or there is no room for it.
    """
    stages = [
        path.parent for path in sorted(source.glob("*/metadata.json")) if not path.parent.name.endswith(".previous")
    ]
    if not stages:
        runs = sorted({str(path.parents[1]) for path in source.glob("**/sft/metadata.json")})
        raise RunError(
            f"`continue_from`: {source} is not the folder of a run: no folder in it has a metadata.json. "
            + (f"There are runs in {', '.join(runs)}." if runs else "Name the folder that `rlhf run` wrote.")
        )
    origin = {"state": hashlib.sha256(b"".join((s / "metadata.json").read_bytes() for s in stages)).hexdigest()}
    marker = target / CONTINUED
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["state"] == origin["state"]:
        return False
    if target.is_dir() and any(target.iterdir()):
        raise RunError(
            f"`continue_from`: {target} holds another run already, which {source} would be mixed with. Leave "
            "--continue_from away to go on with what is there, or name another --output_dir."
        )
    files = [path for stage in stages for path in _needed_files(stage)]
    size, temporary = sum(path.stat().st_size for path in files), target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if (free := shutil.disk_usage(temporary).free) < size + RESERVE_BYTES:
        temporary.rmdir()
        raise RunError(
            f"`output_dir`: {target.parent} has {free:,} bytes free, and {source} needs {size + RESERVE_BYTES:,}. Make "
            "room there, or name another --output_dir."
        )
    for path in files:
        copy = temporary / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)  # without its mode: the source may be read-only
    write_json(temporary / CONTINUED, {"from": source.name, **origin})
    if target.is_dir():
        target.rmdir()
    temporary.replace(target)
    return True


def _needed_files(stage: Path) -> list[Path]:
    keep: set[Path] = set()
    if (read_record(stage) or {}).get("status") != "done" and (last := last_valid(stage)[0]):
        keep.add(last)
        best = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["best_global_step"]
        keep.add(stage / f"checkpoint-{best}")
    left_out = {path for path in checkpoints_in(stage) if path not in keep}
    paths = [path for path in sorted(stage.rglob("*")) if path.is_file() and not path.name.endswith(".tmp")]
    return [path for path in paths if not left_out & set(path.parents)]


def _check(checkpoint: Path, made_from: Mapping[str, Any], processes: int) -> None:
    """Refuse a checkpoint that is damaged, or that other data, another base or another launch made."""
    if found := fault(checkpoint):
        raise RunError(
            f"`resume_from_checkpoint`: {checkpoint} {found}. Name the checkpoint before; `rlhf run` does so itself."
        )
    manifest = _read_manifest(checkpoint) or {}
    faults = [
        f"it was made with {what} {_short(manifest.get(key))}, and this is {_short(made_from[key])}"
        for key, what in (("stage", "the stage"), ("base", "the base"))
        if manifest.get(key) != made_from[key]
    ]
    theirs, ours = manifest.get("parents", {}), made_from["parents"]
    faults += [
        f"it was made from another {name!r} ({_short(theirs.get(name))}) than the one now there ({_short(ours.get(name))})"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if manifest.get("processes") != processes:
        faults.append(
            f"it has the random numbers of {manifest.get('processes')} processes, and this launch has {processes}; start "
            "as many"
        )
    if faults:
        raise RunError(
            f"`resume_from_checkpoint`: {checkpoint} does not belong to this training: {'; '.join(faults)}. Train it with "
            "what it was made from, or begin anew without `resume_from_checkpoint`."
        )


def _short(value: Any) -> str:
    return repr(value[:12] if isinstance(value, str) and len(value) == 64 else value)


def _read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # first: a part of it is no checkpoint
    shutil.rmtree(checkpoint)
