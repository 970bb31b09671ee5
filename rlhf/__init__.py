"""RLHF on TRL for persona-consistent chatbots: SFT, reward model, DPO and PPO that share one persona and one base."""

from importlib import import_module
from typing import Any

# Looked up when first asked for: importing the package must not import torch, nor touch a GPU.
_PUBLIC = {
    "Persona": "rlhf.persona",
    "PPOConfig": "rlhf.ppo_trainer",
    "PPOTrainer": "rlhf.ppo_trainer",
    "run": "rlhf.pipeline",
}
__all__ = ["PPOConfig", "PPOTrainer", "Persona", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
