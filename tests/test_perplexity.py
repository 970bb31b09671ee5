"""Perplexity from sums by hand; `reply_nll` against a direct computation on a tiny model built here."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from evaluation.perplexity import (
    bits_per_byte,
    count_bytes,
    count_words,
    perplexities,
    perplexity,
    perplexity_intervals,
    reply_nll,
    rolling_windows,
    text_nats,
)


def test_units_by_hand():
    nll = 12 * math.log(2)  # 12 bits
    assert perplexity(nll, 4) == pytest.approx(8)
    assert bits_per_byte(nll, 24) == pytest.approx(0.5)
    assert count_words("i have\ta  dog .") == 5
    assert count_words("no\n") == 2  # the empty piece behind the line end counts, as in lm-evaluation-harness
    assert count_bytes("é ☃") == 6
    assert perplexity(1e6, 1) == math.inf and math.isnan(perplexity(math.nan, 1))
    with pytest.raises(ValueError, match="`count` = 0"):
        perplexity(1.0, 0)
    with pytest.raises(ValueError, match="`num_bytes` = 0"):
        bits_per_byte(1.0, 0)


def test_word_and_token_perplexity_are_one_sum():
    # word perplexity = token perplexity ^ (tokens / words), and sums come before the exponential
    rows = [{"nats": nats, "tokens": 10, "words": 8, "bytes": 40} for nats in (10.0, 30.0)]
    found = perplexity_intervals(rows, ["a", "b"])
    assert found["perplexity_token"].value == pytest.approx(math.exp(40 / 20))  # not the mean of e^1 and e^3
    assert found["perplexity_word"].value == pytest.approx(math.exp(2) ** (20 / 16))
    assert found["bits_per_byte"].value == pytest.approx(40 / 80 / math.log(2))
    # two clusters: a resample is (a, a), (a, b) or (b, b), and 2.5 % lies in the outer ones (a quarter each)
    assert found["perplexity_token"][1:] == pytest.approx((math.exp(1), math.exp(3)))
    assert found["bits_per_byte"][1:] == pytest.approx((0.25 / math.log(2), 0.75 / math.log(2)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


ROWS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16], [3, 3]]
MASKS = [[0, 0, 1, 1, 1], [0, 1, 0], [0, 0, 0, 1, 0, 0, 1, 1], [0, 1]]


@pytest.fixture(scope="module")
def capped():
    """A model that does more to its logits than its output layer: it caps them."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=16, final_logit_softcapping=0.02,
        initializer_range=1.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(("name", "batch_size"), [("model", 1), ("model", 3), ("model", 8), ("capped", 3)])
def test_reply_nll_is_the_direct_sum(name, batch_size, request):
    model, expected = request.getfixturevalue(name), []
    with torch.no_grad():
        model.eval()
        for ids, mask in zip(ROWS, MASKS, strict=True):
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            expected.append(-sum(logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]))
    # float32 forward passes of other widths differ in the last bits
    assert reply_nll(model, ROWS, MASKS, batch_size) == pytest.approx(expected, rel=1e-5)


def test_rolling_windows_by_hand():
    def windows(text, length):
        return [(list(context), list(piece)) for context, piece in rolling_windows(text, 0, length)]

    assert windows([1, 2, 3], 4) == [([0], [1, 2, 3])]
    assert windows([1, 2, 3, 4, 5, 6, 7, 8], 4) == [([0], [1, 2, 3, 4]), ([4], [5, 6, 7, 8])]
    # the last piece is short, so the 4 inputs (context and piece, less the last token) take two tokens more
    assert windows([1, 2, 3, 4, 5, 6], 4) == [([0], [1, 2, 3, 4]), ([2, 3, 4], [5, 6])]
    assert windows([1, 2, 3], 1) == [([0], [1]), ([1], [2]), ([2], [3])]
    assert windows([], 4) == []
    with pytest.raises(ValueError, match="`max_length` = 0"):
        windows([1], 0)


def test_text_nats_are_an_independent_float64_loop(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    texts = ["i have a dog . " * 20, "no\n"]
    rows = text_nats(model, tokenizer, texts, batch_size=3, max_length=16)
    double = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    for text, row in zip(texts, rows, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = 0.0
        for position, token in enumerate(ids):
            # whole windows end at multiples of 16; a token of the last one, if short, sees 16 inputs ending with it
            end = min((position // 16 + 1) * 16, len(ids))
            start = max(0, end - 17)
            seen = ([tokenizer.bos_token_id] if position < 16 else ids[start : start + 1]) + ids[
                (0 if position < 16 else start + 1) : position
            ]
            with torch.no_grad():
                logits = double(torch.tensor([seen])).logits[0, -1]
            expected -= (logits[token] - torch.logsumexp(logits, 0)).item()
        assert row["nats"] == pytest.approx(expected, rel=1e-5)  # float32 against float64
        assert row["tokens"] == len(ids) > (16 if text.startswith("i") else 0)
    assert [row["words"] for row in rows] == [101, 2] and rows[1]["bytes"] == 3
    nats, words = sum(row["nats"] for row in rows), 103
    assert perplexities(rows)["perplexity_word"] == pytest.approx(math.exp(nats / words))
    with pytest.raises(ValueError, match="text 1 has no token"):
        text_nats(model, tokenizer, ["a", ""])


STORIES = Path(__file__).parents[2] / "shared/models/stories260K-llama"
SHAKESPEARE = Path(__file__).parents[2] / "shared/data/tinyshakespeare/input.txt"


@pytest.mark.skipif(not (STORIES.exists() and SHAKESPEARE.exists()), reason="no model and text beside the checkout")
def test_text_nats_are_lm_evaluation_harness():
    """Recorded 2026-11-21 from lm_eval 0.4.13, HFLM(model, tokenizer, add_bos_token=False).loglikelihood_rolling."""
    text = SHAKESPEARE.read_text(encoding="utf-8")
    texts = [text[:9000], text[9000:9400], text[50000:52500]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    rows = text_nats(model, tokenizer, texts, batch_size=4)
    nats = [row["nats"] for row in rows]
    assert nats == pytest.approx([23004.920776367188, 1146.916015625, 7201.7490234375], rel=1e-6)
    # their word_perplexity and bits_per_byte of the same three
    assert perplexities(rows)["perplexity_word"] == pytest.approx(2522484.703813002, rel=1e-4)
    assert perplexities(rows)["bits_per_byte"] == pytest.approx(3.801148131933358, rel=1e-6)
    if importlib.util.find_spec("lm_eval") is not None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", add_bos_token=False)
        requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
        assert nats == pytest.approx([-value for value in theirs.loglikelihood_rolling(requests)], rel=1e-4)


def test_reply_nll_leaves_the_mode_and_no_gradients(model):
    model.train()
    reply_nll(model, ROWS, MASKS, 2)
    assert model.training
    model.eval()
    reply_nll(model, ROWS, MASKS, 2)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reply_nll_names_all_bad_rows(model):
    rows = [[1, 2], [1, 2, 3], [1, 2], [1] * 18, [1, 2]]
    masks = [[0, 1], [0, 1], [0, 0], [0] * 17 + [1], [1, 1]]
    with pytest.raises(ValueError) as error:
        reply_nll(model, rows, masks, 2)
    message = str(error.value)
    assert "row 0" not in message
    assert "row 1: 3 ids but a mask of 2" in message
    assert "row 2: nothing to score" in message
    assert "row 3: 17 tokens to read, the model's context is 16" in message
    assert "row 4: the first token cannot be scored" in message
    with pytest.raises(ValueError, match="`batch_size` = 0"):
        reply_nll(model, ROWS, MASKS, 0)
    with pytest.raises(ValueError, match="`rows_masks` has 1 rows"):
        reply_nll(model, ROWS, MASKS[:1], 2)
