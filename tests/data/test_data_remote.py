"""Shards written to object storage and streamed from it: a small server speaks as much S3 as that takes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from corpus import encoded, make_source, photo, talk
from tiny_data import make_image_processor, make_tokenizer

from hive_ds.config import DataConfig
from hive_ds.data.convert import convert
from hive_ds.data.convert_options import ConvertOptions
from hive_ds.data.loader import build_loader
from hive_ds.data.sources.llava import LlavaSource
from hive_ds.errors import HiveError, OutsideError

pytest.importorskip("streaming", reason="needs mosaicml-streaming: pip install 'hive-ds[streaming]'")


class Bucket(BaseHTTPRequestHandler):
    """PUT, GET and HEAD of objects, kept in memory in the order of their upload."""

    objects: dict[str, bytes] = {}  # noqa: RUF012 (one bucket a server, and one server a test)

    def do_PUT(self) -> None:
        self.objects[self.path.split("?")[0]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_HEAD(self) -> None:
        self._send(body=False)

    def do_GET(self) -> None:
        self._send(body=True)

    def _send(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.count("/") < 2:  # the bucket itself
            self._answer(200, b"")
        elif path in self.objects:
            self._answer(200, self.objects[path], body=body)
        else:
            self._answer(404, b"")

    def _answer(self, status: int, data: bytes, *, body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Objects of a fresh server that S3 clients of this process reach."""
    Bucket.objects = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield Bucket.objects
        server.shutdown()


def test_converted_to_and_trained_from_object_storage(
    bucket: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(12):
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(photo(seed=number), "png"))
        rows.append(
            {"id": str(number), "image": f"{number}.png", "conversations": talk("<image>", f"Number {number}.")}
        )
    (tmp_path / "data.json").write_text(json.dumps(rows))
    source = LlavaSource("data.json", "images")
    options = ConvertOptions(workers=2, part_size=5)
    convert(source, "s3://store/data", options)
    convert(source, "local", options)
    assert not list(tmp_path.glob(".hive*"))
    local = {f"/store/data/{path.relative_to('local')}": path.read_bytes() for path in Path("local").rglob("*.*")}
    assert bucket == local
    assert list(bucket)[-1] == "/store/data/index.json"

    def ids(train: str) -> list[str]:
        data = DataConfig(train=train, cache="cache", num_workers=0, shuffle=False)
        loader = build_loader(
            data, make_tokenizer("llama3"), make_image_processor(), micro_batch_size=2, global_batch_size=4, seed=0,
            train=True,
        )  # fmt: skip
        return [id for _, batch in zip(range(6), loader, strict=False) for id in batch.sample_ids]

    assert ids("s3://store/data") == ids("local") == [str(n) for n in range(12)]
    with pytest.raises(HiveError, match=r"^output s3://store/data/: is a folder of shards already; name a new one or"):
        convert(source, "s3://store/data/", ConvertOptions(limit=3))
    assert bucket == local
    assert not list(tmp_path.glob(".hive*"))


def test_killed_when_all_was_uploaded_is_done(
    bucket: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own index is no other data set's."""
    monkeypatch.chdir(tmp_path)
    source, options, removed = make_source(tmp_path), ConvertOptions(workers=1), shutil.rmtree

    def killed(folder: Path, **options: Any) -> None:
        if "/store/data/index.json" in bucket:
            raise KeyboardInterrupt
        removed(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hive_ds.data.convert.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, "s3://store/data", options)
    before = dict(bucket)
    assert convert(source, "s3://store/data", options).samples == 59
    assert bucket == before
    assert not list(tmp_path.glob(".hive*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cloud_that_takes_nothing_is_one_line(
    workers: int, bucket: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the conversion goes on when it does."""
    monkeypatch.chdir(tmp_path)
    source, options = make_source(tmp_path), ConvertOptions(workers=workers, part_size=30)
    with monkeypatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        message = (
            r"^output s3://store/data/part-0000\d: cannot be uploaded to \(EndpointConnectionError: .*\); what is done"
        )
        with pytest.raises(OutsideError, match=message):
            convert(source, "s3://store/data", options)
    assert convert(source, "s3://store/data", options).samples == 59
    assert list(bucket)[-1] == "/store/data/index.json"
    with pytest.raises(
        HiveError, match=r"^output file:///x: expected a folder, or a URL that starts with s3://, gs://"
    ):
        convert(source, "file:///x", options)
    assert not list(tmp_path.glob(".hive*"))
