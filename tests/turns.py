"""Times of rivals that take turns, so that a busy machine slows them all, each in a process of its own: in one process
the leaner rival lives on pages that the other has just freed, and pays for none."""

import multiprocessing
import time


def _serve(pipe, make, arguments):
    step = make(*arguments)
    while pipe.recv():
        pipe.send(step())


def in_turns(make, rivals, seconds, least):
    """make(*rival) -> a function that does the work once and returns its time; rivals: tuples of arguments.

    -> rounds of one time for each rival: as many as `seconds` hold and at least `least`, after one that is left out.
    """
    context, pipes, rounds = multiprocessing.get_context("spawn"), [], []
    for rival in rivals:
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, rival), daemon=True).start()
        theirs.close()  # so that recv fails instead of waiting, should the process die
        pipes.append(ours)

    def step(pipe):
        pipe.send(True)
        return pipe.recv()

    for pipe in pipes:
        step(pipe)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < least:
        rounds.append([step(pipe) for pipe in pipes])
    for pipe in pipes:
        pipe.send(False)
    return rounds
