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


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Whatever text holds is shown as it is. A figure is a thumbnail that leads to its file."""
    lines = [f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>']
    lines += [STYLE, "</style></head>", f"<body><h1>{escape(title)}</h1>"]
    for section in sections:
        lines.append(f"<h2>{escape(section.title)}</h2>")
        lines += [f"<p>{escape(section.text)}</p>"] if section.text else []
        for k, row in enumerate(section.table):
            kind = "td" if k else "th"
            lines += [] if k else ["<table>"]
            lines.append("<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>")
        lines += ["</table>"] if section.table else []
        lines += ['<div class="figures">'] if section.figures else []
        for file, caption in section.figures:
            link = escape(quote(Path(os.path.relpath(file, path.parent)).as_posix()))
            shown = f'<img src="{link}" alt="{escape(caption)}" loading="lazy">'
            if file.suffix == ".pdf":  # no browser shows one as a picture
                shown = escape(file.name)
            lines.append(f'<figure><a href="{link}">{shown}</a><figcaption>{escape(caption)}</figcaption></figure>')
        lines += ["</div>"] if section.figures else []
    text = "\n".join([*lines, "</body></html>\n"])
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))
