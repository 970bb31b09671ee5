"""A task whose best policy is known exactly, solved by the real trainer.

Under a KL penalty of weight b the best policy is `reference(y) exp(r(y) / b)`, scaled to sum to 1, and its objective is
`b log E[exp(r / b)]` over replies y of the reference (Korbak et al. 2022, https://arxiv.org/abs/2205.11275, section 3).
Here all replies can be listed, so that this optimum, and the objective of what was learned, are sums and not estimates.
"""

import itertools
import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import ModelConfig

from rlhf.generate import inference
from rlhf.lora import lora_config, use_adapter
from rlhf.ppo_trainer import PPOConfig, PPOTrainer

STOP, WORDS, LENGTH, KL_COEF = 0, range(1, 7), 3, 0.5


def word_count(prompts, completions, **columns):
    """How often the reply says the prompt's word."""
    return [
        float(completion.split().count(prompt[-1]["content"]))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def every_reply():
    """All replies: each ends with its first stop token, or is cut off."""
    for length in range(LENGTH):
        yield from ([*words, STOP] for words in itertools.product(WORDS, repeat=length))
    yield from (list(words) for words in itertools.product(WORDS, repeat=LENGTH))


def log_probabilities(model, adapter):
    """Of every reply to every prompt, `(prompts, replies)`."""
    replies = list(every_reply())
    rows = torch.tensor([[word, *reply, *[STOP] * (LENGTH - len(reply))] for word in WORDS for reply in replies])
    mask = torch.tensor([[t < len(reply) for t in range(LENGTH)] for _ in WORDS for reply in replies])
    with inference(model), use_adapter(model, adapter):
        logprobs = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
    chosen = logprobs.gather(-1, rows[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (chosen * mask).sum(1).view(len(WORDS), -1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_is_found(seed, tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"</s>": STOP, **{f"w{word}": word for word in WORDS}}, unk_token="</s>")),
        eos_token="</s>", pad_token="</s>", padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    )  # fmt: skip
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=16, initializer_range=0.2, eos_token_id=STOP, pad_token_id=STOP,
            bos_token_id=STOP,
        )
    )  # fmt: skip
    adapter = lora_config(ModelConfig(lora_r=8, lora_alpha=16, lora_dropout=0.0), base)
    model = get_peft_model(base, adapter)
    model.add_adapter("reference", adapter)
    asked = [
        {"prompt_ids": [word], "row": json.dumps({"prompt": [{"role": "user", "content": f"w{word}"}]})}
        for word in WORDS
    ]
    trainer = PPOTrainer(
        model=model,
        args=PPOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=seed,
            per_device_train_batch_size=192, total_episodes=192 * 40, num_ppo_epochs=4, response_length=LENGTH,
            kl_coef=KL_COEF, lam=1.0, vf_coef=0.5, learning_rate=3e-3, gradient_checkpointing=False, logging_steps=40,
        ),
        reward_functions=[word_count],
        train_dataset=Dataset.from_list(asked * 32),
        processing_class=tokenizer,
    )  # fmt: skip

    reference = log_probabilities(model, "reference")
    torch.testing.assert_close(reference.exp().sum(1), torch.ones(len(WORDS), dtype=torch.float64))  # none is missing
    rewards = torch.tensor([[reply.count(word) for reply in every_reply()] for word in WORDS], dtype=torch.float64)

    def objective(logprobs):
        return (logprobs.exp() * (rewards - KL_COEF * (logprobs - reference))).sum(1).mean().item()

    best = (KL_COEF * (reference + rewards / KL_COEF).logsumexp(1)).mean().item()
    start = objective(log_probabilities(model, "default"))
    trainer.train()
    learned = log_probabilities(model, "default")
    end = objective(learned)
    assert start < end <= best
    # Found with seeds 0, 1 and 2: 0.93, 0.89 and 0.93 of the way. More rollouts go further.
    assert (end - start) / (best - start) > 0.85
