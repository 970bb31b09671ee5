"""How long a session lasts, and the stages that are no trainings: each stops at a place of its own, and goes on."""

import math
import os

import pytest

from evaluation.batches import in_batches
from rlhf import pairs, pretrain, session
from rlhf.files import read_jsonl
from rlhf.generate import Reply
from rlhf.pairs import PART, PairsConfig
from rlhf.pretrain import PretrainConfig, learning_rate_factor
from rlhf.session import ENDS, Pace, SessionEnded, seconds_left, seconds_of
from tests.test_pretrain import TINY


@pytest.fixture
def clock(monkeypatch):
    time = [1000.0]
    monkeypatch.setattr(session, "now", lambda: time[0])
    monkeypatch.setattr(pretrain, "now", lambda: time[0])
    return time


@pytest.mark.parametrize(
    ("text", "seconds"), [("11h", 39600), ("90m", 5400), ("3600s", 3600), ("0.5h", 1800), (" 1s ", 1)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


def test_a_session_within_its_block(clock, monkeypatch):
    assert seconds_left() == math.inf
    with session.session(None):
        assert ENDS not in os.environ
    with session.session("1m"):
        clock[0] += 20
        assert seconds_left() == 40
        with session.session("10s"):
            assert seconds_left() == 10
        assert seconds_left() == 40
    assert seconds_left() == math.inf


def test_pace_reserves_the_longest_turn_and_two_saves(clock, monkeypatch):
    monkeypatch.setenv(ENDS, "1100")
    pace, told = Pace(save_seconds=5), []
    for turn in (0, 30, 10, 10, 9, 1):
        clock[0] += turn
        told.append(pace.over())
    # 100, 70, 60, 50, 41 and 40 s are left; 10 s are for saving at first, and from the second turn on 30 s more.
    assert told == [False, False, False, False, False, True]
    monkeypatch.delenv(ENDS)
    assert not pace.over()


def test_an_evaluation_stops_between_two_batches(clock, monkeypatch, tmp_path):
    """A batch is 10 s; of 25 s, two fit, since a third might be longer."""
    monkeypatch.setenv(ENDS, str(clock[0] + 25))
    asked = []

    def compute(batch, first):
        asked.append(first)
        clock[0] += 10
        return batch

    with pytest.raises(SessionEnded, match="3 of 5 batches of greedy are left"):
        in_batches(tmp_path, 1, "greedy", [5, 4, 3, 2, 1], int, compute)
    assert asked == [0, 1]
    monkeypatch.delenv(ENDS)
    assert in_batches(tmp_path, 1, "greedy", [5, 4, 3, 2, 1], int, compute) == [5, 4, 3, 2, 1]
    assert asked == [0, 1, 2, 3, 4]


def test_sampling_of_pairs_stops_between_two_parts(clock, monkeypatch, tmp_path):
    config = PairsConfig(str(tmp_path), "data", "sft", "person")
    prompts = [{"prompt": [{"role": "user", "content": "hi"}], "persona": []}] * (3 * PART)

    def several(model, tokenizer, conversations, *args):
        clock[0] += 10
        return [[Reply("a", True), Reply("b", True)] for _ in conversations]

    monkeypatch.setattr(pairs, "generate_several", several)
    monkeypatch.setenv(ENDS, str(clock[0] + 25))
    with pytest.raises(SessionEnded, match=f"{2 * PART} of {3 * PART} train prompts have their replies"):
        pairs._sample(tmp_path, "train", prompts, [], config, None, None)
    rows = read_jsonl(tmp_path / "replies_train.jsonl")
    assert len(rows) == 2 * PART
    monkeypatch.delenv(ENDS)
    pairs._sample(tmp_path, "train", prompts, rows, config, None, None)
    assert len(read_jsonl(tmp_path / "replies_train.jsonl")) == 3 * PART


def test_a_base_stops_behind_a_checkpoint(clock, monkeypatch, tmp_path):
    """A step is 10 s and nothing is saved by step; of 45 s, the fourth step is the last one."""
    settings = {**TINY, "num_steps": 6, "short_steps": 3, "eval_steps": 3, "save_steps": 100}
    pretrain.train(PretrainConfig(str(tmp_path / "whole"), **settings))

    def factor(step, config):  # asked for at the start and in each step, for two groups of parameters
        clock[0] += 5
        return learning_rate_factor(step, config)

    monkeypatch.setattr(pretrain, "learning_rate_factor", factor)
    monkeypatch.setenv(ENDS, str(clock[0] + 55))
    with pytest.raises(SessionEnded, match="it stopped at step 4 of 6"):
        pretrain.train(PretrainConfig(str(tmp_path / "stopped"), **settings))
    monkeypatch.delenv(ENDS)
    pretrain.train(PretrainConfig(str(tmp_path / "stopped"), **settings))
    name = "model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
