"""``fingpt tokenize``: what it makes is what ``fingpt fit`` finds."""

import json
import shlex
from pathlib import Path

import pytest

from fingpt_lightning.cli.main import main
from fingpt_lightning.data import token_cache, tokenizing
from fingpt_lightning.data.synthetic_news import synthetic_news

_WORDS = ("--config", "debug_quickstart", "--data.train_files", "texts.jsonl", "--data.val_share",
          "0.3", "--trainer.accelerator", "gpu", "--trainer.devices", "8")  # fmt: skip


@pytest.fixture(autouse=True)
def _texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizing, "_BATCH_PIECES", 7)
    lines = (json.dumps({"text": item.text}) for item in synthetic_news(300, 5))
    Path("texts.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _tokenize(cache: str, *words: str) -> None:
    main(["tokenize", *_WORDS, "--data.cache_dir", cache, *words])


def _bytes(cache: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cache).glob("tokens-*")}


def test_shards_of_a_run_are_merged_to_the_cache_that_it_finds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _tokenize("whole")
    assert len(_bytes("whole")) == 4, "ids and header of the kept and the held out documents"
    assert capsys.readouterr().out.count(" tokens of ") == 2
    _tokenize("cache", "--shard", "1/2")
    with pytest.raises(SystemExit) as ended:
        _tokenize("cache", "--merge", "2")
    assert ended.value.code == 1
    said, _, command = capsys.readouterr().err.strip().partition("; run: fingpt ")
    assert said.endswith(".bin are not whole: 2 (missing)")
    main(shlex.split(command))
    # The words of a run may be given whole: what has no part in its tokens is no matter.
    _tokenize("cache", "--merge", "--trainer.max_steps", "3", "--model.rank", "null")
    assert _bytes("cache") == _bytes("whole")
    assert not list(Path("cache").glob("*.shard-*"))
    assert not Path("runs").exists()

    def refused(*_: object) -> None:
        raise AssertionError("the text is tokenized again")

    monkeypatch.setattr(token_cache, "encoded_batches", refused)
    words = ("--config", "debug_quickstart", "--data.train_files", "texts.jsonl")
    main(["fit", *words, "--data.val_share", "0.3", "--data.cache_dir", "cache",
          "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1",
          "--trainer.logger", "false"])  # fmt: skip


@pytest.mark.parametrize("merge", [("--merge",), ("--merge", "2"), ("--merge=2",)])
@pytest.mark.parametrize("workers", [("workers", "2"), ("workers=2",)])
@pytest.mark.parametrize("part", ["data", "data.init_args"])
def test_options_of_tokenizing_are_refused_beside_a_merge(
    merge: tuple[str, ...], workers: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    word, *value = workers
    with pytest.raises(SystemExit) as ended:
        _tokenize("cache", f"--{part}.num_tokenizing_{word}", *value, *merge)
    assert ended.value.code == 2
    message = f"--{part}.num_tokenizing_workers has no effect with --merge, which tokenizes nothing"
    assert f"fingpt: error: {message}\n" in capsys.readouterr().err
    assert not Path("cache").exists()


def test_data_without_a_token_cache_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tokenize", "--config", "debug_finetune_smollm2_fpb"])
    assert ended.value.code == 2
    assert "data FinancialInstructions has no cache of tokens" in capsys.readouterr().err
