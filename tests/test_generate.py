"""The inference path: what is sampled, where a reply ends, and that nothing of it stays behind."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import rlhf.generate
from rlhf.chat import render
from rlhf.generate import (
    RowSampling,
    generate,
    generate_several,
    generation_config,
    inference,
    is_stop,
    left_pad,
    response_mask,
    sample_ids,
    sample_replies,
)
from rlhf.model import load_tokenizer

QUESTIONS = [
    [{"role": "system", "content": "i have a dog ."}, {"role": "user", "content": "hello , how are you ?"}],
    [{"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": "do you have a cat ?"},
        {"role": "assistant", "content": "no , i have a dog ."},
        {"role": "user", "content": "where do you live ?"},
    ],
    [{"role": "user", "content": "hello , how are you ? " * 5}],
]
MODELS = ["tiny_llama", "tiny_gpt2", "tiny_qwen2"]


@pytest.fixture(scope="module", params=MODELS)
def chatbot(request):
    folder = str(request.getfixturevalue(request.param))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():  # fresh weights of size 0.02 say the same after every prompt
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, load_tokenizer(folder)


def test_left_pad():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_token_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_response_lasts_up_to_its_first_stop_token():
    responses = torch.tensor([[5, 2, 2, 5], [2, 2, 2, 2], [5, 6, 7, 8], [5, 0, 6, 2], [0, 5, 2, 0]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert response_mask(responses, 2).tolist() == expected


def test_a_response_lasts_up_to_the_first_of_several_stop_tokens():
    responses = torch.tensor([[5, 2, 3, 5], [5, 3, 2, 2], [3, 5, 5, 5], [5, 6, 7, 8]])
    assert response_mask(responses, [2, 3]).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert is_stop(responses, [2, 3]).sum(1).tolist() == [2, 3, 1, 0]


@torch.no_grad()
def greedy_by_hand(model, tokenizer, messages, max_new_tokens):
    """One conversation, the whole sequence anew for every token: no batch, padding or cache."""
    ids = render(messages, tokenizer, add_generation_prompt=True)["input_ids"]
    reply: list[int] = []
    while len(reply) < max_new_tokens:
        reply.append(model(input_ids=torch.tensor([ids + reply])).logits[0, -1].argmax().item())
        if reply[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode([id for id in reply if id != tokenizer.eos_token_id], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_replies_equal_a_loop_by_hand_in_any_batch(chatbot, batch_size):
    model, tokenizer = chatbot
    expected = [greedy_by_hand(model, tokenizer, messages, 8) for messages in QUESTIONS]
    assert generate(model, tokenizer, QUESTIONS, 8, batch_size=batch_size) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_several_greedy_replies_equal_a_loop_by_hand(chatbot, batch_size):
    """The prompt's keys and values, encoded once and repeated, are those of each reply's own forward pass."""
    model, tokenizer = chatbot
    several = generate_several(model, tokenizer, QUESTIONS, 3, 8, 0.0, batch_size=batch_size)
    assert [[reply.text for reply in replies] for replies in several] == [
        [greedy_by_hand(model, tokenizer, messages, 8)] * 3 for messages in QUESTIONS
    ]


def test_a_sampled_reply_depends_on_nothing_beside_it(chatbot):
    model, tokenizer = chatbot
    whole = generate_several(model, tokenizer, QUESTIONS, 4, 8, 1.0, seed=1)
    assert generate_several(model, tokenizer, QUESTIONS, 4, 8, 1.0, seed=1, batch_size=1) == whole
    assert generate_several(model, tokenizer, QUESTIONS[:2], 2, 8, 1.0, seed=1) == [row[:2] for row in whole[:2]]
    assert generate_several(model, tokenizer, QUESTIONS[2:], 4, 8, 1.0, seed=1, first=2) == whole[2:]
    assert generate(model, tokenizer, QUESTIONS, 8, 1.0, seed=1) == [replies[0].text for replies in whole]
    assert len({reply.text for replies in whole for reply in replies}) == 16


def test_a_prompt_is_encoded_once(chatbot, monkeypatch):
    model, tokenizer = chatbot
    forward, shapes = model.forward, []

    def watched(*args, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    generate_several(model, tokenizer, QUESTIONS[:1], 3, 2, 1.0)
    length = len(render(QUESTIONS[0], tokenizer, add_generation_prompt=True)["input_ids"])
    assert shapes == [(1, length - 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_row_draws_from_the_softmax(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    draw = RowSampling(range(4000), temperature, torch.device("cpu"))
    drawn = draw(torch.empty(0), logits.expand(4000, 5)).argmax(dim=-1)
    found = drawn.bincount(minlength=5) / 4000
    assert_close(found, (logits / temperature).softmax(-1), rtol=0, atol=0.04)  # five standard errors, as below
    later = draw(torch.empty(0), logits.expand(4000, 5)).argmax(dim=-1)
    both = ((drawn == 0) & (later == 0)).float().mean()
    assert_close(both, (logits / temperature).softmax(-1)[0] ** 2, rtol=0, atol=0.04)  # the next token is another draw


def test_a_reply_ends_before_its_stop_token(chatbot, monkeypatch):
    model, tokenizer = chatbot
    stop = tokenizer.eos_token_id
    yes = tokenizer(" yes , i do .", add_special_tokens=False)["input_ids"]
    fixed = torch.tensor([[*yes, stop, *yes], [stop, *yes, *yes], [*yes, *yes, stop], [*yes, *yes, yes[0]]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, fixed], dim=1))
    replies = generate(model, tokenizer, [QUESTIONS[1]] * 4, 2 * len(yes) + 1)
    twice = "yes , i do . yes , i do ."
    assert replies == ["yes , i do .", "", twice, tokenizer.decode([*yes, *yes, yes[0]]).strip()]
    assert replies[3].startswith(twice)
    several = generate_several(model, tokenizer, [QUESTIONS[1]] * 4, 1, 2 * len(yes) + 1, 0.0)
    assert [reply.finished for (reply,) in several] == [True, True, True, False]


def test_replies_to_prompts_of_any_length_come_back_in_their_order(chatbot, monkeypatch):
    """Decoded in batches of like length, so that five prompts of 3 to 40 tokens are padded by 10 ids and not by 98."""
    model, tokenizer = chatbot
    prompts = [list(range(5, 5 + length)) for length in (40, 3, 38, 5, 4)]
    config = generation_config(tokenizer, max_new_tokens=4)
    alone = [sample_replies(model, [prompt], config, 1)[0].tolist() for prompt in prompts]
    widths = []

    def spy(model, input_ids, mask, config):
        widths.append((len(input_ids), input_ids.shape[1], int(mask.sum())))
        return sample_ids(model, input_ids, mask, config)

    sample_ids = rlhf.generate.sample_ids
    monkeypatch.setattr(rlhf.generate, "sample_ids", spy)
    with torch.no_grad():
        together = sample_replies(model, prompts, config, 3)
    assert [row[: len(reply)] for row, reply in zip(together.tolist(), alone, strict=True)] == alone
    assert widths == [(3, 5, 12), (2, 40, 78)]


def test_sampling_follows_the_seed_and_leaves_the_global_generator(chatbot):
    model, tokenizer = chatbot
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, another = (generate(model, tokenizer, QUESTIONS, 8, 1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != another
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_come_from_the_full_distribution_at_the_temperature(chatbot, temperature):
    """The first token of 4,000 samples against the softmax of the logits."""
    model, tokenizer = chatbot
    ids = render(QUESTIONS[1], tokenizer, add_generation_prompt=True)["input_ids"]
    config = generation_config(tokenizer, max_new_tokens=1, temperature=temperature)
    torch.manual_seed(0)
    with inference(model):
        expected = (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
        batch, mask = left_pad([ids] * 4000, tokenizer.pad_token_id)
        drawn = sample_ids(model, batch, mask, config).squeeze(1)
    found = drawn.bincount(minlength=len(expected)) / len(drawn)
    # the standard error of a share is at most sqrt(0.25 / 4000) = 0.008; five of them
    assert_close(found, expected, rtol=0, atol=0.04)
    rare = expected.argsort()[: len(expected) * 3 // 4]  # what top-k 50 or top-p 0.9 would leave out
    assert_close(found[rare].sum(), expected[rare].sum(), rtol=0, atol=0.04)
    assert temperature < 1 or found[rare].sum() > 0


def test_a_long_history_loses_its_oldest_turns(chatbot):
    model, tokenizer = chatbot
    last = QUESTIONS[2][-1:]
    length = len(render(last, tokenizer, add_generation_prompt=True)["input_ids"])
    assert generate(model, tokenizer, [QUESTIONS[2]], 8, max_length=length) == generate(model, tokenizer, [last], 8)
    with pytest.raises(ValueError, match="`max_length`"):
        generate(model, tokenizer, [last], 8, max_length=length - 1)


def test_no_conversations_no_replies(chatbot):
    model, tokenizer = chatbot
    assert generate(model, tokenizer, [], 8) == []


@pytest.mark.parametrize("training", [True, False])
def test_inference_restores_mode_gradients_and_checkpointing(tiny_llama, training):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(training)
    model.lm_head.eval()  # a part that is kept in another mode

    def state():
        modules = list(model.modules())
        return [(m.training, getattr(m, "gradient_checkpointing", None)) for m in modules], torch.is_grad_enabled()

    before = state()
    assert any(checkpointed for _, checkpointed in before[0])
    with pytest.raises(RuntimeError, match="stopped"), inference(model):
        modes, gradients = state()
        assert not any(mode or checkpointed for mode, checkpointed in modes) and not gradients
        raise RuntimeError("stopped")
    assert state() == before
