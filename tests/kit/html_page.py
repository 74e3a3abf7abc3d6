"""What a page of the tools is made of."""

from __future__ import annotations

import html.parser
import json
import re


class Page(html.parser.HTMLParser):
    """What a page is made of. It asks a server for nothing if no attribute names one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.classes: set[str] = set()
        self.open: list[str] = []
        self.data: dict[str, list] = {}  # figure -> its points
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.classes |= set((named.get("class") or "").split())
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data")]
        if tag == "figure":
            self.data[named["id"]] = []
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(named.get("type") or tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in ("meta", "path", "use", "rect"):
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "application/json":
            self.data[list(self.data)[-1]] += json.loads(data)


def assert_alone(text: str) -> None:
    """A page is whole, and asks no server for anything."""
    page = Page(text)
    assert page.open == [], "every element is closed"
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids)), "several figures in one page"
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
