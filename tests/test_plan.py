"""The plan by data size, against the table of its bands written out by hand. How a stage gets it: test_config.py."""

import pytest

from rlhf.plan import KEYS, plan_by_size

# num_examples: rank, alpha, epochs, batch and accumulation on one GPU, the same on two, length, warm-up
BANDS = {
    1: (8, 16, 10, (2, 4), (2, 2), 512, 0),
    9: (8, 16, 10, (2, 4), (2, 2), 512, 0),
    10: (8, 16, 10, (2, 4), (2, 2), 512, 1),
    99: (8, 16, 10, (2, 4), (2, 2), 512, 9),
    100: (16, 32, 5, (2, 4), (2, 2), 640, 10),
    106: (16, 32, 5, (2, 4), (2, 2), 640, 10),
    499: (16, 32, 5, (2, 4), (2, 2), 640, 49),
    500: (32, 64, 3, (4, 2), (4, 1), 768, 50),
    501: (32, 64, 3, (4, 2), (4, 1), 768, 50),
    100_000: (32, 64, 3, (4, 2), (4, 1), 768, 50),
}


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.parametrize("num_examples", BANDS)
def test_bands(num_examples, num_gpus):
    rank, alpha, epochs, one, two, length, warmup = BANDS[num_examples]
    batch, accumulation = one if num_gpus == 1 else two
    plan = plan_by_size(num_examples, num_gpus)
    assert plan.settings() == {
        "lora_r": rank, "lora_alpha": alpha, "num_train_epochs": epochs, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation, "max_length": length, "warmup_steps": warmup,
    }  # fmt: skip
    assert plan.effective_batch_size == 8


@pytest.mark.parametrize(
    ("num_examples", "num_gpus", "batch", "accumulation"),
    [(106, 4, 2, 1), (106, 8, 1, 1), (500, 4, 2, 1), (500, 8, 1, 1)],
)
def test_more_gpus_share_the_same_step(num_examples, num_gpus, batch, accumulation):
    plan = plan_by_size(num_examples, num_gpus)
    assert (plan.per_device_train_batch_size, plan.gradient_accumulation_steps) == (batch, accumulation)
    assert plan.effective_batch_size == 8


@pytest.mark.parametrize("num_gpus", [3, 5, 6, 7, 9, 16])
def test_gpus_that_do_not_divide_the_batch_are_refused_unless_set_by_hand(num_gpus):
    with pytest.raises(ValueError, match=f"`num_gpus` {num_gpus} does not divide the effective batch of 8"):
        plan_by_size(106, num_gpus)
    with pytest.raises(ValueError, match="does not divide"):
        plan_by_size(106, num_gpus, {"per_device_train_batch_size": 1})
    plan = plan_by_size(106, num_gpus, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    assert plan.effective_batch_size == 2 * num_gpus
    assert f"on {num_gpus} GPUs, not the planned 8" in plan.table()


def test_an_override_changes_what_it_names_and_says_so():
    overrides = {"lora_r": 64, "warmup_steps": 0.03}
    plan, changed = plan_by_size(106), plan_by_size(106, overrides=overrides)
    assert changed.settings() == {**plan.settings(), **overrides}
    assert changed.reasons["lora_r"] == "overridden; the plan says 16"
    # alpha stays 32, and 32 / 64 is half
    assert "with `lora_r` 64 the update's scale is 0.5, not 2: override it with 128" in changed.reasons["lora_alpha"]
    both = plan_by_size(106, overrides={"lora_r": 64, "lora_alpha": 128})
    assert both.reasons["lora_alpha"] == "overridden; the plan says 32"
    assert {key for key in KEYS if "overridden;" in changed.reasons[key]} == set(overrides)
    assert {key: changed.reasons[key] for key in KEYS if key not in {*overrides, "lora_alpha"}} == {
        key: plan.reasons[key] for key in KEYS if key not in {*overrides, "lora_alpha"}
    }
    assert plan_by_size(106, overrides={"num_train_epochs": 5.0}).reasons == plan.reasons  # it says the same


def test_table_has_a_line_for_each_key_with_value_and_reason():
    lines = plan_by_size(106).table().splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["lora_r", "16"], ["lora_alpha", "32"], ["num_train_epochs", "5"], ["per_device_train_batch_size", "2"],
        ["gradient_accumulation_steps", "4"], ["max_length", "640"], ["warmup_steps", "10"],
    ]  # fmt: skip
    assert all(len(line.split()) > 4 for line in lines[:-1])  # a reason has words
    assert "106 examples: 100 to 499" in lines[0] and "0.1 x 106 rounded down, at most 50" in lines[6]
    assert lines[-1].split() == ["effective", "batch", "8", "on", "1", "GPU"]
    overridden = plan_by_size(106, overrides={"num_train_epochs": 2.0, "warmup_steps": 0.03}).table()
    assert "num_train_epochs                 2  overridden; the plan says 5\n" in overridden
    assert "warmup_steps                  0.03  overridden; the plan says 10\n" in overridden


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`num_examples` must be at least 1, got 0"),
        ((-3,), "`num_examples` must be at least 1, got -3"),
        ((106, 0), "`num_gpus` must be at least 1, got 0"),
        ((106, 1, {"learning_rate": 1e-4}), "`learning_rate` is no key of the plan; it has lora_r, lora_alpha"),
    ],
)
def test_errors_name_field_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_by_size(*arguments)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match="`num_examples`.*`num_gpus` 3.*`zzz`"):
        plan_by_size(0, 3, {"zzz": 1})


def test_the_plan_fits_the_trainer_that_reads_it(tmp_path):
    from trl import ModelConfig, SFTConfig

    settings = plan_by_size(106).settings()
    model = {key: settings.pop(key) for key in ("lora_r", "lora_alpha")}
    assert ModelConfig(**model).lora_r == 16
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **settings)
    assert args.get_warmup_steps(66) == 10 and args.max_length == 640
