"""README's links into the code point at what they name."""

import re

from tests.conftest import ROOT


def test_links():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    drawn = [(name, "terdit.py", line) for name, line in re.findall(r" (\w+):(\d+)$", readme, re.MULTILINE)]
    assert len(links) > 5 and len(drawn) > 5  # in the text, and in the drawing of the blocks
    for name, file, line in links + drawn:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name}\b", text), f"README says {file}:{line} is {name}, it is {text!r}"
    for path in re.findall(r"\]\(([\w./]+)\)", readme):
        assert (ROOT / path).exists(), path
