"""A persona card, and the data of one character: by hand-written cards, and by the rules that will judge the bot."""

import io
import json
import random
import re
from pathlib import Path

import pytest

from evaluation.contradiction import THRESHOLD, contradicts
from evaluation.fact_probes import questions
from evaluation.probes import score_reply, why
from rlhf.config import ConfigError
from rlhf.data import world
from rlhf.data.audit import check_audit
from rlhf.data.card import read, write
from rlhf.data.card_facts import YOURSELF, asked_facts, suggestion
from rlhf.data.card_rows import small_talk, split_talk
from rlhf.data.sources import DataError
from rlhf.facts import parse_claim
from rlhf.files import read_jsonl
from rlhf.persona import Persona, with_persona
from rlhf.prepare import PrepareConfig, prepare

ROOT = Path(__file__).parents[1]
CONVAI2 = ROOT.parent / "shared" / "data" / "convai2_personachat" / "valid_self_original.txt"
FILES = [f"{kind}_{side}.jsonl" for kind in ("dialogues", "preferences", "prompts") for side in ("train", "heldout")]
SIZES = {
    "train_dialogues": 160, "heldout_dialogues": 60, "train_pairs": 400, "heldout_pairs": 200, "train_prompts": 80,
    "heldout_prompts": 40,
}  # fmt: skip
# Questions and answers about a name, which the persona world does not have.
OF_THE_NAME = "juno name may ask call who am talking anna robert clara henry alice victor emma oscar nora felix"
KEPT_BY_DPO = 0.75  # the recipe with --tiny keeps 0.846: all facts but the name, which its base cannot spell
# As somebody would write them, not in the words of the persona world.
MIRA = Persona(
    (
        "I'm a nurse.",
        "I have two dogs.",
        "I live in Lisbon.",
        "My favourite food is ramen.",
        "I like hiking.",
        "I own a green bicycle.",
        "I don't drink coffee.",
        "Well, life is what it is.",
    ),
    "Mira",
    "short and dry",
    (("How are you?", "Fine. Busy."),),
)
KNIGHT = Persona(
    (
        "I am a knight of the king's guard.",
        "I was born in Thornwood in the year 1142.",
        "My sword is called Dawnbringer.",
        "I serve King Edmund.",
        "I ride a black horse named Tempest.",
        "I lost my left eye in the siege of Harrow.",
        "I hate dragons.",
        "My sister Elaine is a nun.",
        "I never drink wine.",
        "I believe in honour above all.",
    ),
    "Sir Aldric of Thornwood",
    "archaic and courtly",
)
NUMBERS = Persona(
    (
        "I am 45 years old.",
        "I have 3 children.",
        "I have two dogs.",
        "I ran 12 marathons.",
        "My lucky number is 13.",
        "I live in a house with 4 bedrooms.",
        "I work in a hospital.",
        "I wake up at 5:30 every morning.",
    ),
    "Unit 7",
)


def general(count):
    return tuple(list(world.dialogues(count, 5, held_out, flawed=False)) for held_out in (False, True))


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    """The rows of each card, by file."""
    made = {}
    for persona in (MIRA, KNIGHT, NUMBERS):
        folder = tmp_path_factory.mktemp("card")
        counts = write(folder, persona, general(120), seed=1, **SIZES)
        made[persona.name] = (counts, {name: read_jsonl(folder / name) for name in (*FILES, "probes.jsonl")})
    return made


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
    long = "i have a " + "very " * 80 + "old dog"
    path.write_text(
        "nmae: Mira\nname: 7\nstyle: ' '\nfacts:\n  - i have a dog .\n  - i have a dog .\n  - 5\n  -\n"
        '  - my motto: be kind\n  - He lives in Oslo.\n  - "i have a\\x07 cat"\n'
        f"  - {long}\nexamples:\n  - {{usr: hi, assistant: hello}}\n  - {{user: hi, assistant: ''}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read(path)
    odd = {"usr": "hi", "assistant": "hello"}
    expected = [
        f"`nmae`: 'Mira' ({path}:1): no such key; did you mean `name`?; a card has name, facts, style, examples",
        f"`facts.1`: 'i have a dog .' ({path}:6): is given twice; delete one of them",
        f"`facts.2`: 5 ({path}:7): must be text that is not blank; quote it",
        f"`facts.3`: None ({path}:8): must be text that is not blank",
        f"`facts.4`: {{'my motto': 'be kind'}} ({path}:9): must be text that is not blank; quote it",
        (
            f"`facts.5`: 'He lives in Oslo.' ({path}:10): must be in the first person: `I live in Oslo.`, not "
            "`He lives in Oslo.`"
        ),
        f"`facts.6`: 'i have a\\x07 cat' ({path}:11): has the control character '\\x07'; delete it",
        f"`facts.7`: {repr(long)[:60]}… ({path}:12): has 416 characters, more than 300; give each thing its own line",
        f"`examples.0`: {odd} ({path}:14): must have the keys user and assistant; did you mean `user`?",
        f"`examples.1.assistant`: '' ({path}:15): must be text that is not blank",
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


def one(sentence):
    (fact,), left = asked_facts(Persona((sentence,)))
    assert not left
    return fact


@pytest.mark.parametrize(
    ("sentence", "slot", "value", "foil", "question"),
    [
        ("i work as a nurse .", "job", "nurse", "i work as a baker", "what is your job ?"),
        ("I'm a nurse", "job", "nurse", "I'm a baker", "what is your job ?"),
        ("I am a retired engineer.", "job", "engineer", "I work as a baker", "what is your job ?"),
        ("I'm from Lisbon", "origin", "Lisbon", "I'm from Oslo", "where are you from ?"),
        ("i was born in utah .", "birthplace", "utah", "i was born in oslo", "where were you born ?"),
        ("my favourite food is ramen", "favorite food", "ramen", "my favourite food is pizza",
         "what is your favourite food ?"),
        ("Indigo is my favorite color.", "favorite color", "indigo", "my favorite color is blue",
         "what is your favorite color ?"),
        ("I have 3 children.", "number of child", "3", "I have 5 children", "how many children do you have ?"),
        ("I am 34 years old.", "age", "34", "I am 40 years old", "how old are you ?"),
        ("I ran 12 marathons.", "did run", "12", "I ran 14 marathons", "how many marathons did you run ?"),
        ("My lucky number is 13.", "my lucky number", "13", "My lucky number is 15", "what is your lucky number ?"),
        ("I hate dragons.", "like dragons", "dragons", "I love dragons", "how do you feel about dragons ?"),
        ("i enjoy painting my barn .", "like barn", "barn", "i hate painting my barn",
         "how do you feel about painting your barn ?"),
        ("My sword is called Dawn.", "name of sword", "Dawn", "My sword is called Comet", "what is your sword called ?"),
        ("I work in a hospital.", "workplace", "hospital", "I work in a bank", "where do you work ?"),
        ("i have red hair .", "hair", "red", "i have brown hair", "what is your hair like ?"),
    ],
)  # fmt: skip
def test_a_fact_with_foils(sentence, slot, value, foil, question):
    fact = one(sentence)
    assert fact.probed and (fact.slot, fact.value) == (slot, value)
    assert foil in [other.sentence for other in fact.foils] and question in fact.questions
    assert all(value.lower() != other.value.lower() for other in fact.foils)


@pytest.mark.parametrize(
    "sentence",
    [
        "I live in a house.", "i live in the mountains .", "I live in Europe.", "I work in a team.", "I have a headache.",
        "I am allergic to nuts.", "My favourite food is Italian.", "I have one brother.", "My phone number is 555-0199.",
        "I own a red bicycle.", "I am tall.", "I wake up at 5:30.", "I was a nurse.", "i can sing .",
    ],
)  # fmt: skip
def test_nothing_is_denied_that_may_be_so(sentence):
    fact = one(sentence)
    assert not fact.foils and fact.reason == "nothing is known that would rule it out"
    assert fact.kinds() == ("direct", "direct", "true_suggestion")


def test_england_is_around_london():
    assert {foil.value for foil in one("I live in England.").foils} == {
        city.title() for city in world.SLOT["city"].values
    } - {"London"}


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("is this a fact ?", "is a question"),
        ("Life is short.", "does not speak of the character (i, my, me)"),
        ("hi , i am here .", "begins with a greeting or a filler; leave it out"),
        ("I am old. I am tired.", "has more than one sentence; give each its own line"),
        ("I am " + "very " * 30 + "old.", "has more than 25 words; give each thing its own line"),
    ],
)
def test_what_no_reply_can_quote(sentence, reason):
    assert asked_facts(Persona((sentence,))) == ([], {sentence: reason})


def test_what_is_trained_but_not_probed_is_named(rows_of):
    counts, _ = rows_of["Mira"]
    assert counts["facts"]["probed"] == [
        "my name is Mira.", "I'm a nurse.", "I have two dogs.", "I live in Lisbon.", "My favourite food is ramen.",
        "I like hiking.",
    ]  # fmt: skip
    assert counts["facts"]["not_probed"] == {
        "I own a green bicycle.": "nothing is known that would rule it out",
        "I don't drink coffee.": "says what is not so, which word rules cannot judge",
    }
    assert counts["facts"]["left_out"] == {"Well, life is what it is.": "does not speak of the character (i, my, me)"}
    assert len(counts["facts"]["held_out"]) == 1


def test_two_facts_for_one_question():
    facts, _ = asked_facts(Persona(("I like to sing.", "I love to bake rye bread.")))
    assert {fact.reason for fact in facts} == {"its question asks for other facts of the card too"}
    assert all(fact.foils for fact in facts)  # suggestions still tell them apart


def test_a_name_that_is_a_fact_too():
    facts, left = asked_facts(Persona(("My name is Ada.", "I have two cats."), "Ada"))
    assert [fact.slot for fact in facts] == ["name", "number of cat"]
    assert left == {"My name is Ada.": "says what `name` says; delete one of them"}


@pytest.mark.parametrize(
    "sentence",
    [
        "I am 34 years old.", "I am from Utah.", "I work at a zoo.", "I have three cats.", "I have red hair.", "I fear dogs.",
        "I was raised in Peru.", "I am married.", "I speak Danish.", "My father is a judge.", "I drive a tractor.",
        "I met a king.", "My favorite band is Queen.", "I have a parrot.", "I am a vegan.", "I have blue eyes.",
    ],
)  # fmt: skip
def test_wordings_that_the_evaluation_holds_out_are_not_trained(sentence):
    claim = parse_claim(sentence)
    assert claim and questions(claim)[-1] not in one(sentence).questions[:-1]


def test_suggestions_turn_the_sentence_around():
    assert suggestion("My dog likes me") == "your dog likes you"
    assert suggestion("In summer I swim") == "in summer you swim"


# -- small talk ------------------------------------------------------------------------------------------------------


def test_small_talk_could_be_anybodys():
    turns = [
        ("hello there !", "nice to meet you ."),
        ("any pets .", "yes , a parrot ."),  # of the own persona
        ("i saw a cat today .", "how nice !"),  # a foil
        ("tell me what you do .", "i work a lot ."),  # a claim
        ("it gives me heartburn .", "me too !"),
        ("what are you going to do with triplets ?", "getting a nanny ."),  # an answer is its own
        ("how sad .", "good , " + "very " * 30),  # too long
        ("it is late .", "sleep well !"),
        ("my cat died .", "i am sorry to hear that ."),
    ]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    untrained = [{"role": "user", "content": "bye ."}, {"role": "assistant", "content": "see you .", "train": False}]
    rows = [{"persona": ["my pet is a parrot ."], "messages": [*messages, *untrained]}]
    found = small_talk(rows, [one("i have a dog .")])
    assert found == [("hello there !", "nice to meet you ."), ("it is late .", "sleep well !")]


def test_no_small_talk_is_on_both_sides():
    both = [(str(number), "x") for number in range(20)]
    train, heldout = split_talk(both, [*both, ("own", "x")], seed=0)
    assert not set(train) & set(heldout) and len(heldout) == 8 and len(train) == 13 and ("own", "x") in heldout
    assert split_talk(both, [("own", str(n)) for n in range(8)], seed=0)[0] == both


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_prompted_as_the_card_says(rows_of):
    _, rows = rows_of["Mira"]
    own = [row for row in rows["dialogues_train.jsonl"] if row["source"] == "card"]
    assert (len(rows["dialogues_train.jsonl"]), len(own)) == (160, 96)  # two in five are general
    assert {with_persona(row)[0]["content"] for row in own} == {MIRA.system_message()}
    assert {with_persona({**p, "messages": p["history"]})[0]["content"] for p in rows["probes.jsonl"]} == {
        MIRA.system_message()
    }
    example = {"role": "assistant", "content": "Fine. Busy."}
    assert any(example in row["messages"] for row in own)
    assert not any(example in row["messages"] for row in rows["dialogues_heldout.jsonl"])


@pytest.mark.parametrize("persona", [MIRA, KNIGHT, NUMBERS], ids=lambda persona: persona.name)
def test_right_replies_are_right_and_rejected_ones_wrong_by_the_rules(rows_of, persona):
    """The judge is the evaluation's, which knows nothing of how the rows were made."""
    _, rows = rows_of[persona.name]
    judged = {}
    for prompt in (*rows["prompts_train.jsonl"], *rows["prompts_heldout.jsonl"]):
        probe = {**prompt, "persona_values": {prompt["slot"]: prompt["value"]}}
        assert not why(probe, prompt["reference"]), (prompt["prompt"][-1], prompt["reference"])
        judged[prompt["prompt"][-1]["content"]] = probe
    checked = set()
    for pair in (*rows["preferences_train.jsonl"], *rows["preferences_heldout.jsonl"]):
        probe = judged.get(pair["prompt"][-1]["content"])
        if probe and pair["persona"] == list(persona.statements()):
            assert not why(probe, pair["chosen"][0]["content"]), (probe, pair)
            assert not score_reply(probe, pair["rejected"][0]["content"]), pair
            checked.add((pair["kind"], probe["kind"]))
    assert {kind for kind, _ in checked} == {"value", "polarity"}
    assert {asked for _, asked in checked} == {"direct", "false_suggestion", "true_suggestion"}


@pytest.mark.parametrize("persona", [MIRA, KNIGHT, NUMBERS], ids=lambda persona: persona.name)
def test_no_reply_of_the_character_contradicts_its_card(rows_of, persona):
    """By another judge, on the rows of facts that no probe asks for too."""
    _, rows = rows_of[persona.name]
    for row in rows["dialogues_train.jsonl"]:
        if row["source"] == "card":
            for message in row["messages"]:
                if message["role"] == "assistant":
                    assert contradicts(persona.facts, message["content"]).score < THRESHOLD, message


def test_replies_are_written_as_the_card_is(rows_of):
    _, rows = rows_of["Mira"]
    replies = {row["reference"] for row in rows["prompts_train.jsonl"]}
    assert replies & {"I live in Lisbon.", "I have two dogs.", "I like hiking."}
    assert not any(re.search(r" [.,?!]|^[a-z]", reply) for reply in replies)
    lower = asked_facts(Persona(("i live in rome .",), "juno"))[0]
    assert "oslo" in {foil.value for foil in lower[1].foils}


def test_pairs_come_with_their_counterparts_and_no_cheater_wins(rows_of):
    _, rows = rows_of["Mira"]
    pairs = rows["preferences_train.jsonl"]
    for own, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert own["persona"] == list(MIRA.statements()) and own["prompt"] == other["prompt"]
        changed = [(a, b) for a, b in zip(own["persona"], other["persona"], strict=True) if a != b]
        assert len(changed) == 1
        if own["kind"] != "polarity":
            assert (own["chosen"], own["rejected"]) == (other["rejected"], other["chosen"])
    assert {pair["kind"] for pair in pairs} == {"value", "polarity", "stranger"}
    cheaters = check_audit(pairs, 3, rows["preferences_heldout.jsonl"])
    assert {cheater.accuracy for cheater in cheaters} == {0.5}


def test_what_is_held_out_is_in_no_training_row(rows_of):
    counts, rows = rows_of["Mira"]
    (held_out,) = counts["facts"]["held_out"]
    facts, _ = asked_facts(MIRA)
    fact = next(fact for fact in facts if fact.fact == held_out)
    train = [
        message["content"].lower().replace("?", " ?")
        for name in FILES
        if name.endswith("_train.jsonl")
        for row in rows[name]
        if row["dialogue_id"].startswith("Mira")
        for key in ("messages", "prompt", "chosen", "rejected")
        for message in row.get(key, ())
    ]
    text = "\n".join(train)
    assert len(train) > 500 and "someone told me that" not in text
    assert not [question for question in fact.questions if question in text]
    assert not re.search(rf"\b{fact.value.lower()}\b", text)
    last = {question for fact in facts for question in (fact.questions[-1], YOURSELF[-1])}
    assert not [question for question in last if question in text]
    probes = rows["probes.jsonl"]
    # Six facts by three kinds by two turns, in two wordings, but for the one that was held out.
    assert len(probes) == 5 * 3 * 2 * 2 + 3 * 2
    assert {p["slot"] for p in probes if p["split"] == "held_out_slot"} == {fact.slot}
    assert {(p["turn"], len(p["history"])) for p in probes} == {(0, 0), (5, 10)}


def test_the_same_seed_gives_the_same_files(tmp_path):
    rows = general(60)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, MIRA, rows, seed, **SIZES)
    texts = {name: [(tmp_path / name / file).read_bytes() for file in FILES] for name in "abc"}
    assert texts["a"] == texts["b"] and not [a for a, c in zip(texts["a"], texts["c"], strict=True) if a == c]


@pytest.mark.parametrize("facts", [("I am tall.",), ("i never lie .",), ("we are legion , and i am one .",)])
def test_a_card_whose_facts_cannot_be_probed_is_trained_all_the_same(tmp_path, facts):
    counts = write(tmp_path, Persona(facts), general(60), 0, **SIZES)
    assert not counts["facts"]["probed"] and not (tmp_path / "probes.jsonl").exists()
    pairs = read_jsonl(tmp_path / "preferences_train.jsonl")
    assert {pair["kind"] for pair in pairs} == {"stranger"}
    check_audit(pairs, 0, read_jsonl(tmp_path / "preferences_heldout.jsonl"))


def test_one_probed_fact_is_not_held_out(tmp_path):
    counts = write(tmp_path, Persona(("I have two dogs.",)), general(60), 0, **SIZES)
    assert counts["facts"]["held_out"] == [] and len(read_jsonl(tmp_path / "probes.jsonl")) == 12


def test_no_fact_or_too_little_small_talk(tmp_path):
    with pytest.raises(
        DataError, match=r"can quote none of the card's; facts are English.*\n  - 'hm.' does not speak"
    ):
        write(tmp_path, Persona(("hm.",)), general(20), 0)
    with pytest.raises(DataError, match="the train side of the general dialogues has 0 exchanges of small talk"):
        write(tmp_path, MIRA, ([], []), 0)


def test_cards_of_real_personas_are_accepted(tmp_path):
    """Sixty cards of two personas each; a floor, measured lower by a margin, on how much is probed."""
    if not CONVAI2.is_file():
        pytest.skip(f"{CONVAI2} is not there")
    personas, facts = [], []
    for line in CONVAI2.read_text(encoding="utf-8").splitlines():
        number, _, text = line.partition(" ")
        if number == "1" and facts:
            personas.append(facts)
            facts = []
        if text.startswith("your persona: "):
            facts.append(text.removeprefix("your persona: "))
    random.Random(0).shuffle(personas)
    probed = trained = 0
    for number in range(60):
        persona = Persona(tuple(dict.fromkeys(personas[2 * number] + personas[2 * number + 1])), "mira")
        found, left = asked_facts(persona)
        assert len(found) + len(left) == len(persona.facts) + 1 and found[0].probed
        probed += sum(fact.probed for fact in found)
        trained += len(found)
    assert probed / trained > 0.3
    write(tmp_path, persona, general(60), 0, **SIZES)


# -- stage and chat --------------------------------------------------------------------------------------------------


def test_prepare_makes_the_shipped_card(tmp_path):
    card = str(ROOT / "recipes" / "my-character" / "card.yaml")
    counts = prepare(PrepareConfig(str(tmp_path), "card", card=card, **SIZES))
    assert counts["facts"]["left_out"] == {} and counts["facts"]["not_probed"] == {}
    assert counts["rows"]["preferences_train.jsonl"] == 400 and counts["persona"]["name"] == read(card).name
    # What the recipe's base for --tiny was made of; a word of another kind would be a new one to it.
    words = set(world.words())
    assert [fact for fact in read(card).facts if set(fact.split()) <= words] == list(read(card).facts)
    rows = [row for row in read_jsonl(tmp_path / "dialogues_train.jsonl") if row["source"] == "card"]
    said = {word for row in rows for message in row["messages"] for word in message["content"].split()}
    assert said - words <= set(OF_THE_NAME.split())
    # Described is what is trained on: the character's rows beside the general ones.
    sources = json.loads((tmp_path / "statistics.json").read_text())["sources"]["rows"]
    assert sources.keys() == {"card", "world"}


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
    # The base knows the world's facts before any training, so that it is no yardstick.
    assert results["dpo"]["value"] >= KEPT_BY_DPO
    monkeypatch.setattr("sys.stdin", io.StringIO("what is your job ?\n"))
    main(["chat", str(root / "dpo")])
    shown = capsys.readouterr().out
    assert "persona: my name is juno." in shown and "gardener" in shown.split("bot: ")[1]
