"""What a run leaves in its log directory: the curves of log.txt and the facts of run.json.

log.txt has one `step stream value` line a figure. The streams are train, val (nats per token), val_bpb (bits
per byte), hella (acc_norm), lr, norm, tok/s and skipped.
"""

import json
from pathlib import Path

from files import UserError


def read_curves(log_dir):
    """The curves of a run, {stream: (steps, values)}, two lists each, in the order of the steps.

    Where a step stands twice, as in a log glued from pieces, the later line counts. A last line without its
    end is left out: a crash, or a run under way, cut it short. Raises UserError for any other bad line.
    """
    path = Path(log_dir) / "log.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}); name a run's log directory") from error
    curves = {}
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line end: nothing, or a torn line
        try:
            step, stream, value = line.split()
            if not 0 <= int(step) < 2**63:
                raise ValueError
            curves.setdefault(stream, {})[int(step)] = float(value)
        except ValueError:
            raise UserError(f"{path}:{number} is no line of a log: {line.strip()!r}; remove it") from None
    return {stream: (sorted(curve), [curve[step] for step in sorted(curve)])
            for stream, curve in curves.items()}


def read_facts(log_dir):
    """What run.json says of a run's recipe: a dict of flags, data_source and tokenizer, empty if it does not.

    data_source is the "source" of the data's manifest. Raises UserError for a run.json that is damaged.
    """
    path = Path(log_dir) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        flags, data_source, tokenizer = map(record.get, ("flags", "data_source", "tokenizer"))
        return dict(flags=dict(flags or {}), data_source=dict(data_source or {}), tokenizer=tokenizer)
    except FileNotFoundError:
        return dict(flags={}, data_source={}, tokenizer=None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it, it is a record only") from error
