"""What is wrong with a training stage before it starts: `rlhf check`, and the fast part that every training calls.

A sample of the stage's own rows goes through the code that will train on it; what comes out is compared with the rows
and with what a model is asked at inference. No model is loaded.
"""

import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments

from rlhf.chat import Message, neutralise, render, render_within, stop_token_id
from rlhf.config import plan_of, values_of
from rlhf.data.columns import length_remedy, load_rows, preference_columns, prompt_columns, sft_columns
from rlhf.doctor import Finding, Status
from rlhf.facts import lemmas
from rlhf.model import load_tokenizer, positions_problem, precision
from rlhf.persona import as_messages, with_persona
from rlhf.record import RunError, read_record

logger = logging.getLogger(__name__)

FILES = {"sft": "dialogues", "reward": "preferences", "dpo": "preferences", "ppo": "prompts"}
SAMPLED_ROWS = 64
LONGEST_ROWS = 8  # of a file, looked at beside the sampled ones
ROLE_ROWS = 400  # of a file, whose turns are held against their personas
ROLE_TURNS = 30  # fewer that speak of a persona say nothing about whose it is
MAX_USER_SHARE = 0.6  # of these turns
_OF_ONESELF = re.compile(r"\b(?:i|my|me|mine|am)\b", re.IGNORECASE)
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Item:
    """One line of the pre-flight list. A training starts all the same where an item that does not block it fails."""

    name: str
    passed: bool
    detail: str
    blocks: bool = True


@dataclass(frozen=True)
class Example:
    """A sequence as a trainer is given it: ids, 1 where it is trained on (for PPO: the reference), and its dialogue."""

    input_ids: list[int]
    trained: list[int]
    messages: list[Message]

    def runs(self) -> list[tuple[int, list[int]]]:
        """Where each trained stretch begins, and its ids."""
        positions = itertools.groupby(range(len(self.trained)), key=lambda i: self.trained[i])
        stretches = [list(places) for trained, places in positions if trained]
        return [(places[0], [self.input_ids[i] for i in places]) for places in stretches]


@dataclass(frozen=True)
class Examination:
    """The pre-flight list of a stage, with what it was taken from as far as that could be read."""

    items: list[Item]
    tokenizer: PreTrainedTokenizerBase | None = None
    example: Example | None = None


def preflight(stage: str, configs: Sequence[Any]) -> None:
    """Log the pre-flight list of a training stage. Seconds; the scripts call it first.

    Raises:
        RunError: with every item that fails and blocks.
    """
    items = examine(stage, configs).items
    for item in items:
        level = logging.INFO if item.passed else logging.WARNING
        logger.log(level, "check %-9s %s: %s", item.name, "passed" if item.passed else "FAILED", item.detail)
    failed = [f"  - {item.name}: {item.detail}" for item in items if item.blocks and not item.passed]
    if failed:
        raise RunError("\n".join([f"The stage {stage!r} is not fit to start:", *failed]))


def examine(stage: str, configs: Sequence[Any], unmade: Sequence[str] = ()) -> Examination:
    """Go through the pre-flight list of a training stage (sft, reward, dpo, ppo).

    Args:
        stage: Its name.
        configs: Its configurations.
        unmade: Folders that earlier stages of the same run will make: what is not there yet is no fault of this stage.
    """
    values = values_of(configs)
    args = next(config for config in configs if isinstance(config, TrainingArguments))
    items = _settings(values, args)
    rows: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, Path] = {}
    try:
        items += _unfinished(values["dataset"])
    except RunError as error:
        items.append(Item("data", False, str(error)))
    for name, side, limit in (("data", "train", "max_train_rows"), ("held-out", "heldout", "max_eval_rows")):
        path = Path(values["dataset"]) / f"{FILES[stage]}_{side}.jsonl"
        try:
            rows[side] = load_rows(path, values[limit])
            paths[side] = path
            items.append(_apart(rows, side, name, path))
        except (OSError, ValueError) as error:
            alone = stage in ("reward", "dpo") and path.with_name(f"dialogues_{side}.jsonl").is_file()
            why = " It made no pairs; its training.log says why." if alone else ""
            items.append(Item(name, False, f"{error}{why}"))
    if "train" in rows:
        items += _steps(stage, values, args, len(rows["train"]))
        items += _roles(rows["train"])
    try:
        tokenizer = load_tokenizer(values["model_name_or_path"])
    except (OSError, ValueError) as error:
        return Examination([*items, Item("format", False, f"`model_name_or_path`: {error}")])
    if stage == "ppo":
        items += _positions(values)
    try:
        by_row = {
            side: [
                _examples(stage, paths[side], rows[side], place, tokenizer)
                for place in _spread(len(rows[side]), SAMPLED_ROWS)
            ]
            for side in rows
        }
    except ValueError as error:
        return Examination([*items, Item("format", False, str(error))], tokenizer)
    examples = [example for side in by_row.values() for row in side for example in row]
    if examples:
        sampled = sum(map(len, by_row.values()))
        length = _length(stage, by_row, {side: len(rows[side]) for side in rows}, values)
        if length.passed:
            faults = (_uncuttable(stage, paths[side], rows[side], tokenizer, values["max_length"]) for side in rows)
            length = next((Item("length", False, fault) for fault in faults if fault), length)
        items += [
            Item("format", True, f"{sampled} sampled rows rendered, each prompt a prefix of its dialogue"),
            _mask(stage, examples, tokenizer),
            _nan(stage, examples),
            _stop(examples, tokenizer),
            _prompt(stage, examples, tokenizer),
            length,
        ]
    parents = [values[key] for key in ("sft_adapter", "reward_adapter") if values.get(key)]
    parents += [source for source in values.get("rewards") or () if _is_stage(source)]
    items += [_parent(folder, examples, tokenizer, folder in unmade) for folder in dict.fromkeys(parents)]
    return Examination(items, tokenizer, examples[0] if examples else None)


def _settings(values: Mapping[str, Any], args: TrainingArguments) -> list[Item]:
    clip = values["max_grad_norm"]
    clipped = f"`max_grad_norm` {clip}" + ("" if clip > 0 else ": gradients are not clipped; set 1.0")
    numbers = "float32" if args.use_cpu else precision().reason
    return [
        Item("device", True, f"{args.device.type}, {args.world_size} process(es), {numbers}"),
        Item("clipping", clip > 0, clipped, blocks=False),
    ]


def _steps(stage: str, values: Mapping[str, Any], args: TrainingArguments, rows: int) -> list[Item]:
    """How long the training is, and whether samples of the model's own replies fall into it."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if stage == "ppo":
        rollout = batch * values["num_mini_batches"]
        steps = math.ceil(values["total_episodes"] / rollout) * values["num_mini_batches"] * values["num_ppo_epochs"]
        said = f"`total_episodes` {values['total_episodes']:,} in rollouts of {rollout}"
    elif args.max_steps > 0:
        steps, said = args.max_steps, f"`max_steps` {args.max_steps:,}"
    else:
        steps = int(-(-rows // batch) * args.num_train_epochs)
        said = f"`num_train_epochs` {args.num_train_epochs:g} of {rows:,} rows"
    said += f": {steps:,} optimiser steps of {batch}"
    every = values["sample_steps"]
    sampled = (
        f"at the start and every {every:,} steps"
        if every <= steps
        else (f"`sample_steps` is {every:,}, so the trained model is never sampled; set {max(steps, 1):,} or less")
    )
    return [
        Item("steps", steps >= 1, said if steps >= 1 else f"{said}; nothing would be trained"),
        Item("samples", every <= steps, sampled, blocks=False),
    ]


def _positions(values: Mapping[str, Any]) -> list[Item]:
    """A fault where a reply to the longest prompt would leave the positions that the model knows."""
    try:
        config = AutoConfig.from_pretrained(values["model_name_or_path"])
    except (OSError, ValueError) as error:
        return [Item("positions", False, f"`model_name_or_path`: {error}")]
    problem = positions_problem(config, values["max_length"], values["response_length"])
    return [Item("positions", False, problem)] if problem else []


def _unfinished(dataset: str) -> list[Item]:
    """A fault where the stage that makes the data broke off or was refused: its files may lie there all the same."""
    record = read_record(dataset)
    if record is None or record["status"] == "done":
        return []
    ended = f"ended as {record['status']!r}; its training.log says why. Run it again"
    return [Item("data", False, f"the stage {record['stage']!r} in {dataset} {ended}")]


def _apart(rows: Mapping[str, Sequence[dict[str, Any]]], side: str, name: str, path: Path) -> Item:
    """How many rows a file has, and that none of them stands in the training file too."""
    number = len(rows[side])
    if side == "heldout" and "train" in rows:
        known = {json.dumps(row, sort_keys=True) for row in rows["train"]}
        shared = sum(json.dumps(row, sort_keys=True) in known for row in rows[side])
        if shared:
            said = f"{shared} of {number} rows in {path} are in the training file too. Hold out other dialogues"
            return Item(name, False, said)
    return Item(name, True, f"{number:,} rows in {path}")


def _roles(rows: Sequence[dict[str, Any]]) -> list[Item]:
    """Whose the persona is, where enough turns tell: who brings up its words in speaking of himself should be the bot."""
    told: Counter[str] = Counter()
    for place in _spread(len(rows), ROLE_ROWS):
        row = rows[place]
        try:
            system, *messages = with_persona(row)
        except ValueError:
            continue  # the item "format" names it
        reply = row.get("chosen") or row.get("reference")
        unsaid = lemmas(system["content"]) if system["role"] == "system" else frozenset()
        for message in [*messages, *(as_messages(reply) if reply else [])]:
            words = lemmas(message["content"])
            told[message["role"]] += bool(words & unsaid and _OF_ONESELF.search(message["content"]))
            unsaid -= words
    number = told["assistant"] + told["user"]
    if number < ROLE_TURNS:
        return []
    share = told["user"] / number
    detail = f"of {number} turns that speak of a persona in the first person {1 - share:.0%} are the assistant's"
    low = float(binomtest(told["user"], number).proportion_ci(method="wilson").low)
    if share <= MAX_USER_SHARE or low <= 0.5:
        return [Item("roles", True, detail)]
    remedy = "so it seems to be the user's persona. Swap the roles, or give the facts of the other speaker"
    return [Item("roles", False, f"{detail}, {remedy}", blocks=False)]


def _spread(number: int, most: int) -> list[int]:
    """At most `most` places, evenly over all of them: a file is often sorted by source."""
    return [i * number // most for i in range(most)] if number > most else list(range(number))


def _uncuttable(
    stage: str, path: Path, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> str | None:
    """What the training would say of a row that does not fit into `max_length` however it is cut. The longest are tried."""
    longest = sorted(range(len(rows)), key=lambda place: -_least_characters(rows[place]))[:LONGEST_ROWS]
    cut_rows = logging.getLogger(load_rows.__module__)
    cut_rows.disabled, before = True, cut_rows.disabled  # how many rows are cut is said already
    try:
        for place in longest:
            _columns(stage, path, rows, place, tokenizer, max_length)
    except ValueError as error:
        return str(error)
    finally:
        cut_rows.disabled = before
    return None


def _least_characters(row: dict[str, Any]) -> float:
    """About what is left of a row that is cut: the persona, the last turn of the user, and the longest reply to it."""
    try:
        messages = with_persona(row)
    except ValueError:
        return math.inf  # to be looked at, and named
    kept = [message for message in messages if message["role"] == "system"] + messages[-2:]
    replies = [len(str(row[key])) for key in ("chosen", "rejected") if key in row]
    return sum(len(message["content"]) for message in kept) + max(replies, default=0)


def _columns(
    stage: str, path: Path, rows: Sequence[dict[str, Any]], place: int, tokenizer: PreTrainedTokenizerBase, limit: int
) -> dict[str, Any]:
    """What the stage's trainer is given of one row."""
    columns = {"sft": sft_columns, "ppo": prompt_columns}.get(stage, preference_columns)
    try:
        return dict(columns([rows[place]], tokenizer, limit)[0])
    except ValueError as error:
        said = str(error).removeprefix("row 1: ")  # of the one row that was passed on
        raise ValueError(f"{path}, row {place + 1}: {said}") from error


def _examples(
    stage: str, path: Path, rows: Sequence[dict[str, Any]], place: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """What the stage's trainer is given of a row, uncut."""
    row = rows[place]
    columns = _columns(stage, path, rows, place, tokenizer, _NO_LIMIT)
    messages = with_persona(row)
    if stage == "sft":
        return [Example(columns["input_ids"], [int(label != -100) for label in columns["labels"]], messages)]
    if stage == "ppo":
        replies = [("reference", columns["reference_ids"] or [])]
    else:
        replies = [(key, columns[f"{key}_ids"]) for key in ("chosen", "rejected")]
    prompt = columns["prompt_ids"]
    return [
        Example(prompt + ids, [0] * len(prompt) + [1] * len(ids), messages + (as_messages(row[key]) if ids else []))
        for key, ids in replies
    ]


def _replies(stage: str, example: Example) -> list[int]:
    """Positions of the messages that the loss should fall on: for SFT every trained reply, else the last one."""
    said = [i for i, m in enumerate(example.messages) if i and m["role"] == "assistant" and m.get("train", True)]
    return said if stage == "sft" else said[-1:] if any(example.trained) else []


def _mask(stage: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Item:
    """The trained tokens, decoded, are the replies and nothing else."""

    def read(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids).strip()

    for example in examples:
        trained = [read(ids[:-1]) for _, ids in example.runs()]
        # Through the tokenizer and back, since some fold case or spaces.
        texts = [neutralise(example.messages[i]["content"], tokenizer).strip() for i in _replies(stage, example)]
        wanted = [read(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        if trained != wanted:
            return Item("mask", False, f"the loss falls on {trained!r}, the replies are {wanted!r}")
    tokens = sum(sum(example.trained) for example in examples)
    share = tokens / sum(len(example.trained) for example in examples)
    return Item("mask", True, f"the trained tokens ({share:.0%}) are the replies and nothing else")


def _nan(stage: str, examples: Sequence[Example]) -> Item:
    """A loss is a mean over trained tokens; over none of them it is NaN, and so are all weights from then on."""
    without = sum(not any(example.trained) for example in examples) if stage != "ppo" else 0
    said = f"{without} of {len(examples)} sampled sequences have no trained token"
    return Item("nan", not without, said + ("; their loss would be NaN. Leave their rows out" if without else ""))


def _stop(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Item:
    found = stop_token_id(tokenizer)
    name = tokenizer.convert_ids_to_tokens(found)
    if tokenizer.eos_token_id != found:
        return Item("stop", False, f"replies close with {name!r}, but the tokenizer stops at {tokenizer.eos_token!r}")
    runs = [ids for example in examples for _, ids in example.runs()]
    empty = sum(ids == [found] for ids in runs)
    if empty:
        said = "nothing but their stop token, which teaches silence. Leave these replies out"
        return Item("stop", False, f"{empty} of {len(runs)} trained replies have {said}")
    without = sum(ids[-1] != found or ids.count(found) != 1 for ids in runs)
    if without:
        return Item("stop", False, f"{without} of {len(runs)} trained replies do not end with one {name!r}")
    return Item("stop", True, f"{name!r} (id {found}) is trained at the end of each of {len(runs)} replies")


def _prompt(stage: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Item:
    """What `rlhf.generate` asks the model with is, id by id, what stands in front of the reply in training."""
    number = 0
    for example in examples:
        # Where their numbers differ, the item "mask" has failed already.
        for (start, _), place in zip(example.runs(), _replies(stage, example), strict=False):
            asked = render_within(example.messages[:place], tokenizer, _NO_LIMIT, add_generation_prompt=True)[0]
            number += 1
            if example.input_ids[:start] != asked["input_ids"]:
                there, here = (tokenizer.decode(ids[-20:]) for ids in (example.input_ids[:start], asked["input_ids"]))
                return Item("prompt", False, f"training has {there!r} before a reply, inference {here!r}")
    return Item("prompt", True, f"inference asks with the ids of training, before {number} replies")


def _length(
    stage: str, by_row: Mapping[str, Sequence[Sequence[Example]]], rows: Mapping[str, int], values: Mapping[str, Any]
) -> Item:
    """How many rows `max_length` cuts. Where a file was sampled whole this is what the training will count."""
    limit, allowed = values["max_length"], values["max_truncated_share"]
    lengths = {side: [max(_ids_to_fit(stage, example) for example in row) for row in by_row[side]] for side in by_row}
    every = [length for side in lengths.values() for length in side]
    cut = sum(length > limit for length in every)
    said = (
        f"{cut} of {len(every)} sampled rows ({cut / len(every):.0%}) are longer than `max_length` {limit}, "
        f"the longest has {max(every)}"
    )
    for side, of_side in lengths.items():
        over = sum(length > limit for length in of_side)
        share = over / len(of_side)
        if len(of_side) < rows[side]:  # a sample decides only where it is clear
            share = float(binomtest(over, len(of_side)).proportion_ci(method="wilson").low)
        if over and share > allowed:
            return Item("length", False, f"{said}. {length_remedy(of_side, allowed)}")
    return Item("length", True, said)


def _ids_to_fit(stage: str, example: Example) -> int:
    """The ids that `max_length` counts: of PPO's rows those of the prompt."""
    return example.trained.index(1) if stage == "ppo" and any(example.trained) else len(example.trained)


def _is_stage(source: str) -> bool:
    """Whether a reward is a folder of ours: neither `module:function`, nor a model with a template of its own."""
    if ":" in source or (Path(source) / "config.json").is_file():
        return False
    return source.startswith(("runs/", "./", "../", "/")) or Path(source).is_dir()


def _parent(
    folder: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, unmade: bool = False
) -> Item:
    """The adapter that training starts from was trained on prompts of the same form."""
    if not Path(folder).is_dir():
        return Item("parent", unmade, f"there is no {folder} yet; an earlier stage makes it")
    try:
        theirs = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        return Item("parent", False, f"{folder} has no tokenizer that can be read: {error}")
    for example in examples:
        asked, trained = (render(example.messages, each)["input_ids"] for each in (tokenizer, theirs))
        if asked != trained:
            ours, other = tokenizer.decode(asked)[:80], theirs.decode(trained)[:80]
            return Item("parent", False, f"{folder} was trained on {other!r}, here the same dialogue is {ours!r}")
    return Item("parent", True, f"{folder} was trained on dialogues of the same form")


# --- what `rlhf check` shows -----------------------------------------------------------------------------------------


def show(stage: str, configs: Sequence[Any], console: Console | None = None, unmade: Sequence[str] = ()) -> list[str]:
    """Print the pre-flight list, a prompt, and a dialogue with its trained tokens marked.

    Returns:
        The names of the items that failed.
    """
    console = console or Console()
    examination = examine(stage, configs, unmade)
    values = values_of(configs)
    head = Table.grid(padding=(0, 2))
    for key in ("model_name_or_path", "dataset", "output_dir", "max_length"):
        head.add_row(Text(key, style="bold"), Text(str(values[key])))
    console.print(Panel(head, title=f"rlhf check: {stage}", title_align="left", border_style="cyan"))
    if plan := plan_of(configs):
        planned = Table.grid(padding=(0, 2))
        for key, value, reason in plan.rows():
            planned.add_row(Text(key, style="bold"), Text(value), Text(reason))
        title = f"the plan for {plan.num_examples:,} examples"
        console.print(Panel(planned, title=title, title_align="left", border_style="cyan"))
    if examination.example is not None and examination.tokenizer is not None:
        console.print(_shown_dialogue(stage, examination.example, examination.tokenizer))
    listed = Table(show_header=False, box=None, padding=(0, 1))
    for item in examination.items:
        style = "" if item.passed else "red" if item.blocks else "yellow"
        mark = Text("pass", style="green") if item.passed else Text("FAIL", style=f"bold reverse {style}")
        listed.add_row(mark, Text(item.name, style="bold"), Text(item.detail, style=style))
    console.print(Panel(listed, title="pre-flight", title_align="left", border_style="cyan"))
    failed = [item for item in examination.items if not item.passed]
    names = [item.name for item in failed]
    if any(item.blocks for item in failed):
        console.print(Text(f"{stage} is not fit to start: {', '.join(names)}", style="bold red"))
    elif failed:
        console.print(Text(f"{stage} would start, but see: {', '.join(names)}", style="bold yellow"))
    else:
        console.print(Text(f"{stage}: all {len(examination.items)} items passed", style="bold green"))
    return names


def show_recipe(stages: Mapping[str, Sequence[Any]], console: Console | None = None) -> dict[str, list[str]]:
    """[`show`] each training stage of a recipe, and at the end a line on each.

    Args:
        stages: The configurations of each stage, in the order in which they run.
        console: Where to print; None is the terminal.

    Returns:
        The names of the items that failed, by stage.
    """
    console = console or Console()
    failed: dict[str, list[str]] = {}
    unmade: list[str] = []
    for stage, configs in stages.items():
        failed[stage] = show(stage, configs, console, unmade)
        unmade.append(values_of(configs)["output_dir"])
        console.print()
    for stage, names in failed.items():
        line = (f"FAIL {stage}: {', '.join(names)}", "red") if names else (f"pass {stage}", "green")
        console.print(Text(*line))
    return failed


def as_findings(stages: Mapping[str, Sequence[Any]]) -> list[Finding]:
    """The pre-flight lists of a recipe's training stages, for programs: "warn" where an item fails and does not block.

    An item's detail ends with what to do about it.
    """
    findings: list[Finding] = []
    unmade: list[str] = []
    for stage, configs in stages.items():
        for item in examine(stage, configs, unmade).items:
            status: Status = "ok" if item.passed else "fail" if item.blocks else "warn"
            findings.append(Finding(f"{stage}: {item.name}", status, item.detail))
        unmade.append(values_of(configs)["output_dir"])
    return findings


def _shown_dialogue(stage: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Group:
    """The tokens in colour; brackets mark the trained ones where there is no colour."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = Text()
    before = 0
    for id, trained in zip(example.input_ids, example.trained, strict=True):
        shown = _shown_token(id, tokenizer)
        seen = shown[:1].isspace() or text.plain[-1:] in ("", "\n", " ") or id in special  # where it begins
        text.append("" if seen or trained != before else "·", style="dim")
        if trained != before:
            text.append("⟦" if trained else "⟧", style="bold green")
        before = trained
        style = "black on green" if trained else "dim"
        if id == tokenizer.eos_token_id:
            style = "black on yellow" if trained else "yellow"
        elif id in special:
            style = "magenta"
        text.append(shown, style=style)
    text.append("⟧" if before else "", style="bold green")
    legend = Text.assemble(
        ("trained", "black on green"), " ", ("stop token, trained", "black on yellow"), " ", ("special token", "magenta"),
        " ", ("context", "dim"), "  · between tokens that no space parts\n",
        f"{sum(example.trained)} of {len(example.trained)} tokens trained",
    )  # fmt: skip
    what = {"sft": "a dialogue", "ppo": "a prompt and its reference"}.get(stage, "a prompt and its chosen reply")
    runs = example.runs()
    prompt = tokenizer.decode(example.input_ids[: runs[0][0]] if runs else example.input_ids)
    return Group(
        Panel(Text(prompt), title="the first prompt, as the model is asked", title_align="left", border_style="cyan"),
        Panel(Group(text, Text(), legend), title=f"tokens of {what}", title_align="left", border_style="cyan"),
    )


def _shown_token(id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token's text with the space that it begins with; bytes of a character by their name."""
    piece, name = tokenizer.decode([id]), tokenizer.convert_ids_to_tokens(id)
    if "\ufffd" in piece:
        return name
    # SentencePiece's decoder takes the space of a first token away.
    space = " " if name.startswith("▁") and not piece.startswith(" ") else ""
    return (space + piece).replace("\n", "⏎\n")
