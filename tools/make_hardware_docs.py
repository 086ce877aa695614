"""Fills docs/hardware.md with what the program says, and draws its figures.

    .venv/bin/python tools/make_hardware_docs.py [--check | --measure]

Every block of the page that starts with `$ heed hardware ...` holds the output of that command; figures
lie in docs/hardware. --check writes nothing and fails where something differs. --measure also draws the
figures of this machine: the roofline of all mechanisms and time against length, some ten minutes.
"""

import argparse
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from written_files import ROOT, write_or_check

PAGE = ROOT / "docs" / "hardware.md"
FIGURES = ROOT / "docs" / "hardware"
PROGRAM = Path(os.environ.get("HEED_PROGRAM", ROOT / "build" / "heed"))

BLOCK = re.compile(r"```\n\$ heed (hardware [^\n]*)\n.*?```", re.DOTALL)
COMPUTED = {
    "fusemax.svg": "hardware fusemax --model bert",
    "area.svg": "hardware fusemax --area-sweep",
}
MEASURED = {
    "roofline.svg": "bench --seconds 0.1",
    "lengths.svg": "bench --sweep length",
}


def heed(command):
    done = subprocess.run([PROGRAM, *shlex.split(command)], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def filled(page):
    def output(block):
        text = "\n".join(line.rstrip() for line in heed(block[1]).splitlines())
        return f"```\n$ heed {block[1]}\n{text}\n```"

    return BLOCK.sub(output, page)


def drawn(command):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        heed(f"{command} --plot {path}")
        return path.read_text()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare instead of writing")
    mode.add_argument("--measure", action="store_true", help="also the figures of this machine")
    arguments = parser.parse_args()
    texts = {PAGE: filled(PAGE.read_text())}
    figures = COMPUTED | (MEASURED if arguments.measure else {})
    texts |= {FIGURES / name: drawn(command) for name, command in figures.items()}
    write_or_check(texts, arguments.check, "make_hardware_docs.py")


if __name__ == "__main__":
    main()
