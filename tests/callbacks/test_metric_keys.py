import re
from pathlib import Path

import callbacks as package
from fingpt_lightning.modules import LanguageModelingModule

_DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def _promised(kind: type) -> set[str]:
    assert kind.__doc__
    return set(re.findall(r"``([a-z]+/(?:TASK/)?[a-z0-9_]+)``", kind.__doc__))


def test_the_document_and_the_docstrings_name_the_same_keys() -> None:
    sections = re.split(r"^## .*`(?:callbacks\.)?(\w+)`.*$", _DOCUMENT.read_text(), flags=re.M)
    kinds = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert kinds.keys() == {
        "LanguageModelingModule",
        "CompressionMonitor",
        "FinancialEvaluation",
        "MemoryMonitor",
        "PipelineTrace",
        "RunSummary",
        "ThroughputMonitor",
    }
    for name, section in kinds.items():
        kind = getattr(package, name, LanguageModelingModule)
        documented = set(re.findall(r"`([a-z]+/(?:TASK/)?[a-z0-9_]+)`", section))
        assert documented == _promised(kind) - ({"val/loss"} if name == "RunSummary" else set())
        assert documented


def test_a_class_path_finds_every_callback_in_the_package() -> None:
    for name in (
        "CompressionMonitor",
        "FinancialEvaluation",
        "MemoryMonitor",
        "RunSummary",
        "ThroughputMonitor",
    ):
        assert getattr(package, name).__name__ == name
    assert package.DISTRIBUTION == "fingpt-lightning"
