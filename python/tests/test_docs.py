"""The pages: written ones are what the program says, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_mechanism_pages_are_what_the_program_says():
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_docs.py", "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_version_of_pytorch_is_the_same_everywhere():
    pins = {
        name: set(re.findall(r"(?<![\w-])torch==([\d.]+)", (ROOT / name).read_text()))
        for name in ("pyproject.toml", "packages/python.txt")
    }
    (version,) = pins["pyproject.toml"]
    assert pins["packages/python.txt"] == {version}
    assert f"installs PyTorch {version} there" in (ROOT / "README.md").read_text()
