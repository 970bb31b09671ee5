"""Generate, probe and score: one results folder a system, from one base and the adapters on it.

python -m evaluation run --config recipes/<name>/evaluate.yaml
"""

import contextlib
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftModel
from trl import ModelConfig

from evaluation.bots import NAMES as RULES
from evaluation.bots import bots
from evaluation.fact_probes import probes_of
from evaluation.human_band import People, prepared_people
from evaluation.intervals import cluster_bootstrap, rate_interval
from evaluation.nli import NLI, c_scores, load_nli
from evaluation.perplexity import dialogue_nats, perplexity_intervals, reply_nll
from evaluation.probes import persona_consistency, score_reply
from evaluation.ranking import candidate_hits
from evaluation.score import independent, metric_row, read_people, score_rows
from rlhf.chat import render_within, reply_ids
from rlhf.config import ConfigError, did_you_mean
from rlhf.files import folder_hash, read_jsonl, write_json, write_jsonl
from rlhf.generate import generate, prompt_limit
from rlhf.lora import use_adapter, with_adapter
from rlhf.model import load_base, load_tokenizer
from rlhf.persona import with_persona
from rlhf.record import movable, stage

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FACT_PROBE_TURNS = (0, 3)  # exchanges before a probe; real dialogues have about seven
KL_REPLIES = 1000  # sampled probe replies that the KL is estimated on, of all kinds


@dataclass
class EvaluateConfig:
    """What is evaluated, on what, and how replies are decoded."""

    dataset: str = field(metadata={"help": "Folder of the prepare stage.", "path": True})
    output_dir: str = field(metadata={"help": "Where each system gets its folder."})
    systems: dict[str, str | None] = field(
        metadata={
            "help": "Name to adapter folder; null is the base alone, or a bot of evaluation/bots.py by its name."
        }
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
        odd = [name for name, path in self.systems.items() if path is None and name not in ("base", *RULES)]
        if odd:
            problems.append(f"`systems`: {', '.join(odd)} has no adapter; null is for base, {', '.join(RULES)} only")
        # The default need not be there: without it no KL is measured.
        if self.reference_system not in self.systems and self.reference_system != "sft":
            problems.append(
                f"`reference_system` is {self.reference_system!r}, but `systems` has {', '.join(self.systems)}"
                f"{did_you_mean(self.reference_system, self.systems)}"
            )
        if problems:
            raise ConfigError(problems)


def main(args: EvaluateConfig, model_args: ModelConfig) -> None:
    """Write `results.json`, `replies.jsonl` and `likelihoods.jsonl` for each system into `output_dir/<system>/`."""
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

        def reply_with(conversations: Sequence[Any], temperature: float) -> list[str]:
            return generate(
                model, tokenizer, conversations, args.max_new_tokens, temperature, args.seed, args.batch_size,
                args.max_length,
            )  # fmt: skip

        nli = load_nli(args.nli_model) if args.nli_model else None

        # Systems
        config = asdict(movable([args], Path(args.output_dir))[0])
        del config["systems"], config["output_dir"]  # what is one system's stands beside it
        for name, folder in args.systems.items():
            logger.info("evaluating %s", name)
            if name in RULES:
                rows = _judged(_fixed_rows(name, dialogues, probes, args.seed), nli, args)
                results = _results(rows, people, args)
                likelihoods = []
            else:
                with _active(model, name if folder is not None else None):
                    rows = _judged(_model_rows(dialogues, probes, reply_with, args), nli, args)
                    results = _results(rows, people, args)
                    likelihoods = _add_perplexity(results, model, tokenizer, dialogues, args)
                    likelihoods += _add_hits(results, model, tokenizer, dialogues, args)
                    _add_kl(results, model, tokenizer, rows, name, args)
            results["run"] |= {
                **({"probe_coverage": coverage} if coverage else {}),
                "system": name,
                "config": config,
                "adapter": record["parents"][name]["path"] if folder else None,
                "adapter_hash": record["parents"][name]["hash"] if folder else None,
                "base": record["model_name_or_path"],
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "git_commit": record["git_commit"],
                "versions": record["versions"],
                "data_hash": record["data_hash"],
                "decoding": {"greedy": {}, "sampled": {"temperature": args.temperature, "top_k": 0, "top_p": 1.0}},
                "max_new_tokens": args.max_new_tokens,
                "nli_model": nli.name if nli else None,
            }
            write_jsonl(Path(args.output_dir) / name / "replies.jsonl", rows)
            if likelihoods:
                write_jsonl(Path(args.output_dir) / name / "likelihoods.jsonl", likelihoods)
            write_json(Path(args.output_dir) / name / "results.json", results)
            for metric in ("persona_consistency", "persona_consistency_sampled", "perplexity_token"):
                if metric in results["metrics"]:
                    row = results["metrics"][metric]
                    bounds = [math.nan if row[key] is None else row[key] for key in ("ci_low", "ci_high")]
                    logger.info("%s %s %.3f [%.3f, %.3f]", name, metric, row["value"], *bounds)
        record["result_hash"] = folder_hash(args.output_dir)


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
    dialogues: Sequence[Row],
    probes: Sequence[Row],
    reply_with: Callable[[Any, float], list[str]],
    args: EvaluateConfig,
) -> list[Row]:
    """The last reply of each dialogue, greedy, and the reply to each probe, greedy and sampled."""
    asked = [
        with_persona({"persona": p["persona"], "messages": [*p["history"], _user(p["question"])]}) for p in probes
    ]
    rows = _dialogue_rows(dialogues, reply_with([with_persona(row)[:-1] for row in dialogues], 0.0))
    if probes:
        for decoding, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
            rows += _probe_rows(probes, reply_with(asked, temperature), decoding)
    return rows


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
    replies = [bot(probe, rng) for probe in probes]
    for decoding in ("greedy", "sampled"):
        rows += _probe_rows(probes, replies, decoding) if probes else []
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


def _judged(rows: list[Row], nli: NLI | None, args: EvaluateConfig) -> list[Row]:
    """The rows, those of dialogues with their C-score where there is a model for it."""
    if nli is None:
        return rows
    spoken = [row for row in rows if row["correct"] is None]
    for row, value in zip(spoken, c_scores(nli, spoken, args.batch_size), strict=True):
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
    else:
        results["run"]["not_scored"]["persona_consistency"] = "no fact of the held-out personas can be probed"
    return results


def _add_perplexity(
    results: Row, model: Any, tokenizer: Any, dialogues: Sequence[Row], args: EvaluateConfig
) -> list[Row]:
    """Perplexity of all replies of the held-out dialogues, given persona and history; returns what it is made of."""
    rows = dialogue_nats(model, tokenizer, dialogues, args.max_length, args.batch_size)
    intervals = perplexity_intervals(rows, independent(dialogues)[1], seed=args.seed)
    for name, interval in intervals.items():
        _add(results, name, interval, sum(row["replies"] for row in rows))
    return [
        {"persona": dialogue["persona"], "dialogue_id": dialogue["dialogue_id"], **row}
        for dialogue, row in zip(dialogues, rows, strict=True)
    ]


def _add_hits(results: Row, model: Any, tokenizer: Any, dialogues: Sequence[Row], args: EvaluateConfig) -> list[Row]:
    """hits@1, where the data has candidates; returns the ranked replies."""
    hits = candidate_hits(model, tokenizer, dialogues, args.max_length, args.max_ranked, args.seed)
    if not hits:
        results["run"]["not_scored"]["hits_at_1"] = "the dialogues have no candidates"
        return []
    _add(
        results,
        "hits_at_1",
        rate_interval([row["hit"] for row in hits], independent(hits)[1], seed=args.seed),
        len(hits),
    )
    results["run"]["candidates"] = sorted({row["candidates"] for row in hits})
    return hits


def _kl_rows(rows: Sequence[Row], seed: int) -> list[Row]:
    """Sampled probe replies, drawn from all kinds, turns and wordings alike."""
    sampled = [row for row in rows if row["decoding"] == "sampled"]
    return random.Random(seed).sample(sampled, min(KL_REPLIES, len(sampled)))


def _add_kl(results: Row, model: Any, tokenizer: Any, rows: Sequence[Row], name: str, args: EvaluateConfig) -> None:
    """KL to the reference system in nats a reply, estimated on this system's own samples."""
    sampled = _kl_rows(rows, args.seed)
    if not sampled or args.reference_system not in args.systems or name == "base":
        return
    ids, masks = [], []
    limit = prompt_limit(model, args.max_length, args.max_new_tokens)
    for row in sampled:
        asked = with_persona({"persona": row["persona"], "messages": [*row["history"], _user(row["question"])]})
        prompt = render_within(asked, tokenizer, limit, add_generation_prompt=True)[0]["input_ids"]
        reply = reply_ids(asked[-1], row["response"], tokenizer)
        # A reply that never ended gets a stop token here, for which the model may have no position left.
        room = limit + args.max_new_tokens - len(prompt)
        ids.append(prompt + reply[:room])
        masks.append([0] * len(prompt) + [1] * len(reply[:room]))
    own = reply_nll(model, ids, masks, args.batch_size)
    with use_adapter(model, args.reference_system):
        reference = reply_nll(model, ids, masks, args.batch_size)
    differences = np.array(reference) - np.array(own)
    unit = "persona_id" if len({row["persona_id"] for row in sampled}) > 1 else "fact_id"
    interval = cluster_bootstrap(
        differences, np.ones(len(differences)), [row[unit] for row in sampled], seed=args.seed
    )
    _add(results, "kl_reference", interval, len(differences))


def _add(results: Row, name: str, interval: Any, n: int) -> None:
    results["metrics"][name] = metric_row(name, interval, n)


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
