"""Tiny models with tokenizers trained here, in folders as `save_pretrained` writes them: no network, no weights."""

import gc
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
)

from rlhf import callbacks
from rlhf.config import parse
from rlhf.files import folder_hash, read_jsonl, write_json, write_jsonl
from rlhf.pipeline import config_classes

gc.freeze()  # each training begins with a collection, which would look through all of torch and transformers: 0.3 s

SENTENCES = (
    "i have a dog . i like pizza . i am a teacher . my favourite colour is blue .",
    "hello , how are you ? what pet do you have ? do you have a cat ? what do you do for work ?",
    "no , i have a dog . yes , i do . i have two dogs and a cat . i live in a city by the sea .",
)

# As TinyLlama has it: the end-of-sequence token closes every turn.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# As Qwen2.5 has it: a system message of its own where there is none, and a stop token that is not the tokenizer's `eos`.
CHATML_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# In the manner of Qwen3's: history without thinking, an empty block in a prompt and in the last reply.
QWEN3_TEMPLATE = (
    "{%- set asked = namespace(last=0) -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last and loop.index0 > asked.last -%}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
# In the manner of Llama 3.2's: a system message with today's date, text trimmed.
LLAMA3_TEMPLATE = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' }}"
    "{{ (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\n\n' }}"
    "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] | trim }}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set turns = messages -%}{%- endif -%}{{ '<|eot_id|>' }}"
    "{%- for message in turns -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
# In the manner of Gemma's: no system message, user and assistant in turn, another name for the assistant, text trimmed.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('user and assistant must take turns') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else 'user' -%}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}


def byte_level_tokenizer(special_tokens: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-2's and Qwen's: any text is encoded and decoded unchanged, and no BOS is added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **kwargs)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Pad token and stop token are one."""
    return byte_level_tokenizer(
        ["<unk>", "<s>", "</s>"],
        bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>", chat_template=ZEPHYR_TEMPLATE,
    )  # fmt: skip


def qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """The end-of-sequence token is not the one that closes a turn, as in Qwen2.5's base models."""
    return byte_level_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHATML_TEMPLATE,
    )  # fmt: skip


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Neither chat template nor pad token."""
    end = "<|endoftext|>"
    return byte_level_tokenizer([end], bos_token=end, eos_token=end, unk_token=end)


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """The thinking tags are tokens, and not special ones."""
    tokenizer = qwen2_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN3_TEMPLATE
    return tokenizer


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """No pad token; the end of a turn is neither the end of the text nor the tokenizer's own."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level_tokenizer(
        ["<|begin_of_text|>", "<|end_of_text|>", *headers],
        bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        additional_special_tokens=headers, chat_template=LLAMA3_TEMPLATE,
    )  # fmt: skip


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """The template takes no system message. Runs of newlines are tokens, and no control."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = byte_level_tokenizer(
        ["<pad>", "<eos>", "<bos>", *turns],
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=turns, chat_template=GEMMA_TEMPLATE,
    )  # fmt: skip
    tokenizer.add_tokens(["\n\n"])
    return tokenizer


def folding_tokenizer() -> PreTrainedTokenizerFast:
    """Lower case and NFKC: it reads "＜｜USER｜＞" as the tag of its template."""
    tokenizer = llama_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **ids}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = llama_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**_vocabulary(tokenizer), **SIZES, intermediate_size=64, num_key_value_heads=2)
    return _save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = qwen2_tokenizer()
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = Qwen2Config(**_vocabulary(tokenizer), **sizes)
    return _save(Qwen2ForCausalLM(config), tokenizer, tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = gpt2_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(**_vocabulary(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512)
    return _save(GPT2LMHeadModel(config), tokenizer, tmp_path_factory.mktemp("models") / "gpt2")


# Rows as the stage `prepare` writes them: characters with a pet and a food, who are asked about them.

PETS, FOODS = ("dog", "cat", "bird", "fish"), ("pizza", "rice", "soup")
KINDS = ("direct", "false_suggestion", "true_suggestion")


def _character(number: int) -> tuple[str, str, list[str]]:
    pet, food = PETS[number % 4], FOODS[number % 3]
    return pet, food, [f"i have a {pet} .", f"i like {food} ."]


def _question(number: int, kind: str) -> dict:
    """A question about the pet, with the columns that a rule needs to judge the reply."""
    pet, food, persona = _character(number)
    foil = PETS[(number + 1) % 4]
    asked = {"direct": "what pet do you have ?", "false_suggestion": f"do you have a {foil} ?",
             "true_suggestion": f"do you have a {pet} ?"}[kind]  # fmt: skip
    opening = {"direct": "", "false_suggestion": "no , ", "true_suggestion": "yes , "}[kind]
    return {
        "persona": persona,
        "prompt": [{"role": "user", "content": asked}],
        "reply": f"{opening}i have a {pet} .",
        "dialogue_id": f"d{number}",
        "kind": kind, "slot": "pet", "value": pet, "foil": foil if kind == "false_suggestion" else None,
        "slot_values": list(PETS), "persona_values": {"pet": pet, "food": food},
    }  # fmt: skip


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rows(numbers: range) -> dict[str, list[dict]]:
    dialogues, pairs, prompts, probes = [], [], [], []
    for number in numbers:
        row = _question(number, KINDS[number % 3])
        reply = row.pop("reply")
        food = row["persona_values"]["food"]
        more = [_said("user", "what do you like ?"), _said("assistant", f"i like {food} .")][: 2 * (number % 2)]
        messages = [*row["prompt"], _said("assistant", reply), *more]
        shared = {key: row[key] for key in ("persona", "dialogue_id")}
        dialogues.append({**shared, "messages": messages, "source": "world"})
        # Every third rejected reply is as long as the chosen one, the others are longer and shorter in turn.
        wrong = (reply.replace(row["value"], "cow"), "well , who can say what i have , not me .", "yes .")[
            number // 3 % 3
        ]
        pairs.append({**shared, "prompt": row["prompt"], "chosen": [_said("assistant", reply)],
                      "rejected": [_said("assistant", wrong)], "kind": row["kind"]})  # fmt: skip
        prompts.append({**row, "reference": reply})
        for kind in KINDS:
            asked = _question(number, kind)
            probe = {key: asked[key] for key in asked if key not in ("prompt", "reply", "dialogue_id")}
            probes.append({**probe, "probe_id": f"p{number}/{kind}", "persona_id": f"c{number}",
                           "fact_id": f"c{number}/pet", "history": [], "question": asked["prompt"][0]["content"],
                           "turn": 0, "split": "seen"})  # fmt: skip
    return {"dialogues": dialogues, "preferences": pairs, "prompts": prompts, "probes": probes}


def write_dataset(folder: Path, num_train: int = 24, num_heldout: int = 9) -> Path:
    """A finished `prepare` stage."""
    train, heldout = _rows(range(num_train)), _rows(range(100, 100 + num_heldout))
    for kind in ("dialogues", "preferences", "prompts"):
        write_jsonl(folder / f"{kind}_train.jsonl", train[kind])
        write_jsonl(folder / f"{kind}_heldout.jsonl", heldout[kind])
    write_jsonl(folder / "probes.jsonl", heldout["probes"])
    record = {"stage": "prepare", "status": "done", "parents": {}, "result_hash": folder_hash(folder)}
    write_json(folder / "metadata.json", record)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "prepare")


# Trainings of a few steps, in this process and as the scripts do them.


@dataclass
class Run:
    """A finished training: its folder, its trainer, and every parameter as it was before the first step."""

    folder: Path
    trainer: Trainer
    before: dict[str, torch.Tensor]

    def moved(self) -> set[str]:
        """Names of the parameters that are not bit-identical to what they were."""
        now = dict(self.trainer.model.named_parameters())
        assert now.keys() == self.before.keys()
        return {name for name, old in self.before.items() if not torch.equal(old, now[name])}

    def rows(self, name: str) -> list[dict]:
        return read_jsonl(self.folder / name)

    def metadata(self) -> dict:
        return json.loads((self.folder / "metadata.json").read_text())


COMMON = {
    "use_cpu": True, "seed": 3, "max_length": 256, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "max_steps": 6,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1, "eval_strategy": "steps",
    "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True, "report_to": "none",
    "sample_steps": 3, "num_samples": 2, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
PPO = {
    "max_steps": None, "total_episodes": 24, "num_ppo_epochs": 2, "eval_steps": 2, "response_length": 8, "kl_coef": 0.1,
    "metric_for_best_model": "eval_objective/scores",
}  # fmt: skip


def _train(stage: str, folder: Path, tamper: Callable[[Trainer], None] = lambda trainer: None, **values) -> Run:
    """Run a stage; `values` are its keys over `COMMON`, None leaves one out. `tamper` gets the trainer before step 0."""
    values = {**COMMON, **(PPO if stage == "ppo" else {}), "output_dir": folder, **values}
    argv = [f"--{key}={value}" for key, value in values.items() if value is not None]
    module = importlib.import_module(f"rlhf.{stage}")
    seen = {}

    def watch(trainer, *args):
        seen.update(trainer=trainer, before={k: p.detach().clone() for k, p in trainer.model.named_parameters()})
        callbacks.watch(trainer, *args)
        tamper(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "watch", watch)
        module.main(*parse(config_classes(stage), argv, stage))
    return Run(folder, **seen)


@pytest.fixture(scope="session")
def train() -> Callable[..., Run]:
    return _train


@pytest.fixture(scope="session")
def sft_run(tiny_llama: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    return _train("sft", folder, model_name_or_path=tiny_llama, dataset=dataset)


@pytest.fixture(scope="session")
def reward_run(tiny_llama: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "reward"
    return _train("reward", folder, model_name_or_path=tiny_llama, dataset=dataset)


@pytest.fixture(scope="session")
def dpo_run(tiny_llama: Path, dataset: Path, sft_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    return _train("dpo", folder, model_name_or_path=tiny_llama, dataset=dataset, sft_adapter=sft_run.folder)


@pytest.fixture(scope="session")
def ppo_run(
    tiny_llama: Path, dataset: Path, sft_run: Run, reward_run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    parents = {"dataset": dataset, "sft_adapter": sft_run.folder, "reward_adapter": reward_run.folder}
    return _train("ppo", folder, model_name_or_path=tiny_llama, **parents)


@pytest.fixture
def parents(request: pytest.FixtureRequest, tiny_llama: Path, dataset: Path) -> Callable[[str], dict]:
    """The keys of a stage that name its inputs."""

    def of(stage: str) -> dict:
        found = {"model_name_or_path": tiny_llama, "dataset": dataset}
        if stage in ("dpo", "ppo"):
            found["sft_adapter"] = request.getfixturevalue("sft_run").folder
        if stage == "ppo":
            found["reward_adapter"] = request.getfixturevalue("reward_run").folder
        return found

    return of


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DeepSpeed builds its operator; in the usual folder a build that was killed locks out all later ones."""
    return tmp_path_factory.mktemp("extensions")
