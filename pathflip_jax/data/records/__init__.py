"""Records: slides in TFRecord shards, their index and their manifest."""

__all__ = ["Records"]


def __getattr__(name: str):
    """`pathflip_jax.data.records.records.Records` without importing what only its reader needs."""
    if name in __all__:
        from pathflip_jax.data.records.records import Records

        return Records
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
