"""Data: scaling, splits, what may be trained on, refusals, and the order of batches."""

import gc
import itertools
import multiprocessing
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from conftest import refuses
from ddpm_nb import data as module
from ddpm_nb.data import (
    DATASETS,
    ImageDataset,
    batch_order,
    check_data,
    epoch_order,
    load_dataset,
    load_images,
    mirror,
    mix_seeds,
    train_batches,
)
from ddpm_nb.pictures import FolderDataset

# ---- the digits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "Train", None])
def test_digits_of_another_split_are_refused(split):
    refuses(lambda: module.load_digits(split), "split must be one of 'train', 'test'")


def test_splits_are_disjoint_fixed_and_complete():
    from sklearn.datasets import load_digits

    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    together = torch.cat([train.levels, test.levels]).flatten(1)
    everything = torch.as_tensor(load_digits().images, dtype=torch.uint8).flatten(1)
    assert len(train) > len(test)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, everything.numpy()))
    assert load_images("digits").equal(load_images("digits")) and not train.flip


def test_labels_follow_their_images():
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), load_dataset("digits", split="test")
    known = {image.astype(np.uint8).tobytes(): target for image, target in zip(bunch.images, bunch.target, strict=True)}
    assert all(known[levels.numpy().tobytes()] == label for levels, label in zip(data.levels, data.labels.tolist(), strict=True))


def test_resizing_in_parts_is_resizing_at_once():
    data = load_dataset("digits")  # more images than one part holds
    size = {"size": (5, 5), "mode": "bilinear", "antialias": True}
    at_once = torch.nn.functional.interpolate(data.levels.float(), **size).round()
    small = load_dataset("digits", image_size=5)
    assert small.levels.dtype == torch.uint8 and small.levels.float().equal(at_once) and small.n_levels == 17


# ---- what may be trained on -------------------------------------------------------------------------------------------

X = load_images("digits")[:40]


class Pairs(torch.utils.data.Dataset):
    """Serve what a function makes of the digits."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return self.make(X[i])


class Endless(IterableDataset):
    """Serve pairs without an index."""

    def __iter__(self):
        return iter([(x, 0) for x in X])


GOOD = {
    "pairs": Pairs(lambda x: (x, 0)),
    "triples": Pairs(lambda x: [x, "seven", {"any": "thing"}]),
    "arrays": Pairs(lambda x: (x.numpy(), 0)),
    "double arrays": Pairs(lambda x: (x.numpy().astype(np.float64), 0)),
    "a list": [(x, 0) for x in X],
    "TensorDataset": TensorDataset(X, torch.zeros(40)),
    "a part": torch.utils.data.Subset(ImageDataset((X * 8 + 8).byte(), n_levels=17), range(40)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_pairs_of_every_kind_are_read(kind):
    expected = next(train_batches(X, 8, seed=1))
    got = next(train_batches(GOOD[kind], 8, seed=1))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


WANTED = r"data must be a tensor \(N, C, H, W\) or a data set of pairs \(image, label\)"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Pairs(lambda x: ((x + 1) * 127.5, 0)), r"data must be scaled to \[-1, 1\]; got values from 0 to 255"),
        (Pairs(lambda x: (x * 1.01, 0)), r"data must be scaled to \[-1, 1\]"),
        (Pairs(lambda x: (((x + 1) * 127.5).byte(), 0)), r"data must have a floating-point dtype, in \[-1, 1\]; got torch.uint8: ImageDataset"),
        (Pairs(lambda x: (((x + 1) * 127.5).byte().numpy(), 0)), "got torch.uint8"),
        (Pairs(lambda x: (x / 0, 0)), "data must be finite"),
        (Pairs(lambda x: x), WANTED + r".*data\[0\] is Tensor"),
        (list(X), WANTED + r".*data\[0\] is Tensor"),
        (TensorDataset(X), WANTED + r".*data\[0\] is tuple of Tensor"),
        (Pairs(lambda x: {"image": x, "label": 0}), WANTED + r".*data\[0\] is dict"),
        (Pairs(lambda x: (Image.new("L", (8, 8)), 0)), WANTED + r".*data\[0\] is tuple of Image, int"),
        (Pairs(lambda x: (0, x)), WANTED + r".*data\[0\] is tuple of int, Tensor"),
        (Pairs(lambda x: (x[0], 0)), r"data must have shape \(B, C, H, W\)"),
        (Pairs(lambda x: (x.permute(1, 2, 0), 0)), r"data must be images \(C, H, W\), channels first; got \(8, 8, 1\)"),
        (X.numpy(), WANTED + r".*data\[0\] is ndarray"),
        ({"train": X}, WANTED + ".*got dict"),
        ("digits", WANTED + ".*got str"),
        (DataLoader(TensorDataset(X, X)), WANTED + r".*with len\(data\) and data\[i\]; got DataLoader"),
        (Endless(), WANTED + ".*got Endless"),
        (iter(X), WANTED + ".*got "),
        ([], WANTED + ", at least one; got none"),
        ((X * 8 + 8).byte(), "data must have a floating-point dtype.*got torch.uint8"),
        (X / 0, "data must be finite"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_first_step(data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train_batches(data, 8)


def test_the_range_of_tensors_is_the_caller_s_choice():
    points = 3 * X.flatten(1)
    check_data(points)
    check_data(3 * X)  # latents have no range
    refuses(lambda: check_data(3 * X, True), "data must be scaled to [-1, 1]")
    refuses(lambda: check_data(points, True), "data must have shape (B, C, H, W)")
    refuses(lambda: train_batches(3 * X, 8, range_check=True), "data must be scaled to [-1, 1]")
    x = next(train_batches(Pairs(lambda x: (3 * x.flatten(), 0)), 8, seed=1, range_check=False))  # a data set of points
    assert x.equal(next(train_batches(points, 8, seed=1)))


BRIGHT = [(X + 1) / 2, Pairs(lambda x: ((x + 1) / 2, 0)), [((x + 1) / 2, 0) for x in X[:1]]]


@pytest.mark.parametrize("data", BRIGHT)
def test_images_without_a_value_below_zero_are_warned_of(data, recwarn):
    train_batches(data, 1)
    assert [str(warning.message) for warning in recwarn] == [
        "data must be scaled to [-1, 1], but no value is below 0: are they in [0, 1]? Then 2 * x - 1 is right"
    ]
    assert recwarn[0].filename == module.__file__ or recwarn[0].filename == __file__
    recwarn.clear()
    check_data(data, False)
    check_data([(X[0] * 0 + 0.5, 0), (X[1], 0)])  # one bright image is an accident
    check_data(torch.rand(10, 2))  # points
    check_data(ImageDataset(torch.full((1, 1, 2, 2), 16), n_levels=17))
    assert not len(recwarn)


def test_only_a_few_items_are_looked_at():
    seen = []
    check_data(Pairs(lambda x: seen.append(0) or (x, 0)))
    assert len(seen) == 8
    with pytest.warns(UserWarning, match="no value is below 0"):
        check_data(Pairs(lambda x: seen.append(0) or (x.abs(), 0)))
    assert len(seen) == 16


LATER = {  # what some item after the first is, and the words that tell it
    "levels": (lambda x: (x + 1) * 127.5, "data must be scaled to [-1, 1]; got values from -1 to 255"),
    "bytes": (lambda x: ((x + 1) * 127.5).byte(), "one shape and one dtype; data[0] is torch.float32 (1, 8, 8) and data[{}] is torch.uint8 (1, 8, 8)"),
    "another size": (lambda x: x[..., :7], "data[0] is torch.float32 (1, 8, 8) and data[{}] is torch.float32 (1, 8, 7)"),
    "more channels": (lambda x: x.expand(3, 8, 8), "and data[{}] is torch.float32 (3, 8, 8)"),
    "no number": (lambda x: x / 0, "data must be finite"),
    "no image": (lambda x: 7, "data[{}] is tuple of int, int"),
}


@pytest.mark.parametrize("place", [5, 22, 39])
@pytest.mark.parametrize("kind", LATER)
def test_later_items_are_looked_at(kind, place):
    change, words = LATER[kind]
    data = [(change(x) if i == place else x, 0) for i, x in enumerate(X)]
    refuses(lambda: train_batches(data, 8), words.format(place), error=(ValueError, TypeError))


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize("kind", ["bytes", "another size"])
def test_an_item_that_was_not_looked_at_is_named_when_its_turn_comes(kind, n_workers):
    change, _ = LATER[kind]
    told = {"bytes": "data[7] is torch.uint8 (1, 8, 8)", "another size": "data[7] is torch.float32 (1, 8, 7)"}
    stream = train_batches([(change(x) if i == 7 else x, 0) for i, x in enumerate(X)], 40, n_workers=n_workers)
    refuses(lambda: next(stream), "one shape and one dtype", told[kind])


def test_a_look_leaves_the_random_streams_alone():
    """A set that changes its images by chance gives the same batches, however often it is looked at."""

    def draw(x):
        return (x * torch.rand(()) * np.random.rand() * random.random(), 0)

    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before, data = states(), Pairs(draw)
    check_data(data)
    stream = train_batches(data, 8)
    assert states() == before
    x = next(stream)
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    assert len(x.flatten(1).abs().amax(1).unique()) == 8 and states()[1:] != before[1:]  # batches are drawn freely
    check_data(Pairs(lambda x: (x + 1e9, 0)), False)


def test_arrays_that_run_backwards_are_read():
    data = Pairs(lambda x: (x.numpy()[:, :, ::-1], 0))
    got = next(train_batches(data, 8, seed=1))
    assert got.equal(next(train_batches(X.flip(-1), 8, seed=1)))
    upside_down = Pairs(lambda x: (x.numpy()[:, ::-1].astype(np.float64), 0))
    assert next(train_batches(upside_down, 8, seed=1)).equal(next(train_batches(X.flip(-2), 8, seed=1)))


@pytest.mark.parametrize("shape", [(8, 6, 3), (4, 4, 3), (6, 8, 1), (16, 16, 4), (8, 8, 3)])
def test_channels_last_is_refused(shape):
    x = torch.linspace(-1, 1, 4 * 16 * 16).resize_(shape)
    refuses(lambda: check_data([(x, 0)] * 9), f"channels first; got {shape}")
    refuses(lambda: check_data(x.expand(2, *shape), True), f"channels first; got {shape}")


@pytest.mark.parametrize("shape", [(3, 8, 6), (4, 4, 4), (8, 4, 4), (3, 3, 3), (1, 4, 1), (2, 9, 1), (16, 1, 1), (3, 5, 4)])
def test_channels_first_pass(shape):
    check_data([(torch.linspace(-1, 1, 4 * 16 * 16).resize_(shape), 0)])


def test_mirror_turns_the_chosen_alone():
    x, chosen = torch.arange(12.0).reshape(2, 1, 2, 3), torch.tensor([True, False])
    assert mirror(x, chosen)[0].equal(x[0].flip(-1)) and mirror(x, chosen)[1].equal(x[1])


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "digit"}, ValueError, "name must be one of 'digits', 'mnist', 'fashion-mnist', 'cifar10', 'folder'; got 'digit'"),
        ({"split": "val"}, ValueError, "split must be one of 'train', 'test'; got 'val'"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1; got 0"),
        ({"image_size": 8.0}, TypeError, "image_size must be a whole number; got 8.0"),
        ({"grey": True}, TypeError, "grey: only a folder takes options; digits has none"),
        ({"unreadable": "skip", "white_level": 4095}, TypeError, "unreadable, white_level: only a folder takes options"),
        ({"name": "mnist", "in_memory": True, "root": "."}, TypeError, "in_memory: only a folder takes options; mnist has none"),
    ],
)
def test_bad_arguments(arguments, error, message):
    refuses(lambda: load_dataset(**({"name": "digits"} | arguments)), message, error=error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": torch.zeros(2, 1, 4, 4)}, "levels must be whole numbers, a tensor of shape"),
        ({"levels": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "levels must be whole numbers, a tensor of shape"),
        ({"labels": torch.zeros(3)}, "and 3 labels"),
        ({"levels": torch.full((2, 1, 4, 4), 17)}, r"levels must be in 0..16; got values from 17 to 17"),
        ({"levels": torch.full((2, 1, 4, 4), -1)}, r"levels must be in 0..16; got values from -1 to -1"),
        ({"labels": torch.tensor([0, 2])}, r"labels must be in 0..1; got values from 0 to 2"),
        ({"levels": np.zeros((2, 1, 4, 4), np.uint8)}, "levels must be whole numbers, a tensor of shape"),
        ({"n_levels": 1}, "n_levels must be at least 2; got 1"),
    ],
)
def test_bad_images(changes, message):
    good = {"levels": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0, 1]), "n_levels": 17, "classes": "ab"}
    assert len(ImageDataset(**good)) == 2
    alone = ImageDataset(good["levels"], n_levels=17)
    assert alone.labels.tolist() == [0, 0] and alone.classes == ("all",)
    with pytest.raises(ValueError, match=message):
        ImageDataset(**(good | changes))


ORDER = {"n": 26, "batch_size": 6, "n_processes": 2}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 27}, ValueError, r"batch_size must be in 1..26; got 27"),
        ({"batch_size": 0}, ValueError, r"batch_size must be in 1..26; got 0"),
        ({"batch_size": 5}, ValueError, "batch_size must be a multiple of n_processes, 2; got 5"),
        ({"rank": 2}, ValueError, r"rank must be in 0..1; got 2"),
        ({"rank": -1}, ValueError, r"rank must be in 0..1; got -1"),
        ({"n_processes": 0}, ValueError, "n_processes must be at least 1; got 0"),
        ({"start": -1}, ValueError, "start must be at least 0; got -1"),
        ({"start": 1.0}, TypeError, "start must be a whole number; got 1.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"n": 0}, ValueError, "n must be at least 1; got 0"),
    ],
)
def test_bad_orders_are_refused_before_the_first_batch(changes, error, message):
    with pytest.raises(error, match=message):
        batch_order(**(ORDER | changes))
    if "n" not in changes:
        arguments = {key: value for key, value in (ORDER | changes).items() if key != "n"}
        with pytest.raises(error, match=message):
            train_batches(torch.zeros(26, 2), **arguments)


def test_bad_streams():
    with pytest.raises(ValueError, match=r"flip mirrors images of shape \(N, C, H, W\); got \(26, 2\)"):
        train_batches(torch.zeros(26, 2), 4, flip=True)
    with pytest.raises(ValueError, match="n_workers must be at least 0; got -1"):
        train_batches(torch.zeros(26, 2), 4, n_workers=-1)
    with pytest.raises(TypeError, match="sead"):
        train_batches(torch.zeros(26, 2), 4, sead=1)
    with pytest.raises(ValueError, match="number must be at least 0; got -1"):
        mix_seeds(0, -1)


# ---- the order of batches ---------------------------------------------------------------------------------------------


def take(stream, count):
    """Return the next batches of a stream as a list."""
    return list(itertools.islice(stream, count))


def test_seeds_are_the_same_on_every_machine():
    """Values that a later version must reproduce, or old runs could not be resumed exactly."""
    assert (mix_seeds(0, 0), mix_seeds(3, 5), mix_seeds(1, 2, 3)) == (7896617691693857887, 4895867234429419378, 6498626229777268288)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**40), st.booleans()
)
def test_order_from_any_start_and_for_any_number_of_processes(n, share, n_processes, start, seed, flip):
    batch_size = share * n_processes
    if batch_size > n:
        return
    options = {"n": n, "batch_size": batch_size, "seed": seed, "flip": flip}
    whole = take(batch_order(**options), start + 8)
    later = take(batch_order(**options, start=start), 8)
    parts = [take(batch_order(**options, start=start, rank=rank, n_processes=n_processes), 8) for rank in range(n_processes)]
    for step in range(8):
        for which in (0, 1):
            assert later[step][which].equal(whole[start + step][which])
            assert torch.cat([part[step][which] for part in parts]).equal(later[step][which])
            assert all(len(part[step][which]) == share for part in parts)
    per_epoch = n // batch_size
    if per_epoch <= len(whole):
        epoch = torch.cat([indices for indices, _ in whole[:per_epoch]])
        assert len(epoch.unique()) == per_epoch * batch_size
    assert flip or not any(flips.any() for _, flips in whole)


def test_seeds_and_epochs_do_not_meet():
    seeds = {mix_seeds(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert not epoch_order(100, 1, seed=0)[0].equal(epoch_order(100, 0, seed=1)[0])


def test_flips_are_fair_coins_independent_of_the_order():
    flips = torch.stack([epoch_order(1000, epoch, seed=0, flip=True)[1] for epoch in range(100)]).float()
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / 100_000**0.5
    by_image = torch.zeros(1000)
    for epoch in range(100):
        order, flips = epoch_order(1000, epoch, seed=0, flip=True)
        by_image[order] += flips.float()
    assert by_image.min() > 20 and by_image.max() < 80  # each image is mirrored about half of the time: sd 5
    assert epoch_order(1000, 0, seed=0, flip=True)[0].equal(epoch_order(1000, 0, seed=0)[0])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Return the same 20 pictures as a lazy folder, as bytes in memory, as a tensor of floats, and as pairs."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{i:02}.png")
    held = load_dataset("folder", root=root, image_size=8, in_memory=True)
    return {"files": FolderDataset(root, 8), "bytes": held, "floats": held.images(), "other": torch.utils.data.Subset(held, range(20))}


@pytest.mark.parametrize("kind", ["files", "bytes", "floats", "other"])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_streams_hold_what_the_order_says(three, kind, n_workers):
    if n_workers and kind in ("bytes", "floats"):
        pytest.skip("in memory there are no workers")
    options = {"seed": 3, "start": 5, "flip": True, "rank": 1, "n_processes": 2}
    batches = take(train_batches(three[kind], 6, n_workers=n_workers, **options), 7)
    for x, (indices, flips) in zip(batches, batch_order(20, 6, **options), strict=False):
        originals = three["floats"][indices]
        expected = [image.flip(-1) if flip else image for image, flip in zip(originals, flips, strict=True)]
        assert x.equal(torch.stack(expected)) and x.dtype == torch.float32 and x.shape == (3, 3, 8, 8)


def test_streams_of_points(three):
    points = torch.arange(20.0).reshape(10, 2)
    stream = take(train_batches(points, 5, seed=2), 4)
    assert all(x.equal(points[i]) for x, (i, _) in zip(stream, batch_order(10, 5, seed=2), strict=False))
    assert torch.cat(stream[:2]).sort(0).values.equal(points)


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_a_dropped_stream_leaves_no_worker(three, end):
    before = set(multiprocessing.active_children())
    stream = train_batches(three["files"], 4, n_workers=2)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for _ in range(12):
        next(stream)
    assert set(multiprocessing.active_children()) - before == workers  # the same two through all epochs
    if end == "error":
        with pytest.raises(KeyError):
            stream.throw(KeyError("the training failed"))
    stream.close() if end == "close" else None
    del stream
    gc.collect()
    for worker in workers:
        worker.join(10)
    assert not set(multiprocessing.active_children()) - before and not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_streams_leave_the_global_generator_alone(three, n_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for kind in ("files", "bytes", "other"):
        take(train_batches(three[kind], 4, n_workers=n_workers, flip=True), 2)
    assert torch.get_rng_state().equal(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["files", "bytes", "floats"])
def test_streams_on_a_gpu(three, kind):
    options = {"seed": 3, "flip": True, "n_workers": 1}
    expected = take(train_batches(three[kind], 6, **options), 7)
    got = take(train_batches(three[kind], 6, device="cuda", **options), 7)
    assert all(x.is_cuda and x.cpu().equal(y) for x, y in zip(got, expected, strict=True))


def test_names():
    assert DATASETS == ("digits", "mnist", "fashion-mnist", "cifar10", "folder")


def test_a_data_set_may_have_something_called_read():
    class Noting(torch.utils.data.Dataset):
        """Note which images were asked for, under a name that `FolderDataset` uses for something else."""

        def __init__(self):
            self.data, self.read = load_dataset("digits"), []

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            self.read.append(index)
            return self.data[index]

    data = Noting()
    first = next(train_batches(data, 8, seed=1))
    assert torch.equal(first, next(train_batches(load_dataset("digits"), 8, seed=1)))
    assert len(data.read) >= 8


class Jittered(ImageDataset):
    """Change what the set of images hands out."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return 0.5 * image, label


def test_the_items_of_a_class_of_ones_own_are_asked_for():
    levels = torch.full((8, 1, 4, 4), 16)
    batches = train_batches(Jittered(levels, n_levels=17), 4, seed=0)
    assert torch.equal(next(batches), torch.full((4, 1, 4, 4), 0.5))
    check_data(Jittered(levels, n_levels=17))


@pytest.mark.parametrize("labels", [[0, 1, 1], np.array([0, 1, 1]), torch.tensor([0.0, 1.0, 1.0])])
def test_labels_may_be_a_list_or_an_array(labels):
    data = ImageDataset(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), labels, n_levels=2, classes="ab")
    assert data.labels.tolist() == [0, 1, 1] and data.labels.dtype == torch.int64


@pytest.mark.parametrize(("levels", "labels"), [([0, 1], None), (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [0.7, 0]), (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), [[0], [1]])])
def test_levels_and_labels_that_are_none_are_refused(levels, labels):
    with pytest.raises(ValueError, match="must be whole numbers"):
        ImageDataset(levels, labels, n_levels=2, classes="ab")


def test_an_item_that_is_no_image_is_named_when_its_turn_comes():
    class Holed(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return (torch.zeros(1, 4, 4), 0) if index % 19 != 4 else None

    with pytest.raises(TypeError, match=r"data\[4\] is NoneType"):
        list(itertools.islice(train_batches(Holed(), 5, seed=0), 4))


def test_processes_draw_other_augmentations():
    class Noisy(Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return 2 * torch.rand(1, 2, 2) - 1, 0

    first, second, again = (next(train_batches(Noisy(), 8, seed=0, rank=rank, n_processes=2, n_workers=1)) for rank in (0, 1, 0))
    assert not torch.equal(first, second) and torch.equal(first, again)
