"""PathFLIP in JAX: vision-language models for whole slide images."""

__all__ = ["load", "read_slide"]


def __getattr__(name: str):
    """Load JAX only when a model is wanted: `import pathflip_jax` alone stays instant."""
    if name in __all__:
        from pathflip_jax.inference import load as loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
