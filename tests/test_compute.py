"""The usual names: each gives what the module behind it gives, and the three persona calls work on a tiny model."""

import math

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from trl import ModelConfig

from evaluation.compute import (
    calculate_engagement_score,
    compute_bleu,
    compute_distinct_n,
    compute_multi_turn_consistency,
    compute_perplexity,
    compute_rouge,
    compute_text_perplexity,
    evaluate_batch_responses,
    evaluate_consistency,
    evaluate_engagement,
    evaluate_multi_turn_engagement,
    split_traits,
)
from rlhf.chat import render
from rlhf.generate import generate
from rlhf.model import load_base, load_tokenizer
from rlhf.persona import PromptError, with_persona

RESPONSES = ["i have a big dog at home .", "i really like to eat pizza every day .", ""]
REFERENCES = ["i have a big dog , and a cat .", "i really like to eat pizza with cheese .", "hello"]


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    return load_base(ModelConfig(model_name_or_path=str(tiny_llama), dtype="float32"), tokenizer), tokenizer


def test_perplexity_by_hand(tiny):
    """Tokens are weighted alike, whatever the reply; prompt and padding do not count."""
    model, tokenizer = tiny
    dialogues = [
        {
            "persona": ["i have a dog ."],
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": r}],
        }
        for r in ("no", "i live in a city by the sea .")
    ]
    nats = tokens = 0
    model.eval()
    for row in dialogues:
        rendered = render(with_persona(row), tokenizer)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([rendered["input_ids"]])).logits[0].double(), dim=-1)
        for t, scored in enumerate(rendered["assistant_mask"]):
            if scored:
                nats -= logprobs[t - 1, rendered["input_ids"][t]].item()
                tokens += 1
    found = compute_perplexity(model, tokenizer, dialogues, max_length=256, batch_size=2)
    assert found["perplexity_token"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["perplexity_word"] == pytest.approx(math.exp(nats / 10), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / 31 / math.log(2), rel=1e-4)
    plain = compute_text_perplexity(model, tokenizer, ["i have a dog ."])
    assert plain.keys() == found.keys() and plain["perplexity_token"] > 1


def test_bleu_and_rouge_are_the_libraries():
    found = compute_bleu(RESPONSES, REFERENCES)
    assert found["bleu"] == corpus_bleu(RESPONSES, [REFERENCES], lowercase=True, force=True).score
    assert "tok:13a" in found["signature"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    mean = sum(scorer.score(r, g)["rougeL"].fmeasure for g, r in zip(RESPONSES, REFERENCES, strict=True)) / 3
    assert compute_rouge(RESPONSES, REFERENCES, use_stemmer=True)["rougeL"] == pytest.approx(mean)
    with pytest.raises(ValueError, match="`responses` has 3, `references` has 2"):
        compute_rouge(RESPONSES, REFERENCES[:2])


def test_distinct_by_hand():
    # go on go on / on we go: 3 pairs of 5 differ (go on, on go, on we, we go): 4 of 5; in each 2 of 3 and 2 of 2
    assert compute_distinct_n(["go on go on", "on we go"], 2) == {"corpus": 4 / 5, "per_reply": (2 / 3 + 1) / 2}
    assert compute_distinct_n(["go on go on", "on we go"], 1)["corpus"] == 3 / 7
    assert compute_distinct_n(["go go go go"], 1, num_tokens=2)["corpus"] == 1 / 2


def test_traits_are_split_at_bars():
    assert split_traits("i have a dog . | i am tall .") == ["i have a dog .", "i am tall ."]
    assert split_traits(r"either \| or | i am tall .") == ["either | or", "i am tall ."]
    assert split_traits(["a | b"]) == ["a | b"]  # a list is split already
    with pytest.raises(PromptError):
        split_traits("")


def test_batch_responses_match_whole_words():
    personas = ["i have a house . | i work as a teacher .", ["i have a house ."]]
    assert evaluate_batch_responses(["a teacher in a house", "two houses"], personas) == [1.0, 0.0]
    assert evaluate_batch_responses(["teachers", "two houses"], personas, whole_words=False) == [1 / 2, 1.0]
    assert evaluate_batch_responses(["a house", "a house"], personas, min_length=6) == [0.0, 0.0]
    with pytest.raises(ValueError, match="`responses` has 1, `personas` has 2"):
        evaluate_batch_responses(["a"], personas)


def test_consistency_of_a_live_model(tiny):
    model, tokenizer = tiny
    rows = [
        {"persona": f"i have a {pet} . | i like pizza .", "history": [{"role": "user", "content": "any pets ?"}]}
        for pet in ("dog", "cat")
    ]
    asked = [with_persona({"persona": split_traits(row["persona"]), "messages": row["history"]}) for row in rows]
    replies = generate(model, tokenizer, asked, 8)
    expected = evaluate_batch_responses(replies, [row["persona"] for row in rows], min_length=1, stop_words=())
    value = evaluate_consistency(model, tokenizer, rows, max_new_tokens=8, min_length=1, stop_words=())
    assert value == sum(expected) / 2
    with pytest.raises(ValueError, match="`rows` is empty"):
        evaluate_consistency(model, tokenizer, [])


def test_multi_turn_consistency_hears_its_own_replies(tiny):
    model, tokenizer = tiny
    persona, turns = "i have a dog . | i like pizza .", ["hi", "any pets ?"]
    found = compute_multi_turn_consistency(model, tokenizer, [persona], turns, max_new_tokens=6, min_length=1)
    messages, scores = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        reply = generate(model, tokenizer, [with_persona({"persona": split_traits(persona), "messages": messages})], 6)
        scores += evaluate_batch_responses(reply, [persona], min_length=1)
        messages.append({"role": "assistant", "content": reply[0]})
    assert found == {"turn_1": scores[0], "turn_2": scores[1], "average": sum(scores) / 2}
    with pytest.raises(ValueError, match="`user_turns` \\(0\\)"):
        compute_multi_turn_consistency(model, tokenizer, [persona], [])


def test_engagement_by_hand():
    assert calculate_engagement_score("i know") == pytest.approx(0.1 * 2 / 30)  # "know" is no "no"
    assert calculate_engagement_score("no") == pytest.approx(0.15 + 0.1 / 30)
    own = {"markers": {"wow": ["wow"]}, "weights": {"wow": 0.9}}
    assert evaluate_engagement(["wow", "well"], **own) == pytest.approx(0.45 + 0.1 / 30)
    found = evaluate_multi_turn_engagement([["wow", "well"], ["well"]], **own)
    assert found == pytest.approx({"turn_1": 0.45 + 0.1 / 30, "turn_2": 0.1 / 30, "average": 0.3 + 0.1 / 30})
    with pytest.raises(ValueError, match="`responses` is empty"):
        evaluate_engagement([])
