"""Training of a reward adapter with a score head on preference pairs, with TRL's RewardTrainer.

accelerate launch --config_file accelerate_configs/two_t4.yaml rlhf/reward.py --config recipes/persona-chat/reward.yaml
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch.utils.data import SequentialSampler
from trl import ModelConfig, RewardConfig, RewardTrainer

from rlhf.callbacks import watch
from rlhf.check import preflight
from rlhf.checkpoints import train
from rlhf.config import DataConfig, PairConfig
from rlhf.data.columns import load_rows, reward_columns, swap_labels
from rlhf.files import folder_hash, write_json
from rlhf.generate import inference
from rlhf.lora import lora_config, save_adapter, trainable_parameters, with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer, trainable_to_fp32
from rlhf.nonfinite import NonFiniteGuard
from rlhf.persona import as_messages, persona_and_dialogue
from rlhf.record import check_world_size, launch, stage
from rlhf.rewards import check_reward_card, pool_by_mask, score_ids

CARD_ROWS = 8


class PersonaRewardTrainer(RewardTrainer):
    """RewardTrainer that says on held-out pairs how often the chosen reply wins: in all, by kind, and by length alone."""

    _signature_columns: list[str] | None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_margins: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        margins = torch.cat(self._eval_margins).tolist()
        output.metrics.update({f"{prefix}_{k}": v for k, v in rank_accuracy(margins, self.eval_dataset).items()})
        return output

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*known, "length"]))  # for group_by_length

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # grouped by length, the margins would not stand beside their pairs

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not self.model.training:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            self._eval_margins.append(self.accelerator.gather_for_metrics(chosen - rejected).cpu())
        return (loss, outputs) if return_outputs else loss


def rank_accuracy(margins: list[float], pairs: Any) -> dict[str, float]:
    """Share of pairs in which the chosen reply scores higher, a tie counting as lost.

    Args:
        margins: Score of the chosen less that of the rejected reply, in the order of `pairs`.
        pairs: Columns `chosen_ids`, `rejected_ids`, `kind`.

    Returns:
        `rank_accuracy` with its Wilson interval (95 %), the same for each kind as `rank_accuracy/<kind>`, and
        `longer_wins_accuracy`, what a judge would reach who only prefers the longer reply (half a point for equal
        lengths).
    """
    won = [margin > 0 for margin in margins]
    by_kind = defaultdict(list)
    for kind, correct in zip(pairs["kind"], won, strict=True):
        by_kind[kind].append(correct)
    metrics = {}
    for name, results in {"": won, **{f"/{kind}": by_kind[kind] for kind in sorted(by_kind)}}.items():
        interval = binomtest(sum(results), len(results)).proportion_ci(method="wilson")
        metrics[f"rank_accuracy{name}"] = sum(results) / len(results)
        metrics[f"rank_accuracy{name}_low"] = float(interval.low)
        metrics[f"rank_accuracy{name}_high"] = float(interval.high)
    longer = [len(pair["chosen_ids"]) - len(pair["rejected_ids"]) for pair in pairs]
    metrics["longer_wins_accuracy"] = sum((d > 0) + 0.5 * (d == 0) for d in longer) / len(longer)
    return metrics


def main(data_args: DataConfig, pair_args: PairConfig, training_args: RewardConfig, model_args: ModelConfig) -> None:
    """Train one adapter; everything it makes lies in `output_dir`."""
    check_world_size(training_args)
    with stage(
        "reward",
        training_args.output_dir,
        (data_args, pair_args, training_args, model_args),
        seed=training_args.seed,
        log_level=training_args.log_level,
        parents={"prepare": data_args.dataset},
        preflight=lambda: preflight("reward", (data_args, pair_args, training_args, model_args)),
    ) as record:
        # Tokenizer and base
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        model = load_base(model_args, tokenizer, reward=True)
        pool_by_mask(model)

        # Data
        dataset, share = Path(data_args.dataset), data_args.max_truncated_share
        train_rows = load_rows(dataset / "preferences_train.jsonl", data_args.max_train_rows)
        train_rows = swap_labels(train_rows, pair_args.swapped_share, training_args.seed)
        eval_rows = load_rows(dataset / "preferences_heldout.jsonl", data_args.max_eval_rows)
        eval_pairs = reward_columns(eval_rows, tokenizer, training_args.max_length, share)

        # Trainer
        trainer = PersonaRewardTrainer(
            model=model,
            args=training_args,
            train_dataset=reward_columns(train_rows, tokenizer, training_args.max_length, share),
            eval_dataset=eval_pairs,
            processing_class=tokenizer,
            peft_config=lora_config(model_args, model, reward=True),
        )
        trainable_to_fp32(trainer.model)

        def samples() -> list[dict[str, Any]]:
            base = trainer.model.get_base_model()
            with inference(trainer.model):
                scores = [score_ids(base, eval_pairs[key][: data_args.num_samples]) for key in _COLUMNS]
            told = list(map(persona_and_dialogue, eval_rows))
            return [
                {"persona": persona, "messages": messages, "response": as_messages(row[key])[0]["content"],
                 "reference": as_messages(row["chosen"])[0]["content"], "score": score}
                for key, column in zip(("chosen", "rejected"), scores, strict=True)
                for (persona, messages), row, score in zip(told, eval_rows, column, strict=False)
            ]  # fmt: skip

        NonFiniteGuard(trainer, data_args.max_skipped_steps)
        watch(trainer, samples, data_args.sample_steps)

        # Train
        train(trainer, record, data_args.save_minutes)
        metrics = trainer.evaluate()

        # Save
        if trainer.is_world_process_zero():
            save_adapter(trainer.model, training_args.output_dir)
            tokenizer.save_pretrained(training_args.output_dir)
            with inference(trainer.model):
                rows = eval_pairs["chosen_ids"][: CARD_ROWS // 2] + eval_pairs["rejected_ids"][: CARD_ROWS // 2]
                scores = score_ids(trainer.model.get_base_model(), rows)
            card = {
                "rows": [{"ids": ids, "reward": score} for ids, score in zip(rows, scores, strict=True)],
                **{key: value for key, value in metrics.items() if "accuracy" in key},
            }
            write_json(Path(training_args.output_dir) / "reward_card.json", card)
            fresh = load_base(model_args, tokenizer)
            add_score_head(fresh)
            fresh = with_adapter(fresh, training_args.output_dir, "reward")
            with inference(fresh):
                record["reload_difference"] = check_reward_card(fresh.get_base_model(), training_args.output_dir)
            record["result_hash"] = folder_hash(Path(training_args.output_dir))
        record["num_examples"] = len(train_rows)
        record["tokens"] = int(trainer._total_train_tokens)
        record["trainable_parameters"] = trainable_parameters(trainer.model)


_COLUMNS = ("chosen_ids", "rejected_ids")


if __name__ == "__main__":
    launch(main, (DataConfig, PairConfig, RewardConfig, ModelConfig), "reward")
