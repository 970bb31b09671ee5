"""Generate, probe and score: one results folder a system, from one base and the adapters on it.

    python -m evaluation run --config recipes/<name>/evaluate.yaml
    accelerate launch --config_file accelerate_configs/two_t4.yaml -m evaluation run --config recipes/<name>/evaluate.yaml

What was killed goes on by the same command: finished systems stay, and of the others the finished batches. Several
processes share the batches; the numbers are those of one.
"""

import contextlib
import functools
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from peft import PeftModel
from trl import ModelConfig

from evaluation.agreement import measure_agreement
from evaluation.batches import PROGRESS, Work, begin, finish, in_batches, processes
from evaluation.bots import NAMES as BOTS
from evaluation.bots import bots
from evaluation.fact_probes import probes_of
from evaluation.forced_choice import choice_interval, choices_of, chosen, statement_nats
from evaluation.human_band import People, prepared_people
from evaluation.intervals import Interval, cluster_bootstrap, rate_interval
from evaluation.nli import NLI, c_scores, load_nli
from evaluation.perplexity import dialogue_nats, perplexity_intervals, reply_nll
from evaluation.probes import persona_consistency, score_reply
from evaluation.ranking import candidate_hits, to_rank
from evaluation.score import independent, metric_row, read_people, score_rows
from rlhf.chat import render_within, reply_ids
from rlhf.config import ConfigError, PriceConfig, did_you_mean
from rlhf.files import folder_hash, read_jsonl, write_jsonl
from rlhf.generate import generate_several, prompt_limit
from rlhf.lora import use_adapter, with_adapter
from rlhf.model import load_base, load_tokenizer
from rlhf.persona import with_persona
from rlhf.record import movable, stage

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FACT_PROBE_TURNS = (0, 3)  # exchanges before a probe; real dialogues have about seven
KL_REPLIES = 1000  # sampled probe replies that the KL is estimated on, of all kinds


@dataclass
class EvaluateConfig(PriceConfig):
    """What is evaluated, on what, and how replies are decoded."""

    dataset: str = field(metadata={"help": "Folder of the prepare stage.", "path": True})
    output_dir: str = field(metadata={"help": "Where each system gets its folder."})
    systems: dict[str, str | None] = field(
        metadata={"help": "Name to adapter folder; null is the base alone, and named `base`."}
    )
    bots: list[str] = field(
        default_factory=lambda: list(BOTS),
        metadata={"help": "Repliers by rule of evaluation/bots.py: ceiling, floors and attacks.", "choices": BOTS},
    )
    reference_system: str = field(default="sft", metadata={"help": "What the KL of the others is measured against."})
    max_dialogues: int | None = field(default=None, metadata={"help": "Held-out dialogues.", "range": "[1, inf)"})
    max_personas: int | None = field(default=None, metadata={"help": "Personas probed.", "range": "[1, inf)"})
    max_facts: int | None = field(
        default=None, metadata={"help": "Facts probed of a persona, drawn by the seed.", "range": "[1, inf)"}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest reply.", "range": "[1, inf)"})
    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt; older turns are dropped.", "range": "[1, inf)"}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Of the sampled decoding; the other one is greedy.", "range": "(0, inf)"}
    )
    distinct_tokens: int = field(
        default=10_000,
        metadata={"help": "Tokens that distinct-n is taken over; comparable at one number only.", "range": "[1, inf)"},
    )
    max_ranked: int | None = field(
        default=500, metadata={"help": "Replies that hits@1 ranks, drawn by the seed.", "range": "[1, inf)"}
    )
    nli_model: str | None = field(
        default=None, metadata={"help": "Folder or name of an NLI classifier; there is no C-score without."}
    )
    batch_size: int = field(default=64, metadata={"help": "Replies decoded together.", "range": "[1, inf)"})
    seed: int = field(default=0, metadata={"help": "Of sampling and resampling.", "range": "[0, 4294967295]"})
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        problems = []
        odd = [name for name, path in self.systems.items() if path is None and name != "base"]
        if odd:
            problems.append(f"`systems`: {', '.join(odd)} has no adapter; null is for base only, rules go into `bots`")
        if taken := [name for name in self.systems if name in BOTS and name not in odd]:
            problems.append(f"`systems`: {', '.join(taken)} is the name of a rule (see `bots`); take another one")
        # The default need not be there: without it no KL is measured.
        if self.reference_system not in self.systems and self.reference_system != "sft":
            problems.append(
                f"`reference_system` is {self.reference_system!r}, but `systems` has {', '.join(self.systems)}"
                f"{did_you_mean(self.reference_system, self.systems)}"
            )
        if problems:
            raise ConfigError(problems)


class Models(NamedTuple):
    """What replies and judges: the base with all adapters on it, its tokenizer, and the classifier of entailment."""

    model: Any
    tokenizer: Any
    nli: NLI | None


def main(args: EvaluateConfig, model_args: ModelConfig) -> None:
    """Write `results.json`, `replies.jsonl` and what its likelihoods are made of for each system and bot.

    They lie in `output_dir/<system>/`, with `settings.json`, which says what a finished system was made from.
    """
    main_process = processes().is_main_process
    adapters = {name: path for name, path in args.systems.items() if path is not None}
    with stage(
        "evaluate", args.output_dir, (args, model_args), args.seed, args.log_level,
        parents={"prepare": args.dataset, **adapters},
    ) as record:  # fmt: skip
        # Data
        dataset = Path(args.dataset)
        dialogues = read_jsonl(dataset / "dialogues_heldout.jsonl", args.max_dialogues)
        probes, coverage = _probes(dataset / "probes.jsonl", dialogues, args)
        people = read_people(prepared_people(dataset))
        logger.info("%d dialogues, %d probes", len(dialogues), len(probes))
        if coverage:
            logger.info("probes from the personas: %s", coverage)

        # Base and adapters
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        model = load_base(model_args, tokenizer)
        for name, path in adapters.items():
            model = with_adapter(model, path, name)
        models = Models(model, tokenizer, load_nli(args.nli_model) if args.nli_model else None)

        # Systems
        for name in [*args.systems, *_bots(args, probes)]:
            folder = Path(args.output_dir) / name
            if begin(folder, _settings(name, args, model_args, models, record)):
                continue
            logger.info("evaluating %s", name)
            work: Work = functools.partial(in_batches, folder / PROGRESS, args.batch_size)
            if name in BOTS:
                rows, likelihoods = _fixed_rows(name, dialogues, probes, args.seed), Likelihoods()
            else:
                with _active(model, name if name in adapters else None):
                    rows = _model_rows(dialogues, probes, models, work, args)
                    likelihoods = _likelihoods(name, dialogues, probes, rows, models, work, args)
            rows = _judged(rows, models.nli, work, args)
            if main_process:
                results = _results(rows, people, args)
                _add_likelihoods(results, likelihoods, dialogues, args)
                results["run"] |= _origin(name, args, models, record, coverage)
                write_jsonl(folder / "replies.jsonl", rows)
                if likelihoods.dialogues:
                    write_jsonl(folder / "likelihoods.jsonl", [*likelihoods.dialogues, *likelihoods.hits])
                if likelihoods.choices:
                    write_jsonl(folder / "choices.jsonl", likelihoods.choices)
                finish(folder, results)
                _log(name, results)
        record["result_hash"] = folder_hash(args.output_dir)


def _bots(args: EvaluateConfig, probes: Sequence[Row]) -> list[str]:
    """The repliers by rule; with one persona there is no other one that could be read."""
    single = len({row["persona_id"] for row in probes}) == 1
    return [name for name in args.bots if not (single and name == "wrong_persona")]


def _settings(name: str, args: EvaluateConfig, model_args: ModelConfig, models: Models, record: Row) -> Row:
    """All that the results of a system depend on: two with the same settings have the same numbers."""
    model = name not in BOTS
    loaded = {key: getattr(model_args, key) for key in ("load_in_4bit", "bnb_4bit_quant_type", "model_revision")}
    hashes = {parent: link["hash"] for parent, link in record["parents"].items()}
    return {
        **_config(args),
        "data_hash": hashes["prepare"],
        "adapter_hash": hashes.get(name),
        "reference_hash": hashes.get(args.reference_system) if model else None,
        "base": (record.get("base_hash") or record["model_name_or_path"]) if model else None,
        "loading": {**loaded, "dtype": str(models.model.dtype)} if model else None,
        "nli_model": models.nli.name if models.nli else None,
        "git_commit": record["git_commit"],
        "versions": record["versions"],
    }


def _config(args: EvaluateConfig) -> Row:
    """The settings that all systems share; what is one system's stands beside them."""
    config = asdict(movable([args], Path(args.output_dir))[0])
    for key in ("systems", "bots", "output_dir", "log_level"):
        del config[key]
    return config


def _origin(name: str, args: EvaluateConfig, models: Models, record: Row, coverage: Row) -> Row:
    """What `results.json` says of where its numbers come from."""
    parent = record["parents"].get(name) if name in args.systems else None
    return {
        **({"probe_coverage": coverage} if coverage else {}),
        "system": name,
        "config": _config(args),
        "adapter": parent["path"] if parent else None,
        "adapter_hash": parent["hash"] if parent else None,
        "base": record["model_name_or_path"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": record["git_commit"],
        "versions": record["versions"],
        "data_hash": record["data_hash"],
        "decoding": {"greedy": {}, "sampled": {"temperature": args.temperature, "top_k": 0, "top_p": 1.0}},
        "max_new_tokens": args.max_new_tokens,
        "nli_model": models.nli.name if models.nli else None,
    }


def _log(name: str, results: Row) -> None:
    for metric in ("persona_consistency", "persona_consistency_sampled", "forced_choice", "perplexity_token"):
        if metric in results["metrics"]:
            row = results["metrics"][metric]
            bounds = [math.nan if row[key] is None else row[key] for key in ("ci_low", "ci_high")]
            logger.info("%s %s %.3f [%.3f, %.3f]", name, metric, row["value"], *bounds)


def _probes(path: Path, dialogues: Sequence[Row], args: EvaluateConfig) -> tuple[list[Row], Row]:
    """The probes of the first personas, and of some of their facts.

    Data without probes gets them from the personas of the held-out dialogues, and then {"facts", "scorable" ...} of
    `evaluation.fact_probes.probes_of` comes with them.
    """
    rows, coverage = (read_jsonl(path), {}) if path.is_file() else _fact_probes(dialogues, args)
    facts: dict[str, list[str]] = {}
    for row in rows:
        known = facts.setdefault(row["persona_id"], [])
        if row["fact_id"] not in known:
            known.append(row["fact_id"])
    chosen = set()
    for persona in list(facts)[: args.max_personas]:
        number = min(args.max_facts or len(facts[persona]), len(facts[persona]))
        chosen.update(random.Random(f"{args.seed}/{persona}").sample(facts[persona], number))
    return [row for row in rows if row["fact_id"] in chosen], coverage


def _fact_probes(dialogues: Sequence[Row], args: EvaluateConfig) -> tuple[list[Row], Row]:
    """Probes of each different persona, at the start and in its first dialogue that is long enough."""
    personas: dict[str, list[str]] = {}
    histories: dict[str, list[Row]] = {}
    for row in dialogues:
        name = "/".join(row["persona"])
        messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"] if m["role"] != "system"]
        personas[name] = list(row["persona"])
        if messages and messages[0]["role"] == "user" and len(messages) > len(histories.get(name, [])):
            histories[name] = messages
    names = {name: f"persona-{number}" for number, name in enumerate(personas)}
    return probes_of(
        {names[name]: persona for name, persona in personas.items()},
        args.seed,
        {names[name]: messages for name, messages in histories.items()},
        FACT_PROBE_TURNS,
    )


def _active(model: Any, name: str | None) -> contextlib.AbstractContextManager[None]:
    return use_adapter(model, name) if isinstance(model, PeftModel) else contextlib.nullcontext()


def _model_rows(
    dialogues: Sequence[Row], probes: Sequence[Row], models: Models, work: Work, args: EvaluateConfig
) -> list[Row]:
    """The last reply of each dialogue, greedy, and the reply to each probe, greedy and sampled."""

    def replies(task: str, conversations: Sequence[list[Row]], temperature: float) -> list[str]:
        def reply(batch: list[list[Row]], first: int) -> list[str]:
            several = generate_several(
                models.model, models.tokenizer, batch, 1, args.max_new_tokens, temperature, args.seed, args.batch_size,
                args.max_length, first,
            )  # fmt: skip
            return [only.text for (only,) in several]

        return work(task, conversations, _characters, reply)

    rows = _dialogue_rows(dialogues, replies("dialogues", [with_persona(row)[:-1] for row in dialogues], 0.0))
    if probes:
        asked = list(map(_asked, probes))
        for decoding, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
            rows += _probe_rows(probes, replies(decoding, asked, temperature), decoding)
    return rows


def _asked(probe: Row) -> list[Row]:
    """The messages of a probe, with the persona."""
    question = {"role": "user", "content": probe["question"]}
    return with_persona({"persona": probe["persona"], "messages": [*probe["history"], question]})


def _characters(messages: Sequence[Row]) -> int:
    return sum(len(message["content"]) for message in messages)


def _fixed_rows(name: str, dialogues: Sequence[Row], probes: Sequence[Row], seed: int) -> list[Row]:
    """The replies of a bot: ceiling, floors and attacks by rule."""
    bot = bots(probes)[name]
    rng = random.Random(f"{name}/{seed}")
    if name in ("oracle", "wrong_persona"):  # what was really said: here, or in the next dialogue
        source = dialogues if name == "oracle" else [*dialogues[1:], *dialogues[:1]]
        said = [row["messages"][-1]["content"] for row in source]
    else:
        said = [bot(_as_probe(row, rng), rng) for row in dialogues]
    rows = _dialogue_rows(dialogues, said)
    if probes:
        asked = _probe_rows(probes, [bot(probe, rng) for probe in probes], "greedy")
        rows += [{**row, "decoding": decoding} for decoding in ("greedy", "sampled") for row in asked]
    return rows


def _as_probe(row: Row, rng: random.Random) -> Row:
    """A dialogue whose last message is still to be said, for a bot: one of the facts stands for the asked one."""
    persona = row["persona"] or ["i do not know ."]
    question = row["messages"][-2]["content"] if len(row["messages"]) > 1 else ""
    return {"kind": "direct", "persona": persona, "question": question, "fact": rng.choice(persona)}


def _dialogue_rows(dialogues: Sequence[Row], replies: Sequence[str]) -> list[Row]:
    return [
        {
            "persona": row["persona"],
            "history": row["messages"][:-1],
            "response": reply,
            "reference": row["messages"][-1]["content"],
            "dialogue_id": row["dialogue_id"],
            "decoding": "greedy",
            "correct": None,
        }
        for row, reply in zip(dialogues, replies, strict=True)
    ]


def _probe_rows(probes: Sequence[Row], replies: Sequence[str], decoding: str) -> list[Row]:
    return [
        {**probe, "response": reply, "decoding": decoding, "correct": score_reply(probe, reply)}
        for probe, reply in zip(probes, replies, strict=True)
    ]


def _judged(rows: list[Row], nli: NLI | None, work: Work, args: EvaluateConfig) -> list[Row]:
    """The rows, those of dialogues with their C-score where there is a model for it."""
    if nli is None:
        return rows
    spoken = [row for row in rows if row["correct"] is None]
    scores = work(
        "entailment",
        spoken,
        lambda row: len(row["response"]),
        lambda batch, _: c_scores(nli, batch, args.batch_size),
    )
    for row, value in zip(spoken, scores, strict=True):
        row["c_score"] = value
    return rows


def _results(rows: Sequence[Row], people: People, args: EvaluateConfig) -> Row:
    """Metrics that need no model: of the dialogue replies, and of the probes where there are any."""
    spoken = [row for row in rows if row["correct"] is None]
    results = score_rows(spoken, args.seed, args.distinct_tokens, people=people)
    results["breakdown"] = []
    probed = [row for row in rows if row["correct"] is not None]
    if probed:
        consistency = persona_consistency(probed, seed=args.seed)
        results["metrics"] = {**consistency["metrics"], **results["metrics"]}
        results["breakdown"] = consistency["breakdown"]
        results["run"] |= consistency["run"]
        agreement = measure_agreement(probed, args.seed)
        if agreement:
            _add(results, "probe_agreement", agreement.share, agreement.num_pairs)
            results["run"]["probe_agreement_by_chance"] = agreement.by_chance
    else:
        results["run"]["not_scored"]["persona_consistency"] = "no fact of the held-out personas can be probed"
    return results


class Likelihoods(NamedTuple):
    """What the model's own probabilities say, in rows: of dialogues, of ranked replies, of choices; KLs of replies."""

    dialogues: Sequence[Row] = ()
    hits: Sequence[Row] = ()
    choices: Sequence[Row] = ()
    kl: Sequence[Row] = ()


def _likelihoods(
    name: str,
    dialogues: Sequence[Row],
    probes: Sequence[Row],
    rows: Sequence[Row],
    models: Models,
    work: Work,
    args: EvaluateConfig,
) -> Likelihoods:
    model, tokenizer = models.model, models.tokenizer
    nats = work(
        "perplexity",
        dialogues,
        lambda row: _characters(row["messages"]),
        lambda batch, _: dialogue_nats(model, tokenizer, batch, args.max_length, args.batch_size),
    )
    hits = work(
        "ranking",
        to_rank(dialogues, args.max_ranked, args.seed),
        lambda asked: _characters(asked[0]["messages"][: asked[1]]),
        lambda batch, _: candidate_hits(model, tokenizer, batch, args.max_length),
    )
    choices = choices_of(probes, args.seed)
    found = work(
        "choices",
        choices,
        lambda row: _characters(row["history"]),
        lambda batch, _: statement_nats(model, tokenizer, batch, args.max_length, args.batch_size),
    )
    return Likelihoods(
        [
            {"persona": row["persona"], "dialogue_id": row["dialogue_id"], **sums}
            for row, sums in zip(dialogues, nats, strict=True)
        ],
        hits,
        [
            {**row, "nats_true": true, "nats_false": false, "right": chosen(true, false)}
            for row, (true, false) in zip(choices, found, strict=True)
        ],
        _kl(name, rows, models, work, args),
    )


def _kl_rows(rows: Sequence[Row], seed: int) -> list[Row]:
    """Sampled probe replies, drawn from all kinds, turns and wordings alike."""
    sampled = [row for row in rows if row["decoding"] == "sampled"]
    return random.Random(seed).sample(sampled, min(KL_REPLIES, len(sampled)))


def _kl(name: str, rows: Sequence[Row], models: Models, work: Work, args: EvaluateConfig) -> list[Row]:
    """The system's own samples, each with its log-probability less that under the reference system, in nats."""
    sampled = _kl_rows(rows, args.seed)
    if not sampled or args.reference_system not in args.systems or name == "base":
        return []
    limit = prompt_limit(models.model, args.max_length, args.max_new_tokens)

    def differences(batch: list[Row], _: int) -> list[float]:
        ids, masks = [], []
        for row in batch:
            asked = _asked(row)
            prompt = render_within(asked, models.tokenizer, limit, add_generation_prompt=True)[0]["input_ids"]
            # A reply that never ended gets a stop token here, for which the model may have no position left.
            reply = reply_ids(asked[-1], row["response"], models.tokenizer)[
                : limit + args.max_new_tokens - len(prompt)
            ]
            ids.append(prompt + reply)
            masks.append([0] * len(prompt) + [1] * len(reply))
        own = reply_nll(models.model, ids, masks, args.batch_size)
        with use_adapter(models.model, args.reference_system):
            reference = reply_nll(models.model, ids, masks, args.batch_size)
        return [theirs - mine for mine, theirs in zip(own, reference, strict=True)]

    found = work("kl", sampled, lambda row: _characters([*row["history"], {"content": row["response"]}]), differences)
    return [
        {"persona_id": row["persona_id"], "fact_id": row["fact_id"], "nats": nats}
        for row, nats in zip(sampled, found, strict=True)
    ]


def _add_likelihoods(results: Row, found: Likelihoods, dialogues: Sequence[Row], args: EvaluateConfig) -> None:
    """The metrics of the likelihoods; a bot has none."""
    if found.dialogues:
        intervals = perplexity_intervals(found.dialogues, independent(dialogues)[1], seed=args.seed)
        for name, interval in intervals.items():
            _add(results, name, interval, sum(row["replies"] for row in found.dialogues))
        if not found.hits:
            results["run"]["not_scored"]["hits_at_1"] = "the dialogues have no candidates"
        if not found.choices:
            results["run"]["not_scored"]["forced_choice"] = "no fact is probed, or no other value of its slot is known"
    if found.hits:
        interval = rate_interval([row["hit"] for row in found.hits], independent(found.hits)[1], seed=args.seed)
        _add(results, "hits_at_1", interval, len(found.hits))
        results["run"]["candidates"] = sorted({row["candidates"] for row in found.hits})
    if found.choices:
        _add(results, "forced_choice", choice_interval(found.choices, args.seed), len(found.choices))
    if found.kl:
        unit = "persona_id" if len({row["persona_id"] for row in found.kl}) > 1 else "fact_id"
        nats = [row["nats"] for row in found.kl]
        interval = cluster_bootstrap(nats, np.ones(len(nats)), [row[unit] for row in found.kl], seed=args.seed)
        _add(results, "kl_reference", interval, len(nats))


def _add(results: Row, name: str, interval: Interval, n: int) -> None:
    """Put a metric among the results; JSON has no infinity, so a value beyond a double is named with the reason."""
    if math.isinf(interval.value):
        results["run"]["not_scored"][name] = f"beyond the range of numbers, over n = {n}"
        return
    bounds = (bound if math.isfinite(bound) else math.nan for bound in interval[1:])
    results["metrics"][name] = metric_row(name, Interval(interval.value, *bounds), n)
