"""The program `heed` as the tests run it."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORIES = ROOT / "models" / "stories260K.gguf"
PROGRAM = pathlib.Path(os.environ.get("HEED_PROGRAM", ROOT / "build" / "heed"))
# Waiting threads sleep, so that tests side by side do not take each other's cores.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", **os.environ}

# What runs in the background ignores Ctrl-C, and so would the programs started here. A handler of this
# process is none of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

needs_program = pytest.mark.skipif(not PROGRAM.exists(), reason=f"no program at {PROGRAM}")


def heed(*arguments, stdin="", code=0, env=None, cwd=ROOT):
    done = subprocess.run(
        [PROGRAM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**ENVIRONMENT, **(env or {})},
        cwd=cwd,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def heed_json(*arguments, **options):
    return json.loads(heed(*arguments, "--json", **options).stdout)


def error_of(*arguments, **options):
    done = heed(*arguments, code=2, **options)
    assert done.stdout == ""
    assert done.stderr.startswith("heed: ")
    assert done.stderr.count("\n") == 1, "one line for one mistake"
    return done.stderr


def changed_model(path, tokens=None, template=None, without=None, **flags):
    """The stories model with other tokens or flags, a chat form, without a tensor."""
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
        if tensor.name == without:
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
