"""The record of a run in its log directory: the figures in log.txt and the facts in run.json.

log.txt has one `step stream value` line a figure. The streams are train, val (nats per token), val_bpb (bits
per byte), hella (acc_norm), lr, norm, tok/s and skipped. run.json has the flags and what they met, of the
last start at its top level, of all under "starts".
"""

import json
import secrets
from pathlib import Path

from files import UserError, atomic_write


def read_log(log_dir):
    """The lines of log.txt, each as (step, stream, value, the line itself); none before there is a log.

    A last line without its end is left out: a crash, or a run under way, cut it short. Raises UserError for
    any other bad line.
    """
    path = Path(log_dir) / "log.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error})") from error
    figures = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            step, stream, value = line.split()
            if not 0 <= int(step) < 2**63:
                raise ValueError
            figures.append((int(step), stream, float(value), line))
        except ValueError:
            raise UserError(f"{path}:{number} is no line of a log: {line.strip()!r}; remove it") from None
    return figures


def keep_log_before(log_dir, step):
    """Drop the lines of steps >= step from log.txt, and a torn last line. Raises UserError as `read_log`."""
    figures = read_log(log_dir)
    if (Path(log_dir) / "log.txt").exists():
        with atomic_write(Path(log_dir) / "log.txt") as file:
            file.writelines(line for at, _, _, line in figures if at < step)


def read_curves(log_dir):
    """The curves of a run, {stream: (steps, values)}, two lists each, in the order of the steps.

    Where a step stands twice, as in a log glued from pieces, the later line counts. Raises UserError.
    """
    curves = {}
    for step, stream, value, _ in read_log(log_dir):
        curves.setdefault(stream, {})[step] = value
    return {stream: (sorted(curve), [curve[step] for step in sorted(curve)])
            for stream, curve in curves.items()}


def read_record(log_dir):
    """run.json as a dict, without one an empty dict. Raises UserError for a damaged one."""
    path = Path(log_dir) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        flags, source, starts = map(record.get, ("flags", "data_source", "starts"))
        # references and older runs lack some
        return {**record, "flags": dict(flags or {}), "data_source": dict(source or {}),
                "starts": list(map(dict, starts or []))}
    except FileNotFoundError:
        return {"flags": {}, "data_source": {}, "starts": []}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it, it is a record only") from error


def record_start(log_dir, resumed, **start):
    """Write a start of a run to run.json; return the run's id, which stays when it is resumed."""
    starts = read_record(log_dir)["starts"]
    run_id = resumed and starts and starts[-1].get("id") or secrets.token_hex(4)
    start = {"id": run_id, **start}
    with atomic_write(Path(log_dir) / "run.json") as file:
        json.dump({**start, "starts": [*starts, start]}, file, indent=1)
    return run_id
