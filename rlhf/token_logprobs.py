"""Log-probabilities of chosen tokens without the full logits: positions first, then the head in float32 chunks.

With a vocabulary of 150,000 the logits of one batch outweigh the model, so they are never made for positions that no
loss reads, and never for more than `chunk_size` positions at a time
(https://github.com/huggingface/trl/issues/3678).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden_states: Tensor,
    lm_head: nn.Module,
    token_ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at the masked positions.

    Args:
        hidden_states: `(batch, length, hidden)`, at position t the state that predicts `token_ids[:, t]`.
        lm_head: The output layer of the model.
        token_ids: `(batch, length)`.
        mask: `(batch, length)`, non-zero where a log-probability is wanted.
        temperature: What the logits are divided by, as in sampling.
        chunk_size: Positions projected at a time; no logits are kept for the backward pass.

    Returns:
        Log-probabilities and entropies in nats, `(batch, length)`, float32, zero outside the mask. The entropy carries
        no gradient.
    """
    chosen = mask.bool()
    states, targets = hidden_states[chosen], token_ids[chosen]
    values, entropies = [], []
    for piece in zip(states.split(chunk_size), targets.split(chunk_size), strict=True):
        if not (torch.is_grad_enabled() and states.requires_grad):
            value, entropy = _project(*piece, lm_head, temperature)
        elif _is_frozen(lm_head):
            value, entropy = _FrozenHead.apply(*piece, lm_head, temperature)
        else:
            value, entropy = checkpoint(_project, *piece, lm_head, temperature, use_reentrant=False)
        values.append(value)
        entropies.append(entropy)
    empty = hidden_states.new_zeros(chosen.shape, dtype=torch.float32)
    if not len(targets):
        return empty + states.sum(), empty  # a sum of nothing: 0, and a backward pass has a way
    return empty.masked_scatter(chosen, torch.cat(values)), empty.masked_scatter(chosen, torch.cat(entropies))


def _project(states: Tensor, targets: Tensor, lm_head: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    logits = lm_head(states).float() / temperature
    normaliser = logits.logsumexp(-1)
    values = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
    with torch.no_grad():  # last, so that the recomputation of a checkpoint stops before it
        entropy = normaliser - torch.softmax(logits, dim=-1).mul_(logits).sum(-1)
    return values, entropy


def _is_frozen(lm_head: nn.Module) -> bool:
    return type(lm_head) is nn.Linear and not any(parameter.requires_grad for parameter in lm_head.parameters())


class _FrozenHead(torch.autograd.Function):
    """[`_project`] with its gradient worked out while the logits are there, as the frozen head of LoRA allows.

    The gradient of a log-probability by its state is `(W[target] - softmax(logits) W) / temperature`. So the backward
    pass needs neither logits nor head: two products with the head's matrix in place of a checkpoint's three.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, lm_head: nn.Linear, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logits = linear(states, lm_head.weight, lm_head.bias).float() / temperature
        normaliser = logits.logsumexp(-1)
        values = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
        probabilities = torch.softmax(logits, dim=-1)
        expected = probabilities.to(lm_head.weight.dtype) @ lm_head.weight
        ctx.save_for_backward((lm_head.weight[targets].float() - expected.float()) / temperature)
        ctx.dtype = states.dtype
        entropy = normaliser - probabilities.mul_(logits).sum(-1)
        ctx.mark_non_differentiable(entropy)
        return values, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (by_state,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(-1) * by_state).to(ctx.dtype), None, None, None
