"""`score_rows` and `python -m evaluation score`: values by hand, bad rows, files written."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from evaluation import METRICS
from evaluation.__main__ import main
from evaluation.human_band import People
from evaluation.score import independent, parse_row, read_rows, score_rows

ROOT = Path(__file__).parents[1]
CONVAI2 = ROOT.parent / "shared/data/convai2_personachat/valid_self_original.txt"
# What needs a model or probes.
ELSEWHERE = {
    *("persona_consistency", "persona_consistency_sampled", "kl_reference", "perplexity_token", "perplexity_word"),
    *("bits_per_byte", "hits_at_1", "forced_choice", "probe_agreement"),
}


def make_row(**changes):
    return {
        "persona": ["i have two dogs .", "i work as a teacher ."],
        "history": [{"role": "user", "content": "hi , what do you do ?"}],
        "response": "i work as a teacher . and you ?",
        "reference": "i am a teacher .",
        "dialogue_id": "d1",
        **changes,
    }


def make_rows():
    return [
        make_row(),
        make_row(
            history=[
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "i like to walk my dogs"},
                {"role": "user", "content": "yes i like to sing"},
            ],
            response="yes i like to walk",
            reference="yes i like to walk",
            dialogue_id="d2",
        ),
        make_row(response="", reference=None, dialogue_id="d2"),
        make_row(response="no", reference="hello there", dialogue_id="d3"),
    ]


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_values_by_hand():
    result = score_rows(make_rows(), seed=0)
    value = {name: row["value"] for name, row in result["metrics"].items()}
    count = {name: row["n"] for name, row in result["metrics"].items()}
    assert value["keyword_score"] == (1 / 2 + 0 + 0 + 0) / 4  # "teacher" and "work" of one sentence of two
    assert value["fact_density"] == (1 / 2 + 0 + 0 + 0) / 4
    assert value["copy_rate"] == 1 / 4  # 5 of 7 words
    assert value["question_rate"] == 1 / 4
    assert value["length_words"] == (7 + 5 + 0 + 1) / 4
    assert count["length_words"] == 4  # the empty reply is one of them
    # f1: {i work as teacher and you} with {i am teacher}: 2 of 6 and 2 of 3; then 1 and 0
    assert value["f1"] == pytest.approx(100 * (2 * (1 / 3) * (2 / 3) / (1 / 3 + 2 / 3) + 1 + 0) / 3)
    # ROUGE keeps articles: 3 of 7 and 3 of 4 words
    assert value["rouge1"] == pytest.approx((2 * (3 / 7) * (3 / 4) / (3 / 7 + 3 / 4) + 1 + 0) / 3)
    assert value["rouge2"] == pytest.approx((2 * (1 / 6) * (1 / 3) / (1 / 6 + 1 / 3) + 1 + 0) / 3)
    assert count["f1"] == count["bleu"] == count["rougeL"] == 3
    replies, references = [r["response"] for r in make_rows()], [r["reference"] for r in make_rows()]
    upstream = sacrebleu.corpus_bleu(
        [replies[i] for i in (0, 1, 3)], [[references[i] for i in (0, 1, 3)]], lowercase=True, force=True
    )
    assert value["bleu"] == pytest.approx(upstream.score)
    # tokens: i work as teacher and you / yes i like to walk / no: 12, of which "i" is twice
    assert (value["distinct_1"], count["distinct_1"]) == (11 / 12, 12)
    assert value["distinct_2"] == 1
    # "i like to walk" was said in an own turn, "yes i like to" only by the user. 3 + 2 4-grams
    assert (value["repetition"], count["repetition"]) == (1 / 5, 5)


def test_values_of_the_other_metrics_by_hand():
    metrics = score_rows(make_rows(), seed=0)["metrics"]
    value = {name: row["value"] for name, row in metrics.items()}
    count = {name: row["n"] for name, row in metrics.items()}
    # words less stop words: two dogs work teacher of the persona; of the replies work teacher | yes like walk | | (no)
    assert value["persona_precision"] == (2 / 2 + 0 + 0 + 0) / 4
    assert value["persona_recall"] == (2 / 4 + 0 + 0 + 0) / 4
    # own earlier turn "i like to walk my dogs": 1 of the 5 4-grams; "i work as teacher and you", "yes i like to walk"
    assert (value["repetition_within"], value["repetition_across"]) == (0, 1 / 5)
    # persona "i work as teacher", own turn "i like to walk", user's "yes i like to": 3 of 5
    assert (value["repetition_context"], count["repetition_context"]) == (3 / 5, 5)
    # user's turns: "hi , what do you do ?" three times (content word: hi) and "yes i like to sing" (yes, sing)
    assert value["uptake"] == (0 + 1 / 2 + 0 + 0) / 4 and count["uptake"] == 4
    assert value["follow_up_rate"] == 0
    # 7 + 5 + 1 words of replies to 4 + 5 + 2 words of references
    assert (value["length_ratio"], count["length_ratio"]) == (13 / 11, 11)
    # sentences: two of the first reply and one each of the second and last
    assert (value["sentence_words"], count["sentence_words"]) == (13 / 4, 4)
    assert (value["punctuation_rate"], value["capital_rate"]) == (2 / 13, 0)
    # "and" of the first reply and its "?"; "yes"; "no"; and lengths 9, 5, 0, 1 of 30
    assert value["engagement_score"] == pytest.approx((0.15 + 0.25 + 0.15 + 0.15 + 0.1 * 15 / 30) / 4)
    # 11 different of 12 words
    assert value["ead"] == pytest.approx(11 / (19_304 * (1 - (19_303 / 19_304) ** 12)))
    assert count["ead"] == 12


def test_lift_is_against_another_character_whatever_the_order():
    rows = [
        make_row(persona=[f"i live in town{i} ."], response=f"town{i if i < 4 else i + 1}", dialogue_id=str(i))
        for i in range(8)
    ]
    lift = score_rows(rows, seed=3)["metrics"]["persona_lift"]
    # four name their own town; the others name the next one, which counts against them if it is the one drawn
    other = 4 - 8 * lift["value"]
    assert other in (0, 1, 2, 3, 4) and METRICS["persona_lift"].low == -1
    assert score_rows(rows[::-1], seed=3)["metrics"]["persona_lift"]["value"] == lift["value"]
    own = [row | {"response": f"town{i}"} for i, row in enumerate(rows)]
    assert {score_rows(own, seed=seed)["metrics"]["persona_lift"]["value"] for seed in range(9)} == {
        1
    }  # never oneself


def test_a_rate_of_0_has_the_exact_interval_of_its_dialogues():
    rows = [make_row(response="no", dialogue_id=str(i // 2)) for i in range(40)]
    scored = score_rows(rows)["metrics"]["question_rate"]
    assert (scored["value"], scored["ci_low"]) == (0, 0)
    exact = stats.binomtest(0, 20).proportion_ci().high  # .168
    assert scored["ci_high"] == pytest.approx(exact, abs=0.02)  # 2,000 resamples: .152 to .194 at 3.3 standard errors


def test_two_empty_replies_are_no_certainty():
    rows = [make_row(response="", reference="i sing", dialogue_id=str(i)) for i in range(2)]
    metrics = score_rows(rows)["metrics"]
    for name in ("keyword_score", "fact_density", "persona_f1", "copy_rate", "uptake"):
        if name in metrics:
            assert metrics[name]["ci_low"] == 0 and metrics[name]["ci_high"] > 0.8, name  # exact of 0 in 2: .842
    assert {"fact_density", "copy_rate"} <= set(metrics)
    for name in ("bleu", "f1", "rouge1", "length_words"):
        assert metrics[name]["ci_low"] is None and metrics[name]["ci_high"] is None, name


@pytest.mark.slow
@pytest.mark.skipif(not CONVAI2.exists(), reason="ConvAI2 validation data is not beside the checkout")
def test_human_replies_of_convai2():
    """Against values that were measured with other code, to the places that were noted."""
    rows, persona, history, number = [], [], [], 0
    for line in CONVAI2.read_text(encoding="utf-8").splitlines():
        place, _, text = line.partition(" ")
        if place == "1":
            persona, history, number = [], [], number + 1
        if text.startswith("your persona: "):
            persona.append(text.removeprefix("your persona: "))
        else:
            said, reply = text.split("\t")[:2]
            history = [*history, {"role": "user", "content": said}]
            row = {"persona": persona, "history": history, "response": reply, "reference": reply}
            rows.append({**row, "dialogue_id": str(number)})
            history = [*history, {"role": "assistant", "content": reply}]
    assert len(rows) == 7801 and number == 1000
    metrics = score_rows(rows, num_resamples=50)["metrics"]
    for name, expected, places in (
        ("question_rate", 0.288, 3),
        ("copy_rate", 0.008, 3),
        ("repetition_across", 0.003, 3),
        ("repetition_within", 0.000, 3),
        ("engagement_score", 0.22, 2),
        ("bleu", 100, 6),
        ("length_ratio", 1, 6),
        ("verbatim_facts", 1, 6),
    ):
        assert metrics[name]["value"] == pytest.approx(expected, abs=0.5 * 10**-places), name


def test_recorded_c_scores_are_averaged():
    rows = [row | {"c_score": value} for row, value in zip(make_rows(), (2.0, -1.0, 0.0, None), strict=True)]
    scored = score_rows(rows)["metrics"]["c_score"]
    assert (scored["value"], scored["n"]) == (1 / 3, 3)


def test_run_says_what_was_scored():
    run = score_rows(make_rows(), seed=3)["run"]
    assert (run["rows"], run["rows_without_reference"], run["empty_responses"], run["seed"]) == (4, 1, 1, 3)
    assert run["clusters"] == {"unit": "dialogue", "n": 3}  # one persona in all rows
    assert run["distinct_tokens"] == 12
    assert run["ead_vocabulary"] == 19_304
    assert run["not_scored"] == {
        "persona_composite": "no replies of people in other dialogues were given to compare with",
        "persona_lift": "the rows are of fewer than two characters",
        "c_score": "no `nli_model` was given, or no row has a persona",
        "verbatim_facts": "no address, number or name stands in a persona and in its reference",
    }
    assert "case:lc" in run["signatures"]["bleu"] and "stemmer:no" in run["signatures"]["rouge"]


def test_rows_of_the_table_are_true_to_the_metrics():
    numbers = [
        make_row(persona=[f"i am {n} ."], response=f"i am {n} years old .", reference=f"{n} .", dialogue_id=f"d{n}")
        for n in (20, 30)
    ]
    people = People([make_row(persona=["i sing ."], response="i sing songs .", dialogue_id=n) for n in "ab"], "p", "")
    scored = [{**row, "c_score": float(i % 2)} for i, row in enumerate([*make_rows(), *numbers])]
    result = score_rows(scored, people=people)
    assert set(result["metrics"]) == set(METRICS) - ELSEWHERE
    for name, row in result["metrics"].items():
        assert list(row) == ["value", "ci_low", "ci_high", "n", "unit", "higher_is_better"]
        assert (row["unit"], row["higher_is_better"]) == (METRICS[name].unit, METRICS[name].higher_is_better)
        assert METRICS[name].low <= row["ci_low"] <= row["value"] <= row["ci_high"] <= METRICS[name].high
    assert all(name == metric.name and metric.source and metric.protocol for name, metric in METRICS.items())


def test_perfect_replies_and_the_seed():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(50, size=8)) for _ in range(40)]
    rows = [make_row(response=text, reference=text, dialogue_id=str(i // 2)) for i, text in enumerate(texts)]
    first = score_rows(rows, seed=1)["metrics"]
    assert [first[name]["value"] for name in ("bleu", "f1", "rouge1", "rougeL")] == pytest.approx([100, 100, 1, 1])
    assert score_rows(rows, seed=1)["metrics"] == first
    mixed = [{**row, "response": " ".join(row["response"].split()[: rng.integers(9)])} for row in rows]
    one, two = (score_rows(mixed, seed=seed)["metrics"] for seed in (1, 2))
    assert one["f1"]["value"] == two["f1"]["value"]
    assert one["f1"]["ci_low"] != two["f1"]["ci_low"]
    assert one["f1"]["ci_low"] < one["f1"]["value"] < one["f1"]["ci_high"]


def test_distinct_is_taken_at_the_number_of_tokens_asked():
    run = score_rows(make_rows(), distinct_tokens=5)
    assert run["run"]["distinct_tokens"] == run["metrics"]["distinct_1"]["n"] == 5


def test_what_cannot_be_scored_is_named():
    rows = [make_row(persona=[], response="no", reference=None), make_row(persona=[], response="", reference=None)]
    result = score_rows(rows)
    assert set(result["metrics"]) == {
        *("distinct_1", "ead", "question_rate", "length_words", "engagement_score", "follow_up_rate", "uptake"),
        *("mean_idf", "sentence_words", "punctuation_rate", "capital_rate"),
    }
    missing = result["run"]["not_scored"]
    assert set(missing) | set(result["metrics"]) == set(METRICS) - ELSEWHERE
    assert not set(missing) & set(result["metrics"])
    assert missing["bleu"] == "no row has a reference"
    assert missing["keyword_score"] == "no row has a persona"
    assert missing["distinct_2"] == "no reply has 2 tokens"
    assert result["run"]["rows_without_persona"] == 2
    with pytest.raises(ValueError, match="`rows` is empty"):
        score_rows([])


def test_all_replies_empty():
    result = score_rows([make_row(response="", dialogue_id=str(i)) for i in range(3)])
    for name in ("bleu", "f1", "rouge1", "keyword_score", "length_words", "persona_f1", "uptake", "follow_up_rate"):
        assert (result["metrics"][name]["value"], result["metrics"][name]["n"]) == (0, 3)
    assert result["run"]["empty_responses"] == 3
    # a ratio over nothing has no value: it is named, and not 0
    assert set(result["run"]["not_scored"]) == {
        *("distinct_1", "distinct_2", "ead", "persona_lift", "c_score", "verbatim_facts", "mean_idf"),
        *("persona_composite", "repetition", "repetition_within", "repetition_across", "repetition_context"),
        *("sentence_words", "punctuation_rate", "capital_rate"),
    }


def test_one_dialogue_is_clustered_by_reply_and_one_row_has_no_interval():
    result = score_rows([make_row(), make_row(response="hello")])
    assert result["run"]["clusters"] == {"unit": "reply", "n": 2}
    alone = score_rows([make_row()])["metrics"]["length_words"]
    assert (alone["value"], alone["ci_low"], alone["ci_high"]) == (7, None, None)


def test_prompt_text_stands_for_persona_and_history(tmp_path):
    text = "[PERSONA] i have two dogs . | i work as a teacher . [DIALOGUE] hi , what do you do ? [RESPONSE]"
    row = {key: value for key, value in make_row().items() if key not in ("persona", "history")} | {"prompt": text}
    rows, rejected = read_rows(write(tmp_path / "a.jsonl", [row]))
    assert not rejected
    assert rows[0]["persona"] == make_row()["persona"]
    assert rows[0]["history"] == make_row()["history"]


def test_command_writes_results_and_provenance(tmp_path, capsys):
    source = write(tmp_path / "replies.jsonl", make_rows())
    output = tmp_path / "new" / "results.json"
    main(["score", str(source), "--output", str(output), "--seed", "5", "--log_level", "error"])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["metrics"] == score_rows(make_rows(), seed=5)["metrics"]
    run = result["run"]
    assert (run["responses"], run["rejected"], run["seed"], len(run["data_hash"])) == ("replies.jsonl", 0, 5, 64)
    assert {"python", "sacrebleu", "rouge-score"} <= set(run["versions"])
    assert run["date"] and "git_commit" in run
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]  # no temporary file, no rejects
    printed = capsys.readouterr().out
    assert all(name in printed for name in result["metrics"])


def test_few_bad_rows_are_counted_and_kept_apart(tmp_path, caplog):
    rows = [make_row(dialogue_id=str(i)) for i in range(39)]
    source = write(tmp_path / "replies.jsonl", [*rows[:4], "{broken", *rows[4:], make_row(response=None, persona="x")])
    output = tmp_path / "results.json"
    main(["score", str(source), "--output", str(output)])
    assert json.loads(output.read_text())["run"]["rejected"] == 2
    assert json.loads(output.read_text())["run"]["rows"] == 39
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(bad["file"], bad["line"]) for bad in rejected] == [(str(source), 5), (str(source), 41)]
    assert "`persona` must be a list of sentences, got 'x'" in rejected[1]["reason"]
    assert '`response` must be text ("" for an empty reply), got None' in rejected[1]["reason"]
    assert f"{source}:5:" in caplog.text and f"{source}:41:" in caplog.text
    main(["score", str(write(source, rows)), "--output", str(output)])
    assert (tmp_path / "rejected.jsonl").read_text() == ""  # of this run, not of the last


BAD = [
    ("[1]", "a row must be a JSON object, got list"),
    (make_row(history=[{"role": "system", "content": "x"}]), "`history` must be a list of"),
    (make_row(history=None), "`history` must be a list of"),
    (make_row(reference=3), "`reference` must be text or null, got 3"),
    (make_row(dialogue_id=""), "`dialogue_id` must be text that is not empty, got ''"),
    (make_row(persona=["i am tall .", " "]), "`persona` must be a list of sentences"),
    ({"response": "hi"}, "`dialogue_id` must be text that is not empty, got nothing"),
    ({"response": "hi", "dialogue_id": "d", "prompt": "no tags"}, "PERSONA"),
]


def test_many_bad_rows_stop_with_all_of_them(tmp_path):
    source = write(tmp_path / "replies.jsonl", [make_row(), *(row for row, _ in BAD)])
    source.write_bytes(source.read_bytes() + b'{"response": "\xff"}\n')
    output = tmp_path / "results.json"
    with pytest.raises(SystemExit) as stop:
        main(["score", str(source), "--output", str(output)])
    message = str(stop.value)
    assert "9 of 10 rows are bad" in message
    for number, (_, reason) in enumerate(BAD, 2):
        line = next(line for line in message.splitlines() if f"replies.jsonl:{number}:" in line)
        assert reason in line
    assert "replies.jsonl:10: 'utf-8' codec" in message
    assert not output.exists()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    source = tmp_path / "empty.jsonl"
    source.write_text(content)
    with pytest.raises(SystemExit, match="the file has no rows"):
        main(["score", str(source), "--output", str(tmp_path / "results.json")])


def test_missing_file(tmp_path):
    with pytest.raises(SystemExit, match="nowhere.jsonl"):
        main(["score", str(tmp_path / "nowhere.jsonl"), "--output", str(tmp_path / "results.json")])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    source, output = write(tmp_path / "replies.jsonl", make_rows()), tmp_path / "results.json"
    output.write_text("old")

    def full(_descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match="disk full"):
        main(["score", str(source), "--output", str(output)])
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replies.jsonl", "results.json"]


def test_module_is_a_command(tmp_path):
    source, output = write(tmp_path / "replies.jsonl", make_rows()), tmp_path / "results.json"
    command = [sys.executable, "-m", "evaluation", "score", str(source), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "keyword_score" in done.stdout
    assert json.loads(output.read_text())["run"]["rows"] == 4


def test_intervals_are_over_personas():
    """12 personas of 4 dialogues each, which agree within a persona: 48 dialogues tell no more than 12 do."""
    lengths = [1, 9, 3, 7, 2, 8, 4, 6, 1, 9, 5, 5]
    rows = [
        make_row(persona=[f"i live in town{i} ."], response="word " * n, dialogue_id=f"{i}/{j}")
        for i, n in enumerate(lengths) for j in range(4)
    ]  # fmt: skip
    result = score_rows(rows)
    assert result["run"]["clusters"] == {"unit": "persona", "n": 12}
    row = result["metrics"]["length_words"]
    # Normal approximation of the mean of 12; the bootstrap's tails are a little shorter at this n.
    half = 1.96 * np.std(lengths) / np.sqrt(12)
    assert (row["ci_high"] - row["ci_low"]) / 2 == pytest.approx(half, rel=0.1)


def test_who_is_one_cluster():
    shared = ["i have a dog .", "i am a nurse .", "i like tea ."]
    rows = [
        make_row(persona=shared, dialogue_id="a"),
        make_row(persona=[*shared[:2], "i live in Rome ."], dialogue_id="b"),  # most facts shared: the same character
        make_row(persona=["i sing ."], dialogue_id="b"),
        make_row(persona=[], dialogue_id="c"),
        make_row(persona=[], dialogue_id="c"),
    ]
    unit, clusters = independent(rows)
    assert unit == "persona" and clusters[0] == clusters[1] != clusters[2] and clusters[3:] == ["c", "c"]
    assert independent(rows[3:]) == ("reply", [0, 1])
    assert independent([rows[3], {**rows[3], "dialogue_id": "d"}]) == ("dialogue", ["c", "d"])


def test_the_benchmark_scores_what_it_generates():
    spec = importlib.util.spec_from_file_location("evaluation_scaling", ROOT / "benchmarks" / "evaluation_scaling.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = list(benchmark.replies(40))
    assert all(parse_row(row) == row for row in rows)
    result = score_rows(rows, num_resamples=50)
    assert set(result["run"]["not_scored"]) == {"c_score", "verbatim_facts", "persona_composite"}
    assert result["run"]["clusters"] == {"unit": "persona", "n": 4}


def test_letters_that_the_tokeniser_cannot_read_are_named_and_not_scored_as_zero(caplog):
    chinese = "\u6211\u6709\u4e24\u53ea\u72d7"
    row = {"persona": [chinese], "history": [], "response": chinese, "reference": chinese, "dialogue_id": "1"}
    found = score_rows([row, row | {"dialogue_id": "2"}], num_resamples=20)
    assert (
        not {"copy_rate", "fact_density", "persona_f1", "contradiction_free_rate", "rouge1"} & found["metrics"].keys()
    )
    assert found["metrics"]["f1"]["value"] == 100  # split at white space: this one reads it
    assert found["run"]["rows_not_readable"] == {"personas": 2, "responses": 2, "references": 2}
    assert found["run"]["not_scored"]["copy_rate"].startswith("no row has ") and "cannot read" in caplog.text
    some = score_rows([row, row | {"persona": ["i have two dogs ."], "response": "two dogs"}], num_resamples=20)
    assert some["run"]["rows_not_readable"] == {"personas": 1, "responses": 1, "references": 2}
    assert "copy_rate" in some["metrics"] and "rouge1" not in some["metrics"]
    plain = score_rows([row | {"persona": ["hm"], "response": "\U0001f600 !", "reference": ""}], num_resamples=20)
    assert not any(plain["run"]["rows_not_readable"].values()) and plain["metrics"]["copy_rate"]["value"] == 0
