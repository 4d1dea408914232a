"""OpenAI's embeddings with images beside texts, the list of models, and zero-shot classification.

Images come as data URIs with `"modality": "image"` (as infinity takes them), as `{"image": …}`
beside `{"text": …}` (as Jina takes them), or as files of a multipart form.
"""

import asyncio
import base64
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.routing import Route

from lraee.serving.batching import Result
from lraee.serving.errors import ServiceError, bad_request
from lraee.serving.http import Call, answer, fields, files, route
from lraee.serving.service import ServedModel, Service

_MAX_CLASSES = 1000


def routes(service: Service) -> list[Route]:
    """All routes of this file."""
    return [
        route(service, "/v1/embeddings", _embeddings, ("POST",)),
        route(service, "/v1/models", _models),
        route(service, "/v1/models/{model}", _one_model),
        route(service, "/v1/classify", _classify, ("POST",)),
    ]


@dataclass(frozen=True)
class _Input:
    """One input: a text, an image's bytes, or where they come from."""

    kind: Literal["text", "source", "bytes"]
    value: Any


@dataclass(frozen=True)
class _Request:
    model: ServedModel
    inputs: list[_Input]
    options: dict[str, Any]

    @property
    def images(self) -> int:
        return sum(each.kind != "text" for each in self.inputs)


async def _embeddings(call: Call) -> Response:
    service = call.service
    request = await _read_request(call)
    encoding = _encoding(request)
    _check_dimensions(request)
    cost_s = service.cost_s(
        request.model, images=request.images, texts=len(request.inputs) - request.images
    )
    with service.admission.work(cost_s, inputs=len(request.inputs)):
        results = await _each(_embed(service, request.model, each) for each in request.inputs)
    tokens = sum(result.tokens for result in results if isinstance(result, Result))
    return answer(
        {
            "object": "list",
            "data": [_row(i, result, encoding) for i, result in enumerate(results)],
            "model": request.model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _classify(call: Call) -> Response:
    """Softmax over logit_scale * image @ classes: the label of each image, with its share."""
    service = call.service
    request = await _read_request(call)
    names = _labels(request.options.get("labels"))
    if request.images < len(request.inputs):
        raise bad_request('"input" must be images')
    missing = sum(name not in request.model.classes for name in set(names))
    cost_s = service.cost_s(request.model, images=request.images, classes=missing)
    with service.admission.work(cost_s, inputs=request.images + missing):
        rows = await service.class_rows(request.model, names)
        results = await _each(_embed(service, request.model, each) for each in request.inputs)
    scale = request.model.encoder.logit_scale
    data: list[dict[str, Any]] = []
    for i, result in enumerate(results):
        if isinstance(result, ServiceError):
            data.append({"index": i, "label": None, "probs": [], "error": result.as_json()})
            continue
        shares = _softmax(scale * (rows @ result.embedding))
        best = int(shares.argmax())
        row = {"index": i, "label": names[best], "probs": shares, "num_classes": len(names)}
        data.append(row if result.exit_block is None else {**row, "exit_block": result.exit_block})
    return answer({"object": "list", "data": data, "model": request.model.name, "labels": names})


async def _models(call: Call) -> Response:
    models = [_card(model) for model in call.service.models.values()]
    return answer({"object": "list", "data": models})


async def _one_model(call: Call) -> Response:
    return answer(_card(call.service.model(call.request.path_params["model"])))


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": 0, "owned_by": "lraee",
        "dimensions": model.encoder.width, "modalities": ["text", "image"],
    }  # fmt: skip


# Requests


async def _read_request(call: Call) -> _Request:
    if call.is_multipart:
        form = await call.form()
        options: dict[str, Any] = {
            key: value for key in ("encoding_format", "model") for value in fields(form, key)[:1]
        }
        options["labels"] = fields(form, "labels")
        inputs = [_Input("bytes", data) for data in await files(form, "image")]
        inputs += [_Input("text", text) for text in fields(form, "text")]
    else:
        options = call.json()
        inputs = _inputs(options.get("input"), options.get("modality", "text"))
    model = call.service.model(options.get("model"))
    most = call.service.settings.items
    if not 1 <= len(inputs) <= most:
        raise bad_request(f'"input" must have 1 to {most} inputs, got {len(inputs)}')
    return _Request(model, inputs, options)


def _inputs(value: object, modality: object) -> list[_Input]:
    if modality not in ("text", "image"):
        raise bad_request('"modality" must be "text" or "image"')
    values = value if isinstance(value, list) else [value]
    return [_input(each, is_image=modality == "image") for each in values]


def _input(value: object, *, is_image: bool) -> _Input:
    if isinstance(value, str):
        return _Input("source" if is_image else "text", value)
    if isinstance(value, dict) and len(value) == 1:
        ((key, inner),) = value.items()
        if key in ("image", "text") and isinstance(inner, str):
            return _Input("source" if key == "image" else "text", inner)
    raise bad_request(
        '"input" must be strings, {"text": …} or {"image": …}; token ids are not taken'
    )


def _encoding(request: _Request) -> str:
    encoding = request.options.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise bad_request('"encoding_format" must be "float" or "base64"')
    return str(encoding)


def _check_dimensions(request: _Request) -> None:
    dimensions, width = request.options.get("dimensions"), request.model.encoder.width
    if dimensions is not None and (isinstance(dimensions, bool) or dimensions != width):
        raise bad_request(f'"dimensions" must be {width} for {request.model.name}, or left out')


def _labels(value: object) -> list[str]:
    names = value if isinstance(value, list) else []
    are_words = all(isinstance(name, str) and name.strip() for name in names)
    if not are_words or not 1 <= len(names) <= _MAX_CLASSES:
        raise bad_request(f'"labels" must be 1 to {_MAX_CLASSES} class names')
    return names


# Answers


async def _embed(service: Service, model: ServedModel, each: _Input) -> Result:
    if each.kind == "text":
        return await service.embed(model, "text", each.value)
    data = each.value if each.kind == "bytes" else await service.image_bytes(each.value)
    return (await service.embed_image(model, data))[0]


async def _each(work: "Sequence[Awaitable[Result]] | Any") -> list[Result | ServiceError]:
    """Every result or its own error; the error itself where there is nothing else."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ServiceError):
            raise result
    errors = [result for result in results if isinstance(result, ServiceError)]
    if len(errors) == len(results):
        raise errors[0]
    return [each for each in results if isinstance(each, Result | ServiceError)]


def _row(index: int, result: Result | ServiceError, encoding: str) -> dict[str, Any]:
    """One of `data`; an input that failed has an empty embedding and its error."""
    if isinstance(result, ServiceError):
        error = {**result.as_json(), "status": result.status}
        return {"object": "embedding", "index": index, "embedding": [], "error": error}
    row: Any = result.embedding
    if encoding == "base64":
        row = base64.b64encode(result.embedding.astype("<f4").tobytes()).decode()
    extra = {} if result.exit_block is None else {"exit_block": result.exit_block}
    return {"object": "embedding", "index": index, "embedding": row, **extra}


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max())
    shares: NDArray[np.float32] = powers / powers.sum()
    return shares
