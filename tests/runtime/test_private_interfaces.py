"""Each private interface of a library is there and does what we ask of it; none is used but in its one file."""

import ast
import os
import sys
from pathlib import Path

import pytest
from tensorboardX import SummaryWriter

from pathflip_jax.runtime import private_interfaces

ROOT = Path(__file__).parents[2]
OURS = {"pathflip_jax", "configs", "data_prep", "benchmarks", "tests"}
GOLDEN = ROOT / "tests" / "golden"  # its scripts run other tools' private writers, at the versions that they name
CODE = [path for folder in sorted(OURS) for path in (ROOT / folder).rglob("*.py") if GOLDEN not in path.parents]
STORE = """
import sys
import jax
from pathflip_jax.runtime.private_interfaces import key_value_client
assert key_value_client() is None
jax.distributed.initialize("localhost:" + sys.argv[1], num_processes=1, process_id=0)
client = key_value_client()
client.key_value_set("a/1", "one")
client.key_value_set("a/1", "two", allow_overwrite=True)
assert client.blocking_key_value_get("a/1", 1000) == "two"
assert client.key_value_dir_get("a/") == [("a/1", "two")]
try:
    client.blocking_key_value_get("a/2", 50)
except jax.errors.JaxRuntimeError as error:
    assert "DEADLINE_EXCEEDED" in str(error)
"""


def private_imports(path: Path) -> list[str]:
    """Names of other libraries that a file imports and that begin with an underscore, or whose module's does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    theirs = [name.split(".") for name in found if name[:2] != "__" and name.split(".")[0] not in OURS]
    return [".".join(parts) for parts in theirs if any(part.startswith("_") for part in parts)]


def test_nothing_else_imports_a_private_module():
    using = {path.name for path in CODE if private_imports(path)}
    assert using == {Path(private_interfaces.__file__).name}


def test_jax_says_whether_this_is_a_tpu_host():
    assert private_interfaces.running_on_cloud_tpu() in (True, False)


def test_jax_knows_the_clusters_that_launchers_ask_for():
    clusters = {cluster.name: cluster for cluster in private_interfaces.cluster_environments()}
    assert {"ompi", "gcetpu", "gketpu", "slurm"} <= clusters.keys()
    for cluster in clusters.values():
        for method in ("is_env_present", "get_process_count", "get_process_id", "get_coordinator_address"):
            assert callable(getattr(cluster, method))


def test_the_store_of_the_processes_keeps_lists_and_times_out(run_together, free_port):
    command, environment = [sys.executable, "-c", STORE, str(free_port())], os.environ | {"JAX_PLATFORMS": "cpu"}
    codes, said = run_together([command], [environment])
    assert codes == [0], said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the full disk
def test_a_writer_of_events_that_its_disk_ended_is_told(tmp_path, monkeypatch):
    writer = SummaryWriter(str(tmp_path), flush_secs=1)
    assert private_interfaces.is_writing_events(writer)
    inner = writer.file_writer.event_writer

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(inner._ev_writer, "write_event", full)
    writer.add_scalar("loss", 1.0, 1)
    inner._worker.join(timeout=60)
    assert not private_interfaces.is_writing_events(writer)
