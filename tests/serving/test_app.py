import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.generation import Prompt, complete
from fingpt_lightning.deploy.labelling import Columns, Labeller
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.serving.app import build_app
from fingpt_lightning.serving.engine import Engine
from fingpt_lightning.serving.served import Served
from fingpt_lightning.tasks import find_task
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.tasks.chat_templates import PLAIN

PROMPT = "Shares of Foo Corp fell"


class _Server:
    """A server of a tiny model with two adapters, in threads of this process."""

    def __init__(self, folder: Path, api_key: str | None = None, **limits: Any) -> None:
        tiny_network("llama").save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        self.network = load_model(folder / "base", dtype="float64").network
        self.tokenizer = tiny_tokenizer()
        use_chat_template(self.tokenizer, PLAIN)
        self.bank = AdapterBank(self.network)
        for client in save_clients(folder / "base", folder, 2):
            self.bank.load(client.name, client)
        self.engine = Engine(self.network, self.tokenizer, self.bank, **limits)
        served = Served(
            "base", self.network, self.tokenizer, self.engine, self.bank,
            {"fpb": find_task("fpb")}, api_key, max_body_bytes=20_000,
        )  # fmt: skip
        self.server = uvicorn.Server(
            uvicorn.Config(build_app(served), log_level="warning", lifespan="off")
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self._thread.start()
        self.engine.start()
        self._clients: list[openai.OpenAI] = []
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key: str = "any") -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        self._clients.append(made)
        return made

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.server.should_exit = True
        self._thread.join(30)
        self.engine.stop(30.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    made = _Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


def _expected(server: _Server, text: str, adapter: str | None, num_new: int) -> str:
    tokenizer = tiny_tokenizer()
    if text.startswith("chat:"):
        use_chat_template(tokenizer, PLAIN)
        text = text.removeprefix("chat:")
    prompts = [Prompt(text, adapter)]
    ((_, found),) = complete(server.network, tokenizer, prompts, num_new, bank=server.bank)
    return found.text


@pytest.mark.parametrize("model", ["base", "client0", "client1"])
def test_completions_and_chats_are_those_of_fingpt_generate(server: _Server, model: str) -> None:
    client, adapter = server.client(), None if model == "base" else model
    made = client.completions.create(model=model, prompt=PROMPT, max_tokens=9, temperature=0)
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=9, temperature=0
    )
    streamed = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    # The adapters of the bank are in use in the server's thread alone.
    while not server.engine.is_idle:
        time.sleep(0.01)
    assert made.choices[0].text == _expected(server, PROMPT, adapter, 9)
    answer = chat.choices[0].message.content
    assert answer == _expected(server, f"chat:{PROMPT}", adapter, 9)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chat.usage is not None
    assert chunks[-1].usage == chat.usage
    assert chat.usage.prompt_tokens > len(tiny_tokenizer().encode(PROMPT))


def test_several_prompts_texts_stops_and_log_probabilities(server: _Server) -> None:
    client = server.client()
    settings: dict[str, Any] = {"model": "base", "max_tokens": 6, "temperature": 0.8, "seed": 3}
    several = client.completions.create(prompt=[PROMPT, "Profit"], n=2, logprobs=2, **settings)
    again = client.completions.create(prompt=[PROMPT, "Profit"], n=2, logprobs=2, **settings)
    texts = [choice.text for choice in several.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 2
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    logprobs = several.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == texts[0]
    assert all(len(top) <= 2 for top in logprobs.top_logprobs or ())
    streamed = client.completions.create(
        prompt=[PROMPT, "Profit"], n=2, logprobs=2, stream=True, **settings
    )
    offsets: dict[int, list[int]] = {}
    for chunk in streamed:
        for choice in chunk.choices:
            found = offsets.setdefault(choice.index, [])
            found += (choice.logprobs and choice.logprobs.text_offset) or []
    assert [offsets[c.index] for c in several.choices] == [
        c.logprobs and c.logprobs.text_offset for c in several.choices
    ]
    whole = client.completions.create(model="base", prompt=PROMPT, max_tokens=9, temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:2]
    cut = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=9, temperature=0, stop=stop
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Foo"}], max_tokens=2, logprobs=True,
        top_logprobs=3, temperature=0,
    )  # fmt: skip
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert len(content.content[0].top_logprobs) == 3


def test_models_labels_health_and_metrics(server: _Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["base", "client0", "client1"]
    assert client.models.retrieve("client1").id == "client1"
    texts = ["Profit rose", "Shares of Foo fell", " "]
    found = httpx.post(
        f"{server.url}/v1/label",
        json={"model": "client1", "task": "fpb", "texts": texts},
        timeout=60,
    ).json()["data"]
    labeller = Labeller(
        server.network, tiny_tokenizer(), find_task("fpb"), Columns("text", "adapter"),
        bank=server.bank,
    )  # fmt: skip
    use_chat_template(labeller._tokenizer, PLAIN)
    rows = [{"text": text, "adapter": "client1"} for text in texts]
    for row, answer in zip(labeller.label(rows, 1), found, strict=True):
        assert answer["label"] == row["fpb_label"]
        if answer["label"] is None:
            assert answer["probabilities"] is None
        else:
            for label, probability in answer["probabilities"].items():
                assert probability == row[f"fpb_{label}"]
    assert found[2]["label"] is None
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "fingpt_labelled_rows_total 3" in metrics
    assert httpx.get(f"{server.url}/v1/tasks").json()["data"][0]["fields"] == ["text"]
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "fingpt serve" in page.text


CHAT = "chat/completions"
WRONG: list[tuple[str, Any, int, str]] = [
    ("completions", {"model": "bse", "prompt": "a"}, 404,
     "model 'bse' is none of base, client0, client1; did you mean base?"),
    ("completions", {"model": "base", "promt": "a"}, 400,
     "prompt: field required"),
    ("completions", {"model": "base", "prompt": "a", "max_tokns": 3}, 400,
     "unknown field 'max_tokns'; did you mean max_tokens?"),
    ("completions", {"model": "base", "prompt": "a", "temperature": -1}, 400,
     "temperature: input should be greater than or equal to 0 ('-1' was given)"),
    ("completions", {"model": "base", "prompt": []}, 400, "0 prompts, allowed are 1 to 256"),
    ("completions", {"model": "base", "prompt": ["a"] * 17, "n": 16}, 400,
     "17 prompts, allowed are 1 to 16"),
    ("completions", {"model": "base", "prompt": "a", "max_tokens": 1.5}, 400,
     "max_tokens: input should be a valid integer"),
    ("completions", {"model": "base", "prompt": "a", "frequency_penalty": 1}, 400,
     "frequency_penalty: input should be less than or equal to 0"),
    ("completions", {"model": "base", "prompt": "a", "max_tokens": 10**6}, 400,
     "with max_tokens 1000000 that is beyond the model's 330 positions"),
    ("completions", b"{", 400, "the body is not JSON"),
    ("completions", b"[" * 30_000, 413, "the body is larger than 20,000 bytes"),
    (CHAT, {"model": "base", "messages": []}, 400, "messages: list should have at least 1 item"),
    (CHAT, {"model": "base", "messages": [{"role": "robot", "content": "a"}]}, 400,
     "messages.0.role: input should be 'system', 'user' or 'assistant'"),
    (CHAT, {"model": "base", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
     400, "top_logprobs has no effect without logprobs"),
    ("label", {"model": "base", "task": "fbp", "texts": ["a"]}, 404,
     "no task 'fbp'; did you mean fpb?"),
    ("label", {"model": "base", "task": "fpb"}, 400, "give either texts or rows"),
    ("label", {"model": "base", "task": "fpb", "rows": [{"txt": "a"}]}, 400,
     "row 1: no column 'text'; did you mean txt?"),
    ("label", {"model": "base", "task": "fpb", "texts": ["a"] * 257}, 400,
     "texts: list should have at most 256 items"),
    ("labels", {}, 404, "POST /v1/labels: not found"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "message"), WRONG)
def test_what_is_wrong_with_a_request_is_said_in_one_line(
    server: _Server, path: str, body: Any, status: int, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/{path}", content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_null_is_left_out_and_parts_of_text_are_joined(server: _Server) -> None:
    body = {
        "model": "base", "temperature": 0, "max_tokens": 4, "n": None, "stop": None, "tools": None,
        "logprobs": None, "stream": None, "logit_bias": None,
    }  # fmt: skip
    parts = [{"type": "text", "text": "Foo"}, {"type": "text", "text": " fell"}]
    answers = [
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body | {"messages": [{"role": "user", "content": content}]},
            timeout=60,
        ).json()["choices"][0]["message"]["content"]
        for content in ("Foo fell", parts)
    ]
    assert answers[0] == answers[1]


def test_a_temperature_close_to_zero_is_greedy_and_harms_no_other(server: _Server) -> None:
    client = server.client()
    texts = [
        client.completions.create(
            model="base", prompt=PROMPT, max_tokens=5, temperature=temperature
        ).choices[0].text
        for temperature in (0, 1e-308)
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_body_without_a_length_and_a_foreign_host_are_refused(server: _Server) -> None:
    parts = (b"x" * 5_000 for _ in range(10))
    answer = httpx.post(f"{server.url}/v1/completions", content=parts, timeout=60)
    assert answer.status_code == 413
    answer = httpx.get(f"{server.url}/v1/models", headers={"Host": "elsewhere.example"})
    assert answer.status_code == 400


def test_a_key_is_asked_for_and_what_is_too_much_is_told_to_come_again(tmp_path: Path) -> None:
    server = _Server(tmp_path, "secret", max_queue=1, batch_size=1)
    try:
        for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {}):
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert httpx.get(f"{server.url}/health").status_code == 200
        client = server.client("secret")
        assert len(list(client.models.list())) == 3
        with pytest.raises(openai.BadRequestError, match="9 texts in one request, 1 may wait"):
            client.completions.create(model="base", prompt=["Foo"] * 9, max_tokens=50)
        entered, stop = threading.Event(), threading.Event()

        def hold(*_: object) -> None:
            entered.set()
            assert stop.wait(60)

        server.network.base_model.register_forward_pre_hook(hold)
        # One is run, one waits, the third is too much.
        asking = [
            threading.Thread(
                target=lambda: client.completions.create(model="base", prompt="Foo", max_tokens=2)
            )
            for _ in range(2)
        ]
        asking[0].start()
        assert entered.wait(60)
        asking[1].start()
        while server.engine.num_waiting == 0:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="base", prompt="Foo", max_tokens=2)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        assert "waiting already" in caught.value.message
        server.engine.drain()
        stop.set()
        for thread in asking:
            thread.join(60)
        with pytest.raises(openai.InternalServerError, match="about to stop"):
            client.completions.create(model="base", prompt="Foo")
        assert httpx.get(f"{server.url}/health").status_code == 503
    finally:
        server.close()
