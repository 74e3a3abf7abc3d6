"""One HTML file with tables and figures, which asks nothing of any server.

The figures are matplotlib's own, as SVG. A small script finds the nearest point under the pointer, says what it is, and
shows its arm in all figures; without it the page is as complete as the PNG files.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from charts.drawing import Picture

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1a1a1a; --soft: #555; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --back: #191919; --text: #e6e6e6; --soft: #aaa; --line: #444; }
  figure svg { filter: invert(.9) hue-rotate(180deg); } /* black on white becomes white on the page's black */
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1400px; padding: 0 1.5em;
       background: var(--back); color: var(--text); }
table { border-collapse: collapse; font-size: 13px; }
.wide { overflow-x: auto; }
th, td { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2.5em 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: var(--soft); max-width: 60em; }
.arm { transition: opacity .1s; }
svg.pointed .arm { opacity: .12; }
svg.pointed .arm.pointed { opacity: 1; }
#said { position: fixed; display: none; pointer-events: none; white-space: pre; background: var(--back);
        color: var(--text); border: 1px solid #888; border-radius: 4px; padding: .3em .6em; font-size: 13px;
        box-shadow: 0 2px 6px #0003; }
"""

# Points are in the SVG's own units, so that they hold at every size of the window.
_SCRIPT = """
"use strict";
const said = document.getElementById("said");
const nearest = (series, place, reach) => {
  let found = null;
  for (const one of series)
    for (let i = 0; i < one.x.length; i++) {
      const distance = Math.hypot(one.x[i] - place.x, one.y[i] - place.y);
      if (distance <= reach) { reach = distance; found = {arm: one.arm, text: one.texts[i]}; }
    }
  return found;
};
const show = (arm) => {
  for (const svg of document.querySelectorAll("figure svg")) {
    svg.querySelectorAll(".pointed").forEach((mark) => mark.classList.remove("pointed"));
    const marks = arm === null ? [] : svg.querySelectorAll(".arm" + arm);
    marks.forEach((mark) => mark.classList.add("pointed"));
    svg.classList.toggle("pointed", marks.length > 0);
  }
};
let shown = null;
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const series = JSON.parse(figure.querySelector("script").textContent);
  const move = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const legend = event.target.closest && event.target.closest(".arm");
    const found = nearest(series, place, 14) ||
      (legend ? {arm: Number(/arm(\\d+)/.exec(legend.getAttribute("class"))[1]), text: null} : null);
    const arm = found ? found.arm : null;
    if (arm !== shown) show(shown = arm);
    said.style.display = found && found.text ? "block" : "none";
    if (found && found.text) {
      said.textContent = found.text;
      const left = event.clientX + 16, room = window.innerWidth - said.offsetWidth - 8;
      said.style.left = Math.max(0, Math.min(left, room)) + "px";
      said.style.top = Math.max(0, Math.min(event.clientY + 16, window.innerHeight - said.offsetHeight - 8)) + "px";
    }
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerleave", () => { said.style.display = "none"; show(shown = null); });
}
"""


@dataclass(frozen=True)
class Table:
    """rows: column -> text, the same columns in every row; the first column says what the row is of."""

    title: str
    rows: list[dict[str, str]]


def page(title: str, parts: Sequence[str], pictures: Sequence[Picture]) -> str:
    """The whole page. parts: elements below the heading, "" for none; the figures are among them."""
    title = html.escape(title)
    script = f'<div id="said" role="status"></div>\n<script>{_SCRIPT}</script>' if pictures else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join([f"<h1>{title}</h1>", *filter(None, parts)])
        + f"\n{script}\n</body>\n</html>\n"
    )


def section(table: Table) -> str:
    """A table under its heading."""
    return f"<h2>{html.escape(table.title)}</h2>\n{table_element(table)}"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>\n" for line in lines) + "</ul>"


def table_element(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.rows[0])
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values())}</tr>" for row in table.rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure_element(picture: Picture) -> str:
    """A figure with its caption and the points that can be pointed at."""
    drawn, points = svg(picture)
    data = json.dumps(points, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<figure id="{picture.name}">\n{drawn}\n<figcaption>{html.escape(picture.caption)}</figcaption>\n'
        f'<script type="application/json">{data}</script>\n</figure>'
    )


def svg(picture: Picture) -> tuple[str, list[dict]]:
    """The figure as an <svg> element, and its points, {arm, x, y, texts}, in the element's own units.

    Several such elements stand in one page: what is an id in matplotlib's file has the figure's name in front here, and
    the marks of an arm, which are many, have a class in place of an id.
    """
    import matplotlib

    written = io.StringIO()
    figure = picture.figure
    with matplotlib.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "none"}):
        figure.dpi = 72  # the unit of an SVG file: what the layout is now is what it is there
        figure.savefig(written, format="svg")
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="(arm\d+)"', r'class="arm \1"', text)
    text = re.sub(r'\bid="', f'id="{picture.name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # has the time
    label = html.escape(picture.title, quote=True)
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return text.strip(), _points(picture)


def _points(picture: Picture) -> list[dict]:
    height = picture.figure.get_figheight() * 72
    found = []
    for series in picture.series:
        if not series.x:
            continue
        places = (series.place or series.axes.transData).transform(list(zip(series.x, series.y)))
        here = [series.place is not None or series.axes.bbox.contains(x, y) for x, y in places]
        if any(here):
            x, y = ([round(float(place), 1) for place in side] for side in (places[here, 0], height - places[here, 1]))
            texts = [text for text, inside in zip(series.texts, here) if inside]
            found.append({"arm": series.arm, "x": x, "y": y, "texts": texts})
    return found


def link(name: str, content: bytes) -> str:
    """To a CSV file that lies in the page."""
    data = base64.b64encode(content).decode("ascii")
    return f'<a download="{html.escape(name)}" href="data:text/csv;base64,{data}">{html.escape(name)}</a>'
