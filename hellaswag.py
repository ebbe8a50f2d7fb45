"""HellaSwag: which of four endings does the model find likeliest? (https://arxiv.org/abs/1905.07830)

    python hellaswag.py -m gpt2 -d cuda
    python hellaswag.py -m log --protocol both      # the newest checkpoint of a run
    python hellaswag.py --compare log gpt2          # two models, a paired test, where they differ

Two protocols are in use, and their figures must not be mixed. Chance is 0.25 in both.

                what is read             acc: the largest   acc_norm: that sum over
    completion  ctx                      sum of the log-    the ending's tokens
    harness     activity: ctx_a Ctx_b    likelihoods        the ending's characters

                OpenAI's 124M            OpenAI's XL
    completion  acc 0.2859 norm 0.2955   acc 0.3842 norm 0.4893
    harness     acc 0.2892 norm 0.3114   acc 0.4004 norm 0.5089

`completion` is that of the published GPT-2 reproductions. `harness` is the task `hellaswag` of
lm-evaluation-harness (0.4), without examples in the prompt, which papers and leaderboards quote: the
activity_label stands before the context, ctx_b is capitalised, and WikiHow's marks are cleaned away.

The official file holds the context in two parts. Where one holds only ctx, harness assumes that ctx_b is what
follows the last end of a sentence and begins in lower case, as "he" in "A man sits on a roof. he", and that
it is empty otherwise; a ctx_a without a full stop, or a ctx_b with a capital, is not found that way.
"""

import argparse
import json
import re
from pathlib import Path

import accuracy
from files import UserError, atomic_write, fetch, run

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
VALIDATION_ROWS = 10042
DATA = Path("hellaswag/hellaswag_val.jsonl")
PROTOCOLS = ("completion", "harness")
FIGURES = ("n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Evaluate a GPT-2, published or your own, on HellaSwag's validation set.",
        usage="[torchrun --nproc_per_node=N] hellaswag.py {-m MODEL | --compare A B} "
              "[-d DEVICE] [--data FILE] [--flag value ...]",
    )
    models = parser.add_mutually_exclusive_group()
    models.add_argument("-m", "--model_type", default="gpt2",
                        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face directory, "
                             "a run's log directory or one checkpoint")
    models.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="two such models on the same examples, and a paired test")
    parser.add_argument("-d", "--device", help="cuda, mps or cpu (found by itself)")
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "both"], default="completion",
                        help="that of the GPT-2 reproductions, or lm-evaluation-harness's")
    parser.add_argument("--data",
                        help=f"a local .jsonl; by default the validation set, downloaded once to {DATA}")
    parser.add_argument("--limit", type=int, help="only the first N examples")
    parser.add_argument("--by", choices=list(accuracy.GROUPS), help="the figures of each group, too")
    parser.add_argument("--show", type=int, metavar="N",
                        help="print the first N examples with their scores; with --compare, of those "
                             "that only one got right")
    parser.add_argument("--json", metavar="OUT",
                        help="write the result to this file; - prints it, and nothing else")
    args = parser.parse_args(argv)
    for flag in ("limit", "show"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"argument --{flag}: must be at least 1")
    if args.compare and Path(args.compare[0]) == Path(args.compare[1]):
        parser.error("argument --compare: name two different models")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import load_model_and_tokenizer, to_device  # noqa: E402
from packed import onednn_is_faster, pack  # noqa: E402


def download(path=DATA, url=URL, rows=VALIDATION_ROWS):
    """Fetch HellaSwag's validation set to `path`, unless it is there; return the path.

    Raises UserError, and leaves nothing, if it can't be reached or what came is not the `rows` examples.
    """

    def check(file):
        count = sum(1 for _ in iterate_examples(file))
        if count != rows:
            raise UserError(f"{count} examples came, not {rows}")

    return fetch(url, path, check, "name a copy with --data")


def iterate_examples(path):
    """Yield the examples of a .jsonl, dicts with ctx, four endings and a label of 0 to 3.

    Raises UserError with the line of the first that is not one, and if there is none at all.
    """
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield check_example(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as HellaSwag examples ({error})") from error
    if number == 0:
        raise UserError(f"{path}: no examples in it")


def check_example(line, place):
    try:
        example = json.loads(line)
        context, endings, label = example["ctx"], example["endings"], example["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{place}: not a HellaSwag example ({error!r}); fetch the file anew") from error
    if not isinstance(context, str) or not context:
        raise UserError(f"{place}: ctx must be text, not {context!r}")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{place}: four endings are needed, not {endings!r:.80}")
    if label not in (0, 1, 2, 3) or isinstance(label, bool):
        raise UserError(f"{place}: label must be 0, 1, 2 or 3, not {label!r}")
    return example


def require(examples, path, names, flag):
    """Raise a UserError with the line of the first example that lacks all of these fields."""
    for number, example in enumerate(examples, start=1):
        if accuracy.field(example, names) is None:
            raise UserError(f"{path}:{number}: no {' or '.join(names)}, which {flag} needs; "
                            "leave it out, or take the official file")


def clean(text):
    """Text without WikiHow's marks, exactly as lm-evaluation-harness does it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def texts(example, protocol):
    """What a model reads of an example, and its endings: a str and four, to be joined by a space."""
    if protocol == "completion":
        return example["ctx"], example["endings"]
    ctx_a, ctx_b = example.get("ctx_a"), example.get("ctx_b")
    if not isinstance(ctx_a, str) or not isinstance(ctx_b, str):  # assumed: see the top of this file
        parts = re.fullmatch(r"(.*[.!?]\S*) ([^.!?]*)", example["ctx"], re.DOTALL)
        ctx_a, ctx_b = parts.groups() if parts and parts[2][:1].islower() else (example["ctx"], "")
    query = clean(f"{example['activity_label']}: {ctx_a} {ctx_b.capitalize()}")
    return query, [clean(ending) for ending in example["endings"]]


def render_example(example, tokenizer, protocol="completion"):
    """The token ids of an example: the context, and four endings as they follow it, each behind a space.

    The harness moves spaces at the context's end to the endings, encodes both together and cuts. That comes
    to the same as encoding each: GPT-2's BPE joins nothing across a space behind another character.
    """
    context, endings = texts(example, protocol)
    space = " "
    if protocol == "harness":
        context, space = context.rstrip(), context[len(context.rstrip()) :] + " "
    # nothing is predicted from nothing: an empty context is the start of a document
    ids = tokenizer.encode_ordinary(context) or [tokenizer.eot_token]
    return ids, [tokenizer.encode_ordinary(space + ending) for ending in endings]


class Row:
    """One row of a batch: a context and endings that all see it, but not each other.

    A model reads the context once for all its endings. Each token knows its segment (0 is the context,
    1, 2, ... the endings) and its position, which restarts behind the context for each ending.
    """

    def __init__(self, context, endings, places):
        self.ids, self.positions, self.segments = list(context), list(range(len(context))), [0] * len(context)
        # where a prediction is scored, its target, whose it is
        self.scored_at, self.targets, self.places = [], [], []
        for segment, (ending, place) in enumerate(zip(endings, places), start=1):
            first = len(self.ids)
            self.scored_at += [len(context) - 1, *range(first, first + len(ending) - 1)]
            self.targets += ending
            self.places += [place] * len(ending)
            self.ids += ending[:-1]  # the last token is predicted, nothing is predicted from it
            self.positions += range(len(context), len(context) + len(ending) - 1)
            self.segments += [segment] * (len(ending) - 1)


def rows_of(index, context, endings, block_size):
    """The rows that score an example, and how many of its endings had to be cut to the model's context.

    A sequence longer than block_size + 1 keeps its last block_size + 1 tokens; what is left of the ending
    is scored.
    """
    places = [4 * index + i for i in range(len(endings))]
    cut = [len(context) + len(ending) > block_size + 1 for ending in endings]
    if not any(cut):
        return [Row(context, endings, places)], 0
    rows = []  # the endings no longer share a context: each loses another part of it
    for ending, place in zip(endings, places):
        ids = (context + ending)[-(block_size + 1) :]
        split = max(1, len(ids) - len(ending))  # the first token of all has nothing to be predicted from
        rows.append(Row(ids[:split], [ids[split:]], [place]))
    return rows, sum(cut)


def render(examples, tokenizer, block_size, protocol="completion"):
    """What `evaluate` reads of a list of examples: the Rows of all, and how many endings had to be cut."""
    rows, endings_cut = [], 0
    for index, example in enumerate(examples):
        new_rows, cut = rows_of(index, *render_example(example, tokenizer, protocol), block_size)
        rows += new_rows
        endings_cut += cut
    return rows, endings_cut


def make_batches(rows, batch_tokens):
    """Rows of similar length together, at most batch_tokens with their padding (but one row at least)."""
    batches, batch = [], []
    # the largest first: memory runs out at once
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
    # a token attends to what stands before it in its own segment and in the context
    same = segments.unsqueeze(2) == segments.unsqueeze(1)  # (B, T, T)
    mask = ((segments == 0).unsqueeze(1) | same).tril().unsqueeze(1)  # (B, 1, T, T)
    features = model.features(ids, positions, mask)  # (B, T, C)
    scored = [length * b + at for b, row in enumerate(batch) for at in row.scored_at]
    scored = to_device(torch.tensor(scored), device)
    targets = to_device(torch.tensor([target for row in batch for target in row.targets]), device)
    return model.token_losses(features.flatten(0, 1)[scored], targets)


def evaluate(model, tokenizer, examples, batch_tokens=None, rank=0, world_size=1,
             before_batch=lambda: None, progress=False, protocol="completion", rendered=None):
    """Score a list of examples with a GPT in eval mode; all ranks of a process group return the whole result.

    Returns a dict: n, acc, acc_norm, acc_stderr, acc_norm_stderr, endings_cut (sequences longer than the
    model's context), predictions and predictions_norm (lists of n), and the scores that were compared, in
    nats: loglikelihoods, and loglikelihoods_norm per token or character (lists of n lists of 4). protocol
    is one of PROTOCOLS. before_batch is called before each batch, the same number of times on every rank,
    and may raise to leave. batch_tokens bounds the tokens of a forward pass. rendered: what `render` has
    made of the examples, to be made once where they are scored again and again.
    """
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
    for batch, losses in scored:  # read back behind the last batch: a GPU is never waited for in between
        places = torch.tensor([place for row in batch for place in row.places])
        sums.index_add_(0, places, losses.cpu().double())
        counts.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
    if world_size > 1:
        both = torch.stack([sums, counts]).to(device if torch.distributed.get_backend() == "nccl" else "cpu")
        torch.distributed.all_reduce(both)
        sums, counts = both.cpu()

    if protocol == "harness":  # per character
        counts = torch.tensor([len(ending) for e in examples for ending in texts(e, protocol)[1]])
    result = {"endings_cut": endings_cut}
    for suffix, scores in (("", -sums), ("_norm", -sums / counts)):
        scores = scores.view(-1, 4)
        result[f"predictions{suffix}"] = scores.argmax(dim=1).tolist()
        result[f"loglikelihoods{suffix}"] = scores.tolist()
    return {**accuracy.figures(examples, result), **result}


def summary(results):
    """What --json holds of one model: its result, or where there are two protocols, both by their names."""
    small = [{key: value for key, value in r.items() if "loglikelihoods" not in key} for r in results]
    if len(small) == 1:
        return small[0]
    return {key: small[0][key] for key in FIGURES} | {result["protocol"]: result for result in small}


def print_report(args, examples, results, comparisons):
    """Everything for a person, the figures themselves last."""
    if args.show:
        indices = range(len(examples))
        if comparisons:
            indices = accuracy.differing(next(iter(comparisons.values())))
        accuracy.print_examples(examples, indices[: args.show], results)
    if args.by:
        accuracy.print_groups(results, args.by)
    accuracy.print_published(results, VALIDATION_ROWS)
    for result in results:
        accuracy.print_result(result)
    if comparisons:
        print(f"A is {args.compare[0]}, B is {args.compare[1]}")
    for protocol, comparison in comparisons.items():
        accuracy.print_comparison(comparison, protocol)


def main(args):
    from train_gpt2 import rank_zero_first, setup_ranks, tune_host  # all of torch.distributed is set up there

    if args.json and args.json != "-" and not Path(args.json).parent.is_dir():
        raise UserError(f"--json {args.json}: no such directory")
    tune_host()
    device, rank, world_size = setup_ranks(args.device)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if not args.data:
        with rank_zero_first(rank, world_size):
            args.data = download()
    examples = list(iterate_examples(args.data))[: args.limit]
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    if "harness" in protocols:
        require(examples, args.data, ("activity_label",), f"--protocol {args.protocol}")
    if args.by:
        require(examples, args.data, accuracy.GROUPS[args.by], f"--by {args.by}")
    names = args.compare or [args.model_type]
    # both at once: a B that can't be loaded is refused before A is scored
    models = [load_model_and_tokenizer(name, device) for name in names]
    if device == "cpu" and onednn_is_faster():
        for model, _ in models:
            pack(model)

    results = []  # those of A, then those of B. The protocols' contexts differ: there is no work to share
    for name, (model, tokenizer) in zip(names, models):
        for protocol in protocols:
            result = evaluate(model, tokenizer, examples, rank=rank, world_size=world_size,
                              progress=rank == 0, protocol=protocol)
            if args.by:
                result["groups"] = accuracy.figures_by(examples, result, args.by)
            results.append({"model": name, "protocol": protocol, **result})
    if rank == 0:
        a, b = results[: len(protocols)], results[len(protocols) :]
        comparisons = {one["protocol"]: accuracy.compare(examples, one, other) for one, other in zip(a, b)}
        report = summary(a) | ({"other": summary(b), "comparison": comparisons} if b else {})
        if args.json == "-":
            print(json.dumps(report))
        elif args.json:
            with atomic_write(args.json) as file:
                json.dump(report, file)
        if args.json != "-":
            print_report(args, examples, results, comparisons)
    if world_size > 1:
        torch.distributed.barrier()  # no rank takes its end of a connection away while another still uses it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main, args)
