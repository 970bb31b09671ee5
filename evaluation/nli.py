"""C-score by a model of natural language inference, which is optional and of the user's choice.

A generic model tends to take unrelated sentences in the first person ("i have a dog", "i have a cat") for
contradictions; one trained on dialogue NLI does so less. Copying a persona sentence is entailed by any of them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LABELS = ("contradiction", "neutral", "entailment")  # worth -1, 0 and 1


class NLI(NamedTuple):
    """A classifier of sentence pairs, and where its outputs hold the classes in the order of `LABELS`."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    columns: list[int]
    name: str
    """Path or name, and the revision where there is one: what `run.nli_model` says."""


def label_columns(id2label: Mapping[int, str]) -> list[int]:
    """The output index of contradiction, neutral and entailment. Four different orders are in use, so it is read.

    Raises:
        ValueError: when `id2label` does not name exactly these three.
    """
    found = {str(label).lower(): int(index) for index, label in id2label.items()}
    columns = [[index for label, index in found.items() if label.startswith(name[:6])] for name in LABELS]
    if len(id2label) != len(LABELS) or any(len(indices) != 1 for indices in columns):
        raise ValueError(
            f"`nli_model`: its config.id2label is {dict(id2label)}, which does not say which output is contradiction, "
            "neutral and entailment. Correct the model's config.json; a guessed order would turn the score round."
        )
    return [indices[0] for indices in columns]


def load_nli(name_or_path: str) -> NLI:
    """Load a sequence-classification model with the labels contradiction, neutral and entailment.

    Raises:
        OSError: when there is no such model.
        ValueError: when its labels are others.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except OSError as error:
        raise OSError(
            f"`nli_model`: cannot load {name_or_path!r} ({str(error).splitlines()[0]}). Name a folder or a cached "
            "model for sequence classification with NLI labels, or leave the key out: then there is no C-score."
        ) from error
    columns = label_columns(model.config.id2label)
    revision = getattr(model.config, "_commit_hash", None)
    model.eval()
    return NLI(model, tokenizer, columns, f"{name_or_path}@{revision}" if revision else name_or_path)


@torch.no_grad()
def probabilities(nli: NLI, premises: Sequence[str], hypotheses: Sequence[str], batch_size: int = 32) -> np.ndarray:
    """Probabilities ``(n, 3)`` of contradiction, neutral and entailment, in this order, of each pair."""
    if len(premises) != len(hypotheses):
        raise ValueError(f"`premises` has {len(premises)} entries, `hypotheses` {len(hypotheses)}: give pairs.")
    order = sorted(range(len(premises)), key=lambda i: len(premises[i]) + len(hypotheses[i]), reverse=True)
    found = np.zeros((len(premises), len(LABELS)))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs: Any = nli.tokenizer(
            [premises[i] for i in batch],
            [hypotheses[i] for i in batch],
            padding=True,
            truncation="longest_first",
            return_tensors="pt",
        )
        logits = nli.model(**inputs.to(nli.model.device)).logits.float()
        found[batch] = torch.softmax(logits, dim=-1)[:, nli.columns].cpu().numpy()
    return found


def c_scores(nli: NLI, rows: Sequence[Mapping[str, Any]], batch_size: int = 32) -> list[float | None]:
    """For each reply the number of persona sentences that it entails less that of those it contradicts.

    The reply is the premise, a persona sentence the hypothesis, the likeliest class counts. An empty reply says nothing
    and has 0; a row without a persona has None. The corpus value `c_score` is the mean over replies.

    Source: Madotto et al. 2019 (PAML), ACL, consistency score.

    Args:
        rows: with `persona` and `response`.
    """
    pairs = [
        (index, row["response"], sentence)
        for index, row in enumerate(rows)
        if row["response"].strip()
        for sentence in row["persona"]
    ]
    classes = probabilities(nli, [p for _, p, _ in pairs], [h for _, _, h in pairs], batch_size).argmax(axis=1)
    scores: list[float | None] = [0.0 if row["persona"] else None for row in rows]
    for (index, _, _), label in zip(pairs, classes, strict=True):
        scores[index] = (scores[index] or 0.0) + int(label) - 1
    return scores
