"""Types for argparse, and config files of flags."""

import argparse
import difflib
import math
import shlex
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"


def integer(least=-(2**63), most=2**63 - 1):
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {value}")
        return value

    parse.__name__ = "int"  # for the help
    return parse


def integer_or_auto(least=1):
    """An argparse type: "auto", or a whole number of at least `least`."""
    parse = integer(least)
    return lambda text: text if text == "auto" else parse(text)


def number(least=-math.inf, most=1e100):
    """An argparse type: a number from `least` to `most`. Beyond 1e100, an optimizer step overflows."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if not least <= value <= most:  # also for NaN
            limit = f"at most {most:g}" if value > most else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return value

    parse.__name__ = "float"
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default unless it is None, empty or False, or the help names it."""

    def _get_help_string(self, action):
        if action.default is True:
            return f"{action.help} (default: on)"
        silent = action.default in (None, (), []) or action.default is False  # a 0 is shown
        return action.help if silent or "(default:" in action.help else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", None)
        return {"int": "N", "float": "X"}.get(kind) or super()._get_default_metavar_for_optional(action)


# what -m names
MODEL = ("a run's log directory (its newest checkpoint), one checkpoint, gpt2, gpt2-medium, gpt2-large, "
         "gpt2-xl, another GPT-2 of the Hugging Face hub, a Hugging Face directory, or a .pt file of nanoGPT "
         "or build-nanogpt")
# flags of other programs: the flags here with the same meaning, whose names difflib would not find
ELSEWHERE = {
    "batch_size": ("micro_batch_size", "total_batch_size"), "learning_rate": ("max_lr",), "lr": ("max_lr",),
    "block_size": ("sequence_length",), "max_iters": ("max_steps",), "epochs": ("max_steps",),
    "num_iterations": ("max_steps",), "out_dir": ("log_dir",), "output_dir": ("log_dir",),
    "eval_interval": ("val_every",), "dataset": ("data_dir",), "num_tokens": ("max_new_tokens",),
    "start": ("prompt",), "wandb_log": ("track",), "wandb": ("track",), "model_type": ("init_from",),
    "eval_iters": ("val_tokens",), "lr_decay_iters": ("max_steps",), "num_epochs": ("max_steps",),
    "gradient_accumulation_steps": ("total_batch_size",), "context_length": ("sequence_length",),
    "greedy": ("temperature",), "text": ("input", "prompt"), "cpu": ("device",),
}


class Parser(argparse.ArgumentParser):
    """An argparse parser that accepts hyphens for underscores and suggests what an unknown flag may mean.

    aliases: other names of flags, {"--old_name": "--name"}. They work, but --help does not show them.
    """

    def __init__(self, *args, aliases=None, **kwargs):
        self.aliases = aliases or {}
        prog = f"python {Path(sys.argv[0]).name}"
        # an abbreviation would be taken for whatever flag it happens to begin
        defaults = dict(formatter_class=HelpFormatter, prog=prog, allow_abbrev=False)
        super().__init__(*args, **(defaults | kwargs))

    def parse_known_args(self, args=None, namespace=None):
        """Parse words; unlike argparse's own method, exit with an error for an unknown one."""
        words = [self.spelled(word) for word in (sys.argv[1:] if args is None else args)]
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self.suggestion(unknown[0])}")
        return namespace, []

    def spelled(self, word):
        """A flag as this parser spells it, with hyphens or underscores: --max_steps=3 for --max-steps=3."""
        flag, equals, value = word.partition("=")
        flags = {known.replace("-", "_"): known for known in self._option_string_actions}
        flags |= {alias.replace("-", "_"): known for alias, known in self.aliases.items()}
        return flags.get(flag.replace("-", "_"), flag) + equals + value

    def error(self, message):
        # argparse's words for a value given to a switch, as in --compile=False
        super().error(message.replace("ignored explicit argument", "takes no value, but got"))

    def suggestion(self, word):
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        known = {flag.lstrip("-"): flag for flag in self._option_string_actions}
        if word in ("True", "False"):
            return ": a flag that turns something on takes no value; --no-FLAG turns it off"
        if self.fromfile_prefix_chars and name == "config":
            return ": a config needs an @, as in @configs/demo.txt"
        if not word.startswith("-"):  # a value without its flag
            if self.fromfile_prefix_chars and word.endswith(".txt"):
                return f": a config needs an @, as in @{word}"
            for flag in ("--model", "--input"):
                if word and Path(word).exists() and flag in self._option_string_actions:
                    return f": did you mean {flag} {word}?"
        near = [other for other in ELSEWHERE.get(name, ()) if other in known]
        near = near or [other for other in known if name and other.startswith(name)][:2]
        near = near or difflib.get_close_matches(name, known, 2, 0.7)
        if near:
            return f": did you mean {' or '.join(known[other] for other in near)}?"
        return f"; see {self.prog} --help"


def as_flags(values):
    """{name: value} as words of a command line."""
    words = []
    for name, value in values.items():
        switch = [f"--{name}" if value else f"--no-{name}"]
        words += switch if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def bfloat16_on_this_cpu(cpuinfo="/proc/cpuinfo"):
    """What bfloat16 brings on this processor, for a help text. docs/benchmarks.md has the measurements."""
    try:
        features = Path(cpuinfo).read_text().split()
    except OSError:  # not Linux
        return "on CPUs with AMX or AVX-512 BF16 bfloat16 is faster"
    if "amx_bf16" in features:
        return "this CPU has AMX: bfloat16 trains a 124M 2.1 to 2.7 times as fast as float32"
    if "avx512_bf16" in features:
        return "this CPU has AVX-512 BF16: bfloat16 trains a 124M 1.6 to 1.7 times as fast as float32"
    return "this CPU has neither AMX nor AVX-512 BF16: it emulates bfloat16"


def from_command_line(parse_args):
    """Return parse_args(). From now on Ctrl-C prints no traceback, even during the script's imports."""
    previous = sys.excepthook

    def hook(kind, *rest):
        if kind is not KeyboardInterrupt:
            previous(kind, *rest)

    sys.excepthook = hook
    return parse_args()


def parse_with_configs(parser, argv=None):
    """Parse flags and @config files, in which # begins a comment. Flags override configs.

    Exits with status 2 on errors.
    """
    argv = sys.argv[1:] if argv is None else argv
    configs = [word for word in argv if word.startswith("@")]
    here = Path.cwd()
    known = {path.stem: f"@{path.relative_to(here) if path.is_relative_to(here) else path}"
             for path in sorted(CONFIGS.glob("*.txt"))}
    for flag, word in zip(argv, argv[1:]):
        action = parser._option_string_actions.get(parser.spelled(flag))
        if word.startswith("@") and action and action.nargs is None:
            parser.error(f"argument {flag}: a value that begins with @ is written {flag}={word}")
    for config in configs:
        if configs.count(config) > 1:
            parser.error(f"{config} is given twice")
        if not Path(config[1:]).is_file():
            near = difflib.get_close_matches(Path(config).stem, known, 1)
            parser.error(f"no config {config}" + (f": did you mean {known[near[0]]}?" if near else
                                                  f"; there are {', '.join(known.values())}"))

    def split_line(line):
        if "\0" in line:  # no path or command line can hold one
            parser.error(f"config line {line!r} contains a zero byte")
        try:
            # a byte order mark may stand at the beginning of a file
            return [parser.spelled(word) for word in shlex.split(line.removeprefix("\ufeff"), comments=True)]
        except ValueError as error:
            parser.error(f"config line {line!r}: {error}")

    parser.fromfile_prefix_chars, parser.convert_arg_line_to_args = "@", split_line
    try:
        return parser.parse_args([*configs, *(word for word in argv if word not in configs)])
    except UnicodeDecodeError as error:
        parser.error(f"a config file is not UTF-8 text: {error}")
    except RecursionError:
        parser.error("a config file includes itself with @")
