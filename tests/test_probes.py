"""The rules of the probes, sentence by sentence; degenerate bots against an oracle; the aggregation by hand."""

import random

import pytest
from scipy import stats

from evaluation.probes import clauses, mentions, persona_consistency, score_reply, why

SLOTS = {
    "pet": (["dog", "cat", "bird", "gold fish"], "i have a {}", "what pet do you have ?"),
    "job": (["teacher", "nurse", "baker"], "i work as a {}", "what do you do for a living ?"),
    "food": (["pizza", "sushi", "soup"], "my favorite food is {}", "what do you like to eat ?"),
    "city": (["paris", "rome", "oslo"], "i live in {}", "where do you live ?"),
}


def make_probes(personas=40):
    """Probe rows of a small world: all slots of each persona, three kinds, at turn 0."""
    rng = random.Random(0)
    for number in range(personas):
        values = {slot: rng.choice(options) for slot, (options, _, _) in SLOTS.items()}
        sentences = {slot: SLOTS[slot][1].format(value) for slot, value in values.items()}
        for slot, value in values.items():
            foil = rng.choice([option for option in SLOTS[slot][0] if option != value])
            yours = SLOTS[slot][1].replace("i ", "you ").replace("my ", "your ")
            for kind, question in {
                "direct": SLOTS[slot][2],
                "false_suggestion": f"so {yours.format(foil)} , right ?",
                "true_suggestion": f"so {yours.format(value)} , right ?",
            }.items():
                yield {
                    "probe_id": f"{number}/{slot}/{kind}",
                    "persona_id": str(number),
                    "persona": [f"{sentence} ." for sentence in sentences.values()],
                    "history": [],
                    "question": question,
                    "kind": kind,
                    "fact_id": f"{number}/{slot}",
                    "slot": slot,
                    "value": value,
                    "foil": foil if kind == "false_suggestion" else None,
                    "slot_values": SLOTS[slot][0],
                    "persona_values": values,
                    "turn": 0,
                    "split": "seen",
                }


def probe(kind, **changes):
    return {
        "probe_id": "p",
        "persona": ["i have a dog .", "i work as a teacher .", "i love pizza .", "i live in rome ."],
        "kind": kind,
        "slot": "pet",
        "value": "dog",
        "foil": "cat" if kind == "false_suggestion" else None,
        "slot_values": ["dog", "cat", "bird", "gold fish"],
        "persona_values": {"pet": "dog", "job": "teacher", "food": "pizza", "city": "rome"},
        **changes,
    }


RIGHT = {
    "direct": [
        "i have a dog .",
        "A Dog!",
        "dogs",
        "my pet is a dog . do you like it ?",
        "i have a dog , not a cat",
        "i don't have a cat , i have a dog .",
        "i do not have a cat but a dog .",
        "i have a dog and i love pizza .",  # one unasked fact is conversation
        "i am a big fan of mine , it is a dog",
        "you know , i have a dog",
        "it is not hard to guess my dog",  # five words before the value, out of the window
    ],
    "false_suggestion": [
        "no , i have a dog .",
        "no i have a dog",
        "No, I don't have a cat. I have a dog.",
        "nope . my pet is a dog .",
        "not really , i have a dog .",
        "not really i have a dog .",
        "actually , i have a dog .",
        "actually i have a dog .",
        "i have a dog , not a cat .",
        "i do not have a cat , i have a dog .",
        "i dont have a cat but a dog",
        "oh no , sorry , it 's a dog .",
        "that 's not right , i have a dog .",
        "of course not , i have a dog",
        "a cat ? no , i have a dog .",
    ],
    "true_suggestion": [
        "yes .",
        "yes , i have a dog .",
        "yes i have a dog and i love pizza",
        "that 's right , i have a dog .",
        "i have a dog .",
        "of course , my dog is great !",
        "sure do",
        "i do !",
        "right , a dog .",
        "yes , i have a dog , not a cat .",
        "actually , yes , i have a dog .",
        "yes , no doubt , i have a dog .",
    ],
}
WRONG = {
    "direct": [
        "",
        "no .",
        "i do not have a dog .",
        "i do n't have a dog",
        "i don’t have a dog .",
        "i never really had a dog .",
        "no , i have a dog .",
        "i have a cat .",
        "i have a dog and a cat .",
        "i have a cat , not a dog",
        "i have a hotdog",  # word boundary
        "do you have a dog ?",
        "you have a dog .",
        "i think you have a dog",
        "i have two dogs .",
        "i hate my dog",
        "i have a dog , i love pizza , i live in rome .",
        "what do you think ?",
        "i have a dog . i do not have a dog .",
    ],
    "false_suggestion": [
        "",
        "no .",
        "i have a dog .",  # does not reject
        "yes , i have a cat .",
        "yes , i have a dog .",
        "yes , no , i have a dog .",
        "actually , yes , i have a dog .",
        "no , i have a bird .",
        "no , i have a cat .",
        "no , i do not have a dog .",
        "no , i have a dog and a cat .",
        "no problem , i have a dog .",
        "no , do you have a dog ?",
        "so you have a cat , right ?",
        "no , i have a dog , i love pizza and i live in rome .",
        "i do not know .",
    ],
    "true_suggestion": [
        "",
        "no .",
        "no , i have a dog .",
        "not really , i have a dog .",
        "actually , i have a dog .",
        "i have a dog , not a cat .",
        "yes , i have a cat .",
        "yes , but i have a cat too .",
        "i do not have a dog .",
        "yes , i do not have a dog .",
        "so you have a dog , right ?",
        "i think you have a dog , correct ?",
        "really ?",
        "i will be right back .",
        "yes , i have a dog , i love pizza and i live in rome .",
    ],
}


@pytest.mark.parametrize(("kind", "reply"), [(kind, reply) for kind, replies in RIGHT.items() for reply in replies])
def test_right_replies(kind, reply):
    assert why(probe(kind), reply) == ""
    assert score_reply(probe(kind), reply) is True


@pytest.mark.parametrize(("kind", "reply"), [(kind, reply) for kind, replies in WRONG.items() for reply in replies])
def test_wrong_replies(kind, reply):
    assert why(probe(kind), reply) != ""
    assert score_reply(probe(kind), reply) is False


def test_why_names_the_reason():
    assert why(probe("direct"), "") == "says nothing; does not assert 'dog'"
    assert why(probe("direct"), "i have a cat .") == "asserts 'cat' instead of 'dog'; does not assert 'dog'"
    assert why(probe("false_suggestion"), "i have a dog") == "does not reject the suggestion 'cat'"
    assert why(probe("true_suggestion"), "no , i have a dog") == "rejects the right suggestion 'dog'"
    assert why(probe("direct"), "a dog . i love pizza . i live in rome .") == "asserts 2 facts that nobody asked for"


def test_values_of_several_words_and_aversions():
    assert score_reply(probe("direct", value="gold fish", slot_values=["fish", "gold fish"]), "i keep a gold fish .")
    assert "fish" in mentions("i keep a fish .", ["fish", "gold fish"])
    hater = {"persona": ["i hate spiders ."], "slot": "fear", "value": "spiders", "slot_values": ["spiders", "snakes"]}
    assert score_reply(probe("direct", **hater), "i hate spiders .")
    # The fact that is asked for says what is no aversion, not the whole persona.
    both = {"persona": ["i have a dog .", "i hate spiders ."], "fact": "i have a dog ."}
    assert score_reply(probe("direct", **both), "i have a dog .")
    assert not score_reply(probe("direct", **both), "i hate my dog .")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("i hate clowns .", True), ("clowns .", True), ("i do not like clowns .", True),
        ("i can not stand clowns .", True), ("i love clowns .", False), ("i do not hate clowns .", False),
        ("i hate snakes .", False),
    ],
)  # fmt: skip
def test_dislikes(reply, right):
    hated = {"fact": "i hate clowns .", "slot": "like", "value": "clowns", "slot_values": ["clowns", "snakes"]}
    assert score_reply(probe("direct", persona=["i hate clowns ."], dislike=True, **hated), reply) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("i have three dogs .", True), ("3 big dogs !", True), ("three .", True), ("two dogs .", False),
        ("i have five dogs .", False), ("dogs .", False), ("three cats .", False),
    ],
)  # fmt: skip
def test_numbers(reply, right):
    three = {"persona": ["i have three dogs ."], "value": "three dogs", "slot": "number of dog"}
    assert score_reply(probe("direct", **three, slot_values=["two dogs"]), reply) is right
    assert not score_reply(probe("true_suggestion", **three, slot_values=["two dogs"]), "yes , i have five dogs .")


def test_denials_that_reach_far():
    assert not score_reply(probe("direct"), "it is not true that in those days i had a dog .")
    assert not score_reply(probe("direct"), "i do not want to keep or to have a dog .")


def test_two_dogs():
    twins = {"persona": ["i have two dogs ."]}
    assert score_reply(probe("direct", **twins), "i have two dogs .")
    assert not score_reply(probe("direct", **twins), "i have three dogs .")


def test_open_slots():
    liked = {"slot": "like", "value": "rye bread", "foil": None, "slot_values": ["rye bread", "tea", "rum"],
             "persona_values": {"like": "rye bread"}, "persona": ["i like rye bread ."]}  # fmt: skip
    closed, opened = probe("direct", **liked), probe("direct", **liked, exclusive=False)
    assert not score_reply(closed, "rye bread , and i like tea .")
    assert score_reply(opened, "rye bread , and i like tea .")  # one unasked thing is conversation
    assert not score_reply(opened, "rye bread , and i like tea and rum .")
    assert score_reply(opened, "bread of rye is what i like .") and not score_reply(opened, "bread .")
    suggested = probe("false_suggestion", **{**liked, "foil": "tea"}, exclusive=False)
    assert not score_reply(suggested, "no , i like rye bread and tea .")


def test_clauses():
    found = clauses("No i don't , it's a DOG-house ; ok ? yes")
    assert [(clause.words, clause.question) for clause in found] == [
        (["no"], False),
        (["i", "do", "not"], False),
        (["it", "s", "a", "dog", "house"], False),
        (["ok"], True),
        (["yes"], False),
    ]


def test_unknown_kind():
    with pytest.raises(
        ValueError, match=r"`kind` = 'riddle'.*known are direct, false_suggestion, true_suggestion, absent, forget"
    ):
        score_reply(probe("riddle"), "hi")


def fact(row, value=None):
    return SLOTS[row["slot"]][1].format(value or row["value"])


RNG = random.Random(1)
BOTS = {
    "silence": lambda row: "",
    "no": lambda row: "no .",
    "recite all": lambda row: " ".join(row["persona"]),
    "recite all after no": lambda row: "no , " + " ".join(row["persona"]),
    "recite one": lambda row: RNG.choice(row["persona"]),
    "recite two": lambda row: " ".join(RNG.sample(row["persona"], 2)),
    "no, value": lambda row: f"no , {fact(row)} .",
    "yes, value": lambda row: f"yes , {fact(row)} .",
    "value alone": lambda row: f"{fact(row)} .",
    "actually, value": lambda row: f"actually , {fact(row)} .",
    "yes and no, value": lambda row: f"yes , no , {fact(row)} .",
    "not the others": lambda row: (
        f"{fact(row)} , " + " , ".join(f"not a {other}" for other in row["slot_values"] if other != row["value"])
    ),
    "agree": lambda row: "yes , that is right !",
    "agree with the words": lambda row: "yes , " + row["question"].replace("so you", "i").replace(" , right ?", " ."),
    "generic question": lambda row: "that is interesting , what about you ?",
    "repeat the user": lambda row: row["question"],
    "all values": lambda row: " and ".join(row["slot_values"]),
}


def headline(bot, rows=None):
    rows = [{**row, "correct": score_reply(row, bot(row)), "decoding": "greedy"} for row in rows or make_probes()]
    return persona_consistency(rows)["metrics"]["persona_consistency"]


@pytest.mark.parametrize("name", BOTS)
def test_degenerate_bots_keep_no_fact(name):
    assert headline(BOTS[name])["value"] <= (0.15 if name == "recite one" else 0.05)


def oracle(row):
    opening = {"direct": "", "false_suggestion": "no , ", "true_suggestion": "yes , "}[row["kind"]]
    return f"{opening}{fact(row)} ."


def test_oracle_keeps_all_facts():
    row = headline(oracle)
    assert (row["value"], row["n"], row["ci_high"], row["unit"]) == (1.0, 160, 1.0, "share of facts")
    exact = (
        stats.binomtest(40, 40).proportion_ci().low
    )  # .912: the 40 personas, not the 160 facts, of which it is .977
    assert row["ci_low"] == pytest.approx(exact, abs=0.01)  # 2,000 resamples: .898 to .921 at 3.3 standard errors
    assert row["higher_is_better"] is True


def test_persona_of_another_is_worthless():
    rows = list(make_probes())
    others = rows[12:] + rows[:12]  # the next persona, same slot and kind
    replies = {row["probe_id"]: oracle(other) for row, other in zip(rows, others, strict=True)}
    same = sum(row["value"] == other["value"] for row, other in zip(rows, others, strict=True)) / len(rows)
    assert headline(lambda row: replies[row["probe_id"]])["value"] == pytest.approx(same)
    assert same < 0.5


def scored(persona, fact_id, corrects, turn=0, split="seen", decoding="greedy"):
    kinds = ("direct", "false_suggestion", "true_suggestion")
    return [
        {
            "probe_id": f"{fact_id}/{kind}/{turn}/{split}",
            "persona_id": persona,
            "fact_id": fact_id,
            "kind": kind,
            "turn": turn,
            "split": split,
            "decoding": decoding,
            "correct": correct,
        }
        for kind, correct in zip(kinds, corrects, strict=True)
    ]


def cell(result, **where):
    found = [row for row in result["breakdown"] if where.items() <= row.items()]
    assert len(found) == 1
    return found[0]


def test_kept_facts_by_hand():
    rows = [
        *scored("a", "a/pet", (True, True, True)),
        *scored("a", "a/pet", (True, False, True), turn=5),
        *scored("a", "a/job", (True, True, False), split="held_out_wording"),
        *scored("b", "b/pet", (True, True, True)),
    ]
    result = persona_consistency(rows)
    assert list(result["metrics"]) == ["persona_consistency"]
    assert result["metrics"]["persona_consistency"]["value"] == 2 / 4
    assert result["metrics"]["persona_consistency"]["n"] == 4
    # a's pet, asked about twice, a's job and b's pet
    assert result["run"] == {"probe_clusters": {"unit": "persona", "n": 2}, "probed_facts": 3}
    everything = {"decoding": "greedy", "kind": "all", "turn": "all", "split": "all"}
    assert cell(result, **everything)["value"] == 2 / 4
    assert cell(result, **everything | {"kind": "direct"})["value"] == 1
    assert cell(result, **everything | {"kind": "false_suggestion"})["value"] == 3 / 4
    assert cell(result, **everything | {"turn": 5})["value"] == 0
    assert cell(result, **everything | {"turn": 0})["value"] == 2 / 3
    assert cell(result, **everything | {"split": "seen"})["value"] == 2 / 3
    held_out = cell(result, **everything | {"split": "held_out_wording"})
    assert (held_out["value"], held_out["n"]) == (0, 1)
    assert not [row for row in result["breakdown"] if (row["turn"], row["split"]) == (5, "held_out_wording")]


def test_samples_of_a_probe_are_averaged_first():
    rows = [
        *scored("a", "a/pet", (True, True, True), decoding="sampled"),
        *scored("a", "a/pet", (False, True, False), decoding="sampled"),
        *scored("b", "b/pet", (True, True, True), decoding="sampled"),
        *scored("b", "b/pet", (True, True, True), decoding="sampled"),
        *scored("b", "b/pet", (True, True, True)),
        *scored("a", "a/pet", (True, True, False)),
    ]
    metrics = persona_consistency(rows)["metrics"]
    assert metrics["persona_consistency_sampled"]["value"] == pytest.approx((0.5 * 1 * 0.5 + 1) / 2)
    assert metrics["persona_consistency_sampled"]["n"] == 2
    assert metrics["persona_consistency"]["value"] == 1 / 2


def test_one_persona_is_clustered_by_fact():
    rows = [*scored("a", "a/pet", (True, True, True)), *scored("a", "a/job", (True, True, False))]
    result = persona_consistency(rows)
    assert result["run"]["probe_clusters"] == {"unit": "fact", "n": 2}
    row = result["metrics"]["persona_consistency"]
    exact = stats.binomtest(1, 2).proportion_ci()  # .013 to .987, each within .006 by 2,000 resamples
    assert (row["ci_low"], row["value"], row["ci_high"]) == pytest.approx((exact.low, 0.5, exact.high), abs=0.006)


def test_incomplete_facts_are_all_named():
    rows = [
        *scored("a", "a/pet", (True, True, True))[:2],
        *scored("b", "b/job", (True, None, True)),
        *scored("c", "c/pet", (True, True, True)),
    ]
    with pytest.raises(ValueError) as error:
        persona_consistency(rows)
    message = str(error.value)
    assert "fact 'a/pet' at turn 0 (seen, greedy): no probe true_suggestion" in message
    assert "probe 'b/job/false_suggestion/0/seen'" in message
    assert "c/pet" not in message
    with pytest.raises(ValueError, match="no probe rows"):
        persona_consistency([])
