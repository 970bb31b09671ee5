"""A stage's time and cost: pieces that add up, prices, and what a peak of memory is the peak of."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf import ledger
from rlhf.config import DataConfig, PriceConfig
from rlhf.files import write_json
from rlhf.ledger import kept_bytes, price_again, priced, prices_of, reset_peak_memory
from rlhf.pipeline import config_classes
from rlhf.record import read_record, stage


@pytest.fixture
def clock(monkeypatch):
    """Two GPUs, and seconds that pass when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(ledger, "gpus_held", lambda: 2)
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: now.seconds)
    return now


def run(folder, clock, seconds, fails=False, name="sft", **keys):
    config = DataConfig(dataset="d", **{k: v for k, v in keys.items() if k != "resume_from_checkpoint"})
    config = [config, *([resumed()] if keys.get("resume_from_checkpoint") else [])]
    try:
        with stage(name, folder, config, seed=1):
            clock.seconds += seconds
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return read_record(folder)


def resumed():
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="x", use_cpu=True, report_to="none", resume_from_checkpoint="checkpoint-2")


def test_pieces_add_up(tmp_path, clock):
    """100 s, broken off, and 80 s to the end: on two GPUs 0.1 hours, at 0.5 $ an hour 5 cents."""
    first = run(tmp_path, clock, 100, fails=True, rate_per_gpu_hour=0.5)
    assert first["status"] == "failed" and first["wall_seconds"] == 100 and len(first["pieces"]) == 1
    record = run(tmp_path, clock, 80, rate_per_gpu_hour=0.5)
    assert record["status"] == "done" and record["wall_seconds"] == 180
    assert [piece["status"] for piece in record["pieces"]] == ["failed", "done"]
    assert [piece["wall_seconds"] for piece in record["pieces"]] == [100, 80]
    assert record["cost"]["gpu_hours"] == pytest.approx(0.1, abs=1e-6)  # each piece is rounded to a millionth
    assert record["cost"]["total"] == pytest.approx(0.05, abs=1e-6)
    assert record["peak_memory_gb"] == max(piece["peak_memory_gb"] for piece in record["pieces"])


def test_what_a_stage_goes_on_with(tmp_path, clock):
    run(tmp_path, clock, 100)
    assert run(tmp_path, clock, 7)["wall_seconds"] == 7  # it was done, so this is another training
    assert run(tmp_path, clock, 5, resume_from_checkpoint=True)["wall_seconds"] == 12
    run(tmp_path, clock, 3, fails=True)
    assert run(tmp_path, clock, 9, name="dpo")["wall_seconds"] == 9  # another stage's folder


def test_the_time_of_a_killed_piece_is_kept(tmp_path, monkeypatch):
    """What stands on disk in the middle of a stage is what a kill leaves."""
    monkeypatch.setattr(ledger, "HEARTBEAT", 0.05)
    monkeypatch.setattr(ledger, "gpus_held", lambda: 1)
    began = time.perf_counter()
    with stage("sft", tmp_path, [], seed=1) as record:
        record["found"] = 7
        while (left := read_record(tmp_path)).get("wall_seconds", 0) < 0.3:
            time.sleep(0.02)
            assert time.perf_counter() - began < 60, "nothing keeps the record up to date"
    assert left["status"] == "running" and left["found"] == 7 and left["cost"]["gpu_hours"] > 0
    write_json(tmp_path / "metadata.json", left)
    with stage("sft", tmp_path, [], seed=1):
        pass
    record = read_record(tmp_path)
    assert [piece["status"] for piece in record["pieces"]] == ["killed", "done"]
    assert record["wall_seconds"] >= left["wall_seconds"] >= 0.3
    assert record["pieces"][0]["wall_seconds"] == left["wall_seconds"]


def test_no_heart_beats_when_the_stage_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "HEARTBEAT", 0.01)
    with stage("sft", tmp_path, [], seed=1):
        time.sleep(0.05)
    written = (tmp_path / "metadata.json").read_bytes()
    (tmp_path / "metadata.json").unlink()
    time.sleep(0.05)
    assert not (tmp_path / "metadata.json").exists() and b'"done"' in written


def test_prices():
    """Two hours at 0.5 $, and half a GB at 10 cents a GB and month."""
    cost = priced(2.0, 500_000_000, PriceConfig(rate_per_gpu_hour=0.5, storage_price=0.1))
    assert cost == {"gpu_hours": 2.0, "rate_per_gpu_hour": 0.5, "total": 1.0, "storage_price": 0.1,
                    "storage_per_month": 0.05}  # fmt: skip
    assert prices_of([DataConfig(dataset="d", storage_price=3.0)]).storage_price == 3.0
    assert (prices_of([]).rate_per_gpu_hour, prices_of([]).storage_price) == (0.35, 0.02)


@pytest.mark.parametrize("name", ["prepare", "base", "sft", "reward", "pairs", "dpo", "ppo", "evaluate"])
def test_every_stage_knows_the_prices(name):
    assert any(issubclass(cls, PriceConfig) for cls in config_classes(name))


def test_a_finished_stage_is_priced_again(tmp_path, clock):
    before = run(tmp_path, clock, 1800)
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(10))  # what came later costs nothing in this record
    price_again(tmp_path, PriceConfig(rate_per_gpu_hour=2.0, storage_price=0.5))
    record = read_record(tmp_path)
    assert record["cost"]["total"] == 2.0 and before["cost"]["total"] == 0.35  # one GPU-hour
    assert record["cost"]["storage_per_month"] == pytest.approx(record["kept_bytes"] / 2e9, abs=1e-6)
    assert {**record, "cost": None} == {**before, "cost": None}


def test_kept_bytes(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "checkpoint-2" / "b").write_bytes(bytes(23))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert kept_bytes(tmp_path) == 123


def test_what_the_peak_is_of(monkeypatch, tmp_path):
    def refused(*args):
        raise PermissionError("read-only /proc")

    monkeypatch.setattr(Path, "write_text", refused)
    assert reset_peak_memory().startswith("the process since it began")
    monkeypatch.undo()
    with stage("sft", tmp_path, [], seed=1):
        pass
    assert read_record(tmp_path)["peak_memory_of"] == reset_peak_memory()
