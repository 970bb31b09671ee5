"""The ladder: no bot without a model keeps facts, but for the one that reads its persona."""

import random
from pathlib import Path

import pytest

from evaluation.bots import (
    DEGENERATE,
    DEGENERATE_LIMIT,
    FRAMES,
    ORACLE_FLOOR,
    OTHER_PERSONA_LIMIT,
    bots,
    deny,
    ladder,
    oracle,
)
from evaluation.fact_probes import probes_of
from evaluation.probes import score_reply
from rlhf.data.sources import convai2, synthetic_persona_chat

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = {
    "convai2": (convai2, SHARED / "convai2_personachat" / "valid_self_original.txt"),
    "synthetic_persona_chat": (synthetic_persona_chat, SHARED / "synthetic_persona_chat" / "valid.csv"),
}
PETS = ("a parrot", "a hamster", "two goats", "a tabby cat", "three snakes", "a greyhound")
JOBS = ("plumber", "florist", "midwife", "pilot", "tailor", "judge")
TOWNS = ("Leeds", "Lyon", "Bergen", "Turin", "Ghent", "Porto")
DISHES = ("lentil soup", "ravioli", "dumplings", "fish pie", "goulash", "paella")
COLOURS = ("teal", "crimson", "ochre", "violet", "indigo", "beige")
FEARS = ("thunder", "spiders", "heights", "wasps", "lifts", "clowns")
HATED = ("queues", "fog", "mondays", "onions", "ironing", "traffic")


def personas(count: int = 20) -> dict[str, list[str]]:
    """Characters in free English."""
    made = {}
    for number in range(count):
        draw = random.Random(number).choice
        made[f"p{number}"] = [
            f"I have {draw(PETS)}.",
            f"I'm a {draw(JOBS)}.",
            f"I live in {draw(TOWNS)} with my cousin.",
            f"I love to cook {draw(DISHES)}.",
            f"My favourite colour is {draw(COLOURS)}.",
            f"I am afraid of {draw(FEARS)}.",
            f"I hate {draw(HATED)}.",
        ]
    return made


def check(rows):
    found = {name: result["persona_consistency"]["value"] for name, result in ladder(rows, num_resamples=50).items()}
    assert found.pop("oracle") >= ORACLE_FLOOR
    assert found.pop("wrong_persona") < OTHER_PERSONA_LIMIT
    assert found.keys() == DEGENERATE.keys()
    assert not {name: value for name, value in found.items() if value >= DEGENERATE_LIMIT}
    return found


def test_ladder_on_written_personas():
    rows, coverage = probes_of(personas(), seed=0)
    assert coverage["facts"] == 20 * 7 and coverage["scorable"] > 0.95 * 140  # some find no foil without a shared word
    assert max(check(rows).values()) == 0


@pytest.mark.parametrize("name", REAL)
def test_ladder_on_real_personas(name):
    read, path = REAL[name]
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    different = list(dict.fromkeys(tuple(row["persona"]) for row in read(path, [])))
    chosen = random.Random(0).sample(different, 30)
    rows, coverage = probes_of({str(number): list(persona) for number, persona in enumerate(chosen)}, seed=0)
    assert coverage["scorable"] > 40 and len(rows) > 300
    check(rows)


def test_single_metrics_are_won_and_the_headline_is_not():
    rows, _ = probes_of(personas(6), seed=0)
    parts = {
        name: {row["kind"]: row["value"] for row in result["breakdown"] if row["turn"] == row["split"] == "all"}
        for name, result in ladder(rows, num_resamples=50).items()
    }
    assert parts["agree"]["true_suggestion"] == 1 == parts["no_value"]["false_suggestion"]
    assert parts["agree"]["all"] == parts["no_value"]["all"] == 0


@pytest.mark.parametrize("frame", FRAMES)
def test_no_frame_passes_as_an_answer(frame):
    rows, _ = probes_of(personas(6), seed=0)
    asked = [row for row in rows if row["kind"] in ("direct", "true_suggestion", "false_suggestion")]
    assert len(asked) > 100
    assert not [row["fact"] for row in asked if score_reply(row, frame.format(row["fact"].rstrip(".")))]


def test_replies_by_hand():
    row = {
        "kind": "false_suggestion", "slot": "home", "value": "lyon", "foil": "turin", "persona_id": "a",
        "fact": "I live in Lyon.", "persona": ["I live in Lyon.", "I'm a judge"], "persona_values": {"home": "lyon"},
        "question": "So you live in Turin, right?",
    }  # fmt: skip
    other = {**row, "persona_id": "b", "fact": "I live in Turin.", "persona": ["I live in Turin."],
             "persona_values": {"home": "turin"}}  # fmt: skip
    rng = random.Random(0)
    said = {name: bot(row, rng) for name, bot in bots([row, other]).items()}
    assert said["oracle"] == "no , I live in Lyon." and said["wrong_persona"] == "yes , I live in Turin."
    assert said["recite_all"] == "I live in Lyon. I'm a judge ." and said["silence"] == ""
    assert said["repeat_last_line"] == row["question"] and said["no_value"] == "no , I live in Lyon ."
    assert said["deny"] == "no , i do not live in lyon ."
    assert said["disown"] in [frame.format("I live in Lyon") for frame in FRAMES]
    assert sorted(said["keyword_salad"].split()) == ["Lyon", "judge", "live"]
    assert deny({**row, "fact": "Two dogs own me."}, rng) == "no , it is not true that two dogs own me ."
    world = {**row, "kind": "direct", "persona": ["my home is in lyon .", "i am a judge ."]}
    del world["fact"]
    assert oracle(world, rng) == "my home is in lyon ."  # found by its value
