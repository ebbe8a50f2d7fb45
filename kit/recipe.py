"""The flags that decide what a run computes, in one table.

From it come the flags of train_gpt2.py, GPTConfig's arguments, the identity of a run (what --resume must find
unchanged), --allow_change, the recipe by which reference runs are matched, and the model card.
"""

import argparse
import math
from dataclasses import dataclass

from kit.files import UserError
from kit.flags import integer, number


@dataclass(frozen=True)
class Setting:
    """One flag of the table."""

    name: str
    default: object
    help: str
    section: str  # "batch", "optimizer", "model", "model variants", "training variants" or "validation"
    least: float | None = None  # the smallest value allowed, and the largest
    most: float | None = None
    choices: tuple | None = None
    changeable: bool = False  # --allow_change lets a resumed run change it
    recipe: bool = True  # a reference run must have the same value


SETTINGS = (
    Setting("total_batch_size", 524288, "tokens per optimizer step, over all ranks", "batch", 1),
    Setting("sequence_length", 1024, "tokens per sequence", "batch", 1),
    Setting("max_steps", 19073, "optimizer steps; the default reads 10B tokens", "optimizer", 1,
            changeable=True),
    Setting("max_lr", 6e-4, "peak learning rate, after the warm-up", "optimizer", 0, changeable=True),
    Setting("min_lr", 6e-5, "learning rate at the end", "optimizer", 0, changeable=True),
    Setting("warmup_steps", 715, "steps of linear warm-up; the default covers 375M tokens, as in GPT-3",
            "optimizer", 0, changeable=True),
    Setting("weight_decay", 0.1, "weight decay of matrices and embeddings", "optimizer", 0, changeable=True),
    Setting("grad_clip", 1.0, "largest gradient norm; 0 disables clipping", "optimizer", 0, changeable=True),
    Setting("dropout", 0.0, "probability of dropping an activation", "optimizer"),
    Setting("seed", 1337, "random seed for weights, data order, dropout and samples", "optimizer", 0,
            recipe=False),
    Setting("n_layer", 12, "transformer blocks", "model"),
    Setting("n_head", 12, "attention heads per block", "model"),
    Setting("n_embd", 768, "width of the residual stream", "model"),
    Setting("vocab_size", None, "rows of the embedding (default: the tokenizer's ids, padded to a multiple "
            "of 128: 50304 for GPT-2's)", "model"),
    Setting("block_size", None, "longest context of the model (default: --sequence_length)", "model",
            1, recipe=False),
    Setting("bias", True, "biases in linear layers and LayerNorms", "model"),
    # GPTConfig checks the names of parts: a new one in kit/variants.py needs no change here
    Setting("mlp", "gelu", "activation of the MLP: gelu, swiglu, relu2 or your own", "model variants"),
    Setting("norm", "layernorm", "layernorm or rmsnorm", "model variants"),
    Setting("position", "learned", "positions: learned, or rope (rotary)", "model variants"),
    Setting("qk_norm", False, "normalize queries and keys", "model variants"),
    Setting("tie_embeddings", True, "share the embedding and output matrix", "model variants"),
    Setting("logit_softcap", 0.0, "soft-cap logits to +-X, by tanh; 0: off", "model variants", 0),
    Setting("value_residual", False, "mix the first layer's values into those of later layers",
            "model variants"),
    Setting("embedding_norm", False, "a norm after the embedding", "model variants"),
    Setting("x0_shortcut", False, "mix the embedded tokens into the input of each block", "model variants"),
    Setting("zero_init", False, "initialize residual projections and an untied head to 0",
            "model variants"),
    Setting("schedule", "cosine", "cosine, or wsd: constant, then linear decay to min_lr",
            "training variants", changeable=True, choices=("cosine", "wsd")),
    Setting("decay_fraction", 0.4, "fraction of the steps over which wsd decays; 1: linear decay throughout",
            "training variants", 0.001, 1, changeable=True),
    Setting("optimizer", "adamw", "adamw, or muon for the blocks' matrices and AdamW for the rest",
            "training variants", choices=("adamw", "muon")),
    Setting("beta1", 0.9, "AdamW: decay rate of the mean of gradients", "training variants", 0, 0.99999,
            changeable=True),
    Setting("beta2", 0.95, "AdamW: decay rate of the mean of squared gradients", "training variants", 0,
            0.99999, changeable=True),
    Setting("muon_momentum", 0.95, "Muon's momentum", "training variants", 0, 0.99999, changeable=True),
    Setting("muon_scale", 0.2, "root mean square of Muon's updates / learning rate", "training variants", 0,
            changeable=True),
    Setting("val_tokens", 10485760, "tokens of the val split that the validation loss reads", "validation", 1,
            recipe=False),
    Setting("val_start", 0, "tokens to skip at the start of the val split", "validation", 0,
            recipe=False),
)

IDENTITY = tuple(setting.name for setting in SETTINGS)
CHANGEABLE = tuple(setting.name for setting in SETTINGS if setting.changeable)
SHAPE = tuple(setting.name for setting in SETTINGS
              if setting.section in ("model", "model variants"))  # dropout is not part of it
# choices beyond GPT-2's recipe. The default is GPT-2's choice, also for records without the setting
MODEL_VARIANTS = tuple(setting.name for setting in SETTINGS if setting.section == "model variants")
VARIANTS = {setting.name: setting.default for setting in SETTINGS if setting.section.endswith("variants")}
RECIPE = ("init_from", *(setting.name for setting in SETTINGS if setting.recipe))
TRAINING = tuple(setting.name for setting in SETTINGS if setting.section in ("batch", "optimizer"))


def identity_of(flags):
    """The identity of a run, from its flags (a dict). A flag that is missing has its default."""
    return {setting.name: flags.get(setting.name, setting.default) for setting in SETTINGS}


def add_flags(parser, **defaults):
    """Add the flags of the table to a parser, a group for each section. defaults: override the table."""
    for section in dict.fromkeys(setting.section for setting in SETTINGS):
        group = parser.add_argument_group(section)
        for setting in (setting for setting in SETTINGS if setting.section == section):
            if isinstance(setting.default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(setting.default, str):
                kind = dict(choices=setting.choices)
            else:
                limits = dict(least=setting.least, most=setting.most)
                make_type = number if isinstance(setting.default, float) else integer
                kind = dict(type=make_type(**{name: x for name, x in limits.items() if x is not None}))
            kind = dict(default=setting.default, help=setting.help) | kind | defaults
            group.add_argument(f"--{setting.name}", **kind)


def pad_vocabulary(num_tokens):
    """The rows of the embedding for a tokenizer's number of ids: padded, for faster matmuls on GPUs."""
    return math.ceil(num_tokens / 128) * 128


def count_micro_batches(args, world_size):
    """Micro-batches of an optimizer step, over all ranks. Raises UserError if the batch can't be divided."""
    B, total = 1 if args.micro_batch_size == "auto" else args.micro_batch_size, args.total_batch_size
    if not divides(B, args, world_size):
        tokens_per_pass = B * args.sequence_length * world_size
        remedies = [f"--micro_batch_size {b}" for b in range(B - 1, 0, -1)
                    if divides(b, args, world_size)][:1]
        remedies += [f"--total_batch_size {n * tokens_per_pass}"
                     for n in (total // tokens_per_pass, total // tokens_per_pass + 1) if n > 0]
        raise UserError(
            f"--total_batch_size {total} can't be divided into micro-batches of {B} x {args.sequence_length} "
            "tokens (micro_batch_size x sequence_length)"
            + (f", with {'the same number' if args.shard else 'at least one'} for each of {world_size} ranks"
               if world_size > 1 else "")
            + "; use " + " or ".join(remedies))
    return total // (B * args.sequence_length)


def divides(B, args, world_size):
    """Whether the total batch is a whole number of micro-batches of B sequences that suits all ranks.

    Each rank needs at least one; the ranks of a sharded model need equally many.
    """
    count, remainder = divmod(args.total_batch_size, B * args.sequence_length)
    return not remainder and count >= world_size and not (args.shard and count % world_size)


def check_identity(before, now, allowed, log_dir):
    """Compare the identity of a resumed run with its checkpoint's; return the allowed changes, as texts.

    allowed: the flags that --allow_change names. Raises UserError if anything else has changed.
    """
    before = {**identity_of(before), **before}
    changes = {key: f"{key} {before.get(key)!r} -> {value!r}" for key, value in now.items()
               if before.get(key) != value}
    if "data" in changes:  # two digests would say nothing
        changes["data"] = "the data: the shards are not those of the checkpoint"
    if changes.keys() - set(allowed):
        remedy = "use another --log_dir"
        if changes.keys() <= set(CHANGEABLE):
            remedy = f"--allow_change {' '.join(changes)} overrides this check"
        elif "data" in changes:
            remedy = f"to train its model on other data, use --init_from {log_dir} and another --log_dir"
        raise UserError(f"--resume would change the run in {log_dir}: {', '.join(changes.values())}; "
                        + remedy)
    return list(changes.values())
