"""Files and folders that are complete or absent: they are written beside their place, then renamed."""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "new_file", "new_folder", "printable", "save_figure", "shipped_folder", "write_bytes", "write_csv", "write_json",
    "write_text",
]  # fmt: skip


def shipped_folder(name: str) -> Path:
    """Return a folder that comes with the package: inside of it where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary file in path's folder to write; it becomes path at the end, or goes if an error is raised.

    The content is on the disk when the context ends.
    """
    path = Path(path)
    prefix = f".{path.stem[:50]}."  # a name of the longest length that is allowed has a temporary one too
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside path to fill; it becomes path at the end, or goes if an error is raised."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:50]}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def printable(name: str | Path) -> str:
    """Return a file's name with escapes for what is no Unicode."""
    return str(name).encode(errors="backslashreplace").decode()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a complete file."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a complete text file in UTF-8; parts of file names that are no Unicode are escaped."""
    write_bytes(path, printable(text).encode())


def write_json(path: str | Path, content: Any, indent: int = 2) -> None:
    """Write a complete JSON file."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a complete CSV file; its columns are the keys of all rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def save_figure(figure, path: str | Path, dpi: int = 120) -> None:
    """Write a matplotlib figure as a complete file; the suffix names the format."""
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=Path(path).suffix[1:])
