"""Statistics of data sets that can be counted by hand."""

import io
import json

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from rlhf.data.describe import describe, histograms, imbalance, summary, table


def row(dialogue_id, persona, *texts, source="mine"):
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(texts)]
    return {"persona": persona, "messages": messages, "dialogue_id": dialogue_id, "source": source}


DOG = ["i have a dog ."]
NURSE = ["i am a nurse .", "i ski ."]
ROWS = [
    row("1", DOG, "hi", "hello", "pets ?", "a **dog**"),
    row("1", NURSE, "hi", "- one\n- two"),
    row("2", ["I have a  DOG"], "url ?", "see https://example.org/#a", source="other"),
    row("3", DOG, "tag ?", "<b>no</b>"),
]
REJECTED = [
    {"reason": "near-duplicate", "dropped": "reply"},
    {"reason": "near-duplicate", "dropped": "reply"},
    {"reason": "every reply is a near-duplicate", "dropped": "dialogue"},
    {"reason": "placeholder", "dropped": "dialogue"},
    {"reason": "no good reply", "dropped": "dialogue"},
    {"reason": "not JSON", "dropped": "dialogue"},
    {"reason": "stage direction", "dropped": "line"},
]


def test_counts():
    found = describe(iter(ROWS), iter(REJECTED))
    assert {key: found[key] for key in ("rows", "dialogues", "replies", "untrained_replies")} == {
        "rows": 4,
        "dialogues": 3,
        "replies": 5,
        "untrained_replies": 0,
    }
    assert found["well_formed"] == 1 - 1 / 8  # what is left out by rule has no fault of form
    assert found["formatting"] == {"markdown": 0.2, "lists": 0.2, "urls": 0.2, "tags": 0.2, "any": 0.8}
    assert found["sources"]["rows"] == {"mine": 3, "other": 1}
    assert found["personas"]["number"] == 2  # blind to case and spacing
    assert found["personas"]["facts"]["mean"] == 1.5
    assert found["personas"]["imbalance"]["largest_share"] == 0.75
    assert found["duplicates"] == {"replies": 2, "dialogues": 1}
    assert found["rejected"]["line"] == {"stage direction": 1}
    lengths = found["lengths"]
    assert lengths["reply_characters"]["total"] == 5 + 9 + 11 + 26 + 9
    assert lengths["turns"] | {"histogram": None} == summary([4, 2, 2, 2]) | {"histogram": None}
    assert lengths["turns"]["max"] == 4 and lengths["turns"]["count"] == 4
    assert "reply_tokens" not in lengths


def test_context_only_replies_are_counted():
    context = row("1", DOG, "hi", "hello")
    context["messages"][1]["train"] = False
    assert describe([context])["untrained_replies"] == 1


@pytest.mark.parametrize(
    "text", ["2 * 3 * 4", "well - no", "i am 3. you ?", "a_b_c", "a < b > c", "so [he] said (no)", "#1 !"]
)
def test_plain_chat_is_no_formatting(text):
    assert describe([row("1", DOG, "hi", text)])["formatting"]["any"] == 0


@pytest.mark.parametrize("text", ["1. one", "2) two", "* one", "  - one"])
def test_lists(text):
    assert describe([row("1", DOG, "hi", text)])["formatting"]["lists"] == 1


def test_tokens_are_counted_in_batches():
    batches = []

    def by_word(texts):
        batches.append(len(texts))
        return [text.split() for text in texts]

    found = describe([row("1", DOG, "a b c", "d e")] * 1_500, tokenize=by_word)
    assert found["lengths"]["user_tokens"]["total"] == 4_500
    assert found["lengths"]["reply_tokens"]["mean"] == 2 and found["lengths"]["reply_tokens"]["count"] == 1_500
    assert sorted(batches) == [500, 500, 1_000, 1_000]


def test_summary_by_hand():
    found = summary(list(range(101)))
    assert [found[key] for key in ("mean", "min", "p5", "p25", "median", "p75", "p95", "p99", "max")] == [
        50, 0, 5, 25, 50, 75, 95, 99, 100
    ]  # fmt: skip
    # 100 numbers up to the 99th percentile in bins of 3: 34 bins, the last also with 100
    assert found["histogram"]["edges"][:3] == [0, 3, 6]
    assert found["histogram"]["counts"] == [3] * 33 + [2] and sum(found["histogram"]["counts"]) == 101
    assert summary([7])["histogram"] == {"edges": [7, 8], "counts": [1]}
    assert summary([]) == {"count": 0}


def test_effective_number():
    assert imbalance([5, 5, 5, 5]) == {"largest_share": 0.25, "effective_number": pytest.approx(4)}
    # entropy of (1/2, 1/4, 1/4) is 1.5 bits
    assert imbalance([2, 1, 1]) == {"largest_share": 0.5, "effective_number": pytest.approx(2**1.5)}
    assert imbalance([]) == {"largest_share": 0.0, "effective_number": 0.0}


def test_nothing_is_described_too(tmp_path):
    found = describe([])
    assert found["rows"] == 0 and found["well_formed"] is None
    assert Console(file=io.StringIO()).print(table(found)) is None
    histograms(found, tmp_path / "empty.png")


def test_table_and_picture(tmp_path):
    # a source that is markup to rich must come out as it is
    found = json.loads(json.dumps(describe([*ROWS, row("4", DOG, "hi", "ho", source="[red]x[/red]")], REJECTED)))
    out = io.StringIO()
    Console(file=out, width=120).print(table(found))
    for part in ("5 rows of 4 dialogues", "reply characters", "[red]x[/red]", "stage direction", "markdown 16.7%"):
        assert part in out.getvalue()
    histograms(found, tmp_path / "lengths.png")
    with Image.open(tmp_path / "lengths.png") as image:
        assert image.size[0] > 1_000 and len(image.convert("L").getcolors()) > 10  # something is drawn


def test_the_last_bar_says_that_it_holds_what_is_longer(tmp_path, monkeypatch):
    labels = {}

    def keep(figure, *args, **kwargs):
        labels.update({axis.get_title().partition(",")[0]: axis.get_xlabel() for axis in figure.axes})

    monkeypatch.setattr(Figure, "savefig", keep)
    # 100 replies of 1 to 4 letters and one of 50: the 99th percentile is 4, so the axis ends at 5
    rows = [row(str(n), DOG, "hi", "x" * (50 if n == 100 else 1 + n % 4)) for n in range(101)]
    histograms(describe(rows), tmp_path / "lengths.png")
    assert labels["reply characters"] == "last bar: 4 and longer"
    assert labels["user characters"] == ""  # all have 2
