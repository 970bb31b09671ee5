"""Files are written whole or not at all; what is read back says where it is wrong."""

import hashlib
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from rlhf import files
from rlhf.files import folder_hash, read_jsonl, source_hash, write_bytes, write_json, write_jsonl, write_text


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "metadata.json"
    write_text(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os if broken == "fsync" else files.Path, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["metadata.json"]
    assert path.read_text() == "old"


def test_folders_are_made_and_bytes_kept(tmp_path):
    write_bytes(tmp_path / "a" / "b" / "x.bin", b"\r\n\xff")
    assert (tmp_path / "a" / "b" / "x.bin").read_bytes() == b"\r\n\xff"


def write_two(path: Path, row: dict) -> None:
    write_jsonl(path, [{"loss": 1.0}, row])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [write_json, write_two])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path, write, value):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="[Oo]ut of range float"):
        write(path, {"loss": value})
    assert path.read_text() == "old"


def test_rows_come_back_as_they_were(tmp_path):
    rows: list[dict] = [{"content": "a\u2028b\r\nc \u00e9\u6f22\U0001f600"}, {"content": ""}, {"n": [1, None, True]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert read_jsonl(tmp_path / "rows.jsonl", limit=2) == rows[:2]
    assert len((tmp_path / "rows.jsonl").read_bytes().splitlines()) == 3
    write_json(tmp_path / "rows.json", rows)
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == rows


@pytest.mark.parametrize(("line", "fault"), [('{"a": 1', "is not JSON"), ("[1]", "object"), ('"text"', "object")])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, fault):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
    with pytest.raises(ValueError, match=fault) as caught:
        read_jsonl(path)
    assert f"{path}:3 " in str(caught.value)
    assert read_jsonl(path, limit=1) == [{"a": 1}]  # what is not asked for is not read


def test_a_folder_of_results_is_named_by_those_of_each_system(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_text("2")
    (tmp_path / "b" / "replies.jsonl").write_text("1")
    assert folder_hash(tmp_path) == hashlib.sha256(b"b/replies.jsonl\x001b/results.json\x002").hexdigest()


def test_a_folder_is_named_by_its_weights_or_else_by_its_rows(tmp_path):
    (tmp_path / "rejected.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").write_text("2")
    (tmp_path / "a.jsonl").write_text("1")
    assert folder_hash(tmp_path) == hashlib.sha256(b"a.jsonl\x001b.jsonl\x002").hexdigest()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"w")
    assert folder_hash(tmp_path) == hashlib.sha256(b"adapter_model.safetensors\x00w").hexdigest()


def test_a_source_is_named_by_its_bytes_and_a_folder_also_by_its_names(tmp_path):
    write_text(tmp_path / "in" / "a.csv", "1,2\n")
    assert source_hash(tmp_path / "in" / "a.csv") == hashlib.sha256(b"1,2\n").hexdigest()
    assert source_hash(tmp_path / "in" / "b.csv") is None
    hashes = [source_hash(tmp_path / "in")]
    for change in (
        lambda: write_text(tmp_path / "in" / "a.csv", "1,3\n"),
        lambda: (tmp_path / "in" / "a.csv").rename(tmp_path / "in" / "b.csv"),
        lambda: write_text(tmp_path / "in" / "c.csv", ""),
    ):
        change()
        hashes.append(source_hash(tmp_path / "in"))
    assert len(set(hashes)) == 4 and None not in hashes


def test_two_states_of_a_changed_tree_are_told_apart(tmp_path, monkeypatch):
    def git(*words):
        names = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *names, *words], check=True, capture_output=True)

    package = tmp_path / "package" / "files.py"
    write_text(package, "one")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(files, "__file__", str(package))
    commit = files.git_commit()
    assert len(commit) == 40
    write_text(package, "two")
    two = files.git_commit()
    write_text(package, "three")
    assert two.startswith(f"{commit}+changes-") and files.git_commit() not in (two, commit)
