"""Is this machine fit? Section doctor of `rlhf check`: a list of findings, each with what to do about it.

`machine()` gathers the facts, without importing the stack and without opening a context on a card; each finding is a
small function of these facts. `rlhf check` prints them, `rlhf check --json` for programs.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "persona-rlhf"
HUB_SECONDS = 3.0
STALE_SECONDS = 15 * 60.0  # DeepSpeed builds its operators in a few minutes
KAGGLE = "KAGGLE_KERNEL_RUN_TYPE"
KAGGLE_WORKING = Path("/kaggle/working")
KAGGLE_CACHE = Path("/kaggle/temp/huggingface")
COLAB_DRIVE = Path("/content/drive")

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the section: `fail` stops a training, `warn` may."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Card:
    """A GPU as its driver knows it; memory in GB (10^9 bytes)."""

    name: str
    capability: tuple[int, int]
    memory: float
    used: float = 0.0


@dataclass(frozen=True)
class Machine:
    """The facts that the findings are made of.

    Args:
        python: Version of the interpreter.
        requires: What our package asks for, as its metadata says it; empty where it is not installed.
        tested: Version by package that the tests ran with, from constraints.txt; empty outside of a checkout.
        installed: Version by package of what is installed, names normalised.
        cards: The visible GPUs, by `nvidia-smi`.
        driver_cuda: The newest CUDA that the driver runs, None without a driver.
        torch_cuda: The CUDA that torch was built for, None for a CPU build.
        cuda_available: Whether torch can use a card. True where there is no card to ask for.
        arch_list: What torch has kernels for, as `torch.cuda.get_arch_list()`; empty where there is no card.
        bitsandbytes_cuda: The CUDA versions that bitsandbytes has binaries for, as "128".
        nvlink: Whether cards are linked directly.
        ram: Available and total, in GB.
        disk: Free space in GB by folder: "runs" and "models".
        folders: These two folders.
        cores: That this process may use.
        compiler: Path of g++.
        locks: Lock files of torch's extensions, with their age in seconds.
        hub: Seconds until the hub replied, None if it did not, "offline" where it was not asked.
        has_token: Whether there is a token for the hub.
        environment: The process' variables.
    """

    python: str = "3.11.0"
    requires: tuple[str, ...] = ()
    tested: Mapping[str, str] = field(default_factory=dict)
    installed: Mapping[str, str] = field(default_factory=dict)
    cards: tuple[Card, ...] = ()
    driver_cuda: tuple[int, int] | None = None
    torch_cuda: str | None = None
    cuda_available: bool = True
    arch_list: tuple[str, ...] = ()
    bitsandbytes_cuda: tuple[str, ...] = ()
    nvlink: bool = False
    ram: tuple[float, float] = (16.0, 16.0)
    disk: Mapping[str, float] = field(default_factory=lambda: {"runs": 100.0, "models": 100.0})
    folders: Mapping[str, Path] = field(default_factory=lambda: {"runs": Path("runs"), "models": Path("models")})
    cores: int = 4
    compiler: str | None = "/usr/bin/g++"
    locks: tuple[tuple[Path, float], ...] = ()
    hub: float | None | Literal["offline"] = 0.1
    has_token: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


# --- the findings ----------------------------------------------------------------------------------------------------


def python(machine: Machine) -> Finding:
    if Version(machine.python) < Version("3.11"):
        return Finding("python", "fail", machine.python, "needs 3.11 or newer: make a new environment with it")
    return Finding("python", "ok", f"{machine.python} (tested: 3.11)")


def packages(machine: Machine) -> Finding:
    """What is installed against the ranges of pyproject.toml and the exact versions of the tests."""
    name = "packages"
    if not machine.requires:
        return Finding(name, "warn", f"{DISTRIBUTION} is not installed here, so nothing says what it needs", INSTALL)
    wrong, other, number = [], [], 0
    for requirement in map(Requirement, machine.requires):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        number += 1
        key = canonicalize_name(requirement.name)
        version, tested = machine.installed.get(key), machine.tested.get(key)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        elif tested not in (None, version):
            other.append(f"{requirement.name} {version} (tested {tested})")
    if wrong:
        return Finding(name, "fail", "; ".join(wrong), INSTALL)
    if other:
        return Finding(name, "warn", "not the versions of the tests: " + ", ".join(other), INSTALL)
    return Finding(name, "ok", f"all {number} are in the ranges that are tested")


INSTALL = "pip install -c constraints.txt -e .   (leaves torch as it is)"


def torch_build(machine: Machine) -> Finding:
    """torch's CUDA against the driver's: a build runs under drivers of its major version, or of a later one."""
    version = machine.installed.get("torch", "not installed")
    built = f"torch {version}, " + (f"built for CUDA {machine.torch_cuda}" if machine.torch_cuda else "a CPU build")
    if not machine.cards:
        return Finding("torch", "ok", built)
    if machine.torch_cuda is None:
        remedy = "install a CUDA build: pip install torch --index-url https://download.pytorch.org/whl/cu126"
        return Finding("torch", "fail", f"{built}, but there is a {machine.cards[0].name}", remedy)
    driver = "unknown" if machine.driver_cuda is None else ".".join(map(str, machine.driver_cuda))
    both = f"{built}; the driver runs CUDA up to {driver}"
    if machine.driver_cuda is not None and int(machine.torch_cuda.partition(".")[0]) > machine.driver_cuda[0]:
        remedy = (
            "take the image's own torch (a fresh session), or a build of the driver's CUDA; never let pip change torch"
        )
        return Finding("torch", "fail", both, remedy)
    if not machine.cuda_available:
        remedy = 'python -c "import torch; torch.zeros(1).cuda()" says why; a new session often helps'
        return Finding("torch", "fail", f"{both}, yet torch can use no card", remedy)
    return Finding("torch", "ok", both)


def gpus(machine: Machine) -> Finding:
    """How many there are, and how they are used: one process each. Other memory in use is named."""
    where = platform_of(machine)
    if not machine.cards:
        hidden = machine.environment.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and machine.driver_cuda is not None:
            return Finding("gpus", "warn", f"none: CUDA_VISIBLE_DEVICES={hidden!r} hides them", "unset it")
        if where == "Kaggle":
            return Finding("gpus", "warn", "none", "Settings > Accelerator > GPU T4 x2")
        if where == "Colab":
            return Finding("gpus", "warn", "none", "Runtime > Change runtime type > T4 GPU")
        return Finding("gpus", "ok", "none: models of some million parameters train on the CPU, in float32")
    names = [f"{card.name} ({card.memory:.0f} GB, {_dotted(card.capability)})" for card in machine.cards]
    found = names[0] if len(names) == 1 else f"{len(names)}: {', '.join(names)}"
    busy = [card for card in machine.cards if card.used > 1]
    if busy:
        held = ", ".join(f"{card.used:.1f} GB of {card.name}" for card in busy)
        return Finding("gpus", "warn", f"{found}; {held} are in use", "nvidia-smi says by whom: restart that notebook")
    if len({(card.name, card.capability) for card in machine.cards}) > 1:
        remedy = "CUDA_VISIBLE_DEVICES=<the faster ones>: each step waits for the slowest card"
        return Finding("gpus", "warn", found, remedy)
    return Finding("gpus", "ok", found)


def ranks(machine: Machine) -> Finding:
    """One process that sees several cards would split its batches by DataParallel; TRL refuses that."""
    left = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in machine.environment]
    if left:
        found = ", ".join(f"{name}={machine.environment[name]}" for name in left)
        return Finding(
            "processes", "warn", f"{found}: this looks like one rank of a launch", f"unset {' '.join(left)}"
        )
    if len(machine.cards) < 2:
        return Finding("processes", "ok", "one")
    found = f"`rlhf run` starts {len(machine.cards)}, one a card; a script alone needs `accelerate launch`"
    if (7, 5) in [card.capability for card in machine.cards] and not machine.nvlink:
        off = [name for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if name not in machine.environment]
        said = f"; no NVLink: it sets {' and '.join(off)}" if off else "; NCCL is told of the missing NVLink"
        found += said
    return Finding("processes", "ok", found)


def kernels(machine: Machine) -> Finding:
    """A card whose kernels torch was not built with looks available, and fails at the first operation (a P100)."""
    if not machine.cards or not machine.arch_list:
        return Finding("kernels", "ok", "no card to check")
    without = [card for card in machine.cards if not _has_kernels(card.capability, machine.arch_list)]
    if not without:
        return Finding("kernels", "ok", f"torch has them for {', '.join(sorted({_sm(c) for c in machine.cards}))}")
    remedy = "use another card; on Kaggle: Settings > Accelerator > GPU T4 x2"
    found = f"torch has none for {without[0].name} ({_sm(without[0])}), only {' '.join(machine.arch_list)}"
    return Finding("kernels", "fail", found, remedy)


def _has_kernels(capability: tuple[int, int], arch_list: Sequence[str]) -> bool:
    """Machine code runs on later cards of its generation, PTX ("compute_") on every later card (CUDA C++ guide, 5)."""
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(arch_list)):
        major, minor = int(digits[:-1]), int(digits[-1])
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return True
    return False


def precision(machine: Machine) -> Finding:
    """By capability: `torch.cuda.is_bf16_supported()` says yes on a T4, where bf16 is emulated."""
    if not machine.cards:
        return Finding("precision", "ok", "float32")
    lowest = min(card.capability for card in machine.cards)
    if lowest >= (8, 0):
        return Finding("precision", "ok", "bf16")
    asked = [name for name in ("ACCELERATE_MIXED_PRECISION",) if machine.environment.get(name, "no").lower() == "bf16"]
    found = f"fp16: capability {_dotted(lowest)} emulates bf16, several times slower"
    if asked:
        return Finding("precision", "warn", f"{found}, and {asked[0]} asks for bf16", f"unset {asked[0]}")
    return Finding("precision", "ok", found)


def flash_attention(machine: Machine) -> Finding:
    version = machine.installed.get("flash-attn")
    if version is None or not machine.cards:
        return Finding("flash-attn", "ok", "not installed; sdpa is used" if version is None else f"{version}, unused")
    if min(card.capability for card in machine.cards) < (8, 0):
        found = f"{version}, which needs capability 8.0"
        return Finding("flash-attn", "warn", found, "leave `attn_implementation` out, or set sdpa")
    return Finding("flash-attn", "ok", version)


def torchao(machine: Machine) -> Finding:
    """PEFT 0.21 raises for plain LoRA where it finds an older one (peft/import_utils.py, is_torchao_available)."""
    version = machine.installed.get("torchao")
    if version is None:
        return Finding("torchao", "ok", "not installed, nor needed")
    if Version(version) < Version("0.16.0"):
        return Finding("torchao", "fail", f"{version}: PEFT refuses LoRA below 0.16", "pip uninstall -y torchao")
    return Finding("torchao", "ok", version)


def bitsandbytes(machine: Machine) -> Finding:
    """Needed for `load_in_4bit` alone. It loads the binary of torch's own CUDA version."""
    version, name = machine.installed.get("bitsandbytes"), "bitsandbytes"
    upgrade = "pip install -U 'bitsandbytes>=0.46.1'"
    if version is None:
        return Finding(name, "ok", f"not installed; for 4-bit bases: {upgrade}")
    if Version(version) < Version("0.46.1"):
        return Finding(name, "warn", f"{version}: transformers wants 0.46.1 for 4-bit bases", upgrade)
    wanted = "".join((machine.torch_cuda or "").split(".")[:2])
    if machine.cards and wanted and wanted not in machine.bitsandbytes_cuda:
        has = ", ".join(machine.bitsandbytes_cuda) or "none"
        found = f"{version} has no binary for CUDA {machine.torch_cuda} of torch (it has {has})"
        return Finding(name, "warn", found, f"{upgrade}, or BNB_CUDA_VERSION=<one that it has>")
    return Finding(name, "ok", version)


def compiler(machine: Machine) -> Finding:
    version = machine.installed.get("deepspeed")
    if version is None:
        return Finding(
            "deepspeed", "ok", "not installed; two_t4_zero2.yaml alone needs it: pip install -e '.[deepspeed]'"
        )
    if machine.compiler is None:
        return Finding("deepspeed", "warn", f"{version}, but no g++ to build its operators", "apt-get install -y g++")
    return Finding("deepspeed", "ok", f"{version}, g++ is there")


def locks(machine: Machine) -> Finding:
    """A build that was killed leaves its lock, and every later one waits for it without a word."""
    stale = [path for path, age in machine.locks if age > STALE_SECONDS]
    if stale:
        found = f"left by a build that was killed: {', '.join(map(str, stale))}"
        return Finding("locks", "fail", f"{found}; DeepSpeed would wait for ever", f"rm {' '.join(map(str, stale))}")
    if machine.locks:
        return Finding("locks", "ok", f"an extension is being built: {machine.locks[0][0]}")
    return Finding("locks", "ok", "no build of an extension was broken off")


def disk(machine: Machine) -> Finding:
    """Adapters and their checkpoints are small; a base model is not."""
    runs, models = machine.disk["runs"], machine.disk["models"]
    found = f"{runs:.0f} GB free for runs ({machine.folders['runs']}), {models:.0f} GB for models ({machine.folders['models']})"
    remedy = "delete old runs (`du -sh runs/*`), or `--output_dir` on another disk; models go to HF_HOME"
    if runs < 1 or models < 1:
        return Finding("disk", "fail", found, remedy)
    if runs < 5 or models < 20:
        what = "checkpoints" if runs < 5 else "a base of 7 billion parameters, which takes 15 GB"
        return Finding("disk", "warn", f"{found}: little for {what}", remedy)
    return Finding("disk", "ok", found)


def memory(machine: Machine) -> Finding:
    """Each rank reads the checkpoint itself, and importing the stack takes about 1 GB."""
    available, total = machine.ram
    number = max(1, len(machine.cards))
    each = available / number
    found = f"{available:.0f} of {total:.0f} GB are free"
    found += f", {each:.0f} GB for each of {number} ranks, which all load the base" if number > 1 else ""
    if each < 2:
        return Finding("memory", "fail", found, "close other notebooks, or use one GPU: CUDA_VISIBLE_DEVICES=0")
    if each < 5:
        return Finding(
            "memory", "warn", found, "close other notebooks, and take a base of at most 1 billion parameters"
        )
    return Finding("memory", "ok", found)


def hub(machine: Machine) -> Finding:
    """Whether base models can be fetched."""
    token = (
        "" if machine.has_token else "; no token, which gated models (Llama, Gemma) need: HF_TOKEN or `hf auth login`"
    )
    if machine.hub == "offline":
        return Finding("hub", "ok", "HF_HUB_OFFLINE is set: models come from the cache or from a folder")
    if machine.hub is None:
        remedy = "set HF_HUB_OFFLINE=1 and name a base in a folder or in the cache"
        if platform_of(machine) == "Kaggle":
            remedy = (
                "Settings > Internet > on (needs a verified phone number), or attach the model as input and " + remedy
            )
        return Finding("hub", "warn", "does not reply: base models cannot be fetched", remedy)
    return Finding("hub", "ok", f"replies{token}")


def threads(machine: Machine) -> Finding:
    """accelerate gives each of several ranks one thread unless OMP_NUM_THREADS says otherwise."""
    number = max(1, len(machine.cards))
    said = machine.environment.get("OMP_NUM_THREADS")
    if said is None:
        each = "one thread each" if number > 1 else "as many threads as cores"
        return Finding("threads", "ok", f"{machine.cores} cores, OMP_NUM_THREADS is not set: {each}")
    found = f"{machine.cores} cores, OMP_NUM_THREADS={said}"
    if not said.isdecimal() or int(said) * number > machine.cores:
        most = max(1, machine.cores // number)
        return Finding(
            "threads", "warn", f"{found} for {number} process(es): they slow each other down", f"set {most}"
        )
    return Finding("threads", "ok", found)


def platform(machine: Machine) -> Finding:
    """Where results stay, on Kaggle and Colab, once the session has ended."""
    where, runs, models = platform_of(machine), machine.folders["runs"], machine.folders["models"]
    if where == "Kaggle":
        kind = machine.environment.get(KAGGLE, "")
        found = f"Kaggle ({kind}): results in {runs}, models in {models}"
        if not runs.is_relative_to(KAGGLE_WORKING):
            return Finding("platform", "warn", f"{found}; only {KAGGLE_WORKING} is kept", f"cd {KAGGLE_WORKING}")
        if models.is_relative_to(KAGGLE_WORKING):
            remedy = "HF_HOME=/kaggle/temp/huggingface"
            return Finding("platform", "warn", f"{found}, which take from the 20 GB of {KAGGLE_WORKING}", remedy)
        own = f"; `rlhf run` sets HF_HOME={KAGGLE_CACHE} for its stages" if cache_settings(machine.environment) else ""
        return Finding("platform", "ok", f"{found}; {KAGGLE_WORKING} keeps 20 GB of a saved version{own}")
    if where == "Colab":
        found = f"Colab: results in {runs}"
        if runs.is_relative_to(COLAB_DRIVE):
            return Finding("platform", "ok", found)
        remedy = f"mount your Drive, and add --output_dir {COLAB_DRIVE}/MyDrive/runs/<recipe>"
        return Finding("platform", "warn", f"{found}, which is gone with the session", remedy)
    return Finding("platform", "ok", f"{sys.platform}, neither Kaggle nor Colab")


def platform_of(machine: Machine) -> str | None:
    """Kaggle or Colab, by the variables that they set."""
    if KAGGLE in machine.environment:
        return "Kaggle"
    return "Colab" if "COLAB_RELEASE_TAG" in machine.environment else None


def cache_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Where stages keep models on Kaggle: on its scratch disk, since its 20 GB of output are saved with the version.

    A place that the user set stays, and so does a token that was stored by `hf auth login`.
    """
    if KAGGLE not in environment or {"HF_HOME", "HF_HUB_CACHE"} & environment.keys():
        return {}
    return {"HF_HOME": str(KAGGLE_CACHE), "HF_TOKEN_PATH": str(_hub_home(environment) / "token")}


FINDINGS: tuple[Callable[[Machine], Finding], ...] = (
    platform, python, packages, torch_build, gpus, kernels, precision, ranks, flash_attention, torchao, bitsandbytes,
    compiler, locks, disk, memory, threads, hub,
)  # fmt: skip


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _sm(card: Card) -> str:
    return f"sm_{card.capability[0]}{card.capability[1]}"


# --- the facts -------------------------------------------------------------------------------------------------------


def machine() -> Machine:
    """The facts of this machine. Half a second, the hub's reply not counted, for which it waits a few seconds at most."""
    environment = dict(os.environ)
    of_stages = {**environment, **cache_settings(environment)}
    cards = _cards(environment.get("CUDA_VISIBLE_DEVICES"))
    folders = {"runs": Path("runs").resolve(), "models": _models_folder(of_stages)}
    asked = _in_background(lambda: _hub_seconds(environment))
    available, nvlink = True, False
    archs: tuple[str, ...] = ()
    if cards:  # else torch, which takes a second or more to import, would have nothing to say
        import torch

        from rlhf.launching import has_nvlink

        available, archs = torch.cuda.is_available(), tuple(torch.cuda.get_arch_list())
        nvlink = len(cards) > 1 and has_nvlink()
    ram = psutil.virtual_memory()
    return Machine(
        python=sys.version.split()[0],
        requires=_requires(),
        tested=_tested(),
        installed=_installed(),
        cards=cards,
        driver_cuda=_driver_cuda(),
        torch_cuda=_torch_cuda(),
        cuda_available=available,
        arch_list=archs,
        bitsandbytes_cuda=_bitsandbytes_cuda(),
        nvlink=nvlink,
        ram=(ram.available / 1e9, ram.total / 1e9),
        disk={name: _free(folder) for name, folder in folders.items()},
        folders=folders,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        compiler=shutil.which("g++"),
        locks=_locks(environment),
        hub=asked(HUB_SECONDS + 0.5),
        has_token="HF_TOKEN" in environment or (_hub_home(environment) / "token").is_file(),
        environment=environment,
    )


def _requires() -> tuple[str, ...]:
    """pyproject.toml in a checkout, whose installed metadata may be those of an older commit."""
    if (ROOT / "pyproject.toml").is_file():
        return tuple(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])
    try:
        return tuple(importlib.metadata.requires(DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _tested() -> dict[str, str]:
    path = ROOT / "constraints.txt"
    pinned = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else []
    return {canonicalize_name(name): version for name, version in pinned}


def _installed() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(KeyError, TypeError):  # a folder that was half uninstalled has no name
            found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return found


def _torch_cuda() -> str | None:
    """What torch.version.cuda says, from that file alone."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")


def _nvidia_smi(*arguments: str) -> str:
    try:
        told = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout if told.returncode == 0 else ""


def _cards(visible: str | None) -> tuple[Card, ...]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, by their numbers or by what their UUIDs begin with."""
    query = "--query-gpu=uuid,name,compute_cap,memory.total,memory.used"
    return parse_cards(_nvidia_smi(query, "--format=csv,noheader,nounits"), visible)


def parse_cards(csv: str, visible: str | None) -> tuple[Card, ...]:
    """Cards from nvidia-smi's lines "uuid, name, capability, total MiB, used MiB"."""
    cards: dict[str, Card] = {}
    for line in csv.splitlines():
        uuid, name, capability, total, used = (word.strip() for word in line.split(","))
        major, minor = map(int, capability.split("."))
        cards[uuid] = Card(name, (major, minor), float(total) * 2**20 / 1e9, float(used) * 2**20 / 1e9)
    if visible is None:
        return tuple(cards.values())
    seen = []
    for word in filter(None, (word.strip() for word in visible.split(","))):
        if word.isdecimal() and int(word) < len(cards):
            seen.append(list(cards.values())[int(word)])
        elif matching := [card for uuid, card in cards.items() if uuid.startswith(word)]:
            seen.append(matching[0])
        else:
            break  # as CUDA has it: the first that is not there ends the list
    return tuple(seen)


def _driver_cuda() -> tuple[int, int] | None:
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _nvidia_smi())
    return (int(found[1]), int(found[2])) if found else None


def _bitsandbytes_cuda() -> tuple[str, ...]:
    spec = importlib.util.find_spec("bitsandbytes")  # finds it without importing it, which would look for a card
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = [path.name for folder in folders for path in Path(folder).glob("libbitsandbytes_cuda*")]
    return tuple(sorted({match[1] for name in names if (match := re.search(r"_cuda(\d+)", name))}))


def _hub_home(environment: Mapping[str, str]) -> Path:
    cache = Path(environment.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(environment.get("HF_HOME", cache / "huggingface")).expanduser()


def _models_folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HF_HUB_CACHE", _hub_home(environment) / "hub")).expanduser()


def _free(folder: Path) -> float:
    """Free space in GB where a folder is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free / 1e9


def _locks(environment: Mapping[str, str]) -> tuple[tuple[Path, float], ...]:
    """torch writes a file `lock` into the folder of an extension while it builds it (torch.utils.file_baton)."""
    folder = Path(environment.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    now = time.time()
    return tuple((path, now - path.stat().st_mtime) for path in sorted(folder.rglob("lock")))


def _hub_seconds(environment: Mapping[str, str]) -> float | None | Literal["offline"]:
    offline = {environment.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    if offline & {"1", "ON", "YES", "TRUE"}:  # the values that huggingface_hub takes for yes
        return "offline"
    request = urllib.request.Request(environment.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it replied
    except (OSError, ValueError):
        return None
    return time.monotonic() - began


def _in_background(
    ask: Callable[[], float | None | Literal["offline"]],
) -> Callable[[float], float | None | Literal["offline"]]:
    """Start to ask; the returned function gives the answer, or None if there is none after so many seconds.

    A name server that does not reply holds a request longer than its timeout says, so the thread is left alone then.
    """
    answers: list[float | None | Literal["offline"]] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()

    def answer(seconds: float) -> float | None | Literal["offline"]:
        thread.join(seconds)
        return answers[0] if answers else None

    return answer


# --- what is shown ---------------------------------------------------------------------------------------------------


def examine(facts: Machine | None = None) -> list[Finding]:
    """All findings of a machine; None is this one."""
    facts = facts or machine()
    return [finding(facts) for finding in FINDINGS]


def show(findings: Sequence[Finding], console: Console | None = None, problems_alone: bool = False) -> None:
    """Print the findings with their remedies, and how many of each kind there are.

    Args:
        findings: All of them.
        console: Where to print; None is the terminal.
        problems_alone: Whether to leave out what is in order, but for its number.
    """
    console = console or Console()
    listed = Table(show_header=False, box=None, padding=(0, 1))
    styles = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        style = styles[finding.status]
        if finding.status == "ok" and problems_alone:
            continue
        said = Text(finding.found, style="" if finding.status == "ok" else style)
        if finding.remedy:
            said.append(f"\n→ {finding.remedy}", style="bold")
        mark = Text("ok", style=style) if finding.status == "ok" else Text(finding.status.upper(), f"reverse {style}")
        listed.add_row(mark, Text(finding.name, style="bold"), said)
    number = {status: sum(finding.status == status for finding in findings) for status in styles}
    title = f"this machine: {number['ok']} ok, {number['warn']} to look at, {number['fail']} that stop a training"
    console.print(Panel(listed, title=title, title_align="left", border_style="cyan") if listed.rows else Text(title))
