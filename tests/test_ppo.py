"""PPOTrainer: roles, rewards, the check of the ratio, gradients, learning, and resuming."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM, Trainer
from trl import ModelConfig

import rlhf.ppo_trainer
import rlhf.roles
from rlhf.config import ConfigError, parse
from rlhf.data import world
from rlhf.data.columns import load_rows, prompt_columns
from rlhf.files import folder_hash, write_json, write_jsonl
from rlhf.generate import left_pad
from rlhf.lora import lora_config, with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.nonfinite import NonFiniteError
from rlhf.persona import Persona, render_prompt
from rlhf.pipeline import config_classes
from rlhf.ppo import add_rewards, start_of_critic
from rlhf.ppo_trainer import VALUE_ADAPTER_FILE, VALUE_HEAD_FILE, PPOConfig, PPOTrainer, RatioError
from rlhf.record import read_record
from rlhf.rewards import RunningScale, persona_rule, score_ids
from rlhf.roles import RoleError, RoleGuard, _in_float32, dropouts
from rlhf.rollouts import RolloutSampler, as_batch

ROOT = Path(__file__).parents[1]
ARGS = {
    "use_cpu": True, "seed": 3, "report_to": "none", "per_device_train_batch_size": 4, "response_length": 6,
    "logging_steps": 1, "learning_rate": 1e-2, "gradient_checkpointing": False, "save_strategy": "no",
    "lr_scheduler_type": "constant", "disable_tqdm": True, "total_episodes": 8, "num_ppo_epochs": 2,
}  # fmt: skip


def length(prompts, completions, **columns):
    return [len(completion) / 10 for completion in completions]


@pytest.fixture
def make_trainer(request, tiny_llama, sft_run, dataset, tmp_path):
    """A trainer whose policy has left the reference already, so that the KL is not zero.

    `adapters` are roles that begin as the reward adapter: rewards, or the critic.
    """

    def make(
        reward_functions=(length,),
        step_away=0.05,
        head_scale=1.0,
        adapters=(),
        reward_weights=None,
        tamper=None,
        max_skipped_steps=3,
        **args,
    ):
        tokenizer = load_tokenizer(str(tiny_llama))
        base = load_base(ModelConfig(model_name_or_path=str(tiny_llama)), tokenizer)
        base.lm_head.weight.data *= head_scale
        add_score_head(base)
        model = with_adapter(base, sft_run.folder, "default", trainable=True)
        model = with_adapter(model, sft_run.folder, "reference")
        for name in adapters:
            with_adapter(model, request.getfixturevalue("reward_run").folder, name)
        if tamper:
            tamper(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    parameter += step_away * torch.randn_like(parameter)
        return PPOTrainer(
            model=model,
            args=PPOConfig(output_dir=str(tmp_path / "trainer"), **{**ARGS, **args}),
            reward_adapter=[name for name in adapters if name != "critic"],
            reward_functions=list(reward_functions),
            reward_weights=reward_weights,
            train_dataset=prompt_columns(load_rows(dataset / "prompts_train.jsonl"), tokenizer, 256),
            processing_class=tokenizer,
            max_skipped_steps=max_skipped_steps,
        )

    return make


def some_rows(trainer, count=4):
    return [trainer.train_dataset[index] for index in range(count)]


# Configuration


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "`reward_adapter`, `reward_function` and `rewards` are all empty; set one of them"),
        (
            ["--reward_function=rlhf.rewards:persona_rul"],
            "`reward_function` (command line) is 'rlhf.rewards:persona_rul'",
        ),
        (["--reward_function=persona_rule"], "`reward_function` (command line) is 'persona_rule'; write it as"),
        (["--reward_function=no_such_module:f", "--reward_adapter=runs/x/reward"], "No module named 'no_such_module'"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_before_any_stage_runs(words, reason):
    argv = ["--output_dir=runs/x/ppo", "--dataset=runs/x/prepare", "--sft_adapter=runs/x/sft", "--kl_coef=-1", *words]
    with pytest.raises(ConfigError) as caught:
        parse(config_classes("ppo"), argv, "ppo")
    kl_coef, parents = caught.value.problems
    assert kl_coef.startswith("`kl_coef`") and parents.startswith("ParentConfig: ") and reason in parents


# Roles


def test_policy_and_critic_move_and_no_other_role(ppo_run, sft_run, reward_run):
    assert isinstance(ppo_run.trainer.model, PeftModel)  # else the Trainer saves the whole base
    trainable = {name for name, p in ppo_run.trainer.model.named_parameters() if p.requires_grad}
    assert ppo_run.moved() == trainable
    assert {"value_head" if "value_head" in name else "lora" for name in trainable} == {"value_head", "lora"}
    assert all(".default." in name for name in trainable if "value_head" not in name)
    now = dict(ppo_run.trainer.model.named_parameters())
    for adapter, run in (("reference", sft_run), ("reward", reward_run)):
        for name, tensor in load_file(run.folder / "adapter_model.safetensors").items():
            stem, weight = name.rsplit(".", 1)
            stem = stem.replace(".score", ".score.modules_to_save")
            assert torch.equal(now[f"{stem}.{adapter}.{weight}"], tensor), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 10}, "`max_steps` is 10.*total_episodes"),
        ({"num_train_epochs": 2.0}, "`num_train_epochs` is 2.0.*total_episodes"),
        ({"save_strategy": "steps", "save_steps": 7}, "`save_steps` is 7.*Set it to 8"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "`eval_steps` is 1.*Set it to 2"),
        ({"kl_target": 0.1, "kl_coef": 0.0}, "`kl_target` is 0.1 and `kl_coef` 0, which is multiplied and so stays 0"),
        # 1 + (-0.2) * 40 / 8 is 0
        ({"kl_target": 0.1, "kl_horizon": 8, "per_device_train_batch_size": 40}, "`kl_horizon` is 8.*Set it to 40"),
    ],
)
def test_config_refuses(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), **{**ARGS, **values})


def test_config_counts_rollouts(tmp_path):
    args = PPOConfig(
        output_dir=str(tmp_path),
        **{**ARGS, "gradient_accumulation_steps": 3, "num_mini_batches": 2, "total_episodes": 49},
    )
    assert (args.rollout_size, args.steps_per_rollout, args.total_steps) == (24, 4, 12)  # 4*3*2; 2*2; 3 rollouts


@pytest.mark.parametrize(
    ("values", "message"),
    [({"reward_functions": ()}, "nothing to learn from"), ({"reward_adapter": "reward"}, "no adapter 'reward'")],
)
def test_trainer_refuses_missing_roles(values, message, make_trainer):
    trainer = make_trainer()
    arguments = {"reward_functions": [length], **values}
    with pytest.raises(ValueError, match=message):
        PPOTrainer(trainer.model, trainer.args, trainer.train_dataset, trainer.processing_class, **arguments)


def test_rollouts_of_an_epoch(tmp_path):
    """Two ranks, 2 x 2 episodes each a rollout, 2 steps x 2 micro-batches; 25 prompts make 3 rollouts, 1 prompt waits."""
    args = PPOConfig(
        output_dir=str(tmp_path), **{**ARGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    )
    orders = {}
    for epoch in (0, 1):
        batches = []
        for rank in (0, 1):
            ranked = SimpleNamespace(
                seed=3, rollout_size=8, local_rollout_size=4, process_index=rank, gradient_accumulation_steps=2,
                steps_per_rollout=args.steps_per_rollout,
            )  # fmt: skip
            sampler = RolloutSampler(25, ranked)
            sampler.set_epoch(epoch)
            batches.append(list(sampler))
            assert len(batches[-1]) == len(sampler) == 3 * 4
            for start in range(0, 12, 4):  # one batch of prompts for each micro-batch of its rollout
                assert all(batch == batches[-1][start] for batch in batches[-1][start : start + 4])
        used = [index for rank in batches for batch in rank[::4] for index in batch]
        assert len(used) == len(set(used)) == 24 and set(used) <= set(range(25))
        orders[epoch] = used
    assert orders[0] != orders[1]


def test_prompts_that_leave_a_reply_no_position_are_refused(make_trainer):
    """512 positions; `max_length` is 1024, but no prompt is longer than 100."""
    make_trainer(response_length=400)
    with pytest.raises(
        ConfigError, match="`max_length` 1024 and replies of 500 tokens .*512 positions. Set `max_length` to 12"
    ):
        make_trainer(response_length=500)


def test_each_rank_has_random_numbers_of_its_own(make_trainer, monkeypatch):
    """The Trainer seeds all ranks alike. Those of a checkpoint are in it, so that a resumed training is not seeded."""
    trainer, drawn = make_trainer(), []
    monkeypatch.setattr(Trainer, "train", lambda self, *args, **kwargs: drawn.append(torch.rand(3).tolist()))
    monkeypatch.setattr(trainer, "_check_checkpoint", lambda folder: None)
    for rank, checkpoint in ((0, None), (1, None), (0, None), (0, "checkpoint-2")):
        monkeypatch.setattr(PPOConfig, "process_index", rank)
        torch.manual_seed(0)
        trainer.train(resume_from_checkpoint=checkpoint)
    assert drawn[0] == drawn[2] != drawn[1]
    torch.manual_seed(0)
    assert drawn[3] == torch.rand(3).tolist()


def test_each_minibatch_of_a_rollout_and_epoch_is_another_part(make_trainer):
    trainer = make_trainer(num_mini_batches=2)  # 8 episodes, 4 a minibatch
    parts = {
        (number, epoch): [trainer.minibatch(number, epoch, part).tolist() for part in (0, 1)]
        for number in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(one + other) == list(range(8)) for one, other in parts.values())
    assert len({str(part) for part in parts.values()}) == 4


def test_every_setting_reaches_its_function_and_statistics_are_of_all_ranks(make_trainer, monkeypatch):
    """One update with no setting at its default. `rollout_size` is that of three ranks, of which this one is told."""
    seen = {}

    def spy(owner, name):
        own = getattr(owner, name)

        def call(*args, **kwargs):
            seen.setdefault(name, []).append((args, kwargs, own(*args, **kwargs)))
            return seen[name][-1][-1]

        monkeypatch.setattr(owner, name, call)

    settings = {
        "temperature": 0.7,
        "gamma": 0.9,
        "lam": 0.8,
        "cliprange": 0.11,
        "cliprange_value": 0.33,
        "vf_coef": 0.7,
    }
    trainer = make_trainer(
        **settings, whiten_rewards=True, normalize_rewards=True, kl_target=1e-6, kl_horizon=100, kl_coef=0.3,
        total_episodes=4, num_ppo_epochs=1, generation_batch_size=3,
    )  # fmt: skip
    assert not any(parameter.any() for parameter in trainer.model.get_base_model().value_head.parameters())
    for name in ("masked_whiten", "advantages_and_returns", "explained_variance", "policy_loss", "value_loss",
                 "adapted_kl_coef", "sample_replies"):  # fmt: skip
        spy(rlhf.ppo_trainer, name)
    spy(rlhf.roles, "token_logprobs")
    spy(RunningScale, "add")
    spy(trainer, "compute_loss")
    monkeypatch.setattr(PPOConfig, "rollout_size", property(lambda self: 3 * self.local_rollout_size))
    torch.manual_seed(0)
    trainer._initial_global_step = 0
    trainer.create_optimizer()
    trainer.training_step(trainer.accelerator.prepare(trainer.model), some_rows(trainer))

    rewards, advantages = seen["masked_whiten"]
    assert rewards[1] == {"shift_mean": False, "all_sum": trainer._all_sum}
    assert advantages[1] == {"all_sum": trainer._all_sum}
    ((estimated, _, _),) = seen["advantages_and_returns"]
    assert estimated[0] is rewards[2] and estimated[3:] == (0.9, 0.8)
    assert seen["explained_variance"][0][0][3] == trainer._all_sum and seen["add"][0][0][2] == trainer._all_sum
    assert seen["adapted_kl_coef"][0][0][2:] == (1e-6, 12, 100)  # 4 episodes on each of three ranks
    assert seen["sample_replies"][0][0][3] == 3 and seen["sample_replies"][0][0][2].temperature == 0.7
    assert [call[0][4] for call in seen["token_logprobs"]] == [0.7] * 3  # policy, reference, update
    of_policy, of_critic = seen["policy_loss"][0], seen["value_loss"][0]
    assert of_policy[0][4] == 0.11 and of_critic[0][4] == 0.33 and of_critic[2] > 0
    assert seen["compute_loss"][0][2].item() == pytest.approx((of_policy[2] + 0.7 * of_critic[2]).item())


def test_too_few_prompts_for_a_rollout(make_trainer):
    with pytest.raises(ValueError, match="takes 40 prompts.*has 24"):
        make_trainer(per_device_train_batch_size=40).train()


# Rewards


def test_log_obeys_the_kl_identity(make_trainer):
    """Here with another coefficient than in the held-out rows of the log below."""
    kl_coef = 0.2
    trainer = make_trainer(kl_coef=kl_coef)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert len(rows) == 2 and all(abs(row["objective/kl"]) > 1e-3 for row in rows)
    for row in rows:
        penalty = -kl_coef * row["objective/kl"]
        assert row["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-5, abs=0)  # both in float32
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] + penalty, rel=1e-5)


def test_held_out_rows_of_the_log_obey_it_too(ppo_run):
    rows = [row for row in ppo_run.rows("metrics.jsonl") if "eval_objective/kl" in row]
    assert len(rows) == 6
    for row in rows:
        penalty = -0.1 * row["eval_objective/kl"]  # the kl_coef of this training
        assert row["eval_objective/non_score_reward"] == pytest.approx(penalty, rel=1e-5, abs=1e-9)


def rewards_of_a_rollout(trainer, kl_coef, monkeypatch):
    """The rollout of seed 0, its scores, and the reward of each token under `kl_coef`."""
    seen = {}

    def spy(scores, logprobs, ref_logprobs, mask, coefficient):
        assert coefficient == kl_coef
        seen["rewards"] = kl_penalised_rewards(scores, logprobs, ref_logprobs, mask, coefficient)
        seen["scores"] = scores
        return seen["rewards"]

    kl_penalised_rewards = rlhf.ppo_trainer.kl_penalised_rewards
    with monkeypatch.context() as patch:
        patch.setattr(rlhf.ppo_trainer, "kl_penalised_rewards", spy)
        trainer.args.kl_coef = kl_coef
        torch.manual_seed(0)
        log = {}
        rollout = trainer.rollout(some_rows(trainer, 8), log)
    return rollout, seen["scores"], seen["rewards"]


def test_score_on_the_last_token_and_penalty_in_proportion(make_trainer, monkeypatch):
    trainer = make_trainer(response_length=12)
    stop = trainer.processing_class.eos_token_id
    own = trainer.generation_config
    own.suppress_tokens = [
        id for id in range(len(trainer.processing_class)) if id % 40 and id != stop
    ]  # stops are frequent
    rollout, scores, without = rewards_of_a_rollout(trainer, 0.0, monkeypatch)
    _, again, single = rewards_of_a_rollout(trainer, 0.1, monkeypatch)
    _, _, double = rewards_of_a_rollout(trainer, 0.2, monkeypatch)
    assert torch.equal(scores, again) and len(set(scores.tolist())) > 2
    lengths = set()
    for row in range(8):
        width = rollout.mask.shape[1] - 12
        reply = rollout.input_ids[row, width:].tolist()
        last = reply.index(stop) if stop in reply else 11
        lengths.add(last)
        expected = torch.zeros_like(without[row])
        expected[width + last - 1] = scores[row]  # rewards at t are about token t + 1
        assert torch.equal(without[row], expected)
    assert len(lengths) > 2 and 11 in lengths  # replies that stopped at several places, and one cut off
    assert (single - without).abs().max() > 1e-4
    torch.testing.assert_close(double - without, 2 * (single - without), rtol=1e-5, atol=1e-6)


def test_missing_eos_penalty(make_trainer, monkeypatch):
    """Random replies of six tokens out of 400 do not stop."""
    trainer = make_trainer()
    _, plain, _ = rewards_of_a_rollout(trainer, 0.1, monkeypatch)
    trainer.args.missing_eos_penalty = 2.0
    rollout, penalised, _ = rewards_of_a_rollout(trainer, 0.1, monkeypatch)
    stopped = ((rollout.input_ids == trainer.processing_class.eos_token_id) & rollout.mask.bool()).any(1)
    torch.testing.assert_close(penalised, plain - 2.0 * (~stopped))
    assert not stopped.all()


def test_reward_function_gets_prompts_completions_and_columns(make_trainer):
    calls = []

    def record(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [1.0] * len(prompts)

    trainer = make_trainer([record, length])
    log = {}
    rollout = trainer.rollout(some_rows(trainer), log)
    ((prompts, completions, columns),) = calls
    assert prompts[0] == [
        {"role": "system", "content": "i have a dog .\ni like pizza ."}, {"role": "user", "content": "what pet do you have ?"},
    ]  # fmt: skip
    replies = [ids[mask.bool()] for ids, mask in zip(rollout.input_ids, rollout.mask, strict=True)]
    assert completions == [t.strip() for t in trainer.processing_class.batch_decode(replies, skip_special_tokens=True)]
    assert columns["value"] == ["dog", "cat", "bird", "fish"] and columns["foil"] == [None, "bird", None, None]
    assert columns["kind"] == ["direct", "false_suggestion", "true_suggestion", "direct"]
    assert "persona" not in columns and "prompt" not in columns
    mean = sum(1 + len(text) / 10 for text in completions) / 4  # the functions add up
    assert log["objective/scores"] == [pytest.approx(mean)]


def test_rewards_depend_on_the_persona(ppo_run, reward_run, make_trainer, tiny_llama):
    """The same question and the same reply to two personas, by rule and by the learned reward."""
    trainer, tokenizer = make_trainer([persona_rule]), load_tokenizer(str(tiny_llama))
    asked = {"prompt": [{"role": "user", "content": "what pet do you have ?"}], "kind": "direct", "foil": None}
    rows = [
        {**asked, "persona": [f"i have a {pet} ."], "value": pet, "slot_values": ["dog", "cat"]}
        for pet in ("dog", "cat")
    ]
    columns = list(prompt_columns(rows, tokenizer, 256))
    reply = tokenizer("i have a dog .", add_special_tokens=False)["input_ids"]
    responses = torch.tensor([reply, reply])
    by_rule = trainer.score(columns, {}, responses, torch.ones_like(responses))
    assert {name: scores.tolist() for name, scores in by_rule.items()} == {"persona_rule": [1.0, 0.0]}

    learned = ppo_run.trainer
    batch = as_batch(*left_pad([row["prompt_ids"] for row in columns], 0), responses, torch.ones_like(responses))
    with torch.no_grad():
        first, second = learned.score(columns, batch, responses, torch.ones_like(responses))["reward"].tolist()
    assert abs(first - second) > 1e-4
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama)), tokenizer)
    add_score_head(base)
    alone = with_adapter(base, reward_run.folder, "reward").eval()  # the reward adapter and nothing else
    expected = score_ids(alone.get_base_model(), [row["prompt_ids"] + reply for row in columns])
    assert [first, second] == pytest.approx(expected, abs=1e-5)  # float32, padded against alone


def constant(prompts, completions, **columns):
    return [3.0] * len(completions)


def test_score_is_the_weighted_sum_and_each_reward_is_logged(make_trainer):
    weights = {"length": 2.0, "constant": -0.5}
    trainer = make_trainer([length, constant], adapters=["reward", "reward_2"], reward_weights=weights)
    log = {}
    trainer.rollout(some_rows(trainer), log)
    mean = {name: log[f"rewards/{name}/mean"][0] for name in ("length", "constant", "reward", "reward_2")}
    assert mean["constant"] == 3.0 and log["rewards/constant/std"] == [0.0] and log["rewards/length/std"][0] > 0
    assert mean["reward"] == mean["reward_2"] != 0  # the same weights under two names
    total = 2.0 * mean["length"] - 0.5 * 3.0 + 2 * mean["reward"]
    assert log["objective/scores"] == [pytest.approx(total, abs=1e-6)]  # float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward_functions": [length, length]}, "Two rewards are called 'length'"),
        ({"reward_weights": {"lenght": 1.0}}, "names 'lenght'; the rewards are length"),
        ({"stop_tokens": ["<|nothing|>"]}, "`stop_tokens` has '<|nothing|>'"),
        ({"value_model": "adapter"}, "no adapter 'critic'.*starts it from the reward adapter"),
    ],
)
def test_rewards_and_roles_that_cannot_be_are_refused(values, message, make_trainer):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        make_trainer(**values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "'reward' gave 1 scores for 4 replies"),
        ([1.0, float("nan"), 1.0, 1.0], "'reward' gave nan for the reply"),
    ],
)
def test_scores_that_are_not_one_number_a_reply_are_refused(given, message, make_trainer):
    def reward(prompts, completions, **columns):
        return given

    trainer = make_trainer([reward])
    with pytest.raises(ValueError, match=message):
        trainer.rollout(some_rows(trainer), {})


def test_a_string_prompt_reaches_the_reward_as_the_same_messages(make_trainer):
    calls = []

    def record(prompts, completions, **columns):
        calls.append(prompts)
        return [0.0] * len(prompts)

    text = "[PERSONA] i have a dog . | i like pizza . [DIALOGUE] hello [SEP] hi . [SEP] any pets ? [RESPONSE]"
    said = [("user", "hello"), ("assistant", "hi ."), ("user", "any pets ?")]
    messages = [{"role": role, "content": content} for role, content in said]
    rows = [{"prompt": text}, {"prompt": messages, "persona": ["i have a dog .", "i like pizza ."], "more": 1}]
    trainer = make_trainer([record])
    columns = prompt_columns(rows, trainer.processing_class, 256)
    assert columns[0]["prompt_ids"] == columns[1]["prompt_ids"]
    trainer.rollout(list(columns), {})
    ((first, second),) = calls
    assert first == second and first[0] == {"role": "system", "content": "i have a dog .\ni like pizza ."}


def test_normalised_rewards_follow_a_running_scale(make_trainer):
    """Two rollouts: the first by its own mean and deviation, the second by those of all eight scores. Float64 by numpy."""
    seen = []

    def record(prompts, completions, **columns):
        seen.append([len(completion) ** 2 for completion in completions])
        return seen[-1]

    trainer = make_trainer([record], normalize_rewards=True, reward_weights={"record": 2.0})
    for _ in range(2):
        log = {}
        trainer.rollout(some_rows(trainer), log)
        everything = np.concatenate(seen)
        expected = 2.0 * (np.array(seen[-1]) - everything.mean()) / everything.std(ddof=1)
        assert log["objective/scores"] == [pytest.approx(expected.mean(), abs=1e-5)]  # float32 scores
        assert log["rewards/record/mean"] == [pytest.approx(np.mean(seen[-1]))]  # as the reward gave it
    assert trainer.ppo_state.scales["record"].count == 8
    log = {}
    trainer.rollout(some_rows(trainer), log, held_out=True)
    assert log["objective/scores"] == [pytest.approx(2.0 * np.mean(seen[-1]))]  # comparable over the training
    assert trainer.ppo_state.scales["record"].count == 8


def test_adaptive_kl_moves_the_coefficient_of_the_next_rollout(make_trainer):
    trainer = make_trainer(kl_coef=0.5, kl_target=1e-6, kl_horizon=40)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert rows[0]["objective/kl"] > 1e-5 and rows[0]["objective/kl_coef"] == 0.5
    # far above the target: 0.2 * 4 episodes / 40
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.5 * 1.02)
    for row in rows:
        assert row["objective/non_score_reward"] == pytest.approx(-row["objective/kl_coef"] * row["objective/kl"])


def test_any_stop_token_ends_a_reply(make_trainer, monkeypatch):
    """Replies of six tokens, of which "e" is one that may be sampled: it ends them, and no penalty is due."""
    trainer = make_trainer(stop_tokens=["e"], missing_eos_penalty=5.0)
    stop = trainer.processing_class.convert_tokens_to_ids("e")
    trainer.generation_config.suppress_tokens = [
        id for id in range(len(trainer.processing_class)) if id % 40 and id != stop
    ]
    rollout, scores, _ = rewards_of_a_rollout(trainer, 0.1, monkeypatch)
    replies = [ids[mask.bool()].tolist() for ids, mask in zip(rollout.input_ids, rollout.mask, strict=True)]
    stopped = [reply[-1] in trainer.stop_ids for reply in replies]
    assert any(reply[-1] == stop for reply in replies) and not all(stopped)
    width = rollout.mask.shape[1] - 6
    behind = rollout.input_ids[:, width:][rollout.mask[:, width:] == 0]
    assert len(behind) and (behind == trainer.processing_class.pad_token_id).all()  # not sampled on and masked
    for reply, ended, score in zip(replies, stopped, scores.tolist(), strict=True):
        assert not set(reply[:-1]) & set(trainer.stop_ids)
        assert (score >= 0) is ended  # the length is never negative and at most 5


# The check of the ratio


def test_ratio_is_one_on_the_first_minibatch(make_trainer):
    trainer = make_trainer()
    trainer.train()
    first = next(row for row in trainer.state.log_history if "val/ratio" in row)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-4) and first["policy/clipfrac_avg"] == 0


def with_dropout(trainer):
    for module in trainer.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)


def with_another_adapter(trainer):
    rollout = trainer.rollout

    def switched(*args):
        made = rollout(*args)
        trainer.model.set_adapter("reference")
        return made

    trainer.rollout = switched


def with_shifted_positions(trainer):
    rollout = trainer.rollout

    def shifted(*args):
        made = rollout(*args)
        made.position_ids = made.position_ids * 2
        return made

    trainer.rollout = shifted


@pytest.mark.parametrize(
    ("tamper", "cause"),
    [
        (with_dropout, r"dropout is on: `.*lora_dropout.default.p` drops 0.5"),
        (with_another_adapter, "the adapter of the update, 'reference', is not the one that sampled"),
        (with_shifted_positions, "positions and padding differ"),
    ],
)
def test_ratio_check_stops_and_names_the_cause(tamper, cause, make_trainer):
    trainer = make_trainer(step_away=0.3)
    tamper(trainer)
    with pytest.raises(RatioError, match=cause):
        trainer.train()


def test_ratio_is_one_under_autocast_too(tmp_path):
    """The demo's base, whose logits of a head in bfloat16 put a ratio off by 0.019; the limit is 0.01."""
    folder = str(ROOT / "recipes" / "demo" / "base")
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    base = load_base(ModelConfig(model_name_or_path=folder), tokenizer)
    config = lora_config(ModelConfig(lora_r=4, lora_dropout=0.0), base)
    model = get_peft_model(base, config)
    model.add_adapter("reference", config)
    args = {**ARGS, "seed": 1, "bf16": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    args |= {"num_mini_batches": 2, "num_ppo_epochs": 1, "response_length": 16, "total_episodes": 32}
    columns = prompt_columns(list(world.prompts(64, 5))[:64], tokenizer, 384)
    trainer = PPOTrainer(
        model, PPOConfig(output_dir=str(tmp_path), **args), columns, tokenizer, reward_functions=[length]
    )
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16" and trainer.state.global_step == 2


# Held out


def test_held_out_numbers_are_over_all_rows_and_depend_on_nothing_else(make_trainer, caplog):
    """No batch size, no random numbers before it; the perplexity is of the rows that have a reference."""
    rows = [
        {"prompt": [{"role": "user", "content": f"what number {n} do you like ?"}], "persona": ["i like numbers ."]}
        for n in range(6)
    ]
    for row in rows[::2]:
        row["reference"] = "i like " + row["prompt"][0]["content"][12] * 3 + " ."
    trainer = make_trainer()
    nn.init.ones_(trainer.model.get_base_model().value_head.bias)

    def evaluated(rows, size, seed):
        trainer.args.per_device_eval_batch_size = size
        torch.manual_seed(seed)
        metrics = trainer.evaluate(prompt_columns(rows, trainer.processing_class, 256))
        return metrics, torch.rand(1).item()

    metrics, drawn = evaluated(rows, 6, 1)
    assert evaluated(rows, 1, 2)[0] == metrics and metrics["eval_rewards/length/std"] > 0
    torch.manual_seed(1)
    assert drawn == torch.rand(1).item()  # the training goes on with its own
    assert "perplexity are of 3 of 6 rows" in caplog.text
    alone, _ = evaluated(rows[::2], 6, 1)
    assert metrics["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    none, _ = evaluated(rows[1::2], 6, 1)
    assert "eval_loss" not in none


# Gradients


def gradients(trainer, rollout):
    """Of the first optimiser step on a recorded rollout."""
    trainer.rollout = lambda rows, log: rollout
    trainer._initial_global_step = 0
    trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model)
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.training_step(model, [])
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def recorded(make_trainer):
    """A rollout of 8 replies whose lengths differ."""
    trainer = make_trainer(per_device_train_batch_size=8, response_length=12)
    stop = trainer.processing_class.eos_token_id
    trainer.generation_config.suppress_tokens = [
        id for id in range(len(trainer.processing_class)) if id % 40 and id != stop
    ]
    torch.manual_seed(0)
    rollout = trainer.rollout(some_rows(trainer, 8), {})
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    return rollout


@pytest.mark.parametrize("other", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
                                   {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
                                   {"per_device_train_batch_size": 8, "gradient_checkpointing": True}])  # fmt: skip
def test_gradients_do_not_depend_on_how_the_batch_is_cut(other, make_trainer, recorded):
    """A mean over micro-batches would weigh short replies more."""
    whole = gradients(make_trainer(per_device_train_batch_size=8), recorded)
    parts = gradients(make_trainer(**other), recorded)
    assert any(gradient.abs().max() > 1e-2 for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def with_critic(make_trainer):
    def make(**args):
        return make_trainer(adapters=["critic"], value_model="adapter", per_device_train_batch_size=8, **args)

    return make


def test_recomputed_activations_are_those_of_their_own_adapter(with_critic, recorded):
    """Policy and critic in one graph. PyTorch's own recomputation would run the critic's layers under the policy."""

    def with_plain_checkpointing(trainer):
        base = trainer.model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return trainer

    whole = gradients(with_critic(), recorded)
    again = gradients(with_critic(gradient_checkpointing=True), recorded)
    assert {"critic" if ".critic." in name else "policy" for name in whole} == {"critic", "policy"}
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name  # no weight is unused
        assert torch.equal(again[name], gradient), name
    plain = gradients(with_plain_checkpointing(with_critic()), recorded)
    assert any((plain[name] - gradient).abs().max() > 1e-4 for name, gradient in whole.items())


def test_the_critic_starts_as_the_reward_model(with_critic, reward_run, tiny_llama):
    trainer = with_critic(response_length=3)
    rollout = trainer.rollout(some_rows(trainer, 8), {})
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama)), trainer.processing_class)
    add_score_head(base)
    alone = with_adapter(base, reward_run.folder, "reward").eval().get_base_model()
    for row in range(8):
        ids = rollout.input_ids[row][rollout.attention_mask[row].bool()].tolist()
        size = int(rollout.mask[row].sum())
        values = rollout.values[row][rollout.mask[row, 1:].bool()].tolist()
        # the value of a token is said in front of it
        assert values == pytest.approx(score_ids(alone, [ids[: len(ids) - size + t] for t in range(size)]), abs=1e-5)


def test_the_critics_head_works_in_float32_under_autocast():
    torch.manual_seed(0)
    head, states = nn.Linear(16, 1), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        values = _in_float32(head, states)
    assert torch.equal(values, head(states).squeeze(-1))


def test_a_critic_of_its_own_is_trained_saved_and_loaded(with_critic, tmp_path):
    trainer = with_critic(total_episodes=16)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    moved = {name for name, old in before.items() if not torch.equal(old, now[name])}
    assert moved == {name for name, parameter in now.items() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in moved} == {"default", "critic"}
    trainer._save(tmp_path / "saved")
    other = with_critic()
    other._load_from_checkpoint(str(tmp_path / "saved"))
    for name, parameter in other.model.named_parameters():
        assert parameter.requires_grad == now[name].requires_grad, name
        assert torch.equal(parameter, now[name]) or "original_module" in name, name  # the base's own head has no use
    base = load_base(
        ModelConfig(model_name_or_path=trainer.model.get_base_model().name_or_path), trainer.processing_class
    )
    policy = PeftModel.from_pretrained(base, tmp_path / "saved")
    for name, tensor in get_peft_model_state_dict(policy).items():
        assert torch.equal(tensor, get_peft_model_state_dict(trainer.model, adapter_name="default")[name]), name


def test_gradients_are_clipped(make_trainer):
    """Plain SGD with learning rate 1: the length of a step is the norm of its clipped gradient."""
    trainer = make_trainer(optim="sgd", learning_rate=1.0, max_grad_norm=0.01, total_episodes=4)
    weights = broken_at(trainer, (), None)
    trainer.train()
    weights.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert min(norms) > 0.02  # of the whole gradient
    for before, after in itertools.pairwise(weights):
        step = torch.stack([(new - old).norm() for old, new in zip(before, after, strict=True)]).norm()
        assert step.item() == pytest.approx(0.01, rel=1e-3)


# Guards


def test_what_is_not_policy_or_critic_is_not_optimised(make_trainer):
    trainer = make_trainer()
    next(p for name, p in trainer.model.named_parameters() if ".reference." in name).requires_grad_(True)
    with pytest.raises(RoleError, match="1 are frozen that should not.*reference"):
        trainer.train()


def test_a_frozen_role_that_was_changed_is_named(make_trainer):
    trainer = make_trainer(adapters=["reward", "reward_2"])
    named = list(trainer.model.named_parameters())
    weights = [[p for name, p in named if f".{role}." in name][-1] for role in ("reference", "reward_2")]
    rollout = trainer.rollout

    def tampering(*args):
        for weight in weights:
            weight.data += 1e-6
        return rollout(*args)

    guard = RoleGuard(trainer.model, ["reference"])
    guard.on_train_begin(trainer.args, trainer.state, trainer.control)
    weights[0].data += 1e-6
    with pytest.raises(RoleError, match="The adapter reference is frozen"):
        guard.on_save(trainer.args, trainer.state, trainer.control)
    trainer.rollout = tampering
    with pytest.raises(RoleError, match=r"The adapter reference, reward_2 is frozen.*found at step 4"):
        trainer.train()


def broken_at(trainer, steps, break_):
    """Let `break_` spoil the minibatch of these optimiser steps; the weights before each step, and at the end."""
    weights, begin = [], trainer._begin_step

    def begin_and_break(inputs):
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
        begin(inputs)
        if trainer.state.global_step in steps:
            break_(trainer)

    trainer._begin_step = begin_and_break
    return weights


def no_number_in_the_returns(trainer):
    trainer._minibatch.returns[-1] = torch.nan


def no_number_in_a_gradient(trainer):
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B.default" in name)
    handle = weight.register_hook(lambda gradient: handle.remove() or gradient * torch.inf)


@pytest.mark.parametrize("break_", [no_number_in_the_returns, no_number_in_a_gradient])
def test_a_minibatch_that_is_not_finite_changes_nothing_and_is_counted(break_, make_trainer):
    trainer = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, weight_decay=0.1, adam_beta1=0.9
    )
    weights = broken_at(trainer, {1}, break_)
    trainer.train()
    weights.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    same = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    assert same == [False, True, False, False]
    assert [row["skipped_steps"] for row in trainer.state.log_history if "loss" in row] == [0, 1, 1, 1]
    states = trainer.optimizer.state.values()
    assert {state["step"].item() for state in states} == {3.0}  # the averages of AdamW did not move either


def test_too_many_in_a_row_stop_the_run_and_the_minibatch_is_saved(make_trainer, tmp_path):
    trainer = make_trainer(max_skipped_steps=1)
    weights = broken_at(trainer, {0, 2, 3}, no_number_in_the_returns)  # not in a row: 0; one too many: 3
    with pytest.raises(
        NonFiniteError, match=r"2 steps in a row had a loss.*`returns` of the batch.*of rows \d+.*nonfinite_batch_0"
    ):
        trainer.train()
    assert len(weights) == 4 and trainer.guard.skipped == 3
    saved = load_file(tmp_path / "trainer" / "nonfinite_batch_0.safetensors")
    assert saved["returns"][-1].isnan().all() and saved["input_ids"].shape[0] == 4


def test_a_policy_that_cannot_reply_names_its_layer(make_trainer):
    trainer = make_trainer(num_ppo_epochs=1)
    layer = trainer.model.get_base_model().model.layers[1]

    def break_the_second_rollout(trainer):
        if trainer.state.global_step == 1:
            layer.register_forward_hook(lambda module, args, out: out * torch.nan)

    weights, begin = broken_at(trainer, (), None), trainer._begin_step
    trainer._begin_step = lambda inputs: (break_the_second_rollout(trainer), begin(inputs))
    with pytest.raises(
        NonFiniteError, match=r"cannot reply.*in the output of `\S+layers\.1`.*of rows \d+.*learning_rate"
    ):
        trainer.train()
    assert len(weights) == 2


def test_rollouts_use_the_cache_and_no_checkpointing(make_trainer):
    """Four replies of six tokens, decoded two at a time: the prompts of a batch give the first token, the cache the rest."""
    trainer = make_trainer(gradient_checkpointing=True, generation_batch_size=2)
    trainer.model.train()
    shapes, flags, layer = [], [], trainer.model.get_base_model().model.layers[0]

    def look(module, args, kwargs):
        shapes.append((len(args[0]), args[0].shape[1] == 1))
        flags.append(module.gradient_checkpointing)

    layer.register_forward_pre_hook(look, with_kwargs=True)
    trainer.rollout(some_rows(trainer), {})
    assert shapes == [*2 * [(2, False), *5 * [(2, True)]], (4, False), (4, False)]  # then policy and reference
    assert not any(flags) and layer.gradient_checkpointing


def test_rates_of_dropout_that_are_plain_numbers_are_found():
    """OPT keeps its rates as attributes of the attention and of the layer, which no search for nn.Dropout finds."""
    config = OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=20, dropout=0.1,
                       attention_dropout=0.2, word_embed_proj_dim=16)  # fmt: skip
    found = {getattr(module, attribute) for _, module, attribute in dropouts(OPTForCausalLM(config))}
    assert found == {0.1, 0.2}


# Learning


def test_ppo_learns_a_reward(make_trainer):
    """To write the letter o: less than half of random replies do.

    The head is scaled up, since that of a small random model gives all tokens nearly the same logit, whatever the
    hidden state is.
    """

    def has_o(prompts, completions, **columns):
        return [float("o" in completion) for completion in completions]

    trainer = make_trainer(
        [has_o], step_away=0.0, head_scale=10.0, per_device_train_batch_size=16, total_episodes=320, kl_coef=0.0,
        learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 40
    scores = [row["objective/scores"] for row in trainer.state.log_history if "objective/scores" in row]
    start, end = sum(scores[:4]) / 4, sum(scores[-4:]) / 4
    assert start < 0.6 and end > start + 0.3, scores


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(train, tiny_llama, dataset, sft_run, reward_run, tmp_path_factory):
    """Into the second epoch of the data: 24 prompts, 8 rollouts of 4, 16 steps."""
    keys = {
        "model_name_or_path": tiny_llama, "dataset": dataset, "sft_adapter": sft_run.folder,
        "reward_adapter": reward_run.folder, "total_episodes": 32, "save_steps": 6, "save_total_limit": None,
        "load_best_model_at_end": False, "metric_for_best_model": None, "kl_target": 0.1, "kl_horizon": 100,
        "eval_steps": 8, "sample_steps": 8,
        "normalize_rewards": True, "rewards": f'{{"{reward_run.folder}": 0.5, "rlhf.rewards:persona_rule": 2}}',
    }  # fmt: skip
    return train("ppo", tmp_path_factory.mktemp("resume") / "whole", **keys), keys


def test_resumed_training_is_bit_identical(uninterrupted, train, tmp_path):
    """From the middle of the first epoch; test_ppo_resume.py begins between two epochs and within the second one."""
    step = 6
    whole, keys = uninterrupted
    folder = tmp_path / "resumed"
    shutil.copytree(whole.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole.folder / "metrics.jsonl", folder)
    resumed = train("ppo", folder, **keys, resume_from_checkpoint=folder / f"checkpoint-{step}")
    expected = dict(whole.trainer.model.named_parameters())
    for name, parameter in resumed.trainer.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for file in ("adapter_model.safetensors", VALUE_HEAD_FILE):
        assert (folder / "checkpoint-16" / file).read_bytes() == (whole.folder / "checkpoint-16" / file).read_bytes()

    def without_times(rows):
        timed = "rollout/tokens_per_second"
        return [{k: v for k, v in row.items() if not k.startswith("train_") and k != timed} for row in rows]

    assert without_times(resumed.rows("metrics.jsonl")) == without_times(whole.rows("metrics.jsonl"))
    coefficients = [row["objective/kl_coef"] for row in resumed.rows("metrics.jsonl") if "objective/kl_coef" in row]
    assert len(set(coefficients)) > 6  # the state that a checkpoint has to keep did move
    for name in ("tokens", "tokens_generated"):
        assert resumed.metadata()[name] == whole.metadata()[name]


def test_tokens_are_counted(ppo_run):
    """24 prompts, each replied to once, 4 a rollout; prompt and reply are trained on in both of its epochs."""
    generated = sum(
        4 * row["val/response_length"] for row in ppo_run.rows("metrics.jsonl") if "val/response_length" in row
    )
    prompts = sum(len(ids) for ids in ppo_run.trainer.train_dataset["prompt_ids"])
    assert len(ppo_run.trainer.train_dataset) == 24 and generated > 0
    assert ppo_run.metadata()["tokens_generated"] == round(generated)
    assert ppo_run.metadata()["tokens"] == 2 * (prompts + round(generated))


def test_the_script_takes_a_mixture_and_an_adapter_as_critic(
    train, tiny_llama, tiny_qwen2, dataset, sft_run, reward_run, tmp_path
):
    data = tmp_path / "data"  # of every form that a prompt may have: with a persona, without one, and as text
    shutil.copytree(dataset, data)
    (data / "metadata.json").unlink()
    for path in data.glob("prompts_*.jsonl"):
        rows = load_rows(path)
        rows[0].pop("persona")
        rows[1]["prompt"] = render_prompt(Persona(tuple(rows[1].pop("persona"))), rows[1]["prompt"])
        write_jsonl(path, rows)
    write_json(data / "metadata.json", {**read_record(dataset), "result_hash": folder_hash(data)})
    judge = tmp_path / "judge"  # a model of another base
    AutoModelForSequenceClassification.from_pretrained(tiny_qwen2, num_labels=1).save_pretrained(judge)
    load_tokenizer(str(tiny_qwen2)).save_pretrained(judge)
    rewards = {str(reward_run.folder): 0.5, "rlhf.rewards:persona_rule": 2.0, str(judge): 0.25}
    run = train(
        "ppo", tmp_path / "ppo", model_name_or_path=tiny_llama, dataset=data, sft_adapter=sft_run.folder,
        rewards=json.dumps(rewards), value_model="adapter", total_episodes=4, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False, metric_for_best_model=None, gradient_checkpointing=True,
    )  # fmt: skip
    assert {name.split(".")[-2] for name in run.moved()} == {"default", "critic"}
    saved = load_file(run.folder / VALUE_ADAPTER_FILE)  # beside the policy, for a training that goes on
    trained = get_peft_model_state_dict(run.trainer.model, adapter_name="critic")
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)
    told = run.rows("samples.jsonl")
    assert [sample["persona"] for sample in told[:2]] == [
        [],
        load_rows(dataset / "prompts_heldout.jsonl")[1]["persona"],
    ]
    row = next(row for row in run.rows("metrics.jsonl") if "objective/scores" in row)
    total = (
        0.5 * row["rewards/reward/mean"] + 2.0 * row["rewards/persona_rule/mean"] + 0.25 * row["rewards/judge/mean"]
    )
    assert row["objective/scores"] == pytest.approx(total, abs=1e-6) and row["rollout/tokens_per_second"] > 0
    record = run.metadata()["rewards"]
    assert {name: said["weight"] for name, said in record.items()} == {
        "reward": 0.5,
        "persona_rule": 2.0,
        "judge": 0.25,
    }
    assert (run.folder / record["reward"]["source"]).resolve() == reward_run.folder.resolve()  # the folder can move
    assert run.metadata()["parents"]["reward"]["hash"] == record["reward"]["hash"] == folder_hash(reward_run.folder)
    assert record["persona_rule"] == {"source": "rlhf.rewards:persona_rule", "weight": 2.0, "hash": None}
    # A parent whose weights change makes `rlhf run` train anew.
    assert run.metadata()["parents"]["reward model judge"] == {"path": "../judge", "hash": folder_hash(judge)}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rewards={runs/x/none: 1}"], "holds neither a reward adapter .* nor a model"),
        (["--reward_function=rlhf.rewards:persona_rule", "--value_model=adapter"], "starts from a reward adapter"),
    ],
)
def test_rewards_that_are_not_there_are_named(words, reason):
    _, parents, *_ = parse(config_classes("ppo"), ["--output_dir=o", "--dataset=d", "--sft_adapter=s", *words])
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        add_rewards(None, parents)
        start_of_critic(parents)


def test_speed_is_of_the_replies_of_all_ranks(make_trainer, monkeypatch):
    """Two seconds by a clock that is set here, for the tokens that the masks keep."""
    trainer = make_trainer()
    monkeypatch.setattr(rlhf.ppo_trainer.time, "perf_counter", iter([10.0, 12.0, 20.0, 22.0]).__next__)
    log, held_out = {}, {}
    rollout = trainer.rollout(some_rows(trainer), log)
    assert log["rollout/tokens_per_second"] == [pytest.approx(rollout.mask.sum().item() / 2)]
    trainer.rollout(some_rows(trainer), held_out, held_out=True)
    assert "rollout/tokens_per_second" not in held_out


# docs/ppo.md


def test_nothing_of_trl_that_it_does_not_keep_is_imported():
    for path in (ROOT / "rlhf").rglob("*.py"):
        assert "trl.experimental" not in path.read_text(encoding="utf-8"), path


def test_every_test_that_the_documentation_names_is_there():
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / (file or "test_ppo.py")).read_text(encoding="utf-8"), name
