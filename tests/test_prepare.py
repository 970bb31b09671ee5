"""The prepare stage: real dialogues and the world, from a file to the rows that the other stages read."""

import csv
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.sources import DataError
from rlhf.persona import with_persona
from rlhf.prepare import PrepareConfig, main, prepare
from rlhf.record import launch

REAL = Path(__file__).parents[2] / "shared/data/synthetic_persona_chat/valid.csv"
FILES = sorted(
    f"{kind}_{side}.jsonl" for kind in ("dialogues", "preferences", "prompts") for side in ("train", "heldout")
)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def conversation(number: int, turns: int) -> tuple[str, str, str]:
    """Turns of the same form, each with two words of its speaker's persona that nobody else says, the second numbered."""
    rng = random.Random(number)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=18)) + " " for _ in range(2 * turns)]
    lines = (
        f"User {1 + turn % 2}: caf\u00e9 {words[2 * turn]}and so i say that {words[2 * turn + 1][:-1]}{turn} is it"
        " now as all of us here see"
        for turn in range(turns)
    )
    said = [[word for place, word in enumerate(words) if place // 2 % 2 == side] for side in (0, 1)]
    cat, dog = (
        f"I have {pet} n{number}.\nI know {''.join(words)}." for pet, words in zip(("cat", "dog"), said, strict=True)
    )
    return cat, dog, "\n".join(lines)


def write_csv(path: Path, rows: list[tuple[str, str, str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user 1 personas", "user 2 personas", "Best Generated Conversation"), *rows])
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_csv(tmp_path / "chat.csv", [conversation(number, 9) for number in range(20)])


def config(tmp_path: Path, data: str, **changes) -> PrepareConfig:
    return PrepareConfig(str(tmp_path / "out"), "synthetic_persona_chat", **{"path": data, "max_turns": 4, **changes})


def test_files_and_counts(tmp_path, data):
    counts = prepare(config(tmp_path, data, heldout=0.25))
    out = tmp_path / "out"
    beside = ["kept.jsonl", "rejected.jsonl", "statistics.json", "statistics.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, *beside])
    assert counts["rows"] == {name: len(read(out / name)) for name in FILES}
    # 40 dialogues of 9 turns, of one 8 are left (begins with the user, ends with a reply): 2 windows of 4 turns each.
    # 10 of the 40 are held out; a window has 2 replies, each against another persona's, but for those whose most
    # similar ones are taken. A cat rules out no dog, so that no suggestion is false, and none is made.
    pairs = {side: counts["rows"][f"preferences_{side}.jsonl"] for side in ("train", "heldout")}
    assert 40 <= pairs["train"] <= 120 and 10 <= pairs["heldout"] <= 40
    assert counts["rows"] == {
        "dialogues_heldout.jsonl": 20, "dialogues_train.jsonl": 60,
        "preferences_heldout.jsonl": pairs["heldout"], "preferences_train.jsonl": pairs["train"],
        "prompts_heldout.jsonl": 40, "prompts_train.jsonl": 120,
    }  # fmt: skip
    left_out = {key: counts[key] for key in counts if key not in ("rows", "data_hash")}
    assert left_out == {
        "dialogues": 20,
        "rejected": {},
        "removed": {},
        "rows_between_sides": 0,
        "turns_without_reply_or_prompt": 40,
        "dialogues_cut": 40,
        **{
            # "I know" ten words has no rule
            f"facts_{side}": {"facts": number, "without_rule": number // 2, "without_swap": 0, "unusable_share": 0.5}
            for side, number in (("train", 60), ("heldout", 20))
        },
    }
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(name.encode() + b"\0" + (out / name).read_bytes())
    assert counts["data_hash"] == digest.hexdigest()


def test_every_row_renders_user_first_and_ends_with_a_reply(tmp_path, data):
    prepare(config(tmp_path, data))
    for name in FILES:
        for row in read(tmp_path / "out" / name):
            roles = [message["role"] for message in with_persona(row)]
            assert roles[:2] == ["system", "user"]
            assert roles[-1] == ("assistant" if "messages" in row else "user")
            assert len(row.get("messages", [])) <= 4


def test_windows_are_whole_turns_in_order(tmp_path, data):
    prepare(config(tmp_path, data))
    rows = [row for name in FILES[:2] for row in read(tmp_path / "out" / name)]
    cat = [row["messages"] for row in rows if row["persona"][0] == "I have cat n3."]
    turns = [[message["content"].split()[7][-1] for message in messages] for messages in cat]
    assert turns == [["1", "2", "3", "4"], ["5", "6", "7", "8"]]


def test_no_persona_and_no_dialogue_on_both_sides(tmp_path, data):
    prepare(config(tmp_path, data))
    for kind in ("dialogues", "preferences", "prompts"):
        train, heldout = (read(tmp_path / "out" / f"{kind}_{side}.jsonl") for side in ("train", "heldout"))
        for key in ("persona", "dialogue_id"):
            assert not {str(row[key]) for row in train} & {str(row[key]) for row in heldout}


def test_prompts_carry_the_reply_that_follows(tmp_path, data):
    prepare(config(tmp_path, data))
    dialogues = [row["messages"] for name in FILES[:2] for row in read(tmp_path / "out" / name)]
    for side in ("train", "heldout"):
        for row in read(tmp_path / "out" / f"prompts_{side}.jsonl"):
            reply = {"role": "assistant", "content": row["reference"]}
            assert any(messages[: len(row["prompt"]) + 1] == [*row["prompt"], reply] for messages in dialogues)


def test_the_same_seed_gives_the_same_bytes(tmp_path, data):
    first = prepare(config(tmp_path, data))
    again = prepare(PrepareConfig(str(tmp_path / "again"), "synthetic_persona_chat", path=data, max_turns=4))
    other = prepare(PrepareConfig(str(tmp_path / "other"), "synthetic_persona_chat", path=data, max_turns=4, seed=7))
    assert again == first
    assert other["data_hash"] != first["data_hash"]


def test_sizes_are_honoured(tmp_path, data):
    counts = prepare(
        config(tmp_path, data, num_dialogues=12, train_pairs=5, heldout_pairs=4, train_prompts=3, heldout_prompts=2,
               force_audit=True)
    )  # fmt: skip
    assert counts["dialogues"] == 12
    rows = counts["rows"]
    assert [rows[f"preferences_{side}.jsonl"] for side in ("train", "heldout")] == [5, 4]
    assert [rows[f"prompts_{side}.jsonl"] for side in ("train", "heldout")] == [3, 2]


def test_too_many_rejected_dialogues_stop_the_stage(tmp_path):
    bad = ("I ski.", "I teach.", "User 1: hi\nAt the gym")
    data = write_csv(tmp_path / "chat.csv", [bad, bad, *(conversation(number, 5) for number in range(18))])
    message = "2 of 20 dialogues are unusable, more than `max_rejected_share` 0.05: {'unparseable line': 2}"
    with pytest.raises(DataError, match=re.escape(message)):
        prepare(config(tmp_path, data))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]
    assert [entry["line"] for entry in read(tmp_path / "out" / "rejected.jsonl")] == [3, 5]
    assert prepare(config(tmp_path, data, max_rejected_share=0.1))["rejected"] == {"unparseable line": 2}


def test_what_is_left_out_by_rule_does_not_stop_the_stage(tmp_path):
    blank = ("I ski.", "I teach.", "User 1: hi [name]\nUser 2: hello\nUser 1: bye")
    data = write_csv(tmp_path / "chat.csv", [blank] * 5 + [conversation(number, 5) for number in range(20)])
    assert prepare(config(tmp_path, data))["rejected"] == {"placeholder": 5}
    with pytest.raises(DataError, match=re.escape("no dialogues in it that can be used: {'placeholder': 2}")):
        prepare(config(tmp_path, write_csv(tmp_path / "blank.csv", [blank] * 2)))


def test_rejections_after_the_last_dialogue_used_do_not_count(tmp_path):
    bad = ("I ski.", "I teach.", "User 1: hi\nAt the gym")
    data = write_csv(
        tmp_path / "chat.csv", [*(conversation(number, 5) for number in range(10)), bad, conversation(11, 5)]
    )
    assert prepare(config(tmp_path, data, num_dialogues=10))["rejected"] == {}


def test_jsonl_rows(tmp_path, data):
    prepare(config(tmp_path, data))
    rows = [row for name in FILES[:2] for row in read(tmp_path / "out" / name)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepare(PrepareConfig(str(tmp_path / "second"), "jsonl", path=str(path)))
    assert counts["dialogues"] == 20
    assert counts["rows"]["dialogues_train.jsonl"] + counts["rows"]["dialogues_heldout.jsonl"] == len(rows)


def test_the_world_takes_the_place_of_an_earlier_run(tmp_path, data):
    out = tmp_path / "out"
    sizes: dict[str, Any] = {
        f"{side}_{kind}": 6 for side in ("train", "heldout") for kind in ("dialogues", "pairs", "prompts")
    }
    counts = prepare(PrepareConfig(str(out), "world", probe_characters=2, **sizes))
    assert sorted(counts["rows"]) == sorted([*FILES, "probes.jsonl", "references_train.jsonl"])
    assert {counts["rows"][name] for name in FILES} == {6}
    prepare(config(tmp_path, data))
    assert not (out / "probes.jsonl").exists() and not (out / "references_train.jsonl").exists()
    prepare(PrepareConfig(str(out), "world", probe_characters=2, **sizes))
    assert not (out / "rejected.jsonl").exists()


def test_a_file_without_dialogues_is_named(tmp_path):
    with pytest.raises(DataError, match="there are no dialogues in it"):
        prepare(config(tmp_path, write_csv(tmp_path / "empty.csv", [])))


def test_a_failure_leaves_the_old_files(tmp_path, data):
    prepare(config(tmp_path, data))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".jsonl"}
    with pytest.raises(DataError, match="leave rows on both sides"):
        prepare(config(tmp_path, data, heldout=1000))
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".jsonl"}
    assert after == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "jsonl"}, "`path` is None"),
        (
            {"source": "world", "path": "a.csv", "heldout": 0.5},
            "`path`, `heldout` have no effect with `source` 'world'",
        ),
        ({"source": "jsonl", "path": "a", "probe_characters": 3}, "`probe_characters` has no effect"),
        (
            {"source": "convai2", "path": "a", "dataset_name": "a/b", "split": "test", "persona": ["i ski ."]},
            "`dataset_name`, `split`, `persona` have no effect with `source` 'convai2'",
        ),
        ({"source": "messages", "path": "a", "character": "ROMEO"}, "`character` has no effect"),
        ({"source": "jsonl", "path": "a", "max_turns": 5}, "`max_turns` must be even"),
    ],
)
def test_a_contradictory_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PrepareConfig("out", **values)


def test_the_command_writes_a_record_and_names_errors_without_a_traceback(tmp_path, data, monkeypatch, capsys):
    recipe = tmp_path / "prepare.yaml"
    recipe.write_text("source: synthetic_persona_chat\npath: ./chat.csv\nmax_turns: 4\n")
    out = tmp_path / "out"

    def command(*argv: str) -> None:
        monkeypatch.setattr("sys.argv", ["prepare.py", "--config", str(recipe), "--output_dir", str(out), *argv])
        launch(main, (PrepareConfig,), "prepare")

    command()
    record = json.loads((out / "metadata.json").read_text())
    assert (record["stage"], record["status"]) == ("prepare", "done")
    assert record["rows"]["dialogues_train.jsonl"] == len(read(out / "dialogues_train.jsonl"))
    assert record["result_hash"] == record["data_hash"]
    for argv, message in (
        (["--path", str(tmp_path / "none.csv")], "none.csv (No such file or directory)"),
        (["--seed", "x"], "`seed`"),
        (["--max_turns", "3"], "`max_turns` (command line) must be even, so that a row ends with a reply, got 3"),
        (["--source", "wordl"], "`source`"),
        (["--sourc", "world"], "did you mean `source`"),
    ):
        with pytest.raises(SystemExit) as error:
            command(*argv)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert json.loads((out / "metadata.json").read_text())["status"] == "failed"


def test_a_single_character_is_split_by_dialogue_and_has_no_pairs(tmp_path, caplog):
    rng = random.Random(0)
    rows = [
        {"question": f"{''.join(rng.choices('abcdefgh', k=12))} ?", "answer": " ".join(rng.choices(["blue", "dog", "sea",
         "nine", "tall", "oak", "river", "stone"], k=6)) + "."} for _ in range(20)
    ]  # fmt: skip
    path = tmp_path / "faq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepare(
        PrepareConfig(str(tmp_path / "out"), "question_answer", path=str(path), persona=["i know the sea ."])
    )
    assert set(counts["rows"]) == {name for name in FILES if "preferences" not in name}
    # 20 % of 20 dialogues of one reply each
    assert (counts["rows"]["dialogues_train.jsonl"], counts["rows"]["dialogues_heldout.jsonl"]) == (16, 4)
    train, heldout = (read(tmp_path / "out" / f"dialogues_{side}.jsonl") for side in ("train", "heldout"))
    assert not {row["dialogue_id"] for row in train} & {row["dialogue_id"] for row in heldout}
    assert "There are no train pairs" in caplog.text
    assert "cheaters" not in json.loads((tmp_path / "out" / "statistics.json").read_text())


def test_a_leak_is_context_only_and_said(tmp_path):
    """Pairs of dialogues share a long question, each with another short answer: no duplicates, but near enough to leak."""
    rng = random.Random(1)

    def text():
        return " ".join("".join(rng.choices("abcdefghijk", k=6)) for _ in range(8))

    questions = [text() for _ in range(12)]
    rows = []
    for number in range(24):
        contents = [text(), text(), questions[number // 2], ("i ski .", "i sew .")[number % 2]]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        rows.append({"persona": [text()], "messages": messages, "dialogue_id": str(number), "source": "mine"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepare(PrepareConfig(str(tmp_path / "out"), "jsonl", path=str(path), heldout=0.5, force_audit=True))
    train, heldout = (
        {int(row["dialogue_id"]): row for row in read(tmp_path / "out" / f"dialogues_{side}.jsonl")}
        for side in ("train", "heldout")
    )
    across = [number for number in heldout if number ^ 1 in train]
    assert across and counts["removed"] == {"near-duplicate of a training reply": len(across)}
    # the leaked reply is the last one: nothing is left to learn from its exchange
    assert all(len(heldout[number]["messages"]) == (2 if number in across else 4) for number in heldout)
    assert all(len(row["messages"]) == 4 for row in train.values())


def made_up(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghijk", k=6)) for _ in range(count))


def test_pairs_that_are_refused_leave_their_statistics(tmp_path):
    rng = random.Random(2)
    records = [
        {"persona": [f"i know {made_up(rng, 2)} ."], "prompt": f"{made_up(rng, 5)} ?",
         "chosen": made_up(rng, 9), "rejected": made_up(rng, 5)} for _ in range(100)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = PrepareConfig(str(tmp_path / "out"), "preference", path=str(path), heldout=0.3)
    with pytest.raises(DataError, match=r"`longer_wins` 100\.0%.*`force_audit: true` in this stage's file"):
        prepare(settings)
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["cheaters"]["longer_wins"]["accuracy"] == 1.0
    assert (tmp_path / "out" / "statistics.png").is_file()


def test_rows_of_a_file_that_call_themselves_a_world_are_filtered_too(tmp_path):
    rng = random.Random(3)
    rows = []
    for number in range(30):
        contents = [made_up(rng, 8), made_up(rng, 8), made_up(rng, 8), "*** *** ***"]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        rows.append(
            {"persona": [made_up(rng, 3)], "messages": messages, "dialogue_id": str(number), "source": "world"}
        )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepare(PrepareConfig(str(tmp_path / "out"), "jsonl", path=str(path), force_audit=True))
    assert sum(counts["removed"].values()) == 30
    # behind the last reply that is trained on there is nothing
    assert all(len(row["messages"]) == 2 for row in read(tmp_path / "out" / "dialogues_train.jsonl"))


def test_a_model_that_is_not_there_costs_the_token_counts_alone(tmp_path, data, caplog):
    prepare(config(tmp_path, data, model_name_or_path=str(tmp_path / "nowhere")))
    lengths = json.loads((tmp_path / "out" / "statistics.json").read_text())["lengths"]
    assert "reply_characters" in lengths and "reply_tokens" not in lengths
    assert "tokens are not counted" in caplog.text


@pytest.mark.skipif(not REAL.is_file(), reason="needs Synthetic-Persona-Chat's valid.csv in ../shared/data")
def test_200_real_dialogues(tmp_path):
    counts = prepare(PrepareConfig(str(tmp_path / "out"), "synthetic_persona_chat", path=str(REAL), num_dialogues=200))
    assert counts["dialogues"] == 200
    assert counts["rows"]["dialogues_train.jsonl"] > 400
    pairs = read(tmp_path / "out" / "preferences_train.jsonl")
    lengths = [tuple(len(pair[key][0]["content"].split()) for key in ("chosen", "rejected")) for pair in pairs]
    longer = sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in lengths) / len(pairs)
    assert 0.47 < longer < 0.53  # three standard errors of a coin at more than 2,500 pairs
    assert 0.43 < longer < 0.57  # three standard errors of a coin at 500 pairs are 0.067
    assert len(pairs) > 500
