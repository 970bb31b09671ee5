"""The mathematics of PPO as pure functions of tensors.

Notation: `(batch, length)` tensors hold one value a token; `mask` is 1 on one unbroken run a row, the tokens of a
response up to and including its stop token, and 0 on prompt and padding. What stands outside it never changes a result.

Sources: PPO, Schulman et al. 2017 (https://arxiv.org/abs/1707.06347); GAE, Schulman et al. 2016
(https://arxiv.org/abs/1506.02438); its use on language, Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and
Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (https://arxiv.org/abs/2403.17031).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _alone(total: Tensor) -> Tensor:
    """The sum over all ranks, where there is one."""
    return total


def masked_mean(x: Tensor, mask: Tensor, num_tokens: Tensor | float | None = None) -> Tensor:
    """Mean of `x` over the mask, a scalar.

    Args:
        x: `(batch, length)`.
        mask: `(batch, length)`.
        num_tokens: What the sum is divided by in place of the mask's own count, where a batch is worked on in parts.
    """
    count = mask.sum() if num_tokens is None else num_tokens
    return torch.where(mask.bool(), x, 0).sum() / torch.as_tensor(count).clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, all_sum: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """`x` scaled to variance 1 over the mask, and to mean 0 unless `shift_mean` is False.

    Rewards are whitened without the shift, advantages with it (Huang et al. 2024, details 18 and 19). The variance is
    the unbiased one; a single token is left at its size.

    Args:
        x: `(batch, length)`.
        mask: `(batch, length)`.
        shift_mean: Whether to move the mean to 0.
        all_sum: Sums a tensor over all ranks, so that every rank whitens by the same two numbers.

    Returns:
        `(batch, length)`, zero outside the mask.
    """
    keep = mask.bool()
    x = torch.where(keep, x, 0)  # first of all: the gradient of a NaN is NaN even where it is not kept
    total, count = all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    squares = all_sum(torch.where(keep, (x - mean) ** 2, 0).sum())
    variance = squares / (count - 1) if count > 1 else torch.ones_like(squares)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(keep, whitened if shift_mean else whitened + mean, 0)


def kl_penalised_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Reward of each token: `-kl_coef * (logprob - ref_logprob)`, and the score on the last token of the response.

    The penalty is the k1 estimator of the KL divergence, whose gradient is the right one inside a reward
    (http://joschu.net/blog/kl-approx.html).

    Args:
        scores: `(batch,)`, one score a response.
        logprobs: `(batch, length)`, under the policy that sampled.
        ref_logprobs: `(batch, length)`, under the reference.
        mask: `(batch, length)`.
        kl_coef: Weight of the penalty.

    Returns:
        `(batch, length)`. An empty response gets nothing, not even its score: there is no token to reward.
    """
    rewards = torch.where(mask.bool(), -kl_coef * (logprobs - ref_logprobs), 0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    rows = torch.nonzero(mask.any(dim=1)).squeeze(1)
    rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the critic learns.

    `delta_t = r_t + gamma * V_{t+1} - V_t`, `A_t = delta_t + gamma * lam * A_{t+1}`, `R_t = A_t + V_t`, where behind
    the last token of a response both V and A are 0 (Schulman et al. 2016, equations 11 and 16).

    Args:
        rewards: `(batch, length)`.
        values: `(batch, length)`, at position t the critic's value before token t was chosen.
        mask: `(batch, length)`.
        gamma: Discount.
        lam: Weight of the longer estimates.

    Returns:
        Advantages (not whitened) and returns, `(batch, length)`, zero outside the mask.
    """
    keep = mask.bool()
    values = torch.where(keep, values, 0)
    rewards = torch.where(keep, rewards, 0)
    advantages = torch.zeros_like(values)
    following_value = torch.zeros_like(values[:, 0])
    following_advantage = torch.zeros_like(following_value)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = torch.where(keep[:, t], delta + gamma * lam * following_advantage, 0)
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    return advantages, torch.where(keep, advantages + values, 0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    """The clipped surrogate, a scalar to minimise: mean of `max(-A * r, -A * clip(r, 1 - c, 1 + c))`.

    `r = exp(logprob - old_logprob)` (Schulman et al. 2017, equation 7). The log-ratio is held within +-20, so that
    one runaway token cannot make the loss infinite.

    Args:
        logprobs: `(batch, length)`, under the policy being trained.
        old_logprobs: `(batch, length)`, under the policy that sampled.
        advantages: `(batch, length)`.
        mask: `(batch, length)`.
        cliprange: c, the width of the trust region.
        num_tokens: See [`masked_mean`].
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask, num_tokens)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    """Half the mean squared error of the critic, a scalar, with its step away from `old_values` clipped.

    The larger of the clipped and the plain error counts (Huang et al. 2024, detail 21).

    Args:
        values: `(batch, length)`, of the critic being trained.
        old_values: `(batch, length)`, at the time of sampling.
        returns: `(batch, length)`.
        mask: `(batch, length)`.
        cliprange_value: How far a value may move in one rollout.
        num_tokens: See [`masked_mean`].
    """
    # Before anything is squared: the gradient of a NaN is NaN even where it is not kept.
    values, old_values, returns = (torch.where(mask.bool(), x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask, num_tokens)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`exp(logprob - old_logprob)`, `(batch, length)`, 1 outside the mask."""
    return torch.where(mask.bool(), (logprobs - old_logprobs).clamp(-20.0, 20.0), 0).exp()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of the KL divergence of each token, never negative (http://joschu.net/blog/kl-approx.html)."""
    log_ratio = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    return log_ratio.exp() - 1 - log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float, num_episodes: int, kl_horizon: int) -> float:
    """The coefficient of the next rollout, moved towards a KL of `kl_target`.

    `kl_coef * (1 + clip(kl / kl_target - 1, -0.2, 0.2) * num_episodes / kl_horizon)` (Ziegler et al. 2019, section 2.2).

    Args:
        kl_coef: Of this rollout.
        kl: Its mean KL divergence to the reference, in nats a reply; what is not finite leaves the coefficient alone.
        kl_target: The divergence wanted, in the same unit.
        num_episodes: Replies of this rollout.
        kl_horizon: Replies in which a KL that is 20 % or more off changes the coefficient by about 20 %.
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2) if math.isfinite(kl) else 0.0
    return kl_coef * (1 + error * num_episodes / kl_horizon)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """Share of the variance of the returns that the values explain, a scalar; 0 where the returns do not vary.

    Args:
        values: `(batch, length)`.
        returns: `(batch, length)`.
        mask: `(batch, length)`.
        all_sum: See [`masked_whiten`].
    """
    keep = mask.bool()

    def spread(x: Tensor) -> Tensor:
        x = torch.where(keep, x, 0)
        mean = all_sum(x.sum()) / count
        return all_sum(torch.where(keep, (x - mean) ** 2, 0).sum())

    count = all_sum(mask.sum()).clamp(min=1)
    total = spread(returns)
    return torch.where(total > 0, 1 - spread(returns - values) / total, 0)
