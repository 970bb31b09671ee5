"""The plan: counted pieces against hand computations, published numbers, and settings that really fit."""

import contextlib
import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from trl import ModelConfig

from rlhf import cli
from rlhf import memory as plan
from rlhf.hours import Rows, evaluation_hours, pass_seconds, ppo_hours, training_hours
from rlhf.memory import GIB, Card, Setting, base_config, kv_cache_bytes, memory, nearest, optimiser_bytes, published
from rlhf.meta_step import (
    BYTES_OF_4BIT,
    T4,
    Device,
    StepShape,
    StorageCounter,
    Work,
    build,
    measure,
    parts,
    train_step,
)
from rlhf.meta_step import _on as on_device
from rlhf.pipeline import plan as plan_recipe

CPU = Device("cpu", torch.float32, None)
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
RECIPES = Path(__file__).parents[1] / "recipes"


def small_llama(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip


def lora(rank: int = 8, **more) -> ModelConfig:
    return ModelConfig(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **more)


# --- the counter ------------------------------------------------------------------------------------------------------


def test_counter_follows_what_is_alive() -> None:
    counter = StorageCounter()
    with counter:
        a = torch.empty(1000, device="meta")  # 4,000 bytes
        b = a.view(10, 100).t()  # the same storage
        c = a + 1  # 8,000
        del a, b
        d = c * 2  # 8,000 again, since the first is gone
        del c, d
        torch.empty(500, device="meta")
    assert counter.work.peak == 8000


def test_counter_of_a_product_and_its_backward() -> None:
    layer = nn.Linear(50, 30, bias=False, device="meta")
    counter = StorageCounter()
    counter.know(iter(layer.parameters()))
    with counter:
        layer(torch.empty(7, 50, device="meta")).sum().backward()
    # A product of 7 x 50 x 30 forward and, the input needing none, one for the weight: 2 operations a multiplication.
    assert counter.work.flops == 2 * 2 * 7 * 50 * 30
    # Input, the sum and its gradient, and the weight's gradient. The output is gone by then, and its gradient is the
    # sum's own, seen as a matrix.
    assert counter.work.peak == 4 * (7 * 50 + 1 + 1 + 30 * 50)


def test_logits_are_told_by_their_width() -> None:
    counter = StorageCounter((200,))
    with counter:
        kept = torch.empty(10, 64, device="meta"), torch.empty(10, 200, device="meta")
    assert counter.work.logits == 4 * 10 * 200
    assert counter.work.peak == 4 * 10 * 264
    del kept


def test_autocast_is_what_autocast_is() -> None:
    """dtype by dtype as torch's own autocast on a CPU, where it exists."""
    weight = torch.zeros(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real = [nn.functional.linear(torch.zeros(2, 4), weight).dtype, (torch.zeros(2) + 1).dtype]
    with on_device(Device("cpu", torch.bfloat16, torch.bfloat16), nn.Module()):
        x = torch.zeros(2, 4, device="meta")
        found = [nn.functional.linear(x, weight.detach().to("meta")).dtype, (x + 1).dtype]
        with torch.autocast("meta", enabled=False):
            assert nn.functional.linear(x, weight.detach().to("meta")).dtype is torch.float32
    assert found == real == [torch.bfloat16, torch.float32]
    assert torch.autocast is torch.amp.autocast_mode.autocast  # and it is put back


# --- pieces by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted({entry["page"].removeprefix("https://huggingface.co/") for entry in published().values()})
)
def test_published_configurations_have_the_published_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config(name))
    assert sum(p.numel() for p in model.parameters()) == published()[name]["parameters"]


def test_weights_of_llama_8b() -> None:
    found = measure("sft", base_config(LLAMA_8B), lora(16), StepShape(1, 64, 64))
    # Each rotary frequency is a float32 buffer: 64 numbers.
    assert found.parts.weights == pytest.approx(2 * 8_030_261_248, abs=1024)
    # 7 linear layers a block: r x (in + out).
    each = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert found.parts.trainable == 16 * 32 * each
    assert found.parts.adapters == 4 * found.parts.trainable


def test_4bit_layers() -> None:
    config = base_config(LLAMA_8B)
    found = measure("sft", config, lora(16), StepShape(1, 64, 64, load_in_4bit=True))
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 8_030_261_248 - linear  # embeddings, head and norms stay in float16
    assert BYTES_OF_4BIT == pytest.approx(0.516, abs=1e-3)
    assert found.parts.weights == pytest.approx(BYTES_OF_4BIT * linear + 2 * rest, rel=1e-6)


def test_kv_cache_and_optimiser() -> None:
    # Llama-3.1-8B: 32 layers, 8 heads for keys and values of width 128; a token is 128 KiB in float16.
    assert kv_cache_bytes(base_config(LLAMA_8B), 1, torch.float16) == 128 * 1024
    assert kv_cache_bytes(GPT2Config(n_layer=3, n_head=4, n_embd=64), 10, torch.float32) == 2 * 3 * 64 * 10 * 4
    assert optimiser_bytes("adamw_torch") == 8
    assert optimiser_bytes("adamw_8bit") == 2


def test_what_is_added_up() -> None:
    setting = Setting("sft", 2, 2, 2, 64, gradient_checkpointing=True)
    found = memory(setting, small_llama(), lora(), T4, gpus=2)
    trainable = 8 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert found.parts["adapters"] == found.parts["gradients"] == found.parts["DDP buckets*"] == 4 * trainable
    assert found.parts["optimiser*"] == 8 * trainable
    assert found.total == sum(found.parts.values())
    alone = memory(setting, small_llama(), lora(), T4, gpus=1)
    assert alone.parts["DDP buckets*"] == 0


def test_roles_of_each_stage() -> None:
    """Adapters that lie beside each other, in units of one."""
    one = 8 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    for stage, number, heads in (("sft", 1, 0), ("reward", 1, 2), ("dpo", 2, 0), ("ppo", 3, 2)):
        found = parts(build(stage, small_llama(), lora(), StepShape(1, 16, 8), CPU))
        beside = found.adapters / 4 - number * one  # score heads, value head
        assert heads * 64 <= beside <= (heads + 1) * 64 + 1, stage
    critic = parts(build("ppo", small_llama(), lora(), StepShape(1, 16, 8, value_model="adapter"), CPU))
    assert critic.adapters / 4 > 4 * one


# --- the step ---------------------------------------------------------------------------------------------------------


CHEAP = [("reward", True), ("ppo", False)]  # the others cost twenty seconds


@pytest.mark.parametrize(
    ("stage", "checkpointing"),
    [
        pytest.param(stage, checkpointing, marks=[] if (stage, checkpointing) in CHEAP else pytest.mark.slow)
        for stage in ("sft", "reward", "dpo", "ppo")
        for checkpointing in (True, False)
    ],
)
def test_layers_that_are_not_run_are_added_rightly(stage: str, checkpointing: bool, monkeypatch) -> None:
    shape = StepShape(2, 48, 16, checkpointing, accumulates=False)
    prompts = None if stage == "reward" else (4, 32)
    few = measure(stage, small_llama(4), lora(), shape, prompts=prompts)
    monkeypatch.setattr("rlhf.meta_step._FEW_LAYERS", (99, 100))
    whole = measure(stage, small_llama(4), lora(), shape, prompts=prompts)
    assert few.parts == whole.parts
    for name in ("train", "evaluate", "prefill"):
        ours, theirs = getattr(few, name), getattr(whole, name)
        assert ours.peak == pytest.approx(theirs.peak, rel=0.01), name  # where the peak falls may move by a layer
        assert (ours.flops, ours.kernels) == pytest.approx((theirs.flops, theirs.kernels))


def test_checkpointing_and_precision_show() -> None:
    """Of the reward stage, which has no logits to drown them."""
    shape = StepShape(4, 64, 64)
    config = small_llama(6)
    with_it = measure("reward", config, lora(), shape).train.peak
    without = measure("reward", config, lora(), replace(shape, gradient_checkpointing=False)).train.peak
    assert with_it < 0.5 * without
    in_float32 = measure("reward", config, lora(), replace(shape, gradient_checkpointing=False), CPU).train.peak
    assert without < 0.8 * in_float32


def test_the_step_leaves_the_libraries_as_they_were() -> None:
    before = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    shape = StepShape(1, 16, 8)
    train_step("sft", build("sft", small_llama(), lora(), shape, T4), shape, T4)
    assert (torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype) == before


@pytest.mark.slow
def test_plan_against_a_real_training(tmp_path: Path) -> None:
    """One case of benchmarks/plan_memory.py, in this process."""
    import importlib.util

    path = Path(__file__).parents[1] / "benchmarks" / "plan_memory.py"
    spec = importlib.util.spec_from_file_location("plan_memory", path)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    case = replace(benchmark.CASES[9], config=benchmark.llama(128, 3, 4, 2, 256, 8000))
    measured = benchmark.trained(case, tmp_path)
    assert benchmark.planned(case)["total"] == pytest.approx(measured["held"] + measured["peak"], rel=0.15)


# --- fits or not ------------------------------------------------------------------------------------------------------


def test_llama_8b_fits_in_4bit_alone() -> None:
    setting = Setting("sft", 1, 8, 1, 512, gradient_checkpointing=True)
    config, card = base_config(LLAMA_8B), Card()
    assert memory(setting, config, lora(16)).total > card.size  # 15 GiB of weights
    changes = nearest(setting, config, lora(16), card)
    assert changes is not None and changes["load_in_4bit"] is True
    assert memory(replace(setting, **changes), config, lora(16)).total <= card.size


def test_nearest_setting_is_batch_first_and_fits_when_planned_again() -> None:
    config = small_llama()
    setting = Setting("sft", 16, 1, 16, 128, gradient_checkpointing=False)
    quarter = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 4}
    small = memory(replace(setting, **quarter), config, lora()).total
    card = Card(size=int(small) + 1, number=2)
    changes = nearest(setting, config, lora(), card)
    assert changes is not None
    assert changes["per_device_train_batch_size"] == 4 and changes["gradient_accumulation_steps"] == 4
    assert "gradient_checkpointing" not in changes and "max_length" not in changes
    assert memory(replace(setting, **changes), config, lora()).total <= card.size


def test_nothing_fits_a_card_that_holds_no_context() -> None:
    setting = Setting("sft", 1, 1, 1, 64, gradient_checkpointing=True)
    assert nearest(setting, small_llama(), lora(), Card(size=1000)) is None
    assert nearest(setting, small_llama(), lora(), Card()) == {}


def of_the_reply(held: int, batch: int, together: int) -> Setting:
    return Setting("ppo", batch, 1, held, 64, False, generation_batch_size=together, response_length=8)


def test_ppo_does_not_read_the_eval_batch() -> None:
    """Its held-out forward passes have the train batch's size."""
    config = small_llama()
    small, large = (memory(of_the_reply(held, 4, 2), config, lora(), training_only=False) for held in (1, 64))
    assert small.parts == large.parts and small.measured == large.measured
    assert all("per_device_eval_batch_size" not in rung for rung in plan._ladder(of_the_reply(64, 4, 2)))
    assert plan._ladder(of_the_reply(64, 6, 4))[:3] == [
        {"per_device_train_batch_size": batch, "generation_batch_size": together}
        for batch, together in ((3, 2), (1, 1))
    ] + [{"gradient_checkpointing": True}]


def test_an_odd_batch_keeps_the_rows_of_a_step() -> None:
    """5 rows become 1 x 5, and not 2 x 2; 9 x 2 become 3 x 6."""
    config, setting = small_llama(), Setting("sft", 5, 1, 5, 128, gradient_checkpointing=False)
    card = Card(size=int(memory(replace(setting, **one(5)), config, lora()).total) + 1)
    changes = nearest(setting, config, lora(), card)
    assert changes is not None
    assert (changes["per_device_train_batch_size"], changes["gradient_accumulation_steps"]) == (1, 5)
    first = plan._ladder(Setting("sft", 9, 2, 1, 128, True))[0]
    assert plan._changed(Setting("sft", 9, 2, 1, 128, True), first).gradient_accumulation_steps == 6


def one(rows: int) -> dict[str, int]:
    return {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": rows,
    }


def test_reward_loads_the_base_twice_at_its_end() -> None:
    setting = Setting("reward", 1, 2, 1, 128, gradient_checkpointing=True)
    found = memory(setting, base_config("meta-llama/Llama-3.2-3B-Instruct"), lora(16))
    assert found.phase == "the check of the saved adapter"
    assert found.parts["a second copy*"] == found.parts["weights"] + found.parts["adapters"]


# --- what is shown ----------------------------------------------------------------------------------------------------


def shown(recipe: str, card: Card | None = None, **overrides: str) -> str:
    return told(stages_of(recipe, **overrides), card)[0]


def stages_of(recipe: str, **overrides: str) -> dict[str, list]:
    steps = plan_recipe(RECIPES / recipe, False, None, Path("runs") / "nowhere", overrides)
    return {step.stage: step.configs for step in steps}


def told(stages: dict[str, list], card: Card | None = None) -> tuple[str, list[str]]:
    """What is printed, on one line, and returned."""
    out = io.StringIO()
    missing = plan.show_plan(stages, Console(file=out, width=140), card or Card())
    return " ".join(out.getvalue().replace("│", " ").split()), missing


@pytest.fixture
def small_base(monkeypatch) -> None:
    """Two layers of width 64 in the place of each recipe's base."""
    monkeypatch.setattr(plan, "base_config", lambda name: small_llama())


@pytest.mark.slow
def test_persona_chat_takes_five_hours_or_less(tmp_path: Path) -> None:
    steps = plan_recipe(RECIPES / "persona-chat", False, None, tmp_path, {})
    began = time.process_time()
    plans = plan.plan_stages({step.stage: step.configs for step in steps}, Card())
    assert time.process_time() - began < 20  # seconds of one core; 5 without other work beside it
    assert [each.stage for each in plans] == ["sft", "reward", "dpo", "ppo", "evaluate"]
    assert all(each.fits for each in plans)
    assert 1 < sum(each.hours for each in plans) <= 5


def test_table_names_what_is_a_rule(small_base) -> None:
    text = shown("demo")
    for part in ("weights", "adapters", "gradients", "optimiser*", "activations", "CUDA context*", "fragmentation*"):
        assert part in text
    assert "fits" in text and "an estimate" in text and "of Kaggle's 30 hours a week" in text
    assert "training and evaluation: " in text and "not in these hours: prepare, base" in text


def test_gated_base_names_licence_token_and_alternative() -> None:
    said = plan.access(LLAMA_8B)
    assert said is not None
    assert (
        f"https://huggingface.co/{LLAMA_8B}" in said and "hf auth login" in said and "Qwen/Qwen2.5-7B-Instruct" in said
    )
    assert not published()["Qwen/Qwen2.5-7B-Instruct"].get("gated")
    assert plan.access("Qwen/Qwen2.5-7B-Instruct") is None
    for entry in published().values():
        assert not entry.get("gated") or not published()[entry["ungated"]].get("gated")


def test_what_does_not_fit_says_which_keys(small_base) -> None:
    sft = {"sft": stages_of("demo")["sft"]}
    needed = plan.plan_stages(sft, Card())[0].memory.total
    small = Card(size=int(needed) - 1)
    text, missing = told(sft, small)
    assert "NO" in text and "sft does not fit. It fits with `per_device_" in text
    assert missing == []  # there may be other GPUs where it will run
    assert [each.status for each in plan.plan_findings(sft, small)] == ["warn"]
    here = replace(small, here=True)
    assert told(sft, here)[1] == ["sft"]
    assert [each.status for each in plan.plan_findings(sft, here)] == ["fail"]
    assert told(sft, replace(here, size=16 * GIB))[1] == []


@pytest.mark.parametrize(("size", "status"), [(0.47, 1), (16, 0)])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_check_fails_by_what_does_not_fit_the_gpus_here(
    size: float, status: int, form: list[str], small_base, monkeypatch
) -> None:
    """Everything else passes, so that the plan alone decides."""
    monkeypatch.setattr(plan, "visible_card", lambda: Card("a card", int(size * GIB), 1, here=True))
    monkeypatch.setattr("rlhf.doctor.examine", list)
    monkeypatch.setattr("rlhf.check.show_recipe", lambda trainings: {})
    monkeypatch.setattr("rlhf.check.as_findings", lambda trainings: [])
    monkeypatch.setattr(cli, "_stages", lambda recipe, words: {"sft": stages_of("demo")["sft"]})
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as end:
        cli.main(["check", "demo", *form])
    assert not status or end.value.code == 1


def test_a_reward_model_of_its_own_is_named_as_left_out(small_base, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    values = {"reward_adapter": "runs/reward", "reward_function": "rlhf.rewards:persona_rule",
              "rewards": {"runs/reward": 1, "rlhf.rewards:persona_rule": 1, str(tmp_path): 1, "org/judge-8b": 2}}  # fmt: skip
    assert plan._left_out(values) == (
        "left out of memory and hours: org/judge-8b of `rewards`, a model of its own on each GPU"
    )
    assert plan._left_out({**values, "rewards": {}}) == ""
    stages = {"ppo": stages_of("demo")["ppo"]}
    parents = next(config for config in stages["ppo"] if hasattr(config, "rewards"))
    parents.rewards = {"org/judge-8b": 0.5}
    assert "ppo: left out of memory and hours: org/judge-8b of `rewards`" in told(stages)[0]
    assert "org/judge-8b" in plan.plan_findings(stages, Card())[0].found


# --- hours by hand ----------------------------------------------------------------------------------------------------

# Seconds of a pass, without kernels: nothing but what is given here counts. A stage's loading takes 90 s.
HOURLY = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 5,
          "num_train_epochs": 1.0, "max_steps": -1, "eval_strategy": "steps", "eval_steps": 20, "logging_steps": 1,
          "sample_steps": 50, "stage": "sft"}  # fmt: skip
ROWS = Rows(train=1600, heldout=100, mean=50, said="")


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        # 100 steps on two GPUs, of 2 passes of 3 s for rows half as long as counted: 300 s; 5 evaluations of 10 batches
        # of 0.5 s: 25 s; 3 samplings of 40 tokens of 0.1 s: 12 s
        ({}, 300 + 25 + 12),
        ({"eval_strategy": "no"}, 300 + 12),
        ({"eval_strategy": "epoch"}, 300 + 5 + 12),
        ({"per_device_eval_batch_size": 50}, 300 + 2.5 + 12),
        ({"max_steps": 20}, 60 + 5 + 4),
        ({"stage": "reward"}, 300 + 25),
    ],
)
def test_hours_of_a_training(more: dict, seconds: float) -> None:
    found = training_hours({**HOURLY, **more}, ROWS, Work(seconds=3), Work(seconds=1), 2, 100, 0.1)
    assert found * 3600 == pytest.approx(90 + seconds)


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        # A rollout of 4 x 2 x 2 = 16 episodes on each of 2 GPUs, so 10 of them for 320. Each: 2 times 8 replies of
        # 1 s to read and 20 tokens of 0.1 s: 6 s; 4 pieces of 4 under policy, reference and 1 reward, of 0.5 s: 6 s;
        # 3 epochs of 4 passes of 2 s: 24 s. An evaluation of 50 prompts a GPU: 7 x 3 s, 13 pieces x 4 passes x 0.5 s.
        # It comes every 30 of 60 steps.
        ({}, 10 * 36 + 2 * (21 + 26)),
        ({"eval_strategy": "no"}, 10 * 36),
        ({"reward_adapters": 0}, 10 * 34 + 2 * (21 + 19.5)),
        ({"per_device_eval_batch_size": 64}, 10 * 36 + 2 * (21 + 26)),
        ({"eval_strategy": "no", "probe": "a:b", "probe_steps": 30}, 10 * 36 + 3 * 3 * 3),
    ],
)
def test_hours_of_ppo(more: dict, seconds: float) -> None:
    values = {**HOURLY, "num_mini_batches": 2, "num_ppo_epochs": 3, "total_episodes": 320, "generation_batch_size": 8,
              "response_length": 20, "reward_adapters": 1, "eval_steps": 30, **more}  # fmt: skip
    works = Work(seconds=2), Work(seconds=0.5), Work(seconds=1)
    found = ppo_hours(values, replace(ROWS, mean=80), *works, 2, 100, 0.1)
    assert found * 3600 == pytest.approx(90 + seconds)


def test_hours_of_an_evaluation() -> None:
    """100 dialogues and 2 x 11 probes of 4 facts: 188 replies; 188 + 4 x 30 readings, each twice."""
    values = {"max_dialogues": None, "max_personas": 2, "max_facts": 2, "max_ranked": 30, "batch_size": 16,
              "max_new_tokens": 10, "systems": ["base", "sft"]}  # fmt: skip
    # 6 batches of 1 s and 10 tokens of 0.1 s; 10 batches of 2 s; for each of two systems
    found = evaluation_hours(values, ROWS, Work(seconds=2), 2, 100, 0.1)
    assert found * 3600 == pytest.approx(90 + 2 * (6 * 2 + 10 * 2))


def test_many_small_operations_take_what_starting_them_takes() -> None:
    work = Work(seconds=1e-3, kernels=1000)
    assert pass_seconds(work) == pytest.approx(0.025)
    assert pass_seconds(replace(work, seconds=1.0), 0.5) == 0.5


@pytest.mark.parametrize(("strategy", "episodes"), [("no", 16), ("steps", 50)])
def test_the_largest_rollout_may_be_the_held_out_one(strategy: str, episodes: int) -> None:
    values = {**HOURLY, "num_mini_batches": 2, "eval_strategy": strategy}
    assert plan._largest_rollout(values, ROWS, 2) == episodes


def test_unknown_base_says_how_to_get_its_configuration() -> None:
    text = shown("persona-chat", model_name_or_path="somebody/no-such-model")
    assert "hf download somebody/no-such-model config.json" in " ".join(text.replace("│", " ").split())


def test_rows_come_from_the_data_when_there_are_some(dataset: Path, tiny_llama: Path) -> None:
    values = {"dataset": str(dataset), "model_name_or_path": str(tiny_llama), "max_length": 256,
              "max_train_rows": None, "max_eval_rows": 5}  # fmt: skip
    lengths = plan._lengths("sft", values)
    assert lengths is not None and lengths[0] <= lengths[1] < 256
    rows = plan._rows("sft", values, None, lengths)
    assert (rows.train, rows.heldout) == (24, 5)
    assert rows.mean == lengths[0]


def test_rows_of_a_recipe_before_its_data(tmp_path: Path) -> None:
    values = {"dataset": str(tmp_path), "max_length": 512, "max_train_rows": 3000, "max_eval_rows": None}
    prepare = {
        "source": "synthetic_persona_chat",
        "num_dialogues": 1000,
        "heldout": 0.1,
        "train_pairs": 70,
        "heldout_pairs": 7,
    }
    assert plan._rows("sft", values, prepare, None).train == 3000
    assert plan._rows("sft", values, prepare, None).heldout == 400
    assert plan._rows("dpo", values, prepare, None).train == 70
    assert plan._rows("sft", values, prepare, None).mean == 512  # the longest stands in
