"""Runs of a known recipe, so that a new run of the same learns early whether it goes as it should.

A reference is the log directory of such a run, put under log/reference: its log.txt, of which the val curve
counts, and its run.json. That may say less than a run's own does, for what it leaves out may differ: of
"flags" only those of RECIPE count, and of "data_source" what is there, with the "tokenizer".
"""

import math
from pathlib import Path

from record import read_curves, read_record

REFERENCES = Path(__file__).parent / "log/reference"

# the flags that the loss depends on, but for the seed
RECIPE = (
    "init_from", "n_layer", "n_head", "n_embd", "vocab_size", "dropout", "bias", "total_batch_size",
    "sequence_length", "max_steps", "max_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip",
)

BAND = 0.03  # of the loss: why, `check` says
ABOVE = ("the learning rate or its warm-up, a wrong tokenizer or shuffled targets, fp16 that overflows, "
         "a broken attention mask or initialisation")
BELOW = "targets that the model sees, other data, a val split that was trained on"


def loss_at(step, steps, losses):
    """The loss of a curve at a step, None beyond its ends. Losses fall with the logarithm of the step."""
    for i in range(len(steps)):
        if steps[i] == step:
            return losses[i]
        if i and 0 < steps[i - 1] < step < steps[i]:
            way = math.log(step / steps[i - 1]) / math.log(steps[i] / steps[i - 1])
            return losses[i - 1] + way * (losses[i] - losses[i - 1])


def same_recipe(reference, run):
    """Whether a run is of a reference's recipe and data; both as `read_record` has them."""
    flags = {name: value for name, value in reference["flags"].items() if name in RECIPE}
    data = reference["data_source"]
    return (reference.get("tokenizer") == run.get("tokenizer") and data != {}
            and all(run["flags"].get(name) == value for name, value in flags.items())
            and all(run["data_source"].get(name) == value for name, value in data.items()))


def check(step, loss, log_dir, references=REFERENCES):
    """One sentence if the val loss of a run at a step has left the band of its references, else None.

    The band reaches from 3% below the lowest of them to 3% above the highest. Of four seeds of the demo three
    lay 0.2% apart at step 500 and 1.3% at step 1000, and the fourth, which ended badly, 6% above them. Other
    programs with the same recipe draw other random numbers and validate on other tokens. A loss inside the
    band proves little: the demo with a third of its learning rate stayed there (LOG.md).

    log_dir: the run's, whose run.json says what it is. Raises UserError for a record that can't be read.
    """
    run, losses = read_record(log_dir), {}
    for path in sorted(Path(references).glob("*/run.json")):
        if same_recipe(read_record(path.parent), run):
            losses[path.parent.name] = loss_at(step, *read_curves(path.parent).get("val", ((), ())))
    losses = {name: known for name, known in losses.items() if known is not None}
    if not losses:
        return None
    lowest, highest = min(losses.values()), max(losses.values())
    if not (loss < (1 - BAND) * lowest or loss > (1 + BAND) * highest):  # NaN is training's own to tell
        return None
    side, known, causes = ("above", highest, ABOVE) if loss > highest else ("below", lowest, BELOW)
    names = ", ".join(f"{name} {known:.4f}" for name, known in losses.items())
    return (f"step {step}: val loss {loss:.4f} is {abs(loss / known - 1):.1%} {side} what this recipe had "
            f"({names}). Usual causes: {causes}")
