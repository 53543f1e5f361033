"""Vocabulary of the tissue classes, and captions of mosaics in it.

As in `data_prep.phrasings`, held-out names and sentences recombine the training words, and none of them can be made
from a training list; "prompt" lists the texts for grounding and zero-shot classification. A plus marks a plural.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.phrasings import PIECES
from data_prep.reports import Names, Sentences

COLON: Names = {
    "normal": {
        "train": [
            "normal colonic mucosa",
            "unremarkable large bowel mucosa",
            "+evenly spaced straight crypts",
            "+regular crypts with many goblet cells",
            "preserved crypt architecture",
            "+round crypts of even size",
        ],
        "test": [
            "unremarkable colonic mucosa with straight crypts",
            "+evenly spaced crypts with many goblet cells",
            "normal mucosa with preserved architecture",
        ],
        "prompt": [
            "normal large bowel mucosa with regular crypts",
            "+straight crypts of even size with goblet cells",
            "unremarkable mucosa with preserved crypts",
            "+areas of regular round crypts",
        ],
    },
    "polyp": {
        "train": [
            "a non-neoplastic polyp",
            "polypoid mucosa",
            "+elongated dilated crypts without atypia",
            "hyperplastic polypoid mucosa",
            "a polyp with edematous inflamed stroma",
            "+hyperplastic glands in abundant stroma",
        ],
        "test": [
            "a hyperplastic polyp without atypia",
            "+dilated glands in edematous stroma",
            "polypoid mucosa with inflamed abundant stroma",
        ],
        "prompt": [
            "a polyp with dilated crypts",
            "non-neoplastic polypoid mucosa",
            "+hyperplastic crypts in edematous stroma",
            "+areas of inflamed polypoid mucosa",
        ],
    },
    "low-grade intraepithelial neoplasia": {
        "train": [
            "low-grade intraepithelial neoplasia",
            "low-grade dysplasia",
            "+crowded tubular glands with mild atypia",
            "mild atypia with basal elongated nuclei",
            "+tubular glands with pencillate nuclei",
            "mild stratification of nuclei with kept polarity",
        ],
        "test": [
            "low-grade dysplasia with pencillate nuclei",
            "+tubular glands with basal nuclei and mild atypia",
            "mild stratification of elongated basal nuclei",
        ],
        "prompt": [
            "low-grade neoplasia of tubular glands",
            "mild low-grade dysplasia with elongated nuclei",
            "+crowded glands with pencillate basal nuclei",
            "+areas of mild dysplasia with kept polarity",
        ],
    },
    "high-grade intraepithelial neoplasia": {
        "train": [
            "high-grade intraepithelial neoplasia",
            "high-grade dysplasia",
            "+cribriform glands with loss of polarity",
            "severe atypia with full-thickness stratification",
            "+back-to-back glands with severe atypia",
            "+complex glands with rounded nuclei and prominent nucleoli",
        ],
        "test": [
            "high-grade dysplasia with loss of polarity",
            "+cribriform back-to-back glands with prominent nucleoli",
            "severe full-thickness atypia of complex glands",
        ],
        "prompt": [
            "high-grade neoplasia with severe atypia",
            "+cribriform complex glands with severe dysplasia",
            "high-grade dysplasia of back-to-back glands",
            "+areas of severe atypia with loss of polarity",
        ],
    },
    "adenocarcinoma": {
        "train": [
            "adenocarcinoma",
            "invasive carcinoma",
            "+infiltrating irregular glands in desmoplastic stroma",
            "+malignant glands with invasion",
            "+angulated tumor glands infiltrating the wall",
            "invasive tumor with desmoplasia",
        ],
        "test": [
            "invasive adenocarcinoma with desmoplastic stroma",
            "+malignant irregular glands infiltrating the wall",
            "+angulated infiltrating tumor glands",
        ],
        "prompt": [
            "infiltrating adenocarcinoma",
            "+invasive malignant glands in desmoplastic stroma",
            "invasive carcinoma with angulated tumor glands",
            "+areas of invasion with desmoplasia",
        ],
    },
    "serrated adenoma": {
        "train": [
            "a serrated adenoma",
            "serrated neoplasia",
            "+saw-toothed crypts with eosinophilic epithelium",
            "+serrated glands with stellate lumens",
            "eosinophilic epithelium with ectopic budding crypts",
            "serrated epithelium with slit-like lumens",
        ],
        "test": [
            "a serrated adenoma with stellate lumens",
            "+saw-toothed glands with ectopic budding",
            "eosinophilic serrated epithelium with stellate lumens",
        ],
        "prompt": [
            "a serrated adenoma with saw-toothed crypts",
            "serrated epithelium with ectopic budding",
            "+saw-toothed glands with slit-like lumens",
            "+areas of eosinophilic serrated glands",
        ],
    },
}
TEXTURES: Names = {
    "tumor epithelium": {
        "train": ["tumor epithelium", "+carcinoma glands", "+atypical epithelial cells", "+nests of carcinoma cells"],
        "test": ["+nests of atypical tumor cells", "+glands of carcinoma epithelium"],
        "prompt": ["carcinoma epithelium", "+atypical tumor glands", "+carcinoma cells in nests"],
    },
    "simple stroma": {
        "train": ["simple stroma", "homogeneous stroma", "+collagen bundles", "smooth muscle"],
        "test": ["homogeneous stroma of collagen", "+bundles of smooth muscle"],
        "prompt": ["simple homogeneous stroma", "+smooth muscle bundles", "stroma of collagen bundles"],
    },
    "complex stroma": {
        "train": [
            "complex stroma", "stroma with single tumor cells", "+scattered immune cells in stroma",
            "+single tumor cells among immune cells",
        ],
        "test": ["complex stroma with scattered tumor cells", "+single immune cells in complex stroma"],
        "prompt": ["complex stroma with immune cells", "+scattered tumor cells in stroma", "+single cells in stroma"],
    },
    "lymphoid tissue": {
        "train": ["lymphoid tissue", "+lymphoid follicles", "dense lymphocytic infiltrate", "+sheets of lymphocytes"],
        "test": ["+dense sheets of lymphocytes", "lymphoid infiltrate with follicles"],
        "prompt": ["dense lymphoid tissue", "+follicles of lymphocytes", "lymphocytic sheets"],
    },
    "debris": {
        "train": ["debris", "necrosis", "hemorrhage with mucus", "necrotic debris"],
        "test": ["necrosis with mucus", "debris with hemorrhage"],
        "prompt": ["necrotic debris with hemorrhage", "mucus with necrosis", "+areas of debris"],
    },
    "mucosal glands": {
        "train": ["+mucosal glands", "normal mucosa", "+regular crypts", "+normal colonic glands"],
        "test": ["+regular glands of normal mucosa", "colonic mucosa with crypts"],
        "prompt": ["normal colonic mucosa", "+regular mucosal crypts", "+normal glands of the mucosa"],
    },
    "adipose tissue": {
        "train": ["adipose tissue", "mature fat", "+adipocytes", "+lobules of fat"],
        "test": ["mature adipose lobules", "fat with adipocytes"],
        "prompt": ["mature adipose tissue", "+adipocytes of fat", "+lobules of adipocytes"],
    },
}  # fmt: skip
DIAGNOSIS = {
    "train": ["The main finding is {label}.", "Final diagnosis: {label}.", "Most of the tissue shows {label}."],
    "test": ["The final diagnosis is {label}.", "The main finding of the tissue is {label}."],
}
REMARKS = {
    "train": [
        "The specimen consists of {pieces} of tissue.",
        "Received in formalin is biopsy material measuring {cm} cm.",
        "The patient is {age} years old.",
        "The biopsy was taken at endoscopy of a patient of {age} years.",
        "Clinical correlation is recommended.",
        "The deep margin cannot be assessed.",
    ],
    "test": [
        "The specimen received in formalin consists of {pieces}.",
        "The biopsy material measures {cm} cm.",
        "Correlation with endoscopy is recommended.",
        "The patient, age {age}, had a biopsy at endoscopy.",
    ],
}


def write_caption(
    rng: np.random.Generator,
    names: Names,
    extent: Mapping[str, float],
    place: Mapping[str, str],
    split: str,
) -> str:
    """A caption of 5 to 9 sentences about a mosaic: every class present, one to three denials, what slides do not tell.

    `extent` is each class's share of the tissue; that of the largest is the diagnosis.
    """
    sentences = Sentences(rng, names, split)
    findings, places = sentences.findings(extent, place)
    absent = [name for name in names if name not in extent]
    missing = [absent[i] for i in rng.permutation(len(absent))[: int(rng.integers(1, 4))]]
    denials = sentences.denials(missing)
    facts = {
        "label": max(extent, key=lambda name: extent[name]),
        "pieces": PIECES[len(extent)],
        "cm": f"{rng.uniform(0.2, 2.4):.1f}",
        "age": int(rng.integers(34, 88)),
    }
    remarks = [sentences.say(REMARKS, **facts) for _ in range(int(rng.integers(1, 3)))]
    diagnosis = [sentences.say(DIAGNOSIS, **facts)] if rng.random() < 0.8 else []
    kept = list(dict.fromkeys([*findings, *denials, *diagnosis, *places, *remarks]))
    return " ".join(kept[i] for i in rng.permutation(len(kept)))


def class_prompts(names: Names, classes: Sequence[str]) -> dict[str, list[str]]:
    """Class -> prompt ensemble for zero-shot classification by the largest class; no caption contains its texts."""
    prompts = {}
    for name in classes:
        listed = [text.removeprefix("+") for text in names[name]["prompt"]]
        prompts[name] = [
            f"A section of {name}.",
            f"Biopsy material with extensive {name}.",
            *(f"The main finding of the section is {text}." for text in listed[:3]),
            *(f"Large areas of the section contain {text}." for text in listed[:3]),
        ]
    return prompts
