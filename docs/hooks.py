"""What mkdocs does beside its pages: the version on the site, the changelog as one of its pages, and formulas."""

from __future__ import annotations

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The version stands in the package alone; the site shows it in the header and in the title of each page."""
    source = (ROOT / "distwd/__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    config.site_name = f"{config.site_name} {version}"
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """CHANGELOG.md becomes project/changelog.md. Its links start at the repository's root, those of a page at the page."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "project/changelog.md", content=text.replace("](docs/pages/", "](../")))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A block of `math` becomes MathML, which browsers show by themselves: no script, and nothing to load."""
    return re.sub(r"^```math\n(.*?)^```$", _formula, markdown, flags=re.MULTILINE | re.DOTALL)


def _formula(block: re.Match[str]) -> str:
    formula: str = convert(" ".join(block[1].split()), display="block")
    if "\\" in formula:  # latex2mathml writes a command that it does not know as it stands
        raise PluginError(f"latex2mathml does not know a command in this formula:\n{block[1]}")
    return formula
