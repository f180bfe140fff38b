"""A bundle on disk: a folder NAME.knet that is opened only if every byte is what its manifest says,
and that never looks whole when it is half written."""

from __future__ import annotations

import hashlib
import mmap
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from knet_runtime.atomic import AtomicFolder, output_error, write_atomic
from knet_runtime.bundle.describe import bundle_card
from knet_runtime.bundle.external_data import external_locations
from knet_runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Graph,
    Kind,
    Manifest,
    Parity,
    check_paths,
    decode_manifest,
    encode_manifest,
)
from knet_runtime.errors import BundleError, ConfigError, OutputError
from knet_runtime.palettes import recoloured
from knet_runtime.types import Size

_PACKAGE = Path(__file__).resolve().parents[1]
_BLOCK = 1 << 20
_SHOWN = 10  # files, in an error
_MAX_MANIFEST = 1 << 24  # bytes; a real one has some thousands
_MAX_BYTES = 1 << 34  # of all files together; a file of holes is soon made and takes hours to read


class Bundle:
    """An opened bundle: ``path`` of its folder and its ``manifest``, both checked; or one that is
    not written yet, whose manifest lists no files.

    >>> from knet_deploy import Segmenter
    >>> with Segmenter() as segment:
    ...     bundle = segment.bundle
    >>> bundle.manifest.labels.names[:3], bundle.manifest.input.height
    (('Sky', 'Building', 'Pole'), 360)

    A notebook shows it as a table.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({self.model_id}, {str(self.path)!r})"

    def _repr_html_(self) -> str:
        return bundle_card(self)

    def graph(self, kind: Kind) -> Graph:
        """The graph that gives logits or class maps; BundleError where there is none."""
        return self.manifest.graph(kind)

    def with_input_size(self, size: Size) -> Bundle:
        """This bundle run at another (height, width); ConfigError for one that its graph lacks."""
        spec = self.manifest.input
        if size == spec.size:
            return self
        if spec.sizes is None:
            raise ConfigError(
                f"{self.path} was exported for {spec.height}×{spec.width} only: run it at that "
                "size, or export it with --dynamic"
            )
        if size not in spec.sizes:
            low, high = spec.sizes.min, spec.sizes.max
            raise ConfigError(
                f"{self.path} takes heights {low[0]} … {high[0]} and widths {low[1]} … "
                f"{high[1]} in multiples of {spec.sizes.multiple}, not {size[0]}×{size[1]}"
            )
        changed = msgspec.structs.replace(spec, height=size[0], width=size[1])
        return Bundle(self.path, msgspec.structs.replace(self.manifest, input=changed))

    def with_palette(self, palette: str | Path) -> Bundle:
        """This bundle with other colours for its classes: "model" (its own), "distinct",
        "cityscapes", or a file of names and colours; see ``palettes.recoloured``. Raises
        ConfigError."""
        labels = recoloured(self.manifest.labels, palette)
        return Bundle(self.path, msgspec.structs.replace(self.manifest, labels=labels))

    @property
    def model_id(self) -> str:
        """ "name@" and 12 hexadecimal digits of the SHA-256 of the ONNX file.

        With external data the digits are of the hashes of the graph and of its data together, so
        that equal graphs with other weights have other names. A bundle that is not written yet
        has its name only.
        """
        if not self.manifest.files:
            return self.manifest.name
        hashes = [self.manifest.files[path].sha256 for path in self.graph("logits").files]
        digest = hashes[0]
        if len(hashes) > 1:
            digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        return f"{self.manifest.name}@{digest[:12]}"

    @property
    def is_packaged(self) -> bool:
        """Whether it is part of the installed package. Such a model stays as it is: what is
        measured and built on a device goes into bundles of one's own."""
        return self.path.resolve().parent == _PACKAGE

    def file(self, relative: str) -> Path:
        """The absolute path of a listed file; BundleError if the manifest lists others only."""
        if self.manifest.files and relative not in self.manifest.files:
            listed = ", ".join(sorted(self.manifest.files)[:_SHOWN])
            raise BundleError(f"{self.path}: {relative!r} is not listed in it (it lists {listed})")
        return self.path / relative


def _no_bundle(path: Path) -> str:
    """What ``path`` is instead of a bundle, and the command that makes or finds one."""
    if path.is_dir():
        inner = next((found.parent for found in sorted(path.glob(f"*/{MANIFEST_NAME}"))), None)
        if (path / "best.safetensors").is_file():
            fix = (
                f"it is a training run: knet-deploy export {path / 'best.safetensors'} -o NAME.knet"
            )
        elif inner is not None:
            fix = f"did you mean {inner}?"
        else:
            fix = "pass the folder that knet-deploy export wrote"
        return f"this is no bundle, it holds no {MANIFEST_NAME}; {fix}"
    bundle = path.with_suffix(".knet").name
    if (path.parent / MANIFEST_NAME).is_file():
        return f"this is a file of the bundle {path.absolute().parent}: pass that folder"
    match path.suffix.lower():
        case ".safetensors":
            return f"this is a checkpoint; first knet-deploy export {path} -o {bundle}"
        case ".pth" | ".pt" | ".ckpt":
            return f"this is a checkpoint; first knet-deploy import-mmseg {path}, then export"
        case ".onnx" | ".engine" | ".plan":
            return "this is a graph; a bundle is the folder that knet-deploy export wrote"
        case _:
            return "this is a file; a bundle is a folder: unpack it first"


def open_bundle(path: Path | str | None = None) -> Bundle:
    """Open the folder ``path``, after reading every listed file and comparing size and SHA-256.
    The name of a packaged model will do; None is the semantic one.

    Files that the manifest does not list are left alone and never read.
    Raises BundleError, with the file's name, for whatever is missing, damaged, leaves the folder
    through a symbolic link, or was written by a newer version; and for a graph that reads weights
    from anything but the files that the manifest lists as its external data. A file that is changed
    after this, before an engine reads it, is not noticed.

        >>> from knet_deploy import open_bundle
        >>> open_bundle().model_id
        'camvid-knet-edge@...'
    """
    path = find_bundle(path)
    root = path.absolute()
    if not root.exists():
        known = ", ".join(packaged_models()) or "none"
        raise BundleError(
            f"{path}: there is no such bundle; check the path (packaged models: {known})"
        )
    if not root.is_dir() or not os.path.lexists(root / MANIFEST_NAME):
        raise BundleError(f"{path}: {_no_bundle(path)}")
    with _naming(f"{path}: {MANIFEST_NAME}"):
        file = _inside(root, MANIFEST_NAME)
        if (size := _size(file)) > _MAX_MANIFEST:
            raise BundleError(f"has {size} bytes, which no manifest has; copy the bundle again")
        data = file.read_bytes()
    try:
        manifest = decode_manifest(data)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    if sum(record.bytes for record in manifest.files.values()) > _MAX_BYTES:
        raise BundleError(
            f"{path}: {MANIFEST_NAME} lists more than {_MAX_BYTES >> 30} GiB of files, which no "
            "bundle holds; export it again"
        )
    for relative, record in manifest.files.items():
        with _naming(f"{path}: {relative}"):
            _check_file(_inside(root, relative), record)
    for graph in manifest.graphs:
        for relative in graph.files if graph.external_data else ():
            with _naming(f"{path}: {relative}"):
                _check_no_link(root, relative)
        with _naming(f"{path}: {graph.path}"):
            _check_external_data(root, graph, manifest.files[graph.path].bytes)
    return Bundle(root, manifest)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """BundleError, with the file's name, for whatever is wrong with it."""
    try:
        yield
    except FileNotFoundError as error:
        raise BundleError(f"{file} is missing; copy the bundle again") from error
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {_why(error)}") from error
    except BundleError as error:
        raise BundleError(f"{file} {error}") from error


def _size(path: Path) -> int:
    """Its bytes; BundleError for a pipe or folder: to read a pipe would wait for ever."""
    size = path.stat().st_size
    if not path.is_file():
        raise BundleError("is no plain file; copy the bundle again")
    return size


def find_bundle(path: Path | str | None = None) -> Path:
    """The folder that ``path`` means: itself where there is one, else the packaged model of that
    name; None is ``default_bundle_path``."""
    if path is None:
        return default_bundle_path()
    if os.path.lexists(path):
        return Path(path)
    return packaged_models().get(str(path), Path(path))


def packaged_models() -> dict[str, Path]:
    """The folders of the models that are packaged with knet-deploy, by name."""
    return {path.stem: path for path in sorted(_PACKAGE.glob("*.knet"))}


def default_bundle_path() -> Path:
    """The folder of the semantic model that is packaged with knet-deploy; BundleError if there is
    none."""
    if (path := packaged_models().get("default")) is None:
        raise BundleError(
            "this build of knet-deploy carries no model of its own: name a bundle, "
            "the folder NAME.knet that the export wrote"
        )
    return path


def check_own(bundle: Bundle) -> None:
    """OutputError, with what to do, for a packaged model: nothing is written into it."""
    if bundle.is_packaged:
        folder = bundle.path.resolve()
        raise OutputError(
            f"{bundle.path}: is packaged with knet-deploy and stays as it was installed; copy it, "
            f"and name the copy: cp -r {shlex.quote(str(folder))} {folder.name}"
        )


def record_parity(bundle: Bundle, kind: Kind, parity: Parity) -> None:
    """Store what was measured of the ``kind`` graph in ``manifest.json`` on disk, in place of
    what was measured on the same engine and device before. The file is exchanged whole.

    Raises BundleError when it cannot be read, OutputError when it cannot be written, as a packaged
    one's never is.
    """
    check_own(bundle)
    path = bundle.path / MANIFEST_NAME
    with _naming(str(path)):
        data = path.read_bytes()
    manifest = decode_manifest(data)
    same = (parity.engine, parity.device)
    graphs = []
    for graph in manifest.graphs:
        kept = [record for record in graph.parity if (record.engine, record.device) != same]
        fresh = msgspec.structs.replace(graph, parity=(*kept, parity))
        graphs.append(fresh if graph.kind == kind else graph)
    changed = msgspec.structs.replace(manifest, graphs=tuple(graphs))
    try:
        write_atomic(path, encode_manifest(changed))
    except OSError as error:
        raise output_error(path, error) from error


def write_bundle(
    destination: Path,
    manifest: Manifest,
    files: Mapping[str, bytes | Path],
    *,
    replace: bool = False,
) -> Bundle:
    """Write the bundle ``destination`` (a folder that is made) and open it again to check it.

    ``files`` maps paths within the bundle to contents or to files to copy; ``manifest.files`` is
    measured here, whatever it held. All is written to a hidden folder beside ``destination`` and
    renamed: at no time is there half a bundle under that name. An existing bundle is exchanged
    only with ``replace``, and stays if anything fails.
    Raises BundleError when the files do not fit the manifest, OutputError when the folder cannot
    be written.
    """
    destination = Path(destination).absolute()
    _check_files(manifest, files)
    _check_destination(destination, replace)
    try:
        with AtomicFolder(destination) as fresh:
            records = {name: _write(fresh.path / name, content) for name, content in files.items()}
            whole = msgspec.structs.replace(manifest, files=records)
            _write(fresh.path / MANIFEST_NAME, encode_manifest(whole))
            bundle = open_bundle(fresh.path)
            fresh.commit()
    except OSError as error:
        raise OutputError(f"{destination}: cannot be written: {_why(error)}") from error
    return Bundle(destination, bundle.manifest)


def _check_files(manifest: Manifest, files: Mapping[str, bytes | Path]) -> None:
    try:
        check_paths(list(files))
    except ValueError as error:
        raise BundleError(str(error)) from error
    for graph in manifest.graphs:
        for path in graph.files:
            if path not in files:
                raise BundleError(f"graph file {path!r} is not among the files to write: add it")


def _check_destination(destination: Path, replace: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not replace:
        raise OutputError(f"{destination} exists already: choose another name, or replace it")
    # Replacing deletes the old folder, so it must be one that we wrote.
    if not (destination / MANIFEST_NAME).is_file():
        raise OutputError(f"{destination} exists and is no bundle: choose another name")


def _write(path: Path, content: bytes | Path) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return FileRecord(hashlib.sha256(content).hexdigest(), len(content))
    with path.open("xb") as target, content.open("rb") as source:
        return _measure(source, target)


def _measure(source: BinaryIO, copy: BinaryIO | None = None) -> FileRecord:
    """Size and SHA-256 of what ``source`` holds, copied to ``copy`` while it is read."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        size += len(block)
        if copy is not None:
            copy.write(block)
    return FileRecord(digest.hexdigest(), size)


def _check_file(path: Path, expected: FileRecord) -> None:
    size = _size(path)
    if size != expected.bytes:
        raise BundleError(
            f"is damaged (it has {size} bytes, the manifest says {expected.bytes}); "
            "copy the bundle again"
        )
    with path.open("rb") as source:
        if _measure(source).sha256 != expected.sha256:
            raise BundleError(
                "is damaged (its SHA-256 is not the manifest's); copy the bundle again"
            )


def _check_no_link(root: Path, relative: str) -> None:
    """An engine looks for a graph's weights beside the graph, or beside what it is a link to."""
    if (root / relative).resolve() != root.resolve() / relative:
        raise BundleError("is or goes through a link; put the file itself there")


def _check_external_data(root: Path, graph: Graph, size: int) -> None:
    """BundleError when the graph reads weights from anything but its ``external_data``, spelt as
    there."""
    if not graph.path.endswith(".onnx"):
        # By another name engines take it for another format, which names other files.
        raise BundleError("is a graph and must end in .onnx; export it again")
    folder = graph.path.rpartition("/")[0]
    read = set()
    if size:  # nothing cannot be mapped
        with (
            (root / graph.path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            try:
                read = external_locations(data)
            except ValueError as error:
                raise BundleError(f"cannot be taken: {error}; export it again") from error
    found = {f"{folder}/{location}" if folder else location for location in read}
    for name in sorted(found - set(graph.external_data)):
        raise BundleError(
            f"reads weights from {name[:100]!r}, which the manifest does not list as its external "
            "data; export it again"
        )


def _inside(root: Path, relative: str) -> Path:
    """``root / relative``, unless a symbolic link on the way leads out of ``root``."""
    path = root / relative
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except RuntimeError:  # a link that leads to itself, before Python 3.13
        inside = False
    if not inside:
        raise BundleError("is a link that leaves the bundle; put the file itself there")
    return path


def _why(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{reason} ({error.filename})" if error.filename else reason
