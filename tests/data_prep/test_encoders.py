"""Patch encoders: the descriptor against SciPy and scikit-image, networks against their own libraries."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage import data
from skimage.color import rgb2hed

from data_prep import encoders
from data_prep.encoders import StainTexture, load_encoder

ENCODE = StainTexture()
GOLDEN = Path(__file__).parents[1] / "golden" / "stain_texture.npz"


def _patches(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Cut-outs of a real stained section (scikit-image's), so that stains and textures are those of tissue."""
    image = np.tile(data.immunohistochemistry(), (2, 2, 1))
    corners = np.random.default_rng(seed).integers(0, image.shape[0] - size, (number, 2))
    return np.stack([image[y : y + size, x : x + size] for y, x in corners])


def test_descriptor_rows_depend_on_their_patch_alone():
    patches = _patches(70, 64)  # more than one chunk
    together = ENCODE(patches)
    assert together.shape == (70, ENCODE.dim) and together.dtype == np.float32
    np.testing.assert_array_equal(together, ENCODE(patches))
    np.testing.assert_array_equal(together, np.concatenate([ENCODE(patches[i : i + 1]) for i in range(70)]))
    np.testing.assert_array_equal(together[::-1], ENCODE(patches[::-1]))
    assert len(np.unique(together, axis=0)) == 70


@pytest.mark.parametrize("size", [33, 64, 256])
def test_descriptor_gives_the_features_of_records_of_0_1_0(size):
    with np.load(GOLDEN) as kept:
        expected = kept[f"of_{size}_px"]
    np.testing.assert_allclose(ENCODE(_patches(5, size)), expected, rtol=2**-11, atol=2e-6)  # as float16 keeps them


@pytest.mark.parametrize("size", [32, 33, 50, 64, 224, 512])
def test_descriptor_takes_any_patch_size_and_freak_patches(size):
    patches = np.stack([np.full((size, size, 3), value, np.uint8) for value in (0, 1, 255)] + list(_patches(1, size)))
    rows = ENCODE(patches)
    assert np.isfinite(rows).all() and np.abs(rows).max() <= 5
    assert np.isfinite(rows.astype(np.float16)).all()


@pytest.mark.parametrize("turn", [lambda p: np.rot90(p, 1, (1, 2)), lambda p: p[:, ::-1], lambda p: p[:, :, ::-1]])
def test_descriptor_does_not_care_how_the_slide_lay(turn):
    patches = _patches(8, 64)
    np.testing.assert_allclose(ENCODE(turn(patches)), ENCODE(patches), atol=2e-3)


def test_texture_is_robust_to_stain_strength_and_stain_values_follow_it():
    patches = _patches(32, 64)
    stronger = np.round(255 * (patches / 255.0) ** 1.25).astype(np.uint8)  # 25 % more of every stain
    change = np.abs(ENCODE(stronger) - ENCODE(patches)).mean(0)
    assert change[:21].mean() > 3 * change[23:].mean()
    assert (ENCODE(stronger) - ENCODE(patches))[:, :6].mean() > 0.1


def test_descriptor_refuses_what_it_cannot_describe():
    for shape, dtype in (((1, 16, 16, 3), np.uint8), ((1, 64, 64, 3), np.float32), ((64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            ENCODE(np.zeros(shape, dtype))
    assert ENCODE(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, ENCODE.dim)


def test_stains_are_those_of_scikit_image():
    patches = np.maximum(_patches(3, 64), 1)
    stains = np.maximum(encoders._DENSITY[patches] @ encoders._separation(), 0)
    np.testing.assert_allclose(stains, rgb2hed(patches) * -np.log(1e-6), atol=1e-5)


def test_statistics_against_scipy():
    image = (
        ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 40)), 1.5) * 40
    )  # large: the floors drop out
    found = encoders._statistics(image[None].astype(np.float32))
    found = dict(zip(encoders._SCALE_STATISTICS, (float(value[0]) for value in found), strict=True))
    centre = image[1:-1, 1:-1]
    gradient = np.stack(np.gradient(image))[:, 1:-1, 1:-1]
    laplacian = ndimage.laplace(image)[1:-1, 1:-1]
    mixed = np.gradient(np.gradient(image, axis=0), axis=1)[1:-1, 1:-1]
    across = ndimage.convolve1d(image, [1, -2, 1], axis=1)[1:-1, 1:-1]
    down = ndimage.convolve1d(image, [1, -2, 1], axis=0)[1:-1, 1:-1]
    eigenvalues = np.linalg.eigvalsh(np.moveaxis(np.array([[across, mixed], [mixed, down]]), (0, 1), (-2, -1)))
    size = np.sqrt((laplacian**2).mean())
    expected = {
        "variance": np.log(centre.var() + 1e-3),
        "skewness": stats.skew(centre.ravel()),
        "kurtosis": np.log(stats.kurtosis(centre.ravel(), fisher=False) + 0.1),
        "gradient": np.log((gradient**2).sum(0).mean() + 1e-3),
        "laplacian skewness": (laplacian**3).mean() / size**3,
        "laplacian kurtosis": np.log((laplacian**4).mean() / size**4 + 0.1),
        "dark blobs": 2 * np.sqrt((np.minimum(eigenvalues[..., 1], 0) ** 2).mean()) / size,
        "light blobs": 2 * np.sqrt((np.maximum(eigenvalues[..., 0], 0) ** 2).mean()) / size,
        "peaks": np.sqrt(((ndimage.minimum_filter(laplacian, 3) == laplacian) & (laplacian < -size / 2)).mean()),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-2), name
    tensor = np.array([[(a * b).mean() for a in gradient] for b in gradient])
    low, high = np.linalg.eigvalsh(tensor)
    assert found["anisotropy"] == pytest.approx((high - low) / (high + low), rel=1e-2)


def test_patterns_against_a_slow_loop():
    images = np.random.default_rng(1).integers(0, 6, (3, 12, 12)).astype(np.float32)
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for image, found in zip(images, encoders._patterns(images), strict=True):
        counts = np.zeros(10)
        for y in range(1, 11):
            for x in range(1, 11):
                bits = [image[y + dy, x + dx] >= image[y, x] for dy, dx in ring]
                changes = sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True))
                counts[sum(bits) if changes <= 2 else 9] += 1
        np.testing.assert_allclose(found**2 * 100, counts, atol=1e-4)


@pytest.mark.slow
def test_descriptor_tells_the_tissues_of_the_cohort_apart(tmp_path):
    """One-vs-rest AUC of patches on held-out slides, by a linear classifier on the features as they come."""
    import openslide
    from skimage.draw import polygon2mask
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from data_prep.synthetic import generate

    cohort = generate(tmp_path, slides=24, seed=5, workers=2, progress=False, size=1024)
    rows = {"train": ([], []), "test": ([], [])}
    for number, file in enumerate(sorted(cohort.glob("*.tiff"))):
        slide = openslide.OpenSlide(file)
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        features, labels = rows["test" if number % 3 == 0 else "train"]
        for area in json.loads((cohort / "outlines" / f"{file.stem}.geojson").read_text())["features"]:
            shape = area["geometry"]["coordinates"]
            for rings in shape if area["geometry"]["type"] == "MultiPolygon" else [shape]:
                mask = polygon2mask(image.shape[:2], np.array(rings[0])[:, ::-1])
                cells = mask[: mask.shape[0] // 64 * 64, : mask.shape[1] // 64 * 64]
                cells = cells.reshape(mask.shape[0] // 64, 64, -1, 64).mean((1, 3))
                for y, x in np.argwhere(cells > 0.8) * 64:
                    features.append(image[y : y + 64, x : x + 64])
                    labels.append(area["properties"]["classification"]["name"])
    (train, train_labels), (test, test_labels) = ((ENCODE(np.stack(f)), np.array(n)) for f, n in rows.values())
    model = LogisticRegression(C=0.1, max_iter=300).fit(train, train_labels)
    scores = model.predict_proba(test)
    areas = [roc_auc_score(test_labels == name, scores[:, i]) for i, name in enumerate(model.classes_)]
    assert len(areas) == 10 and np.mean(areas) >= 0.95 and min(areas) >= 0.85


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet50", ValueError, "expected stain_texture, an encoder that `pathflip encoders` lists, timm:NAME"),
        ("phikom", ValueError, "did you mean phikon?"),
        ("timm:", ValueError, "unknown encoder"),
        ("hf:/no/such/model", FileNotFoundError, "download the model"),
        ("timm:hf-hub:MahmoodLab/UNI2-h", ValueError, "pass `--encoder uni_v2` instead"),
        ("timm:hf_hub:paige-ai/Virchow", ValueError, "virchow is registered, with its own transform and pooling"),
        ("hf:models/midnight", ValueError, "pass `--encoder midnight12k` instead"),
    ],
)
def test_names_that_are_no_encoder(name, error, message):
    with pytest.raises(error, match=message):
        load_encoder(name)


def test_core_needs_no_torch():
    code = "import sys, data_prep.build; sys.exit(bool({'torch', 'tensorflow', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    """Random models as `save_pretrained` writes them: ViT without and Dinov2 with a pooler that means something."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vit = transformers.ViTModel(transformers.ViTConfig(intermediate_size=32, **small), add_pooling_layer=False)
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**small))
    for name, model in (("vit", vit), ("dino", dino)):
        model.save_pretrained(folder / name)
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
        processor |= {"image_mean": [0.7, 0.6, 0.7], "image_std": [0.2, 0.3, 0.2], "resample": 3}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("name", ["vit", "dino"])
def test_hugging_face_model_gives_its_own_features(hf_folders, name):
    import torch
    import transformers
    from PIL import Image

    encode = load_encoder(f"hf:{hf_folders / name}")
    patches = _patches(70, 48)
    found = encode(patches)
    assert (encode.name, encode.dim, found.shape, found.dtype) == (f"hf:{name}", 24, (70, 24), np.float32)
    resized = [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in patches]
    pixels = (np.stack(resized) / 255 - [0.7, 0.6, 0.7]) / [0.2, 0.3, 0.2]
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    model = transformers.AutoModel.from_pretrained(hf_folders / name).eval()
    with torch.inference_mode():
        expected = model(pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(encode(patches[5:6]), found[5:6], atol=1e-5)
    half = load_encoder(f"hf:{hf_folders / name}", half=True)(patches)
    assert 0 < np.abs(half - found).max() < 0.1


def test_workers_take_a_gpu_each(monkeypatch):
    torch = pytest.importorskip("torch")
    from data_prep import torch_encoders
    from pathflip_jax.runtime import workers

    assert torch_encoders.best_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    found = []
    for number in range(5):
        monkeypatch.setattr(workers, "_number", number)
        found.append(torch_encoders.best_device().index)
    assert found == [0, 1, 2, 0, 1]


def test_hugging_face_folder_that_lacks_weights_is_refused(hf_folders, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(hf_folders / "dino", tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights lack .* tensors"):
        load_encoder(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not a vision model"):
        load_encoder(f"hf:{folder}")


def test_timm_model_gives_its_own_features(tmp_path):
    torch = pytest.importorskip("torch")
    try:
        import timm
        from timm.models import save_for_hf
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported here: {error}")
    from PIL import Image

    shape = {"img_size": 32, "embed_dim": 48, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape).eval()
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    save_for_hf(model, tmp_path / "tiny", model_args=shape)
    encode = load_encoder(f"timm:{tmp_path / 'tiny'}")
    patches = _patches(5, 64)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        expected = model(torch.stack([transform(Image.fromarray(patch)) for patch in patches]))
    np.testing.assert_allclose(encode(patches), expected, atol=1e-5)
    assert (encode.name, encode.dim) == ("timm:tiny", 48)
    with pytest.raises(ValueError, match="timm cannot load it"):
        load_encoder("timm:no_such_model")


def test_missing_extra_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "data_prep.torch_encoders", None)
    monkeypatch.delattr("data_prep.torch_encoders", raising=False)
    with pytest.raises(ImportError, match=r"pathflip-jax\[encoders\]"):
        load_encoder(f"hf:{tmp_path}")


def test_registered_encoders_are_loaded_by_any_of_their_names(small_encoder):
    recipe, weights = small_encoder
    assert encoders.runs_on_device("UNI2-h") and not encoders.runs_on_device("timm:uni")
    assert not encoders.runs_on_device("stain_texture")
    found = load_encoder("Small", weights=weights, batch_size=2)
    assert (found.name, found.dim, found.recipe) == ("small", 32, recipe)
    with pytest.raises(ValueError, match="pass `--encoder small --weights"):
        load_encoder(f"hf:{weights}")
