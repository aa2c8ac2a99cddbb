"""Writes pictures as SVG: text alone, readable on a light and on a dark page."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape


def document(title: str, width: float, height: float, style: str, shapes: Iterable[str]) -> str:
    """Return a picture of ``shapes``, each a line of SVG."""
    body = "\n".join(f"  {shape}" for shape in shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {px(width)} {px(height)}" '
        f'width="{px(width)}" height="{px(height)}" role="img">\n'
        f"  <title>{escaped(title)}</title>\n"
        f"  <style>{style}  </style>\n{body}\n</svg>\n"
    )


def style_of(own: str, colours: str, light: Mapping[str, str], dark: Mapping[str, str]) -> str:
    """Return a style sheet.

    Args:
        own: What holds on any page.
        colours: What else holds; names in braces stand for colours.
        light: Name -> colour on a light page.
        dark: The same on a dark one.
    """
    # No variables: not all that shows an SVG knows them.
    return (
        f"{own}{colours.format(**light)}\n"
        f"  @media (prefers-color-scheme: dark) {{{colours.format(**dark)}\n  }}\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return words at a place: where they start, unless ``anchor`` says otherwise."""
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{px(x)}" y="{px(y)}"{attributes}>{escaped(words)}</text>'


def escaped(words: str) -> str:
    """Return ``words`` as XML has them, without characters that it does not have."""
    return escape(
        "".join(
            c
            if c in "\n\t"
            or (unicodedata.category(c) not in ("Cc", "Cs") and c not in "\ufffe\uffff")
            else "\ufffd"
            for c in words
        )
    )


def px(number: float) -> str:
    """Return a length in pixels, to a tenth of one."""
    return f"{number:.1f}".removesuffix(".0")
