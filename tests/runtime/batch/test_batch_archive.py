"""A batch without Ray: the files of a single run, resumed, with failures by name."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import a_frame

from knet_runtime.batch.archive import find_sources, join, run_batch
from knet_runtime.batch.records import (
    WHOLE,
    BatchResults,
    Job,
    Outcome,
    Settings,
    SourceResult,
    key_of,
)
from knet_runtime.batch.worker import ChunkWorker
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import ConfigError, EngineError, OutputError, SourceError
from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import CocoPanoptic, CocoResults, JsonLines, MaskFolder
from knet_runtime.sources import open_source
from knet_runtime.tracking import Tracker
from knet_synthetic import CAMVID11

Video = Callable[[str], Path]
Files = Callable[[Path], dict[str, bytes]]


def read_results(out: Path) -> BatchResults:
    return msgspec.json.decode((out / "results.json").read_bytes(), type=BatchResults)


@pytest.mark.parametrize(
    "name",
    [
        "b-frames.mp4",
        "open-gop.ts",
        "refresh.mp4",
        "vfr.mkv",
        "interlaced.mp4",
        "one-key.mp4",
        "b-frames.avi",
    ],
)
def test_the_files_are_those_of_a_single_run(
    video: Video,
    name: str,
    settings: Settings,
    pool: Any,
    single: Files,
    written: Files,
    tmp_path: Path,
) -> None:
    path = video(name)
    results = run_batch({name: path}, tmp_path / "out", settings, pool, seconds=0.5)
    assert results.failures == {}
    assert written(tmp_path / "out" / name) == single(path)
    (result,) = results.sources
    assert result.frames == sum(result.chunks) == 60
    assert result.engines == ("onnxruntime-cpu",)
    assert sum(result.shares.values()) == pytest.approx(1, abs=1e-4)
    assert read_results(tmp_path / "out") == results
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == sorted(
        [name, "results.json"]
    )
    if name == "interlaced.mp4":  # its parts depend on frames beside them, which shows beforehand
        assert result.chunks == (60,)
        assert pool.chunks == ["whole"]
    elif name != "one-key.mp4":
        assert len(result.chunks) > 2
        assert "whole" not in pool.chunks


def test_a_damaged_video_is_what_a_single_run_leaves_and_stops_no_other(
    video: Video, settings: Settings, pool: Any, single: Files, written: Files, tmp_path: Path
) -> None:
    text, good = tmp_path / "text.mp4", video("plain.mp4")
    text.write_text("no video")
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(video("parts.mp4").read_bytes()[:-2000])
    sources = {path.name: path for path in (text, damaged, good)}
    results = run_batch(sources, tmp_path / "out", settings, pool, seconds=0.5)
    assert set(results.failures) == {str(text), str(damaged)}
    assert "is damaged after" in results.failures[str(damaged)]
    assert all("\n" not in line for line in results.failures.values())
    assert written(tmp_path / "out" / "damaged.mp4") == single(damaged)
    assert (tmp_path / "out" / "damaged.mp4" / "frames.partial.jsonl").exists()
    assert not (tmp_path / "out" / "text.mp4").exists()
    assert written(tmp_path / "out" / "plain.mp4") == single(good)


def test_what_is_finished_is_not_done_again_unless_it_was_made_otherwise(
    video: Video, settings: Settings, pool: Any, tmp_path: Path, make_bundle: Callable[..., Any]
) -> None:
    path = tmp_path / "b-frames.mp4"
    shutil.copy(video("b-frames.mp4"), path)
    sources, out = {path.name: path}, tmp_path / "out"
    first = run_batch(sources, out, settings, pool, seconds=0.5)
    did = len(pool.done)
    assert run_batch(sources, out, settings, pool, seconds=0.5) == first
    assert len(pool.done) == did
    os.utime(path, ns=(1, 1))  # another file, for all one can know
    run_batch(sources, out, settings, pool, seconds=0.5)
    assert len(pool.done) == 2 * did
    without = msgspec.structs.replace(settings, masks=False)
    pool.worker._settings = without
    run_batch(sources, out, without, pool, seconds=0.5)
    assert len(pool.done) == 3 * did
    assert not (out / path.name / "masks").exists()
    make_bundle(name="other")  # in the same place
    again = type(pool)(without, run_model(without))
    second = run_batch(sources, out, without, again, seconds=0.5)
    assert len(again.done) == did
    assert second.model != first.model


HARM: dict[str, Callable[[Path], object]] = {
    "a mask is gone": lambda out: (out / "masks/000007.png").unlink(),
    "a mask is empty": lambda out: (out / "masks/000007.png").write_bytes(b""),
    "a mask is changed": lambda out: flip(out / "masks/000007.png"),
    "a mask too many": lambda out: shutil.copy(out / "masks/000007.png", out / "masks/000060.png"),
    "no masks": lambda out: shutil.rmtree(out / "masks"),
    "lines are changed": lambda out: flip(out / "frames.jsonl"),
    "no lines": lambda out: (out / "frames.jsonl").write_text(""),
    "no file of lines": lambda out: (out / "frames.jsonl").unlink(),
    "no record": lambda out: (out / "finished.json").unlink(),
}


def test_results_that_were_damaged_since_are_done_again(
    video: Video, settings: Settings, pool: Any, single: Files, written: Files, tmp_path: Path
) -> None:
    sources = {name: video(name) for name in ("b-frames.mp4", "plain.mp4")}
    out, expected = tmp_path / "out", single(sources["b-frames.mp4"])
    run_batch(sources, out, settings, pool, seconds=0.5)
    (out / "plain.mp4" / "note.txt").write_text("of somebody: no harm")
    for what, harm in HARM.items():
        pool.done.clear()
        harm(out / "b-frames.mp4")
        results = run_batch(sources, out, settings, pool, seconds=0.5)
        assert {job.source for job in pool.done} == {str(sources["b-frames.mp4"])}, what
        assert results.failures == {}, what
        assert written(out / "b-frames.mp4") == expected, what


def flip(path: Path) -> None:
    """Change a byte in the middle, as a bad disk does."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_chunks_that_were_damaged_since_are_done_again(
    video: Video, settings: Settings, pool: Any, single: Files, written: Files, tmp_path: Path
) -> None:
    path, out = video("b-frames.mp4"), tmp_path / "out"

    class Stops:
        def __call__(self, jobs: list[Job]) -> Any:
            for number, outcome in enumerate(pool(jobs)):
                if jobs[0].chunk is not None and number == 3:
                    raise KeyboardInterrupt
                yield outcome

    with pytest.raises(KeyboardInterrupt):
        run_batch({path.name: path}, out, settings, Stops(), seconds=0.5)
    chunks = sorted((out / ".work").glob("*/0*"))
    assert len(chunks) > 2
    (chunks[0] / "masks" / "000000.png").write_bytes(b"")  # as a power cut leaves it
    before = (chunks[0] / "finished.json").stat().st_mtime_ns
    kept = (chunks[1] / "finished.json").stat().st_mtime_ns
    seen = []

    class Looks:
        def __call__(self, jobs: list[Job]) -> Any:
            for outcome in pool(jobs):
                if outcome.status == "done" and not seen:
                    seen.extend((one / "finished.json").stat().st_mtime_ns for one in chunks[:2])
                yield outcome

    run_batch({path.name: path}, out, settings, Looks(), seconds=0.5)
    assert seen[0] > before
    assert seen[1] == kept
    assert written(out / path.name) == single(path)


def test_a_second_batch_into_one_folder_is_refused_and_a_leftover_lock_is_not_held(
    video: Video, settings: Settings, pool: Any, tmp_path: Path
) -> None:
    path, out = video("plain.mp4"), tmp_path / "out"
    refused = []

    class Meanwhile:
        def __call__(self, jobs: list[Job]) -> Any:
            with pytest.raises(OutputError, match="another batch is writing there") as caught:
                run_batch({path.name: path}, out, settings, pool)
            refused.append(str(caught.value))
            return pool(jobs)

    out.mkdir()
    (out / ".lock").write_text("left by a killed batch")
    results = run_batch({path.name: path}, out, settings, Meanwhile(), seconds=0.5)
    assert results.failures == {}
    assert all("\n" not in text for text in refused)
    assert len(refused) == 2
    assert sorted(item.name for item in out.iterdir()) == [path.name, "results.json"]


def run_model(settings: Settings) -> str:
    from knet_runtime.batch.worker import settings_bundle

    return settings_bundle(settings).model_id


def test_a_batch_that_stopped_midway_goes_on_from_whole_chunks(
    video: Video, settings: Settings, pool: Any, single: Files, written: Files, tmp_path: Path
) -> None:
    path, out = video("b-frames.mp4"), tmp_path / "out"

    class Stops:
        """Is interrupted after the second chunk, and leaves half of a third."""

        def __call__(self, jobs: list[Job]) -> Any:
            for number, outcome in enumerate(pool(jobs)):
                if jobs[0].chunk is not None and number == 2:
                    half = Path(jobs[0].work) / ".00003_x.host.1.part"
                    half.mkdir()
                    (half / "frames.jsonl").write_text("{")
                    raise KeyboardInterrupt
                yield outcome

    with pytest.raises(KeyboardInterrupt):
        run_batch({path.name: path}, out, settings, Stops(), seconds=0.5)
    assert not (out / path.name).exists()
    assert not (out / "results.json").exists()
    kept = {item: item.stat().st_mtime_ns for item in (out / ".work").rglob("0*/masks/*.png")}
    assert kept
    results = run_batch({path.name: path}, out, settings, pool, seconds=0.5)
    assert results.frames == 60
    assert written(out / path.name) == single(path)
    # Finished masks were linked, not made again.
    times = {item.stat().st_mtime_ns for item in (out / path.name / "masks").iterdir()}
    assert set(kept.values()) <= times
    assert not (out / ".work").exists()


def test_a_job_without_an_outcome_is_a_failure_by_name(
    video: Video, settings: Settings, pool: Any, tmp_path: Path
) -> None:
    class Dies:
        def __call__(self, jobs: list[Job]) -> Any:
            return (one for one in pool(jobs) if "00001" not in one.chunk)

    path, good = video("b-frames.mp4"), video("one-key.mp4")
    sources = {path.name: path, good.name: good}
    results = run_batch(sources, tmp_path / "out", settings, Dies(), seconds=0.5)
    assert list(results.failures) == [str(path)]
    assert "lost with its worker" in results.failures[str(path)]
    assert [result.frames for result in results.sources] == [0, 60]


def test_a_model_that_cannot_run_ends_the_batch(
    video: Video, settings: Settings, pool: Any, tmp_path: Path
) -> None:
    path = video("plain.mp4")
    pool.worker._model = "another@000000000000"
    with pytest.raises(EngineError, match="copy the same bundle"):
        run_batch({path.name: path}, tmp_path / "out", settings, pool)


def test_chunks_of_a_panoptic_run_are_joined_with_their_segment_maps(
    written: Files, tmp_path: Path
) -> None:
    def write(folder: Path, frames: range) -> None:
        sinks = [JsonLines(folder / "frames.jsonl", "m"), MaskFolder(folder / "masks")]
        for number, index in enumerate(frames):
            segment_map = np.zeros((4, 6), np.uint16)
            segment_map[index:] = 1
            result = Segmentation.from_panoptic(segment_map, [9], [0.5], CAMVID11)
            frame, _ = a_frame(number, hw=(4, 6))
            for sink in sinks:
                sink.write(frame, result)
        for sink in sinks:
            sink.close()

    write(tmp_path / "work/a", range(2))
    write(tmp_path / "work/b", range(2, 4))
    write(tmp_path / "single", range(4))
    pieces = [Outcome("v", "done", name, frames=2, engine="e") for name in "ab"]
    result = join(tmp_path / "v", tmp_path / "work", pieces, SourceResult("v", "v", "key"))
    assert (result.frames, result.chunks) == (4, (2, 2))
    assert written(tmp_path / "v") == written(tmp_path / "single")
    assert (tmp_path / "v/masks/000003.segments.png").is_file()
    assert not (tmp_path / "work").exists()


def test_tracks_and_coco_files_are_those_of_a_run_of_the_uncut_video(
    make_segment_bundle: Callable[[str], Bundle], written: Files, video: Video, tmp_path: Path
) -> None:
    bundle, path = make_segment_bundle("panoptic"), video("plain.mp4")
    rules = SegmentRules(score=0.1)
    settings = Settings(
        *(str(bundle.path), "onnxruntime-cpu"),
        **{"masks": False, "track": True, "coco": True, "coco_panoptic": True},  # type: ignore[arg-type]
        rules=rules,
    )
    folder = tmp_path / "single"
    with Segmenter(bundle, "onnxruntime-cpu", rules=rules) as segment, open_source(path) as source:
        track = Tracker()
        sinks: list[Any] = [
            JsonLines(folder / "frames.jsonl", segment.model_id),
            *(CocoResults(folder / "coco.json"), CocoPanoptic(folder / "panoptic")),
        ]
        for frame in source:
            result = track(frame, segment(frame.image))
            for sink in sinks:
                sink.write(frame, result)
        for sink in sinks:
            sink.close()
    done = []

    def batch(settings: Settings) -> BatchResults:
        worker = ChunkWorker(settings, segment.model_id)

        def pool(jobs: Sequence[Job]) -> Iterator[Outcome]:
            for job in jobs:
                done.extend([job.chunk] if job.chunk else [])
                yield worker(job)

        return run_batch({"v": path}, out, settings, pool, seconds=0.5)

    out = tmp_path / "out"
    results = batch(settings)
    assert results.failures == {}
    assert done == [WHOLE]
    assert written(out / "v") == written(folder)
    assert len(list((out / "v/panoptic").glob("*.png"))) == results.frames == 60
    # A file that is lost is noticed, and so are other rules.
    (out / "v/coco.json").unlink()
    batch(settings)
    assert done == [WHOLE] * 2
    assert written(out / "v") == written(folder)
    batch(msgspec.structs.replace(settings, rules=None))
    assert done == [WHOLE] * 3


def test_results_by_other_rules_of_the_bundle_are_not_kept(
    make_segment_bundle: Callable[[str], Bundle],
) -> None:
    bundle, settings = make_segment_bundle("panoptic"), Settings("street.knet")

    def key(rules: SegmentRules, settings: Settings = settings) -> str:
        changed = msgspec.structs.replace(bundle.manifest, rules=rules)
        return key_of(Bundle(bundle.path, changed), settings, "v", (1, 1))

    assert key(SegmentRules(score=0.5)) != key(SegmentRules())
    assert key(SegmentRules()) == key_of(bundle, settings, "v", (1, 1))
    # What is asked for on the command line counts alone.
    asked = msgspec.structs.replace(settings, rules=SegmentRules(score=0.5))
    assert key(SegmentRules(), asked) == key(SegmentRules(score=0.5))


def test_a_video_that_changes_meanwhile_is_refused(
    video: Video, settings: Settings, pool: Any, tmp_path: Path
) -> None:
    path = tmp_path / "plain.mp4"
    shutil.copy(video("plain.mp4"), path)

    class Changes:
        def __call__(self, jobs: list[Job]) -> Any:
            if jobs[0].chunk is not None:
                os.utime(path, ns=(1, 1))
            return pool(jobs)

    results = run_batch({path.name: path}, tmp_path / "out", settings, Changes(), seconds=0.5)
    assert "was changed" in results.failures[str(path)]


def test_a_worker_tells_what_it_cannot_do(settings: Settings, pool: Any, tmp_path: Path) -> None:
    missing = Job(str(tmp_path / "none.mp4"), str(tmp_path / "work"), (0, 0), 1.0)
    outcome: Outcome = pool.worker(missing)
    assert (outcome.status, "none.mp4" in outcome.error) == ("failed", True)
    outcome = pool.worker(msgspec.structs.replace(missing, chunk=WHOLE))
    assert (outcome.status, "none.mp4" in outcome.error) == ("failed", True)


def test_patterns_find_files_and_name_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x.mp4", "a/b/x.mp4", "c/y[1].mp4", "c/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert sorted(find_sources([f"{tmp_path}/**/*.mp4"])) == ["a/b/x.mp4", "a/x.mp4", "c/y[1].mp4"]
    # Where only one folder has any, the folders are named as they will be with more.
    assert list(find_sources([f"{tmp_path}/**/y*.mp4"])) == ["c/y[1].mp4"]
    assert list(find_sources([f"{tmp_path}/c/y[1].mp4"])) == ["y[1].mp4"]
    both = find_sources([f"{tmp_path}/a/x.mp4", f"{tmp_path}/a/b/x.mp4"])
    assert sorted(both) == ["b/x.mp4", "x.mp4"]
    monkeypatch.chdir(tmp_path)
    assert find_sources(["a/*.mp4"]) == {"x.mp4": tmp_path / "a/x.mp4"}
    with pytest.raises(SourceError, match="no file is found"):
        find_sources(["d/*.mp4"])
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match="hidden"):
        find_sources([".hidden.mp4"])


def test_a_part_that_kills_its_worker_each_time_is_given_up(
    video: Video, settings: Settings, pool: Any, tmp_path: Path
) -> None:
    path = video("plain.mp4")
    state = path.stat()
    stamp = (state.st_size, state.st_mtime_ns)
    work = tmp_path / "work"
    work.mkdir()
    job = Job(str(path), str(work), stamp, 1.0, WHOLE)
    (work / ".whole.begun").write_bytes(b"...")  # what three dead workers left
    assert pool.worker(job).status == "done"
    shutil.rmtree(work / "whole")
    outcome = pool.worker(job)
    assert outcome.status == "failed"
    assert outcome.error.startswith(f"{path}: part whole killed its worker 4 times")
    assert pool.worker(job).status == "done"  # another batch tries again


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_name_that_is_no_utf8_is_escaped_and_stops_no_other(
    video: Video, settings: Settings, pool: Any, tmp_path: Path
) -> None:
    good, odd = tmp_path / "good.mp4", Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    broken = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xe9.mp4"))
    for path in (good, odd):
        shutil.copy(video("plain.mp4"), path)
    broken.write_text("no video")
    sources = find_sources([str(tmp_path / "*.mp4")])
    assert sources == {r"bad\xe9.mp4": broken, r"caf\xe9.mp4": odd, "good.mp4": good}
    run_batch(sources, tmp_path / "out", settings, pool)
    kept = read_results(tmp_path / "out")
    assert [(result.folder, result.frames) for result in kept.sources] == [
        (r"bad\xe9.mp4", 0),
        (r"caf\xe9.mp4", 60),
        ("good.mp4", 60),
    ]
    assert list(kept.failures) == [str(tmp_path / r"bad\xe9.mp4")]
    assert (tmp_path / "out" / r"caf\xe9.mp4" / "frames.jsonl").is_file()
    done = len(pool.chunks)
    run_batch(sources, tmp_path / "out", settings, pool)
    assert len(pool.chunks) == done  # what is finished stays so
