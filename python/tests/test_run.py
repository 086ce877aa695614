"""`heed run` and `heed eval`: prompts, options, every attention, what people get wrong, Ctrl-C."""

import os
import re
import signal
import subprocess
import time

import pytest

from program import (
    ENVIRONMENT,
    PROGRAM,
    ROOT,
    STORIES,
    changed_model,
    error_of,
    heed,
    heed_json,
    needs_program,
)

pytestmark = needs_program
BARE = ["run", "--no-chat", "--dtype", "f32", "--max-tokens"]
ONCE = [*BARE, "8", "--model", STORIES]


@pytest.mark.parametrize("end, same", [("\n", True), ("\r\n", True), ("\n\n", False)])
def test_the_newline_at_the_end_of_a_file_is_none_of_the_prompt(tmp_path, end, same):
    text = "Once upon a time"
    tokens = heed_json(*ONCE, "-p", text)["prompt_tokens"]
    file = tmp_path / "prompt.txt"
    file.write_bytes((text + end).encode())
    assert (heed_json(*ONCE, stdin=text + end)["prompt_tokens"] == tokens) == same
    assert (heed_json(*ONCE, "-f", file)["prompt_tokens"] == tokens) == same
    assert "prompt is empty" in error_of(*ONCE, stdin="\n")
    file.write_bytes(b"Once \xc3")
    assert "--file: found byte 0xc3 at offset 5, needed UTF-8" in error_of(*ONCE, "-f", file)


def test_a_text_that_goes_on_has_no_end_token(tmp_path):
    model = changed_model(tmp_path / "model.gguf", add_eos_token=True)
    plain, other = (
        heed_json(*BARE, "8", "-p", "Once upon a time", "--model", m) for m in (STORIES, model)
    )
    assert other["prompt_tokens"] == plain["prompt_tokens"] and other["text"] == plain["text"]


def test_a_text_without_roles_may_name_special_tokens():
    plain = heed_json(*ONCE, "-p", "Once upon a time")
    begun = heed_json(*ONCE, "-p", "<s>Once upon a time")
    assert begun["prompt_tokens"] == plain["prompt_tokens"] and begun["text"] == plain["text"]
    assert heed_json(*ONCE, "-p", "Once upon a time</s><s>")["prompt_tokens"] == 7
    assert "special tokens" in heed("run", "--help").stdout


def test_tokenizers_that_do_not_fit_the_model(tmp_path):
    more = changed_model(tmp_path / "more.gguf", tokens=513)
    assert "512 rows" in error_of(*BARE, "8", "-p", "Once", "--model", more)
    fewer = changed_model(tmp_path / "fewer.gguf", tokens=400)
    draw = ["-p", "Once", "--model", fewer, "--temperature", "5"]
    assert max(heed_json(*BARE, "60", *draw)["tokens"]) < 400


@pytest.mark.parametrize("option", ["--temperature", "--top-p", "--max-tokens"])
@pytest.mark.parametrize("value", ["", "warm"])
def test_what_is_no_number_is_refused(option, value):
    message = error_of(*ONCE, "-p", "Once", option, value)
    assert option in message and f"found '{value}'" in message and "needed" in message


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
        ([*ONCE, "-p", "x", "--attention", "affine_scaled:window=30,left=3"], "and left=3"),
        ([*ONCE, "-p", "x", "--attention", f"stochastic:seed={2**64}"], "-2^63 to 2^63 - 1"),
        (["run", "-p", "x", "--dtype", "int4x"], "--dtype: dtype is int4x, needed is f32, "),
        ([*ONCE, "-p", "x", "--temperature", "nan"], "--temperature: found 'nan'"),
        ([*ONCE, "-p", os.fsdecode(b"ab\xff")], "--prompt: found byte 0xff at offset 2"),
        (["run", "-p", "x", "--system", os.fsdecode(b"\xc3(")], "--system: found byte 0xc3"),
        (["eval", "--text", "LICENSE", "--stride", "x"], "--stride: found 'x', needed a whole"),
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


def test_help_says_when_the_temperature_is_applied():
    text = " ".join(heed("run", "--help").stdout.split())
    assert "in this order, by probabilities before the temperature" in text


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


def stories(*arguments, **options):
    return heed_json("run", "--model", STORIES, "--no-chat", "--dtype", "f32", *arguments, **options)


def test_run_continues_a_text():
    answer = stories("-p", "Once upon a time", "--max-tokens", "20")
    assert set(answer) >= {
        "prompt_tokens", "prompt_tokens_read", "tokens", "text", "prefill_tokens_per_s",
        "decode_tokens_per_s", "attention_share",
    }  # fmt: skip
    assert answer["prompt_tokens_read"] == answer["prompt_tokens"]
    assert answer["prompt_tokens"] == 5 and len(answer["tokens"]) == 20
    assert answer["text"].startswith(", there was a little girl named Lily.")
    assert answer["decode_tokens_per_s"] > 0 and 0 < answer["attention_share"] < 1
    plain = heed("run", "--model", STORIES, "--no-chat", "--dtype", "f32", "-p",
                 "Once upon a time", "--max-tokens", "20")  # fmt: skip
    assert plain.stdout == answer["text"] + "\n"
    assert "tokens/s" in plain.stderr and "attention" in plain.stderr


def test_numbers_are_decimal():
    answer = stories("-p", "Once upon a time", "--max-tokens", "010")
    assert len(answer["tokens"]) == 10


def test_run_takes_prompts_from_files_and_pipes(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")
    texts = {
        stories("-p", "Once upon a time", "--max-tokens", "8")["text"],
        stories("-f", file, "--max-tokens", "8")["text"],
        stories("-f", "-", "--max-tokens", "8", stdin="Once upon a time")["text"],
        stories("--max-tokens", "8", stdin="Once upon a time")["text"],
    }
    assert len(texts) == 1


def test_run_draws_by_seed():
    draw = ["-p", "Once", "--max-tokens", "30", "--temperature", "1", "--top-k", "40"]
    first, again, other = (stories(*draw, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other
    assert stories(*draw, "--seed", 2**64 - 1)["tokens"] != first


def test_run_with_other_attention():
    ask = ["-p", "Once upon a time, there was a", "--max-tokens", "40"]
    full = stories(*ask)["tokens"]
    assert stories(*ask, "--attention", "flash:window=100000")["tokens"] == full
    assert stories(*ask, "--attention", "flash:window=1")["tokens"] != full
    assert stories(*ask, "--attention", "sigmoid:bias=-8")["tokens"] != full


CAUSAL = [
    "affine_scaled", "flash", "lightning", "linear", "local_linear", "magnitude_aware_linear",
    "na1d", "recurrent_softmax", "sigmoid", "stochastic", "taylor_state",
]  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_run_with_every_causal_mechanism(name):
    answer = stories("-p", "Once upon a time", "--max-tokens", "6", "--attention", name)
    assert len(answer["tokens"]) == 6
    assert (answer["cache_bytes"] == 0) != (answer["state_bytes"] == 0)


def test_run_with_attention_that_is_softmax_in_other_words():
    ask = ["-p", "Once upon a time, there was a", "--max-tokens", "40"]
    full = stories(*ask)["tokens"]
    for same in (
        "5xflash",
        "2xflash/3xrecurrent_softmax",
        "affine_scaled:alpha=1,alpha_mean=1",
        "stochastic:window=5000",
        "na1d:kernel_size=5000",
        "local_linear:ridge=1e9",
        "flash/na1d:kernel_size=600/stochastic:window=2000/flash:window=500/recurrent_softmax",
    ):
        assert stories(*ask, "--attention", same)["tokens"] == full, same


def test_run_with_attention_per_layer():
    ask = ["-p", "Once upon a time, there was a", "--max-tokens", "30"]
    texts = {
        spec: stories(*ask, "--attention", spec)["text"]
        for spec in ("flash", "4xflash/lightning", "lightning/4xflash", "5xlightning")
    }
    assert len(set(texts.values())) == len(texts)


def test_run_keeps_states_of_a_fixed_size():
    """5 layers of 8 heads of 8 x 8 float32; a tenth of a cache's growth is too much."""
    for words in (10, 2000):
        answer = stories("-p", "Once upon " * words, "--attention", "lightning", "--context",
                         "1000000000", "--max-tokens", "3")  # fmt: skip
        assert answer["state_bytes"] == 5 * 8 * 8 * 8 * 4 and answer["cache_bytes"] == 0
    mixed = stories("-p", "Once", "--attention", "4xlightning/flash", "--max-tokens", "3")
    cached = stories("-p", "Once", "--max-tokens", "3")
    assert mixed["cache_bytes"] == cached["cache_bytes"] / 5 > 0
    ask = ["run", "--model", STORIES, "--no-chat", "-p", "Once", "--max-tokens", "3"]
    assert "; cache 0." in heed(*ask).stderr
    assert "; states 0.0 MB" in heed(*ask, "--attention", "lightning").stderr


def test_stochastic_attention_follows_its_seed():
    ask = ["-p", "Once upon a time, there was a little girl " * 4, "--max-tokens", "30"]
    first, again, other = (
        stories(*ask, "--attention", f"stochastic:window=8,seed={seed}")["tokens"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["-p", "x", "--attention", "flash:window"], "key=value"),
        (["-p", "x", "--attention", "flash:window=many"], "window"),
        (["-p", "x", "--attention", ""], "NAME"),
        (["-p", "x", "--attention", "merge"], "flash, "),
        (["-p", "x", "--attention", "falsh"], "did you mean 'flash'"),
        (["-p", "x", "--attention", "flash/lightning"], "found a pattern of 2 layers"),
        (["-p", "x", "--attention", "4xflash/3xlightning"], "more than 5 layers"),
        (["-p", "x", "--attention", "0xflash/5xlightning"], "count of 0"),
        (["-p", "x", "--attention", "flash/"], "NAME"),
        (["-p", "x", "--attention", "flash:causal=0"], "causal"),
        (["-p", "x", "--attention", "lightning:slopes=1"], "decay, form"),
        (["-p", "x", "--attention", "linear:map=performer"], "projection"),
        (["-p", "x", "--attention", "taylor_state:order=4"], "0 to 3"),
        (["-p", "x", "--attention", "affine_scaled:alpha=inf"], "alpha is inf"),
        (["-p", "x", "--dtype", "f31"], "did you mean 'f32'"),
        (["-p", "x", "--dtype", "f16"], "dtype is f16, needed is f32, bf16 or int4"),
        (["-p", "x", "--temperature", "-1"], "temperature"),
        (["-p", "x", "--top-p", "2"], "top_p"),
        (["-p", "x", "--threads", "0"], "thread"),
        (["-p", "x", "--context", "0"], "--context"),
        (["-p", "x", "--context", "8k"], "--context"),
        (["-p", "x", "--max-tokens", "-1"], "--max-tokens"),
        (["-p", ""], "prompt is empty"),
        (["-p", "x", "-f", "y"], "--prompt"),
        (["-f", "no-such-file"], "no-such-file"),
        (["-f", "/dev/zero"], "more than 256 MiB"),
        (["-p", "x", "--system", "y"], "--system"),
    ],
)
def test_run_refuses(arguments, expected):
    assert expected in error_of("run", "--model", STORIES, "--no-chat", *arguments)


def test_a_prompt_longer_than_the_context_says_so():
    base = ["run", "--model", STORIES, "--no-chat"]
    message = error_of(*base, "--context", "16", "-p", "Once upon " * 50)
    assert "context" in message and "16" in message


def test_a_full_context_ends_the_answer():
    answer = stories("-p", "Once upon a time", "--context", "16", "--max-tokens", "100")
    assert answer["stop"] == "context full"
    assert answer["prompt_tokens"] + len(answer["tokens"]) == 17  # the last one is never read


def test_missing_and_broken_models(tmp_path):
    assert "no-such.gguf" in error_of("run", "--model", "no-such.gguf", "-p", "x")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(STORIES.read_bytes()[:5000])
    error_of("run", "--model", broken, "-p", "x", "--no-chat")
    broken.write_bytes(b"not a model")
    error_of("eval", "--model", broken, "--text", STORIES)
    error_of("run", "--model", tmp_path, "-p", "x")
    message = error_of("run", "--model", "/dev/null", "-p", "x")
    assert "'/dev/null' is not a regular file" in message
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    message = error_of("run", "--model", loop, "-p", "x")
    assert f"--model: cannot read '{loop}': " in message


def test_models_of_a_folder_have_names(tmp_path):
    (tmp_path / "tiny.gguf").symlink_to(STORIES)
    folder = {"HEED_MODELS": f"/nowhere:{tmp_path}"}
    named = ["run", "--no-chat", "-p", "Once", "--max-tokens", "3"]
    assert heed_json(*named, "--model", "tiny", env=folder)["tokens"]
    assert "did you mean 'tiny'" in error_of(*named, "--model", "tinny", env=folder)


def test_a_model_without_chat_says_what_to_do():
    assert "--no-chat" in error_of("run", "--model", STORIES, "-p", "Hello")


def test_a_chat_form_is_looked_for_before_the_weights_are_read(tmp_path):
    norm = "blk.4.ffn_norm.weight"
    model = changed_model(tmp_path / "model.gguf", without=norm)
    ask = ["run", "--model", model, "-p", "Hello"]
    assert "tokenizer.chat_template" in error_of(*ask)
    assert norm in error_of(*ask, "--no-chat")


def test_ctrl_c_stops_the_answer_and_prints_the_statistics():
    program = subprocess.Popen(
        [PROGRAM, "run", "--model", STORIES, "--no-chat", "-p", "Once upon a time", "--temperature",
         "1", "--context", "100000", "--max-tokens", "90000"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=ENVIRONMENT,
    )  # fmt: skip
    first = program.stdout.read(1)  # the answer has begun
    program.send_signal(signal.SIGINT)
    rest, errors = program.communicate(timeout=120)
    assert program.returncode == 130, errors
    assert first and rest.endswith(b"\n")
    assert b"interrupted" in errors and b"tokens/s" in errors


def test_eval(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time, there was a little girl named Lily. She loved to play. " * 8)
    arguments = ["eval", "--model", STORIES, "--dtype", "f32", "--text", file]
    found = heed_json(*arguments, "--context", "64")
    assert found["complete"] and found["scored_tokens"] == found["tokens"] - 1
    assert 1 < found["perplexity"] < 50
    windowed = heed_json(*arguments, "--context", "64", "--attention", "flash:window=1")
    assert windowed["perplexity"] > found["perplexity"]
    strided = heed_json(*arguments, "--context", "64", "--stride", "63")
    assert strided["perplexity"] != found["perplexity"]
    assert found["tokens_per_s"] > 0 and found["cache_bytes"] > 0 == found["state_bytes"]
    assert "perplexity" in heed(*arguments).stdout
    assert heed_json(*arguments[:-1], "-", stdin=file.read_text())["tokens"] == found["tokens"]
    apart = heed_json(*arguments, "--context", "64", "--stride", "64")
    windows = -(-found["tokens"] // 64)
    assert apart["complete"] and apart["scored_tokens"] == found["tokens"] - windows
    assert apart["tokens"] == found["tokens"] and windows > 1


def test_eval_says_where_a_text_is_not_utf8(tmp_path):
    file = tmp_path / "story.txt"
    file.write_bytes(b"Once upon a \xff time")
    note = "is not UTF-8 throughout"
    assert note in heed("eval", "--model", STORIES, "--text", file).stderr
    file.write_text("Once upon a \u00ff time")
    assert note not in heed("eval", "--model", STORIES, "--text", file).stderr


def test_a_perplexity_of_nan_is_an_error():
    text = ["--model", STORIES, "--text", "LICENSE", "--attention", "flash:scale=1e38"]
    message = error_of("eval", *text, "--json")
    assert "hold NaN or infinity" in message and "--attention overflowed" in message


def test_an_answer_from_nan_is_an_error():
    message = error_of(*ONCE, "-p", "Once upon a time", "--attention", "flash:scale=1e38")
    assert "hold NaN or infinity" in message and "--attention overflowed" in message


def test_eval_of_mixes_and_states(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time, there was a little girl named Lily. She loved to play. " * 40)
    arguments = ["eval", "--model", STORIES, "--dtype", "f32", "--text", file, "--attention"]
    perplexities = {
        spec: heed_json(*arguments, spec)["perplexity"]
        for spec in (
            "flash",
            "stochastic:window=16",
            "2xflash/3xstochastic:window=16",
            "flash:window=8/4xstochastic:window=16",
        )
    }
    assert len({round(p, 6) for p in perplexities.values()}) == len(perplexities)
    assert min(perplexities, key=perplexities.get) == "flash"
    # A window over all slots is softmax attention, also where windows are longer than a chunk.
    everything, full = (
        heed_json(*arguments, spec, "--context", "700")["perplexity"]
        for spec in ("stochastic:window=2000", "flash")
    )
    assert everything == pytest.approx(full, rel=1e-4)
    # One definition, by a state and over a cache, in windows that begin anew.
    state, cache = (
        heed_json(*arguments, spec, "--context", "100")
        for spec in ("taylor_state:order=2", "recurrent_softmax:order=2")
    )
    assert state["perplexity"] == pytest.approx(cache["perplexity"], rel=1e-3)
    assert state["cache_bytes"] == 0 < state["state_bytes"]


def test_specifications_of_the_page_on_real_models_are_understood():
    text = (ROOT / "docs" / "real-model.md").read_text()
    named = re.findall(r"`(?:--attention )?([\w]+(?:[:/][\w:=,./-]+)?)`", text)
    causal = [spec for spec in named if re.sub(r"^\d+x", "", spec).startswith(tuple(CAUSAL))]
    assert len(causal) > 20 and {re.split("[:/]", spec)[0] for spec in causal} >= set(CAUSAL)
    for spec in dict.fromkeys(causal):
        # The page speaks of a model of 30 layers; with 5 its patterns are understood and do not fit.
        done = subprocess.run(
            [PROGRAM, "run", "--model", STORIES, "--no-chat", "-p", "x", "--max-tokens", "1",
             "--attention", spec], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 0 or "divides the model's 5" in done.stderr, (spec, done.stderr)


def test_eval_refuses(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    base = ["eval", "--model", STORIES]
    assert "--text" in error_of(*base)
    assert "no-such" in error_of(*base, "--text", "no-such")
    error_of(*base, "--text", empty)
    assert "stride" in error_of(*base, "--text", STORIES, "--stride", "0")
    text = ["--text", ROOT / "LICENSE"]
    assert "stride" in error_of(*base, *text, "--context", "32", "--stride", "33")
    for context in ("0", "1"):
        message = error_of(*base, *text, "--context", context)
        assert f"--context: found '{context}', needed a whole number from 2" in message
