"""What mkdocs does beside its pages: the version on the site, and the changelog as one of its pages."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
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
