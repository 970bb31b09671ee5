"""What a machine computes in, what a base is loaded with, and the casts; the machines are faked."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from transformers.integrations import sdpa_attention
from trl import ModelConfig

from rlhf import model as model_module
from rlhf.generate import generate
from rlhf.model import (
    add_score_head,
    attention_problem,
    load_base,
    load_tokenizer,
    machine_defaults,
    precision,
    trainable_to_fp32,
)


@pytest.fixture
def machine(monkeypatch):
    """A machine of a given compute capability, None for one without CUDA."""

    def fake(capability: tuple[int, int] | None, apple: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a card")
        # what torch says of every card from Volta on, and must not be believed
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)

    return fake


@pytest.mark.parametrize(
    ("capability", "dtype", "fp16", "bf16"),
    [
        (None, torch.float32, False, False),
        ((6, 0), torch.float16, True, False),
        ((7, 0), torch.float16, True, False),
        ((7, 5), torch.float16, True, False),
        ((8, 0), torch.bfloat16, False, True),
        ((8, 9), torch.bfloat16, False, True),
        ((10, 0), torch.bfloat16, False, True),
    ],
)
def test_precision_follows_the_compute_capability(machine, capability, dtype, fp16, bf16):
    machine(capability)
    here = precision()
    assert (here.dtype, here.fp16, here.bf16) == (dtype, fp16, bf16)
    assert "float" in here.reason and (capability is None or f"{capability[0]}.{capability[1]}" in here.reason)
    assert machine_defaults() == {"use_cpu": capability is None, "fp16": fp16, "bf16": bf16}


def test_apple_silicon_trains_on_the_cpu_and_says_so_once(machine, caplog):
    machine(None, apple=True)
    with caplog.at_level(logging.INFO):
        assert machine_defaults() == {"use_cpu": True, "fp16": False, "bf16": False}
    assert [record.message for record in caplog.records] == [
        "Apple silicon: training on the CPU. Set `use_cpu: false` to try the GPU."
    ]


@pytest.mark.parametrize("capability", [None, (7, 5)])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_refused_below_8_0(machine, capability, name, tiny_llama):
    machine(capability)
    with pytest.raises(ValueError, match=f"`attn_implementation`: '{name}' needs a GPU.*sdpa"):
        load_base(ModelConfig(str(tiny_llama), attn_implementation=name), load_tokenizer(str(tiny_llama)))
    for fine in (None, "sdpa", "eager"):
        assert attention_problem(fine) is None


def test_flash_attention_is_taken_from_8_0_on(machine):
    machine((8, 0))
    assert attention_problem("flash_attention_2") is None


@pytest.fixture(autouse=True)
def upstream():
    """transformers' own predicate, which is there again after each test."""
    predicate = sdpa_attention.use_gqa_in_sdpa
    yield predicate
    sdpa_attention.use_gqa_in_sdpa = predicate


def test_grouped_queries_are_repeated_below_8_0(machine, upstream, tiny_llama, monkeypatch):
    """The tiny Llama has 4 heads in 2 groups. Fails where transformers does not ask its predicate, or groups no more."""
    asked = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        asked.append((query.shape[2], key.shape[1], kwargs.get("enable_gqa", False)))
        return attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tokenizer = load_tokenizer(str(tiny_llama))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def outcome(capability):
        machine(capability)
        model = load_base(ModelConfig(str(tiny_llama), attn_implementation="sdpa", dtype="float32"), tokenizer)
        asked.clear()
        with torch.no_grad():
            logits = model(ids).logits
        forward = set(asked)
        replies = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        return logits, forward, replies, set(asked) - forward

    stock = outcome((8, 0))
    assert stock[1] == {(6, 2, True)} and sdpa_attention.use_gqa_in_sdpa is upstream
    ours = outcome((7, 5))
    assert ours[1] == {(6, 4, False)}
    assert not any(grouped for _, _, grouped in ours[3])  # nor while it decodes
    torch.testing.assert_close(ours[0], stock[0], atol=1e-6, rtol=1e-5)  # float32, another order of sums
    assert torch.equal(ours[2], stock[2])


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
def test_elsewhere_attention_is_left_as_it_is(machine, upstream, capability, tiny_llama):
    machine(capability)
    load_base(ModelConfig(str(tiny_llama), dtype="float32"), load_tokenizer(str(tiny_llama)))
    assert sdpa_attention.use_gqa_in_sdpa is upstream


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded_with(monkeypatch):
    """The keyword arguments of `from_pretrained`, which loads a stand-in."""
    seen: list[dict] = []

    def from_pretrained(name, **kwargs):
        seen.append({"name": name, **kwargs})
        loaded = SimpleNamespace(config=SimpleNamespace(), generation_config=GenerationConfig())
        loaded.to = lambda device: seen.append({"device": device})
        return loaded

    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(model_module, auto), "from_pretrained", from_pretrained)
    state = SimpleNamespace(local_process_index=1, device=torch.device("cuda:1"))
    monkeypatch.setattr(model_module, "PartialState", lambda: state)
    return seen


TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=3)


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_4_bit_base_computes_in_the_card_s_precision(machine, loaded_with, capability, dtype, reward):
    machine(capability)
    loaded = load_base(ModelConfig("base", dtype="auto", load_in_4bit=True), TOKENIZER, reward=reward)
    (kwargs,) = loaded_with  # and nothing moved
    quantization = kwargs["quantization_config"]
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_compute_dtype is dtype and kwargs["dtype"] is dtype
    assert quantization.bnb_4bit_use_double_quant
    load_base(ModelConfig("base", load_in_4bit=True, bnb_4bit_quant_type="fp4"), TOKENIZER, reward=reward)
    assert loaded_with[-1]["quantization_config"].bnb_4bit_quant_type == "fp4"
    assert set(quantization.llm_int8_skip_modules) == {"lm_head", "score"}
    assert kwargs["device_map"] == {"": 1}  # this process' own card
    assert kwargs.get("num_labels") == (1 if reward else None)
    assert "trust_remote_code" not in kwargs
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (2, 3)


def test_a_plain_base_is_moved_to_this_process_card(machine, loaded_with):
    machine((7, 5))
    load_base(ModelConfig("base", dtype="auto", attn_implementation="eager"), TOKENIZER)
    expected = {"name": "base", "dtype": torch.float16, "attn_implementation": "eager"}
    assert loaded_with == [expected, {"device": torch.device("cuda:1")}]


def test_a_recipe_s_dtype_wins_but_for_bfloat16_on_a_t4(machine, loaded_with):
    machine((7, 5))
    load_base(ModelConfig("base", dtype="float32"), TOKENIZER)
    assert loaded_with[0]["dtype"] is torch.float32
    with pytest.raises(ValueError, match="`dtype` is bfloat16.*7.5.*float16"):
        load_base(ModelConfig("base", dtype="bfloat16"), TOKENIZER)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_a_base_is_told_the_tokenizer_s_stop_and_pad_tokens(request, name):
    folder = str(request.getfixturevalue(name))
    tokenizer = load_tokenizer(folder)
    for reward in (False, True):
        base = load_base(ModelConfig(folder), tokenizer, reward=reward)
        assert (base.config.eos_token_id, base.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert base.dtype == torch.float32
    assert base.score.out_features == 1


def test_the_sampling_settings_that_ship_with_a_base_are_left_behind(tiny_llama, tmp_path):
    tokenizer = load_tokenizer(str(tiny_llama))
    model = load_base(ModelConfig(str(tiny_llama)), tokenizer)
    questions = [[{"role": "user", "content": text}] for text in ("hello , how are you ?", "do you have a cat ?")]
    expected = [generate(model, tokenizer, questions, 24, temperature) for temperature in (0.0, 1.0)]
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=20, do_sample=True, top_k=1, top_p=0.1
    )  # Qwen2.5 ships a repetition penalty, top-k and top-p
    model.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).generation_config.repetition_penalty == 5.0
    base = load_base(ModelConfig(str(tmp_path)), tokenizer)
    assert [generate(base, tokenizer, questions, 24, temperature) for temperature in (0.0, 1.0)] == expected


# --- heads and casts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_score_head_is_frozen_and_float32(request, name):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float16)
    add_score_head(model)
    assert (model.score.in_features, model.score.out_features, model.score.bias) == (32, 1, None)
    assert model.score.weight.dtype == torch.float32 and not model.score.weight.requires_grad


def test_trainable_parameters_become_float32_and_others_stay():
    layers = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).half(), nn.Linear(2, 2))
    layers[1].requires_grad_(False)
    parameters = list(layers.parameters())
    values = parameters[0].detach().clone()
    assert trainable_to_fp32(layers) == 2
    assert [p.dtype for p in layers.parameters()] == 2 * [torch.float32] + 2 * [torch.float16] + 2 * [torch.float32]
    assert all(old is new for old, new in zip(parameters, layers.parameters(), strict=True))  # as optimisers hold them
    assert torch.equal(parameters[0], values.float())
    assert trainable_to_fp32(layers) == 0
