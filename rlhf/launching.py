"""How `rlhf run` starts a stage on GPUs: a process on each, through accelerate, once they are known to reach each other.

Data parallel: every process has a whole copy of the base on its own card. A model split by layers over two cards would
let one wait for the other. As a program this file is one rank of the check: accelerate launch ... rlhf/launching.py DIR
"""

import contextlib
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import psutil
import torch

from rlhf.doctor import cache_settings

logger = logging.getLogger(__name__)

SECONDS_TO_MEET = 20.0  # from when the last rank came up until all have added up
SECONDS_TO_IMPORT = 180.0  # until the first rank is up; torch from a cold disk takes a while
SECONDS_TO_STOP = 10.0

REMEDIES = """\
What helps, in this order:
  - cards without a direct link:  NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 rlhf run ...   (set by itself on cards of
    compute capability 7.5 without NVLink, unless you set them otherwise)
  - a firewall or a VPN between the processes, which meet on a free port of this machine:  NCCL_SOCKET_IFNAME=lo, or
    GLOO_SOCKET_IFNAME=lo on a CPU
  - to see what NCCL waits for:  NCCL_DEBUG=INFO rlhf run ...
  - one GPU alone, slower but without any of this:  CUDA_VISIBLE_DEVICES=0 rlhf run ..."""


class LaunchError(RuntimeError):
    """The processes of a stage could not be started, or do not reach each other."""


def command(script: Sequence[str], num_processes: int) -> list[str]:
    """The command line that runs a script on so many processes of this machine.

    Everything that accelerate would take from the user's own `accelerate config` is named, so that a file which was
    made for something else (FSDP, two machines, one GPU) changes nothing here.

    Args:
        script: A file and its arguments, or "-m", a module and its arguments.
        num_processes: One is started without a launcher.
    """
    if num_processes == 1:
        return [sys.executable, *script]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes",
        str(num_processes), "--num_machines", "1", "--machine_rank", "0", "--gpu_ids", "all", "--main_process_port", "0",
        "--rdzv_backend", "static", "--mixed_precision", "no", "--dynamo_backend", "no", *script,
    ]  # fmt: skip


def nccl_settings(capabilities: Sequence[tuple[int, int]], nvlink: bool) -> dict[str, str]:
    """What NCCL must be told where the cards cannot write into each other's memory.

    T4s (compute capability 7.5) have no NVLink; peer-to-peer transfers over PCIe, or the search for InfiniBand, can
    hang without a word on virtual machines (https://github.com/huggingface/accelerate/issues/1622).
    """
    if len(capabilities) < 2 or nvlink or (7, 5) not in capabilities:
        return {}
    return {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def environment(user: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a stage's processes: the user's, and before them what these cards and this platform need."""
    capabilities = [torch.cuda.get_device_capability(card) for card in range(torch.cuda.device_count())]
    settings = nccl_settings(capabilities, nvlink=len(capabilities) > 1 and has_nvlink())
    for name, value in settings.items():
        if name not in user:
            logger.info("%s=%s: cards of compute capability 7.5 without NVLink", name, value)
    return {**settings, **cache_settings(user), **user}


def has_nvlink() -> bool:
    """Whether any two cards are linked, by the matrix of `nvidia-smi topo -m`; unknown counts as no."""
    try:
        told = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"\bNV\d+\b", told.stdout) is not None  # "NV2" in a cell; the legend says "NV#"


@contextlib.contextmanager
def no_cuda_context() -> Iterator[None]:
    """Let this process read a stage's configuration without a CUDA context on the first card.

    A context takes some hundred MB of a card that a stage's own process needs, for as long as `rlhf run` lives. Asking
    for a card's name and capability opens none, but the Trainer's arguments call `torch.cuda.set_device`, which does
    since torch 2.8 with CUDA 12 (`c10::cuda::SetDevice(device, force)`); the first card is the current one anyway.
    """
    with mock.patch.object(torch.cuda, "set_device", lambda device: None):
        yield


def start(script: Sequence[str], num_processes: int) -> int:
    """Run a script on so many processes to its end, after a check that several reach each other.

    Returns:
        The exit status: of the launcher where there are several processes.

    Raises:
        LaunchError: if the processes do not reach each other.
    """
    if num_processes > 1:
        check_all_reduce(num_processes)
    words = command(script, num_processes)
    logger.info("%s", " ".join(words))
    process = subprocess.Popen(words, env=environment())
    with _stopped_at_the_end(process):
        return process.wait()


@functools.cache  # once, before the first stage of a run that has several processes
def check_all_reduce(num_processes: int, timeout: float = SECONDS_TO_MEET) -> float:
    """Start processes as a stage's are started, and let them add up numbers together: NCCL on GPUs, gloo on a CPU.

    Args:
        num_processes: As many as the stage will have.
        timeout: Seconds from when the last of them came up.

    Returns:
        Seconds from the first that came up to the end.

    Raises:
        LaunchError: saying how far they came, and what helps.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf_all_reduce_") as name, tempfile.TemporaryFile("w+") as output:
        folder = Path(name)
        words = command([__file__, name], num_processes)
        process = subprocess.Popen(words, env=environment(), stdout=output, stderr=output)
        began = time.monotonic()
        with _stopped_at_the_end(process):
            status = None
            # What counts is the sum: on a busy machine the launcher takes its time to end.
            while status is None and len(_ranks(folder, "done")) < num_processes:
                if _seconds_left(folder, began, timeout) <= 0:
                    break
                time.sleep(0.05)
                status = process.poll()
        if len(_ranks(folder, "done")) == num_processes:
            first = min(path.stat().st_mtime for path in folder.glob("up_*"))
            seconds = max(path.stat().st_mtime for path in folder.glob("done_*")) - first
            logger.info("%d processes reach each other: an all-reduce after %.1f s", num_processes, seconds)
            return seconds
        output.seek(0)
        raise LaunchError(_how_far(folder, num_processes, status, timeout, output.read()))


def _ranks(folder: Path, milestone: str) -> list[int]:
    return sorted(int(path.name.removeprefix(f"{milestone}_")) for path in folder.glob(f"{milestone}_*"))


def _seconds_left(folder: Path, began: float, timeout: float) -> float:
    up = [path.stat().st_mtime for path in folder.glob("up_*")]
    if up:
        return max(up) + timeout - time.time()
    return began + SECONDS_TO_IMPORT - time.monotonic()


def _how_far(folder: Path, num_processes: int, status: int | None, timeout: float, output: str) -> str:
    up, met, done = (_ranks(folder, milestone) for milestone in ("up", "met", "done"))
    every = set(range(num_processes))

    def missing(there: Sequence[int]) -> str:
        return ", ".join(map(str, sorted(every - set(there)))) or "none"

    if len(up) < num_processes:
        reached = f"rank {missing(up)} never came up"
    elif len(met) < num_processes:
        reached = f"all ranks came up, but rank {missing(met)} did not meet the others at their port"
    else:
        reached = (
            f"all ranks met, but rank {missing(done)} did not end the all-reduce: the cards do not reach each other"
        )
    ended = f"not within {timeout:g} s" if status is None else f"exit status {status}"
    lines = [f"An all-reduce over {num_processes} processes failed ({ended}): {reached}.", REMEDIES]
    last = [line for line in output.splitlines() if line.strip()][-5:]
    return "\n".join([*lines, *(["What they said last:"] if last else []), *(f"  {line}" for line in last)])


@contextlib.contextmanager
def _stopped_at_the_end(process: subprocess.Popen) -> Iterator[None]:
    """End what a process started along with it, on SIGTERM too: ranks are in sessions of their own and would go on."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set a handler
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if in_main_thread else None
    try:
        yield
    finally:
        if process.poll() is None:
            ranks = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *ranks):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.terminate()
            _, alive = psutil.wait_procs(ranks, timeout=SECONDS_TO_STOP)
            for each in (process, *alive):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _rank(folder: Path) -> None:
    """One rank of the check; a file marks each thing it has reached."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"up_{rank}").touch()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    (folder / f"met_{rank}").touch()
    total = torch.full((2**20,), rank + 1.0, device="cuda" if cuda else "cpu")  # 4 MB, as an adapter's gradients
    torch.distributed.all_reduce(total)
    if not torch.all(total == size * (size + 1) / 2):  # waits for the card
        raise LaunchError(f"rank {rank}: the sum is {total.unique().tolist()[:4]}, not {size * (size + 1) / 2}")
    (folder / f"done_{rank}").touch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
