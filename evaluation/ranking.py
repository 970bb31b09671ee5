"""hits@1: is the reply that was said the likeliest among its candidates?"""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf.chat import render_within, reply_ids
from rlhf.generate import inference
from rlhf.persona import with_persona
from rlhf.token_logprobs import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, Any]


def first_place(nats_per_token: Sequence[float], gold: int) -> float:
    """1 when the gold candidate alone has the least, 1/k when k candidates share the first place with it, else 0."""
    best = min(nats_per_token)
    return float(nats_per_token[gold] == best) / sum(nats == best for nats in nats_per_token)


def to_rank(
    dialogues: Sequence[Mapping[str, Any]], max_replies: int | None = None, seed: int = 0
) -> list[tuple[Mapping[str, Any], int]]:
    """The replies that can be ranked, as (row, turn), in the order of the dialogues.

    Args:
        dialogues: rows with `persona`, `messages` and `candidates`: a list as long as `messages`, None or texts.
        max_replies: how many, drawn by the seed; None for all.
    """
    asked = [
        (row, turn)
        for row in dialogues
        for turn, choices in enumerate(row.get("candidates") or [])
        if choices and len(set(choices)) > 1 and (turn or row["persona"])  # without either there is no prompt
    ]
    if max_replies is not None and max_replies < len(asked):
        kept = sorted(random.Random(seed).sample(range(len(asked)), max_replies))
        asked = [asked[index] for index in kept]
    return asked


def candidate_hits(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[tuple[Mapping[str, Any], int]],
    max_length: int,
) -> list[dict[str, Any]]:
    """Rank the candidates of each reply by their mean log-probability a token, end of turn included.

    ConvAI2 gives 20 candidates, the reply and 19 of other dialogues, so that chance is 5 %. The mean is taken because
    the sum would favour short candidates. Candidates with the same text are one. The prompt is read once for all
    candidates of a reply, since it is most of what there is to read.

    Source: Dinan et al. 2019, hits@1/20 of ConvAI2.

    Args:
        asked: of [`to_rank`].
        max_length: tokens; older turns are dropped for all candidates alike.

    Returns:
        For each reply `{"persona", "dialogue_id", "turn", "candidates", "hit"}`; `candidates` is their number, and
        `hit` is from [`first_place`].
    """
    found = []
    with inference(model):
        for row, turn in asked:
            choices = list(dict.fromkeys([row["messages"][turn]["content"], *row["candidates"][turn]]))
            nats = mean_nats(model, *candidate_ids(row, turn, choices, tokenizer, max_length))
            found.append(
                {
                    "persona": row["persona"],
                    "dialogue_id": row["dialogue_id"],
                    "turn": turn,
                    "candidates": len(choices),
                    "hit": first_place(nats, 0),
                }
            )
    return found


def mean_nats(model: "PreTrainedModel", prompt: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
    """Mean of -log p a token of each reply behind one prompt, in nats; the prompt's keys and values are shared."""
    read = model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=True, logits_to_keep=1)
    logits = read.logits.expand(len(replies), -1, -1)  # (replies, 1, vocabulary): of the first token
    width = max(map(len, replies)) - 1  # the last token of a reply is scored and not read
    if width:
        cache = read.past_key_values
        cache.batch_repeat_interleave(len(replies))
        padded = [[*reply[:-1], *[0] * (width + 1 - len(reply))] for reply in replies]
        mask = [[1] * (len(prompt) + len(reply) - 1) + [0] * (width + 1 - len(reply)) for reply in replies]
        rest = model(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([logits, rest], dim=1)
    ids, scored = (
        torch.tensor([[*row, *[0] * (width + 1 - len(row))] for row in rows], device=model.device)
        for rows in (replies, [[1] * len(reply) for reply in replies])
    )
    logprobs, _ = token_logprobs(logits, torch.nn.Identity(), ids, scored)
    return (-logprobs.double().sum(dim=1) / scored.sum(dim=1)).tolist()


def candidate_ids(
    row: Mapping[str, Any],
    turn: int,
    choices: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> tuple[list[int], list[list[int]]]:
    """The ids of the prompt, and of each candidate with its stop token.

    A reply's ids do not depend on what stands in front of its prompt's last token (`rlhf.chat`), so the dialogue is
    rendered once and the candidates behind a short turn.
    """
    prompt = with_persona({"persona": row["persona"], "messages": row["messages"][:turn]})
    question: Message = prompt[-1] if prompt and prompt[-1]["role"] == "user" else {"role": "user", "content": "hi"}
    replies = [reply_ids(question, choice, tokenizer) for choice in choices]
    head, _ = render_within(prompt, tokenizer, max_length, True, completion_length=max(map(len, replies)))
    return head["input_ids"], replies
