"""Files written whole or not at all, JSON lines, and where a result comes from. Standard library only."""

import errno
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sacrebleu", "rouge-score")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """[`write_bytes`] of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """[`write_bytes`] of one JSON value. NaN and infinity are refused, since they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """[`write_bytes`] of one JSON object a line, in ASCII: some readers take a raw U+2028 for the end of a line.

    NaN and infinity are refused, as by [`write_json`].
    """
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSON-lines file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a line is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if type(rows[-1]) is not dict:
            raise ValueError(f"{path}:{number} is not a JSON object: {line[:60]}")
    return rows


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or what may be used of it, is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)  # safetensors has an exception of its own


def folder_hash(folder: str | Path) -> str:
    """SHA-256 by which a stage's result is named: of its adapter or model, or else its rows, or its systems' results."""
    folder = Path(folder)
    paths = [p for p in (folder / "adapter_model.safetensors", folder / "model.safetensors") if p.is_file()]
    paths = paths or sorted(p for p in folder.glob("*.jsonl") if p.name not in ("kept.jsonl", "rejected.jsonl"))
    paths = paths or sorted([*folder.glob("*/results.json"), *folder.glob("*/replies.jsonl")])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # piece by piece: a base can be larger than the memory
    return digest.hexdigest()


def source_hash(path: str | Path) -> str | None:
    """SHA-256 of a file, or of the files that lie in a folder and their names; None where there is neither."""
    path = Path(path)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for each in sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(each.name.encode() + b"\0" + each.stat().st_size.to_bytes(8))
        with each.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from; where the tree differs, "+changes-" and 8 digits of them.

    The digits are a hash of what was changed in known files and of the names of new ones, so that two states of a tree
    are not taken for one.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True).stdout
        lines = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or git is not there
    return commit.strip() + (f"+changes-{hashlib.sha256(changes + lines).hexdigest()[:8]}" if changes.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in PACKAGES}}
