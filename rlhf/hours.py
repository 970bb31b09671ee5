"""How long the stages of a recipe take on T4s: an estimate, by rules that are stated here and shown with it.

A pass takes the longer of two times: that of its operations, each bound by arithmetic or by memory traffic as counted on "meta"
tensors (`rlhf/meta_step.py`), and that of starting them one by one from Python. A decoded token reads all weights and
the cache once. What is not known before the data are made stands in the recipe, or is assumed and said.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.meta_step import T4, Work

SECONDS_A_KERNEL = 25e-6  # assumed: one operation started by Python on a cloud machine's core
SECONDS_A_STAGE = 90  # assumed: imports, loading the base, saving
WEEK_HOURS = 30  # of GPU, Kaggle's quota; a session with two T4s counts once
PROBES_A_FACT = 11  # measured on Synthetic-Persona-Chat: 1,768 probes of 166 facts
RULE = (
    "hours: an estimate. Each operation takes its arithmetic at 40 % of a T4's 65 TFLOPS or its traffic at 80 % of 320 GB/s, "
    "whichever is longer, but a pass no less than 25 µs an operation; a decoded token reads weights and cache once, and "
    "every reply is taken at its longest; 1.5 minutes a stage for loading."
)


@dataclass(frozen=True)
class Rows:
    """How many rows a stage has, and how long they are in tokens, prompt alone for PPO.

    Attributes:
        said: where the numbers come from.
    """

    train: int
    heldout: int
    mean: float
    said: str


def pass_seconds(work: Work, share: float = 1.0) -> float:
    """Of a pass over `share` of the tokens that were counted."""
    return max(work.seconds * share, work.kernels * SECONDS_A_KERNEL)


def token_seconds(weights: float, cache: float, kernels: float) -> float:
    """Of one token of each reply that is decoded together."""
    return max((weights + cache) / T4.bytes_per_second, kernels * SECONDS_A_KERNEL)


def training_hours(
    values: Mapping[str, Any], rows: Rows, train: Work, evaluate: Work, gpus: int, length: int, decode: float
) -> float:
    """Of SFT, reward or DPO: its steps, its held-out batches and its samples.

    Args:
        values: The stage's settings.
        rows: Its data.
        train: A training step of rows of `length` tokens.
        evaluate: A held-out batch likewise.
        gpus: That share a step.
        length: Tokens of the rows that were counted.
        decode: Seconds of a decoded token.
    """
    share = min(1.0, rows.mean / length)
    batch, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    steps = values["max_steps"]
    if steps <= 0:
        steps = math.ceil(rows.train / (batch * accumulation * gpus) * values["num_train_epochs"])
    seconds = steps * accumulation * pass_seconds(train, share)
    batches = math.ceil(rows.heldout / (values["per_device_eval_batch_size"] * gpus))
    seconds += _evaluations(values, steps) * batches * pass_seconds(evaluate, share)
    if values["stage"] != "reward":
        seconds += (1 + steps // values["sample_steps"]) * 40 * decode
    return (seconds + SECONDS_A_STAGE) / 3600


def ppo_hours(
    values: Mapping[str, Any],
    rows: Rows,
    train: Work,
    score: Work,
    prefill: Work,
    gpus: int,
    length: int,
    decode: float,
) -> float:
    """Of PPO: replies, their scores under policy, reference and rewards, updates, and held-out rollouts.

    Args:
        values: The stage's settings; `generation_batch_size` is of the replies that were counted.
        rows: Its prompts.
        train: A training step of a train batch of rows of `length` tokens.
        score: A forward pass of as many.
        prefill: The reading of the prompts that are replied to together.
        gpus: That share a rollout.
        length: Tokens of the rows that were counted, reply included.
        decode: Seconds of a decoded token.
    """
    share = min(1.0, (rows.mean + values["response_length"]) / length)
    batch, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    local = batch * accumulation * values["num_mini_batches"]
    rollouts = math.ceil(values["total_episodes"] / (local * gpus))
    together = values["generation_batch_size"]
    reply = pass_seconds(prefill, share) + values["response_length"] * decode
    passes = 2 + values["reward_adapters"]

    def rollout(episodes: int, passes: int) -> float:
        scored = math.ceil(episodes / batch) * passes * pass_seconds(score, share)
        return math.ceil(episodes / together) * reply + scored

    updates = values["num_ppo_epochs"] * values["num_mini_batches"] * accumulation
    seconds = rollouts * (rollout(local, passes) + updates * pass_seconds(train, share))
    steps = rollouts * values["num_ppo_epochs"] * values["num_mini_batches"]
    # All held-out prompts are one rollout; one more pass is for the likelihood of the reference replies.
    seconds += _evaluations(values, steps) * rollout(math.ceil(rows.heldout / gpus), passes + 1)
    if values.get("probe"):
        seconds += (1 + steps // values["probe_steps"]) * math.ceil(144 / 64) * reply
    return (seconds + SECONDS_A_STAGE) / 3600


def evaluation_hours(
    values: Mapping[str, Any], rows: Rows, prefill: Work, gpus: int, length: int, decode: float
) -> float:
    """Of the evaluation: replies to dialogues and probes, and the likelihoods, for each system.

    Args:
        values: The stage's settings.
        rows: Held-out dialogues.
        prefill: The reading of one batch of prompts of `length` tokens.
        gpus: That share the batches.
        length: Tokens of these prompts.
        decode: Seconds of a decoded token.
    """
    dialogues = min(rows.heldout, values["max_dialogues"] or rows.heldout)
    facts = min(values["max_personas"] or 10, 100) * min(values["max_facts"] or 20, 20)
    replies = dialogues + 2 * PROBES_A_FACT * facts
    # Each probe has two statements to choose from, each ranked reply 20 candidates that share its prompt.
    read = dialogues + 2 * PROBES_A_FACT * facts + 4 * min(values["max_ranked"] or dialogues, dialogues * 8)
    size, share = values["batch_size"] * gpus, min(1.0, rows.mean / length)
    seconds = math.ceil(replies / size) * (pass_seconds(prefill, share) + values["max_new_tokens"] * decode)
    seconds += math.ceil(read / size) * 2 * pass_seconds(prefill, share)
    return (len(values["systems"]) * seconds + SECONDS_A_STAGE) / 3600


def evaluates(values: Mapping[str, Any]) -> bool:
    """Whether a training stops to evaluate at all."""
    return _strategy(values) != "no"


def _evaluations(values: Mapping[str, Any], steps: int) -> int:
    """How often it does."""
    if not evaluates(values):
        return 0
    every = values["eval_steps"] or values["logging_steps"]
    return int(steps // every) if _strategy(values) == "steps" else max(1, round(values["num_train_epochs"]))


def _strategy(values: Mapping[str, Any]) -> str:
    return str(getattr(values["eval_strategy"], "value", values["eval_strategy"]))
