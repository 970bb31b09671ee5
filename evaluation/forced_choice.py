"""Forced choice: is a fact likelier as the answer to its question than what somebody else would say?

A probe without generation. Behind the direct question stands the true statement, or a statement of the same slot by
another persona; the one with the higher mean log-probability a token, end of turn included, is chosen. Chance is 0.5.
It shows what a small model knows before its replies keep any fact. It shows less than `evaluation.probes` does: the true
statement stands in the prompt, so that a model which only copies passes, and nobody has to resist a suggestion.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.bots import fact_of
from evaluation.intervals import Interval, rate_interval
from evaluation.perplexity import reply_nll
from evaluation.ranking import candidate_ids, first_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def choices_of(probes: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """The choice at each direct question: its true statement, and one of somebody else, drawn by the seed and the fact.

    Only questions at the first turn are taken: what comes before the others costs more than all the rest to read, and
    drift is what probes measure.

    The other statement is that of another probed persona with a value that the probe knows to be another (it is among
    its `slot_values`). Where there is none, as with a single persona, it is the true one with such a value in its place.
    A fact that neither fits is left out.

    Returns:
        For each `{"persona", "persona_id", "fact_id", "turn", "split", "history", "question", "true", "false"}`.
    """
    said: dict[str, dict[str, str]] = defaultdict(dict)  # slot -> value -> the statement
    for row in probes:
        if statement := fact_of(row, row):
            said[_slot(row)].setdefault(row["value"], statement)
    first = min((row["turn"] for row in probes), default=0)
    choices = []
    for row in probes:
        statement = fact_of(row, row)
        if row["kind"] != "direct" or row["turn"] != first or statement is None:
            continue
        own = {*row["persona_values"].values(), row["value"]}
        others = [value for value in dict.fromkeys(row["slot_values"]) if value not in own]
        false = [said[_slot(row)][value] for value in others if value in said[_slot(row)]]
        false = [text for text in false if text not in row["persona"]] or _exchanged(statement, row["value"], others)
        if not false:
            continue
        drawn = random.Random(f"forced_choice/{seed}/{row['fact_id']}").choice(false)
        kept = ("persona", "persona_id", "fact_id", "turn", "split", "history", "question")
        choices.append({**{key: row[key] for key in kept}, "true": statement, "false": drawn})
    return choices


def _slot(row: Mapping[str, Any]) -> str:
    """Two facts of one slot are told apart by a number: "like", "like (2)"."""
    return re.sub(r" \(\d+\)$", "", row["slot"])


def _exchanged(statement: str, value: str, others: Sequence[str]) -> list[str]:
    found = re.search(rf"(?<![\w']){re.escape(value)}(?![\w'])", statement, re.IGNORECASE)
    return [statement[: found.start()] + other + statement[found.end() :] for other in others] if found else []


def statement_nats(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    choices: Sequence[Mapping[str, Any]],
    max_length: int,
    batch_size: int,
) -> list[tuple[float, float]]:
    """Mean of -log p a token of the true and of the false statement of each choice, in nats, end of turn included.

    Args:
        choices: of [`choices_of`].
        max_length: tokens; older turns are dropped for both statements alike.
    """
    ids, masks = [], []
    for row in choices:
        messages = [*row["history"], {"role": "user", "content": row["question"]}]
        dialogue = {"persona": row["persona"], "messages": messages}
        prompt, replies = candidate_ids(dialogue, len(messages), [row["true"], row["false"]], tokenizer, max_length)
        ids += [prompt + reply for reply in replies]
        masks += [[0] * len(prompt) + [1] * len(reply) for reply in replies]
    means = [nats / sum(mask) for nats, mask in zip(reply_nll(model, ids, masks, batch_size), masks, strict=True)]
    return list(zip(means[::2], means[1::2], strict=True))


def chosen(true: float, false: float) -> float:
    """1 when the true statement has the fewer nats a token, 0.5 when both have the same, else 0."""
    return first_place([true, false], 0)


def choice_interval(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> Interval:
    """Share of choices that are right, with the interval over personas, or over facts where there is one persona.

    Args:
        rows: choices with `right` from [`chosen`].
    """
    unit = "persona_id" if len({row["persona_id"] for row in rows}) > 1 else "fact_id"
    return rate_interval([row["right"] for row in rows], [row[unit] for row in rows], seed=seed)
