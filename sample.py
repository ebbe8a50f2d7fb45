"""Text from a GPT-2, streamed as it is generated.

    python sample.py                                   # the newest checkpoint of log/
    python sample.py -m gpt2 -p "Once upon a time" -n 3
    python sample.py -m log -p @prompt.txt --temperature 0

Without -p, on a terminal, it asks for prompts until an empty line. There, Ctrl-C stops a text, the arrow keys
bring earlier prompts back, and /temp 0.7, /top_k 50, /top_p 0.9, /tokens 200, /seed 1 change the settings.
"""

import argparse
import codecs
import contextlib
import sys
from pathlib import Path

from files import UserError, run

# what can be typed between two prompts: the setting it changes, and of what kind that is
COMMANDS = {"temp": ("temperature", float), "top_k": ("top_k", int), "top_p": ("top_p", float),
            "tokens": ("max_new_tokens", int)}
PROMPT = "Hello, I'm a language model,"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Continue a prompt with a GPT-2, published or your own.",
        usage="python sample.py [-m MODEL] [-p PROMPT|@FILE] [-n SAMPLES] [--flag value ...]",
    )
    parser.add_argument("-m", "--model_type", default="log",
                        help="a run's log directory (its newest checkpoint), one checkpoint, "
                             "gpt2, gpt2-medium, gpt2-large, gpt2-xl or a Hugging Face directory")
    parser.add_argument("-d", "--device", help="cuda, mps or cpu (found by itself)")
    parser.add_argument("-p", "--prompt", help='text, or @FILE; "" starts a new document')
    parser.add_argument("-n", "--num_samples", type=int, default=1, help="continuations of the prompt")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="it ends earlier at <|endoftext|>")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float,
                        help="draw from the likeliest tokens that together reach p only")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--int8", action="store_true",
                        help="weights in 8 bits: two to three times as fast on a CPU, at times another word")
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        parser.error("argument -n: must be at least 1")
    if not 0 <= args.seed < 2**63:
        parser.error("argument --seed: must lie between 0 and 2**63 - 1")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import torch  # noqa: E402

from checkpoint import load_model_and_tokenizer, pick_device  # noqa: E402
from model import check_sampling  # noqa: E402
from packed import pack  # noqa: E402


def encode_prompt(prompt, tokenizer):
    """Ids of a prompt, (1, T); <|endoftext|> in it means the token, and an empty prompt is one."""
    ids = tokenizer.encode(prompt, allowed_special="all") or [tokenizer.eot_token]
    return torch.tensor([ids])


def print_samples(model, tokenizer, prompt, num_samples, max_new_tokens, generator=None, **settings):
    """Print `num_samples` continuations of a prompt, up to <|endoftext|> each.

    They are generated as one batch; the first is printed token by token, the others once it is complete.
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
    """The prompt, or the text of the file that @FILE names."""
    if prompt is None or not prompt.startswith("@"):
        return prompt
    try:
        return Path(prompt[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"-p {prompt}: can't be read as text ({error})") from error


def typed_prompts(settings, generator):
    """The prompts that a person types, up to an empty line or Ctrl-D; /commands change the settings."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - makes input() know the arrow keys and a history
    print("a prompt, /help, or an empty line to leave")
    while True:
        try:
            line = input("prompt> ")
        except EOFError:
            return
        except KeyboardInterrupt:  # drops the line, as shells do
            print()
            continue
        if line in ("", "/quit", "/exit"):
            return
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            print(change(settings, generator, name, value.strip()))
        else:
            yield line


def change(settings, generator, name, value):
    """Do what a line like "/temp 0.7" says; return the answer, which tells a mistake, too."""
    try:
        if name == "seed":
            generator.manual_seed(int(value))
            return f"seed {value}: from here the same prompts bring the same texts again"
        setting, kind = COMMANDS[name]
        off = value == "off" and name in ("top_k", "top_p")
        changed = {**settings, setting: None if off else kind(value)}
        check_sampling(torch.zeros(1, 1), **changed)
        settings.update(changed)
    except KeyError:
        return ("/temp 0.7, /top_k 50 or off, /top_p 0.9 or off, /tokens 200, /seed 1; Ctrl-C stops a text, "
                "/quit or an empty line the session")
    except (ValueError, RuntimeError) as error:  # RuntimeError: a seed of more than 64 bits
        return f"/{name} {value}: {error}"
    return ", ".join(f"{setting} {value}" for setting, value in settings.items() if value is not None)


def main(args):
    settings = {setting: getattr(args, setting) for setting, _ in COMMANDS.values()}
    try:
        check_sampling(torch.zeros(1, 1), **settings)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    prompt = read_prompt(args.prompt)
    typed = prompt is None and sys.stdin.isatty()
    device = pick_device(args.device)
    if args.int8 and device != "cpu":
        raise UserError(f"--int8: its kernels run on the CPU, not on {device}; add -d cpu, or leave it out")
    model, tokenizer = load_model_and_tokenizer(args.model_type, device)
    if device == "cpu":
        pack(model, args.int8)
    generator = torch.Generator(device).manual_seed(args.seed)
    prompts = [PROMPT if prompt is None else prompt]
    for prompt in typed_prompts(settings, generator) if typed else prompts:
        tokens, block_size = encode_prompt(prompt, tokenizer).size(1), model.config.block_size
        if tokens > block_size:
            print(f"the prompt has {tokens} tokens, the model reads the last {block_size}", file=sys.stderr)
        try:
            print_samples(model, tokenizer, prompt, args.num_samples, generator=generator, **settings)
        except KeyboardInterrupt:
            if not typed:
                raise
            print()  # the text has ended, the program has not
        except ValueError as error:
            raise UserError(f"{args.model_type}: {error}") from error


if __name__ == "__main__":
    run(main, args)
