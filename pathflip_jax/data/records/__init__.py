"""Records: slides in TFRecord shards, with index and manifest."""

__all__ = ["Records"]


def __getattr__(name: str):
    """Lazy import of `pathflip_jax.data.records.records.Records`, whose dependencies only its users need."""
    if name in __all__:
        from pathflip_jax.data.records.records import Records

        return Records
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
