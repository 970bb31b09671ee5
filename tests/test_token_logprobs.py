"""Log-probabilities of chosen tokens against torch's own functions on the full logits."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from rlhf.token_logprobs import token_logprobs

BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 7, 8, 11


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    states = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    return states, head, ids, mask


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 256])
def test_equals_cross_entropy_and_its_gradients(inputs, temperature, chunk_size, frozen):
    states, head, ids, mask = inputs
    head.requires_grad_(not frozen)
    by = [states] if frozen else [states, *head.parameters()]
    weights = torch.randn(BATCH, LENGTH)  # so that each position has a gradient of its own

    logprobs, _ = token_logprobs(states, head, ids, mask, temperature, chunk_size)
    found = torch.autograd.grad((logprobs * weights).sum(), by)

    logits = head(states) / temperature
    reference = -cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask
    expected = torch.autograd.grad((reference * weights).sum(), by)

    assert_close(logprobs, reference)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_entropy_is_that_of_the_distribution_sampled_from(inputs, frozen):
    states, head, ids, mask = inputs
    head.requires_grad_(not frozen)
    _, entropy = token_logprobs(states, head, ids, mask, temperature=0.7, chunk_size=2)
    expected = torch.distributions.Categorical(logits=head(states) / 0.7).entropy() * mask
    assert_close(entropy, expected)
    assert not entropy.requires_grad


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_without_gradients_the_numbers_are_the_same(inputs, frozen):
    states, head, ids, mask = inputs
    head.requires_grad_(not frozen)
    with torch.no_grad():
        logprobs, _ = token_logprobs(states, head, ids, mask)
    assert not logprobs.requires_grad
    assert torch.equal(logprobs, token_logprobs(states, head, ids, mask)[0].detach())


@pytest.mark.parametrize("outside", [0.0, float("inf"), float("nan")])
def test_an_empty_mask_gives_zeros_that_a_backward_pass_goes_through(inputs, outside):
    states, head, ids, mask = inputs
    states = torch.full_like(states, outside, requires_grad=True)  # padding may hold anything
    logprobs, entropy = token_logprobs(states, head, ids, torch.zeros_like(mask))
    assert torch.equal(logprobs, torch.zeros(BATCH, LENGTH)) and torch.equal(entropy, torch.zeros(BATCH, LENGTH))
    (gradient,) = torch.autograd.grad(logprobs.sum(), states)
    assert torch.equal(gradient, torch.zeros_like(states))


def test_garbage_outside_the_mask_changes_nothing(inputs):
    states, head, ids, mask = inputs
    dirty = torch.where(mask.bool().unsqueeze(-1), states.detach(), float("nan")).requires_grad_()
    clean_logprobs, _ = token_logprobs(states, head, ids, mask)
    logprobs, _ = token_logprobs(dirty, head, ids, mask)
    assert torch.equal(logprobs, clean_logprobs)
    (gradient,) = torch.autograd.grad(logprobs.sum(), dirty)
    assert torch.equal(gradient, torch.autograd.grad(clean_logprobs.sum(), states)[0])


def test_half_precision_states_give_float32(inputs):
    states, head, ids, mask = inputs
    logprobs, entropy = token_logprobs(states.detach().bfloat16(), head.bfloat16(), ids, mask)
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_the_head_is_never_asked_for_more_than_a_chunk(inputs):
    states, head, ids, mask = inputs
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    with torch.no_grad():
        token_logprobs(states, head, ids, mask, chunk_size=4)
    assert sizes == [4, 4, 1]  # the 9 masked positions, and none of the 12 others


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass(inputs, frozen):
    """Chunks of 4, 4 and 1 positions, 11 logits each."""
    states, head, ids, mask = inputs
    head.requires_grad_(not frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        token_logprobs(states, head, ids, mask, chunk_size=4)
    assert kept and not [shape for shape in kept if VOCABULARY in shape and shape != head.weight.shape]
