"""Learning curves of PPO's two critics, `value_model: head` and `adapter`, at equal processor time: JSON and a figure.

    rlhf run recipes/demo --until reward
    python benchmarks/critic_curves.py [--run runs/demo] [--seconds 50] [--seeds 1 2 3] [--output critic_curves.json]

Both start from the SFT and the reward adapter of a finished run and train by the demo's recipe on its shorter prompts, one
after the other, in one process with one thread; which goes first changes from seed to seed. A training lasts `--seconds`
of the processor, so that other work on the machine gives neither more steps; loading and measuring are not counted. The
learning rate falls to zero over that time, as the recipe's does over its episodes, so that both end their schedule together.

Five times on the way the policy is measured: on held-out prompts by the learned reward (sampled, with the same random
numbers each time) and by the probes that no reward sees (greedy). `area` is a measure's mean over the time, `end` its last
value. The rule for the default was written down before the first run: the critic with the higher mean area of
`eval_objective/rlhf_reward`, if all seeds agree in the sign; else the head, which needs less memory.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rlhf.files import git_commit, write_text

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "ppo.yaml"
SIDES = ("head", "adapter")
MEASURES = ("eval_objective/rlhf_reward", "eval_objective/scores", "eval_objective/kl", "right", "kept")
MEASUREMENTS = 5  # beside the one at the start
LONGEST = {"train": 3, "heldout": 5}  # messages of a prompt: shorter ones than the recipe's, for time
DECIDES = "eval_objective/rlhf_reward"


def train(side: str, run: Path, seed: int, seconds: float) -> list[dict[str, float]]:
    """One training; what was measured on the way, with the processor's seconds and the episodes until then."""
    import torch
    from transformers import TrainerCallback
    from trl import ModelConfig

    from evaluation.probes import HeldOutProbes
    from rlhf.config import DataConfig, parse
    from rlhf.data.columns import load_rows, prompt_columns
    from rlhf.lora import with_adapter
    from rlhf.model import add_score_head, load_base, load_tokenizer
    from rlhf.ppo import ParentConfig, add_rewards, start_of_critic
    from rlhf.ppo_trainer import PPOConfig, PPOTrainer
    from rlhf.reward_watch import ProbeConfig
    from rlhf.roles import VALUE_ADAPTER

    torch.set_num_threads(1)
    changes = {
        "dataset": run / "prepare", "sft_adapter": run / "sft", "reward_adapter": run / "reward",
        "output_dir": run / "critic_curves", "value_model": side, "seed": seed, "lr_scheduler_type": "constant",
        "total_episodes": 1_000_000, "save_strategy": "no", "eval_strategy": "no", "use_cpu": True,
        "per_device_eval_batch_size": 128, "disable_tqdm": True, "warmup_steps": 0,
    }  # fmt: skip
    argv = ["--config", str(RECIPE), *(f"--{key}={value}" for key, value in changes.items())]
    classes = (DataConfig, ParentConfig, ProbeConfig, PPOConfig, ModelConfig)
    data_args, parents, _, args, model_args = parse(classes, argv, "ppo")
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    model = load_base(model_args, tokenizer)
    add_score_head(model)
    model = with_adapter(model, parents.sft_adapter, "default", trainable=True)
    model = with_adapter(model, parents.sft_adapter, "reference")
    adapters, functions, weights = add_rewards(model, parents)
    if side == "adapter":
        model = with_adapter(model, start_of_critic(parents), VALUE_ADAPTER, trainable=True)
    dataset = Path(data_args.dataset)
    train_rows, held_out = (
        [row for row in load_rows(dataset / f"prompts_{part}.jsonl") if len(row["prompt"]) <= longest]
        for part, longest in LONGEST.items()
    )
    trainer = PPOTrainer(
        model=model, args=args, reward_adapter=adapters, reward_functions=functions, reward_weights=weights,
        train_dataset=prompt_columns(train_rows, tokenizer, args.max_length),
        eval_dataset=prompt_columns(held_out, tokenizer, args.max_length), processing_class=tokenizer,
    )  # fmt: skip
    probe = HeldOutProbes(dataset, args.max_length, args.response_length)
    curve: list[dict[str, float]] = []
    warmup = 8  # the recipe's

    class Clock(TrainerCallback):
        """Measure, set the learning rate, and stop, by the seconds that training alone has taken."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.process_time()  # moves on by what measuring takes
            self.measure(state)

        def spent(self) -> float:
            return time.process_time() - self.began

        def measure(self, state: Any) -> None:
            spent, before = self.spent(), time.process_time()
            metrics = trainer.evaluate()
            probes = {name: statistics.fmean(scores) for name, scores in probe(model, tokenizer).items()}
            found = {**metrics, **probes}
            episodes = state.global_step // args.steps_per_rollout * args.rollout_size
            curve.append(
                {"seconds": round(spent, 2), "episodes": episodes, **{name: found[name] for name in MEASURES}}
            )
            self.began += time.process_time() - before

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            left = max(0.0, 1 - self.spent() / seconds)
            for group in trainer.optimizer.param_groups:
                group["lr"] = args.learning_rate * left * min(1.0, (state.global_step + 1) / warmup)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % args.steps_per_rollout == 0:
                control.should_training_stop = self.spent() >= seconds
                if self.spent() >= seconds / MEASUREMENTS * len(curve):
                    self.measure(state)

    trainer.add_callback(Clock())
    trainer.train()
    return curve


def area(curve: list[dict[str, float]], measure: str, seconds: float) -> float:
    """Mean of a measure over the first `seconds` of a curve, by the trapezoid rule."""
    total, last = 0.0, curve[0]
    for point in curve[1:]:
        stop = min(point["seconds"], seconds)
        if stop <= last["seconds"]:
            break
        part = (stop - last["seconds"]) / (point["seconds"] - last["seconds"])
        reached = last[measure] + part * (point[measure] - last[measure])
        total += (stop - last["seconds"]) * (last[measure] + reached) / 2
        last = {"seconds": stop, measure: reached}
    return total / last["seconds"]


def summary(curves: dict[str, dict[int, list[dict[str, float]]]]) -> dict[str, Any]:
    """Areas and ends by side and seed, differences head - adapter, and the default by the rule."""
    found: dict[str, Any] = {"sides": {}, "head_minus_adapter": {}}
    seconds = min(curve[-1]["seconds"] for by_seed in curves.values() for curve in by_seed.values())
    for side, by_seed in curves.items():
        found["sides"][side] = {
            "episodes": {seed: curve[-1]["episodes"] for seed, curve in by_seed.items()},
            "area": {m: {s: round(area(c, m, seconds), 4) for s, c in by_seed.items()} for m in MEASURES},
            "end": {m: {s: round(c[-1][m], 4) for s, c in by_seed.items()} for m in MEASURES},
        }
    head, adapter = (found["sides"][side] for side in SIDES)
    for kind in ("area", "end"):
        found["head_minus_adapter"][kind] = {
            m: {seed: round(value - adapter[kind][m][seed], 4) for seed, value in head[kind][m].items()}
            for m in MEASURES
        }
    differences = list(found["head_minus_adapter"]["area"][DECIDES].values())
    found["seconds"] = seconds
    found["default"] = "adapter" if all(d < 0 for d in differences) else "head"
    return found


def plot(curves: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    """Held-out reward and probes against seconds and against episodes; a line a seed."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    rows = ((DECIDES, "held-out reward less KL penalty"), ("kept", "held-out facts kept, greedy"))
    columns = (("seconds", "seconds of one core"), ("episodes", "episodes"))
    for axes, (measure, title) in zip(panels, rows, strict=True):
        for axis, (clock, label) in zip(axes, columns, strict=True):
            for side, by_seed in curves.items():
                style = ("C0", "-") if side == "head" else ("C1", "--")
                for number, curve in enumerate(by_seed.values()):
                    axis.plot(
                        [point[clock] for point in curve], [point[measure] for point in curve], style[1],
                        color=style[0], marker=".", alpha=0.8, label=side if number == 0 else None,
                    )  # fmt: skip
            axis.set(xlabel=label, ylabel=title)
            axis.legend(title="value_model")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run of the demo")
    parser.add_argument("--seconds", type=float, default=50, help="of the processor, for each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="also write the JSON here, and the figure beside it")
    arguments = parser.parse_args()
    curves: dict[str, dict[int, list[dict[str, float]]]] = {side: {} for side in SIDES}
    for number, seed in enumerate(arguments.seeds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            began = time.time()
            with contextlib.redirect_stdout(sys.stderr):  # libraries print, and standard output is for the JSON
                curves[side][seed] = train(side, arguments.run.resolve(), seed, arguments.seconds)
                print(side, seed, f"{time.time() - began:.0f} s", curves[side][seed][-1], flush=True)
        result = {  # what is done is kept, should a later training fail
            "commit": git_commit(), "machine": platform.platform(), "cores": os.cpu_count(),
            "budget_seconds": arguments.seconds, **summary(curves), "curves": curves,
        }  # fmt: skip
        if arguments.output:
            write_text(arguments.output, json.dumps(result, indent=2) + "\n")
            plot(curves, arguments.output.with_suffix(".png"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
