"""One strict parser for recipe files and the command line.

A stage is configured by dataclasses: TRL's own (`SFTConfig`, `ModelConfig`, ...) plus ours. Keys are flat and carry TRL's
names; each key goes to every dataclass of the stage that has a field of this name.

    python rlhf/sft.py --config recipes/demo/sft.yaml [--config overlay.yaml ...] [--key value | --key=value ...]

The rules:

- `extends: recipe.yaml` names a file, relative to the file that says so, whose keys come first. Later files win over
  earlier ones, the command line wins over files; of two equal keys on the command line the last one wins.
- Every key of every file must be a field of the stage that reads it. A file that several stages read (recipe.yaml, an
  overlay such as tiny.yaml) therefore holds keys which all of them know; what belongs to one stage only stands in that
  stage's own file, or under the stage's name (`ppo: {kl_coef: 0.05}`), which the other stages pass over.
- Values have exactly the type of the field: `16.5` is no int, `true` is no int, `'no'` is no bool. Three things are
  lenient: an int is a float, `1e-4` is a float (YAML 1.1 reads a string), one string is a list of one string.
  A command-line value is read as YAML first (`--lora_target_modules '[q_proj, v_proj]'`) and as plain text second.
- A field states `choices`, a `range` such as "[1, inf)", or `path: True` in its metadata; for TRL's fields the tables
  below do.
- A path in a file is relative to that file, except `output_dir` and whatever begins with `runs/`, which are relative to
  the current directory, as everything on the command line is. Where a hub id is possible too (`model_name_or_path`), a
  path begins with `./`, `../` or `/`.
- A path that is set must exist, but for those beside `output_dir`, which earlier stages make, and `path` of prepare.
- Precision and device, where nobody names them, are what the machine can do (`rlhf.model.machine_defaults`).
- With `plan_by_size: true` the keys of `rlhf.plan`, where nobody names them, are what the rows and the GPUs ask for.

All problems are raised together in one `ConfigError`.
"""

import dataclasses
import difflib
import enum
import importlib.util
import json
import logging
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ConfigDict, TypeAdapter

from rlhf.files import write_text
from rlhf.plan import KEYS, Plan, plan_by_size

logger = logging.getLogger(__name__)

STAGES = ("prepare", "base", "sft", "reward", "pairs", "dpo", "ppo", "evaluate")

LORA_RANKS = (4, 6, 8, 16, 32, 64)

RANGES = {
    # LoRA
    "lora_r": "[1, inf)",
    "lora_alpha": "[1, inf)",
    "lora_dropout": "[0, 1)",
    # optimiser and schedule
    "learning_rate": "(0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, inf)",
    "max_grad_norm": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "num_train_epochs": "(0, inf)",
    "max_steps": "[-1, inf)",
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "label_smoothing_factor": "[0, 1)",
    "neftune_noise_alpha": "[0, inf)",
    # bookkeeping
    "logging_steps": "(0, inf)",
    "eval_steps": "(0, inf)",
    "eval_delay": "[0, inf)",
    "save_steps": "(0, inf)",
    "save_total_limit": "[1, inf)",
    "seed": "[0, 4294967295]",  # numpy's generator takes 32 bits
    "data_seed": "[0, 4294967295]",
    "dataloader_num_workers": "[0, inf)",
    "ddp_timeout": "[1, inf)",
    # data
    "max_length": "[1, inf)",
    "pad_to_multiple_of": "[1, inf)",
    "dataset_num_proc": "[1, inf)",
    # reward, DPO
    "center_rewards_coefficient": "[0, inf)",
    "beta": "(0, inf)",
    "label_smoothing": "[0, 0.5)",  # a probability that the label is flipped; at 0.5 nothing can be learnt
    "ld_alpha": "[0, 1]",
    "precompute_ref_batch_size": "[1, inf)",
    # PPO
    "kl_coef": "[0, inf)",
    "cliprange": "(0, inf)",
    "cliprange_value": "(0, inf)",
    "vf_coef": "[0, inf)",
    "gamma": "[0, 1]",
    "lam": "[0, 1]",
    "num_ppo_epochs": "[1, inf)",
    "num_mini_batches": "[1, inf)",
    "total_episodes": "[1, inf)",
    "response_length": "[1, inf)",
    "temperature": "(0, inf)",
}

# Only where the field itself names no choices: these two are TRL 1.16's DPO help texts, trust_remote_code is our rule.
CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_type": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "trust_remote_code": (False,),
    "attn_implementation": ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
}  # fmt: skip

# Fields of TRL's ModelConfig that nothing here reads: why another value than the default is refused, and the remedy.
# `lora_r` and its like are not refused for DPO and PPO, where the SFT adapter goes on with its own: recipe.yaml may set
# them for all stages.
NO_EFFECT = {
    "model_revision": "would reach the weights alone, not the tokenizer nor `rlhf chat`; fetch the revision with `hf "
    "download NAME --revision REVISION --local-dir FOLDER`, and give the folder as `model_name_or_path`",
    "use_peft": "every stage trains a LoRA adapter, whose base stays frozen; delete the key",
    "lora_target_parameters": "an adapter sits on whole layers; name them in `lora_target_modules`",
    "lora_modules_to_save": "the stage decides: the reward adapter saves its score head, the others nothing; delete "
    "the key",
    "lora_task_type": "the stage decides: SEQ_CLS for the reward adapter, CAUSAL_LM for the others; delete the key",
    "load_in_8bit": "8-bit bases are not supported; use `load_in_4bit: true`",
    "use_bnb_nested_quant": "is always on with `load_in_4bit: true`; delete the key",
    "save_only_model": "a checkpoint without the optimiser's state cannot be gone on from; delete the key",
    "bnb_4bit_quant_storage": "is of use to FSDP alone, which is not supported; delete the key",
}

# What `report_to` may name (transformers 5.23, `INTEGRATION_TO_CALLBACK`), and the module that must be installed for it.
REPORTERS = {
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": None, "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip

# Part of an optimiser's name -> the module that has it; the first that fits.
OPTIMISERS = {
    "adamw_torch_8bit": "torchao", "adamw_torch_4bit": "torchao", "adamw_anyprecision": "torchdistx",
    "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free": "schedulefree", "stable_adamw": "optimi", "bit": "bitsandbytes", "bnb": "bitsandbytes",
    "ademamix": "bitsandbytes",
}  # fmt: skip

# Modules whose package has another name.
PACKAGES = {
    "azureml": "azureml-mlflow", "galore_torch": "galore-torch", "apollo_torch": "apollo-torch",
    "lomo_optim": "lomo-optim", "optimi": "torch-optimi", "liger_kernel": "liger-kernel", "comet_ml": "comet-ml",
    "flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3",
}  # fmt: skip

PATHS = ("dataset", "chat_template_path", "deepspeed", "fsdp_config", "accelerator_config", "resume_from_checkpoint")

# Names that other tools, or older releases of these, use for the same thing.
RENAMED = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a share of all steps
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
}

SECRETS = ("hub_token",)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration.

    Attributes:
        problems: one line each: key, value, file and line (or "command line"), reason and remedy.
    """

    def __init__(self, problems: Sequence[str], known: Iterable[str] = ()):
        self.problems = list(problems)
        lines = ["the configuration has 1 problem:" if len(self.problems) == 1 else
                 f"the configuration has {len(self.problems)} problems:"]  # fmt: skip
        lines += [f"  - {problem}" for problem in self.problems]
        if known := sorted(known):
            lines.append(textwrap.fill("known names: " + ", ".join(known), 119, subsequent_indent="  "))
        super().__init__("\n".join(lines))


@dataclasses.dataclass(kw_only=True)
class PriceConfig:
    """What a stage's record reckons its cost by; every stage has these keys.

    Attributes:
        rate_per_gpu_hour: dollars for an hour of one GPU. The default is a T4's.
        storage_price: dollars for keeping a GB (1e9 bytes) for a month. The default is that of Google Cloud's standard
            storage in us-central1 (https://cloud.google.com/storage/pricing-examples, 2026-11-21).
    """

    rate_per_gpu_hour: float = dataclasses.field(default=0.35, metadata={"range": "[0, inf)"})
    storage_price: float = dataclasses.field(default=0.02, metadata={"range": "[0, inf)"})


@dataclasses.dataclass
class DataConfig(PriceConfig):
    """The rows a training stage reads, how often it shows what it makes of them, and when it gives up.

    Attributes:
        dataset: folder with the JSON-lines files that the prepare stage writes.
        max_train_rows: read only the first rows of the training file; None reads all.
        max_eval_rows: read only the first rows of the held-out file; None reads all.
        sample_steps: optimiser steps between two samplings of the model's own output.
        num_samples: held-out rows that are sampled.
        max_truncated_share: share of a file's rows that may lose turns to `max_length` before the stage stops.
        max_skipped_steps: optimiser steps in a row that may be skipped as not finite; one more stops the stage.
        save_minutes: longest time between two checkpoints, beside `save_steps`; None saves by step alone. By default a
            session that dies unasked, as Kaggle's may, costs half an hour at most, and a save is a few seconds of it.
    """

    dataset: str = dataclasses.field(metadata={"path": True})
    max_train_rows: int | None = dataclasses.field(default=None, metadata={"range": "[1, inf)"})
    max_eval_rows: int | None = dataclasses.field(default=None, metadata={"range": "[1, inf)"})
    sample_steps: int = dataclasses.field(default=100, metadata={"range": "[1, inf)"})
    num_samples: int = dataclasses.field(default=4, metadata={"range": "[1, inf)"})
    max_truncated_share: float = dataclasses.field(default=0.05, metadata={"range": "[0, 1]"})
    max_skipped_steps: int = dataclasses.field(default=3, metadata={"range": "[0, inf)"})
    save_minutes: float | None = dataclasses.field(default=30.0, metadata={"range": "(0, inf)"})


@dataclasses.dataclass
class PlanConfig:
    """Where the size of the training comes from.

    Attributes:
        plan_by_size: fill the keys of `rlhf.plan` that neither file nor command line sets from the plan for the rows of
            `dialogues_train.jsonl` (at most `max_train_rows`) and the GPUs that share a step.
    """

    plan_by_size: bool = False


@dataclasses.dataclass
class PairConfig:
    """How preference pairs are used.

    Attributes:
        swapped_share: share of the training pairs whose chosen and rejected replies change places, at random; with
            0.5 the labels hold no information, and nothing may be learned from them: a control.
    """

    swapped_share: float = dataclasses.field(default=0.0, metadata={"range": "[0, 1]"})


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value as the user wrote it: `where` is "file:line" or "command line"; `folder` is its file's, None for the latter."""

    value: Any
    where: str
    folder: Path | None


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """safe_load, except that `1e-4` is a number, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """safe_dump that quotes the strings which `_Loader` would read as numbers."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(  # type: ignore[attr-defined]
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read one YAML mapping as `yaml.safe_load` does; `extends` is an ordinary key here.

    Returns:
        The values, and the line (from 1) of each key; a key of a nested mapping is named with dots, `ppo.kl_coef`.

    Raises:
        ConfigError: unreadable file, YAML error, a Python tag, a key given twice, a key that is no string, no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError([f"`{path}`: no such file{did_you_mean(path.name, there)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"`{path}`: cannot be read: {error}"]) from error
    lines: dict[str, int] = {}
    problems: list[str] = []

    def walk(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                walk(item, f"{prefix}{index}.")
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                problems.append(f"`{key.value}` ({path}:{line}): a key must be a string; quote it")
                continue
            name = prefix + key.value
            if name in lines:
                problems.append(f"`{name}` ({path}:{line}): given twice, first in line {lines[name]}; delete one")
                continue
            lines[name] = line
            walk(value, name + ".")

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}, {}
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError([f"`{path}`: must be a mapping, lines of the form `key: value`"])
            walk(node, "")
            if problems:
                raise ConfigError(problems)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([f"`{where}`: not safe YAML: {getattr(error, 'problem', None) or error}"]) from error
    except RecursionError as error:
        raise ConfigError([f"`{path}`: nested too deeply"]) from error


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `override`, mappings merged at every depth; neither input is changed."""
    merged = {key: _copy(value) for key, value in base.items()}
    for key, value in override.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = _copy(value)
    return merged


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def load_recipe(path: str | Path, stage: str | None = None) -> dict[str, Any]:
    """Read a recipe file with everything it extends, and with the keys that its files hold under the name of `stage`.

    Paths are left as written. Raises ConfigError as `load_yaml` does, and for an `extends` that names itself.
    """
    return {key: given.value for key, given in _read(Path(path), stage, known=None).items()}


def _read(
    path: Path, stage: str | None, known: Iterable[str] | None, chain: tuple[Path, ...] = ()
) -> dict[str, _Given]:
    """One file and what it extends. `known` are the stage's fields: a field that is named like a stage is no section."""
    if path.resolve() in chain:
        cycle = " -> ".join(p.name for p in (*chain, path))
        raise ConfigError([f"`extends` ({chain[-1]}): the files extend each other in a circle: {cycle}"])
    values, lines = load_yaml(path)
    folder = path.absolute().parent
    given: dict[str, _Given] = {}
    if "extends" in values:
        parent = values.pop("extends")
        if not isinstance(parent, str):
            raise ConfigError([f"`extends`: {parent!r} ({path}:{lines['extends']}): must be one file name"])
        try:
            given = _read(folder / parent, stage, known, (*chain, path.resolve()))
        except ConfigError as error:
            if (folder / parent).is_file():
                raise
            raise ConfigError([f"`extends`: {parent!r} ({path}:{lines['extends']}): {error.problems[0]}"]) from error
    own = {key: _Given(value, f"{path}:{lines.get(key, 1)}", folder) for key, value in values.items()}
    if stage is not None:
        for name in [key for key in own if key in STAGES and key not in (known or ())]:
            section = own.pop(name)
            if not isinstance(section.value, dict):
                raise ConfigError(
                    [f"`{name}`: {section.value!r} ({section.where}): must be a mapping with the keys of this stage"]
                )
            if name == stage:
                for key, value in section.value.items():
                    nested = _Given(value, f"{path}:{lines.get(f'{name}.{key}', 1)}", folder)
                    own[key] = _over(own.get(key), nested)
    return {**given, **{key: _over(given.get(key), new) for key, new in own.items()}}


def _over(old: _Given | None, new: _Given) -> _Given:
    if old is not None and isinstance(old.value, dict) and isinstance(new.value, dict):
        return dataclasses.replace(new, value=merge(old.value, new.value))
    return new


def save(configs: Iterable[Any], path: str | Path) -> None:
    """Write every field of these dataclass instances as one flat YAML file, atomically: see `dumps`."""
    write_text(path, dumps(configs))


def dumps(configs: Iterable[Any]) -> str:
    """Every field of these dataclass instances as one flat YAML text.

    `parse` reads it back into equal objects. Tokens for the hub (`hub_token`) are never written.

    Raises:
        ValueError: two of the objects hold different values for one key.
    """
    values: dict[str, Any] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            if not field.init or field.name in SECRETS:
                continue
            value = _plain(getattr(config, field.name))
            if field.name in values and values[field.name] != value:
                raise ValueError(f"`{field.name}` is {values[field.name]!r} in one config and {value!r} in another")
            values[field.name] = value
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """The value in YAML's own types."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


# --- types, choices, ranges ------------------------------------------------------------------------------------------


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    names = ["null" if member is type(None) else
             getattr(member, "__name__", str(member)) if not typing.get_args(member) else
             str(member).replace("typing.", "") for member in _members(hint)]  # fmt: skip
    return " or ".join(names)


def _choices(field: dataclasses.Field, hint: Any) -> tuple[Any, ...] | None:
    if field.metadata.get("choices"):
        return tuple(field.metadata["choices"])
    for member in _members(hint):
        # transformers hints these `SchedulerType | str`, which alone would let any string pass
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return tuple(item.value for item in member)
        if typing.get_origin(member) is typing.Literal:
            return typing.get_args(member)
    return CHOICES.get(field.name)


def _one_of(value: Any, choices: Sequence[Any]) -> str:
    names = [str(choice) for choice in choices]
    return f"must be one of {', '.join(names)}{did_you_mean(str(value), names)}"


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _check(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    """Return the value in the type of its field.

    Raises:
        ValueError: the reason, without key and value.
    """
    members = _members(hint)
    if isinstance(value, str) and list[str] in members and str not in members:
        value = [value]  # as TRL and PEFT have it: `lora_target_modules: all-linear`, `loss_type: sigmoid`
    try:
        # Strict JSON is the reading that fits a file: no coercion, yet a list may become a tuple and a string a Path.
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))
        checked = adapter.validate_json(json.dumps(value))
    except (ValueError, TypeError):
        choices = _choices(field, hint)
        reason = _one_of(value, choices) if choices else f"must be {_describe(hint)}, not {type(value).__name__}"
        if isinstance(value, float) and float in members:
            reason = "must be a finite number"
        elif isinstance(value, bool) and str in members:
            reason += "; YAML reads an unquoted no, off, yes, on as a boolean: quote it"
        raise ValueError(reason) from None
    choices = _choices(field, hint)
    if choices and checked is not None:
        for item in checked if isinstance(checked, list) else [checked]:
            item = item.value if isinstance(item, enum.Enum) else item
            if item not in choices:
                if field.name == "trust_remote_code":
                    raise ValueError("must be false: code from a model repository is never run")
                raise ValueError(_one_of(item, choices))
    interval = field.metadata.get("range") or RANGES.get(field.name)
    is_number = isinstance(checked, int | float) and not isinstance(checked, bool)
    if interval and is_number and not _inside(checked, interval):
        raise ValueError(f"must lie in {interval}")
    return checked


def _check_given(field: dataclasses.Field, hint: Any, given: _Given) -> Any:
    if given.folder is not None:
        checked, folder = _check(field, hint, given.value), given.folder
        if isinstance(checked, dict):  # keys too: a reward is named by where it lies
            resolved = {
                os.path.normpath(folder / k) if k.startswith(("./", "../")) else k: (
                    _resolve(field, v, folder) if isinstance(v, str) else v
                )
                for k, v in checked.items()
            }
            if len(resolved) < len(checked):
                raise ValueError("names one path twice")
            return resolved
        return _resolve(field, checked, folder) if isinstance(checked, str) else checked
    try:
        return _check(field, hint, yaml.load(given.value, Loader=_Loader))
    except (ValueError, yaml.YAMLError) as error:
        try:
            return _check(field, hint, given.value)
        except ValueError:
            if isinstance(error, ValueError):
                raise error from None
            raise


def _resolve(field: dataclasses.Field, value: str, folder: Path) -> str:
    """A path of a file, made absolute; every other string as it is."""
    if field.name == "output_dir" or value.startswith("runs/"):
        return value
    is_path = field.name in PATHS or bool(field.metadata.get("path"))
    if not (is_path or value in (".", "..") or value.startswith(("./", "../"))) or value.lstrip().startswith("{"):
        return value  # transformers takes JSON text where it takes a file
    return os.path.normpath(folder / Path(value).expanduser())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


# --- parse -----------------------------------------------------------------------------------------------------------


def parse(
    config_classes: Sequence[type],
    argv: Sequence[str] | None = None,
    stage: str | None = None,
    before_prepare: bool = False,
) -> tuple[Any, ...]:
    """Read `--config FILE` and `--key value` into one instance of each class, by the rules at the top of this module.

    Args:
        config_classes: dataclasses whose fields are the known keys.
        argv: the command line without the program; None takes the program's own.
        stage: the name under which a shared file may hold keys for this stage alone; None allows no such sections.
        before_prepare: whether the stage's data are made only later. A plan by their size is then checked as far as it
            can be, and its keys stay at their defaults.

    Raises:
        ConfigError: with every problem found.
    """
    fields = {cls: {f.name: f for f in dataclasses.fields(cls) if f.init} for cls in config_classes}
    hints = {cls: typing.get_type_hints(cls) for cls in config_classes}
    known = {name for cls in config_classes for name in fields[cls]}
    problems: list[str] = []
    given: dict[str, _Given] = {}
    files, overrides = _split(sys.argv[1:] if argv is None else list(argv), problems)
    unreadable = False
    for file in files:
        try:
            for key, new in _read(Path(file), stage, known).items():
                given[key] = _over(given.get(key), new)
        except ConfigError as error:
            problems += error.problems
            unreadable = True
    given.update({key: _Given(value, "command line", None) for key, value in overrides.items()})

    misnamed = False
    meant: set[str] = set()
    for key in [key for key in given if key not in known]:
        entry = given.pop(key)
        meant.update(difflib.get_close_matches(key.replace("-", "_"), known, n=1), {RENAMED.get(key, key)})
        if RENAMED.get(key) not in known:
            hint = did_you_mean(key.replace("-", "_"), known)
        else:
            hint = f"; it is called `{RENAMED[key]}` here"
        if key in STAGES:
            hint = "; the keys of a stage stand under its name in files that this stage shares with others"
        problems.append(f"`{key}`: {_shown(key, entry.value)} ({entry.where}): no such key{hint}")
        misnamed = True

    values: dict[type, dict[str, Any]] = {cls: {} for cls in config_classes}
    for key, entry in given.items():
        for cls in (cls for cls in config_classes if key in fields[cls]):
            try:
                values[cls][key] = _check_given(fields[cls][key], hints[cls][key], entry)
            except ValueError as error:
                problems.append(f"`{key}`: {_shown(key, entry.value)} ({entry.where}): {error}")
                break
    if not unreadable:
        problems += _missing(fields, given)
    problems += _unusable(values, fields, given)
    problems += _absent(values, fields, given)
    problems += _fill_machine(values, fields, given)
    problems += _fill_plan(values, fields, given, before_prepare)
    # What is done: TRL's default is for scripts that may do without; the filter of the log is `rlhf.nonfinite`'s matter.
    _fill(values, fields, given, {"use_peft": True, "logging_nan_inf_filter": False})
    if unreadable:  # what its keys would have changed is not known
        raise ConfigError(problems, known if misnamed else ())

    bad = meant | {problem.split("`")[1] for problem in problems}
    configs = []
    for cls in config_classes:
        built, reasons = _build(cls, values[cls], fields[cls], bad)
        problems += [f"{cls.__name__}: {_placed(reason, given)}" for reason in reasons]
        configs.append(built)
    if problems:
        raise ConfigError(problems, known if misnamed else ())
    for built in configs:
        if hasattr(built, "mixed_precision") and not (built.fp16 or built.bf16):
            built.mixed_precision = "no"  # TrainingArguments takes the launcher's, which knows nothing of this machine
    rank = values_of(configs).get("lora_r")
    if rank is not None and rank not in LORA_RANKS:
        where = f" ({given['lora_r'].where})" if "lora_r" in given else ""
        logger.warning("`lora_r`: %s%s is outside the usual ranks %s", rank, where, ", ".join(map(str, LORA_RANKS)))
    return tuple(configs)


def exit_with(error: Exception) -> NoReturn:
    """End the process as command-line tools do for a wrong call: the message on stderr, status 2, no traceback."""
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)


def defaults(config_class: type) -> dict[str, Any]:
    """The defaults of a dataclass as declared; a field without one is left out. Its keys are the keys a file may hold."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.init and field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def values_of(configs: Iterable[Any]) -> dict[str, Any]:
    """All fields of these instances in one flat dict."""
    return {f.name: getattr(config, f.name) for config in configs for f in dataclasses.fields(config)}


def _split(argv: list[str], problems: list[str]) -> tuple[list[str], dict[str, str]]:
    """Files and overrides of a command line; whatever else stands there is a problem."""
    files: list[str] = []
    overrides: dict[str, str] = {}
    words: Iterator[tuple[int, str]] = iter(enumerate(argv))
    for position, word in words:
        if not word.startswith("--") or word == "--":
            problems.append(f"`{word}` (command line): belongs to no key; a list is written --key '[a, b]'")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = argv[position + 1] if position + 1 < len(argv) else None
            if following is None or following.startswith("--"):
                remedy = "--config FILE.yaml" if key == "config" else f"--{key} VALUE, for a switch --{key} true"
                problems.append(f"`{key}` (command line): has no value; write {remedy}")
                continue
            value = next(words)[1]
        if key == "config":
            files.append(value)
        else:
            overrides[key] = value
    return files, overrides


def _shown(key: str, value: Any) -> str:
    if key in SECRETS:
        return "(not shown)"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _missing(fields: Mapping[type, Mapping[str, dataclasses.Field]], given: Mapping[str, _Given]) -> list[str]:
    required = {
        name: cls.__name__
        for cls, own in fields.items()
        for name, f in own.items()
        if _is_required(f) and name not in given
    }
    return [f"`{name}`: is missing; {owner} needs it" for name, owner in required.items()]


def _unusable(
    values: Mapping[type, Mapping[str, Any]],
    fields: Mapping[type, Mapping[str, dataclasses.Field]],
    given: Mapping[str, _Given],
) -> list[str]:
    """A problem for each setting that is well-formed, yet that this installation cannot follow, or that has no effect."""
    asked = {key: _plain(value) for own in values.values() for key, value in own.items()}
    default = {
        key: True if key == "use_peft" else field.default for own in fields.values() for key, field in own.items()
    }
    reasons = {key: why for key, why in NO_EFFECT.items() if key in asked and asked[key] != default[key]}
    for key, reason in (
        ("load_in_4bit", _not_installed("bitsandbytes") if asked.get("load_in_4bit") else None),
        ("use_liger_kernel", _not_installed("liger_kernel") if asked.get("use_liger_kernel") else None),
        (
            "optim",
            _not_installed(next((m for part, m in OPTIMISERS.items() if part in str(asked.get("optim"))), None)),
        ),
        ("report_to", _no_reporter(asked.get("report_to"))),
        ("attn_implementation", _no_attention(asked.get("attn_implementation"))),
    ):
        if reason:
            reasons[key] = reason
    if asked.get("max_length", 1) is None:
        reasons["max_length"] = "must be a number of tokens: it decides which rows lose their oldest turns"
    if asked.get("packing_strategy", "bfd") != "bfd":  # which keeps them apart: tests/test_startup.py
        reasons["packing_strategy"] = "cuts samples, and some see parts of others; use bfd"
    if asked.get("padding_free"):
        reasons["padding_free"] = "does not keep to `max_length`; use packing: true, which turns it on where it may be"
    for key in (
        "gradient_checkpointing_kwargs",
        "activation_checkpointing_kwargs",
    ):  # the older name and the newer one
        settings = asked.get(key)
        settings = yaml.load(settings, Loader=_Loader) if isinstance(settings, str) else settings  # JSON text
        if isinstance(settings, dict) and settings.get("use_reentrant"):
            reasons[key] = (
                "reentrant checkpointing fails under DDP where a frozen base carries adapters; set use_reentrant: false, "
                "or delete the key"
            )
    return [f"`{key}`: {_shown(key, given[key].value)} ({given[key].where}): {why}" for key, why in reasons.items()]


def _not_installed(module: str | None) -> str | None:
    if module is None or importlib.util.find_spec(module) is not None:
        return None
    package = PACKAGES.get(module, module)
    return f"needs the package {package}, which is not installed: pip install {package}"


def _no_reporter(names: str | list[str] | None) -> str | None:
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            return _one_of(name, ("none", "all", *REPORTERS))
        if problem := _not_installed(REPORTERS[name]):
            return problem
    return None


def _no_attention(name: str | None) -> str | None:
    if not (name or "").startswith("flash_attention"):
        return None
    from rlhf.model import attention_problem  # not at the top: it imports torch

    module = "flash_attn" if name == "flash_attention_2" else "flash_attn_interface"
    return attention_problem(name) or _not_installed(module)


def _absent(
    values: Mapping[type, Mapping[str, Any]],
    fields: Mapping[type, Mapping[str, dataclasses.Field]],
    given: Mapping[str, _Given],
) -> list[str]:
    """A problem for each path that nothing lies at, but for those beside the stage's folder: earlier stages make them."""
    asked = {
        key: value
        for cls, own in values.items()
        for key, value in own.items()
        if isinstance(value, str) and _is_path(fields[cls][key], value)
    }
    output_dir = next((own["output_dir"] for own in values.values() if "output_dir" in own), None)
    problems = []
    for key, value in asked.items():
        path = Path(value).absolute()
        made = output_dir is None or path.is_relative_to(Path(output_dir).absolute().parent)
        if not (made or path.exists()):
            problems.append(f"`{key}`: {value!r} ({given[key].where}): there is nothing there; correct the path")
    return problems


def _is_path(field: dataclasses.Field, value: str) -> bool:
    """Whether this value must be a path: not one of the words, ids and JSON texts that some fields take beside it."""
    if field.name == "path" or value.lstrip().startswith("{"):
        return False  # `path`, a file that a user fetches, is asked for by the reader, which says what should be in it
    if field.name == "model_name_or_path":
        return value.startswith(("/", "./", "../"))
    return field.name in PATHS or bool(field.metadata.get("path"))


def _build(
    cls: type, values: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], bad: set[str]
) -> tuple[Any, list[str]]:
    """The configuration, and what the class itself finds wrong in it: combinations of fields.

    Where fields are bad already, their defaults stand in for them, and what names one of them is passed over.
    """
    values = {key: value for key, value in values.items() if key not in bad}
    if bad & {"use_cpu", "bf16", "fp16"}:  # what any machine can do
        values |= {key: key == "use_cpu" for key in ("use_cpu", "bf16", "fp16") if key in fields}
    if any(_is_required(field) and name not in values for name, field in fields.items()):
        return None, []
    if bad and "use_cpu" in fields and "WORLD_SIZE" in os.environ:
        return None, []  # TrainingArguments would wait for the other processes, for a run that does not start
    try:
        return cls(**values), []
    except (ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
        reasons = error.problems if isinstance(error, ConfigError) else [str(error)]
        return None, [reason for reason in reasons if not bad & set(re.findall(r"\w+", reason))]


def _placed(reason: str, given: Mapping[str, _Given]) -> str:
    """The reason, with the place of the field that it begins with."""
    name = re.search(r"`(\w+)`", reason)
    if name is None or name[1] not in given:
        return reason
    return reason.replace(name[0], f"{name[0]} ({given[name[1]].where})", 1)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _machine_defaults() -> dict[str, Any]:
    from rlhf.model import machine_defaults  # not at the top: it imports torch

    return machine_defaults()


def _has_accelerator() -> bool:
    import torch  # not at the top: reading a recipe needs no torch

    return torch.accelerator.is_available()


def _fill_machine(
    values: dict[type, dict[str, Any]],
    fields: Mapping[type, Mapping[str, dataclasses.Field]],
    given: Mapping[str, _Given],
) -> list[str]:
    """Set device and precision where nobody did; return a problem for each thing asked of a machine that lacks it.

    This must come before a TrainingArguments is built: TRL's sets bf16 unless fp16 is given, and then raises on a CPU.
    A base is loaded in what it is trained in: TRL's default for `dtype` is float32 on every machine.
    """

    if not any("use_cpu" in own or "bf16" in own for own in fields.values()):
        _fill(values, fields, given, {"dtype": "auto"})  # nothing is trained here, so `rlhf.model.load_base` chooses
        return []
    machine = _machine_defaults()
    asked = {key: value for own in values.values() for key, value in own.items() if key in ("use_cpu", "bf16", "fp16")}
    problems = []

    def refuse(key: str, reason: str) -> None:
        problems.append(f"`{key}`: {str(asked[key]).lower()} ({given[key].where}): {reason}")

    on_cpu = asked.get("use_cpu", machine["use_cpu"])
    if asked.get("use_cpu") is False and machine["use_cpu"] and not _has_accelerator():
        refuse("use_cpu", "this machine has no GPU that torch can use; delete the key")
    if asked.get("bf16") and not on_cpu and not machine["bf16"]:
        refuse("bf16", "needs a GPU of compute capability 8.0 or newer; use fp16: true, or delete the key")
    if asked.get("fp16") and on_cpu:
        refuse("fp16", "needs a GPU; delete the key, a CPU trains in float32")
    if asked.get("fp16") and asked.get("bf16"):
        refuse("fp16", "excludes bf16: true; delete one of the two")
    filled = {**machine, "use_cpu": on_cpu}
    if on_cpu or "bf16" in asked or "fp16" in asked:  # naming one of the two settles the other
        filled |= {"bf16": False, "fp16": False}
    precision = {**filled, **asked}
    filled["dtype"] = "float16" if precision["fp16"] else "bfloat16" if precision["bf16"] else "float32"
    _fill(values, fields, given, filled)
    return problems


def _fill_plan(
    values: dict[type, dict[str, Any]],
    fields: Mapping[type, Mapping[str, dataclasses.Field]],
    given: Mapping[str, _Given],
    before_prepare: bool,
) -> list[str]:
    """Set the keys of the plan by size that nobody set; return a problem for each thing that stands against a plan."""
    known = {key: value for own in values.values() for key, value in own.items()}
    if not known.get("plan_by_size") or "dataset" not in known or all(key in given for key in KEYS):
        return []
    asked = given["plan_by_size"]
    problems = []
    num_examples = 1  # stands in for rows that are not there yet, so that the rest is checked all the same
    if not before_prepare:
        try:
            num_examples = _num_train_rows(known)
        except OSError as error:
            recipe = "recipes/<name>" if asked.folder is None else os.path.relpath(asked.folder)
            problems.append(
                f"{error.strerror}: {error.filename}, whose rows it goes by; `rlhf run {recipe} --until prepare` makes it"
            )
    try:
        plan = plan_by_size(num_examples, num_gpus(known), {key: known.get(key) for key in KEYS if key in given})
    except ValueError as error:
        problems.append(str(error))
    else:
        if not before_prepare:
            _fill(values, fields, given, plan.settings())
    return [f"`plan_by_size`: true ({asked.where}): {problem}" for problem in problems]


def _fill(
    values: dict[type, dict[str, Any]],
    fields: Mapping[type, Mapping[str, dataclasses.Field]],
    given: Mapping[str, _Given],
    filled: Mapping[str, Any],
) -> None:
    for cls, own in fields.items():
        values[cls].update({key: value for key, value in filled.items() if key in own and key not in given})


def plan_of(configs: Iterable[Any]) -> Plan | None:
    """The plan by size beside what these configurations really say, which may differ; None where none was asked for."""
    values = values_of(configs)
    if not values.get("plan_by_size"):
        return None
    return plan_by_size(_num_train_rows(values), num_gpus(values), {key: values[key] for key in KEYS})


def _num_train_rows(values: Mapping[str, Any]) -> int:
    with (Path(values["dataset"]) / "dialogues_train.jsonl").open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    limit = values.get("max_train_rows")
    return rows if limit is None else min(rows, limit)


def num_gpus(values: Mapping[str, Any]) -> int:
    """How many GPUs share an optimiser step, a process on a CPU counting as one.

    So many as the launcher started processes, else all that are visible: `rlhf run` starts a process on each, and
    without a launcher the Trainer splits its batches over them.
    """
    launched = os.environ.get("WORLD_SIZE")
    if launched is not None:
        return int(launched)
    if values.get("use_cpu"):
        return 1
    import torch  # not at the top: reading a recipe needs no torch

    return max(1, torch.cuda.device_count())
