"""Preference pairs from the SFT model's own replies: sample several to each prompt, judge them, keep the best and worst.

    python rlhf/pairs.py --config recipes/demo/pairs.yaml [--key value ...]

One process. The prompts are those of the stage `prepare`; the replies are scored by a reward function or a reward adapter,
or compared by a person, who fills the files review_{train,heldout}.jsonl between two calls of the same command. It writes
preferences_{train,heldout}.jsonl, which the stage `dpo` reads where its `dataset` names this folder, and rejected.jsonl
with what gave no pair, and why. Beside them stands replies_{train,heldout}.jsonl: all replies, with their
scores. Another judge finds them there and samples nothing anew; a stage that was killed goes on where it was.
"""

import inspect
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.config import PriceConfig
from rlhf.data.audit import check_audit
from rlhf.data.columns import load_rows, prompt_columns
from rlhf.data.preferences import import_review, review_rows
from rlhf.data.sampled import balance_lengths, best_and_worst, nearest_in_length
from rlhf.data.sources import DataError
from rlhf.files import folder_hash, read_jsonl, write_json, write_jsonl
from rlhf.generate import generate_several, inference, left_pad, prompt_limit
from rlhf.lora import use_adapter, with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.persona import with_persona
from rlhf.record import RunError, launch, stage
from rlhf.rewards import RewardFunction, check_reward_card, load_reward_function, reward_scores
from rlhf.session import Pace, SessionEnded

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Judge = Callable[[Sequence[Row]], list[float]]

SIDES = ("train", "heldout")
PERSON = "person"
PART = 512  # prompts: what a stage that is killed loses at most


@dataclass
class PairsConfig(PriceConfig):
    """What is sampled, and who judges it.

    Attributes:
        output_dir: folder of the stage.
        dataset: folder of the stage prepare, whose prompts are replied to.
        sft_adapter: folder of the SFT stage, which replies.
        judge: a reward function as `module:function`, the folder of a reward stage, or "person".
        seed: of the sampling and of every draw.
        train_prompts: prompts that training pairs are made from; at most one pair each.
        heldout_prompts: prompts that held-out pairs are made from.
        num_generations: replies to each prompt.
        temperature: of the sampling.
        max_new_tokens: longest reply; one that is cut off gives no pair.
        max_length: longest prompt; older turns are dropped.
        min_margin: least difference between the scores of the two replies of a pair.
        batch_size: replies decoded and scored together.
        force_audit: go on with pairs that can be told apart without the persona.
        log_level: of the console and of `training.log`.
    """

    output_dir: str
    dataset: str = field(metadata={"path": True})
    sft_adapter: str = field(metadata={"path": True})
    judge: str  # no `path` in its metadata: a path in a recipe begins with ./ or runs/, and the other forms stay
    seed: int = field(default=42, metadata={"range": "[0, 4294967295]"})
    train_prompts: int = field(default=2000, metadata={"range": "[1, inf)"})
    heldout_prompts: int = field(default=300, metadata={"range": "[1, inf)"})
    num_generations: int = field(default=4, metadata={"range": "[2, inf)"})
    temperature: float = field(default=1.0, metadata={"range": "(0, inf)"})
    max_new_tokens: int = field(default=64, metadata={"range": "[1, inf)"})
    max_length: int = field(default=1024, metadata={"range": "[1, inf)"})
    min_margin: float = field(default=1.0, metadata={"range": "(0, inf)"})
    batch_size: int = field(default=64, metadata={"range": "[1, inf)"})
    force_audit: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if ":" in self.judge:
            load_reward_function(self.judge, "judge")  # now, not after the stages before this one were trained

    @property
    def reward_adapter(self) -> str | None:
        """The judge where it is a folder."""
        return None if self.judge == PERSON or ":" in self.judge else self.judge


def main(config: PairsConfig, model_args: ModelConfig) -> None:
    """Sample, judge and match; everything it makes lies in `output_dir`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("This stage is one process. Start it with python, or with `--num_processes 1`.")
    function = load_reward_function(config.judge, "judge") if ":" in config.judge else None
    folders = {"prepare": config.dataset, "sft": config.sft_adapter, "reward": config.reward_adapter}
    with stage(
        "pairs",
        config.output_dir,
        (config, model_args),
        seed=config.seed,
        log_level=config.log_level,
        parents={name: path for name, path in folders.items() if path},
    ) as record:
        folder = Path(config.output_dir)
        for name in [f"preferences_{side}.jsonl" for side in SIDES] + ["rejected.jsonl"]:
            (folder / name).unlink(missing_ok=True)  # of an earlier judge

        # Replies
        prompts = {
            side: load_rows(Path(config.dataset) / f"prompts_{side}.jsonl", getattr(config, f"{side}_prompts"))
            for side in SIDES
        }
        _begin(folder, _sampling(config, model_args, record))
        rows = {side: _read(folder, side) for side in SIDES}
        missing = any(len(rows[side]) < len(prompts[side]) for side in SIDES)
        if missing or config.reward_adapter:
            tokenizer, model = _load(config, model_args)
        if missing:
            for side in SIDES:
                _sample(folder, side, prompts[side], rows[side], config, tokenizer, model)
        else:
            logger.info("The replies in %s are from these settings; nothing is sampled.", folder)

        # Judging
        left_out: dict[str, list[Row]] = {side: [] for side in SIDES}
        if config.judge == PERSON:
            pairs = _reviewed(folder, rows, config.seed, left_out)
        else:
            judge = _asking(function, config) if function else _scoring(config, tokenizer, model)
            for side in SIDES:
                _judge(rows[side], judge)
                write_jsonl(_replies_path(folder, side), rows[side])
            pairs = {side: best_and_worst(rows[side], config.min_margin, left_out[side]) for side in SIDES}

        # Pairs
        pairs = {side: balance_lengths(pairs[side], config.seed, left_out[side]) for side in SIDES}
        rejected = [{"file": f"replies_{side}.jsonl", **entry} for side in SIDES for entry in left_out[side]]
        write_jsonl(folder / "rejected.jsonl", rejected)
        record["rejected"] = dict(Counter(entry["reason"] for entry in rejected))
        record["rows"] = {side: len(pairs[side]) for side in SIDES}
        logger.info("pairs %s; left out %s", json.dumps(record["rows"]), json.dumps(record["rejected"]))
        for side in SIDES:
            if not pairs[side]:
                raise RunError(
                    f"No {side} pairs are left: {record['rejected']}. See {folder / 'rejected.jsonl'}. Where replies are "
                    "cut off, raise `max_new_tokens` or train SFT for longer; where scores differ too little, lower "
                    "`min_margin`."
                )
            write_jsonl(folder / f"preferences_{side}.jsonl", pairs[side])

        # Audit
        try:
            cheaters = check_audit(pairs["train"], config.seed, pairs["heldout"], force=config.force_audit)
        except DataError as error:
            raise RunError(str(error)) from error
        for cheater in cheaters:
            shares = [100 * share for share in (cheater.accuracy, cheater.low, cheater.high)]
            logger.info("audit %s %.1f%% [%.1f%%, %.1f%%] of %d", cheater.name, *shares, cheater.n)
        record["cheaters"] = {cheater.name: vars(cheater) for cheater in cheaters}
        record["result_hash"] = folder_hash(folder)


def _load(config: PairsConfig, model_args: ModelConfig) -> tuple[PreTrainedTokenizerBase, PeftModel]:
    """The base with the SFT adapter, and with the reward adapter where that is the judge."""
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    model = load_base(model_args, tokenizer)
    add_score_head(model)
    model = with_adapter(model, config.sft_adapter, "default")
    if config.reward_adapter:
        model = with_adapter(model, config.reward_adapter, "reward")
        with inference(model), use_adapter(model, "reward"):
            check_reward_card(model.get_base_model(), config.reward_adapter)
    return tokenizer, model


# -- replies ---------------------------------------------------------------------------------------------------------

_DECIDES = (
    "seed", "train_prompts", "heldout_prompts", "num_generations", "temperature", "max_new_tokens", "max_length"
)  # fmt: skip


def _sampling(config: PairsConfig, model_args: ModelConfig, record: Row) -> Row:
    """All that the replies depend on."""
    parents = {name: record["parents"][name]["hash"] for name in ("prepare", "sft")}
    loaded = {name: getattr(model_args, name) for name in ("dtype", "load_in_4bit", "model_revision")}
    base = record.get("base_hash") or model_args.model_name_or_path
    return {**{name: getattr(config, name) for name in _DECIDES}, **parents, **loaded, "base": base}


def _begin(folder: Path, sampling: Row) -> None:
    """Take away the replies of other settings, and write down those of this run.

    Raises:
        RunError: where a person's decisions on such replies lie in the folder.
    """
    path = folder / "sampling.json"
    if path.is_file() and json.loads(path.read_text()) == sampling:
        return
    if any((folder / f"review_{side}.jsonl").is_file() for side in SIDES):
        raise RunError(
            f"The review files in {folder} are about other replies than these settings give. Take the settings of "
            f"{path}, or another `output_dir`."
        )
    for side in SIDES:
        _replies_path(folder, side).unlink(missing_ok=True)
    write_json(path, sampling)


def _replies_path(folder: Path, side: str) -> Path:
    return folder / f"replies_{side}.jsonl"


def _read(folder: Path, side: str) -> list[Row]:
    path = _replies_path(folder, side)
    return read_jsonl(path) if path.is_file() else []


def _sample(
    folder: Path,
    side: str,
    prompts: Sequence[Row],
    rows: list[Row],
    config: PairsConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PeftModel,
) -> None:
    """Go on with `rows`, part by part, each written as soon as it is there."""
    pace = Pace()
    while len(rows) < len(prompts):
        if pace.over():
            raise SessionEnded(f"the session ends; {len(rows)} of {len(prompts)} {side} prompts have their replies")
        first = len(rows)
        part = prompts[first : first + PART]
        several = generate_several(
            model, tokenizer, [with_persona(row) for row in part], config.num_generations, config.max_new_tokens,
            config.temperature, config.seed, config.batch_size, config.max_length, first,
        )  # fmt: skip
        rows += [
            {**row, "replies": [reply.text for reply in replies], "finished": [reply.finished for reply in replies]}
            for row, replies in zip(part, several, strict=True)
        ]
        write_jsonl(_replies_path(folder, side), rows)
        logger.info("replied to %d of %d %s prompts", len(rows), len(prompts), side)


# -- judges ----------------------------------------------------------------------------------------------------------


def _judge(rows: Sequence[Row], judge: Judge) -> None:
    """Give each row the `scores` of its replies; those of unfit replies, blank ones say, are not used."""
    asked = [{**row, "reply": reply} for row in rows for reply in row["replies"]]
    scores = judge(asked)
    if len(scores) != len(asked) or not all(math.isfinite(score) for score in scores):
        raise RunError(f"`judge` must give a finite score for each of {len(asked)} replies, got {scores[:8]} …")
    left = iter(scores)
    for row in rows:
        row["scores"] = [float(next(left)) for _ in row["replies"]]


def _asking(function: RewardFunction, config: PairsConfig) -> Judge:
    """The reward function, with the columns that PPO would give it."""

    def judge(rows: Sequence[Row]) -> list[float]:
        own = ("prompt", "persona", "replies", "finished", "scores", "reply")
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key not in own}
        prompts, completions = [with_persona(row) for row in rows], [row["reply"] for row in rows]
        try:
            inspect.signature(function).bind(prompts, completions, **columns)
        except TypeError as error:
            raise RunError(
                f"`judge` {config.judge} does not fit the prompts in {config.dataset}, which have the columns "
                f"{', '.join(columns)}: {error}. Take a reward adapter, or a function that needs no more."
            ) from error
        return function(prompts, completions, **columns)

    return judge


def _scoring(config: PairsConfig, tokenizer: PreTrainedTokenizerBase, model: PeftModel) -> Judge:
    """The reward adapter, on prompt and reply rendered as in its training, those of like length together."""
    limit = prompt_limit(model, config.max_length, config.max_new_tokens)

    def judge(rows: Sequence[Row]) -> list[float]:
        columns = prompt_columns([{**row, "reference": row["reply"]} for row in rows], tokenizer, limit)
        ids = [row["prompt_ids"] + (row["reference_ids"] or []) for row in columns]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        scores = [0.0] * len(ids)
        with inference(model), use_adapter(model, "reward"):
            for start in range(0, len(ids), config.batch_size):
                batch = order[start : start + config.batch_size]
                input_ids, mask = left_pad([ids[i] for i in batch], tokenizer.pad_token_id, model.device)
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
                found = reward_scores(model.get_base_model(), input_ids, mask, positions)
                for place, score in zip(batch, found.tolist(), strict=True):
                    scores[place] = score
        return scores

    return judge


def _reviewed(
    folder: Path, rows: dict[str, list[Row]], seed: int, left_out: dict[str, list[Row]]
) -> dict[str, list[Row]]:
    """The pairs that a person decided; where nothing is decided yet, the files to fill are written.

    Raises:
        RunError: saying what to fill.
    """
    pairs, empty = {}, []
    for side in SIDES:
        path = folder / f"review_{side}.jsonl"
        given = review_rows(nearest_in_length(rows[side], left_out[side]), seed)
        if not path.is_file():
            write_jsonl(path, given)
        pairs[side] = import_review(path, given, left_out[side])
        if not pairs[side]:
            empty.append(str(path))
    if empty:
        raise RunError(
            f"A person has to judge: write a, b or undecided as `decision` in each line of {' and '.join(empty)}, then "
            "run the same command again. It goes on from there; the replies are not sampled anew."
        )
    return pairs


if __name__ == "__main__":
    launch(main, (PairsConfig, ModelConfig), "pairs")
