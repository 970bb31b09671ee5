"""README.md is true: its map against the files, its commands against the parsers, its Python against the signatures."""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import evaluation.__main__
import rlhf.cli
from rlhf.config import parse
from rlhf.pipeline import MODULES, config_classes, plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {name.replace(".", "/") + ".py": stage for stage, name in MODULES.items() if name.startswith("rlhf.")}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    texts = [*blocks("bash"), *blocks("bash", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))]
    return [
        line for text in texts for line in text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)
    ]


MAP = dict(line.split(maxsplit=1) for line in blocks("text", README[README.index("## The map") :])[0].splitlines())


def test_every_module_is_on_the_map():
    files = {
        path.relative_to(ROOT).as_posix() for name in ("rlhf", "evaluation") for path in (ROOT / name).rglob("*.py")
    }
    assert len(files) > 35
    assert {name for name in MAP if name.endswith(".py")} == files


def test_everything_on_the_map_is_there():
    assert not [name for name in MAP if not (ROOT / name).exists()]


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name} \?=" if equals else rf"^\.PHONY:.* {name}\b"
        assert re.search(pattern, makefile, flags=re.MULTILINE), f"{name}: not in the Makefile"


def check_pip(words: list[str]) -> None:
    assert words[:2] == ["install", "-c"] and (ROOT / words[2]).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = re.fullmatch(r"\.(?:\[(.*)\])?", words[-1])
    assert wanted and set(filter(None, (wanted[1] or "").split(","))) <= set(extras)


def check_stage(stage: str, words: list[str]) -> None:
    assert "--config" in words
    parse(config_classes(stage), words, stage)


def check_launch(words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words)
    assert arguments.config_file is None or (ROOT / arguments.config_file).is_file()
    if arguments.module:
        assert arguments.training_script == "evaluation"
        check_evaluation(arguments.training_script_args)
    else:
        check_stage(SCRIPTS[arguments.training_script], arguments.training_script_args)


def check_evaluation(words: list[str]) -> None:
    if words[0] == "run":
        check_stage("evaluate", words[1:])
    else:
        evaluation.__main__.make_parser().parse_args(words)


def check_rlhf(words: list[str]) -> None:
    arguments = rlhf.cli.make_parser().parse_args(words)
    if words[0] == "run":
        overrides = dict(word.split("=", 1) for word in arguments.set)
        root = arguments.output_dir or Path("runs") / arguments.recipe.name
        assert plan(arguments.recipe, arguments.tiny, arguments.until, root, overrides)


def check(command: str) -> None:
    """Fail, or exit as the parser does, on a command that would not be accepted."""
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif program == "rlhf":
        check_rlhf(words)
    elif (program, words[0]) == ("accelerate", "launch"):
        check_launch(words[1:])
    elif (program, words[:2]) == ("python", ["-m", "evaluation"]):
        check_evaluation(words[2:])
    elif program == "python" and words[0] in SCRIPTS:
        check_stage(SCRIPTS[words[0]], words[1:])
    else:
        raise AssertionError(f"nothing here checks {command!r}")


# What a reader has of his own, and something of the same kind that is here: a path that leads nowhere is refused.
OWN = {"my_card.yaml": "recipes/my-character/card.yaml", "./some-small-llama": "./recipes/demo/base"}


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    for own, here in OWN.items():
        command = command.replace(own, here)
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make demmo",
        "make demo VENVV=none",
        "pip install -c constraint.txt .",
        "pip install -c constraints.txt '.[devel]'",
        "rlhf runn recipes/demo",
        "rlhf run recipes/demmo",
        "rlhf run recipes/demo --set ppo.kl_coeff=0.1",
        "rlhf run recipes/demo --untill sft",
        "rlhf chat runs/demo/ppo --persona x",
        "accelerate launch rlhf/sfft.py --config recipes/demo/sft.yaml",
        "accelerate launch rlhf/sft.py --config recipes/demo/sfft.yaml",
        "accelerate launch --config_file accelerate_configs/three_t4.yaml rlhf/sft.py --config recipes/demo/sft.yaml",
        "python rlhf/prepare.py --config recipes/demo/prepare.yaml --seeed 1",
        "python -m evaluation scores replies.jsonl --output results.json",
        "python -m evaluation run --config recipes/demo/evaluate.yaml --systemss a",
        "accelerate launch --module evaluations run --config recipes/demo/evaluate.yaml",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, ValueError, KeyError)):
        check(command)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_names_and_arguments_exist(code):
    tree = ast.parse(code)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    ours = [node for node in calls if node.func.id in known]
    assert {"PPOTrainer", "PPOConfig", "Persona", "run"} <= {node.func.id for node in ours}
    for node in ours:
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        inspect.signature(known[node.func.id]).bind(*node.args, **keywords)
