"""What was found out about a text, as HTML. Whatever is not written here passes through `shown`."""

import html
import math
from collections.abc import Sequence

from .reading import Reading, Written

COLOURS = ("#0072b2", "#d97b00", "#009e73", "#b8478f", "#c23b22", "#5a5aa8")
"""Of the components, in their order; told apart also by who does not see all colours, and by their underlines."""
LINES = ("solid", "dashed", "dotted", "double", "wavy", "solid")

CSS = """
.hp{font-size:.95rem;line-height:1.5;overflow-wrap:anywhere}
.hp p{margin:.4rem 0}
.hp h2{margin:.6rem 0 .4rem}
.hp-text{white-space:pre-wrap;line-height:2.1;font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;
 font-size:.9rem;border:1px solid var(--border-color-primary,#ccc);border-radius:.5rem;padding:.5rem .8rem;
 max-height:28rem;overflow-y:auto}
.hp-t{cursor:pointer;border-radius:.2rem;text-underline-offset:.3em}
.hp-t:hover,.hp-t.hp-on{outline:2px solid currentColor}
.hp-n{opacity:.55}
.hp-key{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.4rem 0 .6rem;padding:0;list-style:none}
.hp-key li{margin:0}
.hp-key .hp-t{cursor:default;padding:0 .35rem}
.hp-wide{overflow-x:auto}
.hp-cards+.hp-wide{margin-top:.8rem}
.hp table{border-collapse:collapse;width:100%;margin:.3rem 0;font-variant-numeric:tabular-nums}
.hp table,.hp tr{border-width:0!important}
.hp th,.hp td{padding:.2rem .6rem .2rem .2rem!important;text-align:left;vertical-align:top;overflow-wrap:normal;
 border-width:0 0 1px!important;border-color:var(--border-color-primary,#ddd)!important}
.hp tr:last-child>td{border-bottom-width:0!important}
.hp td code{overflow-wrap:anywhere}
.hp td.hp-r,.hp th.hp-r{text-align:right;white-space:nowrap}
.hp code{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;font-size:.88em}
.hp-cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16rem,100%),1fr));gap:.8rem}
.hp-card{border:1px solid var(--border-color-primary,#ccc);border-radius:.5rem;padding:.5rem .8rem}
.hp-narrow{grid-template-columns:repeat(auto-fit,minmax(min(11rem,100%),1fr))}
.hp-card h4{margin:.1rem 0 .4rem}
.hp-bar{position:relative;z-index:0}
.hp-bar::before{content:"";position:absolute;z-index:-1;inset:2px auto 2px 0;width:var(--w);border-radius:.2rem;
 background:color-mix(in srgb,var(--c,#777) 28%,transparent)}
.hp-is{font-weight:700}
.hp-note{opacity:.8}
.hp-out{white-space:pre-wrap;font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.88rem}
""" + "\n".join(
    f".hp-{k}{{--c:{colour};text-decoration:underline 2px {line} {colour};"
    "background:color-mix(in srgb,var(--c) var(--a,35%),transparent)}"
    for k, (colour, line) in enumerate(zip(COLOURS, LINES))
)


def shown(text: object, keep: str = "\n\t") -> str:
    """A text of whoever's as HTML that shows it and does nothing else.

    What would turn the reading order, or is invisible, is written out. Braces, dollars and backticks are entities, too:
    Gradio fills in templates in which they mean something.
    """
    plain = "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))
    return "".join(f"&#{ord(c)};" if c in "{}$`\\" else c for c in html.escape(plain, quote=True))


def token_name(text: str) -> str:
    """A token in a table: white space is visible."""
    return shown(text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥"))


def percent(value: float) -> str:
    """A probability or weight: three digits where it is small."""
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}" if value >= 0.001 else "<0.1%"


def place_class(weights: Sequence[float]) -> tuple[str, str]:
    """(class, style) of a token: the colour of the component with most weight, stronger the more it has."""
    top = max(range(len(weights)), key=weights.__getitem__)
    even = 1 / len(weights)
    if len(weights) < 2 or weights[top] - min(weights) < 0.01:
        return "", ""
    strength = (weights[top] - even) / (1 - even)
    return f"hp-{top % len(COLOURS)}", f"--a:{8 + 47 * strength:.0f}%"


def coloured_text(found: Reading, place: int | None = None) -> str:
    """The text, each token coloured by which component had the weight, with a legend; `place` is marked."""
    tokens = "".join(_token(found, i, place) for i in range(len(found.pieces)))
    return (
        f'<div class="hp"><h2>Which component had the most weight</h2>{_notes(found)}{legend(found)}'
        '<div class="hp-text" id="hp-text" role="group" aria-label="The text, coloured by component">'
        f"{tokens}</div></div>"
    )


def _token(found, i, place):
    css, style = place_class(found.weights[i])
    piece = found.pieces[i]
    said = ", ".join(f"{shown(name)} {percent(w)}" for name, w in zip(found.names, found.weights[i]))
    inner = shown(piece).replace("\n", '<span class="hp-n">↵</span>\n') if piece else '<span class="hp-n">·</span>'
    on = " hp-on" if i == place else ""
    return (
        f'<span class="hp-t {css}{on}" style="{style}" data-place="{i}" title="token {i + 1}: {said}; '
        f'{percent(found.chances["hybrid"][i])} expected">{inner}</span>'
    )


def legend(found: Reading) -> str:
    """Which colour and line stands for which component, with its mean weight in this text."""
    n = len(found.weights)
    means = [sum(row[k] for row in found.weights) / n for k in range(len(found.names))]
    items = "".join(
        f'<li><span class="hp-t hp-{k % len(COLOURS)}">{shown(name)}</span> {percent(mean)} of the weight</li>'
        for k, (name, mean) in enumerate(zip(found.names, means))
    )
    if len(found.names) < 2:
        said = "The only component has all the weight."
    elif found.per_token:
        said = "The stronger the colour, the more weight; uncoloured tokens have equal weights."
    else:
        said = "This hybrid's weights are the same for every token."
    blocks = ""
    if len(found.blocks) > 1:
        rows = "".join(
            f"<tr><td>block {s + 1}</td>" + "".join(f'<td class="hp-r">{percent(w)}</td>' for w in row) + "</tr>"
            for s, row in enumerate(found.blocks)
        )
        heads = "".join(f'<th class="hp-r">{shown(name)}</th>' for name in found.names)
        what = " (the last one without what depends on the token)" if found.per_token else ""
        blocks = (
            f"<details><summary>Weights of the {len(found.blocks)} blocks{what}</summary><div class='hp-wide'><table>"
            f"<tr><th></th>{heads}</tr>{rows}</table></div></details>"
        )
    return f'<ul class="hp-key">{items}</ul><p class="hp-note">{said}</p>{blocks}'


def _notes(found):
    return "".join(f'<p class="hp-note">{shown(note)}</p>' for note in found.notes)


def next_tokens(found: Reading, place: int) -> str:
    """What the hybrid and each component expected at a place, side by side, with probabilities."""
    n = len(found.pieces)
    place = min(max(place, 0), n)
    before = "".join(found.pieces[:place])[-60:]
    what = "after the text" if place == n else f"at token {place + 1}"
    here = "" if place == n else f", which is <code>{token_name(found.pieces[place] or found.labels[place])}</code>"
    weights = ", ".join(f"{shown(name)} {percent(w)}" for name, w in zip(found.names, found.weights[place]))
    columns = []
    for name, likely in found.likely.items():
        colour = f"--c:{_colour(found, name)}"
        real = None if place == n else found.chances[name][place]
        rows = "".join(
            f'<tr><td class="hp-bar" style="{colour};--w:{100 * chance:.1f}%"><code>{token_name(token)}</code></td>'
            f'<td class="hp-r">{percent(chance)}</td></tr>'
            for token, chance in likely[place]
        )
        if real is not None:
            rows += f'<tr class="hp-is"><td>actual token</td><td class="hp-r">{percent(real)}</td></tr>'
        columns.append(f'<div class="hp-card"><h4>{shown(name)}</h4><table>{rows}</table></div>')
    return (
        '<div class="hp"><h2>What was expected</h2><p class="hp-note">Choose a token in the text above, or its number '
        "below; the last number stands for what follows the text.</p>"
        f"<p>Expected <b>{what}</b>{here}. Weights here: {weights}.</p>"
        f'<p class="hp-note">… <code>{token_name(before)}</code></p>'
        f'<div class="hp-cards hp-narrow" id="hp-next">{"".join(columns)}</div></div>'
    )


def _colour(found, name):
    return COLOURS[found.names.index(name) % len(COLOURS)] if name in found.names else "#777777"


def token_table(found: Reading) -> str:
    """Every token with its weights and how expected it was: what the colours say, in numbers."""
    models = list(found.likely)
    heads = "".join(f'<th class="hp-r">weight of {shown(name)}</th>' for name in found.names)
    heads += "".join(f'<th class="hp-r">expected by {shown(name)}</th>' for name in models)
    rows = []
    for i, piece in enumerate(found.pieces):
        cells = [percent(w) for w in found.weights[i]] + [percent(found.chances[name][i]) for name in models]
        rows.append(
            f'<tr><td class="hp-r">{i + 1}</td><td><code>{token_name(piece or found.labels[i])}</code></td>'
            + "".join(f'<td class="hp-r">{one}</td>' for one in cells)
            + "</tr>"
        )
    return (
        f'<div class="hp hp-wide"><table id="hp-table"><tr><th></th><th>token</th>{heads}</tr>{"".join(rows)}'
        "</table></div>"
    )


def bits_table(found: Reading) -> str:
    """How well each model predicts the whole text."""
    order = sorted(found.bits, key=lambda name: (math.isnan(found.bits[name]), found.bits[name]))
    rows = "".join(
        f'<tr><td>{shown(name)}</td><td class="hp-r">'
        + ("text too long" if math.isnan(found.bits[name]) else f"{found.bits[name]:.3f}")
        + "</td></tr>"
        for name in order
    )
    return (
        '<div class="hp"><h2>How well each predicts the whole text</h2><table id="hp-bits"><tr><th>model</th>'
        '<th class="hp-r">bits per byte</th></tr>'
        f'{rows}</table><p class="hp-note">Fewer is better. A single text says little: '
        "<code>manticore-hf report</code> measures many.</p></div>"
    )


def continuations(written: Sequence[Written], names: Sequence[str]) -> str:
    """What each model wrote, side by side, and what that took."""
    cards = "".join(
        f'<div class="hp-card"><h4>{shown(one.model)}</h4><div class="hp-out"><span class="hp-n">'
        f"{'… ' if one.prompt else ''}{shown(one.prompt[-40:])}</span><b>{shown(one.text)}</b></div></div>"
        for one in written
    )
    rows = "".join(
        f'<tr><td>{shown(one.model)}</td><td class="hp-r">{short(one.parameters)}</td>'
        f'<td class="hp-r">{milliseconds(one.per_token)}</td><td class="hp-r">{milliseconds(one.first)}</td>'
        f'<td class="hp-r">{one.tokens}</td></tr>'
        for one in written
    )
    heads = "".join(
        f'<th class="hp-r">{head}</th>'
        for head in ("parameters used", "time per token", "time to first token", "tokens generated")
    )
    return (
        f'<div class="hp"><div class="hp-cards" id="hp-written">{cards}</div><div class="hp-wide">'
        f'<table id="hp-costs"><tr><th>model</th>{heads}</tr>{rows}</table></div>'
        '<p class="hp-note">Measured once on this machine, one model after the other.</p></div>'
    )


def said(message: str) -> str:
    """A sentence in the place of a result."""
    return f'<div class="hp"><p><b>{shown(message)}</b></p></div>'


def milliseconds(seconds: float | None) -> str:
    """A time as a table has it."""
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.0995 else f"{1e3 * seconds:,.0f} ms"


def short(number: float) -> str:
    """A count of parameters in three digits: 1234567 -> "1.23 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
