"""How well rules tell contradicting pairs of real sentences from others, as JSON on standard output.

    python benchmarks/contradiction.py --convai2 valid_self_original.txt [--output contradiction.json]

The pairs are two sentences of the same kind by different people, from ConvAI2's validation file, whose personas are
also Synthetic-Persona-Chat's. `contradiction_pairs.csv` beside this file names each sentence by a hash, since the
data is no part of the project, and says whether the two contradict each other. One person labelled them, who also
wrote the rules, without seeing what the rules say: could one person truthfully say both, in an ordinary conversation?
If a hearer would object, they contradict. Two jobs do unless one is a side job, a study or a hope; two favourites of
one thing do; what was once, or is wished for, does not.

Pairs were drawn at random within kinds found by plain patterns, not by the parser: by the verb ("relation": be, have,
like, live, do, favorite, family), by the subject, where contradictions are less rare ("topic": age, home, work, pets
...), or a persona sentence against what somebody else says in a dialogue ("statement", by subject as well).

The parts were read one after the other, each only after the rules had been committed, and the rules were written
further with what it showed. So the last part alone, `statements_2`, says what the rules of today reach on what they
never saw, and for the others the number at the first reading is the one to believe:

    part                    pairs  contradicting  AUC at the first reading
    development               167             28  none: the rules were written on it
    personas_1                157             23  0.713 [0.537, 0.913]; word overlap 0.565
    personas_2                182             16  0.778 [0.480, 1.000]; word overlap 0.654
    statements_1              198             27  0.721 [0.559, 0.879]; word overlap 0.597
    statements_2              216             22  0.787 [0.611, 0.967]; word overlap 0.509

Of `personas_2` one sentence of each pair at least had not been read before, but for an age that had been in another
writing; and nine of its contradictions are of ages.

AUC is the chance that a contradicting pair scores higher than another one; intervals are 95 %, by a bootstrap over
sentences (a pair weighs as often as both of its sentences are drawn). Word overlap is the Jaccard index of the words.
Templates, a fact against its denial by rule and against another fact of the same person, are apart: nothing is
claimed from them.
"""

import argparse
import csv
import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from evaluation.contradiction import THRESHOLD, contradiction, contradicts
from rlhf.data.sources import convai2
from rlhf.facts import parse_fact
from rlhf.files import write_text

PAIRS = Path(__file__).with_name("contradiction_pairs.csv")
NUM_RESAMPLES = 2000


def sentence_hash(sentence: str) -> str:
    """Of the words in lower case: 16 hexadecimal digits."""
    words = " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def overlap(left: str, right: str) -> float:
    """Jaccard index of the words."""
    ours, theirs = (set(re.findall(r"[a-z0-9']+", text.lower())) for text in (left, right))
    return len(ours & theirs) / len(ours | theirs)


def auc(labels: Sequence[int], scores: Sequence[float], sentences: Sequence[tuple[str, str]], seed: int = 0) -> Any:
    """{"auc", "ci_low", "ci_high"}; None where one of the two kinds is missing."""
    if len(set(labels)) < 2:
        return None
    names = {name: at for at, name in enumerate(sorted({name for pair in sentences for name in pair}))}
    ends = np.array([[names[left], names[right]] for left, right in sentences])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(NUM_RESAMPLES):
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        weights = drawn[ends[:, 0]] * drawn[ends[:, 1]]
        kept = weights > 0
        if len(set(np.asarray(labels)[kept])) == 2:
            found.append(
                roc_auc_score(np.asarray(labels)[kept], np.asarray(scores)[kept], sample_weight=weights[kept])
            )
    low, high = np.percentile(found, [2.5, 97.5])
    return {"auc": round(float(roc_auc_score(labels, scores)), 3), "ci_low": round(low, 3), "ci_high": round(high, 3)}


def measure(pairs: Sequence[dict[str, str]], sentences: dict[str, str]) -> dict[str, Any]:
    """What rules and word overlap reach on labelled pairs."""
    labels = [int(pair["contradicts"]) for pair in pairs]
    texts = [(sentences[pair["left"]], sentences[pair["right"]]) for pair in pairs]
    scores = [contradiction(*pair).score for pair in texts]
    flagged = [score >= THRESHOLD for score in scores]
    right = sum(flag and label for flag, label in zip(flagged, labels, strict=True))
    return {
        "pairs": len(pairs),
        "contradicting": sum(labels),
        "rules": auc(labels, scores, texts),
        "word_overlap": auc(labels, [overlap(*pair) for pair in texts], texts),
        "at_threshold": {"flagged": sum(flagged), "right": right, "recall": round(right / max(1, sum(labels)), 3)},
    }


def templates(personas: Sequence[Sequence[str]], seed: int = 0) -> dict[str, Any]:
    """A fact against its denial, and against another fact of the same person."""
    rng = random.Random(seed)
    texts, labels = [], []
    for persona in personas:
        fact = parse_fact(persona[0])
        if fact and len(persona) > 1:
            texts += [(persona[0], fact.deny(fact.value)), (persona[0], rng.choice(persona[1:]))]
            labels += [1, 0]
    scores = [contradiction(*pair).score for pair in texts]
    return {"pairs": len(texts), "rules": auc(labels, scores, texts)}


def false_alarms(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of what contradicts nothing, presumably: two facts of one person, and a person's replies."""
    together = {pair for row in rows for pair in combinations(dict.fromkeys(row["persona"]), 2)}
    facts = [contradiction(*pair).score >= THRESHOLD for pair in together]
    turns = [(row, turn["content"]) for row in rows for turn in row["messages"] if turn["role"] == "assistant"]
    turns = random.Random(0).sample(turns, min(2000, len(turns)))
    replies = [contradicts(row["persona"], reply).score >= THRESHOLD for row, reply in turns]
    return {
        "facts_of_one_person": {"pairs": len(facts), "flagged": round(sum(facts) / len(facts), 4)},
        "human_replies": {"replies": len(replies), "flagged": round(sum(replies) / len(replies), 4)},
    }


def _sentences(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Persona sentences, and the sentences of all turns."""
    for row in rows:
        yield from row["persona"]
        for turn in row["messages"]:
            yield from (part.strip() for part in re.findall(r"[^.!?]+[.!?]*", turn["content"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--convai2", type=Path, required=True, help="validation file with own personas, ParlAI's format"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    rows = list(convai2(arguments.convai2, []))
    personas = list(dict.fromkeys(tuple(row["persona"]) for row in rows))
    sentences = {sentence_hash(sentence): sentence for sentence in _sentences(rows)}
    with PAIRS.open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    missing = sorted({pair[end] for pair in pairs for end in ("left", "right")} - sentences.keys())
    if missing:
        raise SystemExit(
            f"`--convai2`: {arguments.convai2} lacks {len(missing)} of the labelled sentences: {missing[:3]}"
        )
    result: dict[str, Any] = {
        part: measure([pair for pair in pairs if pair["part"] == part], sentences)
        for part in dict.fromkeys(pair["part"] for pair in pairs)
    }
    result["templates"] = templates(personas)
    result["false_alarms"] = false_alarms(rows)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output:
        write_text(arguments.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
