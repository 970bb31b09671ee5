"""The watch over PPO: statistics of replies, the rule on curves, the trick's name, the best adapter, resuming."""

import copy
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState
from trl import ModelConfig

from evaluation.probes import HeldOutProbes
from rlhf.chat import reply_ids
from rlhf.config import ConfigError, parse
from rlhf.data import world
from rlhf.data.columns import prompt_columns
from rlhf.files import folder_hash, write_jsonl
from rlhf.generate import left_pad
from rlhf.lora import lora_config, set_trainable, with_adapter
from rlhf.model import load_base, load_tokenizer
from rlhf.persona import Persona, render_prompt
from rlhf.pipeline import config_classes
from rlhf.ppo_trainer import BEST_ADAPTER_FILE, PPOConfig, PPOTrainer
from rlhf.record import base_of, model_card, read_record, stage
from rlhf.reward_watch import TRICKS, Probing, RewardWatch, best_of, parted, reply_statistics, tricks
from rlhf.rewards import persona_rule

# Statistics of replies

PERSONA = ["i have a dog .", "i work as a nurse in york ."]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # "dog" is the one word of five that says something, and one of the persona's two sentences
        ("yes , i like my dog !", {"words": 5, "repetition": 0, "copied": 0, "facts": 0.5, "persona_words": 0.2}),
        # a run of four: i work as a; nurse makes it five, of six words. "work" and "nurse" say something
        ("i work as a nurse there .", {"words": 6, "copied": 5 / 6, "facts": 0.5, "persona_words": 2 / 6}),
        # pairs: dog dog, dog dog, dog dog; two of three stood before
        ("dog dog dog dog", {"words": 4, "repetition": 2 / 3, "facts": 0.5, "persona_words": 1}),
        ("nurse dog york", {"facts": 1, "persona_words": 1, "copied": 0}),
        ("", {"words": 0, "repetition": 0, "copied": 0, "facts": 0, "persona_words": 0, "same": 0}),
    ],
)
def test_statistics_of_a_reply(reply, expected):
    found = reply_statistics([PERSONA], [reply])
    assert {name: found[f"reply/{name}"] for name in expected} == pytest.approx(expected)


def test_statistics_of_several_replies():
    found = reply_statistics([PERSONA, [], PERSONA, PERSONA], ["Yes.", "yes", "i have a dog", "no no"])
    assert found["reply/words"] == 2  # 1, 1, 4, 2
    assert found["reply/copied"] == 0.25 and found["reply/facts"] == 0.125  # a persona may be empty
    assert found["reply/same"] == 0.25  # one of four is another one's double; case and marks do not count
    assert reply_statistics([], []) == dict.fromkeys(found, 0.0)


# The rule, on curves


def curve(probes, rewards, spread=0.0):
    """Probings of 48 personas; `spread` moves half of them up and half down. Five rollouts each, with a little noise."""
    noise = random.Random(0)
    made = []
    for step, (probe, reward) in enumerate(zip(probes, rewards, strict=True)):
        signs = [1, -1] * 24
        noise.shuffle(signs)
        scores = [probe + spread * sign for sign in signs]
        made.append(Probing(40 * step, scores, [reward + noise.uniform(-0.02, 0.02) for _ in range(5)]))
    return made


def first_fire(probings):
    """The step at which the watch would have said it; None if it never would."""
    return next((p.step for n, p in enumerate(probings) if parted(probings[: n + 1])), None)


@pytest.mark.parametrize(
    ("probes", "rewards", "fires"),
    [
        ([0.9, 0.95, 0.8, 0.7, 0.6], [0.1, 0.3, 0.5, 0.6, 0.7], 120),  # at the second probing below the best
        ([0.9, 0.95, 0.8, 0.96, 0.97], [0.1, 0.3, 0.5, 0.6, 0.7], None),  # once is no finding
        ([0.3, 0.6, 0.8, 0.9, 0.95], [0.1, 0.3, 0.5, 0.6, 0.7], None),  # a clean run
        ([0.9, 0.95, 0.8, 0.7, 0.6], [0.7, 0.6, 0.5, 0.3, 0.1], None),  # both fall: broken, and not hacked
        ([0.9, 0.95, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5, 0.5], None),  # the reward stays within its noise
        ([0.9, 0.95, 0.92, 0.91, 0.91], [0.1, 0.3, 0.5, 0.6, 0.7], None),  # 4 points are nothing to stop for
        ([0.9, 0.6], [0.1, 0.7], None),
    ],
)
def test_rule(probes, rewards, fires):
    assert first_fire(curve(probes, rewards)) == fires


def test_a_fall_within_the_noise_of_the_personas_is_none():
    """A fall of 0.1 whose differences have a standard deviation of 0.5 has a standard error of 0.072 (48 personas)."""
    curves = [0.8, 0.7, 0.7, 0.7], [0.1, 0.3, 0.5, 0.7]
    assert first_fire(curve(*curves)) == 80
    assert first_fire(curve(*curves, spread=0.35)) is None  # of two independent spreads the difference has sqrt(2) one


# Recorded in the slow tests at the end, one clean run from a start that was worse.
RECORDED = Path(__file__).with_name("ppo_curves.json")


@pytest.mark.parametrize(("recorded", "fires"), [("clean", False), ("hacked", True)])
def test_rule_on_recorded_curves(recorded, fires):
    runs = json.loads(RECORDED.read_text())[recorded]
    assert len(runs) >= 1
    for run in runs:
        assert (first_fire([Probing(**probing) for probing in run]) is not None) == fires


def test_false_alarms_are_rare():
    """A policy that gets no better or worse, whose reward rises: 20 probings of 48 personas, 3 questions each.

    A reply's verdict is drawn anew each time, which is more noise than greedy replies of one policy have.
    """
    alarms, runs = 0, 300
    for seed in range(runs):
        rng = random.Random(seed)
        habits = [rng.uniform(0.3, 1.0) for _ in range(48)]
        probings = [
            Probing(step, [sum(rng.random() < p for _ in range(3)) / 3 for p in habits], [step + rng.gauss(0, 1)])
            for step in range(20)
        ]
        alarms += first_fire(probings) is not None
    assert alarms / runs <= 0.02


# The name


def test_every_trick_has_a_name():
    calm = {"reply/words": 6.0, "reply/repetition": 0.0, "reply/copied": 0.3, "reply/facts": 0.2,
            "reply/persona_words": 0.25, "reply/same": 0.0}  # fmt: skip
    moved = {
        "longer replies": {"reply/words": 13.0}, "shorter replies": {"reply/words": 2.5},
        "repetition": {"reply/repetition": 0.4}, "copying": {"reply/copied": 0.9}, "reciting": {"reply/facts": 0.6},
        "keyword overlap": {"reply/persona_words": 0.8}, "collapse": {"reply/same": 0.9},
    }  # fmt: skip
    assert set(moved) == {trick.name for trick in TRICKS}
    for name, statistic in moved.items():
        assert [trick.name for trick in tricks(calm, {**calm, **statistic})] == [name]
    assert tricks(calm, calm) == []
    both = tricks(calm, {**calm, "reply/copied": 0.6, "reply/same": 0.9})
    assert [trick.name for trick in both] == ["collapse", "copying"]  # 9 and 3 times their limits


@pytest.mark.parametrize(
    ("name", "statistic", "within", "beyond"),
    [
        ("longer replies", "reply/words", 7.4, 7.6),  # 1.25 times 6
        ("shorter replies", "reply/words", 4.9, 4.7),  # 0.8 times
        ("repetition", "reply/repetition", 0.04, 0.06),  # 0.05 more than 0
        ("copying", "reply/copied", 0.44, 0.46),  # 0.15 more than 0.3
        ("reciting", "reply/facts", 0.24, 0.26),  # 1.25 times 0.2
        ("keyword overlap", "reply/persona_words", 0.28, 0.29),  # 1.15 times 0.25
        ("collapse", "reply/same", 0.09, 0.11),
    ],
)
def test_a_trick_is_named_from_its_limit_on(name, statistic, within, beyond):
    calm = {"reply/words": 6.0, "reply/repetition": 0.0, "reply/copied": 0.3, "reply/facts": 0.2,
            "reply/persona_words": 0.25, "reply/same": 0.0}  # fmt: skip
    assert tricks(calm, {**calm, statistic: within}) == []
    assert [trick.name for trick in tricks(calm, {**calm, statistic: beyond})] == [name]


def test_the_best_is_the_first_of_equals():
    assert best_of(curve([0.5, 0.9, 0.9, 0.8], [0, 0, 0, 0])).step == 40


# Configuration


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("--probe=evaluation.probes:HeldOutProbe", "`probe` (command line) is 'evaluation.probes:HeldOutProbe'"),
        ("--probe=HeldOutProbes", "`evaluation.probes:HeldOutProbes`"),
        ("--probe_steps=0", "`probe_steps`"),
    ],
)
def test_a_probe_that_cannot_be_had_is_refused_before_any_stage_runs(word, reason):
    argv = ["--output_dir=runs/x/ppo", "--dataset=runs/x/prepare", "--sft_adapter=runs/x/sft", "--reward_adapter=r"]
    with pytest.raises(ConfigError) as caught:
        parse(config_classes("ppo"), [*argv, word], "ppo")
    assert any(reason in problem for problem in caught.value.problems)


# HeldOutProbes


def test_held_out_probes_are_few_and_of_wordings_that_training_has_not(tmp_path):
    cast = world.characters(60, 5, held_out=True, held_out_slots=True)
    write_jsonl(tmp_path / "probes.jsonl", world.probes(cast, 5))
    probe = HeldOutProbes(tmp_path, 384, 16)
    assert list(probe.personas) == [character.id for character in cast[-48:]]
    for rows in probe.personas.values():
        assert sorted(row["kind"] for row in rows) == ["direct", "false_suggestion", "true_suggestion"]
        assert len({(row["fact_id"], row["turn"], row["split"]) for row in rows}) == 1
        assert rows[0]["split"] in ("held_out_wording", "held_out_slot")
    turns = [rows[0]["turn"] for rows in probe.personas.values()]
    assert 10 < turns.count(0) < 38  # some at once, some after a conversation


def test_held_out_probes_judge_the_replies(tmp_path, monkeypatch):
    cast = world.characters(3, 5, held_out=True)
    write_jsonl(tmp_path / "probes.jsonl", world.probes(cast, 5))
    probe = HeldOutProbes(tmp_path, 384, 16)
    asked = [row for rows in probe.personas.values() for row in rows]
    right = [world.oracle_reply(row) for row in asked]
    said = [*right[:3], right[3], "i do not know .", right[5], *["no ."] * 3]  # all right; two of three; none

    def generate(model, tokenizer, conversations, max_new_tokens, **settings):
        assert [messages[-1]["content"] for messages in conversations] == [row["question"] for row in asked]
        assert all(messages[0]["role"] == "system" for messages in conversations) and max_new_tokens == 16
        return said

    monkeypatch.setattr("rlhf.generate.generate", generate)
    assert probe(None, None) == {"right": pytest.approx([1.0, 2 / 3, 0.0]), "kept": [1.0, 0.0, 0.0]}


def test_data_without_probes_gets_them_from_its_held_out_dialogues(tmp_path):
    pets = ("dog", "cat", "bird")
    rows = [{"persona": [f"I have a {pet}.", "I live in Oslo."], "messages": []} for pet in pets]
    write_jsonl(tmp_path / "dialogues_heldout.jsonl", rows)
    probe = HeldOutProbes(tmp_path, 384, 16)
    assert len(probe.personas) == 3 and all(len(rows) == 3 for rows in probe.personas.values())
    write_jsonl(tmp_path / "dialogues_heldout.jsonl", [{"persona": ["Hm."], "messages": []}])
    with pytest.raises(ValueError, match="`probe`: no fact of the held-out personas"):
        HeldOutProbes(tmp_path, 384, 16)


# In a training

PROBE = '''
class OfWeights:
    """A score that goes up and down with the policy's weights, so that the best is not the last."""

    def __init__(self, dataset, max_length, max_new_tokens):
        assert (dataset / "prompts_train.jsonl").is_file() and (max_length, max_new_tokens) == (256, 8)

    def __call__(self, model, tokenizer):
        moved = sum(p.abs().sum().item() for n, p in model.named_parameters() if "lora_B.default" in n)
        return {"wave": [(7 * moved) % 1.0] * 3, "moved": [moved]}
'''


@pytest.fixture(scope="module")
def keys(tiny_llama, dataset, sft_run, reward_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe_of_a_test.py").write_text(PROBE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield {
            "model_name_or_path": tiny_llama, "dataset": dataset, "sft_adapter": sft_run.folder,
            "reward_adapter": reward_run.folder, "probe": "probe_of_a_test:OfWeights", "probe_steps": 4,
            "save_total_limit": None, "load_best_model_at_end": False, "metric_for_best_model": None, "save_steps": 6,
            "total_episodes": 56, "eval_steps": 14, "sample_steps": 14,
        }  # fmt: skip


@pytest.fixture(scope="module")
def watched(keys, train, tmp_path_factory):
    """14 rollouts of 4, 28 steps."""
    return train("ppo", tmp_path_factory.mktemp("watched") / "whole", **keys)


def watch_of(run):
    return next(c for c in run.trainer.callback_handler.callbacks if isinstance(c, RewardWatch))


def test_probes_and_statistics_are_logged(watched):
    rows = watched.rows("metrics.jsonl")
    probed = [row for row in rows if "eval_probe/wave" in row]
    assert [row["step"] for row in probed] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert len({row["eval_probe/wave"] for row in probed}) > 6
    trained = [row for row in rows if "objective/scores" in row]
    assert len(trained) == 14 and all("reply/words" in row and "reply/same" in row for row in trained)
    probings = watch_of(watched).probings
    assert [len(probing.rewards) for probing in probings] == [1, 2, 2, 2, 2, 2, 2, 2]  # two steps a rollout
    rewards = [row["rewards/reward/mean"] for row in trained]
    assert probings[0].rewards == rewards[:1] and [r for p in probings[1:] for r in p.rewards] == rewards
    mean = sum(row["reply/words"] for row in trained[2:4]) / 2
    assert probings[2].replies["reply/words"] == pytest.approx(mean)


def test_every_logged_number_is_explained_and_no_other(watched):
    text = (Path(__file__).parents[1] / "docs" / "ppo.md").read_text(encoding="utf-8")
    text = text.split("## The numbers that PPO logs")[1]
    explained = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(explained) == len(set(explained)) > 35
    of_their_own = ("eval_probe/", "eval_loss", "eval_perplexity")
    logged = set()
    for name in {key for row in watched.rows("metrics.jsonl") for key in row} - {"step"}:
        plain = name if name.startswith(of_their_own) else name.removeprefix("eval_")
        plain = re.sub("^rewards/.+/", "rewards/<name>/", plain)
        logged.add(re.sub("^eval_probe/.+", "eval_probe/<name>", plain))
    assert logged == set(explained)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row.split(" | ")) == 4 for row in rows)  # name, what it is, healthy, when it is not


def test_the_best_adapter_is_kept_beside_the_last(watched, tiny_llama):
    waves = {row["step"]: row["eval_probe/wave"] for row in watched.rows("metrics.jsonl") if "eval_probe/wave" in row}
    best = max(waves, key=waves.get)
    assert 0 < best < 28, "the scores of this seed tell nothing"
    probes = watched.metadata()["probes"]
    assert probes["best"] == {"folder": "best", "step": best, "score": round(waves[best], 4)}
    assert probes["last"] == {"step": 28, "score": round(waves[28], 4)} and probes["reward_hacking"] is None
    card = (watched.folder / "MODEL_CARD.md").read_text()
    assert f"{waves[28]:.3f} for this adapter (step 28), and" in card
    args = SimpleNamespace(load_best_model_at_end=True)
    state = SimpleNamespace(best_model_checkpoint="somewhere/checkpoint-12", global_step=28)
    loaded = RewardWatch(watched.trainer, lambda model, tokenizer: {}, every=4)
    loaded.trainer, loaded.probings = SimpleNamespace(args=args, state=state), watch_of(watched).probings
    assert loaded.summary()["saved_step"] == 12 and probes["saved_step"] == 28
    assert f"{waves[best]:.3f} for the best one (step {best}), which is the adapter in `best/`" in card
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    kept = PeftModel.from_pretrained(base, watched.folder / "best")
    moved = sum(p.abs().sum().item() for name, p in kept.named_parameters() if "lora_B" in name)
    assert (7 * moved) % 1.0 == pytest.approx(waves[best], abs=1e-3)  # sums of float32 in another order
    assert not list(watched.folder.rglob(".best.tmp"))


def test_the_best_adapter_has_a_record_by_which_it_is_a_system_as_the_last_one_is(
    watched, sft_run, dataset, tiny_llama
):
    folder = watched.folder / "best"
    record, of_stage = read_record(folder), watched.metadata()
    assert record["stage"] == "ppo" and record["step"] == of_stage["probes"]["best"]["step"]
    assert record["result_hash"] == folder_hash(folder) != of_stage["result_hash"]
    assert (folder / record["parents"]["sft"]["path"]).resolve() == sft_run.folder.resolve()
    assert (folder / record["parents"]["prepare"]["path"]).resolve() == dataset.resolve()  # where chat finds a persona
    assert Path(base_of(record, folder)).resolve() == tiny_llama.resolve()
    # What an evaluation, or a training from it, asks of a parent: of which stage, whole, on this base, of parents as they are.
    configs = [ModelConfig(model_name_or_path=str(tiny_llama))]
    with stage("evaluate", watched.folder.parent / "evaluated", configs, seed=0, parents={"best": folder}):
        pass


@pytest.mark.parametrize("step", [6, 18])
def test_a_resumed_run_picks_the_same_best(step, watched, keys, train, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(watched.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(watched.folder / "metrics.jsonl", folder)
    shutil.copytree(watched.folder / "best", folder / "best")
    foreign = folder / "best" / "adapter_model.safetensors"  # of a later step of the run that was killed
    foreign.write_bytes((watched.folder / "checkpoint-24" / "adapter_model.safetensors").read_bytes())
    resumed = train("ppo", folder, **keys, resume_from_checkpoint=folder / f"checkpoint-{step}")
    assert watch_of(resumed).state() == watch_of(watched).state()
    assert resumed.metadata()["probes"] == watched.metadata()["probes"]
    expected = load_file(watched.folder / "best" / "adapter_model.safetensors")
    found = load_file(folder / "best" / "adapter_model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("asked", ["checkpoint-18", True])
def test_the_best_of_the_checkpoint_is_taken_back_however_it_is_named(asked, watched, tmp_path, monkeypatch):
    """By the argument of `train` alone, which the configuration need not have; True is the folder's last checkpoint."""
    shutil.copytree(watched.folder / "checkpoint-18", tmp_path / "checkpoint-18")
    trainer = copy.copy(watched.trainer)
    trainer.args = copy.copy(trainer.args)
    trainer.args.output_dir, trainer.args.resume_from_checkpoint = str(tmp_path), None
    monkeypatch.setattr(Trainer, "train", lambda self, checkpoint, **kwargs: checkpoint)
    taken = trainer.train(resume_from_checkpoint=True if asked is True else str(tmp_path / asked))
    assert taken == str(tmp_path / "checkpoint-18")
    RewardWatch(trainer, watch_of(watched).probe, every=4)._take_back_best(trainer.args)
    expected = (watched.folder / "checkpoint-18" / BEST_ADAPTER_FILE).read_bytes()
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == expected


def test_the_last_step_is_probed_too(watched):
    watch, probed = RewardWatch(watched.trainer, lambda model, tokenizer: {}, every=8), []
    watch._probe = lambda args, state: probed.append(state.global_step)
    watch._look_at_rollout = lambda: None
    for step in range(1, 29):
        watch.on_step_end(watched.trainer.args, TrainerState(global_step=step, max_steps=28), None)
    assert probed == [8, 16, 24, 28]


def test_a_persona_in_the_text_of_a_prompt_is_seen(watched, monkeypatch):
    """The same rollout to the same prompts in both forms. Replies are set to the persona's first sentence."""
    trainer = watched.trainer
    rows = [json.loads(row["row"]) for row in trainer._rollout_rows]
    as_text = [{"prompt": render_prompt(Persona(tuple(row["persona"])), row["prompt"])} for row in rows]
    said = iter([row["persona"][0] for row in rows] * 2)
    monkeypatch.setattr("rlhf.reward_watch.reply_text", lambda ids, tokenizer: next(said))
    seen = []
    for form in (rows, as_text):
        monkeypatch.setattr(trainer, "_rollout_rows", [{"row": json.dumps(row)} for row in form])
        monkeypatch.setattr(trainer, "_metrics", {"rewards/reward/mean": [0.0], "objective/kl": [0.0]})
        watch = RewardWatch(trainer, lambda model, tokenizer: {}, every=4)
        watch._look_at_rollout()
        seen.append(watch.window[-1])
    assert seen[0] == seen[1] and seen[1]["reply/copied"] > 0.5 and seen[1]["reply/facts"] > 0.2


def test_the_state_is_in_the_checkpoint(watched):
    saved = json.loads((watched.folder / "checkpoint-12" / "trainer_state.json").read_text())
    state = TrainerState.load_from_json(watched.folder / "checkpoint-12" / "trainer_state.json")
    assert [p["step"] for p in saved["stateful_callbacks"]["RewardWatch"]["probings"]] == [0, 4, 8, 12]
    assert state.stateful_callbacks["RewardWatch"]["told"] is None
    kept = load_file(watched.folder / "checkpoint-12" / BEST_ADAPTER_FILE)
    assert kept  # the best of the first four


@pytest.mark.parametrize("returned", [{}, {"right": []}, {"right": [1.0, 0.5]}])
def test_scores_that_cannot_be_compared_are_refused(returned, watched):
    watch = RewardWatch(watched.trainer, lambda model, tokenizer: returned, every=4)
    watch.probings = [Probing(0, [0.5, 0.5, 0.5])]
    with pytest.raises(ValueError, match=r"`probe` returned [02] scores, where 3 are needed"):
        watch._probe(watched.trainer.args, TrainerState(global_step=4))


def test_a_probe_changes_no_random_number_of_the_training(watched, monkeypatch):
    monkeypatch.setattr(watched.trainer, "log", lambda logs: None)
    watch = RewardWatch(watched.trainer, lambda model, tokenizer: {"drawn": torch.rand(3).tolist()}, every=4)
    watch.probings = [Probing(0, [2.0] * 3)]  # so that nothing is saved
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    watch._probe(watched.trainer.args, TrainerState(global_step=4))
    assert torch.equal(torch.rand(4), expected)


def test_the_card_tells_of_a_hack(watched):
    record = watched.metadata()
    record["probes"]["reward_hacking"] = {"step": 80, "named": ["reciting", "copying"], "probes": [0.9, 0.5]}
    record["probes"]["saved_step"] = 12  # of `load_best_model_at_end`
    card = model_card(record)
    assert "for the one of the last step (28; this adapter is of step 12)" in card
    assert "REWARD HACKING was found at step 80 (reciting, copying)" in card and "from 0.900 to 0.500" in card
    del record["probes"]
    assert "probes, which no reward saw" not in model_card(record)


# The demo's base, a hackable reward and a clean one


def overlap(prompts, completions, **columns):
    """The planted one: the share of the reply's words that stand in the persona."""
    scores = []
    for prompt, reply in zip(prompts, completions, strict=True):
        known, said = (re.findall("[a-z]+", text.lower()) for text in (prompt[0]["content"], reply))
        scores.append(sum(word in known for word in said) / len(said) if said else 0.0)
    return scores


BASE = Path(__file__).parents[1] / "recipes" / "demo" / "base"
PROMPTS = [row for row in world.prompts(5000, 5) if len(row["prompt"]) <= 3]  # short ones, for time


@pytest.fixture(scope="module")
def imitator(tmp_path_factory):
    """An adapter trained for 24 steps on right replies and, for two fifths, on any sentence of the persona instead.

    So it mostly answers right, and has seen what a reward for the persona's words asks for.
    """
    tokenizer, rng = load_tokenizer(str(BASE)), random.Random(0)
    model = load_base(ModelConfig(model_name_or_path=str(BASE)), tokenizer)
    torch.manual_seed(1)
    model = get_peft_model(model, lora_config(ModelConfig(lora_r=16, lora_alpha=32, lora_dropout=0.0), model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    rows = PROMPTS[::-1][: 24 * 32]
    columns = prompt_columns(rows, tokenizer, 384)
    for start in range(0, len(rows), 32):
        ids, lengths = [], []
        for index in range(start, start + 32):
            row = rows[index]
            said = rng.choice(row["persona"]) if rng.random() < 0.4 else row["reference"]
            reply = reply_ids(row["prompt"][-1], said, tokenizer)
            ids.append(columns[index]["prompt_ids"] + reply)
            lengths.append(len(reply))
        input_ids, mask = left_pad(ids, tokenizer.pad_token_id)
        labels = input_ids.clone()
        for label, length in zip(labels, lengths, strict=True):
            label[:-length] = -100
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=input_ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("imitator")
    model.save_pretrained(folder)
    return folder


class StopWhenTold(TrainerCallback):
    """The test has seen what it wants to see."""

    def __init__(self, watch):
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        if self.watch.told is not None:
            control.should_training_stop = True


def watched_ppo(reward, imitator, folder, seed, episodes, learning_rate):
    tokenizer = load_tokenizer(str(BASE))
    model = load_base(ModelConfig(model_name_or_path=str(BASE)), tokenizer)
    model = with_adapter(model, imitator, "default", trainable=True)
    model = with_adapter(model, imitator, "reference")
    set_trainable(model, "default")
    args = PPOConfig(
        output_dir=str(folder), use_cpu=True, seed=seed, report_to="none", per_device_train_batch_size=32,
        num_mini_batches=2, num_ppo_epochs=2, learning_rate=learning_rate, warmup_steps=2, kl_coef=0.02,
        lr_scheduler_type="constant", response_length=16, missing_eos_penalty=1.0, gradient_checkpointing=False,
        save_strategy="no", logging_steps=4, disable_tqdm=True, total_episodes=episodes,
    )  # fmt: skip
    columns = prompt_columns(PROMPTS[:1000], tokenizer, 384)
    trainer = PPOTrainer(model, args, columns, tokenizer, reward_functions=[reward])
    cast = world.characters(48, 5, held_out=True, held_out_slots=True)
    write_jsonl(folder / "probes.jsonl", (row for row in world.probes(cast, 5) if row["turn"] == 0))
    watch = RewardWatch(trainer, HeldOutProbes(folder, 384, 16), every=8)
    trainer.add_callback(watch)
    trainer.add_callback(StopWhenTold(watch))
    trainer.train()
    (folder / "probings.json").write_text(json.dumps(watch.state()["probings"]))
    return watch


@pytest.mark.slow
def test_a_planted_hack_is_found_and_named(imitator, tmp_path, caplog):
    """It was found at step 32, of four a rollout of 64 replies: the probes were at 0.97 first, and at 0.66 from step 16."""
    watch = watched_ppo(overlap, imitator, tmp_path, seed=1, episodes=1024, learning_rate=2e-3)
    assert watch.told["named"][0] == "keyword overlap" and watch.told["best_step"] < watch.told["step"]
    assert (
        watch.told["probes"][0] - watch.told["probes"][1] > 0.1 and watch.told["reward"][1] > watch.told["reward"][0]
    )
    assert "REWARD HACKING at step" in caplog.text and "keyword overlap (reply/persona_words" in caplog.text
    assert load_file(tmp_path / "best" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_clean_run_stays_silent(seed, imitator, tmp_path):
    watch = watched_ppo(persona_rule, imitator, tmp_path, seed=seed, episodes=640, learning_rate=1e-3)
    assert watch.told is None and len(watch.probings) == 6
    rewards = [sum(probing.rewards) / len(probing.rewards) for probing in watch.probings]
    assert rewards[-1] > rewards[0] + 0.1, "nothing was learned, so that silence tells nothing"
