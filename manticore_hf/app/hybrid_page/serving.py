"""The page itself, in Gradio: nothing of it is fetched from elsewhere, and nothing is reported to anyone."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import drawing
from .reading import Hybrid, Reading

EXAMPLE = '''The old house stood at the end of the road, and nobody had lived in it for years.

def add(first, second):
    """Return the sum of two numbers."""
    return first + second
'''
MOST, LONGEST = 256, 100_000
"""Tokens that are written, and letters that are taken, at most."""
_CLICK = """element.addEventListener('click', event => {
  const token = event.target.closest('[data-place]');
  if (token) trigger('click', {place: Number(token.dataset.place)});
});"""


def build(hybrid: Hybrid, title: str) -> gr.Blocks:
    """The page for a hybrid.

    Args:
        hybrid: Hybrid.
        title: What it is called.
    """
    parts = " and ".join(f"{name} ({kind}, {drawing.short(size)} parameters)" for name, kind, size in hybrid.describe())
    first = _read(hybrid, EXAMPLE)
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f'<div class="hp"><h1>{drawing.shown(title)}</h1><p>A hybrid of {drawing.shown(parts)}.</p></div>')
        state = gr.State(first[0], time_to_live=3600)
        text = gr.Textbox(EXAMPLE, label="Text", lines=6, max_lines=14, max_length=LONGEST, elem_id="text")
        with gr.Row():
            read = gr.Button("Read", variant="primary", elem_id="read")
            write = gr.Button("Continue the text", elem_id="write")
        notice = gr.HTML("", elem_id="notice", visible=False)
        seen = gr.HTML(first[1], js_on_load=_CLICK, elem_id="seen")
        expected = gr.HTML(first[3], elem_id="expected")
        place = gr.Slider(1, first[2]["maximum"], value=first[2]["value"], step=1, label="Token", elem_id="place")
        bits = gr.HTML(first[4], elem_id="bits")
        with gr.Accordion("Every token in a table", open=False, elem_id="table"):
            table = gr.HTML(first[5])
        gr.HTML('<div class="hp"><h2>How each continues the text</h2></div>')
        with gr.Row():
            tokens = gr.Slider(1, MOST, value=40, step=1, label="Tokens", info="at most", elem_id="tokens")
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0: the most likely token")
            seed = gr.Number(0, label="Seed", info="for sampling", precision=0, minimum=0, maximum=2**31 - 1)
        written = gr.HTML(drawing.said("Nothing yet: press “Continue the text”."), elem_id="written")

        hidden = {"api_visibility": "private"}

        def on_read(value):
            try:
                reading, text_html, slider, *rest = _read(hybrid, value)
            except ValueError as err:
                return [gr.skip()] * 6 + [gr.HTML(_reason(err), visible=True)]
            return [reading, text_html, gr.Slider(**slider), *rest, gr.HTML("", visible=False)]

        def on_click(reading, event: gr.EventData):
            chosen = _place(reading, getattr(event, "place", None))
            return chosen + 1, *_at(reading, chosen)

        def on_place(reading, number):
            return _at(reading, _place(reading, number and number - 1))

        def on_write(value, count, heat, number):
            done = []
            yield drawing.said("Generating …")
            try:
                for one in hybrid.write(
                    _clean(value),
                    _within(count, 1, MOST),
                    min(max(float(heat or 0), 0.0), 2.0),
                    _within(number, 0, 2**31 - 1),
                ):
                    done.append(one)
                    yield drawing.continuations(done, hybrid.names)
            except ValueError as err:
                yield _reason(err)

        shows = [state, seen, place, expected, bits, table, notice]
        read.click(on_read, text, shows, **hidden)
        seen.click(on_click, state, [place, seen, expected], show_progress="hidden", **hidden)
        at_last = {"show_progress": "hidden", "trigger_mode": "always_last"}
        place.input(on_place, [state, place], [seen, expected], **at_last, **hidden)
        write.click(on_write, [text, tokens, temperature, seed], written, **hidden)
    return page


def _clean(text):
    """Text that has an encoding, and an end: whoever sends it need not use the page."""
    return str(text or "")[:LONGEST].encode("utf-8", "replace").decode("utf-8")


def _within(value, low, high):
    return min(max(int(value or 0), low), high)


def _place(reading, number):
    n = len(reading.pieces)
    return n if number is None else _within(number, 0, n)


def _reason(err):
    return drawing.said(" ".join(str(err).split())[:500])


def _read(hybrid, text):
    """(Reading, text, settings of the slider, what is expected, bits, table)."""
    found = hybrid.read(_clean(text))
    n = len(found.pieces)
    slider = {"minimum": 1, "maximum": n + 1, "value": n + 1}
    seen, expected = _at(found, n)
    return found, seen, slider, expected, drawing.bits_table(found), drawing.token_table(found)


def _at(found: Reading, place):
    return drawing.coloured_text(found, place), drawing.next_tokens(found, place)


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Serves a page, and nothing to the outside: no public link, no telemetry.

    Args:
        page: The page.
        host: Address to listen at; default: that of the environment (a Space sets it), else 127.0.0.1.
        port: Its port; default: the first free one from 7860.
        wait: Until the process is ended.

    Returns:
        Its address.
    """
    page.queue(default_concurrency_limit=1, max_size=32)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        state_session_capacity=200,
        theme=theme(),
        css=drawing.CSS,
        prevent_thread_lock=True,
    )
    print(f"Open {url} in a browser; press Ctrl-C to stop.", flush=True)
    if wait:
        page.block_thread()
    return url


def theme() -> gr.themes.Base:
    """Gradio's, with the fonts that the reader has."""
    return gr.themes.Default(
        font=["system-ui", "Segoe UI", "Roboto", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
    )


def serve_repository(repo_id: str, revision: str) -> None:
    """What a Space runs: the page for a hybrid on the Hub, with the repository's own code at a commit.

    Args:
        repo_id: The hybrid's repository.
        revision: Its commit.
    """
    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=revision, trust_remote_code=False)
    launch(build(Hybrid(model, tokenizer), repo_id))
