"""The table of published encoders: sizes against published totals, names in other tools, transforms."""

import math
import re

import pytest

from pathflip_jax.convert.vision import abstract_parameters, how_to_get
from pathflip_jax.convert.vision_names import names_of
from pathflip_jax.vision.config import swiglu_hidden
from pathflip_jax.vision.recipes import OTHER_NAMES, RECIPES, find_recipe, registry_name, spelled

# Totals of the original classes, and the numbers among them that no feature depends on: the mask token of DINOv2 and
# DINOv3 in transformers and in Meta's code (None: not counted in the total).
PUBLISHED = {
    "uni_v1": (303_350_784, 0),
    "uni_v2": (681_394_176, 0),
    "conch_v1": (87_567_104, 0),
    "conch_v15": (306_109_184, 0),
    "virchow": (631_229_184, 0),
    "virchow2": (631_239_424, 0),
    "gigapath": (1_134_953_984, 0),
    "hoptimus0": (1_134_774_272, 0),
    "hoptimus1": (1_134_774_272, 0),
    "h0_mini": (85_739_520, 0),
    "gpfm": (303_227_904, 0),
    "kaiko_vits16": (21_665_664, 0),
    "kaiko_vits8": (21_670_272, 0),
    "kaiko_vitb16": (85_798_656, 0),
    "kaiko_vitb8": (85_807_872, 0),
    "kaiko_vitl14": (304_370_688, 0),
    "lunit_vits8": (21_670_272, 0),
    "phikon": (85_798_656, 0),
    "phikon_v2": (303_351_808, 1024),
    "hibou_b": (85_741_056, 768),
    "hibou_l": (303_659_264, 1024),
    "midnight12k": (1_134_771_200, 1536),
    "openmidnight": (1_134_777_344, 1536),
    "keep": (303_350_784, -(1024 * 768 + 768 + 768 * 768 + 768)),  # the published total is of the trunk
    "plip": (87_849_216, 0),
    "dinov3_vits16": (21_596_544, 384),
    "dinov3_vitb16": (85_660_416, 768),
    "dinov3_vitl16": (303_129_600, 1024),
    "dinov3_vith16plus": (840_592_640, 1280),
}
MILLIONS = {"dinov2_vits14": 22.06, "dinov2_vitb14": 86.58, "dinov2_vitl14": 304.37, "dinov2_vitg14": 1136.48}
WIDTHS = {
    "uni_v1": 1024, "uni_v2": 1536, "conch_v1": 512, "conch_v15": 768, "virchow": 2560, "virchow2": 2560,
    "gigapath": 1536, "hoptimus0": 1536, "hoptimus1": 1536, "h0_mini": 768, "gpfm": 1024, "kaiko_vits16": 384,
    "kaiko_vits8": 384, "kaiko_vitb16": 768, "kaiko_vitb8": 768, "kaiko_vitl14": 1024, "lunit_vits8": 384,
    "phikon": 768, "phikon_v2": 1024, "hibou_b": 768, "hibou_l": 1024, "midnight12k": 3072, "openmidnight": 1536,
    "keep": 768, "plip": 512, "dinov2_vits14": 384, "dinov2_vitb14": 768, "dinov2_vitl14": 1024, "dinov2_vitg14": 1536,
    "dinov3_vits16": 384, "dinov3_vitb16": 768, "dinov3_vitl16": 1024, "dinov3_vith16plus": 1280,
}  # fmt: skip
SPELLINGS = {
    "uni_v1": ("uni_v1", "uni", "UNI", "MahmoodLab/UNI", "mahmood-uni"),
    "uni_v2": ("uni_v2", "UNI2", "uni2", "UNI2-h", "MahmoodLab/UNI2-h"),
    "conch_v1": ("conch_v1", "CONCH", "mahmood-conch", "MahmoodLab/CONCH"),
    "conch_v15": ("conch_v1_5", "conch_v15", "conch1_5", "CONCHv1.5", "MahmoodLab/conchv1_5"),
    "virchow": ("virchow", "Virchow", "paige-ai/Virchow"),
    "virchow2": ("virchow2", "Virchow2", "paige-ai/Virchow2"),
    "gigapath": ("gigapath", "prov-gigapath", "Prov-GigaPath", "prov-gigapath/prov-gigapath"),
    "hoptimus0": ("hoptimus0", "H-optimus-0", "h_optimus_0", "bioptimus/H-optimus-0"),
    "hoptimus1": ("hoptimus1", "H-optimus-1", "h_optimus_1", "bioptimus/H-optimus-1"),
    "h0_mini": ("h0-mini", "H0-mini", "h0_mini", "bioptimus/H0-mini"),
    "gpfm": ("gpfm", "GPFM", "majiabo/GPFM"),
    "kaiko_vits16": ("kaiko-vits16", "kaiko_vits16"),
    "kaiko_vits8": ("kaiko-vits8", "kaiko-vit-s8"),
    "kaiko_vitb16": ("kaiko-vitb16", "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms"),
    "kaiko_vitb8": ("kaiko-vitb8", "kaiko_vitb8"),
    "kaiko_vitl14": ("kaiko-vitl14", "kaiko_vitl14"),
    "lunit_vits8": ("lunit-vits8", "lunit_vits8", "lunit"),
    "phikon": ("phikon", "owkin/phikon"),
    "phikon_v2": ("phikon_v2", "phikonv2", "phikon-v2", "owkin/phikon-v2"),
    "hibou_b": ("hibou_b", "hibou-b", "histai/hibou-b"),
    "hibou_l": ("hibou_l", "hibou-L", "hibou", "histai/hibou-L"),
    "midnight12k": ("midnight12k", "midnight", "kaiko-ai/midnight"),
    "openmidnight": ("openmidnight", "OpenMidnight", "SophontAI/OpenMidnight"),
    "keep": ("keep", "KEEP", "Astaxanthin/KEEP"),
    "plip": ("plip", "PLIP", "vinid/plip"),
    "dinov2_vits14": ("dinov2_vits14", "facebook/dinov2-small", "dinov2-small"),
    "dinov2_vitb14": ("dinov2_vitb14", "facebook/dinov2-base"),
    "dinov2_vitl14": ("dinov2_vitl14", "facebook/dinov2-large"),
    "dinov2_vitg14": ("dinov2_vitg14", "facebook/dinov2-giant"),
    "dinov3_vits16": ("dinov3_vits16", "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "dinov3_vitb16": ("dinov3-vitb16", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "dinov3_vitl16": ("dinov3-vitl16", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    "dinov3_vith16plus": ("dinov3-vith16plus", "facebook/dinov3-vith16plus-pretrain-lvd1689m"),
}


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


def test_parameters_are_those_of_the_publication(recipe):
    shapes = abstract_parameters(recipe.network)
    found = sum(math.prod(shape.shape) for shape in shapes.values())
    if recipe.layout == "dinov3":  # has no biases of keys, which are zeros here
        found -= recipe.network.depth * recipe.network.width
    assert found == recipe.parameters
    if recipe.name in MILLIONS:  # in transformers, with a mask token
        assert round((found + recipe.network.width) / 1e6, 2) == MILLIONS[recipe.name]
    else:
        total, unused = PUBLISHED[recipe.name]
        assert found == total - unused


def test_the_lists_of_this_file_are_of_all_encoders():
    assert PUBLISHED.keys() | MILLIONS.keys() == WIDTHS.keys() == SPELLINGS.keys() == RECIPES.keys()
    assert OTHER_NAMES.keys() <= RECIPES.keys()


def test_features_are_as_wide_as_published(recipe):
    assert recipe.width == WIDTHS[recipe.name]


@pytest.mark.parametrize(("name", "spelling"), [(name, other) for name, many in SPELLINGS.items() for other in many])
def test_an_encoder_is_found_by_its_names_elsewhere(name, spelling):
    assert find_recipe(spelling) is RECIPES[name] and registry_name(spelling) == name


@pytest.mark.parametrize("name", ["", "stain-texture", "resnet50", "uni3", "virchow3", "MahmoodLab", "ctranspath"])
def test_others_are_not_found(name):
    assert find_recipe(name) is None and registry_name(name) == name


def test_no_two_encoders_share_a_spelling():
    owners = {}
    for recipe in RECIPES.values():
        own = (recipe.name, recipe.repository, recipe.repository.split("/")[1], *OTHER_NAMES.get(recipe.name, ()))
        for spelling in set(map(spelled, own)):
            assert spelling and owners.setdefault(spelling, recipe.name) == recipe.name


def test_every_parameter_has_a_source_and_no_other(recipe):
    sources = names_of(recipe.layout, recipe.network).sources
    paths = [source.path for source in sources]
    assert len(paths) == len(set(paths)) and set(paths) == set(abstract_parameters(recipe.network))


def test_image_and_patches_fit_the_network(recipe):
    network, transform = recipe.network, recipe.transform
    assert transform.crop == network.image and network.image % network.patch == 0
    assert transform.crop <= transform.resize <= 2 * transform.crop
    assert network.width % network.heads == 0 and network.width // network.heads in (64, 80)
    assert recipe.patch_size >= network.image and recipe.mpp == 0.5
    assert network.prefix_positions in (0, 1, network.prefix)
    assert all(0.4 < mean < 0.8 and 0.1 < std <= 0.5 for mean, std in zip(transform.mean, transform.std, strict=True))
    published = network.head_width or network.width * (2 if network.pooling == "class_and_mean" else 1)
    assert recipe.width == published


def test_weights_licence_and_source_are_told(recipe):
    assert re.fullmatch(r"[\w-]+/[\w.-]+", recipe.repository) and recipe.files and recipe.licence and recipe.source
    assert all(file.endswith((".bin", ".safetensors", ".pth", ".pt")) for file in recipe.files)
    told = how_to_get(recipe)
    assert f"hf download {recipe.repository} {recipe.files[0]} --local-dir {recipe.name}" in told
    assert ("hf auth login" in told) == recipe.gated


@pytest.mark.parametrize(
    ("names", "transform"),
    [
        (("uni_v1", "uni_v2", "phikon", "phikon_v2", "openmidnight"), ("bilinear", 224, 0.485)),
        (("virchow", "virchow2", "gpfm", "keep"), ("bicubic", 224, 0.485)),
        (("gigapath", "dinov2_vits14", "dinov2_vitg14"), ("bicubic", 256, 0.485)),
        (("hoptimus0", "hoptimus1", "h0_mini"), ("bicubic", 224, 0.707223)),
        (("hibou_b", "hibou_l"), ("bicubic", 224, 0.7068)),
        (("kaiko_vits8", "kaiko_vitl14", "midnight12k"), ("bilinear", 224, 0.5)),
        (("conch_v1",), ("bicubic", 448, 0.48145466)),
        (("conch_v15",), ("bilinear", 448, 0.485)),
        (("plip",), ("bicubic", 224, 0.48145466)),
        (("lunit_vits8",), ("bicubic", 224, 0.70322989)),
    ],
)
def test_transforms_are_those_of_the_cards(names, transform):
    for name in names:
        found = RECIPES[name].transform
        assert (found.kind, found.resize, found.mean[0]) == transform


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_is_as_wide_as_in_dinov2(width, hidden):
    assert swiglu_hidden(width) == hidden
