"""The stage `pairs` on a tiny adapter: sampled for real or with replies that are given, judged in each of the three ways."""

import json
import re

import pytest
import torch

from rlhf import pairs
from rlhf.cli import _own_or_some_persona
from rlhf.config import parse
from rlhf.data.columns import preference_columns
from rlhf.files import folder_hash, read_jsonl, write_jsonl
from rlhf.generate import Reply, inference
from rlhf.lora import use_adapter, with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.pairs import PairsConfig
from rlhf.pipeline import config_classes
from rlhf.record import RunError, read_record
from rlhf.rewards import score_ids

SIDES = ("train", "heldout")


@pytest.fixture
def sample(tiny_llama, dataset, sft_run, tmp_path, monkeypatch):
    """Run the stage; the files that it leaves, by name."""
    (tmp_path / "judges.py").write_text(
        "def keeps(prompts, completions, value, **columns):\n"
        "    assert all(p[0]['role'] == 'system' and v in p[0]['content'] for p, v in zip(prompts, value))\n"
        "    return [float(v in c) for v, c in zip(value, completions)]\n"
        "def silent(prompts, completions, **columns):\n    return []\n"
        "def broken(prompts, completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def picky(prompts, completions, mood, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def sample(judge, folder=tmp_path / "pairs", **values):
        values = {
            "model_name_or_path": tiny_llama, "dataset": dataset, "sft_adapter": sft_run.folder, "output_dir": folder,
            "judge": judge, "seed": 3, "max_new_tokens": 8, "max_length": 256, **values,
        }  # fmt: skip
        argv = [f"--{key}={value}" for key, value in values.items()]
        pairs.main(*parse(config_classes("pairs"), argv, "pairs"))
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}

    return sample


def saying(monkeypatch, *forms: str):
    """Replies that are given: each form with the pet of the persona, of which every other row's is turned round."""
    asked = []

    def generate_several(model, tokenizer, conversations, num_generations, *args):
        asked.append(len(conversations))
        pets = [re.search(r"have a (\w+)", messages[0]["content"])[1] for messages in conversations]
        return [
            [Reply(form.format(pet=pet, other="cow", number=number % 2), True) for form in forms]
            for number, pet in enumerate(pets)
        ]

    monkeypatch.setattr(pairs, "generate_several", generate_several)
    return asked


def rows(files, name):
    return [json.loads(line) for line in files[f"{name}.jsonl"].decode().splitlines()]


@pytest.fixture
def ended(monkeypatch):
    """Real replies; a model of a few steps never ends one, so all count as ended."""
    real = pairs.generate_several
    monkeypatch.setattr(
        pairs, "generate_several", lambda *args: [[r._replace(finished=True) for r in row] for row in real(*args)]
    )


def test_replies_scored_by_the_reward_adapter(
    sample, ended, dataset, sft_run, reward_run, tiny_llama, tmp_path, train
):
    keys = {"num_generations": 6, "min_margin": 1e-4}
    files = sample(reward_run.folder, **keys)
    assert set(files) == {f"{kind}_{side}.jsonl" for kind in ("preferences", "replies") for side in SIDES} | {
        "rejected.jsonl"
    }
    record = read_record(tmp_path / "pairs")
    assert record["status"] == "done" and set(record["parents"]) == {"prepare", "sft", "reward"}
    assert record["result_hash"] == folder_hash(tmp_path / "pairs")
    assert set(record["cheaters"]) >= {"longer_wins", "echo_wins", "bag_of_words", "writing"}

    # the replies: one row a prompt, in order, and the scores those of one sequence at a time
    tokenizer = load_tokenizer(str(tiny_llama))
    (model_args,) = parse((pairs.ModelConfig,), [f"--model_name_or_path={tiny_llama}"])
    model = load_base(model_args, tokenizer)
    add_score_head(model)
    model = with_adapter(model, reward_run.folder, "reward")
    for side in SIDES:
        prompts, replies = read_jsonl(dataset / f"prompts_{side}.jsonl"), rows(files, f"replies_{side}")
        assert [{key: row[key] for key in prompt} for row, prompt in zip(replies, prompts, strict=True)] == prompts
        assert all(len(row[key]) == 6 for row in replies for key in ("replies", "finished", "scores"))
        said = [(row, text, score) for row in replies for text, score in zip(row["replies"], row["scores"], strict=True)
                if text]  # fmt: skip
        columns = preference_columns(
            [{**row, "chosen": text, "rejected": text} for row, text, _ in said], tokenizer, 256
        )
        with inference(model), use_adapter(model, "reward"):
            expected = score_ids(model.get_base_model(), [c["prompt_ids"] + c["chosen_ids"] for c in columns])
        # padding changes the order of float32 sums
        torch.testing.assert_close(torch.tensor([s for *_, s in said]), torch.tensor(expected), rtol=1e-4, atol=1e-5)

        made = rows(files, f"preferences_{side}")
        assert len(made) == record["rows"][side] > 0
        differences = []
        for pair in made:
            assert list(pair) == ["persona", "prompt", "dialogue_id", "chosen", "rejected", "kind"]
            (row,) = [row for row in replies if row["dialogue_id"] == pair["dialogue_id"]]
            score = dict(zip(row["replies"], row["scores"], strict=True))
            good, bad = (pair[key][0]["content"] for key in ("chosen", "rejected"))
            assert score[good] - score[bad] >= 1e-4
            differences.append(len(good.split()) - len(bad.split()))
        assert sorted(differences) == sorted(-difference for difference in differences)
        # each prompt gave a pair or has a reason
        lost = {entry["dialogue_id"] for entry in rows(files, "rejected") if entry["dropped"] == "pair"}
        assert lost | {pair["dialogue_id"] for pair in made} >= {prompt["dialogue_id"] for prompt in prompts}
        assert lost.isdisjoint(pair["dialogue_id"] for pair in made)

    # the same seed, the same pairs in whatever batches, and the same bytes in the same ones
    assert sample(reward_run.folder, tmp_path / "again", batch_size=7, **keys).keys() == files.keys()
    again = {name: (tmp_path / "again" / name).read_bytes() for name in files}
    assert all(
        again[name] == files[name] for name in files if name.startswith("preferences") or name == "rejected.jsonl"
    )
    assert sample(reward_run.folder, tmp_path / "again", **keys) == files  # scored again, not sampled
    # DPO trains on them
    run = train("dpo", tmp_path / "dpo", model_name_or_path=tiny_llama, dataset=tmp_path / "pairs",
                sft_adapter=sft_run.folder, max_steps=2)  # fmt: skip
    assert run.metadata()["parents"]["prepare"]["path"] == "../pairs"
    heldout = read_jsonl(dataset / "dialogues_heldout.jsonl")
    assert _own_or_some_persona(tmp_path / "pairs") == heldout[0]["persona"]  # who `rlhf chat` speaks as


def test_a_killed_stage_goes_on_and_ends_in_the_same_bytes(sample, ended, reward_run, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs, "PART", 10)
    keys = {"num_generations": 6, "min_margin": 1e-4}
    whole = sample(reward_run.folder, tmp_path / "whole", **keys)
    whole_model, calls = pairs.generate_several, []

    def killed(model, tokenizer, conversations, *args):
        calls.append(args[-1])
        if calls == [0, 10]:
            raise KeyboardInterrupt
        return whole_model(model, tokenizer, conversations, *args)

    monkeypatch.setattr(pairs, "generate_several", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(reward_run.folder, **keys)
    assert len(read_jsonl(tmp_path / "pairs" / "replies_train.jsonl")) == 10
    assert sample(reward_run.folder, **keys) == whole
    assert calls == [0, 10, 10, 20, 0]  # 24 prompts and 9


def test_a_rule_judges_and_another_judge_samples_nothing_anew(sample, monkeypatch, tmp_path, dataset):
    asked = saying(monkeypatch, "i have a {pet} .", "i have a {other} .", "i have a {other} , i think .", "")
    files = sample("judges:keeps", num_generations=4, force_audit=True)  # "cow" is always wrong
    assert asked == [24, 9]
    for side, count in (("train", 24), ("heldout", 9)):
        made = rows(files, f"preferences_{side}")
        assert len(made) == count and {pair["kind"] for pair in made} == {"sampled"}
        pets = [row["value"] for row in read_jsonl(dataset / f"prompts_{side}.jsonl")]
        assert [pair["chosen"][0]["content"] for pair in made] == [f"i have a {pet} ." for pet in pets]
        assert {pair["rejected"][0]["content"] for pair in made} == {"i have a cow ."}  # the nearer one in length
    assert read_record(tmp_path / "pairs")["rejected"] == {"empty reply": 33}
    assert rows(files, "rejected")[0] == {
        "file": "replies_train.jsonl", "dialogue_id": "d0", "reason": "empty reply", "dropped": "reply", "text": "",
    }  # fmt: skip

    # The rule of the world wants a false suggestion, every third prompt, rejected with a "no".
    files = sample("rlhf.rewards:persona_rule", num_generations=4, force_audit=True)
    assert asked == [24, 9]
    assert [len(rows(files, f"preferences_{side}")) for side in SIDES] == [16, 6]
    assert read_record(tmp_path / "pairs")["rejected"] == {"empty reply": 33, "tie": 11}
    sample("rlhf.rewards:persona_rule", num_generations=4, force_audit=True, seed=4)
    assert asked == [24, 9, 24, 9]


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("judges:silent", "a finite score for each of 96 replies, got \\[\\]"),
        ("judges:broken", "a finite score for each of 96 replies, got \\[nan"),
        ("judges:picky", "`judge` judges:picky does not fit .*'mood'"),
    ],
)
def test_a_judge_that_does_not_answer(judge, message, sample, monkeypatch, tmp_path):
    asked = saying(monkeypatch, "i have a {pet} .", "i have a {other} .", "no .", "yes .")
    with pytest.raises(RunError, match=message):
        sample(judge)
    assert read_record(tmp_path / "pairs")["status"] == "failed"
    assert not list((tmp_path / "pairs").glob("preferences_*"))
    again = sample("judges:keeps", force_audit=True)  # the replies are there
    assert asked == [24, 9] and len(rows(again, "preferences_train")) == 24


def test_a_judge_that_is_not_there_is_refused_when_parsed():
    with pytest.raises(ValueError, match="`judge` is 'rlhf.rewards:nothing'; write it as `module:function`"):
        PairsConfig(output_dir="out", dataset="data", sft_adapter="sft", judge="rlhf.rewards:nothing")


def test_pairs_that_words_alone_decide_are_refused_unless_forced(sample, monkeypatch, tmp_path):
    saying(monkeypatch, "i have a {pet} .", "i have a {other} .")
    with pytest.raises(RunError, match="told apart without the persona.*`bag_of_words` 100.0%"):
        sample("judges:keeps", num_generations=2)
    assert read_record(tmp_path / "pairs")["status"] == "failed"
    sample("judges:keeps", num_generations=2, force_audit=True)
    record = read_record(tmp_path / "pairs")
    assert record["status"] == "done" and record["cheaters"]["bag_of_words"]["accuracy"] == 1.0


def test_without_any_pair_the_reasons_are_named(sample, monkeypatch):
    saying(monkeypatch, "i have a {pet} .", "i have a {pet} .")
    with pytest.raises(RunError, match="No train pairs are left: {'duplicate reply': 33, 'too few replies': 33}"):
        sample("judges:keeps", num_generations=2)


def test_a_person_judges_between_two_calls(sample, monkeypatch, tmp_path):
    asked = saying(monkeypatch, "i have a {pet} .", "i have a {other} .")
    folder = tmp_path / "pairs"
    for _ in range(2):  # a call too many changes nothing
        with pytest.raises(RunError, match="write a, b or undecided .*review_train.jsonl and .*review_heldout.jsonl"):
            sample("person", num_generations=2, force_audit=True)
    assert asked == [24, 9]
    for side in SIDES:
        path = folder / f"review_{side}.jsonl"
        lines = read_jsonl(path)
        assert all("scores" not in line and line["decision"] == "" for line in lines)
        assert 0 < sum("cow" in line["reply_a"] for line in lines) < len(lines)
        for line in lines:
            line["decision"] = "b" if "cow" in line["reply_a"] else "a"
        lines[0]["decision"] = "undecided"
        write_jsonl(path, lines[:-1])
    with pytest.raises(RunError, match="are about other replies"):
        sample("person", num_generations=2, seed=4)
    files = sample("person", num_generations=2, force_audit=True)
    made = rows(files, "preferences_train")
    assert len(made) == 22 and {pair["kind"] for pair in made} == {"reviewed"}
    assert not any("cow" in pair["chosen"][0]["content"] for pair in made)
    assert read_record(folder)["rejected"] == {"undecided": 2, "missing from the file": 2}
    assert len(asked) == 2


def test_one_process(sample, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one process"):
        sample("judges:keeps")


def test_the_judge_is_a_function_a_folder_or_a_person():
    def adapter(judge):
        return PairsConfig("out", "data", "sft", judge).reward_adapter

    assert [adapter(j) for j in ("rlhf.rewards:persona_rule", "person", "runs/demo/reward")] == [
        None, None, "runs/demo/reward",
    ]  # fmt: skip
