"""What a machine has left, from a tree of files as Linux has them."""

import pytest

from minillm_jax.planning import machine

GB = 10**9


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes a file of a machine with 64 GB available."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {64 * GB // 1024} kB\n")
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    return write


def v2(tree, folder, limit, used, inactive=0):
    tree(f"sys/fs/cgroup/{folder}/memory.max", f"{limit}\n")
    tree(f"sys/fs/cgroup/{folder}/memory.current", f"{used}\n")
    stat = f"anon 5\ninactive_file {inactive}\n"
    tree(f"sys/fs/cgroup/{folder}/memory.stat", stat)


def v1(tree, folder, limit, used, inactive=0):
    root = f"sys/fs/cgroup/memory/{folder}"
    tree(f"{root}/memory.limit_in_bytes", f"{limit}\n")
    tree(f"{root}/memory.usage_in_bytes", f"{used}\n")
    stat = f"inactive_file 7\ntotal_inactive_file {inactive}\n"
    tree(f"{root}/memory.stat", stat)


def left():
    return round(machine.host().memory_bytes / GB, 3)


def test_without_groups_it_is_what_is_available(tree):
    assert left() == 64


def test_a_container_has_its_limits_at_the_root(tree):
    tree("proc/self/cgroup", "0::/\n")
    v2(tree, "", 8 * GB, 3 * GB, 1 * GB)
    assert left() == 6


@pytest.mark.parametrize(
    ("outer", "inner", "expected"), [(8, 20, 7), (20, 8, 7), ("max", 8, 7), (2, 1, 0)]
)
def test_of_nested_groups_the_one_with_the_least_left_counts(
    tree, outer, inner, expected
):
    tree("proc/self/cgroup", "0::/user.slice/job:1.scope\n")
    for folder, limit in (("user.slice", outer), ("user.slice/job:1.scope", inner)):
        v2(tree, folder, limit if limit == "max" else limit * GB, 1 * GB)
    assert left() == expected


def test_a_group_beside_ours_does_not_count(tree):
    tree("proc/self/cgroup", "0::/ours\n")
    v2(tree, "others", 2 * GB, 1 * GB)
    assert left() == 64


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_groups_of_version_1_have_limits_too(tree, controllers):
    tree("proc/self/cgroup", f"7:{controllers}:/batch/job\n3:pids:/batch\n0::/\n")
    v1(tree, "batch", 8 * GB, 4 * GB, 1 * GB)
    v1(tree, "batch/job", 9223372036854771712, 2 * GB)
    assert left() == 5


def test_a_container_of_version_1_does_not_see_its_own_folder(tree):
    tree("proc/self/cgroup", "4:memory:/docker/0123abcd\n")
    v1(tree, "", 3 * GB, 1 * GB)
    assert left() == 2
