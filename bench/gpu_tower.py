"""Whole image towers on a GPU: INT8 as it is called, beside torch in float16 or float32.

    python -m bench.gpu_tower --tower ViT-B-32 --batch 1 --batch 8 --batch 32 --batch 128

Weights are random: time does not depend on them. torch is timed as it is called and as a CUDA
graph, INT8 as it is called, which replays graphs of its own. Rounds are interleaved, in one process
(lraee.diagnostics.selftest_timing.cuda_interleaved). Beside the times stands what they must not
cost: the centred cosine of the INT8 embeddings with those of float32, and whether an image has the
same bits alone.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import lraee
from lraee.diagnostics.selftest_timing import captured, cuda_interleaved
from lraee.measurement import machine
from lraee.towers.families import tower_spec
from lraee.zoo.opening import open_model

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def centred_cosine(actual: Tensor, expected: Tensor) -> float:
    """Smallest cosine over the images, the mean embedding taken off both."""
    centre = expected.mean(0)
    return float(nn.functional.cosine_similarity(actual - centre, expected - centre).min())


@torch.inference_mode()
def time_tower(name: str, dtype: torch.dtype, batches: list[int], budget_s: float) -> None:
    """Prints agreement, then a line per batch size."""
    device = torch.device("cuda", torch.cuda.current_device())
    exact: Any = open_model(name, may_be_random=True).model.get_submodule("visual").to(device)
    base: Any = copy.deepcopy(exact).to(dtype)
    fast: Any = lraee.accelerate(base)
    size = tower_spec(exact).image_size
    images = torch.randn(max(32, *batches), 3, *size, device=device)
    few = images[:32]
    embedded = fast(few.to(dtype))
    alone = torch.cat([fast(one[None].to(dtype)) for one in few[:4]])
    cosine = centred_cosine(embedded.float(), exact(few))
    print(
        f"{name} {dtype}: cosine {cosine:.5f}, same bits alone: {torch.equal(alone, embedded[:4])}"
    )
    for B in batches:
        x = images[:B].to(dtype).contiguous()
        graph = captured(partial(base, x), device)
        calls: dict[str, Callable[[], object]] = {
            "lraee": partial(fast, x), "torch": partial(base, x), "graph": graph,
        }  # fmt: skip
        seconds = cuda_interleaved(calls, device, budget_s=budget_s)
        ms = {call: f"{1e3 * median(each):.3f} ms" for call, each in seconds.items()}
        ours = seconds["lraee"]
        ratio = {
            call: median(theirs / own for theirs, own in zip(seconds[call], ours, strict=True))
            for call in ("torch", "graph")
        }
        print(
            f"  batch {B}: lraee int8 {ms['lraee']}; torch {ms['torch']} ({ratio['torch']:.2f}x),"
            f" as a CUDA graph {ms['graph']} ({ratio['graph']:.2f}x)",
            flush=True,
        )


def main(
    tower: Annotated[list[str], typer.Option()] = ["ViT-B-32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option()] = [1, 8, 32, 128],  # noqa: B006
    dtype: Annotated[str, typer.Option(help=", ".join(TYPES))] = "float16",
    budget_s: Annotated[float, typer.Option(help="For each line.")] = 2.0,
) -> None:
    """Print the table."""
    if dtype not in TYPES:
        sys.exit(f"gpu_tower: dtype must be one of {', '.join(TYPES)}, got {dtype!r}")
    if not torch.cuda.is_available():
        sys.exit("gpu_tower: needs an NVIDIA GPU, torch sees none")
    print(torch.cuda.get_device_name(), machine.describe()["versions"])
    for name in tower:
        time_tower(name, TYPES[dtype], batch, budget_s)


if __name__ == "__main__":
    typer.run(main)
