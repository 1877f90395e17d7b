import csv
import datetime
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from fingpt_lightning.cli.early_checks import OFF_VARIABLE
from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy import label_command, labelled_file, labelling
from fingpt_lightning.deploy.labelled_file import LabelledFile, check_writable
from fingpt_lightning.deploy.labelling import Labeller
from fingpt_lightning.evaluation.runner import predict
from fingpt_lightning.files import mark_finished, owned
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.tasks import find_task, read_rows
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import ROWS, tiny_network, tiny_tokenizer, write_rows
from tests.tasks.chat_templates import ENDED

Label = Callable[..., tuple[int, str, str]]
TEXTS = [row["text"] for row in ROWS["fpb"]]
ADDED = ["fpb_label", "fpb_negative", "fpb_neutral", "fpb_positive"]


@pytest.fixture
def label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Label:
    """Runs ``fingpt label`` with a tiny Llama; gives status, output and error."""
    tiny_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": f"00{number}", "text": text} for number, text in enumerate(TEXTS)]
    write(tmp_path / "in.jsonl", rows)

    def call(*words: str) -> tuple[int, str, str]:
        given = {
            "--model": tmp_path / "model",
            "--task": "fpb",
            "--input": tmp_path / "in.jsonl",
            "--output": tmp_path / "out.jsonl",
            "--device": "cpu",
        }
        defaults = [str(x) for name, v in given.items() if name not in words for x in (name, v)]
        status = 0
        capsys.readouterr()  # of the fixtures
        try:
            main(["label", *defaults, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return list(parquet.read_table(file).to_pylist())
    if file.suffix == ".csv":
        with file.open(newline="") as opened:
            return list(csv.DictReader(opened))
    return [json.loads(line) for line in file.read_text().splitlines()]


def _expected(tmp_path: Path, calibrate: bool) -> list[dict[str, Any]]:
    task = find_task("fpb")
    examples = read_rows(task, write_rows(tmp_path / "data", "fpb"), "validation").examples
    loaded = load_model(tmp_path / "model")
    tokenizer = loaded.require_tokenizer()
    found = predict(loaded.network, tokenizer, task, examples, calibrate=calibrate)
    return [{"label": task.labels[answer.choice or 0], "scores": answer.scores} for answer in found]


@pytest.mark.parametrize("calibrate", [True, False])
def test_labels_are_those_of_evaluation_with_probabilities_that_add_up_to_one(
    label: Label, tmp_path: Path, calibrate: bool
) -> None:
    status, output, error = label(*([] if calibrate else ["--no_calibrate"]))
    assert status == 0, error
    rows = read(tmp_path / "out.jsonl")
    expected = _expected(tmp_path, calibrate)
    assert [row["fpb_label"] for row in rows] == [answer["label"] for answer in expected]
    for row in rows:
        probabilities = [row[name] for name in ADDED[1:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        best = find_task("fpb").labels[probabilities.index(max(probabilities))]
        assert row["fpb_label"] == best
    assert [row["text"] for row in rows] == TEXTS
    assert list(rows[0]) == ["id", "text", *ADDED]
    assert re.search(r"out.jsonl: 5 rows: negative \d, neutral \d, positive \d", output)
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("ending_out", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("ending_in", [".csv", ".jsonl", ".parquet"])
def test_every_form_of_file_is_read_and_written(
    label: Label, tmp_path: Path, ending_in: str, ending_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_chunks(monkeypatch, 2)
    texts = [*TEXTS[:2], ' with "quotes",\nand a line end', " ", TEXTS[2]]
    rows = [{"id": f"0{number}", "body": text} for number, text in enumerate(texts)]
    file, out = write(tmp_path / f"news{ending_in}", rows), tmp_path / f"labelled{ending_out}"
    words = ("--input", str(file), "--output", str(out), "--text_column", "body")
    status, output, error = label(*words)
    assert status == 0, error
    found = read(out)
    assert [(row["id"], row["body"]) for row in found] == [(r["id"], r["body"]) for r in rows]
    assert [row["fpb_label"] in (None, "") for row in found] == [False, False, False, True, False]
    assert found[3]["fpb_neutral"] in (None, "")
    assert 0 < float(found[4]["fpb_neutral"]) < 1
    assert "1 rows have no label: their text is empty, or " in output


def test_labels_are_those_of_evaluation_with_a_chat_template_too(
    label: Label, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text(ENDED)
    words = ("--no_calibrate", "--chat_template", str(tmp_path / "chat.jinja"))
    status, output, error = label(*words)
    assert status == 0, error
    assert output.startswith(f"chat template: {tmp_path}/chat.jinja\n")
    loaded = load_model(tmp_path / "model")
    tokenizer = loaded.require_tokenizer()
    use_chat_template(tokenizer, ENDED)
    task = find_task("fpb")
    examples = read_rows(task, write_rows(tmp_path / "data", "fpb"), "validation").examples
    for row, answer in zip(
        read(tmp_path / "out.jsonl"),
        predict(loaded.network, tokenizer, task, examples),
        strict=True,
    ):
        found = [row[name] for name in ADDED[1:]]
        assert found == pytest.approx([math.exp(x) for x in answer.scores], abs=2e-6)


def test_adapters_with_different_chat_templates_are_refused(label: Label, tmp_path: Path) -> None:
    ann, bob = save_clients(tmp_path / "model", tmp_path, 2)
    rows = [{"text": "Profit rose", "by": "ann"}, {"text": "Foo fell", "by": "bob"}]
    write(tmp_path / "in.jsonl", rows)
    words = ("--adapters", f"ann={ann},bob={bob}", "--adapter_column", "by")
    for folder, template in ((ann, ENDED), (bob, None)):
        tokenizer = tiny_tokenizer()
        use_chat_template(tokenizer, template)
        tokenizer.save_pretrained(folder)
    status, _, error = label(*words)
    assert status == 1
    assert "--adapters ann, bob were trained with different chat templates; name the one" in error
    tokenizer = tiny_tokenizer()
    use_chat_template(tokenizer, ENDED)
    tokenizer.save_pretrained(bob)
    status, output, error = label(*words)
    assert status == 0, error
    assert "chat template: the one that" in output


def test_a_csv_file_is_read_with_the_separator_and_encoding_that_are_given(
    label: Label, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_bytes("id~text\n1~Gewinn ä, b\n".encode("cp1252"))
    words = ("--input", str(tmp_path / "in.csv"), "--separator", "~")
    status, _, error = label(*words)
    assert status == 1
    assert "in.csv:2: no UTF-8 text at byte 17 of the file; set encoding, such as" in error
    status, _, error = label(*words, "--encoding", "cp1252")
    assert status == 0, error
    assert read(tmp_path / "out.jsonl")[0]["text"] == "Gewinn ä, b"


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_no_column_and_no_character_is_lost(
    label: Label, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_chunks(monkeypatch, 2)
    rows: list[dict[str, Any]] = [
        {"text": "Profit\rrose"},
        {"text": "Profit\r\nfell", "date": None},
        {"text": "x" * 140_000, "date": "May", "price": 1},
        {"text": "Foo", "price": 1.5},
    ]
    file, out = write(tmp_path / "news.jsonl", rows), tmp_path / f"labelled{ending}"
    status, _, error = label("--input", str(file), "--output", str(out))
    assert status == 0, error
    found = read(out)
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert [row.get("date") or None for row in found] == [None, None, "May", None]
    assert [float(row.get("price") or 0) for row in found] == [0, 0, 1, 1.5]


_ODD_VALUES = [
    (True, "true", True),
    (None, "", None),
    (math.nan, "", None),
    (1.0, "1.0", 1.0),
    (datetime.datetime(2024, 1, 2, 3), "2024-01-02T03:00:00", "2024-01-02T03:00:00"),
    (datetime.date(2024, 1, 2), "2024-01-02", "2024-01-02"),
    (Decimal("1.10"), "1.10", "1.10"),
    (["a", None], ValueError, ["a", None]),
    ({"a": [1]}, ValueError, {"a": [1]}),
    (math.inf, ValueError, ValueError),
    ([math.inf], ValueError, ValueError),
    (b"a", ValueError, ValueError),
    (datetime.timedelta(1), ValueError, ValueError),
]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize(("value", "in_csv", "in_jsonl"), _ODD_VALUES)
def test_no_value_is_written_as_python_prints_it(
    tmp_path: Path, value: object, in_csv: object, in_jsonl: object, ending: str
) -> None:
    expected = in_csv if ending == ".csv" else in_jsonl
    row = {"text": "a", "by": value}
    if expected is ValueError:
        with pytest.raises(ValueError, match="column 'by' holds "):
            check_writable(row, ending)
        return
    check_writable(row, ending)
    file = LabelledFile(tmp_path / f"out{ending}", {})
    with file.begun(overwrite=False):
        file.add(0, [row], list(row))
        file.finish()
    (written,) = read(tmp_path / f"out{ending}")
    assert written == {"text": "a", "by": expected}


def test_what_a_cell_cannot_hold_is_named_before_the_model_is_loaded(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OFF_VARIABLE, "1")
    file = write(tmp_path / "news.jsonl", [{"text": "a", "by": 1}, {"text": "b", "by": ["Ann"]}])
    words = ("--input", str(file), "--model", "no/such/model")
    status, _, error = label(*words, "--output", str(tmp_path / "out.csv"))
    assert status == 1
    assert "news.jsonl:2: column 'by' holds a list, which a cell of a .csv cannot; write" in error
    assert "no/such/model" in label(*words)[2]


def test_a_row_that_does_not_fit_has_no_label_and_is_counted(label: Label, tmp_path: Path) -> None:
    rows = [{"text": "Foo " * 500, "entity": "Foo"}, {"text": "Foo", "entity": "Foo " * 500}]
    file = write(tmp_path / "news.jsonl", rows)
    status, output, error = label("--input", str(file), "--task", "fin_ner_types")
    assert status == 0, error
    fits, too_long = read(tmp_path / "out.jsonl")
    assert fits["fin_ner_types_label"] is not None
    assert [too_long[name] for name in fits if name.startswith("fin_ner_types_")] == [None] * 4
    assert "1 rows have no label: their text is empty, or the model's context too short" in output


def test_types_that_parquet_cannot_hold_are_named_before_the_model_is_loaded(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OFF_VARIABLE, "1")
    _small_chunks(monkeypatch, 1)
    file = write(tmp_path / "news.jsonl", [{"text": "a", "by": 1}, {"text": "b", "by": "Ann"}])
    words = ("--input", str(file), "--output", str(tmp_path / "out.parquet"))
    status, _, error = label(*words, "--model", "no/such/model")
    assert status == 1
    assert "news.jsonl: its rows have no common types, which Parquet needs" in error


def test_a_column_that_is_there_twice_is_named(label: Label, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,score,score\nFoo,1,2\n")
    status, _, error = label("--input", str(tmp_path / "in.csv"))
    assert status == 1
    assert "in.csv:1: the header has 'score' twice" in error


def _small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for module in (labelling, label_command):
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)


def _stop_after_one_part(monkeypatch: pytest.MonkeyPatch, label: Label, *words: str) -> None:
    _small_chunks(monkeypatch, 2)
    own = Labeller.label

    def stop_at_third_row(self: Labeller, rows: Any, first: int) -> Any:
        if first == 3:
            raise KeyboardInterrupt
        return own(self, rows, first)

    with monkeypatch.context() as patch:
        patch.setattr(Labeller, "label", stop_at_third_row)
        assert label(*words)[0] == 130


def test_a_run_that_ended_before_its_first_part_does_not_block_another(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Labeller, "label", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert label()[0] == 130
    assert not list(tmp_path.glob("*.partial"))
    folder = tmp_path / "out.jsonl.partial"  # as a SIGKILL leaves it
    folder.mkdir()
    (folder / "settings.json").write_text('{"calibrate": true}')
    (folder / "owner.lock").write_text("process 1 on elsewhere")
    status, _, error = label("--no_calibrate")
    assert status == 0, error
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_do_not_write_one_output(label: Label, tmp_path: Path) -> None:
    with owned(tmp_path / "out.jsonl.partial"):
        status, _, error = label("--overwrite")
    assert status == 1
    assert f"out.jsonl.partial is in use by process {os.getpid()} on " in error
    assert error.rstrip().endswith("out.jsonl.partial/owner.lock)")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_run_that_was_killed_goes_on_where_it_was(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    _small_chunks(monkeypatch, 2)
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    assert label("--output", str(whole))[0] == 0
    own, asked = Labeller.label, list[int]()

    def die_at_third_row(self: Labeller, rows: Any, first: int) -> Any:
        asked.append(first)
        if first == 3 and len(asked) == 2:
            raise KeyboardInterrupt
        return own(self, rows, first)

    monkeypatch.setattr(Labeller, "label", die_at_third_row)
    assert label("--output", str(out))[0] == 130
    assert not out.exists()
    (tmp_path / f"out{ending}.partial" / "0000001.aside").write_text("half")
    status, output, error = label("--output", str(out))
    assert status == 0, error
    assert asked == [1, 3, 3, 5]
    assert "going on after 2 of 5 rows" in output
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_parts_of_other_settings_are_not_gone_on_with(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after_one_part(monkeypatch, label)
    status, _, error = label("--no_calibrate")
    assert status == 1
    assert "is of an earlier run with calibrate True, now False; remove it or" in error
    assert label("--no_calibrate", "--overwrite")[0] == 0
    status, _, error = label()
    assert status == 1
    assert "out.jsonl is there already; --overwrite replaces it" in error


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--no_calibrate",)])
def test_a_kill_after_the_rename_leaves_nothing_that_matters(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(labelled_file, "sync_folder", killed)
        assert label()[0] == 130
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert out.is_file()
    assert parts.is_dir()
    whole = out.read_bytes()
    if words == ("--no_calibrate",):
        out.unlink()  # the parts of other settings do not block it
    status, output, error = label(*words)
    assert status == (0 if words else 1), error
    assert "going on" not in output
    assert not parts.exists()
    assert (out.read_bytes() == whole) == (words != ("--no_calibrate",))


def test_a_kill_before_the_rename_leaves_parts_to_go_on_with(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        mark_finished(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(labelled_file, "mark_finished", killed)
        assert label()[0] == 130

    def killed_at_finish(self: LabelledFile) -> None:
        (self.folder / "whole").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LabelledFile, "finish", killed_at_finish)
        assert label()[0] == 130
    assert "going on after 5 of 5 rows" in label()[1]
    assert (tmp_path / "out.jsonl").is_file()


def test_parts_of_an_adapter_that_was_trained_anew_are_not_gone_on_with(
    label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = save_clients(tmp_path / "model", tmp_path / "clients", 2)
    _stop_after_one_part(monkeypatch, label, "--adapter", str(first))
    for file in second.iterdir():
        shutil.copy(file, first)
    status, _, error = label("--adapter", str(first))
    assert status == 1
    assert "is of an earlier run with adapter_sha256 " in error


def test_each_row_is_labelled_by_its_own_adapter(label: Label, tmp_path: Path) -> None:
    clients = save_clients(tmp_path / "model", tmp_path / "clients", 2)
    names = ["ann", "bob", None, "bob", "ann"]
    rows = [{"text": text, "client": name} for text, name in zip(TEXTS, names, strict=True)]
    file = write(tmp_path / "mixed.jsonl", rows)
    adapters = f"ann={clients[0]},bob={clients[1]}"
    words = ("--input", str(file), "--adapters", adapters, "--adapter_column", "client")
    status, _, error = label(*words)
    assert status == 0, error
    found = read(tmp_path / "out.jsonl")
    for index, name in enumerate(names):
        adapter = None if name is None else clients[["ann", "bob"].index(name)]
        loaded = load_model(tmp_path / "model", adapter=adapter)
        labeller = Labeller(
            loaded.network, loaded.require_tokenizer(), find_task("fpb"),
            labelling.Columns("text"),
        )  # fmt: skip
        (alone,) = labeller.label([rows[index]], 1)
        assert found[index]["fpb_label"] == alone["fpb_label"]
        for column in ADDED[1:]:
            assert found[index][column] == pytest.approx(alone[column], abs=1e-4)
    write(file, [{"text": "Foo", "client": "bab"}])
    status, _, error = label(*words, "--overwrite")
    assert status == 1
    assert "mixed.jsonl:1: adapter 'bab' is not loaded; did you mean bob?" in error


def test_a_task_with_other_fields_reads_them_from_columns_of_their_names(
    label: Label, tmp_path: Path
) -> None:
    file = write(tmp_path / "fiqa.csv", [{"text": "Foo fell", "kind": "post"}])
    assert label("--task", "fiqa_sa", "--input", str(file))[0] == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row["fiqa_sa_label"] in ("negative", "neutral", "positive")
    write(file, [{"text": "Foo fell", "knd": "post"}])
    status, _, error = label("--task", "fiqa_sa", "--input", str(file), "--overwrite")
    assert status == 1
    assert "fiqa.csv:2: no column 'kind'; did you mean knd?" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "{}/im.jsonl"), "no file .*im.jsonl; did you mean in.jsonl"),
        (("--input", "{}/in.txt"), "in.txt ends in none of .jsonl, "),
        (("--output", "{}/out.cvs"), "ends in none of .csv, .jsonl, .parquet; did you mean .csv"),
        (("--text_column", "txt"), "in.jsonl:1: no column 'txt'; did you mean text"),
        (
            ("--separator", ";"),
            r"separator ';' has an effect on \.csv and \.tsv alone, not on ",
        ),
        (("--encoding", "cp1252x"), "encoding 'cp1252x' is not known; such as utf-8"),
        (("--task", "piqa"), "task piqa is of kind choices: it has no labels to give"),
        (("--task", "fbp"), "did you mean fpb"),
        (("--model", "{}/modl"), "no such file or folder"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_bad_input_is_one_line_and_status_1_before_anything_is_written(
    label: Label, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, _, error = label(*[word.format(tmp_path) for word in words])
    assert status == 1, error
    (line,) = error.strip().splitlines()
    assert re.search(message, line)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b", "fpb_label": 1}', "in.jsonl:2: the column 'fpb_label' is"),
        ('{"text": "a"}\n\n{"text": ["b"]', "in.jsonl:3: no JSON"),
        ('{"text": {"a": 1}}', "in.jsonl:1: field 'text' holds an object"),
        ('{"text": "a"}\n{"text": ["a"]}', "in.jsonl:2: field 'text' holds a list, not a text"),
        ('{"text": false}', "in.jsonl:1: field 'text' holds false, not a text"),
        ('{"text": NaN}', "in.jsonl:1: field 'text' holds nan, which is not a finite number"),
        ('{"text": "a"}\n{"text": "b", "by": ["\\ud83d"]}', "in.jsonl:2: 'by' has half of a"),
        ("\n", "in.jsonl holds no row"),
    ],
)
def test_a_wrong_row_is_found_before_the_model_is_loaded(
    label: Label, tmp_path: Path, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OFF_VARIABLE, "1")  # else the model is named, being missing
    (tmp_path / "in.jsonl").write_text(content)
    status, _, error = label("--model", "no/such/model")
    assert status == 1
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapters", "a=b"), "--adapters and --adapter_column: give both or none"),
        (("--adapters", "a=b", "--adapter", "c"), "give one of them"),
        (("--text_colum", "x"), "did you mean --text_column"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    label: Label, words: tuple[str, ...], message: str
) -> None:
    status, _, error = label(*words)
    assert status == 2
    assert message in error


def test_a_part_that_fails_while_it_is_written_is_not_there(tmp_path: Path) -> None:
    file = LabelledFile(tmp_path / "out.csv", {})
    with file.begun(overwrite=False):
        file.add(0, [{"text": "a"}], ["text"])

    with file.begun(overwrite=False) as num_parts:
        assert num_parts == 1
        with pytest.raises(RuntimeError, match="the disk is gone"):
            file.add(1, _Failing(), ["text"])
    with file.begun(overwrite=False) as num_parts:
        assert num_parts == 1


class _Failing(list[dict[str, object]]):
    """Rows of which the second cannot be read."""

    def __iter__(self) -> Iterator[dict[str, object]]:
        yield {"text": "b"}
        raise RuntimeError("the disk is gone")
