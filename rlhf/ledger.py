"""What a stage took and costs: wall time, GPU-hours, peak memory, bytes kept; added up over all the pieces of a stage.

A stage that was interrupted and went on was paid for in pieces, so its record lists each of them, and its totals are theirs.
"""

import contextlib
import json
import logging
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from rlhf.config import PriceConfig
from rlhf.files import write_json

logger = logging.getLogger(__name__)

# Seconds between two writes of a running stage's record: what a kill may leave uncounted.
HEARTBEAT = 30.0


class Ledger:
    """The pieces of one stage; the last one is this process's.

    Args:
        folder: The stage's.
        earlier: The record that lies there, of a stage that this one goes on with; None begins anew.
        prices: What the cost is reckoned by.
    """

    def __init__(self, folder: Path, earlier: Mapping[str, Any] | None, prices: PriceConfig) -> None:
        self.folder = folder
        self.prices = prices
        self.before = [dict(piece) for piece in (earlier or {}).get("pieces", [])]
        for piece in self.before:
            if piece["status"] == "running":
                piece["status"] = "killed"
        self.began = time.perf_counter()
        self.gpus = gpus_held()
        self.peak_of = reset_peak_memory()

    def update(self, record: dict[str, Any]) -> None:
        """Write the totals until now into the record."""
        seconds = time.perf_counter() - self.began
        piece = {
            "started": record["started"],
            "status": record["status"],
            "wall_seconds": round(seconds, 1),
            "gpu_hours": round(seconds / 3600 * self.gpus, 6),
            "peak_memory_gb": round(peak_memory_gb(), 2),
        }
        pieces = [*self.before, piece]
        record["wall_seconds"] = round(sum(each["wall_seconds"] for each in pieces), 1)
        record["peak_memory_gb"] = max(each["peak_memory_gb"] for each in pieces)
        record["peak_memory_of"] = self.peak_of
        record["kept_bytes"] = kept_bytes(self.folder)
        record["cost"] = priced(sum(each["gpu_hours"] for each in pieces), record["kept_bytes"], self.prices)
        record["pieces"] = pieces

    @contextlib.contextmanager
    def heartbeat(self, record: Mapping[str, Any]) -> Iterator[None]:
        """Meanwhile keep the record on disk up to date, so that the time of a piece that is killed is not lost."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                now = dict(record)  # a copy, as the stage adds to it meanwhile
                try:
                    self.update(now)
                    write_json(self.folder / "metadata.json", now)
                except (OSError, RuntimeError) as error:  # a full disk; a value that grows while it is written
                    logger.warning("The record's time could not be brought up to date: %s", error)

        thread = threading.Thread(target=beat, name="ledger", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def prices_of(configs: Iterable[Any]) -> PriceConfig:
    """The prices among a stage's configurations, or the defaults."""
    return next((config for config in configs if isinstance(config, PriceConfig)), PriceConfig())


def priced(gpu_hours: float, kept: int, prices: PriceConfig) -> dict[str, float]:
    """What hours of a GPU (wall time times GPUs) cost, and what keeping so many bytes costs a month, in dollars."""
    return {
        "gpu_hours": round(gpu_hours, 6),
        "rate_per_gpu_hour": prices.rate_per_gpu_hour,
        "total": round(gpu_hours * prices.rate_per_gpu_hour, 6),
        "storage_price": prices.storage_price,
        "storage_per_month": round(kept / 1e9 * prices.storage_price, 6),
    }


def price_again(folder: Path, prices: PriceConfig) -> None:
    """Bring the cost in a finished stage's record to these prices: they change nothing that the stage has made."""
    record = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    cost = priced(record["cost"]["gpu_hours"], record["kept_bytes"], prices) if "kept_bytes" in record else None
    if cost not in (None, record["cost"]):
        write_json(folder / "metadata.json", {**record, "cost": cost})


def kept_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, checkpoints included; what goes away meanwhile is not counted."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def gpus_held() -> int:
    """GPUs that this launch holds, one a process; 0 where it runs on CPUs."""
    return 0 if PartialState().device.type == "cpu" else PartialState().num_processes


def reset_peak_memory() -> str:
    """Begin to measure the peak anew, and say what it is the peak of.

    On a CPU all stages of a recipe share one process, whose own peak would be that of the largest of them.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return "tensors on the first GPU, during the stage"
    try:  # Linux, where the kernel allows it: 5 resets VmHWM (man 5 proc)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "the process since it began, with any stages before this one"
    return "the process, during the stage"


def peak_memory_gb() -> float:
    """The peak since [`reset_peak_memory`], in GB (1e9 bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError):
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def memory_gb() -> float:
    """What the process holds now, in GB (1e9 bytes); on Linux alone."""
    return _status("VmRSS")


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e9
