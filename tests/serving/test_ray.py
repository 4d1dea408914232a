"""Embedding on a real cluster of two nodes on this machine, one of which is killed."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lraee.data.sources import Limits
from lraee.serving.embed import run as run_here
from lraee.serving.embed_model import Choice, PhotoModel
from lraee.serving.listing import open_listing
from lraee.serving.output import Output
from tests.image_files import encoded
from tests.serving.fake_encoder import contents

CHOICE = Choice("lraee-tiny", "0")


def photos(root: Path, count: int) -> Path:
    """Photos, of which one in nine is none."""
    root.mkdir()
    for i in range(count):
        data = b"nothing" if i % 9 == 4 else encoded(i % 40, size=(320, 240))
        (root / f"{i:04d}.jpg").write_bytes(data)
    return root


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs for actors and two nodes, each with an object store of its own."""
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


@pytest.mark.slow
def test_a_killed_node_changes_nothing(tmp_path: Path, cluster: Any) -> None:
    from lraee.serving import ray as on_ray

    nodes, second = cluster
    root = photos(tmp_path / "photos", 1200)
    model = PhotoModel(CHOICE)
    with Output(tmp_path / "here") as output:
        run_here(open_listing([str(root)], Limits()), model, output, part_rows=50, progress=False)
    job = on_ray.Job((str(root),), CHOICE, Limits(), model.settings, batch=8)
    killed = threading.Event()

    def kill() -> None:
        while not list((tmp_path / "there").glob("part-*")):
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with Output(tmp_path / "there") as output:
        totals = on_ray.run(job, output, address=nodes.address, actors=2, part_rows=50)
    assert killed.is_set()
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert totals.skipped.total() == 133 and totals.embedded == 1200 - 133
    (tmp_path / "there" / "part-00003.parquet").unlink()
    with Output(tmp_path / "there") as output:
        again = on_ray.run(job, output, address=nodes.address, actors=1, part_rows=50)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert again.resumed > 0 and again.resumed + again.embedded == totals.embedded
