"""PPO's functions against numbers worked by hand; what stands outside the mask is garbage and must not matter."""

import math
import threading

import pytest
import torch
from torch.testing import assert_close

from rlhf.ppo_math import (
    adapted_kl_coef,
    advantages_and_returns,
    explained_variance,
    kl_k3,
    kl_penalised_rewards,
    masked_mean,
    masked_whiten,
    policy_loss,
    probability_ratio,
    value_loss,
)

# One response that fills its row, one of a single token that begins at column 1.
MASK = torch.tensor([[1, 1, 1], [0, 1, 0]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-9.0, -0.5, -9.0]])
REF_LOGPROBS = torch.tensor([[-1.5, -1.0, -3.25], [-1.0, -1.0, -1.0]])
SCORES = torch.tensor([2.0, -1.0])


def test_score_lands_on_the_last_token_and_the_penalty_on_all():
    rewards = kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1)
    # -0.1 x (0.5, -1, 0.25), score 2 on the last; -0.1 x 0.5 with score -1 on the only token
    assert_close(rewards, torch.tensor([[-0.05, 0.1, 1.975], [0.0, -1.05, 0.0]]))


def test_kl_coef_0_leaves_the_score_alone_and_doubling_doubles_the_penalty():
    bare = kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.0)
    assert_close(bare, torch.tensor([[0.0, 0.0, 2.0], [0.0, -1.0, 0.0]]), rtol=0, atol=0)
    once, twice = (kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, k) - bare for k in (0.1, 0.2))
    assert_close(twice, 2 * once)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_masks_of_any_type_and_an_empty_response(dtype):
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=dtype)
    rewards = kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, mask, kl_coef=0.1)
    assert_close(rewards, torch.tensor([[0.0, 0.1, 1.975], [0.0, 0.0, 0.0]]))


# Three steps with rewards (1, 0, 2) and values (0.5, 1, 0.25), once from column 0 and once from column 1.
STEPS = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
REWARDS = torch.tensor([[1.0, 0.0, 2.0, 7.0], [7.0, 1.0, 0.0, 2.0]])
VALUES = torch.tensor([[0.5, 1.0, 0.25, 7.0], [7.0, 0.5, 1.0, 0.25]])


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages"),
    [
        # delta = (1.4, -0.775, 1.75); A2 = 1.75, A1 = -0.775 + 0.72 x 1.75, A0 = 1.4 + 0.72 x 0.485
        (0.9, 0.8, (1.7492, 0.485, 1.75)),
        (0.9, 0.0, (1.4, -0.775, 1.75)),  # one step: the deltas
        (0.9, 1.0, (2.62 - 0.5, 1.8 - 1.0, 2.0 - 0.25)),  # Monte Carlo: discounted sums of rewards, less the values
        (1.0, 1.0, (3.0 - 0.5, 2.0 - 1.0, 2.0 - 0.25)),
    ],
)
def test_advantages_by_hand(gamma, lam, advantages):
    found, returns = advantages_and_returns(REWARDS, VALUES, STEPS, gamma, lam)
    expected = torch.zeros(2, 4)
    expected[0, :3] = expected[1, 1:] = torch.tensor(advantages)
    assert_close(found, expected)
    assert_close(returns, expected + VALUES * STEPS)


def test_whitening_has_mean_0_and_variance_1_over_the_mask():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6) * 3 + 5, torch.rand(4, 6) < 0.6
    whitened = masked_whiten(x, mask)
    assert_close(whitened[mask], (x[mask] - x[mask].mean()) / x[mask].std())
    assert not whitened[~mask].any()
    kept = masked_whiten(x, mask, shift_mean=False)
    assert_close(kept[mask].mean(), x[mask].mean())
    assert_close(kept[mask].std(), torch.tensor(1.0))


def test_whitening_a_single_token_leaves_its_size():
    x, mask = torch.tensor([[9.0, 4.0]]), torch.tensor([[0, 1]])
    assert_close(masked_whiten(x, mask, shift_mean=False), torch.tensor([[0.0, 4.0]]))
    assert_close(masked_whiten(x, mask), torch.zeros(1, 2))
    assert_close(masked_whiten(x, torch.zeros(1, 2)), torch.zeros(1, 2))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_two_ranks_whiten_as_one(shift_mean):
    torch.manual_seed(0)
    x, mask = torch.randn(4, 5) + 2, torch.rand(4, 5) < 0.7
    barrier, shared, parts = threading.Barrier(2), {}, {}

    def rank(number: int) -> None:
        def all_sum(tensor):
            shared[number] = tensor
            barrier.wait(10)
            total = shared[0] + shared[1]
            barrier.wait(10)
            return total

        # one row against three: a mean of the ranks' means would be another number
        rows = slice(0, 1) if number == 0 else slice(1, 4)
        parts[number] = masked_whiten(x[rows], mask[rows], shift_mean, all_sum)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(torch.cat([parts[0], parts[1]]), masked_whiten(x, mask, shift_mean))


def test_policy_loss_by_hand():
    log_ratio = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]])
    advantages = torch.tensor([[2.0, -1.0, -1.0, 2.0]])
    # clipped above: -2 x 1.2; clipped below: 1 x 0.8; the pessimistic side is not clipped: 1.5 and -2 x 0.5
    loss = policy_loss(log_ratio - 1, torch.full((1, 4), -1.0), advantages, torch.ones(1, 4), cliprange=0.2)
    assert_close(loss, torch.tensor((-2.4 + 0.8 + 1.5 - 1.0) / 4))


def test_value_loss_by_hand():
    values = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]])
    returns = torch.tensor([[1.0, 1.0, 3.0, -1.0, 1.0]])
    # plain errors 0.25, 0.25, 2.25, 2.25, 0.01; of the values clipped to 1.2, 0.8, 1.2, 0.8, 1.1: 0.04, 0.04, 3.24 ...
    loss = value_loss(values, torch.ones(1, 5), returns, torch.ones(1, 5), cliprange_value=0.2)
    assert_close(loss, torch.tensor(0.5 * (0.25 + 0.25 + 3.24 + 3.24 + 0.01) / 5))


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.5)]], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, -1.0]]), torch.ones(1, 3), 0.2)
    loss.backward()
    assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 1.5 / 3]]))  # d(-A r)/d(logprob) = -A r


def test_a_runaway_ratio_stays_finite():
    ratio = probability_ratio(torch.tensor([[500.0, -500.0]]), torch.zeros(1, 2), torch.ones(1, 2))
    assert_close(ratio, torch.tensor([[math.exp(20), math.exp(-20)]]))


def test_k3_by_hand():
    # r = ref / policy: r - 1 - log r for r = 2 and r = 1 / 2
    found = kl_k3(torch.zeros(2), torch.tensor([math.log(2), -math.log(2)]))
    assert_close(found, torch.tensor([1 - math.log(2), math.log(2) - 0.5]))


def test_k3_of_a_token_that_left_the_reference_is_held_at_a_log_ratio_of_20():
    found = kl_k3(torch.tensor([-200.0, 200.0]), torch.zeros(2))
    assert_close(found, torch.tensor([math.exp(20) - 21, math.exp(-20) + 19]))


def example():
    """Random arguments of the two losses, and a mask with a short row, a late row and an empty one."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    return [torch.randn(4, 5) for _ in range(3)], mask


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_parts_of_a_batch_sum_to_the_whole(loss):
    tensors, mask = example()
    whole = loss(*tensors, mask, 0.2)
    parts = [loss(*(x[i : i + 1] for x in tensors), mask[i : i + 1], 0.2, num_tokens=mask.sum()) for i in range(4)]
    assert_close(sum(parts), whole)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, z, mask: policy_loss(x, y, z, mask, 0.2),
        lambda x, y, z, mask: value_loss(x, y, z, mask, 0.2),
        lambda x, y, z, mask: masked_mean(x, mask),
        lambda x, y, z, mask: masked_whiten(x, mask).pow(3),
        lambda x, y, z, mask: masked_whiten(x, mask, shift_mean=False).pow(3),
        lambda x, y, z, mask: probability_ratio(x, y, mask),
        lambda x, y, z, mask: kl_penalised_rewards(z[:, 2].nan_to_num(1, 1, 1).clamp(-9, 9), x, y, mask, 0.1),
        lambda x, y, z, mask: torch.stack(advantages_and_returns(x, y, mask, 0.9, 0.8)),
    ],
    ids=["policy", "value", "mean", "whiten", "whiten unshifted", "ratio", "rewards", "advantages"],
)
def test_garbage_outside_the_mask_changes_neither_results_nor_gradients(function, garbage):
    tensors, mask = example()
    tensors[2][0, 2], tensors[2][2, 2] = 0.5, 1.0  # the scores of the rewards
    found = []
    for filling in (0.0, garbage):
        inputs = [torch.where(mask.bool(), x, filling).requires_grad_() for x in tensors]
        result = function(*inputs, mask)
        result.sum().backward()
        found.append([result.detach(), *(x.grad for x in inputs if x.grad is not None)])
    for clean, dirty in zip(*found, strict=True):
        assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (12.0, 0.1 * (1 + 0.2 * 0.02)),  # 100 % over, held at 20 %; 200 of 10,000 replies
        (6.6, 0.1 * (1 + 0.1 * 0.02)),  # 10 % over
        (3.0, 0.1 * (1 - 0.2 * 0.02)),  # half: held at -20 %
        (math.nan, 0.1),
        (-1.0, 0.1 * (1 - 0.2 * 0.02)),  # an estimate of a KL may be negative
    ],
)
def test_the_adaptive_coefficient_by_hand(kl, expected):
    assert adapted_kl_coef(0.1, kl, kl_target=6.0, num_episodes=200, kl_horizon=10_000) == pytest.approx(expected)


def test_explained_variance_by_hand():
    """Returns 0, 2, 4 (variance 8/3), errors 0, 1, -1 (variance 2/3): 1 - 1/4. Garbage outside counts nothing."""
    mask = torch.tensor([[1, 1, 1, 0]])
    returns = torch.tensor([[0.0, 2.0, 4.0, 1e9]])
    values = torch.tensor([[0.0, 1.0, 5.0, torch.nan]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(values, torch.ones(1, 4), mask).item() == 0  # nothing to explain
    double = explained_variance(values, returns, mask, all_sum=lambda x: 2 * x)  # two ranks with the same rows
    assert double.item() == pytest.approx(0.75)


# Each function against a loop over single tokens in Python's own float64


def random_example(seed):
    """Arguments of every function in float64, runs of ones of any place and length, and garbage outside them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 7)
    mask = torch.zeros(shape)
    for row in range(5):
        start, stop = sorted(torch.randint(0, 8, (2,), generator=generator).tolist())
        mask[row, start:stop] = 1
    mask[4, 2:6] = 1  # whatever the seed, not everything is empty
    x, y, z = (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 for _ in range(3))
    for tensor in (x, y, z):
        tensor[mask == 0] = 1e6
    tokens = [[t for t in range(7) if mask[row, t]] for row in range(5)]
    return x, y, z, mask, tokens


def every(tokens):
    return [(row, t) for row, places in enumerate(tokens) for t in places]


def expect(found, expected):
    assert found.dtype == torch.float64
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


SEEDS = pytest.mark.parametrize("seed", range(5))


@SEEDS
def test_mean_and_whitening_in_a_loop(seed):
    x, _, _, mask, tokens = random_example(seed)
    kept = [x[place].item() for place in every(tokens)]
    mean = math.fsum(kept) / len(kept)
    expect(masked_mean(x, mask), mean)
    expect(masked_mean(x, mask, num_tokens=40), math.fsum(kept) / 40)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / (len(kept) - 1) + 1e-8)
    for shift_mean in (True, False):
        expected = torch.zeros_like(x)
        for place in every(tokens):
            expected[place] = (x[place].item() - mean) / deviation + (0 if shift_mean else mean)
        expect(masked_whiten(x, mask, shift_mean), expected)


@SEEDS
def test_rewards_and_divergences_in_a_loop(seed):
    logprobs, ref_logprobs, scores, mask, tokens = random_example(seed)
    scores = scores[:, 0].clamp(-9, 9)
    rewards, k3, ratio = torch.zeros_like(logprobs), torch.zeros_like(logprobs), torch.ones_like(logprobs)
    for row, t in every(tokens):
        difference = logprobs[row, t].item() - ref_logprobs[row, t].item()
        rewards[row, t] = -0.3 * difference + (scores[row].item() if t == tokens[row][-1] else 0)
        k3[row, t] = math.exp(-difference) - 1 + difference
        ratio[row, t] = math.exp(difference)
    expect(kl_penalised_rewards(scores, logprobs, ref_logprobs, mask, 0.3), rewards)
    expect(probability_ratio(logprobs, ref_logprobs, mask), ratio)
    expect(kl_k3(logprobs, ref_logprobs) * mask, k3)


@SEEDS
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (1.0, 1.0)])
def test_advantages_as_the_sum_of_discounted_errors(seed, gamma, lam):
    """The definition, a sum over all later tokens (Schulman et al. 2016, equation 16), not the recursion."""
    rewards, values, _, mask, tokens = random_example(seed)
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, places in enumerate(tokens):
        for t in places:
            for later in range(t, places[-1] + 1):
                following = values[row, later + 1].item() if later < places[-1] else 0.0
                error = rewards[row, later].item() + gamma * following - values[row, later].item()
                advantages[row, t] += (gamma * lam) ** (later - t) * error
            returns[row, t] = advantages[row, t] + values[row, t]
    found = advantages_and_returns(rewards, values, mask, gamma, lam)
    expect(found[0], advantages)
    expect(found[1], returns)


@SEEDS
@pytest.mark.parametrize("cliprange", [0.2, 1.0])
def test_losses_in_a_loop(seed, cliprange):
    new, old, third, mask, tokens = random_example(seed)
    surrogate, squared = [], []
    for place in every(tokens):
        a, b, c = new[place].item(), old[place].item(), third[place].item()
        ratio = math.exp(a - b)
        surrogate.append(max(-c * ratio, -c * min(max(ratio, 1 - cliprange), 1 + cliprange)))
        held = b + min(max(a - b, -cliprange), cliprange)
        squared.append(0.5 * max((a - c) ** 2, (held - c) ** 2))
    expect(policy_loss(new, old, third, mask, cliprange), math.fsum(surrogate) / len(surrogate))
    expect(value_loss(new, old, third, mask, cliprange), math.fsum(squared) / len(squared))


def test_mean_and_whitening_by_hand():
    x, mask = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert_close(masked_mean(x, mask), torch.tensor(3.0))
    assert_close(masked_mean(x, mask, num_tokens=2), torch.tensor(4.5))
    # squared distances 4, 1, 9 over two degrees of freedom: a variance of 7
    by_root_7 = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) / math.sqrt(7)
    assert_close(masked_whiten(x, mask), by_root_7)
    assert_close(masked_whiten(x, mask, shift_mean=False), by_root_7 + 3 * mask)
