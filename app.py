"""A web page to try a GPT-2: it continues a prompt, and shows each token's probability and alternatives.

    python app.py                       # the newest run among log*
    python app.py -m log_demo --port 7861

It needs `pip install "gradio>=6.24,<7"`. Without --host, only this machine can open the page. It runs
unchanged as a Hugging Face Space, which starts it without flags.
"""

import codecs
import contextlib
import importlib
import math
import os
import socket
import time
from bisect import bisect
from html import escape
from pathlib import Path

from kit.flags import MODEL, Parser, from_command_line, integer

PAUSE = 0.05  # seconds between two updates of a page
ALTERNATIVES = 6  # most likely tokens to show for each position
LEVELS = (0.01, 0.1, 0.5, 0.9)  # probabilities at which the colour changes
EXAMPLES = ("Hello, I'm a language model,", "Return the", "Once upon a time", "The capital of France is")

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.6rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
#head p, .legend, .note { font-size: .9rem; margin: 0; opacity: .75; }
#text { position: relative; font-size: 1.05rem; line-height: 1.75; }
.text { min-height: 7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 600; }
.level0 { background: rgb(234 88 12 / .42); }
.level1 { background: rgb(234 88 12 / .18); }
.level2 { background: rgb(128 128 128 / .12); }
.level3 { background: rgb(37 99 235 / .14); }
.level4 { background: rgb(37 99 235 / .34); }
.token { border-radius: 3px; cursor: pointer; }
.token:hover, .token:focus { outline: 2px solid var(--body-text-color); }
.token::before { content: attr(data-mark); opacity: .5; }
.list { position: absolute; z-index: 9; max-width: 100%; margin-top: .3rem; padding: .4rem;
        border: 1px solid var(--border-color-primary); border-radius: 6px; box-shadow: 0 4px 14px #0003;
        background: var(--background-fill-primary); font: .85rem/1.6 ui-monospace, Consolas, monospace;
        white-space: pre; pointer-events: none; }
.list div { padding-right: .5rem; overflow: hidden; text-overflow: ellipsis;
            background: linear-gradient(rgb(128 128 128 / .25) 0 0) 0 / var(--share) no-repeat; }
.legend { margin-bottom: 1rem !important; }
.legend span { padding: .1rem .4rem; border-radius: 3px; white-space: nowrap; }
"""

LEGEND = '<p class="legend">Probability of each token: ' + " ".join(
    f'<span class="level{level}">{name}</span>'
    for level, name in enumerate(("under 1%", "1 to 10%", "10 to 50%", "50 to 90%", "over 90%"))
) + "<br>Before temperature, top-k and top-p. Point at a token, or tap it, to see its alternatives.</p>"

# lists the alternatives to the token that is pointed at or focused, below it and inside the text's edges
JS = """
const list = document.createElement("div");
list.className = "list";
list.hidden = true;
list.setAttribute("aria-live", "polite");
element.after(list);
for (const type of ["mouseover", "mouseleave", "focusin", "focusout"])
  element.addEventListener(type, () => {
    const token = element.querySelector(".token:hover") ?? element.querySelector(".token:focus");
    list.hidden = !token;
    if (!token) return;
    list.replaceChildren(...token.dataset.list.split("\\n").map(text => {
      const row = document.createElement("div");
      row.textContent = text;
      row.style.setProperty("--share", parseFloat(text) + "%");
      return row;
    }));
    const right = list.offsetParent.clientWidth - list.offsetWidth;
    list.style.left = Math.max(0, Math.min(token.offsetLeft, right)) + "px";
    list.style.top = token.offsetTop + token.offsetHeight + "px";
  });
"""


def parse_args(argv=None):
    parser = Parser(
        description="A web page that continues prompts with a GPT-2, published or your own.",
        usage="python app.py [-m MODEL] [-d DEVICE] [--host NAME] [--port N]",
        aliases={"--model_type": "--model"},
    )
    parser.add_argument("-m", "--model",
                        help=f"{MODEL} (default: the newest run among log*; in a Hugging Face Space without "
                             "any, gpt2)")
    parser.add_argument("-d", "--device", help="cuda, mps or cpu (default: auto-detected)")
    parser.add_argument("--host", metavar="NAME", help="0.0.0.0 lets other machines open the page "
                                                       "(default: GRADIO_SERVER_NAME, or 127.0.0.1)")
    parser.add_argument("--port", type=integer(1, 65535),
                        help="port of the page (default: GRADIO_SERVER_PORT, or the first free from 7860)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = from_command_line(parse_args)
    print("loading PyTorch", flush=True)  # the imports take seconds

import torch

from checkpoint import load_model_and_tokenizer, newest_run, read_meta, resolve
from kit.device import pick_device
from kit.files import UserError, run_script
from kit.packed import pack
from sample import encode_prompt


def token_html(tokenizer, token, text, probs):
    """A token as HTML, coloured by its probability. data-list holds the most likely ones, one per line.

    text: the characters that it completes; empty if it ends within one. probs: of all tokens, (V,).
    """
    top = probs.topk(min(ALTERNATIVES, len(probs)))
    shown = dict(zip(top.indices.tolist(), top.values.tolist()))
    shown.setdefault(token, probs[token].item())  # last, if it is not among the most likely
    rows = []
    for other, prob in shown.items():
        piece = tokenizer.decode_single_token_bytes(other)
        with contextlib.suppress(UnicodeDecodeError):  # a part of a character is shown as bytes
            piece = piece.decode()
        rows.append(f"{prob:7.2%} {'>' if other == token else ' '} {piece!r}")
    level, alternatives = bisect(LEVELS, shown[token]), "\n".join(rows)
    # a token without a visible character needs something to point at
    mark = "<|endoftext|>" if token == tokenizer.eot_token else "·" if not text else "↵" * (text == "\n")
    return (f'<span class="token level{level}" tabindex="0" data-mark="{escape(mark)}" '
            f'data-list="{escape(alternatives)}">{escape(text)}</span>')


def write(model, tokenizer, prompt, temperature, top_k, top_p, max_new_tokens, seed):
    """Yield the prompt and its growing continuation as HTML, at most every PAUSE seconds.

    top_k 0 and top_p 1 keep all tokens. Ends at <|endoftext|>. Raises UserError for a missing prompt or an
    invalid seed, ValueError as GPT.stream.
    """
    if not prompt:
        raise UserError("The prompt is empty: type a few words for the model to continue.")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError("The seed must be a whole number from 0 to 2**63 - 1.")
    device = model.transformer.wte.weight.device
    idx = encode_prompt(prompt, tokenizer).to(device)  # (1, T)
    html, tokens, block_size = "", idx.size(1), model.config.block_size
    if tokens > block_size:
        html = f'<p class="note">The prompt has {tokens} tokens: the model reads the last {block_size}.</p>'
    html += f'<span class="prompt">{escape(prompt)}</span>'
    generator = torch.Generator(device).manual_seed(seed)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens
    shown = -math.inf  # not 0: time.monotonic() may count from boot
    for new, logits in model.stream(idx, max_new_tokens, temperature, top_k or None, top_p, generator,
                                    with_logits=True):
        token = new.item()
        ended = token == tokenizer.eot_token
        text = utf8.decode(b"" if ended else tokenizer.decode_single_token_bytes(token))
        html += token_html(tokenizer, token, text, logits[0].softmax(dim=-1))
        if ended:
            break
        if time.monotonic() - shown > PAUSE:
            yield html
            shown = time.monotonic()
    yield html + escape(utf8.decode(b"", final=True))


def serve(model, tokenizer, name, facts, **settings):
    """Build and serve the page of a model, headed by its name and facts; return it without waiting.

    settings: of gradio's `launch`.
    """
    import gradio as gr

    def respond(*values):
        try:
            yield from write(model, tokenizer, *values)
        except ValueError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{escape(name)}</h1><p>{escape(facts)}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=3, max_lines=12)
                gr.Examples(list(EXAMPLES), prompt, label="Examples", cache_examples=False)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120)
                # the legend is above the text, where no list of alternatives covers it
                text = gr.HTML(html_template=LEGEND + '<div class="text">${value}</div>', js_on_load=JS,
                               elem_id="text", container=True, padding=True, apply_default_css=False)
            with gr.Column(scale=1, min_width=240):
                inputs = [
                    prompt,
                    gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: the most likely token"),
                    gr.Slider(0, 200, 0, step=1, precision=0, label="Top-k", info="0: all tokens"),
                    gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all tokens"),
                    gr.Slider(1, 512, 128, step=1, precision=0, label="New tokens"),
                    gr.Number(1337, precision=0, label="Seed", info="same seed, same text"),
                ]
        # a few visitors at once, because each needs a KV cache; others wait
        writing = gr.on([start.click, prompt.submit], respond, inputs, text, show_progress="hidden",
                        concurrency_limit=4, api_name="generate")
        stop.click(None, cancels=writing)
    theme = gr.themes.Default(primary_hue="blue", font=gr.themes.Font("system-ui"))  # downloads no font
    # quiet: without gradio's advice to make the page public
    page.launch(theme=theme, css=CSS, footer_links=["gradio"], run_history=False, quiet=True,
                prevent_thread_lock=True, **settings)
    return page


def main(args):
    device = pick_device(args.device)
    try:
        source = args.model or newest_run()
    except UserError:
        if "SPACE_ID" not in os.environ:
            raise
        source = "gpt2"  # a Space starts the script without flags, and may have no run
    source = resolve(source)
    host, port = args.host or "127.0.0.1", args.port or 0
    try:  # gradio itself would retry for minutes
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: the page can't be served there ({error})") from error
    print("loading gradio", flush=True)
    try:
        importlib.import_module("gradio")
    except ImportError:
        raise UserError("the page needs gradio, which is not installed: "
                        "pip install 'gradio>=6.24,<7'") from None
    print(f"loading {source}", flush=True)
    model, tokenizer = load_model_and_tokenizer(source, device)
    name = Path(source).name
    facts = f"{model.num_params():,} parameters, a context of {model.config.block_size:,} tokens"
    if isinstance(source, Path):  # a run's checkpoint
        name = source.resolve().parent.name
        facts += f", step {read_meta(source, digests=False)['step']:,}"
    if device == "cpu":
        pack(model)
    page = serve(model, tokenizer, name, facts, server_name=args.host, server_port=args.port)
    print(f"open {page.local_url} in a browser; Ctrl-C stops the server", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, args)
