"""What an object says of itself: a line or a few, with what tells it from others, and never a page of modules."""

import re

import pytest
import torch
from PIL import Image
from torch import nn

from ddpm_nb import (
    ClassUNet,
    FolderDataset,
    ImageDataset,
    NoiseSchedule,
    TextToImage,
    TrainConfig,
    TrainResult,
    bits_per_dim,
    fit,
    load_dataset,
    load_pretrained,
    make_schedule,
    make_unet,
)
from ddpm_nb.hub import NoisePredictor


def small(kind=None):
    with torch.device("meta"):
        return make_unet("digits") if kind is None else kind(4, 8, 1, 16, (1, 2), 1, norm_groups=4)


def test_networks_say_shape_size_and_place():
    unet = small()
    n = sum(p.numel() for p in unet.parameters())
    assert repr(unet) == f"UNet(1 x 8 x 8, {n:,} parameters on meta)"
    assert re.fullmatch(r"ClassUNet\(1 x 8 x 8, [\d,]+ parameters on meta, 4 classes\)", repr(small(ClassUNet)))
    assert nn.Module.__repr__(unet).count("Conv2d") > 10  # torch's list of layers is still there
    schedule = make_schedule("cosine", 20)
    assert repr(schedule) == "NoiseSchedule(n_steps=20, betas=0.00799..0.999)"
    assert len(repr(NoisePredictor(unet, schedule, "v")).splitlines()) == 4


def test_data_sets_say_what_they_hold(tmp_path):
    for name in ("a cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "0.png")
    assert repr(load_dataset("digits")) == "ImageDataset(1500 images 1 x 8 x 8, 17 levels, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"
    data = FolderDataset(tmp_path, 8)
    assert repr(data) == f"FolderDataset(2 images 3 x 8 x 8, 256 levels, 2 classes: a cat, dog, in {str(tmp_path.resolve())!r})"
    assert "1 x 8 x 8" in repr(FolderDataset(tmp_path / "dog", 8, grey=True)) and "classes" not in repr(FolderDataset(tmp_path / "dog", 8))
    many = ImageDataset(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), n_levels=2, classes=map(str, range(99)))
    assert repr(many).endswith("99 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)")


def test_results_say_how_it_went():
    model, schedule = load_pretrained("digits")
    data = load_dataset("digits")
    result = fit(model, schedule, data, TrainConfig(3, batch_size=2), progress=False)
    loss = result.losses.mean()
    assert repr(result) == f"TrainResult(3 iterations in {result.seconds:.0f} s, loss {loss:.4f} at the end, ema={result.ema!r})"
    assert ", 2 skipped," in repr(TrainResult(model, result.losses, 1.0, 2)) and len(repr(result)) < 200
    short = NoiseSchedule(torch.tensor([0.1, 0.2]))
    bits = bits_per_dim(lambda x, t: x, short, data.images()[:2], n_levels=17)
    assert repr(bits) == f"BitsPerDim({bits.mean:.4f} +- {bits.stderr:.4f} over 2 images)"


@pytest.mark.parametrize(("name", "drawn"), [("digits", "pictures 1 x 8 x 8,"), ("mnist", "pictures 1 x 28 x 28 from latents 4 x 8 x 8,")])
def test_pipelines_say_what_they_draw(name, drawn):
    pipeline = TextToImage.from_pretrained(name)
    told = repr(pipeline)
    assert drawn in told and f"{len(pipeline.tokenizer)} words, T = {pipeline.schedule.n_steps})" in told and "\n" not in told
    parts = (pipeline.text_encoder, pipeline.unet, pipeline.autoencoder)
    n = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    assert f" {n:,} parameters on cpu" in told
