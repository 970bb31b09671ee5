"""PPO on two ranks (gloo, CPU, `accelerate launch`): what one rank would have learnt, and no step that is not finite.

One launch makes all that these tests look at; test_launch.py has the script itself on two ranks, with its rollouts.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ppo_ranks import make, on_recorded, trained

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # two processes import torch, transformers and TRL


@pytest.fixture(scope="module")
def folders(tiny_llama, sft_run, reward_run, dataset):
    return {
        "base": str(tiny_llama),
        "sft": str(sft_run.folder),
        "reward": str(reward_run.folder),
        "data": str(dataset),
    }


@pytest.fixture(scope="module")
def recorded(folders, tmp_path_factory):
    """A rollout of 16 replies whose lengths differ between the halves that the ranks get."""
    folder = tmp_path_factory.mktemp("recorded")
    trainer = make(folders, folder, per_device_train_batch_size=4)
    torch.manual_seed(0)
    rollout = trainer.rollout([trainer.train_dataset[index] for index in range(16)], {})
    tokens = rollout.mask.sum(1)
    assert tokens[:8].sum() != tokens[8:].sum() and len(set(tokens.tolist())) > 4
    save_file({name: tensor.contiguous() for name, tensor in vars(rollout).items()}, folder / "rollout.safetensors")
    return folder / "rollout.safetensors"


def launch(out, folders, recorded, config, env=None):
    """Run tests/ppo_ranks.py on two ranks; the report of each."""
    settings = {"out": str(out), "folders": folders, "rollout": str(recorded), "broken": [1, 2, 3]}
    (out / "settings.json").write_text(json.dumps({**settings, "deepspeed": "zero2" in config.name}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "ppo_ranks.py"), str(out / "settings.json")]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        command, env={**os.environ, **shared, **(env or {})}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(folders, recorded, tmp_path_factory):
    """What two ranks under DDP wrote: a folder, and the report of each."""
    out = tmp_path_factory.mktemp("ranks")
    return out, launch(out, folders, recorded, ROOT / "accelerate_configs" / "two_t4.yaml")


@pytest.mark.parametrize("value_model", ["head", "adapter"])
def test_two_ranks_with_half_the_batch_each_are_one_with_the_whole(value_model, ranks, folders, recorded, tmp_path):
    """Four steps with accumulation 2; the ranks' critic adapter recomputes its activations, the one rank's does not."""
    out, reports = ranks
    alone = make(folders, tmp_path, value_model, per_device_train_batch_size=4)
    of_a_rank = make(folders, tmp_path).minibatch
    # The ranks' minibatches, side by side.
    alone.minibatch = lambda *at: torch.cat([of_a_rank(*at), 8 + of_a_rank(*at)])
    before = trained(alone)
    on_recorded(alone, recorded).train()
    expected = trained(alone)
    first, second = (load_file(out / f"{value_model}_{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=0, atol=2e-7, msg=name)  # float32, sums in another order
    furthest = max((expected[name] - before[name]).abs().max() for name in before)
    assert furthest > 1e-3  # much further than the tolerance
    logged = [row for row in alone.state.log_history if "loss/policy_avg" in row]
    for row, of_ranks in zip(logged, reports[0][value_model], strict=True):
        for key in ("loss/policy_avg", "loss/value_avg", "val/ratio", "policy/entropy_avg", "policy/approxkl_avg"):
            assert of_ranks[key] == pytest.approx(row[key], abs=1e-5), key


def test_a_mean_of_the_ranks_own_means_would_not_be_that(folders, recorded, tmp_path):
    """The control: each micro-batch's loss as its own mean moves the weights elsewhere."""
    one, other = (make(folders, tmp_path, per_device_train_batch_size=4) for _ in range(2))
    begin = other._begin_step

    def count_alone(inputs):
        begin(inputs)
        half = other._minibatch.mask[:4].sum()
        other._num_tokens = half * 2

    other._begin_step = count_alone
    for trainer in (one, other):
        on_recorded(trainer, recorded).train()
    weights, elsewhere = trained(one), trained(other)
    assert max((weights[name] - elsewhere[name]).abs().max() for name in weights) > 1e-5


@pytest.mark.parametrize("value_model", ["head", "adapter"])
def test_a_critic_that_drifts_on_one_rank_is_found_at_the_next_save(value_model, ranks):
    for report in ranks[1]:
        assert report["drift"][value_model].startswith("The ranks have drifted apart")


def test_statistics_of_a_rollout_are_over_both_ranks(ranks):
    """Each rank's own replies to the same prompts, and numbers by numpy over the tokens of both."""
    out, reports = ranks
    one, other = (load_file(out / f"sampled_{rank}.safetensors") for rank in (0, 1))
    sampled, logs = [report["sampled"] for report in reports], [report["sampled"]["log"] for report in reports]
    said = [
        [row[mask.bool()].tolist() for row, mask in zip(r["input_ids"], r["mask"], strict=True)] for r in (one, other)
    ]
    assert sum(map(list.__ne__, *said)) > 4  # ranks draw numbers of their own

    def tokens(name):
        return [rollout[name][rollout["mask"][:, 1:].bool()].double().numpy() for rollout in (one, other)]

    own, both = tokens("advantages"), np.concatenate(tokens("advantages"))
    assert both.mean() == pytest.approx(0, abs=1e-5) and both.std(ddof=1) == pytest.approx(1, abs=1e-4)
    assert abs(own[0].mean()) > 1e-3  # which its own whitening would make 0
    values, returns = (np.concatenate(tokens(name)) for name in ("values", "returns"))
    explained = 1 - (returns - values).var() / returns.var()
    for log in logs:
        assert log["val/explained_variance"] == [pytest.approx(explained, rel=1e-3)] and abs(explained) > 0.01
        assert log["rewards/letters/mean"] == logs[0]["rewards/letters/mean"]
    for state in sampled:
        assert state["scale"] == sampled[0]["scale"] and state["scale"]["count"] == 16
        assert state["scale"]["mean"] == pytest.approx(logs[0]["rewards/letters/mean"][0], abs=1e-5)
        assert state["kl_coef"] == pytest.approx(0.05 * (1 + 0.2 * 16 / 100))  # far above the target


def test_held_out_rows_of_which_one_rank_has_no_reference_are_measured(ranks):
    metrics = [report["sampled"]["held_out"] for report in ranks[1]]
    assert metrics[0] == metrics[1] and metrics[0]["eval_loss"] > 0


def check_skipped(out, reports):
    """Steps 1, 2 and 3 are broken on rank 1, and two in a row are allowed."""
    for rank, report in enumerate(reports):
        assert report["same"] == [False, True, True, True]
        assert report["skipped"] == [0, 1, 2]
        assert report["error"].startswith("3 steps in a row") and "`returns` of the batch is not" in report["error"]
    first, second = (load_file(out / f"broken_{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    saved = [load_file(out / "broken" / f"nonfinite_batch_{rank}.safetensors") for rank in (0, 1)]
    assert [bool(minibatch["returns"].isnan().any()) for minibatch in saved] == [False, True]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_both(ranks):
    check_skipped(*ranks)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_it_is_skipped_under_zero_2_too(folders, recorded, tmp_path, extensions):
    """DeepSpeed steps within its backward pass, where the guard speaks through its check for overflows."""
    env = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions)}
    reports = launch(tmp_path, folders, recorded, ROOT / "accelerate_configs" / "two_t4_zero2.yaml", env)
    check_skipped(tmp_path, reports)
