"""Rows to the token columns that each trainer reads. String prompts and message rows go through the same functions."""

import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.chat import Message, render, render_within, reply_ids
from rlhf.files import read_jsonl
from rlhf.persona import PromptError, with_persona

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


def load_rows(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSON-lines file.

    Raises:
        FileNotFoundError: naming the stage that makes the file.
        ValueError: if the file has no rows, or a line is no JSON object.
    """
    if not Path(path).is_file():
        stage = "pairs" if Path(path).parent.name == "pairs" else "prepare"
        raise FileNotFoundError(f"`dataset`: there is no {path}. The stage `{stage}` makes it.")
    rows = read_jsonl(path, limit)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def sft_columns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_truncated_share: float = 1.0
) -> Dataset:
    """`input_ids` and `labels` (-100 but on the assistant's turns and their stop tokens).

    A reply with `"train": False` is context; what follows the last trained reply teaches nothing and is left out.
    """

    def columns(row: Row) -> tuple[dict[str, Any], Cut]:
        messages = _until_last_trained(with_persona(row))
        rendered, dropped = render_within(messages, tokenizer, max_length)
        pairs = zip(rendered["input_ids"], rendered["assistant_mask"], strict=True)
        labels = [id if mask else -100 for id, mask in pairs]
        whole = len(render(messages, tokenizer)["input_ids"]) if dropped else len(labels)
        return {"input_ids": rendered["input_ids"], "labels": labels}, Cut(dropped, whole)

    return _columns(rows, columns, max_length, max_truncated_share)


def preference_columns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_truncated_share: float = 1.0
) -> Dataset:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, and `kind`; a completion ends with the stop token.

    The oldest turns of a prompt go first, as far as the longer of the two completions needs it.
    """

    def columns(row: Row) -> tuple[dict[str, Any], Cut]:
        chosen, rejected = (_completion_ids(row, key, tokenizer) for key in ("chosen", "rejected"))
        longer = max(len(chosen), len(rejected))
        prompt, cut = _prompt_within(row, tokenizer, max_length, longer)
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "kind": row.get("kind", "")}, cut

    return _columns(rows, columns, max_length, max_truncated_share)


def swap_labels(rows: Sequence[Row], share: float, seed: int) -> list[dict[str, Any]]:
    """Preference rows of which a random `share` has chosen and rejected in each other's place."""
    rng = random.Random(seed)
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < share else dict(row)
        for row in rows
    ]


def reward_columns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_truncated_share: float = 1.0
) -> Dataset:
    """`chosen_ids` and `rejected_ids`, each with the prompt in front, as TRL's RewardTrainer wants them."""
    pairs = preference_columns(rows, tokenizer, max_length, max_truncated_share)
    return pairs.map(
        lambda row: {key: row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")},
        remove_columns=["prompt_ids"],
    )


def prompt_columns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_truncated_share: float = 1.0
) -> Dataset:
    """`prompt_ids`, ending with the opening of a reply, and the row itself as JSON in `row` for reward callables.

    A row's `reference`, the reply that stands in the data, becomes `reference_ids`.
    """

    def columns(row: Row) -> tuple[dict[str, Any], Cut]:
        prompt, cut = _prompt_within(row, tokenizer, max_length)
        reference = _completion_ids(row, "reference", tokenizer) if row.get("reference") else None
        return {"prompt_ids": prompt, "reference_ids": reference, "row": json.dumps(row)}, cut

    return _columns(rows, columns, max_length, max_truncated_share)


@dataclass(frozen=True)
class Cut:
    """What `max_length` did to a row: turns dropped, and the ids that it would have without a limit."""

    dropped: int
    whole: int


def _until_last_trained(messages: list[Message]) -> list[Message]:
    # The very first message is never a reply (see `rlhf.chat.render`).
    trained = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and m.get("train", True)]
    if not trained:
        raise PromptError("`messages` has no reply of the assistant to train on; leave the row out")
    return messages[: trained[-1] + 1]


def _prompt(row: Row) -> list[Message]:
    messages = with_persona(row)
    if not messages or messages[-1]["role"] != "user":
        raise PromptError(f"`prompt` must end with a turn of the user, got {messages[-1:]}")
    return messages


def _prompt_within(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_length: int = 0
) -> tuple[list[int], Cut]:
    messages = _prompt(row)
    prompt, dropped = render_within(messages, tokenizer, max_length, True, completion_length)
    whole = render(messages, tokenizer, add_generation_prompt=True) if dropped else prompt
    return prompt["input_ids"], Cut(dropped, len(whole["input_ids"]) + completion_length)


def _completion_ids(row: Row, key: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a row's reply and its stop token."""
    completion = row[key] if isinstance(row[key], list) else [{"role": "assistant", "content": row[key]}]
    if [message["role"] for message in completion] != ["assistant"]:
        raise PromptError(f"`{key}` must be one message of the assistant, or its text, got {completion}")
    if not completion[0].get("train", True):
        raise PromptError(f"`{key}` is a reply with `train` false, which is context only; leave the row out")
    return reply_ids(_prompt(row)[-1], completion[0]["content"], tokenizer)


def _columns(
    rows: Sequence[Row],
    columns: Callable[[Row], tuple[dict[str, Any], Cut]],
    max_length: int,
    max_truncated_share: float,
) -> Dataset:
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(columns(row))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    dropped = [cut.dropped for _, cut in made if cut.dropped]
    if dropped:
        summary = (
            f"{len(dropped)} of {len(rows)} rows lost their oldest turns ({sum(dropped)} in all) to fit "
            f"`max_length` {max_length}."
        )
        if len(dropped) > max_truncated_share * len(rows):
            remedy = length_remedy([cut.whole for _, cut in made], max_truncated_share)
            raise ValueError(f"{summary} {remedy}")
        logger.warning("%s", summary)
    # `length` is what the Trainer's group_by_length goes by where there are no `input_ids`.
    return Dataset.from_list([{**values, "length": _length(values)} for values, _ in made])


def length_remedy(lengths: Sequence[int], max_truncated_share: float) -> str:
    """What `max_length` would do for rows of these lengths (in ids), as a sentence."""
    allowed = math.floor(max_truncated_share * len(lengths))
    enough = sorted(lengths, reverse=True)[min(allowed, len(lengths) - 1)]
    return (
        f"`max_truncated_share` allows {max_truncated_share:.0%}. With `max_length` {enough} the share is kept, with "
        f"{max(lengths)} nothing is cut."
    )


def _length(values: Mapping[str, Any]) -> int:
    return sum(len(ids) for name, ids in values.items() if name.endswith("_ids") and ids)
