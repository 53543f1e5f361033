"""How programs are compiled: what XLA has to be told, and where its work is kept for the next start."""

import os
from pathlib import Path


def compiler_options() -> dict[str, str]:
    """What `jax.jit` is given for programs that take gradients, on the backend in use.

    XLA for CPU removes `optimization_barrier` before it fuses and schedules. Without it a layer's fusion reaches back
    through the residuals of all layers before it, which costs time, and what is to be recomputed for the gradient is
    computed ahead and kept, which costs memory. Nothing but speed depends on this.
    """
    import jax

    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}


def keep_compiled() -> None:
    """Keep compiled programs between runs, in `$XDG_CACHE_HOME/pathflip_jax`; before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` names another folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "pathflip_jax"))
