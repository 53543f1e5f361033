"""Commands against the protocols of S3 and GCS, with the clients that talk to the cloud."""

import subprocess
import sys
from pathlib import Path

import pytest

SERVERS = {"s3": ("s3fs", "moto.server"), "gs": ("gcsfs", "gcp_storage_emulator.server")}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", SERVERS)
def test_the_whole_way_over_a_bucket(protocol):
    for module in SERVERS[protocol]:
        pytest.importorskip(module)
    command = [sys.executable, str(Path(__file__).with_name("buckets.py")), protocol]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.count("as on a disk") == 4
