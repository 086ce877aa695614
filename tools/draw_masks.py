"""Draws docs/masks/*.svg: which keys a query sees, for docs/masks.md.

    .venv/bin/python tools/draw_masks.py
"""

from pathlib import Path

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "masks"
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
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / f"{name}.svg").write_text("\n".join(parts))


def main():
    draw("causal_square", 6, 6, lambda i, j: j <= i)
    draw("causal_more_keys", 4, 9, lambda i, j: j <= i + 5)
    draw("causal_more_queries", 7, 4, lambda i, j: j <= i - 3)
    draw("torch_more_keys", 4, 9, lambda i, j: j <= i)
    draw("window", 6, 9, lambda i, j: i + 3 - 2 <= j <= i + 3 + 1)
    draw("causal_window", 6, 9, lambda i, j: i + 3 - 2 <= j <= i + 3)
    draw("lengths", 6, 9, lambda i, j: j <= i + 3 and j < 6)
    draw("blocks", 8, 12, lambda i, j: (i // 4, j // 4) in {(0, 0), (0, 2), (1, 1), (1, 2)})


if __name__ == "__main__":
    main()
