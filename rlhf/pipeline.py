"""`rlhf run`: the stages of a recipe in order, each skipped when its record says it is done."""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from evaluation.report import write_report
from rlhf.check import FILES, preflight
from rlhf.config import STAGES, ConfigError, did_you_mean, dumps, load_recipe, num_gpus, parse, values_of
from rlhf.files import folder_hash
from rlhf.record import RunError, base_hash, movable, read_record

logger = logging.getLogger(__name__)

# Where each stage's `main` and the names of its configuration classes are. Imported when the stage's turn comes.
MODULES = {
    "prepare": "rlhf.prepare",
    "base": "rlhf.pretrain",
    "sft": "rlhf.sft",
    "reward": "rlhf.reward",
    "pairs": "rlhf.pairs",
    "dpo": "rlhf.dpo",
    "ppo": "rlhf.ppo",
    "evaluate": "evaluation.run",
}

ANEW = "runs anew"  # begins the reason where what was there has to make room
# Settings that cannot change what a stage makes.
BOOKKEEPING = (
    "output_dir", "resume_from_checkpoint", "log_level", "report_to", "run_name", "disable_tqdm",
    "max_skipped_steps", "logging_nan_inf_filter",
)  # fmt: skip


@dataclass
class Step:
    """One stage of a recipe: its command line, and the folder it writes."""

    stage: str
    argv: list[str]
    configs: tuple[Any, ...]
    folder: Path


def run(
    recipe: str | Path,
    tiny: bool = False,
    until: str | None = None,
    output_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> Path:
    """Run the stages of a recipe; what is done stays, what was interrupted goes on from its last checkpoint.

    On a CPU all stages share this process, since importing the stack takes seconds each time. With GPUs each stage
    is a process of its own, or one a GPU, started through accelerate.

    Args:
        recipe: Folder with recipe.yaml and a file a stage.
        tiny: Whether to lay tiny.yaml over it, which runs the whole of it on a CPU.
        until: Last stage to run.
        output_dir: In place of `runs/<recipe>`.
        say: Where the lines about the stages go.
        **overrides: `key=value` for every stage that knows the key, `"stage.key"=value` for one.

    Returns:
        The run's folder.

    Raises:
        ConfigError: with everything that is wrong in any stage, before the first one starts.
        RunError: if a stage cannot start or fails.
    """
    recipe = Path(recipe)
    root = Path(output_dir) if output_dir is not None else Path("runs") / recipe.resolve().name
    steps = plan(recipe, tiny, until, root, overrides)
    for step in steps:
        run_step(step, say)
    if steps and steps[-1].stage == "evaluate":
        page = write_report([root], root / "report")
        say(f"report    {page}")
    return root


def run_step(step: Step, say: Callable[[str], None] = print) -> None:
    """Run one stage if it has to be run, and say why.

    Raises:
        RunError: if it cannot start or does not finish.
    """
    name = step.folder.name
    # Again: a plan by size goes by rows that an earlier stage may have made since the steps were planned.
    step = replace(step, configs=parse(config_classes(step.stage), step.argv, step.stage))
    reason, resume = _state(step)
    if reason is None:
        say(f"{name:9} done: {step.folder} is from these settings and inputs")
        return
    if reason.startswith(ANEW):
        if step.stage in FILES:
            preflight(step.stage, step.configs)  # a stage that would be refused leaves the finished one in its place
        reason += _set_aside(step.folder)
    say(f"{name:9} {reason}")
    _start(step, resume)
    record = read_record(step.folder)
    if record is None or record["status"] != "done":
        raise RunError(f"The stage {step.stage!r} did not finish; see {step.folder / 'training.log'}.")
    say(f"{name:9} finished in {record['wall_seconds']:.0f} s -> {step.folder}")


def plan(recipe: Path, tiny: bool, until: str | None, root: Path, overrides: Mapping[str, Any]) -> list[Step]:
    """The stages with their command lines, all configurations parsed and checked.

    Raises:
        ConfigError: with the problems of all stages together.
    """
    stages = [stage for stage in STAGES if (recipe / f"{stage}.yaml").is_file()]
    if not stages:
        there = ", ".join(sorted(path.parent.name for path in recipe.parent.glob("*/recipe.yaml")))
        raise ConfigError(
            [f"`{recipe}`: is no recipe: it has no file for any stage; there are {there or 'none here'}"]
        )
    if until is not None and until not in stages:
        raise ConfigError([f"`until`: {until!r}: this recipe has the stages {', '.join(stages)}"])
    if tiny and not (recipe / "tiny.yaml").is_file():
        raise ConfigError([f"`tiny`: {recipe} has no tiny.yaml"])
    problems: list[str] = []
    steps: list[Step] = []
    used: set[str] = set()
    every: set[str] = set()
    trained_base: Path | None = None
    for stage in stages:
        files = [recipe / f"{stage}.yaml", *([recipe / "tiny.yaml"] if tiny else [])]
        classes = config_classes(stage)
        known = {field.name for cls in classes for field in fields(cls)}
        every |= known
        values = {key: value for file in files for key, value in load_recipe(file, stage).items()}
        moved = _moved(values, recipe.resolve(), root)
        if trained_base is not None and "model_name_or_path" in known:
            moved["model_name_or_path"] = str(trained_base)
        for name, value in overrides.items():
            target, _, key = name.rpartition(".")
            if target in ("", stage) and (target or key in known):
                moved[key] = value
                used.add(name)
        argv = [word for file in files for word in ("--config", str(file))]
        for key, value in moved.items():
            text = (
                value
                if isinstance(value, str)
                else yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
            )
            argv += [f"--{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"]
        try:
            configs = parse(classes, argv, stage, before_prepare="prepare" in stages)
        except ConfigError as error:
            problems += [f"{stage}: {problem}" for problem in error.problems]
            continue
        folder = Path(next(config.output_dir for config in configs if hasattr(config, "output_dir")))
        steps.append(Step(stage, argv, configs, folder))
        if stage == "base" and configs[0].retrain:
            trained_base = folder
    problems += [_unknown(name, stages, every) for name in overrides if name not in used]
    if problems:
        raise ConfigError(problems)
    last = stages.index(until) if until else len(stages)
    datasets = [values_of(step.configs).get("dataset") for step in steps]
    read = {Path(dataset) for dataset in datasets if dataset}
    # Pairs are sampled where they are asked for, or a stage trains on them.
    return [
        step
        for step in steps
        if stages.index(step.stage) <= last and (step.stage != "pairs" or until == "pairs" or step.folder in read)
    ]


def config_classes(stage: str) -> tuple[type, ...]:
    """The dataclasses that configure a stage: those that its `main` takes, in order."""
    main = importlib.import_module(MODULES[stage]).main
    return tuple(hint for name, hint in main.__annotations__.items() if name != "return")


def _unknown(name: str, stages: list[str], known: set[str]) -> str:
    """What is wrong with a name that no stage took."""
    target, _, key = name.rpartition(".")
    if target and target not in stages:
        return f"`{name}` (--set): no stage {target!r}{did_you_mean(target, stages)}; there are {', '.join(stages)}"
    return f"`{name}` (--set): no stage of this recipe knows it{did_you_mean(key, known)}"


def _moved(values: Mapping[str, Any], recipe: Path, root: Path) -> dict[str, Any]:
    """The values that name a folder of this run, with the run's actual folder; of a mapping its keys too."""
    old = f"runs/{recipe.name}"

    def move(value: Any, inside: bool = False) -> Any:
        if isinstance(value, dict):
            return {move(key, True): move(item, True) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        if inside and value.startswith(("./", "../")):  # on a command line it would be of the current directory
            return os.path.normpath(recipe / value)
        return re.sub(rf"^{re.escape(old)}(?=/|$)", str(root), value)

    return {key: move(value) for key, value in values.items() if move(value) != value}


def _state(step: Step) -> tuple[str | None, str | None]:
    """Why the stage has to run (None: it need not), and the checkpoint it goes on from."""
    record = read_record(step.folder)
    if record is None:
        return "runs: nothing was made yet", None
    changes = _changes(step, record)
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        return f"{ANEW}: its settings changed ({', '.join(changes[:3])}{more})", None
    values = values_of(step.configs)
    for name, parent in record["parents"].items():
        folder = (values.get("systems") or {}).get(name) or step.folder / parent["path"]
        if folder_hash(folder) != parent["hash"]:
            return f"{ANEW}: {name!r} changed", None
    base = values.get("model_name_or_path")
    if base is not None and record.get("base_hash") != base_hash(base):
        return f"{ANEW}: the base's weights changed", None
    if record["status"] == "done" and record.get("result_hash") in (None, folder_hash(step.folder)):
        return None, None
    if record["status"] == "done":
        return f"{ANEW}: its files are not those it made", None
    if any(step.folder.glob("*/settings.json")):
        return "goes on: it was interrupted, and finished systems and batches stay", None
    if (step.folder / "checkpoint.pt").is_file():
        return "goes on from checkpoint.pt: it was interrupted", None
    checkpoint, damaged = _last_whole_checkpoint(step.folder)
    left_out = "".join(f"; {fault}, so it is left out" for fault in damaged)
    if checkpoint is None:
        what = "it has no whole checkpoint" if damaged else "it stopped before its first checkpoint"
        return f"runs again: {what} (status {record['status']!r}){left_out}", None
    return f"goes on from {checkpoint.name}: it was interrupted{left_out}", str(checkpoint)


def _last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that the Trainer can go on from, and what is wrong with those after it.

    A process that is killed while it writes leaves a part of a checkpoint, and the Trainer would fail of it.
    """
    damaged: list[str] = []
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name} {fault}")
    return None, damaged


def _fault(checkpoint: Path) -> str | None:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "has no trainer_state.json that can be read"
    # DeepSpeed keeps the optimizer in a folder of its own, which it names in `latest`.
    optimizer = () if (checkpoint / "latest").is_file() else ("optimizer.pt", "scheduler.pt")
    for pattern in (*optimizer, "rng_state*.pth", "*model.safetensors", "*.safetensors"):
        paths = list(checkpoint.glob(pattern))
        if not paths:
            return f"has no {pattern}"
        for path in paths:
            if not _is_whole(path):
                return f"has a damaged {path.name}"
    return None


def _is_whole(path: Path) -> bool:
    """By the end of the file, without loading it: torch writes zip archives, whose directory is at the end."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def _changes(step: Step, record: Mapping[str, Any]) -> list[str]:
    """The settings that are not those of the record, as "ppo.kl_coef: 0.05 -> 0.1"."""
    path = step.folder / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        saved = None
    if not isinstance(saved, dict):
        return [f"{path} cannot be read"]
    now = yaml.safe_load(dumps(movable(step.configs, step.folder)))
    for values in (saved, now):
        for key in (*BOOKKEEPING, *(["model_name_or_path"] if record.get("base_hash") else [])):
            values.pop(key, None)  # the base goes by its hash, where it has one
        if values.get("systems"):  # their folders are parents, which go by their hashes
            values["systems"] = {name: folder is not None for name, folder in values["systems"].items()}

    def shown(values: Mapping[str, Any], key: str) -> str:
        return textwrap.shorten(str(values[key]), 40, placeholder="...") if key in values else "not there"

    keys = [key for key in {**saved, **now} if key not in saved or key not in now or saved[key] != now[key]]
    return [f"{step.stage}.{key}: {shown(saved, key)} -> {shown(now, key)}" for key in keys]


def _set_aside(folder: Path) -> str:
    previous = folder.with_name(folder.name + ".previous")
    older = f" (the older {previous} is deleted)" if previous.exists() else ""
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)
    return f"; what was there moves to {previous}{older}"


def _start(step: Step, resume: str | None) -> None:
    argv = [*step.argv, *([f"--resume_from_checkpoint={resume}"] if resume else [])]
    gpus = num_gpus(values_of(step.configs))
    single = step.stage in ("prepare", "base", "pairs") or (step.stage == "evaluate" and gpus == 1)
    if single or not torch.cuda.is_available():
        module = importlib.import_module(MODULES[step.stage])
        module.main(*parse(config_classes(step.stage), argv, step.stage))
        return
    script = [importlib.import_module(MODULES[step.stage]).__file__ or ""]
    if step.stage == "evaluate":
        script = ["--module", "evaluation", "run"]
    kind = ["--multi_gpu"] if gpus > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *kind, "--num_processes", str(gpus)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *script, *argv]
    logger.info("%s", " ".join(command))
    if subprocess.run(command, check=False).returncode:
        raise RunError(f"The stage {step.stage!r} failed; see {step.folder / 'training.log'}.")
