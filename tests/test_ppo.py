"""PPOTrainer: roles, rewards, the check of the ratio, gradients, learning, and resuming."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig

import rlhf.ppo_trainer
from rlhf.config import ConfigError, parse
from rlhf.data.columns import load_rows, prompt_columns
from rlhf.generate import left_pad
from rlhf.lora import with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.pipeline import config_classes
from rlhf.ppo_trainer import VALUE_HEAD_FILE, PPOConfig, PPOTrainer, RatioError
from rlhf.rewards import persona_rule, score_ids
from rlhf.rollouts import RolloutSampler, as_batch

ARGS = {
    "use_cpu": True, "seed": 3, "report_to": "none", "per_device_train_batch_size": 4, "response_length": 6,
    "logging_steps": 1, "learning_rate": 1e-2, "gradient_checkpointing": False, "save_strategy": "no",
    "lr_scheduler_type": "constant", "disable_tqdm": True, "total_episodes": 8, "num_ppo_epochs": 2,
}  # fmt: skip


def length(prompts, completions, **columns):
    return [len(completion) / 10 for completion in completions]


@pytest.fixture
def make_trainer(tiny_llama, sft_run, dataset, tmp_path):
    """A trainer whose policy has left the reference already, so that the KL is not zero."""

    def make(reward_functions=(length,), step_away=0.05, head_scale=1.0, **args):
        tokenizer = load_tokenizer(str(tiny_llama))
        base = load_base(ModelConfig(model_name_or_path=str(tiny_llama)), tokenizer)
        base.lm_head.weight.data *= head_scale
        model = with_adapter(base, sft_run.folder, "default", trainable=True)
        model = with_adapter(model, sft_run.folder, "reference")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    parameter += step_away * torch.randn_like(parameter)
        return PPOTrainer(
            model=model,
            args=PPOConfig(output_dir=str(tmp_path / "trainer"), **{**ARGS, **args}),
            reward_functions=list(reward_functions),
            train_dataset=prompt_columns(load_rows(dataset / "prompts_train.jsonl"), tokenizer, 256),
            processing_class=tokenizer,
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


def test_too_few_prompts_for_a_rollout(make_trainer):
    with pytest.raises(ValueError, match="takes 40 prompts.*has 24"):
        make_trainer(per_device_train_batch_size=40).train()


# Rewards


@pytest.mark.parametrize("kl_coef", [0.0, 0.1, 0.2])
def test_log_obeys_the_kl_identity(kl_coef, make_trainer):
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


# Learning


def test_ppo_learns_a_reward(make_trainer):
    """To write the letter o: less than half of random replies do.

    The head is scaled up, since that of a small random model gives all tokens nearly the same logit, whatever the
    hidden state is.
    """

    def has_o(prompts, completions, **columns):
        return [float("o" in completion) for completion in completions]

    trainer = make_trainer(
        [has_o], step_away=0.0, head_scale=10.0, per_device_train_batch_size=16, total_episodes=480, kl_coef=0.0,
        learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 60
    scores = [row["objective/scores"] for row in trainer.state.log_history if "objective/scores" in row]
    start, end = sum(scores[:4]) / 4, sum(scores[-4:]) / 4
    assert start < 0.6 and end > start + 0.3, scores


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(train, tiny_llama, dataset, sft_run, reward_run, tmp_path_factory):
    """Two epochs of the data: 24 prompts, 12 rollouts of 4, 24 steps."""
    keys = {
        "model_name_or_path": tiny_llama, "dataset": dataset, "sft_adapter": sft_run.folder,
        "reward_adapter": reward_run.folder, "total_episodes": 48, "save_steps": 6, "save_total_limit": None,
        "load_best_model_at_end": False, "metric_for_best_model": None,
    }  # fmt: skip
    return train("ppo", tmp_path_factory.mktemp("resume") / "whole", **keys), keys


@pytest.mark.parametrize("step", [6, 12, 18], ids=["in the first epoch", "between epochs", "in the second epoch"])
def test_resumed_training_is_bit_identical(step, uninterrupted, train, tmp_path):
    whole, keys = uninterrupted
    folder = tmp_path / "resumed"
    shutil.copytree(whole.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole.folder / "metrics.jsonl", folder)
    resumed = train("ppo", folder, **keys, resume_from_checkpoint=folder / f"checkpoint-{step}")
    expected = dict(whole.trainer.model.named_parameters())
    for name, parameter in resumed.trainer.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for file in ("adapter_model.safetensors", VALUE_HEAD_FILE):
        assert (folder / "checkpoint-24" / file).read_bytes() == (whole.folder / "checkpoint-24" / file).read_bytes()

    def without_times(rows):
        return [{k: v for k, v in row.items() if not k.startswith("train_")} for row in rows]

    assert without_times(resumed.rows("metrics.jsonl")) == without_times(whole.rows("metrics.jsonl"))
