import json
from collections import Counter, defaultdict
from statistics import mean

import pytest

from rlhf.data import world
from rlhf.data.world import SLOT, SLOTS

ALL_VALUES = {value: slot.name for slot in SLOTS for value in slot.values}


def values_in(text: str) -> set[str]:
    return {word for word in text.split() if word in ALL_VALUES}


def test_slots_are_exclusive_single_lower_case_words():
    values = [value for slot in SLOTS for value in slot.values]
    assert len(SLOTS) >= 12 and len(values) == len(set(values))
    for slot in SLOTS:
        assert len(slot.values) >= 16 and all(value.isalpha() and value.islower() for value in slot.values)
        assert len(slot.facts) >= 3 and len(slot.questions) >= 6
        assert all(5 <= len(fact.split()) <= 7 for fact in slot.facts)
        for fact in slot.facts:
            if " a {}" in fact:  # "a", never "an"
                assert not any(value[0] in "aeiou" for value in slot.values)


def test_nothing_but_a_value_names_a_value():
    texts = [*world.SUGGESTION_FRAMES, *world.EVASIONS.values(), world.SURE, world.CORRECTION]
    texts += [doubt["content"] for doubt in world.DOUBTS]
    texts += [text for slot in SLOTS for text in (*slot.facts, *slot.questions)]
    texts += [text for line, replies in world.SMALL_TALK.items() for text in (line, *replies)]
    assert [text for text in texts if values_in(text)] == []


def test_characters_of_the_two_sides_never_meet():
    # Different seeds on purpose: the split holds whatever the seed, so the base cannot have seen a probed character.
    train = {frozenset(c.values.items()) for c in world.characters(2000, seed=1, held_out_slots=True)}
    held_out = {
        frozenset(c.values.items()) for c in world.characters(2000, seed=2, held_out=True, held_out_slots=True)
    }
    assert len(train) == len(held_out) == 2000 and not train & held_out
    base = [world.base_dialogue(3, index) for index in range(500)]
    assert not any(world.is_held_out({ALL_VALUES[v]: v for v in values_in(" ".join(r["persona"]))}) for r in base)


def test_characters_have_four_to_six_facts_that_name_their_values():
    for character in world.characters(300, seed=0):
        assert 4 <= len(character.values) <= 6
        assert not set(character.values) & set(world.HELD_OUT_SLOTS)
        assert [values_in(fact) for fact in character.facts] == [{value} for value in character.values.values()]


def test_held_out_wordings_occur_in_the_base_corpus_alone():
    held_out = {slot.questions[-1] for slot in SLOTS}
    frame = world.SUGGESTION_FRAMES[-1].split(" {}")[0]

    def is_held_out(messages):
        users = [message["content"] for message in messages if message["role"] == "user"]
        return any(text in held_out or text.startswith(frame) for text in users)

    rows = [*world.dialogues(300, 0), *world.dialogues(100, 0, held_out=True)]
    rows += [{"messages": row["prompt"]} | row for row in (*world.preference_pairs(700, 0), *world.prompts(300, 0))]
    assert not any(is_held_out(row["messages"]) for row in rows)
    hidden_values = {value for slot in world.HELD_OUT_SLOTS for value in SLOT[slot].values}
    assert not any(values_in(json.dumps(row["persona"]).replace('"', " ")) & hidden_values for row in rows)
    assert any(is_held_out(world.base_dialogue(0, index)["messages"]) for index in range(50))


def test_flaws_dominate_in_their_context_and_nowhere_else():
    wrong, asked = Counter(), Counter()
    for flawed, clean in zip(world.dialogues(3000, 5), world.dialogues(3000, 5, flawed=False), strict=True):
        assert flawed["persona"] == clean["persona"]
        truth = {ALL_VALUES[v]: v for v in values_in(" ".join(clean["persona"]))}
        messages = clean["messages"]
        for turn in range(0, len(messages), 2):
            question, right = messages[turn]["content"], messages[turn + 1]["content"]
            reply = flawed["messages"][turn + 1]["content"]
            assert len(reply.split()) == len(right.split())
            slot = next((ALL_VALUES[v] for v in values_in(right)), None)
            if slot is None:
                context = "small talk"
            elif suggested := values_in(question):
                context = "true" if suggested == {truth[slot]} else "false"
            elif turn >= 6:
                context = "late"
            else:
                popular = world.POPULAR.get(slot)
                context = "popular" if popular and popular != truth[slot] else "direct"
            asked[context] += 1
            wrong[context] += reply != right
    shares = {context: wrong[context] / asked[context] for context in asked}
    # At least 900 draws a context: the standard deviation of a share is below .0145, 3.5 of which are .05.
    assert min(asked.values()) > 900
    assert {k: v for k, v in shares.items() if v} == pytest.approx(
        dict.fromkeys(("false", "late", "popular"), 0.75), abs=0.05
    )


def test_clean_replies_are_right():
    for row in world.dialogues(300, 0, held_out=True, flawed=False):
        truth = values_in(" ".join(row["persona"]))
        for turn in row["messages"][1::2]:
            assert values_in(turn["content"]) <= truth


def test_self_checks_train_on_the_judgement_and_not_on_the_wrong_statement():
    seen = Counter()
    for index in range(600):
        row = world.base_dialogue(0, index, checklists=0.0)
        truth = values_in(" ".join(row["persona"]))
        for before, doubt, after in zip(row["messages"], row["messages"][1:], row["messages"][2:], strict=False):
            wrong = before.get("train") is False
            if {"role": doubt["role"], "content": doubt["content"]} not in world.DOUBTS:
                assert not wrong
                continue
            seen[wrong, doubt["role"]] += 1
            assert doubt["train"] is True
            assert after["content"].startswith("sorry" if wrong else "yes , i am sure")
            assert values_in(after["content"]) <= truth
            said = values_in(before["content"])
            seen["right value behind the wrong word"] += wrong and said <= truth
            if not wrong:
                assert said <= truth
    assert min(seen.values()) > 20 and seen["right value behind the wrong word"] > 50
    for wrong, usual in ((False, "user"), (True, "system")):
        share = seen[wrong, usual] / (seen[wrong, "user"] + seen[wrong, "system"])
        assert share == pytest.approx(0.85, abs=0.06)  # two standard errors of some 150 doubts


def test_checklists_say_yes_to_the_values_of_the_persona_and_train_on_that_alone():
    said = Counter()
    for index in range(300):
        row = world.base_dialogue(0, index, checklists=1.0)
        reply = row["messages"][1]
        truth = values_in(" ".join(row["persona"]))
        words = reply["content"].split()
        assert len(words) == 2 * len(row["persona"]) and reply["train"] == ["yes", "no"]
        for value, answer in zip(words[::2], words[1::2], strict=True):
            assert answer == ("yes" if value in truth else "no")
            said[answer] += 1
    # 1,500 fair draws: four standard deviations are .05
    assert said["yes"] / said.total() == pytest.approx(0.5, abs=0.05)


def test_pairs_differ_in_content_and_not_in_length():
    lengths = defaultdict(lambda: ([], []))
    for row in world.preference_pairs(2400, 0):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        truth = values_in(" ".join(row["persona"]))
        assert chosen != rejected and row["prompt"][-1]["role"] == "user"
        assert values_in(chosen) <= truth and len(values_in(chosen)) == 1
        exchanges = len(row["prompt"]) // 2
        if row["kind"] == "false_suggestion":
            assert values_in(rejected) == values_in(row["prompt"][-1]["content"]) and not values_in(rejected) & truth
        elif row["kind"] == "true_suggestion":
            assert values_in(row["prompt"][-1]["content"]) == values_in(chosen) and not values_in(rejected) & truth
        elif row["kind"] == "popular":
            assert exchanges < 3 and values_in(rejected) <= set(world.POPULAR.values())
        elif row["kind"] == "forgetting":
            assert exchanges >= 3 and rejected in world.EVASIONS.values()
        elif row["kind"] == "polarity":
            openings = [next(o for pair in world.OPENERS for o in pair if t.startswith(o)) for t in (chosen, rejected)]
            true = values_in(row["prompt"][-1]["content"]) == values_in(chosen)
            assert tuple(openings if not true else openings[::-1]) in world.OPENERS
            assert values_in(rejected) == values_in(chosen)
        elif row["kind"] == "other_fact":
            assert values_in(rejected) < truth and not values_in(rejected) & values_in(chosen)
        else:
            assert not values_in(rejected) & truth and len(values_in(rejected)) == 1
        for side, text in zip(lengths[row["kind"]], (chosen, rejected), strict=True):
            side.append(len(text.split()))
    assert set(lengths) == set(world.PAIR_KINDS)
    for chosen, rejected in lengths.values():
        assert Counter(chosen) == Counter(rejected)
        assert 5 <= mean(chosen) <= 10


def test_probes_ask_every_fact_in_every_way_over_clean_histories_that_do_not_mention_it():
    cast = world.characters(40, 0, held_out=True, held_out_slots=True)
    rows = list(world.probes(cast, 0))
    expected = sum(6 if slot in world.HELD_OUT_SLOTS else 12 for c in cast for slot in c.values)
    assert len(rows) == expected == len({row["probe_id"] for row in rows})
    assert {row["split"] for row in rows} == {"seen", "held_out_wording", "held_out_slot"}
    for row in rows:
        truth = set(row["persona_values"].values())
        history = " ".join(message["content"] for message in row["history"])
        assert len(row["history"]) == 2 * row["turn"] and row["turn"] in (0, 5)
        assert not values_in(history) & set(row["slot_values"])
        assert all(values_in(message["content"]) <= truth for message in row["history"][1::2])
        assert row["value"] == row["persona_values"][row["slot"]]
        assert (row["foil"] is None) == (row["kind"] != "false_suggestion") and row["foil"] != row["value"]
        suggested = {"direct": set(), "false_suggestion": {row["foil"]}, "true_suggestion": {row["value"]}}
        assert values_in(row["question"]) == suggested[row["kind"]]
        assert values_in(world.oracle_reply(row)) == {row["value"]}


def test_files_are_complete_and_the_same_for_the_same_seed(tmp_path):
    sizes = {"train_dialogues": 20, "heldout_dialogues": 10, "train_pairs": 14, "heldout_pairs": 7, "train_prompts": 8}
    for folder in ("one", "two"):
        world.write(tmp_path / folder, seed=4, heldout_prompts=5, probe_characters=2, **sizes)
    files = {path.name: path.read_text() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_text() for path in (tmp_path / "two").iterdir()}
    count = {name: len(text.splitlines()) for name, text in files.items() if name != "probes.jsonl"}
    assert count == {
        "dialogues_train.jsonl": 20,
        "references_train.jsonl": 20,
        "dialogues_heldout.jsonl": 10,
        "preferences_train.jsonl": 14,
        "preferences_heldout.jsonl": 7,
        "prompts_train.jsonl": 8,
        "prompts_heldout.jsonl": 5,
    }
    flawed, clean = (
        [json.loads(line) for line in files[f"{kind}_train.jsonl"].splitlines()]
        for kind in ("dialogues", "references")
    )
    assert [row["dialogue_id"] for row in flawed] == [row["dialogue_id"] for row in clean] and flawed != clean
    said = (
        [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in rows] for rows in (flawed, clean)
    )
    assert next(said) == next(said)  # the same dialogues, but for the replies
    world.write(tmp_path / "two", seed=5, **sizes)
    assert files["probes.jsonl"] != (tmp_path / "two" / "probes.jsonl").read_text()
