"""How warm the machine is, and how fast its processor runs, where Linux lets it be read."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True):
    """Degrees Celsius by thermal zone, and the fastest core's clock and its ceiling in Hz.

    What can not be read is absent: an empty dict, None.
    """

    temperatures: dict[str, float]
    clock: float | None
    clock_limit: float | None


def read_machine(system: Path = Path("/sys")) -> Machine:
    """Read the sensors under ``system``; never raises."""
    temperatures: dict[str, float] = {}
    for zone in sorted((system / "class/thermal").glob("thermal_zone*")):
        value = _number(zone / "temp")
        # Zones that are switched off answer with nonsense, such as -256 degrees or 0.
        if value is not None and 0 < value < 200_000:
            name = _text(zone / "type") or zone.name
            if name in temperatures:
                name = f"{name} {zone.name.removeprefix('thermal_zone')}"
            temperatures[name] = value / 1000
    processors = list((system / "devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    return Machine(
        temperatures,
        _fastest([folder / "scaling_cur_freq" for folder in processors]),
        _fastest([folder / "cpuinfo_max_freq" for folder in processors]),
    )


def _fastest(files: list[Path]) -> float | None:
    values = [value for file in files if (value := _number(file)) is not None]
    return 1000 * max(values) if values else None  # from kHz


def _number(file: Path) -> float | None:
    try:
        return float(_text(file) or "")
    except ValueError:
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return None
