"""`make gpu-check` without a GPU: skipped by name, and rehearsed on a CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

PARAMETERS = {"SmolLM2-360M": 362e6, "TinyLlama-1.1B": 1.100e9, "Qwen2.5-7B": 7.616e9, "Llama-3.1-8B": 8.030e9}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_every_check_is_skipped_by_name(no_gpu, capsys, tmp_path):
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["checks"]) == 3 + len(gpu_check.TRAININGS) and found["card"] is None
    for result in found["checks"]:
        assert (result["status"], result["reason"]) == ("skipped", "no CUDA device")
    assert not list(tmp_path.iterdir())  # there is no card to name a file by


@pytest.mark.parametrize("name", gpu_check.SHAPES)
def test_shapes_are_those_of_the_models(name):
    """By the number of parameters that each model's page on the Hub gives (2026-11-21)."""
    config = gpu_check.SHAPES[name]
    with torch.device("meta"):
        model = gpu_check.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=2e-3)


def test_a_base_made_by_layers_is_whole(no_gpu):
    machine = gpu_check.Machine(rehearse=True)
    for name in ("Llama-3.1-8B", "Qwen2.5-7B"):
        model = gpu_check.base_model(machine, name, four_bit=True)
        whole = type(model)(machine.shape(name))
        assert [(n, p.shape) for n, p in model.named_parameters()] == [
            (n, p.shape) for n, p in whole.named_parameters()
        ]
        whole.load_state_dict(model.state_dict())
        ids = torch.tensor([[2, 3, 4, 5]])
        torch.testing.assert_close(model(ids).logits, whole(ids).logits)


def test_a_failure_is_a_result_and_the_exit_status(no_gpu, capsys, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("by hand")

    def measured(*args):
        raise gpu_check.Failed("too much", {"steps": 1})

    monkeypatch.setattr(gpu_check, "TRAININGS", (("SmolLM2-360M", "sft", False, 4, 512),))
    monkeypatch.setattr(gpu_check, "check_precision", broken)
    monkeypatch.setattr(gpu_check, "train", measured)
    assert gpu_check.main(["--rehearse"]) == 1
    results = {result["name"]: result for result in json.loads(capsys.readouterr().out)["checks"]}
    assert (
        results["precision"]["status"] == "failed" and "ZeroDivisionError: by hand" in results["precision"]["reason"]
    )
    assert results["kernels"]["status"] == "passed" and results["kernels"]["numbers"]["largest_difference"] < 1e-5
    assert results["sft on SmolLM2-360M"] | {"check_seconds": 0} == {
        "name": "sft on SmolLM2-360M", "status": "failed", "reason": "too much", "numbers": {"steps": 1},
        "check_seconds": 0,
    }  # fmt: skip
    assert results["plan against peak"]["status"] == "skipped"


@pytest.mark.slow
def test_rehearsal(no_gpu, capsys):
    assert gpu_check.main(["--rehearse"]) == 0
    results = json.loads(capsys.readouterr().out)["checks"]
    assert {result["status"] for result in results[:-1]} == {"passed"}
    for result in results[2:-1]:
        numbers = result["numbers"]
        assert numbers["steps"] >= gpu_check.STEPS and numbers["tokens_per_second"] > 0
        assert all(isinstance(loss, float) for loss in numbers["losses"])
