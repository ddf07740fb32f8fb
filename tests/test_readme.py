"""README's links into the code point at what they name."""

import re

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
LINKED_NAMES = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
# In the drawing of the blocks a row ends in NAME:LINE, of terdit.py.
DRAWN_NAMES = [(name, "terdit.py", line) for name, line in re.findall(r" (\w+):(\d+)$", README, re.MULTILINE)]


def test_there_are_names_to_check():
    assert len(LINKED_NAMES) > 5
    assert len(DRAWN_NAMES) > 5


@pytest.mark.parametrize("name, file, line", LINKED_NAMES + DRAWN_NAMES)
def test_line_defines_the_name(name, file, line):
    text = (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert re.match(rf" *(def|class) {name}\b", text)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./]+)\)", README))))
def test_linked_file_exists(path):
    assert (ROOT / path).exists()
