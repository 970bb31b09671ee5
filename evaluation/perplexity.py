"""Perplexity of reference replies given persona and history, from sums that add up over replies.

Only the tokens of the reply are scored. Sums are added over the corpus and the exponential is taken once: a mean of
per-reply perplexities would be ruled by outliers. Perplexity per token depends on the tokenizer; per word and per byte
do not, so only these compare across models. A reply's end-of-turn token is scored, and is not a word.
"""

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.intervals import NUM_RESAMPLES, Interval, cluster_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def count_words(text: str) -> int:
    """Words split at white space, as lm-evaluation-harness counts them for `word_perplexity`."""
    return len(text.split())


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
    # Beyond the range of a double the answer is infinite, and says so.
    return math.exp(nll_sum / count) if nll_sum / count < 709 else math.inf


def bits_per_byte(nll_sum: float, num_bytes: float) -> float:
    """nll_sum / (num_bytes ln 2), in bits; lm-evaluation-harness, api/metrics.py, `bits_per_byte`."""
    if num_bytes <= 0:
        raise ValueError(f"`num_bytes` = {num_bytes}: bits per byte needs at least one byte.")
    return nll_sum / (num_bytes * math.log(2))


def perplexity_intervals(
    nll_sums: Sequence[float],
    num_tokens: Sequence[int],
    num_words: Sequence[int],
    num_bytes: Sequence[int],
    clusters: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """`perplexity_token`, `perplexity_word` and `bits_per_byte`, micro-averaged, with cluster-bootstrap intervals.

    The interval is taken of the mean nats per unit and carried through the (monotone) exponential.

    Args:
        nll_sums: nats, one sum a reply (`reply_nll`).
        num_tokens, num_words, num_bytes: scored tokens, words and bytes of each reply.
        clusters: the dialogue of each reply.
    """
    counts = {"perplexity_token": num_tokens, "perplexity_word": num_words, "bits_per_byte": num_bytes}
    nats = {
        name: cluster_bootstrap(nll_sums, denominators, clusters, num_resamples, seed)
        for name, denominators in counts.items()
    }
    return {
        name: Interval(*(bits_per_byte(x, 1) if name == "bits_per_byte" else perplexity(x, 1) for x in interval))
        for name, interval in nats.items()
    }


@torch.no_grad()
def reply_nll(
    model: "PreTrainedModel", rows_ids: Sequence[Sequence[int]], rows_masks: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Sum of -log p(token | everything before it) over the masked tokens of each row, in nats, in the order given.

    Batches are right-padded with an attention mask and made of rows of like length. Log-probabilities are taken in
    float32 at the masked positions alone, one row at a time, so that no log-softmax of the batch is ever held.

    Args:
        model: causal language model; it is put in evaluation mode and left in the mode it had.
        rows_ids: token ids, rows of any length.
        rows_masks: 1 where the token is scored (the reply and its end), else 0; a row a row of `rows_ids`.
        batch_size: rows a forward pass.

    Raises:
        ValueError: naming every row whose mask does not fit its ids, scores the first token (it has no context) or
            nothing at all, or that is longer than the model's context.
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
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows_ids[batch[0]])
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, index in enumerate(batch):
                length = len(rows_ids[index])
                input_ids[row, :length] = torch.tensor(rows_ids[index])
                attention_mask[row, :length] = 1
            input_ids = input_ids.to(model.device)
            logits = model(
                input_ids=input_ids, attention_mask=attention_mask.to(model.device), use_cache=False
            ).logits  # (batch, width, vocab)
            for row, index in enumerate(batch):
                positions = torch.tensor(rows_masks[index]).nonzero()[:, 0].to(model.device)
                scores = logits[row, positions - 1].float()  # the logits at t - 1 predict the token at t
                chosen = scores.gather(1, input_ids[row, positions][:, None])[:, 0]
                sums[index] = (torch.logsumexp(scores, dim=1) - chosen).double().sum().item()
    finally:
        model.train(was_training)
    return sums.tolist()


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
        elif context is not None and len(ids) > context:
            problems.append(f"row {index}: {len(ids)} tokens, the model's context is {context}; truncate whole turns")
    if problems:
        raise ValueError("`rows_ids` / `rows_masks`:\n" + "\n".join(problems))
