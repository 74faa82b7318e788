"""Photographs and caption files as people have them: look-alikes give the same pixels, every caption goes to its image."""

import json
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import Image

from dyrate.data import Example
from study.examples import examples

RAMP = np.linspace(0, 1, 48).reshape(6, 8)  # a grey ramp, not square, so that a turn shows


def pixels(path):
    """What a model is shown of a file."""
    return np.asarray(Example("x", "caption", "", ("",), path).image()).astype(int)


@pytest.fixture
def grey(tmp_path):
    """The ramp in 8 bit, and its pixels."""
    Image.fromarray((RAMP * 255).round().astype(np.uint8)).save(tmp_path / "grey.png")
    return pixels(tmp_path / "grey.png")


@pytest.mark.parametrize(("name", "values"), [
    ("deep.png", (RAMP * 65535).round().astype(np.uint16)), ("long.tif", (RAMP * 65535).round().astype(np.int32)),
    ("short.tif", (RAMP * 255).round().astype(np.int32)), ("float.tif", RAMP.astype(np.float32)),
    ("wide.tif", (RAMP * 255).astype(np.float32)),
])  # fmt: skip
def test_deep_grey_looks_as_in_eight_bit(grey, tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    assert np.abs(pixels(tmp_path / name) - grey).max() <= 1


@pytest.mark.parametrize(("orientation", "turned"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)])
def test_a_turned_camera_gives_an_upright_picture(grey, tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.open(tmp_path / "grey.png").transpose(turned)
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "as_stored.png")
    assert (pixels(tmp_path / "turned.png") == grey).all()
    assert pixels(tmp_path / "as_stored.png").shape != grey.shape or (pixels(tmp_path / "as_stored.png") != grey).any()


def test_what_is_transparent_is_white_whatever_lies_below(tmp_path):
    for name, hidden in (("red", (255, 0, 0, 0)), ("blue", (0, 0, 255, 0))):
        picture = Image.new("RGBA", (4, 4), hidden)
        picture.putpixel((1, 1), (0, 128, 0, 255))
        picture.save(tmp_path / f"{name}.png")
    red, blue = pixels(tmp_path / "red.png"), pixels(tmp_path / "blue.png")
    assert (red == blue).all() and (red[0, 0] == 255).all() and red[1, 1].tolist() == [0, 128, 0]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 0, 128, 0])
    palette.putpixel((1, 1), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (pixels(tmp_path / "palette.png") == red).all()


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"p{i}.jpg")
    return tmp_path


def captions(folder, **arguments):
    """Captions by image, and the problems."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = examples(folder, **arguments)
    return {e.name: e.references for e in found}, found.problems


PLAIN = "image,caption\np0.jpg,zero\np1.jpg,one\np2.jpg,two\n"
ALL = {"p0.jpg": ("zero",), "p1.jpg": ("one",), "p2.jpg": ("two",)}


@pytest.mark.parametrize(("name", "content"), [
    ("README.txt", "These are photographs.\nHe said \"take them\", and so on.\n"), ("LICENSE.txt", '"As is", without "warranty'),
    ("Flickr_8k.trainImages.txt", "p0.jpg\np1.jpg\n"), ("._captions.txt", "image,caption\np0.jpg,\0\0"),
    ("instances.json", '{"images": [{"id": 1, "file_name": "p0.jpg"}], "annotations": [{"image_id": 1, "bbox": [0]}]}'),
    ("dataset.json", "[1, 2]"), ("notes.txt", "Caf\xe9"),
])  # fmt: skip
def test_other_files_beside_the_captions_do_no_harm(folder, name, content):
    (folder / name).write_text(content, encoding="latin-1")
    (folder / "captions.txt").write_text(PLAIN)
    assert captions(folder) == (ALL, [])


def test_two_caption_files_are_refused(folder):
    (folder / "captions.txt").write_text(PLAIN)
    (folder / "captions.csv").write_text(PLAIN)
    with pytest.raises(ValueError, match=r"captions.csv and .*captions.txt all hold captions: leave one"):
        examples(folder)


@pytest.mark.parametrize(("name", "content", "found", "problem"), [
    ("bom.csv", "\ufeff" + PLAIN, ALL, None),
    ("newline.csv", 'image,caption\np0.jpg,"zero\nand on"\np1.jpg,one\n',
     {"p0.jpg": ("zero\nand on",), "p1.jpg": ("one",)}, None),
    ("comma.csv", "image,caption\np0.jpg,zero, and more, still\n",
     {"p0.jpg": ("zero, and more, still",)}, '1 with "," in the caption'),
    ("bars.csv", 'image_name| comment_number| comment\np0.jpg| 0| say "zero\np1.jpg| 1| one\n',
     {"p0.jpg": ('say "zero',), "p1.jpg": ("one",)}, None),
    ("delimiter.csv", "image_name| comment_number| comment\np0.jpg| 4   zero runs .\np1.jpg| 1| one\n",
     {"p0.jpg": ("zero runs .",), "p1.jpg": ("one",)}, "1 without the second delimiter, mended (first: 2)"),
    ("flickr8k.token", "p0.jpg#0\tzero\np0.jpg#1\tnought\np1.jpg#0\tone\n",
     {"p0.jpg": ("zero", "nought"), "p1.jpg": ("one",)}, None),
    ("metadata.jsonl", '{"file_name": "p0.jpg", "text": "zero"}\n{"file_name": "p1.jpg", "text": ["one", "1"]}\n',
     {"p0.jpg": ("zero",), "p1.jpg": ("one", "1")}, None),
    ("empty.csv", "image,caption\np0.jpg,zero\np0.jpg,\np1.jpg,\n",
     {"p0.jpg": ("zero",)}, "2 without a caption, left out (first: 3)"),
    ("twice.csv", "image,caption\np0.jpg,zero\np0.jpg,zero\n",
     {"p0.jpg": ("zero",)}, "1 with a caption that the image has already"),
    ("null.json", '{"images": [{"id": 139, "file_name": "p0.jpg"}], "annotations": [{"image_id": "139", "caption": "zero"}, '
     '{"image_id": 139, "caption": null}]}', {"p0.jpg": ("zero",)}, "1 without a caption, left out (first: 2)"),
])  # fmt: skip
def test_captions_as_downloaded(folder, name, content, found, problem):
    (folder / name).write_text(content, encoding="utf-8")
    read, problems = captions(folder)
    assert read == found
    assert len(problems) == (problem is not None) and (problem is None or problem in problems[0])


@pytest.mark.parametrize(("name", "content", "message"), [
    ("open.csv", b'image,caption\np0.jpg,"zero\np1.jpg,one\n', r"open.csv, line \d: .*quotation marks"),
    ("latin.csv", "image,caption\np0.jpg,caf\xe9\n".encode("latin-1"), r"latin.csv, line 2: is not UTF-8.*iconv -f latin1"),
    ("cut.json", b'{"images": [', r"cut.json is not valid JSON"),
    ("lost.json", b'{"images": [{"id": 1, "file_name": "p0.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
     r"lost.json, entry 1: lacks or does not resolve '2'"),
    ("middle.csv", b"caption,image\nzero, and more,p0.jpg\n", r"middle.csv, line 2: has 3 cells for the columns"),
])  # fmt: skip
def test_damaged_captions_name_file_and_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        examples(folder)


def test_one_name_in_two_folders_is_two_pictures(folder):
    for name, colour in (("a", 10), ("b", 200)):
        (folder / name).mkdir()
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(folder / name / "same.png")
    (folder / "captions.csv").write_text("image,caption\na/same.png,dark\n./b/same.png,light\n")
    found = {e.references: pixels(e.path)[0, 0, 0] for e in examples(folder)}
    assert found == {("dark",): 10, ("light",): 200}
    (folder / "captions.csv").write_text("image,caption\nsame.png,which\n")
    with pytest.raises(ValueError, match=r"same.png could be meant for a/same.png or b/same.png"):
        examples(folder)


def test_folders_of_the_caption_file_may_be_missing_and_deeper_ones_are_found(folder):
    (folder / "images").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "images" / "deep.png")
    (folder / "captions.csv").write_text("image,caption\nval2014\\p0.jpg,flat\ndeep.png,deep\n")
    assert captions(folder)[0] == {"val2014/p0.jpg": ("flat",), "deep.png": ("deep",)}


def test_composed_and_decomposed_names_are_one(folder):
    Image.new("RGB", (4, 4)).save(folder / unicodedata.normalize("NFD", "caf\xe9.png"))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": unicodedata.normalize("NFC", "caf\xe9.png"), "text": "x"}))
    assert list(captions(folder)[0].values()) == [("x",)]
