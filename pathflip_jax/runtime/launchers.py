"""Detection of the launcher from options and environment variables, of which an incomplete set is an error.

Processes that each believe to be the only one would train separate runs in one folder, and a process that waits for
others that were never started would wait in vain. So the error names the variables that are missing.
"""

import os
import re
from typing import NamedTuple

from pathflip_jax.runtime.private_interfaces import cluster_environments

SWITCH = "PATHFLIP_DISTRIBUTED"
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
INDEX = "JOB_COMPLETION_INDEX"  # of a pod in an indexed Kubernetes job
PORT, DEFAULT_PORT = "JAX_COORDINATOR_PORT", 8476
# Cluster detection of JAX, by its names; the one for Kubernetes queries the cluster, for which a single process in a
# pod may lack permission, so it is tried on demand only.
_CLUSTERS = {"ompi": "Open MPI", "gcetpu": "TPU metadata", "gketpu": "TPU variables"}
_ON_DEMAND = {"": "Kubernetes"}
# Launchers that number their processes without giving the address of the first one: their variables for the number of
# processes, the process index, and its index on its host.
_COUNTING = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    "Flux": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
}
_TASKS = "SLURM_STEP_NUM_TASKS"
_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # JAX needs all


class Launch(NamedTuple):
    """Processes of a run and the launcher; `coordinator` is the address of the first one, None if JAX detects it.

    `method` is JAX's name of the launcher, None if no detection is needed.
    """

    found_by: str
    processes: int
    process: int
    coordinator: str | None = None
    method: str | None = None


def from_options(coordinator: str | None, processes: int | None, process: int | None) -> Launch | None:
    """Launch from `--coordinator HOST:PORT --num_processes N --process_id I`; None if none of them is given."""
    given = (coordinator, processes, process)
    if all(value is None for value in given):
        return None
    if any(value is None for value in given):
        raise ValueError(
            f"--coordinator={coordinator} --num_processes={processes} --process_id={process}: give all three or none"
        )
    address = _address("--coordinator", coordinator)
    count = _number("--num_processes", str(processes), least=1)
    return Launch("--coordinator", count, _number("--process_id", str(process), below=count), address)


def from_variables() -> Launch | None:
    """Launch from JAX's variables; None without them, or if only the address is set, to complement a launcher."""
    count = _value(COUNT)
    number = NUMBER if _value(NUMBER) or not _value(INDEX) else INDEX
    if not count and not _value(NUMBER):
        return None
    if count and _number(COUNT, count, least=1) == 1 and not _value(number):
        return None
    missing = [name for name in (ADDRESS, COUNT, number) if not _value(name)]
    if missing:
        present = [f"{name}={_value(name)}" for name in (ADDRESS, COUNT, number) if _value(name)]
        more = f", or start the pods as an indexed job, which sets {INDEX}" if NUMBER in missing else ""
        raise ValueError(f"{' and '.join(present)} without {' and '.join(missing)}: set all three or none{more}")
    processes = _number(COUNT, count, least=1)
    process = _number(number, _value(number), below=processes)
    return Launch(ADDRESS, processes, process, given_address())


def from_counting() -> Launch | None:
    """Launch from MPI, Flux or torchrun, which need an address in addition."""
    for launcher, (size, rank, _) in _COUNTING.items():
        count = _number(size, _value(size) or "1", least=1)
        if count == 1 or launcher == "Open MPI" and "OMPI_MCA_orte_hnp_uri" in os.environ:  # JAX reads it
            continue
        if not _value(rank):
            raise ValueError(f"{size}={count} without {rank}: {launcher} sets both; unset {size}, or set {SWITCH}=0")
        process = _number(rank, _value(rank), below=count)
        if (str(count), str(process)) == (_value(_TASKS), _value("SLURM_PROCID")):  # srun sets PMI's variables too
            continue
        address = given_address()
        if not address:
            every = f"add `-x {ADDRESS}=HOST:PORT` to mpirun" if launcher == "Open MPI" else f"set {ADDRESS}=HOST:PORT"
            raise ValueError(
                f"{launcher} started this process as one of {count} ({size}) but does not give the address of process "
                f"0: {every}, the same for all, or set {SWITCH}=0 for {count} separate runs"
            )
        return Launch(launcher, count, process, address)
    return None


def from_slurm() -> Launch | None:
    """Launch from the srun step of this process; None for a step of one task, and outside of steps.

    The shell of an interactive job is a step of one task too, although SLURM_NTASKS counts the tasks of the job.
    """
    tasks = _TASKS if _value(_TASKS) else "SLURM_NTASKS"
    count = _number(tasks, _value(tasks) or "1", least=1)
    # A batch script, which is not a step, has process id 0 and no step node list.
    of_many = _value(_TASKS) or _value("SLURM_STEP_NODELIST") or (_value("SLURM_PROCID") or "0") != "0"
    if count == 1 or not of_many:
        return None
    missing = [name for name in _STEP if not _value(name)]
    if missing:
        raise ValueError(
            f"{tasks}={count} without {' and '.join(missing)}: srun sets them, but they did not reach this process; "
            f"pass them on to it, or set {SWITCH}=0 to train alone"
        )
    for name in ("SLURM_JOB_ID", "SLURM_LOCALID"):
        _number(name, _value(name))
    process = _number("SLURM_PROCID", _value("SLURM_PROCID"), below=count)
    return Launch("Slurm", count, process, given_address(), "slurm")


def from_jax(on_demand: bool) -> Launch | None:
    """Launch detected by JAX: TPU pods, Open MPI before version 5, and on demand Kubernetes."""
    names = _CLUSTERS | (_ON_DEMAND if on_demand else {})
    for cluster in cluster_environments():
        try:
            if cluster.name in names and cluster.is_env_present():
                processes, process = cluster.get_process_count(), cluster.get_process_id()
                return Launch(names[cluster.name], processes, process, given_address(), cluster.name)
        except OSError:  # no metadata server: not a Cloud TPU
            continue
        except (ValueError, KeyError) as error:
            values = " ".join(
                f"{x}={os.environ[x]}" for x in sorted(os.environ) if re.match("TPU_|OMPI_|MEGASCALE_", x)
            )
            raise ValueError(f"{names[cluster.name]}: {error!r} in {values or 'its answer'}") from None
    return None


def refuse_address_alone() -> None:
    """Raise ValueError if an address is given without a number of processes."""
    if _value(ADDRESS) and _value(COUNT) != "1":
        raise ValueError(
            f"{ADDRESS}={_value(ADDRESS)} without {COUNT} and {NUMBER}, and no launcher gives the number of processes: "
            f"set all three or none, or {SWITCH}=0 to train alone"
        )


def explain_single_process() -> str:
    """Note on an allocation of several tasks that does not include this process, else an empty text."""
    tasks = _value("SLURM_NTASKS") or ""
    if not tasks.isdecimal() or int(tasks) < 2 or _value(SWITCH) == "0":
        return ""
    return f"the Slurm job has {tasks} tasks, but srun did not start this process, so it runs alone"


def own_address(launch: Launch) -> str | None:
    """Address of the first process, as far as known without network access."""
    if launch.coordinator or launch.method not in ("slurm", "ompi"):
        return launch.coordinator
    port = _value(PORT)
    if port:
        _port(PORT, port)
    (cluster,) = (cluster for cluster in cluster_environments() if cluster.name == launch.method)
    return cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=port)


def port_setting(launch: Launch) -> str:
    """Name of the setting that determines the port of the first process."""
    return "--coordinator" if launch.found_by == "--coordinator" else ADDRESS if launch.coordinator else PORT


def given_address() -> str | None:
    """Address in JAX_COORDINATOR_ADDRESS, with a port; None if it is not set."""
    return _address(ADDRESS, _value(ADDRESS), _value(PORT) or str(DEFAULT_PORT)) if _value(ADDRESS) else None


def listening_port(address: str) -> int:
    """Port on which the first process listens."""
    bound = _value("JAX_COORDINATOR_BIND_ADDRESS")
    return int((_address("JAX_COORDINATOR_BIND_ADDRESS", bound) if bound else address).rpartition(":")[2])


def local_devices() -> list[int] | None:
    """Local device of this process, if its launcher numbers the processes of a host."""
    if ids := _value("JAX_LOCAL_DEVICE_IDS"):
        return [_number("JAX_LOCAL_DEVICE_IDS", text.strip()) for text in ids.split(",")]
    numbered = [(_TASKS, "SLURM_LOCALID"), *((size, local) for size, _, local in _COUNTING.values())]
    for size, local in numbered:  # a step of one task is a shell, where several processes may have been started by hand
        if _value(local) and _value(size) != "1":
            return [_number(local, _value(local))]
    return None


def _value(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _number(name: str, text: str, *, least: int = 0, below: int | None = None) -> int:
    whole = re.fullmatch("[0-9]+", text)
    if not whole or int(text) < least or below is not None and int(text) >= below:
        expected = f"{least} or more" if below is None else f"{least} to {below - 1}, as there are {below} processes"
        raise ValueError(f"{name}={text}: expected a whole number, {expected}")
    return int(text)


def _port(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 2**16:
        raise ValueError(f"{name}={text}: expected a port, 1 to 65535")
    return int(text)


def _address(name: str, text: str, port: str | None = None) -> str:
    """HOST:PORT, with a default port. IPv6 hosts must be in brackets, or the last group would be read as a port."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/\[\]]+)(?::([0-9]+))?", text)
    if not found or not (found[2] or port) or found[2] and not 0 < int(found[2]) < 2**16:
        raise ValueError(f"{name}={text}: expected HOST:PORT, such as node1:{DEFAULT_PORT} or [fe80::1]:{DEFAULT_PORT}")
    return f"{found[1]}:{found[2] or _port(PORT, port)}"
