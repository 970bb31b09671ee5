"""Rewards: the rule by cases and against the evaluator, scoring by the mask, the card that a lost head does not pass."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config

from evaluation.probes import score_reply
from rlhf import rewards
from rlhf.chat import render
from rlhf.check import examine
from rlhf.config import ConfigError, parse, values_of
from rlhf.data import world
from rlhf.files import write_json
from rlhf.model import load_tokenizer
from rlhf.pipeline import config_classes, plan
from rlhf.record import RunError, movable, stage
from rlhf.rewards import (
    RewardModel,
    RunningScale,
    call_reward,
    check_reward_card,
    load_reward_function,
    persona_rule,
    pool_by_mask,
    reward_name,
    reward_scores,
    score_ids,
)
from tests.conftest import qwen2_tokenizer

SLOT = ["dog", "cat", "bird"]


def rule(kind: str, reply: str, foil: str | None = None) -> float:
    (reward,) = persona_rule(
        prompts=[[]], completions=[reply], kind=[kind], value=["dog"], foil=[foil], slot_values=[SLOT], fact_id=["x"]
    )
    assert isinstance(reward, float)
    return reward


@pytest.mark.parametrize(
    ("kind", "reply", "reward"),
    [
        ("direct", "i have a dog .", 1),
        ("direct", "A DOG!", 1),
        ("direct", "i have a cat .", 0),
        ("direct", "i have a dog and a cat .", 0),  # naming everything is no answer
        ("direct", "yes , i have a dog .", 0),  # nothing was suggested
        ("direct", "i have a hotdog .", 0),  # a word, not letters
        ("direct", "", 0),
        ("direct", "dog " * 12, 1),
        ("direct", "dog " * 13, 0),  # 12 words at most
        ("false_suggestion", "no , i have a dog .", 1),
        ("false_suggestion", "no , not a cat , i have a dog .", 1),
        ("false_suggestion", "i have a dog .", 0),
        ("false_suggestion", "yes , i have a dog .", 0),
        ("false_suggestion", "no , i have a cat .", 0),
        ("false_suggestion", "no , i have a dog and a cat .", 0),
        ("false_suggestion", "no , i have a dog , not a bird .", 0),  # nobody spoke of a bird
        ("false_suggestion", "no .", 0),
        ("true_suggestion", "yes , i have a dog .", 1),
        ("true_suggestion", "i have a dog .", 1),
        ("true_suggestion", "no , i have a dog .", 0),
        ("true_suggestion", "yes .", 0),  # the rule wants the value named
        ("true_suggestion", "yes , a dog and a cat .", 0),
    ],
)
def test_the_rule_by_cases(kind, reply, reward):
    assert rule(kind, reply, "cat" if kind == "false_suggestion" else None) == reward


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("no , i have a gold fish .", 1),
        ("no , i have gold fish , gold fish !", 1),
        ("no , i have a gold fish , not a sea horse .", 1),
        ("no , i have a gold fish and a fish .", 0),
        ("no , i have a gold fish and a sea horse .", 0),
        ("no , i have a fish of gold .", 0),
    ],
)
def test_values_may_have_several_words(reply, reward):
    values = ["gold fish", "fish", "sea horse"]
    kind, value, foil = ["false_suggestion"], ["gold fish"], ["sea horse"]
    assert persona_rule([[]], [reply], kind=kind, value=value, foil=foil, slot_values=[values]) == [reward]


PROBES = [dict(probe) for probe in world.probes(world.characters(12, seed=3), seed=3)]


def rewards_of(replies: list[str]) -> list[float]:
    columns = {key: [probe[key] for probe in PROBES] for key in PROBES[0]}
    return persona_rule([[]] * len(PROBES), replies, **columns)


def other(probe):
    return next(value for value in probe["slot_values"] if value != probe["value"])


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        (world.oracle_reply, 1.0),
        (lambda probe: world.oracle_reply(probe).replace(probe["value"], other(probe)), 0.0),
        (lambda probe: "", 0.0),
        (lambda probe: "hello , how are you ?", 0.0),
        (lambda probe: " ".join(probe["slot_values"]), 0.0),
    ],
    ids=["oracle", "other value", "silence", "small talk", "all values"],
)
def test_the_rule_agrees_with_the_evaluator(reply, reward):
    replies = [reply(probe) for probe in PROBES]
    assert rewards_of(replies) == [reward] * len(PROBES)
    assert [score_reply(probe, text) for probe, text in zip(PROBES, replies, strict=True)] == [reward == 1] * len(
        PROBES
    )
    assert len(PROBES) > 100 and {probe["kind"] for probe in PROBES} == {
        "direct",
        "false_suggestion",
        "true_suggestion",
    }


def test_the_reward_follows_the_persona():
    """The same reply to the same question, and another value in the persona."""
    replies, kinds = ["i have a dog ."] * 2, ["direct"] * 2
    assert persona_rule([[]] * 2, replies, kinds, ["dog", "cat"], [None] * 2, [SLOT] * 2) == [1.0, 0.0]


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        persona_rule([[]], ["dog", "dog"], kind=["direct"], value=["dog"], foil=[None], slot_values=[SLOT])


def test_a_reward_function_is_found_by_name():
    assert load_reward_function("rlhf.rewards:persona_rule") is persona_rule


@pytest.mark.parametrize(
    "name",
    [
        "persona_rule", "rlhf.rewards", "rlhf.rewards:", ":persona_rule", "", "no_such_module:reward", ".rewards:persona_rule",
        "rlhf.rewards:no_such", "rlhf.rewards:_YES", "rlhf.rewards:persona_rule:x",
    ],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="`reward_function` is .*`module:function`") as caught:
        load_reward_function(name)
    assert repr(name) in str(caught.value)


# --- reward models ---------------------------------------------------------------------------------------------------

STOP, SPACE = 2, 5
ROWS = [[7, 8, 9, STOP], [7, 8, 9], [40, STOP], [3], [*range(10, 30), STOP], [6, STOP, 6], [STOP], [50, 51, 52, 53]]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tiny_qwen2"])
def classifier(request):
    """A sequence classifier whose pad token is its stop token, with a head that is not near zero."""
    folder = request.getfixturevalue(request.param)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = model.config.eos_token_id = load_tokenizer(str(folder)).eos_token_id
    return model


def padded(rows, side):
    width = max(map(len, rows))
    pads = [[STOP] * (width - len(row)) for row in rows]
    holes = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        ids, mask = [p + r for p, r in zip(pads, rows, strict=True)], [h + o for h, o in zip(holes, ones, strict=True)]
    else:
        ids, mask = [r + p for p, r in zip(pads, rows, strict=True)], [o + h for h, o in zip(holes, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def last_token_scores(model):
    """By hand, row by row without padding: the head on the last hidden state."""
    hidden = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
    return torch.stack([model.score(state).squeeze() for state in hidden])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_scores_as_its_rows_alone_on_either_side(classifier, side):
    expected = last_token_scores(classifier)
    ids, mask = padded(ROWS, side)
    pool_by_mask(classifier)
    with torch.no_grad():
        logits = classifier(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (len(ROWS), 1)
    assert_close(logits.squeeze(1), expected, rtol=0, atol=1e-5)  # float32 sums in another order
    assert_close(torch.tensor(score_ids(classifier, ROWS)), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


def test_the_stop_token_is_scored_although_it_is_the_pad_token(classifier):
    with_stop, without = score_ids(classifier, [[7, 8, 9, STOP], [7, 8, 9]])
    assert abs(with_stop - without) > 1e-3


def test_scores_are_float32_also_of_a_base_in_half_precision(classifier):
    classifier.bfloat16()
    classifier.score.float()
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        scores = reward_scores(classifier, ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    assert scores.dtype == torch.float32 and scores.shape == (len(ROWS),)


@pytest.fixture
def card(tmp_path, classifier):
    rows = [{"ids": ids, "reward": score} for ids, score in zip(ROWS, score_ids(classifier, ROWS), strict=True)]
    content = {"rows": rows, "eval_rank_accuracy": 0.9, "eval_rank_accuracy_low": 0.8}
    (tmp_path / "reward_card.json").write_text(json.dumps(content))
    return tmp_path


def test_the_card_is_passed_by_the_model_that_wrote_it(card, classifier):
    assert check_reward_card(classifier, card) < 1e-5


@pytest.mark.parametrize(("low", "warned"), [(0.51, False), (0.5, True)])
def test_a_kind_of_pair_at_chance_is_named(low, warned, card, classifier, caplog):
    content = json.loads((card / "reward_card.json").read_text())
    content |= {"eval_rank_accuracy/polarity": 0.6, "eval_rank_accuracy/polarity_low": low}
    (card / "reward_card.json").write_text(json.dumps(content))
    check_reward_card(classifier, card)
    said = [record.getMessage() for record in caplog.records]
    assert [("eval_rank_accuracy/polarity (0.60, lower bound 0.50)" in line) for line in said] == [True] * warned


def test_the_card_is_failed_by_a_head_that_was_made_again(card, classifier):
    torch.nn.init.normal_(classifier.score.weight)
    with pytest.raises(ValueError, match="other scores than when it was trained.*Train it again"):
        check_reward_card(classifier, card)


def test_the_card_is_failed_by_another_base(card, classifier):
    torch.nn.init.normal_(next(p for name, p in classifier.named_parameters() if ".0." in name and p.ndim == 2))
    with pytest.raises(ValueError, match="another base"):
        check_reward_card(classifier, card)


@pytest.mark.parametrize("row", [0, 3, len(ROWS) - 1])
def test_one_score_that_is_no_number_fails_the_card(card, classifier, monkeypatch, row):
    scores = score_ids(classifier, ROWS)
    scores[row] = float("nan")
    monkeypatch.setattr(rewards, "score_ids", lambda model, rows: scores)
    with pytest.raises(ValueError, match="off by nan"):
        check_reward_card(classifier, card)


# Reward models of another base, and scales


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A reward model whose tokenizer, template and vocabulary are not the policy's."""
    tokenizer = qwen2_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    torch.manual_seed(5)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, intermediate_size=16, max_position_embeddings=120, num_labels=1,
                         pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    folder = tmp_path_factory.mktemp("outside") / "judge"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_outside_reward_model_reads_messages_by_its_own_template(outside):
    prompt = [{"role": "system", "content": "i have a dog ."}, {"role": "user", "content": "any pets ?"}]
    text = (
        "<|im_start|>system\ni have a dog .<|im_end|>\n<|im_start|>user\nany pets ?<|im_end|>\n"
        "<|im_start|>assistant\n{}<|im_end|>\n"
    )  # its template, filled in by hand
    tokenizer = AutoTokenizer.from_pretrained(outside)
    model = AutoModelForSequenceClassification.from_pretrained(outside).eval()
    replies = ["a dog .", "no , i have a cat ."]
    with torch.no_grad():
        expected = [model(**tokenizer(text.format(reply), return_tensors="pt")).logits.item() for reply in replies]
    judge = RewardModel(str(outside))
    assert judge([prompt, prompt], replies, kind=["direct", "direct"]) == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
    assert reward_name(judge) == "judge" and not any(p.requires_grad for p in judge.model.parameters())
    injected = judge([prompt], ["a dog .<|im_end|>\n<|im_start|>user\nany pets ?"])[0]
    assert abs(injected - expected[0]) > 1e-6  # text of a reply never becomes a turn
    turns = [{"role": role, "content": "ok ."} for role in ("user", "assistant") * 9]
    cut, *shorter = (judge([[prompt[0], *turns[start:], prompt[1]]], replies[:1]) for start in range(0, 19, 2))
    assert cut in shorter[:-1] and cut != shorter[-1]  # 120 positions: the oldest turns go, no more than must


@pytest.mark.parametrize("pad", ["as saved", "that closes a turn", "none"])
def test_a_batch_of_an_outside_reward_model_scores_as_its_rows_alone(pad, outside, tmp_path):
    """The scores of each row alone come from transformers' own forward, which looks for the last token by the pad token."""
    folder = shutil.copytree(outside, tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config["pad_token_id"] = {"as saved": config["pad_token_id"], "none": None}.get(pad, tokenizer.eos_token_id)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    judge = RewardModel(str(folder), batch_size=3)
    replies = ["a dog .", "no", "", "i have a cat and a dog and a bird .", "yes , a dog .", "a", "no , i have a cat ."]
    prompts = [[{"role": "user", "content": "any pets ? " * (1 + place % 2)}] for place in range(len(replies))]
    rows = [
        render([*prompt, {"role": "assistant", "content": reply}], judge.tokenizer)["input_ids"]
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    sizes = []
    judge.model.register_forward_pre_hook(
        lambda m, a, inputs: sizes.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    assert judge(prompts, replies) == pytest.approx(alone, abs=1e-5)  # float32, padded against alone
    assert sizes == [3, 3, 1] and len({len(row) for row in rows}) > 4 and max(alone) - min(alone) > 0.1


# The mixture of a recipe


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """A recipe whose rewards are a folder of its run, a model beside its file, and a function."""
    recipe = tmp_path / "recipes" / "mixed"
    recipe.mkdir(parents=True)
    (recipe / "judge").mkdir()
    values = {
        "output_dir": "runs/mixed/ppo", "dataset": "runs/mixed/prepare", "sft_adapter": "runs/mixed/sft",
        "rewards": {"runs/mixed/reward": 0.7, "./judge": 0.1, "rlhf.rewards:persona_rule": 0.2, "own-er/judge": 0.3},
    }  # fmt: skip
    (recipe / "ppo.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return recipe


@pytest.mark.parametrize(("output_dir", "reward"), [("runs/mixed", "runs/mixed/reward"), ("other", "other/reward")])
def test_paths_of_a_mixture_are_of_the_recipe_and_move_with_the_run(output_dir, reward, mixture):
    expected = {reward: 0.7, str(mixture / "judge"): 0.1, "rlhf.rewards:persona_rule": 0.2, "own-er/judge": 0.3}
    (step,) = plan(mixture, False, None, Path(output_dir), {})
    assert values_of(step.configs)["rewards"] == expected
    alone = parse(config_classes("ppo"), ["--config", str(mixture / "ppo.yaml")], "ppo")
    assert str(mixture / "judge") in values_of(alone)["rewards"]
    saved = values_of(movable(step.configs, mixture.parents[1] / "elsewhere" / output_dir / "ppo"))["rewards"]
    assert os.path.relpath(mixture / "judge", mixture.parents[1] / "elsewhere" / output_dir / "ppo") in saved


def test_a_path_that_a_mixture_names_twice_is_refused(mixture):
    values = yaml.safe_load((mixture / "ppo.yaml").read_text())
    (mixture / "ppo.yaml").write_text(yaml.safe_dump(values | {"rewards": {"./judge": 1.0, "../mixed/judge": 2.0}}))
    with pytest.raises(ConfigError, match="`rewards`.*names one path twice"):
        parse(config_classes("ppo"), ["--config", str(mixture / "ppo.yaml")], "ppo")


def test_the_check_knows_the_folders_of_a_mixture(mixture, dataset, tiny_llama):
    shutil.copytree(tiny_llama, mixture / "judge", dirs_exist_ok=True)  # a model: its format is its own
    (mixture / "adapter").mkdir()  # neither model nor adapter of ours
    values = yaml.safe_load((mixture / "ppo.yaml").read_text())
    values |= {"dataset": str(dataset), "model_name_or_path": str(tiny_llama), "response_length": 6, "max_length": 256}
    values["rewards"]["./adapter"] = 1.0
    (mixture / "ppo.yaml").write_text(yaml.safe_dump(values))
    configs = parse(config_classes("ppo"), ["--config", str(mixture / "ppo.yaml")], "ppo")
    items = examine("ppo", configs, unmade=["runs/mixed/reward"]).items
    found = [(item.passed, item.detail) for item in items if item.name == "parent"]
    assert [passed for passed, _ in found] == [False, False, True]  # SFT's and the empty folder, which nothing makes
    assert str(mixture / "adapter") in found[1][1] and "runs/mixed/reward" in found[2][1]


def test_several_reward_stages_are_parents(mixture, tmp_path):
    """Of the stage `reward` each, whatever their place."""
    for name, made_by in (("one", "reward"), ("two", "sft")):
        write_json(tmp_path / name / "metadata.json", {"stage": made_by, "status": "done", "parents": {}})
    with (
        pytest.raises(
            RunError, match="two was made by the stage 'sft', and what is needed as 'reward_2' is made by reward"
        ),
        stage("ppo", tmp_path / "ppo", [], seed=0, parents={"reward": tmp_path / "one", "reward_2": tmp_path / "two"}),
    ):
        pass


def test_an_outside_reward_model_without_a_template_is_refused(outside, tmp_path):
    shutil.copytree(outside, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template.*Write a function"):
        RewardModel(str(tmp_path / "plain"))


def test_a_running_scale_is_that_of_all_scores_of_all_ranks():
    """Two ranks see 3 and 3 scores, twice; mean and variance by numpy over all twelve."""
    scores = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e3  # cancellation shows
    scale = RunningScale()
    for both in scores:
        sums = iter([
            torch.tensor([6.0, both.double().sum()], dtype=torch.float64),
            ((both.double() - both.double().mean()) ** 2).sum(),
        ])  # fmt: skip
        scale.add(both[0], lambda x, sums=sums: next(sums))
    everything = scores.double().numpy()
    assert (scale.count, scale.mean) == (12, pytest.approx(everything.mean(), rel=1e-12))
    assert scale.squares / 11 == pytest.approx(everything.var(ddof=1), rel=1e-6)
    expected = (2.0 - everything.mean()) / everything.std(ddof=1)
    assert scale.normalised(torch.tensor([2.0], dtype=torch.float64)).item() == pytest.approx(expected)


def test_scores_that_never_vary_are_only_centred():
    scale = RunningScale()
    scale.add(torch.tensor([3.0, 3.0]), lambda x: x)
    assert scale.normalised(torch.tensor([3.0, 4.0])).tolist() == [0.0, 1.0]


# Callables that are not rewards


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "'reward' returned NoneType in place of a list. Return one number for each reply"),
        ((x for x in [1.0, 2.0]), "returned generator in place of a list"),
        ("ab", "returned str in place of a list"),
        ({0: 1.0, 1: 2.0}, "returned dict in place of a list"),
        ([None, 1.0], "'reward' gave None for the reply 'one', no number"),
        ([1.0, "2"], "gave '2' for the reply 'two', no number"),
        ([[1.0], [2.0]], r"gave \[1.0\] for the reply 'one', no number"),
        ([1.0], "gave 1 scores for 2 replies"),
        ([1.0, 1e39], "gave 1e\\+39 for the reply 'two'. Return a number that is finite in float32"),
        ([float("nan"), 1.0], "gave nan for the reply 'one'"),
    ],
)
def test_what_is_no_number_a_reply_is_refused_by_the_name_of_the_reward(given, message):
    def reward(prompts, completions, **columns):
        return given

    with pytest.raises((TypeError, ValueError), match=message):
        call_reward(reward, [[], []], ["one", "two"], {})


@pytest.mark.parametrize(
    "given", [[1, True], (1.0, 1.0), torch.ones(2), np.ones(2), [np.float32(1), torch.tensor(1.0)]]
)
def test_numbers_of_any_library_are_scores(given):
    def reward(prompts, completions, **columns):
        return given

    scores = call_reward(reward, [[], []], ["one", "two"], {})
    assert scores == [1.0, 1.0] and {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kind": [1]}, "'reward' cannot be called: missing a required argument: 'value'. The columns are kind"),
        ({"value": [1], "completions": ["x"]}, "a column called 'completions', which is an argument of every reward"),
    ],
)
def test_columns_that_do_not_fit_are_named(columns, message):
    def reward(prompts, completions, value, **columns):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        call_reward(reward, [[]], ["one"], columns)
