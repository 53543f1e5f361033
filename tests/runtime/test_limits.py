"""Resource limits of a job: the control groups above it, as Slurm, systemd and containers arrange them."""

import os

import pytest

from pathflip_jax.runtime import limits

GB = 2**30
SLURM_JOB = "system.slice/slurmstepd.scope/job_77/step_0/user/task_0"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 GB and 16 processors, whose /proc and /sys hold what a test writes."""
    monkeypatch.setattr(limits, "_SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {60 * GB // 1024} kB\n")
    return write


def groups(machine, hierarchy, path, files):
    """Write the files of the group at `path` of a hierarchy; what a file says is put together from its lines."""
    for name, text in files.items():
        machine(f"sys/fs/cgroup/{hierarchy}/{path}/{name}", f"{text}\n")


def test_a_machine_without_groups_is_its_own_limit(machine):
    assert (limits.memory_limit(), limits.available_memory(), limits.processors()) == (64 * GB, 60 * GB, 16)


def test_the_limit_of_a_job_lies_between_its_own_group_and_the_root(machine):
    machine("proc/self/cgroup", f"0::/{SLURM_JOB}\n")
    unlimited = {"memory.max": "max", "memory.current": GB, "cpu.max": "max 100000"}
    groups(machine, "", SLURM_JOB, unlimited)
    groups(machine, "", "system.slice", unlimited)
    job = {"memory.max": 8 * GB, "memory.current": 3 * GB, "memory.stat": f"anon {2 * GB}\ninactive_file {GB}"}
    groups(machine, "", "system.slice/slurmstepd.scope/job_77", job | {"cpu.max": "350000 100000"})
    assert (limits.memory_limit(), limits.available_memory(), limits.processors()) == (8 * GB, 6 * GB, 4)
    # The group that throttles earlier than it kills counts too, and so does one further up that is fuller.
    groups(machine, "", "system.slice/slurmstepd.scope", {"memory.max": 9 * GB, "memory.current": 8 * GB})
    groups(machine, "", SLURM_JOB, {"memory.high": 4 * GB, "memory.current": GB, "cpu.max": "50000 100000"})
    assert (limits.memory_limit(), limits.available_memory(), limits.processors()) == (4 * GB, GB, 1)


@pytest.mark.parametrize("mounted", [True, False])
def test_the_older_interface_has_a_hierarchy_for_each_controller(machine, tmp_path, mounted):
    machine("proc/self/cgroup", "9:name=systemd:/a\n5:cpu,cpuacct:/slurm/job_3\n4:memory:/slurm/job_3/step_0\n0::/\n")
    if mounted:  # elsewhere than usual
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup").rename(tmp_path / "sys/fs/old")
        line = "3{0} 25 0:3{0} / /sys/fs/old/{1} rw,nosuid - cgroup  rw,{1}\n"
        machine(
            "proc/self/mountinfo",
            "24 1 0:2 / /tmp rw - tmpfs  rw\n" + line.format(1, "memory") + line.format(2, "cpu,cpuacct"),
        )
    place = "../old/" if mounted else ""
    whole = {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 30 * GB}
    groups(machine, f"{place}memory", "", whole)
    job = {
        "memory.limit_in_bytes": 2 * GB,
        "memory.usage_in_bytes": GB,
        "memory.stat": f"total_inactive_file {GB // 2}",
    }
    groups(machine, f"{place}memory", "slurm/job_3", job)
    groups(machine, f"{place}memory", "slurm/job_3/step_0", whole)
    groups(machine, f"{place}cpu,cpuacct", "", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    groups(machine, f"{place}cpu,cpuacct", "slurm/job_3", {"cpu.cfs_quota_us": 200000, "cpu.cfs_period_us": 100000})
    assert (limits.memory_limit(), limits.available_memory(), limits.processors()) == (2 * GB, 3 * GB // 2, 2)


@pytest.mark.parametrize("own", ["/docker/f00", "/docker/f00/inner", "/../../elsewhere", "/not/seen/here"])
def test_a_container_sees_its_own_part_of_the_hierarchy(machine, own):
    """Its group is told from the root of the machine, or from outside its own root, and is mounted as the root."""
    machine("proc/self/cgroup", f"0::{own}\n")
    machine("proc/self/mountinfo", "31 23 0:28 /docker/f00 /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n")
    groups(machine, "", "", {"memory.max": GB, "memory.current": GB // 4})
    groups(machine, "", "inner", {"memory.max": GB // 2, "memory.current": 0})
    assert limits.memory_limit() == (GB // 2 if own.endswith("inner") else GB)


def test_affinity_limits_the_processors(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert limits.processors() == 1


def test_other_systems_than_linux_are_asked_for_their_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_SYSTEM", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (limits.memory_limit(), limits.available_memory(), limits.processors()) == (None, None, 6)
