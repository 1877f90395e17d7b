"""Short documents where benchmarks look for Federal Reserve text."""

import json
from pathlib import Path


def write_fed_text(data_dir: Path) -> None:
    """Writes ``fed_text/train.jsonl`` and ``fed_text/validation.jsonl``."""
    text = data_dir / "fed_text"
    text.mkdir(parents=True)
    documents = [f"The rate of year {year} rose by {year % 7} points." for year in range(300)]
    for name, part in (("train", documents), ("validation", documents[:4])):
        rows = [json.dumps({"text": document}) for document in part]
        (text / f"{name}.jsonl").write_text("\n".join(rows))
