"""`rlhf run`: what is planned, skipped, made anew, gone on with, and refused before anything starts."""

import json
import os
import random
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import rlhf
from rlhf import checkpoints, session
from rlhf.cli import main
from rlhf.config import ConfigError, parse, values_of
from rlhf.files import read_jsonl, write_json, write_jsonl
from rlhf.pipeline import config_classes, plan
from rlhf.record import RunError, read_record
from rlhf.sft import PersonaSFTTrainer
from rlhf.sft import main as train_sft

ROOT = Path(__file__).parents[1]
SHARED = {"seed": 3, "lora_r": 4, "lora_alpha": 8}
TRAINING = {
    "max_length": 256, "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
    "save_steps": 2, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def write_dialogues(path):
    """Twenty-four characters with a dialogue each, of random words, so that none is a near-duplicate of another.

    All are asked alike and each reply speaks of its character, so that replies can be exchanged.
    """
    rng = random.Random(0)

    def words(number):
        return " ".join("".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(number))

    rows = []
    for number in range(24):
        facts = [words(2), words(2)]
        turns = []
        for fact in facts:
            turns.append({"role": "user", "content": f"what do you like best these days , {words(1)} ?"})
            turns.append({"role": "assistant", "content": f"{words(2)} {fact} {words(2)} ."})
        persona = [f"{fact} ." for fact in facts]
        rows.append({"persona": persona, "messages": turns, "dialogue_id": str(number), "source": "mine"})
    write_jsonl(path, rows)


@pytest.fixture(scope="module")
def recipe(tiny_llama, tmp_path_factory):
    """All stages but `base`, of seconds; as the shipped ones are written."""
    folder = tmp_path_factory.mktemp("recipes") / "small"
    folder.mkdir()
    write_dialogues(folder / "mine.jsonl")
    runs = "runs/small"
    files = {
        "recipe": {**SHARED, "model_name_or_path": str(tiny_llama), "dataset": f"{runs}/prepare"},
        "prepare": {"source": "jsonl", "path": str(folder / "mine.jsonl"), "heldout": 0.3},
        "sft": TRAINING,
        "reward": TRAINING,
        "dpo": {**TRAINING, "sft_adapter": f"{runs}/sft"},
        "ppo": {**TRAINING, "sft_adapter": f"{runs}/sft", "reward_adapter": f"{runs}/reward", "total_episodes": 8,
                "num_ppo_epochs": 2, "response_length": 6},
        "evaluate": {"systems": {"sft": f"{runs}/sft", "ppo": f"{runs}/ppo"}, "bots": ["oracle"], "max_new_tokens": 6,
                     "max_length": 256, "distinct_tokens": 10},
        "tiny": {"sft": {"max_steps": 2}},
    }  # fmt: skip
    files["ppo"] = {key: value for key, value in files["ppo"].items() if key != "max_steps"}
    for name, keys in files.items():
        own = {} if name in ("recipe", "tiny") else {"output_dir": f"{runs}/{name}"}
        if name not in ("recipe", "tiny", "prepare"):
            own["extends"] = "recipe.yaml"
        if name == "evaluate":
            (folder / "evaluate_shared.yaml").write_text(
                yaml.safe_dump({k: files["recipe"][k] for k in ("seed", "model_name_or_path", "dataset")})
            )
            own["extends"] = "evaluate_shared.yaml"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**own, **keys}))
    return folder


@pytest.fixture
def go(recipe, tmp_path):
    """Run the recipe into this test's folder; what was said, by stage."""

    def go(**keys):
        lines = []
        rlhf.run(recipe, output_dir=tmp_path / "run", say=lines.append, **keys)
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if "finished in" not in line}

    return go


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# The plan


@pytest.mark.parametrize(("name", "tiny"), [("demo", False), ("persona-chat", False), ("persona-chat", True)])
def test_plan_of_the_shipped_recipes(name, tiny, tmp_path):
    steps = plan(ROOT / "recipes" / name, tiny, None, tmp_path / "elsewhere", {"seed": "7"})
    stages = [step.stage for step in steps]
    assert stages == [s for s in ("prepare", "base", "sft", "reward", "dpo", "ppo", "evaluate") if s in stages]
    assert {"prepare", "sft", "reward", "dpo", "ppo", "evaluate"} <= set(stages)
    for step in steps:
        values = values_of(step.configs)
        assert step.folder == tmp_path / "elsewhere" / step.stage
        assert step.stage == "base" or values["seed"] == 7
        for key in {"dataset", "sft_adapter", "reward_adapter"} & values.keys():
            if (step.stage, key) == ("base", "dataset"):
                continue  # the demo's base is trained on the world itself
            assert Path(values[key]).parent == tmp_path / "elsewhere"
    assert [step.stage for step in plan(ROOT / "recipes" / name, tiny, "sft", tmp_path, {})][-1] == "sft"


def test_pairs_are_sampled_where_they_are_asked_for_or_read(tmp_path):
    def stages(until, **overrides):
        steps = plan(ROOT / "recipes" / "demo", False, until, tmp_path / "run", overrides)
        return [step.stage for step in steps if step.stage not in ("prepare", "base")]

    dpo = {"dpo.dataset": str(tmp_path / "run" / "pairs")}
    assert stages(None) == ["sft", "reward", "dpo", "ppo", "evaluate"]
    assert stages("pairs") == ["sft", "reward", "pairs"]
    assert stages("dpo", **dpo) == ["sft", "reward", "pairs", "dpo"]
    assert stages("reward", **dpo) == ["sft", "reward"]


def test_a_base_that_is_trained_anew_is_the_base_of_all_stages(tmp_path):
    demo = ROOT / "recipes" / "demo"
    shipped, trained = (
        {
            values_of(step.configs).get("model_name_or_path")
            for step in plan(demo, False, None, tmp_path, overrides)
            if step.stage != "prepare"  # it counts the tokens of the shipped one, which are the same
        }
        for overrides in ({}, {"base.retrain": "true"})
    )
    assert {Path(base).resolve() for base in shipped - {None}} == {demo / "base"}
    assert trained - {None} == {str(tmp_path / "base")}


def test_overlay_and_overrides(recipe, tmp_path):
    def steps_of_sft(tiny, overrides):
        (step,) = [s for s in plan(recipe, tiny, None, tmp_path, overrides) if s.stage == "sft"]
        return values_of(step.configs)["max_steps"]

    assert steps_of_sft(False, {}) == 4
    assert steps_of_sft(True, {}) == 2
    assert steps_of_sft(True, {"sft.max_steps": 3, "reward.max_steps": 5}) == 3


@pytest.mark.parametrize(
    ("keys", "problems"),
    [
        ({"learning_rat": 1}, ["`learning_rat` .--set.: no stage of this recipe knows it"]),
        ({"sft.learning_rat": 1, "dpo.beta": "high"}, ["sft: `learning_rat`.*did you mean", "dpo: `beta`"]),
        ({"ppo.max_steps": 4}, ["ppo: .*max_steps.*total_episodes"]),
        ({"until": "deploy"}, ["`until`: 'deploy'"]),
    ],
)
def test_problems_of_all_stages_before_the_first_starts(keys, problems, go, tmp_path):
    with pytest.raises(ConfigError) as error:
        go(**keys)
    assert len(error.value.problems) == len(problems)
    for problem in problems:
        assert error.match(problem)
    assert not (tmp_path / "run").exists()


def test_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="is no recipe.*demo, from-scratch, my-character, persona-chat"):
        rlhf.run(ROOT / "recipes" / "demmo", output_dir=tmp_path)


# The runs


def test_whole_recipe_and_a_second_run(go, tmp_path):
    first = go()
    stages = ["prepare", "sft", "reward", "dpo", "ppo", "evaluate"]
    assert list(first) == [*stages, "report"] and all("nothing was made yet" in first[stage] for stage in stages)
    run = tmp_path / "run"
    assert (run / "report" / "index.html").is_file()
    results = json.loads((run / "evaluate" / "ppo" / "results.json").read_text())
    assert results["metrics"]["perplexity_token"]["value"] > 1 and results["run"]["system"] == "ppo"
    before = {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "report" not in path.parts
    }
    second = go()
    assert all(second[stage].startswith("done") for stage in stages)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # what was deleted of it is made again
    (run / "evaluate" / "ppo" / "results.json").unlink()
    again = go()
    assert "its files are not those it made" in again["evaluate"] and again["ppo"].startswith("done")
    assert (run / "evaluate" / "ppo" / "results.json").is_file()

    # the folder may move: parents are named by relative paths
    run.rename(tmp_path / "moved")
    record = read_record(tmp_path / "moved" / "ppo")
    assert (tmp_path / "moved" / "ppo" / record["parents"]["sft"]["path"] / "config.yaml").is_file()


def test_a_changed_key_makes_the_stage_and_those_after_it_anew(go, tmp_path):
    go(until="reward")
    run = tmp_path / "run"
    before = weights(run / "sft")
    again = go(until="dpo", **{"sft.learning_rate": 2e-2})
    assert again["prepare"].startswith("done") and again["reward"].startswith("done")
    moved = f"what was there moves to {run / 'sft.previous'}"
    assert again["sft"] == f"runs anew: its settings changed (sft.learning_rate: 0.01 -> 0.02); {moved}"
    assert "nothing was made" in again["dpo"]
    assert weights(run / "sft") != before and weights(run / "sft.previous") == before
    third = go(until="dpo", **{"sft.learning_rate": 1e-2})  # the settings of DPO are as they were, but not its parent
    assert third["sft"].endswith(f"{moved} (the older {run / 'sft.previous'} is deleted)")
    assert third["dpo"].startswith("runs anew: 'sft' changed")
    assert weights(run / "sft") == before and third["reward"].startswith("done")


def test_at_most_three_changes_are_named(go):
    go(until="sft")
    keys = {f"sft.{key}": 5e-4 for key in ("adam_epsilon", "weight_decay", "learning_rate", "max_grad_norm")}
    said = go(until="sft", **keys)["sft"]
    assert said.count("-> 0.0005") == 3 and ", and 1 more); what was there moves" in said


def test_what_cannot_change_the_result_is_no_change(go):
    go(until="sft")
    keys = {
        "log_level": "warning",
        "disable_tqdm": False,
        "run_name": "again",
        "report_to": "none",
        "max_skipped_steps": 9,
    }
    assert go(until="sft", **{f"sft.{key}": value for key, value in keys.items()})["sft"].startswith("done")


def test_what_would_be_refused_leaves_the_finished_one_in_its_place(go, tmp_path):
    go(until="sft")
    before = weights(tmp_path / "run" / "sft")
    with pytest.raises(RunError, match="'sft' is not fit to start"):
        go(until="sft", **{"sft.max_length": 4})
    assert weights(tmp_path / "run" / "sft") == before
    assert go(until="sft")["sft"].startswith("done")


def test_done_wherever_it_is_called_from_and_lies(recipe, tiny_llama, tmp_path, monkeypatch):
    """An absolute output folder, a subfolder as the current directory, a checkout that was copied."""
    checkout, copied = tmp_path / "checkout", tmp_path / "elsewhere" / "copy"
    shutil.copytree(recipe, checkout / "recipes" / "small")
    shutil.copytree(tiny_llama, checkout / "recipes" / "small" / "base")
    for name, key, value in (
        ("recipe", "model_name_or_path", "./base"),
        ("evaluate_shared", "model_name_or_path", "./base"),
        ("prepare", "path", "mine.jsonl"),
        ("evaluate", "systems", {"sft": "runs/small/sft"}),
    ):
        path = checkout / "recipes" / "small" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), key: value}))
    for name in ("reward", "dpo", "ppo"):
        (checkout / "recipes" / "small" / f"{name}.yaml").unlink()
    (checkout / "sub").mkdir()

    def said(cwd, recipe, output_dir=None):
        lines = []
        monkeypatch.chdir(cwd)
        rlhf.run(recipe, output_dir=output_dir, say=lines.append)
        return [line.split(maxsplit=1)[1][:4] for line in lines if not line.startswith("report")]

    said(checkout, "recipes/small")
    done = ["done"] * 3
    assert said(checkout, "recipes/small") == done
    assert said(checkout, "recipes/small", checkout / "runs" / "small") == done
    assert said(checkout / "sub", "../recipes/small", "../runs/small") == done
    shutil.copytree(checkout, copied)
    shutil.rmtree(checkout)
    assert said(copied, "recipes/small") == done
    assert "/" not in yaml.safe_load((copied / "runs/small/sft/config.yaml").read_text())["dataset"].lstrip("./")
    configs = parse(config_classes("sft"), ["--config", "runs/small/sft/config.yaml"], "sft")
    assert values_of(configs)["model_name_or_path"] == str(copied / "recipes" / "small" / "base")


def test_data_made_anew(go, tmp_path):
    go(until="sft")
    again = go(until="sft", **{"prepare.train_pairs": 2})
    assert again["prepare"].startswith("runs anew: its settings")
    assert again["sft"].startswith("runs anew: 'prepare' changed")


def test_a_source_that_changed_makes_the_data_anew(go, recipe, tmp_path):
    """Not one that is gone, as of a run that was moved to another machine."""
    mine = Path(shutil.copy(recipe / "mine.jsonl", tmp_path / "mine.jsonl"))
    keys = {"until": "prepare", "prepare.path": str(mine)}
    go(**keys)
    rows, data_hash = read_jsonl(mine), read_record(tmp_path / "run" / "prepare")["data_hash"]
    os.utime(mine, (0, 0))
    assert go(**keys)["prepare"].startswith("done")  # the same bytes, touched
    write_jsonl(mine, rows[:-1])
    assert go(**keys)["prepare"].startswith("runs anew: mine.jsonl changed; what was there moves to")
    assert read_record(tmp_path / "run" / "prepare")["data_hash"] != data_hash
    mine.unlink()
    assert go(**keys)["prepare"].startswith("done")


def test_a_plan_by_size_goes_by_the_data_of_this_run(go, tmp_path):
    run, keys = tmp_path / "run", {"sft.plan_by_size": True}

    def warmup_steps():
        return yaml.safe_load((run / "sft" / "config.yaml").read_text())["warmup_steps"]

    go(until="sft", **keys)  # when it was planned, there were no data
    rows = len(read_jsonl(run / "prepare" / "dialogues_train.jsonl"))
    assert warmup_steps() == rows // 10 > 0
    plan = read_record(run / "sft")["plan"]
    assert (plan["num_examples"], plan["num_gpus"]) == (rows, 1)
    assert plan["reasons"]["max_length"] == "overridden; the plan says 512"
    log = (run / "sft" / "training.log").read_text()
    assert f"The plan by size, for {rows} examples:\nlora_r                           4  overridden" in log
    assert go(until="sft", **keys)["sft"].startswith("done")

    said = go(until="sft", **keys, **{"prepare.num_dialogues": 10})
    assert said["sft"].startswith("runs anew: its settings changed") and warmup_steps() == 0


@pytest.mark.parametrize("status", ["failed", "running"])
def test_an_interrupted_stage_goes_on(status, go, tmp_path):
    go(until="sft")
    sft = tmp_path / "run" / "sft"
    whole, rows = weights(sft), read_jsonl(sft / "metrics.jsonl")
    shutil.rmtree(sft / "checkpoint-4")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (sft / name).unlink()
    write_json(sft / "metadata.json", read_record(sft) | {"status": status})
    said = go(until="sft")
    assert said["prepare"].startswith("done") and said["sft"].startswith("goes on from checkpoint-2")
    assert weights(sft) == whole and read_record(sft)["status"] == "done"
    losses = [(row["step"], row["loss"]) for row in read_jsonl(sft / "metrics.jsonl") if "loss" in row]
    assert losses == [(row["step"], row["loss"]) for row in rows if "loss" in row]  # each step once
    assert go(until="sft")["sft"].startswith("done")  # the checkpoint it went on from is no setting


def test_new_prices_train_nothing_again(go, tmp_path):
    go(until="sft")
    sft = tmp_path / "run" / "sft"
    before = read_record(sft)
    said = go(until="sft", rate_per_gpu_hour=2, storage_price=1000)
    assert said["prepare"].startswith("done") and said["sft"].startswith("done")
    after = read_record(sft)
    assert after["cost"]["rate_per_gpu_hour"] == 2 and before["cost"]["rate_per_gpu_hour"] == 0.35
    assert after["cost"]["storage_per_month"] == pytest.approx(before["kept_bytes"] / 1e6, abs=1e-6)
    assert {**after, "cost": None} == {**before, "cost": None}


def test_stopped_before_its_first_checkpoint(go, tmp_path):
    go(until="sft")
    sft = tmp_path / "run" / "sft"
    for checkpoint in sft.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    write_json(sft / "metadata.json", read_record(sft) | {"status": "failed"})
    assert "stopped before its first checkpoint" in go(until="sft")["sft"]


def cut(name):
    def spoil(checkpoint):
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-100])

    return spoil


def emptied(checkpoint):
    (checkpoint / "trainer_state.json").write_text("")


def without_optimizer(checkpoint):
    (checkpoint / "optimizer.pt").unlink()


@pytest.fixture
def interrupted_sft(go, tmp_path):
    """Killed after its last checkpoint."""
    go(until="sft")
    sft = tmp_path / "run" / "sft"
    write_json(sft / "metadata.json", read_record(sft) | {"status": "running"})
    return sft


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (emptied, "has a damaged trainer_state.json"),
        (without_optimizer, "has no optimizer.pt"),
        (cut("optimizer.pt"), "has a damaged optimizer.pt"),
        (cut("adapter_model.safetensors"), "has a damaged adapter_model.safetensors"),
    ],
)
def test_a_torn_checkpoint_is_left_out(spoil, fault, interrupted_sft, go):
    """The process was killed while it wrote one; the adapter comes out as from the whole training."""
    sft = interrupted_sft
    whole = weights(sft)
    (sft / "adapter_model.safetensors").unlink()
    spoil(sft / "checkpoint-4")
    assert go(until="sft")["sft"] == (
        f"goes on from checkpoint-2: it was interrupted; checkpoint-4 {fault}, so it is left out"
    )
    assert weights(sft) == whole and read_record(sft)["status"] == "done"


def test_only_torn_checkpoints(interrupted_sft, go):
    sft = interrupted_sft
    whole = weights(sft)
    for checkpoint in sft.glob("checkpoint-*"):
        emptied(checkpoint)
    said = go(until="sft")["sft"]
    assert said.startswith(
        "runs again: it has no whole checkpoint (status 'running'); checkpoint-4 has a damaged trainer_state"
    )
    assert "checkpoint-2 has a damaged trainer_state.json, so it is left out" in said
    assert weights(sft) == whole and read_record(sft)["status"] == "done"


# Sessions


@pytest.fixture
def slow_sft(monkeypatch):
    """A step of SFT is 1000 s on the session's clock, everything else takes none."""
    time = [0.0]
    for module in (session, checkpoints):
        monkeypatch.setattr(module, "now", lambda: time[0])
    own = PersonaSFTTrainer.training_step

    def step(self, *args, **kwargs):
        time[0] += 1000
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PersonaSFTTrainer, "training_step", step)
    return time


def test_a_session_that_ends_within_sft_goes_on_in_another(recipe, slow_sft, tmp_path, monkeypatch, capsys):
    """An hour is three steps of four; the run is taken from a read-only folder, and goes on in place too."""
    rlhf.run(recipe, until="sft", output_dir=tmp_path / "whole", say=print)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    words = ["run", str(recipe), "--until", "sft", "--output_dir", str(tmp_path / "run"), "--set", "sft.seed=3"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--session_budget", "60m"])
    assert ended.value.code == 75
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "sft       the session ends; it stopped at step 3 of 4, and checkpoint-3 is kept" in said
    commands = [shlex.split(line) for line in said if line.startswith("rlhf run")]
    assert commands[0] == ["rlhf", *words, "--session_budget", "60m"]
    assert commands[1][:-1] == [*commands[0], "--continue_from"] and "add its output as an input" in " ".join(said)
    assert commands[1][-1] == "/kaggle/input/NOTEBOOK/" + os.path.relpath(tmp_path / "run", "/kaggle/working")
    sft = tmp_path / "run" / "sft"
    assert read_record(sft)["status"] == "stopped" and "RLHF_SESSION_ENDS" not in os.environ
    with pytest.raises(RunError, match="'sft'.* is not finished .status 'stopped'"):
        rlhf.run(recipe, output_dir=tmp_path / "other", **{"sft.dataset": str(tmp_path / "run" / "prepare"),
                                                           "dpo.sft_adapter": str(sft), "until": "dpo"})  # fmt: skip

    saved = shutil.copytree(tmp_path / "run", tmp_path / "input" / "small")
    for path in [saved, *saved.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    slow_sft[0] = 1e6
    main(commands[0][1:])
    assert "goes on from checkpoint-3: the session before ended" in capsys.readouterr().out
    assert weights(sft) == weights(tmp_path / "whole" / "sft")

    shutil.rmtree(tmp_path / "run")
    slow_sft[0] = 2e6
    main([*commands[0][1:], "--continue_from", str(saved)])
    said = capsys.readouterr().out
    assert f"continue  {tmp_path / 'run'} is taken from {saved}" in said and "prepare   done" in said
    assert weights(sft) == weights(tmp_path / "whole" / "sft")
    rows = [
        [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
        for folder in (sft, tmp_path / "whole" / "sft")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    main([*words, "--continue_from", str(saved)])  # the same command again
    assert "was taken already from" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunError, match="'sft' of .* cannot be gone on with: its settings changed .sft.seed: 3 -> 4"):
        rlhf.run(recipe, until="sft", output_dir=tmp_path / "run", continue_from=saved, **{"sft.seed": 4})


def test_no_stage_begins_when_the_session_is_over(recipe, slow_sft, tmp_path):
    """Five hours: SFT takes 4000 s, and is over before the clock jumps."""

    def say(line):
        if line.startswith("sft       finished"):
            slow_sft[0] += 10**5

    with pytest.raises(session.SessionEnded, match="reward    waits: the session ends\nTo go on:\n    rlhf run"):
        rlhf.run(recipe, output_dir=tmp_path / "run", say=say, session_budget="5h", until="reward")
    assert read_record(tmp_path / "run" / "sft")["status"] == "done" and not (tmp_path / "run" / "reward").exists()


@pytest.mark.parametrize("budget", ["11", "h", "0h", "-1h", "1d", "1 h 2m", "nanh"])
def test_a_budget_without_a_unit_is_refused(budget, recipe, tmp_path):
    with pytest.raises(ConfigError, match="`session_budget`: .*write a number with its unit, as 11h, 90m or 3600s"):
        rlhf.run(recipe, output_dir=tmp_path / "run", session_budget=budget)
    assert not (tmp_path / "run").exists()


# What is made anew


def test_a_damaged_stage_is_made_anew(go, tmp_path):
    go(until="sft")
    adapter = tmp_path / "run" / "sft" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    adapter.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "not those it made" in go(until="sft")["sft"]
    assert adapter.read_bytes() == before


def test_another_base_at_the_same_path_makes_the_stage_anew(go, tmp_path):
    go(until="sft")
    sft = tmp_path / "run" / "sft"
    write_json(sft / "metadata.json", read_record(sft) | {"base_hash": "of other weights"})
    assert "base's weights changed" in go(until="sft")["sft"]


def test_missing_parent_names_the_command(recipe, tmp_path):
    """A stage alone, as its script is started."""
    (step,) = [s for s in plan(recipe, False, None, tmp_path / "run", {}) if s.stage == "sft"]
    with pytest.raises(RunError, match=r"'prepare' is needed.*rlhf run recipes/<name> --until prepare"):
        train_sft(*parse(config_classes("sft"), step.argv, "sft"))


def test_python_and_command_line_are_one(recipe, tmp_path):
    rlhf.run(recipe, True, "sft", tmp_path / "a", print, **{"sft.learning_rate": 2e-2, "lora_r": 8})
    main(["run", str(recipe), "--tiny", "--until", "sft", "--output_dir", str(tmp_path / "b"),
          "--set", "sft.learning_rate=2e-2", "--set", "lora_r=8"])  # fmt: skip
    assert weights(tmp_path / "a" / "sft") == weights(tmp_path / "b" / "sft")
    configs = [(tmp_path / name / "sft" / "config.yaml").read_text() for name in ("a", "b")]
    assert configs[0].replace(str(tmp_path / "a"), "") == configs[1].replace(str(tmp_path / "b"), "")
    assert {tensor.shape[0] for k, tensor in load_file(tmp_path / "a/sft/adapter_model.safetensors").items()
            if "lora_A" in k} == {8}  # fmt: skip
