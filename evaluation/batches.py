"""A model's work in batches: each is kept as soon as it is done, and the processes of a launch share them.

What a batch holds depends on the items and its size alone, not on what was there before or on who computes it. So an
evaluation that was killed and goes on, and one by two processes, give the numbers of a single undisturbed one. The
processes meet in files: on several machines they need one file system.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from rlhf.files import write_json, write_text
from rlhf.record import RunError
from rlhf.session import Pace, SessionEnded

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# (task, items, length of an item, what gives a result for each item of a batch) -> a result for each item
Work = Callable[[str, Sequence[Any], Callable[[Any], int], Callable[[list[Any], int], Sequence[Any]]], list[Any]]

RESULTS = "results.json"  # written last: where it is, a system is finished
PROGRESS = "progress"


def processes() -> PartialState:
    """The processes of this launch, on the CPU where there is no GPU.

    Raises:
        RunError: when several were started that do not know of each other.
    """
    state = PartialState(cpu=not torch.cuda.is_available())  # left to itself, each rank on a CPU takes itself for all
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RunError(
            f"The launcher started {launched} processes (WORLD_SIZE), but they see a world of {state.num_processes}. "
            "Start as many as there are GPUs, with one of accelerate_configs/*.yaml."
        )
    return state


def begin(folder: Path, settings: Row) -> bool:
    """Whether a system is finished from these settings. What others left in its folder is taken away.

    Args:
        folder: of the system.
        settings: all that its results depend on, as JSON has it.
    """
    state, path = processes(), folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    finished = there == settings and (folder / RESULTS).is_file()
    state.wait_for_everyone()  # all have read, before one writes
    if state.is_main_process and there != settings:
        if folder.is_dir():
            logger.info("%s starts anew: %s", folder.name, _changes(there, settings))
        for stale in (folder / RESULTS, *folder.glob("*.jsonl")):
            stale.unlink(missing_ok=True)
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
        write_json(path, settings)
    state.wait_for_everyone()
    if finished:
        logger.info("%s is finished from these settings, and stays", folder.name)
    return finished


def _changes(there: Row | None, settings: Row) -> str:
    if there is None:
        return "what is there does not say what it was made from"
    changed = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
    return ", ".join(f"{key}: {_shown(there.get(key))} -> {_shown(settings.get(key))}" for key in changed)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def in_batches(
    folder: Path,
    batch_size: int,
    task: str,
    items: Sequence[Any],
    length: Callable[[Any], int],
    compute: Callable[[list[Any], int], Sequence[Any]],
) -> list[Any]:
    """A result for each item, in their order; batches whose results are in `folder` are not computed again.

    Args:
        folder: where the results of each batch are kept.
        batch_size: items of like length that are computed together.
        task: names the batches, once in a folder.
        items: what is computed from.
        length: of an item, by which they are sorted.
        compute: from the items of a batch, and the place of its first one among all as they are sorted, to results that
            JSON can hold.
    """
    order = sorted(range(len(items)), key=lambda index: length(items[index]), reverse=True)  # the largest fails first
    paths = {start: folder / f"{task}-{start:07d}.json" for start in range(0, len(order), batch_size)}
    missing = [start for start, path in paths.items() if not path.is_file()]
    state = processes()
    if len(missing) < len(paths):
        logger.info("%s goes on: %d of %d batches are there", task, len(paths) - len(missing), len(paths))
    state.wait_for_everyone()  # else a slow rank would not miss what a fast one has just made
    pace = Pace()
    for start in missing[state.process_index :: state.num_processes]:
        if pace.over():
            break
        batch = [items[index] for index in order[start : start + batch_size]]
        write_text(paths[start], json.dumps(list(compute(batch, start)), allow_nan=False))
    state.wait_for_everyone()
    if left := sum(not path.is_file() for path in paths.values()):  # which all processes see alike
        raise SessionEnded(f"the session ends; {left} of {len(paths)} batches of {task} are left")
    results: list[Any] = [None] * len(items)
    for start, path in paths.items():
        found = json.loads(path.read_text(encoding="utf-8"))
        for index, result in zip(order[start : start + batch_size], found, strict=True):
            results[index] = result
    return results


def finish(folder: Path, results: Row) -> None:
    """Write the results of a system, after everything else of it, and take its batches away."""
    write_json(folder / RESULTS, results)
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
