from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.auto_augment import AugmentOp

from pyvitfast.train import Settings, UserError, open_data
from pyvitfast.train.data import EpochBatches, check_batch_size, check_images, make_loader


def settings(**changes: object) -> Settings:
    return Settings.from_dict({"batch_size": 4, "workers": 0, **changes})


def test_digits_split_is_fixed_and_complete() -> None:
    data = open_data(settings())
    again = open_data(settings(seed=7))
    assert (len(data.train), len(data.test), data.num_classes, data.in_chans) == (1300, 497, 10, 1)
    assert torch.equal(data.train.images, again.train.images)
    whole = load_digits()
    joined = torch.cat([data.train.images, data.test.images]).add(1).mul(8).squeeze(1).numpy()
    expected = sorted(zip(map(bytes, whole.images.astype(np.uint8)), whole.target.tolist()))
    assert sorted(zip(map(bytes, joined.astype(np.uint8)), data.train.labels + data.test.labels)) == expected
    # Every digit is in both parts in about equal numbers.
    assert min(np.bincount(data.train.labels)) >= 115
    assert min(np.bincount(data.test.labels)) >= 35


def test_imbalance_touches_the_training_split_only_and_whatever_the_seed() -> None:
    data, other = open_data(settings(imbalance=10)), open_data(settings(imbalance=10, seed=1))
    counts = np.bincount(data.train.labels)
    assert counts[0] > 9 * counts[9]
    assert len(data.test) == 497
    assert torch.equal(other.train.images, data.train.images)


def test_class_folders_without_splits_hold_out_a_fifth_of_each(image_folder: Path) -> None:
    data = open_data(settings(data=str(image_folder)))
    assert data.class_names == ["cat", "dog"]
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    assert not set(data.train.source.paths) & set(data.test.source.paths)
    assert open_data(settings(data=str(image_folder), seed=5)).test.source.paths == data.test.source.paths


def test_train_and_val_folders(image_folder: Path) -> None:
    root = image_folder.parent / "split"
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (root / part / name).symlink_to(image_folder / name)
    data = open_data(settings(data=str(root)))
    assert (len(data.train), len(data.test)) == (20, 20)
    (root / "val" / "bird").mkdir()
    with pytest.raises(UserError, match="val has class folders that train has not: bird"):
        open_data(settings(data=str(root)))


def test_lists_of_images(image_folder: Path, tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("dog/3.png 1\ncat/0.jpg 0\n\ncat/2.jpg 0\n")
    test.write_text("dog/1.png 1\ncat/1.png 0\n")
    lists = {"train_list": str(train), "test_list": str(test)}
    data = open_data(settings(data=str(image_folder), **lists))
    assert (data.train.labels, data.test.labels, data.class_names) == ([1, 0, 0], [1, 0], ["0", "1"])
    assert data.train.source.paths[0] == str(image_folder / "dog/3.png")
    for text, words in (
        ("dog/3.png", "train_list=.*line 1: expected `path label`, got 'dog/3.png'"),
        ("a.png 1\nb.png x", "line 2: expected `path label`"),
        ("", "names no images"),
        ("dog/none.png 1", "unreadable image files: .*none.png"),
    ):
        train.write_text(text)
        with pytest.raises(UserError, match=words):
            open_data(settings(data=str(image_folder), **lists))
    train.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_data(settings(data=str(image_folder), **lists))
    with pytest.raises(UserError, match="--train-list must be given together with test_list"):
        settings(data=str(image_folder), train_list=str(train))


def test_torchvision_folder_through_timm(image_folder: Path) -> None:
    root = image_folder.parent / "tv"
    for part in ("train", "validation"):
        (root / part).mkdir(parents=True)
        (root / part / "cat").symlink_to(image_folder / "cat")
        (root / part / "dog").symlink_to(image_folder / "dog")
    data = open_data(settings(data="torch/image_folder", data_dir=str(root)))
    assert (len(data.train), len(data.test), data.class_names) == (20, 20, ["cat", "dog"])
    data.fit_to(timm.create_model("vit_tiny_patch16_224", img_size=32), settings())
    assert data.train[0, 1][0].shape == (3, 32, 32)


def test_images_follow_the_model(image_folder: Path) -> None:
    data = open_data(settings(data=str(image_folder)))
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, in_chans=1)
    data.fit_to(model, settings())
    image, label = data.test[3, None]
    assert image.shape == (1, 48, 48)
    assert label == 1
    # Normalised with the model's mean 0.5 and std 0.5: white is 1, black is -1.
    assert -1 <= float(image.min()) < float(image.max()) <= 1
    digits = open_data(settings())
    digits.fit_to(model, settings())
    assert digits.train[0, None][0].shape == (1, 48, 48)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_image_only(image_folder: Path, workers: int) -> None:
    chosen = settings(data=str(image_folder), aa="rand-m9-mstd0.5-inc1", reprob=0.5)
    data = open_data(chosen)
    data.fit_to(timm.create_model("vit_tiny_patch16_224", img_size=32), chosen)

    def epoch(loader_workers: int, seed: tuple[int, ...], start: int = 0) -> list[torch.Tensor]:
        batches = EpochBatches(data.train, 4, 1, 0, 1, shuffle=True)
        batches.seed, batches.start = seed, start
        return [images for images, _ in make_loader(batches, loader_workers, False)]

    torch.manual_seed(workers)
    before = torch.get_rng_state()
    found = epoch(workers, (0, 0, 3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    expected = epoch(0, (0, 0, 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    later = epoch(workers, (0, 0, 3), start=2)
    assert all(torch.equal(a, b) for a, b in zip(later, expected[2:], strict=True))
    assert not torch.equal(torch.stack(epoch(0, (0, 0, 4))), torch.stack(expected))


def test_processes_share_each_batch() -> None:
    data = open_data(settings())

    def parts(world: int, rank: int) -> list[list[int]]:
        batches = EpochBatches(data.train, 100, 2, rank, world, shuffle=True)
        batches.seed = (1, 2, 3)
        return [[i for i, _ in batch] for batch in batches]

    whole, first, second = parts(1, 0), parts(2, 0), parts(2, 1)
    assert len(whole) == 12  # 13 batches of 100, and updates of 2 batches
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(w) for w in whole]
    assert len({i for batch in whole for i in batch}) == 1200
    test = [EpochBatches(data.test, 100, 1, rank, 3, shuffle=False) for rank in range(3)]
    assert sorted(i for part in test for batch in part for i, _ in batch) == list(range(497))


def test_bad_image_files_are_named_at_the_start(image_folder: Path) -> None:
    whole = (image_folder / "cat" / "0.jpg").read_bytes()
    (image_folder / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    png = (image_folder / "dog" / "1.png").read_bytes()
    (image_folder / "dog" / "1.png").write_bytes(png[: len(png) // 2])
    (image_folder / "dog" / "2.jpg").write_text("not an image at all")
    (image_folder / "dog" / "4.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        open_data(settings(data=str(image_folder)))
    message = str(error.value)
    for name in (
        "cat/0.jpg (damaged",
        "dog/1.png (damaged",
        "dog/2.jpg (not an image",
        "dog/4.jpg (not an image",
    ):
        assert name in message
    assert "1.jpg" not in message
    unchecked = open_data(settings(data=str(image_folder), check_images=False))
    unchecked.fit_to(timm.create_model("vit_tiny_patch16_224", img_size=32), settings())
    everything = [*unchecked.train.source.paths, *unchecked.test.source.paths]
    place = unchecked.train if "2.jpg" in str(unchecked.train.source.paths) else unchecked.test
    index = next(i for i, p in enumerate(place.source.paths) if p.endswith("dog/2.jpg"))
    with pytest.raises(UserError, match=r"dog/2\.jpg cannot be read as an image"):
        place[index, None]
    assert len(everything) == 20


@pytest.mark.parametrize("format", ["jpg", "png", "webp", "bmp", "gif"])
def test_a_cut_file_of_any_format_is_found(tmp_path: Path, format: str) -> None:
    pixels = np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8)
    path = tmp_path / f"image.{format}"
    Image.fromarray(pixels).save(path)
    assert check_images([str(path)]) == []
    path.write_bytes(path.read_bytes()[:-400])
    assert check_images([str(path)]) != []


def test_wrong_data(tmp_path: Path, image_folder: Path) -> None:
    cases = {
        "digitz": "--data digitz: expected `digits`.*Did you mean 'digits'",
        str(tmp_path / "none"): "there is no such folder",
        "torch/nonsense": "Unknown torchvision dataset nonsense",
        "torch/cifar10": "cannot be opened.*--set download=true",
    }
    for spec, words in cases.items():
        with pytest.raises(UserError, match=words):
            open_data(settings(data=spec, data_dir=str(tmp_path)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="expected one folder per class"):
        open_data(settings(data=str(empty)))
    (empty / "cat").mkdir()
    with pytest.raises(UserError, match="no image files"):
        open_data(settings(data=str(empty)))
    (image_folder / "horse").mkdir()
    (image_folder / "horse" / "notes.txt").write_text("none yet")
    with pytest.raises(UserError, match="no image files in class folder horse"):
        open_data(settings(data=str(image_folder)))
    with pytest.raises(UserError, match="--batch-size 1301 is more than the 1300 training images"):
        check_batch_size(open_data(settings()), settings(batch_size=1301))


def test_hugging_face_data_needs_its_package(tmp_path: Path) -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install datasets"):
            open_data(settings(data="hfds/mnist", data_dir=str(tmp_path)))
    else:
        pytest.skip("the datasets package is installed; its absence cannot be tested")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_strongest_posterize_is_black(mode: str) -> None:
    """timm asks for 0 bits there, which Pillow 13 refuses."""
    image = Image.new(mode, (4, 4), "white")
    for magnitude, most in ((10, 0), (5, 0b11000000)):
        op = AugmentOp("PosterizeIncreasing", 1.0, magnitude, {})
        assert np.asarray(op(image)).max() == most


class TestViews:
    """Two augmented versions of an image."""

    @staticmethod
    def split(
        kind: str | None, image_folder: Path, model: str = "resnet20_cifar", **arguments: object
    ) -> Any:
        data = open_data(settings(data=str(image_folder)))
        data.fit_to(timm.create_model(model, num_classes=2, **arguments), settings(), kind)
        return data

    @pytest.mark.parametrize("kind", ["cifar", "imagenet"])
    @pytest.mark.parametrize("chans", [1, 3])
    def test_they_differ_and_follow_from_the_seed_alone(
        self, kind: str, chans: int, image_folder: Path
    ) -> None:
        data = self.split(kind, image_folder, in_chans=chans)
        before = random.getstate(), torch.get_rng_state()
        first, label = data.train[0, 7]
        assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
        assert first.shape == (2, chans, 32, 32)
        assert label == data.train.labels[0]
        torch.rand(3)
        assert torch.equal(data.train[0, 7][0], first)
        assert not torch.equal(first[0], first[1])
        for view, other in zip(first, data.train[0, 8][0]):
            assert not torch.equal(view, other)
        assert data.test[0, None][0].shape == (chans, 32, 32)

    def test_a_square_of_half_the_side_is_cut_out_of_the_query(self, image_folder: Path) -> None:
        data = self.split("cifar", image_folder)
        mean, std = (
            torch.tensor(data.train.transform.query.transforms[-1].__dict__[k]) for k in ("mean", "std")
        )
        for seed in range(20):
            query = data.train[15, seed][0][0] * std[:, None, None] + mean[:, None, None]
            black = (query.abs() < 1e-6).all(0).float()
            # In some place all 16 x 16 pixels are black.
            assert F.avg_pool2d(black[None], 16, 1).max() == 1

    def test_digits_move_by_a_pixel_and_the_key_loses_a_part(self) -> None:
        data = open_data(settings())
        model = timm.create_model("resnet20_cifar", in_chans=1)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 8, 8)}
        data.fit_to(model, settings(), "cifar")
        image = data.train.images[3]
        padded = F.pad(image, (1, 1, 1, 1), value=-1)
        moved = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        places, erased = set(), 0
        for seed in range(60):
            query, key = data.train[3, seed][0]
            places |= {i for i, m in enumerate(moved) if torch.equal(query, m)}
            (near,) = [m for m in moved if torch.equal(torch.where(key == m, m, -torch.ones(())), key)][:1]
            erased += not torch.equal(near, key)
        assert places == set(range(9))
        assert 15 < erased < 45
        data.fit_to(model, settings())
        assert torch.equal(data.train[3, 5][0], image)
