"""The strict parser: what it takes, from where, and how it says no."""

import dataclasses
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import torch
import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from evaluation.run import EvaluateConfig
from rlhf import config
from rlhf.config import (
    ConfigError,
    DataConfig,
    PlanConfig,
    defaults,
    load_recipe,
    load_yaml,
    merge,
    parse,
    plan_of,
    save,
    values_of,
)
from rlhf.model import machine_defaults
from rlhf.ppo_trainer import PPOConfig

CPU = {"use_cpu": True, "bf16": False, "fp16": False}
T4 = {"use_cpu": False, "bf16": False, "fp16": True}
A100 = {"use_cpu": False, "bf16": True, "fp16": False}


@dataclasses.dataclass
class Loop:
    """A stand-in for a stage's own arguments: cheap, and without TRL's `__post_init__`."""

    steps: int = dataclasses.field(default=10, metadata={"range": "[1, inf)"})
    learning_rate: float = 0.5
    decoding: Literal["greedy", "sampled"] = "greedy"
    name: str | None = None
    verbose: bool = False
    layers: list[str] | None = None
    sizes: tuple[int, ...] = (1, 2)
    options: dict | str | None = None
    card: str | None = dataclasses.field(default=None, metadata={"path": True})
    output_dir: str = "runs/loop"
    seed: int = 1


@pytest.fixture(autouse=True)
def cpu_machine(monkeypatch):
    monkeypatch.setattr(config, "_machine_defaults", lambda: dict(CPU))
    monkeypatch.setattr(config, "_has_accelerator", lambda: False)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def problems(*args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(*args, **kwargs)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_file_then_command_line_and_both_spellings(tmp_path):
    file = write(tmp_path / "a.yaml", "lora_r: 16\nlora_alpha: 64\nlora_dropout: 0.1\n")
    for argv in (
        ["--config", file, "--lora_r", "32"],
        [f"--config={file}", "--lora_r=32"],
        ["--lora_r=32", f"--config={file}"],
    ):
        (model,) = parse((ModelConfig,), argv)
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (32, 64, 0.1)


def test_defaults_are_the_classes_own():
    (model,) = parse((ModelConfig,), [])
    assert model == ModelConfig(dtype="auto", use_peft=True)  # but for the machine's precision, and what is done


def test_argv_none_reads_the_program_s_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loop.py", "--steps", "3"])
    assert parse((Loop,))[0].steps == 3


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("learning_rate: 1e-4", "learning_rate", 0.0001),  # YAML 1.1 reads a string here
        ("learning_rate: 2E+3", "learning_rate", 2000.0),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("layers: all-linear", "layers", ["all-linear"]),
        ("layers: [a, b]", "layers", ["a", "b"]),
        ("sizes: [3, 4]", "sizes", (3, 4)),
        ("name: null", "name", None),
        ("name: '1e-4'", "name", "1e-4"),
        ("decoding: sampled", "decoding", "sampled"),
        ("options: {min_lr: 1e-6}", "options", {"min_lr": 0.000001}),
    ],
)
def test_lenient_where_it_says_so(tmp_path, text, field, expected):
    value = getattr(parse((Loop,), ["--config", write(tmp_path / "a.yaml", text)])[0], field)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("argument", "field", "expected"),
    [
        ("--learning_rate=1e-4", "learning_rate", 0.0001),
        ("--verbose=true", "verbose", True),
        ("--layers=[a, b]", "layers", ["a", "b"]),
        ("--layers=q_proj", "layers", ["q_proj"]),
        ("--name=123", "name", "123"),
        ("--name=no", "name", "no"),
        ("--name=null", "name", None),
        ("--name=[a", "name", "[a"),  # no YAML, yet a fine string
        ("--options={a: 1}", "options", {"a": 1}),
        ("--name=a=b", "name", "a=b"),
    ],
)
def test_command_line_values_take_the_type_of_the_field(argument, field, expected):
    value = getattr(parse((Loop,), [argument])[0], field)
    assert value == expected and type(value) is type(expected)


def test_a_negative_number_is_a_value_and_the_last_of_two_wins():
    (training,) = parse((SFTConfig,), ["--max_steps", "5", "--max_steps", "-1"])
    assert training.max_steps == -1


def test_a_key_goes_to_every_class_that_has_it():
    training, loop = parse((SFTConfig, Loop), ["--seed", "11", "--output_dir", "runs/x"])
    assert (training.seed, loop.seed) == (11, 11)


def test_extends_is_recursive_relative_to_the_file_and_deep(tmp_path):
    write(tmp_path / "base" / "recipe.yaml", "seed: 3\nsteps: 1\noptions: {a: 1, b: {c: 2, d: 3}}\n")
    write(tmp_path / "mid.yaml", "extends: base/recipe.yaml\nsteps: 2\noptions: {b: {c: 9}}\n")
    file = write(tmp_path / "top.yaml", "extends: mid.yaml\nname: top\n")
    (loop,) = parse((Loop,), ["--config", file])
    assert (loop.seed, loop.steps, loop.name) == (3, 2, "top")
    assert loop.options == {"a": 1, "b": {"c": 9, "d": 3}}
    assert load_recipe(file) == {"seed": 3, "steps": 2, "name": "top", "options": {"a": 1, "b": {"c": 9, "d": 3}}}


def test_a_stage_section_is_read_by_its_stage_alone(tmp_path):
    stage_file = write(tmp_path / "sft.yaml", "steps: 100\n")
    overlay = write(tmp_path / "tiny.yaml", "seed: 5\nsft: {steps: 2}\nppo: {kl_coef: 0.1}\n")
    (loop,) = parse((Loop,), ["--config", stage_file, "--config", overlay], stage="sft")
    assert (loop.steps, loop.seed) == (2, 5)
    assert parse((Loop,), ["--config", overlay], stage="dpo")[0].steps == 10
    assert load_recipe(overlay, "ppo") == {"seed": 5, "kl_coef": 0.1}
    # a stage that does not ask for sections is not given any
    assert [p.split(":")[0] for p in problems((Loop,), ["--config", overlay])] == ["`sft`", "`ppo`"]
    (problem,) = problems((Loop,), ["--config", overlay], stage="ppo")
    assert problem.startswith(f"`kl_coef`: 0.1 ({overlay}:3): no such key")


def test_paths_of_a_file_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "dataset: data\nmodel_name_or_path: ./base\n"
    file = write(tmp_path / "recipes" / "demo" / "sft.yaml", text)
    model, data = parse((ModelConfig, DataConfig), ["--config", os.path.relpath(file)])
    assert data.dataset == str(tmp_path / "recipes" / "demo" / "data")
    assert model.model_name_or_path == str(tmp_path / "recipes" / "demo" / "base")

    file = write(
        tmp_path / "recipes" / "b.yaml", "dataset: runs/demo/prepare\nmodel_name_or_path: Qwen/Qwen2.5-0.5B\n"
    )
    model, data = parse((ModelConfig, DataConfig), ["--config", file])
    assert (data.dataset, model.model_name_or_path) == ("runs/demo/prepare", "Qwen/Qwen2.5-0.5B")

    file = write(tmp_path / "recipes" / "c.yaml", "output_dir: ./out\ncard: ../me.yaml\nname: plain\n")
    (loop,) = parse((Loop,), ["--config", file])
    assert (loop.output_dir, loop.card, loop.name) == ("./out", str(tmp_path / "me.yaml"), "plain")
    assert parse((Loop,), ["--config", file, "--card", "me.yaml"])[0].card == "me.yaml"


def test_an_extended_file_s_path_is_relative_to_that_file(tmp_path):
    write(tmp_path / "shared" / "recipe.yaml", "dataset: data\n")
    file = write(tmp_path / "demo" / "sft.yaml", "extends: ../shared/recipe.yaml\n")
    assert parse((DataConfig,), ["--config", file])[0].dataset == str(tmp_path / "shared" / "data")


# --- how it says no --------------------------------------------------------------------------------------------------

REFUSED = {
    "half a rank": ("lora_r: 16.5", "`lora_r`: 16.5", "must be int"),
    "a list for a rank": ("lora_r: [16]", "`lora_r`: [16]", "must be int"),
    "a quoted number": ("lora_r: '16'", "`lora_r`: '16'", "must be int"),
    "rank zero": ("lora_r: 0", "`lora_r`: 0", "[1, inf)"),
    "an empty value": ("lora_r:", "`lora_r`: None", "must be int"),
    "dropout of one": ("lora_dropout: 1.0", "`lora_dropout`: 1.0", "[0, 1)"),
    "a floaty dtype": ("dtype: floaty", "`dtype`: 'floaty'", "auto, bfloat16, float16, float32"),
    "a boolean seed": ("seed: true", "`seed`: True", "must be int"),
    "a quoted no": ("gradient_checkpointing: 'no'", "`gradient_checkpointing`: 'no'", "must be bool"),
    "an unquoted no": ("eval_strategy: no", "`eval_strategy`: False", "quote it"),
    "a strategy nobody has": ("eval_strategy: step", "`eval_strategy`: 'step'", "did you mean `steps`"),
    "a misspelt schedule": ("lr_scheduler_type: cosin", "`lr_scheduler_type`: 'cosin'", "did you mean `cosine`"),
    "a misspelt optimiser": ("optim: adamw_torc", "`optim`: 'adamw_torc'", "did you mean `adamw_torch`"),
    "a loss nobody has": ("loss_type: dpoo", "`loss_type`: 'dpoo'", "must be one of nll"),
    "a learning rate of zero": ("learning_rate: 0", "`learning_rate`: 0", "(0, inf)"),
    "a negative learning rate": ("learning_rate: -1e-4", "`learning_rate`: -0.0001", "(0, inf)"),
    "an infinite learning rate": ("learning_rate: .inf", "`learning_rate`: inf", "finite"),
    "a NaN": ("weight_decay: .nan", "`weight_decay`: nan", "finite"),
    "a learning rate in words": ("learning_rate: small", "`learning_rate`: 'small'", "must be float"),
    "an empty batch": ("per_device_train_batch_size: 0", "`per_device_train_batch_size`: 0", "[1, inf)"),
    "no accumulation": ("gradient_accumulation_steps: 0", "`gradient_accumulation_steps`: 0", "[1, inf)"),
    "a momentum of one": ("adam_beta2: 1.0", "`adam_beta2`: 1.0", "[0, 1)"),
    "a decoding nobody has": (
        "decoding: gready",
        "`decoding`: 'gready'",
        "must be one of greedy, sampled; did you mean",
    ),
    "a decoding of no text": ("decoding: 3", "`decoding`: 3", "must be one of greedy, sampled"),
    "a misspelt key": ("lora_alfa: 16", "`lora_alfa`: 16", "did you mean `lora_alpha`"),
    "another tool's key": ("max_seq_length: 512", "`max_seq_length`: 512", "`max_length` here"),
    "a key that nothing resembles": ("zzz: 1", "`zzz`: 1", "no such key"),
    "environment variables": ("env: {HF_TOKEN: a}", "`env`: {'HF_TOKEN': 'a'}", "no such key"),
    "foreign code": ("trust_remote_code: true", "`trust_remote_code`: True", "must be false"),
    "fp16 without a GPU": ("fp16: true", "`fp16`: true", "needs a GPU"),
    "a GPU that is not there": ("use_cpu: false", "`use_cpu`: false", "no GPU"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_place_and_remedy(tmp_path, name):
    text, start, reason = REFUSED[name]
    file = write(tmp_path / "bad.yaml", f"# first line\n{text}\n")
    classes = (Loop,) if "decoding" in text else (SFTConfig, ModelConfig)
    (problem,) = problems(classes, ["--config", file])
    assert problem.startswith(start) and f"({file}:2)" in problem and reason in problem.split("): ", 1)[1]


OPTIONAL = ("bitsandbytes", "wandb", "liger_kernel", "flash_attn")


@pytest.fixture
def installed(monkeypatch):
    """Makes the optional packages look as if these alone were installed."""
    find_spec = importlib.util.find_spec

    def only(*names):
        answers = {name: object() if name in names else None for name in OPTIONAL}
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: answers[name] if name in answers else find_spec(name, *rest),
        )

    return only


NEEDS = {
    "4 bit": (
        "load_in_4bit: true",
        "needs the package bitsandbytes, which is not installed: pip install bitsandbytes",
    ),
    "8-bit optimiser": ("optim: adamw_bnb_8bit", "pip install bitsandbytes"),
    "paged optimiser": ("optim: paged_lion_32bit", "pip install bitsandbytes"),
    "Liger": ("use_liger_kernel: true", "pip install liger-kernel"),
    "a known reporter": ("report_to: wandb", "pip install wandb"),
    "one of two reporters": ("report_to: [none, wandb]", "pip install wandb"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_is_a_problem_of_the_key_that_needs_it(tmp_path, installed, name):
    text, remedy = NEEDS[name]
    key = text.split(":")[0]
    file = write(tmp_path / "a.yaml", f"output_dir: runs/x\n{text}\nlora_r: 0\n")
    installed()
    found = problems((SFTConfig, ModelConfig), ["--config", file])
    assert [problem.split("`")[1] for problem in found] == ["lora_r", key]
    assert f"({file}:2): " in found[1] and remedy in found[1]
    installed("bitsandbytes", "liger_kernel", "wandb")
    (problem,) = problems((SFTConfig, ModelConfig), ["--config", file])
    assert problem.startswith("`lora_r`")


UNUSABLE = {
    "an unknown reporter": ("report_to: wandbb", "did you mean `wandb`?"),
    "no length": ("max_length: null", "must be a number of tokens"),
    "attention that a CPU has not": (
        "attn_implementation: flash_attention_2",
        "needs a GPU of compute capability 8.0",
    ),
    "attention that nobody has": ("attn_implementation: flash_atention_2", "did you mean `flash_attention_2`?"),
    "a quantisation that nobody has": ("bnb_4bit_quant_type: int4", "must be one of fp4, nf4"),
    "reentrant": ("gradient_checkpointing_kwargs: {use_reentrant: true}", "set use_reentrant: false"),
    "reentrant, by the newer name": (
        "activation_checkpointing_kwargs: '{use_reentrant: true}'",
        "use_reentrant: false",
    ),
    "no adapter": ("use_peft: false", "every stage trains a LoRA adapter"),
    "8 bit": ("load_in_8bit: true", "use `load_in_4bit: true`"),
    "a revision": ("model_revision: v2", "hf download NAME --revision REVISION"),
    "nested": ("use_bnb_nested_quant: true", "is always on"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_followed_is_refused_with_its_place(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text, remedy = UNUSABLE[name]
    file = write(tmp_path / "a.yaml", f"output_dir: runs/x\n{text}\n")
    (problem,) = problems((SFTConfig, ModelConfig), ["--config", file])
    assert problem.startswith(f"`{text.split(':')[0]}`: ") and f"({file}:2): " in problem and remedy in problem


def test_flash_attention_needs_a_package_too(monkeypatch, installed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    installed()
    assert "pip install flash-attn" in problems((ModelConfig,), ["--attn_implementation=flash_attention_2"])[0]
    installed("flash_attn")
    assert parse((ModelConfig,), ["--attn_implementation=flash_attention_2"])[0].attn_implementation


def test_what_changes_nothing_may_be_said():
    (training, model) = parse(
        (SFTConfig, ModelConfig),
        ["--output_dir=runs/x", "--use_peft=true", "--model_revision=main", "--lora_task_type=CAUSAL_LM",
         "--gradient_checkpointing_kwargs={use_reentrant: false}", "--report_to=[]"],
    )  # fmt: skip
    assert model.use_peft and training.gradient_checkpointing_kwargs == {"use_reentrant": False}


# Another value than the default, of the field's type.
OTHER = {
    "model_revision": "v2", "use_peft": False, "lora_target_parameters": ["mlp"], "lora_modules_to_save": ["embed_tokens"],
    "lora_task_type": "SEQ_CLS", "load_in_8bit": True, "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_field_of_a_model_s_configuration_is_read_or_refused(name):
    """A setting that is taken and passed over makes a run that is not the one which was asked for."""
    folder = Path(config.__file__).parent
    read = [path.name for path in (folder / "lora.py", folder / "model.py") if f"args.{name}" in path.read_text()]
    if not read:
        (problem,) = problems((ModelConfig,), [f"--{name}={yaml.safe_dump(OTHER[name], default_flow_style=True)}"])
        assert problem.startswith(f"`{name}`: ")
    assert bool(read) != (name in config.NO_EFFECT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nsteps: 1\nseed: 2\n", "`seed` (FILE:3): given twice, first in line 1"),
        ("options:\n  a: 1\n  a: 2\n", "`options.a` (FILE:3): given twice"),
        ("name: !!python/object/apply:os.getcwd []\n", "`FILE:1`: not safe YAML"),
        ("name: [a\n", "`FILE:2`: not safe YAML"),
        ("- steps\n", "must be a mapping"),
        ("1: steps\n", "`1` (FILE:1): a key must be a string"),
        ("extends: 3\n", "`extends`: 3 (FILE:1): must be one file name"),
        ("extends: recipe.yml\n", "`extends`: 'recipe.yml' (FILE:1)"),
        ("extends: bad.yaml\n", "extend each other in a circle: bad.yaml -> bad.yaml"),
        ("sft: 3\n", "`sft`: 3 (FILE:1): must be a mapping"),
        ("a: &a [*a]\nname: x\n", "FILE"),
        ("name: \x00\n", "not safe YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, text, reason):
    file = write(tmp_path / "bad.yaml", text)
    assert reason.replace("FILE", file) in problems((Loop,), ["--config", file], stage="sft")[0]


def test_a_circle_of_two_files(tmp_path):
    file = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in problems((Loop,), ["--config", file])[0]


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path / "sft.yaml", "")
    assert "no such file; did you mean `sft.yaml`?" in problems((Loop,), ["--config", str(tmp_path / "sftt.yaml")])[0]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--steps", "1.5"], "`steps`: '1.5' (command line): must be int"),
        (["--steps", "0"], "`steps`: '0' (command line): must lie in [1, inf)"),
        (["--learning-rate", "1"], "`learning-rate`: '1' (command line): no such key; did you mean `learning_rate`?"),
        (["--verbose"], "`verbose` (command line): has no value"),
        (["--layers", "a", "b"], "`b` (command line): belongs to no key"),
        (["--config"], "`config` (command line): has no value"),
        (["--decoding", "beam"], "`decoding`: 'beam' (command line): must be"),
    ],
)
def test_command_line_refused(argv, reason):
    (problem,) = problems((Loop,), argv)
    assert problem.startswith(reason)


def test_all_problems_at_once_with_the_known_names(tmp_path):
    file = write(tmp_path / "a.yaml", "lora_r: 16.5\nstepz: 1\nverbose: 'no'\n")
    with pytest.raises(ConfigError) as caught:
        parse((Loop, ModelConfig, DataConfig), ["--config", file, "--seed=true", "stray"])
    text = str(caught.value)
    assert text.startswith("the configuration has 6 problems:")
    assert [p.split("`")[1] for p in caught.value.problems] == [
        "stray",
        "stepz",
        "lora_r",
        "verbose",
        "seed",
        "dataset",
    ]
    assert "known names: " in text and "max_train_rows" in text.split("known names: ")[1]


def test_a_combination_that_the_class_itself_refuses():
    (problem,) = problems((PPOConfig,), ["--output_dir=runs/x", "--max_steps=5"])
    assert problem.startswith("PPOConfig: `max_steps` (command line) is 5, but the length of PPO is given in replies.")


@dataclasses.dataclass
class Halves:
    """A class with two checks of its own, one of which needs both fields."""

    whole: int = dataclasses.field(default=4, metadata={"range": "[1, inf)"})
    half: int = 2
    even: int = 0

    def __post_init__(self):
        found = [f"`half` is {self.half}, not half of whole"] if 2 * self.half != self.whole else []
        found += [f"`even` is {self.even}, which is odd"] if self.even % 2 else []
        if found:
            raise ConfigError(found)


def names(found):
    return [problem.split("`")[1] for problem in found]


def test_what_a_class_finds_is_said_together_with_what_is_wrong_in_its_fields(tmp_path):
    assert names(problems((Halves,), ["--half=3", "--even=1"])) == ["half", "even"]
    # no consequence of the default that stands in for the wrong value
    assert names(problems((Halves,), ["--half=3", "--even=1", "--whole=0"])) == ["whole", "even"]
    assert names(problems((Halves,), ["--whol=6", "--half=3", "--even=1"])) == ["whol", "even"]
    file = write(tmp_path / "a.yaml", "half: 2\neven: 1\n")
    assert problems((Halves,), ["--config", file]) == [f"Halves: `even` ({file}:2) is 1, which is odd"]
    (problem,) = problems((Halves,), ["--config", file, "--config", "nowhere.yaml"])
    assert problem.startswith("`nowhere.yaml`: no such file")


def test_ppo_s_rollout_and_its_coefficient_are_refused_together():
    argv = ["--output_dir=runs/x", "--kl_coef=-1", "--save_steps=7", "--max_steps=5"]
    assert names(problems((PPOConfig,), argv)) == ["kl_coef", "max_steps", "save_steps"]
    # a rollout lasts as many steps as num_ppo_epochs says, which is wrong here
    assert names(problems((PPOConfig,), [*argv, "--num_ppo_epochs=0"])) == ["kl_coef", "num_ppo_epochs", "max_steps"]
    assert names(problems((PPOConfig,), ["--output_dir=runs/x", "--fp16=true", "--save_steps=7"])) == [
        "fp16",
        "save_steps",
    ]


def test_a_path_that_no_stage_makes_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    text = "output_dir: runs/mine/sft\nlora_r: 0\ndataset: /nope\nmodel_name_or_path: ./no_base\n"
    file = write(tmp_path / "a.yaml", text)
    found = problems((DataConfig, SFTConfig, ModelConfig), ["--config", file])
    assert sorted(names(found)) == ["dataset", "lora_r", "model_name_or_path"]
    assert f"`dataset`: '/nope' ({file}:3): there is nothing there; correct the path" in found
    classes = (DataConfig, Loop, ModelConfig)
    file = write(
        tmp_path / "b.yaml", "output_dir: runs/mine/sft\ndataset: runs/mine/prepare\nmodel_name_or_path: ./base\n"
    )
    parse(classes, ["--config", file])  # the stage prepare may yet make its folder
    parse(classes, ["--config", file, "--model_name_or_path=org/name"])
    assert names(problems(classes, ["--config", file, "--dataset=runs/other/prepare"])) == ["dataset"]
    (tmp_path / "runs" / "other" / "prepare").mkdir(parents=True)
    parse(classes, ["--config", file, "--dataset=runs/other/prepare"])


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("--distinct_tokens=-5", "`distinct_tokens`: '-5' (command line): must lie in [1, inf)"),
        ("--max_length=0", "`max_length`: '0' (command line): must lie in [1, inf)"),
        ("--temperature=-1", "`temperature`: '-1' (command line): must lie in (0, inf)"),
        ("--seed=-1", "`seed`: '-1' (command line): must lie in [0, 4294967295]"),
        (
            "--reference_system=sfft",
            "EvaluateConfig: `reference_system` (command line) is 'sfft', but `systems` has base, sft; did you mean `sft`?",
        ),
    ],
)
def test_the_evaluation_s_settings_have_ranges_and_its_reference_is_a_system(word, problem):
    argv = ["--dataset=runs/x/prepare", "--output_dir=runs/x/evaluate", "--systems={base: null, sft: runs/x/sft}"]
    assert problems((EvaluateConfig,), [*argv, word]) == [problem]
    (evaluation,) = parse((EvaluateConfig,), [*argv, "--reference_system=base"])
    assert evaluation.reference_system == "base"


def test_an_unusual_rank_warns(caplog):
    with caplog.at_level(logging.WARNING):
        parse((ModelConfig,), ["--lora_r", "16"])
        assert not caplog.records
        parse((ModelConfig,), ["--lora_r", "12"])
    assert "`lora_r`: 12 (command line) is outside the usual ranks 4, 6, 8, 16, 32, 64" in caplog.text


def test_no_traceback_on_the_command_line():
    root = Path(config.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "rlhf/prepare.py", "--source=world", "--seed=many"],
        check=False,
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the configuration has 2 problems:") and "Traceback" not in done.stderr


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Device:
    """The three fields of TrainingArguments that the machine decides, with TRL's defaults."""

    use_cpu: bool = False
    bf16: bool | None = None
    fp16: bool = False


@pytest.mark.parametrize(
    ("machine", "argv", "expected"),  # expected: use_cpu, bf16, fp16
    [
        (CPU, [], (True, False, False)),
        (CPU, ["--bf16=true"], (True, True, False)),  # a CPU can, slowly
        (T4, [], (False, False, True)),
        (T4, ["--fp16=false"], (False, False, False)),
        (T4, ["--use_cpu=true"], (True, False, False)),
        (A100, [], (False, True, False)),
        (A100, ["--fp16=true"], (False, False, True)),
        (A100, ["--bf16=false"], (False, False, False)),
    ],
)
def test_the_machine_fills_what_nobody_names(monkeypatch, machine, argv, expected):
    monkeypatch.setattr(config, "_machine_defaults", lambda: machine)
    (device,) = parse((Device,), argv)
    assert (device.use_cpu, device.bf16, device.fp16) == expected


@pytest.mark.parametrize(
    ("machine", "argv", "start"),
    [
        (T4, ["--bf16=true"], "`bf16`: true (command line): needs a GPU of compute capability 8.0"),
        (CPU, ["--use_cpu=false"], "`use_cpu`: false (command line): this machine has no GPU"),
        (CPU, ["--fp16=true"], "`fp16`: true (command line): needs a GPU"),
        (A100, ["--fp16=true", "--bf16=true"], "`fp16`: true (command line): excludes bf16"),
        (T4, ["--fp16=true", "--use_cpu=true"], "`fp16`: true (command line): needs a GPU"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_by_name(monkeypatch, machine, argv, start):
    monkeypatch.setattr(config, "_machine_defaults", lambda: machine)
    assert problems((Device,), argv)[0].startswith(start)


@dataclasses.dataclass
class Base:
    """ModelConfig's dtype with TRL's default, which is float32 on every machine."""

    dtype: str | None = "float32"


@pytest.mark.parametrize(
    ("machine", "argv", "expected"),
    [
        (CPU, [], "float32"),
        (T4, [], "float16"),
        (T4, ["--use_cpu=true"], "float32"),
        (T4, ["--fp16=false"], "float32"),
        (T4, ["--dtype=float32"], "float32"),
        (A100, [], "bfloat16"),
        (A100, ["--fp16=true"], "float16"),
        (A100, ["--dtype=auto"], "auto"),
    ],
)
def test_a_base_is_loaded_in_what_it_is_trained_in(monkeypatch, machine, argv, expected):
    monkeypatch.setattr(config, "_machine_defaults", lambda: machine)
    assert parse((Device, Base), argv)[1].dtype == expected


def test_a_base_that_is_not_trained_is_loaded_in_the_machine_s_precision():
    assert parse((Loop, Base), [])[1].dtype == "auto"
    assert ModelConfig().dtype == "float32"  # what `auto` saves a T4 from


def test_an_accelerator_that_is_not_the_default_may_be_asked_for(monkeypatch):
    """Apple silicon: trained on the CPU unless a recipe says otherwise."""
    monkeypatch.setattr(config, "_has_accelerator", lambda: True)
    assert parse((Device,), []) == (Device(use_cpu=True, bf16=False, fp16=False),)
    assert parse((Device,), ["--use_cpu=false"]) == (Device(use_cpu=False, bf16=False, fp16=False),)


def test_this_machine_answers_what_the_parser_asks():
    assert set(machine_defaults()) == {"use_cpu", "bf16", "fp16"}


def test_trl_s_config_is_built_on_a_cpu_without_being_told():
    # SFTConfig() itself turns bf16 on
    (training,) = parse((SFTConfig,), ["--output_dir", "runs/x"])
    assert (training.use_cpu, training.bf16, training.fp16) == (True, False, False)


def test_the_launcher_s_file_does_not_decide_precision(monkeypatch):
    # `accelerate launch` hands on its file's mixed_precision so; two_t4.yaml says fp16, which a CPU cannot
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    (training,) = parse((SFTConfig,), ["--output_dir", "runs/x"])
    assert training.mixed_precision == "no"
    (training,) = parse((SFTConfig,), ["--output_dir", "runs/x", "--bf16", "true"])
    assert training.mixed_precision == "bf16"


# --- the plan by size ------------------------------------------------------------------------------------------------

SFT = (DataConfig, PlanConfig, SFTConfig, ModelConfig)
# For 106 rows and one process, by the table of MISSION: the middle band, 8 rows a step, a tenth of the rows as warm-up.
GOLDEN = {
    "lora_r": 16, "lora_alpha": 32, "num_train_epochs": 5, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "max_length": 640, "warmup_steps": 10,
}  # fmt: skip


@dataclasses.dataclass
class Sized(Device):
    """What the plan fills and the machine decides; SFTConfig would look for the other processes."""

    lora_r: int = 1
    lora_alpha: int = 1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_length: int | None = 1
    warmup_steps: float = 0


@pytest.fixture
def sized(tmp_path, monkeypatch):
    """A recipe and its data of so many rows; gives the command line of its sft.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write(tmp_path / "recipes" / "mine" / "recipe.yaml", "dataset: runs/mine/prepare\nseed: 3\n")

    def make(rows, text=""):
        if rows is not None:
            write(tmp_path / "runs" / "mine" / "prepare" / "dialogues_train.jsonl", '{"messages": []}\n' * rows)
        head = "extends: recipe.yaml\noutput_dir: runs/mine/sft\nplan_by_size: true\n"
        write(tmp_path / "recipes" / "mine" / "sft.yaml", head + text)
        return ["--config", "recipes/mine/sft.yaml"]

    return make


def resolved(configs):
    values = values_of(configs)
    return {key: values[key] for key in GOLDEN}


def test_a_stage_gets_the_plan_for_its_rows(sized):
    configs = parse(SFT, sized(106), "sft")
    assert resolved(configs) == GOLDEN
    plan = plan_of(configs)
    assert plan.settings() == GOLDEN and (plan.num_examples, plan.num_gpus) == (106, 1)
    assert not [reason for reason in plan.reasons.values() if "overridden" in reason]
    # the last row without its line end, and blank lines, which the reader passes over
    path = Path("runs/mine/prepare/dialogues_train.jsonl")
    path.write_text("{}\n" * 105 + "\n  \n{}")
    assert resolved(parse(SFT, sized(None), "sft")) == GOLDEN


def test_the_plan_goes_by_the_rows_that_are_read(sized):
    argv = sized(500)
    assert resolved(parse(SFT, argv, "sft")) == {
        "lora_r": 32, "lora_alpha": 64, "num_train_epochs": 3, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_length": 768, "warmup_steps": 50,
    }  # fmt: skip
    assert resolved(parse(SFT, [*argv, "--max_train_rows=106"], "sft")) == GOLDEN
    assert resolved(parse(SFT, [*argv, "--max_train_rows=1000"], "sft"))["lora_r"] == 32


def test_a_key_that_is_set_wins_over_the_plan(sized):
    Path("recipes/mine/recipe.yaml").write_text("dataset: runs/mine/prepare\nlora_r: 64\n")
    argv = sized(106, "num_train_epochs: 2\nwarmup_steps: 0.03\n")
    configs = parse(SFT, [*argv, "--max_length", "900"], "sft")
    changed = {"lora_r": 64, "num_train_epochs": 2, "warmup_steps": 0.03, "max_length": 900}
    assert resolved(configs) == GOLDEN | changed
    reasons = plan_of(configs).reasons
    assert {key: reason for key, reason in reasons.items() if "overridden" in reason} == {
        "lora_r": "overridden; the plan says 16", "num_train_epochs": "overridden; the plan says 5",
        "max_length": "overridden; the plan says 640", "warmup_steps": "overridden; the plan says 10",
    }  # fmt: skip


def test_without_the_key_there_is_no_plan(sized):
    configs = parse(SFT, [*sized(106), "--plan_by_size=false"], "sft")
    assert plan_of(configs) is None
    assert resolved(configs) == {
        key: value for cls in SFT for key, value in defaults(cls).items() if key in GOLDEN
    }  # fmt: skip


def test_two_gpus_share_the_planned_batch(sized, monkeypatch):
    """As the launcher says it to each process, and as `rlhf run` sees it before it starts them."""
    monkeypatch.setattr(config, "_machine_defaults", lambda: T4)
    argv, classes = sized(106), (DataConfig, PlanConfig, Sized)
    Path("recipes/mine/sft.yaml").write_text("plan_by_size: true\ndataset: runs/mine/prepare\n")
    two = GOLDEN | {"gradient_accumulation_steps": 2}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolved(parse(classes, argv)) == two
    assert resolved(parse(classes, [*argv, "--use_cpu=true"])) == two
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolved(parse(classes, argv)) == two
    assert resolved(parse(classes, [*argv, "--use_cpu=true"])) == GOLDEN


def test_three_gpus_are_named_with_all_other_problems(sized, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = problems(SFT, [*sized(106), "--lora_r=16.5", "--learning_rat=1"], "sft")
    assert [problem.split("`")[1] for problem in found] == ["learning_rat", "lora_r", "plan_by_size"]
    assert "(recipes/mine/sft.yaml:3): `num_gpus` 3 does not divide the effective batch of 8; use 1, 2, 4" in found[2]
    # with the data yet to come, which are a problem of their own if nothing will make them
    Path("runs/mine/prepare/dialogues_train.jsonl").unlink()
    assert "`num_gpus` 3" in problems(SFT, sized(None), "sft", before_prepare=True)[0]
    assert len(problems(SFT, sized(None), "sft")) == 2
    by_hand = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 1\n"
    sized(106)
    Path("recipes/mine/sft.yaml").write_text("plan_by_size: true\ndataset: runs/mine/prepare\n" + by_hand)
    configs = parse((DataConfig, PlanConfig, Sized), ["--config", "recipes/mine/sft.yaml"])
    assert resolved(configs) == GOLDEN | {"gradient_accumulation_steps": 1}
    assert plan_of(configs).effective_batch_size == 6


def test_missing_data_name_the_command_that_makes_them(sized):
    (problem,) = problems(SFT, sized(None), "sft")
    assert problem.startswith("`plan_by_size`: true (recipes/mine/sft.yaml:3): ")
    assert "runs/mine/prepare/dialogues_train.jsonl" in problem
    assert "`rlhf run recipes/mine --until prepare`" in problem
    assert "at least 1, got 0" in problems(SFT, sized(0), "sft")[0]


def test_before_prepare_a_plan_is_not_asked_for_its_rows(sized):
    argv = sized(None)
    # the values are the classes' own, whatever rows an earlier run has left
    assert resolved(parse(SFT, argv, "sft", before_prepare=True))["num_train_epochs"] == 3
    assert resolved(parse(SFT, sized(9), "sft", before_prepare=True))["num_train_epochs"] == 3
    assert resolved(parse(SFT, sized(9), "sft"))["num_train_epochs"] == 10


def test_a_saved_plan_is_read_back_equal(sized, tmp_path):
    configs = parse(SFT, sized(106), "sft")
    save(configs, tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["plan_by_size"] is True and {key: saved[key] for key in GOLDEN} == GOLDEN
    Path("runs/mine/prepare/dialogues_train.jsonl").unlink()  # nothing is left to plan, so nothing is counted
    assert parse(SFT, ["--config", str(tmp_path / "config.yaml")]) == configs


# --- merge, save, defaults -------------------------------------------------------------------------------------------


def test_merge_is_deep_and_leaves_its_inputs_alone():
    base = {"a": 1, "b": {"c": [1], "d": 2}, "e": {"f": 1}}
    override = {"b": {"c": [2, 3]}, "e": 5, "g": {"h": 1}}
    merged = merge(base, override)
    assert merged == {"a": 1, "b": {"c": [2, 3], "d": 2}, "e": 5, "g": {"h": 1}}
    merged["b"]["c"].append(4)
    merged["b"]["d"] = 0
    merged["g"]["h"] = 0
    assert base == {"a": 1, "b": {"c": [1], "d": 2}, "e": {"f": 1}}
    assert override == {"b": {"c": [2, 3]}, "e": 5, "g": {"h": 1}}


@pytest.mark.parametrize(
    "classes", [(SFTConfig, ModelConfig, DataConfig), (RewardConfig,), (DPOConfig,), (PPOConfig,), (Loop,)]
)
def test_saved_file_is_read_back_equal(tmp_path, classes):
    recipe = "output_dir: runs/x\nlearning_rate: 1e-5\n"
    if ModelConfig in classes:
        recipe += "dataset: runs/data\nlora_target_modules: all-linear\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    configs = parse(classes, ["--config", write(tmp_path / "a.yaml", recipe), "--seed", "3"])
    saved = tmp_path / "runs" / "config.yaml"
    save(configs, saved)
    assert parse(classes, ["--config", str(saved)]) == configs
    assert yaml.safe_load(saved.read_text())["seed"] == 3
    assert os.listdir(saved.parent) == ["config.yaml"]  # no temporary file is left


def test_save_quotes_what_looks_like_a_number(tmp_path):
    loop = Loop(name="1e-4", decoding="sampled", sizes=(5,))
    save([loop], tmp_path / "c.yaml")
    assert parse((Loop,), ["--config", str(tmp_path / "c.yaml")]) == (loop,)


def test_save_never_writes_a_token_and_refuses_a_contradiction(tmp_path):
    (training,) = parse((SFTConfig,), ["--hub_token", "hf_secret", "--output_dir", "runs/x"])
    save([training], tmp_path / "c.yaml")
    assert "hf_secret" not in (tmp_path / "c.yaml").read_text()
    with pytest.raises(ValueError, match="`seed` is 42 in one config and 1 in another"):
        save([training, Loop(output_dir="runs/x", learning_rate=training.learning_rate)], tmp_path / "d.yaml")
    assert not (tmp_path / "d.yaml").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    save([Loop(steps=1)], path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save([Loop(steps=2)], path)
    assert load_yaml(path)[0]["steps"] == 1 and os.listdir(tmp_path) == ["c.yaml"]


def test_a_token_is_not_shown_in_an_error():
    (problem,) = problems((Loop,), ["--hub_token", "hf_secret"])
    assert "hf_secret" not in problem


def test_defaults_are_fresh_and_leave_out_required_fields():
    assert defaults(Loop)["sizes"] == (1, 2) and "dataset" not in defaults(DataConfig)
    assert defaults(ModelConfig)["lora_r"] == 16
    defaults(SFTConfig)["include_for_metrics"].append("loss")
    assert defaults(SFTConfig)["include_for_metrics"] == []


def test_load_yaml_gives_the_line_of_each_key(tmp_path):
    file = write(tmp_path / "a.yaml", "# a comment\nseed: 1\n\nppo:\n  # why\n  kl_coef: 0.1\nrate: 3e-4\n")
    values, lines = load_yaml(file)
    assert values == {"seed": 1, "ppo": {"kl_coef": 0.1}, "rate": 0.0003}
    assert lines == {"seed": 2, "ppo": 4, "ppo.kl_coef": 6, "rate": 7}
    assert load_yaml(write(tmp_path / "empty.yaml", "")) == ({}, {})


# --- the tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, DPOConfig, PPOConfig, ModelConfig])
def test_every_default_of_trl_passes_the_check(cls):
    hints, values = get_type_hints(cls), defaults(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name != "output_dir":  # None is what its hint forbids; TRL replaces it
            config._check(fields[name], hints[name], value)
    assert len(values) > 15


def test_every_name_in_the_tables_is_somebody_s_field():
    names = {f.name for cls in (SFTConfig, RewardConfig, DPOConfig, ModelConfig, DataConfig, PPOConfig)
             for f in dataclasses.fields(cls)}  # fmt: skip
    for table in (config.RANGES, config.CHOICES, config.PATHS, config.SECRETS, config.RENAMED.values()):
        assert set(table) <= names


def test_the_reporters_and_optimisers_are_those_of_transformers():
    assert set(config.REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    plain = {name.value for name in OptimizerNames if not any(part in name.value for part in config.OPTIMISERS)}
    assert plain == {
        "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "sgd", "adagrad",
        "rmsprop",
    }  # fmt: skip


def test_importing_the_parser_is_cheap():
    code = (
        "import rlhf.config, sys; assert not {'torch', 'trl', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    root = Path(config.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
