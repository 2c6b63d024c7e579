import builtins

import numpy as np
import pytest
from PIL import Image

from anymask.data import load
from anymask.errors import DataError
from tests.data.conftest import write_image


def write_classes(root, *, classes=("ant", "bee"), each=2, last=7):
    for number, name in enumerate(classes):
        for index in range(each):
            write_image(root / name / f"{index}.png", colour=(number, index, last))


@pytest.mark.parametrize("parts", [["test"], ["val"], ["valid"], ["test", "val"], ["test", "validation"]])
def test_a_folder_with_test_or_val_is_read_and_test_comes_first(tmp_path, parts):
    write_classes(tmp_path / "train", each=3)
    for part in parts:
        write_classes(tmp_path / part, each=1 if part == "test" else 2, last=8 if part == "test" else 9)
    data = load("folder", dir=tmp_path)
    assert data.classes == ("ant", "bee")
    assert data.train.images.shape == (6, 3, 4, 6)
    assert data.train.images[4, :, 0, 0].tolist() == [1, 1, 7]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(data.test) == (2 if "test" in parts else 4)
    assert (data.validation is None) == (len(parts) == 1)
    assert data.validation is None or len(data.validation) == 4


def test_test_images_that_are_trained_on_are_told(tmp_path):
    write_classes(tmp_path / "train", each=3)
    write_classes(tmp_path / "test", each=2, last=8)
    write_image(tmp_path / "test" / "bee" / "double.png", colour=(0, 2, 7))
    with pytest.warns(UserWarning, match=r"1 of 5 test images in .* are training images, too"):
        load("folder", dir=tmp_path)


@pytest.mark.parametrize("train", ["train", "."])
def test_a_fifth_of_every_class_is_held_out_where_there_is_no_test(tmp_path, train):
    write_classes(tmp_path / train, each=10)
    write_image(tmp_path / train / ".hidden" / "x.png")
    (tmp_path / train / "ant" / "notes.txt").write_text("no image")
    data, again = load("folder", dir=tmp_path), load("folder", dir=tmp_path)
    assert data.train.labels.bincount().tolist() == [8, 8]
    assert data.test.labels.bincount().tolist() == [2, 2]
    assert data.test.images.tolist() == again.test.images.tolist()


@pytest.mark.parametrize(("used", "held"), [([], ", and 20% of train are held out as test images"), (["val"], "")])
def test_folders_beside_train_that_are_not_used_are_told(tmp_path, recwarn, used, held):
    for number, part in enumerate(("train", "Test", "eval", *used)):
        write_classes(tmp_path / part, each=10, last=number)
    (tmp_path / "runs" / "1").mkdir(parents=True)  # holds no class
    load("folder", dir=tmp_path)
    assert [str(warning.message).partition(";")[0] for warning in recwarn] == [f"Test, eval in {tmp_path} are not used{held}"]


def test_a_test_class_that_has_no_training_images_is_refused(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", classes=("ant", "wasp"))
    with pytest.raises(DataError, match="wasp"):
        load("folder", dir=tmp_path)


def test_a_test_folder_may_lack_a_class(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", classes=("bee",), last=8)
    assert load("folder", dir=tmp_path).test.labels.tolist() == [1, 1]


def test_two_images_that_differ_in_size_are_named_with_their_sizes_and_a_remedy(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "bee" / "9.png", size=(8, 5))
    with pytest.raises(DataError, match=r"ant/0\.png is 6 x 4 pixels and .*bee/9\.png is 8 x 5\. .*To do: resize"):
        load("folder", dir=tmp_path)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_grey_images_of_16_bits_keep_their_upper_8(tmp_path, kind):
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for index in range(2):
            grey = np.array([[255, 256 * (1 + 2 * number + index)], [40000, 65535]], dtype=np.uint16)
            Image.fromarray(grey).save(tmp_path / name / f"{index}.{kind}")
    data = load("folder", dir=tmp_path)
    channels = [channel for split in (data.train, data.test) for image in split.images.tolist() for channel in image]
    assert sorted(channels) == [[[0, which], [156, 255]] for which in (1, 2, 3, 4) for _ in range(3)]


def test_images_of_32_bits_whose_white_nobody_knows_are_refused(tmp_path):
    write_classes(tmp_path)
    Image.fromarray(np.ones((4, 6), dtype=np.float32)).save(tmp_path / "ant" / "2.tif")
    with pytest.raises(DataError, match=r"ant/2\.tif has one number of 32 bits a pixel \(mode F\).*8-bit PNG"):
        load("folder", dir=tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_classes(tmp_path)
    whole = (tmp_path / "ant" / "1.png").read_bytes()
    for blob in (b"no image", whole[:40]):
        (tmp_path / "ant" / "1.png").write_bytes(blob)
        with pytest.raises(DataError, match=r"ant/1\.png cannot be read as an image"):
            load("folder", dir=tmp_path)


def test_two_folders_of_validation_images_are_refused_and_test_images_among_them_told(tmp_path):
    for part, colour in (("train", 10), ("test", 200), ("val", 200)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            write_image(tmp_path / part / name / "0.png", colour=(colour, 0, 50 * (name == "b")))
    with pytest.warns(UserWarning, match="2 of 2 test images in .* are validation images, too"):
        load("folder", dir=tmp_path)
    (tmp_path / "valid").mkdir()
    with pytest.raises(DataError, match="has val and valid"):
        load("folder", dir=tmp_path)


@pytest.mark.parametrize("part", ["test", "val"])
def test_images_without_class_folders_are_refused(tmp_path, part):
    """As where the labels of the test images are not published."""
    write_classes(tmp_path / "train")
    write_image(tmp_path / part / "0.png")
    with pytest.raises(DataError, match=f"no class folders in .*{part}"):
        load("folder", dir=tmp_path)


@pytest.mark.parametrize(("empty", "message"), [("ant", "no images in .*ant"), (".", "no class folders in")])
def test_empty_folders_are_refused(tmp_path, empty, message):
    (tmp_path / empty).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=message):
        load("folder", dir=tmp_path)


def test_a_folder_that_is_not_given_or_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="'folder' came without a folder"):
        load("folder")
    with pytest.raises(DataError, match=r"no folder in .*gone"):
        load("folder", dir=tmp_path / "gone")


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(("n02", "n01")):
        for index in range(3):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", colour=(100 * number, 0, 0))
        write_image(root / "val" / "images" / f"val_{number}.JPEG", colour=(0, 0, 100 * number))
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn01\t0\t0\t5\t5\nval_0.JPEG\tn02\t0\t0\t5\t5\n")
    return root


def test_tiny_imagenet_is_read_in_the_order_of_wnids_and_val_is_the_test_split(tiny):
    data = load("tiny-imagenet", dir=tiny.parent)
    assert data.classes == ("n02", "n01")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.train.images[:, 0, 0, 0] > 50).tolist() == [False] * 3 + [True] * 3
    assert data.test.labels.tolist() == [1, 0]
    assert (data.test.images[:, 2, 0, 0] > 50).tolist() == [True, False]


@pytest.mark.parametrize("line", ["val_9.JPEG\tn01\t0", "val_0.JPEG\tn77\t0", "val_0.JPEG", ""])
def test_an_annotation_of_an_unknown_image_or_class_is_named(tiny, line):
    (tiny / "val" / "val_annotations.txt").write_text(f"val_1.JPEG\tn01\t0\n{line}\nval_0.JPEG\tn02\n")
    with pytest.raises(DataError, match="line 2 of"):
        load("tiny-imagenet", dir=tiny)


def test_missing_annotations_and_images_are_named(tiny):
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"no .*val_annotations\.txt"):
        load("tiny-imagenet", dir=tiny)
    for path in (tiny / "train" / "n02" / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no images in .*n02"):
        load("tiny-imagenet", dir=tiny)


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_classes(tmp_path)
    real = builtins.__import__

    def without_pillow(name, *arguments):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(DataError, match=r"pip install 'anymask\[images\]'"):
        load("folder", dir=tmp_path)
