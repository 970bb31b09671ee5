"""Time and memory of the stage `prepare` against the number of dialogues, as JSON on standard output.

    python benchmarks/prepare_scaling.py [--rows 10000 30000 100000] [--output scaling.json]

Each size is a JSON-lines file of generated dialogues, prepared in a process of its own, so that its peak memory is its
own. A dialogue has four exchanges of random words, some common and most rare as in natural text; every tenth reply, with
its question, is an altered copy of an earlier one, and every fifth states a fact of its persona. Seconds are of the
processor, so that another program on the machine changes them little; all of it runs on one core. The exponent is the
slope of log seconds over log rows; 1 is linear.
"""

import argparse
import json
import multiprocessing
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

import rlhf.prepare
from rlhf.files import write_text
from rlhf.prepare import PrepareConfig, audit, describe, duplicates, prepare, quality

EXCHANGES = 4
DIALOGUES_PER_PERSONA = 10
COPIED = 0.1  # share of the exchanges that are altered copies
STATED = 0.2  # share of the other replies that state a fact
WORDS = 20_000
RECENT = 1_000  # exchanges that copies are made of
FACTS = ("i have a {} .", "i like {} .", "i work as a {} .", "i live in {} .", "my best friend is a {} .")

# The steps of the stage by what does them; nothing here calls another. What is left over is "other".
STEPS = {
    "read": (rlhf.prepare, "_limited"),
    "quality": (quality, "mark_bad_replies"),
    "duplicates": (duplicates, "drop_duplicates"),
    "split": (rlhf.prepare, "split"),
    "leaks": (rlhf.prepare, "_without_leaks"),
    "pairs_and_prompts": (rlhf.prepare, "_files"),
    "write": (rlhf.prepare, "write_jsonl"),
    "describe": (describe, "describe"),
    "audit": (audit, "audit"),
    "plot": (describe, "histograms"),
}


def dialogues(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` dialogue rows, one persona for each ten."""
    rng = random.Random(seed)
    syllables = [
        first + vowel + last for first in "bdfghklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "st")
    ]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(WORDS)]
    weights = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))  # Zipf's law

    def some_words(count: int) -> str:
        return " ".join(rng.choices(words, cum_weights=weights, k=count))

    def sentence() -> str:
        return some_words(rng.randint(3, 16)) + rng.choice((" .", " ?"))

    recent: list[tuple[str, str]] = []
    persona: list[str] = []
    for number in range(count):
        if number % DIALOGUES_PER_PERSONA == 0:
            persona = [fact.format(some_words(rng.randint(1, 2))) for fact in FACTS]
        messages = []
        for _ in range(EXCHANGES):
            if recent and rng.random() < COPIED:
                user, reply = rng.choice(recent)
                reply = " ".join(["well ,", *reply.split()[:-1], "!"])
            else:
                user, reply = sentence(), sentence()
                if rng.random() < STATED:
                    reply = f"{rng.choice(persona)} {reply}"
                recent = [*recent[-RECENT:], (user, reply)]
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        yield {"persona": persona, "messages": messages, "dialogue_id": f"generated-{number}", "source": "generated"}


def measure(path: str, folder: str) -> dict[str, Any]:
    """Prepare the file: seconds of each step, and peak memory when it ended."""
    seconds: Counter[str] = Counter()
    peaks: dict[str, float] = {"start": _peak_gib()}
    for step, (module, name) in STEPS.items():
        setattr(module, name, _timed(getattr(module, name), step, seconds, peaks))
    began, processor_began = time.perf_counter(), time.process_time()
    counts = prepare(PrepareConfig(folder, "jsonl", path=path))
    total = time.process_time() - processor_began
    wall = time.perf_counter() - began
    seconds["other"] = total - sum(seconds.values())
    statistics = json.loads((Path(folder) / "statistics.json").read_text())
    return {
        "dialogues": counts["dialogues"],
        "duplicate_replies": statistics["duplicates"]["replies"],
        "rows": counts["rows"],
        "wall_seconds": round(wall, 1),
        "seconds": round(total, 1),
        "seconds_by_step": {step: round(value, 2) for step, value in seconds.items()},
        "peak_gib": round(_peak_gib(), 2),
        "peak_gib_after_step": {step: round(value, 2) for step, value in peaks.items()},
    }


def _timed(function: Callable[..., Any], step: str, seconds: Counter[str], peaks: dict[str, float]) -> Any:
    """The function, or each advance of what it yields, with its processor time added to `seconds[step]`."""

    def each(values: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.process_time()
            value = next(values, None)  # none of the steps yields None
            seconds[step] += time.process_time() - began
            if value is None:
                peaks[step] = _peak_gib()
                return
            yield value

    def timed(*args: Any, **keys: Any) -> Any:
        began = time.process_time()
        result = function(*args, **keys)
        seconds[step] += time.process_time() - began
        peaks[step] = _peak_gib()
        return each(result) if isinstance(result, Iterator) else result

    return timed


def _peak_gib() -> float:
    """The process's largest resident memory so far; Linux alone."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    sizes = {}
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            path = Path(folder) / "dialogues.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in dialogues(count))
            sizes[count] = pool.apply(measure, (str(path), f"{folder}/prepare"))
    result: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version(), "sizes": sizes}
    if len(sizes) > 1:
        seconds = [size["seconds"] for size in sizes.values()]
        result["exponent"] = round(float(np.polyfit(np.log(list(sizes)), np.log(seconds), 1)[0]), 3)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output:
        write_text(arguments.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
