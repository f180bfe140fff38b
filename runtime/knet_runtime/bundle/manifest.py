"""The manifest: what a bundle says about itself, as frozen values that refuse unknown keys.

``manifest.json`` is the contract between the packages. It states the task, the image that the
graphs take, the label map, the size and SHA-256 of every file, where the weights came from, the
licences, and per graph its outputs, the tolerance it is held to, and the parity that was measured
on which engine and device.
"""

from __future__ import annotations

import math
import re
import unicodedata
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from knet_runtime.errors import BundleError
from knet_runtime.labels import LabelMap
from knet_runtime.types import Size, Task

SCHEMA = 3
OLDEST_SCHEMA = 2  # that is read, and upgraded in memory
MANIFEST_NAME = "manifest.json"

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Kind = Literal["logits", "classmap"]  # what a graph gives
Meaning = Literal["semantic_logits", "class_map", "class_logits", "mask_logits"]

_CHANNELS: dict[Meaning, int] = {  # sizes of an output before its height and width
    "semantic_logits": 1,
    "class_map": 0,
    "class_logits": 2,
    "mask_logits": 1,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Bounds, so that no bundle keeps whoever opens it busy for long; real ones are far below.
_MAX_FILES = 1000
_MAX_PATH = 255  # characters
_MAX_SIDE = 1 << 14  # pixels
_MAX_BATCH = 1 << 10
_MAX_REASON = 300  # characters of an error that may quote the manifest


def name_for(folder: Path) -> str:
    """The name of a bundle that is written to ``folder`` (NAME.knet): what a name cannot hold
    becomes "-", and letters lose their accents."""
    plain = unicodedata.normalize("NFKD", folder.name.removesuffix(".knet"))
    plain = plain.encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:100] or "model"


class SizeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes that a graph of free height and width takes: each side from ``min``'s to ``max``'s
    (height, width), in multiples of ``multiple``."""

    min: Size
    max: Size
    multiple: int

    def __post_init__(self) -> None:
        if self.multiple < 1 or min(self.min) < 1:
            raise ValueError(f"sizes from {self.min} in multiples of {self.multiple}: both >= 1")
        if self.min[0] > self.max[0] or self.min[1] > self.max[1]:
            raise ValueError(f"sizes from {self.min} to {self.max} hold none")
        if any(side % self.multiple for side in (*self.min, *self.max)):
            raise ValueError(
                f"{self.min} and {self.max} must be multiples of {self.multiple}, as all are"
            )

    def __contains__(self, size: object) -> bool:
        if not isinstance(size, tuple) or len(size) != 2:
            return False
        return all(
            low <= side <= high and side % self.multiple == 0
            for side, low, high in zip(size, self.min, self.max, strict=True)
        )


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graphs' input: uint8 [B, height, width, 3] RGB, 1 <= B <= max_batch.

    ``resize`` says how an image of another size is fitted: "stretch" ignores its aspect ratio,
    "letterbox" keeps it and pads; the image then lies on multiples of ``multiple``, as height and
    width are and as the outputs' strides ask for. With ``sizes`` the graphs take other heights and
    widths too, and these are the ones that they are run at unless somebody asks for others
    (``Bundle.with_input_size``).
    """

    name: str
    height: int
    width: int
    resize: Literal["stretch", "letterbox"] = "stretch"
    max_batch: int = 1
    multiple: int = 4  # the stride of K-Net's logits
    layout: Literal["NHWC"] = "NHWC"
    colour: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    sizes: SizeRange | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the input needs the name of the graph's input tensor")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an input of {self.height}×{self.width} pixels holds no image")
        if self.height > _MAX_SIDE or self.width > _MAX_SIDE:
            raise ValueError(f"the input's sides may have {_MAX_SIDE} pixels at most")
        if not 1 <= self.max_batch <= _MAX_BATCH:
            raise ValueError(f"max_batch {self.max_batch} must be 1 to {_MAX_BATCH}")
        if self.multiple < 1:
            raise ValueError(f"multiple {self.multiple} must be at least 1")
        if self.height % self.multiple or self.width % self.multiple:
            raise ValueError(
                f"input {self.height}×{self.width} must be a multiple of {self.multiple}"
            )
        if self.sizes is None:
            return
        if self.sizes.multiple % self.multiple:
            raise ValueError(
                f"sizes in multiples of {self.sizes.multiple} must be multiples of {self.multiple}"
            )
        if max(self.sizes.max) > _MAX_SIDE:
            raise ValueError(f"sizes may go to {_MAX_SIDE} pixels at most")
        if self.size not in self.sizes:
            raise ValueError(
                f"an input of {self.height}×{self.width} pixels is not among the sizes "
                f"{_times(self.sizes.min)} … {_times(self.sizes.max)} "
                f"(multiples of {self.sizes.multiple})"
            )

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.height, self.width


class OutputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output tensor of a graph: its name, what it means, and its shape per image.

    - "semantic_logits": float32 [classes, height / stride, width / stride]
    - "class_map": uint8 [height, width], the class of each pixel
    - "class_logits": float32 [kernels, classes], the classes of each kernel's mask
    - "mask_logits": float32 [kernels, height / stride, width / stride], the mask of each kernel

    ``channels`` are the sizes before height and width; ``stride`` is in pixels of the input, None
    where there is no height and width.
    """

    name: str
    meaning: Meaning
    channels: tuple[int, ...] = ()
    stride: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("an output needs the name of the graph's output tensor")
        if len(self.channels) != _CHANNELS[self.meaning] or min(self.channels, default=1) < 1:
            raise ValueError(
                f"{self.name}: {self.meaning} has {_CHANNELS[self.meaning]} channels of at least "
                f"1, not {list(self.channels)}"
            )
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride {self.stride} must be at least 1")
        right = {"class_logits": self.stride is None, "class_map": self.stride == 1}
        if not right.get(self.meaning, self.stride is not None):
            raise ValueError(f"{self.name}: {self.meaning} cannot have stride {self.stride}")

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        """The type of its numbers."""
        return "uint8" if self.meaning == "class_map" else "float32"

    def shape(self, size: Size) -> tuple[int, ...]:
        """Its shape for one image at the input's ``size`` (height, width)."""
        if self.stride is None:
            return self.channels
        return *self.channels, size[0] // self.stride, size[1] // self.stride


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of one file of the bundle."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 must be 64 lower-case hexadecimal digits")
        if self.bytes < 0:
            raise ValueError(f"a file cannot hold {self.bytes} bytes")


_SHARES = ("agreement", "agreement_confident")  # limits from below; the others are from above
_OUTSIDE = {
    "delta_miou": "ΔmIoU {:+.3f} points is outside ±{:g}",
    "worst_class_delta_iou": "ΔIoU of the worst class {:+.3f} points is outside ±{:g}",
    "agreement": "pixel agreement {:.6f} is below {:g}",
    "agreement_confident": "agreement of confident pixels {:.6f} is below {:g}",
    "max_logit_diff": "largest logit difference {:.2e} is above {:g} of the largest logit",
    "mean_logit_diff": "mean logit difference {:.2e} is above {:g} of the largest logit",
}


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a graph may be from its PyTorch reference before it is refused.

    ``delta_miou`` (two-sided) and ``worst_class_delta_iou`` are in points (0 … 100) of IoU, of a
    panoptic network of PQ, of one for instances of AP;
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
        for name, value in msgspec.structs.asdict(self).items():
            if name in _SHARES and not 0 < value <= 1:
                raise ValueError(f"tolerance {name} must be in (0, 1], not {value}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"tolerance {name} must be a positive number, not {value}")

    def failures(self, **measured: float | None) -> dict[str, str]:
        """What of the measured, named as the fields are, is outside: in words, by name. NaN is
        outside; None was not measured."""
        found = {}
        for name, value in measured.items():
            limit, words = getattr(self, name), _OUTSIDE[name]
            if value is None:
                continue
            if not (value >= limit if name in _SHARES else abs(value) <= limit):
                found[name] = words.format(value, limit)
        return found


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was measured between a graph on one ``engine`` and ``device`` and its reference, on
    ``images`` images of ``data``, and whether that ``passed`` the tolerance of that day.

    mIoU (PQ, AP) in percent and differences in points; None where the images had no labels. The
    logit difference is a share of the reference's largest logit; None for a graph that gives class
    maps, and where it gave NaN or infinity.
    """

    engine: str
    device: str
    passed: bool
    miou_reference: float | None
    miou_measured: float | None
    delta_miou: float | None
    worst_class_delta_iou: float | None
    agreement: float
    max_logit_diff: float | None
    images: int
    data: str


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One runnable graph: its file, what it gives, the tolerance it is held to, and the parity
    measured, one record per engine and device.

    ``kind`` "logits" gives what the network gives; "classmap" carries the upsampling and the argmax
    too, for GPUs. ``external_data`` names the files it reads weights from, when they are not in the
    graph itself; both kinds may read the same.
    """

    path: str
    kind: Kind = "logits"
    outputs: tuple[OutputSpec, ...]
    format: Literal["onnx"] = "onnx"
    precision: Precision = "fp32"
    tolerance: Tolerance
    parity: tuple[Parity, ...] = ()
    external_data: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Its file, then those that it reads weights from: paths within the bundle."""
        return self.path, *self.external_data

    def output(self, meaning: Meaning) -> OutputSpec:
        """The output that means this. Raises BundleError where it has none."""
        for output in self.outputs:
            if output.meaning == meaning:
                return output
        given = ", ".join(output.meaning for output in self.outputs)
        raise BundleError(f"{self.path} gives {given}, which is not the {meaning} asked for")

    def parity_on(self, engine: str, device: str) -> Parity | None:
        """What was measured on this engine and device, if anything was."""
        same = (each for each in self.parity if (each.engine, each.device) == (engine, device))
        return next(same, None)


class SegmentRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How masks become segments; the published K-Nets' numbers.

    ``score`` (0 … 1): objects below it are left out. ``mask``: the probability above which a pixel
    belongs to a mask. ``overlap`` (panoptic): a segment that won a smaller part of its own mask is
    left out. ``top_k`` (instances): how many pairs of a kernel and a class are looked at. ``nms``:
    of two kernels whose masks have a larger IoU the surer one is kept; 1 keeps both, as the
    published K-Nets do. Raises ValueError for what lies outside.

        >>> from knet_deploy import SegmentRules
        >>> SegmentRules(score=0.5).top_k
        100
    """

    score: float = 0.3
    mask: float = 0.5
    overlap: float = 0.6
    top_k: int = 100
    nms: float = 1.0

    def __post_init__(self) -> None:
        for name in ("score", "mask", "overlap"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it lies in 0 … 1")
        if not 0 < self.nms <= 1:
            raise ValueError(f"nms is {self.nms}; it lies above 0 and up to 1")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least 1 is looked at")


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
    task: Task = "semantic"
    input: InputSpec
    labels: LabelMap
    graphs: tuple[Graph, ...]
    files: dict[str, FileRecord] = {}
    provenance: Provenance
    licence: Licence
    rules: SegmentRules | UnsetType = UNSET  # of other tasks than semantic

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} is not the schema {SCHEMA} of this version")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must be 1 … 100 letters, digits, '.', '_' or '-', "
                "and begin with a letter or digit"
            )
        kinds = [graph.kind for graph in self.graphs]
        if kinds not in (["logits"], ["logits", "classmap"]):
            raise ValueError(
                f"a bundle needs a logits graph and may have a classmap graph after it, not {kinds}"
            )
        if len({graph.precision for graph in self.graphs}) > 1:
            raise ValueError("the graphs of one bundle have one precision")
        for graph in self.graphs:
            self._check_outputs(graph)
            if len(set(graph.files)) < len(graph.files):
                raise ValueError(f"the graph {graph.path} names a file twice")
        check_paths(list(self.files))
        for path in (path for graph in self.graphs for path in graph.files):
            if self.files and path not in self.files:
                raise ValueError(f"graph file {path!r} is not listed in files")

    @property
    def segment_rules(self) -> SegmentRules:
        """How masks become segments: as stated, or by the published numbers."""
        return SegmentRules() if self.rules is UNSET else self.rules

    @property
    def precision(self) -> Precision:
        """That of every graph."""
        return self.graphs[0].precision

    def graph(self, kind: Kind) -> Graph:
        """The graph that gives logits or class maps; BundleError where there is none."""
        for graph in self.graphs:
            if graph.kind == kind:
                return graph
        raise BundleError(f"{self.name} holds no {kind} graph: export it again")

    def _check_outputs(self, graph: Graph) -> None:
        """The outputs are those of the task and the graph's kind, and fit the labels and input."""
        expected: tuple[Meaning, ...] = ("class_logits", "mask_logits")
        if self.task == "semantic":
            expected = ("semantic_logits",) if graph.kind == "logits" else ("class_map",)
        elif graph.kind == "classmap":
            raise ValueError(f"a classmap graph is for semantic bundles, this one is {self.task}")
        found = [output.meaning for output in graph.outputs]
        if sorted(found) != sorted(expected):
            raise ValueError(
                f"a {graph.kind} graph of a {self.task} bundle gives {' and '.join(expected)}, "
                f"not {', '.join(found) or 'nothing'}"
            )
        if len({output.name for output in graph.outputs}) < len(graph.outputs):
            raise ValueError(f"the outputs of {graph.path} must have different names")
        for output in graph.outputs:
            if output.stride is not None and self.input.multiple % output.stride:
                raise ValueError(
                    f"the input's multiple {self.input.multiple} must be a multiple of "
                    f"{output.name}'s stride {output.stride}"
                )
            with_classes = output.meaning in ("semantic_logits", "class_logits")
            if with_classes and output.channels[-1] != self.labels.num_classes:
                raise ValueError(
                    f"{output.name} has {output.channels[-1]} classes, "
                    f"the labels have {self.labels.num_classes}"
                )
        if self.task != "semantic" and len({output.channels[0] for output in graph.outputs}) > 1:
            raise ValueError(f"the outputs of {graph.path} have different numbers of kernels")
        stuff = self.labels.num_classes - len(self.labels.things)
        if self.task == "panoptic" and graph.output("class_logits").channels[0] < stuff:
            raise ValueError(f"{graph.path} has fewer kernels than the {stuff} classes of stuff")


def check_paths(paths: list[str]) -> None:
    """Refuse (ValueError) paths that could leave the bundle's folder or collide in it, that are
    longer than 255 characters, and more than 1,000 of them."""
    if len(paths) > _MAX_FILES:
        raise ValueError(f"a bundle has {_MAX_FILES} files at most, not {len(paths)}")
    seen: dict[str, str] = {}
    for path in paths:
        if reason := _unsafe(path):
            shown = path if len(path) <= _MAX_PATH else f"{path[:60]}…"
            raise ValueError(f"unsafe path {shown!r}: {reason}")
        # Some file systems fold case: two such files would overwrite each other when copied there.
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            raise ValueError(f"paths {other!r} and {path!r} differ only in case")
    for path in seen:
        for folder in accumulate(path.split("/")[:-1], "{}/{}".format):
            if folder in seen:
                raise ValueError(f"{seen[folder]!r} is both a file and a folder")
    if MANIFEST_NAME in seen:
        raise ValueError(f"{MANIFEST_NAME} cannot list itself")


def _unsafe(path: str) -> str | None:
    if not path:
        return "it is empty"
    if len(path) > _MAX_PATH:
        return f"it has more than {_MAX_PATH} characters"
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
    """Read the bytes of a ``manifest.json``; one of schema 2 is upgraded.

    Raises BundleError when they are not valid JSON, were written by a newer or too old version, or
    hold an unknown key, a wrong type, an unsafe path, or a graph that ``files`` does not list.
    """
    try:
        # The number is read first: a newer schema may have fields that are unknown here.
        schema = msgspec.json.decode(data, type=_Schema).schema
        if not OLDEST_SCHEMA <= schema <= SCHEMA:
            newer = schema > SCHEMA
            raise BundleError(
                f"{MANIFEST_NAME} was written by {'a newer' if newer else 'an older'} version "
                f"(schema {schema}, this one reads {OLDEST_SCHEMA} to {SCHEMA}): "
                f"{'upgrade knet-deploy' if newer else 'export the bundle again'}"
            )
        if schema == SCHEMA:
            manifest = msgspec.json.decode(data, type=Manifest)
        else:
            manifest = msgspec.convert(_upgraded(msgspec.json.decode(data)), Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{MANIFEST_NAME} cannot be read: {_one_line(error)}; copy or export the bundle again"
        ) from error
    if not manifest.files:
        raise BundleError(f"{MANIFEST_NAME} lists no files; export the bundle again")
    return manifest


def _one_line(error: Exception) -> str:
    """Its text, which may quote whatever the manifest holds, as a short line."""
    text = str(error)
    if len(text) > _MAX_REASON:
        text = f"{text[: _MAX_REASON // 2]} … {text[-_MAX_REASON // 2 :]}"
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """The JSON of schema 2 as that of schema 3. It knew the semantic task only, stated the logits
    of one graph for all of them, and called some things by other words."""
    try:
        new = old | {"schema": SCHEMA, "graphs": old["artefacts"]}
        del new["artefacts"]
        logits = {"stride": 4} | new.pop("output")
        outputs = {
            "logits": logits
            | {"meaning": "semantic_logits", "channels": [len(old["labels"]["names"])]},
            "classmap": {"name": "classmap", "meaning": "class_map", "stride": 1},
        }
        new["input"]["multiple"] = logits["stride"]
        if sizes := new["input"].get("sizes"):
            sizes["min"], sizes["max"] = sizes.pop("least"), sizes.pop("most")
        for graph in new["graphs"]:
            graph["outputs"] = [outputs[graph.get("kind", "logits")]]
            for record in graph.get("parity", []):
                record["miou_measured"] = record.pop("miou_artefact")
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise msgspec.ValidationError(
            f"it is not as schema {old['schema']} has it ({what})"
        ) from error
    return new


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as UTF-8 JSON, indented by two, keys in a stable order, with a final newline."""
    ordered = msgspec.structs.replace(manifest, files=dict(sorted(manifest.files.items())))
    return (
        msgspec.json.format(msgspec.json.encode(ordered, order="deterministic"), indent=2) + b"\n"
    )


def _times(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
