"""The arithmetic of PPO's benchmarks, on measurements made up here; what they measure is not measured here."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ppo_vs_trl, ppo_scaling, critic_curves = load("ppo_vs_trl"), load("ppo_scaling"), load("critic_curves")


def side(speed, cpu, memory):
    return {
        "episodes_per_second": speed, "cpu_seconds_a_rollout": cpu, "peak_gib": memory, "peak_gib_after_imports": 0.5,
        "seconds": {"rollout": 1.0, "scoring": 2.0, "update": 3.0}, "gflop_per_second": 50.0,
    }  # fmt: skip


def test_ratios_are_medians_of_the_rounds_own_ratios():
    rounds = [
        {"head": side(3.0, 10, 1.0), "adapter": side(2.0, 15, 1.5), "trl": side(1.0, 40, 4.0)},  # a fast minute
        {"head": side(1.0, 12, 1.2), "adapter": side(0.5, 20, 1.5), "trl": side(0.5, 30, 4.0)},
        {"head": side(2.0, 11, 1.1), "adapter": side(1.0, 16, 1.5), "trl": side(0.5, 33, 4.4)},
    ]
    found = ppo_vs_trl.summary(rounds, threads=2)
    assert found["ratio"] == {"throughput": 3.0, "throughput_by_cpu_time": 3.0, "memory": 0.25}
    assert found["ratio_of_adapter"]["throughput"] == 2.0
    assert found["sides"]["head"]["episodes_per_second"] == 2.0 and found["rounds"] == 3
    assert found["sides"]["trl"]["seconds"] == {"rollout": 1.0, "scoring": 2.0, "update": 3.0}
    assert found["floor"]["seconds_a_rollout"] == pytest.approx(found["floor"]["gflop_a_rollout"] / 50, abs=0.01)


def test_the_floor_by_hand():
    """A block has 4 x 256 x 256 + 3 x 256 x 1024 weights and adapters of rank 8 beside its seven layers."""
    block = 262_144 + 786_432 + 8 * (4 * 512 + 3 * 1280)
    tokens = sum(map(len, ppo_vs_trl.prompts(32))) + 32 * 32
    assert all(60 <= len(prompt) <= 180 for prompt in ppo_vs_trl.prompts(32))
    trunk, head = 2 * 4 * block * tokens, 2 * 256 * 50_000 * 1024
    # a rollout once through both; old and reference log-probabilities, and a reward, without the head; 4 epochs there and back
    expected = (trunk + head) + (3 * trunk + 2 * head) + 8 * (trunk + head)
    assert ppo_vs_trl.floor_gflop() == pytest.approx(expected / 1e9)


def test_a_folder_without_trls_ppo_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_WITH_PPO", str(tmp_path))
    with pytest.raises(SystemExit, match=r"holds no TRL with PPO.*Unpack the wheel of TRL 1\.12\.0"):
        ppo_vs_trl.trl_with_ppo(tmp_path / "download")
    there = tmp_path / "other" / "trl" / "experimental" / "ppo"
    there.mkdir(parents=True)
    (there / "ppo_trainer.py").touch()
    assert ppo_vs_trl.trl_with_ppo(tmp_path / "download", tmp_path / "other") == tmp_path / "other"


def test_a_wheel_that_cannot_be_fetched_stops_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.delenv("TRL_WITH_PPO", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="cannot be fetched"):
        ppo_vs_trl.trl_with_ppo(tmp_path / "download")


def test_exponents_are_those_of_the_largest_two_sizes():
    measured = {
        10: {"seconds": 5.0, "own_gib": 1.0},
        100: {"seconds": 6.0, "own_gib": 1.0},
        200: {"seconds": 24.0, "own_gib": 1.0},
    }
    assert ppo_scaling.exponents(measured) == {"seconds": 2.0, "own_gib": 0.0}


def curve(*points):
    """Every measure has the same value, at seconds."""
    return [
        {"seconds": s, "episodes": 128 * place, **dict.fromkeys(critic_curves.MEASURES, value)}
        for place, (s, value) in enumerate(points)
    ]


def test_the_area_is_a_mean_over_the_time():
    """Trapezoids: half of 10 s at 1, then 20 s from 1 to 2; and the same cut off at 20 s, where the value is 1.5."""
    made = curve((0, 0.0), (10, 1.0), (30, 2.0))
    assert critic_curves.area(made, "kept", 30) == pytest.approx((5 + 30) / 30)
    assert critic_curves.area(made, "kept", 20) == pytest.approx((5 + 12.5) / 20)


@pytest.mark.parametrize(
    ("of_adapter", "default"), [((1.5, 1.2), "adapter"), ((1.5, 0.8), "head"), ((0.5, 0.8), "head")]
)
def test_the_default_is_the_critic_that_is_better_with_every_seed(of_adapter, default):
    """The curves are compared over the time that all of them have: 20 s, where the head's value is 1 throughout."""
    head = {seed: curve((0, 1.0), (20, 1.0), (40, 9.0)) for seed in (1, 2)}
    adapter = {seed: curve((0, value), (20, value)) for seed, value in zip((1, 2), of_adapter, strict=True)}
    found = critic_curves.summary({"head": head, "adapter": adapter})
    assert found["default"] == default and found["seconds"] == 20
    differences = found["head_minus_adapter"]["area"]["eval_objective/rlhf_reward"]
    assert differences == {1: pytest.approx(1 - of_adapter[0]), 2: pytest.approx(1 - of_adapter[1])}
    assert (
        found["sides"]["head"]["episodes"] == {1: 256, 2: 256}
        and found["sides"]["adapter"]["end"]["kept"][1] == of_adapter[0]
    )
