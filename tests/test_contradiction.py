"""Contradiction by rule: what counts, what does not, and how sure; the labelled pairs are whole."""

import csv
import importlib.util
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from evaluation.contradiction import THRESHOLD, contradiction, contradicts, statements
from rlhf.data.sources import convai2

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "convai2_personachat" / "valid_self_original.txt"

CONTRADICT = [
    ("i like opera .", "i hate opera .", "affirms and denies the same"),
    ("i do not drink tea .", "i drink tea .", "affirms and denies the same"),
    ("i am afraid of wasps .", "i love wasps .", "affirms and denies the same"),
    ("i have no pets .", "my dog is lazy .", "has none, and has one"),
    ("i can't drive .", "i drive a tractor .", "cannot, and does"),
    ("I live in Lyon.", "i live in oslo with my aunt", "another home"),
    ("i am a plumber .", "i work as a judge .", "another job"),
    ("my dad is a farmer .", "my father was a pilot .", "another job of a parent"),
    ("my favourite colour is teal .", "ochre is my favorite color .", "another favorite color"),
    ("i have two cats .", "my three cats sleep all day .", "another number of cat"),
    ("i am 31 years old .", "i'm in my fifties", "another age"),
    ("i am in the third grade .", "i have been retired for years .", "another age"),
    ("i am a little girl .", "i work at a bank .", "another age"),
    ("i'm a single mom .", "my husband is a judge .", "another marital status"),
    ("i am a guy who sings .", "i am a tall woman .", "another gender"),
    ("i have long black hair .", "i have short black hair .", "another hair length"),
    ("i have green eyes .", "my brown eyes are tired .", "another eyes"),
    ("i'm a vegetarian .", "i love a good steak .", "eats no meat"),
    ("i am retired .", "i work at the zoo .", "does not work"),
    ("i am rather shy .", "i am an outgoing person .", "is the opposite"),
    ("i like rum but hate tea .", "i love tea .", "affirms and denies the same"),  # the second clause
]
COMPATIBLE = [
    ("i like opera .", "i like jazz ."),
    ("i have a dog .", "i have two cats ."),
    ("i hate opera .", "i hate opera ."),
    ("i live in texas .", "i live in the united states ."),
    ("i live in oslo .", "i live in a cabin ."),
    ("i am an engineer .", "i am a mechanical engineer ."),
    ("i am a nurse .", "i also volunteer as a coach ."),
    ("my father is a farmer .", "my mother is a pilot ."),
    ("my favorite color is teal .", "my favorite band is the clash ."),
    ("i have short hair .", "i have curly hair ."),
    ("i am 34 years old .", "i am in my thirties ."),
    ("i am 45 .", "i have worked since i was sixteen years old ."),
    ("i am a vegetarian .", "i am a vegan ."),
    ("i am in high school .", "i teach high school ."),
    ("two cats live here .", "zzz ."),
    ("i live in oslo .", "do i live in rome ?"),
    ("i am sure you will .", "i am not sure yet ."),
    ("i work at a school .", "i teach third grade ."),
]


@pytest.mark.parametrize(("fact", "statement", "reason"), CONTRADICT)
def test_contradictions(fact, statement, reason):
    verdict = contradiction(fact, statement)
    assert verdict.score >= THRESHOLD and verdict.reason == reason
    assert contradiction(statement, fact).score == verdict.score


@pytest.mark.parametrize(("fact", "statement"), COMPATIBLE)
def test_compatible(fact, statement):
    assert contradiction(fact, statement).score < THRESHOLD
    assert contradiction(statement, fact).score < THRESHOLD


def test_surer_of_an_age_than_of_a_job():
    age = contradiction("i am 31 years old .", "i am 40 years old .")
    job = contradiction("i am a plumber .", "i am a judge .")
    assert 1 >= age.score > job.score >= THRESHOLD


def test_a_reply_is_held_against_every_fact():
    persona = ["i live in lyon .", "i am 31 years old .", "i like opera ."]
    assert contradicts(persona, "hello ! i am 40 years old . i live in rome .").reason == "another age"
    assert contradicts(persona, "hello . do you live in rome ?") == (0.0, "")
    assert contradicts(persona, "") == (0.0, "") == contradicts([], "i live in rome .")


def test_statements_are_sentences_without_questions():
    assert statements("hi . do you swim ? i do !\nreally") == ["hi .", " i do !", "really"]
    # a number whose noun is cut off with what follows once ended the whole scoring
    assert contradicts(["i collect hats and i have over 1000 in my collection ."], "i have two dogs .") == (0.0, "")


def _benchmark():
    spec = importlib.util.spec_from_file_location("contradiction_benchmark", ROOT / "benchmarks" / "contradiction.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_labelled_pairs_are_whole():
    with (ROOT / "benchmarks" / "contradiction_pairs.csv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    parts = {}
    for pair in pairs:
        assert len(pair["left"]) == len(pair["right"]) == 16 and pair["left"] != pair["right"]
        parts.setdefault(pair["part"], []).append(int(pair["contradicts"]))
    assert {part: (len(labels), sum(labels)) for part, labels in parts.items()} == {
        "development": (167, 28), "personas_1": (157, 23), "personas_2": (182, 16), "statements_1": (198, 27),
        "statements_2": (216, 22),
    }  # fmt: skip
    assert len({frozenset((pair["left"], pair["right"])) for pair in pairs}) == len(pairs)


def test_on_pairs_that_the_rules_were_not_written_on():
    if not REAL.is_file():
        pytest.skip(f"{REAL} is not there")
    benchmark = _benchmark()
    texts = {benchmark.sentence_hash(text): text for text in benchmark._sentences(list(convai2(REAL, [])))}
    with benchmark.PAIRS.open(encoding="utf-8") as file:
        pairs = [pair for pair in csv.DictReader(file) if pair["part"] == "statements_2"]
    labels = [int(pair["contradicts"]) for pair in pairs]
    sentences = [(texts[pair["left"]], texts[pair["right"]]) for pair in pairs]
    rules = roc_auc_score(labels, [contradiction(*pair).score for pair in sentences])
    words = roc_auc_score(labels, [benchmark.overlap(*pair) for pair in sentences])
    assert rules > 0.75 and rules > words + 0.15


def test_weights_of_the_bootstrap():
    # Two contradicting pairs above two others: every resample that has both kinds has an AUC of 1.
    found = _benchmark().auc([1, 1, 0, 0], [0.9, 0.8, 0.1, 0.2], [("a", "b"), ("c", "d"), ("a", "c"), ("b", "d")])
    assert found == {"auc": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    assert _benchmark().auc([1, 1], [0.9, 0.8], [("a", "b"), ("c", "d")]) is None
