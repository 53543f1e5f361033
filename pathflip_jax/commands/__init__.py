"""The subcommands of `pathflip`, a module each: `add` declares it, what it needs is imported when it runs."""

from pathflip_jax.commands import (
    ask,
    caption,
    compare,
    convert,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    goodput,
    ground,
    import_features,
    prepare,
    split,
    train,
    vocabulary,
)

# In the order in which `pathflip --help` lists them.
COMMANDS = (
    demo, doctor, prepare, import_features, split, vocabulary, train, goodput, evaluate, compare, ground, caption, ask,
    embed, convert, export,
)  # fmt: skip
