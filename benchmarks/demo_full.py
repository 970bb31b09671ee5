"""The demo over several seeds, with its controls and the full held-out sets: the tables of docs/results.md.

    python benchmarks/demo_full.py [--seeds 1 2 3] [--output_dir runs/demo-full]

Beside the recipe's own systems it trains what a claim about them has to be held against: PPO with the rule as reward,
SFT on the chosen replies alone, and DPO and PPO on pairs whose labels are swapped at random. Writes `tables.md`, with a
verdict on each expectation, and prints JSON with every number. Whatever is done is not done again.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from evaluation.headline import guards
from evaluation.report import write_report
from evaluation.results import Score, System, load_runs
from rlhf.config import parse
from rlhf.files import write_text
from rlhf.pipeline import Step, config_classes, plan, run_step

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo"

# Sizes of the full held-out sets; the demo has 100 characters and 100 dialogues.
HELD_OUT = {"prepare.probe_characters": 500, "prepare.heldout_dialogues": 300}

# Name of a run, the stage that makes it, and what differs from the recipe. `{root}` is the seed's folder.
CONTROLS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("ppo_rule", "ppo", {"reward_adapter": "null", "reward_function": "rlhf.rewards:persona_rule"}),
    ("sft_chosen", "dpo", {"loss_type": "[sft]", "loss_weights": "[1.0]"}),
    # The preference term alone: the other one would learn from the right half of the swapped replies as SFT does.
    ("dpo_swapped", "dpo", {"swapped_share": "0.5", "loss_type": "[sigmoid]", "loss_weights": "[1.0]"}),
    ("reward_swapped", "reward", {"swapped_share": "0.5"}),
    ("ppo_swapped", "ppo", {"reward_adapter": "{root}/reward_swapped"}),
)
SYSTEMS = ("base", "sft", "dpo", "ppo", "ppo_rule", "sft_chosen", "dpo_swapped", "ppo_swapped")
# A bound that is absent meets no expectation: every comparison with NaN is false.
BOUNDS = (
    lambda score: score.value,
    lambda score: math.nan if score.low is None else score.low,
    lambda score: math.nan if score.high is None else score.high,
)
DECODINGS = {"greedy": "persona_consistency", "sampled": "persona_consistency_sampled"}
ROWS = (
    *DECODINGS.items(),
    ("KL to SFT", "kl_reference"),
    ("words", "length_words"),
    ("distinct-2", "distinct_2"),
    ("repetition", "repetition"),
)


def run_seed(root: Path, seed: int) -> None:
    """Train and evaluate every system of one seed in `root`."""
    overrides: dict[str, Any] = {"seed": str(seed), **{key: str(value) for key, value in HELD_OUT.items()}}
    *steps, evaluate = plan(RECIPE, tiny=False, until=None, root=root, overrides=overrides)
    by_stage = {step.stage: step for step in steps}
    for step in steps:
        run_step(step)
    for name, stage, changes in CONTROLS:
        run_step(variant(by_stage[stage], root / name, {k: v.format(root=root) for k, v in changes.items()}))
    systems = json.dumps({name: None if name == "base" else str(root / name) for name in SYSTEMS})
    run_step(variant(evaluate, root / "evaluate", {"systems": systems, "max_personas": "500", "max_facts": "1"}))
    write_report([root], root / "report")


def variant(step: Step, folder: Path, changes: dict[str, str]) -> Step:
    """The same stage with other settings, in a folder of its own."""
    argv = [*step.argv, f"--output_dir={folder}", *(f"--{key}={value}" for key, value in changes.items())]
    return Step(step.stage, argv, parse(config_classes(step.stage), argv, step.stage), folder)


def table(systems: dict[int, dict[str, System]]) -> list[str]:
    """Markdown lines, a row a system and seed."""
    lines = ["| system | seed | " + " | ".join(title for title, _ in ROWS) + " |", "|" + " --- |" * (len(ROWS) + 2)]
    for name in (*SYSTEMS, "oracle", "wrong_persona", "silence"):
        for seed, of_seed in systems.items():
            cells = [_cell(of_seed[name].metrics.get(metric)) for _, metric in ROWS]
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
    return lines


def accuracy_table(cards: dict[int, dict[str, Any]]) -> list[str]:
    """Markdown lines: the reward model's rank accuracy by kind of pair."""
    names = [
        key for key in next(iter(cards.values())) if key.startswith("eval_") and not key.endswith(("_low", "_high"))
    ]
    lines = ["| accuracy | " + " | ".join(f"seed {seed}" for seed in cards) + " |", "|" + " --- |" * (len(cards) + 1)]
    return lines + [
        f"| {name.removeprefix('eval_')} | " + " | ".join(f"{card[name]:.3f}" for card in cards.values()) + " |"
        for name in names
    ]


def verdicts(systems: dict[str, System]) -> dict[str, bool]:
    """Whether one seed's systems meet what the demo is meant to show; the limits were set before any run."""
    found = {}
    for decoding, metric in DECODINGS.items():
        value, low, high = ({name: bound(s.metrics[metric]) for name, s in systems.items()} for bound in BOUNDS)
        found[f"SFT is flawed: upper end below 0.5, {decoding}"] = high["sft"] < 0.5
        found[f"DPO: lower end at 0.85 or above, {decoding}"] = low["dpo"] >= 0.85
        found[f"PPO: 0.15 or more above SFT, intervals disjoint, {decoding}"] = (
            value["ppo"] >= value["sft"] + 0.15 and low["ppo"] > high["sft"]
        )
        found[f"PPO: lower end at 0.85 or above, {decoding}"] = low["ppo"] >= 0.85
        found[f"PPO with the rule as reward: 0.90 or above, {decoding}"] = value["ppo_rule"] >= 0.90
        for name in ("dpo_swapped", "ppo_swapped"):
            found[f"{name}: inside SFT's interval, {decoding}"] = low["sft"] <= value[name] <= high["sft"]
    for name in ("dpo", "ppo", "ppo_rule"):
        checks = guards(systems[name], list(systems.values()))
        found[f"{name}: within the guards of the report"] = all(passed for _, _, passed in checks)
    return found


def verdict_table(systems: dict[int, dict[str, System]]) -> list[str]:
    """Markdown lines: each expectation, and in which seeds it was met."""
    by_seed = {seed: verdicts(of_seed) for seed, of_seed in systems.items()}
    heads = " | ".join(f"seed {seed}" for seed in by_seed)
    return [f"| expectation | {heads} |", "|" + " --- |" * (len(by_seed) + 1)] + [
        f"| {name} | " + " | ".join("met" if found[name] else "**not met**" for found in by_seed.values()) + " |"
        for name in next(iter(by_seed.values()))
    ]


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.3f}" + ("" if score.low is None else f" [{score.low:.3f}, {score.high:.3f}]")


def main() -> None:
    """Run all seeds, then print the numbers and write `tables.md` beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-full"))
    arguments = parser.parse_args()
    folders = {seed: arguments.output_dir / f"seed-{seed}" for seed in arguments.seeds}
    for seed, folder in folders.items():
        run_seed(folder, seed)
    systems = {seed: {system.name: system for system in load_runs([folder])[0]} for seed, folder in folders.items()}
    cards = {
        seed: json.loads((folder / "reward" / "reward_card.json").read_text()) for seed, folder in folders.items()
    }
    tables = (verdict_table(systems), table(systems), accuracy_table(cards))
    write_text(arguments.output_dir / "tables.md", "\n\n".join("\n".join(lines) for lines in tables) + "\n")
    numbers = {
        name: {
            seed: {metric: of_seed[name].metrics.get(metric) for _, metric in ROWS}
            for seed, of_seed in systems.items()
        }
        for name in next(iter(systems.values()))
    }
    print(json.dumps({"systems": numbers, "verdicts": {seed: verdicts(s) for seed, s in systems.items()}}, indent=2))


if __name__ == "__main__":
    main()
