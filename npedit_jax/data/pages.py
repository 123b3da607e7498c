"""HTML pages that hold their pictures themselves."""

import base64
import io
from typing import Any

import jinja2
import markupsafe
import numpy as np
from etils import epath
from PIL import Image

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62666d; --paper: #fff; --line: #d9dce1; --bad: #c02b3a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa0a8; --paper: #17191c; --line: #3a3e45; --bad: #ff7b86; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p, small, dt { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.sample { display: flex; flex-wrap: wrap; gap: 1.25rem; padding: 1rem 0; border-bottom: 1px solid var(--line); }
.sample > div { flex: 1 1 30rem; min-width: 0; }
figure { margin: 0; width: 11rem; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { margin-top: .35rem; font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.bad { color: var(--bad); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body>
</html>
"""
_ENVIRONMENT = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def write(path: epath.PathLike, title: str, body: str, **values: Any) -> None:
    """Writes a page; `body` is a Jinja template of what stands below the title, with `values`."""
    environment = _ENVIRONMENT.overlay(loader=jinja2.DictLoader({"frame": _FRAME}))
    template = environment.from_string('{% extends "frame" %}{% block body %}' + body + "{% endblock %}")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.render(title=title, picture=picture, **values))


def picture(pixels: np.ndarray, width: int = 0) -> markupsafe.Markup:
    """An image [H, W, 3] uint8 as an element of a page, with a width in pixels if not its own."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f' width="{width}"' if width else ""
    return markupsafe.Markup(f'<img src="data:image/webp;base64,{data}"{size} alt="">')
