"""Draws docs/masks/*.svg: which keys a query sees, for docs/masks.md.

    .venv/bin/python tools/draw_masks.py [--check]

--check writes nothing and fails if a picture differs from what would be drawn.
"""

import argparse

from written_files import ROOT, write_or_check

PICTURES = ROOT / "docs" / "masks"
CELL, MARGIN = 22, 34

STYLE = """<style>
  text { font: 12px sans-serif; fill: #555; }
  .seen { fill: #2f6fb3; } .own { fill: #16406f; } .hidden { fill: #8884; }
  @media (prefers-color-scheme: dark) { text { fill: #bbb; } .seen { fill: #5b9be0; } .own { fill: #a9cdf5; } }
</style>"""


def draw(name, queries, keys, sees):
    width, height = MARGIN + keys * CELL + 8, MARGIN + queries * CELL + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{name}">',
        STYLE,
        f'<text x="{MARGIN}" y="14">key 0 … {keys - 1}</text>',
        f'<text transform="translate(14 {MARGIN + queries * CELL}) rotate(-90)">query 0 … {queries - 1}</text>',
    ]
    for i in range(queries):
        for j in range(keys):
            kind = "hidden" if not sees(i, j) else "own" if j == i + keys - queries else "seen"
            x, y = MARGIN + j * CELL, MARGIN - 10 + i * CELL
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3"/>'
            )
    parts.append("</svg>\n")
    return "\n".join(parts)


def pictures():
    """The text of each picture by file name."""
    drawn = {}

    def add(name, *shape):
        drawn[f"{name}.svg"] = draw(name, *shape)

    add("causal_square", 6, 6, lambda i, j: j <= i)
    add("causal_more_keys", 4, 9, lambda i, j: j <= i + 5)
    add("causal_more_queries", 7, 4, lambda i, j: j <= i - 3)
    add("torch_more_keys", 4, 9, lambda i, j: j <= i)
    add("window", 6, 9, lambda i, j: i + 3 - 2 <= j <= i + 3 + 1)
    add("causal_window", 6, 9, lambda i, j: i + 3 - 2 <= j <= i + 3)
    add("lengths", 6, 9, lambda i, j: j <= i + 3 and j < 6)
    add("blocks", 8, 12, lambda i, j: (i // 4, j // 4) in {(0, 0), (0, 2), (1, 1), (1, 2)})
    return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    texts = {PICTURES / name: text for name, text in pictures().items()}
    write_or_check(texts, check, "draw_masks.py", set(PICTURES.glob("*.svg")) - set(texts))


if __name__ == "__main__":
    main()
