"""The record of a run: its folder, log file, resolved configuration, parents, time and cost."""

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import string
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from rlhf.config import PATHS, STAGES, ConfigError, exit_with, parse, save, values_of
from rlhf.files import folder_hash, git_commit, is_disk_full, versions, write_json, write_text
from rlhf.ledger import Ledger, prices_of
from rlhf.model import hardware
from rlhf.out_of_memory import EXIT_STATUS, is_out_of_memory, report
from rlhf.session import STATUS, SessionEnded

logger = logging.getLogger(__name__)

# The record knows a base by its weights; PEFT goes by its path, which is another from each directory.
warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# What made a folder, by what it is used as; any other use is that of a model which replies.
KINDS = {"prepare": ("prepare", "pairs"), "reward": ("reward",)}
POLICIES = ("sft", "dpo", "ppo")


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
    preflight: Callable[[], object] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Run a stage inside its folder: log file, `config.yaml` and `metadata.json` are written and kept true.

    Args:
        name: The stage (prepare, base, sft, reward, dpo, ppo, evaluate).
        output_dir: The stage's folder, created when needed.
        configs: The resolved configuration objects, written to `config.yaml`; the cost goes by the prices in them.
        seed: Of the run.
        log_level: Level of the console and of `training.log`.
        parents: The folders this stage reads, by stage name; each is named in the record with its hash.
        preflight: Raises a RunError where the stage is not fit to start. Called before anything is written, so that a
            stage that is refused leaves the folder as it was.

    Yields:
        The record, to which the stage may add what it measured. It becomes `metadata.json`.

    Raises:
        RunError: if a parent is missing, unfinished, or made from something else than it is used with.
    """
    folder = Path(output_dir)
    asked = values_of(configs)  # now: a trainer may change its own, as where a batch does not fit
    base = asked.get("model_name_or_path")
    links = _parents(parents or {}, folder, base)
    main = PartialState().is_main_process
    earlier = read_record(folder) or {"stage": None}
    goes_on = earlier["stage"] == name and (earlier["status"] != "done" or bool(asked.get("resume_from_checkpoint")))
    ledger = Ledger(folder, earlier if goes_on else None, prices_of(configs))
    early = _log(log_level, main)
    try:
        preflight()
    finally:
        logging.getLogger().removeHandler(early)
    folder.mkdir(parents=True, exist_ok=True)
    handler = _log_to(folder / "training.log", early, main)
    set_seed(seed)  # before a model is loaded: a new score head is random
    record: dict[str, Any] = {
        "stage": name,
        "status": "running",
        "started": _now(),
        "git_commit": git_commit(),
        "seed": seed,
        "versions": versions(),
        "hardware": {**hardware(), "processes": PartialState().num_processes},
        "parents": links,
        **({"model_name_or_path": base_from(base, folder), "base_hash": base_hash(base)} if base else {}),
    }
    if "prepare" in record["parents"]:
        record["data_hash"] = record["parents"]["prepare"]["hash"]
        made_of = read_record((parents or {})["prepare"]) or {}
        record |= {key: made_of[key] for key in ("persona",) if key in made_of}  # of a card
    try:
        if main:
            save(movable(configs, folder), folder / "config.yaml")
            ledger.update(record)
            write_json(folder / "metadata.json", record)
        with ledger.heartbeat(record) if main else contextlib.nullcontext():
            yield record
        record["status"] = "done"
    except SessionEnded as ended:
        record["status"] = STATUS
        record["stopped"] = str(ended)
        logger.info("%s", ended)
        raise
    except BaseException as error:
        if is_out_of_memory(error):  # by whichever rank it was
            report(folder, asked, error, PartialState().process_index)
        record["status"] = "failed"
        record["error"] = f"{type(error).__name__}: {error}"[:500]
        trace = None if isinstance(error, RunError) else sys.exc_info()
        # To the file alone: the console gets the message from whoever catches the error.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, record["error"], (), trace))
        if trace:
            error.add_note(f"The traceback is in {folder / 'training.log'}.")
        if is_disk_full(error):
            raise RunError(_disk_full(folder)) from error
        raise
    finally:
        record["finished"] = _now()
        ledger.update(record)
        if main:
            _close(folder, record)
        logging.getLogger().removeHandler(handler)
        handler.close()


def _close(folder: Path, record: Mapping[str, Any]) -> None:
    try:
        write_json(folder / "metadata.json", record)
        without_machine_paths(folder)
        if (folder / "adapter_config.json").is_file():
            write_text(folder / "MODEL_CARD.md", model_card(record))
    except OSError as error:
        if not is_disk_full(error):
            raise
        if record["status"] == "done":
            raise RunError(_disk_full(folder)) from error
        logger.error(
            "The disk is full, so that the record says no more than that the stage began."
        )  # beside the cause


def _disk_full(folder: Path) -> str:
    return (
        f"`output_dir`: the disk of {folder} is full: {shutil.disk_usage(folder).free:,} bytes are free. Make room there "
        "(older runs, *.previous), and run the same command again: it goes on from what was whole."
    )


def launch(
    main: Callable[..., None], config_classes: Sequence[type], stage_name: str, argv: Sequence[str] | None = None
) -> None:
    """Run a script: parse the command line, call `main`; an error ends in a message, as [`exit_or_raise`] has it."""
    try:
        with contextlib.suppress(
            SessionEnded
        ):  # told by the log and the record; not a failure, for which ranks are killed
            main(*parse(config_classes, argv, stage_name))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost call; what it cannot tell it raises
        if is_out_of_memory(error):
            _exit_out_of_memory(error)
        exit_or_raise(error)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Else gloo's threads may outlive the interpreter, and a rank that is done aborts ("terminate called").
        torch.distributed.destroy_process_group()


def _exit_out_of_memory(error: BaseException) -> NoReturn:
    """End this process with the error's message and a status of its own.

    One of several ranks ends at once: the others wait for it in an exchange until the launcher ends them, which it does
    when this one is gone, while the interpreter's way out may wait for them.
    """
    sys.stderr.write("\n".join([f"error: {type(error).__name__}: {error}", *getattr(error, "__notes__", [])]) + "\n")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stderr.flush()
        logging.shutdown()
        os._exit(EXIT_STATUS)
    raise SystemExit(EXIT_STATUS)


def exit_or_raise(error: BaseException) -> NoReturn:
    """End the process with the error's message and status 2, where its traceback stands in a log or is of no use.

    A defect outside of any stage has no log, so it is raised again.
    """
    notes = getattr(error, "__notes__", [])  # from `stage`: where the traceback is
    if not (notes or isinstance(error, RunError | ValueError | OSError)):
        raise error
    told = str(error) if isinstance(error, RunError | ConfigError) else f"{type(error).__name__}: {error}"
    exit_with(RunError("\n".join([told.removesuffix(": "), *notes])))


def check_world_size(args: TrainingArguments) -> None:
    """Refuse a launch that is not what it seems.

    Several processes that do not know of each other would each train a model of its own and overwrite the others'
    files. One process on several GPUs would be split by `nn.DataParallel`, whose losses are wrong
    (https://github.com/huggingface/transformers/issues/40799), and which TRL refuses once the base is loaded.
    Under ZeRO-3 a rank holds a part of each weight, and all must compute what one does: the first rank, which samples
    replies and saves, would wait for ever or save nothing (https://github.com/microsoft/DeepSpeed/issues/3620).

    Raises:
        RunError: if WORLD_SIZE, as the launcher set it, is not the world size that the trainer will use; if one
            process sees several GPUs; if DeepSpeed shards the weights.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise RunError(
            f"The launcher started {launched} processes (WORLD_SIZE), but the trainer sees a world of "
            f"{args.world_size}. On a machine without GPUs set `use_cpu: true`; with GPUs start as many processes as "
            "there are GPUs, with one of accelerate_configs/*.yaml."
        )
    if args.n_gpu > 1:
        number = "" if args.n_gpu == 2 else f"--num_processes {args.n_gpu} "
        raise RunError(
            f"One process sees {args.n_gpu} GPUs. Start one on each:\n"
            f"  accelerate launch --config_file accelerate_configs/two_t4.yaml {number}{shlex.join(sys.argv)}\n"
            "or one on the first alone:\n"
            f"  CUDA_VISIBLE_DEVICES=0 python {shlex.join(sys.argv)}"
        )
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise RunError(
            "DeepSpeed ZeRO-3 (`zero_stage` 3) leaves each rank a part of each weight, while the first alone samples "
            "replies and saves the adapter; a 4-bit base cannot be shared out at all. Use ZeRO-2 "
            "(accelerate_configs/two_t4_zero2.yaml) or plain data parallelism (two_t4.yaml)."
        )


def model_card(record: Mapping[str, Any]) -> str:
    """The model card of an adapter, from nothing but its record."""
    data = record["parents"].get("prepare", {})
    lines = [
        f"# {record['stage']} adapter on {record.get('model_name_or_path')}",
        "",
        (
            f"A LoRA adapter ({record.get('trainable_parameters', 0):,} parameters) trained by the stage "
            f"`{record['stage']}`, which ended as {record['status']!r} on {record['finished']}."
        ),
        "",
        f"- Data: {record.get('num_examples', 0):,} rows of {data.get('path')}, hash {data.get('hash', '')[:16]}",
        *(
            f"- Made from `{name}`: {link['path']}, hash {link['hash'][:16]}"
            for name, link in record["parents"].items()
        ),
        (
            f"- Seed {record['seed']}, {record['wall_seconds']:.0f} s on {record['hardware']['gpus'] or 'CPU'}, commit "
            f"{record['git_commit']}"
        ),
        f"- Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}",
        "",
        *_of_probes(record.get("probes")),
        "Every setting is in config.yaml, the curves are in metrics.jsonl and curves.png, replies during training in",
        "samples.jsonl.",
        "",
        *_persona_section(record.get("persona")),
        "## Use",
        "",
        "    rlhf chat <this folder>",
        "",
        "## Limits",
        "",
        "It was trained to keep to short persona facts in chat. Nothing was done about safety, facts of the world, or",
        "languages other than that of its data. What was measured stands in the report of its run, and nowhere else.",
        "",
    ]
    return "\n".join(lines)


def _persona_section(persona: Mapping[str, Any] | None) -> list[str]:
    if persona is None:
        return []
    named = [f"{key.title()}: {_as_text(persona[key])}  " for key in ("name", "style") if persona.get(key)]
    return ["## Persona", "", *named, "", *(f"- {_as_text(fact)}" for fact in persona["facts"]), ""]


def _as_text(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = " ".join(text.split())
    marks = "".join(set(string.punctuation) - set(" ,.;:?'\"()/-"))
    text = re.sub(rf"([{re.escape(marks)}])", r"\\\1", text)
    return re.sub(r"^(\d*)([-.)])", r"\1\\\2", text)  # what would begin a list


def _of_probes(probes: Mapping[str, Any] | None) -> list[str]:
    """What PPO's watch found, for the card."""
    if not probes:
        return []
    best, last, hacking = probes["best"], probes["last"], probes["reward_hacking"]
    this = (
        f"this adapter (step {last['step']})"
        if probes["saved_step"] == last["step"]
        else f"the one of the last step ({last['step']}; this adapter is of step {probes['saved_step']})"
    )
    told = [
        (
            f"Held-out probes, which no reward saw: {last['score']:.3f} for {this}, and "
            f"{best['score']:.3f} for the best one (step {best['step']}), which is the adapter in `{best['folder']}/`."
        )
    ]
    if hacking:
        told.append(
            f"REWARD HACKING was found at step {hacking['step']} ({', '.join(hacking['named'])}): the reward rose while "
            f"the probes fell from {hacking['probes'][0]:.3f} to {hacking['probes'][1]:.3f}. Use the best adapter."
        )
    return [*told, ""]


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The `metadata.json` of a stage's folder, or None where there is none.

    Raises:
        RunError: if it is no record.
    """
    path = Path(folder) / "metadata.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"stage", "status"} <= record.keys():
        raise RunError(f"{path} is empty or damaged. Delete it, and run the stage again.")
    return record


def movable(configs: Sequence[Any], folder: Path) -> list[Any]:
    """Copies of the configurations with paths relative to `folder`, as a file that lies there is read.

    So a folder says the same wherever its checkout lies and whatever the current directory was. `output_dir`, which
    `rlhf.config` takes relative to the current directory, stays.
    """

    def moved(value: Any, is_path: bool) -> Any:
        if isinstance(value, dict):
            return {moved(key, False): moved(item, is_path) for key, item in value.items()}
        if isinstance(value, str) and (
            value.startswith(("/", "./", "../", "runs/")) or (is_path and Path(value).exists())
        ):
            return relative_to(value, folder)
        return value

    copies = [copy.copy(config) for config in configs]
    for config in copies:
        for field in dataclasses.fields(config):
            if field.name != "output_dir":
                is_path = field.name in (*PATHS, "model_name_or_path") or bool(field.metadata.get("path"))
                setattr(config, field.name, moved(getattr(config, field.name), is_path))
    return copies


def relative_to(path: str | Path, folder: Path) -> str:
    """The path as seen from `folder`, beginning with a dot, by which `rlhf.config` knows a path from a hub id."""
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith("..") else f"./{relative}"


def base_from(base: str, folder: Path) -> str:
    """The base model as a record in `folder` names it: a folder by its path from there, a hub id as it is."""
    return relative_to(base, folder) if Path(base).is_dir() else base


def base_of(record: Mapping[str, Any], folder: Path, base: str | None = None) -> str:
    """The base model of a stage, as it can be loaded.

    Args:
        record: The stage's.
        folder: The stage's.
        base: Where it is now, if it is not where the record says.

    Raises:
        RunError: if it is not there, or is another one.
    """
    named = record["model_name_or_path"]
    if base is None and named.startswith(("/", "./", "../")):
        # As it reads, else through links: the folder may have been made under another name than it is opened by.
        places = [os.path.normpath(folder / named), str(folder / named)]
        base = next((place for place in places if Path(place).is_dir()), None)
        if base is None:
            raise RunError(f"The base model of {folder} is not there: {places[0]}. Give --model_name_or_path.")
    base = base or named
    if record.get("base_hash") not in (None, base_hash(base)):
        raise RunError(
            f"The adapter in {folder} belongs to another base model than {base}. Give --model_name_or_path."
        )
    return base


def without_machine_paths(folder: Path) -> None:
    """PEFT and TRL write the base's path on this machine beside each adapter, and a card that says nothing true.

    The base is named by its path from the current directory, as other programs read it.
    """
    for config in folder.rglob("adapter_config.json"):
        (config.parent / "README.md").unlink(missing_ok=True)
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:  # of a torn checkpoint, which `rlhf run` leaves out
            continue
        base = values.get("base_model_name_or_path")
        if base and Path(base).is_absolute() and Path(base).is_dir():
            write_json(config, {**values, "base_model_name_or_path": os.path.relpath(base)})


def base_hash(base: str) -> str | None:
    """By its weights where they lie in a folder, since a base that was trained anew keeps its path."""
    return folder_hash(base) if (Path(base) / "model.safetensors").is_file() else None


def _parents(parents: Mapping[str, str | Path], child: Path, base: str | None) -> dict[str, dict[str, Any]]:
    """The links to what a stage is made from; what is wrong with any of it is said together."""
    faults, links = [], {}
    # A hub id is a name, or an owner and a name.
    if base and (base.startswith((".", "/", "~")) or base.count("/") > 1) and not Path(base).is_dir():
        faults.append(
            f"`model_name_or_path`: there is no folder {base}. Name the base's folder, or its id on the hub."
        )
        base = None
    for name, path in parents.items():
        try:
            links[name] = _parent(name, Path(path), child, base)
        except RunError as error:
            faults.append(str(error))
    if faults:
        raise RunError("\n".join(faults))
    return links


def _parent(name: str, path: Path, child: Path, base: str | None) -> dict[str, Any]:
    record = read_record(path)
    if record is None:
        made_by = path.name if path.name in STAGES else name
        raise RunError(
            f"The stage {made_by!r} is needed and there is none in {path}. Run it first: "
            f"`rlhf run recipes/<name> --until {made_by}`, or its script with the recipe's {made_by}.yaml."
        )
    kinds = KINDS.get(re.sub(r"_\d+$", "", name), POLICIES)  # PPO may have several rewards: reward, reward_2, ...
    if record["stage"] not in kinds:
        raise RunError(
            f"{path} was made by the stage {record['stage']!r}, and what is needed as {name!r} is made by "
            f"{' or '.join(kinds)}. Name the folder of such a stage."
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
    if base and "model_name_or_path" in record:
        theirs, ours = (
            record.get("base_hash") or record["model_name_or_path"],
            base_hash(base) or base_from(base, path),
        )
        if theirs != ours:
            raise RunError(
                f"The adapter of the stage {name!r} in {path} belongs to another base model: to "
                f"{record['model_name_or_path']} ({theirs[:12]}), while `model_name_or_path` is {base} ({ours[:12]}). "
                f"Use that base, or run the stage {name!r} again on this one."
            )
    for ancestor, link in record.get("parents", {}).items():
        there = path / link["path"]
        if there.is_dir() and folder_hash(there) != link["hash"]:
            raise RunError(
                f"The stage {name!r} in {path} is stale: it was made from another {ancestor!r} than the one now in "
                f"{there}. Run the stage {name!r} again."
            )
    return {"path": os.path.relpath(path, child), "hash": current}


def _log(level: str, main: bool) -> MemoryHandler:
    """Log to the console with time and level, the main process alone; what is logged is kept for the log file."""
    root = logging.getLogger()
    # Two words of the Trainer's: "as the application has it", and one level below debug.
    level = {"passive": "info", "detail": "debug"}.get(level, level)
    root.setLevel(level.upper() if main else logging.ERROR)
    if not any(type(handler) is logging.StreamHandler for handler in root.handlers):
        root.addHandler(logging.StreamHandler())
    for each in root.handlers:
        each.setFormatter(logging.Formatter(LOG_FORMAT))
    for noisy in ("httpx", "datasets", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    kept = MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
    root.addHandler(kept)
    return kept


def _log_to(path: Path, kept: MemoryHandler, main: bool) -> logging.Handler:
    """Append to the log file what is logged from now on, behind what was kept until now."""
    handler = logging.FileHandler(path, delay=not main)  # the other processes write there what they fail of
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    kept.setTarget(handler)
    kept.close()
    logging.getLogger().addHandler(handler)
    return handler


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
