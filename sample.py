"""Text from a GPT-2, streamed as it is generated.

    python sample.py                                   # the newest run among log*
    python sample.py -m gpt2 -p "Once upon a time" -n 3
    python sample.py -m log -p @prompt.txt --temperature 0
    echo "Once upon a time" | python sample.py

Without -p, on a terminal, it asks for prompts. There, /help lists the commands that change the settings,
Ctrl-C stops a text, and the arrow keys recall earlier prompts.
"""

import argparse
import codecs
import contextlib
import importlib
import sys
import threading
from pathlib import Path

from kit.flags import MODEL, Parser, from_command_line, integer, number

# the commands of a session: the setting that each changes, and its type
COMMANDS = {"temp": ("temperature", number(0, float("inf"))), "top_k": ("top_k", integer()),
            "top_p": ("top_p", number()), "tokens": ("max_new_tokens", integer()),
            "n": ("num_samples", integer())}
HELP = """/temp 0.7    temperature; 0 always takes the most likely token
/top_k 50    draw only from the 50 most likely tokens; /top_k off
/top_p 0.9   draw only from the most likely tokens that have probability 0.9 together; /top_p off
/tokens 200  length of a text
/n 3         number of texts
/seed 1      the same prompts give the same texts again
Ctrl-C stops a text; exit, quit or Ctrl-D leaves"""
PROMPT = "Hello, I'm a language model,"
PATIENCE = 1  # seconds to wait for standard input before a hint is printed


def parse_args(argv=None):
    parser = Parser(
        description="Continue a prompt with a GPT-2, published or your own.",
        usage="python sample.py [-m MODEL] [-p PROMPT|@FILE] [-n N] [--flag value ...]",
        aliases={"--model_type": "--model"},
    )
    add = parser.add_argument_group("model and prompt").add_argument
    add("-m", "--model", help=f"{MODEL} (default: the newest run among log*)")
    add("-d", "--device", help="cuda, mps or cpu (default: auto-detected)")
    add("--int8", action="store_true",
        help="8-bit weights: two to four times as fast on a CPU; some tokens differ")
    add("-p", "--prompt", help='text to continue, or @FILE; "" starts a new document (default: asked for on '
                               "a terminal, else read from standard input)")
    add = parser.add_argument_group("sampling").add_argument
    add("-n", "--num_samples", type=integer(1), default=1,
        help="continuations of the prompt; the first is streamed, the others follow")
    add("--max_new_tokens", type=integer(0), default=128,
        help="longest continuation; it may end earlier, at <|endoftext|>")
    add("--temperature", type=number(0, float("inf")), default=0.8,
        help="0 always takes the most likely token")
    add("--top_k", type=integer(1), help="draw only from the N most likely tokens (default: from all)")
    add("--top_p", type=number(),
        help="draw only from the most likely tokens that together have probability X (default: from all)")
    add("--seed", type=integer(0), default=1337, help="random seed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = from_command_line(parse_args)

import torch

from checkpoint import load_model_and_tokenizer, newest_run, read_meta, resolve
from kit.device import pick_device
from kit.files import UserError, run_script
from kit.packed import pack
from model import check_sampling
from tokenizer import encode_text


def encode_prompt(prompt, tokenizer):
    """Ids of a prompt, (1, T). <|endoftext|> in it means the special token; an empty prompt becomes one."""
    ids = encode_text(prompt, tokenizer, special=True) or [tokenizer.eot_token]
    return torch.tensor([ids])


def print_samples(model, tokenizer, prompt, num_samples, max_new_tokens, generator=None, **settings):
    """Print `num_samples` continuations of a prompt, each up to <|endoftext|>.

    They are generated as one batch: the first is printed token by token, then the others.
    settings: temperature, top_k, top_p as for GPT.stream.
    """
    device = model.transformer.wte.weight.device
    idx = encode_prompt(prompt, tokenizer).repeat(num_samples, 1).to(device)  # (B, T)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens
    rows, ended = [], False
    print(prompt, end="", flush=True)
    for new in model.stream(idx, max_new_tokens, generator=generator, **settings):
        rows.append(new)
        if not ended:
            ended = new[0].item() == tokenizer.eot_token
            piece = b"" if ended else tokenizer.decode_single_token_bytes(new[0].item())
            print(utf8.decode(piece), end="", flush=True)
        if ended and num_samples == 1:
            break
    print(utf8.decode(b"", final=True))
    for row in torch.cat(rows, dim=1)[1:].tolist() if rows else []:
        end = row.index(tokenizer.eot_token) if tokenizer.eot_token in row else len(row)
        print("-" * 40, prompt + tokenizer.decode(row[:end]), sep="\n", flush=True)


def read_prompt(prompt):
    """The prompt, or the text of the file that @FILE names; without a prompt, what is piped into the script.

    The newline with which editors and `echo` end a text is not part of it.
    """
    hint = "waiting for a prompt on standard input, until end of file; or use -p TEXT"
    timer = threading.Timer(PATIENCE, print, [hint], dict(file=sys.stderr, flush=True))
    try:
        if prompt is None:
            timer.start()
            return sys.stdin.read().removesuffix("\n") or PROMPT
        if prompt.startswith("@"):
            return Path(prompt[1:]).read_text(encoding="utf-8-sig").removesuffix("\n")
        return prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"-p {prompt or 'from a pipe'} can't be read as text ({error})") from error
    finally:
        timer.cancel()


def typed_prompts(name, settings, generator):
    """Yield the prompts that the user types, until exit, quit or Ctrl-D. /commands change the settings.

    name: the model's, printed first.
    """
    with contextlib.suppress(ImportError):  # missing on Windows
        importlib.import_module("readline")  # gives input() arrow keys and a history
    print(f"{name}: type a prompt, /help or exit")
    while True:
        try:
            line = input("prompt> ")
        except EOFError:
            return
        except KeyboardInterrupt:  # discards the line, as in a shell
            print()
            continue
        command = line.strip()
        if command in ("exit", "quit", "/exit", "/quit"):
            return
        if command.startswith("/"):
            print(change(settings, generator, *command[1:].partition(" ")[::2]))
        elif line:
            yield line


def change(settings, generator, name, value):
    """Execute a command such as "/temp 0.7"; return the answer or the error as text."""
    if name not in (*COMMANDS, "seed"):
        return HELP if name == "help" else f"/{name}: unknown; /help lists the commands"
    if not value.strip():
        return f"/{name} needs a value:\n{next(line for line in HELP.splitlines() if f'/{name} ' in line)}"
    try:
        if name == "seed":
            generator.manual_seed(integer()(value))
            return f"seed {value}"
        setting, kind = COMMANDS[name]
        off = value.strip() == "off" and name in ("top_k", "top_p")
        changed = {**settings, setting: None if off else kind(value)}
        check_settings(**changed)
        settings.update(changed)
    except (ValueError, argparse.ArgumentTypeError) as error:
        return f"/{name} {value}: {error}"
    return ", ".join(f"{setting} {value}" for setting, value in settings.items() if value is not None)


def check_settings(num_samples, **settings):
    """Raise ValueError for invalid settings."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    check_sampling(torch.zeros(1, 1), **settings)


def main(args):
    settings = {setting: getattr(args, setting) for setting, _ in COMMANDS.values()}
    try:
        check_settings(**settings)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    typed = args.prompt is None and sys.stdin.isatty()
    text = None if typed else read_prompt(args.prompt)
    device = pick_device(args.device)
    if args.int8 and device != "cpu":
        raise UserError(f"--int8 runs on the CPU only, not on {device}: add -d cpu, or leave out --int8")
    source = resolve(args.model or newest_run())
    model, tokenizer = load_model_and_tokenizer(source, device)
    if device == "cpu":
        pack(model, args.int8)
    generator = torch.Generator(device).manual_seed(args.seed)
    name = str(source)
    if isinstance(source, Path):  # a run's checkpoint
        name += f", step {read_meta(source, digests=False)['step']:,}"
    for prompt in typed_prompts(name, settings, generator) if typed else [text]:
        tokens, block_size = encode_prompt(prompt, tokenizer).size(1), model.config.block_size
        if tokens > block_size:
            print(f"the prompt has {tokens} tokens: the model reads the last {block_size}", file=sys.stderr)
        try:
            print_samples(model, tokenizer, prompt, generator=generator, **settings)
        except KeyboardInterrupt:
            if not typed:
                raise
            print()  # ends the text, not the session
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error


if __name__ == "__main__":
    run_script(main, args)
