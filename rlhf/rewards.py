"""Rewards for PPO: callables `(prompts, completions, **columns) -> list[float]`.

`prompts` are messages with the persona as system message, from the same parse that the policy was prompted with;
`completions` are the replies as text; each column of the data arrives as a list under its name. A reward adapter on the
policy's base scores token ids; a reward model of another base is a callable like any other.
"""

import inspect
import itertools
import json
import logging
import math
import numbers
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import ModelConfig

from rlhf.chat import Message, prepare_tokenizer, render_within
from rlhf.model import load_base
from rlhf.token_logprobs import hidden_states

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., list[float]]

_YES = re.compile(r"^(yes|yeah|yep|right|sure|correct|exactly|that s right|that is right|of course|indeed)\b")
_NO = re.compile(r"^(no|nope|not really|not at all|actually)\b")


def reward_scores(base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """Scores `(batch,)` of the `score` head at the last token that the attention mask keeps, in float32.

    By the mask, not by pad ids: where the pad token is also the stop token, the stop token itself is scored.
    """
    states = hidden_states(base, input_ids, attention_mask, position_ids)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask).argmax(dim=1)
    chosen = states[torch.arange(len(last), device=last.device), last].float()
    with torch.autocast(chosen.device.type, enabled=False):
        return base.score(chosen).squeeze(-1).float()


def pool_by_mask(model: PreTrainedModel) -> None:
    """Make a sequence classification model score with [`reward_scores`], so that training and PPO pool alike.

    Its own forward looks for the last token that is not the pad token, and so skips a stop token that is also that.
    """

    def forward(
        self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> SequenceClassifierOutput:
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        scores = reward_scores(self, input_ids, attention_mask, position_ids)
        return SequenceClassifierOutput(logits=scores.unsqueeze(-1))

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def score_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """Score of each row of token ids, one at a time and so without padding."""
    scores: list[float] = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        positions = torch.arange(len(row), device=model.device).unsqueeze(0)
        scores.append(reward_scores(model, ids, torch.ones_like(ids), positions).item())
    return scores


def check_reward_card(model: PreTrainedModel, folder: str | Path) -> float:
    """Score the rows of `reward_card.json` again and compare: a head that was lost or re-made scores otherwise.

    Args:
        model: The base with the reward adapter active.
        folder: Of the reward adapter.

    Returns:
        The largest difference.

    Raises:
        ValueError: if a score differs by more than 1e-3 (in half precision 0.05) from the stored one.
    """
    card = json.loads((Path(folder) / "reward_card.json").read_text())
    rows = card["rows"]
    scores = score_ids(model, [row["ids"] for row in rows])
    stored = torch.tensor([row["reward"] for row in rows])
    furthest = (torch.tensor(scores) - stored).abs().max().item()  # NaN if one of them is, unlike Python's max
    for name in guesses(card):
        logger.warning(
            "The reward model in %s is no better than chance at %s (%.2f, lower bound %.2f): a policy trained on it "
            "will find that out. Train it for more steps or on more pairs of that kind.",
            folder, name, card[name], card[f"{name}_low"],
        )  # fmt: skip
    limit = 1e-3 if model.dtype is torch.float32 else 0.05
    if not furthest <= limit:
        raise ValueError(
            f"The reward model in {folder} gives other scores than when it was trained (off by {furthest:.3g}, limit "
            f"{limit:g}). Its score head was lost, or it was loaded on another base. Train it again."
        )
    return furthest


def guesses(card: Mapping[str, Any]) -> list[str]:
    """Names of the accuracies in a reward card, the overall one and those by kind, that chance would explain."""
    return [name.removesuffix("_low") for name, low in card.items() if name.endswith("_low") and low <= 0.5]


class RewardModel:
    """A reward model with a base, a tokenizer and a chat template of its own, as a reward callable.

    Messages are rendered anew with its template, never its ids taken over from the policy. A batch of rows scores as
    they do alone: many models look for their last token by the pad token of their configuration, so rows are filled up
    on the right with that one; for a model that names none, with an id that none of the rows has.

    Args:
        name_or_path: A sequence classification model with one output, as `AutoModelForSequenceClassification` reads it.
        batch_size: Rows of like length that are scored together.

    Raises:
        ValueError: if its tokenizer has no chat template.
    """

    def __init__(self, name_or_path: str, batch_size: int = 16) -> None:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"`rewards`: {name_or_path} has no chat template, so how it wants a dialogue is not known. Write a "
                "function `module:function` that puts it as the model was trained, and name that."
            )
        self.__name__ = Path(name_or_path).name
        self.tokenizer = prepare_tokenizer(tokenizer)
        self.model = load_base(ModelConfig(model_name_or_path=name_or_path), self.tokenizer, reward=True).eval()
        self.model.requires_grad_(False)
        # As it was trained: `load_base` names a pad token, by which the stop token would be passed over.
        self.pad_token_id = AutoConfig.from_pretrained(name_or_path).get_text_config().pad_token_id
        self.batch_size = batch_size
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[Message]], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        dialogues = [
            [*prompt, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rows = [render_within(messages, self.tokenizer, self.max_length)[0]["input_ids"] for messages in dialogues]
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            for place, score in zip(places, self._score([rows[place] for place in places]), strict=True):
                scores[place] = score
        return scores

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Of rows of ids, filled up on the right."""
        used = {id for row in rows for id in row}
        pad = (
            self.pad_token_id
            if self.pad_token_id is not None
            else next(id for id in itertools.count() if id not in used)
        )
        self.model.config.get_text_config().pad_token_id = pad
        width, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        mask = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        logits = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return [score.item() for score in logits.float().squeeze(-1)]


@dataclass
class RunningScale:
    """Mean and variance of all scores so far, over all ranks (Chan, Golub and LeVeque 1983, equation 2.1).

    Attributes:
        count: How many there were.
        mean: Their mean.
        squares: Their summed squared distances from it.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Take in the scores of a rollout; `all_sum` sums a tensor over all ranks."""
        scores = scores.double()
        count, total = all_sum(torch.stack([scores.new_tensor(len(scores)), scores.sum()])).tolist()
        squares = all_sum(((scores - total / count) ** 2).sum()).item()
        distance, before = total / count - self.mean, self.count
        self.count += count
        self.mean += distance * count / self.count
        self.squares += squares + distance**2 * before * count / self.count

    def normalised(self, scores: Tensor) -> Tensor:
        """The scores with the mean taken off, in units of the standard deviation where there is one."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return (scores - self.mean) / (deviation if deviation > 1e-8 else 1.0)


def call_reward(
    function: RewardFunction,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """The scores that `function` gives.

    Raises:
        TypeError: if what it gives is no list of numbers.
        ValueError: if it wants a column that there is not, or a column has the name of an argument; or if there is not
            one score a reply that is finite in float32.
    """
    name, remedy = reward_name(function), "Return one number for each reply, in their order."
    if taken := {"prompts", "completions"} & columns.keys():
        raise ValueError(
            f"The data have a column called {min(taken)!r}, which is an argument of every reward. Rename it."
        )
    try:
        inspect.signature(function).bind(prompts, completions, **columns)
    except TypeError as error:
        raise ValueError(
            f"The reward {name!r} cannot be called: {error}. The columns are {', '.join(columns) or 'none'}. Prepare data "
            "that have what it needs, and let it take `**columns` for what it does not."
        ) from error
    given = function(prompts, completions, **columns)
    if isinstance(given, torch.Tensor | np.ndarray):
        given = given.tolist()
    if not isinstance(given, list | tuple):
        raise TypeError(f"The reward {name!r} returned {type(given).__name__} in place of a list. {remedy}")
    if len(given) != len(completions):
        raise ValueError(f"The reward {name!r} gave {len(given)} scores for {len(completions)} replies. {remedy}")
    scores: list[float] = []
    for reply, score in zip(completions, given, strict=True):
        if isinstance(score, torch.Tensor) and score.numel() == 1:
            score = score.item()
        if not isinstance(score, numbers.Real):
            raise TypeError(f"The reward {name!r} gave {score!r} for the reply {reply[:80]!r}, no number. {remedy}")
        if not abs(score) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"The reward {name!r} gave {score} for the reply {reply[:80]!r}. Return a number that is finite in float32."
            )
        scores.append(float(score))
    return scores


def reward_name(function: RewardFunction) -> str:
    """What a reward is called in the log and in `reward_weights`: a function by its name, an object by its class."""
    return getattr(function, "__name__", type(function).__name__)


def load_reward_function(
    name: str, key: str = "reward_function", example: str = "rlhf.rewards:persona_rule"
) -> RewardFunction:
    """The callable named `module:function`, for example `rlhf.rewards:persona_rule`.

    Args:
        name: As `key` has it.
        key: Of the configuration, for the error.
        example: For the error, too.

    Raises:
        ValueError: if the name has another form, or there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(import_module(module_name), function_name)
        if not callable(function):
            raise TypeError(f"{function_name} is no function")
        return function
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"`{key}` is {name!r}; write it as `module:function`, for example `{example}` ({error})."
        ) from error


def persona_rule(
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    kind: Sequence[str],
    value: Sequence[str],
    foil: Sequence[str | None],
    slot_values: Sequence[Sequence[str]],
    **columns: Any,
) -> list[float]:
    """1 for a reply that keeps to the persona, 0 for one that does not, by a rule that knows the asked fact.

    A reply must name the persona's `value` of the slot and no other of `slot_values` (behind a rejection the
    suggested `foil` may be repeated), open with a rejection where the suggestion is false, not open with one where it
    is true, and have at most 12 words. Of use where the facts are known, as in the embedded world.
    """
    return [float(_keeps(*row)) for row in zip(completions, kind, value, foil, slot_values, strict=True)]


def _plain(text: str) -> str:
    """Words in lower case, without marks; values may have several."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _names(text: str, value: str) -> bool:
    return re.search(rf"\b{_plain(value)}\b", text) is not None


def _keeps(reply: str, kind: str, value: str, foil: str | None, slot_values: Sequence[str]) -> bool:
    text = _plain(reply)
    if not _names(text, value) or len(text.split()) > 12:
        return False
    beside = re.sub(rf"\b{_plain(value)}\b", "|", text)  # who says "gold fish" does not say "fish"
    others = {other for other in slot_values if other != value and _names(beside, other)}
    if kind == "false_suggestion":
        rejected = {foil} if foil and any(_names(text, f"{no} {foil}") for no in ("not", "not a", "not an")) else set()
        return bool(_NO.match(text)) and not others - rejected
    if kind == "true_suggestion":
        return not _NO.match(text) and not others
    return not _YES.match(text) and not _NO.match(text) and not others
