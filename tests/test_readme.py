"""README's links into the code point at what they name."""

import re

from tests.conftest import ROOT


def test_links():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) > 5
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), f"README says {file}:{line} is {name}, it is {text!r}"
    for path in re.findall(r"\]\(([\w./]+)\)", readme):
        assert (ROOT / path).exists(), path
