"""Log-probabilities of chosen tokens against torch's own functions on the full logits."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rlhf.token_logprobs import hidden_states, piece_sizes, token_logprobs

BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 7, 8, 11


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    states = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    return states, head, ids, mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 256])
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_equals_cross_entropy_and_its_gradients(inputs, temperature, chunk_size, trained):
    states, head, ids, mask = inputs
    head.requires_grad_(trained)
    weights = torch.randn(BATCH, LENGTH)  # so that each position has a gradient of its own
    leaves = [states, *(parameter for parameter in head.parameters() if trained)]

    logprobs, _ = token_logprobs(states, head, ids, mask, temperature, chunk_size)
    found = torch.autograd.grad((logprobs * weights).sum(), leaves)

    logits = head(states) / temperature
    reference = -cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask
    expected = torch.autograd.grad((reference * weights).sum(), leaves)

    assert_close(logprobs, reference)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_entropy_is_that_of_the_distribution_sampled_from(inputs):
    states, head, ids, mask = inputs
    _, entropy = token_logprobs(states, head, ids, mask, temperature=0.7, chunk_size=2)
    expected = torch.distributions.Categorical(logits=head(states) / 0.7).entropy() * mask
    assert_close(entropy, expected)
    assert not entropy.requires_grad
    head.requires_grad_(False)
    _, of_frozen = token_logprobs(states, head, ids, mask, temperature=0.7, chunk_size=2)
    assert_close(of_frozen, expected)
    assert not of_frozen.requires_grad


def test_without_gradients_the_numbers_are_the_same(inputs):
    states, head, ids, mask = inputs
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


class Made(TorchDispatchMode):
    """Shapes of the float32 tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype is torch.float32:
            self.shapes.add(tuple(made.shape))
        return made


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_works_in_float32_under_autocast_and_in_pieces(inputs, dtype, autocast, monkeypatch):
    """Logits of some tens, which bfloat16 rounds by 0.06 and more; the reference is float64 on the same weights."""
    monkeypatch.setattr("rlhf.token_logprobs._HEAD_PIECE", 3 * HIDDEN)  # 4 pieces, the last one of 2 rows
    states, head, ids, mask = inputs
    head = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
    head.weight.mul_(40)
    head = head.to(dtype)
    with Made() as made, torch.autocast("cpu", autocast, enabled=autocast is not None):
        logprobs, _ = token_logprobs(states, head, ids, mask, temperature=0.7)
    (gradient,) = torch.autograd.grad(logprobs.sum(), states)
    with torch.no_grad():
        assert torch.equal(token_logprobs(states, head, ids, mask, temperature=0.7)[0], logprobs)

    logits = states.double() @ head.weight.double().T + head.bias.double()
    copies = {shape for shape in made.shapes if HIDDEN in shape and VOCABULARY in shape}
    assert dtype is torch.float32 or not copies  # of a head in half precision there never is more than a piece
    expected = -cross_entropy((logits / 0.7).transpose(1, 2), ids, reduction="none") * mask
    (its_gradient,) = torch.autograd.grad(expected.sum(), states)
    assert logits[mask.bool()].abs().max() > 20
    assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-4)
    assert_close(gradient, its_gradient, rtol=1e-4, atol=1e-3)


def test_the_head_is_never_asked_for_more_than_a_chunk(inputs):
    states, head, ids, mask = inputs
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    with torch.no_grad():
        token_logprobs(states, head, ids, mask, chunk_size=4)
    assert sizes == [4, 4, 1]  # the 9 masked positions, and none of the 12 others


def test_a_frozen_head_is_asked_once_for_a_position(inputs):
    states, head, ids, mask = inputs
    sizes = []
    head.requires_grad_(False).register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    token_logprobs(states, head, ids, mask, chunk_size=4)[0].sum().backward()
    assert sizes == [4, 4, 1]  # and not again in the backward pass


def test_small_probabilities_keep_their_gradient_in_half_precision():
    """50,000 tokens of probability 1e-8 each, which float16 would round to nothing, and which weigh 5e-4 together."""
    head = nn.Linear(1, 50_001, dtype=torch.float16).requires_grad_(False)
    head.weight.data.fill_(10.0)
    head.bias.data.fill_(0.0)
    head.weight.data[7], head.bias.data[7] = 0.0, -math.log(1e-8)
    states = torch.zeros(1, 1, 1, dtype=torch.float16, requires_grad=True)
    token_logprobs(states, head, torch.tensor([[7]]), torch.ones(1, 1))[0].sum().backward()
    assert states.grad.item() == pytest.approx(-50_000 * 1e-8 * 10, rel=0.01)  # the bias is rounded to 18.42


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass(inputs, trained):
    """Chunks of 4, 4 and 1 positions, 11 logits each."""
    states, head, ids, mask = inputs
    head.requires_grad_(trained)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        token_logprobs(states, head, ids, mask, chunk_size=4)
    weights = {(VOCABULARY, HIDDEN), (HIDDEN, VOCABULARY)}
    assert kept and not [shape for shape in kept if VOCABULARY in shape and shape not in weights]


# Hidden states without padding


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
@pytest.mark.parametrize("pass_tokens", [0, 192], ids=["many pieces", "few pieces"])
def test_states_and_gradients_are_those_of_each_row_alone(name, pass_tokens, request, monkeypatch):
    """Prompts of 3 to 40 tokens padded on the left, replies on the right, and a row of nothing."""
    monkeypatch.setattr("rlhf.token_logprobs._PASS_TOKENS", pass_tokens)
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name)).eval()
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 300, (6, 48)), torch.zeros(6, 48, dtype=torch.long)
    for row, (start, stop) in enumerate([(37, 42), (0, 48), (20, 41), (1, 44), (36, 48), (40, 40)]):
        mask[row, start:stop] = 1
    weights = torch.randn(6, 48, 32)
    passes = []
    model.base_model.register_forward_hook(lambda module, args, output: passes.append(output[0].shape[:2]))

    states = hidden_states(model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    assert states.shape == (6, 48, 32)
    (states * weights)[mask.bool()].sum().backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum(rows for rows, _ in passes) == 6 and len(passes) == (6 if pass_tokens == 0 else 1)

    model.zero_grad()
    for row in range(5):
        keep = mask[row].bool()
        alone = model.base_model(input_ids=ids[row : row + 1, keep]).last_hidden_state[0]
        assert_close(states[row, keep], alone, rtol=0, atol=2e-6)  # float32, other sizes of matrices
        (alone * weights[row, keep]).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(found[key], parameter.grad, rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize("pass_tokens", [0, 1, 5, 20, 1000])
@pytest.mark.parametrize("lengths", [[9, 9, 9, 2, 2, 1], [30, 8, 7, 7, 3], [4], [0, 0], []])
def test_pieces_cost_the_least(lengths, pass_tokens):
    def cost(sizes):
        starts = itertools.accumulate(sizes[:-1], initial=0)
        return sum(size * lengths[start] + pass_tokens for start, size in zip(starts, sizes, strict=True))

    sizes = piece_sizes(lengths, pass_tokens)
    assert sum(sizes) == len(lengths) and all(size > 0 for size in sizes)
    every = [
        [stop - start for start, stop in itertools.pairwise([0, *cuts, len(lengths)])]
        for count in range(len(lengths))
        for cuts in itertools.combinations(range(1, len(lengths)), count)
    ]
    assert not lengths or cost(sizes) == min(map(cost, every))
