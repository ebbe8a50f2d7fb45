"""The record of a run: numbers in log.txt, facts in run.json. This file owns both formats.

log.txt has one line `step stream value` per number. The streams are train, val (nats per token), val_bpb
(bits per byte), hella (acc_norm), lr, norm, tok/s and skipped. run.json has the flags and facts of the latest
start at its top level, and those of all starts under "starts". source_DIGEST.zip has the program itself.
"""

import contextlib
import functools
import hashlib
import json
import secrets
import zipfile
from pathlib import Path

from kit.files import UserError, atomic_write, name_in_errors


def log_path(log_dir):
    return Path(log_dir) / "log.txt"


def append_log(log_dir, step, values):
    """Append the numbers of a step to log.txt. values: {stream: number}."""
    path = log_path(log_dir)
    with name_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{step} {stream} {value:.10f}\n" for stream, value in values.items())


def read_log(log_dir):
    """The lines of log.txt as (step, stream, value, the line itself), in order; none if there is no file.

    Blank lines are left out, and an unfinished last line: a crash cut it short, or a run is writing it.
    Raises UserError for any other invalid line.
    """
    path = log_path(log_dir)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error})") from error
    parsed = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        if not line.strip():
            continue
        try:
            step, stream, value = line.split()
            if not 0 <= int(step) < 2**63:
                raise ValueError
            parsed.append((int(step), stream, float(value), line))
        except ValueError:
            raise UserError(f"{path}:{number} is not a valid log line: {line.strip()!r}; remove it") from None
    return parsed


def truncate_log(log_dir, step):
    """Drop the lines of steps >= step from log.txt, and an unfinished last line. Raises UserError."""
    lines = read_log(log_dir)
    if log_path(log_dir).exists():
        with atomic_write(log_path(log_dir)) as file:
            file.writelines(line for at, _, _, line in lines if at < step)


def read_curves(log_dir):
    """The curves of a run, {stream: (steps, values)}, two lists each, in the order of the steps.

    If a step occurs twice, as in a log joined from pieces, the later line counts. Raises UserError.
    """
    curves = {}
    for step, stream, value, _ in read_log(log_dir):
        curves.setdefault(stream, {})[step] = value
    return {stream: (sorted(curve), [curve[step] for step in sorted(curve)])
            for stream, curve in curves.items()}


def read_record(log_dir):
    """run.json as a dict; an empty record if there is no file. Raises UserError if it is damaged."""
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
        raise UserError(f"{path} is damaged ({error!r}); remove it, training does not need it") from error


@functools.cache
def source():
    """This program's own files: (their digest, {name: bytes})."""
    root = Path(__file__).parent.parent
    paths = sorted(path for pattern in ("*.py", "kit/*.py", "configs/*.txt") for path in root.glob(pattern)
                   if not path.name.startswith("."))  # an editor's temporary file
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    return hashlib.sha256(repr(files).encode()).hexdigest()[:8], files


def save_source(log_dir):
    """Store this program's own files as log_dir/source_DIGEST.zip, unless it is there; return the digest."""
    digest, files = source()
    archive = Path(log_dir) / f"source_{digest}.zip"
    if not archive.exists():
        with atomic_write(archive, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
    return digest


def add_facts(log_dir, **facts):
    """Add facts to the latest start in run.json, unless the file was removed."""
    record = read_record(log_dir)
    if not record["starts"]:
        return
    record["starts"][-1] |= facts
    with atomic_write(Path(log_dir) / "run.json") as file:
        json.dump({**record, **facts}, file, indent=1)


def is_run(log_dir):
    """Whether a directory contains a run of this program: its run.json or a checkpoint."""
    if any(path for name in ("ckpt_*", "best") for path in Path(log_dir).glob(f"{name}/meta.json")):
        return True
    with contextlib.suppress(UserError):  # a run.json that can't be read is not ours
        return bool(read_record(log_dir)["starts"])
    return False


def record_start(log_dir, resumed, **start):
    """Add a start of a run to run.json; return the run's id, which stays the same when it is resumed."""
    starts = read_record(log_dir)["starts"]
    run_id = resumed and starts and starts[-1].get("id") or secrets.token_hex(4)
    start = {"id": run_id, **start}
    with atomic_write(Path(log_dir) / "run.json") as file:
        json.dump({**start, "starts": [*starts, start]}, file, indent=1)
    return run_id
