"""Files and the edges of a script: atomic writes, downloads, locks, and one-line error messages."""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path


class UserError(ValueError):
    """A mistake in a flag or a file. Its text is the line the user sees: what is wrong, and the remedy."""


BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that a retry may cure
PAUSES = (1, 2, 4, 8, 16)  # seconds between retries

# errors of a path that the user chose. A full disk is not in this list: it is not the user's mistake
UNUSABLE_PATH = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM,
                 errno.ENAMETOOLONG)


def run_script(main, args):
    """Call main(args) and turn expected failures into one line on stderr and an exit status.

    Status 2: a mistake of the user's (UserError, or a path that can't be used). Status 1: the system failed,
    for example on a full disk. Status 130: Ctrl-C.
    """
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal can't show become "?"
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the pipe has left: `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # all ranks find most mistakes: rank 0 prints, then torchrun ends the others
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)  # a path may hold line breaks
        sys.exit(2 if isinstance(error, UserError) or error.errno in UNUSABLE_PATH else 1)


def first_line(error):
    """The first line of an exception's text; the name of its type if the text is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def temporary_path(path):
    """Where the file or directory `path` is written until it is complete. A crash leaves this name behind."""
    return path.with_name(f".{path.name}.tmp")


def retried(call, *args, **kwargs):
    """Return call(*args, **kwargs); retry after each of PAUSES if a server is busy or a transfer breaks."""
    for pause in PAUSES:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # each library raises its own types
            response = getattr(error, "response", error)
            status = getattr(response, "status_code", getattr(response, "code", None))
            if status not in BUSY and not isinstance(error, ConnectionResetError):
                raise
            print(f"{first_line(error)}; retrying in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return call(*args, **kwargs)


@contextlib.contextmanager
def name_in_errors(path):
    """Add the file's name to an OSError raised in the body: the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that replaces `path` once it is complete and on the disk. A crash leaves the old file."""
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with name_in_errors(path), open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            publish(file, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(file, path):
    """Rename an open file, written at `temporary_path(path)`, to `path`, after it has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync(path.parent)


def drop_cached_pages(file):
    """Ask the system to write a file's data to disk and drop it from memory, which shards would fill up.

    It also saves time: the next write reuses these pages, while fresh ones would have to be cleared first.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):  # Linux starts writing, and drops the pages that are already written
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fetch(url, path, check, remedy):
    """Download a url to `path` unless the file exists; return the path.

    check: called with the name of the downloaded file; raises UserError if it must not become `path`.
    remedy: what the error message suggests besides a copy by hand. Raises UserError and leaves no file if
    the download fails.
    """
    path = Path(path)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            retried(read_url, url, file)
            check(file.name)
    except (OSError, UserError) as error:  # an HTTP error status is an OSError too
        raise UserError(f"{url} can't be fetched ({error}); copy the file to {path}, or {remedy}") from error
    return path


def read_url(url, file):
    """Write the contents of a url to an open file, from its beginning. Raises OSError."""
    import urllib.request

    file.seek(0)
    file.truncate()
    with urllib.request.urlopen(url, timeout=60) as response:
        shutil.copyfileobj(response, file)
        if response.length:  # copyfileobj does not notice a short read
            raise ConnectionResetError(f"{url} ended {response.length} bytes early")
    file.flush()


@contextlib.contextmanager
def locked(directory):
    """Create a directory and lock it against other writers for the duration of the body.

    The kernel holds the lock, so it ends with the process. A directory that is still empty afterwards is
    removed if it is new. Raises UserError if the directory is locked already or can't be written.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    new = not directory.exists()
    lock = FileLock(directory / ".lock", blocking=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{directory} is in use by another process: wait until it ends, "
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
    """Wait until a file, or the names in a directory, are on the disk (POSIX only)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(path):
    """The XXH3 digest of a file, as text. It finds damage at memory speed; it is not cryptographic."""
    import xxhash

    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def share_tensors(directory):
    """Give the .safetensors files of a directory the permissions of its .json files.

    safetensors 0.8 makes them private: https://github.com/safetensors/safetensors/issues/782
    """
    for path in directory.glob("*.safetensors"):
        shutil.copymode(next(directory.glob("*.json")), path)
