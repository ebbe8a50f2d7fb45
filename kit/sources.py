"""Where texts come from: local files, the Hugging Face hub, and Python's own documentation."""

import ast
import contextlib
import glob
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from kit.files import UserError, atomic_write, count, digest, fetch, first_line, retried
from kit.formats import FORMATS, check_format, format_of

# by name: repository, configuration and revision on the hub. OpenWebText's main branch is a script, which the
# datasets library no longer runs; the hub keeps its texts as parquet on another branch
DATASETS = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", None),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", None),
    "openwebtext": ("Skylion007/openwebtext", None, "refs/convert/parquet"),
}
# by name: the address of a text file, and its digest
TEXTS = {"tinyshakespeare": (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "ae717de95b0441526572a3fb9fde75d3")}
HUB_TIMEOUT = 3  # seconds to wait for the first answer of the Hugging Face hub
HUB_ADDRESS = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")  # repository, revision, path


def find_files(entries, data_dir=None):
    """The files that a user names, in order.

    entries: files, directories, patterns such as "data/*.jsonl", or - for standard input. A directory stands
    for its files of all known formats, at any depth, sorted; links from one of them to another are left out.
    data_dir: the output directory. No input directory may contain it, and no pattern may match a file in it.
    Raises UserError for what is missing, and for a file that two entries name.
    """
    files = {}  # by the real path
    for entry in entries:
        for path in expand(entry, data_dir):
            real = os.path.realpath(path)
            if real in files:
                raise UserError(f"--input: {files[real]} and {path} are the same file: name it once")
            files[real] = path
    return list(files.values())


def expand(entry, data_dir):
    """The paths of one entry of `find_files`. Raises UserError if there are none."""
    if entry == "-" or entry and Path(entry).is_file():
        return [entry]
    if entry and Path(entry).is_dir():
        return list_directory(entry, data_dir)
    if not glob.has_magic(entry):
        problem = "not a file; pipe its text into -" if entry and Path(entry).exists() else "no such file"
        raise UserError(f"--input {entry}: {problem}")
    matches = sorted(glob.glob(entry, recursive=True))
    paths = once_each(entry, [path for match in matches for path in expand(match, data_dir)])
    if not paths:
        raise UserError(f"--input {entry}: no such files")
    if data_dir and any(Path(path).resolve().is_relative_to(Path(data_dir).resolve()) for path in paths):
        raise UserError(f"--data_dir {data_dir} contains files that match {entry}: choose another")
    print(f"{entry}: {count(len(paths), 'file')}")
    return paths


def list_directory(entry, data_dir):
    """The files of a directory that can be read, sorted, without hidden ones. Raises UserError if none."""
    if data_dir and Path(data_dir).resolve().is_relative_to(Path(entry).resolve()):
        raise UserError(f"--data_dir {data_dir} is inside {entry}, where the texts are: choose another")
    def unreadable(error):
        raise UserError(f"--input {entry}: {error.filename} can't be read ({error.strerror})")

    found = [Path(folder, name) for folder, folders, names in os.walk(entry, onerror=unreadable)
             for name in folders + names]
    paths = [path for path in sorted(found)
             if not any(part.startswith(".") for part in path.relative_to(entry).parts)]
    for path in paths:
        if format_of(path)[0] and not path.exists():
            raise UserError(f"--input {entry}: {path} is a link to a file that does not exist")
    files = [str(path) for path in paths if path.is_file() and format_of(path)[0]]
    # a link to a directory is not followed
    others = len(paths) - len(files) - sum(path.is_dir() and not path.is_symlink() for path in paths)
    if not files:
        raise UserError(f"--input {entry}: no file of a known format in it ({FORMATS})")
    left_out = f", without {others} of other formats" if others else ""
    files = once_each(entry, files)
    print(f"{entry}: {count(len(files), 'file')}{left_out}")
    return files


def once_each(entry, paths):
    """The paths of an entry, each file once: by its own name rather than that of a link to it.

    Prints how many links are left out.
    """
    names = {}
    for path in sorted(paths, key=lambda path: os.path.realpath(path) != os.path.abspath(path)):
        names.setdefault(os.path.realpath(path), path)
    kept = set(names.values())
    others = [path for path in paths if path not in kept]
    if others:
        print(f"{entry}: left out {count(len(others), 'link')} to files that are already included, such as "
              f"{others[0]} to {names[os.path.realpath(others[0])]}")
    return [path for path in dict.fromkeys(paths) if path in kept]


def name_of(entry):
    """A name for the data of an entry of `find_files`: my for x/my.jsonl.gz, texts for "texts/*.txt"."""
    if entry == "-":
        return "stdin"
    path = Path(os.path.abspath(entry))
    while glob.has_magic(path.name) and not path.exists():
        path = path.parent
    return path.name.strip(".").partition(".")[0] or "text"


def store_stdin(path, keep=False):
    """Copy standard input to a file, since an interrupted preparation needs the same text again.

    keep: the file exists; raise UserError unless it has the same text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        if keep and digest(file.name) != digest(path):
            raise UserError(f"standard input is not the text that {path.parent.parent} was made from: "
                            f"continue with --input {path}, or choose another --data_dir")


def check_files(files, reader, numbers=None):
    """Read the beginning of each local file, or of those with these numbers.

    Raises UserError if one can't be used, if all files are empty, or if --split_on fits none of them.
    """
    if reader.split_on and not any(format_of(path)[0] == ".txt" for path in files):
        raise UserError(f"--split_on {reader.split_on!r} separates documents of .txt files: there are none")
    checked = files if numbers is None else [files[number] for number in numbers]
    empty = [reader.is_empty(path) for path in checked if not HUB_ADDRESS.match(path)]
    if all(empty) and len(empty) == len(files):
        raise UserError(f"no text in {', '.join(files)}")


def names(source):
    """The names of the files that a manifest's source lists: hub addresses, or local names without folder."""
    return [file if isinstance(file, str) else file["name"] for file in source.get("files", [])]


def hub_files(dataset, name, revision=None):
    """The files of a hub dataset's train split: "hf://..." addresses that name the revision, or local paths.

    Raises UserError if there is no network, no such dataset or configuration, or a file of another format.
    """
    from datasets import load_dataset_builder
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if not Path(dataset).exists():
            with contextlib.suppress(HfHubHTTPError):  # an error status is an answer: the hub can be reached
                find_on_hub(dataset, revision)
        builder = retried(load_dataset_builder, dataset, name, revision=revision)
        data_files = builder.config.data_files or {}
    except Exception as error:  # the hub's libraries raise many types
        raise UserError(f"--dataset {dataset}: {first_line(error)}. "
                        "Without a network, --input takes local files") from error
    if "train" not in data_files:
        raise UserError(f"--dataset {dataset}: no train split of plain files "
                        f"({', '.join(data_files) or 'none'})")
    for path in data_files["train"]:
        check_format(path)
    return list(data_files["train"])


def find_on_hub(dataset, revision):
    """Ask the hub for a dataset: without a network this fails at once, a download after half a minute."""
    from huggingface_hub import HfApi

    retried(HfApi().repo_info, dataset, repo_type="dataset", revision=revision, timeout=HUB_TIMEOUT)


def fetch_text(name, data_dir):
    """Download one of TEXTS into data_dir unless it is there; return its path. Raises UserError."""
    url, expected = TEXTS[name]

    def check(file):
        if digest(file) != expected:
            raise UserError("the downloaded text is not the expected one")

    return str(fetch(url, Path(data_dir) / f"{name}.txt", check, "name a copy with --input"))


def local_file(address, remedy="the same command continues from here"):
    """The local path of a file. A file of the hub is downloaded into the hub's cache, or found there.

    Raises UserError that names the remedy if the download fails.
    """
    match = HUB_ADDRESS.match(address)
    if not match:
        return address
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, revision, path = match.groups()
    where = dict(repo_type="dataset", revision=revision)
    cached = try_to_load_from_cache(repository, path, **where)
    if isinstance(cached, str):
        return cached
    try:
        find_on_hub(repository, revision)
        return retried(hf_hub_download, repository, path, **where)
    except Exception as error:  # the hub's library raises many types
        raise UserError(f"{address} can't be downloaded ({first_line(error)}); {remedy}") from error


PYTHON_DOCS = {"documentation of": f"Python {platform.python_version()}"}  # the source, for the manifest


def python_docs():
    """The documentation that every Python carries: some 2 MB of plain English, as a list of texts.

    They are the docstrings of the standard library and the topics of the language reference, without
    duplicates, shuffled with a fixed seed. No module but the topics is imported.
    """
    from pydoc_data.topics import topics

    # a dict keeps the order and drops duplicates
    found = dict.fromkeys(topics[name].strip() for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.relative_to(library).parts):
            continue
        try:
            nodes = [ast.parse(path.read_bytes())]
        except (SyntaxError, ValueError, OSError):  # a template that is not valid Python
            continue
        while nodes:
            node = nodes.pop()
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[ast.get_docstring(node) or ""] = None
                nodes += reversed(node.body)
    texts = [text for text in found if text]
    random.Random(1337).shuffle(texts)
    return texts
