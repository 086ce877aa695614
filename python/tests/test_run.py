"""`heed run` and `heed eval`: prompts, options and files that people get wrong, and Ctrl-C."""

import os
import pty
import select
import signal
import subprocess
import time

import pytest

from program import ENVIRONMENT, PROGRAM, ROOT, error_of, heed, heed_json, needs_program

STORIES = ROOT / "models" / "stories260K.gguf"
pytestmark = needs_program
BARE = ["run", "--no-chat", "--dtype", "f32", "--max-tokens"]
ONCE = [*BARE, "8", "--model", STORIES]


def changed_model(path, tokens=None, template=None, **flags):
    """The stories model with another number of tokens in its tokenizer, a chat form, other flags."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    reader = gguf.GGUFReader(STORIES)
    writer = gguf.GGUFWriter(path, "llama")
    per_token = {"tokens": "<more>", "scores": -1e6, "token_type": 3}
    changes = {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changes:
            continue
        value = field.contents()
        short = name.removeprefix("tokenizer.ggml.")
        if tokens is not None and short in per_token:
            value = (value + [per_token[short]] * tokens)[:tokens]
        writer.add_key_value(name, value, field.types[0], field.types[-1])
    for name, value in changes.items():
        writer.add_bool(name, value)
    if template is not None:
        writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("end, same", [("\n", True), ("\r\n", True), ("\n\n", False)])
def test_the_newline_at_the_end_of_a_file_is_none_of_the_prompt(tmp_path, end, same):
    text = "Once upon a time"
    tokens = heed_json(*ONCE, "-p", text)["prompt_tokens"]
    file = tmp_path / "prompt.txt"
    file.write_bytes((text + end).encode())
    assert (heed_json(*ONCE, stdin=text + end)["prompt_tokens"] == tokens) == same
    assert (heed_json(*ONCE, "-f", file)["prompt_tokens"] == tokens) == same
    assert "prompt is empty" in error_of(*ONCE, stdin="\n")


def test_a_text_that_goes_on_has_no_end_token(tmp_path):
    model = changed_model(tmp_path / "model.gguf", add_eos_token=True)
    plain, other = (
        heed_json(*BARE, "8", "-p", "Once upon a time", "--model", m) for m in (STORIES, model)
    )
    assert other["prompt_tokens"] == plain["prompt_tokens"] and other["text"] == plain["text"]


def test_tokenizers_that_do_not_fit_the_model(tmp_path):
    more = changed_model(tmp_path / "more.gguf", tokens=513)
    assert "512 rows" in error_of(*BARE, "8", "-p", "Once", "--model", more)
    fewer = changed_model(tmp_path / "fewer.gguf", tokens=400)
    draw = ["-p", "Once", "--model", fewer, "--temperature", "5"]
    assert max(heed_json(*BARE, "60", *draw)["tokens"]) < 400


@pytest.mark.parametrize("option", ["--top-k", "--top-p", "--min-p", "--seed"])
def test_options_of_draws_need_a_temperature(option):
    message = error_of(*ONCE, "-p", "Once", option, "1")
    assert option in message and "--temperature above 0" in message
    heed(*ONCE, "-p", "Once", option, "1", "--temperature", "0.5")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["run", "--top-k", "3000000000"], "from 1 to 2147483647"),
        (["run", "--threads", "1025"], "from 1 to 1024"),
        (["run", "What is 2+2?"], "-p TEXT"),
        (["run", "What is 2+2?"], "--model FILE"),
        (["eval", "file.txt", "--text", "x"], "--text FILE"),
        (["eval", "file.txt"], "--text"),
        ([*ONCE, "-p", "x", "--attention", "flash:dropout=0.5"], "window, softcap, scale"),
        ([*ONCE, "-p", "x", "--attention", "flash:seed=1"], "window, softcap, scale"),
        ([*ONCE, "-p", "x", "--attention", "sigmoid:right=1"], "bias, window, scale"),
        ([*ONCE, "-p", "x", "--attention", "unknown"], "a model takes: "),
    ],
)
def test_refusals(arguments, expected):
    assert expected in error_of(*arguments)


def test_misspelt_attention_names_only_what_a_model_takes():
    message = error_of(*ONCE, "-p", "x", "--attention", "unknown")
    assert "lightning" in message and "parallax" not in message


def test_help_says_where_models_lie_and_where_to_read_on():
    for command in ("run", "eval"):
        text = heed(command, "--help").stdout
        assert "HEED_MODELS" in text and "docs/real-model.md" in text


def test_a_context_longer_than_the_model_was_trained_for_is_said():
    ask = [*ONCE, "-p", "Once", "--context"]
    assert "trained for 512 tokens" in heed(*ask, "513").stderr
    assert "trained for" not in heed(*ask, "512").stderr
    assert "trained for" not in heed(*ask, "513", "--attention", "lightning").stderr


DRAW = ["--model", STORIES, "-p", "Once", "--temperature", "1"]
LONG = [*BARE, "90000", *DRAW, "--context", "100000"]


def test_ctrl_c_while_nobody_reads_is_no_error_of_writing():
    program = subprocess.Popen(
        [PROGRAM, *map(str, LONG)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT, pipesize=4096,
    )  # fmt: skip
    time.sleep(5)  # the pipe is full
    program.send_signal(signal.SIGINT)
    time.sleep(0.5)
    _, errors = program.communicate(timeout=120)
    assert program.returncode == 130 and b"interrupted" in errors, errors


def test_ctrl_c_that_the_parent_ignores_stays_ignored():
    program = subprocess.Popen(
        [PROGRAM, *map(str, [*BARE, "200", *DRAW])],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=ENVIRONMENT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    program.stdout.read(1)
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=120)
    assert program.returncode == 0 and b"interrupted" not in errors, errors


def conversation(model, *steps):
    """What a terminal shows: each step waits for a text and then types one."""
    parent, child = pty.openpty()
    program = subprocess.Popen(
        [PROGRAM, "run", "--model", model, "--max-tokens", "5"], stdin=child, stdout=child,
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


def test_commands_of_a_conversation(chat_model):
    code, shown = conversation(
        chat_model, (b"> ", b"  /reset \n"), (b"> ", b"/rset\n"), (b"there is no /rset", b""),
        (b"> ", b"Hello\n"), (b"in attention", b""), (b"> ", b"/quit \n"),
    )  # fmt: skip
    assert code == 0 and b"/reset starts" in shown and shown.count(b"in attention") == 1


@pytest.mark.parametrize("last", [b"\x03", b"\x04", b"/exit\n"])
def test_ctrl_c_at_the_prompt_says_how_to_end(chat_model, last):
    code, shown = conversation(
        chat_model, (b"> ", b"\x03"), (b"Ctrl-C once more ends", b""), (b"> ", last)
    )
    assert code == 0, shown
