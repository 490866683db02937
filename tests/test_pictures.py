"""Pictures from files: torchvision's sets, downloads, folders, their parts, damaged files, and what is told."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import sys
import tarfile
import threading
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import datasets

from conftest import refuses
from ddpm_nb import pictures, texts
from ddpm_nb.data import ImageDataset, load_dataset, load_images, scale_levels, train_batches
from ddpm_nb.pictures import (
    FolderDataset,
    find_parts,
    list_pictures,
    load_folder,
    load_torchvision,
    read_picture,
)

# ---- torchvision's files ----------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
KINDS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}


def mnist_files():
    """Return six random images in MNIST's own file format, by file name."""
    files = {}
    for part, pixels in (("train", PIXELS[::-1]), ("t10k", PIXELS)):
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 2051, 6, 28, 28) + pixels.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 2049, 6) + bytes(range(6))
    return files


def write(folder, files):
    """Write files into a folder that need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def pack(monkeypatch, kind):
    """Return the packed files of a set, and let torchvision know their checksums."""
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in mnist_files().items()}
    monkeypatch.setattr(kind, "resources", [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()])
    return packed


@pytest.fixture
def no_network(monkeypatch):
    """Count attempts to reach the network, which all fail."""
    attempts = []

    def refuse(request, *args, **kwargs):
        attempts.append(getattr(request, "full_url", request))
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return attempts


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("inner", ["{}/raw", "raw", ""])
def test_files_on_disk_need_no_network(tmp_path, no_network, name, inner):
    write(tmp_path / inner.format(KINDS[name].__name__), mnist_files())
    data = load_dataset(name, root=tmp_path, split="test")
    assert data.levels.equal(load_torchvision(name, root=tmp_path, split="test").levels)
    assert data.n_levels == 256 and len(data.classes) == 10 and data.labels.tolist() == list(range(6)) and not data.flip
    torch.testing.assert_close(data.images()[:, 0], torch.as_tensor(PIXELS).float() / 127.5 - 1)
    assert load_dataset(name, root=tmp_path).levels[0, 0].equal(torch.as_tensor(PIXELS[-1].copy()))
    assert load_images(name, root=tmp_path, image_size=32).shape == (6, 1, 32, 32) and not no_network


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inner", ["{}/raw", "raw", ""])
def test_mnist_and_fashion_mnist_are_told_apart(tmp_path, no_network, inner, split):
    """Their files have equal names; whole sets of one are refused where the other is asked for."""
    n = {"train": 60_000, "test": 10_000}
    even = {part: np.arange(size) % 10 for part, size in n.items()}
    uneven = {part: np.where(np.arange(size) == 5, 0, labels) for (part, size), labels in zip(n.items(), even.values(), strict=True)}
    own, other = {"mnist": uneven, "fashion-mnist": even}, {"mnist": even, "fashion-mnist": uneven}
    words = {"mnist": f"hold {n[split] // 10} images of each class, as Fashion-MNIST does", "fashion-mnist": "hold classes of"}
    for name, kind in KINDS.items():
        for labels, place in ((own[name], "own"), (other[name], "other")):
            folder = tmp_path / name / place / inner.format(kind.__name__)
            files = {}
            for part, file in (("train", "train"), ("test", "t10k")):
                header = struct.pack(">IIII", 2051, n[part], 1, 1)
                files[f"{file}-images-idx3-ubyte"] = header + bytes(n[part])
                files[f"{file}-labels-idx1-ubyte"] = struct.pack(">II", 2049, n[part]) + labels[part].astype(np.uint8).tobytes()
            write(folder, files)
        assert len(load_dataset(name, root=tmp_path / name / "own", split=split)) == n[split]
        refused = lambda name=name: load_dataset(name, root=tmp_path / name / "other", split=split)
        refuses(refused, f"{name} could not be loaded", words[name], "whose files have the same names", error=RuntimeError)
    assert not no_network


def test_names_of_classes_are_those_of_the_digits(tmp_path):
    write(tmp_path, mnist_files())
    assert load_dataset("mnist", root=tmp_path).classes == load_dataset("digits").classes == tuple("0123456789")


def test_packed_files_are_verified_and_unpacked(tmp_path, monkeypatch, no_network):
    packed = pack(monkeypatch, datasets.MNIST)
    write(tmp_path / "good", packed)
    assert load_dataset("mnist", root=tmp_path / "good").levels.shape == (6, 1, 28, 28)
    write(tmp_path / "bad", packed | {"t10k-labels-idx1-ubyte.gz": b"other"})
    with pytest.raises(RuntimeError, match=r"t10k-labels-idx1-ubyte.gz does not match its checksum"):
        load_dataset("mnist", root=tmp_path / "bad")
    assert (tmp_path / "bad" / "t10k-labels-idx1-ubyte.gz").read_bytes() == b"other" and not no_network


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("t10k-images-idx3-ubyte", b"no images", "."),
        ("t10k-images-idx3-ubyte", struct.pack(">IIII", 2051, 6, 28, 28) + bytes(100), "."),
        ("t10k-labels-idx1-ubyte", struct.pack(">II", 2049, 5) + bytes(5), "as many as labels"),
        ("train-labels-idx1-ubyte", None, "train-labels-idx1-ubyte is missing"),
    ],
)
def test_damaged_files_are_an_error_that_says_where(tmp_path, no_network, file, content, reason):
    folder = tmp_path / "MNIST" / "raw"
    write(folder, mnist_files())
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = rf"^mnist could not be loaded: .*{reason}.*put train-images-idx3-ubyte.* into {folder}, or pass"
    with pytest.raises(RuntimeError, match=message):
        load_dataset("mnist", root=tmp_path, split="test")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept and not no_network  # nothing was replaced


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_no_network_is_one_clear_error(tmp_path, no_network, name):
    message = rf"^{name} could not be loaded: .*Network is unreachable.*With no network, put .* into {tmp_path}"
    with pytest.raises(RuntimeError, match=message):
        load_dataset(name, root=tmp_path / "new")
    assert no_network and list((tmp_path / "new").iterdir()) == []


def write_cifar(monkeypatch, folder):
    """Write CIFAR-10's pickles with 2 images a batch, and let torchvision know their checksums."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {name: pickle.dumps({"data": pixels[2 * i : 2 * i + 2], "labels": [i, 9]}) for i, name in enumerate(names)}
    files["batches.meta"] = pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]})
    write(folder, files)
    sums = [[name, hashlib.md5(content).hexdigest()] for name, content in files.items()]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums[6][1]})
    return pixels


@pytest.mark.parametrize("inner", ["cifar-10-batches-py", ""])
def test_cifar(tmp_path, monkeypatch, no_network, inner):
    pixels = write_cifar(monkeypatch, tmp_path / inner)
    data, test = load_dataset("cifar10", root=tmp_path), load_dataset("cifar10", root=tmp_path, split="test")
    assert data.flip and data.n_levels == 256 and data.classes[3] == "kind 3" and data.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.levels.equal(torch.as_tensor(pixels[:10]).reshape(10, 3, 32, 32)) and test.levels.shape == (2, 3, 32, 32)
    assert load_dataset("cifar10", root=tmp_path, image_size=16).flip and not no_network


@pytest.mark.parametrize("root", ["data", None])
def test_cifar_in_a_relative_folder(tmp_path, monkeypatch, no_network, root):
    pixels = write_cifar(monkeypatch, tmp_path / "data" / "cifar-10-batches-py")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("cifar10", root=root).levels) == len(pixels) - 2 and not no_network


@pytest.mark.parametrize("split", ["val", "Train", None])
def test_sets_of_torchvision_have_two_parts(split):
    refuses(lambda: load_torchvision("mnist", split=split), "split must be one of 'train', 'test'")
    refuses(lambda: load_torchvision("svhn"), "name must be one of 'mnist', 'fashion-mnist', 'cifar10'")


def test_a_download_completes_what_is_there(tmp_path, monkeypatch):
    def fetch(part, download):
        write(Path(part) / "set", {"a": b"new", "b": b"new"})

    write(tmp_path / "set", {"a": b"old", ".DS_Store": b"x"})
    pictures._download(fetch, tmp_path, Path("set"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == {"a": b"old", "b": b"new", ".DS_Store": b"x"}


def test_a_pickle_with_another_checksum_is_not_opened(tmp_path, monkeypatch, no_network):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    write_cifar(monkeypatch, tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RuntimeError, match="data_batch_1 does not match its checksum"):
        load_dataset("cifar10", root=tmp_path)
    assert not (tmp_path / "ran").exists() and not no_network


def test_cifar_in_its_archive(tmp_path, monkeypatch, no_network):
    write_cifar(monkeypatch, tmp_path / "a" / "cifar-10-batches-py")
    (tmp_path / "b").mkdir()
    archive = tmp_path / "b" / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "a" / "cifar-10-batches-py", "cifar-10-batches-py")
    with pytest.raises(RuntimeError, match=f"{archive.name} does not match its checksum"):
        load_dataset("cifar10", root=tmp_path / "b")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    expected = load_dataset("cifar10", root=tmp_path / "a").levels
    for _ in range(2):  # from the archive, then from what was unpacked
        assert load_dataset("cifar10", root=tmp_path / "b").levels.equal(expected)
    assert not no_network


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve the folder `served` on this machine as MNIST's only mirror."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{httpd.server_port}/"])
        yield tmp_path / "served"
        httpd.shutdown()


@pytest.mark.parametrize("terminal", [True, False])
def test_download_shows_its_progress_on_a_terminal_only(tmp_path, monkeypatch, server, capfd, terminal):
    write(server, pack(monkeypatch, datasets.MNIST))
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    screen.isatty = lambda: terminal
    data = load_dataset("mnist", root=tmp_path / "new" / "place", split="test")
    assert data.levels[:, 0].equal(torch.as_tensor(PIXELS)) and socket.getdefaulttimeout() is None
    assert ("100%" in screen.getvalue()) == terminal and (terminal or capfd.readouterr() == ("", ""))
    server.rename(tmp_path / "gone")
    assert load_dataset("mnist", root=tmp_path / "new" / "place", split="test").levels.equal(data.levels)


def test_a_download_with_another_checksum_leaves_nothing(tmp_path, monkeypatch, server):
    write(server, pack(monkeypatch, datasets.MNIST))
    (server / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(RuntimeError, match=r"mnist could not be loaded: .*t10k-images-idx3-ubyte.gz.*corrupted.*put"):
        load_dataset("mnist", root=tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self):
        (tmp_path / "new" / "seen").touch()
        write(Path(self.raw_folder), {"train-images-idx3-ubyte": b"half"})
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.MNIST, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("mnist", root=tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["seen"] and socket.getdefaulttimeout() is None


def test_another_process_that_was_faster_is_no_error(tmp_path, monkeypatch):
    def download(self):
        write(tmp_path / "new" / "MNIST" / "raw", mnist_files())  # the other process
        write(Path(self.raw_folder), mnist_files())

    monkeypatch.setattr(datasets.MNIST, "download", download)
    assert len(load_dataset("mnist", root=tmp_path / "new")) == 6


# ---- folders ----------------------------------------------------------------------------------------------------------


def picture(width=20, height=20, channels=3, seed=0):
    """Return a smooth random picture as an array (H, W) or (H, W, channels) of bytes."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB" if channels == 3 else "L"))


def one(tmp_path, image, name="a.png", size=20, grey=False, **options):
    """Save a picture alone in a folder and read it back as levels (C, H, W)."""
    image.save(tmp_path / name, **options)
    return FolderDataset(tmp_path, size, grey=grey).read(0)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "I;16", "RGBA", "LA"])
def test_modes_come_out_as_they_look(tmp_path, mode, grey):
    rgb, flat = picture(), picture(channels=1)
    source = {
        "RGB": lambda: (Image.fromarray(rgb), rgb),
        "L": lambda: (Image.fromarray(flat), flat),
        "P": lambda: (image := Image.fromarray(rgb).quantize(), np.asarray(image.convert("RGB"))),
        "1": lambda: (Image.fromarray(flat > 127), (flat > 127) * np.uint8(255)),
        "I;16": lambda: (Image.fromarray(flat.astype(np.uint16) * 257), flat),
        "RGBA": lambda: (Image.fromarray(np.dstack([rgb, np.full((20, 20), 255, np.uint8)])), rgb),
        "LA": lambda: (Image.merge("LA", [Image.fromarray(flat), Image.new("L", (20, 20), 255)]), flat),
    }
    image, looks = source[mode]()
    assert image.mode == mode
    looks = Image.fromarray(looks).convert("L" if grey else "RGB")
    expected = torch.from_numpy(np.array(looks)).reshape(20, 20, -1).permute(2, 0, 1)
    assert one(tmp_path, image, grey=grey).equal(expected)


def test_sixteen_bits_straight_would_be_white():
    image = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    assert np.asarray(image.convert("L")).min() == 255  # the wrong form: middle grey is clipped to white


def test_big_endian_sixteen_bits(tmp_path):
    flat = picture(channels=1)
    image = Image.frombytes("I;16B", (20, 20), (flat.astype(">u2") * 257).astype(">u2").tobytes())
    assert one(tmp_path, image, "a.tif", grey=True)[0].equal(torch.tensor(flat))


@pytest.mark.parametrize(
    ("mode", "level", "reason"),
    [("F", 0.5, "floating-point levels"), ("I", 70000, "must be in 0..65535; got 70000"), ("I", -1, "0..65535; got -1")],
)
def test_levels_of_unknown_range_are_refused(tmp_path, mode, level, reason):
    with pytest.raises(ValueError, match=rf"cannot read 1 of 1 files in .*'a.tif' \(ValueError: .*{reason}"):
        one(tmp_path, Image.new(mode, (4, 4), level), "a.tif")


@pytest.mark.parametrize("palette", [False, True])
def test_transparent_pixels_are_white(tmp_path, palette):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 10, 20))
    if palette:
        image = image.quantize()
        assert image.mode == "P"
    levels = one(tmp_path, image)
    assert levels[:, :, :10].float().mean((1, 2)).tolist() == [200, 0, 0] and (levels[:, :, 10:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    levels = one(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 51)), size=8)  # a fifth of black
    assert (levels == 204).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed(tmp_path, orientation):
    upright = Image.fromarray(picture(24, 24))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how a viewer's turn is undone
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    levels = one(tmp_path, stored, size=24, exif=exif)
    assert levels.permute(1, 2, 0).equal(torch.from_numpy(np.array(upright)))


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (41, 20), (20, 20), (10, 10), (7, 300), (64, 48)])
def test_shorter_side_is_resized_and_the_middle_kept(tmp_path, width, height):
    array = picture(width, height, 1)
    side = min(width, height)
    top, left = (height - side) / 2, (width - side) / 2
    middle = Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    got = one(tmp_path, Image.fromarray(array), size=16, grey=True)[0].int()
    assert (got - torch.from_numpy(np.array(middle)).int()).abs().max() <= 1


def test_reduction_is_antialiased_and_agrees_with_tensors(tmp_path):
    stripes = np.zeros((32, 32), np.uint8)
    stripes[:, ::4] = 252
    small = one(tmp_path, Image.fromarray(stripes), size=4, grey=True)
    assert small.float().mean() == 63
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    got = FolderDataset(tmp_path, 12, grey=True).read(0)
    tensor = torch.nn.functional.interpolate(torch.as_tensor(noise)[None, None].float(), (12, 12), mode="bilinear", antialias=True)
    assert (got - tensor[0]).abs().max() <= 2  # Pillow rounds after each direction


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"])
def test_formats(tmp_path, suffix):
    array = picture(32, 32)
    got = one(tmp_path, Image.fromarray(array), f"a{suffix}", size=32).float()
    assert (got - torch.from_numpy(array.copy()).permute(2, 0, 1)).abs().mean() < 12  # some formats lose a little


def test_colour_jpeg_for_print(tmp_path):
    image = Image.fromarray(picture(32, 32)).convert("CMYK")
    got = one(tmp_path, image, "a.jpg", size=32, quality=95)
    assert (got.float() - torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)).abs().mean() < 4


def fill(root, names, **options):
    """Write a picture under each name, all different."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed=seed, **options)).save(root / name)


def test_order_and_classes_do_not_depend_on_the_system(tmp_path, monkeypatch):
    names = ["b/2.png", "a/10.png", "a/sub/1.png", "b/1.PNG", "a/9.png", "C/x.jpg"]
    fill(tmp_path, names)
    data = FolderDataset(tmp_path, 8)
    assert data.files == sorted(names) and data.classes == ("C", "a", "b") and data.labels.tolist() == [0, 1, 1, 1, 2, 2]
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **kwargs: ((a, b, c[::-1]) for a, b, c in reversed(list(walk(*args, **kwargs)))))
    assert FolderDataset(tmp_path, 8).files == data.files
    image, label = data[-1]
    assert label == 2 and image.dtype == torch.float32
    torch.testing.assert_close(image, data.read(5).float() / 127.5 - 1)


def test_flat_folder_is_one_class_and_a_mixture_is_refused(tmp_path):
    fill(tmp_path, ["b.png", "a.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no picture")
    data = FolderDataset(tmp_path, 8)
    assert data.classes == ("all",) and data.labels.tolist() == [0, 0] and data.n_levels == 256 and len(data) == 2
    fill(tmp_path, ["dogs/c.png"])
    with pytest.raises(ValueError, match="all beside each other; got 2 beside the folders 'dogs'"):
        FolderDataset(tmp_path, 8)


def test_hidden_and_other_files_stay_out(tmp_path):
    fill(tmp_path, ["a/1.png", ".thumbnails/1.png", "a/._1.png", "a/.cache/2.png", "__MACOSX/a/._1.png"])
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    data = FolderDataset(tmp_path, 8)
    assert data.files == ["a/1.png"] and data.classes == ("a",) and data.unreadable == {}


def damage(root):
    """Damage files of a folder in several ways, and return what the report has to say."""
    whole = (root / "a" / "0.png").read_bytes()
    Image.fromarray(picture(64, 64)).save(root / "a" / "cut.jpg")
    (root / "a" / "cut.jpg").write_bytes((root / "a" / "cut.jpg").read_bytes()[:-200])
    (root / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "b" / "page.png").write_text("<html>not found</html>")
    return {"a/cut.jpg": "truncated", "a/cut.png": "", "a/empty.png": "", "b/page.png": ""}


def test_no_other_program_is_started_for_a_file(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    Image.fromarray(picture()).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    with pytest.raises(ValueError, match=r"'page.png' \(UnidentifiedImageError"):
        FolderDataset(tmp_path, 8)
    assert started == []


def test_unreadable_files_are_refused_or_skipped_by_name(tmp_path):
    fill(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])
    expected = FolderDataset(tmp_path, 8)
    problems = damage(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read 4 of 7 files .*unreadable='skip'") as refused:
        FolderDataset(tmp_path, 8)
    assert all(f"{name!r} (" in str(refused.value) and reason in str(refused.value) for name, reason in problems.items())
    assert str(refused.value).count(str(tmp_path)) == 1  # the folder is named once, not with every file
    with pytest.warns(UserWarning, match="left out 4 of 7 files") as caught:
        data = FolderDataset(tmp_path, 8, unreadable="skip")
    assert all(repr(name) in str(caught[0].message) for name in problems) and set(data.unreadable) == set(problems)
    assert data.files == expected.files and data.classes == expected.classes and data.labels.equal(expected.labels)
    assert all(torch.equal(data[i][0], expected[i][0]) for i in range(3))


def test_classes_do_not_move_when_all_files_of_one_are_damaged(tmp_path):
    fill(tmp_path, ["a/0.png", "b/0.png", "c/0.png"])
    (tmp_path / "b" / "0.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="left out 1 of 3"):
        data = FolderDataset(tmp_path, 8, unreadable="skip")
    assert data.classes == ("a", "b", "c") and data.labels.tolist() == [0, 2]


def test_trust_looks_at_no_file_until_its_turn(tmp_path, monkeypatch):
    fill(tmp_path, ["0.png", "1.png"])
    (tmp_path / "1.png").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("a file was opened"))
        data = FolderDataset(tmp_path, 8, unreadable="trust")
    assert len(data) == 2 and data[0][0].shape == (3, 8, 8)
    with pytest.raises(RuntimeError, match=r"cannot read '1.png' in .*: UnidentifiedImageError"):
        data[1]


def test_a_file_that_vanishes_is_named(tmp_path):
    fill(tmp_path, ["0.png", "1.png"])
    data = FolderDataset(tmp_path, 8)
    (tmp_path / "1.png").unlink()
    with pytest.raises(RuntimeError, match=r"cannot read '1.png' in .*: FileNotFoundError"):
        next(train_batches(data, 2))


def test_many_unreadable_files_are_counted(tmp_path):
    for i in range(15):
        (tmp_path / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read 15 of 15 files .*'09.png' \([^;]*; \.\.\.\. Repair"):
        FolderDataset(tmp_path, 8)
    with pytest.warns(UserWarning, match="left out 15"), pytest.raises(ValueError, match="holds no picture that can be read"):
        FolderDataset(tmp_path, 8, unreadable="skip")


def test_links_out_of_the_folder_are_unreadable(tmp_path):
    fill(tmp_path, ["mine/0.png", "mine/1.png", "private/secret.png"])
    (tmp_path / "mine" / "out.png").symlink_to(tmp_path / "private" / "secret.png")
    (tmp_path / "mine" / "folder").symlink_to(tmp_path / "private")
    (tmp_path / "mine" / "within.png").symlink_to("0.png")
    (tmp_path / "mine" / "nowhere.png").symlink_to("gone.png")
    (tmp_path / "mine" / "loop.png").symlink_to("loop.png")
    for unreadable in ("refuse", "trust"):  # links are known without opening a file
        with pytest.raises(ValueError, match="cannot read 4 of 7"):
            FolderDataset(tmp_path / "mine", 8, unreadable=unreadable)
    with pytest.warns(UserWarning, match="'out.png' .a link that leads out of the folder"):
        data = FolderDataset(tmp_path / "mine", 8, unreadable="skip")
    assert data.files == ["0.png", "1.png", "within.png"] and set(data.unreadable) == {"out.png", "folder", "nowhere.png", "loop.png"}
    (tmp_path / "alias").symlink_to(tmp_path / "private")
    assert FolderDataset(tmp_path / "alias", 8).files == ["secret.png"]  # the folder itself may be a link


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    fill(tmp_path, ["0.png"])
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"'pipe.png' \(not a file\)"):
        FolderDataset(tmp_path, 8)


@pytest.mark.parametrize("limit", [500, 250])  # Pillow warns beyond the limit, and refuses beyond twice that
def test_bombs_are_refused_by_name(tmp_path, monkeypatch, limit):
    fill(tmp_path, ["0.png"], width=25, height=25)
    trusted = FolderDataset(tmp_path, 8, unreadable="trust")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    filters = list(warnings.filters)
    with pytest.raises(ValueError, match=r"'0.png' \(DecompressionBomb.*625 pixels"):
        FolderDataset(tmp_path, 8)
    with pytest.raises(RuntimeError, match=r"'0.png' .*DecompressionBomb"):
        trusted[0]
    assert warnings.filters == filters


def test_folders_stay_on_the_disk(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(5)])
    data = FolderDataset(tmp_path, 256)
    assert len(pickle.dumps(data)) < 3 * 256 * 256  # less than a single image


def test_load_dataset_reads_folders(tmp_path):
    fill(tmp_path, ["a/0.png", "b/1.png"])
    lazy = load_dataset("folder", root=str(tmp_path), image_size=8, grey=True, flip=True)
    held = load_dataset("folder", root=tmp_path, image_size=8, grey=True, flip=True, in_memory=True)
    assert isinstance(lazy, FolderDataset) and isinstance(held, ImageDataset) and lazy.flip and held.flip
    assert held.levels.dtype == torch.uint8 and held.classes == lazy.classes and held.labels.equal(lazy.labels) and held.n_levels == 256
    images = load_images("folder", root=tmp_path, image_size=8, grey=True)
    assert images.equal(held.images()) and images.equal(lazy.images()) and images.shape == (2, 1, 8, 8)
    assert images.equal(torch.stack([image for image, _ in lazy]))
    assert not load_dataset("folder", root=tmp_path, image_size=8).flip
    for split in ("val", "test"):
        refuses(lambda: load_folder(tmp_path, 8, split=split), f"split '{split}' needs the sub-folders 'train' and '{split}'")  # noqa: B023


# ---- parts of a data set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["val", "valid", "VALIDATION", "dev", "test", "Testing"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
def test_parts_are_no_classes(tmp_path, train, held):
    fill(tmp_path, [f"{train}/a/0.png", f"{train}/b/1.png", f"{held}/a/2.png", f"{held}/b/3.png"])
    data = load_dataset("folder", root=tmp_path, image_size=8)
    assert data.classes == ("a", "b") and data.files == ["a/0.png", "b/1.png"] and data.root.name == train
    assert load_folder(tmp_path, 8, split="test").root.name == held
    refuses(lambda: FolderDataset(tmp_path, 8), "root must hold classes, not the parts", repr(train), repr(held))
    if not held.lower().startswith("test"):
        assert load_folder(tmp_path, 8, split="val").root.name == held


def test_which_part_is_read(tmp_path):
    fill(tmp_path / "three", ["train/a/0.png", "train/a/1.png", "val/a/2.png", "test/a/3.png", "test/a/4.png", "test/a/5.png"])
    sizes = {split: len(load_folder(tmp_path / "three", 8, split=split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 2, "val": 1, "test": 3}
    fill(tmp_path / "one", ["train/a/0.png", "train/b/1.png"])
    assert load_folder(tmp_path / "one", 8).classes == ("a", "b")
    for split in ("val", "test"):
        refuses(lambda: load_folder(tmp_path / "one", 8, split=split), f"split '{split}' is not in", "which holds 'train'")  # noqa: B023
    fill(tmp_path / "flat", ["train/0.png", "test/1.png"])
    assert load_folder(tmp_path / "flat", 8).classes == ("all",)
    refuses(lambda: load_folder(tmp_path / "flat", 8, split="all"), "split must be one of 'train', 'val', 'test'; got 'all'")


def test_what_lies_beside_the_parts_is_told(tmp_path):
    fill(tmp_path, ["train/a/0.png", "test/a/1.png", "extra/2.png", "extra/3.png", "cover.png"])
    with pytest.warns(UserWarning, match="left out 3 pictures in .* beside 'train', 'test'"):
        assert len(load_folder(tmp_path, 8)) == 1
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("no picture")
    assert find_parts(["test/a.png", "valid/b.png"]) == {"test": "test", "val": "valid"}


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ["car/0.png", "train/1.png"])
    with pytest.warns(UserWarning, match="read as a class, though named like a part of a data set: 'train'"):
        assert load_folder(tmp_path, 8).classes == ("car", "train")
    with pytest.warns(UserWarning, match="'val'"):
        assert find_parts(["cat/0.png", "dog/1.png", "val/2.png"]) == {}
    refuses(lambda: find_parts(["train/0.png", "val/1.png", "valid/2.png"]), "one folder for each part", "'val', 'valid'")
    assert find_parts(["a.png"]) == find_parts([]) == find_parts(["cat/train/1.png"]) == {}


MIXED = {  # folders that look like parts of one data set, though not named exactly so
    "a year": ["train2017", "val2017"],
    "two years": ["train2017", "val2014", "annotations"],
    "a word after": ["train_images", "test_images"],
    "a word before": ["seg_train", "seg_test", "seg_pred"],
    "other words": ["training_set", "test-images"],
    "one word": ["trainset", "testset"],
    "two sets": ["trainA", "testA", "trainB", "testB"],
    "an exact one": ["train", "test2"],
    "resolutions": ["DIV2K_train_HR", "DIV2K_valid_HR"],
    "held out alone": ["val2017", "test2017"],
    "below one folder": ["images/train", "images/val"],
    "within classes": ["cat/train", "cat/test", "dog/train", "dog/test"],
    "deep": ["data/v1/Train", "data/v1/Validation"],
}


@pytest.mark.parametrize("kind", MIXED)
def test_what_looks_like_several_parts_is_refused(tmp_path, kind):
    fill(tmp_path, [f"{name}/{inside}" for name in MIXED[kind] for inside in ("c/0.png", "c/1.png")])
    names = map(repr, MIXED[kind][:2])
    for load in (FolderDataset, load_folder):
        refuses(lambda load=load: load(tmp_path, 8), "root must hold one part of a data set", *names, "pass one of them as root")
    assert len(FolderDataset(tmp_path / MIXED[kind][0], 8)) == 2


ALONE = {
    "train2017": ["train2017/0.png", "misc/1.png"],
    "seg_test": ["cat/0.png", "seg_test/1.png"],
    "data/train": ["data/train/c/0.png", "data/train/d/1.png"],
    "cat/test": ["cat/0.png", "cat/test/1.png", "dog/2.png"],
    "bullet_train": ["bullet_train/0.png", "test_tube/1.png", "violin/2.png"],
}


@pytest.mark.parametrize("name", ALONE)
def test_what_looks_like_one_part_is_read_and_told(tmp_path, name):
    fill(tmp_path, ALONE[name])
    words = rf"read as a class.* though named like a part of a data set: .*'{name}'.*; if it is one, pass that folder as root"
    with pytest.warns(UserWarning, match=words):
        assert len(load_folder(tmp_path, 8)) == len(ALONE[name])


def test_words_that_hold_the_name_of_a_part_are_none(tmp_path):
    classes = ["terrain", "contest", "trainer", "interval", "device", "tests", "valley", "latest2", "strain_1"]
    fill(tmp_path, [f"{name}/{k}/0.png" for k, name in enumerate(classes)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderDataset(tmp_path, 8).classes == tuple(sorted(classes))


def test_all_parts_number_their_classes_alike(tmp_path):
    fill(tmp_path, ["train/a/0.png", "train/b/1.png", "train/c/2.png", "test/a/3.png", "test/c/4.png"])
    for split in ("train", "test"):
        words = "same classes in train and test; got ('a', 'b', 'c') and ('a', 'c')"
        refuses(lambda: load_folder(tmp_path, 8, split=split), words)  # noqa: B023


# ---- sixteen bits, and endings ----------------------------------------------------------------------------------------

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint16), (64, 1))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_of_which_fewer_are_used(tmp_path, bits, name):
    Image.fromarray(RAMP * 2 ** (bits - 8)).save(tmp_path / name)
    top, white = 252 * 2 ** (bits - 8), 2**bits - 1
    with pytest.warns(UserWarning, match=rf"16-bit pictures in .* \(1\) have no level above {top} .*pass white_level={white}"):
        dark = FolderDataset(tmp_path, 64, grey=True)
    assert dark.read(0).max() < 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bright = load_dataset("folder", root=tmp_path, image_size=64, grey=True, white_level=white).read(0)
        FolderDataset(tmp_path, 64, unreadable="trust")  # looks at no file
    assert (bright[0, 0].double() - torch.arange(0, 256, 4) * 255 * 2 ** (bits - 8) / white).abs().max() <= 0.5
    images = load_images("folder", root=tmp_path, image_size=64, grey=True, white_level=white)
    torch.testing.assert_close(images[0], bright / 127.5 - 1)


def test_one_bright_picture_is_enough_and_white_is_a_limit(tmp_path):
    Image.fromarray(RAMP * 16).save(tmp_path / "a.png")
    Image.fromarray(RAMP * 256).save(tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(FolderDataset(tmp_path, 8, grey=True)) == 2
    refuses(lambda: FolderDataset(tmp_path, 8, white_level=4095), "'b.png' (ValueError: grey levels must be in 0..4095; got 0 to 64512")
    for bad in (0, 254, 65536):
        refuses(lambda: FolderDataset(tmp_path, 8, white_level=bad), "white_level must be in 255..65535")  # noqa: B023


def sixteen_bit_colour(path, levels, kind=2):
    """Write a PNG of 16 bits a channel, which Pillow cannot, from levels (H, W, 3), or of another kind of colours."""
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_dark_colours_of_sixteen_bits_are_told(tmp_path):
    sixteen_bit_colour(tmp_path / "a.png", np.stack([RAMP * 16] * 3, -1))
    told = "no level above 4095 and come out dark; if 4095 is white, scale the files to 65535: of 16-bit colours only the upper 8"
    with pytest.warns(UserWarning, match=told) as found:
        FolderDataset(tmp_path, 64)
    assert not any("white_level" in str(warning.message) for warning in found)  # which would be refused
    refuses(lambda: FolderDataset(tmp_path, 64, white_level=4095), "white_level is for grey pictures")
    sixteen_bit_colour(tmp_path / "a.png", np.stack([RAMP * 257] * 3, -1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderDataset(tmp_path, 64).read(0)[:, 0].equal(torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, -1))


@pytest.mark.parametrize(("bands", "kind"), [(3, 2), (2, 4), (4, 6)], ids=["RGB", "LA", "RGBA"])
def test_dark_sixteen_bits_are_told_whatever_their_bands(tmp_path, bands, kind):
    """Neither full opacity nor levels of which the upper byte holds nothing hide that a picture comes out black."""
    levels = np.stack([RAMP] * bands, -1)
    if bands % 2 == 0:
        levels[..., -1] = 65535  # opaque
    sixteen_bit_colour(tmp_path / "a.png", levels, kind)
    with pytest.warns(UserWarning, match="no level above 255 and come out dark; if 255 is white, scale the files"):
        FolderDataset(tmp_path, 64)


@pytest.mark.parametrize("level", [0, 254, 65536, "4095", 4095.0, True])
def test_a_level_of_white_that_no_file_has_is_refused_everywhere(tmp_path, level):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    for read in (lambda: FolderDataset(tmp_path, 8, white_level=level), lambda: read_picture(tmp_path / "a.png", 8, white_level=level)):
        refuses(read, "white_level must be", error=(ValueError, TypeError))


def test_transparent_level_of_sixteen_bits_is_white(tmp_path):
    flat = np.full((8, 8), 40 * 257, np.uint16)
    flat[:, 4:] = 0
    Image.fromarray(flat).save(tmp_path / "a.png", transparency=0)
    assert Image.open(tmp_path / "a.png").info["transparency"] == 0
    levels = read_picture(tmp_path / "a.png", 8, grey=True)
    assert (levels[..., :4] == 40).all() and (levels[..., 4:] == 255).all()
    Image.fromarray((flat // 257).astype(np.uint8)).save(tmp_path / "b.png", transparency=0)
    assert read_picture(tmp_path / "b.png", 8, grey=True).equal(levels)  # as of eight bits


def test_other_endings_are_counted(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for name in ("b.jfif", "c.JPE", "d.apng"):
        Image.fromarray(picture()).save(tmp_path / name, format="PNG" if name == "d.apng" else "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderDataset(tmp_path, 8).files == ["a.png", "b.jfif", "c.JPE", "d.apng"]
    for name in ("e.avif", "f.AVIF", "g.heic", "picture", ".hidden", "notes.txt", "labels.csv"):
        (tmp_path / name).write_bytes(b"")
    assert list_pictures(tmp_path)[2] == Counter({".avif": 2, ".heic": 1, "no ending": 1})
    for unreadable in ("refuse", "trust"):
        with pytest.warns(UserWarning, match=r"left out 4 files in .* with other endings: .avif 2, .heic 1, no ending 1; read are .png"):
            assert len(FolderDataset(tmp_path, 8, unreadable=unreadable)) == 4


def test_every_ending_but_that_of_a_text_is_counted(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    strange = ["b.npy", "c.NPZ", "d.png.gz", "e.j2k", "f.jpg~", "g.png.part", "h.zip", "i.\x07png"]
    for name in (*strange, "j.txt", "k.jsonl", "README.md", "Thumbs.db", "l.xml", "m.caption"):
        (tmp_path / name).write_bytes(b"")
    told = r": .\\x07png 1, .gz 1, .j2k 1, .jpg~ 1, .npy 1, .npz 1, .part 1, .zip 1; read are"
    with pytest.warns(UserWarning, match="left out 8 files in .*" + told):
        assert len(FolderDataset(tmp_path, 8)) == 1
    for i in range(12):
        (tmp_path / f"x.{i:02}").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out 20 files in .*, \.\.\.; read are"):
        FolderDataset(tmp_path, 8)


def test_animations_count_with_their_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "b.tif", "c.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if name == "c.webp" else {}))
    data = FolderDataset(tmp_path, 8)
    assert all(data.read(i).float().mean((1, 2)).tolist() == [200, 0, 0] for i in range(3))


# ---- one walk, one decoding -------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Count the walks through folders, and how often each picture is decoded."""
    found = Counter()
    walk, load = os.walk, ImageFile.ImageFile.load

    def decode(file):
        found["decoded"] += bool(file.tile)  # what is left to decode
        return load(file)

    monkeypatch.setattr(os, "walk", lambda *args, **options: found.update(["walks"]) or walk(*args, **options))
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    return found


def captions_beside(root):
    """Write a caption beside each picture."""
    for file in root.rglob("*.png"):
        file.with_suffix(".txt").write_text("a red cat")


ONCE = {
    "in memory": lambda root: load_dataset("folder", root=root, image_size=8, in_memory=True).images(),
    "images": lambda root: load_images("folder", root=root, image_size=8),
    "class": lambda root: FolderDataset(root, 8).images(),
    "loaded": lambda root: FolderDataset(root, 8).loaded().images(),
    "captions": lambda root: captions_beside(root) or scale_levels(texts._take(texts.CaptionedFolder(root, 8))[0], 256),
}


@pytest.mark.parametrize("way", ONCE)
def test_a_folder_is_walked_and_decoded_once(way, tmp_path, counted):
    fill(tmp_path, [f"{'ab'[i % 2]}/{i}.png" for i in range(6)])
    got = ONCE[way](tmp_path)
    assert counted == {"walks": 1, "decoded": 6}
    assert got.equal(torch.stack([image for image, _ in FolderDataset(tmp_path, 8)]))


def test_a_part_is_read_alone_and_the_folder_walked_once(tmp_path, counted):
    fill(tmp_path, ["train/a/1.png", "train/a/2.png", "test/a/3.png"])
    (tmp_path / "train/a/away.png").symlink_to("../../test/a/3.png")  # out of the part, if not of the folder
    (tmp_path / "train/a/0.heic").write_bytes(b"a picture perhaps")
    (tmp_path / "test/a/1.avif").write_bytes(b"one of another part")
    with pytest.warns(UserWarning, match="left out 1 file") as told:
        data = load_dataset("folder", root=tmp_path, image_size=8, unreadable="skip", in_memory=True)
    assert counted == {"walks": 1, "decoded": 2} and len(data) == 2
    words = " ".join(str(warning.message) for warning in told)
    assert "left out 1 file" in words and ".heic 1" in words and ".avif" not in words and "'a/away.png' (a link that leads out" in words


def test_pictures_that_were_left_out_do_not_shift_the_others(tmp_path, counted):
    fill(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])
    expected = torch.stack([FolderDataset(tmp_path, 8).read(i) for i in range(3)])
    damage(tmp_path)
    counted.clear()
    with pytest.warns(UserWarning, match="left out 4 of 7"):
        data = FolderDataset(tmp_path, 8, unreadable="skip").loaded()
    assert data.levels.equal(expected) and data.labels.tolist() == [0, 0, 1] and counted["walks"] == 1


def test_what_is_read_one_by_one_or_too_large_is_not_kept(tmp_path, counted, monkeypatch):
    fill(tmp_path, ["0.png", "1.png"])
    data = FolderDataset(tmp_path, 8)
    assert data._kept is not None and pickle.loads(pickle.dumps(data))._kept is None
    data.read(0)
    assert data._kept is None and data.images().equal(FolderDataset(tmp_path, 8).images())
    few = replace(pictures.list_folder(tmp_path), most_bytes=2 * 3 * 64 - 1)
    assert FolderDataset(few, 8)._kept is None and FolderDataset(few, 8, grey=True)._kept is not None
    counted.clear()
    load_dataset("folder", root=few, image_size=8, in_memory=True)  # which is asked for, however large
    assert counted == {"decoded": 2}


def test_a_slice_is_no_unreadable_picture(tmp_path):
    fill(tmp_path, ["0.png", "1.png"])
    data = FolderDataset(tmp_path, 8)
    assert data.read(np.int64(1)).equal(data.read(torch.tensor(1))) and len(list(data)) == 2
    refuses(lambda: data[0:2], "'slice' object cannot be interpreted as an integer", error=TypeError)


def test_two_sets_in_memory_share_no_bytes(tmp_path):
    fill(tmp_path, ["0.png"])
    data = FolderDataset(tmp_path, 8)
    data.loaded().levels.zero_()
    assert data.loaded().levels.any()


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_size": 8, "root": None}, ValueError, "root must be an existing folder of pictures; got None"),
        ({"image_size": 8, "root": "no/such"}, ValueError, "root must be an existing folder of pictures; got 'no/such'"),
        ({}, TypeError, "image_size must be a whole number, such as 32, for a folder; got None"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1; got 0"),
        ({"image_size": 8, "unreadable": "no"}, ValueError, "unreadable must be one of 'refuse', 'skip'"),
        ({"image_size": 8}, ValueError, "holds no picture that can be read, with one of the endings .png"),
        ({"image_size": 8, "gray": True}, TypeError, "gray"),
    ],
)
def test_bad_folders(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    refuses(lambda: load_dataset(**({"name": "folder", "root": "."} | arguments)), message, error=error)


# ---- streams ----------------------------------------------------------------------------------------------------------


def test_an_unreadable_file_is_named_by_a_worker(tmp_path):
    fill(tmp_path, ["0.png", "1.png"])
    (tmp_path / "1.png").write_bytes(b"damaged")
    stream = train_batches(FolderDataset(tmp_path, 8, unreadable="trust"), 2, n_workers=1)
    with pytest.raises(RuntimeError, match=r"cannot read '1.png' in "):
        next(stream)
    (tmp_path / "0.png").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"cannot read '0.png' in "):  # the first item, before the first step
        train_batches(FolderDataset(tmp_path, 8, unreadable="trust"), 2)


def test_workers_send_bytes(tmp_path, monkeypatch):
    fill(tmp_path, [f"{i}.png" for i in range(4)])
    data, sent = FolderDataset(tmp_path, 8), []
    scale = sys.modules["ddpm_nb.data"].scale_levels
    monkeypatch.setattr("ddpm_nb.data.scale_levels", lambda levels, n: sent.append(levels.dtype) or scale(levels, n))
    next(train_batches(data, 4))
    assert sent == [torch.uint8]  # once for the batch, after it has arrived
