"""What every script does at its edges: write files whole or not at all, and tell a mistake in one line."""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path


class UserError(ValueError):
    """A mistake in a flag or a file. Its text is the one line the user sees: what is wrong and the remedy."""


BUSY = (408, 429, 500, 502, 503, 504)  # statuses of a server that may answer the next time
PAUSES = (1, 2, 4, 8, 16)  # seconds

# what the system says of a path that a user gave and that can't be used; a full disk is no mistake of theirs
UNUSABLE_PATH = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM,
                 errno.ENAMETOOLONG)


def run(main, args):
    """main(args) as a script: a mistake ends it with one line and exit status 2, Ctrl-C with status 130.

    What the system can't do, as to write to a full disk, is one line too, with status 1.
    """
    sys.stdout.reconfigure(errors="replace")  # what a terminal or pipe has no character for is shown as a ?
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has left: `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # all ranks find most mistakes: rank 0 says it, and torchrun ends the others
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)  # a path may hold line breaks
        sys.exit(2 if isinstance(error, UserError) or error.errno in UNUSABLE_PATH else 1)


def first_line(error):
    """The first line of an exception's text, for messages of our own; its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def beside(path):
    """Where the file or directory `path` is written until complete; its name tells a leftover of a crash."""
    return path.with_name(f".{path.name}.tmp")


def retried(call, *args, **kwargs):
    """call(*args, **kwargs), once more after each of PAUSES where a server is busy or breaks off."""
    for pause in PAUSES:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # each library has its own kinds
            response = getattr(error, "response", error)
            status = getattr(response, "status_code", getattr(response, "code", None))
            if status not in BUSY and not isinstance(error, ConnectionResetError):
                raise
            print(f"{first_line(error)}; once more in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return call(*args, **kwargs)


@contextlib.contextmanager
def naming(path):
    """An error of the system's names the file that is written: that of a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that appears as `path` only once complete and on the disk: a crash leaves the old one."""
    path = Path(path)
    temporary = beside(path)
    try:
        with naming(path), open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            appear(file, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def appear(file, path):
    """Let an open file, written `beside(path)`, be `path`, once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync(path.parent)


def release(file):
    """Let what was written go to the disk by and by, then out of memory, which 20 GB of shards would fill.

    It is faster, too: what is written next takes the same pages, where fresh ones had to be cleared.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):  # on Linux it begins to write, and drops what is written
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fetch(url, path, check, otherwise):
    """Download a url to `path`, unless it is there; return the path.

    check: called with the name of the downloaded file, raises UserError for what must not become `path`.
    otherwise: the remedy, beside a copy by hand. Raises UserError, and leaves nothing, if it fails.
    """
    path = Path(path)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            retried(read_url, url, file)
            check(file.name)
    except (OSError, UserError) as error:  # a status other than 200 is an OSError too
        raise UserError(f"{url} can't be fetched ({error}); copy it to {path}, or {otherwise}") from error
    return path


def read_url(url, file):
    """Write what a url holds to a file open for writing, from its beginning. Raises OSError."""
    import urllib.request

    file.seek(0)
    file.truncate()
    with urllib.request.urlopen(url, timeout=60) as response:
        shutil.copyfileobj(response, file)
        if response.length:  # what copyfileobj does not notice
            raise ConnectionResetError(f"{url} broke off {response.length} bytes before its end")
    file.flush()


@contextlib.contextmanager
def locked(directory):
    """Make a directory and hold it against a second writer, which gets a UserError.

    The kernel keeps the lock: it ends with the process that holds it, however that ends. A directory that was
    made for nothing is removed again. Raises UserError where it can't be written, too.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    new = not directory.exists()
    lock = FileLock(directory / ".lock", blocking=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{directory} is in use: another process writes there. Wait until it ends, "
                        "or choose another directory") from None
    except OSError as error:
        raise UserError(f"{directory} can't be written ({error})") from error
    try:
        yield
    finally:
        if new and os.listdir(directory) == [".lock"]:
            shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def sync(path):
    """Wait until a file, or the names in a directory, are on the disk, where the system can say so."""
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
