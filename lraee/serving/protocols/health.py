"""Health and metadata: /health/*, the Open Inference Protocol v2, and /metrics."""

from importlib import metadata

from starlette.responses import Response
from starlette.routing import Route

from lraee.serving.errors import ServiceError
from lraee.serving.http import Call, answer, route
from lraee.serving.service import Service


def routes(service: Service) -> list[Route]:
    """All routes of this file."""
    return [
        route(service, "/health/live", _live),
        route(service, "/health/ready", _ready),
        route(service, "/v2/health/live", _v2_live),
        route(service, "/v2/health/ready", _v2_ready),
        route(service, "/v2", _v2_server),
        route(service, "/v2/models/{model}", _v2_model),
        route(service, "/v2/models/{model}/ready", _v2_model_ready),
        route(service, "/metrics", _metrics),
    ]


async def _live(call: Call) -> Response:
    return answer({"status": "live"})


async def _ready(call: Call) -> Response:
    _require_ready(call.service)
    return answer({"status": "ready"})


async def _v2_live(call: Call) -> Response:
    return answer({"live": True})


async def _v2_ready(call: Call) -> Response:
    is_ready = call.service.is_ready
    return answer({"ready": is_ready}, 200 if is_ready else 503)


async def _v2_server(call: Call) -> Response:
    version = metadata.version("lraee")
    return answer({"name": "lraee", "version": version, "extensions": []})


async def _v2_model(call: Call) -> Response:
    model = call.service.model(call.request.path_params["model"])
    height, width = model.encoder.image_size
    image = {"name": "image", "datatype": "FP32", "shape": [-1, 3, height, width]}
    embedding = {"name": "embedding", "datatype": "FP32", "shape": [-1, model.encoder.width]}
    return answer(
        {
            "name": model.name,
            "versions": ["1"],
            "platform": "lraee",
            "inputs": [image, {"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [embedding],
        }
    )


async def _v2_model_ready(call: Call) -> Response:
    model = call.service.model(call.request.path_params["model"])
    is_ready = model.batcher.is_alive and not call.service.is_closing
    return answer({"name": model.name, "ready": is_ready}, 200 if is_ready else 503)


async def _metrics(call: Call) -> Response:
    text = call.service.metrics.render()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _require_ready(service: Service) -> None:
    if not service.is_ready:
        raise ServiceError(503, "a model's worker does not run", "not_ready", 10)
