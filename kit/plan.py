"""What a run will need: memory, disk, time, and what limits it on many GPUs. Arithmetic only (--plan).

docs/scaling.md compares the formulas with measured peaks and published runs.
"""

import math
from dataclasses import dataclass, replace

import torch

from kit import recipe, shards
from kit.device import PEAK_FLOPS, NoRandomWeights
from kit.files import UserError, count, epochs_text
from kit.loss import LOGITS_AT_ONCE
from model import GPT

NOMINAL_TOKENS = 10**10  # of FineWeb-Edu's sample-10BT, for data that is not there yet
CARDS = {"RTX 4090": 24, "A100": 80, "H100": 80, "H200": 141, "B200": 180}  # memory in GB
# for each card, from one run of llm.c on eight of them in 2024: the share of the peak FLOP/s that training
# reaches, dollars per GPU-hour, and the run. https://github.com/karpathy/llm.c/tree/master/scripts:
# run_gpt2_124M.sh (300 ms per step, $14 per hour), run_gpt2_1558M.sh (2.80 s per step, $28 per hour). This
# project has not been measured on GPUs
RUNS = {"A100": (0.60, 1.75, "llm.c's 124M"), "H100": (0.486, 3.50, "llm.c's 1558M")}
KEPT = {"cuda": 38, "cpu": 68}  # bytes kept for the backward pass, per token, layer and unit of width
# assumptions for a cluster of nodes with eight GPUs
NVLINK, NETWORK = 300e9, 50e9  # bytes/s per GPU between the GPUs of a node, and between nodes
DISK = 1e9  # bytes/s of writing a checkpoint
GPU_HOURS_PER_FAILURE = 50_700  # Llama 3: 419 failures in 54 days on 16,384 GPUs (https://arxiv.org/abs/2407.21783)


@dataclass
class Plan:
    """What a run needs, computed from its flags, on a number of GPUs (ranks)."""

    args: object  # the flags of train_gpt2.py
    model: GPT  # on the meta device
    gpus: int
    data_tokens: int  # of the training split
    is_nominal: bool  # whether that number is an assumption

    @property
    def N(self):
        return self.model.num_params()

    @property
    def flops_per_token(self):
        return self.model.flops_per_token(self.args.sequence_length)

    @property
    def micro_batches(self):
        """Of a step, over all ranks. Raises UserError if the batch can't be divided."""
        return recipe.count_micro_batches(self.args, self.gpus)

    @property
    def tokens(self):
        return self.args.max_steps * self.args.total_batch_size

    @property
    def epochs(self):
        """As a run counts them: of whole windows."""
        T = self.args.sequence_length
        return self.tokens / (self.data_tokens // T * T)

    @property
    def moments(self):
        """Bytes of optimizer state: two numbers per parameter for AdamW, one for Muon's matrices."""
        blocks = sum(p.numel() for p in self.model.transformer.h.parameters() if p.dim() == 2)
        return 8 * self.N - 4 * blocks * (self.args.optimizer == "muon")

    def memory(self, device="cuda", sharded=False, micro_batch_size=None):
        """Peak memory of a rank in training, in bytes, by part, without the process itself.

        device: "cuda" (compiled, bf16) or "cpu" (not compiled, fp32). micro_batch_size: overrides the flag.
        """
        c, args = self.model.config, self.args
        tokens = (micro_batch_size or args.micro_batch_size) * args.sequence_length
        V, C = c.vocab_size, c.n_embd
        parts = self.gpus if sharded else 1
        kept = KEPT[device] * C * tokens * c.n_layer
        if args.checkpoint_activations:  # the input of each block, and one block at a time
            kept = 4 * C * tokens * c.n_layer + KEPT[device] * C * tokens
        logits = min(tokens * V, LOGITS_AT_ONCE[device]) * (4 if device == "cpu" else 6)  # fp32, and bf16
        memory = {"weights": 4 * self.N // parts, "gradients": 4 * self.N // parts,
                  "optimizer": self.moments // parts, "activations": kept, "logits": logits,
                  "gradient of the head": 4 * V * C}
        if device == "cuda":
            memory["weights in bf16"] = 2 * self.N // parts
        if sharded:
            block = sum(p.numel() for p in self.model.transformer.h[0].parameters())
            embeddings = self.N - c.n_layer * block
            memory["whole embeddings and two whole blocks"] = 4 * (embeddings + 2 * block)
        return memory

    def seconds(self, card, gpus):
        """The time of training alone: without evaluations, saves and waiting for other GPUs."""
        mfu = self.args.plan_mfu or RUNS[card][0]
        return self.tokens * self.flops_per_token / (gpus * PEAK_FLOPS[card] * mfu)

    @property
    def checkpoint_bytes(self):
        return 4 * self.N + self.moments


def make(args, config, gpus):
    """The Plan of a run. args: the flags of train_gpt2.py. config: its GPTConfig. gpus: number of ranks.

    Raises UserError for flags that leave the size of the model or of micro-batches open, and for a damaged
    manifest.
    """
    if args.init_from or args.micro_batch_size == "auto":
        flag = "--init_from" if args.init_from else "--micro_batch_size auto"
        raise UserError(f"--plan can't be used with {flag}: give the size by flags")
    manifest = shards.read_manifest(args.data_dir)
    if args.demo_data and not manifest:
        raise UserError(f"--plan: {args.data_dir} has no data yet; a run without --plan makes the demo's")
    listed = manifest["shards"] if manifest else ()
    tokens = sum(shard["tokens"] for shard in listed if shard["split"] == "train")
    return Plan(args, model_on_meta(args, config, manifest), gpus, tokens or NOMINAL_TOKENS, not tokens)


def model_on_meta(args, config, manifest):
    """The GPT of a GPTConfig, without values. Its vocabulary is the data's if --vocab_size is not given.

    manifest: of the data; None if there is none yet.
    """
    if manifest and not args.vocab_size:
        ids = manifest["num_tokens"]
        config = replace(config, num_tokens=ids, vocab_size=recipe.pad_vocabulary(ids))
    with torch.device("meta"), NoRandomWeights():
        return GPT(config)


def lines(plan):
    """The report, as lines."""
    args, gb = plan.args, lambda size: f"{size / 1e9:,.2f} GB"
    result = [
        f"model        {plan.N:,} parameters, {plan.flops_per_token / 1e9:.3f} GFLOPs per training token",
        f"data         {plan.data_tokens:,} training tokens" + (
            " (assumed: FineWeb-Edu's sample-10BT; there is no manifest yet)" if plan.is_nominal else ""),
        f"run          {args.max_steps:,} steps x {args.total_batch_size:,} tokens = {plan.tokens:,} tokens, "
        f"{epochs_text(plan.epochs)}, {plan.tokens * plan.flops_per_token:.2e} FLOPs",
        f"step         {args.total_batch_size:,} tokens = {count(args.micro_batch_size, 'sequence')} x "
        f"{args.sequence_length} tokens x {count(plan.micro_batches, 'micro-batch', 'es')}, on "
        f"{count(plan.gpus, 'GPU')}",
        f"disk         {gb(2 * plan.data_tokens)} of shards, {args.keep} checkpoints of "
        f"{gb(plan.checkpoint_bytes)}, best/ of {gb(4 * plan.N)}",
        "", f"Memory per GPU, in GB (bf16, compiled)        DDP{'':8}--shard on {count(plan.gpus, 'GPU')}"]
    whole, sharded = plan.memory(), plan.memory(sharded=True)
    for part in sharded:
        result.append(f"  {part:<40}{whole.get(part, 0) / 1e9:7.2f}{sharded[part] / 1e9:14.2f}")
    needed = sum((sharded if args.shard else whole).values())
    result.append(f"  {'total':<40}{sum(whole.values()) / 1e9:7.2f}{sum(sharded.values()) / 1e9:14.2f}")
    for card, size in CARDS.items():
        fits = [B for B in (2**i for i in range(12)) if recipe.divides(B, args, plan.gpus)
                and sum(plan.memory(sharded=args.shard, micro_batch_size=B).values()) < 0.93e9 * size]
        result.append(f"  {card + ',':<9} {size} GB: "
                      + (f"--micro_batch_size up to {max(fits)}" if fits else "does not fit"))
    result += ["", "Training time: FLOPs / (GPUs x peak x MFU), without evaluations and communication",
               f"  {'GPUs':<31}{'1':>8}{'8':>10}{'64':>10}   GPU-hours    price      cost"]
    for card in CARDS if args.plan_mfu else RUNS:
        mfu, price, source = RUNS.get(card, (None, None, None))
        hours = [plan.seconds(card, gpus) / 3600 for gpus in (1, 8, 64)]
        label = f"{card}, MFU {args.plan_mfu or mfu} ({'--plan_mfu' if args.plan_mfu else source})"
        cost = f"{f'${price:.2f}':>9}{f'${hours[0] * price:,.0f}':>10}" if price else ""
        result.append(f"  {label:<31}" + "".join(f"{each:6.1f} h  " for each in hours)
                      + f"{hours[0]:10,.1f}{cost}")
    result.append("  price: per GPU-hour, of llm.c's runs in 2024")
    return result + limits(plan) + warnings(plan, needed)


def limits(plan):
    """What limits 8, 64 and 512 GPUs, as lines; for an H100 at its assumed MFU."""
    args = plan.args
    result = ["", "On many H100s (512: an extrapolation). The exchange of gradients overlaps with the last "
              "backward pass", "  GPUs    compute   exchange  sequences        input    failure  save every"]
    save = plan.checkpoint_bytes / DISK
    for gpus in (8, 64, 512):
        compute = plan.seconds("H100", gpus) / args.max_steps
        exchange = 2 * (gpus - 1) / gpus * 4 * plan.N / (NVLINK if gpus <= 8 else NETWORK)
        sequences = args.total_batch_size / args.sequence_length / gpus
        if sequences < 1:
            break
        between = GPU_HOURS_PER_FAILURE * 3600 / gpus
        best = math.sqrt(2 * save * between)  # Young 1974, https://doi.org/10.1145/361147.361115
        rate = 2 * args.total_batch_size / compute / 1e6 * min(8, gpus) / gpus
        steps = max(1, round(best / max(compute, exchange)))
        result.append(f"  {gpus:4}  {1000 * compute:6.0f} ms  {1000 * exchange:6.0f} ms  {sequences:9.1f}  "
                      f"{rate:6.1f} MB/s  {between / 3600:7,.0f} h  {best / 60:4.0f} min"
                      + (f" = {steps:,} steps" if steps < args.max_steps else ": longer than the run"))
    return result + [
        "  compute, exchange: time per step; sequences: per step and GPU; input: per node of eight GPUs;",
        "  failure: mean time between failures; save every: the interval that loses least time, if",
        f"  a save takes {save:.1f} s. Assumed: {NVLINK / 1e9:.0f} GB/s per GPU within a node, "
        f"{NETWORK / 1e9:.0f} GB/s between nodes,",
        f"  {DISK / 1e9:g} GB/s to the disk, one failure in {GPU_HOURS_PER_FAILURE:,} GPU-hours (Llama 3)"]


def warnings(plan, needed):
    """What would go wrong, as lines. needed: bytes of memory per GPU."""
    args, found = plan.args, []
    if needed > 0.93e9 * max(CARDS.values()):
        found.append("no card here has enough memory: lower --micro_batch_size, or use "
                     "--checkpoint_activations, or --shard on more GPUs")
    if plan.epochs > 20:
        found.append(f"each token is read {plan.epochs:,.0f} times; one epoch is --max_steps "
                     f"{math.ceil(args.max_steps / plan.epochs)}")
    if args.warmup_steps >= args.max_steps:
        found.append(f"--warmup_steps {args.warmup_steps}: the whole run is warm-up")
    if args.total_batch_size // args.sequence_length < 64:
        found.append("64 GPUs can't be used: a step has only "
                     f"{args.total_batch_size // args.sequence_length} sequences")
    return [""] * bool(found) + [f"warning: {each}" for each in found]
