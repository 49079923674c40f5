"""Figures of executed notebooks, as files that a page loads."""

import base64
import hashlib
import io
from html import escape
from pathlib import Path

from PIL import Image


def write_figure(png: str, folder: Path, alt: str, address: str) -> str:
    """Write a figure (PNG in base64) as lossless WebP into `folder`; returns the HTML that shows it.

    `address` is the folder's, from the page. With its width and height nothing moves while the page loads.
    """
    data = base64.b64decode(png)
    image = Image.open(io.BytesIO(data))
    if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):
        image = image.convert("RGB")
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.webp"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, "WEBP", lossless=True, quality=100, method=4)
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="figure" src="{address}/{name}" alt="{escape(alt)}" {size}>'
