"""A stage's record: status, parents that are refused, log file, and the launch that is not what it seems."""

import errno
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from rlhf.config import ConfigError, DataConfig, load_yaml
from rlhf.files import folder_hash, write_json
from rlhf.record import RunError, base_of, check_world_size, launch, model_card, read_record, stage
from rlhf.session import SessionEnded


def run_stage(folder, parents=None, **found):
    with stage("sft", folder, [DataConfig(dataset="d")], seed=1, parents=parents) as record:
        logging.getLogger("rlhf.test").info("inside")
        assert read_record(folder)["status"] == "running"
        record.update(found)


def test_files_of_a_stage(tmp_path, dataset):
    folder = tmp_path / "sft"
    run_stage(folder, {"prepare": dataset}, tokens=7)
    record = read_record(folder)
    assert record["status"] == "done" and record["tokens"] == 7 and record["seed"] == 1
    assert record["parents"]["prepare"]["hash"] == record["data_hash"] == folder_hash(dataset)
    assert (folder / record["parents"]["prepare"]["path"]).resolve() == dataset.resolve()
    assert not record["parents"]["prepare"]["path"].startswith("/")
    assert record["hardware"]["processes"] == 1 and {"torch", "trl", "python"} <= record["versions"].keys()
    assert record["started"] <= record["finished"] and record["wall_seconds"] >= 0 and record["peak_memory_gb"] > 0
    assert record["cost"]["gpu_hours"] == record["cost"]["total"] == 0.0  # no GPU in the tests
    assert load_yaml(folder / "config.yaml")[0]["dataset"] == "d"
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO rlhf.test: inside$",
                     (folder / "training.log").read_text(), re.MULTILINE)  # fmt: skip
    assert not any(type(handler) is logging.FileHandler for handler in logging.getLogger().handlers)


def test_a_failure_is_recorded_and_raised(tmp_path):
    with pytest.raises(ZeroDivisionError), stage("sft", tmp_path / "sft", [], seed=1):
        1 / 0  # noqa: B018
    record = read_record(tmp_path / "sft")
    assert record["status"] == "failed" and record["error"].startswith("ZeroDivisionError")
    log = (tmp_path / "sft" / "training.log").read_text()
    assert "ERROR rlhf.record: ZeroDivisionError" in log and "Traceback" in log


def missing(folder):
    shutil.rmtree(folder)


def unfinished(folder):
    write_json(folder / "metadata.json", read_record(folder) | {"status": "failed"})


def changed(folder):
    (folder / "prompts_train.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, "'prepare' is needed.*rlhf run recipes/<name> --until prepare"),
        (unfinished, "'prepare'.* is not finished"),
        (changed, "not those that its record names.*Run the stage 'prepare' again"),
    ],
)
def test_a_refused_parent_leaves_what_was_there(spoil, message, dataset, tmp_path):
    data, folder = tmp_path / "prepare", tmp_path / "sft"
    shutil.copytree(dataset, data)
    run_stage(folder, {"prepare": data})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spoil(data)
    with pytest.raises(RunError, match=message):
        run_stage(folder, {"prepare": data})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not any(type(handler) is logging.FileHandler for handler in logging.getLogger().handlers)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_a_stage_that_is_not_fit_to_start_leaves_what_was_there(name, sft_run, train, tiny_llama, dataset, tmp_path):
    """A recipe's own script, started over a finished run with a setting that the pre-flight list refuses."""
    run_stage(tmp_path / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    keys = {"sft_adapter": sft_run.folder} if name in ("dpo", "ppo") else {}
    keys |= {"reward_function": "rlhf.rewards:persona_rule"} if name == "ppo" else {}
    with pytest.raises(RunError, match="not fit to start"):
        train(name, tmp_path / name, max_length=4, model_name_or_path=tiny_llama, dataset=dataset, **keys)
    assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


def test_the_preflight_list_stands_in_the_log(sft_run):
    log = (sft_run.folder / "training.log").read_text()
    assert log.count("check mask      passed") == 1


def test_all_missing_parents_are_named(tmp_path):
    with pytest.raises(RunError) as refused:
        run_stage(tmp_path / "dpo", {"prepare": tmp_path / "pairs", "sft": tmp_path / "mine"})
    first, second = str(refused.value).splitlines()
    assert "--until pairs`" in first and "--until sft`" in second and str(tmp_path / "mine") in second


@pytest.mark.parametrize(
    ("used_as", "made_by", "needed"),
    [("reward", "sft", "reward"), ("sft", "reward", "sft or dpo or ppo"), ("prepare", "sft", "prepare or pairs")],
)
def test_a_parent_of_another_kind_is_refused(used_as, made_by, needed, tmp_path):
    parent = tmp_path / "parent"
    write_json(parent / "metadata.json", {"stage": made_by, "status": "done", "parents": {}})
    with pytest.raises(RunError, match=f"made by the stage '{made_by}'.*needed as '{used_as}' is made by {needed}"):
        run_stage(tmp_path / "child", {used_as: parent})


def test_a_base_that_is_not_there(sft_run, train, dataset, tmp_path):
    """Read as the name of a hub model until the stage looks; `./nowhere` can be nothing but a path (see test_config)."""
    base = "recipes/demo/nowhere"
    with pytest.raises(RunError) as refused:
        train("dpo", tmp_path, model_name_or_path=base, dataset=dataset, sft_adapter=sft_run.folder)
    assert str(refused.value).startswith(f"`model_name_or_path`: there is no folder {base}. Name")
    assert "belongs to another base" not in str(refused.value)


@pytest.mark.parametrize("text", ["", '{"stage": "prep', "[]", "{}"])
def test_a_damaged_record_is_named(text, tmp_path):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(RunError, match=r"metadata.json is empty or damaged. Delete it, and run the stage again"):
        read_record(tmp_path)


def test_a_parent_without_its_adapter_is_refused(sft_run, tmp_path):
    sft = shutil.copytree(sft_run.folder, tmp_path / "sft")
    (sft / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"The files in .*sft are not those .* Run the stage 'sft' again"):
        run_stage(tmp_path / "dpo", {"sft": sft})
    assert not (tmp_path / "dpo").exists()


def test_a_stage_that_is_stopped_by_the_session_says_so(tmp_path):
    with pytest.raises(SessionEnded), stage("sft", tmp_path / "sft", [], seed=1):
        raise SessionEnded("the session ends; it stopped at step 3 of 9")
    record = read_record(tmp_path / "sft")
    assert (record["status"], record["stopped"]) == ("stopped", "the session ends; it stopped at step 3 of 9")
    log = (tmp_path / "sft" / "training.log").read_text()
    assert "it stopped at step 3" in log and "ERROR" not in log and "Traceback" not in log


@pytest.mark.parametrize("done", [True, False])
def test_a_full_disk_is_told_and_hides_no_other_error(done, tmp_path, monkeypatch):
    """Within the stage, and when the record of a finished one is written."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    refused = pytest.raises(RunError, match=r"the disk of .*sft is full: [\d,]+ bytes are free. Make room")
    with refused as told, stage("sft", tmp_path / "sft", [], seed=1):
        monkeypatch.setattr("rlhf.record.write_json", full)
        if not done:
            full()
    assert told.value.__cause__.errno == errno.ENOSPC
    assert read_record(tmp_path / "sft")["status"] == "running"


def test_a_stale_parent_is_refused(dataset, tmp_path):
    """SFT was made from data that has since been made anew."""
    data, sft = tmp_path / "prepare", tmp_path / "sft"
    shutil.copytree(dataset, data)
    run_stage(sft, {"prepare": data})
    run_stage(tmp_path / "dpo", {"prepare": data, "sft": sft})
    changed(data)
    write_json(data / "metadata.json", read_record(data) | {"result_hash": folder_hash(data)})
    with pytest.raises(
        RunError, match="'sft'.* is stale: it was made from another 'prepare'.*Run the stage 'sft' again"
    ):
        run_stage(tmp_path / "dpo", {"prepare": data, "sft": sft})


@pytest.mark.parametrize("same_path", [False, True], ids=["another base", "the base was trained anew"])
def test_a_foreign_adapter_is_refused(same_path, sft_run, train, tiny_llama, dataset, tmp_path):
    """Another base of the same shape would take the adapter without a word."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    shared = {"dataset": dataset, "model_name_or_path": base}
    parent = train("sft", tmp_path / "sft", max_steps=2, **shared).folder if same_path else sft_run.folder
    train("dpo", tmp_path / "dpo", max_steps=2, sft_adapter=parent, **shared)  # the same weights, wherever they lie
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(base)
    with pytest.raises(RunError, match="'sft'.* belongs to another base model"):
        train("dpo", tmp_path / "dpo", max_steps=2, sft_adapter=parent, **shared)


def test_no_file_of_a_run_names_a_path_of_this_machine(train, tiny_llama, dataset, tmp_path, monkeypatch):
    """DPO: adapters of PEFT's, checkpoints of the Trainer's, a card of TRL's."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    shutil.copytree(dataset, tmp_path / "runs" / "prepare")
    monkeypatch.chdir(tmp_path)
    shared = {"dataset": "runs/prepare", "model_name_or_path": tmp_path / "base", "max_steps": 2}
    train("sft", Path("runs/sft"), **shared)
    train("dpo", Path("runs/dpo"), sft_adapter="runs/sft", **shared)
    folder = tmp_path / "runs" / "dpo"
    texts = [p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl", ".yaml", ".md")]
    assert {"metadata.json", "adapter_config.json", "config.yaml", "MODEL_CARD.md"} <= {path.name for path in texts}
    assert [path.name for path in texts if str(tmp_path) in path.read_text()] == []
    assert not list(folder.rglob("README.md")) and (folder / "checkpoint-2").is_dir()
    assert read_record(folder)["model_name_or_path"] == "../../base"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_the_model_card_names_the_persona_and_shows_it_as_it_is(tmp_path):
    facts = ["# i like *stars* & <b>bold</b>", "1. i have_two_dogs", "- see [x](y) `z` \n| a ~b~", "i live in oslo ."]
    persona = {"name": "ju*no*", "facts": facts, "style": "brief and polite", "examples": []}
    data = tmp_path / "prepare"
    run_stage(data, {})
    write_json(data / "metadata.json", read_record(data) | {"stage": "prepare", "persona": persona})
    run_stage(tmp_path / "sft", {"prepare": data})
    record = read_record(tmp_path / "sft")
    assert record["persona"] == persona
    card = model_card(record)
    section = card[card.index("## Persona") : card.index("## Use")]
    blocks = [token for token in MarkdownIt().enable("strikethrough").parse(section) if token.type == "inline"]
    assert all(child.type in ("text", "hardbreak", "softbreak") for token in blocks for child in token.children)
    shown = ["".join(child.content or "|" for child in token.children) for token in blocks]
    assert shown == ["Persona", "Name: ju*no*|Style: brief and polite", *(" ".join(fact.split()) for fact in facts)]
    assert "## Persona" not in model_card({key: record[key] for key in record if key != "persona"})


def test_a_base_is_found_from_its_adapter(sft_run, tiny_llama, tiny_qwen2, tmp_path):
    record = read_record(sft_run.folder)
    assert Path(base_of(record, sft_run.folder)) == tiny_llama
    moved = tmp_path / "a" / "b" / "moved"
    with pytest.raises(RunError, match=r"is not there: .*llama. Give --model_name_or_path"):
        base_of(record, moved)
    assert base_of(record, moved, str(tiny_llama)) == str(tiny_llama)
    with pytest.raises(RunError, match="belongs to another base model than .*qwen2"):
        base_of(record, moved, str(tiny_qwen2))
    assert base_of({"model_name_or_path": "some/hub-id"}, moved) == "some/hub-id"


def test_launch_ends_in_a_message(capsys):
    def main(config):
        raise RunError("no parent")

    with pytest.raises(SystemExit) as end:
        launch(main, (DataConfig,), "sft", ["--dataset", "d"])
    assert end.value.code == 2 and capsys.readouterr().err == "error: no parent\n"
    with pytest.raises(SystemExit):
        launch(main, (DataConfig,), "sft", ["--datset", "d"])
    assert "did you mean `dataset`" in capsys.readouterr().err


def test_launch_does_not_hide_defects():
    def main(config):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        launch(main, (DataConfig,), "sft", ["--dataset", "d"])
    assert issubclass(ConfigError, ValueError) and issubclass(RunError, RuntimeError)


@pytest.mark.parametrize(
    ("error", "told"), [(KeyError("a defect"), "KeyError: 'a defect'"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)
def test_a_defect_within_a_stage_is_a_message(error, told, tmp_path, capsys):
    def main(config):
        with stage("sft", tmp_path / "sft", [config], seed=1):
            raise error

    with pytest.raises(SystemExit) as end:
        launch(main, (DataConfig,), "sft", ["--dataset", "d"])
    log = tmp_path / "sft" / "training.log"
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said[-2:] == [f"error: {told}", f"The traceback is in {log}."]
    assert "Traceback" in log.read_text()


def test_ranks_that_do_not_know_each_other(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    check_world_size(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="started 2 processes .WORLD_SIZE.*a world of 1.*use_cpu: true"):
        check_world_size(args)


def test_metadata_is_json_without_nan(tmp_path):
    folder = tmp_path / "sft"
    run_stage(folder)
    json.loads((folder / "metadata.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").is_file(), reason="the kernel's peak can be reset on Linux alone"
)
def test_peak_memory_is_that_of_the_stage(tmp_path):
    bytearray(600_000_000)  # another stage's, gone before this one starts
    run_stage(tmp_path / "small")
    with stage("prepare", tmp_path / "large", [], 0):
        bytearray(600_000_000)
    small, large = (read_record(tmp_path / name)["peak_memory_gb"] for name in ("small", "large"))
    assert large - small == pytest.approx(0.6, abs=0.1)  # what the interpreter allocates meanwhile
