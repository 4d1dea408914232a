"""Every protocol against a real server on loopback."""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from lraee.serving.encoder import ClipEncoder
from lraee.serving.server import create_app
from lraee.serving.settings import Settings
from tests.serving.conftest import MODEL, Running

Single = Callable[[bytes], NDArray[np.float32]]


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def error_of(response: Any, status: int) -> str:
    """The message of a refusal, which has OpenAI's shape and one line."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message: str = body["error"]["message"]
    assert "\n" not in message and "Traceback" not in response.text
    return message


# OpenAI's client


def test_openai_client_embeds_images_with_the_bits_of_a_single_call(
    client: openai.OpenAI, photo_files: dict[str, bytes], single: Single
) -> None:
    files = list(photo_files.values())
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(
            model=MODEL, input=[data_uri(data) for data in files], encoding_format=encoding,
            extra_body={"modality": "image"},
        )  # fmt: skip
        assert [row.index for row in answer.data] == list(range(len(files)))
        for row, data in zip(answer.data, files, strict=True):
            embedding: Any = row.embedding
            if encoding == "base64":
                embedding = np.frombuffer(base64.b64decode(embedding), "<f4")
            assert np.array_equal(np.array(embedding, np.float32), single(data))


def test_openai_client_embeds_texts(client: openai.OpenAI, encoder: ClipEncoder) -> None:
    texts = ["an espresso", "a photo of a tabby"]
    answer = client.embeddings.create(model=MODEL, input=texts)
    for row, text in zip(answer.data, texts, strict=True):
        expected = encoder.encode("text", [text])[0].embedding
        assert np.array_equal(np.array(row.embedding, np.float32), expected)
    # <start> an espresso <end>, <start> a photo of a tab by <end>; padding is 0
    assert answer.usage.prompt_tokens == int(encoder.opened.tokenizer(texts).count_nonzero()) >= 11
    alone = client.embeddings.create(model=MODEL, input=texts[0])
    assert alone.data[0].embedding == answer.data[0].embedding


def test_openai_client_lists_models_and_raises_its_own_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "lraee"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.embeddings.create(model="text-embedding-3-small", input="a cat")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=MODEL, input="a cat", dimensions=64)
    assert client.embeddings.create(model=MODEL, input="a cat", dimensions=256).data


def test_jina_inputs_mix_texts_and_images(
    server: Running, photo_files: dict[str, bytes], single: Single
) -> None:
    coffee = photo_files["coffee.png"]
    plain = base64.b64encode(coffee).decode()
    body = {"model": MODEL, "input": [{"text": "a cat"}, {"image": plain}]}
    with server.client() as client:
        rows = client.post("/v1/embeddings", json=body).json()["data"]
        text = client.post("/v1/embeddings", json={"model": MODEL, "input": "a cat"}).json()["data"]
    assert rows[0]["embedding"] == text[0]["embedding"]
    assert np.array_equal(np.array(rows[1]["embedding"], np.float32), single(coffee))


def test_multipart_upload(server: Running, photo_files: dict[str, bytes], single: Single) -> None:
    names = ["coffee.png", "rocket.jpg"]
    files = [("image", (name, photo_files[name])) for name in names]
    with server.client() as client:
        rows = client.post("/v1/embeddings", data={"model": MODEL}, files=files).json()["data"]
    for row, name in zip(rows, names, strict=True):
        assert np.array_equal(np.array(row["embedding"], np.float32), single(photo_files[name]))


def test_a_broken_image_harms_itself_only(
    server: Running, photo_files: dict[str, bytes], single: Single
) -> None:
    good, broken = photo_files["coffee.png"], photo_files["coffee.png"][:5000]
    inputs = [data_uri(each) for each in (good, broken, b"no image at all", good)]
    body = {"model": MODEL, "input": inputs, "modality": "image"}
    with server.client() as client:
        response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 200
    rows = response.json()["data"]
    for i in (0, 3):
        assert np.array_equal(np.array(rows[i]["embedding"], np.float32), single(good))
    assert [rows[i]["error"]["status"] for i in (1, 2)] == [422, 415]
    assert rows[1]["embedding"] == rows[2]["embedding"] == []


def test_classify_answers_as_the_model_does(
    server: Running, photo_files: dict[str, bytes], encoder: ClipEncoder, single: Single
) -> None:
    labels = ["tabby, tabby cat", "espresso", "missile"]
    files = [("image", (name, photo_files[name])) for name in ("coffee.png", "rocket.jpg")]
    with server.client() as client:
        form = {"model": MODEL, "labels": labels}
        answer = client.post("/v1/classify", data=form, files=files).json()
        again = client.post("/v1/classify", data=form, files=files).json()
    assert [row["label"] for row in answer["data"]] == ["espresso", "missile"]
    classes = np.stack([encoder.encode("class", [label])[0].embedding for label in labels])
    logits = encoder.logit_scale * (classes @ single(photo_files["coffee.png"]))
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    # one softmax of three float32 numbers, summed in the same order
    assert np.allclose(answer["data"][0]["probs"], expected, rtol=1e-6, atol=0)
    assert again == answer


# immich


def immich_form(entries: object, *, image: bytes | None = None, text: str | None = None) -> bytes:
    """The bytes that immich's server sends: undici's FormData, an image as a Blob without name."""
    boundary = "----formdata-undici-044160925712"
    parts = [f'name="entries"\r\n\r\n{json.dumps(entries)}'.encode()]
    if image is not None:
        head = 'name="image"; filename="blob"\r\nContent-Type: application/octet-stream\r\n\r\n'
        parts.append(head.encode() + image)
    if text is not None:
        parts.append(b'name="text"\r\n\r\n' + text.encode())
    head = f"--{boundary}\r\nContent-Disposition: form-data; ".encode()
    return b"".join(head + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()


def predict(server: Running, body: bytes) -> Any:
    kind = "multipart/form-data; boundary=----formdata-undici-044160925712"
    with server.client() as client:
        return client.post("/predict", content=body, headers={"content-type": kind})


def test_immich_image(server: Running, photo_files: dict[str, bytes], single: Single) -> None:
    entries = {"clip": {"visual": {"modelName": MODEL}}}
    coffee = photo_files["coffee.png"]
    answer = predict(server, immich_form(entries, image=coffee)).json()
    assert set(answer) == {"clip", "imageHeight", "imageWidth"}
    assert (answer["imageWidth"], answer["imageHeight"]) == (600, 400)
    assert isinstance(answer["clip"], str)
    assert np.array_equal(np.array(json.loads(answer["clip"]), np.float32), single(coffee))


def test_immich_text(server: Running, encoder: ClipEncoder) -> None:
    entries = {"clip": {"textual": {"modelName": MODEL, "options": {"language": "en"}}}}
    answer = predict(server, immich_form(entries, text="Ein Kaffee ☕")).json()
    assert set(answer) == {"clip"}
    expected = encoder.encode("text", ["Ein Kaffee ☕"])[0].embedding
    assert np.array_equal(np.array(json.loads(answer["clip"]), np.float32), expected)


def test_immich_ping_and_refusals(server: Running, photo_files: dict[str, bytes]) -> None:
    with server.client() as client:
        ping = client.get("/ping")
    assert ping.status_code == 200 and ping.text == "pong"
    coffee = photo_files["coffee.png"]
    faces = {"facial-recognition": {"detection": {"modelName": "buffalo_l"}}}
    error_of(predict(server, immich_form(faces, image=coffee)), 404)
    other = {"clip": {"visual": {"modelName": "ViT-B-32__openai"}}}
    error_of(predict(server, immich_form(other, image=coffee)), 404)
    mine = {"clip": {"visual": {"modelName": MODEL}}}
    error_of(predict(server, immich_form(mine, image=coffee[:3000])), 422)
    error_of(predict(server, immich_form(mine, image=b"text")), 415)
    error_of(predict(server, immich_form(mine)), 400)
    error_of(predict(server, b"--nonsense"), 400)


# Health and metadata


def test_health_and_open_inference_protocol(server: Running) -> None:
    with server.client() as client:
        paths = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
        assert [client.get(path).status_code for path in paths] == [200] * 4
        assert client.get("/v2").json()["name"] == "lraee"
        about = client.get(f"/v2/models/{MODEL}").json()
        assert about["inputs"][0]["shape"] == [-1, 3, 56, 56]
        assert about["outputs"][0]["shape"] == [-1, 256]
        assert client.get(f"/v2/models/{MODEL}/ready").json() == {"name": MODEL, "ready": True}
        error_of(client.get("/v2/models/other/ready"), 404)


def test_metrics_count_what_was_done(
    encoder: ClipEncoder, photo_files: dict[str, bytes], serve: Callable[..., Any]
) -> None:
    with serve(create_app([encoder])) as server, server.client() as client:
        files = [("image", ("x", photo_files["coffee.png"]))] * 3
        assert client.post("/v1/embeddings", data={"model": MODEL}, files=files).is_success
        error_of(client.post("/v1/embeddings", content=b"{"), 400)
        rows = dict(
            line.rsplit(" ", 1)
            for line in client.get("/metrics").text.splitlines()
            if not line.startswith("#")
        )
    assert rows['lraee_requests_total{route="/v1/embeddings",status="200"}'] == "1.0"
    assert rows['lraee_requests_total{route="/v1/embeddings",status="400"}'] == "1.0"
    assert rows["lraee_decode_seconds_count"] == "3.0"
    # two images of warming up, three of the client
    assert rows['lraee_batch_size_sum{kind="image",model="lraee-tiny"}'] == "5.0"
    assert rows['lraee_queue_depth{model="lraee-tiny"}'] == "0.0"
    assert float(rows["lraee_event_loop_cpu_seconds"]) > 0


# The token and the Host header


def test_token_guards_all_but_health(encoder: ClipEncoder, serve: Callable[..., Any]) -> None:
    app = create_app([encoder], Settings(token="correct horse"))
    with serve(app) as server, server.client() as client:
        for path in ("/ping", "/health/live", "/health/ready", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            error_of(client.get("/v1/models", headers=headers), 401)
            error_of(client.post("/v1/embeddings", headers=headers), 401)
            error_of(client.get("/metrics", headers=headers), 401)
        right = {"Authorization": "Bearer correct horse"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_other_hosts_are_refused(encoder: ClipEncoder, serve: Callable[..., Any]) -> None:
    app = create_app([encoder], Settings(allowed_hosts=("127.0.0.1", "localhost", "[::1]")))
    with serve(app) as server, server.client() as client:
        for host in ("127.0.0.1:80", "localhost", "LOCALHOST:3003", "[::1]:9"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example:80", "[::2]"):
            error_of(client.get("/v1/models", headers={"Host": host}), 421)


def test_two_models_of_one_name_are_refused(encoder: ClipEncoder) -> None:
    with pytest.raises(ValueError, match="serve: models must have different names"):
        create_app([encoder, encoder])
