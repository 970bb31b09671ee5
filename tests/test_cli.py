"""The command `rlhf`."""

import io
import shutil

import pytest

from rlhf.cli import main


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "run" in shown and "chat" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "recipes/none"], "is no recipe"),
        (["run", "recipes/demo", "--set", "seed"], "--set stage.key=value"),
        (["run", "recipes/demo", "--set", "sft.sed=1"], "did you mean `seed`"),
        (
            ["run", "recipes/demo", "--set", "sed=1"],
            "`sed` (--set): no stage of this recipe knows it; did you mean `seed`",
        ),
        (["run", "recipes/demo", "--set", "sfft.lora_r=4"], "no stage 'sfft'; did you mean `sft`?; there are prepare"),
        (["run", "recipes/demo", "--until", "deploy"], "invalid choice: 'deploy'"),
        (["chat", "recipes/demo"], "neither a run of a recipe nor a training stage"),
        (["chat", "recipes/demo", "--temperature", "-1"], "must be 0 (greedy) or more, got -1"),
        (["deploy"], "invalid choice: 'deploy'"),
    ],
)
def test_what_the_user_can_mend_is_a_message(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(__import__("pathlib").Path(__file__).parents[1])
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_a_defect_is_not_hidden(monkeypatch):
    import rlhf.pipeline

    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(rlhf.pipeline, "run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["run", "recipes/demo"])


@pytest.mark.parametrize("ending", ["\n", ""], ids=["an empty line", "end of input"])
def test_chat(ending, sft_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"do you have a dog ?\nreally ?\n{ending}"))
    main(["chat", str(sft_run.folder), "--fact", "i have a dog .", "--max_new_tokens", "5"])
    shown = capsys.readouterr().out
    assert "persona: i have a dog ." in shown and shown.count("bot: ") == 2


def test_chat_takes_a_held_out_persona(ppo_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    main(["chat", str(ppo_run.folder)])
    assert "persona: i have a dog . i like rice ." in capsys.readouterr().out  # number 100 of the rows


def test_chat_with_a_run_whose_base_is_elsewhere(sft_run, tiny_llama, tmp_path, capsys, monkeypatch):
    shutil.copytree(sft_run.folder, tmp_path / "a" / "b" / "c" / "sft")
    chat = ["chat", str(tmp_path / "a" / "b" / "c" / "sft"), "--fact", "i have a dog ."]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit):
        main(chat)
    assert "is not there" in (said := capsys.readouterr().err) and "Give --model_name_or_path" in said
    main([*chat, "--model_name_or_path", str(tiny_llama)])
    assert "persona: i have a dog ." in capsys.readouterr().out


def test_chat_replies_with_the_adapter(sft_run, tiny_llama, capsys, monkeypatch):
    """What it says is what the trained model generates: messages of the chat so far, persona first."""
    from rlhf.generate import generate
    from rlhf.model import load_tokenizer

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    main(["chat", str(sft_run.folder), "--fact", "i have a cat .", "--max_new_tokens", "8"])
    bot = [line.split("bot: ")[1] for line in capsys.readouterr().out.split("\n") if "bot: " in line]
    messages = [{"role": "system", "content": "i have a cat ."}]
    for text, reply in zip(("hello", "again"), bot, strict=True):
        messages.append({"role": "user", "content": text})
        expected = generate(sft_run.trainer.model, load_tokenizer(str(tiny_llama)), [messages], 8)[0]
        assert reply == expected.split("\n")[0]
        messages.append({"role": "assistant", "content": expected})


def test_chat_with_a_run_takes_its_last_adapter(sft_run, dpo_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for stage, run in (("sft", sft_run), ("dpo", dpo_run)):
        (tmp_path / stage).symlink_to(run.folder)
        main(["chat", str(tmp_path), "--fact", "i have a dog ."])
        assert f"adapter: {tmp_path / stage}\n" in capsys.readouterr().out
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
