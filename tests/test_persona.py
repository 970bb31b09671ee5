"""The persona prompt: exact inverses for any text, and errors that say what is missing and where."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.persona import Persona, PromptError, parse_prompt, render_prompt, with_persona

# Pieces that could be mistaken for structure, mixed with arbitrary text.
PIECES = st.sampled_from(
    [
        "[PERSONA]",
        "[DIALOGUE]",
        "[SEP]",
        "[RESPONSE]",
        "[NAME]",
        "[STYLE]",
        "|",
        " | ",
        "\\",
        "\\\\",
        " ",
        "\n",
        "\t",
        "\u00a0",
        "\u2028",
        "[",
    ]
)
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=5)), min_size=1, max_size=8).map("".join).filter(str.strip)


def alternating(turns: list[str]) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": turn} for role, turn in zip(roles, reversed(turns), strict=False)][::-1]


@given(
    st.lists(TEXT, min_size=1, max_size=4), st.none() | TEXT, st.none() | TEXT, st.lists(TEXT, min_size=1, max_size=5)
)
@example(["\\[SEP]", "\\\\|"], None, None, ["ends in a backslash\\", "\\"])
@example([" | "], "[NAME]", "[STYLE] \\[DIALOGUE]", ["[RESPONSE]", " leading and trailing \n"])
def test_parse_inverts_render(facts, name, style, turns):
    persona, messages = Persona(tuple(facts), name, style), alternating(turns)
    assert parse_prompt(render_prompt(persona, messages)) == (persona, messages)


@given(st.lists(st.one_of(PIECES, st.sampled_from([" [DIALOGUE] ", " [SEP] ", "hi"])), max_size=8).map("".join))
def test_render_inverts_parse_for_every_accepted_prompt(middle):
    for text in (
        f"[PERSONA] a [DIALOGUE] {middle} [RESPONSE]",
        f"[PERSONA] {middle} [DIALOGUE] a [RESPONSE]",
        f"[PERSONA] a [STYLE] {middle} [DIALOGUE] a [RESPONSE]",
    ):
        try:
            persona, messages = parse_prompt(text)
        except PromptError:
            continue
        assert render_prompt(persona, messages) == text


def test_a_prompt_by_hand():
    persona, messages = parse_prompt(
        "[PERSONA] i have a dog . | i teach\nmath . [DIALOGUE] hi! [SEP] hello . [SEP] a | b? [RESPONSE]"
    )
    assert persona == Persona(("i have a dog .", "i teach\nmath ."))
    assert messages == [
        {"role": "user", "content": "hi!"},
        {"role": "assistant", "content": "hello ."},
        {"role": "user", "content": "a | b?"},
    ]


def test_an_even_number_of_turns_begins_with_the_assistant():
    _, messages = parse_prompt("[PERSONA] a [DIALOGUE] hello [SEP] hi [RESPONSE]")
    assert [message["role"] for message in messages] == ["assistant", "user"]


def test_a_name_comes_first():
    text = "[NAME] Ada [PERSONA] i write programs . [DIALOGUE] hi [RESPONSE]"
    persona, messages = parse_prompt(text)
    assert persona == Persona(("i write programs .",), "Ada")
    assert persona.system_message() == "my name is Ada.\ni write programs ."
    assert render_prompt(persona, messages) == text


def test_a_style_stands_behind_the_facts():
    text = "[NAME] Ada [PERSONA] i write programs . | i am [ill] [STYLE] short | dry [DIALOGUE] hi [RESPONSE]"
    persona, messages = parse_prompt(text)
    assert persona == Persona(("i write programs .", "i am [ill]"), "Ada", "short | dry")
    assert persona.system_message() == (
        "my name is Ada.\ni write programs .\ni am [ill]\nmy style of speaking: short | dry"
    )
    assert render_prompt(persona, messages) == text


def test_a_row_with_statements_is_prompted_as_the_persona_itself():
    """What prepare writes and what the evaluator and the chat ask with: one system message, byte for byte."""
    persona = Persona(("i write programs .",), "Ada", "dry", (("hi", "hm ."),))
    expected = [{"role": "system", "content": "my name is Ada.\ni write programs .\nmy style of speaking: dry"}, HI]
    assert with_persona({"messages": [HI], "persona": list(persona.statements())}) == expected
    text = render_prompt(persona, [HI])
    assert with_persona({"prompt": text}) == expected
    assert with_persona({"prompt": text, "persona": list(persona.statements())}) == expected
    assert with_persona({"prompt": text, "persona": ["i write programs ."]}) == expected


def test_examples_are_in_no_prompt():
    persona = Persona(("i write programs .",), examples=(("how are you ?", "i compile ."),))
    assert "compile" not in persona.system_message() + render_prompt(persona, [HI])
    assert persona == Persona(("i write programs .",))


def test_quoting_is_one_backslash():
    text = render_prompt(Persona(("a|b", "c\\d")), [{"role": "user", "content": "say [SEP] or \\[SEP]"}])
    assert text == r"[PERSONA] a\|b | c\d [DIALOGUE] say \[SEP] or \\[SEP] [RESPONSE]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "[PERSONA] is missing"),
        ("hello", "[PERSONA] is missing"),
        ("[PERSONA] a [RESPONSE]", "[DIALOGUE] is missing"),
        ("[PERSONA] a [DIALOGUE] b", "[RESPONSE] is missing"),
        ("[PERSONA] a [PERSONA] b [DIALOGUE] c [RESPONSE]", "[PERSONA] occurs 2 times"),
        ("[DIALOGUE] b [PERSONA] a [RESPONSE]", "[DIALOGUE] at character 0 where [PERSONA] is expected"),
        ("[PERSONA] a [SEP] b [DIALOGUE] c [RESPONSE]", "[SEP] at character 12 where [DIALOGUE] is expected"),
        ("[PERSONA] a [DIALOGUE] b [RESPONSE] [SEP]", "[RESPONSE] at character 25 where [SEP] is expected"),
        ("[NAME] a [NAME] b [PERSONA] c [DIALOGUE] d [RESPONSE]", "[NAME] at character 9 where [PERSONA] is expected"),
        ("[PERSONA] a [DIALOGUE] b [RESPONSE] c", "text after [RESPONSE] at character 35"),
        ("x [PERSONA] a [DIALOGUE] b [RESPONSE]", "text before [PERSONA]"),
        ("[PERSONA] [DIALOGUE] b [RESPONSE]", "the persona is empty at character 9"),
        ("[PERSONA]  [DIALOGUE] b [RESPONSE]", "the persona is empty at character 9"),
        ("[PERSONA] a |  | b [DIALOGUE] c [RESPONSE]", "fact 2 of the persona is empty at character 13"),
        ("[PERSONA] a | [DIALOGUE] c [RESPONSE]", "fact 2 of the persona is empty at character 13"),
        ("[PERSONA] a [DIALOGUE] [RESPONSE]", "turn 1 of the dialogue is empty at character 22"),
        ("[PERSONA] a [DIALOGUE] b [SEP] [RESPONSE]", "turn 2 of the dialogue is empty at character 30"),
        ("[NAME] [PERSONA] a [DIALOGUE] b [RESPONSE]", "the name is empty at character 6"),
        ("[PERSONA] a [STYLE] [DIALOGUE] b [RESPONSE]", "the style is empty at character 19"),
        ("[STYLE] a [PERSONA] b [DIALOGUE] c [RESPONSE]", "[STYLE] at character 0 where [PERSONA] is expected"),
        ("[PERSONA] a [STYLE] b [STYLE] c [DIALOGUE] d [RESPONSE]", "[STYLE] at character 22 where [DIALOGUE]"),
        ("[PERSONA] a [DIALOGUE] b [RESPONSE] [STYLE]", "[DIALOGUE] at character 12 where [STYLE] is expected"),
        ("[PERSONA]a [DIALOGUE] b [RESPONSE]", "missing at character 9"),
        ("[PERSONA] a|b [DIALOGUE] c [RESPONSE]", "missing at character 11"),
        ("[PERSONA] a [DIALOGUE] b[RESPONSE]", "missing at character 24"),
    ],
)  # fmt: skip
def test_a_malformed_prompt_is_named(text, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        parse_prompt(text)


@pytest.mark.parametrize(
    ("persona", "messages", "message"),
    [
        (Persona(()), [("user", "a")], "`persona` has no facts"),
        (Persona(("a",)), [], "`messages` is empty"),
        (Persona(("a",)), [("assistant", "a")], "'assistant' where 'user' is expected"),
        (Persona(("a",)), [("user", "a"), ("user", "b")], "message 1 of 2 has the role 'user'"),
        (Persona(("a",)), [("system", "a"), ("user", "b")], "the persona takes the system's place"),
        (Persona(("a",)), [("user", " \n")], "message 1 of 1 is blank"),
        (Persona(("a",)), [("bot", "a")], "known: system, user, assistant"),
    ],
)
def test_what_the_form_cannot_hold_is_refused(persona, messages, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        render_prompt(persona, [{"role": role, "content": content} for role, content in messages])


@pytest.mark.parametrize("arguments", [
        ("a fact",), (("a", " "),), ((1,),), (("a",), ""), (None,), (("a",), None, " "), (("a",), None, 1),
        (("a",), None, None, (("hi", " "),)), (("a",), None, None, ("hi",)),
    ],
)  # fmt: skip
def test_a_persona_with_a_blank_or_wrong_field_is_refused(arguments):
    with pytest.raises(PromptError, match="`facts`|`name`|`style`|`examples`"):
        Persona(*arguments)


HI = {"role": "user", "content": "hi"}


def test_string_row_and_message_row_give_the_same_messages():
    text = "[PERSONA] i have a dog . | i teach . [DIALOGUE] hi [RESPONSE]"
    expected = [{"role": "system", "content": "i have a dog .\ni teach ."}, HI]
    persona = ["i have a dog .", "i teach ."]
    assert with_persona({"prompt": text}) == expected
    assert with_persona({"prompt": text, "persona": persona, "chosen": []}) == expected
    assert with_persona({"prompt": [HI], "persona": persona}) == expected
    assert with_persona({"messages": [HI], "persona": persona}) == expected


@pytest.mark.parametrize(
    "row", [{"messages": [HI]}, {"messages": [HI], "persona": []}, {"messages": [HI], "persona": None}]
)
def test_without_persona_there_is_no_system_message(row):
    assert with_persona(row) == [HI]


def test_the_row_is_not_changed():
    row = {"messages": [dict(HI)], "persona": ["a"]}
    with_persona(row)[1]["content"] = "changed"
    assert row == {"messages": [HI], "persona": ["a"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"persona": ["a"]}, "either `prompt` or `messages`"),
        ({"prompt": [HI], "messages": [HI]}, "either `prompt` or `messages`"),
        ({"prompt": "hi", "persona": ["a"]}, "[PERSONA] is missing"),
        ({"prompt": "[PERSONA] a [DIALOGUE] b [RESPONSE]", "persona": ["c"]}, "keep one"),
        ({"messages": [{"role": "system", "content": "b"}, HI], "persona": ["a"]}, "keep one of the two"),
        ({"messages": [HI], "persona": "a"}, "`facts` must be a tuple of strings"),
        ({"messages": [{"role": "user", "content": None}]}, "must have text as content"),
        ({"messages": [{"role": "user", "text": "a"}]}, "keys role and content only"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(row, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        with_persona(row)
