"""Adapters: where they sit, what they train, what loading refuses, and that switching leaves no trace."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Qwen2Config,
)
from trl import ModelConfig

from rlhf.lora import (
    adapter_hash,
    lora_config,
    save_adapter,
    set_trainable,
    target_modules,
    trainable_parameters,
    use_adapter,
    with_adapter,
)
from rlhf.model import add_score_head
from rlhf.rewards import reward_scores

RANK = 4
ARGS = ModelConfig(lora_r=RANK, lora_alpha=8)
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[1, 5, 9, 20, 7], [3, 3, 8, 30, 2]])

# in + out of the seven, four or six linear layers of a block of width 32, by hand
ARCHITECTURES = {
    # q, o: 32 + 32; k, v: 32 + 16 (two of four heads); gate, up: 32 + 64; down: 64 + 32
    "llama": (LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2), 64 + 48 + 48 + 64 + 96 + 96 + 96),
    "qwen2": (Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2), 64 + 48 + 48 + 64 + 96 + 96 + 96),
    # attention's 32 + 96 and 32 + 32; the MLP's 32 + 128 and 128 + 32
    "gpt2": (GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4), 128 + 64 + 160 + 160),
    "opt": (OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32), 4 * 64 + 2 * 96),
    "gpt_neox": (GPTNeoXConfig(**SMALL, intermediate_size=64), 128 + 64 + 2 * 96),
}


def build(architecture="llama", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture][0])


def randomise(model, name):
    """Adapters begin at zero: without this every one of them would compute the same."""
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            torch.nn.init.normal_(parameter.data, std=0.3)


@pytest.fixture
def sft_folder(tmp_path):
    """An adapter of the small Llama, saved."""
    model = get_peft_model(build(), lora_config(ARGS, build()))
    torch.manual_seed(1)
    randomise(model, "default")
    save_adapter(model, tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def reward_folder(tmp_path):
    """A reward adapter with its head, of the same Llama as a sequence classifier, and its scores of IDS."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.model.load_state_dict(build().model.state_dict())
    model.config.pad_token_id = 0
    model = get_peft_model(model, lora_config(ARGS, model, reward=True)).eval()
    torch.manual_seed(2)
    randomise(model, "default")
    save_adapter(model, tmp_path / "reward")
    with torch.no_grad():
        return tmp_path / "reward", model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.squeeze(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_of_a_block_gets_an_adapter(architecture):
    base = build(architecture)
    model = get_peft_model(base, lora_config(ARGS, base))
    assert trainable_parameters(model) == 2 * RANK * ARCHITECTURES[architecture][1]
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_A." in key or ".lora_B." in key for key in trained)
    assert not any("lm_head" in key or "embed" in key for key in trained)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_that_the_recipe_says_reaches_the_adapter(architecture):
    base, layer = build(architecture), target_modules(architecture)[0]
    config = lora_config(ModelConfig(lora_r=3, lora_alpha=5, lora_dropout=0.25, lora_target_modules=[layer]), base)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 5, 0.25, {layer})
    assert not (config.use_rslora or config.use_dora)
    assert config.fan_in_fan_out == (architecture == "gpt2")
    assert config.task_type == "CAUSAL_LM" and config.modules_to_save is None
    reward = lora_config(ModelConfig(), base, reward=True)
    assert reward.task_type == "SEQ_CLS" and reward.modules_to_save == ["score"]


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(["q_proj"], 1), ("q_proj", 1), (["q_proj", "v_proj"], 2), ("all-linear", 7), (r".*\.(q_proj|o_proj|v_proj)", 3)],
)
def test_targets_may_be_one_name_several_all_or_a_pattern(targets, layers):
    base = build()
    model = get_peft_model(base, lora_config(ModelConfig(lora_target_modules=targets), base))
    assert sum(".lora_A." in key for key, _ in model.named_parameters()) == 2 * layers


@pytest.mark.parametrize("targets", [["nosuch"], "nosuch", ["q_proj", "nosuch"], ["model"]])
def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are(targets):
    with pytest.raises(
        ValueError, match="`lora_target_modules`: '(nosuch|model)' is no linear .* has down_proj, .*v_proj"
    ):
        lora_config(ModelConfig(lora_target_modules=targets), build())
    with pytest.raises(ValueError, match="did you mean `q_proj`"):
        lora_config(ModelConfig(lora_target_modules=["q_prj", "v_proj"]), build())


def test_the_rank_stabilised_scale_is_by_the_root_of_the_rank():
    base = build()
    model = get_peft_model(base, lora_config(ModelConfig(lora_r=RANK, lora_alpha=8, use_rslora=True), base))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": 4.0}  # 8 / sqrt(4), where LoRA's is 8 / 4 (https://arxiv.org/abs/2312.03732)


def test_a_dora_adapter_comes_back_as_it_was_saved(tmp_path):
    base = build()
    model = get_peft_model(base, lora_config(ModelConfig(lora_r=RANK, lora_alpha=8, use_dora=True), base)).eval()
    randomise(model, "default")
    assert any("magnitude" in key for key, parameter in model.named_parameters() if parameter.requires_grad)
    save_adapter(model, tmp_path / "dora")
    again = with_adapter(build(), tmp_path / "dora", "default", trainable=True).eval()
    with torch.no_grad():
        assert_close(again(IDS).logits, model(IDS).logits)
    assert trainable_parameters(again) == trainable_parameters(model)


def test_an_unknown_architecture_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"`lora_target_modules`.*'mamba'.*known: .*llama.*print\(model\)"):
        target_modules("mamba")


def test_an_adapter_comes_back_as_it_was_saved(sft_folder):
    model = with_adapter(build(), sft_folder, "default", trainable=True)
    saved = load_file(sft_folder / "adapter_model.safetensors")
    loaded = {key.replace(".default", ""): value for key, value in model.state_dict().items() if ".default." in key}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    assert trainable_parameters(model) == 2 * RANK * ARCHITECTURES["llama"][1]
    assert trainable_parameters(with_adapter(build(), sft_folder, "default")) == 0


def test_saving_leaves_the_other_roles_out(sft_folder, tmp_path):
    model = with_adapter(build(), sft_folder, "default", trainable=True)
    model = with_adapter(model, sft_folder, "reference")
    save_adapter(model, tmp_path / "again")
    assert not (tmp_path / "again" / "reference").exists()
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
        == load_file(sft_folder / "adapter_model.safetensors").keys()
    )
    assert adapter_hash(tmp_path / "again") == adapter_hash(sft_folder)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**{**SMALL, "num_hidden_layers": 3}, intermediate_size=64, num_key_value_heads=2),
        LlamaConfig(**{**SMALL, "num_hidden_layers": 1}, intermediate_size=64, num_key_value_heads=2),
        LlamaConfig(**{**SMALL, "hidden_size": 16}, intermediate_size=64, num_key_value_heads=2),
    ],
    ids=["deeper", "shallower", "narrower"],
)
@pytest.mark.parametrize("second", [False, True])
def test_an_adapter_of_another_base_is_refused(sft_folder, tmp_path, config, second):
    base = LlamaForCausalLM(config)
    if second:
        base = get_peft_model(base, lora_config(ARGS, base))
    with pytest.raises(ValueError, match="does not fit the base model"):
        with_adapter(base, sft_folder, "other")


def test_an_adapter_of_another_architecture_is_refused(sft_folder):
    with pytest.raises(ValueError, match="not found in the base model"):
        with_adapter(build("gpt2"), sft_folder, "default")


def test_a_reward_adapter_without_a_place_for_its_head_is_refused(reward_folder):
    with pytest.raises(ValueError, match="does not fit the base model"):
        with_adapter(build(), reward_folder[0], "reward")


def test_a_reward_adapter_that_lost_its_head_is_refused(reward_folder):
    weights = load_file(reward_folder[0] / "adapter_model.safetensors")
    assert [key for key in weights if "score" in key]
    save_file(
        {key: value for key, value in weights.items() if "score" not in key},
        reward_folder[0] / "adapter_model.safetensors",
    )
    base = build()
    add_score_head(base)
    with pytest.raises(ValueError, match="missing .*score"):
        with_adapter(base, reward_folder[0], "reward")


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        with_adapter(build(), tmp_path, "default")
    with pytest.raises(FileNotFoundError):
        adapter_hash(tmp_path)


@pytest.mark.parametrize("alone", [True, False])
def test_a_reward_adapter_scores_on_the_policy_s_base_as_where_it_was_trained(sft_folder, reward_folder, alone):
    folder, expected = reward_folder
    base = build()
    add_score_head(base)
    if alone:
        model = with_adapter(base, folder, "reward")
    else:  # as PPO has it: beside the policy
        model = with_adapter(with_adapter(base, sft_folder, "default", trainable=True), folder, "reward")
    ones = torch.ones_like(IDS)
    model.eval()  # without dropout, as the scores were made
    with torch.no_grad(), use_adapter(model, "reward"):
        scores = reward_scores(model.get_base_model(), IDS, ones, ones.cumsum(1) - 1)
    assert_close(scores, expected, rtol=0, atol=1e-6)
    assert expected.abs().min() > 1e-3


# --- switching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_roles(sft_folder, reward_folder) -> PeftModel:
    base = build()
    add_score_head(base)
    model = with_adapter(base, sft_folder, "default", trainable=True)
    model = with_adapter(model, sft_folder, "reference")
    model = with_adapter(model, reward_folder[0], "reward")
    torch.manual_seed(3)
    randomise(model, "reference")
    set_trainable(model, "default")
    return model.eval()


def grads(model):
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_set_trainable_trains_one_adapter_alone(three_roles):
    for name in ("default", "reference", None):
        set_trainable(three_roles, name)
        assert {key for key, on in grads(three_roles).items() if on} == {
            key for key in grads(three_roles) if name and f".{name}." in key
        }


@pytest.mark.parametrize("name", ["reference", "reward", "default", None])
@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize(
    "trained", ["default", None]
)  # with None PEFT's own switch back would make "default" trainable
def test_switching_restores_everything(three_roles, name, failing, trained):
    set_trainable(three_roles, trained)
    before, policy = grads(three_roles), logits(three_roles)
    assert any(before.values()) == (trained is not None)
    try:
        with use_adapter(three_roles, name):
            inside = logits(three_roles)
            if failing:
                raise RuntimeError("out of memory")
    except RuntimeError as error:
        assert failing and str(error) == "out of memory"
    assert three_roles.active_adapter == "default"
    assert grads(three_roles) == before
    assert torch.equal(logits(three_roles), policy)
    assert torch.equal(inside, policy) == (name == "default")


def test_the_bare_base_is_the_base(three_roles):
    with use_adapter(three_roles, None):
        assert_close(logits(three_roles), logits(build().eval()), rtol=0, atol=0)


@pytest.mark.parametrize("outer", ["reference", None])
@pytest.mark.parametrize("inner", ["reference", "reward", None])
def test_switches_nest(three_roles, outer, inner):
    alone = {}
    for name in (outer, inner):
        with use_adapter(three_roles, name):
            alone[name] = logits(three_roles)
    before, policy = grads(three_roles), logits(three_roles)
    with use_adapter(three_roles, outer):
        with use_adapter(three_roles, inner):
            assert torch.equal(logits(three_roles), alone[inner])
        assert torch.equal(logits(three_roles), alone[outer])
    assert torch.equal(logits(three_roles), policy) and grads(three_roles) == before


def test_an_unknown_adapter_is_refused_and_nothing_changes(three_roles):
    before = grads(three_roles)
    with pytest.raises(ValueError, match="no_such"), use_adapter(three_roles, "no_such"):
        pass
    assert three_roles.active_adapter == "default" and grads(three_roles) == before


def test_gradients_reach_the_active_adapter_alone(three_roles):
    with use_adapter(three_roles, "reference"):
        pass
    three_roles(input_ids=IDS).logits.sum().backward()
    touched = {key for key, parameter in three_roles.named_parameters() if parameter.grad is not None}
    assert touched == {key for key in grads(three_roles) if ".lora_" in key and ".default." in key}
