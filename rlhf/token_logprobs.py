"""Log-probabilities of chosen tokens without padding and without the full logits.

Hidden states come from rows of like length together; then positions are chosen, then the head works in float32 chunks.

With a vocabulary of 150,000 the logits of one batch outweigh the model, so they are never made for positions that no
loss reads, and never for more than `chunk_size` positions at a time
(https://github.com/huggingface/trl/issues/3678).
"""

from collections.abc import Sequence
from typing import Any

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
    logprobs = torch.log_softmax(_over(lm_head(states).float(), temperature), dim=-1)
    entropy = -logprobs.detach().exp().mul_(logprobs.detach()).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


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
            logits = lm_head(leaf)
        logprobs = torch.log_softmax(_over(logits.detach().float(), temperature), dim=-1)
        probabilities = logprobs.exp()
        where = targets.unsqueeze(-1)
        value = logprobs.gather(-1, where).squeeze(-1)
        entropy = -logprobs.mul_(probabilities).sum(-1)  # in place, as are the next: each is as large as the logits
        slope = probabilities.neg_().scatter_add_(-1, where, torch.ones_like(value).unsqueeze(-1))
        (gradient,) = torch.autograd.grad(logits, leaf, slope.mul_(_GRADIENT_SCALE).to(logits.dtype))
        ctx.save_for_backward(gradient)
        ctx.scale = _GRADIENT_SCALE * temperature
        ctx.mark_non_differentiable(entropy)
        return value, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient.float() * (upstream[0] / ctx.scale).unsqueeze(-1)
        return scaled.to(gradient.dtype), None, None, None
