"""Time rivals in turns: one call of each, then again one call of each, so that a busy machine slows all of them.

Each rival runs in a process of its own. In a shared process, a rival that needs little memory would reuse the pages
that another one has just freed, and its time would not include getting new pages from the system.
"""

import multiprocessing
import time


def serve(pipe, make, arguments):
    """What the process of one rival runs: for each True that arrives, do the work once and send back its time."""
    work = make(*arguments)
    while pipe.recv():
        pipe.send(work())


def start(make, arguments):
    """Start the process of one rival -> our end of the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, make, arguments), daemon=True).start()
    theirs.close()  # if the process dies, recv() then raises EOFError; otherwise it would wait for ever
    return ours


def run_once(pipe):
    pipe.send(True)
    return pipe.recv()


def in_turns(make, rivals, seconds, least):
    """Run all rivals in turns for `seconds`, and for at least `least` rounds.

    make(*arguments) returns a function that does the work once and returns its time; `rivals` is a list of such
    arguments, one tuple for each rival. Returns the rounds, each a list with one time for each rival. The first round
    warms up and is left out.
    """
    pipes = [start(make, arguments) for arguments in rivals]
    for pipe in pipes:
        run_once(pipe)
    rounds = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < least:
        rounds.append([run_once(pipe) for pipe in pipes])
    for pipe in pipes:
        pipe.send(False)
    return rounds
