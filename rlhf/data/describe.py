"""What a prepared data set is like: the numbers of statistics.json, a table for the terminal, histograms as a PNG."""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from itertools import islice
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from rlhf.data.duplicates import DIALOGUE_REASON, REPLY_REASON
from rlhf.data.quality import NO_GOOD_REPLY
from rlhf.data.sources import FILTERED
from rlhf.data.split import persona_key
from rlhf.files import write_bytes

PERCENTILES = (5, 25, 75, 95, 99)
BINS = 40
BATCH = 1_000  # replies tokenised at a time

LEAK_REASON = "near-duplicate of a training reply"
# Why a dialogue is left out in which nothing is malformed.
WELL_FORMED = FILTERED | {NO_GOOD_REPLY, DIALOGUE_REASON, LEAK_REASON}

# Share of the replies that hold one; a reply can count for several.
FORMATTING: dict[str, re.Pattern[str]] = {
    "markdown": re.compile(r"\*\*\S.*?\*\*|__\S.*?__|`[^`\n]+`|^#{1,6} |^```|\[[^\]\n]+\]\([^)\n]+\)", re.MULTILINE),
    "lists": re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+\S", re.MULTILINE),
    "urls": re.compile(r"\b(?:https?://|www\.)\w", re.IGNORECASE),
    "tags": re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>", re.IGNORECASE),
}


def describe(
    rows: Iterable[Mapping[str, Any]],
    rejected: Iterable[Mapping[str, Any]] = (),
    tokenize: Callable[[list[str]], Sequence[Sequence[int]]] | None = None,
) -> dict[str, Any]:
    """Statistics of dialogue rows, in one pass over each argument.

    Args:
        rows: {"persona", "messages", "dialogue_id", "source"}.
        rejected: {"reason", "dropped"}; "dropped" is "dialogue" where a whole one was.
        tokenize: A batch of texts to their token ids, such as
            `lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]`; without it tokens are not counted.

    Returns:
        - "rows", "dialogues" (different `dialogue_id`), "replies" (the assistant's), "untrained_replies" ("train": False);
        - "well_formed": share of the rows and of the rejected dialogues without a fault of form, None without any;
        - "lengths": by name ("reply_characters", "user_characters", "dialogue_characters", "turns", and with a tokenizer
          "reply_tokens", "user_tokens") a [`summary`]; the persona and special tokens are not counted in;
        - "formatting": share of the replies with markdown, lists, URLs, markup tags, and with "any" of these;
        - "sources": rows by `source`, with their "imbalance" (below);
        - "personas": "number", "facts" (a [`summary`] over personas), rows by persona as "imbalance";
        - "duplicates": "replies" of rows that are left, and whole "dialogues", rejected as near-duplicates;
        - "rejected": number by what was dropped and by reason.
        An imbalance is {"largest_share", "effective_number"}; the latter is exp(entropy) of the shares in nats, which is
        the number where all are equal (Hill 1973, order 1).
    """
    lengths: dict[str, array[int]] = {name: array("q") for name in ("reply_characters", "user_characters")}
    lengths |= {name: array("q") for name in ("dialogue_characters", "turns")}
    texts = _Tokens(tokenize)
    formatting: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    personas: Counter[frozenset[str]] = Counter()
    dialogue_ids: set[str] = set()
    untrained = 0
    for row in rows:
        sources[row["source"]] += 1
        personas[persona_key(row["persona"])] += 1
        dialogue_ids.add(row["dialogue_id"])
        lengths["turns"].append(len(row["messages"]))
        lengths["dialogue_characters"].append(sum(len(message["content"]) for message in row["messages"]))
        for message in row["messages"]:
            text = message["content"]
            speaker = "reply" if message["role"] == "assistant" else "user"
            lengths[f"{speaker}_characters"].append(len(text))
            texts.add(f"{speaker}_tokens", text)
            if speaker == "reply":
                untrained += not message.get("train", True)
                found = [name for name, pattern in FORMATTING.items() if pattern.search(text)]
                formatting.update([*found, "any"] if found else [])
    lengths |= texts.counted()

    reasons: dict[str, Counter[str]] = {}
    for entry in rejected:
        reasons.setdefault(entry["dropped"], Counter())[entry["reason"]] += 1
    count, replies = len(lengths["turns"]), len(lengths["reply_characters"])
    whole = reasons.get("dialogue", Counter())
    faulty = sum(number for reason, number in whole.items() if reason not in WELL_FORMED)
    total = count + whole.total()
    return {
        "rows": count,
        "dialogues": len(dialogue_ids),
        "replies": replies,
        "untrained_replies": untrained,
        "well_formed": 1 - faulty / total if total else None,
        "lengths": {name: summary(values) for name, values in lengths.items()},
        "formatting": {name: formatting[name] / max(replies, 1) for name in (*FORMATTING, "any")},
        "sources": {"rows": dict(sources.most_common()), "imbalance": imbalance(sources.values())},
        "personas": {
            "number": len(personas),
            "facts": summary([len(persona) for persona in personas]),
            "imbalance": imbalance(personas.values()),
        },
        "duplicates": {
            "replies": reasons.get("reply", Counter())[REPLY_REASON],
            "dialogues": reasons.get("dialogue", Counter())[DIALOGUE_REASON],
        },
        "rejected": {what: dict(counter.most_common()) for what, counter in sorted(reasons.items())},
    }


class _Tokens:
    """Counts the tokens of texts, a batch at a time: one text at a time is many times slower."""

    def __init__(self, tokenize: Callable[[list[str]], Sequence[Sequence[int]]] | None) -> None:
        self.tokenize = tokenize
        self.waiting: dict[str, list[str]] = {}
        self.lengths: dict[str, array[int]] = {}

    def add(self, name: str, text: str) -> None:
        if self.tokenize is None:
            return
        waiting = self.waiting.setdefault(name, [])
        waiting.append(text)
        if len(waiting) == BATCH:
            self._count(name)

    def counted(self) -> dict[str, "array[int]"]:
        for name in self.waiting:
            self._count(name)
        return self.lengths

    def _count(self, name: str) -> None:
        if self.tokenize is not None and self.waiting[name]:
            lengths = self.lengths.setdefault(name, array("q"))
            lengths.extend(len(ids) for ids in self.tokenize(self.waiting[name]))
            self.waiting[name].clear()


def summary(values: Sequence[int]) -> dict[str, Any]:
    """{"count", "total", "mean", "min", "p5", "p25", "median", "p75", "p95", "p99", "max", "histogram"}.

    Percentiles are linear between the two nearest values, as numpy's. The histogram is {"edges", "counts"} of at most 40
    equal bins of whole numbers up to the 99th percentile; the last bin holds all that is longer. Of no values there is
    "count" alone.
    """
    if not len(values):
        return {"count": 0}
    numbers = np.array(values)
    quantiles = dict(zip((*PERCENTILES, 50), np.percentile(numbers, (*PERCENTILES, 50)).tolist(), strict=True))
    low, high = int(numbers.min()), int(numbers.max())
    width = max(1, -(-(int(quantiles[99]) + 1 - low) // BINS))
    edges = list(range(low, int(quantiles[99]) + width + 1, width))
    counts = np.bincount(np.minimum((numbers - low) // width, len(edges) - 2), minlength=len(edges) - 1)
    return {
        "count": len(numbers),
        "total": int(numbers.sum()),
        "mean": float(numbers.mean()),
        "min": low,
        **{f"p{at}": quantiles[at] for at in (5, 25)},
        "median": quantiles[50],
        **{f"p{at}": quantiles[at] for at in (75, 95, 99)},
        "max": high,
        "histogram": {"edges": edges, "counts": counts.tolist()},
    }


def imbalance(counts: Iterable[int]) -> dict[str, float]:
    """{"largest_share", "effective_number"} of counts; both 0 where there are none."""
    numbers = [count for count in counts if count]
    shares = [count / sum(numbers) for count in numbers]
    return {
        "largest_share": max(shares, default=0.0),
        "effective_number": exp(-sum(share * log(share) for share in shares)) if shares else 0.0,
    }


def table(statistics: Mapping[str, Any], most: int = 10) -> Table:
    """The statistics for a terminal: `rich.print(table(statistics))`. Of sources and reasons the `most` frequent."""
    made = Table(title=f"{statistics['rows']:,} rows of {statistics['dialogues']:,} dialogues")
    for column in ("", "mean", "min", "p5", "median", "p95", "max"):
        made.add_column(column, justify="right" if column else "left")
    measured = {**statistics["lengths"], "facts of a persona": statistics["personas"]["facts"]}
    for name, values in measured.items():
        if values["count"]:
            cells = [f"{values[column]:,.0f}" for column in ("min", "p5", "median", "p95", "max")]
            made.add_row(name.replace("_", " "), f"{values['mean']:,.1f}", *cells)
    made.add_section()
    personas, duplicates = statistics["personas"], statistics["duplicates"]
    facts = {
        "replies": f"{statistics['replies']:,}, {statistics['untrained_replies']:,} of them context only",
        "well-formed": "-" if statistics["well_formed"] is None else f"{statistics['well_formed']:.1%} of the rows",
        "formatting": ", ".join(f"{name} {share:.1%}" for name, share in statistics["formatting"].items()),
        "personas": f"{personas['number']:,}, {_imbalance(personas['imbalance'])}",
        "sources": f"{len(statistics['sources']['rows']):,}, {_imbalance(statistics['sources']['imbalance'])}",
        **{f"  {name}": f"{count:,} rows" for name, count in islice(statistics["sources"]["rows"].items(), most)},
        "near-duplicates": f"{duplicates['replies']:,} replies, {duplicates['dialogues']:,} dialogues",
    }
    for what, reasons in statistics["rejected"].items():
        facts[f"rejected: {what}"] = f"{sum(reasons.values()):,}"
        facts |= {f"  {reason}": f"{count:,}" for reason, count in islice(reasons.items(), most)}
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        # Text of the data is no markup of the terminal's.
        grid.add_row(Text(name), Text(value))
    whole = Table.grid()
    whole.add_row(made)
    whole.add_row(grid)
    return whole


def histograms(statistics: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG with a histogram for each of `statistics["lengths"]`; the last bar holds all that is longer."""
    measured = {name: values for name, values in statistics["lengths"].items() if values["count"]}
    columns = 3
    lines = max(1, -(-len(measured) // columns))
    figure = Figure(figsize=(4 * columns, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, values) in zip(axes, measured.items(), strict=False):
        edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
        axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#4c72b0")
        axis.axvline(values["median"], color="black", linewidth=1, linestyle="--")
        axis.set_title(
            f"{name.replace('_', ' ')}, median {values['median']:,.0f}, longest {values['max']:,}", fontsize=9
        )
        if values["max"] >= edges[-1]:
            # What is longer than the axis stands in the last bar, so that a few long texts do not flatten the others.
            axis.patches[-1].set_color("#dd8452")
            axis.set_xlabel(f"last bar: {edges[-2]:,} and longer", fontsize=8)
        axis.set_ylabel("number", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in axes[len(measured) :]:
        axis.set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())


def _imbalance(values: Mapping[str, float]) -> str:
    return f"the largest {values['largest_share']:.1%}, effectively {values['effective_number']:,.1f}"
