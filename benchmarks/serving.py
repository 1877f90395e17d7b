"""How much faster does a server answer many clients than one request after the other?

Starts ``fingpt serve`` with a model and adapters made for the purpose, and asks it for texts that
go on from rows of FPB, each of the base or of an adapter in turn: one request at a time, then by
many clients at once. The answers of both are compared with each other and with those that
`fingpt_lightning.deploy.generation.complete` writes one by one. Then a server with a short queue is
overloaded, and one is ended while it works: what they have accepted has to be answered.
"""

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.generation import Prompt, complete
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt, adapted_layers, save_adapter
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.units import MIB

QUESTION = (
    "How much faster does a server answer many clients with mixed adapters than one request after"
    " the other, are the answers the same, and what happens to requests when it is too much?"
)
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Answer:
    """What came of a request: status, text and seconds."""

    status: int
    text: str
    seconds: float


class Server:
    """A ``fingpt serve`` of its own process.

    Args:
        model: Path of the model.
        adapters: Paths of its adapters, by name.
        options: Further options.
    """

    def __init__(self, model: str, adapters: Mapping[str, Path], *options: str) -> None:
        named = ",".join(f"{name}={path}" for name, path in adapters.items())
        words = ["serve", "--model", model, "--name", "base", "--adapters", named, "--port", "0"]
        command = [sys.executable, "-m", "fingpt_lightning", *words, "--chat_template", "none"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"at (http://\S+)/v1", line):
                self.url = found[1]
                return
        raise RuntimeError(f"fingpt serve ended with status {self.process.wait()}")

    def metric(self, name: str) -> float:
        """A counter or gauge of the server."""
        text = httpx.get(f"{self.url}/metrics", timeout=_TIMEOUT_S).text
        found = re.search(rf"^fingpt_{name} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    def ask(self, client: httpx.Client, body: Mapping[str, Any]) -> Answer:
        """The answer to one request."""
        started_s = time.perf_counter()
        try:
            made = client.post(f"{self.url}/v1/completions", json=body)
        except httpx.TransportError:
            return Answer(0, "", time.perf_counter() - started_s)
        text = made.json()["choices"][0]["text"] if made.status_code == 200 else ""
        return Answer(made.status_code, text, time.perf_counter() - started_s)

    def ask_all(self, bodies: Sequence[Mapping[str, Any]], num_clients: int) -> list[Answer]:
        """The answers to requests of several clients, each of which asks one after the other."""
        answers: list[Answer | None] = [None] * len(bodies)
        places = itertools.count()

        def client() -> None:
            # One per client of the server: it takes as long to make as several short requests.
            with httpx.Client(timeout=_TIMEOUT_S) as own:
                while (place := next(places)) < len(bodies):
                    answers[place] = self.ask(own, bodies[place])

        threads = [threading.Thread(target=client) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answer for answer in answers if answer is not None]

    def end(self) -> int:
        """Asks the server to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_TIMEOUT_S)


@contextmanager
def _running(*arguments: Any) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data_dir", type=Path, required=True, help="with fpb/validation.jsonl")
    parser.add_argument("--num_requests", type=int, default=2000)
    parser.add_argument("--num_clients", type=int, default=64)
    parser.add_argument("--num_single", type=int, default=64, help="requests one at a time")
    parser.add_argument("--max_tokens", type=int, default=16)
    parser.add_argument("--num_adapters", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    config = {key: value for key, value in vars(options).items() if key not in ("json", "data_dir")}
    record = new_record(QUESTION, config)
    with tempfile.TemporaryDirectory() as folder:
        adapters = _made_adapters(options, Path(folder))
        bodies = _bodies(options, list(adapters))
        singles = bodies[: options.num_single]
        batch = ("--batch_size", str(options.num_clients))
        with _running(options.model, adapters, *batch) as server:
            server.ask_all(singles[:2], 1)  # kernels are chosen, memory is taken
            started_s = time.perf_counter()
            alone = server.ask_all(singles, 1)
            alone_s = time.perf_counter() - started_s
            server.ask_all(bodies[: len(bodies) // 10], options.num_clients)
            memory = server.metric("memory_bytes")
            started_s = time.perf_counter()
            together = server.ask_all(bodies, options.num_clients)
            together_s = time.perf_counter() - started_s
            grown = server.metric("memory_bytes") - memory
            cache = server.metric("cache_bytes")
            is_ended = server.end() == 0
        written = _written(options, adapters, singles)
        with _running(options.model, adapters, "--max_queue", "4", "--batch_size", "4") as server:
            crowd = server.ask_all(bodies[: 4 * options.num_clients], options.num_clients)
            overloaded = {str(status): _count(crowd, status) for status in (200, 503)}
            num_failed = server.metric("failed_total")
        killed = _killed(options, adapters, bodies[: options.num_clients])
    rates = {"one at a time": len(alone) / alone_s, "all clients": len(together) / together_s}
    record["rows"] = [
        {
            "contender": name,
            "requests": len(answers),
            "requests_per_s": rates[name],
            "seconds_per_request": spread([answer.seconds for answer in answers]),
            "statuses": {str(s): _count(answers, s) for s in {a.status for a in answers}},
        }
        for name, answers in (("one at a time", alone), ("all clients", together))
    ]
    record["overloaded"], record["ended_amid_requests"] = overloaded, killed
    texts = [answer.text for answer in together[: len(singles)]]
    record["summary"] = {
        "throughput_ratio": rates["all clients"] / rates["one at a time"],
        "num_errors": len(together) - _count(together, 200),
        "same_as_one_at_a_time": sum(
            a.text == b for a, b in zip(alone, texts, strict=True)
        ) / len(singles),
        "same_as_generate": sum(a == b for a, b in zip(written, texts, strict=True)) / len(singles),
        "memory_growth_mib": grown / MIB,
        "cache_mib": cache / MIB,
        "has_ended_with_status_0": is_ended,
        "overloaded_lost": len(crowd) - sum(overloaded.values()) + int(num_failed),
    }  # fmt: skip
    write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def _made_adapters(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Adapters with random factors, strong enough to change the texts."""
    network = load_model(options.model).network
    adapt(network, AdapterOptions(options.rank))
    found = {}
    for number in range(options.num_adapters):
        torch.manual_seed(number)
        with torch.no_grad():
            for layer in adapted_layers(network).values():
                torch.nn.init.normal_(layer.lora_B, std=0.02)
        name = f"client{number}"
        found[name] = folder / name
        save_adapter(network, found[name], str(Path(options.model).resolve()))
    return found


def _bodies(options: argparse.Namespace, adapters: Sequence[str]) -> list[dict[str, Any]]:
    lines = (options.data_dir / "fpb" / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    texts = [str(row.get("sentence", row.get("text"))) for row in rows]
    models = itertools.cycle(["base", *adapters])
    return [
        {
            "model": next(models),
            "prompt": texts[number % len(texts)],
            "max_tokens": options.max_tokens,
            "temperature": 0,
        }
        for number in range(options.num_requests)
    ]


def _written(
    options: argparse.Namespace, adapters: Mapping[str, Path], bodies: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What ``fingpt generate`` writes to the same prompts, one by one."""
    loaded = load_model(options.model)
    tokenizer = loaded.require_tokenizer()
    use_chat_template(tokenizer, None)
    bank = AdapterBank(loaded.network)
    for name, path in adapters.items():
        bank.load(name, path)
    found = []
    for body in bodies:
        prompt = Prompt(body["prompt"], None if body["model"] == "base" else body["model"])
        ((_, made),) = complete(loaded.network, tokenizer, [prompt], body["max_tokens"], bank=bank)
        found.append(made.text)
    return found


def _killed(
    options: argparse.Namespace, adapters: Mapping[str, Path], bodies: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """What comes of requests of which a server has accepted a part when it is asked to end."""
    with _running(options.model, adapters) as server:
        answers: list[Answer] = []
        asking = threading.Thread(
            target=lambda: answers.extend(server.ask_all(bodies, len(bodies)))
        )
        asking.start()
        while server.metric("new_tokens_total") == 0:
            time.sleep(0.01)
        status = server.end()
        asking.join()
    return {
        "answered": _count(answers, 200),
        "refused": _count(answers, 503) + _count(answers, 0),
        "lost": len(answers) - sum(_count(answers, s) for s in (200, 503, 0)),
        "exit_status": status,
    }


def _count(answers: Sequence[Answer], status: int) -> int:
    return sum(answer.status == status for answer in answers)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table."""
    header = ["", "requests", "requests per s", "s per request (p10-p90)", "statuses"]
    return markdown_table(
        header,
        [
            [
                row["contender"],
                f"{row['requests']:,}",
                f"{row['requests_per_s']:.2f}",
                "{median:.2f} ({p10:.2f}-{p90:.2f})".format(**row["seconds_per_request"]),
                ", ".join(f"{status}: {count:,}" for status, count in row["statuses"].items()),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
