"""Files of the repository that a program writes: brought up to date, or compared."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_or_check(texts, check, script, old=()):
    """Writes the texts by path where they differ and deletes the old paths.

    With ``check`` it does neither, names what differs and ends the program, with 1 where anything does.
    """
    differ = sorted(
        path for path, text in texts.items() if not path.is_file() or path.read_text() != text
    )
    if check:
        for path in [*differ, *sorted(old)]:
            print(f"{path.relative_to(ROOT)} is out of date: run tools/{script}")
        sys.exit(bool(differ or old))
    for path in old:
        path.unlink()
    for path in differ:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path])
    print(f"{len(texts)} files, {len(differ)} changed")
