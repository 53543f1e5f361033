"""tpu.sh against a stand-in Cloud: requests are granted, run, preempted, fail, and are always deleted in the end."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CLOUD = """
import fcntl
lock = open(HERE / "lock", "w")  # the script asks for the state while a connection changes it
fcntl.flock(lock, fcntl.LOCK_EX)
state = HERE / "state"
request, verb = argv[:3] == ["compute", "tpus", "queued-resources"], argv[3]
if request and verb == "create":
    if state.exists() or next_line("creations", "0") != "0":
        sys.exit(1)
    state.write_text("WAITING_FOR_RESOURCES")
elif request and verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: the resource was not found")
    print(state.read_text())
    now = state.read_text()
    grant = next_line("grants", "ACTIVE") if now == "WAITING_FOR_RESOURCES" else now
    state.write_text({"SUSPENDING": "SUSPENDED", "PROVISIONING": "ACTIVE"}.get(now, grant))
elif request and verb == "delete":
    state.unlink(missing_ok=True)
elif verb == "ssh" and "worker.sh train" in argv[-1]:
    end = next_line("ends", "0")
    if end == "preempted":  # the connection ends with the host
        state.write_text("SUSPENDING")
        sys.exit(255)
    if end == "hangs":  # the host is gone, and nobody says so
        state.write_text("SUSPENDED")
        lock.close()
        time.sleep(60)
    if end == "waits":
        (HERE / "waiting").touch()
        lock.close()
        time.sleep(60)
    sys.exit(int(end))
elif verb in ("ssh", "scp"):
    sys.exit(int(next_line("preparations", "0")))
"""
SETTINGS = {
    "PROJECT": "lab", "ZONE": "us-west4-a", "DATA": "gs://lab/cohort", "WORKDIR": "gs://lab/runs/base",
    "POLL": "0.05", "PAUSE": "0", "MAX_RESTARTS": "2",
}  # fmt: skip
OPTIONS = ["--config", "demo", "--config.data.texts=my reports.jsonl"]


@pytest.fixture
def cloud(stand_ins):
    stand_ins.add("gcloud", CLOUD)
    stand_ins.add("git")  # of the archive, only that it is made
    return stand_ins


def requests(cloud, verb):
    return cloud.calls("gcloud", "compute", "tpus", "queued-resources", verb)


def trainings(cloud):
    return [call for call in cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh") if " train " in call[-1]]


def preparations(cloud):
    return cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "scp")


def test_a_run_is_requested_prepared_trained_and_deleted(cloud):
    done = cloud.run("tpu.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 0, done.stderr
    (request,) = requests(cloud, "create")
    assert "--spot" in request and "--accelerator-type=v5litepod-8" in request
    assert len(preparations(cloud)) == len(trainings(cloud)) == len(requests(cloud, "delete")) == 1
    assert (
        "--worker=all" in preparations(cloud)[0]
        and len([call for call in cloud.calls("git") if "archive" in call]) == 1
    )
    archive = Path(preparations(cloud)[0][5])  # of this launch alone: others of this name have other commits
    assert archive.parent.parent == cloud.folder and not archive.parent.exists()
    # What the host is told is what a shell there reads as the options given here.
    command = trainings(cloud)[0][-1].removeprefix("--command=").replace("pathflip/launch/worker.sh", "printf '%s|'")
    read = subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout
    assert read == "|".join(["train", *OPTIONS]) + "|"
    assert "WORKDIR=gs://lab/runs/base" in command


@pytest.mark.parametrize("lost", ["preempted", "hangs"])
def test_a_preempted_request_is_made_anew_and_the_run_goes_on(cloud, lost):
    """More often than failures may be."""
    cloud.plan("ends", lost, lost, lost, 0)
    done = cloud.run("tpu.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert len(requests(cloud, "create")) == len(preparations(cloud)) == len(trainings(cloud)) == 4
    assert len(requests(cloud, "delete")) == 4


def test_stopped_after_saving_starts_again_on_the_same_hosts(cloud):
    cloud.plan("ends", 75, 75, 75, 0)
    assert cloud.run("tpu.sh", *OPTIONS, **SETTINGS).returncode == 0
    assert len(trainings(cloud)) == 4 and len(requests(cloud, "create")) == len(preparations(cloud)) == 1


def test_failures_are_started_again_only_so_often(cloud):
    cloud.plan("ends", 1, 137, 1, 0)
    done = cloud.run("tpu.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 1 and "giving up" in done.stderr
    assert len(trainings(cloud)) == 3 and not (cloud.folder / "state").exists()


def test_a_request_that_is_there_already_is_left_alone(cloud):
    """It may be another run's: not to be trained on, and not to be deleted at the end."""
    (cloud.folder / "state").write_text("ACTIVE")
    done = cloud.run("tpu.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 2 and "NAME=pathflip: a request of this name exists (ACTIVE)" in done.stderr
    assert (cloud.folder / "state").exists() and trainings(cloud) == preparations(cloud) == []
    cloud.add("gcloud", "sys.exit('ERROR: (gcloud.auth) You do not currently have an active account selected.')")
    done = cloud.run("tpu.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 2 and "cannot tell whether" in done.stderr and "active account" in done.stderr


@pytest.mark.parametrize(
    ("accelerator", "told"),
    [
        ("v6e-8", "one host, with the software v2-alpha-tpuv6e"),
        ("v5p-128", "a pod slice of several hosts, with the software v2-alpha-tpuv5"),
        ("v4-8", "one host, with the software tpu-ubuntu2204-base"),
        ("v9-8", "RUNTIME_VERSION is empty, and none is known for ACCELERATOR_TYPE=v9-8: set it"),
    ],
)
def test_what_is_taken_for_granted_is_told(cloud, accelerator, told):
    settings = SETTINGS | {"WORKDIR": "/share/run", "ACCELERATOR_TYPE": accelerator}
    done = cloud.run("tpu.sh", "--dry-run", *OPTIONS, **settings)
    assert told in done.stderr and cloud.calls() == []
    assert done.returncode == (2 if "RUNTIME_VERSION is" in told else 0)
    assert told.startswith("RUNTIME") or f"--runtime-version={told.rpartition(' ')[2]} " in done.stdout


def test_wrong_input_is_not_started_again(cloud):
    cloud.plan("ends", 2)
    assert cloud.run("tpu.sh", *OPTIONS, **SETTINGS).returncode == 2
    assert len(trainings(cloud)) == 1 and not (cloud.folder / "state").exists()


def test_a_request_that_fails_or_is_refused_counts_as_a_failure(cloud):
    cloud.plan("grants", "FAILED", "PROVISIONING")
    cloud.plan("creations", 0, 1, 0)
    done = cloud.run("tpu.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 0 and "(2 of 2)" in done.stderr
    assert len(requests(cloud, "create")) == 3 and len(trainings(cloud)) == 1


def test_preparing_fails_and_is_tried_again(cloud):
    cloud.plan("preparations", 1)
    assert cloud.run("tpu.sh", *OPTIONS, **SETTINGS).returncode == 0
    assert len(preparations(cloud)) == 2 and len(trainings(cloud)) == 1 and len(requests(cloud, "create")) == 1


def test_data_that_cannot_be_staged_is_wrong_input(cloud):
    cloud.plan("preparations", 0, 2)
    assert cloud.run("tpu.sh", *OPTIONS, **SETTINGS).returncode == 2
    assert trainings(cloud) == [] and not (cloud.folder / "state").exists()


def test_ending_the_script_deletes_the_request(cloud):
    cloud.plan("ends", "waits")
    process = cloud.start("tpu.sh", *OPTIONS, **SETTINGS)
    deadline = time.monotonic() + 30
    while not (cloud.folder / "waiting").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)  # also means that the ssh to the hosts has ended
    assert process.returncode == 130 and not (cloud.folder / "state").exists()


def test_a_pod_slice_needs_a_folder_and_finds_its_hosts(cloud):
    settings = SETTINGS | {"ACCELERATOR_TYPE": "v5litepod-64"}
    done = cloud.run("tpu.sh", *OPTIONS, **settings)
    assert done.returncode == 2 and "give a folder that PREPARE mounts on all of them, or --config" in done.stderr
    assert cloud.calls() == []
    settings |= {"WORKDIR": "/share/runs/base", "PREPARE": "sudo mount -t nfs 10.0.0.2:/share /share"}
    assert cloud.run("tpu.sh", *OPTIONS, **settings).returncode == 0
    commands = [call[-1] for call in cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh")]
    assert commands[0] == "--command=sudo mount -t nfs 10.0.0.2:/share /share"
    assert commands[-1].startswith("--command=PATHFLIP_DISTRIBUTED=1 ")
    assert trainings(cloud)[0][-1] == commands[-1]
