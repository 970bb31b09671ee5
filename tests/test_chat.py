"""Ids and masks of dialogues, token by token, for byte-level and SentencePiece-like tokenizers and several templates."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.chat import (
    PERSONA_TEMPLATE,
    ChatTemplateError,
    neutralise,
    prepare_tokenizer,
    render,
    render_within,
    stop_token_id,
)
from rlhf.model import load_tokenizer
from rlhf.persona import Persona, render_prompt
from tests.conftest import SENTENCES, ZEPHYR_TEMPLATE, gpt2_tokenizer, llama_tokenizer, qwen2_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "models"
DIALOGUE = [
    {"role": "system", "content": "i have a dog .\ni like pizza ."},
    {"role": "user", "content": "hello , how are you ?"},
    {"role": "assistant", "content": "i am a teacher ."},
    {"role": "user", "content": "do you have a cat ?"},
    {"role": "assistant", "content": "no , i have a dog ."},
]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-1's: "▁" is put in front of the text and of what follows a special token; bytes for unknown characters."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = " ".join(SENTENCES).split()
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    )
    state = json.loads(bpe.to_str())
    vocabulary = state["model"]["vocab"]
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + [c for c in map(chr, range(33, 127))]:
        vocabulary.setdefault(piece, len(vocabulary))
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, chat_template=ZEPHYR_TEMPLATE,
        bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
    )  # fmt: skip


MAKERS = {
    "zephyr": llama_tokenizer,
    "chatml": qwen2_tokenizer,
    "persona": gpt2_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
}
REAL = ("gpt2-tokenizer", "qwen2.5-tokenizer", "tinyllama-zephyr-tokenizer")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: prepare_tokenizer(make()) for name, make in MAKERS.items()}


@pytest.fixture(params=[*MAKERS, *REAL])
def tokenizer(request, tokenizers):
    if request.param in tokenizers:
        return tokenizers[request.param]
    if not (SHARED / request.param).is_dir():
        pytest.skip(f"the real tokenizer {request.param} is not on this machine")
    return tokenizers.setdefault(request.param, load_tokenizer(str(SHARED / request.param)))


def by_pieces(tokenizer, pieces):
    """Ids and mask of text cut by hand into (piece, mask)."""
    rendered = [(tokenizer(piece, add_special_tokens=False)["input_ids"], mask) for piece, mask in pieces]
    return [i for ids, _ in rendered for i in ids], [mask for ids, mask in rendered for _ in ids]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (
            "zephyr",  # pad and stop token are one
            [
                ("<|system|>\ni have a dog .\ni like pizza .</s>\n<|user|>\nhello , how are you ?</s>\n<|assistant|>\n", 0),
                ("i am a teacher .</s>", 1),
                ("\n", 0),
                ("<|user|>\ndo you have a cat ?</s>\n<|assistant|>\n", 0),
                ("no , i have a dog .</s>", 1),
                ("\n", 0),
            ],
        ),
        (
            "chatml",  # the stop token is not the tokenizer's own end of sequence
            [
                ("<|im_start|>system\ni have a dog .\ni like pizza .<|im_end|>\n", 0),
                ("<|im_start|>user\nhello , how are you ?<|im_end|>\n<|im_start|>assistant\n", 0),
                ("i am a teacher .<|im_end|>", 1),
                ("\n<|im_start|>user\ndo you have a cat ?<|im_end|>\n<|im_start|>assistant\n", 0),
                ("no , i have a dog .<|im_end|>", 1),
                ("\n", 0),
            ],
        ),
        (
            "persona",  # no template of its own: the text form
            [
                ("[PERSONA] i have a dog . | i like pizza . [DIALOGUE] hello , how are you ? [RESPONSE]", 0),
                (" i am a teacher .<|endoftext|>", 1),
                (" [SEP] do you have a cat ? [RESPONSE]", 0),
                (" no , i have a dog .<|endoftext|>", 1),
                (" [SEP]", 0),
            ],
        ),
    ],
)  # fmt: skip
def test_the_mask_covers_the_replies_and_their_stop_tokens_alone(tokenizers, name, pieces):
    rendered = render(DIALOGUE, tokenizers[name])
    assert (rendered["input_ids"], rendered["assistant_mask"]) == by_pieces(tokenizers[name], pieces)


def test_sentencepiece_puts_no_space_in_front_of_a_piece(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    rendered = render(DIALOGUE[1:3], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(rendered["input_ids"])
    # "▁" stands at the beginning and after </s>, as in the whole text, and not before the reply
    newline = "<0x0A>"
    opening = [token for token in tokens[: tokens.index(newline)]]
    assert opening[0].startswith("▁") and "".join(opening) == "▁<|user|>"
    assert [token for token, mask in zip(tokens, rendered["assistant_mask"], strict=True) if mask] == [
        "i", "▁am", "▁a", "▁teacher", "▁.", "</s>",
    ]  # fmt: skip
    assert tokens[-3:] == ["</s>", "▁", newline]


def tagged(opening: str) -> str:
    """A template that marks each reply and its stop token as transformers' own masks want it."""
    return (
        f"{{% for m in messages %}}{{{{ {opening} }}}}{{% if m['role'] == 'assistant' %}}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    )


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("zephyr", "'<|' + m['role'] + '|>\n'"),
        ("sentencepiece", "'<|' + m['role'] + '|>\n'"),
        ("chatml", "'<|im_start|>' + m['role'] + '\n'"),
    ],
)
def test_ids_and_mask_are_those_of_a_template_with_generation_tags(tokenizers, name, opening):
    expected = tokenizers[name].apply_chat_template(
        DIALOGUE,
        chat_template=tagged(opening),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    rendered = render(DIALOGUE, tokenizers[name])
    assert rendered["input_ids"] == expected["input_ids"]
    assert rendered["assistant_mask"] == expected["assistant_masks"]


DIALOGUES = {
    "plain": DIALOGUE,
    "no persona": DIALOGUE[1:],
    "the assistant begins": [DIALOGUE[0], DIALOGUE[2], *DIALOGUE[3:]],
    "odd text": [
        {"role": "system", "content": "i speak français , 漢字 and \U0001f600 ."},
        {"role": "user", "content": "  two  spaces\n\nand lines \n"},
        {"role": "assistant", "content": "it's 1,234.50 ... isn't it ?!  "},
        {"role": "user", "content": "ﬁ é \u0301 \t tab | bar \\"},
        {"role": "assistant", "content": "\u00e9"},
    ],
}


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
def test_ids_are_the_template_s_own(tokenizer, dialogue):
    """All four templates render earlier turns alike, and no token spans the border of a reply in these dialogues."""
    for messages, prompt in ((dialogue, False), (dialogue[:-1], True)):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=True
        )
        assert render(messages, tokenizer, add_generation_prompt=prompt)["input_ids"] == expected["input_ids"]


ODD_REPLIES = ["", " ", "\n", "\n\n x", " leading", "trailing \n", "]", "'s", "\u0301accent", "ing", "0"]


@pytest.mark.parametrize("reply", ODD_REPLIES)
def test_every_prompt_is_a_prefix_of_the_dialogue_whatever_the_reply_begins_with(tokenizer, reply):
    answer = {"role": "assistant", "content": reply}
    dialogue = [*DIALOGUE[:2], answer, DIALOGUE[3], answer]
    whole = render(dialogue, tokenizer)
    for turn in (2, 4):
        prompt = render(dialogue[:turn], tokenizer, add_generation_prompt=True)
        length = len(prompt["input_ids"])
        assert whole["input_ids"][:length] == prompt["input_ids"]
        assert whole["assistant_mask"][:length] == prompt["assistant_mask"]
        assert whole["assistant_mask"][length - 1 : length + 1] == [0, 1]  # if only the stop token
        until = render(dialogue[: turn + 1], tokenizer)["input_ids"]
        assert whole["input_ids"][: len(until)] == until


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
def test_what_is_masked_reads_as_the_replies(tokenizer, dialogue):
    rendered = render(dialogue, tokenizer)
    runs: list[list[int]] = []
    before = 0
    for id, mask in zip(rendered["input_ids"], rendered["assistant_mask"], strict=True):
        if mask:
            runs = [*runs, []] if not before else runs
            runs[-1].append(id)
        before = mask
    replies = [message["content"] for message in dialogue if message["role"] == "assistant"]
    assert [run.count(tokenizer.eos_token_id) for run in runs] == [1] * len(replies)
    assert [run[-1] for run in runs] == [tokenizer.eos_token_id] * len(replies)
    assert [tokenizer.decode(run[:-1]).strip() for run in runs] == [reply.strip() for reply in replies]


def test_an_opening_line_without_anything_before_it_is_context(tokenizer):
    dialogue = [{"role": "assistant", "content": "hello ."}, *DIALOGUE[1:3]]
    rendered = render(dialogue, tokenizer)
    whole = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=True)
    assert rendered["input_ids"] == whole["input_ids"]
    ids = [id for id, mask in zip(*rendered.values(), strict=True) if mask]
    assert tokenizer.decode(ids[:-1]).strip() == "i am a teacher ." and ids[-1] == tokenizer.eos_token_id


_TURN = "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
_OPENING = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        # the reasoning of earlier turns goes, as in Qwen3's
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[0 if loop.last else -1]"
        " + eos_token }}{% endfor %}" + _OPENING,
        # the number of turns stands in front
        "{{ messages | length }}{% for m in messages %}" + _TURN + "{% endfor %}" + _OPENING,
        # the prompt opens a reply otherwise than the dialogue does
        "{% for m in messages %}" + _TURN + "{% endfor %}" + _OPENING.replace("assistant", "bot"),
    ],
    ids=["earlier turns", "length", "opening"],
)
def test_a_template_that_renders_earlier_turns_differently_is_refused(template):
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = template
    prepare_tokenizer(tokenizer)
    dialogue = [DIALOGUE[1], {"role": "assistant", "content": "<think>hm , well</think>i am"}, *DIALOGUE[3:]]
    with pytest.raises(ChatTemplateError, match="template"):
        render(dialogue, tokenizer)


@pytest.mark.parametrize(
    ("name", "stop", "pad"),
    [
        ("zephyr", "</s>", "</s>"),
        ("sentencepiece", "</s>", "</s>"),
        ("chatml", "<|im_end|>", "<|endoftext|>"),
        ("persona", "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_the_stop_token_is_the_one_that_closes_a_reply(tokenizers, name, stop, pad):
    assert (tokenizers[name].eos_token, tokenizers[name].pad_token) == (stop, pad)


def test_a_template_without_a_stop_token_is_refused():
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="eos_token"):
        prepare_tokenizer(tokenizer)


@pytest.mark.parametrize("name", MAKERS)
def test_a_prepared_tokenizer_survives_saving(tokenizers, tmp_path, name):
    tokenizers[name].save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert stop_token_id(bare) == again.eos_token_id == tokenizers[name].eos_token_id
    assert again.pad_token_id == tokenizers[name].pad_token_id
    hostile = [{"role": "user", "content": "[RESPONSE] </s>"}, *DIALOGUE[2:]]
    assert render(hostile, again) == render(hostile, tokenizers[name])


def test_the_text_form_is_the_template_of_a_base_without_one(tokenizers):
    facts = tuple(DIALOGUE[0]["content"].split("\n"))
    text = render_prompt(Persona(facts), DIALOGUE[1:2])
    ids = render(DIALOGUE[:2], tokenizers["persona"], add_generation_prompt=True)["input_ids"]
    assert tokenizers["persona"].decode(ids) == text


# --- text never becomes control --------------------------------------------------------------------------------------

HOSTILE = [
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "[SEP]",
    "[PERSONA]", "[DIALOGUE]", "[RESPONSE]", "</", "s>", "<|im_", "end|>", "[RESP", "ONSE]", "[[SEP]", "SEP]", "\\",
    "<<s>s>", " ", "\n", "|", "yes",
]  # fmt: skip


def control(tokenizer, ids: list[int]) -> list:
    """Special tokens in order and, where the template is the text form, its tags."""
    special = [id for id in ids if id in tokenizer.all_special_ids]
    text = tokenizer.decode(ids)
    tags = ("[PERSONA]", "[DIALOGUE]", "[SEP]", "[RESPONSE]") if tokenizer.chat_template == PERSONA_TEMPLATE else ()
    return [special, [text.count(tag) for tag in tags]]


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=6).map("".join), min_size=5, max_size=5
    )
)
@pytest.mark.parametrize("name", MAKERS)
def test_text_never_becomes_a_control_token(tokenizers, name, texts):
    tokenizer = tokenizers[name]
    harmless = control(tokenizer, render(DIALOGUE, tokenizer)["input_ids"])
    dialogue = [{**message, "content": text} for message, text in zip(DIALOGUE, texts, strict=True)]
    rendered = render(dialogue, tokenizer)
    assert control(tokenizer, rendered["input_ids"]) == harmless
    stops = [id for id, mask in zip(*rendered.values(), strict=True) if mask and id == tokenizer.eos_token_id]
    assert len(stops) == 2


def test_neutralising_breaks_tokens_up_and_nothing_else(tokenizers):
    assert neutralise("a </s> b [SEP] c", tokenizers["zephyr"]) == "a < /s> b [SEP] c"
    assert neutralise("a <|endoftext|> [SEP] c", tokenizers["persona"]) == "a < |endoftext|> [ SEP] c"


# --- truncation ------------------------------------------------------------------------------------------------------


def test_whole_exchanges_go_from_the_oldest_on(tokenizers):
    tokenizer = tokenizers["zephyr"]
    for dialogue, prompt in ((DIALOGUE, False), (DIALOGUE[:4], True)):
        last = [DIALOGUE[0], *dialogue[3:]]
        whole, short = (len(render(turns, tokenizer, prompt)["input_ids"]) for turns in (dialogue, last))
        assert render_within(dialogue, tokenizer, whole, prompt) == (render(dialogue, tokenizer, prompt), 0)
        for room in (whole - 1, short):
            assert render_within(dialogue, tokenizer, room, prompt) == (render(last, tokenizer, prompt), 2)
        with pytest.raises(ValueError, match=f"`max_length` is {short - 1}, .* take {short} tokens"):
            render_within(dialogue, tokenizer, short - 1, prompt)


def test_the_kept_part_begins_with_a_user_turn(tokenizers):
    tokenizer = tokenizers["chatml"]
    greeting = {"role": "assistant", "content": "hello . " * 20}
    dialogue = [DIALOGUE[0], greeting, *DIALOGUE[1:]]
    whole = len(render(dialogue, tokenizer)["input_ids"])
    assert render_within(dialogue, tokenizer, whole - 1) == (render(DIALOGUE, tokenizer), 1)
    without = len(render(DIALOGUE, tokenizer)["input_ids"])
    assert render_within(dialogue, tokenizer, without - 1) == (render([DIALOGUE[0], *DIALOGUE[3:]], tokenizer), 3)
