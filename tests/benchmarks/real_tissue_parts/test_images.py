"""Collections of tissue images: both layouts, splits by case, and faulty folders named."""

import shutil
from collections import defaultdict

import pytest
from PIL import Image


@pytest.fixture
def images(benchmark_modules):
    return benchmark_modules("real_tissue_parts.images")


@pytest.fixture
def names(benchmark_modules):
    return list(benchmark_modules("real_tissue_parts.words").COLON)


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def test_both_layouts_hold_the_same_images(images, names, published, subset):
    ours, theirs = (images.read_collection(folder, names) for folder in (published, subset()))
    assert ours.edge == theirs.edge == 128 and len(ours.images) == len(theirs.images) == 48
    assert sorted((one.label, one.case) for one in ours.images) == sorted(
        (one.label, one.case) for one in theirs.images
    )
    assert {one.label for one in ours.images} == {
        "normal", "polyp", "low-grade intraepithelial neoplasia", "adenocarcinoma",
    }  # fmt: skip


def test_digits_alone_are_the_case(images):
    assert {images.case_of(name, "a") for name in ("GT2012118-1-400-001", "GTXC2012118-2-400-003")} == {"2012118"}
    with pytest.raises(ValueError, match=r"slide.png: no case number at the start of '-1'.*GT2001837-1-400-002"):
        images.case_of("-1", "slide.png")


def test_splits_are_disjoint_by_case_and_hold_every_class(images, names, published):
    collection = images.read_collection(published, names)
    splits = images.assign_splits(collection.images, 0)
    assert splits == images.assign_splits(collection.images, 0)
    classes = defaultdict(set)
    for one in collection.images:
        classes[splits[one.case]].add(one.label)
    assert {split: len(found) for split, found in classes.items()} == {"train": 4, "val": 4, "test": 4}
    another = images.assign_splits(collection.images, 1)
    test = {case for case, split in splits.items() if split == "test"}
    assert test == {case for case, split in another.items() if split == "test"}  # whatever the seed
    assert another != splits  # validation cases follow it


def test_a_split_that_the_table_names_is_the_test_set(images, names, subset):
    collection = images.read_collection(subset(), names)
    splits = images.assign_splits(collection.images, 0)
    assert {case for case, split in splits.items() if split == "test"} == {"200000", "200100", "200200", "200300"}


def test_a_case_on_two_sides_is_named_whatever_its_prefix(images, names, subset):
    def change(rows):
        row = next(row for row in rows if row["case"] == "GTxc200001")
        row["split"] = "test"
        return rows

    with pytest.raises(ValueError, match=r"labels.csv: the cases 200001 are on both sides.*move its images to one"):
        images.read_collection(subset(change), names)


def test_a_class_with_too_few_cases_is_named(images, names, subset):
    def change(rows):
        return [row for row in rows if row["class"] != "polyp" or row["case"].endswith(("00", "01"))]

    collection = images.read_collection(subset(change), names)
    with pytest.raises(ValueError, match=r"class 'polyp': 2 cases are too few.*0 for train \(at least 2\).*add cases"):
        images.assign_splits(collection.images, 0)


def test_missing_masks_and_labels_are_named(images, names, copy, tmp_path):
    (copy / "Polyp" / "label" / "GT200101-1-400-000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"Polyp/label: no mask of GT200101-1-400-000.png; expected one"):
        images.read_collection(copy, names)
    shutil.rmtree(copy / "Polyp" / "label")
    with pytest.raises(FileNotFoundError, match=r"Polyp/label: no such folder, and .*image is there"):
        images.read_collection(copy, names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: neither labels.csv nor folders <Class>/image"):
        images.read_collection(tmp_path / "empty", names)


def test_a_row_without_its_file_or_class_is_named(images, names, subset):
    folder = subset()
    missing = folder / "masks" / "Polyp__GT200101-1-400-000.png"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=r"Polyp__GT200101-1-400-000.png: missing, though .*labels.csv"):
        images.read_collection(folder, names)
    (folder / "labels.csv").write_text("image,mask,case\na,b,GT1\n")
    with pytest.raises(ValueError, match=r"labels.csv.*no class; expected the columns image, mask, class, case"):
        images.read_collection(folder, names)


def test_images_of_several_sizes_are_named(images, names, copy):
    path = copy / "Normal" / "image" / "GT200001-1-400-000.png"
    Image.new("RGB", (160, 160)).save(path)
    with pytest.raises(ValueError, match=r"label/GT200001-1-400-000.png: 128 x 128 px, its image .* 160 x 160"):
        images.read_collection(copy, names)
    Image.new("L", (160, 160)).save(copy / "Normal" / "label" / path.name)
    with pytest.raises(ValueError, match=r"several sizes: .*GT200001-1-400-000.png \(160 x 160 px\).*crop them to one"):
        images.read_collection(copy, names)


def test_an_unknown_class_and_a_file_that_is_no_image_are_named(images, names, copy):
    (copy / "Normal").rename(copy / "Ganglion")
    with pytest.raises(ValueError, match=r"Ganglion: the class 'Ganglion' is unknown; expected normal, polyp"):
        images.read_collection(copy, names)
    (copy / "Ganglion").rename(copy / "Normal")
    (copy / "Normal" / "image" / "GT200001-1-400-000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"GT200001-1-400-000.png: not an image that Pillow reads"):
        images.read_collection(copy, names)
