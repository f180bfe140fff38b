"""Where the image of an annotation lies, and how large it is shown."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from knet_runtime.errors import DataError
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.files import walk


class ImageFinder:
    """The images of a tree, by the names that annotations have for them."""

    def __init__(self, root: Path) -> None:
        self.paths = [p for p in walk(root, []) if p.suffix.lower() in IMAGE_SUFFIXES]
        self._ends: dict[str, list[Path]] = {}
        for path in self.paths:
            self._ends.setdefault(path.name, []).append(path)

    def find(self, name: str) -> Path | None:
        """The image whose path ends as ``name`` does, the longer the better; None for none.
        Raises DataError where several do alike."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        found = self._ends.get(parts[-1], []) if parts else []
        for length in range(2, len(parts) + 1):
            closer = [path for path in found if path.parts[-length:] == parts[-length:]]
            if not closer:
                break
            found = closer
        if len(found) > 1:
            raise DataError(
                f"{name} may be {found[0]} or {found[1]}: take one of them out, or rename it"
            )
        return found[0] if found else None
