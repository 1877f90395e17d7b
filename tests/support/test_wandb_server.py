import gzip
import http.client
import json
import textwrap
import time
from collections.abc import Iterator
from http import HTTPStatus
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import wandb_server
from tests.support.wandb_client import run_client
from tests.support.wandb_graphql import root_fields
from tests.support.wandb_server import WandbServer
from tests.support.wandb_sweeps import Json, plan_trials

_STREAM = "/files/test/p/r1/file_stream"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def _send(
    server: WandbServer, method: str, path: str, body: bytes | Iterator[bytes] = b"", **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def _query(server: WandbServer, query: str, **variables: object) -> Json:
    body = json.dumps({"query": query, "variables": variables}).encode()
    status, content = _send(server, "POST", "/graphql", body)
    assert status == HTTPStatus.OK
    answer: Json = json.loads(content)
    return answer


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), depth=st.integers(0, 3))
def test_a_grid_is_every_point_once_nested_as_written(sizes: list[int], depth: int) -> None:
    inner: Json = {f"p{axis}": {"values": list(range(size))} for axis, size in enumerate(sizes)}
    parameters = inner
    for _ in range(depth):
        parameters = {"parameters": parameters}
        parameters = {"level": parameters, "fixed": {"value": None}}
    trials = plan_trials({"method": "grid", "parameters": parameters})
    points = set()
    for trial in trials:
        for _ in range(depth):
            assert trial["fixed"] is None
            trial = trial["level"]
        assert trial.keys() == inner.keys()
        points.add(tuple(trial.values()))
    assert len(points) == len(trials) == prod(sizes)


@given(low=st.integers(-9, 9), span=st.integers(1, 9), run_cap=st.integers(1, 7))
def test_random_trials_keep_their_range_type_and_number(low: int, span: int, run_cap: int) -> None:
    parameters = {
        "whole": {"min": low, "max": low + span},
        "real": {"min": float(low), "max": float(low + span)},
        "log": {"min": 1e-4, "max": 0.1, "distribution": "log_uniform_values"},
        "one_of": {"values": ["a", None]},
    }
    config = {"method": "bayes", "run_cap": run_cap, "parameters": parameters}
    trials = plan_trials(config)
    assert len(trials) == run_cap
    assert trials == plan_trials(config)
    for trial in trials:
        assert isinstance(trial["whole"], int)
        assert low <= trial["whole"] <= low + span
        assert isinstance(trial["real"], float)
        assert low <= trial["real"] <= low + span
        assert 1e-4 <= trial["log"] <= 0.1
        assert trial["one_of"] in ("a", None)


def test_root_fields_stop_at_the_operation() -> None:
    query = "mutation M($i: In!) { make(input: {a: $i}) { ...Made } } fragment Made on P { id }"
    assert root_fields(query) == {"make": "make"}


def test_a_grid_over_a_range_is_told_to_the_client(server: WandbServer) -> None:
    config = json.dumps({"method": "grid", "parameters": {"rank": {"min": 1, "max": 9}}})
    answer = _query(server, "mutation { upsertSweep(input: {}) { sweep { name } } }", config=config)
    assert answer["errors"] == [
        {"message": "grid sweep: rank has neither value nor values"},
    ]
    assert not server.sweeps


def test_streamed_rows_overwrite_at_their_offset(server: WandbServer) -> None:
    def rows(offset: int, *values: int) -> bytes:
        lines = [json.dumps({"_step": value, "loss": value}) for value in values]
        chunk = {"offset": offset, "content": lines}
        return json.dumps({"files": {"wandb-history.jsonl": chunk}}).encode()

    _send(server, "POST", _STREAM, rows(0, 1, 2))
    _send(server, "POST", _STREAM, gzip.compress(rows(1, 5, 6)), Content_Encoding="gzip")
    assert server.runs["r1"].logged("loss") == [1, 5, 6]
    assert server.runs["r1"].state == "running"
    _send(server, "POST", _STREAM, b'{"complete": true, "exitcode": 3}')
    assert server.runs["r1"].state == "crashed"
    assert server.runs["r1"].exit_code == 3


def test_uploads_come_back(server: WandbServer) -> None:
    pieces = iter([b"one ", b"two"])
    assert _send(server, "PUT", "/upload/p/r1/a%20b.txt", pieces)[0] == HTTPStatus.OK
    assert server.files == {"/upload/p/r1/a b.txt": b"one two"}
    assert _send(server, "GET", "/upload/p/r1/a%20b.txt") == (HTTPStatus.OK, b"one two")
    assert _send(server, "GET", "/upload/p/r1/other")[0] == HTTPStatus.NOT_FOUND


def test_a_request_above_the_limit_is_refused(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_server, "_MAX_REQUEST_BYTES", 100)
    packed = gzip.compress(bytes(9999))
    assert len(packed) < 100
    refused = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert _send(server, "PUT", "/upload/big", bytes(101))[0] == refused
    assert _send(server, "PUT", "/upload/big", iter([bytes(60), bytes(60)]))[0] == refused
    assert _send(server, "PUT", "/upload/big", packed, Content_Encoding="gzip")[0] == refused
    assert _send(server, "PUT", "/upload/fits", bytes(100))[0] == HTTPStatus.OK
    assert set(server.files) == {"/upload/fits"}


def test_a_defect_of_the_server_is_raised_at_its_end() -> None:
    def break_it(server: WandbServer) -> None:
        with server, pytest.raises(http.client.RemoteDisconnected):
            _send(server, "POST", "/graphql", b"no json")

    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        break_it(WandbServer())


def test_a_connection_that_a_client_keeps_does_not_hold_up_the_end() -> None:
    with WandbServer() as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/")
        connection.getresponse().read()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    connection.close()


def test_a_real_client_logs_and_reads_back(server: WandbServer, tmp_path: Path) -> None:
    client = """
        import wandb

        run = wandb.init(project="p", id="r1", group="g", config={"rank": 4, "nested": {"a": None}})
        for step in range(3):
            run.log({"loss": 1.0 / (step + 1)})
        run.log({"table": wandb.Table(columns=["word"], data=[["profit"]])})
        artifact = wandb.Artifact("weights", type="model")
        with artifact.new_file("weights.txt") as file:
            file.write("1 2 3")
        run.log_artifact(artifact)
        run.finish()
        (seen,) = wandb.Api().runs("test/p")
        assert (seen.name, seen.state, seen.config["rank"]) == ("r1", "finished", 4)
        assert [row.get("loss") for row in seen.history(pandas=False)] == [1, 1 / 2, 1 / 3, None]
    """
    run_client(server, tmp_path, "-c", textwrap.dedent(client))
    run = server.runs["r1"]
    assert (run.state, run.exit_code, run.group) == ("finished", 0, "g")
    assert run.config == {"rank": 4, "nested": {"a": None}}
    assert run.logged("loss") == [1, 1 / 2, 1 / 3]
    assert run.summary["loss"] == 1 / 3
    (weights,) = [entry for entry in server.artifacts.values() if entry.type == "model"]
    assert (weights.name, weights.state) == ("weights", "COMMITTED")
    assert server.files[f"/upload/artifacts/{weights.id}/weights.txt"] == b"1 2 3"
    assert any(b"profit" in content for content in server.files.values())
