"""Atomic writes, downloads, locks, and the one-line error messages of scripts."""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import socket
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


NUMBER = re.compile(r"\[(Errno|WinError) -?\d+\] ")  # the beginning of an OSError's text

# errors of a call that a file system (SMB, exFAT, NFS, FUSE, ...) does not support
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY,
               errno.ENODEV)


def run_script(main, args):
    """Call main(args) and turn expected failures into one line on stderr and an exit status.

    Status 2: a user error (UserError, or a path that can't be used). Status 1: the system failed,
    for example on a full disk. Status 130: Ctrl-C. With several ranks, the line names the one that failed.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed, as by `>&-`: the next file opened would take its place
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r"))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has none
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal can't show become "?"
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the pipe has left: `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, (RuntimeError, MemoryError)):
            if not out_of_memory(error):
                raise
            error = UserError("out of memory: use a smaller model, or fewer or shorter texts at once")
        rank = os.environ.get("RANK", "")
        if rank not in ("", "0"):
            time.sleep(3)  # most mistakes hit all ranks: rank 0 prints, then torchrun ends the others
        message = " ".join(str(error).splitlines())  # a path may hold line breaks
        if rank and os.environ.get("WORLD_SIZE", "") not in ("", "1"):  # each machine may have its own files
            message += f" (rank {rank} on {socket.gethostname()})"
        print("error:", NUMBER.sub("", message), file=Unbreakable(sys.stderr), flush=True)
        sys.exit(2 if isinstance(error, UserError) or error.errno in UNUSABLE_PATH else 1)


def out_of_memory(error):
    """Whether an exception means out of memory. On a CPU only the text of torch's error shows it."""
    words = "can't allocate memory|not enough memory|out of memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


class Unbreakable:
    """A text stream that drops what can't be written, for example because the terminal was closed."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self):
        """Send this and all further output to the null device; what is buffered goes there too."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: a notebook's stream has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def unbreakable_output():
    """A context in which failing output (closed terminal, `| tee` after Ctrl-C, full disk) is no error."""
    with contextlib.redirect_stdout(Unbreakable(sys.stdout)), \
            contextlib.redirect_stderr(Unbreakable(sys.stderr)):
        yield


@functools.cache  # each message once
def warn_once(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def count(number, noun, ending="s"):
    """A number and its noun: 1 rank, 8 ranks."""
    return f"{number:,} {noun}{ending if number != 1 else ''}"


def epochs_text(epochs):
    """A number of epochs as text: 0.53 epochs, less than 0.01 epochs."""
    seen = f"{epochs:,.{2 if epochs < 100 else 0}f}" if epochs >= 0.01 else "less than 0.01"
    return f"{seen} epochs"


def first_line(error):
    """The first line of an exception's text, without "[Errno 2]"; the name of its type if that is empty."""
    return NUMBER.sub("", str(error).strip().partition("\n")[0]) or type(error).__name__


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
def name_in_errors(path, temporary=None):
    """If the body raises an OSError that names no file, or only the temporary one, let it name this file."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def check_output(flag, path, *inputs):
    """Make the directory of the output file that a flag names.

    path and inputs may be None; inputs that are not files don't count. A path of "-" is stdout. Raises
    UserError if the file is an input, or if the directory can't be made or written.
    """
    if path in (None, "-"):
        return
    for source in filter(os.path.isfile, filter(None, inputs)):
        if os.path.exists(path) and os.path.samefile(source, path):
            raise UserError(f"{flag} {path} would overwrite the input {source}: name another file")
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {first_line(error)}") from error
    if not os.access(directory, os.W_OK):
        raise UserError(f"{flag} {path}: the directory {directory} can't be written")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that replaces `path` once it is complete and on the disk. A crash leaves the old file."""
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with (name_in_errors(path, temporary),
              open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file):
            yield file
            publish(file, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(file, path):
    """Close a file, written at `temporary_path(path)`, and rename it to `path` once it is on the disk."""
    file.close()  # Windows does not rename an open file
    sync(file.name)
    os.replace(file.name, path)
    sync(path.parent)


def drop_cached_pages(file):
    """Ask the system to write a file's data to disk and drop it from memory, which shards would fill up.

    It also saves time: the next write reuses these pages, while fresh ones would have to be cleared first.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):  # Linux starts writing, and drops the pages that are already written
        with contextlib.suppress(OSError):  # not every file system supports it
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
        reason = error.reason if type(error).__name__ == "URLError" else error  # URLError wraps it
        raise UserError(f"{url} can't be fetched ({reason}); copy the file to {path}, or {remedy}") from error
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
def locked(directory, wait=False):
    """Create a directory and lock it against other writers for the duration of the body.

    The kernel holds the lock, so it ends with the process. wait: until another process unlocks the directory.
    A directory that is still empty afterwards is removed if it is new. Raises UserError if the directory
    can't be written, or is locked already and wait is False.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    new = not directory.exists()
    # without fallback: a lock that is a file would outlive a killed process
    lock = FileLock(directory / ".lock", blocking=False, fallback_to_soft=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            if not wait:
                raise UserError(f"{directory} is in use by another process: wait until it ends, "
                                "or choose another directory") from None
            print(f"{directory} is in use by another process: waiting until it ends", flush=True)
            lock.acquire(blocking=True)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise UserError(f"{directory} can't be written ({error})") from error
        warn_once(f"the file system of {directory} has no locks: two runs in it would not be detected")
    try:
        yield
    finally:
        if new and os.listdir(directory) == [".lock"]:
            shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def sync(path):
    """Wait until a file, or the names in a directory, are on the disk (POSIX only)."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # EBADF: some file systems want a file open for writing; EACCES: some open no directory
        if error.errno not in (*UNSUPPORTED, errno.EBADF, errno.EACCES):
            raise
        warn_once(f"the file system of {mount_point(path)} does not support fsync: after a power failure the "
                  "newest files may be lost")


def mount_point(path):
    """The directory at which the file system of a path is mounted."""
    path = Path(path).resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_mount())


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
        with contextlib.suppress(OSError):  # a file system without permissions (exFAT, SMB) has none to copy
            shutil.copymode(next(directory.glob("*.json")), path)
