"""The pre-flight list: what passes on good data, and each item failing on what it is there for."""

import io
import json
import shutil

import pytest
from rich.console import Console

from rlhf import check, doctor
from rlhf.check import Example, examine, preflight, show
from rlhf.cli import main
from rlhf.config import parse
from rlhf.data.columns import sft_columns
from rlhf.model import load_tokenizer
from rlhf.pipeline import config_classes
from rlhf.record import RunError
from tests.conftest import ZEPHYR_TEMPLATE

NAMES = [
    "device", "clipping", "data", "held-out", "steps", "samples", "format", "mask", "nan", "stop", "prompt", "length"
]  # fmt: skip


@pytest.fixture
def configs(tiny_llama, dataset, tmp_path):
    def make(stage, **values):
        values = {"model_name_or_path": tiny_llama, "dataset": dataset, "output_dir": tmp_path / "run", "use_cpu": True,
                  "max_length": 256, "sample_steps": 1, **values}  # fmt: skip
        if stage == "ppo":
            values = {
                "total_episodes": 64,
                "per_device_train_batch_size": 4,
                "reward_function": "builtins:len",
                **values,
            }
        return parse(config_classes(stage), [f"--{key}={value}" for key, value in values.items()], stage)

    return make


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    """The tokenizer that a stage saves beside its adapter."""
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def failed(examination):
    return {item.name: item.detail for item in examination.items if not item.passed}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_good_data_passes(stage, configs, adapter):
    parents = {"sft_adapter": adapter} if stage in ("dpo", "ppo") else {}
    examination = examine(stage, configs(stage, **parents))
    assert not failed(examination)
    assert [item.name for item in examination.items] == NAMES + ["parent"] * len(parents)
    preflight(stage, configs(stage, **parents))


# Both folders lie beside the stage's own, where an earlier stage may make them: elsewhere the parser refuses them.
@pytest.mark.parametrize(
    ("values", "name", "detail"),
    [
        ({"dataset": "nowhere", "output_dir": "run"}, "data", "The stage `prepare` makes it"),
        ({"model_name_or_path": "./nowhere", "output_dir": "run"}, "format", "`model_name_or_path`"),
        ({"max_length": 40}, "length", "With `max_length`"),
    ],
)
def test_what_would_spoil_the_training_stops_it(configs, values, name, detail):
    assert detail in failed(examine("sft", configs("sft", **values)))[name]
    with pytest.raises(RunError, match=f"not fit to start:(.|\n)*- {name}: "):
        preflight("sft", configs("sft", **values))


def test_of_files_that_are_sampled_whole_the_share_is_that_of_the_training(configs, tiny_llama, dataset, tmp_path):
    """As `columns` counts it, for each file: 1 of 9 held-out rows is more than 5 %, and 1 of 24 training rows is not."""
    tokenizer = load_tokenizer(str(tiny_llama))
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)

    def lengthen(side):
        lines = (dataset / f"dialogues_{side}.jsonl").read_text().split("\n")
        row = json.loads(lines[0])
        row["messages"] *= 30  # of which the older ones can be cut
        (folder / f"dialogues_{side}.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]))
        shorter = [json.loads(line) for line in lines[1:] if line]
        return max(len(row["input_ids"]) for row in sft_columns(shorter, tokenizer, 10**6))

    limit = max(lengthen("train"), 200)
    assert not failed(examine("sft", configs("sft", dataset=folder, max_length=limit)))
    assert lengthen("heldout") <= limit
    found = failed(examine("sft", configs("sft", dataset=folder, max_length=limit)))["length"]
    assert found.startswith("2 of 33 sampled rows (6%)") and "allows 5%" in found


def test_pairs_that_one_character_does_not_have_are_explained(configs, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    for path in folder.glob("preferences_*"):
        path.unlink()
    found = failed(examine("reward", configs("reward", dataset=folder)))
    assert set(found) == {"data", "held-out"} and "It made no pairs" in found["data"]


def test_what_is_only_unwise_does_not_stop_it(configs, caplog):
    unwise = configs("sft", max_grad_norm=0, sample_steps=100, max_steps=5)
    assert failed(examine("sft", unwise)) == {
        "clipping": "`max_grad_norm` 0.0: gradients are not clipped; set 1.0",
        "samples": "`sample_steps` is 100, so the trained model is never sampled; set 5 or less",
    }
    preflight("sft", unwise)
    assert "check clipping  FAILED" in caplog.text


def spoken(folder, user, assistant):
    """40 rows in which these two turns are said, each row with a persona of its own."""
    rows = [
        {"persona": [f"i have a pet{n} ."], "dialogue_id": f"{n}", "source": "test",
         "messages": [{"role": "user", "content": user.format(n)}, {"role": "assistant", "content": assistant.format(n)}]}
        for n in range(40)
    ]  # fmt: skip
    (folder / "dialogues_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("user", "assistant", "passed"),
    [
        ("hello .", "my pet{} is here .", True),
        ("so you have a pet{} ?", "i do , my pet{} is here .", None),  # brought up by a question: says nothing
        ("i feed my pet{} now .", "good .", False),
        ("i feed my pet{} now .", "good , i have a pet{} .", False),
        ("hello .", "good .", None),
    ],
)
def test_a_persona_of_which_the_user_speaks_is_said_to_be_the_users(
    user, assistant, passed, configs, dataset, tmp_path
):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    spoken(folder, user, assistant)
    found = [item for item in examine("sft", configs("sft", dataset=folder)).items if item.name == "roles"]
    assert [item.passed for item in found] == ([] if passed is None else [passed])
    assert all(
        ("100% are" if passed else " 0% are") in item.detail and not (item.blocks and not passed) for item in found
    )


def test_the_last_rollout_is_a_whole_one(configs, adapter):
    """8 episodes in rollouts of 4 x 5 are one rollout, of 5 minibatches and 4 epochs: as the trainer counts."""
    asked = configs("ppo", sft_adapter=adapter, total_episodes=8, num_mini_batches=5)
    steps = next(item.detail for item in examine("ppo", asked).items if item.name == "steps")
    assert "in rollouts of 20: 20 optimiser steps" in steps


def test_prompts_that_leave_a_reply_no_position_are_refused(configs, adapter):
    """The model has 512 positions."""
    fits = configs("ppo", sft_adapter=adapter, max_length=500, response_length=12)
    assert "positions" not in failed(examine("ppo", fits))
    found = failed(examine("ppo", configs("ppo", sft_adapter=adapter, max_length=505, response_length=53)))
    assert "`max_length` 505" in found["positions"] and "53 tokens (`response_length`" in found["positions"]
    assert "the model has 512 positions. Set `max_length` to 459 or less" in found["positions"]


def test_an_adapter_of_another_chat_format_is_refused(configs, adapter, tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = ZEPHYR_TEMPLATE.replace(
        "'<|' + message['role'] + '|>\n'", "'### ' + message['role'] + '\n'"
    ).replace("<|assistant|>", "### assistant")  # as Alpaca's
    tokenizer.save_pretrained(adapter)
    assert "### system" in failed(examine("dpo", configs("dpo", sft_adapter=adapter)))["parent"]
    shutil.rmtree(adapter)
    assert "an earlier stage makes it" in failed(examine("dpo", configs("dpo", sft_adapter=adapter)))["parent"]
    adapter.mkdir()
    assert "no tokenizer" in failed(examine("dpo", configs("dpo", sft_adapter=adapter)))["parent"]


def tampered(monkeypatch, change):
    def columns(rows, tokenizer, *args):
        row = sft_columns(rows, tokenizer, *args).to_list()[0]
        return [{**row, **change(row, tokenizer)}]

    monkeypatch.setattr(check, "sft_columns", columns)


def test_a_loss_on_the_prompt_is_seen(configs, monkeypatch):
    tampered(monkeypatch, lambda row, tokenizer: {"labels": row["input_ids"]})
    assert set(failed(examine("sft", configs("sft")))) >= {"mask"}


def test_a_stop_token_masked_as_padding_is_seen(configs, monkeypatch):
    """As collators do that mask every id that is the pad id."""
    tampered(
        monkeypatch,
        lambda row, tokenizer: {"labels": [-100 if id == tokenizer.pad_token_id else id for id in row["labels"]]},
    )
    assert "do not end with one '</s>'" in failed(examine("sft", configs("sft")))["stop"]


def test_a_prompt_of_another_form_is_seen(configs, monkeypatch):
    tampered(
        monkeypatch,
        lambda row, tokenizer: {"input_ids": [7, *row["input_ids"]], "labels": [-100, *row["labels"]]},
    )
    assert set(failed(examine("sft", configs("sft")))) == {"prompt"}


def test_a_row_without_a_trained_token_is_seen(configs, monkeypatch):
    tampered(monkeypatch, lambda row, tokenizer: {"labels": [-100] * len(row["labels"])})
    assert failed(examine("sft", configs("sft")))["nan"].startswith("33 of 33 sampled sequences have no trained token")


def test_stretches_of_trained_tokens():
    assert Example([5, 6, 7, 8, 9], [0, 1, 1, 0, 1], []).runs() == [(1, [6, 7]), (4, [9])]


def test_the_dialogue_is_shown_with_its_trained_tokens_marked(configs):
    console = Console(width=200, record=True, file=io.StringIO())
    assert show("sft", configs("sft"), console) == []
    text = console.export_text()
    assert "⟦i have a dog .</s>⟧" in text and "sft: all 12 items passed" in text
    assert "0 of 33 sampled rows (0%) are longer than `max_length` 256" in " ".join(text.split())


def test_the_plan_is_shown_with_its_reasons(configs):
    console = Console(width=200, record=True, file=io.StringIO())
    show("sft", configs("sft", plan_by_size=True), console)
    lines = [line.strip("│ ").split(maxsplit=2) for line in console.export_text().splitlines()]
    assert ["lora_r", "8", "24 examples: fewer than 100; the more examples, the larger an adapter they fill"] in lines
    assert ["max_length", "256", "overridden; the plan says 512"] in lines


def test_the_command_ends_with_a_status(tiny_llama, dataset, tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    values = {
        "model_name_or_path": str(tiny_llama),
        "dataset": str(dataset),
        "output_dir": "runs/x",
        "sample_steps": 1,
    }
    path.write_text(json.dumps(values))  # JSON is YAML
    main(["check", str(path), "--use_cpu", "true"])
    assert "all 12 items passed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["check", str(path), "--use_cpu", "true", "--max_grad_norm=0"])
    assert end.value.code == 1 and "sft would start, but see: clipping" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["check", str(tmp_path / "prepare.yaml")])
    assert end.value.code == 2 and "no training stage" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def fit_machine(monkeypatch):
    monkeypatch.setattr(doctor, "machine", doctor.Machine)


@pytest.fixture
def recipe(tiny_llama, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shared = {
        "model_name_or_path": str(tiny_llama),
        "dataset": "runs/mine/prepare",
        "sample_steps": 1,
        "use_cpu": True,
    }
    for stage in ("sft", "dpo"):
        more = {"sft_adapter": "runs/mine/sft"} if stage == "dpo" else {}
        (folder / f"{stage}.yaml").write_text(json.dumps({**shared, **more, "output_dir": f"runs/mine/{stage}"}))
    return folder


def test_a_recipe_is_checked_stage_by_stage(recipe, dataset, capsys):
    main(["check", str(recipe), "--dataset", str(dataset), "--max_length=256"])
    shown = capsys.readouterr().out
    assert "sft: all 12 items passed" in shown and "dpo: all 13 items passed" in shown
    assert "there is no runs/mine/sft yet; an earlier stage makes it" in shown and "pass sft\npass dpo\n" in shown
    assert shown.index("pass dpo\n") < shown.index("plan for 2 x T4")
    with pytest.raises(SystemExit) as end:
        main(["check", str(recipe), "--dataset", str(dataset), "--dpo.max_length", "30"])
    shown = capsys.readouterr().out
    assert end.value.code == 1 and "dpo is not fit to start: length" in shown
    assert "pass sft\nFAIL dpo: length\n" in shown


def test_the_findings_as_json(recipe, dataset, capsys):
    words = [str(recipe), "--dataset", str(dataset), "--dpo.max_length", "30"]
    with pytest.raises(SystemExit) as end:
        main(["check", "--json", *words])
    printed = capsys.readouterr().out
    findings = {finding["name"]: finding for finding in json.loads(printed)}
    assert end.value.code == 1 and findings["torch"]["status"] == "ok" and findings["sft: mask"]["status"] == "ok"
    assert findings["dpo: length"]["status"] == "fail" and "`max_length` 30" in findings["dpo: length"]["found"]
    assert findings["dpo: parent"]["status"] == "ok"  # its folder comes from the stage before
    assert findings["sft: plan"]["status"] == "ok" and " of 14.74 GiB on each GPU, " in findings["sft: plan"]["found"]
    with pytest.raises(SystemExit):
        main(["check", *words, "--json"])
    assert capsys.readouterr().out == printed


def test_a_recipe_that_ran_elsewhere_is_checked_there(recipe, dataset, adapter, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "prepare").symlink_to(dataset)
    (tmp_path / "elsewhere" / "sft").symlink_to(adapter)
    main(["check", str(recipe), "--output_dir", str(tmp_path / "elsewhere")])
    assert "was trained on dialogues of the same form" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset"], "`--dataset` (command line): write --key value"),
        (["dataset=x"], "`dataset=x` (command line): write --key value"),
        (["--datset", "x"], "`datset` (--set): no stage of this recipe knows it"),
        (["--tiny"], "has no tiny.yaml"),
    ],
)
def test_a_wrong_command_for_a_recipe_is_a_message(recipe, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", str(recipe), *words])
    assert end.value.code == 2 and message in capsys.readouterr().err


# -- data that would train badly, and where it is ----------------------------------------------------------------------


@pytest.fixture
def changed(dataset, tmp_path):
    """A copy of the data of which one file's rows go through `change`."""

    def make(file, change):
        folder = tmp_path / "changed"
        shutil.copytree(dataset, folder)
        rows = [json.loads(line) for line in (dataset / file).read_text().splitlines()]
        change(rows)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


def test_data_of_a_stage_that_was_refused_are_no_data(configs, adapter, dataset, tmp_path):
    folder = tmp_path / "refused"
    shutil.copytree(dataset, folder)
    record = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**record, "status": "failed"}))
    found = failed(examine("dpo", configs("dpo", dataset=folder, sft_adapter=adapter)))
    assert "the stage 'prepare'" in found["data"] and "ended as 'failed'" in found["data"]


def test_empty_replies_are_seen(configs, changed):
    def empty(rows):
        for row in rows:
            row["messages"][1]["content"] = ""

    found = failed(examine("sft", configs("sft", dataset=changed("dialogues_train.jsonl", empty))))
    assert "24 of" in found["stop"] and "teaches silence" in found["stop"]


def test_held_out_rows_that_are_trained_on_are_seen(configs, dataset, changed):
    train = [json.loads(line) for line in (dataset / "dialogues_train.jsonl").read_text().splitlines()]

    def leak(rows):
        rows[2:4] = train[:2]

    found = failed(examine("sft", configs("sft", dataset=changed("dialogues_heldout.jsonl", leak))))
    assert found["held-out"].startswith("2 of 9 rows") and "in the training file too" in found["held-out"]


def test_a_row_that_cannot_be_cut_is_named_though_it_is_the_only_one(configs, adapter, changed, monkeypatch):
    """Only one row is sampled, the first: the eighth is looked at since it is the longest."""
    monkeypatch.setattr(check, "SAMPLED_ROWS", 1)

    def lengthen(rows):
        rows[7]["chosen"][0]["content"] = "i have a dog . " * 100

    folder = changed("preferences_train.jsonl", lengthen)
    found = failed(examine("dpo", configs("dpo", dataset=folder, sft_adapter=adapter)))
    assert f"{folder / 'preferences_train.jsonl'}, row 8: " in found["length"] and "row 1:" not in found["length"]


def test_a_malformed_row_is_named_by_file_and_number(configs, changed):
    def spoil(rows):
        rows[4]["messages"][0]["role"] = "narrator"

    folder = changed("dialogues_heldout.jsonl", spoil)
    found = failed(examine("sft", configs("sft", dataset=folder)))
    assert found["format"].startswith(f"{folder / 'dialogues_heldout.jsonl'}, row 5: ")
