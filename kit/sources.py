"""Where texts come from: local files, the Hugging Face hub, and Python's own documentation."""

import ast
import contextlib
import gzip
import json
import platform
import random
import re
import sysconfig
import zlib
from pathlib import Path

from kit.files import UserError, digest, fetch, first_line, retried

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
HUB_ADDRESS = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")  # repository, revision, path
BATCH_CHARS = 2**22  # text read and encoded at a time: small enough to stay in warm memory


def read_texts(path, column="text"):
    """Yield the texts of a file in order, as (starts_document, text). A large .txt comes in several pieces.

    Raises UserError with the file and line of what can't be read or has no such column.
    """
    for part in read_parts(str(path), column):
        yield from documents(part)


def read_parts(path, column):
    """The same in parts: lists of (starts_document, text), or Arrow arrays with a document in each row."""
    with explain_read_errors(path):
        if path.endswith(".txt"):
            with open(path, encoding="utf-8", newline="") as file:
                for piece in read_pieces(file):
                    yield [piece]
        elif path.endswith((".jsonl", ".jsonl.gz")):
            for place, row in read_json_lines(path):
                yield [(True, text_of_row(row, column, place))]
        elif path.endswith(".parquet"):
            yield from read_parquet(path, column)
        else:
            raise UserError(f"{path}: not .txt, .jsonl, .jsonl.gz or .parquet")


def read_rows(path):
    """Yield the rows of a .jsonl, .jsonl.gz or .parquet file as (file and line, value). Raises UserError."""
    with explain_read_errors(path):
        if not path.endswith(".parquet"):
            yield from read_json_lines(path)
            return
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


@contextlib.contextmanager
def explain_read_errors(path):
    """Turn the errors of reading a file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it with iconv") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read to its end ({error})") from error
    except ValueError as error:
        if type(error).__module__.partition(".")[0] != "pyarrow":
            raise
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


def read_pieces(file):
    """A text file in pieces that encode to the same ids as the entire file, which may not fit into memory."""
    rest, starts_document = "", True
    while block := file.read(BATCH_CHARS):
        cut = last_cut(block)
        if cut:
            yield starts_document, rest + block[:cut]
            rest, starts_document = block[cut:], False
        else:
            rest += block
    if rest:
        yield starts_document, rest


def last_cut(text):
    """The last place between a visible character and white space, where GPT-2 always ends a word; or 0."""
    end = max(0, *(text.rfind(space) for space in " \n\r\t"))
    head = text[:end].rstrip(" \n\r\t")
    return len(head) if head and not head[-1].isspace() else 0


def read_json_lines(path):
    """Yield (file and line, value) for the lines of a .jsonl or .jsonl.gz that are not blank."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not JSON ({error})") from None


def text_of_row(row, column, place):
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place}: no column {column!r}, only {has}; name the right one with --text_column")
    if not isinstance(row[column], str):
        raise UserError(f"{place}: column {column!r} contains {type(row[column]).__name__}, not text; "
                        "name the right one with --text_column")
    return row[column]


def read_parquet(path, column):
    """Yield the texts of a parquet file in Arrow arrays of about BATCH_CHARS, whatever the row groups."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # True keeps in memory what it has read
        if column not in file.schema_arrow.names:
            text_of_row(dict.fromkeys(file.schema_arrow.names), column, path)  # raises, with the columns
        info, size = file.metadata, 1
        for group in map(info.row_group, range(info.num_row_groups)):
            chunks = map(group.column, range(info.num_columns))
            size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
        # at most 10,000 rows: in the sizes above, a text that many rows repeat counts once
        batch_size = min(10_000, 1 + BATCH_CHARS * info.num_rows // size)
        number = 0
        for rows in file.iter_batches(batch_size, columns=[column]):
            texts = rows.column(0)
            if texts.null_count or texts.type not in (pyarrow.string(), pyarrow.large_string()):
                for row, text in enumerate(texts.to_pylist(), start=number + 1):
                    text_of_row({column: text}, column, f"{path}, row {row}")  # raises, with the row
            number += len(texts)
            texts.validate(full=True)  # checks that it is UTF-8
            yield texts.cast(pyarrow.large_string())


def documents(part):
    """A part of a file, as `read_parts` yields it, as a list of (starts_document, text)."""
    return part if isinstance(part, list) else [(True, text) for text in part.to_pylist()]


def batches(path, column):
    """The texts of a file in batches of about BATCH_CHARS; Arrow arrays stay free of Python strings."""
    texts, size = [], 0
    for part in read_parts(path, column):
        if not isinstance(part, list):
            yield part
            continue
        texts += part
        size += sum(len(text) for _, text in part)
        if size >= BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def hub_files(dataset, name, revision=None):
    """The files of a hub dataset's train split: "hf://..." addresses that name the revision, or local paths.

    Raises UserError if there is no network, no such dataset or no such configuration.
    """
    from datasets import load_dataset_builder

    try:
        builder = retried(load_dataset_builder, dataset, name, revision=revision)
        data_files = builder.config.data_files or {}
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--dataset {dataset}: {first_line(error)}. "
                        "Without network, --input takes local files") from error
    if "train" not in data_files:
        raise UserError(f"--dataset {dataset}: no train split of plain files "
                        f"({', '.join(data_files) or 'none'})")
    return list(data_files["train"])


def fetch_text(name, data_dir):
    """Download one of TEXTS into data_dir unless it is there; return its path. Raises UserError."""
    url, expected = TEXTS[name]

    def check(file):
        if digest(file) != expected:
            raise UserError("the downloaded text is another one")

    return str(fetch(url, Path(data_dir) / f"{name}.txt", check, "name a copy with --input"))


def local_file(address, remedy="the same command continues from here"):
    """The local path of a file. A file of the hub is downloaded into the hub's cache, or found there.

    Raises UserError with the remedy if the download fails.
    """
    match = HUB_ADDRESS.match(address)
    if not match:
        return address
    from huggingface_hub import hf_hub_download

    repository, revision, path = match.groups()
    try:
        return retried(hf_hub_download, repository, path, repo_type="dataset", revision=revision)
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
