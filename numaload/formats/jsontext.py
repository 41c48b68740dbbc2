"""JSON of files that are not trusted, walked and not built: headers and indexes of safetensors.

A JSON parser makes objects of whatever is there before anybody can object: two bytes become a list
of sixty, and of two members with one name the last one wins. Here only what is expected is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import isinf
from typing import Any, NoReturn

from numaload.errors import FormatError

MAX_TEXT = 100_000_000  # bytes; the safetensors library's own limit for headers
MAX_NAME = 65535  # characters, since names are printed; as in GGUF
MAX_SKIPPED = 1 << 20  # characters of a value that nobody asked for
SHORT = 1 << 10  # characters that hold most such values
MOST_SKIPPED = 1000 * MAX_SKIPPED  # characters that are taken in search of their ends
MAX_DIGITS = 300  # of a whole number, which is then a float's size too
SHOWN = 60  # characters of what was found

WS = "[ \t\n\r]*"
PLAIN = re.compile(r'"([^"\\\x00-\x1f]*)"')  # a string without escapes
PLAIN_MEMBER = re.compile(f"{PLAIN.pattern}{WS}:{WS}")
MARKS = {
    marks: re.compile(f"{WS}([{re.escape(marks)}]){WS}")
    for marks in ("{", ":", ",}", "}", "[", ",]", "]")
}
END = re.compile(rf"{WS}\Z")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, at most {MAX_DIGITS} are read")
    return int(text)


def _float(text: str) -> float:
    found = float(text)
    if isinf(found):
        raise ValueError(f"a number beyond all floats: {text[:SHOWN]}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in an object")
    return found


DECODER = json.JSONDecoder(
    parse_constant=_refuse, parse_int=_integer, parse_float=_float, object_pairs_hook=_once
)


def parse_object(raw: bytes, path: str, kind: type[FormatError]) -> dict[str, Any]:
    """Parse a small file whole: a configuration. Raises: ``kind``."""
    try:
        found = DECODER.decode(raw.decode())
    except (ValueError, RecursionError) as error:
        raise kind(f"expected JSON: {error}", path=path) from None
    if not isinstance(found, dict):
        raise kind(f"expected an object, found a {type(found).__name__}", path=path)
    return found


class JsonText:
    """Walk the text. ``kind`` is the error to raise where it is not what it must be.

    pos counts characters of ``text``; ``start`` is the byte of the file at which it begins.
    """

    def __init__(self, raw: bytes, path: str, kind: type[FormatError], start: int = 0) -> None:
        self.path, self.kind, self.start, self.pos = path, kind, start, 0
        self.skipped = 0
        self.text = ""
        try:
            self.text = raw.decode()
        except UnicodeDecodeError as error:
            wrong = slice(error.start, error.start + 4)
        if raw and not self.text:
            message = f"expected text, found {raw[wrong]!r}, which is not UTF-8"
            raise kind(message, path=path, offset=start + wrong.start)

    def fail(
        self, message: str, at: int | None = None, kind: type[FormatError] | None = None
    ) -> NoReturn:
        before = self.text[: self.pos if at is None else at]
        offset = len(before) if before.isascii() else len(before.encode())
        raise (kind or self.kind)(message, path=self.path, offset=self.start + offset)

    def expected(self, what: str) -> NoReturn:
        shown = self.text[self.pos : self.pos + SHOWN]
        more = "..." if self.pos + SHOWN < len(self.text) else ""
        self.fail(f"expected {what}, found {shown!r}{more}" if shown else f"expected {what}")

    def mark(self, marks: str, what: str) -> str:
        """Go past one of these characters and the whitespace around it; which it was."""
        match = MARKS[marks].match(self.text, self.pos)
        if match is None:
            self.expected(what)
        self.pos = match.end()
        return match[1]

    def string(self, what: str) -> str:
        """Read a string. Half of a surrogate pair is refused: it is no text."""
        match = PLAIN.match(self.text, self.pos)
        if match is not None:
            self.pos = match.end()
            return match[1]
        value = self._escaped_string()
        if value is None:
            self.expected(what)
        return value

    def _escaped_string(self) -> str | None:
        if not self.text.startswith('"', self.pos):
            return None
        try:
            value, end = DECODER.raw_decode(self.text, self.pos)
            value.encode()
        except ValueError:
            return None
        self.pos = end
        return str(value)

    def members(self, what: str) -> Iterator[str]:
        """Yield the name of each member; ``pos`` is then at its value, to walk past."""
        self.mark("{", f"{{ of {what}")
        if self.text.startswith("}", self.pos):
            self.mark("}", "")
            return
        mark = ","
        while mark == ",":
            name = self._name(what)
            yield name
            mark = self.mark(",}", f", or }} in {what}")

    def _name(self, what: str) -> str:
        at = self.pos
        match = PLAIN_MEMBER.match(self.text, at)
        if match is not None:
            name, self.pos = match[1], match.end()
        else:
            name = self.string(f"a name in {what}")
            self.mark(":", f": after a name in {what}")
        if len(name) > MAX_NAME:
            self.fail(f"name of {len(name)} characters in {what}, at most {MAX_NAME} are read", at)
        return name

    def string_map(self, what: str) -> dict[str, str]:
        """Read an object of strings only, each name once."""
        found: dict[str, str] = {}
        for name in self.members(what):
            if name in found:
                self.fail(f"{name!r} appears twice in {what}")
            found[name] = self.string(f"a string for {name!r} in {what}")
        return found

    def null(self) -> bool:
        """Go past a null, if there is one."""
        found = self.text.startswith("null", self.pos)
        self.pos += 4 * found
        return found

    def skip(self, what: str) -> None:
        """Go past any value; it is looked at only to know where it ends."""
        for most in (SHORT, MAX_SKIPPED):
            self.skipped += most
            if self.skipped > MOST_SKIPPED:
                self.fail("too many members that are not known")
            part = self.text[self.pos : self.pos + most]
            try:
                _, end = DECODER.raw_decode(part)
            except (ValueError, RecursionError):
                continue
            if end < most:  # or else a number may go on
                self.pos += end
                return
        self.expected(f"a value of {what} of at most {MAX_SKIPPED} characters")

    def end(self, what: str) -> None:
        if END.match(self.text, self.pos) is None:
            self.expected(f"nothing after {what}")
