"""Metrics under the names that they are usually called by, for use from Python: thin functions over the other modules.

They return values without intervals; `evaluation.score.score_rows` adds those. Matching here is by whole words, so that
"know" holds no "no"; the substring definitions are the metrics `keyword_score` and `engagement_score`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.diversity import distinct_n, distinct_per_reply
from evaluation.engagement import MARKERS, WEIGHTS, engagement_score
from evaluation.overlap import bleu, normalize, rouge
from evaluation.perplexity import dialogue_nats, perplexities, text_nats
from evaluation.persona import keyword_score
from rlhf.generate import generate
from rlhf.persona import parse_prompt, with_persona

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]


# -- quality -----------------------------------------------------------------------------------------------------------


def compute_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    dialogues: Sequence[Row],
    max_length: int = 1024,
    batch_size: int = 8,
) -> dict[str, float]:
    """`perplexity_token`, `perplexity_word` and `bits_per_byte` of the replies of dialogues.

    Args:
        tokenizer: from [`rlhf.model.load_tokenizer`].
        dialogues: rows with `persona` and `messages`.
        max_length: tokens; older turns are dropped.
    """
    return perplexities(dialogue_nats(model, tokenizer, dialogues, max_length, batch_size))


def compute_text_perplexity(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], batch_size: int = 8
) -> dict[str, float]:
    """The same of plain texts, in rolling windows of the model's context (`evaluation.perplexity.text_nats`)."""
    return perplexities(text_nats(model, tokenizer, texts, batch_size))


def compute_bleu(responses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """`{"bleu": corpus BLEU-4 in 0-100, "signature": sacrebleu's}`."""
    value, signature = bleu(list(responses), list(references))
    return {"bleu": value, "signature": signature}


def compute_rouge(responses: Sequence[str], references: Sequence[str], use_stemmer: bool = False) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL`: mean F-measures in [0, 1]."""
    _same_length(responses=responses, references=references)
    scores = [rouge(*pair, use_stemmer) for pair in zip(responses, references, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def compute_distinct_n(
    responses: Sequence[str], n: int = 2, num_tokens: int | None = None, seed: int = 0
) -> dict[str, float]:
    """`{"corpus", "per_reply"}`: different n-grams / n-grams, of the first `num_tokens` tokens and as mean of replies.

    Args:
        num_tokens: what the corpus value is taken over, and comparable at; None for all tokens.

    Raises:
        ValueError: when the replies have fewer tokens, or none of them has `n`.
    """
    available = sum(len(normalize(response)) for response in responses)
    corpus = distinct_n(responses, n, available if num_tokens is None else num_tokens, seed)
    shares = [share for response in responses if (share := distinct_per_reply(response, n)) is not None]
    return {"corpus": corpus, "per_reply": sum(shares) / len(shares)}


# -- persona -----------------------------------------------------------------------------------------------------------


def split_traits(persona: str | Sequence[str]) -> list[str]:
    """The facts of a persona; those of a text stand between bars, as in a prompt (`rlhf.persona`).

    Raises:
        PromptError: when the text is empty or a bar stands without a space on each side.
    """
    if not isinstance(persona, str):
        return list(persona)
    return list(parse_prompt(f"[PERSONA] {persona} [DIALOGUE] hi [RESPONSE]")[0].facts)


def evaluate_batch_responses(
    responses: Sequence[str], personas: Sequence[str | Sequence[str]], **matching: Any
) -> list[float]:
    """Share of the facts of each persona of which a keyword is in its reply, by whole words. In [0, 1].

    No measure of consistency: reciting scores 1, denying as asserting (`evaluation.persona.keyword_score`). Consistency
    is what the probes of `evaluation.run` measure.

    Args:
        personas: one a reply; a list of facts, or a text with bars between them.
        matching: `min_length`, `stop_words` or `whole_words` of `keyword_score`.
    """
    _same_length(responses=responses, personas=personas)
    settings = {"whole_words": True, **matching}
    return [
        keyword_score(split_traits(persona), response, **settings)
        for response, persona in zip(responses, personas, strict=True)
    ]


def evaluate_consistency(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    **matching: Any,
) -> float:
    """Mean of [`evaluate_batch_responses`] over the model's replies to rows with `persona` and `history`."""
    if not rows:
        raise ValueError("`rows` is empty: nothing to evaluate.")
    personas = [split_traits(row["persona"]) for row in rows]
    asked = [
        with_persona({"persona": persona, "messages": row["history"]})
        for persona, row in zip(personas, rows, strict=True)
    ]
    scores = evaluate_batch_responses(
        generate(model, tokenizer, asked, max_new_tokens, temperature, seed), personas, **matching
    )
    return sum(scores) / len(scores)


def compute_multi_turn_consistency(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    personas: Sequence[str | Sequence[str]],
    user_turns: Sequence[str],
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    **matching: Any,
) -> dict[str, float]:
    """Means of [`evaluate_batch_responses`] turn by turn, the model hearing its own earlier replies.

    Args:
        user_turns: what the user says, the same to every persona.

    Returns:
        `{"turn_1": …, "turn_2": …, "average": …}`.
    """
    if not personas or not user_turns:
        raise ValueError(f"`personas` ({len(personas)}) and `user_turns` ({len(user_turns)}) need one each or more.")
    facts = list(map(split_traits, personas))
    histories: list[list[dict[str, Any]]] = [[] for _ in facts]
    means: dict[str, float] = {}
    for number, turn in enumerate(user_turns, 1):
        for history in histories:
            history.append({"role": "user", "content": turn})
        asked = [
            with_persona({"persona": f, "messages": history}) for f, history in zip(facts, histories, strict=True)
        ]
        replies = generate(model, tokenizer, asked, max_new_tokens, temperature, seed + number)
        scores = evaluate_batch_responses(replies, facts, **matching)
        means[f"turn_{number}"] = sum(scores) / len(scores)
        for history, reply in zip(histories, replies, strict=True):
            history.append({"role": "assistant", "content": reply})
    return {**means, "average": sum(means.values()) / len(means)}


# -- engagement --------------------------------------------------------------------------------------------------------


def calculate_engagement_score(
    response: str,
    markers: Mapping[str, Sequence[str]] = MARKERS,
    weights: Mapping[str, float] = WEIGHTS,
) -> float:
    """Weighted flags of one reply, markers as whole words (`evaluation.engagement.engagement_score`). In [0, 1]."""
    return engagement_score(response, markers, weights, whole_words=True)


def evaluate_engagement(
    responses: Sequence[str],
    markers: Mapping[str, Sequence[str]] = MARKERS,
    weights: Mapping[str, float] = WEIGHTS,
) -> float:
    """Mean of [`calculate_engagement_score`] over replies."""
    if not responses:
        raise ValueError("`responses` is empty: nothing to evaluate.")
    return sum(calculate_engagement_score(response, markers, weights) for response in responses) / len(responses)


def evaluate_multi_turn_engagement(
    conversations: Sequence[Sequence[str]],
    markers: Mapping[str, Sequence[str]] = MARKERS,
    weights: Mapping[str, float] = WEIGHTS,
) -> dict[str, float]:
    """[`evaluate_engagement`] turn by turn: `{"turn_1": …, "average": …}`, the average over all replies.

    Args:
        conversations: the bot's replies of each dialogue, in order; they may differ in number.
    """
    longest = max(map(len, conversations), default=0)
    by_turn = [[turns[number] for turns in conversations if number < len(turns)] for number in range(longest)]
    means = {f"turn_{n}": evaluate_engagement(replies, markers, weights) for n, replies in enumerate(by_turn, 1)}
    everything = [reply for turns in conversations for reply in turns]
    return {**means, "average": evaluate_engagement(everything, markers, weights)}


def _same_length(**lists: Sequence[Any]) -> None:
    if not all(lists.values()) or len(set(map(len, lists.values()))) != 1:
        sizes = ", ".join(f"`{name}` has {len(values)}" for name, values in lists.items())
        raise ValueError(f"{sizes}: they must pair up, one or more.")
