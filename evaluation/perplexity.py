"""Perplexity of reference replies given persona and history, and of plain text, from sums that add up.

Of a dialogue only the tokens of the replies are scored. Sums are added over the corpus and the exponential is taken
once: a mean of per-reply perplexities would be ruled by outliers. Perplexity per token depends on the tokenizer; per
word and per byte do not, so only these compare across models. A reply's end-of-turn token is scored, and is not a word.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel

from evaluation.intervals import NUM_RESAMPLES, Interval, Statistic, cluster_bootstrap, ratio
from rlhf.chat import render_within
from rlhf.persona import with_persona
from rlhf.token_logprobs import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COUNTS = {"perplexity_token": "tokens", "perplexity_word": "words", "bits_per_byte": "bytes"}


def count_words(text: str) -> int:
    """Pieces between white space as lm-evaluation-harness counts them: white space at an end makes an empty piece."""
    return len(re.split(r"\s+", text))


def count_bytes(text: str) -> int:
    """Bytes of the UTF-8 encoding."""
    return len(text.encode("utf-8"))


def perplexity(nll_sum: float, count: float) -> float:
    """exp(nll_sum / count), with nll_sum in nats over the corpus: per token, word or byte, as `count` is.

    Raises:
        ValueError: when `count` is not positive.
    """
    if count <= 0:
        raise ValueError(f"`count` = {count}: perplexity needs at least one scored unit.")
    nats = nll_sum / count
    # Beyond the range of a double the answer is infinite, and says so; a bound that is not there (NaN) stays so.
    return math.inf if nats >= 709 else math.exp(nats)


def bits_per_byte(nll_sum: float, num_bytes: float) -> float:
    """nll_sum / (num_bytes ln 2), in bits; lm-evaluation-harness, api/metrics.py, `bits_per_byte`."""
    if num_bytes <= 0:
        raise ValueError(f"`num_bytes` = {num_bytes}: bits per byte needs at least one byte.")
    return nll_sum / (num_bytes * math.log(2))


def nats_statistic(name: str) -> Statistic:
    """What makes `perplexity_token`, `perplexity_word` or `bits_per_byte` of totals (nats, units) ``(..., 2)``."""

    def number(totals: np.ndarray) -> np.ndarray:
        nats = ratio(totals)
        with np.errstate(over="ignore"):  # beyond the range of a double the answer is infinite
            return nats / math.log(2) if name == "bits_per_byte" else np.exp(nats)

    return number


def perplexity_intervals(
    rows: Sequence[Mapping[str, Any]],
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """`perplexity_token`, `perplexity_word` and `bits_per_byte`, micro-averaged, with cluster-bootstrap intervals.

    The interval is taken of the mean nats per unit and carried through the (monotone) exponential.

    Args:
        rows: of `dialogue_nats` or `text_nats`, with the `nats` and counts of a dialogue or text.
        clusters: what each row belongs to.
    """
    intervals = {}
    for name, unit in COUNTS.items():
        nats = cluster_bootstrap(
            [row["nats"] for row in rows], [row[unit] for row in rows], clusters, num_resamples, seed
        )
        intervals[name] = Interval(
            *(bits_per_byte(x, 1) if name == "bits_per_byte" else perplexity(x, 1) for x in nats)
        )
    return intervals


# -- dialogues and plain text ------------------------------------------------------------------------------------------


def dialogue_nats(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    dialogues: Sequence[Mapping[str, Any]],
    max_length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Nats of all replies of each dialogue given persona and history, and what they may be divided by.

    Args:
        dialogues: rows with `persona` and `messages`; replies with `"train": False` are context only.
        max_length: tokens; older turns are dropped, and are then neither scored nor counted.

    Returns:
        For each dialogue `{"nats", "tokens", "words", "bytes", "replies"}`; tokens include the end of each reply.
    """
    rendered = [render_within(with_persona(row), tokenizer, max_length) for row in dialogues]
    nats = reply_nll(
        model, [r["input_ids"] for r, _ in rendered], [r["assistant_mask"] for r, _ in rendered], batch_size
    )
    rows = []
    for row, (r, dropped), nll in zip(dialogues, rendered, nats, strict=True):
        replies = [
            m["content"] for m in row["messages"][dropped:] if m["role"] == "assistant" and m.get("train", True)
        ]
        rows.append(
            {
                "nats": nll,
                "tokens": sum(r["assistant_mask"]),
                "words": sum(map(count_words, replies)),
                "bytes": sum(map(count_bytes, replies)),
                "replies": len(replies),
            }
        )
    return rows


def rolling_windows(
    ids: Sequence[int], prefix_id: int, max_length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Cut a text into disjoint pieces, each with the context that it is scored after; every token is scored once.

    A piece has at most `max_length` tokens. The first follows the prefix token alone, a full one behind it the one
    token before it, and the last one, shorter, as much text as fills the model's `max_length` inputs.

    Source: lm-evaluation-harness, utils.py, `get_rolling_token_windows` with context_len 1, made disjoint.

    Returns:
        (context, piece); the model reads context and piece without its last token.

    Raises:
        ValueError: when `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"`max_length` = {max_length}: a window needs one token or more.")
    for start in range(0, len(ids), max_length):
        piece = ids[start : start + max_length]
        yield ([prefix_id] if start == 0 else ids[start + len(piece) - max_length - 1 : start]), piece


def text_nats(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """Nats of each whole text in rolling windows, as lm-evaluation-harness scores it, and what to divide them by.

    It is their `loglikelihood_rolling` with `add_bos_token=False`. Left to its default, version 0.4.13 keeps the BOS
    that some tokenizers write in front of a text and scores it like a word.

    Args:
        max_length: of a window in tokens; by default the model's context.

    Returns:
        For each text `{"nats", "tokens", "words", "bytes"}`. No end of text is scored.

    Raises:
        ValueError: when a text has no token, the tokenizer neither BOS nor EOS, or the model no known context.
    """
    prefix_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config: Any = model.config
    length = max_length or getattr(config, "max_position_embeddings", None)
    if prefix_id is None or length is None:
        raise ValueError("the tokenizer needs a BOS or EOS token, and the model a context; else give `max_length`.")
    rows, owners, ids, masks = [], [], [], []
    for number, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"`texts`: text {number} has no token, {text[:40]!r}; leave it out.")
        for context, piece in rolling_windows(tokens, prefix_id, length):
            owners.append(number)
            ids.append([*context, *piece])
            masks.append([0] * len(context) + [1] * len(piece))
        rows.append({"nats": 0.0, "tokens": len(tokens), "words": count_words(text), "bytes": count_bytes(text)})
    for owner, nats in zip(owners, reply_nll(model, ids, masks, batch_size), strict=True):
        rows[owner]["nats"] += nats
    return rows


def perplexities(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`perplexity_token`, `perplexity_word` and `bits_per_byte` of rows of `dialogue_nats` or `text_nats`."""
    nats = sum(row["nats"] for row in rows)
    return {
        name: (bits_per_byte if name == "bits_per_byte" else perplexity)(nats, sum(row[unit] for row in rows))
        for name, unit in COUNTS.items()
    }


@torch.no_grad()
def reply_nll(
    model: "PreTrainedModel", rows_ids: Sequence[Sequence[int]], rows_masks: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Sum of -log p(token | everything before it) over the masked tokens of each row, in nats, in the order given.

    Batches are right-padded with an attention mask and made of rows of like length. Log-probabilities are those of
    `rlhf.token_logprobs`: in float32, at the masked positions alone. The last token of a row is scored and not read.

    Args:
        model: causal language model; it is put in evaluation mode and left in the mode it had.
        rows_ids: token ids, rows of any length.
        rows_masks: 1 where the token is scored (the reply and its end), else 0; a row a row of `rows_ids`.
        batch_size: rows a forward pass.

    Raises:
        ValueError: naming every row whose mask does not fit its ids, scores the first token (it has no context) or
            nothing at all, or of which the model would read more than its context.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` = {batch_size}: it must be 1 or more.")
    config: Any = model.config
    _check_rows(rows_ids, rows_masks, getattr(config, "max_position_embeddings", None))
    order = sorted(range(len(rows_ids)), key=lambda i: len(rows_ids[i]), reverse=True)  # the largest batch fails first
    sums = np.zeros(len(rows_ids))
    was_training = model.training
    model.eval()
    try:
        read, head = _states_and_head(model)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows_ids[batch[0]])
            ids, read_mask, scored = (
                torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
                for rows in (
                    [rows_ids[i] for i in batch],
                    [[1] * (len(rows_ids[i]) - 1) for i in batch],
                    [rows_masks[i] for i in batch],
                )
            )
            states = read(input_ids=ids[:, :-1], attention_mask=read_mask[:, :-1], use_cache=False)
            logprobs, _ = token_logprobs(states, head, ids[:, 1:], scored[:, 1:])
            sums[batch] = -logprobs.double().sum(dim=1).cpu().numpy()
    finally:
        model.train(was_training)
    return sums.tolist()


def _states_and_head(model: "PreTrainedModel") -> tuple[Callable[..., torch.Tensor], torch.nn.Module]:
    """What reads ids into states `(batch, length, hidden)`, and the layer that makes logits of these.

    Some families do more to their logits than their output layer does (Gemma 2 caps them, Cohere scales them). Of such
    a model the logits themselves are the states.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = causal.get_output_embeddings()

    def states(**inputs: Any) -> torch.Tensor:
        return causal.base_model(**inputs).last_hidden_state

    def logits(**inputs: Any) -> torch.Tensor:
        return causal(**inputs).logits

    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    plain = torch.allclose(
        head(states(input_ids=token)).float(), logits(input_ids=token).float(), rtol=1e-4, atol=1e-4
    )
    return (states, head) if plain else (logits, torch.nn.Identity())


def _check_rows(rows_ids: Sequence[Sequence[int]], rows_masks: Sequence[Sequence[int]], context: int | None) -> None:
    if len(rows_ids) != len(rows_masks):
        raise ValueError(f"`rows_masks` has {len(rows_masks)} rows, `rows_ids` {len(rows_ids)}: give one mask a row.")
    problems = []
    for index, (ids, mask) in enumerate(zip(rows_ids, rows_masks, strict=True)):
        if len(ids) != len(mask):
            problems.append(f"row {index}: {len(ids)} ids but a mask of {len(mask)}")
        elif not any(mask):
            problems.append(f"row {index}: nothing to score, the mask is all 0")
        elif mask[0]:
            problems.append(f"row {index}: the first token cannot be scored, it has no context")
        elif context is not None and len(ids) - 1 > context:
            problems.append(f"row {index}: {len(ids) - 1} tokens to read, the model's context is {context}; cut it")
    if problems:
        raise ValueError("`rows_ids` / `rows_masks`:\n" + "\n".join(problems))
