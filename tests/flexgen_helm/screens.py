"""A terminal, as far as our progress needs one: what its lines hold after something was written to it."""

from __future__ import annotations

import re

_PARTS = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])|\x1b\[[\d;]*m|[\r\n]|[^\x1b\r\n]+")


def screen(written: str) -> list[str]:
    """The lines that are not empty. Raises `AssertionError` for a control that it does not know."""
    lines, row, column = [""], 0, 0
    end = 0
    for part in _PARTS.finditer(written):
        assert part.start() == end, ascii(written[end : end + 20])
        end = part.end()
        text = part.group()
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text.startswith("\x1b"):
            number, command = int(part.group(2) or 1) if part.group(2) else 1, part.group(3) or "m"
            assert command in "mAKhl", ascii(text)
            if command == "A":
                row = max(0, row - number)
            elif command == "K":
                lines[row] = ""
        else:
            lines[row] = (lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]).rstrip()
            column += len(text)
    assert end == len(written), ascii(written[end : end + 20])
    return [line for line in lines if line]
