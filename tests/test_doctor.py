"""The findings on a machine, each by its facts: machines are faked; the facts of this one are gathered once."""

import io
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlhf import doctor
from rlhf.doctor import Card, Finding, Machine, examine, parse_cards, show

ROOT = Path(__file__).parents[1]
ARCHS = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")  # of a build for CUDA 12.8
FINE = {
    "requires": ("torch>=2.6", "trl>=1.16,<1.17"),
    "installed": {"torch": "2.9.1", "trl": "1.16.0", "bitsandbytes": "0.49.0"},
    "torch_cuda": "12.8",
    "arch_list": ARCHS,
    "bitsandbytes_cuda": ("126", "128"),
}
NONE = Machine(requires=FINE["requires"], installed={"torch": "2.9.1+cpu", "trl": "1.16.0"})
T4S = Machine(cards=(Card("Tesla T4", (7, 5), 15.8),) * 2, driver_cuda=(12, 8), **FINE)
H100 = Machine(cards=(Card("H100", (9, 0), 80.0),), driver_cuda=(13, 0), **FINE)
P100 = Machine(cards=(Card("Tesla P100", (6, 0), 17.1),), driver_cuda=(12, 8), **FINE)


def found(machine: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(machine)}


def problems(machine: Machine) -> dict[str, str]:
    return {finding.name: finding.status for finding in examine(machine) if finding.status != "ok"}


def test_machines_in_order():
    assert problems(NONE) == problems(T4S) == problems(H100) == {}
    assert found(NONE)["precision"].found == "float32" and found(H100)["precision"].found == "bf16"
    assert found(T4S)["precision"].found.startswith("fp16: capability 7.5 emulates bf16")
    assert found(T4S)["gpus"].found == "2: Tesla T4 (16 GB, 7.5), Tesla T4 (16 GB, 7.5)"
    assert found(T4S)["processes"].found.startswith("`rlhf run` starts 2, one a card")
    assert "it sets NCCL_P2P_DISABLE and NCCL_IB_DISABLE" in found(T4S)["processes"].found
    assert "NCCL" not in found(replace(T4S, nvlink=True))["processes"].found


def test_a_p100_has_no_kernels():
    assert problems(P100) == {"kernels": "fail"}
    assert "sm_60" in found(P100)["kernels"].found and "GPU T4 x2" in found(P100)["kernels"].remedy


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 5), ("sm_75",), True),
        ((8, 9), ("sm_80",), True),  # an Ada card runs Ampere's code
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),
        ((12, 0), ("sm_120",), True),
        ((9, 0), ("sm_90a",), True),
        ((7, 5), ("compute_80",), False),
    ],
)
def test_which_cards_a_build_runs_on(capability, archs, runs):
    machine = replace(H100, cards=(Card("a card", capability, 16.0),), arch_list=archs)
    assert (found(machine)["kernels"].status == "ok") is runs


CASES = {
    # name: the machine, the finding, its status, what it says, what it advises
    "old Python": (replace(NONE, python="3.10.14"), "python", "fail", "3.10.14", "3.11"),
    "not installed": (replace(NONE, requires=()), "packages", "warn", "is not installed", "-e ."),
    "a package missing": (replace(NONE, installed={"torch": "2.9"}), "packages", "fail", "trl is missing", "-c constr"),
    "a package too old": (
        replace(NONE, installed={"torch": "2.9", "trl": "1.15.2"}),
        "packages", "fail", "trl 1.15.2 is not <1.17,>=1.16", "pip install -c constraints.txt",
    ),
    "another version": (
        replace(NONE, tested={"trl": "1.16.1", "torch": "2.9.1+cpu"}),
        "packages", "warn", "trl 1.16.0 (tested 1.16.1)", "pip install -c constraints.txt",
    ),
    "a CPU build beside a card": (replace(T4S, torch_cuda=None), "torch", "fail", "but there is a Tesla T4", "cu1"),
    "an old driver": (
        replace(T4S, torch_cuda="13.0", driver_cuda=(12, 2)), "torch", "fail", "CUDA up to 12.2", "image's own",
    ),
    "a card that torch cannot use": (replace(T4S, cuda_available=False), "torch", "fail", "no card", "says why"),
    "Kaggle without a card": (
        replace(NONE, environment={"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}), "gpus", "warn", "none", "GPU T4 x2",
    ),
    "Colab without a card": (
        replace(NONE, environment={"COLAB_RELEASE_TAG": "r"}), "gpus", "warn", "none", "Change runtime type",
    ),
    "hidden cards": (
        replace(NONE, driver_cuda=(12, 8), environment={"CUDA_VISIBLE_DEVICES": ""}), "gpus", "warn", "hides", "unset",
    ),
    "a card in use": (
        replace(H100, cards=(Card("H100", (9, 0), 80.0, 9.1),)), "gpus", "warn", "9.1 GB of H100 are in use", "nvidia-smi",
    ),
    "unlike cards": (
        replace(H100, cards=(*H100.cards, *T4S.cards[:1])), "gpus", "warn", "H100", "CUDA_VISIBLE_DEVICES=",
    ),
    "one rank of a launch": (
        replace(T4S, environment={"WORLD_SIZE": "2", "RANK": "0"}),
        "processes", "warn", "WORLD_SIZE=2, RANK=0", "unset WORLD_SIZE RANK",
    ),
    "bf16 asked of a T4": (
        replace(T4S, environment={"ACCELERATE_MIXED_PRECISION": "bf16"}), "precision", "warn", "asks for bf16", "unset",
    ),
    "FlashAttention on a T4": (
        replace(T4S, installed={**FINE["installed"], "flash-attn": "2.8.3"}),
        "flash-attn", "warn", "needs capability 8.0", "attn_implementation",
    ),
    "an old torchao": (
        replace(NONE, installed={**NONE.installed, "torchao": "0.10.0"}),
        "torchao", "fail", "0.10.0: PEFT refuses LoRA", "pip uninstall -y torchao",
    ),
    "the last torchao that PEFT refuses": (
        replace(NONE, installed={**NONE.installed, "torchao": "0.15.1"}),
        "torchao", "fail", "0.15.1: PEFT refuses LoRA", "pip uninstall -y torchao",
    ),
    "an old bitsandbytes": (
        replace(T4S, installed={**FINE["installed"], "bitsandbytes": "0.45.5"}),
        "bitsandbytes", "warn", "0.45.5", "pip install -U 'bitsandbytes>=0.46.1'",
    ),
    "bitsandbytes without this CUDA": (
        replace(T4S, bitsandbytes_cuda=("118", "126")), "bitsandbytes", "warn", "no binary for CUDA 12.8", "BNB_CUDA",
    ),
    "bitsandbytes without CUDA": (
        replace(T4S, bitsandbytes_cuda=()), "bitsandbytes", "warn", "it has none", "pip install -U",
    ),
    "DeepSpeed without g++": (
        replace(NONE, installed={**NONE.installed, "deepspeed": "0.19.8"}, compiler=None),
        "deepspeed", "warn", "no g++", "apt-get install -y g++",
    ),
    "a stale lock": (
        replace(NONE, locks=((Path("/c/lock"), 3600.0),)), "locks", "fail", "wait for ever", "rm /c/lock",
    ),
    "a full disk": (replace(NONE, disk={"runs": 0.4, "models": 0.4}), "disk", "fail", "0 GB free", "delete old runs"),
    "a disk that runs full": (replace(NONE, disk={"runs": 3.0, "models": 90.0}), "disk", "warn", "checkpoints", "--output"),
    "little room for models": (replace(NONE, disk={"runs": 19.0, "models": 19.0}), "disk", "warn", "15 GB", "HF_HOME"),
    "little memory for two ranks": (
        replace(T4S, ram=(8.0, 31.0)), "memory", "warn", "4 GB for each of 2 ranks", "at most 1 billion",
    ),
    "no memory": (replace(T4S, ram=(3.0, 31.0)), "memory", "fail", "3 of 31 GB", "CUDA_VISIBLE_DEVICES=0"),
    "no network": (replace(NONE, hub=None), "hub", "warn", "cannot be fetched", "HF_HUB_OFFLINE=1"),
    "no network on Kaggle": (
        replace(T4S, hub=None, environment={"KAGGLE_KERNEL_RUN_TYPE": "Batch"}),
        "hub", "warn", "does not reply", "Settings > Internet",
    ),
    "too many threads": (
        replace(T4S, environment={"OMP_NUM_THREADS": "4"}), "threads", "warn", "OMP_NUM_THREADS=4 for 2", "set 2",
    ),
    "Kaggle elsewhere": (
        replace(T4S, environment={"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, folders={"runs": Path("/tmp/runs"),
                "models": Path("/root/.cache")}), "platform", "warn", "only /kaggle/working is kept", "cd /kaggle/working",
    ),
    "models in Kaggle's 20 GB": (
        replace(T4S, environment={"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, folders={
                "runs": Path("/kaggle/working/runs"), "models": Path("/kaggle/working/hf")}),
        "platform", "warn", "20 GB", "HF_HOME=",
    ),
    "Colab": (
        replace(T4S, environment={"COLAB_RELEASE_TAG": "release"}, folders={"runs": Path("/content/runs"),
                "models": Path("/root/.cache")}), "platform", "warn", "gone with the session", "/content/drive/MyDrive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_problem_with_its_remedy(case):
    machine, name, status, said, remedy = CASES[case]
    finding = found(machine)[name]
    assert finding.status == status and said in finding.found and remedy in finding.remedy


def test_every_finding_has_a_case_that_is_not_in_order():
    assert {case[1] for case in CASES.values()} | {"kernels"} == {finding.name for finding in examine(NONE)}


@pytest.mark.parametrize(
    ("machine", "name", "said"),
    [
        (replace(NONE, installed={**NONE.installed, "torchao": "0.16.0"}), "torchao", "0.16.0"),  # the first PEFT takes
        (replace(NONE, hub="offline"), "hub", "HF_HUB_OFFLINE is set"),
        (replace(NONE, has_token=False), "hub", "replies; no token, which gated models"),
        (replace(NONE, locks=((Path("/c/lock"), 30.0),)), "locks", "is being built"),
        (replace(T4S, installed=NONE.installed), "bitsandbytes", "for 4-bit bases: pip install"),
        (replace(T4S, torch_cuda="12.8", driver_cuda=(12, 2)), "torch", "CUDA up to 12.2"),  # minor versions are compatible
        (
            replace(T4S, environment={"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, folders={
                    "runs": Path("/kaggle/working/runs"), "models": Path("/root/.cache/huggingface/hub")}),
            "platform", "Kaggle (Batch): results in /kaggle/working/runs, models in /root/.cache",
        ),
        (
            replace(T4S, environment={"COLAB_RELEASE_TAG": "r"}, folders={
                    "runs": Path("/content/drive/MyDrive/runs"), "models": Path("/root/.cache")}),
            "platform", "Colab: results in /content/drive",
        ),
        (
            replace(T4S, environment={"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, folders={
                    "runs": Path("/kaggle/working/runs"), "models": Path("/kaggle/temp/huggingface/hub")}),
            "platform", "`rlhf run` sets HF_HOME=/kaggle/temp/huggingface for its stages",
        ),
        (replace(T4S, environment={"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}), "processes", "NCCL is told"),
    ],
)  # fmt: skip
def test_what_is_in_order_and_worth_saying(machine, name, said):
    assert found(machine)[name].status == "ok" and said in found(machine)[name].found


# The facts


LINES = "GPU-aa, Tesla T4, 7.5, 15360, 3\nGPU-bb, Tesla P100-PCIE-16GB, 6.0, 16384, 2048\n"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["Tesla T4", "Tesla P100-PCIE-16GB"]),
        ("", []),
        ("1", ["Tesla P100-PCIE-16GB"]),
        ("1,0", ["Tesla P100-PCIE-16GB", "Tesla T4"]),
        ("GPU-b", ["Tesla P100-PCIE-16GB"]),
        ("0,7,1", ["Tesla T4"]),
        ("-1", []),
    ],
)
def test_cards_are_read_from_nvidia_smi(visible, names):
    cards = parse_cards(LINES, visible)
    assert [card.name for card in cards] == names
    if visible is None:
        assert cards[0].capability == (7, 5) and cards[0].memory == pytest.approx(16.106, abs=1e-3)  # 15360 MiB
        assert cards[1].used == pytest.approx(2.147, abs=1e-3)


def test_no_driver_no_cards():
    assert parse_cards("", None) == ()


def test_locks_and_their_age(tmp_path):
    (tmp_path / "py311_cpu" / "ds_shm").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "ds_shm" / "lock"
    lock.touch()
    ((path, age),) = doctor._locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert path == lock and 0 <= age < 60
    assert doctor._locks({"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}) == ()


def test_a_hub_that_never_replies_is_not_waited_for():
    """It accepts the connection and says nothing; and a name server that does not reply holds even longer."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        answer = doctor._in_background(lambda: doctor._hub_seconds({"HF_ENDPOINT": endpoint}))
        assert answer(0.3) is None and time.monotonic() - began < 2
    assert doctor._hub_seconds({"HF_ENDPOINT": endpoint, "NO_PROXY": "*"}) is None  # nobody listens
    assert doctor._hub_seconds({"HF_HUB_OFFLINE": "1"}) == "offline"


def test_the_models_of_kaggle_are_looked_for_where_stages_keep_them(monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert doctor.machine().folders["models"] == Path("/kaggle/temp/huggingface/hub")


def test_this_machine(monkeypatch):
    """Without the stack, so within seconds; torch itself is asked on machines with a card alone."""
    code = "import sys; from rlhf import doctor; facts = doctor.machine(); print(facts.installed['torch'])\n"
    code += "assert facts.requires and facts.tested['trl']\n"
    code += "loaded = {'torch', 'transformers', 'trl'} & set(sys.modules)\nassert not loaded or facts.cards, loaded"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    import torch

    assert done.stdout.strip() == torch.__version__ and doctor._torch_cuda() == torch.version.cuda


# What is shown


def shown(findings, **how) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(findings, console, **how)
    return console.file.getvalue()


def test_the_table():
    machine = replace(P100, locks=((Path("/c/lock"), 3600.0),), hub=None)
    text = shown(examine(machine))
    assert "14 ok, 1 to look at, 2 that stop a training" in text
    assert "FAIL  kernels" in text and "→ rm /c/lock" in text and " ok    python" in text
    alone = shown(examine(machine), problems_alone=True)
    assert "14 ok, 1 to look at" in alone and "FAIL  kernels" in alone and "python " not in alone
    assert shown(examine(NONE), problems_alone=True).strip().startswith("this machine: 17 ok, 0 to look at, 0 that")


def test_the_command(monkeypatch, capsys):
    from rlhf.cli import main

    monkeypatch.setattr(doctor, "machine", lambda: T4S)
    main(["check"])
    assert "17 ok" in capsys.readouterr().out
    main(["check", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert len(printed) == 17 and set(printed[0]) == {"name", "status", "found", "remedy"}
    monkeypatch.setattr(doctor, "machine", lambda: P100)
    with pytest.raises(SystemExit) as end:
        main(["check", "--json"])
    assert end.value.code == 1
    kernels = [finding for finding in json.loads(capsys.readouterr().out) if finding["status"] == "fail"]
    assert [finding["name"] for finding in kernels] == ["kernels"]
