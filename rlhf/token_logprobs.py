"""Log-probabilities of chosen tokens without the full logits: positions first, then the head in float32 chunks.

With a vocabulary of 150,000 the logits of one batch outweigh the model, so they are never made for positions that no
loss reads, and never for more than `chunk_size` positions at a time
(https://github.com/huggingface/trl/issues/3678).
"""

import torch
from torch import Tensor, nn
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
        chunk_size: Positions projected at a time; their logits are recomputed in the backward pass.

    Returns:
        Log-probabilities and entropies in nats, `(batch, length)`, float32, zero outside the mask. The entropy carries
        no gradient.
    """
    chosen = mask.bool()
    states, targets = hidden_states[chosen], token_ids[chosen]

    def project(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(lm_head(states).float() / temperature, dim=-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy

    values, entropies = [], []
    for start in range(0, len(targets), chunk_size):
        piece = states[start : start + chunk_size], targets[start : start + chunk_size]
        if torch.is_grad_enabled() and states.requires_grad:
            value, entropy = checkpoint(project, *piece, use_reentrant=False)
        else:
            value, entropy = project(*piece)
        values.append(value)
        entropies.append(entropy)
    empty = hidden_states.new_zeros(chosen.shape, dtype=torch.float32)
    if not values:
        return empty + states.sum(), empty  # a sum of nothing: 0, and a backward pass has a way
    return empty.masked_scatter(chosen, torch.cat(values)), empty.masked_scatter(chosen, torch.cat(entropies))
