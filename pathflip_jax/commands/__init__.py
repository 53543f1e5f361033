"""The subcommands of `pathflip`, a module each: `add` declares it, what it needs is imported when it runs."""

from pathflip_jax.commands import (
    ask,
    caption,
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
    report,
    serve,
    train,
    vocabulary,
)

# In the order in which `pathflip --help` lists them.
COMMANDS = (
    demo, doctor, prepare, import_features, vocabulary, train, goodput, evaluate, ground, report, serve, caption, ask,
    embed, convert, export,
)  # fmt: skip
