"""The command `rlhf`."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.config import STAGES, ConfigError, exit_with, parse
from rlhf.session import EXIT_STATUS, SessionEnded

# Read when torch starts its threads. By default a thread spins for milliseconds while it waits, and takes the core from
# whatever else runs; some 50 microseconds are as fast where nothing else does (SFT of the demo, 2 cores, torch 2.13).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def make_parser() -> argparse.ArgumentParser:
    """The parser; each sub-command sets `command`, which is called with the parsed arguments."""
    parser = argparse.ArgumentParser(prog="rlhf", description="Train and try persona-consistent chatbots.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the stages of a recipe, skipping what is done")
    run.add_argument("recipe", type=Path, metavar="RECIPE", help="a folder such as recipes/demo")
    run.add_argument("--tiny", action="store_true", help="lay tiny.yaml over it: the whole of it on a CPU")
    run.add_argument("--until", choices=STAGES, metavar="STAGE", help="the last stage to run")
    run.add_argument("--output_dir", type=Path, metavar="DIR", help="in place of runs/<recipe>")
    run.add_argument(
        "--set", action="append", default=[], metavar="[STAGE.]KEY=VALUE", help="override a key; may be repeated"
    )
    run.add_argument(
        "--session_budget", metavar="TIME", help="as 11h, 90m or 3600s: stop before, and say which command goes on"
    )
    run.add_argument(
        "--continue_from",
        type=Path,
        metavar="DIR",
        help="a run of another session, which may be read-only, to go on with",
    )
    run.set_defaults(command=_run)

    chat = commands.add_parser("chat", help="talk to a run or an adapter")
    chat.add_argument("adapter", type=Path, metavar="RUN|ADAPTER", help="a folder such as runs/demo/ppo")
    chat.add_argument("--fact", action="append", metavar="TEXT", help="a fact of the persona; may be repeated")
    chat.add_argument("--model_name_or_path", metavar="BASE", help="where its base is, if it was moved")
    chat.add_argument("--temperature", type=_not_negative, default=0.0, help="0 decodes greedily")
    chat.add_argument("--max_new_tokens", type=int, default=64)
    chat.set_defaults(command=_chat)

    check = commands.add_parser("check", help="what is wrong with this machine, and with what a stage would train on")
    check.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE|STAGE.yaml",
        help="recipes/demo, or a stage of it: recipes/demo/sft.yaml; the machine alone without it",
    )
    check.add_argument("--json", action="store_true", help="the findings as JSON: name, status, found, remedy")
    check.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--key value",
        help="other settings, as --dataset runs/kl/prepare; for a recipe also --tiny, and --output_dir as for `run`",
    )
    check.set_defaults(command=_check)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; an error ends in a message and status 2, its traceback stands in the stage's training.log."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except SessionEnded as ended:
        print(ended)
        raise SystemExit(EXIT_STATUS) from ended
    except ConfigError as error:
        exit_with(error)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost call; what it cannot tell it raises
        from rlhf.record import exit_or_raise  # not at the top: it imports torch

        exit_or_raise(error)


def _run(arguments: argparse.Namespace) -> None:
    from rlhf.pipeline import run

    overrides: dict[str, Any] = {}
    for word in arguments.set:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError([f"`set`: {word!r}: write --set key=value or --set stage.key=value"])
        overrides[key] = value
    session = {"session_budget": arguments.session_budget, "continue_from": arguments.continue_from}
    run(arguments.recipe, arguments.tiny, arguments.until, arguments.output_dir, **session, **overrides)


def _check(arguments: argparse.Namespace) -> None:
    from rlhf import doctor  # first, and without the stack, which does not import on some machines that it knows

    as_json = arguments.json or "--json" in arguments.overrides
    words = [word for word in arguments.overrides if word != "--json"]
    findings = doctor.examine()
    if not as_json:
        doctor.show(findings, problems_alone=arguments.recipe is not None)
    failed = any(finding.status == "fail" for finding in findings)
    if arguments.recipe is not None:
        from rlhf.check import FILES, as_findings, show, show_recipe
        from rlhf.memory import plan_findings, show_plan

        stages = _stages(arguments.recipe, words)
        trainings = {stage: configs for stage, configs in stages.items() if stage in FILES}
        if as_json:
            of_stages, of_plan = as_findings(trainings), plan_findings(stages)
            findings += of_stages + of_plan
            failed |= any(finding.status != "ok" for finding in of_stages)
            failed |= any(finding.status == "fail" for finding in of_plan)
        elif arguments.recipe.suffix == ".yaml":
            ((stage, configs),) = stages.items()
            failed |= bool(show(stage, configs))
        else:
            failed |= any(show_recipe(trainings).values())
        if not as_json:
            failed |= bool(show_plan(stages))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    if failed:
        raise SystemExit(1)


def _stages(recipe: Path, words: Sequence[str]) -> dict[str, Any]:
    """The configurations of a recipe's stages, or of the one training stage whose file was named."""
    from rlhf.check import FILES
    from rlhf.pipeline import config_classes, plan

    if recipe.suffix != ".yaml":
        keys = _keys([word for word in words if word != "--tiny"])
        root = Path(keys.pop("output_dir", Path("runs") / recipe.resolve().name))
        steps = plan(recipe, "--tiny" in words, None, root, keys)
        return {step.stage: step.configs for step in steps}
    if recipe.stem not in FILES:
        raise ConfigError([f"`{recipe}`: is the file of no training stage; there are {', '.join(FILES)} .yaml"])
    return {recipe.stem: parse(config_classes(recipe.stem), ["--config", str(recipe), *words], recipe.stem)}


def _keys(words: Sequence[str]) -> dict[str, Any]:
    """{"key": "value"} of `--key value` and `--key=value`."""
    keys: dict[str, Any] = {}
    left = iter(words)
    for word in left:
        key, equals, value = word.removeprefix("--").partition("=")
        keys[key] = value if equals else next(left, None)
        if not word.startswith("--") or keys[key] is None:
            raise ConfigError([f"`{word}` (command line): write --key value, as in --dataset runs/demo/prepare"])
    return keys


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:  # NaN too
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) or more, got {text}")
    return value


def _chat(arguments: argparse.Namespace) -> None:
    from trl import ModelConfig

    from rlhf.generate import generate
    from rlhf.lora import with_adapter
    from rlhf.model import load_base, load_tokenizer
    from rlhf.persona import Persona, with_persona
    from rlhf.record import RunError, base_of, read_record

    candidates = [arguments.adapter, *(arguments.adapter / stage for stage in ("ppo", "dpo", "sft"))]
    folder = next((path for path in candidates if (path / "adapter_config.json").is_file()), None)
    record = read_record(folder) if folder else None
    if folder is None or record is None or "model_name_or_path" not in record:
        raise RunError(f"{arguments.adapter} is neither a run of a recipe nor a training stage of one.")
    print(f"adapter: {folder}")
    base = base_of(record, folder, arguments.model_name_or_path)
    tokenizer = load_tokenizer(base)
    model = load_base(ModelConfig(model_name_or_path=base, dtype="auto"), tokenizer)
    model = with_adapter(model, folder, "default")
    # An own card stands in prepare's record; its statements make the system message that was trained.
    facts = arguments.fact or _own_or_some_persona(folder / record["parents"]["prepare"]["path"])
    persona = Persona(tuple(facts))
    print("persona: " + " ".join(persona.facts))
    print("(an empty line ends the chat)")
    messages: list[dict[str, str]] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        conversation = with_persona({"persona": list(persona.facts), "messages": messages})
        reply = generate(
            model, tokenizer, [conversation], arguments.max_new_tokens, arguments.temperature, seed=len(messages)
        )[0]
        messages.append({"role": "assistant", "content": reply})
        print(f"bot: {reply}")


def _own_or_some_persona(dataset: Path) -> list[str]:
    """The character that the data were made for, or else a held-out one of the data."""
    from rlhf.data.columns import load_rows
    from rlhf.persona import Persona
    from rlhf.record import read_record

    record = read_record(dataset) or {}
    if "prepare" in record.get("parents", {}):  # sampled pairs, which were made from the prompts of that stage
        return _own_or_some_persona(dataset / record["parents"]["prepare"]["path"])
    card = record.get("persona")
    if card is not None:
        return list(Persona(card["facts"], card["name"], card["style"]).statements())
    return load_rows(dataset / "dialogues_heldout.jsonl", 1)[0]["persona"]


def _ask() -> str:
    try:
        return input("you: ").strip()
    except EOFError:
        print()
        return ""


if __name__ == "__main__":
    main()
