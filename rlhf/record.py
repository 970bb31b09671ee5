"""The record of a run: its folder, log file, resolved configuration, parents, time and cost."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from rlhf.config import ConfigError, exit_with, parse, save
from rlhf.model import hardware

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class RunError(RuntimeError):
    """A stage cannot start: a parent is missing, stale or foreign, or the launch is not what it seems."""


@contextlib.contextmanager
def stage(
    name: str,
    output_dir: str | Path,
    configs: Sequence[Any],
    seed: int,
    log_level: str = "info",
    parents: Mapping[str, str | Path] | None = None,
    rate_per_gpu_hour: float = 0.35,
) -> Iterator[dict[str, Any]]:
    """Run a stage inside its folder: log file, `config.yaml` and `metadata.json` are written and kept true.

    Args:
        name: The stage (prepare, base, sft, reward, dpo, ppo, evaluate).
        output_dir: The stage's folder, created when needed.
        configs: The resolved configuration objects, written to `config.yaml`.
        seed: Of the run.
        log_level: Level of the console and of `training.log`.
        parents: The folders this stage reads, by stage name; each is named in the record with its hash.
        rate_per_gpu_hour: In dollars, for the cost of the stage.

    Yields:
        The record, to which the stage may add what it measured. It becomes `metadata.json`.

    Raises:
        RunError: if a parent is missing, unfinished, or made from something else than it is used with.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    main = PartialState().is_main_process
    set_seed(seed)  # before a model is loaded: a new score head is random
    handler = _log_to(folder / "training.log", log_level, main)
    began = time.perf_counter()
    record: dict[str, Any] = {
        "stage": name,
        "status": "running",
        "started": _now(),
        "git_commit": git_commit(),
        "seed": seed,
        "versions": versions(),
        "hardware": {**hardware(), "processes": PartialState().num_processes},
        "parents": {key: _parent(key, Path(path), folder) for key, path in (parents or {}).items()},
    }
    if "prepare" in record["parents"]:
        record["data_hash"] = record["parents"]["prepare"]["hash"]
    try:
        if main:
            save(configs, folder / "config.yaml")
            write_json(folder / "metadata.json", record)
        yield record
        record["status"] = "done"
    except BaseException as error:
        record["status"] = "failed"
        record["error"] = f"{type(error).__name__}: {error}"[:500]
        raise
    finally:
        seconds = time.perf_counter() - began
        gpu_hours = seconds / 3600 * PartialState().num_processes if torch.cuda.is_available() else 0.0
        record["finished"] = _now()
        record["wall_seconds"] = round(seconds, 1)
        record["peak_memory_gb"] = round(_peak_memory_gb(), 2)
        record["cost"] = {
            "gpu_hours": round(gpu_hours, 4),
            "rate_per_gpu_hour": rate_per_gpu_hour,
            "total": round(gpu_hours * rate_per_gpu_hour, 4),
        }
        if main:
            write_json(folder / "metadata.json", record)
        logging.getLogger().removeHandler(handler)
        handler.close()


def launch(main: Callable[..., None], config_classes: Sequence[type], stage_name: str) -> None:
    """Run a script: parse the command line, call `main`; what the user can mend ends in a message, not a traceback."""
    try:
        main(*parse(config_classes, stage=stage_name))
    except (ConfigError, RunError) as error:
        exit_with(error)


def check_world_size(args: TrainingArguments) -> None:
    """Refuse a launch in which several processes were started that do not know of each other.

    Each would train a model of its own and overwrite the others' files.

    Raises:
        RunError: if WORLD_SIZE, as the launcher set it, is not the world size that the trainer will use.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise RunError(
            f"The launcher started {launched} processes (WORLD_SIZE), but the trainer sees a world of "
            f"{args.world_size}. On a machine without GPUs set `use_cpu: true`; with GPUs start as many processes as "
            "there are GPUs, with one of accelerate_configs/*.yaml."
        )


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The `metadata.json` of a stage's folder, or None where there is none."""
    path = Path(folder) / "metadata.json"
    return json.loads(path.read_text()) if path.is_file() else None


def folder_hash(folder: Path) -> str:
    """SHA-256 by which a stage's result is named: of its adapter or model, or of its rows where it made data."""
    paths = [p for p in (folder / "adapter_model.safetensors", folder / "model.safetensors") if p.is_file()]
    paths = paths or sorted(p for p in folder.glob("*.jsonl") if p.name != "rejected.jsonl")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+changes" where the tree differs from it."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or git is not there
    return commit.strip() + ("+changes" if changes.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in PACKAGES}}


def _parent(name: str, path: Path, child: Path) -> dict[str, Any]:
    record = read_record(path)
    if record is None:
        raise RunError(
            f"The stage {name!r} is needed and there is none in {path}. Run it first: "
            f"`rlhf run recipes/<name> --until {name}`, or its script with the recipe's {name}.yaml."
        )
    if record["status"] != "done":
        raise RunError(
            f"The stage {name!r} in {path} is not finished (status {record['status']!r}). Run it again; it goes on "
            "from its last checkpoint."
        )
    current = folder_hash(path)
    if record.get("result_hash", current) != current:
        raise RunError(
            f"The files in {path} are not those that its record names (hash {current[:12]}, recorded "
            f"{record['result_hash'][:12]}). Run the stage {name!r} again."
        )
    for ancestor, link in record.get("parents", {}).items():
        there = path / link["path"]
        if there.is_dir() and folder_hash(there) != link["hash"]:
            raise RunError(
                f"The stage {name!r} in {path} is stale: it was made from another {ancestor!r} than the one now in "
                f"{there}. Run the stage {name!r} again."
            )
    return {"path": os.path.relpath(path, child), "hash": current}


def _peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def _log_to(path: Path, level: str, main: bool) -> logging.Handler:
    """Log to the console (the main process alone) and append to `path`, with time and level."""
    root = logging.getLogger()
    level = "info" if level == "passive" else level  # the Trainer's word for "as the application has it"
    root.setLevel(level.upper() if main else logging.ERROR)
    if not any(type(handler) is logging.StreamHandler for handler in root.handlers):
        root.addHandler(logging.StreamHandler())
    handler: logging.Handler = logging.FileHandler(path) if main else logging.NullHandler()
    for each in (*root.handlers, handler):
        each.setFormatter(logging.Formatter(LOG_FORMAT))
    root.addHandler(handler)
    for noisy in ("httpx", "datasets", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return handler


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
