"""`lraee embed --ray` on a real cluster of two nodes on this machine, one of which is killed."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.image_files import encoded
from tests.serving.fake_encoder import contents, rows


def photos(root: Path, count: int) -> Path:
    """Photos, of which one in nine is none."""
    root.mkdir()
    for i in range(count):
        data = b"nothing" if i % 9 == 4 else encoded(i % 40, size=(320, 240))
        (root / f"{i:04d}.jpg").write_bytes(data)
    return root


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and a second node, each with a CPU and an object store of its own."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'lraee[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), *filter(None, sys.path)]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
    small = {"node_ip_address": "127.0.0.2", "object_store_memory": 100 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, **small},
    )
    try:
        yield cluster, cluster.add_node(num_cpus=1, **small)
    finally:
        ray.shutdown()
        cluster.shutdown()


def on_ray(photos: Path, out: Path, nodes: Any, *options: str) -> dict[str, Any]:
    """What `lraee embed --ray` says that it did."""
    command = [
        sys.executable, "-m", "lraee", "embed", str(photos), "--out", str(out),
        "--ray", nodes.address, "--part-rows", "50", "--batch", "8", "--json", *options,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.slow
def test_a_killed_node_changes_nothing(tmp_path: Path, cluster: Any) -> None:
    nodes, second = cluster
    root, here, there = photos(tmp_path / "photos", 1200), tmp_path / "here", tmp_path / "there"
    command = [sys.executable, "-m", "lraee", "embed", str(root), "--out", str(here)]
    subprocess.run([*command, "--part-rows", "50", "--no-progress"], check=True)
    killed = threading.Event()

    def kill() -> None:
        while not list(there.glob("part-*")):
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    totals = on_ray(root, there, nodes, "--actors", "2")
    assert killed.is_set() and len(list(there.glob("part-*"))) > 20
    assert contents(there) == contents(here)
    paths = rows(there)["path"].to_pylist()
    assert len(set(paths)) == len(paths) == totals["embedded"] == 1200 - 133
    assert totals["skipped"] == 133
    (there / "part-00003.parquet").unlink()
    again = on_ray(root, there, nodes)
    assert contents(there) == contents(here)
    assert again["resumed"] > 1000 and again["resumed"] + again["embedded"] == 1200 - 133
