"""Paired comparison of two systems: items, differences by hand, and the same numbers as for each system alone."""

import json
import math

import numpy as np
import pytest

from evaluation import METRICS
from evaluation.compare import compare, fact_items, likelihood_items, reply_items, system_items
from evaluation.intervals import randomisation_test, wilson, with_ones
from evaluation.probes import KINDS, persona_consistency
from evaluation.score import score_rows

WORDS = [
    "i",
    "have",
    "dog",
    "cat",
    "tea",
    "like",
    "we",
    "you",
    "go",
    "house",
    "red",
    "old",
    "sing",
    "run",
    "far",
    "sea",
]


def rows(seed, count=60, length=9):
    """Replies to the same 60 prompts of 12 characters, by a system that is its seed."""
    data, system = np.random.default_rng(0), np.random.default_rng(seed)

    def sentence(rng, n):
        return " ".join(rng.choice(WORDS, size=n))

    found = []
    for number in range(count):
        found.append(
            {
                "persona": [f"i live in town{number % 12} .", f"i like {WORDS[number % 12 + 4]} ."],
                "history": [{"role": "user", "content": sentence(data, 6) + " ?"}],
                "reference": sentence(data, 8),
                "dialogue_id": str(number),
            }
        )
    return [{**row, "response": sentence(system, 1 + int(system.integers(length)))} for row in found]


def test_differences_are_those_of_the_scores():
    a, b = rows(1), rows(2, length=6)
    compared = compare(reply_items(a), reply_items(b), num_resamples=200, num_trials=200)
    mine, other = score_rows(a)["metrics"], score_rows(b)["metrics"]
    assert set(compared) == set(mine) - {"distinct_1", "distinct_2", "ead"}  # these do not add up over replies
    assert list(compared) == [name for name in METRICS if name in compared]
    for name, row in compared.items():
        assert row["a"] == pytest.approx(mine[name]["value"], abs=1e-9)
        assert row["difference"] == pytest.approx(mine[name]["value"] - other[name]["value"], abs=1e-9)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
        assert 0 < row["p_value"] <= row["p_holm"] <= 1
        assert (row["n_clusters"], row["unit"]) == (12, METRICS[name].unit)
    length = compared["length_words"]
    words = [np.array([len(row["response"].split()) for row in system]) for system in (a, b)]
    difference = words[0] - words[1]
    by_character = difference.reshape(5, 12).mean(axis=0)
    assert length["effect"] == pytest.approx(by_character.mean() / by_character.std(ddof=1))
    assert length["effect_name"] == "d_z over clusters" and compared["bleu"]["effect"] is None
    follow = compared["follow_up_rate"]
    assert follow["effect"] == pytest.approx(100 * follow["difference"])


def test_the_p_value_is_the_paired_tests_whatever_the_order_of_the_rows():
    a, b = rows(1), rows(2)
    first = compare(reply_items(a), reply_items(b), num_trials=500)
    shuffled = [b[i] for i in np.random.default_rng(5).permutation(len(b))]
    assert compare(reply_items(a), reply_items(shuffled), num_trials=500) == first
    words = [with_ones([len(row["response"].split()) for row in system]) for system in (a, b)]
    clusters = [number % 12 for number in range(60)]
    assert first["length_words"]["p_value"] == randomisation_test(*words, clusters, num_trials=500)


def test_a_system_against_itself():
    compared = compare(reply_items(rows(1)), reply_items(rows(1)), num_trials=100)
    assert {row["p_value"] for row in compared.values()} == {1.0}
    assert {row["difference"] for row in compared.values()} == {0.0}
    bound = wilson(0, 12)[1]
    assert (compared["question_rate"]["ci_low"], compared["question_rate"]["ci_high"]) == (-bound, bound)
    assert compared["length_words"]["effect"] is None  # no deviation to divide by
    json.dumps(compared, allow_nan=False)


def test_several_decodings_are_averaged_first():
    """Two decodings whose means are the single replies of another system: nothing differs, and n counts prompts."""
    prompts = [{**row, "response": "a b c d"} for row in rows(1, 12)]
    twice = [{**row, "response": text} for row in prompts for text in ("a b", "a b c d e f")]
    compared = compare(reply_items(twice), reply_items(prompts), num_trials=100)["length_words"]
    assert (compared["a"], compared["b"], compared["n"], compared["p_value"]) == (4, 4, 12, 1)
    items = reply_items(twice)["length_words"]
    assert items.statistics.tolist() == [[4, 1]] * 12


def test_other_prompts_are_refused():
    with pytest.raises(
        ValueError, match="`contradiction_free_rate`: 10 of the 60 items of `a` are not in `b`, and 0 of `b`"
    ):
        compare(reply_items(rows(1)), reply_items(rows(2, 50)))
    with pytest.raises(ValueError, match="none of `metrics` .* in common: .* `b` none"):
        compare(reply_items(rows(1)), {})


def test_the_family_is_what_is_asked_for():
    a, b = reply_items(rows(1)), reply_items(rows(2))
    two = compare(a, b, ("f1", "length_words"), num_trials=200)
    everything = compare(a, b, num_trials=200)
    assert set(two) == {"f1", "length_words"}
    for name, row in two.items():
        assert {**row, "p_holm": 0} == {**everything[name], "p_holm": 0}
    low, high = sorted(row["p_value"] for row in two.values())
    assert sorted(row["p_holm"] for row in two.values()) == pytest.approx(
        sorted([min(1, 2 * low), max(2 * low, high)])
    )


def probe_rows(seed, personas=6, facts=3, samples=2):
    rng, found = np.random.default_rng(seed), []
    for persona in range(personas):
        for fact in range(facts):
            for kind in KINDS:
                probe = {"persona_id": f"c{persona}", "fact_id": f"c{persona}/{fact}", "turn": 0, "split": "seen",
                         "kind": kind, "probe_id": f"{persona}/{fact}/{kind}"}  # fmt: skip
                for decoding, number in (("greedy", 1), ("sampled", samples)):
                    found += [
                        {**probe, "decoding": decoding, "correct": bool(rng.random() < 0.8)} for _ in range(number)
                    ]
    return found


def test_facts_are_those_of_the_headline():
    a, b = probe_rows(1), probe_rows(2)
    compared = compare(fact_items(a), fact_items(b), num_trials=200)
    assert list(compared) == ["persona_consistency", "persona_consistency_sampled"]
    for name, row in compared.items():
        for key, system in (("a", a), ("b", b)):
            assert row[key] == pytest.approx(persona_consistency(system)["metrics"][name]["value"])
        assert (row["n"], row["n_clusters"]) == (18, 6)
        assert row["effect"] == pytest.approx(100 * row["difference"])
    one = [row for row in a if row["persona_id"] == "c0"]
    assert len(set(fact_items(one)["persona_consistency"].clusters)) == 3  # one persona: its facts


def test_likelihoods_and_folders(tmp_path):
    def write(folder, nats, seed):
        folder.mkdir()
        likelihoods = [
            {
                "persona": [f"i am {i} ."],
                "dialogue_id": str(i),
                "nats": nats + i,
                "tokens": 10,
                "words": 5,
                "bytes": 20,
            }
            for i in range(4)
        ] + [
            {"persona": [f"i am {i} ."], "dialogue_id": str(i), "turn": t, "candidates": 20, "hit": float(t == 1)}
            for i in range(4)
            for t in (1, 3)
        ]
        spoken = [{**row, "correct": None, "decoding": "greedy"} for row in rows(seed, 12)]
        for name, content in (("likelihoods", likelihoods), ("replies", [*spoken, *probe_rows(seed)])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return likelihoods

    likelihoods = write(tmp_path / "a", 20.0, 1)
    write(tmp_path / "b", 30.0, 2)
    items = likelihood_items(likelihoods)
    assert items["perplexity_token"].statistics.tolist() == [[20 + i, 10] for i in range(4)]
    long = likelihood_items([*likelihoods, {**likelihoods[0], "nats": 1.0, "tokens": 90}])["perplexity_token"]
    assert long.statistics.tolist()[-1] == [1, 90] and len(set(long.keys)) == 5  # two rows of one dialogue stay two
    assert long.clusters[-1] == long.clusters[0]
    compared = compare(system_items(tmp_path / "a"), system_items(tmp_path / "b"), num_trials=200)
    assert compared["perplexity_token"]["a"] == pytest.approx(math.exp(86 / 40))
    assert compared["perplexity_word"]["b"] == pytest.approx(math.exp(126 / 20))
    assert compared["bits_per_byte"]["difference"] == pytest.approx((86 - 126) / 80 / math.log(2))
    # all four dialogues differ by as much: swapping all or none of them is as large, 2 of 16
    assert compared["perplexity_token"]["p_value"] == pytest.approx(2 / 16, abs=0.1)  # 200 draws
    assert (compared["hits_at_1"]["a"], compared["hits_at_1"]["n"], compared["hits_at_1"]["n_clusters"]) == (0.5, 8, 4)
    assert {"persona_consistency", "bleu", "f1"} <= set(compared)
    (tmp_path / "a" / "likelihoods.jsonl").unlink()  # a system of rules has none
    assert "perplexity_token" not in compare(system_items(tmp_path / "a"), system_items(tmp_path / "b"), num_trials=9)
