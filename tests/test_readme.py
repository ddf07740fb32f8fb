"""README: its worked example, and the names, files and tests that it speaks of."""

import ast
import doctest
import re
from functools import lru_cache

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
NAME = r"`(?P<name>\w+)`"
FILE = r"(?P<file>[\w/]+\.(?:py|cu))\b"
FORMS = [
    rf"\[{NAME}\]\({FILE}",  # [`name`](file)
    rf"{NAME} in\s+(?:\[|`)?{FILE}",  # `name` in file; in `file`; in [file](file)
    rf"{NAME} \((?:\[|`)?{FILE}",  # `name` (file)
    rf"{FILE}`?'s\s+{NAME}",  # file's `name`
]
MATCHES = [match for form in FORMS for match in re.finditer(form, README)]
NAMES_WITH_FILE = sorted({(match["name"], match["file"]) for match in MATCHES})
RELATIVE_LINKS = sorted(set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README)))
TEST_COMMANDS = re.findall(r"`pytest ([^`]+)`", " ".join(README.split()))


@lru_cache(maxsize=None)
def defined_names(file):
    """Functions, classes, methods, variables of a .py file; words before ( { = of a .cu file."""
    text = (ROOT / file).read_text()
    if file.endswith(".cu"):
        return set(re.findall(r"\b(\w+)(?:\[\])?\s*[({=]", text))
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_the_worked_example_gives_what_is_shown():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 5
    assert failed == 0


def test_there_are_names_links_and_commands_to_check():
    assert len(NAMES_WITH_FILE) > 5
    assert len(RELATIVE_LINKS) > 5
    assert len(TEST_COMMANDS) > 3


@pytest.mark.parametrize("name, file", NAMES_WITH_FILE)
def test_the_file_defines_the_name(name, file):
    assert name in defined_names(file)


@pytest.mark.parametrize("path", RELATIVE_LINKS)
def test_the_linked_file_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", TEST_COMMANDS)
def test_the_command_selects_tests(command):
    """Each file exists, and each word of -k "one or another" is in the name of a test."""
    files = re.findall(r"tests/test_\w+\.py", command)
    assert files
    tests = [name for file in files for name in defined_names(file) if name.startswith("test_")]
    selection = re.search(r'-k "(.+)"', command)
    words = selection[1].split(" or ") if selection else []
    for word in words:
        assert any(word in name for name in tests), word
