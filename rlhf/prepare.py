"""Make the data of a recipe: dialogues for SFT, preference pairs for reward and DPO, prompts for PPO.

    python rlhf/prepare.py --config recipes/<name>/prepare.yaml [--key value ...]

One process, no GPU, seconds. Writes into `output_dir` {dialogues,preferences,prompts}_{train,heldout}.jsonl; for real
data also rejected.jsonl (what was left out and why), for the persona world also probes.jsonl.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rlhf.data import preferences, sources, world
from rlhf.data.sources import DataError, Row
from rlhf.data.split import split
from rlhf.files import folder_hash, write_jsonl
from rlhf.record import RunError, launch, stage

logger = logging.getLogger(__name__)

KINDS = ("dialogues", "preferences", "prompts")
SIDES = ("train", "heldout")
WORLD_ONLY = ("train_dialogues", "heldout_dialogues", "probe_characters")
FILE_ONLY = ("path", "num_dialogues", "heldout", "max_turns", "max_rejected_share")


@dataclass
class PrepareConfig:
    """Where the data comes from and how much of it there is.

    Attributes:
        output_dir: folder of the stage.
        source: "world" generates data; "synthetic_persona_chat" reads a CSV of that name; "jsonl" reads dialogue rows.
        seed: of the split and of every draw.
        train_pairs: preference pairs for training; real data gives at most as many as it has replies.
        heldout_pairs: preference pairs held out.
        train_prompts: prompts for PPO.
        heldout_prompts: prompts held out.
        train_dialogues: world only.
        heldout_dialogues: world only.
        probe_characters: world only; characters that the probes ask about.
        path: the file to read; not for the world.
        num_dialogues: read until this many dialogues are usable (a conversation read from both sides counts once);
            None reads all. Not for the world.
        heldout: share of the rows to hold out if below 1, else their number; whole characters. Not for the world.
        max_turns: longer dialogues are cut, from the oldest turn on, into rows of this many turns. Not for the world.
        max_rejected_share: share of the dialogues that may be unusable before the stage stops. Not for the world.
        log_level: of the console and of `training.log`.
    """

    output_dir: str
    source: Literal["world", "synthetic_persona_chat", "jsonl"] = "world"
    seed: int = field(default=42, metadata={"range": "[0, inf)"})
    train_pairs: int = field(default=6000, metadata={"range": "[1, inf)"})
    heldout_pairs: int = field(default=700, metadata={"range": "[1, inf)"})
    train_prompts: int = field(default=6000, metadata={"range": "[1, inf)"})
    heldout_prompts: int = field(default=300, metadata={"range": "[1, inf)"})
    train_dialogues: int = field(default=3000, metadata={"range": "[1, inf)"})
    heldout_dialogues: int = field(default=200, metadata={"range": "[1, inf)"})
    probe_characters: int = field(default=100, metadata={"range": "[1, inf)"})
    path: str | None = field(default=None, metadata={"path": True})
    num_dialogues: int | None = field(default=None, metadata={"range": "[1, inf)"})
    heldout: float = field(default=0.2, metadata={"range": "(0, inf)"})
    max_turns: int = field(default=16, metadata={"range": "[2, inf)"})
    max_rejected_share: float = field(default=0.05, metadata={"range": "[0, 1]"})
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        foreign = FILE_ONLY if self.source == "world" else WORLD_ONLY
        changed = [f.name for f in fields(self) if f.name in foreign and getattr(self, f.name) != f.default]
        if changed:
            names = ", ".join(f"`{name}`" for name in changed)
            raise ValueError(
                f"{names} {'has' if len(changed) == 1 else 'have'} no effect with `source` {self.source!r}; remove"
            )
        if self.source != "world" and self.path is None:
            raise ValueError(f"`path` is None; `source` {self.source!r} needs the file to read")
        if self.max_turns % 2:
            raise ValueError(f"`max_turns` must be even, so that a row ends with a reply, got {self.max_turns}")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the files of the stage and count what they hold.

    Returns:
        {"rows": {file: rows}, "data_hash"}; for real data also "dialogues" (usable), "rejected" ({reason: number},
        whole dialogues), "removed" ({reason: number}, lines and stretches of turns within dialogues that were kept),
        "rows_between_sides" (left out by the split), "turns_without_reply_or_prompt" (at the ends of dialogues),
        "dialogues_cut" (rows longer than `max_turns`, made into several).

    Raises:
        DataError: if the file cannot be read, more than `max_rejected_share` of its dialogues are unusable (after
            rejected.jsonl is written, and before anything else is), or too little is left.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {}
    if config.source == "world":
        _remove_old(folder)
        (folder / "rejected.jsonl").unlink(missing_ok=True)
        sizes = {
            f"{side}_{kind}": getattr(config, f"{side}_{kind}")
            for side in SIDES
            for kind in ("dialogues", "pairs", "prompts")
        }
        world.write(folder, config.seed, probe_characters=config.probe_characters, **sizes)
    else:
        sides, counts = _read(config, folder / "rejected.jsonl")
        made = {}
        for name, rows in zip(SIDES, sides, strict=True):
            pairs = preferences.other_persona_pairs(rows, getattr(config, f"{name}_pairs"), config.seed)
            asked = preferences.prompts(rows, getattr(config, f"{name}_prompts"), config.seed)
            for kind, values in zip(KINDS, (rows, pairs, asked), strict=True):
                if not values:
                    raise DataError(f"{config.path}: too few dialogues for any {name} {kind}. Add dialogues.")
                made[f"{kind}_{name}.jsonl"] = values
        _remove_old(folder)
        for file, values in made.items():
            write_jsonl(folder / file, values)
    written = sorted(path for path in folder.glob("*.jsonl") if path.name != "rejected.jsonl")
    counts["rows"] = {path.name: path.read_bytes().count(b"\n") for path in written}
    counts["data_hash"] = folder_hash(folder)
    logger.info("%s", json.dumps(counts))
    return counts


def _read(config: PrepareConfig, rejected_path: Path) -> tuple[tuple[list[Row], list[Row]], dict[str, Any]]:
    """Training and held-out rows of a file, each at most `max_turns` long, and the counts of what was left out."""
    reader = {"synthetic_persona_chat": sources.synthetic_persona_chat, "jsonl": sources.jsonl}[config.source]
    rejected: list[Row] = []
    rows: list[Row] = []
    ids: set[str] = set()
    used = 0
    for row in reader(str(config.path), rejected):
        if len(ids) == config.num_dialogues and row["dialogue_id"] not in ids:
            del rejected[used:]  # of dialogues after the last one that is used
            break
        ids.add(row["dialogue_id"])
        rows.append(row)
        used = len(rejected)
    write_jsonl(rejected_path, rejected)
    reasons = {
        whole: Counter(entry["reason"] for entry in rejected if (entry["dropped"] == "dialogue") == whole)
        for whole in (True, False)
    }
    bad = reasons[True].total()
    if not rows and not bad:
        raise DataError(f"{config.path}: there are no dialogues in it.")
    if bad > config.max_rejected_share * (len(ids) + bad):
        raise DataError(
            f"{config.path}: {bad} of {len(ids) + bad} dialogues are unusable, more than `max_rejected_share` "
            f"{config.max_rejected_share}: {dict(reasons[True])}. See {rejected_path} for each with its line."
        )
    train, heldout, between = split(rows, config.heldout, config.seed)
    counts = {
        "dialogues": len(ids),
        "rejected": dict(reasons[True]),
        "removed": dict(reasons[False]),
        "rows_between_sides": len(between),
        "turns_without_reply_or_prompt": 0,
        "dialogues_cut": 0,
    }
    return (_windows(train, config.max_turns, counts), _windows(heldout, config.max_turns, counts)), counts


def _windows(rows: Iterable[Row], max_turns: int, counts: dict[str, Any]) -> list[Row]:
    """Rows that begin with the user and end with a reply, as most chat templates demand, at most `max_turns` long."""
    windows = []
    for row in rows:
        messages = row["messages"]
        start = int(messages[0]["role"] == "assistant")
        end = len(messages) - int(messages[-1]["role"] == "user")
        counts["turns_without_reply_or_prompt"] += len(messages) - (end - start)
        counts["dialogues_cut"] += end - start > max_turns
        windows += [
            {**row, "messages": messages[at : min(at + max_turns, end)]} for at in range(start, end, max_turns)
        ]
    return windows


def _remove_old(folder: Path) -> None:
    """Take away what an earlier run made: its files would be read, and hashed, as this run's."""
    for name in [*(f"{kind}_{side}.jsonl" for kind in KINDS for side in SIDES), "probes.jsonl"]:
        (folder / name).unlink(missing_ok=True)


def main(config: PrepareConfig) -> None:
    """Run the stage inside its folder, with a record."""
    with stage("prepare", config.output_dir, [config], config.seed, config.log_level) as record:
        try:
            record.update(prepare(config))
        except DataError as error:
            raise RunError(str(error)) from error
        record["result_hash"] = record["data_hash"]


if __name__ == "__main__":
    launch(main, (PrepareConfig,), "prepare")
