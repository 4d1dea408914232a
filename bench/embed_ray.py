"""What a Ray cluster of one node on this machine adds to `lraee embed`.

    python -m bench.embed_ray --count 400 --count 2000

Each count is embedded in this process and by one actor of Ray on the same CPUs; their difference
gives milliseconds a photo, the rest is the start: the node, the actor and its model.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import ray
import typer
from ray.cluster_utils import Cluster

from bench.embed_memory import library
from bench.environment import describe
from lraee.data.sources import Limits
from lraee.serving import ray as on_ray
from lraee.serving.embed import run
from lraee.serving.embed_model import Choice, PhotoModel
from lraee.serving.listing import open_listing
from lraee.serving.output import Output


def seconds_here(model: PhotoModel, photos: Path, out: Path) -> float:
    """Of `lraee embed` with an open model."""
    start = time.perf_counter()
    with Output(out) as output:
        run(open_listing([str(photos)], Limits()), model, output, progress=False)
    return time.perf_counter() - start


def seconds_on_ray(job: on_ray.Job, out: Path) -> float:
    """Of starting a node, embedding on it and stopping it."""
    start = time.perf_counter()
    small = {"node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": job.cpus, **small})
    try:
        with Output(out) as output:
            on_ray.run(job, output, address=cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return time.perf_counter() - start


def main(
    count: Annotated[list[int] | None, typer.Option(min=1, help="Photos; twice.")] = None,
    model: str = "lraee-tiny",
) -> None:
    """Print seconds here and on Ray for each count, then milliseconds a photo."""
    typer.echo("  ".join(f"{key} {value}" for key, value in describe().items()))
    choice, counts = Choice(model, "bench"), sorted(count or [400, 2000])
    opened = PhotoModel(choice)
    here, there = [], []
    for photos in counts:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            library(root / "photos", photos)
            cpus = len(os.sched_getaffinity(0))
            job = on_ray.Job((str(root / "photos"),), choice, Limits(), opened.settings, cpus=cpus)
            here.append(seconds_here(opened, root / "photos", root / "here"))
            there.append(seconds_on_ray(job, root / "there"))
        typer.echo(f"{photos:6d} photos  here {here[-1]:7.1f} s  on Ray {there[-1]:7.1f} s")
    if len(counts) > 1:
        more = counts[-1] - counts[0]
        each = [1e3 * (times[-1] - times[0]) / more for times in (here, there)]
        typer.echo(f"a photo: here {each[0]:.2f} ms, on Ray {each[1]:.2f} ms")


if __name__ == "__main__":
    typer.run(main)
