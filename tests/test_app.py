"""app.py: the HTML that it writes; and with -m browser, its page in a headless Chromium.

    pip install gradio playwright && python -m pytest -m browser               # with the system's Chromium
    APP_SCREENSHOT=assets/app.png python -m pytest -m browser -k screenshot    # of log_modern_demo/
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest
import torch
from runs import ROOT, assert_refused, run_here, run_script, wait_for_line

import app
import checkpoint
from kit.files import UserError
from sample import encode_prompt

SETTINGS = dict(temperature=0.8, top_k=0, top_p=1, max_new_tokens=20, seed=1337)


@pytest.fixture(scope="module")
def loaded(small_run):
    """A model and its tokenizer. The model never draws <|endoftext|>, the last id, so no text ends early."""
    model, tokenizer = checkpoint.load_model_and_tokenizer(small_run)
    model.config.num_tokens = tokenizer.eot_token
    return model, tokenizer


def write(loaded, prompt="The", **settings):
    return app.write(*loaded, prompt, **{**SETTINGS, **settings})


def last(html_so_far):
    *_, html = html_so_far
    return html


def tokens_of(html):
    """The tokens in the HTML: the level of the colour, mark, text and list (percent, drawn, name) of each."""
    token = re.compile(r'<span class="token level(\d)" tabindex="0" data-mark="(.*?)" data-list="(.*?)">'
                       r'(.*?)</span>', re.DOTALL)
    row = re.compile(r" *([\d.]+)% ([> ]) (.*)")
    return [SimpleNamespace(level=int(level), mark=unescape(mark), text=unescape(text), list=[
        (float(percent), drawn == ">", name) for percent, drawn, name in row.findall(unescape(rows))
    ]) for level, mark, rows, text in token.findall(html)]


def fake(tokenizer, ids):
    """A stand-in for a model: it writes these ids, and all 512 ids are equally likely."""
    model = SimpleNamespace(transformer=SimpleNamespace(wte=torch.nn.Embedding(1, 1)), drawn=0,
                            config=SimpleNamespace(block_size=32))

    def stream(*args, **kwargs):
        for token in ids:
            model.drawn += 1
            yield torch.tensor([[token]]), torch.zeros(1, 512)

    model.stream = stream
    return model, tokenizer


def test_the_text_depends_on_the_seed_and_only_grows(loaded, monkeypatch):
    monkeypatch.setattr(app, "PAUSE", 0)
    shown = list(write(loaded))
    assert shown == list(write(loaded)) and shown[-1] != last(write(loaded, seed=2))
    assert all(new.startswith(old) for old, new in zip(shown, shown[1:]))
    assert len(tokens_of(shown[0])) == 1 and len(tokens_of(shown[-1])) == 20 <= len(shown)
    monkeypatch.setattr(app, "PAUSE", time.monotonic() / 2)  # shorter than the time since the machine started
    assert list(write(loaded)) == [shown[0], shown[-1]]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(temperature=0), dict(temperature=1.5, top_k=9, top_p=0.9)])
def test_the_probabilities_are_those_of_a_plain_forward_pass(loaded, settings):
    model, idx = loaded[0], encode_prompt("The", loaded[1])
    sampling = {"temperature": 0.8, "top_k": None, "top_p": None, **settings}
    ids = model.generate(idx, 25, generator=torch.Generator().manual_seed(1337), **sampling)
    shown = tokens_of(last(write(loaded, max_new_tokens=25, **settings)))
    assert len(shown) == 25
    for position, token in enumerate(shown, start=idx.size(1)):
        probs = model(ids[:, :position])[0][0, -1, :511].softmax(dim=0)
        prob, likeliest = probs[ids[0, position]].item(), probs.topk(app.ALTERNATIVES).values.tolist()
        percents = [percent for percent, _, _ in token.list]
        assert percents[: app.ALTERNATIVES] == pytest.approx([100 * p for p in likeliest], abs=0.006)
        assert [p for p, drawn, _ in token.list if drawn] == pytest.approx([100 * prob], abs=0.006)
        assert len(percents) == app.ALTERNATIVES + (prob < likeliest[-1]) and sum(percents) <= 100.1
        assert token.level == sum(prob >= edge for edge in app.LEVELS)


def test_the_model_runs_once_a_token(loaded, calls_of):
    calls = calls_of(loaded[0], "features")
    last(write(loaded))
    assert len(calls) == 20


def test_a_stopped_text_computes_no_further_token(learned):
    tokenizer = checkpoint.get_tokenizer(learned)
    loaded = fake(tokenizer, [65] * 100)
    text = write(loaded)
    next(text)
    text.close()
    assert loaded[0].drawn == 1


def test_characters_of_several_tokens_are_whole_and_the_text_ends(learned):
    tokenizer = checkpoint.get_tokenizer(learned)
    ids = tokenizer.encode("é🙂\n<b>&")
    loaded = fake(tokenizer, [*ids, tokenizer.eot_token, *ids])
    shown = tokens_of(last(write(loaded)))
    assert loaded[0].drawn == len(ids) + 1 and "".join(token.text for token in shown) == "é🙂\n<b>&"
    assert [token.mark for token in shown if token.text == ""] == ["·"] * 4 + ["<|endoftext|>"]
    assert [token.mark for token in shown if token.text == "\n"] == ["↵"]
    assert [name for _, drawn, name in shown[2].list if drawn] == [repr("🙂".encode()[:1])]
    assert last(write(fake(tokenizer, tokenizer.encode("é")[:1]))).endswith("\ufffd")  # incomplete


def test_html_in_a_prompt_or_a_text_is_escaped(loaded):
    prompt = "<b>&amp; <script>alert(1)</script> ${1 + 1} {{value}} <|endoftext|>"
    html = last(write(loaded, prompt))
    assert "<b>&amp; " not in html and "<script" not in html
    assert unescape(re.search('<span class="prompt">(.*?)</span>', html)[1]) == prompt
    html = last(write(fake(loaded[1], loaded[1].encode("<i>&amp;"))))
    assert ">&lt;</span>" in html and ">&amp;</span>" in html
    assert "".join(token.text for token in tokens_of(html)) == "<i>&amp;"


@pytest.mark.parametrize("values, words", [
    (dict(prompt=""), "prompt"), (dict(prompt=None), "prompt"), (dict(seed=None), "seed"),
    (dict(seed=-1), "seed"), (dict(seed=2**63), "seed"), (dict(seed="x"), "seed"),
    (dict(temperature=-1), "temperature"), (dict(top_p=2), "top_p"),
])
def test_a_bad_value_raises_an_error_with_its_name(loaded, values, words):
    with pytest.raises(ValueError, match=words):
        last(write(loaded, **values))


def test_a_prompt_beyond_the_context_is_cut_and_that_is_said(loaded):
    assert "the model reads the last 32." in last(write(loaded, "word " * 100))
    assert "the model reads" not in last(write(loaded, "word"))


def test_without_gradio_it_names_the_command(tmp_path, small_run):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    process = run_script("app.py", "-m", small_run, check=False, env={"PYTHONPATH": str(tmp_path)})
    assert_refused(process, "pip install 'gradio>=6.24,<7'")


def test_it_says_what_it_loads_before_it_does(tmp_path, small_run, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    process = run_script("app.py", "-m", small_run, check=False, env={"PYTHONPATH": str(tmp_path)})
    assert process.stdout == "loading PyTorch\n" and process.stderr == "torch is imported\n"

    gradio = MagicMock()
    gradio.Blocks().__enter__().local_url = "http://127.0.0.1:7860/"
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    process = run_here(app, "-m", small_run)
    assert process.stdout.splitlines() == [
        "loading gradio", f"loading {small_run / 'ckpt_000003'}",
        "open http://127.0.0.1:7860/ in a browser; Ctrl-C stops the server"]
    assert gradio.Blocks().__enter__().launch.call_args.kwargs["quiet"]  # no advice to make it public
    gradio.Blocks().__enter__().block_thread.assert_called_once()


def test_a_space_takes_the_newest_run_or_else_gpt2(tmp_path, small_run, monkeypatch):
    def load(source, device):
        raise UserError(f"loaded {source}")

    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    monkeypatch.setattr(app, "load_model_and_tokenizer", load)
    monkeypatch.chdir(tmp_path)
    assert_refused(run_here(app), "no run found in log")
    monkeypatch.setenv("SPACE_ID", "someone/gpt2")
    assert_refused(run_here(app), "loaded gpt2")
    shutil.copytree(small_run, tmp_path / "log")
    assert run_here(app).stderr.endswith("error: loaded log/ckpt_000003\n")


@pytest.mark.parametrize("flags, words", [
    (["-m", "./nowhere"], ["./nowhere does not exist"]),
    (["--port", "65536"], ["--port"]), (["-d", "tpu"], ["--device", "tpu"]),
])
def test_a_wrong_value_of_a_flag_is_refused(flags, words):
    assert_refused(run_here(app, *flags), *words)


def test_an_address_that_can_not_be_had_is_one_line(small_run):
    command = ["app.py", "-m", small_run]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert_refused(run_script(*command, "--port", port, check=False), f"--port {port}")
    assert_refused(run_script(*command, "--host", "192.0.2.1", check=False), "--host 192.0.2.1")


# the page in a browser: python -m pytest -m browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = [path for name in ("chromium", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no chromium or google-chrome on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(loaded):
    """The page of a model that takes 20 ms a token: its url, and the texts that are being computed."""
    pytest.importorskip("gradio", reason="pip install gradio")
    model, tokenizer = loaded
    running = set()

    def stream(*args, **kwargs):
        running.add(text := object())
        try:
            for pair in model.stream(*args, **kwargs):
                time.sleep(0.02)
                yield pair
        finally:
            running.remove(text)

    slow = SimpleNamespace(stream=stream, transformer=model.transformer, config=model.config)
    page = app.serve(slow, tokenizer, "a <small> GPT", "of the tests")
    yield SimpleNamespace(url=page.local_url, running=running)
    page.close(verbose=False)


@pytest.fixture
def visitor(browser, served):
    """Open the page as one more visitor; no request may leave this machine, no script may fail."""
    contexts, hosts, errors = [], set(), []

    def visit(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on("websocket", lambda websocket: hosts.add(urlsplit(websocket.url).hostname))
        page.on("pageerror", lambda error: errors.append(error))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.goto(served.url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert hosts == {"127.0.0.1"} and not errors
    until(lambda: not served.running)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def generate(page, prompt="The", **numbers):
    page.get_by_label("Prompt").fill(prompt)
    for label, value in numbers.items():
        field = page.get_by_label(re.compile(f"^(number input for )?{label.replace('_', ' ')}", re.I)).first
        field.fill(str(value))
        field.blur()
    page.get_by_role("button", name="Generate").click()


def shown_text(page):
    """The prompt and its continuation."""
    return page.locator(".text").evaluate("""element => {
        const copy = element.cloneNode(true);
        copy.querySelector(".note")?.remove();
        return copy.textContent;
    }""")


def text_of(loaded, prompt="The", **settings):
    text = unescape(re.sub("<.*?>", "", last(write(loaded, prompt, **settings)), flags=re.DOTALL))
    return text.replace("\r", "\n").replace("\0", "")  # as a browser reads them


@pytest.mark.browser
def test_browser_tokens_stream_in_and_show_their_probabilities(visitor, loaded, served):
    page = visitor()
    until(lambda: page.title() == page.locator("h1").inner_text() == "a <small> GPT")
    generate(page, New_tokens=60)
    tokens, counts = page.locator(".token"), set()
    until(lambda: counts.add(tokens.count()) or 60 in counts)
    assert len(counts) > 10 and shown_text(page) == text_of(loaded, max_new_tokens=60)
    expected = tokens_of(last(write(loaded, max_new_tokens=60)))[30].list
    legend = page.locator(".legend").bounding_box()
    for token in (tokens.first, tokens.last):
        token.hover()
        assert page.locator(".list:visible").bounding_box()["y"] > legend["y"] + legend["height"]
    for show in (tokens.nth(30).hover, tokens.nth(30).focus):
        page.locator("h1").click()  # away from the tokens
        assert page.locator(".list:visible").count() == 0
        show()
        rows = re.findall(r" *([\d.]+)% ([> ]) (.*)", page.locator(".list").inner_text())
        assert [(float(percent), drawn == ">", name) for percent, drawn, name in rows] == expected


@pytest.mark.browser
def test_browser_stop_ends_the_computation(visitor, served):
    page = visitor()
    generate(page, New_tokens=512)
    until(lambda: page.locator(".token").count() > 5)
    page.get_by_role("button", name="Stop").click()
    until(lambda: not served.running, seconds=3)
    time.sleep(0.3)
    count = page.locator(".token").count()
    time.sleep(0.3)
    assert page.locator(".token").count() == count < 500
    generate(page, New_tokens=3)  # the page still works
    until(lambda: page.locator(".token").count() == 3)


@pytest.mark.browser
def test_browser_a_visitor_who_leaves_ends_the_computation(visitor, served):
    page = visitor()
    generate(page, New_tokens=512)
    until(lambda: page.locator(".token").count() > 5)
    page.context.close()
    until(lambda: not served.running, seconds=3)


@pytest.mark.browser
def test_browser_two_visitors_at_once(visitor, loaded, served):
    first, second = visitor(), visitor()
    generate(first, "The", New_tokens=150, Seed=1)
    generate(second, "A", New_tokens=150, Seed=2)
    until(lambda: first.locator(".token").count() > 5 and second.locator(".token").count() > 5)
    assert len(served.running) == 2  # neither waits for the other
    for page, prompt, seed in ((first, "The", 1), (second, "A", 2)):
        until(lambda page=page: page.locator(".token").count() == 150)
        assert shown_text(page) == text_of(loaded, prompt, max_new_tokens=150, seed=seed)


@pytest.mark.browser
@pytest.mark.parametrize("values, words", [
    (dict(prompt=""), "The prompt is empty"), (dict(Seed=""), "The seed must be"),
    (dict(Seed=-5), "The seed must be"),
])
def test_browser_bad_values_are_told_on_the_page(visitor, capfd, values, words):
    page = visitor()
    generate(page, **values)
    page.get_by_text(words).wait_for()
    assert page.locator(".token").count() == 0
    page.locator(".toast-close").first.click()
    generate(page, New_tokens=2, Seed=1)
    until(lambda: page.locator(".token").count() == 2)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.browser
def test_browser_html_in_the_prompt_is_text_and_a_long_one_is_cut(visitor):
    page = visitor()
    prompt = 2 * "<b>b</b> &amp; <img src=x onerror=alert(1)> <script>alert(1)</script> ${alert(1)} {{value}}"
    generate(page, prompt, New_tokens=3)
    until(lambda: page.locator(".token").count() == 3)
    assert shown_text(page).startswith(prompt) and page.locator("#text img, #text .prompt b").count() == 0
    assert page.get_by_text("the model reads the last 32").count() == 1


@pytest.mark.browser
def test_browser_a_phone_scrolls_in_one_direction(visitor):
    page = visitor(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    generate(page, "W" * 300, New_tokens=100)
    until(lambda: page.locator(".token").count() == 100)
    for token in page.locator(".token").all()[::7]:
        token.tap()
        box = page.locator(".list:visible").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.browser
def test_browser_a_long_text_stays_quick(visitor, served):
    page = visitor()
    generate(page, New_tokens=512)
    until(lambda: page.locator(".token").count() > 400, seconds=60)
    until(lambda: not served.running)
    until(lambda: page.locator(".token").count() == 512, seconds=2)  # it shows what comes, at once


@contextlib.contextmanager
def started(*flags, cwd=ROOT, **env):
    """Start app.py on a free port; yield the port."""
    pytest.importorskip("gradio", reason="pip install gradio")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1", **env}
    process = subprocess.Popen([sys.executable, ROOT / "app.py", *flags], cwd=cwd, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for_line(process, f":{port}")
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.browser
def test_browser_a_space_starts_it_without_flags(browser, small_run):
    """As Hugging Face does: the run lies in log/, the address in the environment."""
    space = dict(SYSTEM="spaces", SPACE_ID="someone/gpt2", GRADIO_SERVER_NAME="0.0.0.0")
    with started(cwd=small_run.parent, **space) as port, browser.new_page() as page:
        page.goto(f"http://127.0.0.2:{port}")  # beyond the one address that it answers by itself
        page.get_by_text("step 3").wait_for()


@pytest.mark.browser
def test_browser_screenshot(browser):
    if "APP_SCREENSHOT" not in os.environ:
        pytest.skip("APP_SCREENSHOT names no file to write")
    size = dict(width=1100, height=860)
    with started("-m", "log_modern_demo") as port, browser.new_page(viewport=size) as page:
        page.goto(f"http://127.0.0.1:{port}")
        generate(page, "Return the", Temperature=0.5, Seed=6)
        time.sleep(5)  # until it has written enough
        page.locator(".token").nth(page.locator(".token").count() // 5).hover()
        Path(os.environ["APP_SCREENSHOT"]).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=os.environ["APP_SCREENSHOT"])
