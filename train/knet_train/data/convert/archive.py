"""A ZIP file, unpacked without writing anything outside of a temporary folder."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from knet_runtime.errors import DataError


def unpack_zip(path: Path, folder: Path) -> None:
    """Unpack into ``folder``. Raises DataError for names that lead out of it, links, passwords,
    damage, and contents that do not fit on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(entry.file_size for entry in archive.infolist())
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise DataError(
                    f"{path} unpacks to {needed >> 20} MiB, and {folder} has {free >> 20} MiB "
                    "left: let TMPDIR name a folder with more"
                )
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename.replace("\\", "/"))
                link = stat.S_ISLNK(entry.external_attr >> 16)
                if name.is_absolute() or ".." in name.parts or ":" in str(name) or link:
                    raise DataError(
                        f"{path} holds {entry.filename!r}, which leads out of it: unpack it "
                        "yourself if you trust it, and name the folder"
                    )
                archive.extract(entry, folder)
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path}: {error}; export it again, or name its unpacked folder") from error
