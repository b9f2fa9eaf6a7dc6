"""Names of encodings of text, as Python knows them."""

from mspc.errors import InputError


def check_encoding(name: str) -> None:
    """Raises InputError for a name that is no encoding of text."""
    try:
        "".encode(name)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"text_encoding {name!r} is no encoding that Python knows. Name one such as cp1252 or utf-16."
        ) from error
