"""What a forked process needs: OpenMP's threads are not copied, so it must not wait for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_FORK = """
import os
import torch
import lraee
from tests.clip_models import make_images
from tests.small_calibration import small_clip

def answer():
    with torch.no_grad():
        return fast.encode_image(images)

assert torch.get_num_threads() == 2
{before}
child = os.fork()
if child == 0:
    {inside}
    os._exit(0 if answer().equal(expected) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
print("the same bits")
"""

_CALL = "images = make_images(9); fast = lraee.accelerate(small_clip()); expected = answer()"


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("", _CALL),
        ("torch.set_num_threads(1)\n" + _CALL, "pass"),
        (_CALL, "torch.set_num_threads(1)"),
    ],
    ids=["before torch has computed", "one thread from the start", "one thread in the child"],
)
def test_a_forked_process_answers(before: str, inside: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _FORK.format(before=before, inside=inside)], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert run.stdout.strip() == "the same bits", run.stderr
