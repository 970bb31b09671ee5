"""Time and memory of scoring recorded replies against their number, as JSON on standard output.

    python benchmarks/evaluation_scaling.py [--rows 2500 5000 10000 20000] [--output scaling.json]

All metrics that need no model, each with its interval from 2,000 resamples of the personas. Each size runs in a process
of its own, so that its peak memory is its own; what the imports alone take is measured in one more. The replies are
generated: random words, some common and most rare as in natural text, with a persona of five sentences for every two
dialogues of five exchanges; a reply says a sentence of its persona now and then. Seconds are of the processor, so that
another program on the machine changes them little; all of it runs on one core. The exponent is the slope of log seconds
over log rows; 1 is linear.
"""

import argparse
import json
import logging
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

from evaluation.intervals import NUM_RESAMPLES
from evaluation.score import score_rows
from rlhf.files import write_text

EXCHANGES = 5
DIALOGUES = 2  # of a persona
FACTS = 5
FROM_PERSONA = 0.1  # share of the replies that are a sentence of the persona
WORDS = 15_000  # fewer than the vocabulary of EAD


def replies(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` rows as `python -m evaluation score` reads them."""
    rng = random.Random(seed)
    syllables = [
        first + vowel + last for first in "bdfghklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "st")
    ]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(WORDS)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))  # Zipf's law

    def sentence() -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(4, 18))) + rng.choice((" .", " .", " ?"))

    persona: list[str] = []
    history: list[dict[str, str]] = []
    for number in range(count):
        if number % (EXCHANGES * DIALOGUES) == 0:
            persona = [sentence() for _ in range(FACTS)]
        if number % EXCHANGES == 0:
            history = []
        user, reference = sentence(), sentence()
        reply = rng.choice(persona) if rng.random() < FROM_PERSONA else sentence()
        yield {
            "persona": persona,
            "history": [*history, {"role": "user", "content": user}],
            "response": reply,
            "reference": reference,
            "dialogue_id": str(number // EXCHANGES),
        }
        history = [*history, {"role": "user", "content": user}, {"role": "assistant", "content": reference}]


def measure(count: int) -> dict[str, Any]:
    """Seconds of scoring, and peak memory; 0 rows measure the imports."""
    logging.disable(logging.WARNING)
    rows = list(replies(count))
    rows_gib = _peak_gib()
    if not rows:
        return {"rows": 0, "peak_gib": round(rows_gib, 3)}
    begin, clock = time.process_time(), time.perf_counter()
    results = score_rows(rows)
    seconds, wall = time.process_time() - begin, time.perf_counter() - clock
    return {
        "rows": count,
        "clusters": results["run"]["clusters"]["n"],
        "resamples": NUM_RESAMPLES,
        "metrics": len(results["metrics"]),
        "seconds": round(seconds, 2),
        "wall_seconds": round(wall, 2),
        "peak_gib": round(_peak_gib(), 3),
        "peak_gib_of_the_rows": round(rows_gib, 3),
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_500, 5_000, 10_000, 20_000])
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    measured = []
    for count in (0, *arguments.rows):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured.append(pool.apply(measure, (count,)))
    imports, *sizes = measured
    result: dict[str, Any] = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "peak_gib_of_the_imports": imports["peak_gib"],
        "sizes": sizes,
    }
    if len(sizes) > 1:
        rows, seconds = ([size[key] for size in sizes] for key in ("rows", "seconds"))
        result["exponent"] = round(float(np.polyfit(np.log(rows), np.log(seconds), 1)[0]), 3)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output:
        write_text(arguments.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
