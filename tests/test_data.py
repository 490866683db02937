"""Data sets: scaling, splits, torchvision's files on disk, and refusals."""

import gzip
import struct

import numpy as np
import pytest
import torch

from ddpm_nb.data import ImageDataset, load_dataset, load_images, resize


def test_splits_are_disjoint_fixed_and_complete():
    from sklearn.datasets import load_digits

    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    together = torch.cat([train.levels, test.levels]).flatten(1)
    everything = torch.as_tensor(load_digits().images, dtype=torch.uint8).flatten(1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, everything.numpy()))
    assert load_images("digits").equal(load_images("digits"))


def test_labels_follow_their_images():
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), load_dataset("digits", split="test")
    known = {image.astype(np.uint8).tobytes(): target for image, target in zip(bunch.images, bunch.target, strict=True)}
    assert all(known[levels.numpy().tobytes()] == label for levels, label in zip(data.levels, data.labels.tolist(), strict=True))


def write_mnist(root, n=6):
    """Write random images in MNIST's own file format where torchvision looks for them."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + bytes(range(n)))
    return pixels


def test_mnist_files_on_disk_need_no_network(tmp_path):
    pixels = write_mnist(tmp_path)
    data = load_dataset("mnist", root=tmp_path, split="test")
    assert data.n_levels == 256 and len(data.classes) == 10 and data.labels.tolist() == list(range(6))
    torch.testing.assert_close(data.images()[:, 0], torch.as_tensor(pixels).float() / 127.5 - 1)
    assert load_images("mnist", root=tmp_path, image_size=32).shape == (6, 1, 32, 32)


def test_damaged_files_are_an_error_that_says_where(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(gzip.compress(b"no images"))
    with pytest.raises(RuntimeError, match=f"mnist could not be loaded from or downloaded to {tmp_path}"):
        load_dataset("mnist", root=tmp_path, split="test")


def test_resizing_averages_where_plain_bilinear_skips():
    stripes = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    stripes[..., ::4] = 16  # every fourth column
    small = resize(ImageDataset(stripes, torch.zeros(1), n_levels=17, classes="0"), 2)
    assert small.levels.float().mean() == 4 and small.levels.dtype == torch.uint8
    plain = torch.nn.functional.interpolate(stripes.float(), (2, 2), mode="bilinear")
    assert plain.mean() == 0  # reads only columns without ink


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "digit"}, ValueError, "name must be one of 'digits', 'mnist', 'fashion-mnist', 'cifar10'; got 'digit'"),
        ({"name": "digits", "split": "val"}, ValueError, "split must be one of 'train', 'test'; got 'val'"),
        ({"name": "digits", "image_size": 0}, ValueError, "image_size must be at least 1; got 0"),
        ({"name": "digits", "image_size": 8.0}, TypeError, "image_size must be a whole number; got 8.0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load_dataset(**arguments)
