"""`rlhf run`: the stages of a recipe in order, each skipped when its record says it is done."""

import importlib
import logging
import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from evaluation.report import write_report
from rlhf import launching
from rlhf.check import FILES, preflight
from rlhf.checkpoints import continue_from as take_over
from rlhf.checkpoints import last_valid
from rlhf.config import STAGES, ConfigError, did_you_mean, dumps, load_recipe, num_gpus, parse, values_of
from rlhf.files import folder_hash, source_hash
from rlhf.ledger import price_again, prices_of
from rlhf.out_of_memory import sizes_of, take_report
from rlhf.record import RunError, base_hash, movable, read_record
from rlhf.session import STATUS, SessionEnded, seconds_left, session

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
    "max_skipped_steps", "logging_nan_inf_filter", "save_minutes", "rate_per_gpu_hour", "storage_price",
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
    session_budget: str | None = None,
    continue_from: str | Path | None = None,
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
        session_budget: As "11h", "90m" or "3600s" from now: what is running then stops before, and is kept.
        continue_from: Folder of a run of another session, which may be read-only: its state is taken into the run's
            folder first.
        **overrides: `key=value` for every stage that knows the key, `"stage.key"=value` for one.

    Returns:
        The run's folder.

    Raises:
        ConfigError: with everything that is wrong in any stage, before the first one starts.
        RunError: if a stage cannot start or fails.
        SessionEnded: when the budget is used up, with the command that goes on.
    """
    recipe = Path(recipe)
    root = Path(output_dir) if output_dir is not None else Path("runs") / recipe.resolve().name
    steps = plan(recipe, tiny, until, root, overrides)
    try:
        with session(session_budget):
            if continue_from is not None:
                taken = take_over(Path(continue_from), root)
                say(f"{'continue':9} {root} {'is taken from' if taken else 'was taken already from'} {continue_from}")
                _refuse_anew(steps, Path(continue_from))
            for step in steps:
                run_step(step, say)
    except SessionEnded as ended:
        command = _command(recipe, tiny, until, output_dir, session_budget, overrides)
        raise SessionEnded(f"{ended}\n{_how_to_go_on(command, root)}") from ended
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
    with launching.no_cuda_context():
        step = replace(step, configs=parse(config_classes(step.stage), step.argv, step.stage))
    reason, resume = _state(step)
    if reason is None:
        price_again(step.folder, prices_of(step.configs))
        say(f"{name:9} done: {step.folder} is from these settings and inputs")
        return
    if seconds_left() <= 0:  # before anything is moved to make room
        raise SessionEnded(f"{name:9} waits: the session ends")
    if reason.startswith(ANEW):
        if step.stage in FILES:
            preflight(step.stage, step.configs)  # a stage that would be refused leaves the finished one in its place
        reason += _set_aside(step.folder)
    say(f"{name:9} {reason}")
    while True:
        try:
            _start(step, resume)
            break
        except SessionEnded as ended:  # of this process; one of another process stands in the record
            raise SessionEnded(f"{name:9} {ended}") from ended
        except RuntimeError:
            changed = take_report(step.folder, sizes_of(values_of(step.configs)))
            if changed is None:  # another failure, or nothing is left to make smaller
                raise
        reason, resume = _state(step)
        say(f"{name:9} ran out of memory; {reason}, with {changed}")
    record = read_record(step.folder)
    if record is not None and record["status"] == STATUS:
        raise SessionEnded(f"{name:9} {record['stopped']}")
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
        argv += [f"--{key}={_as_word(value)}" for key, value in moved.items()]
        try:
            with launching.no_cuda_context():
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


def _as_word(value: Any) -> str:
    """A value as the command line has it."""
    if not isinstance(value, str):
        value = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return value.removesuffix("\n").removesuffix("...").strip()


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
    for key, known in record.get("sources", {}).items():
        # A finished run may lie where its sources do not.
        if source_hash(values[key]) not in (None, known):
            return f"{ANEW}: {Path(values[key]).name} changed", None
    base = values.get("model_name_or_path")
    if base is not None and record.get("base_hash") != base_hash(base):
        return f"{ANEW}: the base's weights changed", None
    if record["status"] == "done" and record.get("result_hash") in (None, folder_hash(step.folder)):
        return None, None
    if record["status"] == "done":
        return f"{ANEW}: its files are not those it made", None
    why = "the session before ended" if record["status"] == STATUS else "it was interrupted"
    if any(step.folder.glob("*/settings.json")):
        return f"goes on: {why}, and finished systems and batches stay", None
    if (step.folder / "sampling.json").is_file():
        return f"goes on: {why}, and the replies that were sampled stay", None
    if (step.folder / "checkpoint.pt").is_file():
        return f"goes on from checkpoint.pt: {why}", None
    checkpoint, damaged = last_valid(step.folder)
    left_out = "".join(f"; {fault}, so it is left out" for fault in damaged)
    if checkpoint is None:
        what = "it has no whole checkpoint" if damaged else "it stopped before its first checkpoint"
        return f"runs again: {what} (status {record['status']!r}){left_out}", None
    return f"goes on from {checkpoint.name}: {why}{left_out}", str(checkpoint)


def _refuse_anew(steps: list[Step], source: Path) -> None:
    """What was taken over is gone on with, and never silently made anew.

    Raises:
        RunError: naming what differs from the session before.
    """
    for step in steps:
        with launching.no_cuda_context():
            step = replace(step, configs=parse(config_classes(step.stage), step.argv, step.stage))
        reason, _ = _state(step)
        if reason is None:
            continue
        if not reason.startswith(ANEW):
            return  # it goes on, or begins; those after it are made from it
        raise RunError(
            f"`continue_from`: the stage {step.stage!r} of {source} cannot be gone on with: {reason.split(': ', 1)[1]}. "
            "Give what the session before had, or leave --continue_from away: the stage then runs anew."
        )


def _command(
    recipe: Path,
    tiny: bool,
    until: str | None,
    output_dir: str | Path | None,
    budget: str | None,
    overrides: Mapping[str, Any],
) -> list[str]:
    """The words of the command line that goes on."""
    words = ["rlhf", "run", str(recipe), *(["--tiny"] if tiny else []), *(["--until", until] if until else [])]
    words += ["--output_dir", str(output_dir)] if output_dir is not None else []
    words += [word for name, value in overrides.items() for word in ("--set", f"{name}={_as_word(value)}")]
    return words + (["--session_budget", budget] if budget else [])


def _how_to_go_on(command: list[str], root: Path) -> str:
    told = f"To go on:\n    {shlex.join(command)}"
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        return told
    # Kaggle keeps /kaggle/working as the version's output, which lies below /kaggle/input/<notebook> where it is added.
    there = Path("/kaggle/input/NOTEBOOK") / os.path.relpath(root, "/kaggle/working")
    return (
        f"{told}\nin this session. In a new one: save the version (Save Version; in a commit it is saved by itself), "
        "open the notebook again, add its output as an input (Add Input, Your Work), and run\n"
        f"    {shlex.join([*command, '--continue_from', str(there)])}\n"
        "with the name that the input has there in place of NOTEBOOK."
    )


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
    if step.stage == "prepare" or not torch.cuda.is_available():
        module = importlib.import_module(MODULES[step.stage])
        module.main(*parse(config_classes(step.stage), argv, step.stage))
        return
    # What loads a model never shares this process: its memory on a card would be missing in the next stage.
    gpus = 1 if step.stage in ("base", "pairs") else num_gpus(values_of(step.configs))
    script = [importlib.import_module(MODULES[step.stage]).__file__ or ""]
    if step.stage == "evaluate":
        script = ["-m", "evaluation", "run"]
    try:
        status = launching.start([*script, *argv], gpus)
    except launching.LaunchError as error:
        raise RunError(f"The stage {step.stage!r} was not started. {error}") from error
    if status:
        raise RunError(f"The stage {step.stage!r} failed; see {step.folder / 'training.log'}.")
