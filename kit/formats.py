"""Read texts and rows from files of all supported formats, in batches that fit into memory."""

import contextlib
import csv
import gzip
import itertools
import json
import os
import re
import zlib

from kit.files import UserError, count

KINDS = (".txt", ".jsonl", ".json", ".csv")  # each also compressed; .parquet has a compression of its own
COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # and their first bytes, which no text has
# the first bytes of other files that people take for text
OTHERS = {"bzip2": b"BZh", "xz": b"\xfd7zXZ", "a zip": b"PK\3\4", "parquet": b"PAR1", "a PDF": b"%PDF"}
FORMATS = f"{', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)} appended, and .parquet"
INPUT = f"files ({FORMATS}), directories of them, quoted patterns, or - for standard input"  # --input's help
END_OF_TEXT = "<|endoftext|>"  # precedes each document in the shards; GPT-2's only special token
BATCH_CHARS = 2**22  # read and encoded at a time; few, so that memory is reused instead of mapped anew
SURROGATE = re.compile("[\ud800-\udfff]")


def format_of(path):
    """Format and compression of a file by its name, in any case: (".jsonl", ".gz"). None if it has none."""
    name = str(path).lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), None)
    name = name.removesuffix(compression or "")
    kinds = KINDS if compression else (*KINDS, ".parquet")
    return next((end for end in kinds if name.endswith(end)), None), compression


def check_format(path):
    """Raise UserError unless a file's name has the suffix of a supported format."""
    if format_of(path)[0] is None:
        raise UserError(f"{path}: unsupported format; supported: {FORMATS}")


def add_flags(parser):
    """Add the flags of `Reader`, and that of standard input, to an argparse parser or group."""
    parser.add_argument("--text_column", metavar="NAME", default="text",
                        help="the column of text in .jsonl, .json, .csv and .parquet; "
                             "meta.text is the column text inside meta")
    parser.add_argument("--split_on", metavar="TEXT", type=separator,
                        help="what separates the documents of a .txt, for example '<|endoftext|>' "
                             "(default: a .txt is one document)")
    parser.add_argument("--skip_null", action="store_true",
                        help="leave out rows whose text is null (in .csv: empty), and count them")
    parser.add_argument("--stdin_format", choices=[kind[1:] for kind in KINDS],
                        help="format of standard input, which is named - (default: txt)")


def check_flags(parser, args, files):
    """End with the parser's error if flags of `add_flags` do not fit the files that are named."""
    if args.stdin_format and "-" not in files:
        parser.error("argument --stdin_format: only for standard input, which is named -")


def separator(text):
    """The argparse type of --split_on: any text but the empty one."""
    if not text:
        raise ValueError
    return text


class Reader:
    """Reads the texts of files.

    column: of rows; a dot leads into a nested column, unless a column has that very name. split_on: what
    separates the documents of a .txt. The line breaks around it are dropped, and so are empty documents. Rows
    of other formats are documents already. skip_null: leave out rows whose text is null.

    It counts what `report` prints.
    """

    def __init__(self, column="text", split_on=None, skip_null=False):
        self.column, self.split_on, self.skip_null = column, split_on, skip_null
        self.empty = []  # files without text
        self.nulls = 0  # rows left out
        self.splits = 0  # separators found
        self.marks = 0  # how often the texts contain <|endoftext|>

    def report(self, since=None):
        """Print what was left out, or read as plain text. since: the first file read, if not all were."""
        where = f" in {since} and the files after it" if since else ""
        for path in self.empty:
            print(f"{path}: no text in it, left out")
        if self.nulls:
            print(f"{count(self.nulls, 'row')} left out{where}: column {self.column!r} is null")
        if self.marks:
            print(f"{END_OF_TEXT} was read as plain text {count(self.marks, 'time')}{where}; "
                  f"--split_on '{END_OF_TEXT}' would split a .txt at it")
        if self.split_on and not self.splits and not since:
            print(f"--split_on {self.split_on!r} occurs nowhere: each .txt is one document")

    def texts(self, path):
        """Yield the texts of a file in order, as (starts_document, text); a large .txt in several pieces.

        Raises UserError with the file and line of what can't be read or has no such column.
        """
        for part in self.parts(path):
            yield from documents(part)

    def batches(self, path):
        """The texts of a file in batches of about BATCH_CHARS; Arrow arrays are yielded as they are."""
        texts, size = [], 0
        for part in self.parts(path):
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

    def is_empty(self, path):
        """Whether a file has no text. Reads its beginning, and raises UserError if that can't be used."""
        probe = Reader(self.column, self.split_on, self.skip_null)  # with counts of its own
        with contextlib.closing(probe.parts(path)) as parts:
            return next(parts, None) is None

    def parts(self, path):
        """The texts in parts: lists of (starts_document, text), or Arrow arrays with one document a row."""
        check_format(path)
        part = None
        with explain_read_errors(path):
            for part in self.read(path):
                self.marks += count_marks(part)
                yield part
        if part is None:
            self.empty.append(path)

    def read(self, path):
        kind, _ = format_of(path)
        if kind == ".txt":
            with open_text(path, newline="") as file:
                for piece in self.pieces(file):
                    yield [piece]
        elif kind == ".parquet":
            yield from self.read_parquet(path)
        else:
            for place, row in read_csv(path, self.column) if kind == ".csv" else read_json(path):
                text = self.text_of_row(row, place)
                if text is not None:
                    yield [(True, text)]

    def pieces(self, file):
        """A text file in pieces that encode to the same ids as entire documents, which may be large."""
        rest, starts_document = "", True
        for begins, block in self.split_blocks(iter(lambda: file.read(BATCH_CHARS), "")):
            if begins:
                if rest:
                    yield starts_document, rest
                rest, starts_document = "", True
            cut = last_cut(block)
            if cut:
                yield starts_document, rest + block[:cut]
                rest, starts_document = block[cut:], False
            else:
                rest += block
        if rest:
            yield starts_document, rest

    def split_blocks(self, blocks):
        """Yield blocks of text as (starts_document, text), cut where --split_on separates documents."""
        if self.split_on is None:
            yield from ((number == 0, block) for number, block in enumerate(blocks))
            return
        # the lookbehind keeps a search in a long run of line breaks linear
        boundary = re.compile(rf"(?:(?<![\r\n])[\r\n]+)?{re.escape(self.split_on)}[\r\n]*")
        rest, starts_document, after_boundary = "", True, False
        for block in itertools.chain(blocks, [None]):  # None: the end
            rest += block or ""
            if after_boundary and starts_document:  # line breaks after it may come with the next block
                rest = rest.lstrip("\r\n")
            *ended, rest = boundary.split(rest)
            for text in ended:
                if text:
                    yield starts_document, text
                starts_document = after_boundary = True
            self.splits += len(ended)
            # the end of the block may hold the beginning of a boundary
            whole = len(rest) if block is None else max(0, len(rest) + 1 - len(self.split_on))
            text = rest[:whole] if block is None else rest[:whole].rstrip("\r\n")
            if text:
                yield starts_document, text
                starts_document = False
            rest = rest[len(text):]

    def text_of_row(self, row, place):
        """The text of a row, or None if it is null and may be left out. Raises UserError with the place."""
        value = row
        literal = isinstance(row, dict) and self.column in row
        for name in [self.column] if literal else self.column.split("."):
            if value is None and row is not None:  # a null column has no columns inside
                break
            if not isinstance(value, dict) or name not in value:
                has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise UserError(f"{place}: no column {self.column!r}, only {has}; "
                                "name the right one with --text_column")
            value = value[name]
        if value is None and self.skip_null:
            self.nulls += 1
            return None
        if value is None:
            raise UserError(f"{place}: column {self.column!r} is null; --skip_null leaves out such rows")
        if not isinstance(value, str):
            raise UserError(f"{place}: column {self.column!r} contains {type(value).__name__}, not text; "
                            "name the right one with --text_column")
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 can't
            value = SURROGATE.sub("\ufffd", value)
        return value

    def read_parquet(self, path):
        """Yield the texts of a parquet file in Arrow arrays of about BATCH_CHARS, whatever the row groups."""
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # True keeps in memory what it read
            columns = outline(file.schema_arrow)
            self.text_of_row(columns, path)  # raises if it is not there
            names = [self.column] if self.column in columns else self.column.split(".")
            check_unique(names[0], file.schema_arrow.names, path)
            info, size = file.metadata, 1
            for group in map(info.row_group, range(info.num_row_groups)):
                chunks = map(group.column, range(info.num_columns))
                size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == self.column)
            # at most 10,000 rows: in the sizes above, a text that many rows repeat counts once
            batch_size = min(10_000, 1 + BATCH_CHARS * info.num_rows // size)
            number = 0
            for rows in file.iter_batches(batch_size, columns=[self.column]):
                texts = rows.column(rows.schema.names.index(names[0]))
                if len(names) > 1:
                    texts = pyarrow.compute.struct_field(texts, names[1:])
                if texts.null_count or texts.type not in (pyarrow.string(), pyarrow.large_string()):
                    for row, text in enumerate(texts.to_pylist(), start=number + 1):
                        self.text_of_row({self.column: text}, f"{path}, row {row}")  # raises, or counts it
                number += len(texts)
                texts.validate(full=True)  # checks that it is UTF-8
                texts = texts.cast(pyarrow.large_string()).drop_null()
                if len(texts):
                    yield texts


def outline(columns):
    """The columns of an Arrow schema or struct as a row of empty texts, with structs as dicts."""
    import pyarrow

    return {column.name: outline(column.type) if pyarrow.types.is_struct(column.type) else ""
            for column in columns}


def read_rows(path):
    """Yield the rows of a file as (file and line, value). Raises UserError.

    Formats: .parquet, .csv, .json (lines, or one list); a file of any other name is read as JSON lines.
    """
    with explain_read_errors(path):
        kind, _ = format_of(path)
        if kind != ".parquet":
            yield from read_csv(path) if kind == ".csv" else read_json(path)
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
        other = begins_like(path, OTHERS)
        remedy = f"it begins like {other}: unpack or convert it" if other else "convert it with iconv"
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); {remedy}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read to its end ({error})") from error
    except Exception as error:  # these libraries raise types of their own
        if type(error).__module__.partition(".")[0] not in ("pyarrow", "backports"):
            raise
        raise UserError(f"{path}: damaged, or not what its name says ({error})") from error


def open_text(path, newline=None):
    """Open a file as UTF-8 text. It may be compressed, also without a suffix that says so.

    A byte order mark at its start is dropped. Raises EOFError for a compressed file of 0 bytes, which a
    failed download may leave.
    """
    _, compression = format_of(path)
    if compression and not os.path.getsize(path):  # gzip itself takes it for an empty text
        raise EOFError("it has 0 bytes")
    compression = compression or begins_like(path, COMPRESSIONS)
    text = dict(encoding="utf-8-sig", newline=newline)
    if compression == ".gz":
        return gzip.open(path, "rt", **text)
    if compression == ".zst":
        from backports import zstd

        # the default refuses files of `zstd --long=31`, such as dumps of forums
        return zstd.open(path, "rt", options={zstd.DecompressionParameter.window_log_max: 31}, **text)
    return open(path, **text)


def begins_like(path, magics):
    """The key of magics, {name: first bytes}, that fits the beginning of a file; None if none does."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for name, magic in magics.items() if start.startswith(magic)), None)


def read_json(path):
    """Yield (file and line, value) for the lines of a file that are not blank.

    A .json may also be one list, which is read into memory as a whole.
    """
    kind, _ = format_of(path)
    hint = "; a .json contains JSON lines, or one list of objects" if kind == ".json" else ""
    with open_text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for index, (number, line) in enumerate(lines):
            if kind == ".json" and index == 0 and line.lstrip().startswith("["):
                items = parse_json(line + file.read(), path, hint)
                yield from ((f"{path}, item {item}", value) for item, value in enumerate(items, start=1))
                return
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}", hint)


def is_json_line(path):
    """Whether the first line of a text file is a JSON object."""
    with explain_read_errors(path), open_text(path) as file:
        try:
            return isinstance(json.loads(file.readline(BATCH_CHARS)), dict)
        except (ValueError, RecursionError):
            return False


def parse_json(text, place, hint):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}){hint}") from None


def read_csv(path, column=None):
    """Yield (file and line, row) for the rows of a .csv with a header, each as a dict; an empty cell is None.

    Raises UserError if two columns are named `column`.
    """
    csv.field_size_limit(2**31 - 1)  # of this process; the default is 131,072 characters
    with open_text(path, newline="") as file:
        rows = csv.reader(file, strict=True)  # otherwise a missing quote swallows the rest of the file
        try:
            header = next(filter(None, rows), [])
            check_unique(column, header, path)
            line = rows.line_num + 1
            for row in rows:
                place, line = f"{path}:{line}", rows.line_num + 1
                if row and len(row) != len(header):
                    raise UserError(f"{place}: {len(row)} fields, but the header has {len(header)}")
                if row:
                    yield place, dict(zip(header, (cell or None for cell in row)))
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not CSV ({error})") from None


def check_unique(column, names, path):
    """Raise UserError if several columns have the name of the one to read."""
    if names.count(column) > 1:
        raise UserError(f"{path}: {names.count(column)} columns are named {column!r}: rename all but one")


def last_cut(text):
    """The last place between a visible character and white space, where GPT-2 always ends a word; or 0."""
    end = max(0, *(text.rfind(space) for space in " \n\r\t"))
    head = text[:end].rstrip(" \n\r\t")
    return len(head) if head and not head[-1].isspace() else 0


def documents(part):
    """A part of a file, as `Reader.parts` yields it, as a list of (starts_document, text)."""
    return part if isinstance(part, list) else [(True, text) for text in part.to_pylist()]


def count_marks(part):
    """How often the texts of a part contain <|endoftext|>."""
    if isinstance(part, list):
        return sum(text.count(END_OF_TEXT) for _, text in part)
    import numpy as np
    import pyarrow.compute

    _, offsets, content = part.buffers()
    start, end = np.frombuffer(offsets, np.int64)[[part.offset, part.offset + len(part)]]
    if start == end:
        return 0
    # almost no text contains "<|", and a search for it takes a tenth of the time of a count
    content = np.frombuffer(content, np.uint8)[start:end]
    bars = np.flatnonzero(content == ord("|"))
    if not (content[bars - 1] == ord("<")).any():
        return 0
    return pyarrow.compute.sum(pyarrow.compute.count_substring(part, END_OF_TEXT)).as_py()
