"""Log-probabilities of chosen tokens without padding and without the full logits.

Hidden states come from rows of like length together; then positions are chosen, then the head works in float32 chunks.

With a vocabulary of 150,000 the logits of one batch outweigh the model, so they are never made for positions that no
loss reads, and never for more than `chunk_size` positions at a time
(https://github.com/huggingface/trl/issues/3678).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# What another forward pass costs beside its tokens, in tokens; see `hidden_states`.
_PASS_TOKENS = 192

# Gradients with respect to logits are probabilities, of which float16 would lose those below 6e-8. A power of two, so
# that in float32 nothing is rounded.
_GRADIENT_SCALE = 1024.0

# Numbers of a head in half precision that stand in float32 at a time, 64 MiB of them.
_HEAD_PIECE = 2**24


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """The base's last hidden states, computed on rows of like length together, without the padding that they share.

    The same numbers as of one pass, up to rounding: a row's states do not depend on the rows beside it, and its
    positions are given.

    Args:
        model: A causal model; of a PEFT model, its base.
        input_ids: `(batch, length)`.
        attention_mask: `(batch, length)`, on each row one unbroken run of ones.
        position_ids: `(batch, length)`.

    Returns:
        `(batch, length, hidden)`; what stands at padding means nothing.
    """
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    states = []
    for rows in order.split(piece_sizes(lengths[order].tolist(), _PASS_TOKENS)):
        used = attention_mask[rows].any(dim=0).nonzero()
        start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        piece = model.base_model(
            input_ids=input_ids[rows, start:stop],
            attention_mask=attention_mask[rows, start:stop],
            position_ids=position_ids[rows, start:stop],
            use_cache=False,
        ).last_hidden_state
        states.append(pad(piece, (0, 0, start, input_ids.shape[1] - stop)))
    return torch.cat(states)[order.argsort()]


def piece_sizes(lengths: Sequence[int], pass_tokens: int) -> list[int]:
    """How many rows, the longest first, go through a model together for the least work.

    Args:
        lengths: Of the rows in tokens, falling. A piece of them is as wide as its first.
        pass_tokens: What each piece costs beside its rows times its width.
    """
    best, size_of_last = [0], [0]  # of the first 0, 1, ... rows
    for stop in range(1, len(lengths) + 1):
        costs = [best[start] + (stop - start) * lengths[start] + pass_tokens for start in range(stop)]
        best.append(min(costs))
        size_of_last.append(stop - costs.index(best[-1]))
    sizes, left = [], len(lengths)
    while left:
        sizes.append(size_of_last[left])
        left -= sizes[-1]
    return sizes[::-1]


def token_logprobs(
    hidden_states: Tensor,
    lm_head: nn.Module,
    token_ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at the masked positions.

    Where the head is frozen, the gradient of each log-probability is worked out along with it, while its chunk of
    logits exists: `(onehot - softmax) W / temperature`, as long as a hidden state. So the backward pass is a
    multiplication, and no logits are made twice. A head that is trained needs the logits again for its own gradient.

    Args:
        hidden_states: `(batch, length, hidden)`, at position t the state that predicts `token_ids[:, t]`.
        lm_head: The output layer of the model.
        token_ids: `(batch, length)`.
        mask: `(batch, length)`, non-zero where a log-probability is wanted.
        temperature: What the logits are divided by, as in sampling.
        chunk_size: Positions projected at a time.

    Returns:
        Log-probabilities and entropies in nats, `(batch, length)`, float32, zero outside the mask. The entropy carries
        no gradient.
    """
    chosen = mask.bool()
    states, targets = hidden_states[chosen], token_ids[chosen]
    trained = any(parameter.requires_grad for parameter in lm_head.parameters())
    values, entropies = [], []
    for start in range(0, len(targets), chunk_size):
        piece = states[start : start + chunk_size], targets[start : start + chunk_size]
        if not (torch.is_grad_enabled() and (trained or states.requires_grad)):
            value, entropy = _project(*piece, lm_head, temperature)
        elif trained:
            value, entropy = checkpoint(_project, *piece, lm_head, temperature, use_reentrant=False)
        else:
            value, entropy = _ByFrozenHead.apply(*piece, lm_head, temperature)
        values.append(value)
        entropies.append(entropy)
    empty = hidden_states.new_zeros(chosen.shape, dtype=torch.float32)
    if not values:
        return empty + states.sum(), empty  # a sum of nothing: 0, and a backward pass has a way
    return empty.masked_scatter(chosen, torch.cat(values)), empty.masked_scatter(chosen, torch.cat(entropies))


def _project(states: Tensor, targets: Tensor, lm_head: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(_over(_logits(states, lm_head), temperature), dim=-1)
    entropy = -logprobs.detach().exp().mul_(logprobs.detach()).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def _logits(states: Tensor, lm_head: nn.Module) -> Tensor:
    """The head's outputs in float32, under autocast too.

    A logit of 20 is rounded by up to 0.06 in bfloat16. Two forwards of the same tokens beside other padding differ in the
    last bit of a state, and rounding makes a step of that: PPO's first ratio was off by 0.02 and its check stopped.
    """
    with torch.autocast(states.device.type, enabled=False):
        if not _is_frozen_half(lm_head):
            weight = next(lm_head.parameters(), states)
            return lm_head(states.to(weight.dtype)).float()
        logits = torch.empty(len(states), lm_head.out_features, device=states.device)
        for rows, weight in _in_pieces(lm_head.weight):
            torch.mm(states.detach().float(), weight.T, out=logits[:, rows])
        return logits if lm_head.bias is None else logits.add_(lm_head.bias)


def _is_frozen_half(lm_head: nn.Module) -> TypeGuard[nn.Linear]:
    """A trained head is in float32 (`rlhf.model.trainable_to_fp32`)."""
    return type(lm_head) is nn.Linear and lm_head.weight.itemsize == 2 and not lm_head.weight.requires_grad


def _in_pieces(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight and they in float32: of 128,000 x 4096 the whole would be 2 GiB."""
    step = max(1, _HEAD_PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        yield rows, weight[rows].float()


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature  # a pass over all of them less


class _ByFrozenHead(torch.autograd.Function):
    """[`_project`] with the gradient of each log-probability taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, lm_head: nn.Module, temperature: float
    ) -> tuple[Tensor, Tensor]:
        leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            logits = _logits(leaf, lm_head)
        logprobs = torch.log_softmax(_over(logits.detach(), temperature), dim=-1)
        probabilities = logprobs.exp()
        where = targets.unsqueeze(-1)
        value = logprobs.gather(-1, where).squeeze(-1)
        entropy = -logprobs.mul_(probabilities).sum(-1)  # in place, as are the next: each is as large as the logits
        slope = probabilities.neg_().scatter_add_(-1, where, torch.ones_like(value).unsqueeze(-1))
        slope.mul_(_GRADIENT_SCALE)
        with torch.autocast(states.device.type, enabled=False):
            if _is_frozen_half(lm_head):
                parts = (slope[:, rows] @ weight for rows, weight in _in_pieces(lm_head.weight))
                gradient = functools.reduce(Tensor.add_, parts).to(states.dtype)
            else:
                (gradient,) = torch.autograd.grad(logits, leaf, slope)
        ctx.save_for_backward(gradient)
        ctx.scale = _GRADIENT_SCALE * temperature
        ctx.mark_non_differentiable(entropy)
        return value, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient.float() * (upstream[0] / ctx.scale).unsqueeze(-1)
        return scaled.to(gradient.dtype), None, None, None
