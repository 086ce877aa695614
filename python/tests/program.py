"""The program `heed` as the tests run it."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
