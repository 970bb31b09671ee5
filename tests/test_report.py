"""The report is built from a small invented run folder: what is copied, what is claimed, what is said to be missing."""

import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from evaluation import charts
from evaluation.__main__ import main
from evaluation.report import write_report
from evaluation.results import System
from evaluation.sections import make_sections

SLOTS = {
    "pet": ("my pet is a {} .", "what pet do you have ?", ["dog", "cat", "parrot", "horse"]),
    "job": ("i work as a {} .", "what do you do for a living ?", ["baker", "nurse", "pilot", "clerk"]),
    "drink": ("i always drink {} .", "what do you like to drink ?", ["tea", "juice", "coffee", "milk"]),
    "hobby": ("i enjoy {} .", "how do you spend your evenings ?", ["chess", "yoga", "painting", "gardening"]),
}
# kept facts with 95 % interval, then the shares of right answers to direct, false and true suggestions
SYSTEMS = {
    "base": ((0.860, 0.812, 0.901), (0.95, 0.91, 0.97)),
    "sft": ((0.577, 0.548, 0.607), (0.68, 0.30, 1.00)),
    "dpo": ((0.922, 0.8499, 0.9431), (0.97, 0.94, 0.99)),
    "ppo": ((0.955, 0.931, 0.974), (0.98, 0.97, 0.99)),
    "oracle": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "wrong_persona": ((0.041, 0.022, 0.064), (0.06, 0.30, 0.20)),
    "silence": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
}
KINDS = ("direct", "false_suggestion", "true_suggestion")
ARROWS = {
    "perplexity_token": False,
    "repetition": False,
    "copy_rate": False,
    "question_rate": None,
    "length_words": None,
}
METRICS = {
    "keyword_score": (0.213, "share"),
    "copy_rate": (0.021, "share"),
    "perplexity_token": (3.421, "per token"),
    "bleu": (18.42, "0 to 100"),
    "rougeL": (0.447, "share"),
    "f1": (0.402, "share"),
    "distinct_1": (0.061, "share"),
    "distinct_2": (0.184, "share"),
    "ead": (0.184, "ratio"),
    "question_rate": (0.112, "share"),
    "length_words": (6.83, "words"),
    "repetition": (0.004, "share"),
}
HOSTILE = "<script>alert(1)</script> | **x** `y` &amp; \ud800"


def score(value: float, low: float, high: float, n: int, unit: str = "share", better: bool | None = True) -> dict:
    return {"value": value, "ci_low": low, "ci_high": high, "n": n, "unit": unit, "higher_is_better": better}


def part(share: float, n: int, **where: str | int) -> dict:
    half = 1.96 * (share * (1 - share) / n) ** 0.5
    row = {"metric": "persona_consistency", "decoding": "greedy", "kind": "all", "turn": "all", "split": "all"} | where
    return row | {"value": share, "ci_low": max(0, share - half), "ci_high": min(1, share + half), "n": n}


def write(path: Path, content: dict | list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def probes() -> list[dict]:
    generator = random.Random(1)
    rows = []
    for person in range(12):
        values = {slot: generator.choice(spec[2]) for slot, spec in SLOTS.items()}
        persona = [SLOTS[slot][0].format(value) for slot, value in values.items()]
        for slot, value in values.items():
            foil = generator.choice([other for other in SLOTS[slot][2] if other != value])
            for turn in (0, 5):
                chat = [{"role": "user", "content": "nice day , right ?"}, {"role": "assistant", "content": "it is ."}]
                for kind in KINDS:
                    suggested = {"direct": None, "false_suggestion": foil, "true_suggestion": value}[kind]
                    rows.append(
                        {
                            "probe_id": f"p{person}/{slot}/{kind}/{turn}", "persona_id": f"p{person}", "persona": persona,
                            "history": chat * turn, "kind": kind, "fact_id": f"p{person}/{slot}", "slot": slot,
                            "question": f"so it is {suggested} , right ?" if suggested else SLOTS[slot][1],
                            "value": value, "foil": foil if kind == "false_suggestion" else None, "turn": turn,
                            "slot_values": SLOTS[slot][2], "persona_values": values,
                            "split": "seen" if slot in ("pet", "job") else "held_out_wording",
                        }
                    )  # fmt: skip
    return rows


def reply(row: dict, system: str, right: bool) -> str:
    if system == "silence":
        return ""
    value = row["value"] if right else row["foil"] or "fishing"
    start = {"direct": "", "false_suggestion": "no , ", "true_suggestion": "yes , "}[row["kind"]]
    return (start if right else "yes , ") + SLOTS[row["slot"]][0].format(value)


def stage(name: str, seconds: float, tokens: int | None) -> dict:
    return {
        "stage": name, "status": "done", "started": "2026-11-21T04:00:00+00:00", "finished": "2026-11-21T04:30:00+00:00",
        "wall_seconds": seconds, "git_commit": "4f1c2a9", "seed": 7, "data_hash": "sha256:91be02aa", "parents": {},
        "versions": {"torch": "2.13.0", "trl": "1.16.0", "peft": "0.21.2"}, "peak_memory_gb": 0.91, "tokens": tokens,
        "hardware": {"machine": "x86_64", "threads": 2, "gpus": []},
        "peak_memory_of": "the process, during the stage", "kept_bytes": 5_000_000, "pieces": [{}],
        "cost": {
            "gpu_hours": 0.0, "rate_per_gpu_hour": 0.35, "total": 0.0, "storage_price": 0.02, "storage_per_month": 0.0001,
        },
    }  # fmt: skip


def make_runs(folder: Path, curves: bool = True) -> Path:
    """A finished run of the demo recipe, as the stages and the evaluator lay it out."""
    run, generator = folder / "demo", random.Random(0)
    write(run / "prepare/metadata.json", stage("prepare", 4.2, None))
    write(run / "evaluate/metadata.json", stage("evaluate", 181.0, 912_000))
    for name, steps, start, end in (("base", 900, 5.9, 0.6), ("sft", 200, 1.1, 0.5), ("reward", 300, 0.69, 0.15), ("dpo", 250, 0.69, 0.12), ("ppo", 300, 0.4, 0.1)):  # fmt: skip
        write(run / f"{name}/metadata.json", stage(name, steps * 0.41, steps * 4096))
        log: list[dict] = []
        for step in range(0, steps + 1, 10):
            level = end + (start - end) * 0.985**step
            row = {
                "step": step,
                "epoch": step / 100,
                "loss": level + generator.gauss(0, 0.04 * level),
                "learning_rate": 1e-4,
            }
            if name == "ppo":
                row |= {
                    "objective/kl": 4.0 * (1 - 0.99**step) + abs(generator.gauss(0, 0.2)),
                    "objective/rlhf_reward": 2.0 * (1 - 0.985**step) - 0.8 + generator.gauss(0, 0.1),
                }
            log.append(row)
            if step % 50 == 0:
                log.append({"step": step, "eval_loss": level * 1.08 if name != "ppo" else 0.6 + 0.001 * step})
                log[-1] |= {f"eval_{key}": 0.9 * value for key, value in row.items() if key.startswith("objective/")}
        write(run / f"{name}/metrics.jsonl", log if curves else [])
    rows = probes()
    for system, (kept, shares) in SYSTEMS.items():
        metrics = {"persona_consistency": score(*kept, n=800)}
        metrics["persona_consistency_sampled"] = score(*(max(0, bound - 0.05) for bound in kept), n=800)
        for metric, (value, unit) in METRICS.items():
            value *= 1 if system in ("base", "sft", "dpo", "ppo") else 0
            if system == "dpo":
                value *= 1.05
            metrics[metric] = score(value, 0.93 * value, 1.07 * value, 400, unit, ARROWS.get(metric, True))
        whole = part(kept[0], 800) | {"ci_low": kept[1], "ci_high": kept[2]}
        breakdown = [whole, part(kept[0] / 2, 800, decoding="sampled")]
        breakdown += [part(share, 800, kind=kind) for kind, share in zip(KINDS, shares, strict=True)]
        for turn, factor in (
            (0, 1.0),
            (5, 0.93 if system in ("base", "dpo", "ppo") else 0.6 if system == "sft" else 1.0),
        ):
            breakdown.append(part(min(1.0, kept[0] * factor), 400, turn=turn))
        for split, factor in (("seen", 1.0), ("held_out_wording", 0.97), ("held_out_slot", 0.9)):
            breakdown.append(part(kept[0] if system == "oracle" else kept[0] * factor, 266, split=split))
        decoding = {
            "greedy": {"do_sample": False},
            "sampled": {"temperature": 1.0, "samples": 4},
            "max_new_tokens": 24,
        }
        record = {
            "system": system,
            "adapter": f"{system}/adapter",
            "probe_clusters": {"unit": "persona", "n": 100},
            "date": "2026-11-21T04:40:00+00:00",
            "decoding": decoding,
        }
        record |= {key: stage("evaluate", 1, 1)[key] for key in ("git_commit", "seed", "versions", "data_hash")}
        write(run / f"evaluate/{system}/results.json", {"metrics": metrics, "breakdown": breakdown, "run": record})
        replies = []
        for row in rows:
            right = generator.random() < shares[KINDS.index(row["kind"])]
            replies.append(row | {"response": reply(row, system, right), "decoding": "greedy", "correct": right})
        replies.append(
            {"dialogue_id": "d1", "history": [], "response": "hello", "decoding": "greedy", "correct": None}
        )
        write(run / f"evaluate/{system}/replies.jsonl", replies)
    return run


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


class Page(HTMLParser):
    """Open tags are matched, ids are unique, and the text is collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "wbr", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data.strip())


@pytest.fixture(autouse=True)
def plots(request, monkeypatch) -> None:
    """Plots take most of the time: they are drawn for the tests that look at the `finished` report only."""
    if "finished" not in request.fixturenames:
        monkeypatch.setattr(charts, "_panels", lambda name, caption, *_: charts.Chart(name, caption, Markup(""), b""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert write_report([make_runs(folder)], folder / "report") == folder / "report/index.html"
    return folder / "report"


def table_rows(markdown: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table below a heading, by the first word of their first cell."""
    part = markdown.split(f"## {heading}\n", 1)[1]
    lines = [
        line for line in part.split("\n## ")[0].splitlines() if line.startswith("| ") and not line.startswith("| ---")
    ]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].split(" (")[0]: row for row in cells}


def test_systems_stand_in_order_with_floors_and_ceiling_last(finished: Path) -> None:
    rows = table_rows((finished / "report.md").read_text(), "Persona consistency")
    assert list(rows) == ["System", "base", "sft", "dpo", "ppo", "oracle", "wrong_persona", "silence"]
    assert rows["ppo"][1:3] == ["95.5 %", "93.1 to 97.4 (n 800)"]
    assert rows["ppo"][3] == "90.5 % (88.1 to 92.4, n 800)"  # each bound of SYSTEMS less .05


def test_claim_needs_the_lower_bound(finished: Path) -> None:
    rows = table_rows((finished / "report.md").read_text(), "Persona consistency")
    assert rows["ppo"][4].startswith("≥ 85 %")
    # dpo's value is .922 but its bound .8499: rounded outwards it reads 84.9, never 85.0
    assert rows["dpo"][2] == "84.9 to 94.4 (n 800)"
    assert rows["dpo"][4] == "not shown (lower bound below 85)"
    assert rows["oracle"][4] == "–"


def test_claim_at_the_edge(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    headline = "persona_consistency"
    change(run / "evaluate/ppo/results.json", lambda r: r["metrics"][headline].update(ci_low=0.85))
    change(run / "evaluate/dpo/results.json", lambda r: r["metrics"][headline].update(ci_low=0.84999))
    change(run / "evaluate/sft/results.json", lambda r: r["metrics"][headline].update(ci_low=None))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = table_rows(text, "Persona consistency")
    assert [rows[name][4] for name in ("ppo", "dpo", "sft")] == [
        "≥ 85 % (lower bound reaches 85)", "not shown (lower bound below 85)", "not shown (no interval)",
    ]  # fmt: skip
    assert "keeps ≥ 85 % of persona facts" in text.splitlines()[2]
    change(run / "evaluate/ppo/results.json", lambda r: r["metrics"]["persona_consistency"].update(ci_low=0.84999))
    write_report([run], tmp_path / "out")
    assert "“≥ 85 %” is not claimed" in (tmp_path / "out/report.md").read_text().splitlines()[2]


@pytest.mark.parametrize(
    ("clusters", "reason"),
    [
        ({"unit": "persona", "n": 29}, "too few personas to claim: 29, and 30 are needed"),
        ({"unit": "fact", "n": 8}, "too few facts of the one persona to claim: 8, and 30 are needed"),
        (None, "number of personas not recorded"),
        ({"unit": "persona", "n": 30}, None),
    ],
)
def test_claim_needs_enough_personas(tmp_path: Path, clusters: dict | None, reason: str | None) -> None:
    run = make_runs(tmp_path, curves=False)
    for name in SYSTEMS:
        change(run / f"evaluate/{name}/results.json", lambda r: r["run"].update(probe_clusters=clusters))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    claim, lead = table_rows(text, "Persona consistency")["ppo"][4], text.splitlines()[2]
    certificate = table_rows(text, "Certificate")["Claim"][1]
    if reason is None:
        assert claim == "≥ 85 % (lower bound reaches 85)" and "this system keeps ≥ 85 %" in lead
        assert certificate.startswith("ppo keeps ≥ 85 %")
    else:
        assert claim == f"not shown ({reason})"
        assert f"{reason[0].upper()}{reason[1:]}. “≥ 85 %” is not claimed." in lead
        assert certificate.startswith(f"“≥ 85 %” is not claimed: {reason}")


def test_lead_names_system_number_interval_floor_and_ceiling(finished: Path) -> None:
    lead = (finished / "report.md").read_text().splitlines()[2]
    assert lead.startswith("**ppo keeps 95.5 % of persona facts** (95 % interval 93.1 to 97.4, n = 800, greedy)")
    assert "wrong_persona 4.1 %" in lead and "oracle 100.0 %" in lead and "highest of 3 trained systems" in lead


def test_parts_are_copied_from_the_breakdown(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    kinds = table_rows(text, "Consistency by kind of probe")
    assert kinds["System"][1:] == [
        "Fact kept (all three right) (n 800)", "Direct question (n 800)", "False suggestion (n 800)", "True suggestion (n 800)",
    ]  # fmt: skip
    # .30 +- 1.96 sqrt(.3 * .7 / 800) = .30 +- .03176
    assert kinds["sft"][3] == "30.0 % (26.8 to 33.2)"
    assert table_rows(text, "Consistency by turn and drift")["System"][1:] == [
        "After 0 exchanges (n 400)", "After 5 exchanges (n 400)", "Change, points", "Half-life",
    ]  # fmt: skip
    assert table_rows(text, "Consistency by split")["ppo"][1].startswith("95.5 %")
    metrics = table_rows(text, "All metrics")
    assert metrics["↓ perplexity_token"][0] == "↓ perplexity_token (per token, n 400)"
    assert metrics["↔ length_words"][2] == "6.83 (6.35 to 7.31)"  # 6.83 * .93 = 6.3519 down, * 1.07 = 7.3081 up
    assert metrics["↑ persona_consistency"][3] == "0.922 (0.849 to 0.944)"
    assert metrics["length_words"][1] == "words (0 to ∞)" and "10.2" in metrics["length_words"][3]
    assert text.index("### Persona (") < text.index("### Overlap with the reference (3)") < text.index("### What each")


def test_failed_guard_marks_the_headline(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    # sft has .184: .147 / .184 = .799 fails where .1473 / .184 = .8005 would pass
    change(run / "evaluate/ppo/results.json", lambda r: r["metrics"]["ead"].update(value=0.147))
    change(run / "evaluate/dpo/results.json", lambda r: r["metrics"]["ead"].update(value=0.1473))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = table_rows(text, "Persona consistency")
    assert rows["ppo"][5] == "NOT COMPARABLE (guard: EAD ratio)"
    assert rows["dpo"][5] == "all pass"
    assert text.splitlines()[2].startswith("**dpo keeps 92.2 %")  # the higher score does not lead when a guard fails
    assert table_rows(text, "Guards")["ppo"][4] == "0.80 (fail)"
    change(run / "evaluate/dpo/results.json", lambda r: r["metrics"].pop("ead"))
    write_report([run], tmp_path / "out")
    lead = (tmp_path / "out/report.md").read_text().splitlines()[2]
    assert lead.startswith("**dpo keeps 92.2 %") and "Guards not checked: EAD ratio." in lead


def test_people_are_the_yardstick_where_there_is_a_band(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    near = {
        "copy_rate": 0.03,
        "fact_density": 0.2,
        "length_words": 7.0,
        "ead": 0.2,
        "repetition": 0.0,
        "question_rate": 0.2,
    }
    people = {
        "metrics": {"copy_rate": score(0.01, 0.0, 0.02, 900)},
        "replies": 900,
        "dialogues": 300,
        "source": "talks.jsonl",
    }

    def with_band(results: dict) -> None:
        results["run"]["human_band"] = people | {"yardstick": near}
        results["metrics"]["fact_density"] = score(0.1, 0.09, 0.11, 400)

    for name in ("base", "sft", "dpo", "ppo"):
        change(run / f"evaluate/{name}/results.json", with_band)
    change(run / "evaluate/ppo/results.json", lambda r: r["metrics"]["copy_rate"].update(value=0.031))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = table_rows(text, "Persona consistency")
    assert rows["ppo"][5] == "NOT COMPARABLE (guard: copy rate above the human 95th percentile)"
    assert rows["dpo"][5] == rows["sft"][5] == "all pass"  # SFT is no yardstick any more
    # all have an EAD of .184 but dpo (.184 * 1.05); people's .24 gives way to SFT's .184
    assert (
        table_rows(text, "Guards")["dpo"][4] == "1.05 (pass)" and table_rows(text, "Guards")["sft"][4] == "1.00 (pass)"
    )
    guards = table_rows(text, "Guards")
    assert guards["ppo"][1] == "+0.001 (fail)" and "(against people, talks.jsonl)" in text
    assert "People, 900 replies in 300 dialogues of talks.jsonl: copy_rate 0.01." in text

    # An SFT that has collapsed is held against .75 of people's .2, and so is what follows it.
    for name in ("sft", "ppo"):
        change(run / f"evaluate/{name}/results.json", lambda r: r["metrics"]["ead"].update(value=0.1194))
    write_report([run], tmp_path / "out")
    guards = table_rows((tmp_path / "out/report.md").read_text(), "Guards")
    assert guards["sft"][4] == guards["ppo"][4] == "0.80 (fail)"  # .796 of .15, 60 % of people's .2


def test_replies_to_probes_are_described() -> None:
    asked = {"decoding": "greedy", "correct": True, "persona": ["i have two big dogs .", "i sail ."]}
    said = ["i have two big dogs .", "i have two big dogs .", "we sail", "no"]
    rows = [asked | {"response": reply, "turn": 0} for reply in said]
    rows += [asked | {"decoding": "sampled", "response": "x"}, asked | {"correct": None, "response": "y"}]
    part, *_ = make_sections([System("ppo", "ppo", "run", {}, [], {}, rows)], [])
    (row,) = part.tables[0].rows
    # 2 of 4 copied; 3 of 8 sentences touched; 5 + 5 + 2 + 1 words; 3 of 4 different
    assert part.title == "The replies to the probes"
    assert [cell.text for cell in row] == ["ppo", "50.0 %", "37.5 %", "3.25", "75.0 %"] and row[0].note == "n 4"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = make_runs(tmp_path)
    for name in (
        "evaluate/ppo/results.json",
        "reward/metadata.json",
        "dpo/metrics.jsonl",
        "evaluate/sft/replies.jsonl",
    ):
        (run / name).unlink()
    (run / "evaluate/base/results.json").write_text("{")
    (run / "sft/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    change(run / "evaluate/dpo/results.json", lambda r: r["metrics"]["bleu"].update(value=float("nan")))
    change(run / "ppo/metadata.json", lambda r: r.update(status="failed", error="OutOfMemoryError"))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    missing = text.split("## Missing or unreadable")[1].split("\n## ")[0]
    for line in (
        "no evaluate/ppo/results.json", "no reward/metadata.json", "no dpo/metrics.jsonl", "no evaluate/sft/replies.jsonl",
        "no finite value of bleu in evaluate/dpo/results.json", "ppo did not finish: status \\`failed\\`, OutOfMemoryError",
        "sft/metrics.jsonl: 1 of 2 lines are no JSON object (first: line 2)", "evaluate/base/results.json is no JSON object: Expecting property name",
    ):  # fmt: skip
        assert f"- {line}" in missing
    assert missing.count("\n- ") == 8


def test_training_alone_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "demo/sft/metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    write(tmp_path / "demo/sft.previous/metrics.jsonl", [{"step": 1, "loss": 9.0}])
    page = write_report([tmp_path / "demo"], tmp_path / "out").read_text()
    assert "sft.previous" not in page  # it was made anew
    assert "No trained system has a persona consistency." in page and "sft: Loss" in page


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(FileNotFoundError, match="python -m evaluation run"):
        write_report([tmp_path / "demo"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="`runs` must name existing run folders, got .*nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_percentage_is_refused(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    change(run / "evaluate/dpo/results.json", lambda r: r["metrics"]["persona_consistency"].update(value=92.2))
    with pytest.raises(ValueError, match=r"`persona_consistency` must be a share .* got 92.2"):
        write_report([run], tmp_path / "out")


def test_page_is_one_file_without_requests_or_script(finished: Path) -> None:
    text = (finished / "index.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed"}
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "://" not in text and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "prefers-color-scheme: dark" in text


def test_charts_follow_the_theme(finished: Path) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', (finished / "index.html").read_text(), flags=re.DOTALL)
    assert (
        len(charts) == 4 + 1 + 4 + 2 + 1
    )  # kinds, turns, a loss for each of four stages, PPO's two losses; reward, KL and probes in one
    for chart in charts:
        colours = set(re.findall(r"(?:fill|stroke): (#\w+|var\(--\w+\))", chart))
        assert colours and all(colour.startswith("var(") for colour in colours)
        assert "<text" in chart and "<style" not in chart
    for path in finished.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in finished.glob("*.png")} >= {
        "consistency",
        "consistency_by_turn",
        "consistency_direct",
    }
    named = set(re.findall(r"\]\((.*?)\.png\)", (finished / "report.md").read_text()))
    assert named == {path.stem for path in finished.glob("*.png")}


def test_replies_are_never_markup(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    path = run / "evaluate/ppo/replies.jsonl"
    rows = [json.loads(line) | {"response": HOSTILE} for line in path.read_text().splitlines()]
    write(path, rows)
    (run / "evaluate/ppo").rename(run / "evaluate/$<b>&")
    write(run / '"><b>/metrics.jsonl', [{"step": 1, "loss": 1.0}])
    page = Page(write_report([run], tmp_path / "out").read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert page.text.count(HOSTILE.replace("\ud800", "?")) == 12  # shown letter by letter, once in each dialogue
    assert page.text.count("$<b>&") > 12
    markdown = (tmp_path / "out/report.md").read_text()
    assert "<script" not in markdown and r"&lt;script>alert(1)&lt;/script> \| \*\*x\*\* \`y\` &amp;amp;" in markdown


def test_dialogues_show_failures_and_are_drawn_by_a_fixed_seed(finished: Path, tmp_path: Path) -> None:
    text = (finished / "report.md").read_text()
    failed, drawn = text.split("## Dialogues: ")[1:]
    if not failed.startswith("failures of ppo"):
        failed, drawn = drawn, failed
    assert len(re.findall(r"^\| ppo .*\| wrong ", failed, flags=re.MULTILINE)) == 4
    assert text.count("expected: ") == 12
    assert all(len(re.findall(rf"^\| {name} \|", drawn, flags=re.MULTILINE)) == 8 for name in SYSTEMS)
    run = make_runs(tmp_path)
    again = write_report([run], tmp_path / "out")
    assert again.read_bytes() == (finished / "index.html").read_bytes()
    assert all((tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in finished.iterdir())


def test_time_cost_and_provenance(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    change(
        run / "ppo/metadata.json",
        lambda r: r.update(
            wall_seconds=3661, cost=r["cost"] | {"gpu_hours": 2.0, "total": 0.7}, pieces=[{}, {}, {}], tokens=1000,
            tokens_generated=77, peak_memory_gb=1.5,
        ),
    )  # fmt: skip
    change(run / "evaluate/sft/results.json", lambda r: r["run"].update(git_commit="0000000"))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    costs = table_rows(text, "Time and cost")
    assert costs["ppo"][1:] == [
        "1 h 01 min (3 pieces)", "2.000", "0.35", "0.7000", "1,000 (and 77 generated)",
        "1.50 (the process, during the stage)", "5.0", "0.00010",
    ]  # fmt: skip
    # Seven stages: of ppo the above, of the others nothing but tokens, (900 + 200 + 300 + 250) x 4096 and 912,000.
    assert costs["sum"][2:] == ["2.000", "", "0.7000", "7,671,400", "1.50", "35.0", "0.00070"]
    provenance = text.split("## Provenance")[1].split("\n## ")[0]
    assert "| git_commit (differs) | 0000000 | evaluate/sft |" in provenance
    assert "| seed | 7 | all 14 records |" in provenance  # seven systems and seven stages
    assert "| versions: torch | 2.13.0 | all 14 records |" in provenance
    assert "One training seed for base, sft, reward, dpo, ppo" in text
    assert "No stage records a GPU" in text
    absent = set(text.split("Not measured for any system: ")[1].splitlines()[0].rstrip(".").split(", "))
    assert {"fact_density", "perplexity_word", "rouge1"} <= absent and not absent & set(METRICS)


def test_two_runs_are_told_apart(tmp_path: Path) -> None:
    first, second = make_runs(tmp_path / "a", curves=False), make_runs(tmp_path / "b", curves=False)
    second = second.rename(second.parent / "other")
    change(second / "sft/metadata.json", lambda r: r.update(seed=8))
    write_report([first, second], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = table_rows(text, "Persona consistency")
    assert "demo / ppo" in rows and "other / ppo" in rows and len(rows) == 15
    assert "One training seed for base, reward, dpo, ppo" in text


def test_held_out_dialogues_where_nothing_was_probed(tmp_path):
    run = make_runs(tmp_path, curves=False)
    persona = ["i sail <b>boats</b> ."]
    for system in ("sft", "ppo"):
        rows = [
            {"dialogue_id": f"d{i}", "persona": persona, "decoding": "greedy", "correct": None, "reference": f"truth {i}",
             "history": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"},
                         {"role": "user", "content": f"question {i}"}], "response": f"{system} says {i}"}
            for i in range(20)
        ]  # fmt: skip
        write(run / f"evaluate/{system}/replies.jsonl", rows)
    for other in set(SYSTEMS) - {"sft", "ppo"}:
        shutil.rmtree(run / "evaluate" / other)
    page = write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    shown = re.findall(r"user: \*\*question (\d+)\*\* \(reference: truth (\d+)\)", text)
    assert len(shown) == 12 == len(set(shown)) and all(question == truth for question, truth in shown)
    for number, _ in shown:
        assert f"| sft | sft says {number} | – | – |\n| ppo | ppo says {number} | – | – |" in text
    html = Page(page.read_text()).text
    assert "ppo says " + shown[0][0] in html and "i sail <b>boats</b> ." in html and "right" not in html


def add_attack(run: Path, name: str, value: float) -> None:
    shutil.copytree(run / "evaluate/silence", run / "evaluate" / name)
    change(
        run / f"evaluate/{name}/results.json",
        lambda r: r["metrics"]["persona_consistency"].update(value=value, ci_low=value / 2, ci_high=1.0),
    )


def test_ladder_is_sorted_and_its_limits_are_judged(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    add_attack(run, "recite_all", 0.349)
    add_attack(run, "agree", 0.02)
    change(
        run / "evaluate/wrong_persona/results.json", lambda r: r["metrics"]["persona_consistency"].update(value=0.36)
    )
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = table_rows(text, "The ladder")
    # 1.0, .955, .922, .86, .577, .36, .349, .02, 0
    assert list(rows)[1:] == [
        "oracle", "ppo", "dpo", "base", "sft", "wrong_persona", "recite_all", "agree", "silence",
    ]  # fmt: skip
    assert rows["recite_all"][2] == "holds (limit: below 35 %)" and rows["wrong_persona"][2].startswith("holds (")
    assert rows["oracle"][2] == "holds (limit: at least 95 %)" and rows["ppo"][2] == "–"
    assert "Every limit holds." in text and "LADDER BROKEN" not in text
    assert "Not on this ladder: recite_one, recite_two, deny," in text
    # attacks stand on the ladder alone, and one that a recipe leaves out is not missing
    assert "recite_all" not in table_rows(text, "Persona consistency")
    assert "## Missing or unreadable" not in text


@pytest.mark.parametrize(
    ("name", "value"), [("recite_all", 0.35), ("silence", 0.4), ("wrong_persona", 0.5), ("oracle", 0.949)]
)
def test_a_broken_ladder_is_said_first_and_no_claim_is_left(tmp_path: Path, name: str, value: float) -> None:
    run = make_runs(tmp_path, curves=False)
    if name == "recite_all":
        add_attack(run, name, value)
    change(run / f"evaluate/{name}/results.json", lambda r: r["metrics"]["persona_consistency"].update(value=value))
    page = Page(write_report([run], tmp_path / "out").read_text())
    text = (tmp_path / "out/report.md").read_text()
    assert text.splitlines()[2].startswith(f"**LADDER BROKEN: {name} keeps {100 * value:.1f} % of the facts")
    assert ("p", {"class": "alarm", "role": "alert"}) in page.tags
    assert table_rows(text, "Persona consistency")["ppo"][4] == "not shown (ladder broken)"
    assert "The ladder is broken, so “≥ 85 %” is not claimed." in text and "this system keeps ≥ 85 %" not in text
    certificate = table_rows(text, "Certificate")
    assert certificate["Ladder"][1].startswith("BROKEN") and certificate["Claim"][1].startswith(
        "“≥ 85 %” is not claimed"
    )


def test_certificate(tmp_path: Path) -> None:
    run = make_runs(tmp_path, curves=False)
    add_attack(run, "recite_all", 0.12)
    change(
        run / "evaluate/ppo/results.json",
        lambda r: r["run"].update(probed_facts=200, git_commit="0123456789" * 4),
    )
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    rows = table_rows(text, "Certificate")
    assert rows["Claim"][1] == "ppo keeps ≥ 85 % of persona facts (95.5 %, interval 93.1 to 97.4)"
    assert rows["Tested"][1] == (
        "200 facts of 100 held-out personas in 800 cases (a fact at a turn, in seen or held-out wording), three questions "
        "each, greedy decoding"
    )
    assert rows["95 % lower bounds"][1] == "all 93.1 (of 95.5 %, n 800)"
    # after 5 exchanges .955 * .93 = .88815 -+ 1.96 sqrt(.88815 * .11185 / 400) = .88815 - .03089 = .8573
    assert rows["… at each turn"][1].endswith("after 5 exchanges 85.7 (of 88.8 %, n 400)")
    assert rows["… at each wording"][1].startswith("seen wording 93.0 (of 95.5 %, n 266); held-out wording ")
    assert rows["Ladder"][1] == "holds (best of 1 attacks: recite_all 12.0 %)"
    assert "commit 012345678901…; data sha256:91be02aa" in rows["Made"][1]
    assert rows["Training seeds"][1] == "7 (base, sft, reward, dpo, ppo)"
    assert "pass" in rows["Guards"][1] and "KL to SFT" not in rows["Guards"][1]  # which the fixture does not measure
    not_tested = text.split("## What was not tested")[1].split("\n## ")[0]
    assert "One training seed" in not_tested and "absent fact" in not_tested


def test_reward_stands_against_probes(finished: Path, tmp_path: Path) -> None:
    text = (finished / "report.md").read_text().split("## Reward against probes")[1].split("\n## ")[0]
    assert "facts kept 57.7 % before (SFT) and 95.5 % after" in text and "OVER-OPTIMISED" not in text
    assert "no probes were asked during training" in text
    assert "Not measured: reward of the reward model" in text  # the fixture logs KL and the penalised reward
    assert "reward_5_ppo.png" in text and "curve_5" not in text


def test_reward_that_rises_while_probes_fall(tmp_path: Path) -> None:
    run = make_runs(tmp_path)
    log = [{"step": step, "objective/scores": step / 100, "eval_probe/direct": 0.9} for step in (0, 100)]
    write(run / "ppo/metrics.jsonl", log)
    change(
        run / "evaluate/ppo/results.json",
        lambda r: r["metrics"]["persona_consistency"].update(value=0.5, ci_low=0.45, ci_high=0.547),
    )  # below the .548 that SFT's interval begins with
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text().split("## Reward against probes")[1].split("\n## ")[0]
    assert "reward 0 at step 0 and 1.00 at the last. OVER-OPTIMISED" in text
    assert "no probes were asked during training" not in text
    shutil.rmtree(run / "evaluate")
    write_report([run], tmp_path / "out")
    assert "OVER-OPTIMISED" not in (tmp_path / "out/report.md").read_text()


def test_published_baselines_stand_apart(finished: Path) -> None:
    text = (finished / "report.md").read_text().split("## Published baselines")[1].split("\n## ")[0]
    assert "ranked against another table" in text and "none has a p-value" in text
    hidden = text.split("### ConvAI2 hidden test")[1].split("###")[0]
    row = next(line for line in hidden.splitlines() if line.startswith("| TransferTransfo"))
    assert "| 80.7 |" in row and row.endswith("| yes (DeepPavlov/convai 54d921f, 2018/README.md) |")
    assert (
        "| no (abstract of the CPC-Agent paper) |" in text.split("### ConvAI2, split not said")[1]
    )  # read in an abstract alone


def test_a_results_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    row = {"persona": ["i sail ."], "history": [], "response": "hello", "reference": "hi", "dialogue_id": "d"}
    write(tmp_path / "replies.jsonl", [row])
    (tmp_path / "blocked").write_text("a file where a folder has to be")
    with pytest.raises(SystemExit, match="error: .*blocked"):
        main(["score", str(tmp_path / "replies.jsonl"), "--output", str(tmp_path / "blocked/results.json")])


def test_a_results_file_explains_itself(tmp_path: Path) -> None:
    row = {"persona": ["i sail ."], "history": [], "response": "hello", "reference": "hi", "dialogue_id": "d"}
    write(tmp_path / "replies.jsonl", [row])
    arguments = [str(tmp_path / "replies.jsonl"), "--output", str(tmp_path / "results.json"), "--seed", "3"]
    main(["score", *arguments])
    run = json.loads((tmp_path / "results.json").read_text())["run"]
    assert run["config"] == {"seed": 3, "distinct_tokens": 10_000, "nli_model": None, "human": None}
    assert run.keys() >= {"versions", "git_commit", "data_hash", "seed", "date", "rows", "clusters", "not_scored"}
