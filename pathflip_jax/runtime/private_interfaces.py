"""Private interfaces of JAX and tensorboardX, each with the reason why no public one suffices.

No other file may use private interfaces of a library. tests/runtime/test_private_interfaces.py checks each against the
installed version, and `make test-peers` against the other supported ones: the oldest JAX, the newest, and one between.
"""

from typing import Any


def running_on_cloud_tpu() -> bool:
    """Whether JAX detects this machine as a Cloud TPU host.

    There JAX assigns the chips itself, and a launcher's local process index is not passed on to it.
    """
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def cluster_environments() -> list[type]:
    """Cluster types that `jax.distributed.initialize` detects, in its order.

    It does not report the detected values, and connects immediately; to name missing processes or wrong variables in an
    error, they have to be queried first.
    """
    from jax._src.clusters import ClusterEnv

    return ClusterEnv._cluster_types


def key_value_client() -> Any | None:
    """Client of the key-value store shared by the processes; None for a single process.

    The public way to exchange values, `jax.experimental.multihost_utils`, uses collectives: they wait forever for a
    process that hangs, and so cannot serve to identify it.
    """
    from jax._src import distributed

    return distributed.global_state.client


def is_writing_events(writer: Any) -> bool:
    """Whether the writer thread of a tensorboardX SummaryWriter is alive.

    A full disk ends the thread silently; `add_scalar` then fills a queue, and hangs when it is full.
    """
    return writer.file_writer.event_writer._worker.is_alive()
