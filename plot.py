"""Draw the curves of runs: loss, HellaSwag, learning rate, gradient norm and speed, from their logs.

    python plot.py log                               # log/curves.png
    python plot.py log other_log --out both.svg      # two runs in one picture

Runs whose tokenizers differ are compared in bits per byte. Results published for OpenAI's models are drawn as
dashed lines if run.json shows that they apply. train_gpt2.py draws its own run at every evaluation.
"""

from pathlib import Path

from kit.flags import Parser, from_command_line


def parse_args(argv=None):
    parser = Parser(description="Draw the curves of runs.",
                    usage="python plot.py LOG_DIR [LOG_DIR ...] [--log_x] [--out FILE]")
    parser.add_argument("log_dirs", nargs="+", metavar="LOG_DIR", help="a run's log directory")
    parser.add_argument("--log_x", action="store_true", help="steps on a logarithmic axis")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="a .png with 200 dpi, or a .svg "
                             "(default: LOG_DIR/curves.png; for several runs, curves.png)")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = Path(args.log_dirs[0] if len(args.log_dirs) == 1 else ".", "curves.png")
    if args.out.suffix not in (".png", ".svg"):
        parser.error(f"argument --out: {args.out} must end in .png or .svg")
    return args


if __name__ == "__main__":
    args = from_command_line(parse_args)

from kit import curves
from kit.files import run_script


def main(args):
    curves.draw(args.log_dirs, args.out, args.log_x)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main, args)
