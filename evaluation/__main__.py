"""Command line of the evaluation: `python -m evaluation score|run|report`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.report import write_report
from evaluation.score import DISTINCT_TOKENS, score


def make_parser() -> argparse.ArgumentParser:
    """The parser; each sub-command sets `command`, the function that is called with the parsed arguments."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    scorer = commands.add_parser("score", help="score a file of replies, with no model")
    scorer.add_argument("responses", type=Path, metavar="RESPONSES.jsonl")
    scorer.add_argument("--output", type=Path, required=True, metavar="results.json")
    scorer.add_argument("--seed", type=int, default=0, help="of the resamples and of the shuffle for distinct-n")
    scorer.add_argument(
        "--distinct_tokens", type=int, default=DISTINCT_TOKENS, help="tokens that distinct-n is taken over"
    )
    scorer.add_argument("--nli_model", help="folder or name of an NLI classifier: adds the C-score")
    scorer.add_argument(
        "--human",
        type=Path,
        metavar="FILE.jsonl",
        help="replies of people in other dialogues, as RESPONSES.jsonl or whole dialogues with `messages`: adds the "
        "human band, the guards and persona_composite",
    )
    scorer.set_defaults(command=score)

    commands.add_parser(  # listed here for the help alone: `main` hands it to the parser of recipes
        "run",
        help="generate, probe and score: --config recipes/<name>/evaluate.yaml [--key value ...]",
        add_help=False,
    )

    reporter = commands.add_parser("report", help="write report.md and index.html from run folders")
    reporter.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder such as runs/demo")
    reporter.add_argument("--output", type=Path, required=True, metavar="DIR")
    reporter.add_argument(
        "--compare",
        type=Path,
        metavar="OTHER_RUN",
        help="paired differences of RUN less this one, on the same prompts",
    )
    reporter.set_defaults(command=_report)

    for command in (scorer, reporter):
        command.add_argument("--log_level", default="warning", choices=["debug", "info", "warning", "error"])
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; a problem with the input ends it with the message and exit status 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["run"]:  # its keys are those of the recipe, which have a parser of their own
        _run(argv[1:])
        return
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(argv: Sequence[str]) -> None:
    from trl import ModelConfig  # not at the top: `score` and `report` need no model, and so no seconds of imports

    from evaluation.run import EvaluateConfig
    from evaluation.run import main as evaluate
    from rlhf.record import launch

    launch(evaluate, (EvaluateConfig, ModelConfig), "evaluate", argv)


def _report(arguments: argparse.Namespace) -> None:
    print(write_report(arguments.runs, arguments.output, arguments.compare))


if __name__ == "__main__":
    main()
