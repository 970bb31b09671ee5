"""Direct preference optimisation of the SFT adapter, with TRL's DPOTrainer.

accelerate launch --config_file accelerate_configs/two_t4.yaml rlhf/dpo.py --config recipes/persona-chat/dpo.yaml
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, ModelConfig

from rlhf.callbacks import watch
from rlhf.check import preflight
from rlhf.checkpoints import train
from rlhf.config import DataConfig, PairConfig
from rlhf.data.columns import load_rows, preference_columns, swap_labels
from rlhf.files import folder_hash
from rlhf.generate import generate
from rlhf.lora import save_adapter, trainable_parameters, with_adapter
from rlhf.model import load_base, load_tokenizer, trainable_to_fp32
from rlhf.nonfinite import NonFiniteGuard
from rlhf.persona import as_messages, persona_and_dialogue, with_persona
from rlhf.record import check_world_size, launch, stage


@dataclass
class ParentConfig:
    """The adapter that training starts from."""

    sft_adapter: str = field(metadata={"help": "Folder of the SFT stage: start and frozen reference.", "path": True})


class PersonaDPOTrainer(DPOTrainer):
    """DPOTrainer on ids that are already rendered, with the held-out perplexity of the chosen replies."""

    _signature_columns: list[str] | None

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # TRL's own would render the text again, by other rules

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        nll, tokens = self._eval_sums.tolist()
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_perplexity"] = math.exp(nll / tokens)
        return output

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*known, "length"]))  # for group_by_length

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            rows = len(inputs["input_ids"]) // 2  # the chosen replies stand before the rejected ones
            nll = -self._metrics["eval"]["logps/chosen"][-1] * rows * self.accelerator.num_processes
            tokens = self.accelerator.reduce(inputs["completion_mask"][:rows].sum()).item()
            self._eval_sums += torch.tensor([nll, tokens], dtype=torch.float64)
        if self.state.global_step == 0 and self.model.training:
            margin = self._metrics["train"]["rewards/margins"][-1]
            if abs(margin) >= 1e-2:  # a NaN is the guard's matter
                raise RuntimeError(
                    f"Before the first step policy and reference are the same adapter, so the margin must be 0, but "
                    f"it is {margin:.3g}. Probable causes: dropout is on, or the reference is not the SFT adapter."
                )
        return result


def main(
    data_args: DataConfig,
    pair_args: PairConfig,
    parents: ParentConfig,
    training_args: DPOConfig,
    model_args: ModelConfig,
) -> None:
    """Train one adapter; everything it makes lies in `output_dir`."""
    check_world_size(training_args)
    with stage(
        "dpo",
        training_args.output_dir,
        (data_args, pair_args, parents, training_args, model_args),
        seed=training_args.seed,
        log_level=training_args.log_level,
        parents={"prepare": data_args.dataset, "sft": parents.sft_adapter},
        preflight=lambda: preflight("dpo", (data_args, pair_args, parents, training_args, model_args)),
    ) as record:
        # Tokenizer and base
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        model = load_base(model_args, tokenizer)

        # Data
        dataset, share = Path(data_args.dataset), data_args.max_truncated_share
        train_rows = load_rows(dataset / "preferences_train.jsonl", data_args.max_train_rows)
        train_rows = swap_labels(train_rows, pair_args.swapped_share, training_args.seed)
        eval_rows = load_rows(dataset / "preferences_heldout.jsonl", data_args.max_eval_rows)

        # Trainer
        trainer = PersonaDPOTrainer(
            model=with_adapter(model, parents.sft_adapter, "default", trainable=True),
            args=training_args,
            train_dataset=preference_columns(train_rows, tokenizer, training_args.max_length, share),
            eval_dataset=preference_columns(eval_rows, tokenizer, training_args.max_length, share),
            processing_class=tokenizer,
        )
        trainable_to_fp32(trainer.model)

        def samples() -> list[dict[str, Any]]:
            conversations = [with_persona(row) for row in eval_rows[: data_args.num_samples]]
            replies = generate(trainer.model, tokenizer, conversations, max_new_tokens=40)
            told = map(persona_and_dialogue, eval_rows)
            return [
                {"persona": persona, "messages": messages, "response": reply,
                 "reference": as_messages(row["chosen"])[0]["content"]}
                for (persona, messages), row, reply in zip(told, eval_rows, replies, strict=False)
            ]  # fmt: skip

        NonFiniteGuard(trainer, data_args.max_skipped_steps, zero_is_healthy=True)
        watch(trainer, samples, data_args.sample_steps)

        # Train
        train(trainer, record, data_args.save_minutes)

        # Save
        if trainer.is_world_process_zero():
            save_adapter(trainer.model, training_args.output_dir)
            tokenizer.save_pretrained(training_args.output_dir)
            record["result_hash"] = folder_hash(Path(training_args.output_dir))
        record["num_examples"] = len(train_rows)
        record["tokens"] = int(trainer._total_train_tokens)
        record["trainable_parameters"] = trainable_parameters(trainer.model)


if __name__ == "__main__":
    launch(main, (DataConfig, PairConfig, ParentConfig, DPOConfig, ModelConfig), "dpo")
