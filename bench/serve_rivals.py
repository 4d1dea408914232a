"""LitServe around the same encoder: python -m bench.serve_rivals litserve PORT.

For bench.serve_load. Takes OpenAI's request of one image as a data URI and answers in its shape,
with the decoding and the model that `lraee serve` runs; batches of at most 32 within 5 ms, as
there. infinity-emb brings its own command and model.
"""

import base64
import sys
from typing import Any

import litserve
import torch

from lraee.serving.encoder import ModelChoice


class Api(litserve.LitAPI):  # type: ignore[misc]
    """POST /v1/embeddings."""

    def setup(self, device: str) -> None:
        self.encoder = ModelChoice("lraee-tiny").open()

    def decode_request(self, request: dict[str, Any], **_: Any) -> torch.Tensor:
        payload = request["input"].partition(",")[2]
        return self.encoder.preprocess(base64.b64decode(payload))

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return inputs

    def predict(self, inputs: list[torch.Tensor], **_: Any) -> list[Any]:
        return self.encoder.encode("image", inputs)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any, **_: Any) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": output.embedding.tolist()}],
            "model": "lraee-tiny",
        }


def main() -> None:
    """Serve on loopback until a signal comes."""
    api = Api(max_batch_size=32, batch_timeout=0.005, api_path="/v1/embeddings")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error"
    )


if __name__ == "__main__":
    main()
