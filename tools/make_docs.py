"""Writes docs/mechanisms: one page per mechanism, from its card, cascades and record.

    .venv/bin/python tools/make_docs.py [--check]

--check writes nothing and fails if a page differs from what would be written.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "mechanisms"


def heed(*arguments):
    command = [ROOT / "build" / "heed", *arguments, "--json"]
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
        lines.append(f"Passes over `{shown['pass_rank']}`: {cascade['passes']}.")
        lines += ["", "Operations of each line, in sizes of ranks:", "", *counts_table(cascade["counts"])]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    mechanisms = heed("list")
    pages = {file_name(m["name"]): page(m) for m in mechanisms} | {"README.md": index(mechanisms)}
    old = {p.name for p in PAGES.glob("*.md")} - set(pages)
    differ = sorted(
        name
        for name, text in pages.items()
        if not (PAGES / name).is_file() or (PAGES / name).read_text() != text
    )
    if check:
        for name in [*differ, *sorted(old)]:
            print(f"docs/mechanisms/{name} is not what the program says: run tools/make_docs.py")
        sys.exit(bool(differ or old))
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in old:
        (PAGES / name).unlink()
    for name in differ:
        (PAGES / name).write_text(pages[name])
    print(f"{len(pages)} pages, {len(differ)} changed")


if __name__ == "__main__":
    main()
