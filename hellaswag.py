"""HellaSwag: which of four endings does the model find likeliest? (https://arxiv.org/abs/1905.07830)

    python hellaswag.py -m gpt2 -d cuda
    python hellaswag.py -m log                # the newest checkpoint of a run

The completion protocol of the published GPT-2 reproductions: each ending is scored by the cross-entropy of
its tokens behind the context. `acc` takes the ending with the lowest sum, `acc_norm` the one with the lowest
mean. OpenAI's 124M reaches acc 0.2859, acc_norm 0.2955; the XL 0.3842 and 0.4893; chance is 0.25.
"""

import argparse
import json
from pathlib import Path

from files import UserError, atomic_write, fetch, run

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
VALIDATION_ROWS = 10042
DATA = Path("hellaswag/hellaswag_val.jsonl")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Evaluate a GPT-2, published or your own, on HellaSwag's validation set.",
        usage="[torchrun --nproc_per_node=N] hellaswag.py -m MODEL [-d DEVICE] [--data FILE] "
              "[--limit N] [--json OUT]",
    )
    parser.add_argument("-m", "--model_type", default="gpt2",
                        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face directory, "
                             "a run's log directory or one checkpoint")
    parser.add_argument("-d", "--device", help="cuda, mps or cpu (found by itself)")
    parser.add_argument("--data",
                        help=f"a local .jsonl; by default the validation set, downloaded once to {DATA}")
    parser.add_argument("--limit", type=int, help="only the first N examples")
    parser.add_argument("--json", metavar="OUT", help="write the result to this file, - for the terminal")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("argument --limit: must be at least 1")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import load_model_and_tokenizer  # noqa: E402


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


def render_example(example, tokenizer):
    """The token ids of an example: the context, and four endings as they follow it, each behind a space."""
    context = tokenizer.encode_ordinary(example["ctx"])
    return context, [tokenizer.encode_ordinary(" " + ending) for ending in example["endings"]]


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
        return torch.tensor([ids + [value] * (length - len(ids)) for ids in lists]).to(device)  # (B, T)

    ids = padded([row.ids for row in batch], 0)
    positions = padded([row.positions for row in batch], 0)
    segments = padded([row.segments for row in batch], -1)
    # a token attends to what stands before it in its own segment and in the context
    same = segments.unsqueeze(2) == segments.unsqueeze(1)  # (B, T, T)
    mask = ((segments == 0).unsqueeze(1) | same).tril().unsqueeze(1)  # (B, 1, T, T)
    features = model.features(ids, positions, mask)  # (B, T, C)
    scored = torch.tensor([length * b + at for b, row in enumerate(batch) for at in row.scored_at]).to(device)
    targets = torch.tensor([target for row in batch for target in row.targets]).to(device)
    return model.token_losses(features.flatten(0, 1)[scored], targets)


def evaluate(model, tokenizer, examples, batch_tokens=None, rank=0, world_size=1,
             before_batch=lambda: None, progress=False):
    """Score a list of examples with a GPT in eval mode; all ranks of a process group return the whole result.

    Returns a dict: n, acc, acc_norm, acc_stderr, acc_norm_stderr, endings_cut (sequences longer than the
    model's context) and predictions, predictions_norm (lists of n). before_batch is called before each
    batch, the same number of times on every rank, and may raise to leave. batch_tokens bounds the tokens of
    a forward pass.
    """
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (2**16 if device.type == "cuda" else 2**11)
    rows, endings_cut = [], 0
    for index, example in enumerate(examples):
        context, endings = render_example(example, tokenizer)
        new_rows, cut = rows_of(index, context, endings, model.config.block_size)
        rows += new_rows
        endings_cut += cut

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

    labels = torch.tensor([example["label"] for example in examples])
    predictions = sums.view(-1, 4).argmin(dim=1)
    predictions_norm = (sums / counts).view(-1, 4).argmin(dim=1)
    result = {"n": len(examples)}
    for name, right in (("acc", predictions == labels), ("acc_norm", predictions_norm == labels)):
        p = right.double().mean().item()
        result[name] = p
        # as lm-evaluation-harness has it
        result[f"{name}_stderr"] = (p * (1 - p) / max(1, len(examples) - 1)) ** 0.5
    result.update(endings_cut=endings_cut, predictions=predictions.tolist(),
                  predictions_norm=predictions_norm.tolist())
    return result


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
    model, tokenizer = load_model_and_tokenizer(args.model_type, device)
    result = evaluate(model, tokenizer, examples, rank=rank, world_size=world_size, progress=rank == 0)
    if rank == 0:
        if args.json == "-":
            print(json.dumps(result))
        elif args.json:
            with atomic_write(args.json) as file:
                json.dump(result, file)
        cut = f", {result['endings_cut']} endings cut to the context of {model.config.block_size}"
        print(
            f"{args.model_type}: HellaSwag acc {result['acc']:.4f} ± {result['acc_stderr']:.4f}, "
            f"acc_norm {result['acc_norm']:.4f} ± {result['acc_norm_stderr']:.4f} on {result['n']} examples"
            + (cut if result["endings_cut"] else "")
        )
    if world_size > 1:
        torch.distributed.barrier()  # no rank takes its end of a connection away while another still uses it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main, args)
