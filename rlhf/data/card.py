"""A persona card, and the data that make one character of it: SFT rows, preference pairs, prompts and probes.

A card is a YAML or JSON file with `name`, `facts`, `style` and `examples`. Its facts are free English sentences in the
first person, one thing each. `rlhf.data.card_facts` says how each can be asked about, `rlhf.data.card_rows` makes the
rows. What cannot be quoted by a reply stands in the prompt alone; `write` returns and logs each such fact, and each that
is trained but not probed, with its reason. `style` stands in every prompt; only the examples show what it means.

Held out from training: the last wording of every question, the last frame of suggestions, small talk, and
`heldout_facts` of the facts.
"""

import logging
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import ConfigError, did_you_mean, load_yaml
from rlhf.data.card_facts import asked_facts
from rlhf.data.card_rows import ANY_QUESTION, MIN_SMALL_TALK, Cast, Row, small_talk, split_talk
from rlhf.data.sources import DataError
from rlhf.files import write_jsonl
from rlhf.persona import Persona

logger = logging.getLogger(__name__)

GENERAL_SHARE = 0.4  # of the SFT rows: dialogues of other characters, so that the bot does not forget how to chat
KEYS = ("name", "facts", "style", "examples")
MAX_CHARACTERS = 300  # of an item: the whole card stands in every prompt
SHAPES = (
    "facts are English sentences in the first person, one thing each: I am a nurse. I live in Oslo. I have two dogs. "
    "My favourite food is soup. I like hiking. My dog is called Rex."
)
_THIRD_PERSON = re.compile(r"(?:he|she|they)\b(?!.*\b(?:i|me|my|mine|myself)\b)", re.IGNORECASE)


def read(path: str | Path) -> Persona:
    """The persona of a card.

    `facts` is a list of sentences in the first person. An example is a line of the character, or a mapping
    `{user: ..., assistant: ...}` of what is said to it and its reply. `name`, `style` and `examples` may be left out.

    Raises:
        ConfigError: with every problem, each with its key, file and line.
    """
    values, lines = load_yaml(path)
    lines |= _item_lines(path)
    problems: list[str] = []

    def wrong(key: str, value: Any, what: str) -> None:
        where = lines.get(key, lines.get(key.rpartition(".")[0], lines.get(key.partition(".")[0], 1)))
        shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:60]}…"
        problems.append(f"`{key}`: {shown} ({path}:{where}): {what}")

    def text(key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            unquoted = (
                isinstance(value, Mapping) and len(value) == 1 or not isinstance(value, str | Mapping | list | None)
            )
            wrong(key, value, f"must be text that is not blank{'; quote it' if unquoted else ''}")
            return ""
        control = [
            character for character in value if unicodedata.category(character) == "Cc" and character not in "\t\r\n"
        ]
        if control:
            wrong(key, value, f"has the control character {control[0]!r}; delete it")
        if len(value) > MAX_CHARACTERS:
            wrong(key, value, f"has {len(value)} characters, more than {MAX_CHARACTERS}; give each thing its own line")
        return " ".join(value.split())

    def items(key: str) -> list[Any]:
        value = values.get(key, [])
        if not isinstance(value, list) or not value and key in values:
            wrong(key, value, "must be a list, a line `- ...` for each")
            return []
        return value

    for key in values:
        if key not in KEYS:
            wrong(key, values[key], f"no such key{did_you_mean(key, KEYS)}; a card has {', '.join(KEYS)}")
    if "facts" not in values:
        problems.append(f"`facts` ({path}): is missing; a card needs the list of its facts")
    facts: list[str] = []
    for number, fact in enumerate(items("facts")):
        said = text(key := f"facts.{number}", fact)
        if _THIRD_PERSON.match(said):
            wrong(key, fact, "must be in the first person: `I live in Oslo.`, not `He lives in Oslo.`")
        if said and said in facts:
            wrong(key, fact, "is given twice; delete one of them")
        facts.append(said)
    examples = []
    for number, example in enumerate(items("examples")):
        key = f"examples.{number}"
        if not isinstance(example, Mapping):
            examples.append((ANY_QUESTION, text(key, example)))
        elif set(example) != {"user", "assistant"}:
            odd = [name for name in example if name not in ("user", "assistant")]
            hint = did_you_mean(str(odd[0]), ("user", "assistant")) if odd else ""
            wrong(key, dict(example), f"must have the keys user and assistant{hint}")
        else:
            examples.append((text(f"{key}.user", example["user"]), text(f"{key}.assistant", example["assistant"])))
    name, style = (text(key, values[key]) if key in values else None for key in ("name", "style"))
    if problems:
        raise ConfigError(problems)
    return Persona(tuple(facts), name, style, tuple(examples))


def _item_lines(path: str | Path) -> dict[str, int]:
    """The line of each item of the card's lists, as `facts.0`; `load_yaml` knows those of keys alone."""
    root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return {
        f"{key.value}.{number}": item.start_mark.line + 1
        for key, value in (root.value if isinstance(root, yaml.MappingNode) else ())
        if isinstance(value, yaml.SequenceNode)
        for number, item in enumerate(value.value)
    }


def write(
    folder: str | Path,
    persona: Persona,
    general: tuple[Sequence[Row], Sequence[Row]],
    seed: int,
    train_dialogues: int = 3000,
    heldout_dialogues: int = 200,
    train_pairs: int = 3000,
    heldout_pairs: int = 300,
    train_prompts: int = 3000,
    heldout_prompts: int = 200,
    heldout_facts: int = 1,
) -> dict[str, Any]:
    """Writes ``{dialogues,preferences,prompts}_{train,heldout}.jsonl`` into ``folder``, and ``probes.jsonl`` where a fact
    can be probed.

    Args:
        folder: Of the stage.
        persona: Of the card.
        general: Training and held-out rows of dialogues between other people, which begin with the user.
        seed: Of every draw.
        train_dialogues: SFT rows; ``GENERAL_SHARE`` of them are general ones with their own personas, as far as there
            are so many.
        heldout_dialogues: The same, held out.
        train_pairs: Preference pairs; half of them are the counterparts'.
        heldout_pairs: The same, held out.
        train_prompts: For PPO.
        heldout_prompts: The same, held out.
        heldout_facts: Probed facts that no training row asks for; they stand in the prompt alone. One is always left.

    Returns:
        {"persona": the card, "facts": {"probed", "held_out": sentences, "not_probed", "left_out": {sentence: reason}},
        "general_dialogues": {side: rows}, "small_talk": {side: exchanges}}.

    Raises:
        DataError: if no fact can be quoted, or the general dialogues have too little small talk.
    """
    folder = Path(folder)
    facts, left = asked_facts(persona)
    if not facts:
        raise DataError(f"`facts`: a reply can quote none of the card's; {SHAPES} What is wrong:{_listed(left)}")
    probed = [fact for fact in facts if fact.probed]
    unseen = random.Random(f"card/facts/{seed}").sample(probed, max(0, min(heldout_facts, len(probed) - 1)))
    counts: dict[str, Any] = {
        "persona": asdict(persona),
        "facts": {
            "probed": [fact.fact for fact in probed],
            "held_out": [fact.fact for fact in unseen],
            "not_probed": {fact.fact: fact.reason for fact in facts if not fact.probed},
            "left_out": left,
        },
        "general_dialogues": {},
        "small_talk": {},
    }
    _log(counts["facts"], heldout_facts)
    talks = split_talk(small_talk(general[0], facts), small_talk(general[1], facts), seed)
    sizes = ((train_dialogues, train_pairs, train_prompts), (heldout_dialogues, heldout_pairs, heldout_prompts))
    for held_out, rows, talk, (dialogues, pairs, prompts) in zip((False, True), general, talks, sizes, strict=True):
        side = "heldout" if held_out else "train"
        if len(talk) < MIN_SMALL_TALK:
            raise DataError(
                f"the {side} side of the general dialogues has {len(talk)} exchanges of small talk that could be "
                f"anybody's, fewer than {MIN_SMALL_TALK}. Give more general dialogues."
            )
        cast = Cast(persona, facts if held_out else [fact for fact in facts if fact not in unseen], talk, held_out)
        rng = random.Random(f"card/general/{held_out}/{seed}")
        others = rng.sample(list(rows), min(len(rows), round(GENERAL_SHARE * dialogues)))
        mixed = [*others, *cast.dialogues(dialogues - len(others), seed)]
        rng.shuffle(mixed)
        write_jsonl(folder / f"dialogues_{side}.jsonl", mixed)
        write_jsonl(folder / f"preferences_{side}.jsonl", cast.pairs(pairs, seed))
        write_jsonl(folder / f"prompts_{side}.jsonl", cast.prompts(prompts, seed))
        counts["general_dialogues"][side], counts["small_talk"][side] = len(others), len(talk)
        if held_out and probed:
            write_jsonl(folder / "probes.jsonl", cast.probes(seed, unseen))
    return counts


def _log(facts: Mapping[str, Any], heldout_facts: int) -> None:
    logger.info("%d facts of the card are probed, the name among them", len(facts["probed"]))
    if len(facts["held_out"]) < heldout_facts:
        logger.warning(
            "%d facts are held out, not `heldout_facts` %d, so that one is left to train on",
            len(facts["held_out"]), heldout_facts,
        )  # fmt: skip
    logger.info("%d held out from training: %s", len(facts["held_out"]), "; ".join(facts["held_out"]))
    for fact, reason in facts["not_probed"].items():
        logger.warning("1 fact is trained, but not probed: %r: %s", fact, reason)
    for fact, reason in facts["left_out"].items():
        logger.warning("1 fact stands in the prompt alone: %r: %s", fact, reason)


def _listed(left: Mapping[str, str]) -> str:
    return "".join(f"\n  - {sentence!r} {reason}" for sentence, reason in left.items())
