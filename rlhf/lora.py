"""The one LoRA set-up: target modules by architecture, loading an adapter, switching between adapters."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from rlhf.config import did_you_mean

# All linear layers of a block: attention alone learns style, the MLP is where facts are looked up
# (Biderman et al. 2024, https://arxiv.org/abs/2405.09673, section 5).
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3small"),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


def target_modules(model_type: str) -> list[str]:
    """Names of the layers that get an adapter.

    Raises:
        ValueError: for an architecture that is not in the table.
    """
    if model_type not in TARGET_MODULES:
        raise ValueError(
            f"`lora_target_modules` is not known for the architecture {model_type!r} (known: "
            f"{', '.join(sorted(TARGET_MODULES))}). Name the linear layers of one block, for example "
            "`lora_target_modules: [q_proj, v_proj]`; `print(model)` shows what they are called."
        )
    return list(TARGET_MODULES[model_type])


def lora_config(args: ModelConfig, model: PreTrainedModel, reward: bool = False) -> LoraConfig:
    """The adapter that `args` asks for: `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`, and its variant.

    A reward adapter also trains and saves the score head.

    Raises:
        ValueError: if a name in `lora_target_modules` is that of no linear layer of the model.
    """
    targets = args.lora_target_modules or target_modules(model.config.model_type)
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # TRL makes a list of one name a string, which PEFT takes for a pattern of the whole path
    if isinstance(targets, list):
        _check_targets(targets, model)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if reward else TaskType.CAUSAL_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        modules_to_save=["score"] if reward else None,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D stores the weight transposed
    )


def _check_targets(targets: list[str], model: PreTrainedModel) -> None:
    """PEFT itself leaves out a name that fits no layer, as long as another one does."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if target != "all-linear" and not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(
                f"`lora_target_modules`: {target!r} is no linear layer of this model, which has {', '.join(known)}"
                f"{did_you_mean(target, known)}"
            )


def with_adapter(
    model: PreTrainedModel | PeftModel, folder: str | Path, name: str, trainable: bool = False
) -> PeftModel:
    """Load the adapter in `folder` under `name`, and check that every weight found its place.

    PEFT itself only returns the keys that did not fit, which is how a score head gets lost
    (https://github.com/huggingface/peft/issues/577).

    Raises:
        FileNotFoundError: if there is no adapter in `folder`.
        ValueError: if weights are missing, or have no place in the model.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"There is no adapter in {folder} (no adapter_config.json).")
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    misfit = f"The adapter in {folder} does not fit the base model: "
    remedy = "It was trained on another base, or its score head was lost or has no module here."
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)
    except (KeyError, RuntimeError) as error:  # a missing head; weights of another size
        raise ValueError(f"{misfit}missing or of another size: {error}. {remedy}") from error
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        raise ValueError(f"{misfit}missing {missing[:3]}, without a place {result.unexpected_keys[:3]}. {remedy}")
    set_trainable(model, name if trainable else None)
    return model


def set_trainable(model: PeftModel, name: str | None) -> None:
    """Make the weights of the adapter `name`, and nothing else, require gradients."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(name is not None and f".{name}." in key)


@contextlib.contextmanager
def use_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Run with the adapter `name` (None: the bare base), then restore the active adapter and every `requires_grad`.

    The only code that switches adapters: PEFT's own switches leave other parameters trainable than they found
    (https://github.com/huggingface/peft/issues/3447).
    """
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    active = model.active_adapter
    bare = next(module for module in model.modules() if isinstance(module, BaseTunerLayer)).disable_adapters
    try:
        if name is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()  # off, where this stands inside a `use_adapter(model, None)`
            model.set_adapter(name)
        yield
    finally:
        model.set_adapter(active)
        if bare:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(before[key])


def checkpoint_activations(model: PeftModel, every_n_layers: int = 1, offload: bool = False, **kwargs: Any) -> None:
    """Turn gradient checkpointing on, so that activations are computed again under the adapter of their forward pass.

    PyTorch's own recomputation runs under whichever adapter is active in the backward pass: with two adapters in one
    graph its gradients are wrong, and nothing says so.

    Args:
        model: A PeftModel.
        every_n_layers: As transformers has it.
        offload: Likewise.
        kwargs: For `torch.utils.checkpoint.checkpoint`; `use_reentrant` is always False.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), _under(model, model.active_adapter)

    kwargs |= {"use_reentrant": False, "context_fn": contexts}
    model.get_base_model().activation_checkpointing_enable(
        activation_checkpointing_kwargs=kwargs, every_n_layers=every_n_layers, offload=offload
    )


@contextlib.contextmanager
def _under(model: PeftModel, name: str) -> Iterator[None]:
    with contextlib.nullcontext() if model.active_adapter == name else use_adapter(model, name):
        yield


def role_hash(model: PeftModel, name: str) -> str:
    """SHA-256 of the weights of the adapter `name` as they are in memory, the score head that it brings included."""
    digest = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        if f".{name}." in key:
            digest.update(key.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_hash(folder: str | Path) -> str:
    """SHA-256 of an adapter's weights file, by which a run names its parents.

    Raises:
        FileNotFoundError: if there is no adapter in `folder`.
    """
    return hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()


def trainable_parameters(model: torch.nn.Module) -> int:
    """Number of parameters that require gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter "default" to `folder`, without the other roles that share its base."""
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
