"""Private interfaces of JAX and tensorboardX, each with the reason: no public one tells or does the same.

No other file may reach into a library. tests/runtime/test_private_interfaces.py holds each against the installed
version, and `make test-peers` against the others that are supported: the oldest JAX, the newest, and one between.
"""

from typing import Any


def running_on_cloud_tpu() -> bool:
    """Whether JAX takes this machine for a TPU host of Google's cloud.

    There JAX shares out the chips itself, and a launcher's number of a process on its host is not passed on to it.
    """
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def cluster_environments() -> list[type]:
    """The kinds of cluster that `jax.distributed.initialize` knows, in the order that it asks them.

    It does not tell what it would find, and starts to connect at once; whoever wants to name the processes that are
    missing, or the variable that is wrong, has to ask first.
    """
    from jax._src.clusters import ClusterEnv

    return ClusterEnv._cluster_types


def key_value_client() -> Any | None:
    """The client of the key-value store that the processes share; None in a lone one.

    The public ways to exchange values, `jax.experimental.multihost_utils`, are collectives: they wait for ever for a
    process that hangs, and cannot be used where one is to be found out.
    """
    from jax._src import distributed

    return distributed.global_state.client


def is_writing_events(writer: Any) -> bool:
    """Whether the thread of a tensorboardX SummaryWriter still writes.

    A full disk ends the thread in silence; `add_scalar` then fills a queue, and hangs when that is full.
    """
    return writer.file_writer.event_writer._worker.is_alive()
