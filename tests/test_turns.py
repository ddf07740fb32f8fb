"""The clock of the benchmarks."""

import itertools
import os

import pytest

from tests.turns import in_turns


def count_from(start):
    """Work whose "time" is the next whole number, with the id of the process that did it."""
    numbers = itertools.count(start)
    return lambda: (next(numbers), os.getpid())


def test_rivals_take_turns():
    rounds = in_turns(count_from, [(10,), (20,)], seconds=0, least=3)
    numbers = [[number for number, _ in times] for times in rounds]
    assert numbers == [[11, 21], [12, 22], [13, 23]]  # the first round, of 10 and 20, is left out
    processes = {process for times in rounds for _, process in times}
    assert len(processes) == 2 and os.getpid() not in processes


def test_a_rival_that_dies():
    with pytest.raises((EOFError, OSError)):
        in_turns(os._exit, [(1,)], seconds=0, least=1)
