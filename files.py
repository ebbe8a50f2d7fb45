"""What every script does at its edges: write files whole or not at all, and tell a mistake in one line."""

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path


class UserError(ValueError):
    """A mistake in a flag or a file. Its text is the one line the user sees: what is wrong and the remedy."""


# what the system says of a path that a user gave and that can't be used so
UNUSABLE_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def run(main, args):
    """main(args) as a script: a mistake ends it with one line and exit status 2, Ctrl-C with status 130."""
    try:
        main(args)
    except (UserError, *UNUSABLE_PATH) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # all ranks find most mistakes: rank 0 says it, and torchrun ends the others
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has left: `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def first_line(error):
    """The first line of an exception's text, for messages of our own; its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def beside(path):
    """Where the file or directory `path` is written until complete; its name tells a leftover of a crash."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that appears as `path` only once complete and on the disk: a crash leaves the old one."""
    path = Path(path)
    temporary = beside(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(path):
    """Wait until the names in a directory are on the disk, where the system can say so."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(path):
    """The XXH3 digest of a file, as text. It finds damage at memory speed; it doesn't stop a forger."""
    import xxhash

    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
