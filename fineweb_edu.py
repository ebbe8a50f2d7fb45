"""Turn FineWeb-Edu, or other text, into shards of token ids (their format: kit/shards.py).

    python fineweb_edu.py                                                  # FineWeb-Edu's sample-10BT (hub)
    python fineweb_edu.py --dataset openwebtext                            # a short name, or any hub dataset
    python fineweb_edu.py --input my.txt more.jsonl.gz --data_dir data/my  # local text
    python fineweb_edu.py --input texts/ "more/*.json.zst"                 # directories, quoted patterns
    python fineweb_edu.py --verify data/my                                 # check shards and their manifest
    python fineweb_edu.py --part 3/8                                       # one of 8 machines; then --merge

If a preparation is interrupted, the same command continues after the last complete shard; the shards are the
same, byte for byte. FineWeb-Edu: https://arxiv.org/abs/2406.17557
"""

import argparse
import os

from kit.flags import Parser, from_command_line, integer


def part_of(text):
    """The argparse type of --part: "3/8" becomes [3, 8]."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, as in 3/8, not {text!r}")
    return [int(number), int(parts)]


def parse_args(argv=None):
    from kit import formats, sources  # here, because by now Ctrl-C prints no traceback

    parser = Parser(
        description="Tokenize FineWeb-Edu, another hub dataset or local files into uint16 shards.",
        usage="python fineweb_edu.py [--input FILE ... | --dataset NAME | --verify DIR] [--flag value ...]",
        aliases={"--val_tokens": "--val_size", "--text": "--input"},
    )
    group = parser.add_argument_group("text")
    source, add = group.add_mutually_exclusive_group(), group.add_argument
    source.add_argument("--input", nargs="+", metavar="FILE", help=formats.INPUT)
    source.add_argument("--dataset", metavar="NAME", default="fineweb-edu",
                        help=f"{', '.join((*sources.DATASETS, *sources.TEXTS))}, or any dataset of the "
                             "Hugging Face hub")
    source.add_argument("--verify", metavar="DIR",
                        help="only check the shards of a directory against its manifest")
    add("--name", metavar="CONFIG", help="configuration of a hub dataset, for example sample-100BT")
    add("--revision", help="commit, branch or tag of a hub dataset")
    formats.add_flags(group)
    add = parser.add_argument_group("shards").add_argument
    add("--data_dir", metavar="DIR", help="output directory (default: edu_fineweb10B, or data/NAME)")
    add("--tokenizer", metavar="FILE", default="gpt2", help="gpt2, or a file made by tokenizer.py")
    add("--shard_size", type=integer(1), default=10**8, help="tokens per shard")
    add("--val_size", type=integer(1), help="tokens of the val split, taken from the start of the text "
        "(default: one shard; a tenth of a text that is shorter than two shards)")
    add("--format", choices=("npy", "bin"), default="npy",
        help="shard format: numpy's, or that of llm.c and modded-nanogpt")
    add("--num_proc", type=integer(1), default=os.cpu_count(), help="number of worker threads or processes")
    parts = parser.add_argument_group("many machines").add_mutually_exclusive_group()
    parts.add_argument("--part", metavar="I/N", type=part_of,
                       help="prepare only the files of part I of N into DIR/parts/I-of-N; I counts from 1")
    parts.add_argument("--merge", action="store_true",
                       help="join the complete parts into the shards that a single preparation would make")
    args = parser.parse_args(argv)
    flag = "part" if args.part else "merge" if args.merge else None
    if flag and (args.verify or args.dataset in sources.TEXTS or "-" in (args.input or ())):
        parser.error(f"argument --{flag}: only for files of --input, or for a --dataset of the hub")
    if args.format == "bin" and args.shard_size >= 2**31:
        parser.error("argument --shard_size: a .bin file counts its ids in 31 bits")
    for flag in ("name", "revision"):
        if getattr(args, flag) and (args.input or args.dataset in sources.TEXTS):
            parser.error(f"argument --{flag}: only for a --dataset of the hub")
    formats.check_flags(parser, args, args.input or ())
    if args.data_dir is None:
        name = sources.name_of(args.input[0]) if args.input else args.dataset.rpartition("/")[2]
        args.data_dir = "edu_fineweb10B" if name == "fineweb-edu" and not args.input else f"data/{name}"
    if args.dataset in sources.DATASETS:
        args.dataset, name, revision = sources.DATASETS[args.dataset]
        args.name, args.revision = args.name or name, args.revision or revision
    return args


if __name__ == "__main__":
    args = from_command_line(parse_args)

import contextlib
import importlib.metadata
import json
import multiprocessing
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from kit import formats, shards, sources
from kit.files import UserError, atomic_write, count, digest, locked, run_script
from kit.sources import HUB_ADDRESS, TEXTS
from tokenizer import encode_text, get_fast_tokenizer, get_tokenizer, rank_lines, train

# encoding


def encode(batch, tokenizer):
    """The ids of a batch of texts, uint16, with <|endoftext|> before each document."""
    import numpy as np

    encoding = get_tokenizer(tokenizer)
    parts = []  # an array per text: one list of all ids would take twenty times the memory
    for starts_document, text in formats.documents(batch):
        start = [encoding.eot_token] if starts_document else []
        parts.append(np.array(start + encode_text(text, encoding), dtype=np.uint16))
    return np.concatenate(parts)


def encode_fast(batch, tokenizer):
    """The same ids as `encode`, by gigatoken: ten times as fast, because it makes no Python int per token."""
    import awkward
    import numpy as np

    if isinstance(batch, list):
        starts_document, texts = map(list, zip(*batch))
    else:
        starts_document, texts = slice(None), awkward.from_arrow(batch)  # shares the memory
    try:
        encoded = get_fast_tokenizer(tokenizer).encode_batch(texts, parallel=False)
    except TypeError:  # half of a surrogate pair: tiktoken replaces it
        return encode(batch, tokenizer)
    ids, offsets = encoded.layout.content.data, encoded.layout.offsets.data  # numpy arrays
    starts = offsets[:-1][starts_document]
    stream = np.full(len(ids) + len(starts), get_tokenizer(tokenizer).eot_token, dtype=np.uint16)
    is_text = np.ones(len(stream), dtype=bool)
    is_text[starts + np.arange(len(starts))] = False
    stream[is_text] = ids  # the same as np.insert, in half the time
    return stream


def encodes_alike(batch, tokenizer):
    """Whether gigatoken is installed and encodes the beginnings of a batch's texts as tiktoken does."""
    sample = [(starts_document, text[:4096]) for starts_document, text in formats.documents(batch[:64])]
    if rank_lines(tokenizer) is None:
        problem = "gigatoken needs special tokens to have the highest ids"
    elif get_fast_tokenizer(tokenizer) is None:
        problem = "gigatoken is not installed"
    elif encode_fast(sample, tokenizer).tolist() == encode(sample, tokenizer).tolist():
        return True
    else:
        problem = "gigatoken and tiktoken differ on this text"
    print(f"{problem}: using tiktoken, which is slower")
    return False


def start_worker():
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends if its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class Encoder:
    """A context that encodes batches in parallel: gigatoken in threads, or tiktoken in processes.

    gigatoken releases the GIL while it encodes; tiktoken, which builds Python lists, does not.
    """

    def __init__(self, tokenizer, num_proc):
        self.tokenizer, self.num_proc, self.fast = tokenizer, num_proc, True
        self.threads, self.processes = ThreadPoolExecutor(num_proc), None
        self.workers = set()  # the processes seen so far

    def begin_file(self, batch):
        """Check with a file's first batch whether gigatoken can encode the file."""
        # in a thread of the pool, where the tokenizer made for this check is used again
        self.fast = self.fast and self.threads.submit(encodes_alike, batch, self.tokenizer).result()
        if not self.fast and not self.processes and self.num_proc > 1:
            spawn = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
            self.processes = ProcessPoolExecutor(self.num_proc, spawn, start_worker)

    def submit(self, batch):
        """A future of the batch's ids."""
        if self.fast:
            return self.threads.submit(encode_fast, batch, self.tokenizer)
        return (self.processes or self.threads).submit(encode, batch, self.tokenizer)

    def result(self, future):
        """Wait for the ids of a batch. Raises BrokenProcessPool if a worker was killed.

        The pool itself notices that, unless the worker was killed while it sent a result: the pool would wait
        for the rest of that result for ever.
        """
        while True:
            alive = set(multiprocessing.active_children())
            self.workers |= alive
            if self.workers != alive:
                raise BrokenProcessPool
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=1)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is BrokenProcessPool:
            print("error: a worker was killed, probably because memory ran out; the same command, perhaps "
                  "with a smaller --num_proc, continues after the last shard", file=sys.stderr, flush=True)
            # shutdown would wait; in early Python 3.11 for ever: github.com/python/cpython/issues/94777
            os._exit(1)
        for pool in filter(None, (self.threads, self.processes)):
            pool.shutdown(cancel_futures=error is not None)


# preparing


def describe(source, tokenizer="gpt2", column="text", shard_size=10**8, val_tokens=None, file_format="npy",
             split_on=None, skip_null=False, part=None):
    """What a manifest says about a preparation with these settings, which are those of `prepare`.

    Raises UserError if the tokenizer has too many ids.
    """
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 2**16:
        raise UserError(f"--tokenizer {tokenizer}: it has {encoding.n_vocab} ids, more than the 65536 of "
                        "uint16 shards; python tokenizer.py train learns a smaller one")
    return {
        "format": shards.FORMAT,
        "source": source,
        "text_column": column,
        "tokenizer": "gpt2" if tokenizer == "gpt2"
                     else {"file": "tokenizer.json", "digest": digest(tokenizer)},
        "num_tokens": encoding.n_vocab,
        "shard_size": shard_size,
        "val_tokens_asked": val_tokens,
        "file_format": file_format,
        **({"split_on": split_on} if split_on else {}),
        **({"skip_null": True} if skip_null else {}),
        **({"part": list(part)} if part else {}),
    }


def differences(manifest, request):
    """The keys whose values in a manifest are not those of a request."""
    # a manifest has the last three only if they are set
    keys = dict.fromkeys([*request, "split_on", "skip_null", "part"])
    return [key for key in keys if manifest.get(key) != request.get(key)]


def open_manifest(data_dir, request, batches_by):
    """The manifest of data_dir, complete or to be continued, or a new one.

    request: the values that it must have. batches_by: what determines how texts are cut into batches. It must
    stay the same, because "next" counts batches. Raises UserError if data_dir contains other shards.
    """
    manifest = shards.read_manifest(data_dir)
    if manifest is None:
        if any(shards.SHARD_NAME.search(path.name) for path in data_dir.glob("*")):
            raise UserError(f"{data_dir} contains shards of unknown origin: "
                            "remove them or choose another --data_dir")
        val_tokens = 0 if "part" in request else request["val_tokens_asked"]
        return {**request, "val_tokens": val_tokens, "complete": False, "next": (0, 0, 0),
                "batches": batches_by, "shards": []}
    can_continue = manifest.get("batches") == batches_by
    if not manifest["complete"] and can_continue:
        manifest = adapt(data_dir, manifest, request)
    different = differences(manifest, request)
    if different:
        raise UserError(f"{data_dir} contains shards made with different settings ({', '.join(different)}): "
                        f"choose another --data_dir, or remove them and {shards.MANIFEST}")
    if not manifest["complete"] and not can_continue:
        raise UserError(f"{data_dir} was started by another version of this program or of pyarrow, or by a "
                        f"--merge of other parts, and can't be continued: remove its shards and "
                        f"{shards.MANIFEST}, or choose another --data_dir")
    return manifest


def adapt(data_dir, manifest, request):
    """The manifest of an interrupted preparation, adapted to a new request if finished shards stay valid.

    --skip_null may be added: no null was found so far. Local files may be repaired, replaced, left out or
    added: the shards that end before the first such file are kept. Since only a part's own files have digests
    in its source, a file that comes from another part, or goes to one, counts as changed.
    """
    if request.get("skip_null") and not manifest.get("skip_null"):
        manifest = {**request, **manifest, "skip_null": True}  # in the order of a new manifest
    before, now = manifest["source"].get("files"), request["source"].get("files")
    of_hub = "ref" in manifest["source"] or "ref" in request["source"]
    merging = manifest["batches"][0] == shards.PARTS  # the places count parts, not files
    if before == now or of_hub or merging or not before or not now or not manifest["shards"]:
        return manifest
    changed = next((n for n, (one, other) in enumerate(zip(before, now)) if one != other),
                   min(len(before), len(now)))
    ends = [shard.get("next") for shard in manifest["shards"][:-1]] + [manifest["next"]]
    kept = max((n for n, end in enumerate(ends, start=1) if end and end[0] < changed), default=0)
    # before two shards are full, the default size of the val split is not decided; a part has no such split
    if kept < (1 if manifest["val_tokens_asked"] or "part" in request else 2):
        return manifest
    dropped = manifest["shards"][kept:]
    print(f"{data_dir}: the input changed from file {changed + 1} on; keeping {count(kept, 'shard')}"
          + (f", remaking {len(dropped)}" if dropped else ""))
    manifest = {**manifest, "source": request["source"], "next": ends[kept - 1],
                "shards": manifest["shards"][:kept]}
    shards.write_manifest(data_dir, manifest)
    for shard in dropped:
        (data_dir / shard["file"]).unlink(missing_ok=True)
    return manifest


def prepare(files, data_dir, source, tokenizer="gpt2", column="text", shard_size=10**8, val_tokens=None,
            num_proc=1, file_format="npy", split_on=None, skip_null=False, part=None):
    """Encode files (paths or hub addresses, in this order) into the shards of data_dir; return the manifest.

    source: a dict for the manifest that says where the files are from. column, split_on and skip_null: as for
    `formats.Reader`. part: [I, N] encodes only the files of part I of N, without a val split, for `merge`.
    The beginnings of the local files to be read are checked first. Shards that an interrupted call finished
    are kept. Raises UserError for unusable input, and if data_dir contains shards of something else.
    """
    from tqdm import tqdm

    data_dir, files = Path(data_dir), list(map(str, files))
    request = describe(source, tokenizer, column, shard_size, val_tokens, file_format, split_on, skip_null,
                       part)
    batches_by = [formats.BATCH_CHARS, importlib.metadata.version("pyarrow")]
    manifest = open_manifest(data_dir, request, batches_by)
    if manifest["complete"]:
        print(f"{data_dir} is already prepared; --verify {data_dir} checks it")
        return manifest

    own = shards.files_of(part, len(files))
    first_file, first_batch, _ = max(tuple(manifest["next"]), (own.start, 0, 0))
    if first_file >= own.stop:
        raise UserError(f"{data_dir / shards.MANIFEST} does not fit the input; choose another --data_dir")
    reader = formats.Reader(column, split_on, skip_null)
    sources.check_files(files, reader, range(first_file, own.stop))
    writer = open_writer(data_dir, manifest, tokenizer)
    done = sum(shard["tokens"] for shard in manifest["shards"])
    progress = tqdm(unit=" tokens", unit_scale=True, initial=done, desc=data_dir.name, disable=None)
    in_flight = deque()  # (file, batch, future) in the order of the stream; kept short, to save memory

    def collect():
        file, batch, future = in_flight.popleft()
        ids = encoder.result(future)
        progress.update(len(ids))
        writer.add(file, batch, ids)

    with progress, contextlib.closing(writer), Encoder(tokenizer, num_proc) as encoder:
        for file in range(first_file, own.stop):
            path = sources.local_file(files[file])
            try:
                for batch, texts in enumerate(reader.batches(path)):
                    if batch == 0:
                        encoder.begin_file(texts)
                    if (file, batch) >= (first_file, first_batch):
                        in_flight.append((file, batch, encoder.submit(texts)))
                    while len(in_flight) > 2 * num_proc:
                        collect()
            except UserError as error:
                while in_flight:  # keep what was read before the error
                    collect()
                raise explain_shards(error, files[file], len(manifest["shards"]), part) from error
        while in_flight:
            collect()
        writer.finish()
    reader.report(files[first_file] if first_file or part else None)
    return manifest


def open_writer(data_dir, manifest, tokenizer):
    """The writer that begins or continues the shards of data_dir, which gets a copy of the tokenizer.

    Raises UserError if data_dir contains another tokenizer.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    shards.remove_leftovers(data_dir)
    copy = data_dir / "tokenizer.json"
    if tokenizer != "gpt2" and not (copy.exists() and digest(copy) == digest(tokenizer)):
        if copy.exists():
            raise UserError(f"{copy} is not the same tokenizer as {tokenizer}: remove it, or choose another "
                            "--data_dir")
        shutil.copyfile(tokenizer, copy)
    if manifest["shards"]:
        print(f"{data_dir}: continuing after {manifest['shards'][-1]['file']}")
    return shards.ShardWriter(data_dir, manifest)


def explain_shards(error, file, finished, part):
    """The error of an unreadable file, with what happens to the shards. finished: how many there are."""
    if not finished:
        return error
    remedy = ("if the file is damaged, remove it, and the same command downloads it again and continues"
              if HUB_ADDRESS.match(file) else
              "repair or replace the file, and the same command continues" if part else
              "repair or replace the file, or leave it out, and the same command continues")
    kept = "is kept" if finished == 1 else "are kept"
    return UserError(f"{error}. {count(finished, 'finished shard')} {kept}: {remedy}")


# parts

SAME_FLAGS = "give --merge the flags of --part, or remove this folder and prepare the part again"


def merge(data_dir, source, tokenizer="gpt2", **settings):
    """Join the parts of data_dir into the shards that a single preparation would make; return the manifest.

    source: what the parts' manifests must say of their source, with "files" as a list of names. tokenizer,
    settings: as for `describe`; the parts must have the same. Shards that an interrupted call finished are
    kept, and so are the parts. Raises UserError if a part is missing, incomplete, damaged or made with other
    settings.
    """
    from tqdm import tqdm

    data_dir = Path(data_dir)
    parts = shards.read_parts(data_dir)
    request = describe(join_sources(parts, source), tokenizer, **settings)
    for number, (folder, part) in enumerate(parts, start=1):
        wanted = {**request, "source": part["source"], "part": [number, len(parts)]}
        if not part.get("skip_null"):  # it had no null, or it would not be complete
            wanted.pop("skip_null", None)
        different = differences(part, wanted)
        if different:
            raise UserError(f"{folder} was prepared with different settings ({', '.join(different)}): "
                            f"{SAME_FLAGS}")
        shards.open_part(folder, part)  # raises if a shard is missing: better now than hours later
    manifest = open_manifest(data_dir, request, [shards.PARTS, len(parts)])
    if manifest["complete"]:
        print(f"{data_dir} is already prepared; --verify {data_dir} checks it")
        return manifest
    writer = open_writer(data_dir, manifest, tokenizer)
    first = tuple(manifest["next"][:2])
    done = sum(shard["tokens"] for shard in manifest["shards"])
    total = sum(shard["tokens"] for _, part in parts for shard in part["shards"])
    progress = tqdm(unit=" tokens", unit_scale=True, initial=done, total=total, desc=data_dir.name,
                    disable=None)
    with progress, contextlib.closing(writer):
        for number, (folder, part) in enumerate(parts):
            for index, (path, ids) in enumerate(shards.open_part(folder, part)):
                if (number, index) >= first:
                    shards.check_digest(path, part["shards"][index]["digest"])
                    writer.add(number, index, ids)
                    progress.update(len(ids))
        writer.finish()
    print(f"{data_dir}: joined {count(len(parts), 'part')}; their folder is no longer needed: "
          f"rm -r {data_dir / shards.PARTS}")
    return manifest


def join_sources(parts, source):
    """The source of all parts together. Raises UserError if one is not what was asked for, or differs."""
    first, joined = parts[0], []
    for number, (folder, part) in enumerate(parts, start=1):
        known = {**part["source"], "files": sources.names(part["source"])}
        different = [key for key in source if known.get(key) != source[key]]  # "files", or "dataset", ...
        if different:
            raise UserError(f"{folder} was prepared from different input ({', '.join(different)}): "
                            f"{SAME_FLAGS}")
        if known != {**first[1]["source"], "files": sources.names(first[1]["source"])}:
            raise UserError(f"{folder} and {first[0]} were prepared from different revisions: remove one of "
                            "them, and prepare it again with the --revision of the other")
        files = part["source"].get("files")
        if files:
            own = shards.files_of([number, len(parts)], len(files))
            joined += files[own.start : own.stop]
    return {**first[1]["source"], **({"files": joined} if joined else {})}


# the demo, the command line


def prepare_demo(data_dir):
    """Prepare Python's own documentation, with a tokenizer learned on it, unless data_dir has it already.

    Waits while another process prepares it. Raises UserError if data_dir contains other data.
    """
    if demo_is_prepared(data_dir):
        return
    with locked(data_dir, wait=True):
        if demo_is_prepared(data_dir):
            return
        print(f"collecting Python's own documentation into {data_dir} ...", flush=True)
        texts = sources.python_docs()
        if sum(map(len, texts)) < 10**6:
            raise UserError("--demo_data: this Python has almost no documentation; "
                            "install its full standard library")
        folder = Path(data_dir) / "sources"
        files, tokenizer = [str(folder / "python_docs.jsonl")], str(folder / "tokenizer.json")
        folder.mkdir(exist_ok=True)
        with atomic_write(files[0]) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        train(texts, 2048, tokenizer)
        prepare(files, data_dir, sources.PYTHON_DOCS, tokenizer=tokenizer)


def demo_is_prepared(data_dir):
    """Whether a directory contains the whole demo data, of any version of Python. Raises UserError."""
    manifest = shards.read_manifest(data_dir)
    if manifest and manifest["source"].keys() != sources.PYTHON_DOCS.keys():
        raise UserError(f"{data_dir} contains other data: use --no-demo_data or another --data_dir")
    return bool(manifest and manifest["complete"])


def find_input(args, files, folder):
    """The files to encode into a folder, and the source for its manifest. Raises UserError.

    A part's source lists the files of all parts, but has the digests of its own only.
    """
    if args.dataset in TEXTS:
        files = [sources.fetch_text(args.dataset, args.data_dir)]
    if "-" in files:
        stdin = Path(args.data_dir) / "sources" / f"stdin.{args.stdin_format or 'txt'}"
        sources.store_stdin(stdin, keep=stdin.exists() and shards.read_manifest(args.data_dir) is not None)
        if not args.stdin_format and formats.is_json_line(stdin):
            stdin.unlink()
            raise UserError("standard input begins with a line of JSON: add --stdin_format jsonl")
        files = [str(stdin) if path == "-" else path for path in files]
    if files:
        own = shards.files_of(args.part, len(files))
        return files, {"files": [{"name": Path(path).name, **({"digest": digest(path)} if n in own else {})}
                                 for n, path in enumerate(files)]}
    # an interrupted preparation continues with the files it began with, though the hub may have newer ones. A
    # part uses the files of the parts that began before it
    parts = sorted(Path(args.data_dir, shards.PARTS).glob(f"*-of-{args.part[1]}")) if args.part else []
    request = asked_source(args, files)
    for manifest in filter(None, map(shards.read_manifest, (folder, *parts))):
        source = manifest["source"]
        if all(source.get(key) == value for key, value in request.items()):
            return source["files"], source
    files = sources.hub_files(args.dataset, args.name, args.revision)
    revisions = ", ".join({match[2] for match in map(sources.HUB_ADDRESS.match, files) if match})
    return files, {**request, "revision": revisions, "files": files}


def asked_source(args, files):
    """What the flags say of the source: the names of local files, or a dataset of the hub."""
    if files:
        return {"files": [Path(path).name for path in files]}
    return {"dataset": args.dataset, "name": args.name, "ref": args.revision}


def main(args):
    if args.verify:
        print(f"{args.verify}: {shards.verify(args.verify):,} tokens, all as the manifest says")
        return
    files = sources.find_files(args.input or [], args.data_dir)
    settings = dict(tokenizer=args.tokenizer, column=args.text_column, shard_size=args.shard_size,
                    val_tokens=args.val_size, file_format=args.format, split_on=args.split_on,
                    skip_null=args.skip_null)
    folder = args.data_dir
    if args.part:
        folder = shards.part_folder(args.data_dir, *args.part)
        if shards.read_manifest(args.data_dir) and not shards.read_manifest(folder):
            raise UserError(f"{args.data_dir} already contains shards, which --merge would not replace: "
                            "remove them, or choose another --data_dir")
    with locked(folder):
        if args.merge:
            manifest = merge(folder, asked_source(args, files), **settings)
        else:
            files, source = find_input(args, files, folder)
            manifest = prepare(files, folder, source, num_proc=args.num_proc, part=args.part, **settings)
    tokens = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split)
              for split in ("train", "val")}
    if args.part:
        print(f"{folder}: {count(tokens['train'], 'token')}, complete. When all parts are, the same command "
              "with --merge instead of --part joins them")
        return
    print(f"{args.data_dir}: {len(manifest['shards'])} shards, "
          f"{tokens['train']:,} train and {tokens['val']:,} val tokens")


if __name__ == "__main__":
    run_script(main, args)
