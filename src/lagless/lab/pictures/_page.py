"""The laboratory's page: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lagless.lab.pictures._drawing import Picture

PAGE = "laboratory.html"
_CSS = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5c5c5c; --back: #ffffff; --line: #d5d8dd; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a8adb5; --back: #17191c; --line: #3b4048; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); } h3 { margin: 2rem 0 .5rem; }
.soft { color: var(--soft); } nav a { margin-right: 1rem; } a { color: inherit; }
figure { margin: 0 0 2.5rem; } figcaption { max-width: 52rem; }
img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem;
      box-sizing: border-box; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def write_page(sections: Sequence[tuple[str, Sequence[Picture]]], folder: Path, footer: str) -> Path:
    """Write the page into ``folder``, where the pictures are.

    Args:
        sections: headings, each with its pictures, saved as ``NAME.png``.
        folder: where to.
        footer: how all this was made.
    """
    links = " ".join(f"<a href='#{_anchor(heading)}'>{escape(heading)}</a>" for heading, _ in sections)
    body = "\n".join(
        f"<h2 id='{_anchor(heading)}'>{escape(heading)}</h2>\n" + "\n".join(_figure(p, folder) for p in pictures)
        for heading, pictures in sections
    )
    path = folder / PAGE
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>The quadratic laboratory</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>The quadratic "
        "laboratory</h1>\n<p class='soft'>Near a minimum a loss is a quadratic, and training with a constant "
        "learning rate is a noisy walk in it. There everything that averaging does can be computed: curves are "
        "exact, and sampled runs are laid beside them with ± 2 standard errors. A language model is no quadratic; "
        f"what is true here is where to start, not what to expect.</p>\n<nav>{links}</nav>\n{body}\n<p "
        f"class='soft'>{escape(footer)}</p>\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _figure(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / f"{picture.name}.png").read_bytes()).decode()
    return (
        f"<h3>{escape(picture.title)}</h3>\n<figure id='{picture.name}'>"
        f"<img alt='{escape(picture.title)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )
