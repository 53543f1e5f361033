"""XLA compilation: compiler options, and the persistent compilation cache."""

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX records it for every program, cached or not
# Options for bitwise reproducible programs, by backend. CPU and TPU: reproducible by default
# (tests/training/test_loop.py shows it for a CPU), XLA has no flag for it. GPU: no atomics, and no kernels chosen by
# autotuning at compilation.
DETERMINISTIC = {"cpu": {}, "tpu": {}, "gpu": {"xla_gpu_deterministic_ops": True}}
# A TPU overlaps computation with the all-reduce of gradients only if each large one is reduced separately: a combined
# all-reduce is waited for at the end of the step. Smaller ones are combined, up to the threshold in bytes.
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

    With `deterministic`, programs are bitwise reproducible; raises ValueError for a backend that is not in
    `DETERMINISTIC`.

    By default XLA:CPU removes `optimization_barrier` before fusion and scheduling. Without the barrier, a layer's
    fusion reaches back through the residuals of all earlier layers, which costs time, and values to be rematerialised
    in the backward pass are computed early and kept, which costs memory. Only performance depends on this.
    """
    import jax

    backend = platform or jax.default_backend()
    options = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}, "tpu": TPU_OVERLAP}.get(backend, {})
    if not deterministic:
        return options
    if backend not in DETERMINISTIC:
        raise ValueError(
            f"train.deterministic=True is supported on {', '.join(DETERMINISTIC)}, but this backend is {backend!r}; "
            "set it to False"
        )
    return options | DETERMINISTIC[backend]


class CompileCounter:
    """Context manager that counts, in `count`, the programs that this process compiled or loaded from the cache."""

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


def enable_compilation_cache() -> None:
    """Enable the persistent compilation cache in `$XDG_CACHE_HOME/pathflip_jax`; call before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` selects another folder. Without a writable folder, programs are compiled at each start,
    which is reported once.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        if cache.startswith("~"):  # not expanded: neither HOME nor an entry in passwd
            _report_no_cache("HOME is not set, and this user has no entry in passwd", "a folder")
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache) / "pathflip_jax")
    if warnings.showwarning is not _show_once:
        _show_others[:] = [warnings.showwarning]
        warnings.showwarning = _show_once


_CACHE_FAULT = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for .*?: (.*)", re.DOTALL)
_reported: list[str] = []
_show_others: list[Callable] = []  # the previous `warnings.showwarning`


def _show_once(message: Warning | str, *where, **how) -> None:
    """Show cache warnings only once, as JAX warns for every program, both on reading and on writing."""
    if not (fault := _CACHE_FAULT.match(str(message))):
        _show_others[0](message, *where, **how)
    elif not _reported:
        cure = "a writable folder with free space, or delete damaged files there"
        _report_no_cache(f"{os.environ.get('JAX_COMPILATION_CACHE_DIR')}: {fault[1]}", cure)


def _report_no_cache(reason: str, cure: str) -> None:
    _reported.append(reason)
    start = f"pathflip: compiled programs cannot be cached for the next start ({reason})"
    print(f"{start}; set JAX_COMPILATION_CACHE_DIR to {cure}", file=sys.stderr)
