"""Temperatures and clocks from a folder that looks like Linux's /sys."""

from __future__ import annotations

from pathlib import Path

from knet_runtime.web.status import Sensors, read_sensors


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_what_can_be_read_is_read(tmp_path: Path) -> None:
    zones = tmp_path / "class/thermal"
    for number, (kind, value) in enumerate(
        [("cpu-thermal", "51500"), ("cpu-thermal", "48000"), ("cv0-thermal", "-256000")]
    ):
        write(zones / f"thermal_zone{number}/type", f"{kind}\n")
        write(zones / f"thermal_zone{number}/temp", f"{value}\n")
    write(zones / "thermal_zone3/type", "odd\n")
    write(zones / "thermal_zone3/temp", "?\n")
    (zones / "thermal_zone4").mkdir()
    for core, hertz in ((0, "1200000"), (1, "1510000")):
        folder = tmp_path / f"devices/system/cpu/cpu{core}/cpufreq"
        write(folder / "scaling_cur_freq", hertz)
        write(folder / "cpuinfo_max_freq", "2400000")
    machine = read_sensors(tmp_path)
    assert machine.temperatures == {"cpu-thermal": 51.5, "cpu-thermal 1": 48.0}
    assert (machine.clock, machine.clock_limit) == (1.51e9, 2.4e9)


def test_what_can_not_be_read_is_absent(tmp_path: Path) -> None:
    assert read_sensors(tmp_path) == Sensors({}, None, None)
