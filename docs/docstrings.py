"""A griffe extension that renders the library's docstrings (prose, formulas and doctests) as Markdown.

A paragraph of lines such as `params: what torch.optim takes` becomes a list, an example becomes a block of code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\*{0,2}[a-z]\w*(?:, \w+)*): ")  # not "Source: ...", which is prose
# `measures(settings): ...`, below a line of prose that introduces it
METHOD = re.compile(r"^ *([a-z]\w*\([\w, ]*\)): ")


class Prose(griffe.Extension):
    """Rewrites every docstring, once, when griffe has read it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", docstring))


def _block(block: str) -> str:
    if block.startswith(">>>"):
        return f"```pycon\n{block}\n```"
    lines: list[str] = []
    for line in block.split("\n"):
        item = ITEM.match(line) or METHOD.match(line)
        if item:
            # Markdown needs an empty line between prose and the list that follows it.
            if lines and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
            lines.append(f"- `{item[1]}`: {line[item.end() :]}")
        elif lines and lines[-1].startswith(("- ", "  ")) and line.startswith(" "):
            lines.append("  " + line.strip())
        else:
            if lines and lines[-1].startswith(("- ", "  ")):
                lines.append("")
            lines.append(line.strip())
    return "\n".join(lines)
