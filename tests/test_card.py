"""A persona card, and the data of one character: by hand-written cards, and by the rules that will judge the bot."""

import io
import json
import re
from pathlib import Path

import pytest

from evaluation.probes import score_reply, why
from rlhf.config import ConfigError
from rlhf.data import world
from rlhf.data.audit import check_audit
from rlhf.data.card import asked_facts, read, small_talk, write
from rlhf.data.sources import DataError
from rlhf.files import read_jsonl
from rlhf.persona import Persona, with_persona
from rlhf.prepare import PrepareConfig, prepare

ROOT = Path(__file__).parents[1]
FILES = [f"{kind}_{side}.jsonl" for kind in ("dialogues", "preferences", "prompts") for side in ("train", "heldout")]
SIZES = {
    "train_dialogues": 120, "heldout_dialogues": 60, "train_pairs": 240, "heldout_pairs": 120, "train_prompts": 30,
    "heldout_prompts": 20,
}  # fmt: skip
# As somebody would write it, not in the words of the persona world.
MIRA = Persona(
    (
        "I'm a nurse.",
        "I have two dogs.",
        "I live in Lisbon.",
        "My favourite food is sushi.",
        "I like hiking.",
        "I like green tea.",
        "I don't drink coffee.",
        "Well, life is what it is.",
    ),
    "Mira",
    "short and dry",
    (("How are you?", "Fine. Busy."),),
)


def general(count):
    return tuple(list(world.dialogues(count, 5, held_out, flawed=False)) for held_out in (False, True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    rows = (
        [*general(100)[0], {"persona": ["i like old films .", "i like red wine ."], "messages": []}],
        general(100)[1],
    )
    counts = write(folder, MIRA, rows, seed=1, **SIZES)
    return counts, {name: read_jsonl(folder / name) for name in (*FILES, "probes.jsonl")}


# -- the card --------------------------------------------------------------------------------------------------------


def test_a_card_is_read(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text(
        "name: Mira\nstyle: short\nfacts:\n  - I'm a nurse.\n  - i have a   dog .\n"
        "examples:\n  - Fine. Busy.\n  - {user: 'How are you?', assistant: Tired.}\n"
    )
    persona = read(path)
    assert persona == Persona(("I'm a nurse.", "i have a dog ."), "Mira", "short")
    assert persona.examples == (("tell me something .", "Fine. Busy."), ("How are you?", "Tired."))


def test_a_card_may_be_json_and_hold_facts_alone(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"facts": ["i have a dog ."]}, indent=2))
    assert read(path) == Persona(("i have a dog .",))


def test_every_problem_of_a_card_is_named_at_once(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text(
        "nmae: Mira\nname: 7\nstyle: ' '\nfacts:\n  - i have a dog .\n  - i have a dog .\n  - 5\n  -\n"
        "examples:\n  - {usr: hi, assistant: hello}\n  - {user: hi, assistant: ''}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read(path)
    odd = {"usr": "hi", "assistant": "hello"}
    expected = [
        f"`nmae`: 'Mira' ({path}:1): no such key; did you mean `name`?; a card has name, facts, style, examples",
        f"`facts.2`: 5 ({path}:4): must be text that is not blank; quote it",
        f"`facts.3`: None ({path}:4): must be text that is not blank",
        f"`facts`: 'i have a dog .' ({path}:4): is given 2 times; delete all but one",
        f"`examples.0`: {odd} ({path}:9): must have the keys user and assistant; did you mean `user`?",
        f"`examples.1.assistant`: '' ({path}:11): must be text that is not blank",
        f"`name`: 7 ({path}:2): must be text that is not blank; quote it",
        f"`style`: ' ' ({path}:3): must be text that is not blank",
    ]
    assert caught.value.problems == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\n", "`facts` ({path}): is missing"),
        ("facts: []\n", "must be a list, a line `- ...` for each"),
        ("facts: i have a dog\n", "must be a list, a line `- ...` for each"),
        ("facts: [a]\nexamples: hi\n", "`examples`: 'hi' ({path}:2): must be a list"),
        ("facts: [a]\nfacts: [b]\n", "given twice"),
    ],
)
def test_a_card_that_is_no_card(tmp_path, text, message):
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message.format(path=path))):
        read(path)


# -- facts -----------------------------------------------------------------------------------------------------------


def one(sentence, rows=()):
    facts, left = asked_facts(Persona((sentence,)), rows)
    assert not left
    return facts[0]


@pytest.mark.parametrize(
    ("sentence", "slot", "value", "foil", "question", "suggestion"),
    [
        ("i work as a nurse .", "job", "nurse", "baker", "what is your job ?", "you work as a baker"),
        ("I'm a nurse", "job", "nurse", "baker", "what is your job ?", "you're a baker"),
        ("I am an engineer.", "", "", "", "", ""),
        ("I'm from Lisbon", "origin", "Lisbon", "Oslo", "where are you from ?", "you're from Oslo"),
        ("my favourite food is sushi", "food", "sushi", "pizza", "what is your favourite food ?",
         "your favourite food is pizza"),
        ("i have two dogs .", "number of dogs", "two", "three", "how many dogs do you have ?", "you have three dogs"),
        ("i have an old cat .", "pet", "old cat", "dog", "what pet do you have ?", "you have a dog"),
        ("I am 34 years old.", "age", "34", "33", "how old are you ?", "you are 33 years old"),
        ("i practise judo every week .", "sport", "judo", "golf", "what sport do you do ?",
         "you practise golf every week"),
    ],
)  # fmt: skip
def test_a_fact_is_taken_apart(sentence, slot, value, foil, question, suggestion):
    facts, left = asked_facts(Persona((sentence,)), [])
    if not slot:  # a job outside the table, and no general dialogues that could say what else one is
        assert not facts and left == {
            sentence: "no two other values of its kind are known, in the tables or the general dialogues"
        }
        return
    (fact,) = facts
    assert (fact.slot, fact.value) == (slot, value)
    assert foil in fact.foils and value not in fact.foils and question in fact.questions
    assert fact.suggest(foil) == suggestion


def test_foils_come_from_the_general_dialogues_where_no_table_has_any():
    rows = [{"persona": ["i like old films .", "i like the sea .", "i like red wine ."]}]
    fact = one("i like green tea .", rows)
    assert fact.foils == ("old films", "red wine")  # two words as here, and no article
    assert fact.questions[0] == "what do you like ?"
    assert asked_facts(Persona(("i like green tea .",)), [])[0] == []


def test_articles_agree():
    fact = one("I have a dog.")
    assert fact.state("owl") == "I have an owl" and fact.contrast("cat") == "not a cat"
    assert one("I live in Lisbon.").contrast("Oslo") == "not Oslo"


def test_facts_without_a_question_of_their_own_are_left_to_suggestions(made):
    counts, rows = made
    assert counts["facts"]["suggestions_only"] == ["I like green tea."]  # "hiking": nothing else of one word is liked
    reasons = counts["facts"]["left_out"]
    assert set(reasons) == {"I don't drink coffee.", "Well, life is what it is.", "I like hiking."}
    assert reasons["I don't drink coffee."] == "says what is not so, which word rules cannot judge"
    assert counts["facts"]["asked"] == [
        "my name is Mira.", "I'm a nurse.", "I have two dogs.", "I live in Lisbon.", "My favourite food is sushi."
    ]  # fmt: skip
    assert len(counts["facts"]["held_out"]) == 1
    assert not any("green tea" in row["value"] for row in rows["probes.jsonl"])


def test_two_facts_for_one_question():
    rows = [{"persona": ["i like old films .", "i like red wine ."]}]
    facts, _ = asked_facts(Persona(("i like green tea .", "i like long walks .")), rows)
    assert [(fact.slot, fact.questions) for fact in facts] == [("i like (1)", ()), ("i like (2)", ())]


# -- small talk ------------------------------------------------------------------------------------------------------


def test_small_talk_could_be_anybodys():
    facts = [one("i have a dog .")]
    turns = [
        ("hello there !", "nice to meet you ."),
        ("any pets ?", "yes , a parrot ."),  # of the own persona
        ("i saw a cat today .", "how nice !"),  # a foil
        ("what do you do ?", "i work a lot ."),  # a claim
        ("how are you ?", "good , " + "very " * 30),  # too long
        ("it is late .", "sleep well !"),
    ]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    found = small_talk([{"persona": ["my pet is a parrot ."], "messages": messages}], facts)
    assert found == [("hello there !", "nice to meet you ."), ("it is late .", "sleep well !")]


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_prompted_as_the_card_says(made):
    _, rows = made
    own = [row for row in rows["dialogues_train.jsonl"] if row["dialogue_id"].startswith("Mira")]
    assert (len(rows["dialogues_train.jsonl"]), len(own)) == (120, 72)  # two in five are general
    assert {with_persona(row)[0]["content"] for row in own} == {MIRA.system_message()}
    assert {with_persona({**p, "messages": p["history"]})[0]["content"] for p in rows["probes.jsonl"]} == {
        MIRA.system_message()
    }
    assert any({"role": "assistant", "content": "Fine. Busy."} in row["messages"] for row in own)


def test_right_replies_are_right_and_rejected_ones_wrong_by_the_rules(made):
    """The judge is the evaluation's, which knows nothing of how the rows were made."""
    _, rows = made
    judged = {}
    for prompt in (*rows["prompts_train.jsonl"], *rows["prompts_heldout.jsonl"]):
        probe = {**prompt, "persona_values": {prompt["slot"]: prompt["value"]}}
        assert not why(probe, prompt["reference"]), (prompt["prompt"][-1], prompt["reference"])
        judged[prompt["prompt"][-1]["content"]] = probe
    checked = set()
    for pair in (*rows["preferences_train.jsonl"], *rows["preferences_heldout.jsonl"]):
        probe = judged.get(pair["prompt"][-1]["content"])
        if probe and pair["persona"] == list(MIRA.statements()):
            assert not why(probe, pair["chosen"][0]["content"])
            assert not score_reply(probe, pair["rejected"][0]["content"]), pair
            checked.add((pair["kind"], probe["kind"]))
    assert {kind for kind, _ in checked} == {"value", "denial", "polarity"}
    assert {asked for _, asked in checked} == {"direct", "false_suggestion", "true_suggestion"}


def test_replies_are_written_as_the_card_is(made):
    _, rows = made
    replies = {row["reference"] for row in rows["prompts_train.jsonl"]}
    assert replies & {"I'm a nurse.", "I live in Lisbon.", "I have two dogs.", "My name is Mira."}
    assert not any(re.search(r" [.,?!]|^[a-z]", reply) for reply in replies)


def test_pairs_come_with_their_counterparts_and_no_cheater_wins(made):
    _, rows = made
    pairs = rows["preferences_train.jsonl"]
    for own, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert own["persona"] == list(MIRA.statements()) and own["prompt"] == other["prompt"]
        changed = [(a, b) for a, b in zip(own["persona"], other["persona"], strict=True) if a != b]
        assert len(changed) == 1
        if own["kind"] != "polarity":
            assert (own["chosen"], own["rejected"]) == (other["rejected"], other["chosen"])
    cheaters = check_audit(pairs, 3, rows["preferences_heldout.jsonl"])
    assert {cheater.name: cheater.accuracy for cheater in cheaters} == dict.fromkeys(
        ("longer_wins", "shorter_wins", "bag_of_words", "reply_prefix"), 0.5
    )


def test_what_is_held_out_is_in_no_training_row(made):
    counts, rows = made
    (held_out,) = counts["facts"]["held_out"]
    fact = next(fact for fact in asked_facts(MIRA, [])[0] if fact.sentence == held_out)
    train = [
        message["content"].lower()
        for name in FILES
        if name.endswith("_train.jsonl")
        for row in rows[name]
        if row["dialogue_id"].startswith("Mira")
        for message in (
            *row.get("messages", ()),
            *row.get("prompt", ()),
            *row.get("chosen", ()),
            *row.get("rejected", ()),
        )
    ]
    text = "\n".join(train)
    assert len(train) > 500 and "someone told me that" not in text
    assert fact.value.lower() not in text and not [question for question in fact.questions if question in text]
    probes = rows["probes.jsonl"]
    seen = [p for p in probes if p["split"] == "held_out_wording" and p["kind"] == "direct"]
    assert len(seen) == 8 and not [p for p in seen if p["question"].lower().replace("?", " ?") in text]
    # Five facts by three kinds by two turns, in two wordings, but for the one that was held out.
    assert len(probes) == 4 * 3 * 2 * 2 + 3 * 2
    assert {p["slot"] for p in probes if p["split"] == "held_out_slot"} == {fact.slot}
    assert {(p["turn"], len(p["history"])) for p in probes} == {(0, 0), (5, 10)}


def test_the_same_seed_gives_the_same_files(tmp_path):
    rows = general(60)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, MIRA, rows, seed, **SIZES)
    texts = {name: [(tmp_path / name / file).read_bytes() for file in FILES] for name in "abc"}
    assert texts["a"] == texts["b"] and not [a for a, c in zip(texts["a"], texts["c"], strict=True) if a == c]


def test_too_few_facts_or_too_little_small_talk(tmp_path):
    with pytest.raises(DataError, match=r"`facts`: 1 of the card's can be asked .*no rule takes it apart"):
        write(tmp_path, Persona(("i have a dog .", "hm , well .")), general(20), 0)
    with pytest.raises(DataError, match="the train side of the general dialogues has 0 exchanges of small talk"):
        write(tmp_path, MIRA, ([], []), 0)


# -- stage and chat --------------------------------------------------------------------------------------------------


def test_prepare_makes_the_shipped_card(tmp_path):
    card = str(ROOT / "recipes" / "my-character" / "card.yaml")
    counts = prepare(PrepareConfig(str(tmp_path), "card", card=card, **SIZES))
    assert counts["facts"]["left_out"] == {} and counts["facts"]["suggestions_only"] == []
    assert counts["rows"]["preferences_train.jsonl"] == 240 and counts["persona"]["name"] == read(card).name
    # What the recipe's base for --tiny was made of; a word of another kind would be a new one to it.
    words = set(world.words())
    known = [fact for fact in read(card).facts if set(fact.split()) <= words]
    assert known == list(read(card).facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "card"}, "`card` is None"),
        ({"source": "card", "card": "a.yaml", "general": "jsonl"}, "`path` is None; 'jsonl' needs"),
        ({"source": "card", "card": "a.yaml", "num_dialogues": 3}, "`num_dialogues` has no effect"),
        ({"source": "world", "card": "a.yaml"}, "`card` has no effect"),
    ],
)
def test_keys_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PrepareConfig("out", **arguments)


@pytest.mark.slow
def test_from_card_to_chat(tmp_path, capsys, monkeypatch):
    from rlhf.cli import main
    from rlhf.pipeline import run

    monkeypatch.chdir(ROOT)
    root = run(ROOT / "recipes" / "my-character", tiny=True, output_dir=tmp_path / "run")
    results = {
        name: json.loads((root / "evaluate" / name / "results.json").read_text())["metrics"]["persona_consistency"]
        for name in ("base", "dpo", "silence")
    }
    assert results["silence"]["value"] == 0 and results["dpo"]["n"] == 26
    assert results["dpo"]["value"] > results["base"]["value"]
    monkeypatch.setattr("sys.stdin", io.StringIO("what is your job ?\n"))
    main(["chat", str(root / "dpo")])
    shown = capsys.readouterr().out
    assert "persona: my name is juno." in shown and "gardener" in shown.split("bot: ")[1]
