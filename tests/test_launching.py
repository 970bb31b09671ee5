"""How a stage starts: the command, NCCL's settings, the check that ranks reach each other (real ones, gloo), their end."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import ClusterConfig

from rlhf import launching, pipeline
from rlhf.launching import LaunchError, check_all_reduce, command, environment, nccl_settings, no_cuda_context, start

slow = pytest.mark.slow
DEMO = Path(__file__).parents[1] / "recipes" / "demo"


@pytest.fixture(autouse=True)
def check_anew():
    check_all_reduce.cache_clear()


def two_gpus(monkeypatch, capability=(7, 5)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *card: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *card: "a card")


# The command


def test_one_process_needs_no_launcher():
    assert command(["rlhf/sft.py", "--seed=1"], 1) == [sys.executable, "rlhf/sft.py", "--seed=1"]


@pytest.mark.parametrize("script", [["rlhf/sft.py", "--seed=1"], ["-m", "evaluation", "run", "--seed=1"]])
def test_a_configuration_of_accelerate_for_something_else_changes_nothing(script, tmp_path, monkeypatch):
    """What `accelerate config` left, for two machines, ZeRO-3 and one card, is read in any case."""
    other = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "use_cpu": False, "num_machines": 2,
        "num_processes": 8, "machine_rank": 1, "gpu_ids": "0", "mixed_precision": "bf16", "main_process_port": 29500,
        "main_process_ip": "10.0.0.1", "rdzv_backend": "c10d", "deepspeed_config": {"zero_stage": 3},
    }  # fmt: skip
    (tmp_path / "default_config.yaml").write_text(yaml.safe_dump(other))
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    read = ClusterConfig.from_yaml_file(tmp_path / "default_config.yaml")
    monkeypatch.setattr(accelerate_launch, "load_config_from_file", lambda path: read)
    words = command(script, 2)
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    arguments = accelerate_launch.launch_command_parser().parse_args(words[3:])
    arguments, defaults, _ = accelerate_launch._validate_launch_command(arguments)
    assert defaults is read
    assert arguments.multi_gpu and not arguments.use_deepspeed
    assert (arguments.num_processes, arguments.num_machines, arguments.machine_rank) == (2, 1, 0)
    assert (arguments.gpu_ids, arguments.mixed_precision, arguments.main_process_port) == ("all", "no", 0)
    assert (arguments.rdzv_backend, bool(arguments.module)) == ("static", script[0] == "-m")
    assert [arguments.training_script, *arguments.training_script_args] == script[script[0] == "-m" :]


# The environment


@pytest.mark.parametrize(
    ("capabilities", "nvlink", "set_to"),
    [
        ([(7, 5), (7, 5)], False, "1"),  # two T4s
        ([(7, 5), (7, 5)], True, None),  # two cards of the same generation that have a bridge
        ([(7, 5)], False, None),
        ([(8, 0), (8, 0)], False, None),
        ([], False, None),
    ],
)
def test_cards_without_a_direct_link(capabilities, nvlink, set_to):
    settings = nccl_settings(capabilities, nvlink)
    assert (settings.get("NCCL_P2P_DISABLE"), settings.get("NCCL_IB_DISABLE")) == (set_to, set_to)


def test_what_the_user_set_stays(monkeypatch):
    two_gpus(monkeypatch)
    monkeypatch.setattr(launching, "has_nvlink", lambda: False)
    assert environment({"A": "b"}) == {"A": "b", "NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    assert environment({"NCCL_P2P_DISABLE": "0"}) == {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "1"}


def test_models_lie_outside_of_what_kaggle_saves(monkeypatch):
    kaggle = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "XDG_CACHE_HOME": "/cache"}
    token = "/cache/huggingface/token"  # where `hf auth login` left it
    assert environment(kaggle) == {**kaggle, "HF_HOME": "/kaggle/temp/huggingface", "HF_TOKEN_PATH": token}
    assert environment({**kaggle, "HF_TOKEN_PATH": "/mine"})["HF_TOKEN_PATH"] == "/mine"
    for others in ({"COLAB_RELEASE_TAG": "r"}, {**kaggle, "HF_HOME": "/mine"}, {**kaggle, "HF_HUB_CACHE": "/mine"}):
        assert environment(others) == others


LEGEND = "\nLegend:\n  NV#  = Connection traversing a bonded set of # NVLinks\n"


@pytest.mark.parametrize(
    ("matrix", "linked"),
    [
        ("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n", False),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV2\nGPU1\tNV2\t X \n", True),
    ],
)
def test_nvlink_is_read_from_the_matrix(matrix, linked, monkeypatch):
    told = subprocess.CompletedProcess([], 0, matrix + LEGEND)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: told)
    assert launching.has_nvlink() is linked


def test_without_nvidia_smi_no_link_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert launching.has_nvlink() is False


# The parent


def test_the_parent_opens_no_context(tmp_path, monkeypatch):
    """The arguments of every stage are built, on a machine that seems to have two cards."""
    two_gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("a context on a card"))
    steps = pipeline.plan(DEMO, False, None, tmp_path / "run", {})
    (sft,) = [step for step in steps if step.stage == "sft"]
    pipeline._refuse_anew([sft], tmp_path)  # what `--continue_from` reads once more
    assert sft.configs[2].fp16 and not sft.configs[2].use_cpu and not torch.cuda.is_initialized()


def test_the_guard_is_needed_and_ends(monkeypatch):
    from transformers import TrainingArguments

    two_gpus(monkeypatch)
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    with no_cuda_context():
        TrainingArguments(report_to="none").device  # noqa: B018 - the property does it
    assert asked == []
    TrainingArguments(report_to="none").device  # noqa: B018
    assert asked == [torch.device("cuda:0")]


@pytest.mark.parametrize(
    ("stage", "processes"), [("sft", 2), ("reward", 2), ("dpo", 2), ("ppo", 2), ("evaluate", 2), ("pairs", 1)]
)
def test_every_stage_with_a_model_is_a_process_of_its_own(stage, processes, tmp_path, monkeypatch):
    two_gpus(monkeypatch)
    steps = pipeline.plan(DEMO, False, "pairs" if stage == "pairs" else None, tmp_path / "run", {})
    (step,) = [step for step in steps if step.stage == stage]
    started = []
    monkeypatch.setattr(launching, "start", lambda script, number: started.append((script, number)) or 0)
    pipeline._start(step, "a/checkpoint-8")
    ((script, number),) = started
    assert number == processes and script[-1] == "--resume_from_checkpoint=a/checkpoint-8"
    first = ["-m", "evaluation", "run"] if stage == "evaluate" else [str(DEMO.parents[1] / "rlhf" / f"{stage}.py")]
    assert script == [*first, *step.argv, script[-1]]


def test_a_stage_that_fails_or_was_not_started(tmp_path, monkeypatch):
    (step,) = [s for s in pipeline.plan(DEMO, False, "sft", tmp_path / "run", {}) if s.stage == "sft"]
    two_gpus(monkeypatch)
    monkeypatch.setattr(launching, "start", lambda script, number: 3)
    with pytest.raises(pipeline.RunError, match="'sft' failed; see .*training.log"):
        pipeline._start(step, None)

    def refuse(script, number):
        raise LaunchError("no port")

    monkeypatch.setattr(launching, "start", refuse)
    with pytest.raises(pipeline.RunError, match="'sft' was not started. no port"):
        pipeline._start(step, None)


# Several GPUs and no launcher


def test_a_script_alone_with_two_gpus_says_what_to_type(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    from rlhf.record import RunError, check_world_size

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(sys, "argv", ["rlhf/sft.py", "--config", "my recipe/sft.yaml"])
    for number, more in ((2, ""), (4, "--num_processes 4 ")):
        args._n_gpu = number
        with pytest.raises(RunError, match=f"One process sees {number} GPUs") as error:
            check_world_size(args)
        typed = f"--config_file accelerate_configs/two_t4.yaml {more}rlhf/sft.py --config 'my recipe/sft.yaml'\n"
        assert f"accelerate launch {typed}" in str(error.value)
        assert "CUDA_VISIBLE_DEVICES=0 python rlhf/sft.py --config 'my recipe/sft.yaml'" in str(error.value)


def test_zero_3_is_refused_by_name(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    from rlhf.record import RunError, check_world_size

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for zero_stage in (2, 3):
        args.deepspeed_plugin = type("Plugin", (), {"zero_stage": zero_stage})
        if zero_stage == 2:
            check_world_size(args)
            continue
        with pytest.raises(RunError, match="DeepSpeed ZeRO-3 .*4-bit.*two_t4_zero2.yaml"):
            check_world_size(args)


# The check, with real processes


@slow
def test_two_ranks_reach_each_other():
    assert 0 < check_all_reduce(2) < launching.SECONDS_TO_MEET
    assert check_all_reduce.cache_info().currsize == 1


@pytest.fixture
def one_of_two(monkeypatch):
    """The launcher starts rank 0 alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "command", lambda script, number: [sys.executable, *script])


def test_a_rank_that_never_comes(one_of_two):
    began = time.monotonic()
    with pytest.raises(LaunchError) as error:
        check_all_reduce(2, timeout=0.5)
    assert time.monotonic() - began < 60  # it waits for the import of torch and half a second, not for gloo's minutes
    said = str(error.value)
    assert said.startswith("An all-reduce over 2 processes failed (not within 0.5 s): rank 1 never came up.")
    for remedy in ("NCCL_P2P_DISABLE=1", "firewall", "NCCL_DEBUG=INFO", "CUDA_VISIBLE_DEVICES=0"):
        assert remedy in said
    assert not psutil.Process().children(recursive=True)


def test_a_launcher_that_takes_its_time_to_end_is_not_waited_for(monkeypatch):
    marks = "[Path(sys.argv[1], f'{mark}_{rank}').touch() for mark in ('up', 'met', 'done') for rank in (0, 1)]"
    code = f"import sys, time; from pathlib import Path; {marks}; time.sleep(600)"
    monkeypatch.setattr(launching, "command", lambda script, number: [sys.executable, "-c", code, script[1]])
    assert 0 <= check_all_reduce(2) < launching.SECONDS_TO_MEET
    assert not psutil.Process().children(recursive=True)


def test_a_rank_that_fails_is_quoted(monkeypatch):
    monkeypatch.setattr(launching, "command", lambda *args: [sys.executable, "-c", "raise OSError('no such card')"])
    with pytest.raises(LaunchError, match=r"\(exit status 1\): rank 0, 1 never came up") as error:
        check_all_reduce(2)
    assert str(error.value).splitlines()[-1] == "  OSError: no such card"


@pytest.mark.parametrize(
    ("marks", "reached"),
    [
        ({"up": 2}, "rank 0, 1 did not meet the others at their port"),
        ({"up": 2, "met": 2, "done": 1}, "all ranks met, but rank 1 did not end the all-reduce"),
    ],
)
def test_how_far_the_ranks_came(marks, reached, tmp_path):
    for milestone, number in marks.items():
        for rank in range(number):
            (tmp_path / f"{milestone}_{rank}").touch()
    assert reached in launching._how_far(tmp_path, 2, None, 20.0, "")


# The end


def test_several_processes_are_checked_first(monkeypatch):
    done = []
    monkeypatch.setattr(launching, "check_all_reduce", done.append)
    monkeypatch.setattr(launching, "command", lambda script, number: [sys.executable, *script])
    assert start(["-c", "raise SystemExit(7)"], 2) == 7 and done == [2]
    assert start(["-c", "pass"], 1) == 0 and done == [2]


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow)])
def test_what_a_stage_started_ends_with_it(sent, tmp_path):
    """A grandchild in a session of its own, as a rank is, which takes no hint."""
    file = tmp_path / "pid"
    rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    stage = (
        "import subprocess, sys, time, pathlib\n"
        f"child = subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)\n"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    code = (
        "import signal\nfrom rlhf import launching\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"launching.SECONDS_TO_STOP = 0.5\nlaunching.start(['-c', {stage!r}], 1)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=DEMO.parents[1], stderr=subprocess.DEVNULL)
    while not file.is_file() or not file.read_text():
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # until it ignores the signal
    ranks = psutil.Process(run.pid).children(recursive=True)
    assert int(file.read_text()) in {process.pid for process in ranks}
    run.send_signal(sent)
    assert run.wait(timeout=60) in (143, -signal.SIGINT)
    assert not [process for process in ranks if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
