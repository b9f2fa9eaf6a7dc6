"""Elements of HTML. Every string that is not made here is escaped, so that no name or text becomes markup."""

import re
from collections.abc import Iterable
from html import escape

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
"""Characters that HTML does not have."""
_ALONE = ("meta", "br")


class Html(str):
    """Markup that is finished."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """`<tag ...>children</tag>`. An attribute `class_` is `class`; one that is None is left out."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(printable(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{given}>" if tag in _ALONE else f"<{tag}{given}>{joined(children)}</{tag}>")


def joined(children: Iterable[object]) -> Html:
    """Markup as it is, all else as text; None is nothing."""
    parts = (part if isinstance(part, Html) else escape(printable(part)) for part in children if part is not None)
    return Html("".join(parts))


def printable(value: object) -> str:
    """A text that a file of UTF-8 can hold: bytes of names that are no text, and controls, become visible."""
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROLS.sub("\ufffd", text)


def table(
    head: Iterable[object], rows: Iterable[Iterable[object]], *, left: int = 1, class_: str | None = None
) -> Html:
    """A table whose first `left` columns are text, and whose others are numbers."""
    kinds = ("text", "number")
    titles = (element("th", cell, class_=kinds[i >= left], scope="col") for i, cell in enumerate(head))
    lines = (
        element("tr", *(element("td", cell, class_=kinds[i >= left]) for i, cell in enumerate(row))) for row in rows
    )
    whole = element("table", element("thead", element("tr", *titles)), element("tbody", *lines), class_=class_)
    return element("div", whole, class_="scroll")


def section(title: str, *children: object) -> Html:
    return element("section", element("h3", title), *children)


def note(*children: object) -> Html:
    """A small paragraph that explains what is above it."""
    return element("p", *children, class_="note")
