"""The human band from files and folders, and the ladder of recorded replies in the world and on real dialogues."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.bots import DEGENERATE_LIMIT, OTHER_PERSONA_LIMIT
from evaluation.guards import check, verdict
from evaluation.human_band import People, human_band, human_replies, prepared_people
from evaluation.score import read_people, read_rows, score_rows
from rlhf.data import world
from rlhf.files import write_jsonl

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
REAL = {
    "convai2": DATA / "convai2_personachat" / "valid_self_original.txt",
    "synthetic_persona_chat": DATA / "synthetic_persona_chat" / "valid.csv",
}
spec = importlib.util.spec_from_file_location("recorded_ladder", ROOT / "benchmarks" / "recorded_ladder.py")
recorded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorded)


def talk(name, *replies, persona=("i have a dog .", "i live in oslo .")):
    messages = [{"role": "system", "content": "be kind"}]
    for number, reply in enumerate(replies):
        messages += [{"role": "user", "content": f"line {number} ?"}, {"role": "assistant", "content": reply}]
    return {"persona": list(persona), "messages": messages, "dialogue_id": name}


def people(*dialogues):
    return People([row for dialogue in dialogues for row in human_replies(dialogue)], "talks.jsonl", "0")


def test_replies_of_a_dialogue():
    dialogue = talk("a", "hello", "i have a dog")
    dialogue["messages"][2]["train"] = False
    (row,) = human_replies(dialogue)
    assert row["response"] == "i have a dog" and row["history"][1]["content"] == "hello" and len(row["history"]) == 3
    with pytest.raises(ValueError, match="`messages` must be a list of"):
        human_replies(dialogue | {"messages": "hi"})


def test_band_is_taken_at_as_many_places_as_are_scored():
    many = people(*(talk(str(n), "what ?", "a b c d e", "i have a dog") for n in range(30)))
    last = [human_replies(talk(f"s{n}", "x", "y", "z", persona=["i sing ."]))[-1] for n in range(10)]
    band = human_band(many, last)
    assert (band["replies"], band["dialogues"], band["replies_per_dialogue"]) == (30, 30, {"people": 1, "scored": 1})
    assert band["metrics"]["length_words"]["value"] == 4 and band["metrics"]["question_rate"]["value"] == 0
    # "i have a dog" is 4 words of the persona sentence, all of the reply
    assert band["metrics"]["copy_rate"]["value"] == 1 == band["yardstick"]["copy_rate"]
    everything = human_band(many, [row for n in range(9) for row in human_replies(talk(f"s{n}", "x", "y", "z"))])
    assert everything["replies"] == 90 and everything["metrics"]["question_rate"]["value"] == 1 / 3
    assert (band["source"], band["hash"]) == ("talks.jsonl", "0")


def test_copying_may_reach_the_95th_percentile_of_samples_of_people():
    copies = people(*(talk(str(n), "i live in oslo ." if n % 10 == 0 else "well , hello") for n in range(200)))
    rows = [human_replies(talk(f"s{n}", "x", persona=["i sing ."]))[0] for n in range(50)]
    limit = human_band(copies, rows)["yardstick"]["copy_rate"]
    # the 95th percentile of a binomial of 50 with .1 is 9 (scipy.stats.binom.ppf)
    assert limit == 9 / 50
    assert human_band(copies, rows * 4)["yardstick"]["copy_rate"] < limit  # 200 of them vary less


def test_ead_is_taken_at_as_many_words():
    rng = random.Random(0)
    talks = [talk(str(n), " ".join(f"w{rng.randrange(500)}" for _ in range(8))) for n in range(100)]
    few = [human_replies(talk(f"s{n}", "b c d e f g h i"))[0] for n in range(10)]
    many = [human_replies(talk(f"s{n}", "b c d e f g h i"))[0] for n in range(120)]
    bands = [human_band(people(*talks), rows)["yardstick"]["ead"] for rows in (few, many[:100], many)]
    assert bands[0] > 1.3 * bands[1] and bands[2] is None  # 80 of 500 words are mostly different, 800 are not


def test_dialogues_that_are_scored_are_left_out():
    scored = [row | {"reference": row["response"]} for row in human_replies(talk("a", "hi", "i have a dog"))]
    band = human_band(people(talk("b", "hi", "i have a dog"), talk("c", "hello", "a cat")), scored)
    assert (band["dialogues"], band["dialogues_also_scored"]) == (1, 1)  # whatever they are called
    with pytest.raises(ValueError, match=r"talks.jsonl: none of its 1 dialogues is another than those scored"):
        human_band(people(talk("b", "hi", "i have a dog")), scored)


def test_coverage_does_not_compare_across_lengths():
    short = people(*(talk(str(n), "the dog barks", persona=["i have a dog .", f"i like {n} ."]) for n in range(9)))
    rows = [row for n in range(9) for row in human_replies(talk(f"s{n}", "the dog barks", "well", "so"))]
    result = score_rows(rows, num_resamples=50, people=short)
    assert "grounded_coverage" in result["metrics"] and "persona_composite" not in result["metrics"]
    assert result["run"]["not_scored"]["persona_composite"] == "people have 1.0 replies a dialogue, and 3.0 are scored"
    nobody = people(*(talk(str(n), "hello", persona=[]) for n in range(9)))
    reason = score_rows(rows[::3], num_resamples=50, people=nobody)["run"]["not_scored"]["persona_composite"]
    assert reason == "the replies of people express no persona"


def test_the_generated_references_stand_for_people(tmp_path):
    world.write(tmp_path, seed=1, train_dialogues=5, heldout_dialogues=2, train_pairs=8, heldout_pairs=8,
                train_prompts=2, heldout_prompts=2, probe_characters=1)  # fmt: skip
    assert prepared_people(tmp_path).name == "references_train.jsonl"
    assert read_people(prepared_people(tmp_path)).source == "references_train.jsonl"
    (tmp_path / "references_train.jsonl").unlink()
    assert prepared_people(tmp_path).name == "dialogues_train.jsonl"


def test_command_takes_a_file_of_people(tmp_path, capsys):
    said = [
        "oh , the dog barks",
        "yes",
        "rain here",
        "we met a dog",
        "good",
        "fine",
        "oslo is cold",
        "maybe",
        "ok then",
    ]
    write_jsonl(tmp_path / "people.jsonl", [talk(str(n), f"{said[n]} {n}", said[-n]) for n in range(9)])
    replies = [row for n in range(6) for row in human_replies(talk(f"s{n}", "i have a dog .", "i live in oslo ."))]
    write_jsonl(tmp_path / "replies.jsonl", replies)
    files = [str(tmp_path / "replies.jsonl"), "--output", str(tmp_path / "results.json")]
    main(["score", *files, "--human", str(tmp_path / "people.jsonl"), "--log_level", "error"])
    result, printed = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    assert result["metrics"]["persona_composite"]["value"] == 0  # all copied
    band = result["run"]["human_band"]
    assert (band["source"], len(band["hash"]), result["run"]["config"]["human"]) == (
        "people.jsonl",
        64,
        "people.jsonl",
    )
    assert "NOT COMPARABLE: copy rate above the human 95th percentile" in printed
    assert "People, 18 replies in 9 dialogues of people.jsonl: " in printed
    assert read_rows(tmp_path / "people.jsonl")[0][1]["history"][1]["content"] == "oh , the dog barks 0"


def holds(results):
    """The limits of the ladder."""
    composite = {name: found["metrics"]["persona_composite"]["value"] for name, found in results.items()}
    human, reworded = composite.pop("human"), composite.pop("reworded_fact")  # the latter has no limit
    composite.pop("deaf_reworded")  # nor has this one: the guards are there for it
    for name in ("deaf", "deaf_reworded"):
        assert "uptake" in guard(results, name)[1], name
    # Near 1 with as many dialogues as docs/results.md has; with a few the interval is wide, and must reach it.
    assert human > max(2 * DEGENERATE_LIMIT, reworded)
    assert results["human"]["metrics"]["persona_composite"]["ci_high"] > 0.9
    assert composite.pop("other_persona") < OTHER_PERSONA_LIMIT
    assert len(composite) == 13 and max(composite.values()) < DEGENERATE_LIMIT, composite


def guard(results, name):
    metrics = {metric: row["value"] for metric, row in results[name]["metrics"].items()}
    return verdict(check(metrics, results[name]["run"]["human_band"]["yardstick"]))


def test_the_ladder_in_the_world():
    replies = [
        [reply for dialogue in world.dialogues(count, 5, held_out, flawed=False) for reply in human_replies(dialogue)]
        for count, held_out in ((40, True), (80, False))
    ]
    results = recorded.ladder(replies[0], People(replies[1], "world", ""), num_resamples=50)
    holds(results)
    assert guard(results, "human")[0] == "all pass"
    for name in ("recite_all", "recite_one", "keyword_salad", "deny", "silence", "generic_question"):
        assert guard(results, name)[0] == "NOT COMPARABLE", name


@pytest.mark.parametrize("kind", REAL)
def test_the_ladder_on_real_dialogues(kind):
    if not REAL[kind].is_file():
        pytest.skip(f"{REAL[kind]} is not there")
    dialogues = list(recorded.FORMATS[kind](REAL[kind], []))
    holds(recorded.ladder(*recorded.halves(dialogues, 40), num_resamples=50))
