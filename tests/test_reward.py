"""The reward script: what moves, the head that is saved and found again, and the measures on held-out pairs."""

import json
import math
import shutil

import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from rlhf.data.columns import load_rows, reward_columns
from rlhf.files import folder_hash, write_json
from rlhf.generate import inference
from rlhf.lora import with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.record import RunError
from rlhf.reward import rank_accuracy
from rlhf.rewards import score_ids


def test_lora_and_score_head_move_and_the_base_does_not(reward_run):
    trainable = {name for name, p in reward_run.trainer.model.named_parameters() if p.requires_grad}
    assert reward_run.moved() == trainable
    heads = {name for name in trainable if "lora_" not in name}
    assert {name.split("model.")[-1] for name in heads} == {"score.modules_to_save.default.weight"}


def wilson(won: int, n: int) -> tuple[float, float]:
    """Wilson 1927, with the 0.975 quantile of the normal distribution."""
    z, p = 1.959963984540054, won / n
    centre, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)


def test_rank_accuracy_by_hand():
    pairs = Dataset.from_dict({
        "chosen_ids": [[1, 2], [1, 2, 3], [1], [1, 2]],
        "rejected_ids": [[1], [1, 2], [1, 2], [1, 2]],  # longer, longer, shorter, equal
        "kind": ["a", "a", "b", "b"],
    })  # fmt: skip
    metrics = rank_accuracy([0.5, -0.1, 0.0, 2.0], pairs)  # won, lost, a tie, won
    for name, won, n in (("", 2, 4), ("/a", 1, 2), ("/b", 1, 2)):
        low, high = metrics.pop(f"rank_accuracy{name}_low"), metrics.pop(f"rank_accuracy{name}_high")
        assert (low, high) == pytest.approx(wilson(won, n))
    assert metrics == {
        "rank_accuracy": 0.5, "rank_accuracy/a": 0.5, "rank_accuracy/b": 0.5, "longer_wins_accuracy": 2.5 / 4,
    }  # fmt: skip


def test_metrics_are_those_of_the_saved_adapter(reward_run, tiny_llama, dataset):
    """Scored again on a causal base, one row at a time: another model class, no padding, another order."""
    tokenizer = load_tokenizer(str(tiny_llama))
    pairs = reward_columns(load_rows(dataset / "preferences_heldout.jsonl"), tokenizer, 256)
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama)), tokenizer)
    add_score_head(base)
    model = with_adapter(base, reward_run.folder, "reward")
    with inference(model):
        chosen, rejected = (score_ids(model.get_base_model(), pairs[key]) for key in ("chosen_ids", "rejected_ids"))
    won = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    card = json.loads((reward_run.folder / "reward_card.json").read_text())
    assert card["eval_rank_accuracy"] == won / len(pairs) and 0 < won <= len(pairs)
    low, high = wilson(won, len(pairs))
    assert (card["eval_rank_accuracy_low"], card["eval_rank_accuracy_high"]) == pytest.approx((low, high))
    longer = [len(c) - len(r) for c, r in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)]
    points = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in longer)
    assert card["eval_longer_wins_accuracy"] == points / len(pairs) and 0 < points < len(pairs)
    kinds = {
        key.split("/")[1]
        for key in card
        if key.startswith("eval_rank_accuracy/") and not key.endswith(("_low", "_high"))
    }
    assert kinds == {"direct", "false_suggestion", "true_suggestion"}
    for row, score in zip(card["rows"][:4], chosen, strict=False):
        assert row["reward"] == pytest.approx(score, abs=1e-5)  # float32, padded against alone
    assert reward_run.metadata()["reload_difference"] < 1e-5


def lose(weights):
    return {name: tensor for name, tensor in weights.items() if "score" not in name}


def remake(weights):
    return {name: tensor + 0.1 if "score" in name else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("recorded", [False, True], ids=["not recorded", "recorded"])
@pytest.mark.parametrize(("change", "error"), [(lose, "missing.*score"), (remake, "score head was lost")])
def test_ppo_refuses_another_head(change, error, recorded, reward_run, sft_run, train, tiny_llama, dataset, tmp_path):
    """By the recorded hash; and where the record was written anew, by the missing weight or by the scores."""
    folder = tmp_path / "reward"
    shutil.copytree(reward_run.folder, folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    assert any("score" in name for name in weights)
    save_file(change(weights), file, metadata={"format": "pt"})
    record = reward_run.metadata()
    record["parents"] = {}
    write_json(folder / "metadata.json", record | ({"result_hash": folder_hash(folder)} if recorded else {}))
    shared = {"model_name_or_path": tiny_llama, "dataset": dataset, "sft_adapter": sft_run.folder}
    with pytest.raises(ValueError if recorded else RunError, match=error if recorded else "not those that its record"):
        train("ppo", tmp_path / "ppo", reward_adapter=folder, **shared)
