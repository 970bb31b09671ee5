"""`python -m evaluation run`: systems, rules, and the numbers that need a model."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from evaluation.bots import DEGENERATE, other_persona
from evaluation.compare import compare, system_items
from evaluation.intervals import Interval
from evaluation.perplexity import reply_nll
from evaluation.run import EvaluateConfig, _add, _bots, _kl_rows, main
from rlhf.config import parse
from rlhf.files import folder_hash, read_jsonl, write_json, write_jsonl, write_text
from rlhf.generate import generate_several
from rlhf.pipeline import config_classes
from rlhf.record import RunError, read_record

KEYS = {"max_new_tokens": 8, "max_length": 256, "distinct_tokens": 20, "batch_size": 4, "seed": 1}


def evaluate(folder, dataset, model, systems, bots=(), **keys):
    values = {**KEYS, "dataset": dataset, "output_dir": folder, "model_name_or_path": model, **keys}
    argv = [f"--{key}={value}" for key, value in values.items()]
    argv += ["--systems", json.dumps(systems), "--bots", json.dumps(bots)]
    main(*parse(config_classes("evaluate"), argv, "evaluate"))
    return {name: json.loads((folder / name / "results.json").read_text()) for name in [*systems, *bots]}


@pytest.fixture(scope="module")
def evaluated(tiny_llama, dataset, sft_run, ppo_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "evaluate"
    systems = {"base": None, "sft": str(sft_run.folder), "ppo": str(ppo_run.folder)}
    bots = ["oracle", "wrong_persona", "silence", "agree", "recite_all"]
    return folder, evaluate(folder, dataset, tiny_llama, systems, bots)


def value(results, system, metric):
    return results[system]["metrics"][metric]["value"]


def test_record_and_rows(evaluated, sft_run, tiny_llama, dataset):
    folder, results = evaluated
    assert (
        read_record(folder)["status"] == "done" and {"prepare", "sft", "ppo"} == read_record(folder)["parents"].keys()
    )
    run = results["sft"]["run"]
    assert run["adapter_hash"] == folder_hash(sft_run.folder) and run["data_hash"] == folder_hash(dataset)
    assert (folder / run["adapter"]).samefile(sft_run.folder) and (folder / run["base"]).samefile(tiny_llama)
    assert not Path(run["adapter"]).is_absolute() and not Path(run["base"]).is_absolute()
    assert run["system"] == "sft" and run["decoding"]["sampled"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert results["base"]["run"]["adapter"] is None and "perplexity_token" not in results["oracle"]["metrics"]
    for name in results:
        rows = read_jsonl(folder / name / "replies.jsonl")
        assert [row["decoding"] for row in rows] == ["greedy"] * 36 + [
            "sampled"
        ] * 27  # 9 dialogues, 9 x 3 probes twice
        assert [row["correct"] is None for row in rows] == [True] * 9 + [False] * 54
    for metric in results["sft"]["metrics"].values():
        assert metric["n"] > 0
        if metric["ci_low"] is None:  # a value that no resample changes
            assert metric["ci_high"] is None and not metric["unit"].startswith("share of ")
        else:
            assert metric["ci_low"] <= metric["value"] <= metric["ci_high"]
    assert {(row["decoding"], row["kind"]) for row in results["sft"]["breakdown"]} >= {
        (decoding, kind)
        for decoding in ("greedy", "sampled")
        for kind in ("all", "direct", "false_suggestion", "true_suggestion")
    }


def test_rules_are_ceiling_and_floors(evaluated):
    _, results = evaluated
    assert value(results, "oracle", "persona_consistency") == 1
    assert value(results, "oracle", "bleu") == pytest.approx(100)  # it says the reference
    # the next character has another pet, but for the last of the nine, whose next one is the first: both have a dog
    assert value(results, "wrong_persona", "persona_consistency") == pytest.approx(1 / 9)
    assert value(results, "silence", "persona_consistency") == 0 and value(results, "silence", "length_words") == 0
    assert value(results, "agree", "persona_consistency") == 0 and value(results, "agree", "length_words") == 4
    assert value(results, "recite_all", "keyword_score") > value(results, "oracle", "keyword_score")  # and yet
    assert value(results, "recite_all", "persona_consistency") == 0


def test_perplexity_is_the_trainers(evaluated, sft_run, ppo_run):
    """The trainer's own held-out loss is over the same replies: one turn or two, each with its stop token."""
    _, results = evaluated
    best = min(row["eval_perplexity"] for row in sft_run.rows("metrics.jsonl") if "eval_perplexity" in row)
    assert value(results, "sft", "perplexity_token") == pytest.approx(best, rel=1e-4)  # float32, other batches
    assert value(results, "base", "perplexity_token") > value(results, "sft", "perplexity_token")
    assert value(results, "ppo", "perplexity_token") != value(results, "sft", "perplexity_token")


def test_kl_to_the_reference(evaluated):
    """On samples of at most 8 tokens; a model against itself is exactly 0."""
    _, results = evaluated
    assert value(results, "sft", "kl_reference") == 0
    assert math.isfinite(value(results, "ppo", "kl_reference")) and value(results, "ppo", "kl_reference") != 0
    assert "kl_reference" not in results["base"]["metrics"]


def test_the_kl_reads_what_the_model_was_asked(tiny_llama, dataset, sft_run, tmp_path, monkeypatch):
    """A probe after a long conversation is cut for the KL as it was for the reply, or it would not fit the context."""
    read = []

    def spy(model, rows, masks, batch_size):
        read.extend(zip(rows, masks, strict=True))
        return reply_nll(model, rows, masks, batch_size)

    monkeypatch.setattr("evaluation.run.reply_nll", spy)
    data = tmp_path / "prepare"
    shutil.copytree(dataset, data)
    talk = [{"role": role, "content": "well , that is nice to hear ."} for role in ("user", "assistant")] * 4
    write_jsonl(data / "probes.jsonl", [{**row, "history": talk} for row in read_jsonl(data / "probes.jsonl")])
    write_json(data / "metadata.json", read_record(data) | {"result_hash": folder_hash(data)})
    sizes = {}
    for limit in (512, 100):
        results = evaluate(tmp_path / str(limit), data, tiny_llama, {"sft": str(sft_run.folder)}, max_length=limit)
        sizes[limit] = max(len(ids) for ids, _ in read)
        assert all(sum(mask) for _, mask in read)
        assert value(results, "sft", "kl_reference") == 0
        read.clear()
    assert sizes[100] <= 100 + 8 < sizes[512]


def test_a_system_does_not_depend_on_the_others(evaluated, tiny_llama, dataset, sft_run, tmp_path):
    folder, _ = evaluated
    evaluate(tmp_path / "alone", dataset, tiny_llama, {"sft": str(sft_run.folder)})
    rows, alone = (read_jsonl(path / "sft" / "replies.jsonl") for path in (folder, tmp_path / "alone"))
    assert rows == alone


@pytest.mark.parametrize("written", [2, 14])
def test_what_broke_off_goes_on(written, evaluated, tiny_llama, dataset, sft_run, tmp_path, monkeypatch):
    """Nothing that was written is made again, and the files are those of an evaluation that nobody disturbed."""
    folder, _ = evaluated
    systems, replied, left = {"sft": str(sft_run.folder)}, [], [written]

    def counted(model, tokenizer, conversations, *more):
        replied.append(len(conversations))
        return generate_several(model, tokenizer, conversations, *more)

    def broken(path, text):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write_text(path, text)

    monkeypatch.setattr("evaluation.run.generate_several", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("evaluation.batches.write_text", broken)
        evaluate(tmp_path / "evaluate", dataset, tiny_llama, systems, ["silence"])
    lost = replied[-1]  # the batch that was computed and not written
    results = evaluate(tmp_path / "evaluate", dataset, tiny_llama, systems, ["silence"])
    assert sum(replied) == 9 + 2 * 27 + lost
    evaluate(tmp_path / "evaluate", dataset, tiny_llama, systems, ["silence"])
    assert sum(replied) == 9 + 2 * 27 + lost  # a finished system is not asked again
    for name in ("sft", "silence"):
        for file in ("replies.jsonl", "choices.jsonl", "likelihoods.jsonl"):
            if name == "sft" or file == "replies.jsonl":
                assert (tmp_path / "evaluate" / name / file).read_bytes() == (folder / name / file).read_bytes()
        undisturbed = json.loads((folder / name / "results.json").read_text())
        for found in (results[name], undisturbed):
            for key in ("date", "adapter", "base", "config"):  # the paths are seen from another folder
                del found["run"][key]
        assert results[name] == undisturbed


def test_one_dialogue_has_no_interval(tiny_llama, dataset, tmp_path):
    """The bound of an interval over one cluster is not there, and not infinite."""
    results = evaluate(tmp_path / "evaluate", dataset, tiny_llama, {"base": None}, max_dialogues=1, max_personas=2)
    row = results["base"]["metrics"]["perplexity_token"]
    assert row["value"] > 1 and row["ci_low"] is None and row["ci_high"] is None


def test_a_number_that_is_infinite_is_named():
    results = {"metrics": {}, "run": {"not_scored": {}}}
    _add(results, "perplexity_word", Interval(math.inf, 3.0, math.inf), 7)
    _add(results, "perplexity_token", Interval(5.0, 3.0, math.inf), 7)
    assert results["run"]["not_scored"] == {"perplexity_word": "beyond the range of numbers, over n = 7"}
    assert results["metrics"]["perplexity_token"]["ci_high"] is None


def test_forced_choice_and_agreement_stand_beside_the_probes(evaluated):
    folder, results = evaluated
    choices = read_jsonl(folder / "sft" / "choices.jsonl")
    assert len(choices) == 9 and {row["right"] for row in choices} <= {0, 0.5, 1}
    assert value(results, "sft", "forced_choice") == sum(row["right"] for row in choices) / 9
    assert all(row["true"] in row["persona"] and row["false"] not in row["persona"] for row in choices)
    assert all((row["nats_true"] < row["nats_false"]) == (row["right"] == 1) for row in choices)
    assert "forced_choice" not in results["agree"]["metrics"]
    # always a yes: right on the true suggestion alone, so of three pairs one agrees
    assert value(results, "agree", "probe_agreement") == pytest.approx(1 / 3)
    assert results["agree"]["run"]["probe_agreement_by_chance"] == pytest.approx(1 / 3)
    assert compare(system_items(folder / "ppo"), system_items(folder / "sft"), num_resamples=50, num_trials=50)[
        "forced_choice"
    ]["b"] == value(results, "sft", "forced_choice")


def test_all_bots_are_probed_unless_there_is_one_persona(dataset):
    args = EvaluateConfig(dataset=str(dataset), output_dir="y", systems={"base": None})
    probes = read_jsonl(dataset / "probes.jsonl")
    assert _bots(args, probes) == args.bots and set(args.bots) == {"oracle", "wrong_persona", *DEGENERATE}
    assert "wrong_persona" not in _bots(args, probes[:3])


def test_the_folder_of_a_run_may_move(evaluated, sft_run, tmp_path, monkeypatch):
    """The systems' adapters are named from the folder, and read from there."""
    folder, _ = evaluated
    systems = yaml.safe_load((folder / "config.yaml").read_text())["systems"]
    assert systems["base"] is None and systems["sft"].startswith("../")
    monkeypatch.chdir(tmp_path)
    args, _ = parse(config_classes("evaluate"), ["--config", str(folder / "config.yaml")], "evaluate")
    assert Path(args.systems["sft"]).samefile(sft_run.folder)


def test_data_without_probes(tiny_llama, dataset, tmp_path):
    data = tmp_path / "prepare"
    shutil.copytree(dataset, data)
    (data / "probes.jsonl").unlink()
    write_json(data / "metadata.json", read_record(data) | {"result_hash": folder_hash(data)})
    # Three characters with a pet and a food; their dialogues are too short for a probe after three exchanges.
    results = evaluate(tmp_path / "some", data, tiny_llama, {"base": None}, ["oracle", "agree"], max_dialogues=3)
    assert value(results, "oracle", "persona_consistency") == 1 and value(results, "agree", "persona_consistency") == 0
    assert results["base"]["metrics"]["persona_consistency"]["n"] == 6 * 2  # in seen and in held-out wordings
    coverage = results["base"]["run"]["probe_coverage"]
    assert coverage["facts"] == coverage["scorable"] == 6 and coverage["without_history"] == {"3": 3}
    rows = read_jsonl(data / "dialogues_heldout.jsonl")
    write_jsonl(data / "dialogues_heldout.jsonl", ({**row, "persona": ["zzz ."]} for row in rows))
    write_json(data / "metadata.json", read_record(data) | {"result_hash": folder_hash(data)})
    results = evaluate(tmp_path / "none", data, tiny_llama, {"base": None}, ["oracle"], max_dialogues=3)
    for name in ("base", "oracle"):
        assert "persona_consistency" not in results[name]["metrics"] and results[name]["breakdown"] == []
        reason = "no fact of the held-out personas can be probed"
        assert results[name]["run"]["not_scored"]["persona_consistency"] == reason
        assert results[name]["run"]["probe_coverage"]["unscorable_share"] == 1


def test_candidates_and_a_judge(tiny_llama, dataset, sft_run, tmp_path):
    """Data with candidates has hits@1; with a classifier there is a C-score, of rules and models alike."""
    data, judge = tmp_path / "prepare", tmp_path / "judge"
    shutil.copytree(dataset, data)
    rows = read_jsonl(data / "dialogues_heldout.jsonl")
    for row in rows:
        row["candidates"] = [
            [m["content"], "well", "no"] if m["role"] == "assistant" else None for m in row["messages"]
        ]
    write_jsonl(data / "dialogues_heldout.jsonl", rows)
    write_json(data / "metadata.json", read_record(data) | {"result_hash": folder_hash(data)})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, id2label=labels, **sizes)
    classifier = BertForSequenceClassification(config)
    with torch.no_grad():  # says "entailment" whatever it reads
        classifier.classifier.weight.zero_()
        classifier.classifier.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    classifier.save_pretrained(judge)
    tokenizer.save_pretrained(judge)

    folder = tmp_path / "evaluate"
    systems = {"base": None, "sft": str(sft_run.folder)}
    results = evaluate(folder, data, tiny_llama, systems, ["oracle", "silence"], nli_model=judge, max_ranked=8)
    assert results["sft"]["metrics"]["hits_at_1"]["n"] == 8
    hits = results["base"]["metrics"]["hits_at_1"]
    assert hits["n"] == 8 and results["base"]["run"]["candidates"] == [3]
    likelihoods = read_jsonl(folder / "base" / "likelihoods.jsonl")
    assert [("nats" in row, "hit" in row) for row in likelihoods] == [(True, False)] * 9 + [(False, True)] * 8
    assert hits["value"] == sum(row["hit"] for row in likelihoods[9:]) / 8
    nats, tokens = (sum(row[key] for row in likelihoods[:9]) for key in ("nats", "tokens"))
    assert value(results, "base", "perplexity_token") == pytest.approx(math.exp(nats / tokens))
    assert not (folder / "oracle" / "likelihoods.jsonl").exists()
    facts = len(rows[0]["persona"])
    assert value(results, "oracle", "c_score") == facts and value(results, "silence", "c_score") == 0
    assert results["oracle"]["run"]["nli_model"] == str(judge)
    compared = compare(
        system_items(folder / "base"), system_items(folder / "oracle"), num_resamples=200, num_trials=200
    )
    assert {"persona_consistency", "bleu", "c_score"} <= set(compared) and "hits_at_1" not in compared
    assert compared["c_score"]["effect_name"] == "Cliff's delta"


def test_a_changed_adapter_is_refused(tiny_llama, dataset, sft_run, tmp_path):
    adapter = tmp_path / "sft"
    shutil.copytree(sft_run.folder, adapter)
    write_json(adapter / "metadata.json", read_record(adapter) | {"parents": {}})
    shutil.copy(sft_run.folder / "checkpoint-6" / "optimizer.pt", adapter / "adapter_model.safetensors")
    with pytest.raises(RunError, match="not those that its record names"):
        evaluate(tmp_path / "evaluate", dataset, tiny_llama, {"sft": str(adapter)})


@pytest.mark.parametrize(
    ("kind", "foil", "persona", "reply"),
    [
        ("direct", None, "dog", "i have a dog ."),
        ("true_suggestion", None, "dog", "yes , i have a dog ."),
        ("false_suggestion", "cat", "dog", "no , i have a dog ."),
        ("false_suggestion", "cat", "cat", "yes , i have a cat ."),  # right for the other persona
        ("direct", None, None, "i do not know ."),
    ],
)
def test_reply_from_a_persona(kind, foil, persona, reply):
    probe = {"kind": kind, "slot": "pet", "value": "dog", "foil": foil, "persona_id": "asked"}
    values = {"pet": persona} if persona else {}
    source = {"persona_id": "read", "persona": [f"i have a {persona} ."], "persona_values": values}
    assert other_persona([probe, source])(probe, random.Random(0)) == reply


def test_kl_is_estimated_on_all_kinds_and_turns():
    kinds = ("direct", "false_suggestion", "true_suggestion")
    rows = [
        {"decoding": decoding, "kind": kinds[i % 3], "turn": 5 * (i // 6 % 2)}
        for decoding in ("greedy", "sampled")
        for i in range(6000)
    ]
    chosen = _kl_rows(rows, seed=0)
    assert len(chosen) == 1000 and {row["decoding"] for row in chosen} == {"sampled"}
    assert {(row["kind"], row["turn"]) for row in chosen} == {(kind, turn) for kind in kinds for turn in (0, 5)}


def test_a_name_without_adapter_is_refused():
    with pytest.raises(ValueError, match="oracle has no adapter; .* rules go into `bots`"):
        EvaluateConfig(dataset="x", output_dir="y", systems={"base": None, "oracle": None})
    with pytest.raises(ValueError, match="silence is the name of a rule"):
        EvaluateConfig(dataset="x", output_dir="y", systems={"silence": "runs/x/sft"})
