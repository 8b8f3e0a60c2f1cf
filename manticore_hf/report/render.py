"""The view through its templates: a self-contained HTML file, and Markdown.

In HTML everything is escaped (autoescape); only charts, whose texts are escaped where they are drawn, are markup. In
Markdown the environment of the cards escapes.
"""

from manticore_hf.report.facts import Facts
from manticore_hf.report.verdict import Verdict
from manticore_hf.report.view import make_view
from manticore_hf.utils.formatting import html_environment, markdown_environment


def render(facts: Facts, verdict: Verdict) -> tuple[str, str]:
    """(HTML, Markdown) of a report; `facts` as `gather` gives them, `verdict` as `decide` does."""
    view = make_view(facts, verdict)
    html = html_environment().get_template("report.html.jinja").render(view)
    return html, markdown_environment().get_template("report.md.jinja").render(view).rstrip() + "\n"
