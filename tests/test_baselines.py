"""Published baselines: read, checked, and never compared across protocols."""

import pytest
import yaml

from evaluation.baselines import FILE, beside, by_protocol, load_baselines

SMALL = {
    "protocols": {
        "p": {
            "data": "test",
            "note": "n",
            "metrics": {"f1": {"unit": "0-100", "ours": "f1"}, "human": {"unit": "1-4"}},
        },
        "q": {"data": "valid", "note": "n", "metrics": {"hits": {"unit": "%", "ours": "hits_at_1", "scale": 0.01}}},
    },
    "systems": [
        {"system": "A", "protocol": "p", "source": "s", "verified": True, "values": {"f1": 17.5, "human": 3}},
        {"system": "B", "protocol": "p", "source": "s", "verified": True, "values": {"f1": 19.5}},
        {"system": "A", "protocol": "q", "source": "s", "verified": False, "values": {"hits": 80.7}},
    ],
}


def load(tmp_path, content):
    path = tmp_path / "baselines.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_baselines(path)


def test_the_shipped_file():
    found = load_baselines()
    assert FILE.is_file() and len(found) > 150
    values = {(b.system, b.protocol, b.metric): b for b in found}
    best = values["TransferTransfo (Hugging Face)", "convai2_test", "hits_at_1"]
    assert (best.value, best.our_value, best.ours, best.verified) == (80.7, pytest.approx(0.807), "hits_at_1", True)
    assert values["P2 Bot", "convai2_valid", "f1"].value == 19.77
    # what was read in an abstract alone is not verified
    assert {b.system for b in found if not b.verified} == {"CPC-Agent"}
    assert all(b.source and b.unit and b.data for b in found)


def test_ranked_within_a_protocol_only(tmp_path):
    groups = by_protocol(load(tmp_path, SMALL))
    assert {key: [b.system for b in group] for key, group in groups.items()} == {
        ("p", "f1"): ["B", "A"],
        ("p", "human"): ["A"],
        ("q", "hits"): ["A"],
    }


def test_what_may_be_said_beside_a_published_value(tmp_path):
    f1, human, _, hits = load(tmp_path, SMALL)
    assert beside("f1", 18.0, 19.0, "p", f1) == (True, "")
    assert beside("f1", 17.0, 18.0, "p", f1) == (False, "")
    assert beside("hits_at_1", 0.80, 0.81, "q", hits) == (False, "")
    assert beside("f1", 18.0, 19.0, None, f1) == (None, "other data: test")
    assert beside("f1", 18.0, 19.0, "q", f1).outside is None
    assert beside("f1", 18.0, 19.0, "p", human) == (None, "another definition: human (1-4)")
    assert beside("f1", None, None, "p", f1) == (None, "no interval of ours")


def changed(**values):
    row = {**SMALL["systems"][0], **values}
    return {**SMALL, "systems": [{key: value for key, value in row.items() if value is not None}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(protocol="r"), "`protocol` = 'r'; known are p, q"),
        (changed(values={"bleu": 1.0}), "protocol p has no metric 'bleu'"),
        (changed(values={"f1": "17"}), "valid number"),
        (changed(values={"f1": float("nan")}), "`f1` = nan is no number"),
        (changed(values={}), "at least 1 item"),
        (changed(source=None), "Field required"),
        (changed(source=" "), "at least 1 character"),
        (changed(verified="yes"), "valid boolean"),
        (changed(p_value=0.01), "Extra inputs are not permitted"),
        ({**SMALL, "systems": SMALL["systems"][:1] * 2}, "is there twice for p"),
        (
            {**SMALL, "protocols": {"p": {**SMALL["protocols"]["p"], "metrics": {"f1": {"unit": "x", "ours": "g1"}}}}},
            "`ours` = 'g1' is no metric of METRICS",
        ),
    ],
)
def test_faults_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, content)
