"""What LoRA saves against full fine-tuning, from two trainings that were both measured.

Time is to the same held-out loss; cost puts each side on the cheapest card that holds it. What is no measurement is listed
under `estimates` with its rule. `benchmarks/savings.py` measures both sides.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rlhf.memory import T4_BYTES

# What the project set out to reach: the least reduction that counts as met, of 60-70 % and of 75-80 %.
TIME_TARGET, COST_TARGET = 0.60, 0.75


@dataclass(frozen=True)
class Card:
    """A GPU that can be rented: its memory in GB (1e9 bytes), $ an hour, and peak dense half-precision TFLOP/s."""

    name: str
    memory_gb: float
    rate_per_gpu_hour: float
    tflops: float


# Google Cloud, us-central1, on demand, the GPU without its machine: https://cloud.google.com/compute/gpus-pricing. Not
# read there: copies of the list of 2025 in public repositories have these numbers (looked up 2026-11-21). The peaks are of
# NVIDIA's data sheets, without sparsity.
CARDS = (
    Card("T4", T4_BYTES / 1e9, 0.35, 65),  # what torch has of its 16 GB
    Card("L4", 24, 0.56, 121),
    Card("A100 40 GB", 40, 2.93, 312),
    Card("A100 80 GB", 80, 3.93, 312),
)
# Of a card's memory no program has all: the CUDA context and what the allocator cannot use.
RESERVED_GB = 1.0


@dataclass(frozen=True)
class Side:
    """One way of training, measured.

    Attributes:
        name: "LoRA", "full".
        curve: Seconds of training and the held-out loss there, by time; the first point is before the first step.
        memory_gb: What a card has to hold, in GB: the peak that was measured, or what a plan says.
        kept_bytes: Of the weights that are kept of the training.
        memory_rule: How `memory_gb` was planned; empty where it was measured.
    """

    name: str
    curve: Sequence[tuple[float, float]]
    memory_gb: float
    kept_bytes: int
    memory_rule: str = ""


@dataclass(frozen=True)
class Bill:
    """What one side took: seconds to the target, its card and what that costs; None where it never got there or fits nowhere."""

    name: str
    best_loss: float
    seconds: float | None
    memory_gb: float
    card: str | None
    rate_per_gpu_hour: float | None
    dollars: float | None
    kept_bytes: int
    storage_per_month: float


@dataclass(frozen=True)
class Savings:
    """LoRA against full fine-tuning at one held-out loss. Reductions are shares: 0.6 is 60 % less, below 0 is more.

    Attributes:
        target_loss: The held-out loss up to which time is counted.
        loss_gap: Best loss of LoRA less that of full fine-tuning; above 0 LoRA stays behind.
        time_reduction: Of seconds to the target; None where a side never got there.
        cost_reduction: Of dollars to the target, each side on its own card; None also where a side fits on no card.
        memory_reduction: Of the memory that a card has to hold.
        storage_reduction: Of the bytes that are kept.
        estimates: What is no measurement, each with its rule.
    """

    lora: Bill
    full: Bill
    measured_on: str
    target_loss: float
    loss_gap: float
    time_reduction: float | None
    cost_reduction: float | None
    memory_reduction: float
    storage_reduction: float
    estimates: tuple[str, ...]

    def verdicts(self) -> dict[str, str]:
        """Whether each target was met, in words."""
        return {
            f"time: {TIME_TARGET:.0%} less or better": _verdict(self.time_reduction, TIME_TARGET),
            f"cost: {COST_TARGET:.0%} less or better": _verdict(self.cost_reduction, COST_TARGET),
        }

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "verdicts": self.verdicts()}, indent=2, allow_nan=False)

    def __str__(self) -> str:
        """As Markdown, which is readable as text."""
        lora, full = self.lora, self.full
        rows = [
            (f"seconds to a held-out loss of {self.target_loss:.4f}", lora.seconds, full.seconds, ".1f", self.time_reduction),
            ("memory, GB", lora.memory_gb, full.memory_gb, ".2f", self.memory_reduction),
            ("cheapest card that holds it", lora.card, full.card, "", None),
            ("its rate, $ an hour", lora.rate_per_gpu_hour, full.rate_per_gpu_hour, ".2f", None),
            ("cost, $", lora.dollars, full.dollars, ".6f", self.cost_reduction),
            ("weights kept, MB", lora.kept_bytes / 1e6, full.kept_bytes / 1e6, ".2f", self.storage_reduction),
            ("storage of these, $ a month", lora.storage_per_month, full.storage_per_month, ".6f", self.storage_reduction),
            ("best held-out loss", lora.best_loss, full.best_loss, ".4f", None),
        ]  # fmt: skip
        lines = [f"| measured on {self.measured_on} | {lora.name} | {full.name} | less |", "| --- | --- | --- | --- |"]
        for title, one, other, form, less in rows:
            lines.append(f"| {title} | {_shown(one, form)} | {_shown(other, form)} | {_percent(less)} |")
        lines += ["", f"Loss gap, {lora.name} less {full.name}: {self.loss_gap:+.4f}.", ""]
        lines += [f"- {name}: {verdict}" for name, verdict in self.verdicts().items()]
        lines += [f"- estimate: {rule}" for rule in self.estimates]
        return "\n".join(lines) + "\n"


def calculate_savings(
    lora: Side,
    full: Side,
    measured_on: str,
    target_loss: float | None = None,
    cards: Sequence[Card] = CARDS,
    storage_price: float = 0.02,
) -> Savings:
    """What LoRA saves against full fine-tuning on the same data, measured on the same machine.

    Args:
        lora: The one side.
        full: The other side.
        measured_on: The machine; where it is the name of a card, its seconds are that card's.
        target_loss: The held-out loss that both should reach. None takes the worse one of the two best losses, which is
            the best that both reach.
        cards: Those that may be rented.
        storage_price: In dollars for a GB (1e9 bytes) and month.

    Returns:
        Each side's bill, the reductions, and what in them is an estimate.

    Raises:
        ValueError: naming everything that is wrong with either side.
    """
    faults = [fault for side in (lora, full) for fault in _faults(side)]
    if not cards:
        faults.append("`cards` is empty; name one at least")
    if faults:
        raise ValueError("\n".join(faults))
    best = [min(loss for _, loss in side.curve) for side in (lora, full)]
    target = max(best) if target_loss is None else target_loss
    places = [_cheapest(side.memory_gb, cards) for side in (lora, full)]
    machine = next((card for card in cards if card.name == measured_on), None)
    # A machine that is no card of the list is taken for the card of LoRA's side, or else of the other one.
    reference = machine or places[0] or places[1]
    bills = []
    for side, loss, card in zip((lora, full), best, places, strict=True):
        seconds = seconds_to_loss(side.curve, target)
        dollars = None
        if seconds is not None and card is not None and reference is not None:
            dollars = seconds * reference.tflops / card.tflops / 3600 * card.rate_per_gpu_hour
        bills.append(
            Bill(
                name=side.name,
                best_loss=loss,
                seconds=seconds,
                memory_gb=side.memory_gb,
                card=card.name if card else None,
                rate_per_gpu_hour=card.rate_per_gpu_hour if card else None,
                dollars=dollars,
                kept_bytes=side.kept_bytes,
                storage_per_month=side.kept_bytes / 1e9 * storage_price,
            )
        )
    return Savings(
        lora=bills[0],
        full=bills[1],
        measured_on=measured_on,
        target_loss=target,
        loss_gap=best[0] - best[1],
        time_reduction=_less(bills[0].seconds, bills[1].seconds),
        cost_reduction=_less(bills[0].dollars, bills[1].dollars),
        memory_reduction=1 - lora.memory_gb / full.memory_gb,
        storage_reduction=1 - lora.kept_bytes / full.kept_bytes,
        estimates=_estimates((lora, full), places, machine, reference, measured_on),
    )


def seconds_to_loss(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When the held-out loss first reached `target`, on straight lines between the evaluations; None if it never did."""
    (before, high), *rest = curve
    if high <= target:
        return before
    for seconds, loss in rest:
        if loss <= target:
            return before + (seconds - before) * (high - target) / (high - loss)
        before, high = seconds, loss
    return None


def _cheapest(memory_gb: float, cards: Sequence[Card]) -> Card | None:
    fitting = [card for card in cards if memory_gb + RESERVED_GB <= card.memory_gb]
    return min(fitting, key=lambda card: card.rate_per_gpu_hour, default=None)


def _estimates(
    sides: Sequence[Side],
    places: Sequence[Card | None],
    machine: Card | None,
    reference: Card | None,
    measured_on: str,
) -> tuple[str, ...]:
    said = [f"memory of {side.name}: {side.memory_rule}" for side in sides if side.memory_rule]
    if machine is None and reference is not None:
        said.append(
            f"cost: a {reference.name} is taken to need as many seconds as {measured_on} did; this cancels out in the "
            "reduction where both sides are on one card"
        )
    for side, card in zip(sides, places, strict=True):
        if card is not None and reference is not None and card is not reference:
            said.append(
                f"cost of {side.name}: hours on a {card.name} are those of a {reference.name} times "
                f"{reference.tflops:g} / {card.tflops:g}, the ratio of their peak TFLOP/s"
            )
        if card is None:
            said.append(f"{side.name} fits on no card of the list ({side.memory_gb:.1f} GB), so its cost is not known")
    return tuple(said)


def _faults(side: Side) -> list[str]:
    faults = []
    seconds = [point[0] for point in side.curve]
    if len(side.curve) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(seconds)):
        faults.append(
            f"`curve` of {side.name}: needs two points or more, by rising seconds, got {list(side.curve)[:5]}"
        )
    if not all(math.isfinite(number) for point in side.curve for number in point):
        faults.append(
            f"`curve` of {side.name}: has a number that is not finite; leave the evaluation out or train again"
        )
    for name in ("memory_gb", "kept_bytes"):
        if not getattr(side, name) > 0:
            faults.append(f"`{name}` of {side.name}: must be above 0, got {getattr(side, name)}")
    return faults


def _less(lora: float | None, full: float | None) -> float | None:
    return None if lora is None or not full else 1 - lora / full


def _verdict(reduction: float | None, target: float) -> str:
    if reduction is None:
        return "not known"
    change = f"{abs(reduction):.1%} {'less' if reduction >= 0 else 'more'}"
    return f"met ({change})" if reduction >= target else f"NOT met ({change})"


def _percent(reduction: float | None) -> str:
    return "" if reduction is None else f"{reduction:+.1%}"


def _shown(value: float | str | None, form: str) -> str:
    return "–" if value is None else format(value, form)
