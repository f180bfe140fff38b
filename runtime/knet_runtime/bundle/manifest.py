"""The manifest: what a bundle says about itself, as frozen values that refuse unknown keys.

``manifest.json`` is the contract between the rooms. It states the picture the graph takes, the
logits it gives, the label map, the size and SHA-256 of every file, where the weights came from, the
licences, and per artefact the tolerance it is held to and the parity that was measured on which
engine and device.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from knet_runtime.errors import BundleError
from knet_runtime.labels import LabelMap
from knet_runtime.types import Size

SCHEMA = 2
MANIFEST_NAME = "manifest.json"

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Kind = Literal["logits", "classmap"]  # what a graph gives
CLASSMAP_OUTPUT = "classmap"  # the name of the classmap graph's output tensor

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class SizeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes that a graph of dynamic height and width takes: each side from ``least``'s to
    ``most``'s (height, width), in multiples of ``multiple``."""

    least: Size
    most: Size
    multiple: int

    def __post_init__(self) -> None:
        if self.multiple < 1 or min(self.least) < 1:
            raise ValueError(f"sizes from {self.least} in multiples of {self.multiple}: both >= 1")
        if self.least[0] > self.most[0] or self.least[1] > self.most[1]:
            raise ValueError(f"sizes from {self.least} to {self.most} hold none")
        if any(side % self.multiple for side in (*self.least, *self.most)):
            raise ValueError(
                f"{self.least} and {self.most} must be multiples of {self.multiple}, as all are"
            )

    def __contains__(self, size: object) -> bool:
        if not isinstance(size, tuple) or len(size) != 2:
            return False
        return all(
            low <= side <= high and side % self.multiple == 0
            for side, low, high in zip(size, self.least, self.most, strict=True)
        )


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph's input: uint8 [B, height, width, 3] RGB, 1 <= B <= max_batch.

    ``resize`` says how a picture of another size is fitted: "stretch" ignores its aspect ratio,
    "letterbox" keeps it and pads. With ``sizes`` the graph takes other heights and widths too, and
    these are the ones that it is run at unless somebody asks for others (``Bundle.at``).
    """

    name: str
    height: int
    width: int
    resize: Literal["stretch", "letterbox"] = "stretch"
    max_batch: int = 1
    layout: Literal["NHWC"] = "NHWC"
    colour: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    sizes: SizeRange | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the input needs the name of the graph's input tensor")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an input of {self.height}×{self.width} pixels holds no picture")
        if self.max_batch < 1:
            raise ValueError(f"max_batch {self.max_batch} must be at least 1")
        if self.sizes is not None and (self.height, self.width) not in self.sizes:
            raise ValueError(
                f"an input of {self.height}×{self.width} pixels is not among the sizes "
                f"{_times(self.sizes.least)} … {_times(self.sizes.most)} "
                f"(multiples of {self.sizes.multiple})"
            )


class OutputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The output of the ``logits`` graph, float32 [B, N, height / stride, width / stride] logits of
    N classes; and of the ``classmap`` graph, uint8 [B, height, width] classes at the input's size.
    """

    name: str
    stride: int = 4

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the output needs the name of the graph's output tensor")
        if self.stride < 1:
            raise ValueError(f"stride {self.stride} must be at least 1")


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of one file of the bundle."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 must be 64 lower-case hexadecimal digits")
        if self.bytes < 0:
            raise ValueError(f"a file can not hold {self.bytes} bytes")


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an artefact may be from its PyTorch reference before it is refused.

    ``delta_miou`` (two-sided) and ``worst_class_delta_iou`` are in IoU points (0 … 100),
    ``agreement`` is the least fraction of equal pixels (0 … 1), ``max_logit_diff`` and
    ``mean_logit_diff`` are shares of the reference's largest absolute logit.
    ``agreement_confident`` is ``agreement`` where the reference's best class leads by a logit.
    """

    delta_miou: float
    worst_class_delta_iou: float
    agreement: float
    max_logit_diff: float
    agreement_confident: float = 0.99
    mean_logit_diff: float = 0.05

    def __post_init__(self) -> None:
        for field in ("delta_miou", "worst_class_delta_iou", "max_logit_diff", "mean_logit_diff"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"tolerance {field} must be a positive number, not {value}")
        for field in ("agreement", "agreement_confident"):
            value = getattr(self, field)
            if not 0 < value <= 1:
                raise ValueError(f"tolerance {field} must be in (0, 1], not {value}")


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured between an artefact on one ``engine`` and ``device`` and its reference, on
    ``images`` pictures of ``data``, and whether that ``passed`` the tolerance of that day.

    mIoU in percent and differences in points; None where the pictures had no labels. The logit
    difference is a share of the reference's largest logit; None for a graph that gives class maps,
    and where it gave NaN or infinity.
    """

    engine: str
    device: str
    passed: bool
    miou_reference: float | None
    miou_artefact: float | None
    delta_miou: float | None
    worst_class_delta_iou: float | None
    agreement: float
    max_logit_diff: float | None
    images: int
    data: str


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One runnable graph: its file, what it gives, the tolerance it is held to, and the parity
    measured, one record per engine and device.

    ``kind`` "logits" gives the output that ``OutputSpec`` states, "classmap" carries the upsampling
    and the argmax too, for GPUs. ``external_data`` names the files it reads weights from, when they
    are not in the graph itself; both kinds may read the same.
    """

    path: str
    kind: Kind = "logits"
    format: Literal["onnx"] = "onnx"
    precision: Precision = "fp32"
    tolerance: Tolerance
    parity: tuple[Parity, ...] = ()
    external_data: tuple[str, ...] = ()

    def parity_on(self, engine: str, device: str) -> Parity | None:
        """What was measured on this engine and device, if anything was."""
        for record in self.parity:
            if (record.engine, record.device) == (engine, device):
                return record
        return None


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights came from: the checkpoint's SHA-256, its preset, the tools' versions."""

    checkpoint_sha256: str
    preset: str
    tools: dict[str, str]

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.checkpoint_sha256):
            raise ValueError("checkpoint_sha256 must be 64 lower-case hexadecimal digits")


class Licence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Under which licences the code, the weights and the training data stand."""

    code: str
    weights: str
    data: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole statement. ``files`` is empty only until the bundle is written."""

    schema: int = SCHEMA
    name: str
    input: InputSpec
    output: OutputSpec
    labels: LabelMap
    artefacts: tuple[Graph, ...]
    files: dict[str, FileRecord] = {}
    provenance: Provenance
    licence: Licence

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} is not the schema {SCHEMA} of this version")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must be 1 … 100 letters, digits, '.', '_' or '-', "
                "and begin with a letter or digit"
            )
        stride = self.output.stride
        if self.input.height % stride or self.input.width % stride:
            raise ValueError(
                f"input {self.input.height}×{self.input.width} must be a multiple of "
                f"the output's stride {stride}"
            )
        kinds = [artefact.kind for artefact in self.artefacts]
        if kinds not in (["logits"], ["logits", "classmap"]):
            raise ValueError(
                f"a bundle needs a logits artefact, and may have a classmap after it, not {kinds}"
            )
        if len({artefact.precision for artefact in self.artefacts}) > 1:
            raise ValueError("the artefacts of one bundle have one precision")
        check_paths(list(self.files))
        if self.files:
            self._check_listed()

    def _check_listed(self) -> None:
        for artefact in self.artefacts:
            for path in (artefact.path, *artefact.external_data):
                if path not in self.files:
                    raise ValueError(f"artefact file {path!r} is not listed in files")


def check_paths(paths: list[str]) -> None:
    """Refuse (ValueError) paths that could leave the bundle's folder or collide in it."""
    seen: dict[str, str] = {}
    for path in paths:
        if reason := _unsafe(path):
            raise ValueError(f"unsafe path {path!r}: {reason}")
        # Some file systems fold case: two such files would overwrite each other when copied there.
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            raise ValueError(f"paths {other!r} and {path!r} differ only in case")
    for path in seen:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in seen:
                raise ValueError(f"{seen['/'.join(parts[:depth])]!r} is both a file and a folder")
    if MANIFEST_NAME in seen:
        raise ValueError(f"{MANIFEST_NAME} can not list itself")


def _unsafe(path: str) -> str | None:
    if not path:
        return "it is empty"
    if "\\" in path or ":" in path:
        return "backslashes and colons mean another place on some systems"
    if not path.isprintable():
        return "it holds control characters"
    if path.startswith("/"):
        return "it is absolute"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "it holds an empty, '.' or '..' part"
    return None


class _Schema(msgspec.Struct):
    schema: int


def decode_manifest(data: bytes) -> Manifest:
    """Read the bytes of a ``manifest.json``.

    Raises BundleError when they are not valid JSON, were written by a newer version, or hold an
    unknown key, a wrong type, an unsafe path, or an artefact that ``files`` does not list.
    """
    try:
        # The number is read first: a newer schema may have fields that are unknown here.
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != SCHEMA:
            newer = schema > SCHEMA
            raise BundleError(
                f"{MANIFEST_NAME} was written by {'a newer' if newer else 'an older'} version "
                f"(schema {schema}, this one reads {SCHEMA}): "
                f"{'upgrade knet-deploy' if newer else 'export the bundle again'}"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{MANIFEST_NAME} can not be read: {error}; copy or export the bundle again"
        ) from error
    if not manifest.files:
        raise BundleError(f"{MANIFEST_NAME} lists no files; export the bundle again")
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as UTF-8 JSON, indented by two, keys in a stable order, with a final newline."""
    ordered = msgspec.structs.replace(manifest, files=dict(sorted(manifest.files.items())))
    return (
        msgspec.json.format(msgspec.json.encode(ordered, order="deterministic"), indent=2) + b"\n"
    )


def _times(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
