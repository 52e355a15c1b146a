"""Images and labels of a run: built-in digits, image folders, torchvision and Hugging Face data sets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from timm.data import auto_augment
from timm.data.readers import get_img_extensions
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from pyvitfast.distill import long_tail_indices
from pyvitfast.train.errors import UserError, nearest
from pyvitfast.train.settings import Settings

DIGITS_TRAIN = 1300
HOLD_OUT = 0.2
_TRAIN_FOLDERS = ("train", "training")
_TEST_FOLDERS = ("val", "valid", "validation", "eval", "test")


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, and a black image for the 0 bits that its strongest magnitude asks for."""
    return auto_augment.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


# Pillow 13 raises for 0 bits, so a run with the published policy would end after some hundred images.
auto_augment.NAME_TO_OP.update(
    {name: _posterize for name, op in auto_augment.NAME_TO_OP.items() if op is auto_augment.posterize}
)

# An image's place in a data set, and the seed of its augmentation; None when nothing is random.
Key = tuple[int, int | None]


@dataclass
class Data:
    """A training and a test split.

    Args:
        name: the ``--data`` specification.
        train: training images.
        test: test images.
        class_names: names by class number.
        in_chans: channels, where the data fixes them; None for images, which are converted.
    """

    name: str
    train: Split
    test: Split
    class_names: list[str]
    in_chans: int | None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def fit_to(self, model: nn.Module, settings: Settings, views: str | None = None) -> None:
        """Give the splits the transforms that ``model`` and ``settings`` ask for.

        With ``views``, one of :data:`pyvitfast.train.settings.VIEWS`, a training image comes as two views of
        it, [2, C, S, S]: the query's and the key's of contrastive learning.
        """
        self.train.fit_to(model, settings, True, views)
        self.test.fit_to(model, settings, False)


class Split(Dataset[tuple[Tensor, int]]):
    """One split; an item is asked for by its :data:`Key`."""

    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all items but ``indices``."""
        raise NotImplementedError

    def fit_to(self, model: nn.Module, settings: Settings, training: bool, views: str | None = None) -> None:
        """Prepare items for ``model``."""
        raise NotImplementedError


class TwoViews:
    """Two random transforms of an image, [2, C, S, S].

    Args:
        query: of the first view.
        key: of the second.
    """

    def __init__(self, query: Callable[[Any], Tensor], key: Callable[[Any], Tensor]) -> None:
        self.query, self.key = query, key

    def __call__(self, image: Any) -> Tensor:
        """Both views of ``image``."""
        return torch.stack([self.query(image), self.key(image)])


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and those of before afterwards; None changes nothing.

    Seeding by image, not by process, makes the augmentation the same for any number of workers and after a
    resume in the middle of an epoch.
    """
    if seed is None:
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class TensorSplit(Split):
    """Images in memory, float32 [N, C, S, S] from -1, enlarged to the model's size on access."""

    def __init__(self, images: Tensor, labels: list[int]) -> None:
        self.images, self.labels = images, labels
        self.size = images.shape[-1]
        self.views: TwoViews | None = None

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all items but ``indices``."""
        self.images = self.images[list(indices)]
        self.labels = [self.labels[i] for i in indices]

    def fit_to(self, model: nn.Module, settings: Settings, training: bool, views: str | None = None) -> None:
        """Take the model's image size; these images are not augmented, but for views of any kind."""
        self.size, self.views = image_size(model), None
        if views is not None:
            moved = transforms.RandomCrop(self.size, padding=-(-self.size // 8), fill=-1)
            self.views = TwoViews(
                moved, transforms.Compose([moved, transforms.RandomErasing(scale=(0.05, 0.25), value=-1)])
            )

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, seed = key
        image = self.images[index]
        if self.size != image.shape[-1]:
            image = F.interpolate(image[None], size=self.size, mode="bilinear")[0]
        if self.views is not None:
            with _seeded(seed):
                image = self.views(image)
        return image, self.labels[index]


class ImageSplit(Split):
    """PIL images from a timm or torchvision data set, transformed by timm.

    Args:
        source: gives image ``i``, and a name of it for messages.
        labels: class numbers.
    """

    def __init__(self, source: Callable[[int], tuple[Image.Image, str]], labels: list[int]) -> None:
        self.source, self.labels = source, labels
        self.indices = list(range(len(labels)))
        self.mode = "RGB"
        self.transform: Callable[[Image.Image], Tensor] | None = None

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all items but ``indices``."""
        self.indices = [self.indices[i] for i in indices]
        self.labels = [self.labels[i] for i in indices]

    def fit_to(self, model: nn.Module, settings: Settings, training: bool, views: str | None = None) -> None:
        """timm's transform for the model's input size, mean, std and interpolation; or two views."""
        chans = input_channels(model)
        self.mode = {1: "L", 3: "RGB"}[chans]
        config = timm.data.resolve_model_data_config(model)
        size = image_size(model)
        mean, std = (
            v if len(v) == chans else (sum(v) / len(v),) * chans for v in (config["mean"], config["std"])
        )
        if views is not None:
            self.transform = two_views(
                views, (chans, size, size), mean, std, config["interpolation"], settings.hflip
            )
            return
        augmentation: dict[str, Any] = {}
        if training:
            augmentation = {
                "hflip": settings.hflip,
                "color_jitter": settings.color_jitter or None,
                "auto_augment": settings.aa,
                "re_prob": settings.reprob,
                "re_mode": settings.remode,
            }
        if training and settings.train_crop == "pad":
            resample = transforms.InterpolationMode(config["interpolation"])
            self.transform = transforms.Compose(
                [
                    transforms.Resize((size, size), resample),
                    transforms.RandomCrop(size, padding=size // 8),
                    transforms.RandomHorizontalFlip(settings.hflip),
                    transforms.ToTensor(),
                    transforms.Normalize(mean, std),
                ]
            )
            return
        self.transform = timm.data.create_transform(
            input_size=(chans, size, size),
            is_training=training,
            mean=mean,
            std=std,
            interpolation=config["interpolation"],
            crop_pct=settings.crop_pct or config["crop_pct"],
            **augmentation,
        )

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, seed = key
        image, name = self.source(self.indices[index])
        assert self.transform is not None, "fit_to() comes first"
        try:
            image = image.convert(self.mode)
        except OSError as error:
            raise UserError(f"{name} cannot be decoded: {error}. Replace or remove the file.") from error
        with _seeded(seed):
            return self.transform(image), self.labels[index]


def two_views(
    kind: str,
    shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    hflip: float,
) -> TwoViews:
    """Views of a PIL image for PaCo.

    The query's are for ``cifar`` crops of the padded image, AutoAugment's policy for CIFAR-10 and a Cutout of
    half the side, which lies whole in the image, where the released code lets it reach over the border; for
    ``imagenet`` random resized crops, colours and RandAugment(2, 10) on timm's scale. The key's are those of
    SimCLR in the form of MoCo v2; for ``imagenet`` from smaller crops, all with changed colours.

    Args:
        kind: ``cifar`` or ``imagenet``.
        shape: channels and sides of a view.
        mean: of each channel.
        std: of each channel.
        interpolation: of resizing.
        hflip: probability of a horizontal flip.

    Source:
        Cui et al., Parametric Contrastive Learning, ICCV 2021, released code.
    """
    size, cifar = shape[1], kind == "cifar"
    key = timm.data.create_transform(
        input_size=shape,
        is_training=True,
        mean=mean,
        std=std,
        interpolation=interpolation,
        hflip=hflip,
        scale=(0.2, 1.0) if cifar else (0.08, 1.0),
        color_jitter=(0.4, 0.4, 0.4, 0.1) if cifar else (0.4, 0.4, 0.4),
        color_jitter_prob=0.8 if cifar else 1.0,
        grayscale_prob=0.2,
        gaussian_blur_prob=0.5 if size > 11 else 0.0,  # timm's kernel needs a margin of 11 pixels
    )
    resample, flip = transforms.InterpolationMode(interpolation), transforms.RandomHorizontalFlip(hflip)
    tensor, normal = transforms.ToTensor(), transforms.Normalize(mean, std)
    if cifar:
        query = [
            transforms.Resize((size, size), resample),
            transforms.RandomCrop(size, padding=size // 8),
            flip,
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
            tensor,
            transforms.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
            normal,
        ]
    else:
        grey = tuple(round(255 * m) for m in mean)
        strength = {"translate_const": int(0.45 * size), "img_mean": grey if len(grey) > 1 else grey[0]}
        query = [
            transforms.RandomResizedCrop(size, interpolation=resample),
            flip,
            transforms.ColorJitter(0.4, 0.4, 0.4),
            auto_augment.rand_augment_transform("rand-n2-m10-mstd0.5", strength),
            tensor,
            normal,
        ]
    return TwoViews(transforms.Compose(query), key)


def image_size(model: nn.Module) -> int:
    """Side of the square images ``model`` takes."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = getattr(model, "img_size", None)  # a CrossViT has a patch embedding for each branch
    if not isinstance(size, tuple | list):
        size = timm.data.resolve_model_data_config(model)["input_size"][-2:]
    if size[0] != size[1]:
        raise UserError(
            f"the model takes images of {size[0]}x{size[1]}; only square images are supported here."
        )
    return int(size[0])


def input_channels(model: nn.Module) -> int:
    """Channels of the images ``model`` takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return int(timm.data.resolve_model_data_config(model)["input_size"][0])


def open_data(settings: Settings, share: Callable[[list[str]], list[str]] | None = None) -> Data:
    """The data set that ``settings.data`` names, with ``settings.imbalance`` applied to its training split.

    Args:
        settings: of the run.
        share: joins the lists of unreadable files of all processes; None for a single process.

    Raises:
        UserError: unknown specification, missing or empty folder, unreadable images.
    """
    spec = settings.data
    if spec == "digits":
        data = _digits()
    elif spec.startswith(("torch/", "hfds/")):
        data = _timm_dataset(settings)
    elif Path(spec).is_dir() and settings.train_list is not None and settings.test_list is not None:
        lists = settings.train_list, settings.test_list
        data = _listed(Path(spec), lists, settings.check_images, share or (lambda names: names))
    elif Path(spec).is_dir():
        data = _folder(Path(spec), settings.check_images, share or (lambda names: names))
    else:
        hint = nearest(spec, ["digits"])
        raise UserError(
            f"--data {spec}: expected `digits`, an existing folder of class folders, `torch/NAME` or "
            f"`hfds/NAME`; there is no such folder.{hint}"
        )
    if settings.imbalance > 1:
        kind: Any = settings.imbalance_type
        data.train.keep(long_tail_indices(data.train.labels, settings.imbalance, kind))
    return data


def check_batch_size(data: Data, settings: Settings, flag: str = "--batch-size ") -> None:
    """Raise UserError when the training split is smaller than one optimizer update."""
    if len(data.train) < settings.batch_size * settings.grad_accum_steps:
        product = (
            "" if settings.grad_accum_steps == 1 else f" times --grad-accum-steps {settings.grad_accum_steps}"
        )
        raise UserError(
            f"{flag}{settings.batch_size}{product} is more than the {len(data.train)} training images "
            f"of {data.name}. Lower it."
        )


def _digits() -> Data:
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float().unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8] in -1..1
    labels = digits.target[order].tolist()
    train = TensorSplit(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN])
    test = TensorSplit(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:])
    return Data("digits", train, test, [str(i) for i in range(10)], in_chans=1)


class _FileSource:
    """Image files by number; opened in loader processes."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __call__(self, index: int) -> tuple[Image.Image, str]:
        path = self.paths[index]
        try:
            return Image.open(path), path
        except OSError as error:
            raise UserError(
                f"{path} cannot be read as an image: {error}. Replace or remove the file."
            ) from error


class _DatasetSource:
    """Images of a map-style data set that yields (image, label)."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __call__(self, index: int) -> tuple[Image.Image, str]:
        return self.dataset[index][0], f"image {index} of {self.name}"


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _scan_folder(root: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Image paths and labels, checked: each class folder holds at least one image."""
    if not classes:
        raise UserError(
            f"--data {root}: expected one folder per class with images inside (DIR/cat/1.jpg), or DIR/train "
            "and DIR/val holding such folders; there are no folders in it."
        )
    extensions = ", ".join(sorted(get_img_extensions()))
    try:
        source = timm.data.create_dataset(
            "", root=str(root), search_split=False, class_map=dict(zip(classes, range(len(classes))))
        )
        samples = source.reader.samples
    except RuntimeError as error:
        raise UserError(f"--data {root}: no image files in its folders; expected {extensions}.") from error
    present = {label for _, label in samples}
    empty = [name for i, name in enumerate(classes) if i not in present]
    if empty:
        raise UserError(
            f"--data {root}: no image files in class folder{'s' if len(empty) > 1 else ''} "
            f"{', '.join(empty[:5])}; expected {extensions}. Add images or remove the folder."
        )
    return [path for path, _ in samples], [label for _, label in samples]


def unreadable_image(path: str) -> str | None:
    """Why ``path`` is not a whole image, or None; headers only where that is enough to tell."""
    try:
        with open(path, "rb") as file:
            with Image.open(file) as image:
                kind = image.format
                image.verify()
            if kind == "PNG":  # verify() has read all chunks and their checksums
                return None
            if kind == "JPEG":
                file.seek(-min(64, file.seek(0, 2)), 2)
                if b"\xff\xd9" in file.read():  # the end marker
                    return None
            file.seek(0)
            with Image.open(file) as image:
                image.load()
    except UnidentifiedImageError:
        return "not an image"
    except (OSError, SyntaxError, ValueError) as error:
        return f"damaged: {error}"
    return None


def check_images(paths: Sequence[str]) -> list[str]:
    """``"path (reason)"`` for each file that is not a whole image."""
    with ThreadPoolExecutor(8) as pool:
        reasons = list(pool.map(unreadable_image, paths))
    return [f"{path} ({reason})" for path, reason in zip(paths, reasons) if reason]


def _folder(root: Path, check: bool, share: Callable[[list[str]], list[str]]) -> Data:
    train_root, test_root = _subfolder(root, _TRAIN_FOLDERS), _subfolder(root, _TEST_FOLDERS)
    classes = _class_folders(train_root or root)
    paths, labels = _scan_folder(train_root or root, classes)
    if train_root is not None:
        if test_root is None:
            raise UserError(
                f"--data {root}: there is a {train_root.name} folder but none of {', '.join(_TEST_FOLDERS)}."
            )
        if unknown := sorted(set(_class_folders(test_root)) - set(classes)):
            raise UserError(
                f"--data {root}: {test_root.name} has class folders that {train_root.name} has not: "
                f"{', '.join(unknown[:5])}."
            )
        here = [name for name in classes if (test_root / name).is_dir()]
        test_paths, test_labels = _scan_folder(test_root, here)
        test_labels = [classes.index(here[label]) for label in test_labels]
    else:
        held_out = _hold_out(root, labels, classes)
        test_paths, test_labels = [paths[i] for i in held_out], [labels[i] for i in held_out]
        rest = sorted(set(range(len(paths))) - set(held_out))
        paths, labels = [paths[i] for i in rest], [labels[i] for i in rest]
    if check:
        _refuse_unreadable(root, paths + test_paths, share)
    return Data(
        str(root),
        ImageSplit(_FileSource(paths), labels),
        ImageSplit(_FileSource(test_paths), test_labels),
        classes,
        None,
    )


def _refuse_unreadable(root: Path, paths: list[str], share: Callable[[list[str]], list[str]]) -> None:
    if broken := share(check_images(paths)):
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(
            f"--data {root}: unreadable image files: {'; '.join(broken[:5])}{more}. Replace or remove them."
        )


def _listed(root: Path, lists: tuple[str, str], check: bool, share: Callable[[list[str]], list[str]]) -> Data:
    """Images that text files name, as ImageNet-LT and iNaturalist are published."""
    (paths, labels), (test_paths, test_labels) = (
        _read_list(root, file, flag) for file, flag in zip(lists, ("train_list", "test_list"), strict=True)
    )
    if check:
        _refuse_unreadable(root, paths + test_paths, share)
    classes = [str(c) for c in range(max(labels + test_labels) + 1)]
    train, test = ImageSplit(_FileSource(paths), labels), ImageSplit(_FileSource(test_paths), test_labels)
    return Data(str(root), train, test, classes, None)


def _read_list(root: Path, file: str, name: str) -> tuple[list[str], list[int]]:
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--set {name}={file} cannot be read: {error}.") from error
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        path, _, label = line.strip().rpartition(" ")
        if not label:
            continue
        if not path or not (label.isascii() and label.isdigit()):
            raise UserError(f"--set {name}={file}, line {number}: expected `path label`, got {line!r}.")
        paths.append(str(root / path))
        labels.append(int(label))
    if not paths:
        raise UserError(f"--set {name}={file} names no images; expected lines of `path label`.")
    return paths, labels


def _hold_out(root: Path, labels: list[int], classes: list[str]) -> list[int]:
    """A fifth of each class, the same images in every run."""
    random_state = np.random.RandomState(0)
    chosen: list[int] = []
    for c, name in enumerate(classes):
        members = random_state.permutation(np.flatnonzero(np.asarray(labels) == c))
        if len(members) < 2:
            raise UserError(
                f"--data {root}: class folder {name} holds one image; a fifth of each class is held out for "
                "testing, so two are needed, or separate DIR/train and DIR/val folders."
            )
        chosen.extend(members[: max(1, int(len(members) * HOLD_OUT))].tolist())
    return sorted(chosen)


def _timm_dataset(settings: Settings) -> Data:
    spec = settings.data
    kind = spec.partition("/")[0]
    splits = []
    try:
        for split in ("train", "validation"):
            splits.append(
                timm.data.create_dataset(
                    spec, root=settings.data_dir, split=split, download=settings.download, input_img_mode=None
                )
            )
    except ImportError as error:
        raise UserError(
            f"--data {spec} needs a package that is missing: {error}. pip install datasets"
        ) from error
    except AssertionError as error:
        raise UserError(f"--data {spec}: {error}. Names are those of timm's create_dataset.") from error
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--data {spec} cannot be opened in --set data_dir={settings.data_dir}: {reason} "
            f"(--set download=true fetches data sets that torchvision can fetch)"
            if kind == "torch"
            else f"--data {spec} cannot be opened: {reason}"
        ) from error
    labels = [_labels(dataset) for dataset in splits]
    source = splits[0]
    named = getattr(source, "classes", None) or list(
        getattr(getattr(source, "reader", None), "class_to_idx", None) or []
    )
    count = max(max(part) for part in labels) + 1
    classes = [str(c) for c in named] if len(named) >= count else [str(i) for i in range(count)]
    train, test = (ImageSplit(_DatasetSource(d, spec), part) for d, part in zip(splits, labels))
    return Data(spec, train, test, classes, None)


def _labels(dataset: Any) -> list[int]:
    if hasattr(dataset, "reader"):
        return [int(target) for target in dataset.reader.dataset[dataset.reader.label_key]]
    if hasattr(dataset, "targets"):
        return [int(target) for target in dataset.targets]
    return [int(dataset[i][1]) for i in range(len(dataset))]


class EpochBatches(Sampler[list[Key]]):
    """This process's share of each batch of one epoch, in an order that follows from (seed, epoch) alone.

    Args:
        split: the images.
        batch_size: images in a batch over all processes.
        group: batches in an optimizer update; the last incomplete group of an epoch is left out.
        rank: number of this process.
        world: number of processes.
        shuffle: False keeps the order, all images and no augmentation seeds, for evaluation.
        repeats: times an image comes up when shuffled, each time with a seed of its own and, as neighbours in
            a batch, on another process.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        group: int,
        rank: int,
        world: int,
        shuffle: bool,
        repeats: int = 1,
    ) -> None:
        self.split, self.batch_size, self.group = split, batch_size, group
        self.rank, self.world, self.shuffle, self.repeats = rank, world, shuffle, repeats
        self.seed: tuple[int, ...] = (0,)
        self.start = 0

    def __len__(self) -> int:
        if not self.shuffle:
            return -(-len(self.split) // self.batch_size)
        return len(self.split) // (self.batch_size * self.group) * self.group

    def __iter__(self) -> Iterator[list[Key]]:
        count = len(self.split)
        if not self.shuffle:
            for begin in range(0, count, self.batch_size):
                if mine := range(begin + self.rank, min(count, begin + self.batch_size), self.world):
                    yield [(i, None) for i in mine]
            return
        generator = np.random.default_rng(self.seed)
        order = generator.permutation(count)
        seeds = generator.integers(2**62, size=count)
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size
            places = range(first + self.rank, first + self.batch_size, self.world)
            chosen = [(int(order[place // self.repeats]), place % self.repeats) for place in places]
            yield [(i, int(seeds[i]) + copy) for i, copy in chosen]


def make_loader(batches: EpochBatches, workers: int, pin_memory: bool) -> DataLoader[tuple[Tensor, int]]:
    """A loader over ``batches``; it takes nothing from the global random state."""
    return DataLoader(
        batches.split,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),
    )
