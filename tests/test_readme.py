"""README's names and links: what it says is in a file is there."""

import ast
import re
from functools import lru_cache

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
NAME = r"`(?P<name>\w+)`"
FILE = r"(?P<file>[\w/]+\.(?:py|cu))\b"
FORMS = [
    rf"\[{NAME}\]\({FILE}",  # [`name`](file)
    rf"{NAME} in (?:\[|`)?{FILE}",  # `name` in file; in `file`; in [file](file)
    rf"{NAME} \((?:\[|`)?{FILE}",  # `name` (file)
    rf"{FILE}`?'s\s{NAME}",  # file's `name`
]
NAMES_WITH_FILE = sorted({(m["name"], m["file"]) for form in FORMS for m in re.finditer(form, README)})
RELATIVE_LINKS = sorted(set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README)))


@lru_cache(maxsize=None)
def defined_names(file):
    """Functions, classes and their methods, and constants: every name that a .py or .cu file defines."""
    text = (ROOT / file).read_text()
    if file.endswith(".cu"):
        return set(re.findall(r"\b(\w+)\s*[({=]", text))
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_there_are_names_and_links_to_check():
    assert len(NAMES_WITH_FILE) > 5
    assert len(RELATIVE_LINKS) > 5


@pytest.mark.parametrize("name, file", NAMES_WITH_FILE)
def test_the_file_defines_the_name(name, file):
    assert name in defined_names(file)


@pytest.mark.parametrize("path", RELATIVE_LINKS)
def test_the_linked_file_exists(path):
    assert (ROOT / path).exists()
