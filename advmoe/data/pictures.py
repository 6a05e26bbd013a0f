"""Finds the image files that a user names: files, folders of any depth, and patterns."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from advmoe.data.folders import is_image, list_images
from advmoe.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""File name endings that folders and patterns select. A file named by itself may have any name."""


def find_pictures(named: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The image files selected by the names, each once. The order of the names is kept; within a
    folder or pattern the order is natural.

    Args:
        named: Files; folders, which are searched through all levels for files with one of
            `SUFFIXES`; and patterns with `*`, `?`, `[...]` and `**`, which mean such files among
            their matches, and those in matching folders. Hidden files and folders, whose names begin
            with a dot, are meant only if they are named themselves.

    Raises:
        DataError: A file or folder does not exist, holds no images, or matches nothing.
    """
    found: dict[Path, None] = {}
    for name in map(Path, named):
        found |= dict.fromkeys(_meant_by(name))
    return list(found)


def _meant_by(name: Path) -> list[Path]:
    if name.is_dir():
        pictures = _in_folder(name)
        if not pictures:
            raise DataError(f"{name} holds no images; expected files that end in {', '.join(SUFFIXES)}")
        return pictures
    if name.exists():
        return [name]
    if not glob.has_magic(str(name)):
        raise DataError(f"no image file or folder {name}; expected a file, a folder or a pattern such as photos/*.jpg")
    matches = [match for match in Path(name.anchor).glob(str(name.relative_to(name.anchor))) if _shown(match, name)]
    files = [match for match in matches if not match.is_dir() and is_image(match.name, SUFFIXES)]
    inside = [picture for match in matches if match.is_dir() for picture in _in_folder(match)]
    pictures = sorted({*files, *inside}, key=natural)
    if not pictures:
        raise DataError(f"no image file matches {name}")
    return pictures


def _shown(match: Path, pattern: Path) -> bool:
    """Whether the pattern names every hidden part of the match by a part that begins with a dot, as in a shell."""
    hidden = [part for part in match.parts if part.startswith(".")]
    dotted = [part for part in pattern.parts if part.startswith(".")]
    return all(any(fnmatch.fnmatchcase(part, other) for other in dotted) for part in hidden)


def _in_folder(folder: Path) -> list[Path]:
    return sorted((folder / name for name in list_images(folder, SUFFIXES)), key=natural)


def natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """A sort key for paths: folder by folder, and `page 9` before `page 10`."""
    return [  # numbers in a part of the path sort as numbers, before text
        [(0, int(part), part) if part.isdecimal() else (1, 0, part.casefold()) for part in re.split(r"(\d+)", name)]
        for name in path.parts
    ]
