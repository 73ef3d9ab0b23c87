# SPDX-License-Identifier: Apache-2.0
"""Messages are tested by what matters in them: names and numbers, in their order, in any words."""

from __future__ import annotations

import re


def saying(*parts: object) -> str:
    """A pattern for ``pytest.raises(match=...)``: ``str`` of every part, whole, in this order; a
    part that is a pattern itself stays one.

    What was found comes before what was expected, as in all messages of the package. A number does
    not match a part of a longer one: neither 12, -2 nor 2.5 says 2.
    """
    return "(?s)" + ".*".join(_whole(part) for part in parts)


def says(text: str, *parts: object) -> bool:
    """Whether a message names every part, in this order."""
    return re.search(saying(*parts), text) is not None


def _whole(part: object) -> str:
    if isinstance(part, re.Pattern):
        return part.pattern
    text = str(part)
    pattern = re.escape(text)
    if re.match(r"-?\d", text):
        return rf"(?<![\w-])(?<!\d\.){pattern}(?!\w|\.\d)"
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w$", text) else ""
    return f"{before}{pattern}{after}"
