"""Shards of token ids: this file owns their format, writes it and reads it.

A shard is a .npy file of uint16 ids, or a .bin file as llm.c and modded-nanogpt write and read them. The
shards of a directory are one stream: <|endoftext|>, a document, <|endoftext|>, the next document, ... The
first ids of the stream are the val split. manifest.json has the source of the shards and their digests.
Shards of other programs have none; nanoGPT's train.bin and val.bin are read too, but not written.
"""

import contextlib
import io
import json
import os
import re
from pathlib import Path

from kit.files import (
    UNSUPPORTED,
    UserError,
    atomic_write,
    count,
    digest,
    drop_cached_pages,
    mount_point,
    name_in_errors,
    publish,
    temporary_path,
    warn_once,
)
from kit.sources import DATASETS, TEXTS

MANIFEST = "manifest.json"
PARTS = "parts"  # the folder, in a directory of shards, of the parts that become these shards
VERIFIED = ".verified.json"  # size and time of each shard when its digest was last checked
FORMAT = "uint16 token shards, version 1"
# llm.c's small data sets have no number, nanoGPT's no prefix either
SHARD_NAME = re.compile(r"(?:^|_)(train|val)(?:_(\d{1,9}))?\.(npy|bin)$")
RAW_NAMES = ("train.bin", "val.bin")  # nanoGPT's: ids without a header
# directories in which build-nanogpt and modded-nanogpt look for shards, and the prefix that they look for
PREFIXES = {"edu_fineweb10B": "edufineweb", "fineweb10B": "fineweb", "finewebedu10B": "finewebedu"}
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 256  # llm.c's header: magic, version, number of ids; int32
OTHER_MAGICS = {  # of llm.c's other .bin files
    20240801: "a shard of Llama 3's 32-bit ids", 20240522: "a file of multiple-choice questions",
    20240326: "a model", 20240327: "a record of a model's activations", 20240328: "a tokenizer",
}

# writing


class Shard:
    """A shard while it is written: ids go to the disk as they arrive, the file gets its name in `publish`."""

    def __init__(self, path, split, size):
        import xxhash

        self.path, self.split = path, split
        self.tokens, self.room = 0, size
        self.next = None  # (file, batch, offset) in the source of the first id after this shard
        self.digest = xxhash.xxh3_128()  # the same as `files.digest`
        with name_in_errors(path):
            self.file = open(temporary_path(path), "w+b")
        self.write(header(path, size))

    def write(self, content):
        self.digest.update(content)
        with name_in_errors(self.path):
            self.file.write(content)
            drop_cached_pages(self.file)

    def add(self, ids):
        self.write(ids.astype("<u2", copy=False))
        self.tokens += len(ids)
        self.room -= len(ids)

    @contextlib.contextmanager
    def set_aside(self):
        """Give the shard up. Yields a file to read its ids from, which is removed after the body."""
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
        """Give the file its name, with the ids it has by now; return its digest."""
        with name_in_errors(self.path), self.file:
            if self.room:
                self.file.seek(0)
                self.file.write(header(self.path, self.tokens))
            publish(self.file, self.path)
        return digest(self.path) if self.room else self.digest.hexdigest()

    def discard(self):
        """Remove the shard if it was not published."""
        with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
            self.file.close()
        temporary_path(self.path).unlink(missing_ok=True)


def header(path, tokens):
    """The header of a shard of that many ids. Its length does not depend on their number."""
    import numpy as np

    if path.suffix == ".bin":
        return np.array([BIN_MAGIC, BIN_VERSION, tokens] + [0] * (BIN_HEADER - 3), dtype="<i4").tobytes()
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return out.getvalue()


class ShardWriter:
    """Cuts the stream of ids into shards. The manifest says where in the source the next shard begins.

    A part's val split has length 0. Otherwise its length may not be known until two shards are full, or until
    the end. Until then the first shard counts as the val split, and no shard is published.
    """

    def __init__(self, data_dir, manifest):
        self.data_dir, self.manifest = data_dir, manifest
        self.prefix = PREFIXES.get(data_dir.resolve().name) or data_dir.resolve().name
        self.start = tuple(manifest["next"])  # earlier ids are in finished shards
        self.shards = []  # not published yet; the last one takes the next ids
        self.added = []  # (file, batch, number of ids) of their contents, while they may have to be cut again

    def add(self, file, batch, ids):
        """Add the ids of a batch. file: its number in the source. batch: its number in the file."""
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
        val_tokens = size if self.manifest["val_tokens"] is None else self.manifest["val_tokens"]
        missing = val_tokens - sum(tokens for split, tokens in shards if split == "val")
        split = "val" if missing > 0 else "train"
        name = f"{self.prefix}_{split}_{len(shards):06d}.{self.manifest['file_format']}"
        return Shard(self.data_dir / name, split, min(missing, size) if missing > 0 else size)

    def publish(self):
        """Publish the first shard, and add it to the manifest."""
        if not self.manifest["shards"]:  # a crash must not leave a shard without a manifest
            write_manifest(self.data_dir, self.manifest)
        shard = self.shards[0]
        shard_digest = shard.publish()
        entry = {"file": shard.path.name, "split": shard.split, "tokens": shard.tokens,
                 "bytes": shard.path.stat().st_size, "digest": shard_digest}
        self.manifest["shards"].append({**entry, "next": shard.next})  # until the preparation is complete
        self.manifest["next"] = shard.next
        del self.shards[0]
        write_manifest(self.data_dir, self.manifest)

    def finish(self):
        """Publish the last shard and complete the manifest. Raises UserError if there is no train split."""
        total = sum(shard["tokens"] for shard in self.manifest["shards"])
        total += sum(shard.tokens for shard in self.shards)
        val_tokens = self.manifest["val_tokens"]
        if val_tokens is None:
            val_tokens = max(1, total // 10)
        if 0 < val_tokens >= total:  # 0: a part, which may have no text
            raise UserError(f"--val_size {val_tokens} leaves nothing to train on: the text has only "
                            f"{count(total, 'token')}")
        if self.manifest["val_tokens"] is None:
            self.manifest["val_tokens"] = val_tokens
            self.cut_again()
        if self.shards:
            self.publish()
        self.manifest["complete"] = True
        del self.manifest["next"], self.manifest["batches"]
        for shard in self.manifest["shards"]:
            shard.pop("next", None)  # if an older version began the shards, they have none
        write_manifest(self.data_dir, self.manifest)

    def cut_again(self):
        """Cut the same stream again, now that the length of the val split is known."""
        import numpy as np

        with contextlib.ExitStack() as asides:
            files = [asides.enter_context(shard.set_aside()) for shard in self.shards]
            self.shards = []
            for file, batch, size in self.added:
                ids = b""
                for old in files:  # the ids of a batch may continue in the next file
                    ids += old.read(2 * size - len(ids))
                self.add(file, batch, np.frombuffer(ids, dtype="<u2"))

    def close(self):
        """Remove the shards that were not published."""
        while self.shards:
            self.shards.pop().discard()


def remove_leftovers(data_dir):
    """Remove the unfinished files that an interrupted preparation has left behind."""
    for path in data_dir.glob(".*.tmp"):
        name = path.name[1:].removesuffix(".tmp").removesuffix(".aside").removeprefix(".")
        if SHARD_NAME.search(name) or name in (MANIFEST, VERIFIED.removeprefix(".")):
            path.unlink()


# parts


def part_folder(data_dir, number, parts):
    """Where a part of data_dir is prepared. number: from 1 to parts."""
    return Path(data_dir) / PARTS / f"{number}-of-{parts}"


def files_of(part, files):
    """The numbers of a part's files, as a range. The sizes of the parts differ by at most one file.

    part: [number, parts], or None for all. files: how many there are. Raises UserError if they are too few.
    """
    number, parts = part or (1, 1)
    if part and parts > files:
        raise UserError(f"--part {number}/{parts}: the input is {count(files, 'file')}, which make at most "
                        f"{count(files, 'part')}")
    return range(files * (number - 1) // parts, files * number // parts)


def read_parts(data_dir):
    """The parts of data_dir in order, all complete: a list of (folder, manifest). Raises UserError."""
    place = Path(data_dir) / PARTS
    names = [path.name for path in place.glob("*-of-*")]
    totals = {int(name.rpartition("-")[2]) for name in names if re.fullmatch(r"\d+-of-[1-9]\d*", name)}
    if not totals:
        raise UserError(f"{place} has no parts to merge: prepare them with --part 1/N to N/N")
    if len(totals) > 1:
        raise UserError(f"{place} has parts of {' and of '.join(map(str, sorted(totals)))}: remove those "
                        "that are not to be merged")
    [total] = totals
    folders = [part_folder(data_dir, number, total) for number in range(1, total + 1)]
    parts = [(folder, read_manifest(folder)) for folder in folders]
    missing = [f"{number}/{total}" for number, (_, manifest) in enumerate(parts, start=1)
               if manifest is None or not manifest["complete"]]
    if missing:
        raise UserError(f"{place}: missing or not complete: {', '.join(missing)}; run the same command with "
                        f"--part {missing[0]} instead of --merge")
    return parts


def open_part(folder, manifest):
    """The shards of a complete part, as from `open_shards`; none if it has no text. Raises UserError."""
    return open_shards(folder, "train") if manifest["shards"] or find_shards(folder) else []


# the manifest


def write_manifest(data_dir, manifest):
    with atomic_write(Path(data_dir) / MANIFEST) as file:
        json.dump(manifest, file, indent=1)


def has(entry, kinds):
    """Whether a dict has these keys, each with a value of its type."""
    return all(key in entry and isinstance(entry[key], kind) for key, kind in kinds.items())


def read_manifest(data_dir):
    """The manifest of a directory as a dict; None if there is none, as for build-nanogpt's shards.

    Raises UserError.
    """
    path = Path(data_dir) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path} was not written by fineweb_edu.py, or by another version: its format is "
                            f"not {FORMAT!r}; move it elsewhere, or name another --data_dir")
        manifest.setdefault("file_format", "npy")  # older manifests lack it
        needed = dict(source=dict, tokenizer=(str, dict), num_tokens=int, complete=bool, shards=list)
        if not has(manifest, needed):
            raise ValueError("a part of it is missing")
        if not all(has(shard, dict(file=str, split=str, tokens=int, bytes=int, digest=str))
                   for shard in manifest["shards"]):
            raise ValueError("it does not describe its shards")
        if manifest["tokenizer"] != "gpt2" and not has(manifest["tokenizer"], dict(file=str, digest=str)):
            raise ValueError("it does not name its tokenizer")
        if "part" in manifest and not all(isinstance(file, str) or has(file, dict(name=str))
                                          for file in manifest["source"].get("files", [])):
            raise ValueError("it does not name the files of its source")
        places = [manifest.get("next"), *(shard["next"] for shard in manifest["shards"] if "next" in shard)]
        if not manifest["complete"] and not (
                has(manifest, dict(batches=list, val_tokens=(int, type(None))))
                and all(isinstance(place, list) and len(place) == 3 for place in places)
                and all(isinstance(n, int) and n >= 0 for place in places for n in place)):
            raise ValueError("it does not say where to continue")
        return manifest
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} can't be used ({error!r}); prepare the data again") from error


def tokenizer_of(data_dir, asked=None):
    """The tokenizer of a directory's shards: "gpt2", or the path of a tokenizer.json. Raises UserError.

    asked: the user's --data_tokenizer. Shards without a manifest need it if they are nanoGPT's; for others it
    is GPT-2's by default.
    """
    data_dir, name = Path(data_dir), "gpt2"
    manifest = read_manifest(data_dir)
    if manifest is None:
        raw = [path for split in ("train", "val") for path, _ in open_shards(data_dir, split) if is_raw(path)]
        if raw and (data_dir / "meta.pkl").exists():
            raise UserError(f"{data_dir}/meta.pkl: nanoGPT gave each character an id, and only this pickle, "
                            "which is never opened, lists them. Encode the text again: python fineweb_edu.py "
                            f"--input {data_dir}/input.txt --data_dir {data_dir}_shards [--tokenizer FILE]")
        if raw and asked is None:
            raise UserError(f"{raw[0]} does not name its tokenizer: add --data_tokenizer gpt2 if nanoGPT's "
                            "data/openwebtext/prepare.py or data/shakespeare/prepare.py wrote it, otherwise "
                            "--data_tokenizer FILE with the tokenizer.json that encoded it")
        return asked or name
    if manifest["tokenizer"] != "gpt2":
        path = data_dir / manifest["tokenizer"]["file"]
        if not path.is_file() or digest(path) != manifest["tokenizer"]["digest"]:
            raise UserError(f"{path} is missing, or is not the tokenizer that encoded these shards; "
                            "prepare the data again")
        name = str(path)
    if asked not in (None, name):
        raise UserError(f"--data_tokenizer {asked}: {data_dir / MANIFEST} says that {name} encoded these "
                        "shards; omit the flag")
    return name


def source_of(data_dir):
    """What a directory's shards were made from, according to its manifest or their names: a dict, or {}."""
    manifest = read_manifest(data_dir)
    if manifest is None:  # build-nanogpt, llm.c and modded-nanogpt give FineWeb-Edu's shards these names
        names = [path.name for path, _ in open_shards(data_dir, "train")]
        known = all(re.match("edu_?fineweb_|finewebedu_", name) for name in names)
        return {"dataset": DATASETS["fineweb-edu"][0], "known": "by the shards' names"} if known else {}
    source = manifest["source"]
    # a hub dataset's revision determines its files
    return {key: value for key, value in source.items() if value and not (key == "files" and "ref" in source)}


def identity(data_dir, tokenizer):
    """What identifies a directory's shards and their tokenizer, wherever they are: a dict of texts.

    tokenizer: as `tokenizer_of` returns it.
    """
    manifest, name = Path(data_dir) / MANIFEST, Path(tokenizer).name
    if manifest.exists():  # it has the tokenizer's digest too
        return {"data": digest(manifest), "tokenizer": name}
    shards = sorted(path for path in Path(data_dir).glob("*") if SHARD_NAME.search(path.name))
    return {"data": "unverified: " + ", ".join(f"{path.name} {path.stat().st_size}" for path in shards),
            "tokenizer": name if tokenizer == "gpt2" else f"{name} {digest(tokenizer)}"}


# reading


def shard_key(name):
    """What a shard is, according to its name: (split, number or 0, suffix); None if it is no shard."""
    match = SHARD_NAME.search(name)
    return match and (match[1], int(match[2] or 0), match[3])


def find_shards(data_dir):
    """The shards of a directory by their keys. Raises UserError if two have the same."""
    found = {}
    for path in sorted(Path(data_dir).glob("*")):
        key = shard_key(path.name)
        if key in found:
            raise UserError(f"{found[key]} and {path.name} are {key[0]} shards with the same number, or "
                            "without one: a directory holds one data set; move one of them elsewhere")
        if key:
            found[key] = path
    return found


def listed_shards(manifest):
    """The entries of a manifest, if any, by shard key: file names may have another prefix by now."""
    return {shard_key(shard["file"]): shard for shard in manifest["shards"]} if manifest else {}


def open_shards(data_dir, split):
    """The shards of a split in order, memory-mapped if possible: a list of (path, uint16 array).

    Checks sizes and headers. Raises UserError that names the first file which is missing, damaged or not
    what the manifest says.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    if manifest is not None and not manifest["complete"]:
        raise UserError(f"{data_dir}: its preparation is not complete; if it was interrupted, run the same "
                        "fineweb_edu.py command again")
    found, listed = find_shards(data_dir), listed_shards(manifest)
    if manifest is not None:
        problems = [f"{data_dir / shard['file']} is missing"
                    for key, shard in listed.items() if key not in found]
        problems += [f"{path} is not in {MANIFEST}" for key, path in found.items() if key not in listed]
        if problems:
            raise UserError(f"{problems[0]}; prepare the data again, or restore it")
    keys = sorted(key for key in found if key[0] == split)
    if not keys and (data_dir / PARTS).is_dir():
        raise UserError(f"{data_dir} has parts, but no {split} shards: when all parts are complete, run the "
                        "same fineweb_edu.py command with --merge instead of --part")
    if not keys:
        name, source = Path(data_dir).name, f" --input FILE --data_dir {data_dir}"
        if name in (*DATASETS, *TEXTS):
            source = f" --dataset {name}"
        if name == "edu_fineweb10B":
            source = ""
        raise UserError(f"no {split} shards in {data_dir}: make them with python fineweb_edu.py{source}, or "
                        "train on built-in data with python train_gpt2.py @configs/modern_demo.txt")
    if len({suffix for _, _, suffix in keys}) > 1:
        raise UserError(f"{data_dir} contains {split} shards as .npy and as .bin: remove one kind")
    for (_, before, _), (_, after, _) in zip(keys, keys[1:]):
        if after != before + 1:
            raise UserError(f"{data_dir}: {split} shard {before + 1:06d} is missing "
                            f"between {before:06d} and {after:06d}")
    return [(found[key], open_shard(found[key], listed.get(key))) for key in keys]


def open_shard(path, expected=None):
    """The ids of a shard, memory-mapped if possible. Raises UserError.

    expected: its entry in the manifest.
    """
    import numpy as np

    size = path.stat().st_size
    if expected and size != expected["bytes"]:
        raise UserError(f"{path} has {size} bytes, its manifest says {expected['bytes']}; prepare it again")
    read = open_bin if path.suffix == ".bin" else open_npy
    try:
        tokens = read(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"the file system of {mount_point(path)} can't map files into memory: every rank holds all "
                  "shards in its own memory")
        tokens = read(path, mapped=False)
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise UserError(f"{path} contains {tokens.ndim}-D {tokens.dtype}, not 1-D uint16; prepare it again")
    if expected and len(tokens) != expected["tokens"]:
        raise UserError(f"{path} has {len(tokens)} tokens, its manifest says {expected['tokens']}")
    return tokens


def is_raw(path):
    """Whether a shard is nanoGPT's: uint16 ids and nothing else, under one of its names."""
    if path.name not in RAW_NAMES:
        return False
    with open(path, "rb") as file:
        magic = int.from_bytes(file.read(4), "little")  # as ids, all magics are beyond GPT-2's vocabulary
    return magic not in (BIN_MAGIC, *OTHER_MAGICS)


def open_npy(path, mapped=True):
    """The array of a .npy file. Raises UserError if it is incomplete, OSError if it can't be mapped."""
    import numpy as np

    try:
        return np.load(path, "r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if mapped and isinstance(error, OSError) and error.errno in UNSUPPORTED:
            raise
        raise UserError(f"{path} is not a complete .npy file ({error}); get it again") from error


def open_bin(path, mapped=True):
    """The ids of a .bin shard. Raises UserError if it is incomplete, OSError if it can't be mapped."""
    import numpy as np

    def ids(start, tokens):
        if mapped:
            return np.memmap(path, dtype="<u2", mode="r", offset=start, shape=(tokens,))
        return np.fromfile(path, dtype="<u2", count=tokens, offset=start)

    start, size = 4 * BIN_HEADER, path.stat().st_size
    if is_raw(path):
        if size == 0 or size % 2:
            raise UserError(f"{path} has {size} bytes, not a whole number of 16-bit ids; get it again")
        return ids(0, size // 2)
    if size < start:
        raise UserError(f"{path} has {size} bytes, fewer than its header; get it again")
    magic, version, tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
    if magic in OTHER_MAGICS:
        raise UserError(f"{path} is {OTHER_MAGICS[magic]} (llm.c's header {magic}, {version}), not a shard "
                        "of 16-bit ids: move it elsewhere; python fineweb_edu.py makes shards from text")
    if (magic, version) != (BIN_MAGIC, BIN_VERSION):
        raise UserError(f"{path} is not a shard of llm.c: its header is {magic}, {version}, not {BIN_MAGIC}, "
                        f"{BIN_VERSION}. nanoGPT's files, which have none, must be train.bin and val.bin")
    if size != start + 2 * tokens:
        raise UserError(f"{path} has {size} bytes, its header says {start + 2 * tokens}; get it again")
    return ids(start, tokens)


# verifying


def check_digest(path, expected):
    actual = digest(path)
    if actual != expected:
        raise UserError(f"{path} has changed since it was written: its digest is {actual}, its manifest says "
                        f"{expected}; prepare the data again, or restore it")


def verify_changed(data_dir):
    """Check the digests of the shards that changed since their last check. Raises UserError."""
    manifest, found = read_manifest(data_dir), find_shards(data_dir)
    verified_path, verified, now = Path(data_dir) / VERIFIED, {}, {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        verified = dict(json.loads(verified_path.read_text(encoding="utf-8")))
    for key, shard in listed_shards(manifest).items():
        stat = found[key].stat()
        now[found[key].name] = [shard["digest"], stat.st_size, stat.st_mtime_ns]
    changed = [name for name in now if now[name] != verified.get(name)]
    if changed:
        print(f"{data_dir}: checking {count(len(changed), 'new shard')}", flush=True)
    for name in changed:
        check_digest(Path(data_dir) / name, now[name][0])
        verified[name] = now[name]
        with contextlib.suppress(OSError), atomic_write(verified_path) as file:  # it may be read-only
            json.dump(verified, file)


def verify(data_dir):
    """Check digests and ids of all shards against the manifest; return the number of tokens.

    Raises UserError.
    """
    manifest = read_manifest(data_dir)
    if manifest is None:
        raise UserError(f"{data_dir} has no {MANIFEST} to verify it against")
    tokenizer_of(data_dir)
    total = 0
    opened = (open_part(data_dir, manifest) if "part" in manifest else
              open_shards(data_dir, "val") + open_shards(data_dir, "train"))
    for path, tokens in opened:
        check_digest(path, listed_shards(manifest)[shard_key(path.name)]["digest"])
        if len(tokens) and tokens.max() >= manifest["num_tokens"]:
            offset = int((tokens >= manifest["num_tokens"]).argmax())
            raise UserError(f"{path} contains id {tokens[offset]} at offset {offset}, but the "
                            f"tokenizer's last id is {manifest['num_tokens'] - 1}")
        total += len(tokens)
    return total
