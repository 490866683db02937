"""Chapter 30: shapes and their measuring rule, folders with captions, pieces of words, training in three stages."""

import csv
import json
import os
import warnings

import pytest
import torch
from PIL import Image

from conftest import refuses
from ddpm_nb.captions import BEGIN, PADDING, UNKNOWN, Tokenizer, check_prompts
from ddpm_nb.gaussian import seeded
from ddpm_nb.plots import to_pixels
from ddpm_nb.texts import (
    KINDS,
    PALETTE,
    CaptionedFolder,
    PieceTokenizer,
    all_scenes,
    count_tokens,
    cut_word,
    describe_scenes,
    draw_shapes,
    fit_pieces,
    learn_merges,
    merge_pair,
    read_metadata,
    read_shapes,
    score_shapes,
    shape_cover,
    split_scenes,
    turn_round,
)


@pytest.fixture(scope="module")
def shapes():
    """Draw some pictures once."""
    return draw_shapes(300, generator=seeded(3))


# Shapes


def test_pictures_show_what_their_captions_and_masks_say(shapes):
    assert shapes.captions == describe_scenes(shapes.scenes)
    assert len({*shapes.captions}) > 200 and shapes.images.abs().max() <= 1
    colours = torch.tensor(list(PALETTE.values()))[shapes.scenes[:, [0, 3]]]
    drawn = 2 * torch.einsum("nshw,nsc->nchw", shapes.masks, colours) - 1
    assert (drawn - shapes.images).abs().max() < 1e-5
    assert shapes.masks.prod(1).max() == 0  # nothing overlaps
    border = torch.cat([shapes.masks[..., 0, :], shapes.masks[..., -1, :], shapes.masks[..., 0], shapes.masks[..., -1]], -1)
    assert border.max() < 0.3  # and nothing but the point of a triangle touches the border
    areas = shapes.masks.sum((2, 3))
    assert areas.min() > 58 and areas.max() < 87
    dx, dy = (shapes.centres[:, 1] - shapes.centres[:, 0]).T
    for r, along, across in ((0, dx, dy), (1, -dx, dy), (2, dy, dx), (3, -dy, dx)):
        chosen = shapes.scenes[:, 2] == r
        assert chosen.sum() > 40 and (along[chosen] > 5).all()
        assert (across[chosen].abs() <= 0.4 * along[chosen] + 1e-4).all()
    steps = torch.arange(32) + 0.5
    x = (shapes.masks.sum(2) * steps).sum(-1) / areas
    y = (shapes.masks.sum(3) * steps).sum(-1) / areas
    assert (torch.stack([x, y], -1) - shapes.centres).abs().max() < 0.2


def test_the_rule_is_right_on_drawings_and_tells_each_fault_apart(shapes):
    assert score_shapes(shapes.images, shapes.scenes).all(1).double().mean() >= 0.99
    assert score_shapes(shapes.images, turn_round(shapes.scenes)).all(1).double().mean() >= 0.99
    large = draw_shapes(60, image_size=64, generator=seeded(5))
    assert score_shapes(large.images, large.scenes).all(1).double().mean() >= 0.99
    wrong_kind, wrong_relation, wrong_colour = (shapes.scenes.clone() for _ in range(3))
    wrong_kind[:, 4] = (wrong_kind[:, 4] + 1) % 3
    wrong_relation[:, 2] ^= 1
    free = [[c for c in range(6) if c not in (a, b)] for a, b in shapes.scenes[:, [0, 3]].tolist()]
    wrong_colour[:, 0] = torch.tensor([c[0] for c in free])
    right = [score_shapes(shapes.images, rows).double().mean(0) for rows in (wrong_kind, wrong_relation, wrong_colour)]
    assert right[0][0] == 1 and right[0][1] < 0.01 and right[0][2] == 1
    assert right[1][0] == 1 and right[1][1] > 0.99 and right[1][2] == 0
    assert right[2].max() == 0
    exchanged = shapes.scenes[:, [3, 1, 2, 0, 4]]  # the colours only: "red square, blue circle" becomes "blue square, red circle"
    right = score_shapes(shapes.images, exchanged).double().mean(0)
    same_kind = (shapes.scenes[:, 1] == shapes.scenes[:, 4]).double().mean()
    assert right[0] == 1 and abs(right[1] - same_kind) < 0.02 and right[2] == 0


def test_a_third_colour_or_a_missing_one_is_a_wrong_picture(shapes):
    areas, kinds, centres = read_shapes(shapes.images)
    assert areas.shape == kinds.shape == (300, 6) and centres.shape == (300, 6, 2)
    assert (areas >= 20).sum(1).eq(2).all()
    third = shapes.images[:1].clone()
    spare = next(c for c in range(6) if c not in shapes.scenes[0, [0, 3]].tolist())
    spot = torch.tensor(list(PALETTE.values())[spare])[:, None, None] * 2 - 1
    bare = shapes.masks[0].amax(0) == 0
    third[0, :, :5] = torch.where(bare[:5], spot, third[0, :, :5])
    assert not score_shapes(third, shapes.scenes[:1])[0, 0]
    assert not score_shapes(torch.full((1, 3, 32, 32), -1.0), shapes.scenes[:1]).any()


def test_every_scene_occurs_once_and_none_is_on_both_sides():
    seen, out = split_scenes(seed=1)
    assert len(all_scenes()) == 540 == len(seen) + len(out)
    assert {*describe_scenes(torch.cat([seen, out]))} == {*describe_scenes(all_scenes())}
    assert len(split_scenes(0.5)[1]) == 270 and not split_scenes()[1].equal(out)
    only = draw_shapes(50, scenes=out[:2], generator=seeded(0))
    assert {*only.captions} <= {*describe_scenes(out[:2]), *describe_scenes(turn_round(out[:2]))} and len({*only.captions}) == 4


def test_areas_of_drawn_shapes_are_as_asked():
    areas = torch.tensor([50.0, 90.0, 200.0])
    for kind in range(len(KINDS)):
        cover = shape_cover(torch.full((3,), kind), torch.full((3, 2), 16.3), areas)
        assert (cover.sum((1, 2)) / areas - 1).abs().max() < 0.03


def test_what_is_no_scene_is_refused(shapes):
    refuses(lambda: describe_scenes(shapes.scenes.float()), "scenes must be whole numbers")
    refuses(lambda: describe_scenes([[0] * 5]), "shape (N, 5); got list")
    refuses(lambda: describe_scenes(torch.tensor([[6, 0, 0, 1, 0]])), "first colour in 0..5; got values from 6")
    refuses(lambda: describe_scenes(torch.tensor([[1, 0, 4, 0, 0]])), "relation in 0..3")
    refuses(lambda: describe_scenes(torch.tensor([[1, 0, 0, 1, 0]])), "two different colours")
    refuses(lambda: draw_shapes(0), "n must be at least 1")
    refuses(lambda: draw_shapes(1, image_size=8), "image_size must be at least 16")
    refuses(lambda: score_shapes(shapes.images, shapes.scenes[:3]), "a row for each of 300; got 3")
    refuses(lambda: read_shapes(torch.zeros(1, 1, 32, 32)), "(B, 3, 32, 32)")


# Folders


def write_pictures(folder, shapes, n):
    """Write n pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(to_pixels(shapes.images[:n])):
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
def test_all_forms_give_the_same_set(form, shapes, tmp_path):
    root = tmp_path / "set"
    write_pictures(root / "deep", shapes, 3)
    rows = [(f"deep/{i}.png", shapes.captions[i]) for i in (2, 0, 1)] + [("deep/1.png", "another, with a comma")]
    if form == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f, "text": t}) for f, t in rows) + "\n\n")
    elif form == "csv":
        with open(root / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("file_name", "text", "extra"), *((f, t, "x") for f, t in rows)])
    else:
        for name, text in rows:
            with open(root / f"{name[:-4]}.txt", "a") as file:
                file.write(f"  {text} \n\n")
    data = CaptionedFolder(root, 32)
    assert data.files == ["deep/0.png", "deep/1.png", "deep/2.png"] and data.problems == {}
    assert data.captions == [(shapes.captions[0],), (shapes.captions[1], "another, with a comma"), (shapes.captions[2],)]
    assert (data.images() - shapes.images[:3]).abs().max() < 0.01 and len(data) == 3
    assert CaptionedFolder(root, 16, grey=True)[0][0].shape == (1, 16, 16)


def test_every_misfit_is_counted_and_named_before_any_work(shapes, tmp_path):
    root = tmp_path / "set"
    write_pictures(root, shapes, 6)
    (root / "5.png").write_bytes(b"nothing")
    outside = tmp_path / "outside.png"
    Image.fromarray(to_pixels(shapes.images[:1])[0]).save(outside)
    os.symlink(outside, root / "link.png")
    names = ["0.png", "./1.png", "../outside.png", str(outside), "7.png", "3.png", "5.png", "link.png"]
    lines = [json.dumps({"file_name": name, "text": "!" if name == "3.png" else "words"}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join([*lines, "[]", '{"file_name": 4, "text": "a"}', '{"file_name": "2.png"}', "no"]))
    refuses(
        lambda: CaptionedFolder(root, 32),
        f"2 paths that lead out of the folder: ../outside.png, {outside}",
        "1 captions without a picture: 7.png",
        "1 empty captions: 3.png",
        "4 lines without texts for 'file_name' and 'text': line 9, line 10, line 11, line 12",
        "3 pictures without a caption: 2.png, 3.png, 4.png",
        "2 pictures that cannot be read: link.png (a link that leads out of the folder), 5.png (UnidentifiedImageError",
        "problems='skip'",
    )
    with pytest.warns(UserWarning, match="left out: in .* 2 paths") as told:
        data = CaptionedFolder(root, 32, problems="skip")
    assert data.files == ["0.png", "1.png"] and len(told) == 1 and len(data.problems) == 6
    refuses(lambda: CaptionedFolder(root, 32, problems="ignore"), "problems must be one of 'refuse', 'skip'")
    (root / "metadata.jsonl").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses(lambda: CaptionedFolder(root, 32, problems="skip"), "holds no picture with a caption")


def test_other_columns_and_broken_files_of_captions(shapes, tmp_path):
    root = tmp_path / "set"
    write_pictures(root, shapes, 1)
    refuses(lambda: CaptionedFolder(root, 32), "holds no captions: metadata.jsonl, metadata.csv, or a .txt")
    refuses(lambda: CaptionedFolder(root / "none", 32), "root must be an existing folder")
    refuses(lambda: CaptionedFolder(None, 32), "root must be an existing folder")
    (root / "metadata.csv").write_text("file,text\n0.png,a\n")
    refuses(lambda: CaptionedFolder(root, 32), "must have the columns 'file_name' and 'text'; it lacks file_name")
    (root / "metadata.csv").write_text("file_name,caption\n0.png,a dog\n0.png\n")
    refuses(lambda: CaptionedFolder(root, 32, column="caption"), "1 lines without texts for 'file_name' and 'caption': line 3")
    (root / "metadata.csv").write_text("file_name,caption\n0.png,a dog\n")
    assert CaptionedFolder(root, 32, column="caption").captions == [("a dog",)]
    (root / "metadata.csv").write_bytes(b"file_name,text\n0.png,\xff\xfe\n")
    refuses(lambda: CaptionedFolder(root, 32), "must be text in UTF-8")
    (root / "metadata.jsonl").write_text("")
    refuses(lambda: CaptionedFolder(root, 32), "must hold one file of captions; got metadata.jsonl and metadata.csv")


def test_texts_without_a_picture_and_empty_ones_are_named(shapes, tmp_path):
    root = tmp_path / "set"
    write_pictures(root, shapes, 2)
    for name, text in (("0", "a dog"), ("1", " \n"), ("2", "a cat"), (".hidden", "x")):
        (root / f"{name}.txt").write_text(text)
    refuses(lambda: CaptionedFolder(root, 32), "1 captions without a picture: 2.txt", "1 empty captions: 1.png")
    pairs, problems = read_metadata(root.resolve(), ["0.png", "1.png"])
    assert pairs == [("0.png", "a dog")] and len(problems) == 2


# Pieces of words


def test_merges_are_those_of_a_count_by_hand():
    # "ab" 3 times, "abc" 2: pairs (start, a) 5, (a, b) 5, (b, c) 2; equal counts are taken in the order of the letters
    assert learn_merges({"ab": 3, "abc": 2}, 9) == [("a", "b"), ("▁", "ab"), ("▁ab", "c")]
    assert learn_merges({"ab": 3, "abc": 2}, 9, min_count=3) == [("a", "b"), ("▁", "ab")]
    assert learn_merges({"ab": 3, "abc": 2}, 1) == [("a", "b")]
    assert merge_pair(["a", "b", "a", "b", "c"], ("a", "b")) == ["ab", "ab", "c"]
    assert cut_word("abb", {("a", "b"): 0, ("▁", "ab"): 1}) == ["▁ab", "b"]
    assert cut_word("abb", {("a", "b"): 1, ("b", "b"): 0}) == ["▁", "a", "bb"]  # the earlier merge first


def test_unknown_words_are_encoded_where_their_pieces_are_known():
    captions = ["a dog", "a dog runs", "two dogs", "the cat runs", "a cat"]
    tokenizer = fit_pieces(captions)
    assert {"a", "dog", "cat", "runs"} <= {*tokenizer.words} and "two" not in tokenizer.words
    tokens = tokenizer.encode([*captions, ""])
    assert tokens.shape == (6, tokenizer.length) and tokens.dtype == torch.int64
    assert (tokens[:, 0] == BEGIN).all() and not (tokens == UNKNOWN).any() and tokens[5, 1:].eq(PADDING).all()
    assert tokens.max() < len(tokenizer) and {*tokens.unique().tolist()} >= {*range(3, len(tokenizer))}  # all pieces are used
    assert tokenizer.decode(tokens) == [*captions, ""]
    assert tokenizer.unknown_words("two cats") == [] and tokenizer.unknown_words("a Dog, x zoo x") == ["x", "zoo", "x"]
    refuses(lambda: check_prompts("a dgo", tokenizer), "unknown words: 'dgo' (nearest: dog")
    assert check_prompts("cats", tokenizer) == ["cats"]
    assert tokenizer.encode(["zoo"])[0, 1:3].tolist().count(UNKNOWN) >= 1


def test_length_and_kept_form():
    tokenizer = fit_pieces(["a b c d", "a b c d"])
    assert tokenizer.length == 5 and count_tokens(tokenizer, ["a", "a b c d a"]) == [2, 6]
    refuses(lambda: tokenizer.encode(["a b c d a"]), "at most 4 pieces of words; got 5 in 'a b c d a'")
    refuses(lambda: tokenizer.encode("a"), "captions must be a list of texts", error=TypeError)
    refuses(lambda: fit_pieces(["!", ""]), "at least one word; got none")
    refuses(lambda: fit_pieces(["a"], 1), "length must be at least 2")
    assert fit_pieces(["a " * 100] * 2).length == 77 and fit_pieces(["a"], 9).length == 9
    kept = json.loads(json.dumps(tokenizer.to_dict()))
    assert PieceTokenizer.from_dict(kept) == tokenizer == Tokenizer.from_dict(kept)
    assert isinstance(Tokenizer.from_dict({"words": ["a"], "length": 3}), Tokenizer)
