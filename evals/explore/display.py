"""Text with codes as colours, for notebooks, and the same in plain words for terminals."""

from __future__ import annotations

import html

import numpy as np

from evals.explore.activity import Context

# Of codes above 0 and below; readable under dark and light text.
_WARM, _COLD = "230, 126, 34", "52, 120, 246"
# What would not be seen, or would move the page.
_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "→", "\ufeff": "␀", "\u200b": "␀"}


def visible(text: str) -> str:
    """A token's text with its control characters as symbols."""
    return "".join(
        _SHOWN.get(c, c if c.isprintable() or c == " " else "\ufffd") for c in text
    )  # fmt: skip


def shaded(context: Context, most: float) -> str:
    """HTML of a context: warm tokens have codes above 0, cold ones below; the code is the title.

    Arguments:
      most: |code| of the full colour.
    """
    spans = []
    for i, (token, code) in enumerate(zip(context.tokens, context.codes, strict=True)):
        text = html.escape(visible(token))
        if code:
            share = min(abs(code) / most, 1) if most else 0
            colour = f"rgba({_WARM if code > 0 else _COLD}, {0.15 + 0.5 * share:.2f})"
            line = "; text-decoration: underline" if i == context.at else ""
            text = f'<span title="{code:.4g}" style="background: {colour}{line}">{text}</span>'
        spans.append(text)
    return f'<span style="white-space: pre-wrap">{"".join(spans)}</span>'


def plain(context: Context) -> str:
    """A context in one line: [token]code where the feature fires."""
    return "".join(
        f"[{visible(token)}]{code:.3g} " if code else visible(token)
        for token, code in zip(context.tokens, context.codes, strict=True)
    )


class Contexts(list[Context]):
    """Contexts that show themselves."""

    def _most(self) -> float:
        return max((float(np.abs(one.codes).max()) for one in self), default=0.0)

    def __repr__(self) -> str:
        return "\n".join(f"{one.codes[one.at]:9.4g}  {plain(one)}" for one in self)

    def _repr_html_(self) -> str:
        most = self._most()
        rows = [[f"{one.codes[one.at]:.4g}", Raw(shaded(one, most))] for one in self]
        return table(["code", "text"], rows)


class Raw(str):
    """HTML that is not escaped again."""

    __slots__ = ()


def table(heads: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are escaped but for `Raw` ones."""

    def cell(tag: str, text: str) -> str:
        own = text if isinstance(text, Raw) else html.escape(text)
        return f'<{tag} style="text-align: left; vertical-align: top">{own}</{tag}>'

    lines = "".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(cell('th', head) for head in heads)}</tr>{lines}</table>"


def columns(heads: list[str], rows: list[list[str]]) -> str:
    """The same in plain text."""
    every = [heads, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(heads))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in every
    )


class Rows:
    """A small table that shows itself."""

    def __init__(self, title: str, heads: list[str], rows: list[list[str]]) -> None:
        self.title, self.heads, self.rows = title, heads, rows

    def __repr__(self) -> str:
        return f"{self.title}\n{columns(self.heads, self.rows)}"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.title)}</b></p>{table(self.heads, self.rows)}"
