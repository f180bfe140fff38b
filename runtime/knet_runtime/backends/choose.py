"""Which engine ``auto`` takes: the first of an order that was proven for this bundle, here."""

from __future__ import annotations

from knet_runtime.backends.machine import gpu_name, processor_name
from knet_runtime.bundle import Bundle
from knet_runtime.manifest import Artefact, Kind

CPU_ENGINES = ("onnxruntime-cpu", "openvino", "openvino-bf16")
# Fastest first: TensorRT's own engines, then its providers, which may split the graph, then CUDA;
# on the CPU, bf16 where it is right, then ONNX Runtime, which runs everywhere and so ends the list.
PREFERENCE: tuple[str, ...] = (
    "tensorrt",
    "tensorrt-rtx",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "onnxruntime-cuda",
    "openvino-bf16",
    "onnxruntime-cpu",
)


def own_kind(bundle: Bundle, engine: str) -> Kind:
    """What ``engine`` runs when nobody says: GPUs the class map, which is less to bring back, where
    the bundle has it; processors the logits, for which the runtime's own tail is the faster."""
    kinds = [artefact.kind for artefact in bundle.manifest.artefacts]
    return "classmap" if engine not in CPU_ENGINES and "classmap" in kinds else "logits"


def device_of(engine: str) -> str | None:
    """The device that ``engine`` would run on; None when this machine has none."""
    return processor_name() if engine in CPU_ENGINES else gpu_name()


def doubt(artefact: Artefact, engine: str, device: str) -> str | None:
    """Why ``artefact`` on this engine and device is not proven right; None if verify passed it.

    What onnxruntime-cpu passed on one processor holds for the others, unless it failed there:
    every export is verified on it.
    """
    found = artefact.parity_on(engine, device)
    if found is not None:
        return None if found.passed else f"it did not pass verify on {device}"
    passed = any(parity.passed for parity in artefact.parity if parity.engine == engine)
    if passed and engine == "onnxruntime-cpu":
        return None
    return f"it was never verified on {device}"


def objection(bundle: Bundle, engine: str, kind: Kind | None = None) -> str | None:
    """Why ``auto`` may not take ``engine`` here; None if it may. onnxruntime-cpu needs no record,
    but one that says that it failed counts."""
    device = device_of(engine)
    if device is None:
        return "there is no NVIDIA GPU, or no driver for it"
    artefact = bundle.of_kind(kind or own_kind(bundle, engine))
    if engine == "onnxruntime-cpu" and artefact.parity_on(engine, device) is None:
        return None
    return doubt(artefact, engine, device)


def reason(bundle: Bundle, engine: str) -> str:
    """Why ``auto`` took ``engine`` here, in words: what spoke against those before it."""
    passed_over: dict[str, list[str]] = {}
    for earlier in PREFERENCE[: PREFERENCE.index(engine)]:
        # Nothing was against it, and it was not taken: so it did not open, as a warning said.
        against = objection(bundle, earlier) or "it passed verify but does not work now"
        passed_over.setdefault(against, []).append(earlier)
    if not passed_over:
        return "the first of auto's order"
    others = "; ".join(f"{', '.join(names)}: {why}" for why, names in passed_over.items())
    return f"the first of auto's order that may be taken here ({others})"
