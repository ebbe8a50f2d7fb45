"""Text to token ids and back: GPT-2's byte-level BPE, or one learned from your own text.

    python tokenizer.py train FILES --vocab_size 2048 --out my_tokenizer.json  # files as for fineweb_edu.py

Either way the tokenizer is a `tiktoken.Encoding`, and the rest of the program treats both alike.
"""

import functools
import json
import re
import tempfile
import threading
from base64 import b64encode
from pathlib import Path

from kit import formats, sources
from kit.files import UserError, atomic_write, run_script
from kit.flags import Parser, from_command_line, integer
from kit.formats import END_OF_TEXT

# A text is cut before the last character of a run of white space this long. GPT-2's words end there anyway,
# but the regular expressions of tiktoken panic at a run of a million characters
LONGEST_RUN = 100_000
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # \s in tiktoken's pattern
LONG_RUN = re.compile(f"(?<!{SPACE}){SPACE}{{{LONGEST_RUN},}}")
RENEW_AFTER = 1000  # calls after which a thread gets a new gigatoken: 4 GB of fineweb_edu.py's text
per_thread = threading.local()  # by tokenizer: the thread's gigatoken, and how often it was used


def parse_args(argv=None):
    parser = Parser(description="Learn a byte-level BPE from your own text.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="learn a tokenizer from files")
    command.add_argument("files", nargs="+", metavar="FILES",
                         help=f"files ({formats.FORMATS}), directories of them, quoted patterns, "
                              "or - for standard input")
    command.add_argument("--vocab_size", type=integer(257, 65536), default=4096,
                         help="number of ids, including <|endoftext|>")
    formats.add_flags(command)
    command.add_argument("--out", required=True, help="the tokenizer.json to write")
    args = parser.parse_args(argv)
    formats.check_flags(parser, args, args.files)
    return args


@functools.cache
def get_tokenizer(name="gpt2"):
    """The tiktoken.Encoding of "gpt2", or of a file that `train` wrote. It is built once and cached.

    Raises UserError if GPT-2's vocabulary is neither cached nor reachable, or if the file is not a byte-level
    BPE.
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
    from tiktoken_ext.openai_public import r50k_pat_str  # the pattern that splits text into GPT-2's words

    try:
        spec = json.loads(Path(name).read_text(encoding="utf-8-sig"))
        vocab = spec["model"]["vocab"]
        ranks = {to_bytes(token): rank for token, rank in vocab.items() if token != END_OF_TEXT}
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        encoding = tiktoken.Encoding(Path(name).stem, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens=special)
        if sorted(ranks.values()) != list(range(len(ranks))) or END_OF_TEXT not in special:
            raise ValueError(f"its ids are not 0, 1, 2, ..., or it has no {END_OF_TEXT}")
    except FileNotFoundError:
        raise UserError(f"no tokenizer {name}: name 'gpt2' or a file made by "
                        "`python tokenizer.py train`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not a tokenizer made by "
                        f"`python tokenizer.py train`: {error!r}") from error
    return encoding


def encode_text(text, encoding, special=False):
    """The ids of a text, also where tiktoken would panic. special: <|endoftext|> means the special token."""
    ids = []
    for piece in cut_long_runs(text, tuple(encoding.special_tokens_set) if special else ()):
        ids += encoding.encode(piece, allowed_special="all") if special else encoding.encode_ordinary(piece)
    return ids


def cut_long_runs(text, special=()):
    """Cut a text before the last character of each long run of white space, where GPT-2 always ends a word.

    It does not if the text ends with the run, or one of the special tokens follows.
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
    """The tokens of a tokenizer in the format of tiktoken's files: a line for each, base64 and rank."""
    encoding = get_tokenizer(name)
    # <|endoftext|>, the last id, is left out: no text encodes to it
    tokens = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    return b"".join(b"%b %d\n" % (b64encode(token), rank) for rank, token in enumerate(tokens))


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

    Returns the number of ids: less than vocab_size if the text has too few different pairs of tokens. Raises
    UserError if vocab_size is not between 257 (256 bytes and <|endoftext|>) and 65536 (uint16).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size must be between 257 and 65536, not {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
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

    max_length: the model's context, in tokens. transformers warns about longer texts.
    """
    from transformers import GPT2Tokenizer

    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    vocab = {"".join(symbols[byte] for byte in token): rank for rank, token in enumerate(tokens)}
    tokenizer = GPT2Tokenizer(vocab={**vocab, END_OF_TEXT: encoding.eot_token}, merges=merges(vocab),
                              model_max_length=max_length)
    tokenizer.save_pretrained(directory)


def main(args):
    reader = formats.Reader(args.text_column, args.split_on, args.skip_null)
    files = sources.find_files(args.files)
    with tempfile.TemporaryDirectory() as folder:
        if "-" in files:
            stdin = Path(folder) / f"stdin.{args.stdin_format or 'txt'}"
            sources.store_stdin(stdin)
            files = [str(stdin) if path == "-" else path for path in files]
        sources.check_files(files, reader)
        texts = (text for path in files for _, text in reader.texts(path))
        count = train(texts, args.vocab_size, args.out)
    reader.report()
    print(f"{args.out}: {count} tokens" + (", more can't be learned from this text" if count < args.vocab_size
                                           else ""))


if __name__ == "__main__":
    run_script(main, from_command_line(parse_args))
