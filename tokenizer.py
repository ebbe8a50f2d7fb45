"""Text to token ids and back: GPT-2's byte-level BPE, or one learned from your own text.

    python tokenizer.py train FILES --vocab_size 2048 --out my_tokenizer.json

Either way the tokenizer is a `tiktoken.Encoding`, so nothing else here needs to know which it is.
"""

import argparse
import functools
import json
import tempfile
import threading
from base64 import b64encode
from pathlib import Path

from files import UserError, atomic_write, run

END_OF_TEXT = "<|endoftext|>"  # stands before each document; the only special token
RENEW_AFTER = 1000  # calls for a thread's gigatoken, which are 4 GB of fineweb_edu.py's text
per_thread = threading.local()  # by name: its gigatoken, and how often that was asked for


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Learn a byte-level BPE from your own text.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="learn a tokenizer from files")
    command.add_argument("files", nargs="+", metavar="FILES", help=".txt, .jsonl, .jsonl.gz or .parquet")
    command.add_argument("--vocab_size", type=int, default=4096, help="ids in all, <|endoftext|> among them")
    command.add_argument("--text_column", default="text", help="where .jsonl and .parquet hold the text")
    command.add_argument("--out", required=True, help="the tokenizer.json to write")
    return parser.parse_args(argv)


@functools.cache
def get_tokenizer(name="gpt2"):
    """The tiktoken.Encoding of "gpt2", or of a file that `train` wrote. Built on first use, then kept.

    Raises UserError if GPT-2's vocabulary is neither cached nor reachable, or the file is no byte-level BPE.
    """
    import tiktoken

    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: a wrong digest
            raise UserError(
                "GPT-2's vocabulary can't be fetched: no network? Copy the two files from where they are "
                "cached, 6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json), into a folder and set "
                f"TIKTOKEN_CACHE_DIR to it ({type(error).__name__})"
            ) from error
    from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words

    try:
        spec = json.loads(Path(name).read_text(encoding="utf-8"))
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


def get_fast_tokenizer(name="gpt2"):
    """gigatoken's tokenizer of the same ids, for a batch of texts; None where it isn't installed.

    Each thread has its own, for it lets in one at a time, and a new one after RENEW_AFTER calls: what it
    remembers of the words it met is never forgotten (github.com/marcelroed/gigatoken/issues/36).
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
    """The tokens of a tokenizer in the form of tiktoken's files, a line each: base64 and rank."""
    encoding = get_tokenizer(name)
    # <|endoftext|> is the last id: no text encodes to it
    tokens = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    return b"".join(b"%b %d\n" % (b64encode(token), rank) for rank, token in enumerate(tokens))


@functools.cache
def byte_symbols():
    """GPT-2's way to write each byte as a visible character: itself where it is one, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def to_bytes(token):
    return bytes(byte_symbols()[symbol] for symbol in token)


def train(texts, vocab_size, path):
    """Learn a GPT-2-style byte-level BPE from an iterable of str and write it to `path` as a tokenizer.json.

    Returns the number of ids, less than vocab_size where the text holds too few different pairs. Raises
    UserError if vocab_size is outside 257 (256 bytes and <|endoftext|>) to 65536 (what a uint16 can name).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size must lie between 257 and 65536, not {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    if vocab_size > 257 and bpe.get_vocab_size() == 256:
        raise UserError("no tokenizer can be learned: the text holds no pair of bytes that comes twice")

    vocab = bpe.get_vocab(with_added_tokens=False)
    bpe.model = models.BPE(vocab=vocab, merges=merges(vocab))
    bpe.add_special_tokens([END_OF_TEXT])
    with atomic_write(path) as file:
        file.write(bpe.to_str())
    return bpe.get_vocab_size()


def merges(vocab):
    """The merges, pairs of tokens, that make the tokenizers library encode as tiktoken does with a vocab.

    tiktoken joins any two neighbours whose union is a token, the earliest learned first. As merges are
    learned and published, each token would be reached by one way only.
    """
    ways = [
        (vocab[token], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [way[3:] for way in sorted(ways)]


def save_pretrained(encoding, directory, max_length):
    """Write a tiktoken.Encoding of ours as a Hugging Face tokenizer of the same ids, for AutoTokenizer.

    max_length: the model's context, in tokens, of which transformers warns.
    """
    from transformers import GPT2Tokenizer

    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    vocab = {"".join(symbols[byte] for byte in token): rank for rank, token in enumerate(tokens)}
    tokenizer = GPT2Tokenizer(vocab={**vocab, END_OF_TEXT: encoding.eot_token}, merges=merges(vocab),
                              model_max_length=max_length)
    tokenizer.save_pretrained(directory)


def main(args):
    from fineweb_edu import read_texts

    texts = (text for path in args.files for _, text in read_texts(path, args.text_column))
    count = train(texts, args.vocab_size, args.out)
    print(f"{args.out}: {count} tokens" + (", the text holds no more" if count < args.vocab_size else ""))


if __name__ == "__main__":
    run(main, parse_args())
