"""Text to token ids and back: GPT-2's byte-level BPE, one learned from your own text, or another model's.

    python tokenizer.py train --input my.txt --vocab_size 2048 --out my_tokenizer.json

--input takes the same files as in fineweb_edu.py. Every tokenizer is a `tiktoken.Encoding`, and the rest of
the program treats them alike.
"""

import argparse

from kit.flags import Parser, from_command_line, integer


def parse_args(argv=None):
    from kit import formats  # here, because by now Ctrl-C prints no traceback

    parser = Parser(description="Learn a byte-level BPE from your own text.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "train", help="learn a tokenizer from files",
        usage="python tokenizer.py train --input FILE ... --out FILE [--flag value ...]")
    command.add_argument("--input", nargs="+", metavar="FILE", default=[], help=formats.INPUT)
    command.add_argument("files", nargs="*", help=argparse.SUPPRESS)  # the older form of --input
    command.add_argument("--vocab_size", type=integer(257, 65536), default=4096,
                         help="number of ids, including <|endoftext|>")
    formats.add_flags(command)
    command.add_argument("--out", metavar="FILE", required=True, help="the tokenizer.json to write")
    args = parser.parse_args(argv)
    args.input = [*args.input, *args.files]
    if not args.input:
        command.error("argument --input: name the text to learn from")
    formats.check_flags(command, args, args.input)
    return args


if __name__ == "__main__":
    args = from_command_line(parse_args)

import functools
import json
import re
import tempfile
import threading
from base64 import b64encode
from pathlib import Path

from kit import formats, sources
from kit.files import UserError, atomic_write, check_output, run_script
from kit.formats import END_OF_TEXT

# A run of white space this long is cut before its last character. GPT-2's words end there anyway, but
# tiktoken's regular expressions panic at a run of a million characters
LONGEST_RUN = 100_000
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # \s in tiktoken's pattern
LONG_RUN = re.compile(f"(?<!{SPACE}){SPACE}{{{LONGEST_RUN},}}")
LONGEST_WORD = 10_000  # bytes; training cuts longer words into pieces
# calls after which a thread gets a new gigatoken tokenizer; in fineweb_edu.py they encode 4 GB of text
RENEW_AFTER = 1000
per_thread = threading.local()  # {tokenizer: (its gigatoken tokenizer in this thread, number of calls)}
# a text that both libraries must encode alike: spaces, digits, contractions, two forms of é, many scripts
PROBE = (" The  year 1984: it's We'LL don't\n\n\t  x = 3.14;\r\n café cafe\u0301 ﬁ ½\u00a0\u2003русский "
         "中文 عربي हिन्दी 한국어 🙂\u200d   ")


@functools.cache
def get_tokenizer(name="gpt2"):
    """The tiktoken.Encoding of "gpt2", a tokenizer.json, or a Hugging Face directory. It is built once.

    Raises UserError if GPT-2's vocabulary is neither cached nor reachable, or if the files contain a
    tokenizer that an Encoding can't represent, or one that ends texts with another token than <|endoftext|>.
    """
    import tiktoken

    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: a wrong digest
            raise UserError(
                f"GPT-2's vocabulary can't be downloaded ({type(error).__name__}). Without a network, copy "
                "6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json) from the tiktoken cache of another "
                "machine into a folder and set TIKTOKEN_CACHE_DIR to it"
            ) from error
    path = Path(name)
    if not path.exists():
        raise UserError(f"no tokenizer {name}: name 'gpt2', a tokenizer.json (python tokenizer.py train "
                        "makes one) or a Hugging Face directory")
    try:
        encoding = build_encoding(path.stem, read_directory(path) if path.is_dir() else read_json(path))
        if path.is_dir():
            check_end_of_text(path, encoding)
        return encoding
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = error if type(error) is ValueError else repr(error)
        raise UserError(f"{name}: unsupported tokenizer: {reason}. Supported: byte-level BPE with GPT-2's "
                        "splitting, as made by python tokenizer.py train") from error


def read_json(path):
    """The content of a JSON file; {} if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}


def read_directory(path):
    """The tokenizer files of a Hugging Face directory, as the content of one tokenizer.json: a dict.

    Raises ValueError if there is none that can be read.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab, pairs = path / "vocab.json", path / "merges.txt"
    spec, settings = read_json(path / "tokenizer.json"), read_json(path / "tokenizer_config.json")
    if not spec:
        if not (vocab.is_file() and pairs.is_file()):
            raise ValueError("it has neither a tokenizer.json nor a vocab.json with a merges.txt")
        bpe = Tokenizer(models.BPE.from_file(str(vocab), str(pairs)))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        spec = json.loads(bpe.to_str())
    for option in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if settings.get(option):
            raise ValueError(f"its tokenizer_config.json sets {option}")
    # tokens with a role, such as pad_token, are special; they are given as texts or with their properties
    roles = {}
    for role, value in (*settings.items(), *read_json(path / "special_tokens_map.json").items()):
        if role.endswith(("_token", "_special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                token = token if isinstance(token, dict) else {"content": token}
                roles[token.get("content")] = token
    added = [*spec["added_tokens"],
             *({**token, "id": int(i)} for i, token in settings.get("added_tokens_decoder", {}).items())]
    known = {token["content"] for token in added}
    added += [{"content": token, "id": i, "special": token in known}  # this file has no properties
              for token, i in read_json(path / "added_tokens.json").items()]
    ids = {}
    for token in added:
        i = ids.setdefault(token["content"], token["id"])
        if i != token["id"]:
            raise ValueError(f"its files give {token['content']!r} two ids, {i} and {token['id']}")
    added += [{**token, "id": ids[content]} for content, token in roles.items() if content in ids]
    return {**spec, "added_tokens": [
        {**token, "special": token.get("special", True) or token["content"] in roles} for token in added]}


def build_encoding(name, spec):
    """The tiktoken.Encoding with the same ids as a tokenizer.json, given its content. Raises ValueError.

    tiktoken joins any two neighbours that form a token, the token with the lowest id first; the tokenizers
    library joins the pairs that `merges` lists, in that order. The results are the same if the list is in the
    order of the ids and makes every token from its own bytes. All this is checked here, not assumed.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # the pattern that splits text into GPT-2's words
    from tokenizers import Tokenizer

    model, splitter = spec["model"], spec.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or spec.get("normalizer"):
        raise ValueError(f"it is not a BPE, or has the normalizer {spec.get('normalizer')}")
    if splitter.get("type") != "ByteLevel" or (
            splitter["add_prefix_space"] or not splitter.get("use_regex", True)):
        raise ValueError("its pre_tokenizer splits text differently from GPT-2's")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    joined = ["".join(pair) for pair in pairs]
    made = {*byte_symbols(), *joined}
    for token in spec["added_tokens"]:  # never made from plain text here; spaces beside it stay
        odd = next((flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)), None)
        if odd or not token.get("special", True):
            raise ValueError(f"its added token {token['content']!r} " + (
                f"has {odd}" if odd else "is not special; if it never occurs in a text, mark it as special"))
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if special.keys() & made:
        raise ValueError(f"its added token {min(special.keys() & made)!r} is an ordinary token too")
    special |= {token: i for token, i in model["vocab"].items()
                if token not in made and re.fullmatch(r"[<\[].+[>\]]", token)}  # <pad>, for example
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    if END_OF_TEXT not in special:
        raise ValueError(f"it has no {END_OF_TEXT}, only {', '.join(special) or 'ordinary tokens'}")
    if sorted([*vocab.values(), *special.values()]) != list(range(len(vocab) + len(special))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    if not byte_symbols().keys() <= vocab.keys():
        raise ValueError("it lacks a token for some of the 256 bytes")
    order = [vocab[token] for token in joined]
    if order != sorted(order):
        raise ValueError("its merges are not in the order of its ids")

    encoding = tiktoken.Encoding(name, pat_str=r50k_pat_str, special_tokens=special,
                                 mergeable_ranks={to_bytes(token): i for token, i in vocab.items()})
    theirs = Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "truncation": None, "padding": None}))
    for token, i in vocab.items():
        if [piece.id for piece in theirs.model.tokenize(token)] != [i]:
            raise ValueError(f"its merges do not make its token {token!r}")
    if theirs.encode(PROBE).ids != encoding.encode_ordinary(PROBE):
        raise ValueError("it encodes text differently from GPT-2's")
    return encoding


def check_end_of_text(directory, encoding):
    """Raise ValueError if a Hugging Face directory ends its texts with another token than <|endoftext|>."""
    special = special_tokens(encoding)
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        content = read_json(directory / file)
        token, ids = content.get("eos_token"), content.get("eos_token_id")
        token = token["content"] if isinstance(token, dict) else token
        # an id that is no special token is GPT2Config's default, which was not adapted to the vocabulary
        named = [name for name, i in special.items() if i in (ids if isinstance(ids, list) else [ids])]
        for name in (token, *named):
            if name not in (None, END_OF_TEXT):
                raise ValueError(f"its {file} ends texts with {name!r}, not with {END_OF_TEXT}")


def special_tokens(encoding):
    """The special tokens of an Encoding in the order of their ids: {token: id}."""
    ids = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def without_tokens(encoding, tokens):
    """The Encoding without some of its special tokens, which must have the highest ids."""
    import tiktoken

    special = {token: i for token, i in special_tokens(encoding).items() if token not in tokens}
    return tiktoken.Encoding(encoding.name, pat_str=encoding._pat_str, special_tokens=special,
                             mergeable_ranks=encoding._mergeable_ranks)


def ordinary_tokens(encoding):
    """The tokens of an Encoding without the special ones: {id: bytes}."""
    special = set(special_tokens(encoding).values())
    return {i: encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab) if i not in special}


def padding_token(encoding):
    """The special token to pad batches with: the one with "pad" in its name, or <|endoftext|>."""
    return next((token for token in special_tokens(encoding) if "pad" in token.lower()), END_OF_TEXT)


def encode_text(text, encoding, special=False):
    """The ids of a text, also where tiktoken would panic.

    special: <|endoftext|> and other special tokens in the text are encoded as such, not as plain text.
    """
    ids = []
    for piece in cut_long_runs(text, tuple(encoding.special_tokens_set) if special else ()):
        ids += encoding.encode(piece, allowed_special="all") if special else encoding.encode_ordinary(piece)
    return ids


def cut_long_runs(text, special=()):
    """Cut a text before the last character of each long run of white space, where GPT-2 ends a word.

    A run before the end of the text or one of the special tokens is a single word, and stays whole.
    """
    start = 0
    for run in LONG_RUN.finditer(text) if len(text) > LONGEST_RUN else ():
        if run.end() < len(text) and not text.startswith(special, run.end()):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def get_fast_tokenizer(name="gpt2"):
    """gigatoken's tokenizer with the same ids, for batches of texts; None if it isn't installed.

    Each thread has its own, because a shared one serves one thread at a time. After RENEW_AFTER calls it is
    replaced, because its cache of words never shrinks (github.com/marcelroed/gigatoken/issues/36).
    """
    try:
        import gigatoken
    except ImportError:
        return None
    tokenizer, calls = vars(per_thread).get(name, (None, 0))
    if calls % RENEW_AFTER == 0:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "ranks.tiktoken"
            path.write_bytes(rank_lines(name))
            tokenizer = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {})
    vars(per_thread)[name] = tokenizer, calls + 1
    return tokenizer


@functools.cache
def rank_lines(name):
    """The tokens of a tokenizer in the format of tiktoken's files: a line for each, base64 and rank.

    None if special tokens come before others: gigatoken wants the ranks 0, 1, 2, ...
    """
    # special tokens are left out: no text encodes to them
    tokens = ordinary_tokens(get_tokenizer(name))
    if max(tokens) >= len(tokens):
        return None
    return b"".join(b"%b %d\n" % (b64encode(token), rank) for rank, token in tokens.items())


@functools.cache
def byte_symbols():
    """How GPT-2's files write bytes, {character: byte}: visible ones as themselves, others from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def to_bytes(token):
    return bytes(byte_symbols()[symbol] for symbol in token)


def train(texts, vocab_size, path):
    """Learn a GPT-2-style byte-level BPE from an iterable of str and write it to `path` as a tokenizer.json.

    Returns the number of ids: less than vocab_size if the text has too few distinct pairs of tokens. Raises
    UserError if vocab_size is not between 257 (256 bytes and <|endoftext|>) and 65536 (uint16).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size must be between 257 and 65536, not {vocab_size}")
    bpe = Tokenizer(models.BPE())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # the trainer's time grows with the square of a word's length: a run of a million blanks would take hours
    bpe.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.FixedLength(LONGEST_WORD)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = splitter
    if vocab_size > 257 and bpe.get_vocab_size() == 256:
        raise UserError("no tokenizer can be learned: no pair of bytes occurs twice in the text")

    vocab = bpe.get_vocab(with_added_tokens=False)
    bpe.model = models.BPE(vocab=vocab, merges=merges(vocab))
    bpe.add_special_tokens([END_OF_TEXT])
    with atomic_write(path) as file:
        file.write(bpe.to_str())
    return bpe.get_vocab_size()


def merges(vocab):
    """The merges (pairs of tokens) with which the tokenizers library encodes like tiktoken with this vocab.

    tiktoken joins any two neighbours that form a token, in the order in which tokens were learned. Published
    merges contain only the one pair by which each token was learned.
    """
    pairs = [
        (vocab[token], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [pair[3:] for pair in sorted(pairs)]


def save_pretrained(encoding, directory, max_length):
    """Write a tiktoken.Encoding as a Hugging Face tokenizer with the same ids, for AutoTokenizer.

    transformers 4 and llama.cpp read vocab.json and merges.txt beside tokenizer.json. max_length: the model's
    context, in tokens. transformers warns about longer texts.
    """
    from transformers import GPT2Tokenizer

    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    vocab = {"".join(symbols[byte] for byte in token): rank
             for rank, token in ordinary_tokens(encoding).items()}
    special, pad = special_tokens(encoding), padding_token(encoding)
    # padding on the left: a generated text must follow its prompt
    tokenizer = GPT2Tokenizer(vocab={**vocab, **special}, merges=merges(vocab), model_max_length=max_length,
                              pad_token=pad, padding_side="left")
    # not as extra_special_tokens: transformers 5 writes a list, which version 4 can't read
    tokenizer.add_tokens([token for token in special if token not in (END_OF_TEXT, pad)], special_tokens=True)
    tokenizer.save_pretrained(directory)
    tokenizer.backend_tokenizer.model.save(str(directory))  # vocab.json and merges.txt


def main(args):
    reader = formats.Reader(args.text_column, args.split_on, args.skip_null)
    files = sources.find_files(args.input)
    check_output("--out", args.out, *files)
    with tempfile.TemporaryDirectory() as folder:
        if "-" in files:
            stdin = Path(folder) / f"stdin.{args.stdin_format or 'txt'}"
            sources.store_stdin(stdin)
            files = [str(stdin) if path == "-" else path for path in files]
        sources.check_files(files, reader)
        texts = (text for path in files for _, text in reader.texts(path))
        count = train(texts, args.vocab_size, args.out)
    reader.report()
    fewer = f"; the text has too few different pairs for {args.vocab_size}" if count < args.vocab_size else ""
    print(f"{args.out}: {count} tokens{fewer}")


if __name__ == "__main__":
    run_script(main, args)
