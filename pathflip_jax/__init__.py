"""PathFLIP in JAX: vision-language models for whole slide images."""

__all__ = ["load", "read_slide"]


def __getattr__(name: str):
    """Public functions, imported on first use: `import pathflip_jax` alone does not load JAX."""
    if name in __all__:
        from pathflip_jax.inference import load as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
