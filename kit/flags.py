"""Types for argparse, and config files of flags."""

import argparse
import math
import shlex
import sys


def integer(least=-(2**63), most=2**63 - 1):
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text):
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {value}")
        return value

    parse.__name__ = "int"  # argparse names it: invalid int value
    return parse


def number(least=-math.inf, most=1e100):
    """An argparse type: a number of at least `least` and less than `most`. Beyond 1e100, steps overflow."""

    def parse(text):
        value = float(text)
        if not least <= value < most:  # also for NaN
            raise argparse.ArgumentTypeError(f"must be at least {least:g} and less than {most:g}, not {text}")
        return value

    parse.__name__ = "float"
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it says something: not None, not False, and not where the help names it."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == ()
        return action.help if silent or "(default:" in action.help else super()._get_help_string(action)


def from_command_line(parse_args):
    """parse_args() of a script; from now on Ctrl-C, also during its imports, prints no traceback."""
    previous = sys.excepthook

    def hook(kind, *rest):
        if kind is not KeyboardInterrupt:
            previous(kind, *rest)

    sys.excepthook = hook
    return parse_args()


def parse_with_configs(parser, argv=None):
    """Parse flags and @config files, in which # begins a comment. Exits with status 2 on errors."""

    def split_line(line):
        if "\0" in line:  # no path or command line can hold one
            parser.error(f"config line {line!r} contains a zero byte")
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            parser.error(f"config line {line!r}: {error}")

    parser.fromfile_prefix_chars, parser.convert_arg_line_to_args = "@", split_line
    try:
        return parser.parse_args(argv)
    except UnicodeDecodeError as error:
        parser.error(f"a config file is not UTF-8 text: {error}")
    except RecursionError:
        parser.error("a config file includes itself with @")
