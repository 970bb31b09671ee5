import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import pretrain
from rlhf.data import world
from rlhf.files import folder_hash, write_json, write_jsonl
from rlhf.pretrain import (
    BaseConfig,
    PretrainConfig,
    batches,
    build_model,
    build_tokenizer,
    collate,
    corpus_hash,
    dialogues,
    drawn,
    encode,
    learning_rate_factor,
    tokenizer_of,
)
from rlhf.record import RunError

BASE = Path(__file__).parent.parent / "recipes" / "demo" / "base"
TOKENIZER = build_tokenizer()
TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "batch_size": 2,
    "warmup_steps": 2,
}


def with_system(row):
    return [{"role": "system", "content": "\n".join(row["persona"])}, *row["messages"]]


def rendered_ids(messages, **kwargs):
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, **kwargs)
    return TOKENIZER(text)["input_ids"]


def test_every_word_of_the_world_is_one_token():
    assert [word for word in world.words() if len(TOKENIZER(f" {word}")["input_ids"]) != 1] == []


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_and_no_token_is_added(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    if "<|" not in text:
        assert not set(ids) & set(TOKENIZER.all_special_ids)


def test_a_prompt_is_a_prefix_of_its_dialogue_at_every_turn():
    for index in range(20):
        messages = with_system(world.base_dialogue(0, index))
        whole = rendered_ids(messages)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = rendered_ids(messages[:turn], add_generation_prompt=True)
                assert whole[: len(prompt)] == prompt
                through = rendered_ids(messages[: turn + 1])
                assert whole[: len(through)] == through
                reply = TOKENIZER.decode(through[len(prompt) :])
                assert reply == f" {message['content']}<|end|>"


def test_a_decoded_reply_goes_back_into_a_dialogue_without_a_second_space():
    reply = {"role": "assistant", "content": " i have a dog ."}
    assert rendered_ids([reply]) == rendered_ids([{**reply, "content": "i have a dog ."}])


def test_loss_is_taken_on_trained_turns_alone():
    row = {
        "persona": ["i have a dog ."],
        "messages": [
            {"role": "user", "content": "do you have a pet ?"},
            {"role": "assistant", "content": "i have a cat .", "train": False},
            {"role": "user", "content": "really ?", "train": True},
            {"role": "assistant", "content": "sorry , i was wrong , i have a dog ."},
            {"role": "user", "content": "which of these are true ?"},
            {"role": "assistant", "content": "dog yes paris no", "train": ["yes", "no"]},
        ],
    }
    [(ids, mask)] = encode([row], TOKENIZER)
    trained = TOKENIZER.decode([token for token, here in zip(ids, mask, strict=True) if here])
    assert ids == rendered_ids(with_system(row))
    assert trained == "<|user|> really ?<|end|> sorry , i was wrong , i have a dog .<|end|> yes no"


def test_loss_equals_that_of_transformers():
    config = PretrainConfig("unused", **TINY)
    model = build_model(config, TOKENIZER)
    ids, mask = collate(encode([world.base_dialogue(0, i) for i in range(3)], TOKENIZER), TOKENIZER.pad_token_id)
    expected = model(input_ids=ids, attention_mask=ids != TOKENIZER.pad_token_id, labels=ids.masked_fill(~mask, -100))
    # float32 sums in another order
    assert pretrain.loss_of(model, ids, mask).item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero():
    config = PretrainConfig("unused", num_steps=110, warmup_steps=10)
    assert [learning_rate_factor(step, config) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    # Cosine: a quarter of the way down it stands at (1 + cos 45 degrees) / 2.
    assert learning_rate_factor(35, config) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert learning_rate_factor(60, config) == pytest.approx(0.5)
    assert learning_rate_factor(110, config) == pytest.approx(0.0)


def test_a_batch_depends_on_its_step_alone():
    config = PretrainConfig("unused", **TINY, num_steps=40, short_steps=16)
    everything = list(batches(config, TOKENIZER, 0))
    later = list(batches(config, TOKENIZER, 21))
    assert len(everything) == 40 and len(later) == 19
    for (ids, mask), (same_ids, same_mask) in zip(everything[21:], later, strict=True):
        assert torch.equal(ids, same_ids) and torch.equal(mask, same_mask)
    assert [ids.shape[0] for ids, _ in everything] == [6] * 16 + [2] * 24


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    # Breaks after step 5, in the middle of an interval of metrics; the checkpoint is of step 3.
    settings = {**TINY, "num_steps": 8, "short_steps": 4, "eval_steps": 4, "save_steps": 3}
    heldout = pretrain.heldout_batches(PretrainConfig("unused"), TOKENIZER)[:1]
    monkeypatch.setattr(pretrain, "heldout_batches", lambda config, tokenizer: heldout)
    pretrain.train(PretrainConfig(str(tmp_path / "straight"), **settings))

    def failing(step, config):
        if step == 5:
            raise KeyboardInterrupt
        return learning_rate_factor(step, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "learning_rate_factor", failing)
        pretrain.train(PretrainConfig(str(tmp_path / "broken"), **settings))
    assert (tmp_path / "broken" / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="`learning_rate`"):
        pretrain.train(PretrainConfig(str(tmp_path / "broken"), **settings, learning_rate=1e-3))
    pretrain.train(PretrainConfig(str(tmp_path / "broken"), **settings))
    straight, broken = (tmp_path / name for name in ("straight", "broken"))
    assert not (broken / "checkpoint.pt").exists()
    assert (straight / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (straight, broken)]
    assert [row["step"] for row in rows[0]] == [4, 8]
    assert [(r["loss"], r["eval_loss"]) for r in rows[0]] == [(r["loss"], r["eval_loss"]) for r in rows[1]]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"hidden_size": 100}, "hidden_size"),
        ({"matching_heads": 5}, "matching_heads"),
        ({"num_steps": 9}, "warmup_steps"),
        ({"dataset": "somewhere"}, "short_steps"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        PretrainConfig("unused", **wrong)


def test_the_shipped_base_is_small_and_speaks_this_world():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert (BASE / "model.safetensors").stat().st_size <= 5e6
    assert model.num_parameters() <= 1.2e6 and model.config.vocab_size % 64 == 0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token_id is None

    cast = world.characters(3, seed=2024, held_out=True, held_out_slots=True)
    probes = [probe for probe in world.probes(cast, seed=2024) if probe["turn"] == 5]
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "\n".join(probe["persona"])},
                *probe["history"],
                {"role": "user", "content": probe["question"]},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        for probe in probes
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    side = {"direct": None, "false_suggestion": 0, "true_suggestion": 1}
    right = 0
    for probe, reply in zip(probes, replies, strict=True):
        facts = [fact.format(probe["value"]) for fact in world.SLOT[probe["slot"]].facts]
        opener = side[probe["kind"]]
        expected = facts if opener is None else [f"{o[opener]} {f}" for o in world.OPENERS for f in facts]
        right += reply.strip() in expected
    # .97 of the facts were kept in a large sample; some 70 probes leave room for four failures.
    assert right / len(probes) > 0.93


@pytest.fixture
def small(monkeypatch):
    """A base of four steps, as `main` takes it."""
    heldout = pretrain.heldout_batches(PretrainConfig("unused"), TOKENIZER)[:1]
    monkeypatch.setattr(pretrain, "heldout_batches", lambda config, tokenizer: heldout)
    return {**TINY, "num_steps": 4, "short_steps": 2, "retrain": True}


def test_the_stage_trains_what_train_does(small, tmp_path):
    pretrain.main(BaseConfig(str(tmp_path / "base"), **small))
    record = json.loads((tmp_path / "base" / "metadata.json").read_text())
    assert record["status"] == "done" and record["step"] == 4 and "shipped" not in record
    pretrain.train(PretrainConfig(str(tmp_path / "alone"), **{k: v for k, v in small.items() if k != "retrain"}))
    base, alone = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "alone"))
    assert base == alone


@pytest.mark.slow
def test_the_shipped_base_was_made_from_this_corpus():
    record = json.loads((BASE / "record.json").read_text())
    assert corpus_hash(PretrainConfig("unused", **record["config"])) == record["corpus_hash"]


def test_the_corpus_hash_is_that_of_the_batches():
    config = PretrainConfig("unused", **{**TINY, "num_steps": 3, "short_steps": 1})
    alone = hashlib.sha256()
    for ids, mask in pretrain.batches(config, TOKENIZER, 0):
        alone.update(ids.numpy().tobytes())
        alone.update(mask.numpy().tobytes())
    assert corpus_hash(config) == alone.hexdigest() != corpus_hash(replace(config, seed=config.seed + 1))


def test_the_shipped_base_is_used_as_it_is_and_refused_when_altered(tmp_path):
    pretrain.main(BaseConfig(str(tmp_path / "run"), shipped=str(BASE)))
    record = json.loads((tmp_path / "run" / "metadata.json").read_text())
    assert record["shipped"]["result_hash"] == folder_hash(BASE)
    altered = tmp_path / "altered"
    shutil.copytree(BASE, altered)
    weights = load_file(altered / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="not those of its record.json"):
        pretrain.main(BaseConfig(str(tmp_path / "run"), shipped=str(altered)))
    with pytest.raises(RunError, match="Set `retrain`"):
        pretrain.main(BaseConfig(str(tmp_path / "run")))


@pytest.fixture
def prepared(tmp_path):
    """A prepare stage with nine dialogues of four people, and the settings of a base that is trained on it."""
    pets = ("dog", "parrot", "zebra", "kitten")
    rows = [
        {
            "persona": [f"i have a {pet} ."],
            "messages": [
                {"role": "user", "content": "hello , what is new ?"},
                {"role": "assistant", "content": f"my {pet} sleeps ."},
                {"role": "user", "content": "really ?"},
                {"role": "assistant", "content": "oops .", "train": False},
                {"role": "user", "content": "go on" + " and on" * number},
                {"role": "assistant", "content": f"i like my {pet} ."},
            ],
            "dialogue_id": f"{pet}/{number}",
            "source": "here",
        }
        for pet in pets
        for number in range(3)
    ]
    folder = tmp_path / "prepare"
    write_jsonl(folder / "dialogues_train.jsonl", rows[:9])
    write_jsonl(folder / "dialogues_heldout.jsonl", rows[9:])
    write_json(folder / "metadata.json", {"stage": "prepare", "status": "done", "parents": {}})
    return {**TINY, "dataset": str(folder), "vocab_size": 300, "short_steps": 0, "num_steps": 8, "eval_steps": 2}


def test_dialogues_are_drawn_epoch_by_epoch_and_by_their_number_alone():
    corpus = [([number], [True]) for number in range(5)]
    everything = [ids[0] for ids, _ in drawn(corpus, 0, 15, seed=1)]
    epochs = [everything[:5], everything[5:10], everything[10:]]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [ids[0] for ids, _ in drawn(corpus, 4, 7, seed=1)] == everything[4:11]


def test_of_a_prepare_stage_the_replies_alone_are_learned(prepared):
    tokenizer = tokenizer_of(PretrainConfig("unused", **prepared))
    assert len(tokenizer) <= 300
    encoded = dialogues(prepared["dataset"], "train", tokenizer)
    ids, mask = encoded[0]
    assert tokenizer.decode(ids).startswith("<|system|> i have a dog .<|end|><|user|> hello , what is new ?<|end|>")
    trained = tokenizer.decode([token for token, here in zip(ids, mask, strict=True) if here])
    assert trained == " my dog sleeps .<|end|> i like my dog .<|end|>"
    # 8 steps of two dialogues, in a pool of 32: each of the nine three times, and five of them once more.
    texts = [
        tokenizer.decode(row)
        for batch, _ in batches(PretrainConfig("unused", **{**prepared, "num_steps": 16}), tokenizer, 0)
        for row in batch.tolist()
    ]
    assert len(texts) == 32 and not any("kitten" in text for text in texts)
    assert sum("and on and on" in text for text in texts) >= 9


def test_training_on_dialogues_goes_on_in_the_same_bits_unless_they_changed(prepared, tmp_path, monkeypatch):
    settings = {**prepared, "save_steps": 3, "load_best_model_at_end": True}
    pretrain.train(PretrainConfig(str(tmp_path / "straight"), **settings))

    def failing(step, config):
        if step == 5:
            raise KeyboardInterrupt
        return learning_rate_factor(step, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "learning_rate_factor", failing)
        pretrain.train(PretrainConfig(str(tmp_path / "broken"), **settings))
    shutil.copytree(tmp_path / "broken", tmp_path / "stale")
    pretrain.train(PretrainConfig(str(tmp_path / "broken"), **settings))
    straight, broken = (tmp_path / name for name in ("straight", "broken"))
    assert (straight / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert (straight / "tokenizer.json").read_bytes() == (broken / "tokenizer.json").read_bytes()
    with (Path(prepared["dataset"]) / "dialogues_train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="`dataset`"):
        pretrain.train(PretrainConfig(str(tmp_path / "stale"), **settings))


def test_the_best_weights_are_saved_where_that_is_asked_for(prepared, tmp_path, monkeypatch):
    seen = []
    losses = [3.0, 1.0, 2.0, 4.0]

    def scripted(model, batches):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return losses[(len(seen) - 1) % 4]

    monkeypatch.setattr(pretrain, "evaluate", scripted)
    for load_best, number in ((True, 1), (False, 3)):
        seen.clear()
        config = PretrainConfig(str(tmp_path / str(load_best)), **prepared, load_best_model_at_end=load_best)
        row = pretrain.train(config)
        assert row["eval_loss"] == losses[number] and row["step"] == 2 * (number + 1)
        saved = load_file(tmp_path / str(load_best) / "model.safetensors")
        assert all(torch.equal(value, seen[number][name]) for name, value in saved.items())


def test_the_stage_names_the_dialogues_it_was_made_from(prepared, tmp_path):
    pretrain.main(BaseConfig(str(tmp_path / "base"), **prepared, retrain=True))
    record = json.loads((tmp_path / "base" / "metadata.json").read_text())
    assert record["parents"]["prepare"]["hash"] == folder_hash(prepared["dataset"])
    assert record["corpus_hash"] == corpus_hash(PretrainConfig("unused", **prepared))
    with pytest.raises(RunError, match="'prepare' is needed"):
        pretrain.main(BaseConfig(str(tmp_path / "base"), **{**prepared, "dataset": str(tmp_path)}, retrain=True))
