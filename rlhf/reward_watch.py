"""Does the policy get better, or only its reward? Held-out probes against the reward, and the name of the trick.

A probe is a callable `(model, tokenizer) -> {name: scores}` that asks the policy on data which no reward sees: one score
from 0 to 1 for each held-out persona, or whatever else is independent of the others, in the same order each time, higher
being better. The first name is the one that is watched. A recipe names what makes a probe, `probe: module:name`, which
is called once, before the training, as `name(dataset, max_length, max_new_tokens)`; a class will do:

    class Polite:
        def __init__(self, dataset, max_length, max_new_tokens):
            self.questions = [...]  # lists of messages
            self.max_new_tokens = max_new_tokens

        def __call__(self, model, tokenizer):
            replies = generate(model, tokenizer, self.questions, self.max_new_tokens)
            return {"polite": [float("please" in reply) for reply in replies]}

What an optimiser of a proxy does is known: the proxy rises on, while what it stands for rises, peaks and falls (Gao,
Schulman and Hilton 2022, https://arxiv.org/abs/2210.10760). The rule that looks for it is [`parted`].
"""

import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rlhf.chat import reply_text
from rlhf.facts import STOP_WORDS
from rlhf.facts import lemma as uncached_lemma
from rlhf.files import folder_hash, write_json
from rlhf.lora import save_adapter
from rlhf.persona import persona_and_dialogue
from rlhf.ppo_trainer import BEST_ADAPTER_FILE, PPOTrainer
from rlhf.record import read_record
from rlhf.rewards import load_reward_function

logger = logging.getLogger(__name__)
lemma = functools.lru_cache(maxsize=2**16)(uncached_lemma)

Probe = Callable[[Any, PreTrainedTokenizerBase], Mapping[str, Sequence[float]]]

BEST = "best"  # the folder of the adapter with the best held-out score, inside the stage's

Z_FALL = 3.0  # standard errors: the best of several probings is compared, which is the best by luck too
Z_RISE = 2.0  # standard errors; nothing is chosen here
SMALLEST_FALL = 0.05  # of the probes' score; a smaller one is nothing to stop for
PATIENCE = 2  # probings in a row
COPIED_RUN = 4  # words in a row that make a copy


@dataclass
class ProbeConfig:
    """What the policy is probed with while it is trained, and how often."""

    probe: str | None = field(default=None, metadata={"help": "`module:name` of what makes the held-out probes."})
    probe_steps: int = field(
        default=80, metadata={"help": "Optimiser steps between two probings.", "range": "[1, inf)"}
    )

    def __post_init__(self) -> None:
        if self.probe:
            load_probe(self.probe)  # now, not after the stages before this one were trained


def load_probe(name: str) -> Callable[..., Probe]:
    """What makes a probe, by its dotted path `module:name`; the module need not be one of ours.

    Raises:
        ValueError: if the name has another form, or there is nothing to call.
    """
    make: Callable[..., Any] = load_reward_function(name, "probe", "evaluation.probes:HeldOutProbes")
    return make


class Trick(NamedTuple):
    """A way to raise a reward without doing what it stands for, and how replies show it."""

    name: str
    statistic: str  # of `reply_statistics`, or objective/kl
    limit: float  # where `ratio`, the factor that the statistic changes by; else what is added to it
    ratio: bool
    remedy: str


# Three standard errors or more at two rollouts of 64 replies of six words. They are looked at after reward and probes
# have parted, so that a low limit raises no alarm.
TRICKS = (
    Trick("longer replies", "reply/words", 1.25, True, "cap them, or reward what they say for each of their words"),
    Trick("shorter replies", "reply/words", 0.8, True, "reward replies that answer, not replies that risk little"),
    Trick("repetition", "reply/repetition", 0.05, False, "take repeated words off the reward"),
    Trick("copying", "reply/copied", 0.15, False, "take words copied from the persona off the reward"),
    Trick("reciting", "reply/facts", 1.25, True, "count a fact only where it was asked for"),
    Trick("keyword overlap", "reply/persona_words", 1.15, True, "judge what is said of a fact, not its words"),
    Trick("collapse", "reply/same", 0.1, False, "raise `kl_coef` or lower `learning_rate`: replies no longer differ"),
)


def reply_statistics(personas: Sequence[Sequence[str]], replies: Sequence[str]) -> dict[str, float]:
    """What tricks show in: of a batch of replies, each to a persona of its own.

    Returns:
        `reply/words`: words a reply. `reply/repetition`: share of a reply's pairs of neighbouring words that stood in
        it before. `reply/copied`: share of its words in runs of four or more that a persona sentence has.
        `reply/facts`: share of the persona's sentences of which it names a word that says something.
        `reply/persona_words`: share of its words that are such words. `reply/same`: share of replies that are another
        one's double. But for the last, means over the replies; 0 where there is nothing to take a share of.
    """
    spoken = [_words(reply) for reply in replies]
    facts = [[_content(sentence) for sentence in persona] for persona in personas]
    rows = list(zip(spoken, personas, facts, strict=True))
    return {
        "reply/words": _mean([len(words) for words in spoken]),
        "reply/repetition": _mean([_repeated(words) for words in spoken]),
        "reply/copied": _mean([_copied(words, [_words(sentence) for sentence in persona]) for words, persona, _ in rows]),
        "reply/facts": _mean([_mean([not said.isdisjoint(map(lemma, words)) for said in about]) for words, _, about in rows]),
        "reply/persona_words": _mean(
            [_mean([lemma(word) in set().union(*about) for word in words]) for words, _, about in rows]
        ),
        "reply/same": 1 - len(set(map(tuple, spoken))) / len(spoken) if spoken else 0.0,
    }  # fmt: skip


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _content(sentence: str) -> set[str]:
    return {lemma(word) for word in _words(sentence) if word not in STOP_WORDS}


def _repeated(words: Sequence[str]) -> float:
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _copied(words: Sequence[str], sentences: Sequence[Sequence[str]]) -> float:
    runs = {tuple(s[i : i + COPIED_RUN]) for s in sentences for i in range(len(s) - COPIED_RUN + 1)}
    copied: set[int] = set()
    for start in range(len(words) - COPIED_RUN + 1):
        if tuple(words[start : start + COPIED_RUN]) in runs:
            copied.update(range(start, start + COPIED_RUN))
    return len(copied) / len(words) if words else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass
class Probing:
    """The probes' scores at a step, and what the rollouts since the probing before were like.

    At step 0 these are the first rollout alone, which the untrained policy made.
    """

    step: int
    scores: list[float]  # of the first name
    rewards: list[float] = field(default_factory=list)  # the mean score of each rollout
    replies: dict[str, float] = field(default_factory=dict)  # means of `reply_statistics` and objective/kl

    @property
    def score(self) -> float:
        return _mean(self.scores)


def best_of(probings: Sequence[Probing]) -> Probing:
    """The first of those with the highest score: the later one went further from the reference for nothing."""
    return max(probings, key=lambda probing: (probing.score, -probing.step))


def parted(probings: Sequence[Probing]) -> bool:
    """Whether the reward rises while the probes fall, at the last `PATIENCE` probings in a row.

    Each is compared with the best probing before it. The probes fell if their mean did by more than 0.05 and by more
    than 3 standard errors of the differences persona by persona: the personas are the same each time, so that what
    differs between them drops out. The reward rose if the mean over the rollouts did by more than 2 standard errors,
    where the scatter of one rollout is taken from the differences of neighbouring ones (von Neumann 1941), in which a
    trend hardly counts. A clean run's reward rises too, so that the probes alone keep it silent; and once is chance,
    or a step too large that the next one mends.
    """
    last = range(len(probings) - PATIENCE, len(probings))
    return last[0] > 0 and all(_parted(probings[: index + 1]) for index in last)


def _parted(probings: Sequence[Probing]) -> bool:
    now, best = probings[-1], best_of(probings[:-1])
    falls = [before - after for before, after in zip(best.scores, now.scores, strict=True)]
    margin = max(SMALLEST_FALL, Z_FALL * _standard_error(falls))
    rewards = [reward for probing in probings for reward in probing.rewards]
    steps = [(after - before) ** 2 for before, after in itertools.pairwise(rewards)]
    scatter = math.sqrt(_mean(steps) / 2)
    if not best.rewards or not now.rewards:
        return False
    noise = scatter * math.sqrt(1 / len(best.rewards) + 1 / len(now.rewards))
    return _mean(falls) > margin and _mean(now.rewards) - _mean(best.rewards) > Z_RISE * noise


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def tricks(before: Mapping[str, float], after: Mapping[str, float]) -> list[Trick]:
    """What replies have come to do, by their statistics; the one furthest beyond its limit first."""
    found = [(_excess(trick, before, after), trick) for trick in TRICKS]
    return [trick for excess, trick in sorted(found, key=lambda item: -item[0]) if excess >= 1]


def _excess(trick: Trick, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """How many times its limit a statistic has moved."""
    old, new = before[trick.statistic], after[trick.statistic]
    if not trick.ratio:
        return (new - old) / trick.limit
    if old <= 0 or new <= 0:
        return math.inf if (new > old) == (trick.limit > 1) and new != old else 0.0
    return math.log(new / old) / math.log(trick.limit)


class RewardWatch(TrainerCallback, ExportableState):
    """Probe the policy during PPO, say when reward and probes part, and keep the adapter with the best held-out score.

    The scores are logged as `eval_probe/<name>`, the statistics of the replies with those of their rollout. The best
    adapter stands in `best/`, and its weights in each checkpoint: a resumed run goes on with the best one of then.

    Args:
        trainer: Before it trains.
        probe: See the module's words.
        every: Optimiser steps between two probings; step 0 and the last one are probed too.
    """

    def __init__(self, trainer: PPOTrainer, probe: Probe, every: int) -> None:
        self.trainer = trainer
        self.probe = probe
        self.every = every
        self.probings: list[Probing] = []
        self.window: list[dict[str, float]] = []  # of each rollout since the last probing
        self.told: dict[str, Any] | None = None  # what was said when reward and probes first parted

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in a checkpoint; read again in `on_train_begin`."""
        return {
            "probings": [dataclasses.asdict(probing) for probing in self.probings],
            "window": [dict(rollout) for rollout in self.window],
            "told": self.told,
        }

    def summary(self) -> dict[str, Any]:
        """What the stage's record says of the probes."""
        best, last = best_of(self.probings), self.probings[-1]
        args, state = self.trainer.args, self.trainer.state
        loaded = state.best_model_checkpoint if args.load_best_model_at_end else None
        return {
            "saved_step": int(loaded.rpartition("-")[2]) if loaded else state.global_step,
            "best": {"folder": BEST, "step": best.step, "score": round(best.score, 4)},
            "last": {"step": last.step, "score": round(last.score, 4)},
            "reward_hacking": self.told,
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) if state.global_step else None
        if saved:
            self.probings = [Probing(**probing) for probing in saved["probings"]]
            self.window, self.told = saved["window"], saved["told"]
            if state.is_world_process_zero:
                self._take_back_best(args)
        elif state.is_world_process_zero:
            self._probe(args, state)  # the first is the best so far, and takes the place of another run's

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if (state.global_step - 1) % self.trainer.args.steps_per_rollout == 0:
            self._look_at_rollout()
        if state.is_world_process_zero and (
            state.global_step % self.every == 0 or state.global_step == state.max_steps
        ):
            self._probe(args, state)

    def _look_at_rollout(self) -> None:
        """Statistics of the replies of a new rollout, on every rank alike; logged with the trainer's own."""
        trainer, rollout = self.trainer, self.trainer._rollout
        assert rollout is not None  # a step has just been made of it
        tokenizer = trainer.processing_class
        ids = [row[mask.bool()].tolist() for row, mask in zip(rollout.input_ids, rollout.mask, strict=True)]
        replies = [reply_text(row, tokenizer) for row in ids]
        personas = [persona_and_dialogue(json.loads(row["row"]))[0] for row in trainer._rollout_rows]
        found = {name: rollout.logprobs.new_tensor(x) for name, x in reply_statistics(personas, replies).items()}
        means = trainer._mean(found)
        for name, value in means.items():
            trainer._metrics.setdefault(name, []).append(value)
        # As the rewards gave it: neither normalised by what came before, nor less a penalty.
        by_reward = {name: trainer._metrics[f"rewards/{name}/mean"][-1] for name in trainer.reward_weights}
        reward = sum(weight * by_reward[name] for name, weight in trainer.reward_weights.items())
        self.window.append({**means, "reward": reward, "objective/kl": trainer._metrics["objective/kl"][-1]})
        if len(self.probings) == 1 and not self.probings[0].rewards:
            self._describe(self.probings[0])

    def _describe(self, probing: Probing) -> None:
        names = [name for name in (self.window[0] if self.window else ()) if name != "reward"]
        probing.replies = {name: _mean([rollout[name] for rollout in self.window]) for name in names}
        probing.rewards = [rollout["reward"] for rollout in self.window]

    def _probe(self, args: TrainingArguments, state: TrainerState) -> None:
        device = self.trainer.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # a probe may draw numbers
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            found = self.probe(model, self.trainer.processing_class)
        probing = Probing(state.global_step, [float(score) for score in next(iter(found.values()), [])])
        expected = len(self.probings[0].scores) if self.probings else max(1, len(probing.scores))
        if len(probing.scores) != expected:
            raise ValueError(
                f"`probe` returned {len(probing.scores)} scores, where {expected} are needed. Return at least one "
                "number a persona, for the same personas each time."
            )
        self._describe(probing)
        self.window = []
        self.probings.append(probing)
        self.trainer.log({f"eval_probe/{name}": _mean(list(scores)) for name, scores in found.items()})
        if best_of(self.probings) is probing:
            self._save_best(args)
        if parted(self.probings) and self.told is None:
            self._tell()

    def _tell(self) -> None:
        best, now = best_of(self.probings), self.probings[-1]
        named = tricks(best.replies, now.replies)
        self.told = {
            "step": now.step,
            "named": [trick.name for trick in named] or ["unknown"],
            "best_step": best.step,
            "probes": [round(best.score, 4), round(now.score, 4)],
            "reward": [round(_mean(best.rewards), 4), round(_mean(now.rewards), 4)],
            "replies": {name: [round(best.replies[name], 4), round(now.replies[name], 4)] for name in now.replies},
        }
        shown = "; ".join(
            f"{trick.name} ({trick.statistic} {best.replies[trick.statistic]:.3g} -> {now.replies[trick.statistic]:.3g}): "
            f"{trick.remedy}" for trick in named
        )  # fmt: skip
        logger.warning(
            "REWARD HACKING at step %d: since step %d the reward rose from %.3g to %.3g while the held-out probes fell "
            "from %.3f to %.3f, at %d probings in a row. What changed in the replies: %s. The adapter of step %d is "
            "kept in %s/.",
            now.step, best.step, _mean(best.rewards), _mean(now.rewards), best.score, now.score, PATIENCE,
            shown or "nothing that is measured here; read samples.jsonl", best.step, BEST,
        )  # fmt: skip

    def _save_best(self, args: TrainingArguments, weights: Path | None = None) -> None:
        """The policy as it is, or of the same form with the weights in a file."""
        folder = Path(args.output_dir) / BEST
        temporary = folder.with_name(f".{BEST}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save_adapter(self.trainer.accelerator.unwrap_model(self.trainer.model), temporary)
        if weights is not None:
            shutil.copyfile(weights, temporary / SAFETENSORS_WEIGHTS_NAME)
        if record := read_record(args.output_dir):  # a trainer of one's own may write none
            write_json(temporary / "metadata.json", self._record(record, temporary))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        self.trainer.best_adapter = folder / SAFETENSORS_WEIGHTS_NAME

    def _record(self, record: Mapping[str, Any], adapter: Path) -> dict[str, Any]:
        """The stage's record as that of its best adapter, which lies one folder deeper: chat and evaluation ask for it."""

        def deeper(path: str) -> str:
            return os.path.normpath(Path("..", path)) if path.startswith(("./", "../")) else path

        links = {name: {**link, "path": deeper(f"./{link['path']}")} for name, link in record["parents"].items()}
        best = best_of(self.probings)
        return {
            **record,
            "status": "done",
            "parents": links,
            "model_name_or_path": deeper(record["model_name_or_path"]),
            "result_hash": folder_hash(adapter),
            "step": best.step,
            "probe_score": round(best.score, 4),
        }

    def _take_back_best(self, args: TrainingArguments) -> None:
        """The best adapter of the checkpoint; that of the folder may be of a step after it."""
        kept = self.trainer.resumed_from and self.trainer.resumed_from / BEST_ADAPTER_FILE
        if kept and kept.is_file():
            self._save_best(args, kept)
