"""train_gpt2.py or fineweb_edu.py with a fault put in: `FAULT=CODE python tests/faulty.py SCRIPT --flags`.

CODE is Python that runs before the script does; `at` and `kill` are there for it.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name, count, act, after=False):
    """Call act() when owner.name is called for the count-th time, before it does its work or after."""
    real, calls = getattr(owner, name), []

    def faulty(*args, **kwargs):
        calls.append(name)
        if len(calls) == count and not after:
            act()
        result = real(*args, **kwargs)
        if len(calls) == count and after:
            act()
        return result

    setattr(owner, name, faulty)


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    exec(os.environ["FAULT"])
    script.run(script.main, script.parse_args(sys.argv[2:]))
