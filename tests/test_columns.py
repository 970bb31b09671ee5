"""Rows to token columns: string prompts and message rows alike, labels, truncation, what is refused."""

import json
import logging

import pytest

from rlhf.chat import render
from rlhf.data.columns import load_rows, preference_columns, prompt_columns, reward_columns, sft_columns, swap_labels
from rlhf.model import load_tokenizer
from rlhf.persona import Persona, render_prompt

PERSONA = ["i have a dog .", "i like pizza ."]
HISTORY = [
    {"role": "user", "content": "hello , how are you ?"},
    {"role": "assistant", "content": "i am a teacher ."},
    {"role": "user", "content": "do you have a cat ?"},
]
YES, NO = "yes , i do .", "no , i have a dog ."
SYSTEM = {"role": "system", "content": "\n".join(PERSONA)}
MESSAGE_ROW = {
    "persona": PERSONA,
    "prompt": HISTORY,
    "chosen": [{"role": "assistant", "content": NO}],
    "rejected": [{"role": "assistant", "content": YES}],
    "reference": NO,
    "kind": "contradiction",
}
STRING_ROW = {
    **{key: MESSAGE_ROW[key] for key in ("reference", "kind")},
    "prompt": render_prompt(Persona(tuple(PERSONA)), HISTORY),
    "chosen": NO,
    "rejected": YES,
}


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def tokenizer(request):
    return load_tokenizer(str(request.getfixturevalue(request.param)))


def ids_and_mask(tokenizer, reply):
    rendered = render([SYSTEM, *HISTORY, {"role": "assistant", "content": reply}], tokenizer)
    return rendered["input_ids"], rendered["assistant_mask"]


def completion(tokenizer, reply):
    """Of the byte-level tokenizers: the reply as it stands behind the opening, and the stop token."""
    space = " " if tokenizer.chat_template.startswith("{%- if messages[0]['role'] == 'system' -%}[PERSONA]") else ""
    return tokenizer(space + reply + tokenizer.eos_token, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("columns", [preference_columns, reward_columns, prompt_columns])
def test_string_prompts_and_message_rows_give_the_same_ids(tokenizer, columns):
    first, second = (columns([row], tokenizer, 512).to_list()[0] for row in (STRING_ROW, MESSAGE_ROW))
    first.pop("row", None), second.pop("row", None)
    assert first == second
    assert any(first.values())


def test_a_row_of_text_without_a_reply_has_nothing_to_train_on(tokenizer):
    text = render_prompt(Persona(tuple(PERSONA)), HISTORY[:1])
    for row in ({"messages": text}, {"prompt": text}, {"persona": PERSONA, "messages": HISTORY[:1]}):
        with pytest.raises(ValueError, match="row 2: `messages` has no reply of the assistant to train on"):
            sft_columns([{"persona": PERSONA, "messages": HISTORY[:2]}, row], tokenizer, 512)


def test_labels_are_the_replies_and_their_stop_tokens(tokenizer):
    reply = {"role": "assistant", "content": NO}
    row = sft_columns([{"persona": PERSONA, "messages": [*HISTORY, reply]}], tokenizer, 512)[0]
    trained = [label for label in row["labels"] if label != -100]
    assert trained == completion(tokenizer, "i am a teacher .") + completion(tokenizer, NO)
    assert all(label in (-100, id) for id, label in zip(row["input_ids"], row["labels"], strict=True))


def test_prompt_and_completion_of_a_pair_make_the_dialogue(tokenizer):
    pair = preference_columns([MESSAGE_ROW], tokenizer, 512)[0]
    assert (pair["chosen_ids"], pair["rejected_ids"]) == (completion(tokenizer, NO), completion(tokenizer, YES))
    assert pair["kind"] == "contradiction"
    reward = reward_columns([MESSAGE_ROW], tokenizer, 512)[0]
    assert set(reward) == {"chosen_ids", "rejected_ids", "kind", "length"}
    assert reward["length"] == sum(len(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    for key, reply in (("chosen_ids", NO), ("rejected_ids", YES)):
        whole, mask = ids_and_mask(tokenizer, reply)
        until_stop = whole[: len(mask) - mask[::-1].index(1)]
        assert pair["prompt_ids"] + pair[key] == reward[key] == until_stop


def test_prompts_carry_their_row_and_the_reference(tokenizer):
    rows = [MESSAGE_ROW, {"persona": PERSONA, "prompt": HISTORY, "dialogue_id": "é"}]
    first, second = prompt_columns(rows, tokenizer, 512)
    assert first["prompt_ids"] == render([SYSTEM, *HISTORY], tokenizer, add_generation_prompt=True)["input_ids"]
    assert first["reference_ids"] == completion(tokenizer, NO) and second["reference_ids"] is None
    assert [json.loads(row["row"]) for row in (first, second)] == rows


def test_dropped_turns_are_counted_and_the_longer_completion_decides(tokenizer, caplog):
    long = {**MESSAGE_ROW, "rejected": [{"role": "assistant", "content": " ".join([YES] * 5)}]}
    whole = len(ids_and_mask(tokenizer, NO)[0])
    with caplog.at_level(logging.WARNING):
        short, kept = preference_columns([long, MESSAGE_ROW], tokenizer, whole)
    assert "1 of 2 rows lost their oldest turns (2 in all)" in caplog.text
    assert short["prompt_ids"] == render([SYSTEM, HISTORY[-1]], tokenizer, add_generation_prompt=True)["input_ids"]
    assert kept["prompt_ids"] == render([SYSTEM, *HISTORY], tokenizer, add_generation_prompt=True)["input_ids"]
    assert len(short["prompt_ids"]) + len(short["rejected_ids"]) <= whole


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (sft_columns, {"persona": PERSONA, "messages": HISTORY}),
        (preference_columns, MESSAGE_ROW),
        (prompt_columns, MESSAGE_ROW),
    ],
)
def test_the_user_s_own_max_length_is_named_where_it_is_too_small(tokenizer, columns, row):
    with pytest.raises(ValueError, match="`max_length` is 16") as caught:
        columns([row], tokenizer, 16)
    assert "Raise `max_length`" in str(caught.value)


@pytest.mark.parametrize(
    "completion",
    [
        [],
        [{"role": "user", "content": YES}],
        [{"role": "assistant", "content": YES}, {"role": "user", "content": "why ?"}],
    ],
)
def test_a_completion_is_one_reply(tokenizer, completion):
    with pytest.raises(ValueError, match="row 2: `rejected` must be one message"):
        preference_columns([MESSAGE_ROW, {**MESSAGE_ROW, "rejected": completion}], tokenizer, 512)


@pytest.mark.parametrize("prompt", [HISTORY[:2], []])
def test_a_prompt_ends_with_the_user_s_turn(tokenizer, prompt):
    for columns in (preference_columns, prompt_columns):
        with pytest.raises(ValueError, match="row 1: `prompt` must end with a turn of the user"):
            columns([{**MESSAGE_ROW, "prompt": prompt}], tokenizer, 512)


def test_rows_are_loaded_up_to_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert load_rows(path) == [{"a": 1}, {"a": 2}]
    assert load_rows(path, limit=1) == [{"a": 1}]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        load_rows(path)
    with pytest.raises(FileNotFoundError, match="`dataset`.*prepare"):
        load_rows(tmp_path / "none.jsonl")


def test_labels_are_swapped_for_a_random_share():
    rows = [{"chosen": number, "rejected": -number, "kind": "k"} for number in range(1, 401)]
    swapped = swap_labels(rows, share=0.25, seed=1)
    wrong = [row["chosen"] < 0 for row in swapped]
    assert 60 <= sum(wrong) <= 140  # 100, five standard deviations of the binomial are 43
    assert [{abs(row["chosen"]), abs(row["rejected"])} for row in swapped] == [{row["chosen"]} for row in rows]
    assert all(row["chosen"] == -row["rejected"] and row["kind"] == "k" for row in swapped)
    assert swapped == swap_labels(rows, share=0.25, seed=1) != swap_labels(rows, share=0.25, seed=2)
    assert swap_labels(rows, share=0.0, seed=1) == rows
    assert all(row["chosen"] < 0 for row in swap_labels(rows, share=1.0, seed=1))


# --- replies that are context only, and the share of rows that may be cut ---------------------------------------------


def test_a_reply_that_is_context_only_is_not_trained(tokenizer):
    untrained = {**HISTORY[1], "train": False}
    reply = {"role": "assistant", "content": NO}
    (row,) = sft_columns(
        [{"persona": PERSONA, "messages": [HISTORY[0], untrained, HISTORY[2], reply]}], tokenizer, 512
    )
    (both,) = sft_columns([{"persona": PERSONA, "messages": [*HISTORY, reply]}], tokenizer, 512)
    assert row["input_ids"] == both["input_ids"]
    assert [label for label in row["labels"] if label != -100] == completion(tokenizer, NO)


def test_turns_behind_the_last_trained_reply_are_left_out(tokenizer):
    rows = [{"persona": PERSONA, "messages": [*HISTORY, {"role": "assistant", "content": NO, "train": False}]},
            {"persona": PERSONA, "messages": HISTORY[:2]}]  # fmt: skip
    first, second = sft_columns(rows, tokenizer, 512)
    assert first == second


def test_a_row_in_which_every_reply_is_context_is_refused(tokenizer):
    rows = [{"messages": HISTORY[:2]}, {"messages": [HISTORY[0], {**HISTORY[1], "train": False}]}]
    with pytest.raises(ValueError, match="row 2: `messages` has no reply of the assistant to train on"):
        sft_columns(rows, tokenizer, 512)


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_a_reply_that_is_context_only_is_neither_chosen_nor_rejected(tokenizer, key):
    row = {**MESSAGE_ROW, key: [{"role": "assistant", "content": YES, "train": False}]}
    with pytest.raises(ValueError, match=f"row 2: `{key}` is a reply with `train` false"):
        preference_columns([MESSAGE_ROW, row], tokenizer, 512)


def test_too_many_cut_rows_are_refused_with_the_lengths_that_would_do(tokenizer):
    reply = {"role": "assistant", "content": NO}
    row = {"persona": PERSONA, "messages": [*HISTORY, reply]}
    longer = {"persona": PERSONA, "messages": [*HISTORY[:2], *HISTORY, reply]}
    one, two = (len(sft_columns([each], tokenizer, 512)[0]["input_ids"]) for each in (row, longer))
    rows = [row, row, row, longer]
    assert len(sft_columns(rows, tokenizer, one, 0.25)) == 4  # one of four, as allowed
    with pytest.raises(ValueError, match=rf"With `max_length` {two} the share is kept, with {two} nothing is cut"):
        sft_columns(rows, tokenizer, one, 0.2)
    with pytest.raises(
        ValueError, match=rf"4 of 4 rows .*With `max_length` {one} the share is kept, with {two} nothing"
    ):
        sft_columns(rows, tokenizer, one - 1, 0.25)


@pytest.mark.parametrize(("folder", "stage"), [("prepare", "prepare"), ("pairs", "pairs"), ("mine", "prepare")])
def test_a_missing_file_names_the_stage_that_makes_it(folder, stage, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"The stage `{stage}` makes it"):
        load_rows(tmp_path / folder / "preferences_train.jsonl")
