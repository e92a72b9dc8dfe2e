"""Files of this machine, as doctor looks at them: what is missing or can't be read is empty."""

from __future__ import annotations

from pathlib import Path

__all__ = ["entries", "text"]


def entries(folder: Path, pattern: str = "*") -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
