"""Plans, kept in the bundle under a key of all that they depend on.

A plan is machine code for one graph, one release of an engine and one GPU. What was built stands in
``NAME.knet/engines/`` as ``ENGINE-KEY.plan`` with a ``.json`` of the same name that says all of
this. Only a plan whose record fits this machine and whose bytes have the recorded hash is handed
out: a plan is code, so a foreign or damaged one is never given to its engine.

What else an engine or its builder keeps for the next time has its place here too: a
``StoredPlan.runtime_cache`` beside the plan, and ``timing_cache`` for the builder.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import NamedTuple

import msgspec

from knet_runtime.atomic import make_folder, output_error, remove_empty, write_atomic
from knet_runtime.bundle.manifest import Kind, Precision
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.hardware import Gpu
from knet_runtime.errors import EngineError, EngineUnavailable

FOLDER = "engines"
_KEY_DIGITS = 16
_NAME = f"-{'[0-9a-f]' * _KEY_DIGITS}.plan"  # not those of tensorrt-rtx for tensorrt


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """So many images of so many pixels."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shapes that a plan takes, from ``min`` to ``max``; it is fastest at ``opt``."""

    min: Shape
    opt: Shape
    max: Shape


class BuildOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the builder was told. ``workspace`` is in MiB; None leaves a choice to the builder."""

    profile: Profile
    workspace: int | None = None
    optimization_level: int | None = None


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is known of a plan.

    ``engine`` runs it, of release ``version``. ``files`` are the SHA-256 of the graph and of its
    external data. ``gpu`` is the one it was built on, or None when it was built ahead of time for
    the architectures in ``targets``. ``layers`` counts its layers, "type precision" each, where a
    GPU was there to look into it.
    """

    engine: str
    version: str
    kind: Kind
    precision: Precision
    files: dict[str, str]
    gpu: Gpu | None
    targets: tuple[str, ...] = ()
    options: BuildOptions
    sha256: str
    bytes: int
    seconds: float
    built: str
    layers: dict[str, int] | None = None

    @property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of what decides whether it fits."""
        decides = {
            "files": self.files,
            "kind": self.kind,
            "engine": [self.engine, self.version],
            "for": msgspec.to_builtins(self.gpu) if self.gpu else sorted(self.targets),
            "options": msgspec.to_builtins(self.options),
        }
        return digest(msgspec.json.encode(decides, order="sorted"))[:_KEY_DIGITS]


class StoredPlan(NamedTuple):
    """A plan on disk and what is known of it."""

    path: Path
    record: PlanRecord

    @property
    def runtime_cache(self) -> Path:
        """Where the engine may keep what it compiles when the plan first runs."""
        return self.path.with_suffix(".cache")

    def read(self) -> bytes:
        """The plan. Raises EngineUnavailable when its bytes are not those that were built."""
        rebuild = (
            f"knet-deploy build {shlex.quote(str(self.path.parents[1]))} "
            f"--engine {self.record.engine} --graph {self.record.kind} --force"
        )
        try:
            plan = self.path.read_bytes()
        except OSError as error:
            raise EngineUnavailable(
                f"{self.path} cannot be read ({error.strerror}): {rebuild}"
            ) from error
        if digest(plan) != self.record.sha256:
            raise EngineUnavailable(
                f"{self.path} is damaged (its SHA-256 is not the recorded one), so it is not "
                f"loaded: {rebuild}"
            )
        return plan


def digest(plan: bytes) -> str:
    """The SHA-256 that a record states of its plan."""
    return hashlib.sha256(plan).hexdigest()


def graph_hashes(bundle: Bundle, kind: Kind) -> dict[str, str]:
    """The SHA-256 of the files that a plan of this kind is made from."""
    return {name: bundle.manifest.files[name].sha256 for name in bundle.graph(kind).files}


def plan_path(bundle: Bundle, record: PlanRecord) -> Path:
    """Where the plan of this record stands."""
    return bundle.path / FOLDER / f"{record.engine}-{record.key}.plan"


def stored_plans(bundle: Bundle) -> list[Path]:
    """The plans in the bundle, of whatever engine, by name."""
    return sorted((bundle.path / FOLDER).glob("*.plan"))


def plans_digest(bundle: Bundle) -> str:
    """A SHA-256 that changes with every plan that is built in the bundle: of all records, which
    hold the hash of each."""
    records = sorted((bundle.path / FOLDER).glob("*.json"))
    return digest(b"".join(path.read_bytes() for path in records))


def timing_cache(bundle: Bundle, engine: str, version: str, sm: str) -> Path:
    """Where this builder may keep what it measured on GPUs of this architecture."""
    return bundle.path / FOLDER / f"{engine}-{version}-{sm}.timing"


def store_plan(bundle: Bundle, plan: bytes, record: PlanRecord) -> StoredPlan:
    """Write plan and record; the record comes last, and without it a plan does not count.

    Raises OutputError; nothing new is left then.
    """
    path = plan_path(bundle, record)
    text = msgspec.json.format(msgspec.json.encode(record, order="deterministic")) + b"\n"
    created: list[Path] = []
    try:
        created = make_folder(path.parent)
        _json(path).unlink(missing_ok=True)  # no moment at which an old record meets a new plan
        write_atomic(path, plan)
        try:
            write_atomic(_json(path), text)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        remove_empty(created)
    return StoredPlan(path, record)


def read_record(path: Path) -> PlanRecord:
    """The record beside the plan ``path``. Raises EngineError when there is none to read."""
    try:
        return msgspec.json.decode(_json(path).read_bytes(), type=PlanRecord)
    except OSError as error:
        raise EngineError(f"has no record that can be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"has a record that cannot be understood ({error})") from error


def find_plan(bundle: Bundle, engine: str, kind: Kind, version: str, gpu: Gpu) -> StoredPlan:
    """The latest plan in ``bundle`` that fits this release of the engine, this GPU and the size
    that the bundle runs at.

    Raises EngineUnavailable that names the plan that comes nearest, all in which it differs, and
    the command that builds the right one.
    """
    fitting: list[StoredPlan] = []
    others: list[tuple[Path, list[str]]] = []
    for path in sorted((bundle.path / FOLDER).glob(engine + _NAME)):
        try:
            record = read_record(path)
        except EngineError as error:
            others.append((path, [str(error)]))
            continue
        if reasons := _differences(path, record, bundle, kind, version, gpu):
            others.append((path, reasons))
        else:
            fitting.append(StoredPlan(path, record))
    if fitting:
        return max(fitting, key=lambda stored: (stored.record.built, stored.path.name))
    nearest = ""
    if others:
        path, reasons = min(others, key=lambda other: len(other[1]))
        nearest = f": {path.name} {'; it '.join(reasons)}"
    raise EngineUnavailable(
        f"{bundle.path} holds no {engine} plan for this machine{nearest}: knet-deploy build "
        f"{shlex.quote(str(bundle.path))} --engine {engine} --graph {kind}"
    )


def _differences(
    path: Path, record: PlanRecord, bundle: Bundle, kind: Kind, version: str, gpu: Gpu
) -> list[str]:
    reasons = []
    if path.stem != f"{record.engine}-{record.key}":
        reasons.append("is not named after its record")
    if record.kind != kind:
        reasons.append(f"gives {record.kind}, not {kind}")
    elif record.files != graph_hashes(bundle, kind):
        reasons.append("was built from another graph or other weights")
    if record.version != version:
        reasons.append(f"was built by {record.engine} {record.version}, this is {version}")
    if record.gpu is None:
        if gpu.sm not in record.targets:
            reasons.append(f"was built for {', '.join(record.targets)}, this GPU is {gpu.sm}")
    else:
        if (record.gpu.name, record.gpu.sm) != (gpu.name, gpu.sm):
            built_on = f"{record.gpu.name} ({record.gpu.sm})"
            reasons.append(f"was built on {built_on}, this GPU is {gpu.name} ({gpu.sm})")
        if record.gpu.driver != gpu.driver:
            reasons.append(f"was built with driver {record.gpu.driver}, this is {gpu.driver}")
    profile, spec = record.options.profile, bundle.manifest.input
    rows = profile.min.height <= spec.height <= profile.max.height
    columns = profile.min.width <= spec.width <= profile.max.width
    if not (rows and columns):
        reasons.append(
            f"takes {profile.min} to {profile.max}, not {spec.height}x{spec.width} pixels"
        )
    return reasons


def _json(path: Path) -> Path:
    return path.with_suffix(".json")
