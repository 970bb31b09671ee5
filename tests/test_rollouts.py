"""Rollouts as tensors: pieces and padding. The order of the prompts is tested with the trainer, in test_ppo.py."""

import torch

from rlhf.rollouts import Rollout, as_batch, pieces

# Prompts of 3, 1, 2 ids, replies of 1, 2, 1 ids in width 3.
PROMPT = torch.tensor([[5, 6, 7], [0, 0, 8], [0, 9, 10]])
PROMPT_MASK = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]])
REPLY = torch.tensor([[1, 0, 0], [2, 3, 0], [4, 0, 0]])
REPLY_MASK = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0]])


def test_positions_count_real_tokens_alone():
    batch = as_batch(PROMPT, PROMPT_MASK, REPLY, REPLY_MASK)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 3, 3], [0, 0, 0, 1, 2, 2], [0, 0, 1, 2, 2, 2]]
    assert batch["mask"].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]


def test_pieces_hold_episodes_of_like_length_without_common_padding():
    batch = as_batch(PROMPT, PROMPT_MASK, REPLY, REPLY_MASK)
    first, second = pieces(batch, 2)
    assert first.rows.tolist() == [0, 1] and (first.start, first.stop) == (0, 5)  # 4 and 3 ids; column 5 is empty
    assert second.rows.tolist() == [2] and (second.start, second.stop) == (1, 4)
    assert second.batch["input_ids"].tolist() == [[9, 10, 4]]
    assert second.batch["position_ids"].tolist() == [[0, 1, 2]]


def test_a_trimmed_rollout_keeps_each_token_s_numbers():
    batch = as_batch(PROMPT, PROMPT_MASK, REPLY, REPLY_MASK)
    about = torch.arange(18.0).reshape(3, 6)[:, 1:]  # at t the number of token t + 1
    rollout = Rollout(**batch, logprobs=about, values=about, advantages=about, returns=about)
    assert rollout.by_length().input_ids[:, 2].tolist() == [7, 8, 10]  # 4, 3, 3 ids
    trimmed = rollout.take(torch.tensor([2])).trimmed()
    assert trimmed.input_ids.tolist() == [[9, 10, 4]]
    assert trimmed.logprobs.tolist() == [[14, 15]]  # of the ids 10 and 4, in columns 2 and 3 of row 2
    assert trimmed.mask[:, 1:].tolist() == [[0, 1]]
