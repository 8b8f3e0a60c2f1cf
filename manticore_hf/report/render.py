"""The view through its templates: a self-contained HTML file, and Markdown.

In HTML everything is escaped (autoescape); only charts, whose texts are escaped where they are drawn, are markup. In
Markdown the environment of the cards escapes.
"""

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from manticore_hf.report.facts import Facts
from manticore_hf.report.verdict import Verdict
from manticore_hf.report.view import make_view
from manticore_hf.utils.formatting import markdown_environment


def render(facts: Facts, verdict: Verdict) -> tuple[str, str]:
    """(HTML, Markdown) of a report; `facts` as `gather` gives them, `verdict` as `decide` does."""
    view = make_view(facts, verdict)
    folder = files("manticore_hf.hub_cards")
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    html = environment.get_template("report.html.jinja").render(view)
    return html, markdown_environment().get_template("report.md.jinja").render(view).rstrip() + "\n"
