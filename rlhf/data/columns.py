"""Rows to the token columns that each trainer reads. String prompts and message rows go through the same functions."""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.chat import Message, render, render_within
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
        raise FileNotFoundError(f"`dataset`: there is no {path}. The stage `prepare` makes it.")
    rows = read_jsonl(path, limit)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def sft_columns(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`input_ids` and `labels` (-100 but on the assistant's turns and their stop tokens)."""

    def columns(row: Row) -> tuple[dict[str, Any], int]:
        rendered, dropped = render_within(with_persona(row), tokenizer, max_length)
        pairs = zip(rendered["input_ids"], rendered["assistant_mask"], strict=True)
        return {"input_ids": rendered["input_ids"], "labels": [id if mask else -100 for id, mask in pairs]}, dropped

    return _columns(rows, columns, max_length)


def preference_columns(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, and `kind`; a completion ends with the stop token.

    The oldest turns of a prompt go first, as far as the longer of the two completions needs it.
    """

    def columns(row: Row) -> tuple[dict[str, Any], int]:
        chosen, rejected = (_completion_ids(row, key, tokenizer) for key in ("chosen", "rejected"))
        longer = max(len(chosen), len(rejected))
        prompt, dropped = render_within(_prompt(row), tokenizer, max_length, True, completion_length=longer)
        ids = {"prompt_ids": prompt["input_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
        return {**ids, "kind": row.get("kind", "")}, dropped

    return _columns(rows, columns, max_length)


def swap_labels(rows: Sequence[Row], share: float, seed: int) -> list[dict[str, Any]]:
    """Preference rows of which a random `share` has chosen and rejected in each other's place."""
    rng = random.Random(seed)
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < share else dict(row)
        for row in rows
    ]


def reward_columns(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`chosen_ids` and `rejected_ids`, each with the prompt in front, as TRL's RewardTrainer wants them."""
    pairs = preference_columns(rows, tokenizer, max_length)
    return pairs.map(
        lambda row: {key: row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")},
        remove_columns=["prompt_ids"],
    )


def prompt_columns(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`prompt_ids`, ending with the opening of a reply, and the row itself as JSON in `row` for reward callables.

    A row's `reference`, the reply that stands in the data, becomes `reference_ids`.
    """

    def columns(row: Row) -> tuple[dict[str, Any], int]:
        prompt, dropped = render_within(_prompt(row), tokenizer, max_length, add_generation_prompt=True)
        reference = _completion_ids(row, "reference", tokenizer) if row.get("reference") else None
        return {"prompt_ids": prompt["input_ids"], "reference_ids": reference, "row": json.dumps(row)}, dropped

    return _columns(rows, columns, max_length)


def _prompt(row: Row) -> list[Message]:
    messages = with_persona(row)
    if not messages or messages[-1]["role"] != "user":
        raise PromptError(f"`prompt` must end with a turn of the user, got {messages[-1:]}")
    return messages


def _completion_ids(row: Row, key: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a reply and its stop token. They follow from the last user turn: earlier turns do not change them."""
    completion = row[key] if isinstance(row[key], list) else [{"role": "assistant", "content": row[key]}]
    if [message["role"] for message in completion] != ["assistant"]:
        raise PromptError(f"`{key}` must be one message of the assistant, or its text, got {completion}")
    rendered = render([*_prompt(row)[-1:], *completion], tokenizer)
    pairs = zip(rendered["input_ids"], rendered["assistant_mask"], strict=True)
    return [id for id, mask in pairs if mask]


def _columns(rows: Sequence[Row], columns: Callable[[Row], tuple[dict[str, Any], int]], max_length: int) -> Dataset:
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(columns(row))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    cut = [dropped for _, dropped in made if dropped]
    if cut:
        logger.warning(
            "%d of %d rows lost their oldest turns (%d in all) to fit `max_length` %d.",
            len(cut), len(rows), sum(cut), max_length,
        )  # fmt: skip
    # `length` is what the Trainer's group_by_length goes by where there are no `input_ids`.
    return Dataset.from_list([{**values, "length": _length(values)} for values, _ in made])


def _length(values: Mapping[str, Any]) -> int:
    return sum(len(ids) for name, ids in values.items() if name.endswith("_ids") and ids)
