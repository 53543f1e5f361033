"""Subcommands of `pathflip`, one module each, and their exit codes.

The table names and summarises every command, so that only the module of the one that runs is imported.
"""

from importlib import import_module

FAILED_SLIDES, WRONG_INPUT = 1, 2

# In the order in which `pathflip --help` lists them. The module of a command has its name.
COMMANDS = {
    "demo": "run the complete workflow on a synthetic cohort, from slides to report, in about ten minutes on two cores",
    "doctor": "check versions, devices, memory, data and configs, and name the cure for each fault",
    "encoders": "list the registered patch encoders, or check a file or folder of weights",
    "prepare": "encode slides into records of patch features",
    "import": "turn feature files of CLAM, TRIDENT, LazySlide, slideflow and other tools into records",
    "split": "split a slide table by patient, balanced over labels and sites, or check an existing split",
    "vocabulary": "train a small WordPiece vocabulary on reports, for use without a BERT folder",
    "train": "train a model; options are settings of the config",
    "goodput": "report where the time of a run went, and how often to save",
    "evaluate": "score a trained model: retrieval, classification, survival, regression, grounding; captions "
    "and answers",
    "compare": "compare evaluations of the same slides: paired differences to the first, with p-values",
    "ground": "map where on a slide a text matches",
    "report": "write slides with maps of where texts match, as a folder that opens in any browser",
    "serve": "show slides in a browser: search them by text, see where a text matches, ask questions about them",
    "caption": "write a report of a slide with a trained language model",
    "ask": "answer a question about a slide with a trained language model",
    "embed": "embed every slide of a folder into one Parquet or AnnData file",
    "convert": "turn PyTorch weights (of a released model, or written by `pathflip export`) into a run folder",
    "push": "publish a run with its model card on the Hugging Face hub, private unless you say otherwise",
    "export": "export a trained model for PyTorch, transformers or PEFT, or records as feature files of TRIDENT",
}
_MODULES = {"import": "import_features"}  # `import` is a keyword of Python


def add_command(commands, name: str) -> None:
    """Add a command with its options to the subparsers `commands`, importing its module."""
    import_module(f"{__name__}.{_MODULES.get(name, name)}").add(commands)
