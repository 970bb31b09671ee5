"""The verdicts of the demo over seeds: each can be met and can be missed, by hand-made scores."""

import importlib.util
from pathlib import Path

import pytest

from evaluation.results import Score, System
from rlhf.pipeline import config_classes, plan

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("demo_full", ROOT / "benchmarks" / "demo_full.py")
demo_full = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo_full)


def system(name, value, low, high, words=5.0):
    share = Score(value, low, high, 500, "share of facts", True)
    metrics = dict.fromkeys(demo_full.DECODINGS.values(), share)
    for metric, number in {"length_words": words, "ead": 0.5, "repetition": 0.1, "question_rate": 0.1}.items():
        metrics[metric] = Score(number, None, None, 500, "", None)
    metrics["kl_reference"] = Score(1.0, None, None, 500, "", None)
    return System(name, name, "run", metrics, [], {}, [])


def made(**changes):
    values = {
        "sft": (0.02, 0.01, 0.04), "dpo": (0.9, 0.85, 0.95), "ppo": (0.9, 0.85, 0.95), "ppo_rule": (0.9, 0.8, 0.95),
        "dpo_swapped": (0.04, 0.02, 0.06), "ppo_swapped": (0.01, 0.0, 0.02),
    }  # fmt: skip
    return {name: system(name, *bounds) for name, bounds in {**values, **changes}.items()}


def test_all_met():
    found = demo_full.verdicts(made())
    assert len(found) == 17 and all(found.values())


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"dpo": (0.9, 0.849, 0.95)}, "DPO: lower end"),
        ({"ppo": (0.9, 0.849, 0.95)}, "PPO: lower end"),
        ({"ppo_rule": (0.899, 0.85, 0.95)}, "PPO with the rule"),
        ({"dpo_swapped": (0.041, 0.02, 0.06)}, "dpo_swapped: inside"),
        ({"ppo_swapped": (0.009, 0.0, 0.02)}, "ppo_swapped: inside"),
    ],
)
def test_one_missed(changes, missed):
    found = demo_full.verdicts(made(**changes))
    assert {name.split(",")[0] for name, met in found.items() if not met} == {
        name.split(",")[0] for name in found if name.startswith(missed)
    }


def test_longer_replies_break_the_guards():
    systems = made() | {"ppo": system("ppo", 0.9, 0.85, 0.95, words=11.0)}  # 2.2 times the words of SFT
    assert [name for name, met in demo_full.verdicts(systems).items() if not met] == [
        "ppo: within the guards of the report"
    ]


def test_controls_are_the_recipe_with_the_named_changes(tmp_path):
    steps = {step.stage: step for step in plan(demo_full.RECIPE, False, None, tmp_path, {"seed": "1"})}
    for name, stage, changes in demo_full.CONTROLS:
        step = demo_full.variant(
            steps[stage], tmp_path / name, {k: v.format(root=tmp_path) for k, v in changes.items()}
        )
        before, after = ({k: v for c in s.configs for k, v in vars(c).items()} for s in (steps[stage], step))
        moved = {key for key in before if before[key] != after[key]} - {"distributed_state"}
        assert moved == {"output_dir", *changes} and len(step.configs) == len(config_classes(stage))
