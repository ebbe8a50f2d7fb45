"""Work that training need not wait for: it is done in a thread, one job after another."""

import sys
from concurrent.futures import ThreadPoolExecutor


class Background:
    """A queue of jobs and the thread that does them; leaving this context waits for all.

    The error of a job is raised by the next `check` or `wait`.
    """

    def __init__(self, on):
        """on: whether there is a thread. Without one, `submit` does the job itself."""
        self.on, self.jobs = on, []
        if on:  # a thread that draws may hold the GIL for 0.1 ms, not 5, while training waits for it
            sys.setswitchinterval(1e-4)
        self.pool = ThreadPoolExecutor(max_workers=1)

    def submit(self, function, *args):
        """Do function(*args) when the jobs before it are done."""
        if self.on:
            self.jobs.append(self.pool.submit(function, *args))
        else:
            function(*args)

    def check(self):
        """Raise the error of a job that has failed."""
        while self.jobs and self.jobs[0].done():
            self.jobs.pop(0).result()

    def wait(self):
        """Wait until all jobs are done, and raise the error of one that has failed."""
        while self.jobs:
            self.jobs.pop(0).result()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.pool.shutdown()
        if kind is None:
            self.wait()
