"""Subcommands of `pathflip`, one module each; `add` declares the command, whose imports wait until it runs."""

from pathflip_jax.commands import (
    ask,
    caption,
    compare,
    convert,
    demo,
    doctor,
    embed,
    encoders,
    evaluate,
    export,
    goodput,
    ground,
    import_features,
    prepare,
    report,
    serve,
    split,
    train,
    vocabulary,
)

# In the order in which `pathflip --help` lists them.
COMMANDS = (
    demo, doctor, encoders, prepare, import_features, split, vocabulary, train, goodput, evaluate, compare, ground,
    report, serve, caption, ask, embed, convert, export,
)  # fmt: skip
