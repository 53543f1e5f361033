"""Compilation of programs: options for XLA, and the folder in which its work is kept for the next start."""

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX records it for every program, from the cache or not
# What makes a program give the same bits each time it runs, by backend. CPU and TPU: it does
# (tests/training/test_loop.py shows it for a CPU), XLA has no flag for it. GPU: no atomics, and no kernels chosen by a
# race at compilation.
DETERMINISTIC = {"cpu": {}, "tpu": {}, "gpu": {"xla_gpu_deterministic_ops": True}}
# A TPU computes on while gradients are summed over the devices, if each large one goes by itself: those joined into one
# operation are waited for at the end of the step. Small ones are joined up to so many bytes.
TPU_OVERLAP = {
    "xla_jf_crs_combiner_threshold_in_bytes": "131072",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}


def compiler_options(deterministic: bool = False, platform: str | None = None) -> dict[str, str | bool]:
    """Compiler options of `jax.jit` for programs that take gradients, on a platform; None: the backend in use.

    With `deterministic`, a program gives the same bits each time: ValueError for a backend without a known way.

    XLA for CPU removes `optimization_barrier` before it fuses and schedules. Without it a layer's fusion reaches back
    through the residuals of all layers before it, which costs time, and what is to be recomputed for the gradient is
    computed ahead and kept, which costs memory. Nothing but speed depends on this.
    """
    import jax

    backend = platform or jax.default_backend()
    options = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}, "tpu": TPU_OVERLAP}.get(backend, {})
    if not deterministic:
        return options
    if backend not in DETERMINISTIC:
        raise ValueError(
            f"train.deterministic=True is known for {', '.join(DETERMINISTIC)}, this backend is {backend!r}; set it to "
            "False"
        )
    return options | DETERMINISTIC[backend]


class CompileCounter:
    """`count`: the programs that this process compiled or took from the cache; a context manager while it counts."""

    def __init__(self):
        self.count = 0

    def _listen(self, event: str, _seconds: float, **_) -> None:
        self.count += event == COMPILED

    def __enter__(self):
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._listen)


def keep_compiled() -> None:
    """Keep compiled programs between runs, in `$XDG_CACHE_HOME/pathflip_jax`; before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` names another folder. Without a folder that can be written, programs are compiled at
    each start, which is said once.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        if cache.startswith("~"):  # as it stands: neither HOME nor an entry in passwd
            _say_not_kept("HOME is not set, and this user has no entry in passwd", "a folder")
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache) / "pathflip_jax")
    if warnings.showwarning is not _show_once:
        _shown_by[:] = [warnings.showwarning]
        warnings.showwarning = _show_once


_CACHE_FAULT = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for .*?: (.*)", re.DOTALL)
_told: list[str] = []
_shown_by: list[Callable] = []  # what shows all other warnings


def _show_once(message: Warning | str, *where, **how) -> None:
    """Show a warning. JAX warns for each program, when it reads and when it writes: once is enough."""
    if not (fault := _CACHE_FAULT.match(str(message))):
        _shown_by[0](message, *where, **how)
    elif not _told:
        cure = "a folder that may be written and has room, or delete damaged files there"
        _say_not_kept(f"{os.environ.get('JAX_COMPILATION_CACHE_DIR')}: {fault[1]}", cure)


def _say_not_kept(reason: str, cure: str) -> None:
    _told.append(reason)
    start = f"pathflip: compiled programs are not kept for the next start ({reason})"
    print(f"{start}; set JAX_COMPILATION_CACHE_DIR to {cure}", file=sys.stderr)
