"""Perplexity from sums by hand; `reply_nll` against a direct computation on a tiny model built here."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.perplexity import (
    bits_per_byte,
    count_bytes,
    count_words,
    perplexity,
    perplexity_intervals,
    reply_nll,
)


def test_units_by_hand():
    nll = 12 * math.log(2)  # 12 bits
    assert perplexity(nll, 4) == pytest.approx(8)
    assert bits_per_byte(nll, 24) == pytest.approx(0.5)
    assert count_words("i have\ta  dog .") == 5
    assert count_bytes("é ☃") == 6
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="`count` = 0"):
        perplexity(1.0, 0)
    with pytest.raises(ValueError, match="`num_bytes` = 0"):
        bits_per_byte(1.0, 0)


def test_word_and_token_perplexity_are_one_sum():
    # word perplexity = token perplexity ^ (tokens / words), and sums come before the exponential
    found = perplexity_intervals([10.0, 30.0], [10, 10], [8, 8], [40, 40], ["a", "b"])
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


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_reply_nll_is_the_direct_sum(model, batch_size):
    expected = []
    with torch.no_grad():
        model.eval()
        for ids, mask in zip(ROWS, MASKS, strict=True):
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            expected.append(-sum(logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]))
    # float32 forward passes of other widths differ in the last bits
    assert reply_nll(model, ROWS, MASKS, batch_size) == pytest.approx(expected, rel=1e-5)


def test_reply_nll_leaves_the_mode_and_no_gradients(model):
    model.train()
    reply_nll(model, ROWS, MASKS, 2)
    assert model.training
    model.eval()
    reply_nll(model, ROWS, MASKS, 2)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reply_nll_names_all_bad_rows(model):
    rows = [[1, 2], [1, 2, 3], [1, 2], [1] * 17, [1, 2]]
    masks = [[0, 1], [0, 1], [0, 0], [0] * 16 + [1], [1, 1]]
    with pytest.raises(ValueError) as error:
        reply_nll(model, rows, masks, 2)
    message = str(error.value)
    assert "row 0" not in message
    assert "row 1: 3 ids but a mask of 2" in message
    assert "row 2: nothing to score" in message
    assert "row 3: 17 tokens, the model's context is 16" in message
    assert "row 4: the first token cannot be scored" in message
    with pytest.raises(ValueError, match="`batch_size` = 0"):
        reply_nll(model, ROWS, MASKS, 0)
    with pytest.raises(ValueError, match="`rows_masks` has 1 rows"):
        reply_nll(model, ROWS, MASKS[:1], 2)
