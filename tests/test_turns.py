"""The clock of the benchmarks."""

import itertools
import os

import pytest

from tests.turns import in_turns


def count(start):
    numbers = itertools.count(start)
    return lambda: (next(numbers), os.getpid())


def test_rivals_take_turns():
    rounds = in_turns(count, [(10,), (20,)], seconds=0, least=3)
    assert [[n for n, _ in pair] for pair in rounds] == [[11, 21], [12, 22], [13, 23]]  # the first pair is left out
    assert len({process for pair in rounds for _, process in pair} | {os.getpid()}) == 3


def test_a_rival_that_dies():
    with pytest.raises((EOFError, OSError)):
        in_turns(os._exit, [(1,)], seconds=0, least=1)
