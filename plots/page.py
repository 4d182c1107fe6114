"""One HTML page of figures and numbers: plain, self-contained, links relative to where it lies."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from utils.checkpoint import write_atomic

STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1200px;margin:2em auto;padding:0 1em}
h1,h2{line-height:1.2}h2{margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #eee}
th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #999}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1.5em}
figure{margin:0}img{width:100%;max-height:340px;object-fit:contain;object-position:top left;border:1px solid #ddd}
figcaption{font-size:.9em;color:#555}"""


@dataclass(frozen=True)
class Section:
    """A part of a page. table: rows of cells, the first one its heads. figures: files, with what each shows."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    figures: Sequence[tuple[Path, str]] = ()


def html_page(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The page as it is to lie in `folder`; whatever text holds is shown as it is."""
    body = "\n".join(_section(section, folder) for section in sections)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}<style>\n{STYLE}\n</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    text = html_page(title, sections, path.parent)
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def _section(section: Section, folder: Path) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(section.text)}</p>"] if section.text else []
    for kind, row in zip(("th", *["td"] * len(section.table)), section.table, strict=False):
        parts += [] if kind == "td" else ["<table>"]
        parts.append("<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>")
    parts += ["</table>"] if section.table else []
    figures = [_figure(*shown, folder) for shown in section.figures]
    parts += ['<div class="figures">', *figures, "</div>"] if figures else []
    return "\n".join(parts)


def _figure(path: Path, caption: str, folder: Path) -> str:
    """A thumbnail that leads to the file; a browser shows no PDF as a picture, so of one the name."""
    link = escape(quote(Path(os.path.relpath(path, folder)).as_posix()))
    shown = escape(path.name) if path.suffix == ".pdf" else f'<img src="{link}" alt="{escape(caption)}" loading="lazy">'
    return f'<figure><a href="{link}">{shown}</a><figcaption>{escape(caption)}</figcaption></figure>'
