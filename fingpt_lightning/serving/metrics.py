"""What the server has done, as Prometheus reads it."""

from dataclasses import asdict

import psutil

from fingpt_lightning.serving.engine import Engine

_COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were run.",
    "new_tokens": "Tokens that were written.",
    "steps": "Steps of the batch, of one token for each of its texts.",
    "labelled_rows": "Rows that were labelled.",
    "finished": "Requests that were answered.",
    "failed": "Requests that failed after they were taken.",
}


def metrics_text(engine: Engine) -> str:
    """The counters and gauges of an engine.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats/.
    """
    counts = asdict(engine.counts)
    rows = [(f"{name}_total", "counter", text, counts[name]) for name, text in _COUNTERS.items()]
    rows += [
        ("waiting", "gauge", "Requests that wait.", engine.num_waiting),
        ("running", "gauge", "Texts that are being written.", engine.num_running),
        ("cache_bytes", "gauge", "Bytes of keys and values.", engine.cache_bytes()),
        ("memory_bytes", "gauge", "Resident memory.", psutil.Process().memory_info().rss),
    ]
    lines = []
    for name, kind, text, value in rows:
        full = f"fingpt_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"
