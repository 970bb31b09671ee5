"""The ladder of recorded replies on real dialogues, as JSON: people and degenerate bots through `score_rows`.

    python benchmarks/recorded_ladder.py --format convai2 valid_self_original.txt
    python benchmarks/recorded_ladder.py --format synthetic_persona_chat valid.csv

The characters of the file are split in halves: on one half the bots reply to every turn of people's dialogues, the other
half is the human band. A recorded reply answers no probe, so what is compared is `persona_composite`. Its limits are those
of the ladder of probes: every degenerate bot below 0.35, people's replies with another persona below 0.5.
`reworded_fact` and `deaf_reworded` have no limit and are there to say what the composite does not see: a fact in other
words, in every reply or in the first of replies that are people's in other dialogues. The guards are what stops them.
"""

import argparse
import json
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.bots import DEGENERATE, Bot, disown
from evaluation.guards import check, verdict
from evaluation.human_band import People, human_replies
from evaluation.intervals import NUM_RESAMPLES
from evaluation.measures import passes
from evaluation.score import score_rows
from rlhf.data.sources import convai2, synthetic_persona_chat
from rlhf.data.split import characters, split

FORMATS = {"convai2": convai2, "synthetic_persona_chat": synthetic_persona_chat}
SHOWN = (
    "persona_composite",
    "grounded_coverage",
    "contradiction_free_rate",
    "copy_rate",
    "fact_density",
    "keyword_score",
)
PADDING = ("yeah , well , honestly , to tell the truth :", "ha , so as for me , in short :", "and then , as i say :")
OPENINGS = ("oh nice , you know", "ha , by the way", "sure , and well", "same here , though", "i see , so")

Row = dict[str, Any]


def halves(dialogues: Sequence[Row], limit: int, seed: int = 0) -> tuple[list[Row], People]:
    """Replies of at most `limit` dialogues to score, and those of as many others, of other characters, as the band."""
    band, scored, _ = split(list(dialogues), 0.5, seed)
    rng = random.Random(seed)
    sides = [rng.sample(side, min(limit, len(side))) for side in (scored, band)]
    rows, people = ([reply for dialogue in side for reply in human_replies(dialogue)] for side in sides)
    return [row | {"reference": row["response"]} for row in rows], People(people, "the other half", "")


def reworded_fact(row: Row, rng: random.Random) -> str:
    """A fact with a word put in after every second one, so that no run of four words is copied."""
    words = row["fact"].rstrip(" .!").split()
    parts = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    return f"{rng.choice(OPENINGS)} {' really '.join(parts)} ."


def reworded_denial(row: Row, rng: random.Random) -> str:
    """Such a fact under "it is a lie that", "i wish" and the like."""
    return disown(row | {"fact": reworded_fact(row, rng)}, rng)


def padded_fact(row: Row, rng: random.Random) -> str:
    """A fact as it stands, behind words enough to hide it in."""
    return f"{rng.choice(PADDING)} {row['fact']}"


def deaf(rows: Sequence[Row], people: People, opening: Bot, seed: int) -> list[Row]:
    """One fact in the first reply, and otherwise what people said in other dialogues, whatever the user says."""
    rng = random.Random(f"{opening.__name__}/{seed}")
    found = [row | {"response": rng.choice(people.rows)["response"]} for row in rows]
    for first, *_ in passes(rows, range(len(rows))):
        found[first] = found[first] | {"response": opening(_asked(rows[first], rng), rng)}
    return found


def ladder(rows: Sequence[Row], people: People, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Row]:
    """What every bot scores in place of the replies of `rows`: results as of `score_rows`."""
    replies: dict[str, list[Row]] = {"human": list(rows), "other_persona": _with_another_persona(rows, seed)}
    replies |= {
        "deaf": deaf(rows, people, padded_fact, seed),
        "deaf_reworded": deaf(rows, people, reworded_fact, seed),
    }
    for name, bot in {**DEGENERATE, "reworded_denial": reworded_denial, "reworded_fact": reworded_fact}.items():
        rng = random.Random(f"{name}/{seed}")
        replies[name] = [row | {"response": bot(_asked(row, rng), rng)} for row in rows]
    return {name: score_rows(said, seed, 2_000, num_resamples, people) for name, said in replies.items()}


def _asked(row: Mapping[str, Any], rng: random.Random) -> Row:
    """A turn as bots want it: one of the facts stands for the asked one."""
    question = row["history"][-1]["content"] if row["history"] else ""
    return {"kind": "direct", "persona": row["persona"], "question": question, "fact": rng.choice(row["persona"])}


def _with_another_persona(rows: Sequence[Row], seed: int) -> list[Row]:
    """People's replies, each dialogue as if it were another character's."""
    of = characters(rows)
    personas = {number: row["persona"] for number, row in zip(of, rows, strict=True)}
    found = []
    for number, row in zip(of, rows, strict=True):
        rng = random.Random(f"{seed}/{row['dialogue_id']}/{number}")
        found.append(row | {"persona": personas[rng.choice([other for other in personas if other != number])]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--dialogues", type=int, default=250, help="of each half, a speaker of one counted once")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows, people = halves(list(FORMATS[arguments.format](arguments.path, [])), arguments.dialogues)
    table = {}
    for name, results in ladder(rows, people).items():
        metrics, band = results["metrics"], results["run"]["human_band"]
        checks = check({metric: row["value"] for metric, row in metrics.items()}, band["yardstick"])
        table[name] = {
            metric: [round(metrics[metric][key], 3) for key in ("value", "ci_low", "ci_high")] for metric in SHOWN
        } | {"guards": ": ".join(filter(None, verdict(checks)))}
    run = {
        "file": arguments.path.name,
        "replies": len(rows),
        "clusters": results["run"]["clusters"],
        "human_band": band,
    }
    print(json.dumps({**run, "ladder": table}, indent=2))


if __name__ == "__main__":
    main()
