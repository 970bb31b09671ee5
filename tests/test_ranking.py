"""hits@1 against a direct computation on tiny models built here."""

import pytest
import torch
from trl import ModelConfig

from evaluation.ranking import candidate_hits, candidate_ids, first_place, mean_nats, to_rank
from rlhf.chat import render
from rlhf.model import load_base, load_tokenizer
from rlhf.persona import with_persona

CHOICES = ["i have a dog .", "no .", "my favourite colour is blue .", "i live in a city by the sea ."]
DIALOGUE = {
    "persona": ["i have a dog .", "i like pizza ."],
    "messages": [
        {"role": "user", "content": "what pet do you have ?"},
        {"role": "assistant", "content": "i have a dog ."},
        {"role": "user", "content": "do you have a cat ?"},
        {"role": "assistant", "content": "no ."},
    ],
    "candidates": [None, [*CHOICES[1:], CHOICES[0]], None, [*CHOICES, "no ."]],
    "dialogue_id": "d1",
}


def test_first_place():
    assert first_place([2.0, 1.0, 3.0], 1) == 1
    assert first_place([2.0, 1.0, 3.0], 0) == 0
    assert first_place([1.0, 1.0, 3.0], 0) == 1 / 2  # shared
    assert first_place([1.0] * 20, 7) == pytest.approx(1 / 20)  # a model that knows nothing is at chance


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def loaded(request):
    path = str(request.getfixturevalue(request.param))
    tokenizer = load_tokenizer(path)
    return load_base(ModelConfig(model_name_or_path=path, dtype="float32"), tokenizer).eval(), tokenizer


def directly(model, ids, mask):
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    scored = [-logprobs[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]]
    return sum(scored) / len(scored)


def test_hits_are_the_direct_ranking(loaded):
    model, tokenizer = loaded
    expected = []
    for turn, gold in ((1, "i have a dog ."), (3, "no .")):
        found = {}
        for choice in CHOICES:
            messages = [*DIALOGUE["messages"][:turn], {"role": "assistant", "content": choice}]
            rendered = render(with_persona({"persona": DIALOGUE["persona"], "messages": messages}), tokenizer)
            prompt = render(with_persona({"persona": DIALOGUE["persona"], "messages": messages[:-1]}), tokenizer, True)
            start = len(prompt["input_ids"])
            mask = [0] * start + rendered["assistant_mask"][start:]
            found[choice] = directly(model, rendered["input_ids"], mask)
            ids, replies = candidate_ids(DIALOGUE, turn, [choice], tokenizer, 512)
            whole = ids + replies[0]
            assert whole == rendered["input_ids"][: len(whole)] and sum(mask) == len(replies[0])
        prompt, replies = candidate_ids(DIALOGUE, turn, CHOICES, tokenizer, 512)
        with torch.no_grad():
            assert mean_nats(model, prompt, replies) == pytest.approx(list(found.values()), rel=1e-5)  # float32
            assert mean_nats(model, prompt, [replies[0][:1]]) == pytest.approx(
                [directly(model, prompt + replies[0][:1], [0] * len(prompt) + [1])], rel=1e-5
            )  # a single token needs no second pass
        expected.append(float(min(found, key=found.get) == gold))
    hits = candidate_hits(model, tokenizer, to_rank([DIALOGUE]), 512)
    assert [hit["hit"] for hit in hits] == expected
    assert [(hit["turn"], hit["candidates"], hit["dialogue_id"]) for hit in hits] == [(1, 4, "d1"), (3, 4, "d1")]
    # the likeliest choice made the gold one is a hit, whatever its place in the list
    best = min(found, key=found.get)
    changed = [*DIALOGUE["messages"][:3], {"role": "assistant", "content": best}]
    row = {**DIALOGUE, "messages": changed, "candidates": [None, None, None, CHOICES]}
    assert [hit["hit"] for hit in candidate_hits(model, tokenizer, to_rank([row]), 512)] == [1.0]


def test_limits_and_rows_without_candidates():
    rows = [{**DIALOGUE, "dialogue_id": str(i)} for i in range(5)]
    some = to_rank(rows, max_replies=3, seed=1)
    assert len(some) == 3 and some == to_rank(rows, max_replies=3, seed=1)
    assert len(to_rank(rows)) == 10 and all(asked in to_rank(rows) for asked in some)
    plain = {key: value for key, value in DIALOGUE.items() if key != "candidates"}
    assert to_rank([plain]) == []
    alone = {**DIALOGUE, "candidates": [None, ["i have a dog ."], None, None]}
    assert to_rank([alone]) == []  # one candidate is no choice
