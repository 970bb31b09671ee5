"""Trains a small base model from scratch: on the persona world (`rlhf.data.world`), or on the dialogues of a prepare stage.

    python rlhf/pretrain.py --config recipes/demo/base.yaml
    python rlhf/pretrain.py --config recipes/from-scratch/base.yaml

One thread and a schedule in steps make the result bit-reproducible on one kind of CPU, also across a resume.
"""

import hashlib
import io
import json
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.config import PriceConfig
from rlhf.data import world
from rlhf.data.columns import load_rows, sft_columns
from rlhf.files import folder_hash, write_bytes, write_jsonl
from rlhf.persona import with_persona
from rlhf.record import RunError, launch, stage
from rlhf.session import Pace, SessionEnded, now

logger = logging.getLogger(__name__)

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
# The space before the content belongs to the content: `<|assistant|>` alone is the generation prompt, and every word
# of a turn has its leading space. `trim` keeps a reply that was decoded with that space from getting a second one.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ ' ' + message['content'] | trim + '<|end|>' }}{% endgeneration %}"
    "{%- else -%}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | trim + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
POOL = 16  # batches drawn and sorted by length together, so that a batch holds dialogues of about one length
POSITIONS = 512
Encoded = tuple[list[int], list[bool]]  # token ids of a dialogue, and on which of them the loss is taken


@dataclass
class PretrainConfig:
    """Model and schedule of the base stage.

    Attributes:
        output_dir: folder of the stage: model, tokenizer, metrics.jsonl.
        dataset: folder of a prepare stage, whose training dialogues are gone through in random order, again and again,
            while the held-out ones are for eval_loss alone; None for the persona world.
        vocab_size: entries of the tokenizer at most. The world needs fewer: merging ends when each word is one token.
        seed: of the initial weights and of the corpus.
        num_steps: optimizer steps.
        short_steps: the first of them are taken on checklists and dialogues of one exchange. World only.
        batch_size: dialogues a step; three times as many while they are short.
        learning_rate: peak; linear warm-up, then cosine to zero.
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's, on matrices alone.
        max_grad_norm: gradients are clipped to this norm.
        hidden_size: width of the model.
        intermediate_size: width of its MLPs.
        num_hidden_layers: its depth.
        num_attention_heads: heads a layer.
        initializer_range: standard deviation of the initial weights; with the usual 0.02 look-up comes much later.
        matching_heads: heads in each of the first two layers that begin with equal query and key projections.
        load_best_model_at_end: the weights with the lowest eval_loss are saved, instead of the last ones.
        max_eval_rows: held-out dialogues that eval_loss is taken on.
        eval_steps: a row of metrics.jsonl every so many steps.
        save_steps: a checkpoint to resume from every so many steps.
        num_threads: of torch; only equal numbers give equal bits.
        log_level: of the console and of `training.log`.
    """

    output_dir: str
    dataset: str | None = None
    vocab_size: int = field(default=8192, metadata={"range": "[262, inf)"})
    seed: int = field(default=0, metadata={"range": "[0, inf)"})
    num_steps: int = field(default=7000, metadata={"range": "[1, inf)"})
    short_steps: int = field(default=1000, metadata={"range": "[0, inf)"})
    batch_size: int = field(default=8, metadata={"range": "[1, inf)"})
    learning_rate: float = field(default=2e-3, metadata={"range": "(0, inf)"})
    warmup_steps: int = field(default=200, metadata={"range": "[0, inf)"})
    weight_decay: float = field(default=0.01, metadata={"range": "[0, inf)"})
    max_grad_norm: float = field(default=1.0, metadata={"range": "(0, inf)"})
    hidden_size: int = field(default=128, metadata={"range": "[2, inf)"})
    intermediate_size: int = field(default=256, metadata={"range": "[1, inf)"})
    num_hidden_layers: int = field(default=4, metadata={"range": "[2, inf)"})
    num_attention_heads: int = field(default=4, metadata={"range": "[1, inf)"})
    initializer_range: float = field(default=0.08, metadata={"range": "(0, inf)"})
    matching_heads: int = field(default=2, metadata={"range": "[0, inf)"})
    load_best_model_at_end: bool = False
    max_eval_rows: int = field(default=256, metadata={"range": "[1, inf)"})
    eval_steps: int = field(default=100, metadata={"range": "[1, inf)"})
    save_steps: int = field(default=250, metadata={"range": "[1, inf)"})
    num_threads: int = field(default=1, metadata={"range": "[1, inf)"})
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of twice `num_attention_heads` ({self.num_attention_heads}), "
                f"got {self.hidden_size}"
            )
        if self.matching_heads > self.num_attention_heads:
            raise ValueError(
                f"`matching_heads` must be at most `num_attention_heads` ({self.num_attention_heads}), "
                f"got {self.matching_heads}"
            )
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"`warmup_steps` must be less than `num_steps` ({self.num_steps}), got {self.warmup_steps}"
            )
        if self.dataset and self.short_steps:
            raise ValueError(f"`short_steps` must be 0 with a `dataset`: it is the world's, got {self.short_steps}")


def world_texts() -> list[str]:
    """The words of the world, each once. Facts are joined by newlines, so that their first words have no space too."""
    opening = sorted({fact.split()[0] for slot in world.SLOTS for fact in slot.facts})
    return [*(f" {word}" for word in world.words()), *opening]


def dialogue_texts(dataset: str) -> list[str]:
    """The turns of the training dialogues of a prepare stage, personas first, as the chat template writes them."""
    rows = load_rows(Path(dataset) / "dialogues_train.jsonl")
    return [f" {message['content'].strip()}" for row in rows for message in with_persona(row)]


def build_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; by default each word of the world, with its leading space, is one token.

    Any text can be encoded and decoded unchanged, since all 256 bytes are in the alphabet. No BOS is added.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    specials = [PAD, *(f"<|{role}|>" for role in ROLES), END]
    bpe.train_from_iterator(
        world_texts() if texts is None else texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            show_progress=False,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=specials[1:-1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings and fresh weights, its vocabulary padded to a multiple of 64."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64 * math.ceil(len(tokenizer) / 64),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            initializer_range=config.initializer_range,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Such heads look for the same word from the start; comparing a suggestion with the persona is learned sooner.
    rows = config.matching_heads * config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.self_attn.k_proj.weight[:rows] = layer.self_attn.q_proj.weight[:rows]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=32
    )
    return model


def encode(rows: list[world.Row], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Token ids of dialogues, and which of them the loss is taken on: those of trained turns with their `<|end|>`.

    A user's or system's turn that is trained on is so with the token that opens it: who speaks is predicted, too.
    """
    messages = [[{"role": "system", "content": "\n".join(row["persona"])}, *row["messages"]] for row in rows]
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    openings = set(tokenizer.convert_tokens_to_ids([f"<|{role}|>" for role in ROLES]))
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    encoded = []
    for turns, ids in zip(messages, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        trained = iter([turn.get("train", turn["role"] == "assistant") for turn in turns])
        mask: list[bool] = []
        for token in ids:
            if token in openings:
                current = next(trained)
                if isinstance(current, list):
                    current = set(tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in current]))
                mask.append(current is True and token != assistant)
            else:
                mask.append(token in current if isinstance(current, set) else current)
        encoded.append((ids, mask))
    return encoded


def collate(encoded: list[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids [batch, length] and loss mask [batch, length]; causal attention never looks at the padding."""
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded])
    mask = torch.tensor([mask + [False] * (length - len(mask)) for _, mask in encoded])
    return ids, mask


def dialogues(dataset: str, side: str, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """The dialogues of one side of a prepare stage; the loss is on what SFT takes it on, the replies of the character.

    The user's turns are not learned: in a file that knows one persona of a dialogue, held-out people may speak them.
    """
    rows = load_rows(Path(dataset) / f"dialogues_{side}.jsonl")
    columns = sft_columns(rows, tokenizer, POSITIONS)
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in columns]


def drawn(corpus: list[Encoded], first: int, size: int, seed: int) -> list[Encoded]:
    """The dialogues from number `first` on of an endless sequence: the corpus again and again, each time shuffled."""
    chosen = []
    for epoch in range(first // len(corpus), (first + size - 1) // len(corpus) + 1):
        order = random.Random(f"{seed}/epoch {epoch}").sample(corpus, len(corpus))
        begin = epoch * len(corpus)
        chosen += order[max(0, first - begin) : first + size - begin]
    return chosen


def batches(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the steps from ``start`` on. Each depends on its step alone, so that a resume goes on exactly."""
    pad = tokenizer.convert_tokens_to_ids(PAD)
    corpus = dialogues(config.dataset, "train", tokenizer) if config.dataset else None
    order: list[list[Encoded]] = []
    for step in range(start, config.num_steps):
        pool = step // POOL
        if not order or step % POOL == 0:
            short = pool * POOL < config.short_steps
            size = config.batch_size * (3 if short else 1)
            if corpus is None:
                shape = (1, 0.5) if short else (8, 0.1)  # exchanges at most, share of checklists
                # Dialogue numbers are never used twice: pools are spaced by the larger size.
                first = pool * POOL * config.batch_size * 3
                rows = [world.base_dialogue(config.seed, first + i, *shape) for i in range(POOL * size)]
                encoded = encode(rows, tokenizer)
            else:
                encoded = drawn(corpus, pool * POOL * size, POOL * size, config.seed)
            encoded = sorted(encoded, key=lambda item: len(item[0]))
            order = [encoded[i * size : (i + 1) * size] for i in range(POOL)]
            random.Random(f"{config.seed}/{pool}").shuffle(order)
        yield collate(order[step % POOL], pad)


def tokenizer_of(config: PretrainConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the corpus that the configuration names."""
    texts = dialogue_texts(config.dataset) if config.dataset else world_texts()
    return build_tokenizer(texts, config.vocab_size)


def corpus_hash(config: PretrainConfig) -> str:
    """SHA-256 of all batches in the order of training, ids and loss mask: what the weights were made from."""
    digest = hashlib.sha256()
    for ids, mask in batches(config, tokenizer_of(config), 0):
        digest.update(ids.numpy().tobytes() + mask.numpy().tobytes())
    return digest.hexdigest()


def loss_of(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the masked tokens; logits are made for these alone."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    chosen = mask[:, 1:]
    return cross_entropy(model.lm_head(hidden[chosen]), ids[:, 1:][chosen])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over batches."""
    losses = [loss_of(model, ids, mask).item() for ids, mask in batches]
    return sum(losses) / len(losses)


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)))


def heldout_batches(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> list[tuple[Tensor, Tensor]]:
    """Dialogues of held-out characters, for the evaluation loss; those of the world are clean."""
    if config.dataset:
        encoded = dialogues(config.dataset, "heldout", tokenizer)
        encoded = random.Random("heldout").sample(encoded, min(config.max_eval_rows, len(encoded)))
    else:
        rows = world.dialogues(config.max_eval_rows, seed=0, held_out=True, flawed=False)
        encoded = encode(list(rows), tokenizer)
    encoded.sort(key=lambda item: len(item[0]))
    pad = tokenizer.convert_tokens_to_ids(PAD)
    return [collate(encoded[i : i + 64], pad) for i in range(0, len(encoded), 64)]


def train(config: PretrainConfig) -> dict[str, Any]:
    """Train, and save model, tokenizer and metrics.jsonl (rows of step, loss, eval_loss, seconds) in `output_dir`.

    A checkpoint in `output_dir` is continued to the bit: nothing is drawn during training but the corpus, which
    depends on the step alone. It is removed at the end.

    Returns:
        The row of metrics.jsonl of the weights that are saved: the last one, or the best.

    Raises:
        ValueError: if the checkpoint was made with another configuration.
        RuntimeError: if a gradient is not finite.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        return _train(config)
    finally:
        torch.set_num_threads(threads)


def _train(config: PretrainConfig) -> dict[str, Any]:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"

    tokenizer = tokenizer_of(config)
    model = build_model(config, tokenizer)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    what = {key: value for key, value in asdict(config).items() if key not in ("output_dir", "log_level")}
    if config.dataset:
        what["dataset"] = folder_hash(config.dataset)  # wherever it lies
    first, seconds, total, rows = 0, 0.0, 0.0, []
    best: dict[str, Any] = {"eval_loss": math.inf}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["config"] != what:
            changed = ", ".join(f"`{key}`" for key in what if state["config"].get(key) != what[key])
            raise ValueError(f"{checkpoint} was made with other values of {changed}. Remove it, or set them back.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first, seconds, total, rows = state["step"], state["seconds"], state["total"], state["metrics"]
        best = state["best"]
        logger.info("continuing from step %d", first)

    heldout = heldout_batches(config, tokenizer)
    began = time.perf_counter() - seconds
    pace = Pace()
    for step, (ids, mask) in enumerate(batches(config, tokenizer, first), start=first + 1):
        loss = loss_of(model, ids, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % config.eval_steps == 0 or step == config.num_steps:
            since = step - (rows[-1]["step"] if rows else 0)
            passed = round(time.perf_counter() - began, 1)
            rows.append(
                {"step": step, "loss": total / since, "eval_loss": evaluate(model, heldout), "seconds": passed}
            )
            total = 0.0
            logger.info("%s", rows[-1])
            write_jsonl(folder / "metrics.jsonl", rows)
            if config.load_best_model_at_end and rows[-1]["eval_loss"] < best["eval_loss"]:
                best = {**rows[-1], "model": {name: value.clone() for name, value in model.state_dict().items()}}
        over = pace.over()
        if (step % config.save_steps == 0 or over) and step < config.num_steps:
            saving = now()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": step,
                "seconds": time.perf_counter() - began,
                "total": total,
                "metrics": rows,
                "best": best,
                "config": what,
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_bytes(checkpoint, buffer.getvalue())
            pace.save_seconds = now() - saving
            if over:
                raise SessionEnded(f"the session ends; it stopped at step {step} of {config.num_steps}, which is kept")
    if config.load_best_model_at_end:
        model.load_state_dict(best.pop("model"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return best if config.load_best_model_at_end else rows[-1]


@dataclass
class BaseConfig(PretrainConfig, PriceConfig):
    """The base stage: by default the model that is shipped, checked against its record; trained again on request."""

    retrain: bool = field(default=False, metadata={"help": "Train it again, instead of using the shipped one."})
    shipped: str | None = field(default=None, metadata={"help": "Folder of the shipped model.", "path": True})


def main(config: BaseConfig) -> None:
    """Run the stage inside its folder, with a record.

    Raises:
        RunError: if there is no shipped model, or it is not the one that its record names.
    """
    parents = {"prepare": config.dataset} if config.dataset else {}
    with stage("base", config.output_dir, [config], config.seed, config.log_level, parents) as record:
        if config.retrain:
            asked = PretrainConfig(**{f.name: getattr(config, f.name) for f in fields(PretrainConfig)})
            record["corpus_hash"] = corpus_hash(asked)
            record.update(train(asked))
            record["result_hash"] = folder_hash(config.output_dir)
            return
        if config.shipped is None or not (Path(config.shipped) / "record.json").is_file():
            raise RunError(f"`shipped` is {config.shipped!r}, which holds no model with a record.json. Set `retrain`.")
        known = json.loads((Path(config.shipped) / "record.json").read_text())
        if folder_hash(config.shipped) != known["result_hash"]:
            raise RunError(
                f"The weights in {config.shipped} are not those of its record.json. Restore them, or retrain."
            )
        logger.info("the shipped model is used: trained for %d steps in %.0f s", known["steps"], known["seconds"])
        record["shipped"] = known


if __name__ == "__main__":
    launch(main, (BaseConfig,), "base")
