"""Two runs in one report: which systems are paired, what is said of a difference, and when nothing is claimed."""

import json
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.differences import difference_section
from evaluation.report import write_report
from evaluation.results import load_runs

KINDS = ("direct", "false_suggestion", "true_suggestion")
PERSONAS = 40


def make_system(run: Path, name: str, kept: int, first: int = 0) -> None:
    """A system that keeps the facts of personas 0 to `kept`; one fact a persona, `PERSONAS` of them from `first` on."""
    rows = [
        {"probe_id": f"p{i}/{kind}", "persona_id": f"p{i}", "persona": ["i am a baker ."], "history": [], "kind": kind,
         "fact_id": f"p{i}/job", "question": "?", "turn": 0, "split": "seen", "response": "x", "decoding": "greedy",
         "correct": kind == "direct" or i < kept}
        for i in range(first, first + PERSONAS) for kind in KINDS
    ]  # fmt: skip
    value = kept / PERSONAS
    row = {"value": value, "ci_low": value / 2, "ci_high": 1.0, "n": PERSONAS, "unit": "share of facts"}
    metrics = {"persona_consistency": row | {"higher_is_better": True}}
    folder = run / "evaluate" / name
    folder.mkdir(parents=True)
    (folder / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"metrics": metrics, "breakdown": [], "run": {}}))


def section(run: Path, other: Path):
    return difference_section(run, other, load_runs([run])[0], load_runs([other])[0])


def test_systems_of_the_same_name_are_paired(tmp_path):
    a, b = tmp_path / "new", tmp_path / "old"
    for run, sft, ppo in ((a, 20, 35), (b, 20, 15)):
        make_system(run, "sft", sft)
        make_system(run, "ppo", ppo)
        make_system(run, "silence", 0)
    found = section(a, b)
    assert [table.title for table in found.tables] == ["ppo: new less old", "sft: new less old"]  # the lead first
    ppo, sft = (table.rows[0] for table in found.tables)
    assert ppo[0].text.endswith("persona_consistency") and ppo[0].note == "n 40, 40 clusters"
    # 35/40 - 15/40; 20 of 40 differences are 1: 1.96 * .5 / sqrt(40) = .155, and the bootstrap's bounds lie near
    assert ppo[1].text == "+0.500"
    low, high = map(float, ppo[1].note.split(" to "))
    assert low == pytest.approx(0.345, abs=0.03) and high == pytest.approx(0.655, abs=0.03)
    assert (ppo[2].text, ppo[2].mark) == ("better", "good")
    assert ppo[3].text == "0.0002"  # the least of 10,000 swaps, 1 / 10,001, times the two differences
    assert ppo[4].text == "+50.00" and ppo[5].text == "0.875" and ppo[6].text == "0.375"
    assert sft[2] == ("no difference shown", "the interval contains 0", "") and sft[3].text == "1.0000"
    words = " ".join(found.notes)
    assert "Of 2 differences" in words and "sft: new less old: persona consistency +0.0 points" in words
    assert "the interval contains 0, so no difference is shown" in words


def test_a_worse_system_is_called_worse(tmp_path):
    make_system(tmp_path / "new", "ppo", 10)
    make_system(tmp_path / "old", "ppo", 40)
    row = section(tmp_path / "new", tmp_path / "old").tables[0].rows[0]
    assert row[1].text == "-0.750" and (row[2].text, row[2].mark) == ("worse", "bad")


def test_the_two_that_lead_are_paired_where_no_name_is_shared(tmp_path):
    make_system(tmp_path / "new", "dpo", 30)
    make_system(tmp_path / "new", "oracle", 40)
    make_system(tmp_path / "old", "ppo", 28)
    make_system(tmp_path / "old", "oracle", 40)
    found = section(tmp_path / "new", tmp_path / "old")
    assert [table.title for table in found.tables] == ["new / dpo less old / ppo"]
    assert "No system has the same name in both runs" in found.notes[1]


def test_a_run_with_itself_is_its_systems_with_sft(tmp_path):
    for name, kept in (("base", 3), ("sft", 10), ("dpo", 12), ("ppo", 40), ("oracle", 40)):
        make_system(tmp_path / "demo", name, kept)
    found = section(tmp_path / "demo", tmp_path / "demo")
    assert found.title == "Trained systems against SFT"
    assert [(table.title, table.rows[0][1].text) for table in found.tables] == [
        ("dpo less sft", "+0.050"), ("ppo less sft", "+0.750"),
    ]  # fmt: skip
    assert found.tables[0].columns[-2:] == ["dpo", "sft"]


def test_other_prompts_are_named_and_not_compared(tmp_path):
    make_system(tmp_path / "new", "ppo", 30)
    make_system(tmp_path / "old", "ppo", 30, first=5)
    found = section(tmp_path / "new", tmp_path / "old")
    assert found.tables == [] and "ppo and ppo were not compared: `persona_consistency`: 5 of the 40" in found.notes[1]


def test_command_line(tmp_path, capsys):
    make_system(tmp_path / "a/demo", "ppo", 30)
    make_system(tmp_path / "b/demo", "ppo", 20)
    arguments = ["report", str(tmp_path / "a/demo"), "--output", str(tmp_path / "out")]
    main([*arguments, "--compare", str(tmp_path / "b/demo")])
    text = (tmp_path / "out/report.md").read_text()
    assert f"## {tmp_path}/a/demo against {tmp_path}/b/demo" in text.replace(
        "\\_", "_"
    )  # of the same name: by their paths
    assert "No pair of systems was tested" not in text
    main(arguments)
    assert "No pair of systems was tested" in (tmp_path / "out/report.md").read_text()
    with pytest.raises(ValueError, match="`compare` needs one run"):
        write_report([tmp_path / "a/demo", tmp_path / "b/demo"], tmp_path / "out", tmp_path / "b/demo")
    with pytest.raises(SystemExit, match="nowhere"):
        main([*arguments, "--compare", str(tmp_path / "nowhere")])
