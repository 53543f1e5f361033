"""The JobSet and the XPK workload: manifests that the API knows, with the answers to stops, lost nodes, wrong input."""

import re
import subprocess

import pytest
import yaml

SETTINGS = {
    "IMAGE": "registry/pathflip:1", "DATA": "s3://lab/cohort", "WORKDIR": "/share/runs/base", "SHARED_CLAIM": "claim",
    "NAME": "base", "NODES": "3", "NODE_SELECTOR": "cloud.google.com/gke-tpu-topology=4x4 pool=a100",
}  # fmt: skip
# Words that YAML would read as something else.
OPTIONS = ["--config", "align_base", "--config.data.texts=it's: #1 {reports}.jsonl", "yes", "1e3"]

KUBECTL = """
if argv[:2] == ["config", "current-context"]:
    sys.exit(print("the lab's cluster"))
(HERE / "manifest").write_text(sys.stdin.read())
"""


@pytest.fixture
def manifest(stand_ins):
    stand_ins.add("kubectl", KUBECTL)
    done = stand_ins.run("jobset.sh", *OPTIONS, **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert stand_ins.calls()[-1] == ["kubectl", "create", "--validate=strict", "--filename=-"]
    text = (stand_ins.folder / "manifest").read_text()
    printed = stand_ins.run("jobset.sh", "--dry-run", *OPTIONS, **SETTINGS).stdout
    assert text in printed and yaml.safe_load(printed) == yaml.safe_load(text)
    return yaml.safe_load(text)


@pytest.fixture
def pods(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def test_the_api_knows_every_field_and_type(manifest):
    """The models are Kubeflow's, generated from the JobSet and Kubernetes APIs; what they do not know, they drop."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


def what_follows(manifest, pod_failure: dict) -> str:
    """The JobSet's action for a failed pod, as Job and JobSet controllers find it.

    Rules in order, the first that matches; a Job says which of its rules ended it.
    """
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        assert rule["action"] == "FailJob"
        if codes and "containerName" not in codes and pod_failure.get("code") in codes["values"]:
            message = f"Container stage for pod ns/pod failed with exit code {pod_failure['code']}"
        elif not any(row == {"type": pod_failure.get("condition"), "status": "True"} for row in conditions):
            continue
        else:
            message = f"Pod ns/pod has condition {pod_failure['condition']}"
        reason, message = "PodFailurePolicy", f"{message} matching FailJob rule at index {index}"
        break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("pod_failure", "action"),
    [
        ({"code": 75}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"condition": "DisruptionTarget", "code": 143}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 2}, "FailJobSet"),
        ({"code": 1}, "RestartJobSet"),
        ({"code": 137}, "RestartJobSet"),
        ({"code": 12}, "RestartJobSet"),
    ],
)
def test_what_follows_a_failed_pod(manifest, pod_failure, action):
    assert what_follows(manifest, pod_failure) == action
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 20


def test_pods_meet_at_the_first_ones_name_once_all_have_staged(manifest, pods):
    assert pods["completionMode"] == "Indexed" and pods["completions"] == pods["parallelism"] == 3
    network = manifest["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "publishNotReadyAddresses": False}
    (stage,), (train,) = (pods["template"]["spec"][kind] for kind in ("initContainers", "containers"))
    assert stage["args"] == ["stage"] and train["args"] == ["train", *OPTIONS]
    assert stage["env"] == train["env"] and stage["volumeMounts"] == train["volumeMounts"]
    environment = {row["name"]: row.get("value") for row in train["env"]}
    # <JobSet>-<replicated job>-<job index>-<pod index>.<JobSet>
    names = [f"base-worker-0-{number}.base" for number in range(3)]
    assert environment["COORDINATOR"] == f"{names[0]}:8476" and environment["PROCESSES"] == "3"
    assert environment["WAIT_FOR"].split() == names
    (process,) = (row["valueFrom"] for row in train["env"] if row["name"] == "PROCESS")
    (launch,) = (row["valueFrom"] for row in train["env"] if row["name"] == "LAUNCH_ID")
    assert launch == {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert process == index


def test_what_a_pod_is_given(pods):
    pod = pods["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "4x4", "pool": "a100"}
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    mounts = {row["name"]: row["mountPath"] for row in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"local": "/var/tmp/pathflip", "shm": "/dev/shm", "share": "/share"}
    assert {row["name"] for row in pod["volumes"]} == set(mounts) and pod["terminationGracePeriodSeconds"] == 300


def test_the_cluster_is_named_or_told(stand_ins):
    stand_ins.add("kubectl", KUBECTL)
    assert "kubectl's current context: the lab's cluster" in stand_ins.run("jobset.sh", *OPTIONS, **SETTINGS).stderr
    done = stand_ins.run("jobset.sh", *OPTIONS, **SETTINGS, CONTEXT="other")
    assert "current context" not in done.stderr and stand_ins.calls()[-1][:3] == [
        "kubectl",
        "--context=other",
        "create",
    ]


def test_one_pod_may_keep_its_run_on_a_bucket(stand_ins):
    settings = SETTINGS | {"NODES": "1", "WORKDIR": "gs://lab/runs/base", "SHARED_CLAIM": "", "NODE_SELECTOR": ""}
    printed = stand_ins.run("jobset.sh", "--dry-run", *OPTIONS, **settings).stdout
    pod = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {} and len(pod["volumes"]) == 2
    assert "aws s3 sync" in printed and "gcloud storage rsync" in printed  # data and run, as each pod copies them


def test_xpk_restarts_after_a_stop_and_a_lost_host(stand_ins):
    stand_ins.add("xpk", "sys.exit(int(next_line('ends', '0')))")
    settings = {
        "PROJECT": "lab", "ZONE": "us-west4-a", "CLUSTER": "pods", "IMAGE": "registry/pathflip:1",
        "DATA": "gs://lab/cohort", "WORKDIR": "/share/runs/base",
    }  # fmt: skip
    assert stand_ins.run("xpk.sh", *OPTIONS, **settings).returncode == 0
    (call,) = stand_ins.calls("xpk", "workload", "create")
    assert {"--restart-on-exit-codes=1,75", "--max-restarts=100", "--tpu-type=v5litepod-256", "--spot"} <= set(call)
    # Its command, read by a shell with a stand-in for the script in the image.
    command = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    stand_ins.add("worker.sh", "(HERE / 'data').write_text(os.environ['DATA'] + os.environ['PATHFLIP_DISTRIBUTED'])")
    subprocess.run(["bash", "-c", command.replace("/opt/pathflip/launch", str(stand_ins.folder))], check=True)
    assert stand_ins.calls("worker.sh") == [["worker.sh", "stage"], ["worker.sh", "train", *OPTIONS]]
    assert (stand_ins.folder / "data").read_text() == "gs://lab/cohort1"
    stand_ins.plan("ends", 3)
    assert stand_ins.run("xpk.sh", *OPTIONS, **settings).returncode == 3
