"""HellaSwag: which of four endings is most likely to the model? (https://arxiv.org/abs/1905.07830)

    python hellaswag.py -m gpt2 -d cuda
    python hellaswag.py -m log --protocol both      # the newest checkpoint of a run
    python hellaswag.py --compare log gpt2          # two models: a paired test, and where they differ

Two protocols are in use, and their results can't be compared with each other. Chance is 0.25 in both.

`acc` takes the ending with the largest sum of log-likelihoods; `acc_norm` divides each sum by the ending's
length.

                the model reads          length in
    completion  ctx                      tokens
    harness     activity: ctx_a Ctx_b    characters

                OpenAI's 124M            OpenAI's XL
    completion  acc 0.2859 norm 0.2955   acc 0.3842 norm 0.4893
    harness     acc 0.2892 norm 0.3114   acc 0.4004 norm 0.5089

`completion` is the protocol of the published GPT-2 reproductions. `harness` is the task `hellaswag` of
lm-evaluation-harness (0.4), zero-shot, which papers and leaderboards quote: the activity_label precedes the
context, ctx_b is capitalized, and WikiHow's marks are removed.

The official file has the context in two parts, ctx_a and ctx_b. For a file with only ctx, the harness
protocol takes the text after the last sentence as ctx_b if that begins in lower case, like "he" in "A man
sits on a roof. he". This misses a ctx_a without a full stop, and a ctx_b that begins with a capital letter.
"""

import json
import re
import zlib
from pathlib import Path

from kit import scores
from kit.flags import MODEL, Parser, from_command_line, integer

# the validation split on the hub. The authors' GitHub repository was taken down in September 2026
DATA = ("hf://datasets/Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76/"
        "data/validation-00000-of-00001.parquet")
PROTOCOLS = ("completion", "harness")


def parse_args(argv=None):
    parser = Parser(
        description="Evaluate a GPT-2, published or your own, on HellaSwag's validation set.",
        usage="python hellaswag.py [-m MODEL | --compare A B] [-d DEVICE] [--flag value ...]",
        aliases={"--model_type": "--model", "--data": "--hellaswag_data"},
    )
    group = parser.add_argument_group("model and examples")
    models, add = group.add_mutually_exclusive_group(), group.add_argument
    models.add_argument("-m", "--model", help=f"{MODEL} (default: the newest run among log*)")
    models.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="compare two models on the same examples, with a paired test")
    add("-d", "--device", help="cuda, mps or cpu (default: auto-detected)")
    add("--protocol", choices=[*PROTOCOLS, "both"], default="completion",
        help="protocol of the GPT-2 reproductions, or of lm-evaluation-harness")
    add("--hellaswag_data", metavar="FILE",
        help="file of examples, .jsonl, .jsonl.gz or .parquet (default: the validation split, downloaded "
             "once from the Hugging Face hub)")
    add("--limit", type=integer(1), help="evaluate only the first N examples")
    add = parser.add_argument_group("output").add_argument
    add("--by", choices=list(scores.GROUPS), help="also print the accuracy of each group")
    add("--show", type=integer(1),
        help="print the first N examples with their scores; with --compare, only those that exactly one of "
             "the models got right")
    add("--json", metavar="OUT", help="write the result to this file; with -, print only the JSON")
    args = parser.parse_args(argv)
    if args.compare and Path(args.compare[0]) == Path(args.compare[1]):
        parser.error("argument --compare: name two different models")
    return args


if __name__ == "__main__":
    args = from_command_line(parse_args)

import torch
from tqdm import tqdm

from checkpoint import load_model_and_tokenizer, newest_run
from kit.device import to_device, tune
from kit.files import UserError, atomic_write, check_output, run_script
from kit.formats import read_rows
from kit.packed import onednn_is_faster, pack
from kit.published import HELLASWAG_EXAMPLES
from kit.ranks import Ranks
from kit.sources import local_file
from tokenizer import encode_text


def download(address=DATA, rows=HELLASWAG_EXAMPLES):
    """The local path of HellaSwag's validation split, downloaded unless it is in the hub's cache.

    Raises UserError if it can't be downloaded, or if there are not that many rows.
    """
    path = local_file(address, "name a local copy with --hellaswag_data")
    count = sum(1 for _ in iterate_examples(path))
    if count != rows:
        raise UserError(f"{path} has {count} examples, not {rows}; name another copy with --hellaswag_data")
    return path


def iterate_examples(path):
    """Yield the examples of a file: dicts with ctx, four endings and a label of 0 to 3.

    path: a .jsonl, .jsonl.gz or .parquet file. Raises UserError that names the first bad row, and if there
    are no rows.
    """
    place = None
    for place, row in read_rows(str(path)):
        yield check_example(row, place)
    if place is None:
        raise UserError(f"{path}: no examples in it")


def fingerprint(examples):
    """A text that changes with the examples and with their order."""
    return f"{len(examples)}, checksum {zlib.crc32(repr(examples).encode(errors='replace')):08x}"


def check_example(row, place):
    """A row of HellaSwag with its label as an int. Raises UserError with the place of a bad row."""
    if not isinstance(row, dict) or not {"ctx", "endings"} <= row.keys():
        raise UserError(f"{place}: not a HellaSwag example, which has ctx, endings and label")
    context, endings, label = row["ctx"], row["endings"], row.get("label")
    if not isinstance(context, str) or not context:
        raise UserError(f"{place}: ctx must be text, not {context!r}")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{place}: endings must be four texts, not {endings!r:.80}")
    if str(label) in ("None", "", "-1", "-1.0"):
        raise UserError(f"{place}: no label ({label!r}). HellaSwag's test split has none: use the validation "
                        "split")
    if not re.fullmatch(r"[0-3](\.0)?", str(label)):  # the hub stores labels as text, a data frame as floats
        raise UserError(f"{place}: label must be 0, 1, 2 or 3, not {label!r}")
    return {**row, "label": int(float(label))}


def require_fields(examples, path, names, flag):
    """Raise UserError with the number of the first example that has none of these fields."""
    for number, example in enumerate(examples, start=1):
        if scores.field(example, names) is None:
            raise UserError(f"{path}: example {number} has no {' or '.join(names)}, which {flag} needs; "
                            "use the official file, or leave out the flag")


def strip_marks(text):
    """Text without WikiHow's marks, exactly as lm-evaluation-harness removes them."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def context_and_endings(example, protocol):
    """The context of an example and its four endings as texts, to be joined by a space."""
    if protocol == "completion":
        return example["ctx"], example["endings"]
    ctx_a, ctx_b = example.get("ctx_a"), example.get("ctx_b")
    if not isinstance(ctx_a, str) or not isinstance(ctx_b, str):  # a guess: see the top of this file
        parts = re.fullmatch(r"(.*[.!?]\S*) ([^.!?]*)", example["ctx"], re.DOTALL)
        ctx_a, ctx_b = parts.groups() if parts and parts[2][:1].islower() else (example["ctx"], "")
    query = strip_marks(f"{example['activity_label']}: {ctx_a} {ctx_b.capitalize()}")
    return query, [strip_marks(ending) for ending in example["endings"]]


def render_example(example, tokenizer, protocol="completion"):
    """The token ids of an example: the context, and the four endings that follow it after a space.

    The harness moves trailing spaces from the context to the endings, encodes both together and splits the
    ids. Encoding them separately gives the same ids, as GPT-2's BPE never joins a character and the space
    after it.
    """
    context, endings = context_and_endings(example, protocol)
    space = " "
    if protocol == "harness":
        context, space = context.rstrip(), context[len(context.rstrip()) :] + " "
    # the first token needs a context: an empty one means the start of a document
    ids = encode_text(context, tokenizer) or [tokenizer.eot_token]
    return ids, [encode_text(space + ending, tokenizer) for ending in endings]


class Row:
    """One row of a batch: a context, and endings that attend to it but not to each other.

    Thus the model reads the context once for all endings. Each token has a segment (0 is the context; 1, 2,
    ... are the endings) and a position, which restarts after the context for each ending.
    """

    def __init__(self, context, endings, places):
        self.ids, self.positions, self.segments = list(context), list(range(len(context))), [0] * len(context)
        # for each scored prediction: its index in the row, its target, and the number of its ending
        self.scored_at, self.targets, self.places = [], [], []
        for segment, (ending, place) in enumerate(zip(endings, places), start=1):
            first = len(self.ids)
            self.scored_at += [len(context) - 1, *range(first, first + len(ending) - 1)]
            self.targets += ending
            self.places += [place] * len(ending)
            self.ids += ending[:-1]  # nothing is predicted from the last token
            self.positions += range(len(context), len(context) + len(ending) - 1)
            self.segments += [segment] * (len(ending) - 1)


def rows_of(index, context, endings, block_size):
    """The rows that score an example, and how many of its endings had to be truncated.

    A sequence longer than block_size + 1 keeps its last block_size + 1 tokens; what is left of
    the ending is scored.
    """
    places = [4 * index + i for i in range(len(endings))]
    cut = [len(context) + len(ending) > block_size + 1 for ending in endings]
    if not any(cut):
        return [Row(context, endings, places)], 0
    rows = []  # each ending leaves a different part of the context, so they can't share it
    for ending, place in zip(endings, places):
        ids = (context + ending)[-(block_size + 1) :]
        split = max(1, len(ids) - len(ending))  # the first token is never predicted
        rows.append(Row(ids[:split], [ids[split:]], [place]))
    return rows, sum(cut)


def render(examples, tokenizer, block_size, protocol="completion"):
    """The Rows that score a list of examples, and how many endings had to be truncated."""
    rows, endings_cut = [], 0
    for index, example in enumerate(examples):
        new_rows, cut = rows_of(index, *render_example(example, tokenizer, protocol), block_size)
        rows += new_rows
        endings_cut += cut
    return rows, endings_cut


def make_batches(rows, batch_tokens):
    """Batches of rows of similar length: at most batch_tokens each, padding included, but at least a row."""
    batches, batch = [], []
    # the longest first, so that memory runs out at once or never
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if batch and len(batch[0].ids) * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    return batches + [batch]


@torch.no_grad()
def score_batch(model, batch, device):
    """The loss of every scored token of a batch of Rows, in nats: (N,), in the order of the rows' places."""
    length = len(batch[0].ids)

    def padded(lists, value):
        rows = torch.tensor([ids + [value] * (length - len(ids)) for ids in lists])  # (B, T)
        return to_device(rows, device)

    ids = padded([row.ids for row in batch], 0)
    positions = padded([row.positions for row in batch], 0)
    segments = padded([row.segments for row in batch], -1)
    # a token attends to the context and to its own segment, as far as they precede it
    same = segments.unsqueeze(2) == segments.unsqueeze(1)  # (B, T, T)
    mask = ((segments == 0).unsqueeze(1) | same).tril().unsqueeze(1)  # (B, 1, T, T)
    features = model.features(ids, positions, mask)  # (B, T, C)
    scored = [length * b + at for b, row in enumerate(batch) for at in row.scored_at]
    scored = to_device(torch.tensor(scored), device)
    targets = to_device(torch.tensor([target for row in batch for target in row.targets]), device)
    return model.token_losses(features.flatten(0, 1)[scored], targets)


def evaluate(model, tokenizer, examples, batch_tokens=None, ranks=None, before_batch=lambda: None,
             progress=False, protocol="completion", rendered=None):
    """Score a list of examples with a GPT in eval mode. ranks: share the work; all of them get the result.

    Returns a dict: n, acc, acc_norm, acc_stderr, acc_norm_stderr, endings_cut (how many were truncated to the
    model's context), predictions and predictions_norm (lists of n), and the scores behind them, in nats:
    loglikelihoods, and loglikelihoods_norm per token or character (lists of n lists of 4).

    protocol: one of PROTOCOLS. before_batch: called before each batch, equally often on every rank; it may
    raise to stop. batch_tokens: the most tokens in a forward pass. rendered: the result of `render`, if the
    same examples are scored more than once.
    """
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (2**15 if device.type == "cuda" else 2**11)
    rows, endings_cut = rendered or render(examples, tokenizer, model.config.block_size, protocol)
    sums = torch.zeros(4 * len(examples), dtype=torch.float64)
    counts = torch.zeros(4 * len(examples), dtype=torch.float64)
    batches = make_batches(rows, batch_tokens)
    scored = []
    for first in tqdm(range(0, len(batches), world_size), desc="HellaSwag", unit="batch",
                      disable=None if progress else True):
        before_batch()
        if first + rank < len(batches):
            batch = batches[first + rank]
            scored.append((batch, score_batch(model, batch, device)))
    for batch, losses in scored:  # read after the last batch, to wait for the GPU only once
        places = torch.tensor([place for row in batch for place in row.places])
        sums.index_add_(0, places, losses.cpu().double())
        counts.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
    if ranks:
        sums, counts = ranks.sum(torch.stack([sums, counts]))

    if protocol == "harness":  # per character
        endings = [ending for e in examples for ending in context_and_endings(e, protocol)[1]]
        counts = torch.tensor(list(map(len, endings)))
    result = {"endings_cut": endings_cut}
    for suffix, loglikelihoods in (("", -sums), ("_norm", -sums / counts)):
        loglikelihoods = loglikelihoods.view(-1, 4)
        result[f"predictions{suffix}"] = loglikelihoods.argmax(dim=1).tolist()
        result[f"loglikelihoods{suffix}"] = loglikelihoods.tolist()
    return {**scores.accuracies(examples, result), **result}


def summary(results):
    """What --json writes for a model: its result, without log-likelihoods.

    For two protocols: the numbers of the first, and the results of both by their names.
    """
    small = [{key: value for key, value in r.items() if "loglikelihoods" not in key} for r in results]
    if len(small) == 1:
        return small[0]
    top = ("n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr")
    return {key: small[0][key] for key in top} | {result["protocol"]: result for result in small}


def print_report(args, examples, results, comparisons):
    """Print everything that was asked for, the results themselves last."""
    if args.show:
        indices = range(len(examples))
        if comparisons:
            indices = scores.differing(next(iter(comparisons.values())))
        if indices:  # two models may have got the same examples right
            scores.print_examples(examples, indices[: args.show], results)
    if args.by:
        scores.print_groups(results, args.by)
    if results[0]["n"] == HELLASWAG_EXAMPLES:
        scores.print_published(results)
    for result in results:
        scores.print_result(result)
    if comparisons:
        print(f"A is {args.compare[0]}, B is {args.compare[1]}")
    for protocol, comparison in comparisons.items():
        scores.print_comparison(comparison, protocol)


def main(args):
    check_output("--json", args.json, args.hellaswag_data, args.model, *(args.compare or ()))
    ranks = Ranks(args.device)
    tune(ranks.device)
    names = args.compare or [args.model or newest_run(ranks.is_first)]
    path = args.hellaswag_data
    if not path:
        with ranks.first_goes_ahead():
            path = download()
    examples = list(iterate_examples(path))[: args.limit]
    ranks.check_same({**vars(args), "device": None, "examples": fingerprint(examples)})
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    if "harness" in protocols:
        require_fields(examples, path, ("activity_label",), f"--protocol {args.protocol}")
    if args.by:
        require_fields(examples, path, scores.GROUPS[args.by], f"--by {args.by}")
    # load both before scoring, so that a B that can't be loaded is refused at once
    models = [load_model_and_tokenizer(name, ranks.device) for name in names]
    if ranks.device == "cpu" and onednn_is_faster():
        for model, _ in models:
            pack(model)

    results = []  # those of A, then those of B. The protocols share no work, because their contexts differ
    for name, (model, tokenizer) in zip(names, models):
        for protocol in protocols:
            result = evaluate(model, tokenizer, examples, ranks=ranks, progress=ranks.is_first,
                              protocol=protocol)
            if args.by:
                result["groups"] = scores.accuracies_by(examples, result, args.by)
            data = args.hellaswag_data or DATA
            results.append({"model": name, "protocol": protocol, "data": data, **result})
    if ranks.is_first:
        a, b = results[: len(protocols)], results[len(protocols) :]
        comparisons = {one["protocol"]: scores.compare(examples, one, other) for one, other in zip(a, b)}
        report = summary(a) | ({"other": summary(b), "comparison": comparisons} if b else {})
        if args.json == "-":
            print(json.dumps(report))
        elif args.json:
            with atomic_write(args.json) as file:
                json.dump(report, file)
        if args.json != "-":
            print_report(args, examples, results, comparisons)
    ranks.leave()


if __name__ == "__main__":
    run_script(main, args)
