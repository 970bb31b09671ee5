"""Every shipped recipe is parsed by the very script that it configures, and says what each of its keys is for."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import rlhf.config
import rlhf.record
from rlhf.config import STAGES, load_yaml, values_of
from rlhf.pipeline import config_classes
from rlhf.plan import KEYS

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHARED = ("recipe", "tiny", "card")
MODULES = {stage: f"rlhf.{stage}" for stage in STAGES} | {"base": "rlhf.pretrain", "evaluate": "evaluation"}


def stage_of(path: Path) -> str:
    """`sft.yaml` and variants of it such as `sft_small.yaml` configure the stage sft."""
    return re.split("[_-]", path.stem)[0]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


STAGE_FILES = [path for path in RECIPES if stage_of(path) in STAGES]
WITH_OVERLAY = [(path, path.with_name("tiny.yaml")) for path in STAGE_FILES if path.with_name("tiny.yaml").exists()]


class Parsed(Exception):
    """Ends a script as soon as its arguments are parsed."""


@pytest.fixture
def parse_with_script(monkeypatch):
    """Start the script of a stage as a user does, and return the values that its own call of `parse` gives."""
    parsed = {}
    parse = rlhf.config.parse

    def spy(*args, **kwargs):
        parsed.update(values_of(parse(*args, **kwargs, before_prepare=True)))  # there are no data here
        raise Parsed

    monkeypatch.setattr(rlhf.config, "parse", spy)
    monkeypatch.setattr(rlhf.record, "parse", spy)

    def start(stage, *files):
        configs = [word for file in files for word in ("--config", str(file))]
        monkeypatch.setattr(sys, "argv", [stage, *(["run"] if stage == "evaluate" else []), *configs])
        with pytest.raises(Parsed):
            runpy.run_module(MODULES[stage], run_name="__main__", alter_sys=True)
        return parsed

    return start


def test_the_recipes_are_found():
    assert {"prepare", "sft", "reward", "dpo", "ppo", "evaluate"} <= {stage_of(path) for path in STAGE_FILES}
    assert len(STAGE_FILES) >= 12 and len({path.parent for path in STAGE_FILES}) >= 2
    unknown = [name_of(path) for path in RECIPES if stage_of(path) not in STAGES and path.stem not in SHARED]
    assert not unknown, f"neither a stage nor shared, so nothing parses it: {unknown}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runpy, of a module that another test has imported
@pytest.mark.parametrize("path", STAGE_FILES, ids=name_of)
def test_recipe_is_parsed_by_its_script(path, parse_with_script):
    values = parse_with_script(stage_of(path), path)
    assert values["output_dir"].startswith(f"runs/{path.parent.name}/")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("paths", WITH_OVERLAY, ids=lambda paths: name_of(paths[0]))
def test_recipe_is_parsed_with_its_overlay(paths, parse_with_script):
    values = parse_with_script(stage_of(paths[0]), *paths)
    assert values["output_dir"].startswith(f"runs/{paths[0].parent.name}/")


def test_my_character_leaves_to_the_plan_what_its_rows_decide(tmp_path, monkeypatch):
    """All but the epochs; laid over it, tiny.yaml has sizes of its own."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "runs" / "my-character" / "prepare" / "dialogues_train.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("{}\n" * 3000)

    def sizes(*names):
        configs = [word for name in names for word in ("--config", str(ROOT / "recipes" / "my-character" / name))]
        values = values_of(rlhf.config.parse(config_classes("sft"), configs, "sft"))
        return tuple(values[key] for key in KEYS)

    assert sizes("sft.yaml") == (32, 64, 2, 4, 2, 768, 50)
    assert sizes("sft.yaml", "tiny.yaml") == (16, 32, 2, 16, 1, 448, 0.03)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem == "recipe"], ids=name_of)
def test_shared_file_is_extended(path):
    """Else its keys would be read by nobody, and so checked by nobody."""
    assert any(load_yaml(other)[0].get("extends") == "recipe.yaml" for other in path.parent.glob("*.yaml"))


@pytest.mark.parametrize(
    "path", [p for p in STAGE_FILES if stage_of(p) in ("sft", "reward", "dpo", "ppo")], ids=name_of
)
def test_training_keeps_its_best_checkpoint(path):
    values, _ = load_yaml(path)
    # Without one of the two keys the Trainer determines no best, and rotation keeps the last ones alone.
    assert values.get("load_best_model_at_end") or values.get("metric_for_best_model")
    assert values["save_steps"] % values["eval_steps"] == 0


def uncommented(path: Path) -> list[str]:
    """Keys without a comment behind them or in the line above; a stage's section is judged by its keys."""
    values, lines = load_yaml(path)
    keys = [key for key in values if key != "extends" and key not in STAGES]
    keys += [f"{stage}.{key}" for stage in STAGES if isinstance(values.get(stage), dict) for key in values[stage]]
    text = ["", *path.read_text(encoding="utf-8").splitlines()]
    missing = []
    for key in keys:
        behind = re.sub(r"'[^']*'|\"[^\"]*\"", "", text[lines[key]])
        if not re.search(r"\s#\s*\w", behind) and not re.match(r"\s*#\s*\w", text[lines[key] - 1]):
            missing.append(key)
    return missing


def test_uncommented_keys_are_seen(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1  # why\n# why\nb: 1\nc: 'x # y'\n\nd: 1\nsft:\n  e: 1\n  f: 1  # why\nextends: b.yaml\n")
    assert uncommented(path) == ["c", "d", "sft.e"]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_key_has_a_comment(path):
    assert not uncommented(path)


@pytest.mark.parametrize("path", STAGE_FILES, ids=name_of)
def test_recipe_is_headed_by_its_launch_line(path):
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header and f"--config {name_of(path)}" in header[0]


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=name_of)
def test_accelerate_config_is_read_by_accelerate(path):
    loaded = load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    # Unquoted, `no` would be a boolean, on which accelerate fails. DeepSpeed has its precision in its own settings.
    assert isinstance(values["distributed_type"], str)
    assert isinstance(values.get("mixed_precision"), str) or values["distributed_type"] == "DEEPSPEED"
    assert f"--config_file {name_of(path)}" in path.read_text()
    expected = {"cpu": (1, True, "no"), "one_gpu": (1, False, "no"), "two_t4": (2, False, "fp16")}
    if path.stem in expected:
        assert (loaded.num_processes, loaded.use_cpu, loaded.mixed_precision) == expected[path.stem]


def test_accelerate_configs_are_found():
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} >= {"cpu", "one_gpu", "two_t4"}
