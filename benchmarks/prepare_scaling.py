"""Time and memory of preparing data against the number of dialogues, as JSON on standard output.

    python benchmarks/prepare_scaling.py [--rows 10000 30000 100000] [--output scaling.json]

Each size runs in a process of its own, so that its peak memory is its own. The dialogues are generated: four exchanges of
random words, some common and most rare as in natural text, and every tenth reply, with its question, an altered copy of
an earlier one. Seconds are of the processor, so that another program on the machine changes them little; all of it runs
on one core. The exponent is the slope of log seconds over log rows; 1 is linear.
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.describe import describe
from rlhf.data.duplicates import drop_duplicates
from rlhf.data.split import split
from rlhf.files import write_text

EXCHANGES = 4
FACTS = 5
COPIED = 0.1  # share of the exchanges that are altered copies
WORDS = 20_000
RECENT = 1_000  # exchanges that copies are made of


def dialogues(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` dialogue rows, one persona for each ten."""
    rng = random.Random(seed)
    syllables = [
        first + vowel + last for first in "bdfghklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "st")
    ]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(WORDS)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))  # Zipf's law

    def sentence() -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(3, 16))) + rng.choice((" .", " ?"))

    recent: list[tuple[str, str]] = []
    persona: list[str] = []
    for number in range(count):
        if number % 10 == 0:
            persona = [sentence() for _ in range(FACTS)]
        messages = []
        for _ in range(EXCHANGES):
            if recent and rng.random() < COPIED:
                user, reply = rng.choice(recent)
                reply = " ".join(["well ,", *reply.split()[:-1], "!"])
            else:
                user, reply = sentence(), sentence()
                recent = [*recent[-RECENT:], (user, reply)]
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        yield {"persona": persona, "messages": messages, "dialogue_id": f"generated-{number}", "source": "generated"}


def measure(count: int) -> dict[str, Any]:
    """Seconds of each step, and peak memory: of everything, and of the generated rows alone."""
    rows = list(dialogues(count))
    start_gib = _peak_gib()
    times = {}
    begin = time.process_time()
    kept, rejected = drop_duplicates(rows)
    times["duplicates"] = time.process_time() - begin
    begin = time.process_time()
    statistics = describe(kept, rejected)
    times["describe"] = time.process_time() - begin
    begin = time.process_time()
    split(kept, 0.2, 42)
    times["split"] = time.process_time() - begin
    return {
        "rows": count,
        "replies": count * EXCHANGES,
        "duplicates": statistics["duplicates"]["replies"],
        "seconds": round(sum(times.values()), 2),
        "seconds_by_step": {name: round(seconds, 2) for name, seconds in times.items()},
        "peak_gib": round(_peak_gib(), 3),
        "peak_gib_of_the_rows": round(start_gib, 3),
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    measured = []
    for count in arguments.rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured.append(pool.apply(measure, (count,)))
    result: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version(), "sizes": measured}
    if len(measured) > 1:
        rows, seconds = ([size[key] for size in measured] for key in ("rows", "seconds"))
        result["exponent"] = round(float(np.polyfit(np.log(rows), np.log(seconds), 1)[0]), 3)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output:
        write_text(arguments.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
