"""The page of a comparison: one HTML file with every table and figure."""

from __future__ import annotations

import html
from collections.abc import Sequence

from charts import page as charts_page
from charts.drawing import Picture
from charts.page import Table, bullets, figure_element, link, section, table_element

from compare.outcome import Outcome


def page(
    outcome: Outcome,
    tables: Sequence[Table],
    points: Table,
    notes: Sequence[str],
    pictures: Sequence[Picture],
    files: dict[str, bytes],
) -> str:
    """The whole page. files: name -> content of what the reader may want to save from it."""
    links = ", ".join(link(name, content) for name, content in files.items())
    parts = [
        *map(section, tables),
        bullets(notes),
        *map(figure_element, pictures),
        f"<details><summary>{html.escape(points.title)}</summary>\n{table_element(points)}</details>",
        f"<p>As files: {links}</p>" if links else "",
    ]
    return charts_page.page(outcome.title or "A comparison of methods", parts, pictures)
