"""Files of text as documents: .txt, .jsonl, .json and .parquet. Errors name the file and the line."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mspc.errors import InputError
from mspc.progress import log
from mspc.text.reading import Reading
from mspc.text.rows import TEXT, column_of, document, document_of, sound

SUFFIXES = (".txt", ".jsonl", ".parquet", ".json")
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and the encoding that each tells, the longer ones first."""
MARK = "\ufeff"


def documents_of(path: Path, reading: Reading, tokenizer: Any) -> list[str]:
    """The documents of a file, or of all files of text in a folder."""
    files = _text_files(path)
    suffixes = {file.suffix.lower() for file in files}
    reading.check_columns(suffixes != {".txt"}, str(path))
    reading.check_encodings(".txt" in suffixes, str(path))
    return [text for file in files for text in _read(file, reading, tokenizer, file != path) if text.strip()]


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.rglob("*") if _counts(file, path))
        if not files:
            raise InputError(f"Folder {path} holds no text: give {', '.join(SUFFIXES)} files.")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise InputError(f"{file}: text must be one of {', '.join(SUFFIXES)}.")
    return files


def _counts(file: Path, folder: Path) -> bool:
    """Tell if a file of a folder is text. Hidden ones are not."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def _read(path: Path, reading: Reading, tokenizer: Any, in_folder: bool) -> Iterable[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _read_parquet(path, reading, tokenizer)
        encoding = _encoding_of(path, (reading.encoding or "utf-8") if suffix == ".txt" else "utf-8")
        if suffix == ".txt":
            return [_read_txt(path, encoding, reading)]
        if suffix == ".jsonl":
            with path.open(encoding=encoding) as lines:
                return list(_read_lines(path, lines, reading, tokenizer))
        try:
            return _read_json(path, encoding, reading, tokenizer)
        except InputError as error:
            if not in_folder:
                raise
            log.info(f"{error} The file is left out.")  # folders of text hold JSON of many kinds
            return []
    except UnicodeError as error:
        raise _undecodable(path, encoding) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _encoding_of(path: Path, otherwise: str) -> str:
    with path.open("rb") as file:
        begin = file.read(4)
    return next((name for mark, name in MARKS if begin.startswith(mark)), otherwise)


def _undecodable(path: Path, encoding: str) -> InputError:
    """The error for bytes that are not in the encoding of a file, with the line."""
    advice = "Save it as UTF-8."
    if path.suffix.lower() == ".txt":
        advice = "Name its encoding with --text-encoding, such as cp1252 or utf-16."
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        found = data[error.start : error.end].hex(" ")
        return InputError(f"{path} cannot be read: line {line} holds the bytes {found}, not {encoding}. {advice}")
    except UnicodeError as error:  # a UTF-16 without its mark
        return InputError(f"{path} cannot be read: line 1 is not {encoding} ({error}). {advice}")
    return InputError(f"{path} cannot be read as {encoding}. {advice}")


def _read_txt(path: Path, encoding: str, reading: Reading) -> str:
    text = path.read_text(encoding=encoding).removeprefix(MARK)
    if reading.encoding is None and 4 * text.count("\0") > len(text):
        raise InputError(
            f"{path}, line 1: it holds NUL characters, so it is no UTF-8. Name its encoding with --text-encoding, such "
            "as utf-16-le."
        )
    return sound(text, lambda: f"{path}")


def _read_lines(path: Path, lines: Iterable[str], reading: Reading, tokenizer: Any) -> Iterator[str]:
    """One JSON object a line; blank lines are left out."""
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(MARK)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or error
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a `{reading.column or TEXT}` field ({reason})."
            ) from error
        yield document(row, reading.column, tokenizer, partial("{}, line {}".format, path, number))


def _read_json(path: Path, encoding: str, reading: Reading, tokenizer: Any) -> list[str]:
    """An array of objects or strings, one object, or, as in a .jsonl, one object a line."""
    text = path.read_text(encoding=encoding).removeprefix(MARK)
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return list(_read_lines(path, text.split("\n"), reading, tokenizer))
        raise InputError(f"{path}, line {error.lineno}: this is no JSON ({error.msg}). Correct it.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line 1: this JSON cannot be read ({error}). Give an array of objects.") from error
    if isinstance(value, dict):
        return [document(value, reading.column, tokenizer, lambda: f"{path}, line 1")]
    if not isinstance(value, list):
        raise InputError(f"{path}, line 1: expected an array of objects with a `{reading.column or TEXT}` field.")
    rows = [(row, partial(_place, path, text, index)) for index, row in enumerate(value)]
    return [
        sound(row, where) if isinstance(row, str) else document(row, reading.column, tokenizer, where)
        for row, where in rows
    ]


def _place(path: Path, text: str, index: int) -> str:
    """The file and line in which an element of a JSON array begins."""
    between, decoder, at, end = re.compile(r"[\s,]*"), json.JSONDecoder(), 0, text.index("[") + 1
    for _ in range(index + 1):
        match = between.match(text, end)
        at = match.end() if match else end
        _, end = decoder.raw_decode(text, at)
    return f"{path}, line {text.count(chr(10), 0, at) + 1}"


def _read_parquet(path: Path, reading: Reading, tokenizer: Any) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"Reading {path} needs pyarrow, in mspc's extra parquet: pip install '.[parquet]' in mspc's folder."
        ) from error
    wanted = reading.column or TEXT
    cannot = f"{path} cannot be read as parquet with a `{wanted}` column"
    try:
        names = pyarrow.parquet.read_schema(path).names
        name = column_of(names, reading.column)
        if name is None:
            raise InputError(f"{cannot}: it holds {', '.join(names[:8])}. Name one with --text-column.")
        column = pyarrow.parquet.read_table(path, columns=[name])[name]
        kind = column.type
        lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        if pyarrow.types.is_struct(kind) or (lists and pyarrow.types.is_struct(kind.value_type)):
            values = enumerate(column.to_pylist(), 1)
            places = [(value, partial("{}, row {}".format, path, row)) for row, value in values if value is not None]
            return [document_of(value, name, tokenizer, where) for value, where in places]
        return list(column.drop_null().cast(pyarrow.string()).to_pylist())
    except (pyarrow.ArrowException, KeyError, UnicodeError) as error:
        raise InputError(f"{cannot}: {error}.") from error
