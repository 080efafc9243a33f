"""Classes of a set: what folders and `dataset.json` tell is right, or refused in words that say what to do."""

import json
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from neon.data.images import ImageDataset
from neon.data.labels import FolderClasses
from neon.errors import RequestError


def images(root: Path, *names: str) -> Path:
    """A set of tiny images with these names; one that ends with a slash is an empty folder."""
    for name in names:
        file = root / name
        if name.endswith("/"):
            file.mkdir(parents=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(file)
    return root


def zipped(folder: Path, top: str = "") -> Path:
    """The zip of a folder, with its folders as entries, everything below `top`."""
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, top + path.relative_to(folder).as_posix())
    return file


def labels(path: Path) -> list[int] | None:
    found = ImageDataset(path).labels
    return None if found is None else found.tolist()


def label(folder: Path, content: object) -> None:
    """Write `content`, text or what becomes JSON, as the labels of a set."""
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps({"labels": content}))


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("3/a.png", "7/a.png"), [3, 7]),
        (("0/a.png", "1/a.png", "10/a.png", "11/a.png", "2/a.png"), [0, 1, 10, 11, 2]),
        (("007/a.png", "3/a.png", "5/"), [7, 3]),
        (("set/ant/a.png", "set/bee/a.png", "set/bee/b.png"), [0, 1, 1]),
        (("train/3/a.png", "train/7/a.png"), [3, 7]),
        (("7/a.png", "7/b.png"), [7, 7]),
        (("all/a.png", "all/b.png"), None),
        (("ant/a.png", "bee/a.png", ".hidden/a.png", "__MACOSX/ant/._a.png", "__MACOSX/ant/a.png"), [0, 1]),
        (("train/a.png", "cup/a.png"), [0, 1]),
        (("3/a.png", "7/a.png", "7/b.png/"), [3, 7]),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_folders_tell_classes(tmp_path: Path, names: tuple[str, ...], classes: list[int] | None, as_zip: bool) -> None:
    folder = images(tmp_path / "set", *names)
    assert labels(zipped(folder) if as_zip else folder) == classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant/a.png", "bee/", "cat/a.png"), "folder bee holds none"),
        (("set/ant/a.png", "set/bee/a.png", "set/cat/"), "folder set/cat holds none"),
        (
            ("train/ant/a.png", "val/ant/b.png"),
            "train/ant/a.png lies in a folder of train; if that is a part of the set, name it instead",
        ),
        (("train/a.png", "val/b.png"), "train and val are parts of a set"),
        (("ant/a.png", "b.png"), "b.png lies beside folders"),
        (("0/a.png", "1/a.png", "rest/a.png"), "folder 0 is named by a class number, rest is not"),
        (("7/a.png", "07/a.png"), "not of one class each"),
        (("-1/a.png", "0/a.png"), "not of one class each"),
        (("20231105/a.png", "20231106/a.png"), "not of one class each"),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_folders_that_tell_no_classes_are_refused_when_classes_are_asked_for(
    tmp_path: Path, names: tuple[str, ...], message: str, as_zip: bool
) -> None:
    folder = images(tmp_path / "set", *names)
    dataset = ImageDataset(zipped(folder) if as_zip else folder)
    with pytest.raises(RequestError, match=f"{dataset.path}: no classes, since .*{message}.*; expected one folder"):
        _ = dataset.labels
    assert len(dataset.examples(range(len(dataset)))) == sum(not name.endswith("/") for name in names)


def test_the_classes_of_folders_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = ImageDataset(images(tmp_path / "set", *(f"{name}/a.png" for name in "abcdefg")))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        dataset.load([0])
    assert (
        capsys.readouterr().err.count(f"{dataset.path}: 7 classes by folder: 0 = a, 1 = b, 2 = c, 3 = d, ..., 6 = g")
        == 1
    )
    assert str(FolderClasses([], {3: "3", 7: "7"})) == "2 classes of the numbers that folders have: 3, 7"


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", "ant/a.png")
    images(tmp_path / "elsewhere", "b.png", "c.png")
    (folder / "bee").symlink_to(tmp_path / "elsewhere")
    (folder / "ant" / "d.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "elsewhere" / "again").symlink_to(folder)
    assert ImageDataset(folder).names == ["ant/a.png", "ant/d.png", "bee/b.png", "bee/c.png"]
    (folder / "bee" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(RequestError, match=r"bee/dead\.png cannot be read"):
        ImageDataset(folder)


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("x/a.png", "y/b.png")])
@pytest.mark.parametrize("top", ["", "set/", "./", "a/b/"])
def test_labels_beside_the_images_are_used_wherever_the_set_lies(
    tmp_path: Path, names: tuple[str, str], top: str
) -> None:
    folder = images(tmp_path / "set", *names)
    label(folder, [[name, 5 + i] for i, name in enumerate(names)])
    assert labels(zipped(folder, top)) == [5, 6]


def test_two_sets_in_one_folder_are_refused_for_training(tmp_path: Path) -> None:
    for name in ("one", "two"):
        label(images(tmp_path / "set" / name, "a.png"), [["a.png", 1]])
    with pytest.raises(RequestError, match=r"holds 2 sets, with one/dataset\.json and two/dataset\.json"):
        labels(tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ([["a.png", 3], ["b.png", 0]], [3, 0]),
        ([["a.png", 3.0], ["b.png", 0.0]], [3, 0]),
        ([["./a.png", 3], [".\\b.png", 0]], [3, 0]),
        ("\ufeff" + '{"labels": [["a.png", 3], ["b.png", 0]]}', [3, 0]),
        ('{"labels": null}', None),
    ],
)
def test_labels_are_read(tmp_path: Path, content: object, classes: list[int] | None) -> None:
    folder = images(tmp_path / "set", "a.png", "b.png")
    label(folder, content)
    assert labels(folder) == classes


def test_windows_names_are_read_in_labels_and_zips(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", "x/a.png", "y/b.png")
    label(folder, [["x\\a.png", 2], ["y\\b.png", 4]])
    assert labels(folder) == [2, 4]
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for name in ("3\\a.png", "7\\a.png"):
            archive.write(folder / "x" / "a.png", name)
    assert labels(tmp_path / "windows.zip") == [3, 7]


def entry(value: str) -> str:
    return f'{{"labels": [["a.png", {value}], ["b.png", 0]]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((entry(value), "label of a.png is .*expected a class number, 0 to 1048575") for value in (
            "0.7", "true", "null", '"3"', "[0, 1]", "NaN", "Infinity", "-Infinity", "1e400", "1e300", "-1",
            "9223372036854775808", "1048576", "9" * 400, "{}",
        )),
        ("[" * 100_000, "nested too deeply"),
        ('{"labels": ' + '{"a":' * 100_000, "nested too deeply"),
        ('{"labels": [["a.png", 1], ["a.png", 1], ["b.png", 1]]}', "names a.png twice"),
        ('{"labels": [["a.png", 1]]}', "no label for 1 of 2 images, the first is b.png"),
        ('{"labels": []}', "no label for 2"),
        ('{"labels": {"a.png": 1}}', "its labels are"),
        ('{"labels": [["a.png", 1, 2]]}', "among its labels is"),
        ('{"labels": ["ab"]}', "among its labels is"),
        ('{"labels": [[3, 1]]}', "among its labels is"),
        ('[["a.png", 1]]', "no entry"),
        ("null", "no entry"),
        ("", "Expecting value"),
        ("\udcff", "decode"),
        ("9" * 5000, "digit"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = images(tmp_path / "set", "a.png", "b.png")
    (folder / "dataset.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match=rf"set: dataset\.json .*{message}"):
        _ = ImageDataset(folder).labels


def test_labels_of_images_that_are_not_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "set", "a.png")
    label(folder, [["a.png", 1], ["b.png", 2]])
    assert labels(folder) == [1]
    assert "dataset.json has 2 labels, but 1 images are there" in capsys.readouterr().err


def test_a_list_of_labels_is_not_read_if_it_is_too_large(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", "a.png")
    label(folder, [])
    os.truncate(folder / "dataset.json", 1 << 30)
    with pytest.raises(RequestError, match=r"dataset\.json cannot be read \(1073741824 bytes"):
        labels(folder)
