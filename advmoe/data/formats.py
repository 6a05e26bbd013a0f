"""Names files that are no images for this program by their first bytes, for messages."""

from __future__ import annotations

import re

HEAD = 64
"""First bytes of a file that tell its format."""

SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"%PDF": "PDF",
}
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
"""Kinds of files that begin with a box `ftyp`."""
REMEDY = "convert it to JPEG or PNG, for example with Pillow or ImageMagick"


def explained(message: str, head: bytes) -> str:
    """A message of the decoder, with the format in place of the bytes that an unknown format begins with.

    Args:
        message: Ends with the first bytes if the format is neither JPEG nor PNG.
        head: The first bytes of the image, `HEAD` or all.
    """
    return re.sub(r"bytes that begin with \[[0-9A-F, ]*\]", lambda found: _format(head) or found[0], message)


def _format(head: bytes) -> str | None:
    """What a file is that is neither JPEG nor PNG, and what to do with it; None if its format is not known."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps a failed download; download the image again"
    name = next((name for start, name in SIGNATURES.items() if head.startswith(start)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        name = "WebP"
    if head[4:8] == b"ftyp":
        name = BRANDS.get(head[8:12])
    return None if name is None else f"{name}; {REMEDY}"
