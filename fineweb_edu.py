"""FineWeb-Edu, or other text, as shards of token ids: the one owner of the shard format.

    python fineweb_edu.py                                                  # FineWeb-Edu's sample-10BT (hub)
    python fineweb_edu.py --dataset openwebtext                            # by name, or any other of the hub
    python fineweb_edu.py --input my.txt more.jsonl.gz --data_dir data/my  # local text
    python fineweb_edu.py --verify data/my                                 # prove shards by their manifest

A shard is a .npy file of uint16 ids, or a .bin as llm.c and modded-nanogpt write and read them. All shards
are one stream: <|endoftext|>, a document, <|endoftext|>, the next document, ... The first ids of the stream
are the val split. manifest.json says what the shards were made from, and their digests. An interrupted
preparation goes on behind its last complete shard and ends in the same bytes.
FineWeb-Edu: https://arxiv.org/abs/2406.17557
"""

import argparse
import contextlib
import gzip
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from files import (
    UserError,
    appear,
    atomic_write,
    beside,
    digest,
    fetch,
    first_line,
    locked,
    naming,
    release,
    retried,
    run,
)
from tokenizer import get_fast_tokenizer, get_tokenizer

MANIFEST = "manifest.json"
PROVED = ".proved.json"  # size and time of each shard when its digest was last found right
FORMAT = "uint16 token shards, version 1"
SHARD_NAME = re.compile(r"_(train|val)(?:_(\d{6}))?\.(npy|bin)$")  # llm.c's small ones have no number
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 256  # llm.c's: magic, version, number of ids, zeros: int32
# by name: repository, configuration and revision on the hub. OpenWebText's own branch is a script, which the
# datasets library does not run any more; the hub keeps its texts as parquet on another
DATASETS = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", None),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", None),
    "openwebtext": ("Skylion007/openwebtext", None, "refs/convert/parquet"),
}
# by name: the address of a text, and its digest
TEXTS = {"tinyshakespeare": (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "ae717de95b0441526572a3fb9fde75d3")}
HUB_ADDRESS = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")  # repository, revision, path
BATCH_CHARS = 2**22  # text that is encoded at a time: memory that was just used is faster than fresh memory


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Tokenize FineWeb-Edu, another hub dataset or local files into uint16 shards.",
        usage="python fineweb_edu.py [--input FILE ... | --dataset NAME --name CONFIG | --verify DIR] "
              "[--flag value ...]",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", metavar="FILE",
                        help="local .txt, .jsonl, .jsonl.gz or .parquet files")
    source.add_argument("--dataset", default="fineweb-edu",
                        help=f"{', '.join((*DATASETS, *TEXTS))}, or any dataset of the Hugging Face hub")
    source.add_argument("--verify", metavar="DIR",
                        help="check every shard of a directory against its manifest")
    parser.add_argument("--name", help="the dataset's configuration, as sample-10BT or sample-100BT")
    parser.add_argument("--revision", help="of the dataset: a commit, branch or tag")
    parser.add_argument("--data_dir", help="where they go: edu_fineweb10B, data/NAME of others")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or a file made by tokenizer.py")
    parser.add_argument("--text_column", default="text", help="where .jsonl and .parquet hold the text")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens in a shard")
    parser.add_argument("--val_tokens", type=int,
                        help="tokens of the val split, the first of the stream "
                             "(one shard; a tenth of an input smaller than two shards)")
    parser.add_argument("--format", choices=("npy", "bin"), default="npy",
                        help="of the shards: numpy's, or the one of llm.c and modded-nanogpt")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="cores that encode")
    args = parser.parse_args(argv)
    if args.format == "bin" and args.shard_size >= 2**31:
        parser.error("argument --shard_size: a .bin counts its ids in 31 bits")
    for flag in ("shard_size", "val_tokens", "num_proc"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"argument --{flag}: must be at least 1")
    for flag in ("name", "revision"):
        if getattr(args, flag) and (args.input or args.dataset in TEXTS):
            parser.error(f"argument --{flag}: goes with a --dataset of the hub")
    if args.data_dir is None:
        name = Path(args.input[0]).name.partition(".")[0] if args.input else args.dataset.rpartition("/")[2]
        args.data_dir = "edu_fineweb10B" if name == "fineweb-edu" and not args.input else f"data/{name}"
    if args.dataset in DATASETS:
        args.dataset, name, revision = DATASETS[args.dataset]
        args.name, args.revision = args.name or name, args.revision or revision
    return args


# reading: every source becomes one stream of texts


def read_texts(path, column="text"):
    """Yield the texts of a file in order, as (starts_document, text): a large .txt comes in several pieces.

    Raises UserError, with file and line, for what can't be read or has no such column.
    """
    for part in read(str(path), column):
        yield from documents(part)


def read(path, column):
    """What `read_texts` does, in parts: lists of (starts_document, text), or Arrow arrays of documents."""
    try:
        if path.endswith(".txt"):
            with open(path, encoding="utf-8", newline="") as file:
                for piece in read_pieces(file):
                    yield [piece]
        elif path.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        place = f"{path}:{number}"
                        yield [(True, text_of_row(parse_json(line, place), column, place))]
        elif path.endswith(".parquet"):
            yield from read_parquet(path, column)
        else:
            raise UserError(f"{path}: not .txt, .jsonl, .jsonl.gz or .parquet")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it with iconv") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: can't be read to its end ({error})") from error


def read_pieces(file):
    """A text file in pieces that encode as the whole does, so that a file of any size fits into memory."""
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


def parse_json(line, place):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from None


def text_of_row(row, column, place):
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place}: no column {column!r}, only {has}; name the right one with --text_column")
    if not isinstance(row[column], str):
        raise UserError(f"{place}: column {column!r} holds {type(row[column]).__name__}, not text; "
                        "--text_column?")
    return row[column]


def read_parquet(path, column):
    """Yield the texts of a parquet file in Arrow arrays of about BATCH_CHARS, whatever the row groups."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # else it keeps what it has read
            if column not in file.schema_arrow.names:
                # says which columns there are
                text_of_row(dict.fromkeys(file.schema_arrow.names), column, path)
            info, size = file.metadata, 1
            for group in map(info.row_group, range(info.num_row_groups)):
                chunks = map(group.column, range(info.num_columns))
                size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
            # at most so many: a text that stands in many rows counts once there
            batch_size = min(10_000, 1 + BATCH_CHARS * info.num_rows // size)
            number = 0
            for rows in file.iter_batches(batch_size, columns=[column]):
                texts = rows.column(0)
                if texts.null_count or texts.type not in (pyarrow.string(), pyarrow.large_string()):
                    for row, text in enumerate(texts.to_pylist(), start=number + 1):
                        text_of_row({column: text}, column, f"{path}, row {row}")  # says which one it is
                number += len(texts)
                texts.validate(full=True)  # that it is UTF-8
                yield texts.cast(pyarrow.large_string())
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error


def documents(part):
    """A part of a file as a list of (starts_document, text), be it one already or an Arrow array."""
    return part if isinstance(part, list) else [(True, text) for text in part.to_pylist()]


def batches(path, column):
    """The texts of a file, about BATCH_CHARS at a time: Arrow's as they are, without a Python string, others
    put together."""
    texts, size = [], 0
    for part in read(path, column):
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
    """Download one of TEXTS into data_dir, unless it is there; return its path. Raises UserError."""
    url, expected = TEXTS[name]

    def check(file):
        if digest(file) != expected:
            raise UserError("what came is another text")

    return str(fetch(url, Path(data_dir) / f"{name}.txt", check, "name a copy with --input"))


def local_file(address):
    """The local path of a file; one of the hub is downloaded into the hub's cache, or found there."""
    match = HUB_ADDRESS.match(address)
    if not match:
        return address
    from huggingface_hub import hf_hub_download

    repository, revision, path = match.groups()
    try:
        return retried(hf_hub_download, repository, path, repo_type="dataset", revision=revision)
    except Exception as error:  # of the hub's library or those below it
        raise UserError(f"{address} can't be fetched ({first_line(error)}); "
                        "the same command goes on from here") from error


# encoding and writing


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # a parent that was killed can't tell its workers to stop

    threading.Thread(target=leave_with_parent, daemon=True).start()


def encode(batch, tokenizer):
    """The ids of a batch of texts, uint16, <|endoftext|> before each document."""
    import numpy as np

    encoding = get_tokenizer(tokenizer)
    parts = []  # an array a text: a list of all ids would take twenty times the memory
    for starts_document, text in documents(batch):
        start = [encoding.eot_token] if starts_document else []
        parts.append(np.array(start + encoding.encode_ordinary(text), dtype=np.uint16))
    return np.concatenate(parts)


def encode_fast(batch, tokenizer):
    """What `encode` returns, by gigatoken: some ten times as fast, without a Python int for each token."""
    import awkward
    import numpy as np

    if isinstance(batch, list):
        starts_document, texts = map(list, zip(*batch))
    else:
        starts_document, texts = slice(None), awkward.from_arrow(batch)  # the same memory
    try:
        encoded = get_fast_tokenizer(tokenizer).encode_batch(texts, parallel=False)
    except TypeError:  # half a character, as JSON can hold one: tiktoken knows what becomes of it
        return encode(batch, tokenizer)
    ids, offsets = encoded.layout.content.data, encoded.layout.offsets.data  # numpy arrays
    starts = offsets[:-1][starts_document]
    stream = np.full(len(ids) + len(starts), get_tokenizer(tokenizer).eot_token, dtype=np.uint16)
    of_text = np.ones(len(stream), dtype=bool)
    of_text[starts + np.arange(len(starts))] = False
    stream[of_text] = ids  # what np.insert does, in half the time
    return stream


def encodes_alike(batch, tokenizer):
    """Whether gigatoken is there and makes the same ids as tiktoken of the beginnings of a batch's texts."""
    sample = [(starts_document, text[:4096]) for starts_document, text in documents(batch[:64])]
    if get_fast_tokenizer(tokenizer) is None:
        reason = "gigatoken is not installed"
    elif encode_fast(sample, tokenizer).tolist() == encode(sample, tokenizer).tolist():
        return True
    else:
        reason = "gigatoken and tiktoken differ on this text"
    print(f"{reason}: tiktoken encodes, which takes longer")
    return False


class Shard:
    """A shard on its way: its ids go to the disk as they come, its name appears with `publish`."""

    def __init__(self, path, split, size):
        import xxhash

        self.path, self.split = path, split
        self.tokens, self.room = 0, size
        self.next = None  # (file, batch, offset) in the source of the first id behind it
        self.digest = xxhash.xxh3_128()  # as `files.digest` has it
        with naming(path):
            self.file = open(beside(path), "w+b")
        self.write(header(path, size))

    def write(self, content):
        self.digest.update(content)
        with naming(self.path):
            self.file.write(content)
            release(self.file)

    def add(self, ids):
        self.write(ids.astype("<u2", copy=False))
        self.tokens += len(ids)
        self.room -= len(ids)

    @contextlib.contextmanager
    def set_aside(self):
        """Give the shard up: its ids become a file to read from, which is removed behind the context."""
        aside = self.path.with_name(f".{self.path.name}.aside.tmp")
        self.file.close()
        os.replace(self.file.name, aside)
        try:
            with open(aside, "rb") as file:
                file.seek(len(header(self.path, 0)))
                yield file
        finally:
            aside.unlink()

    def publish(self):
        """Let it appear, of the size that it has by now; return its digest."""
        with naming(self.path), self.file:
            if self.room:
                self.file.seek(0)
                self.file.write(header(self.path, self.tokens))
            appear(self.file, self.path)
        return digest(self.path) if self.room else self.digest.hexdigest()

    def discard(self):
        """Give it up, unless it has appeared."""
        with contextlib.suppress(OSError):  # what a full disk did not take is not wanted any more
            self.file.close()
        beside(self.path).unlink(missing_ok=True)


def header(path, tokens):
    """What stands before the ids of a shard, of the same length for any number of them."""
    import numpy as np

    if path.suffix == ".bin":
        return np.array([BIN_MAGIC, BIN_VERSION, tokens] + [0] * (BIN_HEADER - 3), dtype="<i4").tobytes()
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return out.getvalue()


class ShardWriter:
    """Cuts the stream of ids into shards and keeps the manifest, which says where in the source the next
    one begins.

    How long the val split is may be known only when two shards are full, or at the end. Until then the first
    is taken for it, and none appears.
    """

    def __init__(self, data_dir, manifest):
        self.data_dir, self.manifest = data_dir, manifest
        self.prefix = "edufineweb" if data_dir.name == "edu_fineweb10B" else data_dir.resolve().name
        self.start = tuple(manifest["next"])  # what comes before stands in shards already
        self.shards = []  # that did not appear yet; the last takes the next ids
        self.added = []  # (file, batch, number of ids) of what is in them, while they may be cut anew

    def add(self, file, batch, ids):
        if self.manifest["val_tokens"] is None:
            self.added.append((file, batch, len(ids)))
        offset = self.start[2] if (file, batch) == self.start[:2] else 0
        while offset < len(ids):
            if not self.shards or not self.shards[-1].room:
                self.shards.append(self.next_shard())
            shard = self.shards[-1]
            part = ids[offset : offset + shard.room]
            shard.add(part)
            offset += len(part)
            shard.next = (file, batch, offset)
            if self.manifest["val_tokens"] is None and len(self.shards) == 2 and not shard.room:
                self.manifest["val_tokens"] = self.manifest["shard_size"]
            while self.shards and not self.shards[0].room and self.manifest["val_tokens"] is not None:
                self.publish()

    def next_shard(self):
        size = self.manifest["shard_size"]
        shards = [(shard["split"], shard["tokens"]) for shard in self.manifest["shards"]]
        shards += [(shard.split, shard.tokens) for shard in self.shards]
        val_tokens = self.manifest["val_tokens"] or size
        left = val_tokens - sum(tokens for split, tokens in shards if split == "val")
        split = "val" if left > 0 else "train"
        name = f"{self.prefix}_{split}_{len(shards):06d}.{self.manifest['file_format']}"
        return Shard(self.data_dir / name, split, min(left, size) if left > 0 else size)

    def publish(self):
        """Let the first shard appear, and be in the manifest."""
        if not self.manifest["shards"]:  # without a manifest they would be of unknown origin
            write_manifest(self.data_dir, self.manifest)
        shard = self.shards[0]
        found = shard.publish()
        entry = {"file": shard.path.name, "split": shard.split, "tokens": shard.tokens,
                 "bytes": shard.path.stat().st_size, "digest": found}
        self.manifest["shards"].append(entry)
        self.manifest["next"] = shard.next
        del self.shards[0]
        write_manifest(self.data_dir, self.manifest)

    def finish(self):
        import numpy as np

        total = sum(shard["tokens"] for shard in self.manifest["shards"])
        total += sum(shard.tokens for shard in self.shards)
        val_tokens = self.manifest["val_tokens"] or max(1, total // 10)
        if total <= val_tokens:
            raise UserError(f"--val_tokens {val_tokens} leaves nothing to train on: {total} tokens in all")
        if self.manifest["val_tokens"] is None:  # then the same stream is cut anew
            self.manifest["val_tokens"] = val_tokens
            with contextlib.ExitStack() as asides:
                files = [asides.enter_context(shard.set_aside()) for shard in self.shards]
                self.shards = []
                for file, batch, count in self.added:
                    ids = b""
                    for old in files:  # what is at its end gives nothing
                        ids += old.read(2 * count - len(ids))
                    self.add(file, batch, np.frombuffer(ids, dtype="<u2"))
        if self.shards:
            self.publish()
        self.manifest["complete"] = True
        del self.manifest["next"], self.manifest["batches"]
        write_manifest(self.data_dir, self.manifest)

    def discard(self):
        """Remove what did not appear."""
        while self.shards:
            self.shards.pop().discard()


def write_manifest(data_dir, manifest):
    with atomic_write(Path(data_dir) / MANIFEST) as file:
        json.dump(manifest, file, indent=1)


def has(entry, kinds):
    """Whether a dict has these keys, each with a value of its kind."""
    return all(key in entry and isinstance(entry[key], kind) for key, kind in kinds.items())


def read_manifest(data_dir):
    """The manifest of a directory of shards, or None if it has none (build-nanogpt's have none)."""
    path = Path(data_dir) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest.setdefault("file_format", "npy")  # the only one there was at first
        needed = dict(source=dict, tokenizer=(str, dict), num_tokens=int, complete=bool, shards=list)
        if manifest["format"] != FORMAT or not has(manifest, needed):
            raise ValueError(f"it is not one of {FORMAT!r}")
        if not all(has(shard, dict(file=str, split=str, tokens=int, bytes=int, digest=str))
                   for shard in manifest["shards"]):
            raise ValueError("it does not describe its shards")
        if manifest["tokenizer"] != "gpt2" and not has(manifest["tokenizer"], dict(file=str, digest=str)):
            raise ValueError("it does not name its tokenizer")
        if not manifest["complete"] and not (
                has(manifest, dict(next=list, batches=list, val_tokens=(int, type(None))))
                and len(manifest["next"]) == 3
                and all(isinstance(n, int) and n >= 0 for n in manifest["next"])):
            raise ValueError("it does not say where to go on")
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} can't be used ({error!r}); prepare the data anew") from error


def prepare(files, data_dir, source, tokenizer="gpt2", column="text", shard_size=10**8, val_tokens=None,
            num_proc=1, file_format="npy"):
    """Encode files (paths or hub addresses, in this order) into the shards of data_dir; return the manifest.

    source: a dict for the manifest that says where the files are from. What an interrupted call finished is
    kept. Raises UserError for unusable input, and if data_dir holds shards of something else.
    """
    from tqdm import tqdm

    data_dir = Path(data_dir)
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 2**16:
        raise UserError(f"tokenizer {tokenizer} has {encoding.n_vocab} ids, "
                        "a uint16 shard holds ids below 65536")
    request = {
        "format": FORMAT,
        "source": source,
        "text_column": column,
        "tokenizer": "gpt2" if tokenizer == "gpt2"
                     else {"file": "tokenizer.json", "digest": digest(tokenizer)},
        "num_tokens": encoding.n_vocab,
        "shard_size": shard_size,
        "val_tokens_asked": val_tokens,
        "file_format": file_format,
    }
    # what "next" counts in: batches cut elsewhere would tear the stream
    batches_by = [BATCH_CHARS, importlib.metadata.version("pyarrow")]
    manifest = read_manifest(data_dir)
    if manifest is None:
        if any(SHARD_NAME.search(path.name) for path in data_dir.glob("*")):
            raise UserError(f"{data_dir} holds shards of unknown origin: "
                            "remove them or choose another --data_dir")
        manifest = {**request, "val_tokens": val_tokens, "complete": False, "next": (0, 0, 0),
                    "batches": batches_by, "shards": []}
    different = [key for key in request if manifest.get(key) != request[key]]
    if different:
        raise UserError(f"{data_dir} holds a preparation with another {', '.join(different)}: "
                        "choose another --data_dir")
    if manifest["complete"]:
        print(f"{data_dir} is prepared already; --verify {data_dir} checks it")
        return manifest
    if manifest.get("batches") != batches_by:
        raise UserError(f"{data_dir} was begun with another version of this program or of pyarrow, which "
                        "can't go on with it: remove it, or choose another --data_dir")

    data_dir.mkdir(parents=True, exist_ok=True)
    for leftover in data_dir.glob(".*.tmp"):
        leftover.unlink()
    if tokenizer != "gpt2":
        shutil.copyfile(tokenizer, data_dir / "tokenizer.json")
    writer = ShardWriter(data_dir, manifest)
    if manifest["shards"]:
        print(f"{data_dir}: going on behind {manifest['shards'][-1]['file']}")
    done = sum(shard["tokens"] for shard in manifest["shards"])
    progress = tqdm(unit=" tokens", unit_scale=True, initial=done, desc=data_dir.name,
                    disable=None)
    in_flight = deque()  # (file, batch, future), in the stream's order and few: memory stays bounded

    def collect():
        file, batch, future = in_flight.popleft()
        ids = future.result()
        progress.update(len(ids))
        writer.add(file, batch, ids)

    with progress, contextlib.ExitStack() as pools:
        pools.callback(writer.discard)
        # gigatoken leaves Python's lock to others while it encodes, tiktoken's lists need a process a core
        threads, processes, fast = pools.enter_context(ThreadPoolExecutor(num_proc)), None, True
        try:
            first_file, first_batch, _ = manifest["next"]
            for file in range(first_file, len(files)):
                batch = -1
                for batch, texts in enumerate(batches(local_file(str(files[file])), column)):
                    if batch == 0:
                        # on a thread of the pool, which keeps the tokenizer that is made for it
                        fast = fast and threads.submit(encodes_alike, texts, tokenizer).result()
                    if not fast and not processes and num_proc > 1:  # spawned: a fork is not safe here
                        spawn = multiprocessing.get_context("spawn")
                        processes = pools.enter_context(ProcessPoolExecutor(num_proc, spawn, start_worker))
                    if (file, batch) >= (first_file, first_batch):
                        work, pool = (encode_fast, threads) if fast else (encode, processes or threads)
                        in_flight.append((file, batch, pool.submit(work, texts, tokenizer)))
                    while len(in_flight) > 2 * num_proc:
                        collect()
                if batch < 0:
                    raise UserError(f"{files[file]}: no text in it")
            while in_flight:
                collect()
        except BrokenProcessPool:
            print("error: a worker was killed, by the system when memory runs out; the same command, perhaps "
                  "with a smaller --num_proc, goes on behind the last shard", file=sys.stderr, flush=True)
            # the pool would be waited for, by early 3.11 for ever: github.com/python/cpython/issues/94777
            os._exit(1)
        except BaseException:
            for pool in filter(None, (threads, processes)):
                pool.shutdown(cancel_futures=True)
            raise
        writer.finish()
    return manifest


# opening and verifying


def open_shards(data_dir, split):
    """The shards of a split in order, memory-mapped: a list of (path, uint16 array).

    Sizes and headers are checked. Raises UserError that names the first file which is missing, damaged or
    not what the manifest says.
    """
    import numpy as np

    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    if manifest is not None and not manifest["complete"]:
        raise UserError(f"{data_dir}: its preparation was interrupted; "
                        "run the same fineweb_edu.py command again")
    found = {path.name: path for path in data_dir.glob("*") if SHARD_NAME.search(path.name)}
    if manifest is not None:
        expected = {shard["file"]: shard for shard in manifest["shards"]}
        for name in sorted(expected.keys() ^ found.keys()):
            what = "is missing" if name in expected else f"is not in {MANIFEST}"
            raise UserError(f"{data_dir / name} {what}; prepare the data anew, or restore it")
    names = sorted(name for name in found if SHARD_NAME.search(name).group(1) == split)
    if not names:
        raise UserError(f"no {split} shards in {data_dir}: python fineweb_edu.py makes them of a dataset "
                        f"(--dataset NAME) or of your files (--input FILE --data_dir {data_dir})")
    if len({SHARD_NAME.search(name).group(3) for name in names}) > 1:
        raise UserError(f"{data_dir} holds {split} shards as .npy and as .bin: remove one kind")
    numbers = [int(SHARD_NAME.search(name).group(2) or 0) for name in names]
    for before, after in zip(numbers, numbers[1:]):
        if after != before + 1:
            raise UserError(f"{data_dir}: {split} shard {before + 1:06d} is missing "
                            f"between {before:06d} and {after:06d}")

    shards = []
    for name in names:
        path = found[name]
        size = path.stat().st_size
        if manifest is not None and size != expected[name]["bytes"]:
            raise UserError(f"{path} has {size} bytes, its manifest says {expected[name]['bytes']}; "
                            "prepare it anew")
        try:
            tokens = open_bin(path) if path.suffix == ".bin" else np.load(path, "r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is not a whole {path.suffix} file ({error}); get it anew") from error
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise UserError(f"{path} holds {tokens.ndim}-D {tokens.dtype}, not 1-D uint16; prepare it anew")
        if manifest is not None and len(tokens) != expected[name]["tokens"]:
            raise UserError(f"{path} has {len(tokens)} tokens, its manifest says {expected[name]['tokens']}")
        shards.append((path, tokens))
    return shards


def open_bin(path):
    """The ids of a .bin shard, memory-mapped. Raises ValueError for what is none."""
    import numpy as np

    start = 4 * BIN_HEADER
    if path.stat().st_size < start:
        raise ValueError(f"it has {path.stat().st_size} bytes, fewer than its header")
    magic, version, size = np.fromfile(path, dtype="<i4", count=3)
    if (magic, version) != (BIN_MAGIC, BIN_VERSION):
        raise ValueError(f"its header is {magic}, {version}; GPT-2's of llm.c is {BIN_MAGIC}, {BIN_VERSION}")
    if path.stat().st_size != start + 2 * size:
        raise ValueError(f"it has {path.stat().st_size} bytes, its header says {start + 2 * size}")
    return np.memmap(path, dtype="<u2", mode="r", offset=start, shape=(int(size),))


def tokenizer_of(data_dir):
    """What the shards of a directory were encoded with: "gpt2", or the path of its tokenizer.json."""
    manifest = read_manifest(data_dir)
    if manifest is None or manifest["tokenizer"] == "gpt2":
        return "gpt2"
    path = Path(data_dir) / manifest["tokenizer"]["file"]
    if not path.is_file() or digest(path) != manifest["tokenizer"]["digest"]:
        raise UserError(f"{path} is missing or not the tokenizer that encoded these shards; "
                        "prepare the data anew")
    return str(path)


def source_of(data_dir):
    """What the shards of a directory were made from, by its manifest or their names: a dict, or empty."""
    manifest = read_manifest(data_dir)
    if manifest is None:  # as build-nanogpt and llm.c name theirs
        known = all(re.match("edu_?fineweb_", path.name) for path, _ in open_shards(data_dir, "train"))
        return {"dataset": DATASETS["fineweb-edu"][0], "known": "by the shards' names"} if known else {}
    source = manifest["source"]
    # the files of a hub's dataset follow from its revision
    return {key: value for key, value in source.items() if value and not (key == "files" and "ref" in source)}


def identity(data_dir):
    """A text that changes with the shards of a directory, whatever the directory's place."""
    manifest = Path(data_dir) / MANIFEST
    if manifest.exists():
        return digest(manifest)
    shards = sorted(path for path in Path(data_dir).glob("*") if SHARD_NAME.search(path.name))
    return "unverified: " + ", ".join(f"{path.name} {path.stat().st_size}" for path in shards)


def check_digest(path, expected):
    actual = digest(path)
    if actual != expected:
        raise UserError(f"{path} has changed since it was written: its digest is {actual}, its manifest says "
                        f"{expected}; prepare the data anew, or restore it")


def prove(data_dir):
    """Check the digests of those shards that were not proved since they last changed. Raises UserError."""
    manifest, proof, proved, now = read_manifest(data_dir), Path(data_dir) / PROVED, {}, {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        proved = dict(json.loads(proof.read_text(encoding="utf-8")))
    for shard in manifest["shards"] if manifest else []:
        stat = (Path(data_dir) / shard["file"]).stat()
        now[shard["file"]] = [shard["digest"], stat.st_size, stat.st_mtime_ns]
    changed = [name for name in now if now[name] != proved.get(name)]
    if changed:
        print(f"{data_dir}: reading {len(changed)} shards whole, once, to prove their digests", flush=True)
    for name in changed:
        check_digest(Path(data_dir) / name, now[name][0])
        proved[name] = now[name]
        with contextlib.suppress(OSError), atomic_write(proof) as file:  # read-only: proved each time
            json.dump(proved, file)


def verify(data_dir):
    """Check every shard's digest and ids by the manifest; return the number of tokens. Raises UserError."""
    manifest = read_manifest(data_dir)
    if manifest is None:
        raise UserError(f"{data_dir} has no {MANIFEST} to verify it against")
    tokenizer_of(data_dir)
    total = 0
    for split in ("val", "train"):
        for path, tokens in open_shards(data_dir, split):
            entry = next(shard for shard in manifest["shards"] if shard["file"] == path.name)
            check_digest(path, entry["digest"])
            if len(tokens) and tokens.max() >= manifest["num_tokens"]:
                offset = int((tokens >= manifest["num_tokens"]).argmax())
                raise UserError(f"{path} holds id {tokens[offset]} at {offset}, "
                                f"the tokenizer ends at {manifest['num_tokens'] - 1}")
            total += len(tokens)
    return total


def main(args):
    if args.verify:
        print(f"{args.verify}: {verify(args.verify):,} tokens, all as the manifest says")
        return
    with locked(args.data_dir):
        if args.dataset in TEXTS:
            args.input = [fetch_text(args.dataset, args.data_dir)]
        if args.input:
            files = args.input
            for path in files:
                if not Path(path).is_file():
                    raise UserError(f"--input {path}: no such file")
            source = {"files": [{"name": Path(path).name, "digest": digest(path)} for path in files]}
        else:
            source = (read_manifest(args.data_dir) or {}).get("source", {})
            asked = {"dataset": args.dataset, "name": args.name, "ref": args.revision}
            if any(source.get(key) != value for key, value in asked.items()):
                files = hub_files(args.dataset, args.name, args.revision)
                revisions = ", ".join({match[2] for match in map(HUB_ADDRESS.match, files) if match})
                source = {**asked, "revision": revisions, "files": files}
            files = source["files"]  # of the revision begun with, though the hub may have a newer one
        settings = dict(tokenizer=args.tokenizer, column=args.text_column, shard_size=args.shard_size,
                        file_format=args.format)
        manifest = prepare(files, args.data_dir, source, val_tokens=args.val_tokens, num_proc=args.num_proc,
                           **settings)
    tokens = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split)
              for split in ("train", "val")}
    print(f"{args.data_dir}: {len(manifest['shards'])} shards, "
          f"{tokens['train']:,} train and {tokens['val']:,} val tokens")


if __name__ == "__main__":
    run(main, parse_args())
