"""Reads a page as a browser would take it: tags, tables, text."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Reads tags, tables and text of a page, as a browser would take them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.text, self._cell, self._ignore = [], [], [], None, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._ignore = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = self.tables[-1][-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell[-1] = " ".join(self._cell[-1].split())
            self._cell = None
        if tag == self._ignore:
            self._ignore = None

    def handle_data(self, data):
        if self._ignore:
            return
        self.text.append(data)
        if self._cell is not None:
            self._cell[-1] += data

    @property
    def words(self):
        return " ".join("".join(self.text).split())

    def table(self, *heads):
        """Give the first table whose head begins with these cells."""
        return next(t for t in self.tables if any(row[: len(heads)] == list(heads) for row in t))
