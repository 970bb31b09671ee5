"""One update on one rollout, by TRL 1.12's PPOTrainer and by ours: what agrees, and which defect of theirs the rest is.

TRL runs in a process of its own (this file, as a program), with its last wheel that has PPO before the installed one. There
it samples, scores and trains as it does; the variables of its training loop are written down when it calls backward. Ours
is then given the same replies, and what it computed on the way to its own backward pass is compared.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from rlhf.ppo_math import advantages_and_returns, masked_whiten, value_loss

ROOT = Path(__file__).parents[1]
EPISODES, RESPONSE, VOCABULARY, PAD, STOP = 8, 10, 40, 0, 1
SETTINGS = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "seed": 5, "per_device_train_batch_size": EPISODES,
    "num_ppo_epochs": 2, "total_episodes": EPISODES, "response_length": RESPONSE, "kl_coef": 0.2, "gamma": 1.0,
    "lam": 0.9, "temperature": 0.9, "missing_eos_penalty": 1.0, "gradient_checkpointing": False, "disable_tqdm": True,
    "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "vf_coef": 0.0,  # their critic is a model of its own, ours moves the policy's hidden states too
}  # fmt: skip
CLOSE = {"rtol": 0, "atol": 1e-4}

pytestmark = pytest.mark.slow  # a process that imports transformers for each of three cases


def prompts():
    """Of several lengths, so that there is padding on the left."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        for length in (4, 9, 15, 6, 22, 5, 11, 17)
    ]


# In TRL's process


def run_trl(folder, pad_is_stop):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    if pad_is_stop:
        tokenizer.pad_token = tokenizer.eos_token
    base.generation_config.pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
    policy = PeftModel.from_pretrained(base, folder / "policy", is_trainable=True)
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / name, num_labels=1)
        for name in ("reward", "critic")
    )
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(folder / "out"), bf16=False, stop_token="eos", num_sample_generations=0, **SETTINGS),
        processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts()]),
    )  # fmt: skip
    seen = {}

    def backward(loss):
        """In the place of accelerate's; the training loop is one function and hands nothing out."""
        variables = sys._getframe(1).f_locals
        loss.backward()
        gradients = {f"gradient.{name}": p.grad for name, p in policy.named_parameters() if p.grad is not None}
        for name, value in {**variables, **gradients}.items():
            if isinstance(value, torch.Tensor):
                seen[f"epoch {variables['ppo_epoch_idx']} {name}"] = value.detach().clone().contiguous()

    trainer.accelerator.backward = backward
    trainer.train()
    save_file(seen, folder / "trl.safetensors")


# In this process


@pytest.fixture(scope="module")
def trl_with_ppo(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("ppo_vs_trl", ROOT / "benchmarks" / "ppo_vs_trl.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    try:
        return benchmark.trl_with_ppo(tmp_path_factory.mktemp("trl"))
    except SystemExit as error:
        pytest.skip(str(error))


def write_models(folder, stop_logit):
    """A base, a policy that has left it, a reward model on the base and a critic on the policy's hidden states.

    Coordinate 0 of the residual stream is a constant, so that the head can make the pad token impossible and the stop
    token likely or impossible.
    """
    words = {"<pad>": PAD, "</s>": STOP, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="</s>", padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    ).save_pretrained(folder / "base")  # fmt: skip
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=PAD, eos_token_id=STOP, bos_token_id=STOP,
        num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    base, reward, critic = LlamaForCausalLM(config), *(LlamaForSequenceClassification(config) for _ in range(2))
    base.model.embed_tokens.weight.data[:, 0] = 1.0
    for layer in base.model.layers:
        layer.self_attn.o_proj.weight.data[0] = layer.mlp.down_proj.weight.data[0] = 0.0
    base.lm_head.weight.data[:, 0] = 0.0
    base.lm_head.weight.data[PAD, 0], base.lm_head.weight.data[STOP, 0] = -30.0, stop_logit
    base.save_pretrained(folder / "base")
    reward.model.load_state_dict(base.model.state_dict())
    reward.save_pretrained(folder / "reward")
    targets = ["q_proj", "v_proj", "up_proj"]
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=targets))
    policy.save_pretrained(folder / "reference")  # as it is made, it changes nothing, like an adapter that is off
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.save_pretrained(folder / "policy")
    critic.model.load_state_dict(policy.merge_and_unload().model.state_dict())
    critic.save_pretrained(folder / "critic")


@pytest.fixture(scope="module")
def compare(trl_with_ppo, tmp_path_factory):
    """What TRL computed and what we did, by name."""

    def run(stop_logit, pad_is_stop):
        folder = tmp_path_factory.mktemp("models")
        write_models(folder, stop_logit)
        path = os.pathsep.join([str(trl_with_ppo), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [sys.executable, __file__, str(folder), *(["pad is stop"] if pad_is_stop else [])]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen = load_file(folder / "trl.safetensors")
        theirs = {name.removeprefix("epoch 0 "): tensor for name, tensor in seen.items() if "epoch 0 " in name}
        theirs["later_policy_loss"] = seen["epoch 1 pg_loss"]
        return theirs, run_ours(folder, theirs)

    return run


@pytest.fixture(scope="module")
def cut_off(compare):
    """No reply stops by itself."""
    return compare(stop_logit=-30.0, pad_is_stop=False)


@pytest.fixture(scope="module")
def stopped(compare):
    """Some replies stop early, and the pad token is not the stop token."""
    return compare(stop_logit=0.8, pad_is_stop=False)


@pytest.fixture(scope="module")
def stopped_by_pad(compare):
    """Some replies stop early, and the pad token is the stop token, as in many tokenizers."""
    return compare(stop_logit=0.8, pad_is_stop=True)


def run_ours(folder, theirs):
    """One rollout with TRL's replies and one update; rows and columns in TRL's order."""
    from trl import ModelConfig

    import rlhf.ppo_trainer
    from rlhf.lora import lora_config, with_adapter
    from rlhf.model import add_score_head, load_base, load_tokenizer
    from rlhf.ppo_trainer import PPOConfig, PPOTrainer

    tokenizer = load_tokenizer(str(folder / "base"))
    model_args = ModelConfig(model_name_or_path=str(folder / "base"), lora_r=4)
    base = load_base(model_args, tokenizer)
    add_score_head(base)
    reward = lora_config(model_args, base, reward=True)
    model = with_adapter(base, folder / "policy", "default", trainable=True)
    model = with_adapter(model, folder / "reference", "reference")
    model.add_adapter("reward", reward)
    head = load_file(folder / "reward" / "model.safetensors")["score.weight"]
    base.score.modules_to_save["reward"].weight.data.copy_(head)
    trainer = PPOTrainer(
        model=model,
        args=PPOConfig(output_dir=str(folder / "ours"), max_grad_norm=1e9, **SETTINGS),
        reward_adapter="reward",
        train_dataset=Dataset.from_list([{"prompt_ids": ids, "row": "{}"} for ids in prompts()]),
        processing_class=tokenizer,
    )
    base.value_head.weight.data.copy_(load_file(folder / "critic" / "model.safetensors")["score.weight"])

    context = theirs["queries"].shape[1]
    replies = {}
    for query, reply in zip(theirs["queries"], theirs["responses"], strict=True):
        prompt = [id for id in query.tolist() if id not in (PAD, STOP)]
        replies[tuple(prompt)] = reply

    def generate(input_ids, attention_mask, **kwargs):
        rows = [replies[tuple(ids[keep.bool()].tolist())] for ids, keep in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, torch.stack(rows)], dim=1)

    seen = {}

    def spy(name, keep):
        function = getattr(rlhf.ppo_trainer, name)

        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.update(keep(args, result))
            return result

        return wrapper

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    seen.setdefault(f"gradient.{name}", parameter.grad.clone())

    trainer.add_callback(Gradients())
    rollout = trainer.rollout

    def ordered(rows, *args, **kwargs):
        order = [list(replies).index(tuple(row["prompt_ids"])) for row in rows]
        seen["order"] = torch.tensor(order).argsort()
        return rollout(rows, *args, **kwargs)

    trainer.rollout = ordered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", generate)
        for name, keep in {
            "kl_penalised_rewards": lambda args, rewards: {
                "scores": args[0], "logprobs": args[1], "ref_logprobs": args[2], "mask": args[3], "rewards": rewards,
            },
            "advantages_and_returns": lambda args, result: {"values": args[1], "raw": result[0], "returns": result[1]},
            "masked_whiten": lambda args, advantages: {"advantages": advantages},
            "policy_loss": lambda args, loss: {
                "later_policy_loss" if "policy_loss" in seen else "policy_loss": loss.detach()
            },
            "value_loss": lambda args, loss: {} if "value_loss" in seen else {"value_loss": loss.detach()},
        }.items():  # fmt: skip
            patch.setattr(rlhf.ppo_trainer, name, spy(name, keep))
        trainer.train()
    order = seen.pop("order")
    found = {}
    for name, tensor in seen.items():
        if name.startswith("gradient.") or not tensor.ndim:
            found[name] = tensor
        else:
            found[name] = tensor[order] if tensor.ndim == 1 else tensor[order, context - 1 :]
    return found


# The comparison


def by_their_convention(theirs, keep):
    """Advantages, returns and value loss by our functions, with the score where TRL puts it.

    Behind the last token that it keeps, on padding, where there is a column left; and so one more token a reply has a
    value, a return and a part in the critic's loss.
    """
    last = keep.sum(1) - 1
    place = (last + 1).clamp(max=RESPONSE - 1)
    longer = torch.arange(RESPONSE) <= place[:, None]
    rewards = torch.where(keep, -SETTINGS["kl_coef"] * (theirs["logprobs"] - theirs["ref_logprobs"]), 0)
    rewards[torch.arange(EPISODES), place] += theirs["scores"]
    values = torch.where(longer, theirs["values"], 0)
    raw, returns = advantages_and_returns(rewards, values, longer, SETTINGS["gamma"], SETTINGS["lam"])
    return masked_whiten(raw, keep), returns, value_loss(values, values, returns, longer, 0.2)


def test_without_padding_everything_agrees(cut_off):
    theirs, ours = cut_off
    assert ours["mask"].all() and not theirs["padding_mask"].any()
    for name in ("scores", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert theirs[name].abs().max() > 0.5, name
        assert_close(ours[name], theirs[name], **CLOSE, msg=name)
    assert_close(ours["logprobs"] - ours["ref_logprobs"], theirs["kl"], **CLOSE)
    assert_close(ours["value_loss"], theirs["vf_loss"], **CLOSE)
    assert_close(ours["policy_loss"], theirs["pg_loss"], **CLOSE)  # 0 on both sides: ratios of 1, whitened advantages
    names = [name for name in theirs if name.startswith("gradient.")]
    assert len(names) == 12  # A and B of three layers of two blocks
    for name in names:
        assert_close(ours[name], theirs[name], **CLOSE, msg=name)
    assert max(theirs[name].abs().max() for name in names) > 0.1
    # and once more after the step that these gradients made
    assert theirs["later_policy_loss"].abs() > 1e-2
    assert_close(ours["later_policy_loss"], theirs["later_policy_loss"], **CLOSE)


@pytest.mark.parametrize("case", ["stopped", "stopped_by_pad"])
def test_log_probabilities_values_and_kl_agree_wherever_both_look(case, request):
    theirs, ours = request.getfixturevalue(case)
    keep = ours["mask"].bool() & ~theirs["padding_mask"]
    for name in ("logprobs", "ref_logprobs", "values"):
        assert_close(ours[name][keep], theirs[name][keep], **CLOSE, msg=name)
    assert_close((ours["logprobs"] - ours["ref_logprobs"])[keep], theirs["kl"][keep], **CLOSE)


def test_trl_puts_the_score_on_the_padding_behind_the_stop_token(stopped):
    """huggingface/trl#3750. With lambda below 1 the tokens of a reply get less of its score than GAE gives them."""
    theirs, ours = stopped
    keep = ~theirs["padding_mask"]
    assert torch.equal(ours["mask"].bool(), keep) and not keep.all()
    assert_close(ours["scores"], theirs["scores"], **CLOSE)
    early = keep.sum(1) < RESPONSE
    last = keep.sum(1) - 1
    moved = (theirs["rewards"] - ours["rewards"])[early]
    rows = torch.arange(int(early.sum()))
    assert_close(moved[rows, last[early]], -ours["scores"][early], **CLOSE)
    assert_close(moved[rows, last[early] + 1], ours["scores"][early], **CLOSE)
    assert_close(theirs["rewards"][~early], ours["rewards"][~early], **CLOSE)

    assert (theirs["advantages"] - ours["advantages"])[keep].abs().max() > 0.05
    assert (theirs["vf_loss"] - ours["value_loss"]).abs() > 1e-3
    advantages, returns, of_critic = by_their_convention(theirs, keep)
    assert_close(advantages, theirs["advantages"], **CLOSE)
    assert_close(returns[keep], theirs["returns"][keep], **CLOSE)
    assert_close(of_critic, theirs["vf_loss"], **CLOSE)


def test_trl_takes_the_stop_token_for_padding_where_they_are_one(stopped_by_pad):
    """It looks for the end of a reply by the pad token: the stop token is never trained, and the score is read before it."""
    theirs, ours = stopped_by_pad
    keep, early = ~theirs["padding_mask"], ours["mask"].sum(1) < RESPONSE
    assert early.any()
    assert torch.equal(keep.sum(1), ours["mask"].sum(1) - early.long())
    assert (theirs["scores"] - ours["scores"])[early].abs().min() > 1e-2
    assert_close(theirs["scores"][~early], ours["scores"][~early], **CLOSE)
    advantages, returns, of_critic = by_their_convention(theirs, keep)
    assert_close(advantages, theirs["advantages"], **CLOSE)
    assert_close(returns[keep], theirs["returns"][keep], **CLOSE)
    assert_close(of_critic, theirs["vf_loss"], **CLOSE)


if __name__ == "__main__":
    run_trl(Path(sys.argv[1]), pad_is_stop=len(sys.argv) > 2)
