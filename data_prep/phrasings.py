"""Vocabulary of the synthetic reports: concept names and sentence templates, for training and held out.

"train" lists write the training and validation reports, "test" lists the held-out ones, and "prompt" lists the texts
for grounding and zero-shot classification. The held-out lists recombine the training words; none of their sentences can
be generated from a training list. A plus marks a plural.
"""

# Names of concepts. The first two names of a training list are also used for negations.
NAMES = {
    "glands": {
        "train": [
            "+tumor glands",
            "gland-forming carcinoma",
            "+tubular glands with open lumens",
            "+round glands lined by columnar cells",
            "+infiltrating glandular structures",
            "+acini with central lumens",
        ],
        "test": [
            "+glandular structures with open lumens",
            "+tubular acini lined by columnar tumor cells",
            "+round tumor glands with central lumens",
        ],
        "prompt": [
            "+infiltrating tubular glands",
            "+acini lined by columnar cells",
            "gland-forming tumor with open lumens",
            "+areas of round glandular structures",
        ],
    },
    "keratin pearls": {
        "train": [
            "+keratin pearls",
            "+squamous nests with keratinization",
            "+concentric whorls of keratin",
            "+keratinizing squamous cells",
            "lamellated keratin in squamous nests",
            "+squamous whorls with keratin pearls",
        ],
        "test": [
            "+concentric keratin pearls",
            "+nests of keratinizing squamous cells with whorls",
            "+lamellated whorls of keratin",
        ],
        "prompt": [
            "+squamous nests with keratin pearls",
            "concentric lamellated keratin",
            "keratinization with squamous whorls",
            "+areas of keratinizing nests",
        ],
    },
    "papillary fronds": {
        "train": [
            "+papillary fronds",
            "+papillae with fibrovascular cores",
            "+branching papillary structures",
            "+fronds lined by cells with clear nuclei",
            "papillary architecture with fibrovascular cores",
            "+branching fronds in clear spaces",
        ],
        "test": [
            "+branching papillae lined by cells with clear nuclei",
            "+papillary structures with fibrovascular cores",
            "+papillary fronds in clear spaces",
        ],
        "prompt": [
            "+branching papillary fronds",
            "fibrovascular cores of papillae",
            "+fronds with papillary architecture",
            "+areas of branching papillae",
        ],
    },
    "mucin pools": {
        "train": [
            "+mucin pools",
            "+pools of extracellular mucin",
            "+lakes of mucin with floating tumor cells",
            "extracellular mucin with floating clusters",
            "+mucinous lakes",
            "+tumor clusters floating in mucin",
        ],
        "test": [
            "+lakes of extracellular mucin",
            "+mucinous pools with floating tumor cells",
            "+clusters of tumor cells floating in lakes of mucin",
        ],
        "prompt": [
            "+extracellular mucin pools",
            "+mucinous lakes with floating clusters",
            "+floating tumor cells in pools of mucin",
            "+areas of mucin lakes",
        ],
    },
    "solid sheets": {
        "train": [
            "+solid sheets of tumor cells",
            "solid growth of large cells",
            "+sheets of large cells with vesicular nuclei",
            "+poorly cohesive sheets with prominent nucleoli",
            "a solid pattern without differentiation",
            "+diffuse sheets of pleomorphic cells",
        ],
        "test": [
            "+solid sheets of large pleomorphic cells",
            "a solid growth pattern with prominent nucleoli",
            "diffuse growth of tumor cells with vesicular nuclei",
        ],
        "prompt": [
            "+solid sheets of pleomorphic cells",
            "diffuse solid growth with vesicular nuclei",
            "+large cells in sheets with prominent nucleoli",
            "+areas of solid tumor without differentiation",
        ],
    },
    "necrosis": {
        "train": [
            "necrosis",
            "tumor necrosis",
            "necrotic debris",
            "coagulative necrosis with ghost cells",
            "granular necrotic material",
            "geographic necrosis with nuclear dust",
        ],
        "test": [
            "coagulative tumor necrosis",
            "granular necrotic debris with nuclear dust",
            "necrotic material with ghost cells",
        ],
        "prompt": [
            "granular debris of coagulative necrosis",
            "ghost cells and nuclear dust",
            "geographic tumor necrosis",
            "+areas of necrotic debris",
        ],
    },
    "lymphoid aggregates": {
        "train": [
            "+lymphoid aggregates",
            "dense lymphoid tissue",
            "a dense infiltrate of small lymphocytes",
            "+lymphocytes with germinal centers",
            "+lymphoid follicles",
            "chronic inflammation with lymphoid follicles",
        ],
        "test": [
            "+dense lymphoid aggregates with germinal centers",
            "an infiltrate of small lymphocytes in follicles",
            "+dense aggregates of lymphocytes",
        ],
        "prompt": [
            "+small lymphocytes in dense aggregates",
            "+lymphoid follicles with germinal centers",
            "a dense lymphoid infiltrate",
            "+areas of small lymphocytes",
        ],
    },
    "fat": {
        "train": [
            "fat",
            "adipose tissue",
            "+mature adipocytes",
            "+mature fat lobules",
            "+lobules of adipose tissue",
            "+empty adipocytes with thin membranes",
        ],
        "test": [
            "mature adipose tissue",
            "+lobules of mature fat",
            "fat with empty adipocytes",
        ],
        "prompt": [
            "+adipocytes of mature fat",
            "+adipose lobules with thin membranes",
            "+mature adipose lobules",
            "+areas of empty adipocytes",
        ],
    },
    "fibrous stroma": {
        "train": [
            "fibrous stroma",
            "dense collagen",
            "+collagen bundles with spindle cells",
            "desmoplastic fibrous tissue",
            "+wavy bundles of dense collagen",
            "fibrosis with spindle cells",
        ],
        "test": [
            "dense fibrous tissue with wavy collagen",
            "desmoplastic stroma with collagen bundles",
            "+spindle cells in dense fibrous stroma",
        ],
        "prompt": [
            "wavy collagen with spindle cells",
            "dense desmoplastic stroma",
            "+bundles of fibrous collagen",
            "+areas of dense fibrosis",
        ],
    },
    "ulcer": {
        "train": [
            "ulceration",
            "fibrinopurulent exudate",
            "an ulcer bed with neutrophils",
            "acute inflammation with fibrin",
            "fibrin with many neutrophils",
            "ulcer exudate with acute inflammation",
        ],
        "test": [
            "an ulcer with fibrin and neutrophils",
            "fibrinopurulent ulcer exudate",
            "acute exudate with many neutrophils",
        ],
        "prompt": [
            "neutrophils in fibrin",
            "ulceration with fibrinopurulent exudate",
            "an ulcer bed with acute inflammation",
            "+areas of fibrin and neutrophils",
        ],
    },
}

# {n} = the name, {b} = it without its article, {N} = with a capital, {is} = is or are, {makes} = makes or make.
PRESENT = {
    "focal": {
        "train": [
            "There {is} focal {b}.",
            "{N} {is} seen focally.",
            "A small area of {b} is noted.",
            "Focal areas show {n}.",
            "A minor component of {b} is present.",
        ],
        "test": [
            "Noted focally {is} {n}.",
            "A minor focal area shows {n}.",
            "Present in a small area {is} {n}.",
        ],
    },
    "moderate": {
        "train": [
            "There {is} {n} in part of the section.",
            "{N} {is} identified.",
            "Some areas show {n}.",
            "The section contains {n}.",
            "{N} {is} present in moderate amount.",
        ],
        "test": [
            "Part of the section shows {n}.",
            "Identified in some areas {is} {n}.",
            "A moderate amount of {b} is noted.",
        ],
    },
    "extensive": {
        "train": [
            "There {is} extensive {b}.",
            "{N} {is} extensive.",
            "Large areas show {n}.",
            "Much of the section is occupied by {n}.",
            "{N} {makes} up a large part of the tissue.",
            "Most of the tissue is made up of {n}.",
        ],
        "test": [
            "A large part of the section shows extensive {b}.",
            "Much of the tissue is made up of {n}.",
            "Large areas of the tissue are occupied by {n}.",
        ],
    },
}
WHERE = {
    "train": [
        "The {side} half of the slide contains {n}.",
        "On the {side} side of the slide, {n} {is} found.",
        "The {side} side is where {n} {is} seen.",
    ],
    "test": [
        "The {side} side of the slide is where {n} {is} found.",
        "Found in the {side} half of the slide {is} {n}.",
    ],
}
ABSENT = {
    "train": [
        "No {b} {is} identified.",
        "There is no evidence of {b}.",
        "{N} {is} absent.",
        "The section shows no {b}.",
        "{N} {is} not seen.",
    ],
    "test": ["No evidence of {b} is seen.", "{N} {is} not identified.", "There {is} no {b} in the section."],
}
DIAGNOSIS = {
    "train": [
        "The findings are those of {label}.",
        "Final diagnosis: {label}.",
        "The tumor is classified as {label}.",
        "Sections show {label}.",
    ],
    "test": [
        "The final diagnosis is {label}.",
        "The tumor shows findings of {label}.",
        "Sections are classified as {label}.",
    ],
}
SPECIMEN = {
    "train": [
        "The specimen consists of {pieces} of tissue.",
        "Received in formalin is a resection specimen with a tumor measuring {cm} cm.",
        "The tumor measures {cm} cm in greatest dimension.",
        "Gross examination shows a firm mass measuring {cm} x {cm2} cm.",
    ],
    "test": [
        "The resection specimen shows a mass measuring {cm} cm in greatest dimension.",
        "Received is a firm tumor that measures {cm} x {cm2} cm.",
        "The specimen received in formalin consists of {pieces}.",
    ],
}
STAGE = {
    "train": [
        "Pathologic stage is pT{t} N{n}.",
        "The tumor is staged as pT{t} N{n}.",
        "Of {nodes} lymph nodes, {positive} contain metastasis (pN{n}).",
    ],
    "test": [
        "The pathologic stage of the tumor is pT{t} N{n}.",
        "Staged as pT{t}, with metastasis in {positive} of {nodes} lymph nodes.",
    ],
}
CASE = {
    "train": [
        "Surgical margins are free of tumor.",
        "The closest margin is {mm} mm.",
        "The deep and lateral margins are not involved.",
        "Lymphovascular invasion is not identified.",
        "Perineural invasion is present.",
        "The patient is a {age}-year-old with a history of weight loss.",
        "The patient, age {age}, has anemia and pain that began at night.",
        "Immunohistochemistry for p53 shows a wild-type pattern.",
        "Ki-67 labels {ki} % of tumor cells.",
        "Clinical correlation is recommended.",
        "The tumor cells are positive for cytokeratin by immunohistochemistry.",
    ],
    "test": [
        "The surgical margins are not involved, and the closest is {mm} mm.",
        "Lymphovascular and perineural invasion are not identified.",
        "The patient has a history of weight loss at age {age}.",
        "By immunohistochemistry, Ki-67 is positive in {ki} % of cells.",
        "Immunohistochemistry for cytokeratin is positive.",
        "Correlation with clinical history is recommended.",
    ],
}
PIECES = {1: "one fragment", 2: "two fragments", 3: "three fragments", 4: "four fragments"}
