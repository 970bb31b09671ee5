"""Make the data of a recipe: dialogues for SFT, preference pairs for reward and DPO, prompts for PPO.

    python rlhf/prepare.py --config recipes/<name>/prepare.yaml [--key value ...]

One process, no GPU. Rows of a file go through reader, quality, near-duplicates, split and the search for leaks across it;
what is left becomes the files {dialogues,preferences,prompts}_{train,heldout}.jsonl. Beside them stand kept.jsonl (the
dialogues, uncut), rejected.jsonl (what was left out, and why), statistics.json and statistics.png. The persona world is generated, not filtered; it and the data
of a card have probes.jsonl too, and its training dialogues without flaws are in references_train.jsonl.

Nothing is drawn but by the seed and every file is written whole, so a stage that was killed and runs again ends in the
same bytes. It starts anew: 100,000 dialogues of four exchanges take 200 s of a slow core and 1.7 GB, 30,000 take 50 s
(`benchmarks/prepare_scaling.py`).
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rlhf.config import ConfigError, PriceConfig
from rlhf.data import audit, card, describe, duplicates, preferences, quality, scripts, sources, world
from rlhf.data.sources import DataError, Row
from rlhf.data.split import characters, split
from rlhf.files import folder_hash, read_jsonl, source_hash, write_json, write_jsonl
from rlhf.model import load_tokenizer
from rlhf.record import RunError, launch, stage

logger = logging.getLogger(__name__)

KINDS = ("dialogues", "preferences", "prompts")
SIZED = ("dialogues", "pairs", "prompts")
SIDES = ("train", "heldout")
WORLD_ONLY = ("train_dialogues", "heldout_dialogues", "probe_characters")
CARD_ONLY = ("card", "general", "heldout_facts")
FILE_ONLY = (
    "path", "dataset_name", "split", "persona", "character", "num_dialogues", "heldout", "max_turns",
    "max_rejected_share", "quality",
)  # fmt: skip
OF_SOME_READERS = ("dataset_name", "split", "persona", "character")
# Each reader with the settings that it takes beside the path.
READERS: dict[str, tuple[Callable[..., Iterator[Row]], tuple[str, ...]]] = {
    "synthetic_persona_chat": (sources.synthetic_persona_chat, ()),
    "convai2": (sources.convai2, ()),
    "script": (scripts.script, ("character", "persona")),
    "question_answer": (sources.question_answer, ("persona",)),
    "messages": (sources.messages, ("persona",)),
    "preference": (sources.preference, ("persona",)),
    "hub": (sources.hub, ("split", "character", "persona")),
    "jsonl": (sources.jsonl, ()),
}
NOT_DATA = ("kept.jsonl", "rejected.jsonl")

_ALONE = (
    "one character has nobody to exchange replies with. Stop after SFT (--until sft), or make pairs from a card "
    "(recipes/my-character)"
)
_UNLIKE = "no two characters speak of their facts in replies to similar turns. Stop after SFT (--until sft), or add dialogues"


@dataclass
class PrepareConfig(PriceConfig):
    """Where the data comes from and how much of it there is.

    Attributes:
        output_dir: folder of the stage.
        source: "world" generates data; "card" makes the data of one character from its card and from general dialogues;
            the others are the readers of `rlhf/data/sources.py`, one a format; "hub" reads a dataset of the Hub by its
            columns, "jsonl" dialogue rows as they come out here.
        seed: of the split and of every draw.
        train_pairs: preference pairs for training; real data gives at most as many as it has replies.
        heldout_pairs: preference pairs held out.
        train_prompts: prompts for PPO.
        heldout_prompts: prompts held out.
        train_dialogues: world and card only.
        heldout_dialogues: world and card only.
        probe_characters: world only; characters that the probes ask about.
        card: card only; the character's file.
        general: card only; the source of the general dialogues, whose keys then hold.
        heldout_facts: card only; facts that no training row asks for.
        path: the file to read; not for the world and the Hub.
        dataset_name: of a dataset on the Hub; for `source: hub`.
        split: of that dataset, as `datasets.load_dataset` takes it; None is "train".
        persona: facts of the character, for formats that have none of their own.
        character: whose lines are the replies; for scripts.
        quality: what is asked of a reply (`rlhf/data/quality.py`); None goes by the source. Not for the world.
        num_dialogues: read until this many dialogues are usable (a conversation read from both sides counts once);
            None reads all. Not for the world.
        heldout: share of the rows to hold out if below 1, else their number; whole characters. Not for the world.
        max_turns: longer dialogues are cut, from the oldest turn on, into rows of this many turns. Not for the world.
        max_rejected_share: share of the dialogues that may be unusable before the stage stops. Not for the world.
        force_audit: go on with preference pairs that can be told apart without the persona.
        model_name_or_path: whose tokens statistics.json counts; None counts characters alone.
        log_level: of the console and of `training.log`.
    """

    output_dir: str
    source: Literal[
        "world", "card", "synthetic_persona_chat", "convai2", "script", "question_answer", "messages", "preference",
        "hub", "jsonl",
    ] = "world"  # fmt: skip
    seed: int = field(default=42, metadata={"range": "[0, inf)"})
    train_pairs: int = field(default=6000, metadata={"range": "[1, inf)"})
    heldout_pairs: int = field(default=700, metadata={"range": "[1, inf)"})
    train_prompts: int = field(default=6000, metadata={"range": "[1, inf)"})
    heldout_prompts: int = field(default=300, metadata={"range": "[1, inf)"})
    train_dialogues: int = field(default=3000, metadata={"range": "[1, inf)"})
    heldout_dialogues: int = field(default=200, metadata={"range": "[1, inf)"})
    probe_characters: int = field(default=100, metadata={"range": "[1, inf)"})
    card: str | None = field(default=None, metadata={"path": True})
    general: Literal["world", "synthetic_persona_chat", "convai2", "jsonl"] = "world"
    heldout_facts: int = field(default=1, metadata={"range": "[0, inf)"})
    path: str | None = field(default=None, metadata={"path": True})
    dataset_name: str | None = None
    split: str | None = None
    persona: list[str] | None = None
    character: str | None = None
    quality: Literal["chat", "script", "answers", "expert"] | None = None
    num_dialogues: int | None = field(default=None, metadata={"range": "[1, inf)"})
    heldout: float = field(default=0.2, metadata={"range": "(0, inf)"})
    max_turns: int = field(default=16, metadata={"range": "[2, inf)"})
    max_rejected_share: float = field(default=0.05, metadata={"range": "[0, 1]"})
    force_audit: bool = False
    model_name_or_path: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        read = self.general if self.source == "card" else self.source
        takes = ("dataset_name", *READERS[read][1]) if read == "hub" else READERS[read][1] if read in READERS else ()
        foreign = FILE_ONLY if read == "world" else tuple(name for name in OF_SOME_READERS if name not in takes)
        if self.source == "card":
            foreign += ("probe_characters",)
        else:
            foreign += CARD_ONLY + (WORLD_ONLY if self.source != "world" else ())
        changed = [f.name for f in fields(self) if f.name in foreign and getattr(self, f.name) != f.default]
        problems = []
        if changed:
            names = ", ".join(f"`{name}`" for name in changed)
            problems.append(
                f"{names} {'has' if len(changed) == 1 else 'have'} no effect with `source` {self.source!r}; remove"
            )
        needed = "dataset_name" if read == "hub" else "path"
        if read != "world" and getattr(self, needed) is None:
            problems.append(f"`{needed}` is None; {read!r} needs to know what to read")
        if self.source == "card" and self.card is None:
            problems.append("`card` is None; `source` 'card' needs the character's file")
        if self.source == "script" and self.character is None:
            problems.append("`character` is None; `source` 'script' needs the speaker whose lines are the replies")
        if self.source in ("script", "question_answer") and not self.persona:
            problems.append(f"`persona` is {self.persona!r}; `source` {self.source!r} has no facts of its own")
        if self.max_turns % 2:
            problems.append(f"`max_turns` must be even, so that a row ends with a reply, got {self.max_turns}")
        if problems:
            raise ConfigError(problems)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the files of the stage and count what they hold.

    Returns:
        {"rows": {file: rows}, "data_hash"}; for real data also "dialogues" (usable), "rejected" ({reason: number},
        whole dialogues), "removed" ({reason: number}, parts of dialogues that were kept), "rows_between_sides" (left out
        by the split), "turns_without_reply_or_prompt" (at the ends of dialogues), "dialogues_cut" (rows longer than
        `max_turns`, made into several); for a card what `rlhf.data.card.write` says.

    Raises:
        DataError: if the file cannot be read, more than `max_rejected_share` of its dialogues are unusable (after
            rejected.jsonl is written, and before anything else is), too little is left, or preference pairs can be told
            apart without the persona (`rlhf.data.audit`) and `force_audit` is not set (statistics.json has the numbers).
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {}
    rejected: list[Row] = []
    sizes = {f"{side}_{kind}": getattr(config, f"{side}_{kind}") for side in SIDES for kind in SIZED}
    if config.source == "world":
        _remove_old(folder)
        world.write(folder, config.seed, probe_characters=config.probe_characters, **sizes)
    elif config.source == "card":
        persona = card.read(str(config.card))
        train, heldout, between = _sides(config, rejected, counts)
        general = (_windows(train, config.max_turns, counts), _windows(heldout, config.max_turns, counts))
        _remove_old(folder)
        counts |= card.write(folder, persona, general, config.seed, heldout_facts=config.heldout_facts, **sizes)
    else:
        train, heldout, between = _sides(config, rejected, counts)
        alone = len(set(characters([*train, *heldout]))) == 1
        made: dict[str, list[Row]] = {}
        for side, rows in zip(SIDES, (train, heldout), strict=True):
            # Few characters are held out, and have few values to exchange; those of training are no secret.
            lenders = made.get("dialogues_train.jsonl", [])
            for kind, values in _files(rows, side, config, counts, lenders).items():
                if values:
                    made[f"{kind}_{side}.jsonl"] = values
                elif kind == "preferences":
                    logger.warning("There are no %s pairs: %s.", side, _ALONE if alone else _UNLIKE)
                else:
                    raise DataError(f"{config.path}: too few dialogues for any {side} {kind}. Add dialogues.")
        _remove_old(folder)
        for file, values in made.items():
            write_jsonl(folder / file, values)
    if config.source == "world":
        kept = _written_dialogues(folder)
    else:
        kept = [{key: row[key] for key in row if key != "pair"} for row in (*train, *heldout, *between)]
        write_jsonl(folder / "kept.jsonl", kept)
        write_jsonl(folder / "rejected.jsonl", rejected)
        counts |= {"rejected": _reasons(rejected, whole=True), "removed": _reasons(rejected, whole=False)}
    # What training reads: of a card the rows made of it, beside the general ones.
    described = _written_dialogues(folder) if config.source == "card" else kept
    statistics = describe.describe(described, rejected, _tokenize(config.model_name_or_path))
    pairs = [folder / f"preferences_{side}.jsonl" for side in SIDES]
    cheaters: list[audit.Cheater] = []
    if all(path.is_file() for path in pairs):
        train_pairs, heldout_pairs = map(read_jsonl, pairs)
        cheaters = audit.audit(train_pairs, config.seed, heldout_pairs)
        statistics["cheaters"] = {cheater.name: vars(cheater) for cheater in cheaters}
    # Before pairs are refused: whoever has to mend them needs the numbers.
    write_json(folder / "statistics.json", statistics)
    describe.histograms(statistics, folder / "statistics.png")
    audit.refuse_cheaters(cheaters, config.force_audit)
    written = sorted(path for path in folder.glob("*.jsonl") if path.name not in NOT_DATA)
    counts["rows"] = {path.name: path.read_bytes().count(b"\n") for path in written}
    counts["data_hash"] = folder_hash(folder)
    logger.info("%s", json.dumps(counts))
    return counts


def _sides(config: PrepareConfig, rejected: list[Row], counts: dict[str, Any]) -> tuple[list[Row], ...]:
    """Training rows, held-out rows and those that belong to neither, as far as they are fit to be trained on."""
    if config.source == "card" and config.general == "world":
        sizes = (config.train_dialogues, config.heldout_dialogues)
        train, heldout = (
            list(world.dialogues(size, config.seed, held_out, flawed=False))
            for size, held_out in zip(sizes, (False, True), strict=True)
        )
        between: list[Row] = []
    else:
        rows = _usable(config, rejected)
        train, heldout, between = split(rows, config.heldout, config.seed)
        heldout = _without_leaks(train, heldout, rejected)
    counts["dialogues"] = len({row["dialogue_id"] for row in (*train, *heldout, *between)})
    counts |= {"rows_between_sides": len(between), "turns_without_reply_or_prompt": 0, "dialogues_cut": 0}
    return train, heldout, between


def _usable(config: PrepareConfig, rejected: list[Row]) -> list[Row]:
    """Dialogue rows that may be trained on; one made of a preference pair carries it as `pair`."""
    rows = list(_limited(config, rejected))
    file = config.dataset_name or config.path
    judged: list[Row] = []
    for source, group in groupby(rows, key=lambda row: row["source"]):
        standard = quality.STANDARDS[config.quality or quality.KIND_OF_SOURCE.get(source, "chat")]
        judged += quality.mark_bad_replies(group, standard, str(file), rejected)
    reasons = _reasons(rejected, whole=True)
    faults = {reason: count for reason, count in reasons.items() if reason not in describe.WELL_FORMED}
    left, repeated = duplicates.drop_duplicates(judged)  # repeated is not unusable
    rejected += repeated
    if not left and not faults:
        raise DataError(
            f"{file}: there are no dialogues in it" + (f" that can be used: {reasons}." if reasons else ".")
        )
    unusable, dialogues = sum(faults.values()), len({row["dialogue_id"] for row in judged})
    if unusable > config.max_rejected_share * (dialogues + unusable):
        rejected_path = Path(config.output_dir) / "rejected.jsonl"
        write_jsonl(rejected_path, rejected)
        raise DataError(
            f"{file}: {unusable} of {dialogues + unusable} dialogues are unusable, more than `max_rejected_share` "
            f"{config.max_rejected_share}: {faults}. See {rejected_path} for each with its line; mend them, or raise "
            "`max_rejected_share` to go on without them."
        )
    return left


def _limited(config: PrepareConfig, rejected: list[Row]) -> Iterator[Row]:
    """The rows of the first `num_dialogues` dialogues of the source, pairs as the dialogue that they prefer."""
    reader, names = READERS[config.general if config.source == "card" else config.source]
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    ids: set[str] = set()
    used = 0
    for row in reader(config.dataset_name or config.path, rejected, **given):
        if len(ids) == config.num_dialogues and row["dialogue_id"] not in ids:
            del rejected[used:]  # of dialogues after the last one that is used
            return
        ids.add(row["dialogue_id"])
        used = len(rejected)
        if "chosen" in row:
            shared = {key: row[key] for key in ("persona", "dialogue_id")}
            yield {**shared, "messages": [*row["prompt"], *row["chosen"]], "source": "preference", "pair": row}
        else:
            yield row


def _without_leaks(train: list[Row], heldout: list[Row], rejected: list[Row]) -> list[Row]:
    """Held-out rows in which a reply that training nearly has (to nearly the same turn) is context only."""
    ours = duplicates.placed_units(heldout)
    theirs = [unit for _, _, unit in duplicates.placed_units(train)]
    leaked: dict[int, set[int]] = {}
    for _, place, _ in duplicates.leaks(theirs, [unit for _, _, unit in ours]):
        number, at, _ = ours[place]
        leaked.setdefault(number, set()).add(at)
    left = []
    for number, row in enumerate(heldout):
        found = leaked.get(number, set())
        own = {"dialogue_id": row["dialogue_id"], "reason": describe.LEAK_REASON}
        if found and len(found) == len(duplicates.units(row)):
            text = "\n".join(message["content"] for message in row["messages"])
            rejected.append({**own, "dropped": "dialogue", "text": text})
            continue
        rejected += [{**own, "dropped": "reply", "text": row["messages"][at]["content"]} for at in sorted(found)]
        left.append(duplicates.untrained(row, found))
    return left


def _files(
    rows: list[Row], side: str, config: PrepareConfig, counts: dict[str, Any], lenders: list[Row]
) -> dict[str, list[Row]]:
    """The three kinds of rows of one side."""
    pairs = [row["pair"] for row in rows if "pair" in row]
    preferred = [{key: row[key] for key in row if key != "pair"} for row in rows if "pair" in row]
    windows = _windows([row for row in rows if "pair" not in row], config.max_turns, counts)
    most = getattr(config, f"{side}_pairs")
    if len(pairs) < most and windows:
        wanted = most - len(pairs)
        made, counts[f"facts_{side}"] = preferences.persona_pairs(windows, wanted, config.seed, lenders)
        pairs += made
    prompts = preferences.prompts([*windows, *preferred], getattr(config, f"{side}_prompts"), config.seed)
    return {"dialogues": [*windows, *preferred], "preferences": pairs[:most], "prompts": prompts}


def _windows(rows: Iterable[Row], max_turns: int, counts: dict[str, Any]) -> list[Row]:
    """Rows that begin with the user and end with a trained reply, at most `max_turns` long.

    Most chat templates demand the first; behind the last trained reply there is nothing to learn.
    """
    windows = []
    for row in rows:
        messages = row["messages"]
        start = int(messages[0]["role"] == "assistant")
        end = len(messages) - int(messages[-1]["role"] == "user")
        counts["turns_without_reply_or_prompt"] += len(messages) - (end - start)
        counts["dialogues_cut"] += end - start > max_turns
        for at in range(start, end, max_turns):
            places = range(at, min(at + max_turns, end))
            trained = [i for i in places if messages[i]["role"] == "assistant" and messages[i].get("train", True)]
            if trained:
                cut: Row = {key: row[key][at : trained[-1] + 1] for key in ("messages", "candidates") if key in row}
                windows.append({**row, **cut})
    return windows


def _reasons(rejected: Iterable[Row], whole: bool) -> dict[str, int]:
    """How often each reason took a whole dialogue, or else a part of one."""
    return dict(Counter(entry["reason"] for entry in rejected if (entry["dropped"] == "dialogue") == whole))


def _written_dialogues(folder: Path) -> list[Row]:
    return [row for side in SIDES for row in read_jsonl(folder / f"dialogues_{side}.jsonl")]


def _tokenize(model: str | None) -> Callable[[list[str]], list[list[int]]] | None:
    if model is None:
        return None
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError) as error:
        # Nothing else here needs the model, which may not be there before the training.
        logger.warning("`model_name_or_path` %s cannot be read, so tokens are not counted: %s", model, error)
        return None
    return lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]


def _remove_old(folder: Path) -> None:
    """Take away what an earlier run made: its files would be read, and hashed, as this run's."""
    data = [f"{kind}_{side}.jsonl" for kind in KINDS for side in SIDES]
    for name in (*data, *NOT_DATA, "probes.jsonl", "references_train.jsonl", "statistics.json", "statistics.png"):
        (folder / name).unlink(missing_ok=True)
    for left_over in folder.glob(".*.tmp"):  # by a run that was killed in a write
        left_over.unlink()


def main(config: PrepareConfig) -> None:
    """Run the stage inside its folder, with a record."""
    with stage("prepare", config.output_dir, [config], config.seed, config.log_level) as record:
        # Before they are read: what is written to them meanwhile makes the stage anew.
        read = {key: getattr(config, key) for key in ("path", "card")}
        record["sources"] = {key: source_hash(path) for key, path in read.items() if path is not None}
        try:
            record.update(prepare(config))
        except DataError as error:
            raise RunError(str(error)) from error
        statistics = json.loads((Path(config.output_dir) / "statistics.json").read_text())
        Console(stderr=True).print(describe.table(statistics))
        record["result_hash"] = record["data_hash"]


if __name__ == "__main__":
    launch(main, (PrepareConfig,), "prepare")
