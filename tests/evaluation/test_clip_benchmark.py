"""CLIP_benchmark's own command on a small webdataset, with the model type `lraee`."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lraee.data.photos import decode
from lraee.evaluation.clip_benchmark import load_lraee
from lraee.model.accelerate import accelerate
from lraee.zoo.opening import open_model
from tests.image_files import encoded
from tests.support import assert_same

REASON = "needs CLIP_benchmark and its numpy < 2.4: pip install 'lraee[clip-benchmark]'"
HAS_IT = (
    importlib.util.find_spec("clip_benchmark") is not None
    and np.lib.NumpyVersion(np.__version__) < "2.4.0"
)


def test_load_gives_the_int8_model_its_transform_and_tokenizer() -> None:
    model, transform, tokenizer = load_lraee("lraee-tiny", "none", None, "cpu")
    opened = open_model("lraee-tiny")
    image = decode(encoded(1))
    assert_same(transform(image), opened.preprocess(image))
    assert_same(tokenizer(["a cat"]), opened.tokenizer(["a cat"]))
    with torch.inference_mode():
        batch = transform(image)[None]
        assert_same(model.encode_image(batch), accelerate(opened.model).encode_image(batch))


def webdataset(root: Path) -> None:
    """Six photos of two classes, as CLIP_benchmark reads them."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("goldfish\nteapot")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}.")
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for i in range(6):
            for name, data in ((f"{i}.jpg", encoded(i)), (f"{i}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.skipif(not HAS_IT, reason=REASON)
def test_its_command_evaluates_the_model(tmp_path: Path) -> None:
    webdataset(tmp_path / "data")
    out = tmp_path / "result.json"
    words = (
        "eval --model_type lraee --model lraee-tiny --pretrained none --no_amp --num_workers 0"
        f" --dataset wds/local --dataset_root {tmp_path / 'data'} --output {out}"
        " --task zeroshot_classification --batch_size 4"
    )
    command = [sys.executable, "-m", "lraee.evaluation.clip_benchmark", *words.split()]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert result["model"] == "lraee-tiny" and 0 <= result["metrics"]["acc1"] <= 1
