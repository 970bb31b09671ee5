"""Forced choice: which statements stand against each other, and their likelihoods against a direct computation."""

import pytest
import torch
from trl import ModelConfig

from evaluation.forced_choice import choice_interval, choices_of, chosen, statement_nats
from rlhf.chat import render
from rlhf.model import load_base, load_tokenizer
from rlhf.persona import with_persona

PEOPLE = {"ann": ("a dog", "i have a dog ."), "bob": ("a cat", "i got a cat ."), "cid": ("a cow", "a cow is mine .")}


def probes(people=PEOPLE, slot="pet"):
    values = [value for value, _ in people.values()]
    return [
        {
            "persona_id": name, "persona": [fact, "i like soup ."], "fact_id": f"{name}/{slot}", "slot": slot,
            "fact": fact, "value": value, "slot_values": values, "persona_values": {slot: value, "food": "soup"},
            "kind": kind, "turn": turn, "split": "seen", "question": "any pets ?", "foil": None,
            "history": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi ."}] * turn,
        }
        for name, (value, fact) in people.items()
        for turn in (0, 2)
        for kind in ("direct", "true_suggestion")
    ]  # fmt: skip


def test_the_other_statement_is_somebody_elses():
    rows = choices_of(probes(), seed=1)
    assert [row["persona_id"] for row in rows] == ["ann", "bob", "cid"]  # direct questions, at the first turn
    facts = {name: fact for name, (_, fact) in PEOPLE.items()}
    assert all(row["true"] == facts[row["persona_id"]] for row in rows)
    assert all(row["false"] in set(facts.values()) - {row["true"]} for row in rows)
    drawn = {tuple(row["false"] for row in choices_of(probes(), seed)) for seed in range(8)}
    assert len(drawn) > 1 and rows == choices_of(probes(), seed=1)


def test_a_value_that_the_persona_has_too_is_no_other():
    rows = probes()
    for row in rows:
        if row["persona_id"] == "ann":
            row["persona_values"]["pet (2)"] = "a cat"
            row["slot"] = "pet (1)"  # two facts of a slot are told apart by a number
    for seed in range(8):
        assert choices_of(rows, seed)[0]["false"] == "a cow is mine ."


def test_a_single_persona_gets_other_values_into_its_statement():
    rows = probes({"ann": PEOPLE["ann"]})
    for row in rows:
        row["slot_values"] = ["a dog", "three goats"]
    (choice,) = choices_of(rows)
    assert (choice["true"], choice["false"]) == ("i have a dog .", "i have three goats .")
    for row in rows:
        row["slot_values"] = ["a dog"]  # nothing else is known
    assert choices_of(rows) == []


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_nats_are_the_direct_ones(name, request):
    path = str(request.getfixturevalue(name))
    tokenizer = load_tokenizer(path)
    model = load_base(ModelConfig(model_name_or_path=path, dtype="float32"), tokenizer).eval()
    rows = choices_of(probes())
    found = statement_nats(model, tokenizer, rows, 512, batch_size=4)
    for row, nats in zip(rows, found, strict=True):
        asked = [*row["history"], {"role": "user", "content": row["question"]}]
        for statement, value in zip((row["true"], row["false"]), nats, strict=True):
            messages = [*asked, {"role": "assistant", "content": statement}]
            rendered = render(with_persona({"persona": row["persona"], "messages": messages}), tokenizer)
            ids, mask = rendered["input_ids"], rendered["assistant_mask"]
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            last = [t for t in range(len(ids)) if mask[t]]  # the history has no replies
            direct = [-logprobs[t - 1, ids[t]].item() for t in last]
            assert value == pytest.approx(sum(direct) / len(direct), rel=1e-5)  # float32, another batch


def test_choice_and_interval():
    assert [chosen(1.0, 2.0), chosen(2.0, 1.0), chosen(1.0, 1.0)] == [1, 0, 0.5]
    rows = [{"persona_id": f"p{i // 2}", "fact_id": f"p{i // 2}/{i}", "right": float(i % 4 != 3)} for i in range(40)]
    value, low, high = choice_interval(rows)
    # narrower than of 20 wholly right or wrong personas of whom 15 are right: .509 to .913 (Clopper and Pearson)
    assert value == 0.75 and 0.509 < low < 0.75 < high < 0.913
    one = [{**row, "persona_id": "p"} for row in rows]
    assert choice_interval(one).low < choice_interval(one).value  # over its facts
