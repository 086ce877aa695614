"""Writes docs/mechanisms: one page per mechanism, from its card, cascades and record.

    .venv/bin/python tools/make_docs.py [--check | --accuracy]

--check writes nothing and fails if a page differs from what would be written. --accuracy writes
docs/accuracy.md instead: what `heed check` finds on this machine, in some minutes.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from written_files import ROOT, write_or_check

PROGRAM = Path(os.environ.get("HEED_PROGRAM", ROOT / "build" / "heed"))
PAGES = ROOT / "docs" / "mechanisms"


ACCURACY = ROOT / "docs" / "accuracy.md"


def heed(*arguments):
    command = [PROGRAM, *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def file_name(name):
    return name + ".md"


def counts_table(counts):
    columns = ["tensor", *(key for key in counts[0] if key != "tensor")]
    lines = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * len(columns) + "|"]
    for row in counts:
        lines.append("| " + " | ".join(f"`{row[c]}`" for c in columns) + " |")
    return lines


def page(mechanism):
    shown = heed("show", mechanism["name"])
    papers = ", ".join(f"[arXiv {a}](https://arxiv.org/abs/{a})" for a in shown["arxiv"])
    gradient = "has gradients" if shown["differentiable"] else "forward only"
    lines = [shown["card"].strip(), "", "## Record", ""]
    lines.append(f"`{shown['name']}`: {shown['title']}. {papers}. Engine: {shown['engine']}; {gradient}.")
    for cascade in shown["cascades"]:
        lines += ["", f"## Cascade `{cascade['name']}`", "", "```", cascade["text"].strip(), "```", ""]
        if cascade["passes"] is not None:
            lines += [f"Passes over `{shown['pass_rank']}`: {cascade['passes']}.", ""]
        lines += ["Operations of each line, in sizes of ranks:", "", *counts_table(cascade["counts"])]
    lines += ["", f"`heed show {shown['name']}` prints this page's tables, `heed check {shown['name']}` proves the kernels."]
    return "\n".join(lines) + "\n"


def index(mechanisms):
    lines = ["# Mechanisms", "", "| name | what it is | engine | passes | gradients |", "|---|---|---|---|---|"]
    for m in mechanisms:
        gradient = "yes" if m["differentiable"] else "no"
        lines.append(
            f"| [{m['name']}]({file_name(m['name'])}) | {m['title']} | {m['engine']} | {m['passes']} | {gradient} |"
        )
    return "\n".join(lines) + "\n"


ACCURACY_TEXT = """# How close to float64

Every kernel is compared with its cascade, which the interpreter runs in float64: all example cases
of the registry, three memory layouts, each instruction set of the machine, forward and every
gradient. The inputs are the same numbers for both, already rounded to the type of the call. Inputs
are standard normal, so results are of the order of 1 and the absolute errors below can be read as
relative to that; gradients of sums can be larger.

An element may differ from float64 by

    u(result) |want| + 3 R + s max|want| + e

`u` is the unit roundoff of the result's type: the result has to be rounded. `R` is how much the
definition itself changes when its inputs are multiplied by `1 + s` or `1 - s` at random, with
`s = u` for 16-bit types (weights are rounded once more on the way to a matrix unit), `16 u` for
float32 and `64 u` for float64 (sums in another order). `s max|want|` allows for values that
cancelled; `e` is the smallest step of float16. Gradients add `s` times the largest gradient that
comes in. The table shows errors where they come closest to their bound. A ratio of 1 in the last
column would be an error as large as the bound; one above 1 fails the tests.

"""


def accuracy():
    """The table of docs/accuracy.md."""
    found = heed("cpu")
    lines = [
        f"Measured on {found['model']}, paths {', '.join(found['instruction_sets'])}; `heed check` repeats it on yours.",
        "",
        "| mechanism | type | comparisons | error of results | of gradients | error / bound |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for mechanism in heed("list"):
        rows = heed("check", mechanism["name"])
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            of_type = [r for r in rows if r["type"] == dtype]
            assert all(r["ok"] for r in of_type), mechanism["name"]
            results = [r["error"] for r in of_type if not r["result"].startswith("grad ")]
            gradients = [r["error"] for r in of_type if r["result"].startswith("grad ")]
            if not results:
                continue
            gradient = f"{max(gradients):.1e}" if gradients else "-"
            ratio = max(r["ratio"] for r in of_type)
            lines.append(
                f"| {mechanism['name']} | {dtype} | {len(of_type):,} | {max(results):.1e} | {gradient} | {ratio:.2f} |"
            )
    return ACCURACY_TEXT + "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--accuracy", action="store_true", help="write docs/accuracy.md")
    arguments = parser.parse_args()
    if arguments.accuracy:
        ACCURACY.write_text(accuracy())
        return
    mechanisms = heed("list")
    pages = {PAGES / file_name(m["name"]): page(m) for m in mechanisms}
    pages[PAGES / "README.md"] = index(mechanisms)
    write_or_check(pages, arguments.check, "make_docs.py", set(PAGES.glob("*.md")) - set(pages))


if __name__ == "__main__":
    main()
