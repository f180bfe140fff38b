"""The samples that a run learns from, which process computes which of them, and the images that
score it.

Sample ``i`` of a run is a pure function of (seed, i): which image it is, and every random number of
its augmentation. So the order of workers does not matter, and a resumed run continues with the very
samples that it would have seen. Step s uses the samples s·B … (s + 1)·B - 1, whatever the number of
processes: process r of R takes the r-th slice of them, and computes it in ``optim.accumulate``
parts. So a run on many devices sees the same batches as on one.
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from types import FrameType
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from knet_runtime.labels import LabelMap
from knet_runtime.sources.images import read_image
from knet_synthetic import CAMVID11, Street
from knet_train.config import Config, DataConfig
from knet_train.data.dataset import LabelledFolder
from knet_train.data.segment_folder import SegmentFolder
from knet_train.data.soft_labels import SoftLabels
from knet_train.data.targets import segment_targets
from knet_train.data.truth import Truth
from knet_train.segment_loss import SegmentTargets, image_counts

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
AnyFolder = LabelledFolder | SegmentFolder
_NOTHING = -1  # no class, in planes of objects
_FRAMES_PER_STREET = 16  # a street costs more to build than a frame to draw
SOFT_STRIDE = 2  # pixels of a crop to one of its soft labels
_FILL = 128  # grey, which is near zero after normalisation


class Samples(Dataset[Any]):
    """``length`` augmented samples of the crop size, each of an image and of planes that say what
    its pixels are.

    A ``data.synthetic_share`` of them, evenly spread, are synthetic streets, and a
    ``data.unlabelled_share`` of the others are of the ``unlabelled`` images, if there are any; the
    rest goes through the folder. Both are gone through in a new order every time round.
    """

    def __init__(
        self, images: int, config: DataConfig, seed: int, length: int, unlabelled: int = 0
    ) -> None:
        self.images = images
        self.unlabelled = unlabelled
        self.config = config
        self.seed = seed
        self.length = length
        *strengths, hue = config.jitter
        brightness, contrast, saturation = ((1 - s, 1 + s) for s in strengths)
        self.jitter = _Jitter(brightness, contrast, saturation, (-hue, hue))

    def __len__(self) -> int:
        return self.length

    def source(self, index: int) -> tuple[Street, int] | int:
        """What a sample is made of: a frame of a street, or an image: one of the folder, or, with
        numbers from ``images`` on, one without labels."""
        synthetic = int(index * self.config.synthetic_share)
        if int((index + 1) * self.config.synthetic_share) > synthetic:
            street = _street(
                self.seed * 1_000_003 + synthetic // _FRAMES_PER_STREET, self.config.eval_size
            )
            rng = np.random.default_rng((self.seed, 1, index))
            return street, int(rng.integers(0, 3000))
        other = index - synthetic
        share = self.config.unlabelled_share if self.unlabelled else 0.0
        before = int(other * share)
        if int((other + 1) * share) > before:
            return self.images + self._in_turn(before, self.unlabelled, 6)
        return self._in_turn(other - before, self.images, 2)

    def _in_turn(self, index: int, images: int, key: int) -> int:
        turn, place = divmod(index, images)
        order = np.random.default_rng((self.seed, key, turn)).permutation(images)
        return int(order[place])

    def augmented(
        self, key: tuple[int, int], pixels: NDArray[np.uint8], planes: NDArray[Any], nothing: int
    ) -> tuple[Tensor, Tensor, Window]:
        """The image uint8 [H, W, 3] and its planes [P, H, W] of whole numbers, the first of them
        classes, augmented alike, and what part of the whole image is seen. ``nothing`` is no class,
        and what pads the planes; ``key`` is what the random numbers are drawn for."""
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(planes))
        with torch.random.fork_rng(devices=[]):
            (state,) = np.random.SeedSequence((self.seed, *key)).generate_state(1)
            torch.manual_seed(int(state))
            image, mask, window = self._augment(image, mask, nothing)
        return image.as_subclass(Tensor).permute(1, 2, 0), mask.as_subclass(Tensor), window

    def _augment(
        self, image: tv_tensors.Image, planes: tv_tensors.Mask, nothing: int
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask, Window]:
        config, full = self.config, planes.shape[-2:]
        scale = _uniform(*config.scale) * self._evaluation_scale(*full)
        stretch = _uniform(-1.0, 1.0) * np.log(config.aspect)
        size = [
            max(1, round(full[0] * scale * float(np.exp(-stretch / 2)))),
            max(1, round(full[1] * scale * float(np.exp(stretch / 2)))),
        ]
        image = tvf.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
        planes = tvf.resize(planes, size, InterpolationMode.NEAREST_EXACT)
        height, width = config.crop
        pad_y, pad_x = max(0, height - size[0]), max(0, width - size[1])
        before_y = before_x = 0
        if pad_y or pad_x:
            before_y, before_x = _integer(pad_y + 1), _integer(pad_x + 1)
            sides = [before_x, before_y, pad_x - before_x, pad_y - before_y]
            image = tvf.pad(image, sides, fill=_FILL)
            planes = tvf.pad(planes, sides, fill=nothing)
        top, left = self._crop_corner(planes[0], nothing)
        image = tvf.crop(image, top, left, height, width)
        planes = tvf.crop(planes, top, left, height, width)
        mirrored = _uniform(0, 1) < config.flip
        if mirrored:
            image, planes = tvf.horizontal_flip(image), tvf.horizontal_flip(planes)
        if _uniform(0, 1) < config.photometric:
            image = self.jitter(image)
        corner = (top - before_y, left - before_x)
        return image, planes, Window((size[0], size[1]), corner, config.crop, mirrored)

    def _evaluation_scale(self, height: int, width: int) -> float:
        """Scale 1 is the size at which the network will see the whole image."""
        if self.config.eval_mode == "keep_ratio":
            longest, shortest = self.config.eval_scale
            return min(longest / max(height, width), shortest / min(height, width))
        return min(self.config.eval_size[0] / height, self.config.eval_size[1] / width)

    def _crop_corner(self, label: Tensor, nothing: int) -> tuple[int, int]:
        """A corner whose crop is not mostly one class, as mmsegmentation's ``cat_max_ratio``."""
        height, width = self.config.crop
        for _ in range(10):
            top = _integer(label.shape[0] - height + 1)
            left = _integer(label.shape[1] - width + 1)
            crop = label[top : top + height, left : left + width]
            counts = torch.bincount(crop[crop != nothing], minlength=1)
            if (counts > 0).sum() > 1 and counts.max() < self.config.max_class_share * counts.sum():
                break
        return top, left


class Window(NamedTuple):
    """What part of an image is seen: the image was resized to ``size``, (height, width), cropped to
    ``crop`` from ``corner`` (top, left) on, which may lie outside, and ``mirrored`` then."""

    size: tuple[int, int]
    corner: tuple[int, int]
    crop: tuple[int, int]
    mirrored: bool

    def of(self, maps: NDArray[np.uint8]) -> Tensor:
        """Maps [C, h, w] that are stretched over the whole image -> what of them is seen, uint8
        [C, H / 2, W / 2] (rounded up), bilinear; 0 outside of the image."""
        target, slopes, starts, inside = [], [], [], []
        for axis, source in enumerate(maps.shape[1:]):
            crop, size = self.crop[axis], self.size[axis]
            count = -(-crop // SOFT_STRIDE)
            step, first = crop / count, crop / count / 2  # places of pixels in the crop
            if axis == 1 and self.mirrored:
                step, first = -step, crop - first
            first += self.corner[axis]
            places = first + step * np.arange(count)
            inside.append((places >= 0) & (places < size))
            target.append(count)
            slopes.append(step * source / size)
            starts.append(first * source / size - 0.5)
        way = np.array([[slopes[1], 0, starts[1]], [0, slopes[0], starts[0]]])
        seen = np.stack(
            [
                cv2.warpAffine(
                    one,
                    way,
                    (target[1], target[0]),
                    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                    borderMode=cv2.BORDER_REPLICATE,
                )
                for one in maps
            ]
        )
        seen[:, ~np.outer(*inside)] = 0
        return torch.from_numpy(seen)


class TrainingSamples(Samples):
    """Samples of a folder of class maps: image uint8 [H, W, 3] and label uint8 [H, W]; with soft
    labels also their values uint8 [C, H / 2, W / 2], 0 where there are none. An image without
    labels has a label of ignored pixels."""

    def __init__(
        self,
        folder: LabelledFolder,
        config: DataConfig,
        seed: int,
        length: int,
        soft: SoftLabels | None = None,
    ) -> None:
        super().__init__(len(folder), config, seed, length, len(soft.unlabelled) if soft else 0)
        self.folder, self.soft = folder, soft

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        ignored, path = self.folder.labels.ignore_index, None
        match self.source(index):
            case (street, frame):
                pixels, classes = street.frame(frame)
            case int(number) if number < self.images:
                pixels, classes = self.folder.read(number)
                path = self.soft.labelled[number] if self.soft else None
            case int(number):
                assert self.soft is not None
                image_file, path = self.soft.unlabelled[number - self.images]
                pixels = read_image(image_file)
                classes = np.full(pixels.shape[:2], ignored, np.uint8)
        image, planes, window = self.augmented((3, index), pixels, classes[None], ignored)
        if self.soft is None:
            return image, planes[0]
        if path is None:
            height, width = (-(-side // SOFT_STRIDE) for side in self.config.crop)
            values = torch.zeros((self.soft.classes, height, width), dtype=torch.uint8)
        else:
            values = window.of(self.soft.read(path))
        return image, planes[0], values


class SegmentSamples(Samples):
    """Samples of a folder of objects: image uint8 [H, W, 3] and ``SegmentTargets``, which know of
    what is void where ``ignore_void`` is."""

    def __init__(
        self,
        folder: SegmentFolder,
        config: DataConfig,
        seed: int,
        length: int,
        *,
        ignore_void: bool,
    ) -> None:
        super().__init__(len(folder), config, seed, length)
        self.folder, self.ignore_void = folder, ignore_void

    def __getitem__(self, index: int) -> tuple[Tensor, SegmentTargets]:
        things = self.folder.labels.things
        match self.source(index):
            case (street, frame):
                pixels, truth = street_truth(street, frame, self.folder.labels)
            case int(number):
                pixels, truth = self.folder.read(number)
        sample = self._augmented((3, index), pixels, truth)
        rng = np.random.default_rng((self.seed, 4, index))
        if rng.random() < self.config.copy_paste:
            donor = self.folder.read(int(rng.integers(self.images)))
            sample = pasted(sample, self._augmented((5, index), *donor), things, rng)
        void = sample.void if self.ignore_void else None
        return sample.image, segment_targets(sample.ids, sample.truth, things, void)

    def _augmented(
        self, key: tuple[int, int], pixels: NDArray[np.uint8], truth: Truth
    ) -> Augmented:
        classes = np.array([_NOTHING, *truth.classes], np.int32)
        unknown = truth.void | np.isin(truth.ids, list(truth.crowds)).any(0)
        planes = np.concatenate([classes[truth.flat().ids][None], unknown[None], truth.ids])
        image, moved, _ = self.augmented(key, pixels, planes, _NOTHING)
        return Augmented(image, moved[2:].clamp(min=0), moved[1] != 0, truth)


class Augmented(NamedTuple):
    """An image and its objects after augmentation."""

    image: Tensor  # uint8 [H, W, 3]
    ids: Tensor  # [L, H, W] of ``truth``
    void: Tensor  # bool [H, W]
    truth: Truth  # of the whole image


def pasted(
    sample: Augmented, donor: Augmented, things: Collection[int], rng: np.random.Generator
) -> Augmented:
    """About half of the donor's objects on top of the sample: simple copy-paste, arXiv 2012.07177.
    Only ``things`` are pasted, and no crowds."""
    image, ids, void = sample.image.clone(), sample.ids.clone(), sample.void.clone()
    classes = list(sample.truth.classes)
    for number in torch.unique(donor.ids).tolist():
        class_id = donor.truth.classes[number - 1] if number else _NOTHING
        if class_id not in things or number in donor.truth.crowds or rng.random() < 0.5:
            continue
        mask = (donor.ids == number).any(0)
        classes.append(class_id)
        image[mask] = donor.image[mask]
        ids[:, mask] = 0
        ids[0, mask] = len(classes)
        void &= ~mask
    return Augmented(image, ids, void, sample.truth._replace(classes=tuple(classes)))


def street_truth(street: Street, frame: int, labels: LabelMap) -> tuple[NDArray[np.uint8], Truth]:
    """A synthetic frame and its truth in ``labels``, whose names are CamVid's or some of them:
    what has no class there is background, as stuff in task "instance"."""
    pixels, values, objects = street.scene(frame)
    table = np.array([_index(labels, name) for name in CAMVID11.names])
    kept = [number for number, one in enumerate(objects.classes) if table[one] >= 0]
    ids = np.zeros(len(objects.classes) + 1, np.uint16)
    ids[np.array(kept, np.intp) + 1] = np.arange(1, len(kept) + 1)
    segments = ids[objects.ids]
    classes = [int(table[objects.classes[number]]) for number in kept]
    for value, class_id in enumerate(table.tolist()):
        if class_id >= 0 and class_id not in labels.things and (values == value).any():
            classes.append(class_id)
            segments[values == value] = len(classes)
    void = np.zeros(values.shape, np.bool_)
    return pixels, Truth(segments[None], tuple(classes), frozenset(), void)


def _index(labels: LabelMap, name: str) -> int:
    return labels.names.index(name) if name in labels.names else -1


class _Jitter(v2.RandomPhotometricDistort):  # type: ignore[misc]  # torchvision has no types
    """Each distortion with probability 1/2, but never torchvision's swap of colour channels: grass
    and sky keep their colours, as in mmsegmentation's ``PhotoMetricDistortion``."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _integer(high: int) -> int:
    return int(torch.randint(high, ()))


@lru_cache(maxsize=2)
def _street(seed: int, size: tuple[int, int]) -> Street:
    return Street(seed, size)


class Part(NamedTuple):
    """What one process computes at a time: 1 / ``optim.accumulate`` of its share of a step."""

    images: Tensor  # uint8 [b, H, W, 3]
    labels: Tensor  # uint8 [b, H, W]
    share_labels: Tensor  # labels of the process's whole share of the step: the loss is their mean
    part: int  # 0 … accumulate - 1
    soft: Tensor | None = None  # uint8 [b, C, H / 2, W / 2], values of soft labels
    share_soft: Tensor | None = None  # those of the whole share


class SegmentPart(NamedTuple):
    """The same of objects."""

    images: Tensor  # uint8 [b, H, W, 3]
    targets: Sequence[SegmentTargets]  # [b]
    share_counts: Tensor  # ``image_counts`` of the process's whole share of the step
    part: int


class StepIndices(Sampler[int]):
    """Sample indices of one process, from step ``start`` on.

    Its length is that of the whole run, which Lightning counts.
    """

    def __init__(self, start: int, steps: int, batch_size: int, rank: int, ranks: int) -> None:
        self.start, self.steps, self.batch_size = start, steps, batch_size
        self.share = batch_size // ranks
        self.offset = rank * self.share

    def __len__(self) -> int:
        return self.steps * self.share

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.offset
            yield from range(first, first + self.share)


class Parts:
    """A loader's batches, each cut into ``count`` equal parts."""

    def __init__(self, loader: DataLoader[Any], count: int) -> None:
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return len(self.loader) * self.count

    def __iter__(self) -> Iterator[Part | SegmentPart]:
        for images, truth, *soft in self.loader:
            chunks = images.chunk(self.count)
            for part, image in enumerate(chunks):
                if isinstance(truth, Tensor):
                    own_soft = [one.chunk(self.count)[part] for one in soft]
                    label = truth.chunk(self.count)[part]
                    yield Part(image, label, truth, part, *own_soft, *soft)
                else:
                    targets, counts = truth
                    own = targets[part * len(chunks[0]) : part * len(chunks[0]) + len(image)]
                    yield SegmentPart(image, own, counts, part)

    def close(self) -> None:
        """End the processes that read images. They leave a first SIGTERM to this process, so at
        its exit, when Python sends them one, it would wait for them for ever."""
        reading: Any = self.loader._iterator
        if reading is None:
            return
        try:
            reading._shutdown_workers()
        finally:
            for worker in reading._workers:
                worker.kill()


class SegmentationData(pl.LightningDataModule):
    """Training samples from the step that the run has reached, and the images that score it: those
    of the validation split and, if any, those of the drives that are left out."""

    def __init__(
        self,
        train: AnyFolder,
        val: AnyFolder,
        config: Config,
        left_out: AnyFolder | None = None,
        soft: SoftLabels | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.config = train, val, config
        self.left_out, self.soft = left_out, soft
        self.parts: Parts | None = None

    def train_dataloader(self) -> Parts:
        optim, settings, trainer = self.config.optim, self.config.trainer, self.trainer
        assert trainer is not None
        step, rank, ranks = trainer.global_step, trainer.global_rank, trainer.world_size
        length = optim.steps * optim.batch_size
        objects = isinstance(self.train, SegmentFolder)
        samples: Any = partial(TrainingSamples, soft=self.soft)
        if objects:
            samples = partial(SegmentSamples, ignore_void=self.config.loss.void == "ignored")
        loader: DataLoader[Any] = DataLoader(
            samples(self.train, self.config.data, settings.seed, length),
            optim.batch_size // ranks,
            sampler=StepIndices(step, optim.steps, optim.batch_size, rank, ranks),
            num_workers=settings.workers,
            collate_fn=_collate if objects else None,
            persistent_workers=settings.workers > 0,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )
        self.parts = Parts(loader, optim.accumulate)
        return self.parts

    def close(self) -> None:
        """End what reads images in the background. To be called however the run has ended."""
        if self.parts is not None:
            self.parts.close()

    def val_dataloader(self) -> list[DataLoader[int]]:
        """The images of this process as they are, each as its folder's ``read`` gives it: those of
        ``val``, then those of ``left_out``."""
        assert self.trainer is not None
        loaders = []
        folders = [self.val] if self.left_out is None else [self.val, self.left_out]
        for folder in folders:
            own: Any = range(self.trainer.global_rank, len(folder), self.trainer.world_size)
            read: Any = folder.read  # without a batch, collate_fn gets what `own` holds: an index
            loaders.append(DataLoader(own, batch_size=None, collate_fn=read))
        return loaders


def _collate(
    samples: Sequence[tuple[Tensor, SegmentTargets]],
) -> tuple[Tensor, tuple[list[SegmentTargets], Tensor]]:
    """Images, and their targets with ``image_counts``, which the workers count."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), (list(targets), image_counts(targets))


def _leave_signals_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to workers too, and a cluster SIGTERM; the run still needs them to
    end its step, and ends them itself."""

    def heed_the_next(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, heed_the_next)
