"""Each link between the pages leads to a file, and to a heading of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.running_pool import ROOT

PAGES = sorted(
    path
    for directory in ("", "docs", "deploy", "hsm_pool", "security_domain", "benchmarks", "proto")
    for path in (Path(ROOT) / directory).glob("*.md")
)
_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page as GitHub makes them."""
    texts = _HEADING.findall(_FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def test_there_are_pages_to_look_at() -> None:
    assert {"README.md", "operations.md", "architecture.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        whole = not anchor or target.suffix != ".md" or anchor in headings(target)
        if not target.exists() or not whole:
            broken.append(link)
    assert broken == []
