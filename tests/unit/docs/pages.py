"""The documentation as its readers get it: pages, their code blocks, tables and links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"

Object = dict[str, Any]

_BLOCK = re.compile(r"^( *)```yaml\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]+`")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def pages() -> list[Path]:
    """Every page that users or contributors read."""
    roots = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "charts/pipelinejob/README.md"]
    return [*roots, *sorted(DOCS.rglob("*.md"))]


def yaml_blocks(page: Path) -> Iterator[Object]:
    """The objects of a page's YAML blocks."""
    for indent, text in _BLOCK.findall(page.read_text()):
        lines = (line.removeprefix(indent) for line in text.splitlines())
        yield from yaml.safe_load_all("\n".join(lines))


def links(page: Path) -> list[str]:
    """Targets of a page's links within the project."""
    found = _LINK.findall(_INLINE_CODE.sub("", _CODE.sub("", page.read_text())))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: Path, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head; code marks are taken off."""
    _, _, section = page.read_text().partition(f"\n## {heading}\n")
    assert section, f"{page} has no heading {heading}"
    rows = []
    for line in section.split("\n## ")[0].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]
