"""The demo over several seeds, with its controls and the full held-out sets: the tables of docs/results.md.

    python benchmarks/demo_full.py [--seeds 1 2 3] [--output_dir runs/demo-full]

Beside the recipe's own systems it trains what a claim about them has to be held against: PPO with the rule as reward,
SFT on the chosen replies alone, and DPO and PPO on pairs whose labels are swapped at random. Prints JSON with every
number, and writes the tables. Whatever is done is not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from evaluation.report import write_report
from rlhf.config import parse
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
ROWS = (
    ("greedy", "persona_consistency"),
    ("sampled", "persona_consistency_sampled"),
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
    adapters = {name: None if name == "base" else str(root / name) for name in SYSTEMS}
    systems = json.dumps({**adapters, "oracle": None, "wrong_persona": None, "silence": None})
    run_step(variant(evaluate, root / "evaluate", {"systems": systems, "max_personas": "500", "max_facts": "1"}))
    write_report([root], root / "report")


def variant(step: Step, folder: Path, changes: dict[str, str]) -> Step:
    """The same stage with other settings, in a folder of its own."""
    argv = [*step.argv, f"--output_dir={folder}", *(f"--{key}={value}" for key, value in changes.items())]
    return Step(step.stage, argv, parse(config_classes(step.stage), argv, step.stage), folder)


def table(root: Path, seeds: list[int]) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines, a row a system and seed, and the same numbers as a dictionary."""
    lines = ["| system | seed | " + " | ".join(title for title, _ in ROWS) + " |", "|" + " --- |" * (len(ROWS) + 2)]
    numbers: dict[str, Any] = {}
    for system in (*SYSTEMS, "oracle", "wrong_persona", "silence"):
        for seed in seeds:
            results = json.loads((root / f"seed-{seed}" / "evaluate" / system / "results.json").read_text())
            metrics = results["metrics"]
            numbers.setdefault(system, {})[seed] = {name: metrics.get(name) for _, name in ROWS}
            cells = [_cell(metrics.get(name)) for _, name in ROWS]
            lines.append(f"| {system} | {seed} | " + " | ".join(cells) + " |")
    return lines, numbers


def accuracy_table(root: Path, seeds: list[int]) -> list[str]:
    """Markdown lines: the reward model's rank accuracy by kind of pair."""
    cards = [json.loads((root / f"seed-{seed}" / "reward" / "reward_card.json").read_text()) for seed in seeds]
    names = [name for name in cards[0] if name.startswith("eval_") and not name.endswith(("_low", "_high"))]
    lines = ["| accuracy | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|" + " --- |" * (len(seeds) + 1)]
    return lines + [
        f"| {name.removeprefix('eval_')} | " + " | ".join(f"{card[name]:.3f}" for card in cards) + " |"
        for name in names
    ]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    bounds = "" if row["ci_low"] is None else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"{row['value']:.3f}{bounds}"


def main() -> None:
    """Run all seeds, then print the numbers and write `tables.md` beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-full"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run_seed(arguments.output_dir / f"seed-{seed}", seed)
    lines, numbers = table(arguments.output_dir, arguments.seeds)
    lines += ["", *accuracy_table(arguments.output_dir, arguments.seeds)]
    (arguments.output_dir / "tables.md").write_text("\n".join(lines) + "\n")
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
