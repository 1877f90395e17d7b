import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy import generation
from fingpt_lightning.deploy.generate_command import read_prompts
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.loading import load_model
from tests.deploy.tiny_clients import save_clients, save_low_rank_model
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.tasks.chat_templates import ENDED

Generate = Callable[..., tuple[int, str, str]]
PROMPTS = ["Shares of Foo", "Profit rose and the dividend", "Gold"]


@pytest.fixture
def generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Runs ``fingpt generate`` on a tiny Llama; gives status, output and error."""
    tiny_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer("<begin>").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def call(*words: str) -> tuple[int, str, str]:
        given = {"--model": tmp_path / "model", "--device": "cpu", "--max_new_tokens": 9}
        defaults = [str(x) for name, v in given.items() if name not in words for x in (name, v)]
        status = 0
        capsys.readouterr()  # of the fixtures
        try:
            main(["generate", *defaults, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_prompt_and_its_text_are_printed(generate: Generate) -> None:
    status, output, error = generate("--prompt", "Shares of Foo")
    assert status == 0, error
    assert output.startswith("Shares of Foo")
    # Keys and values of 2 layers, 2 heads of 6 numbers of 4 bytes.
    assert re.search(r"model \(llama\): \d tokens, [\d.]+ per second; 192 bytes of cache", error)


def test_a_prompt_is_what_the_user_says_where_a_chat_template_is_in_use(
    generate: Generate, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text(ENDED)
    out = tmp_path / "texts.jsonl"
    words = ("--prompt", "Shares", "--dtype", "float64")
    chat = ("--chat_template", str(tmp_path / "chat.jinja"))
    status, output, error = generate(*words, *chat)
    assert status == 0, error
    assert output.startswith("Shares\n")
    assert error.startswith(f"chat template: {tmp_path}/chat.jinja\n")
    assert generate(*words, *chat, "--output", str(out))[0] == 0
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("user:\nShares<end>assistant:\n")
    network = load_model(tmp_path / "model", dtype="float64").network
    (new,) = decode(network, [tokens], 9, end_tokens=[0])
    assert json.loads(out.read_text())["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_a_text_ends_with_the_turn_of_a_chat(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat.jinja").write_text(ENDED.replace("<end>", "<begin>"))
    seen = []

    def decode_none(*_: Any, end_tokens: list[int], **__: Any) -> list[list[int]]:
        seen.append(set(end_tokens))
        return [[5]]

    monkeypatch.setattr(generation, "decode", decode_none)
    for words in ((), ("--chat_template", str(tmp_path / "chat.jinja"))):
        assert generate("--prompt", "Shares", *words)[0] == 0
    assert seen == [{0}, {0, 1}]


def test_texts_are_those_of_transformers_own_greedy_generation(
    generate: Generate, tmp_path: Path
) -> None:
    out = tmp_path / "texts.jsonl"
    words = ("--prompts", str(tmp_path / "prompts.txt"), "--batch_size", "2", "--output", str(out))
    status, output, error = generate(*words, "--dtype", "float64")
    assert status == 0, error
    assert output.strip() == f"{out}: 3 texts"
    network: Any = tiny_network("llama").double()
    tokenizer = tiny_tokenizer("<begin>")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["prompt"])])
        whole = network.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=0)
        new = whole[0, ids.shape[1] :].tolist()
        has_ended = 0 in new
        new = new[: new.index(0)] if has_ended else new
        assert row["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (row["num_tokens"], row["has_ended"]) == (len(new), has_ended)


def test_a_low_rank_checkpoint_generates(generate: Generate, tmp_path: Path) -> None:
    folder = save_low_rank_model(tmp_path / "low_rank")
    status, output, error = generate("--model", str(folder), "--prompt", "Gold rose")
    assert status == 0, error
    assert output.startswith("Gold rose")
    assert "(low-rank gpt2)" in error


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_and_an_adapter_generate(
    generate: Generate, tmp_path: Path, quantize: str
) -> None:
    (client,) = save_clients(tmp_path / "model", tmp_path / "clients", 1)
    status, output, error = generate(
        "--adapter", str(client), "--quantize", quantize, "--prompt", "Gold rose"
    )
    assert status == 0, error
    loaded = load_model(tmp_path / "model", quantize=quantize, adapter=client)
    tokenizer = loaded.require_tokenizer()
    (new,) = decode(loaded.network, [tokenizer.encode("Gold rose")], 9, end_tokens=[0])
    assert output.strip() == "Gold rose" + str(tokenizer.decode(new, skip_special_tokens=True))


def test_each_prompt_of_a_file_may_name_its_adapter(generate: Generate, tmp_path: Path) -> None:
    clients = save_clients(tmp_path / "model", tmp_path / "clients", 2)
    adapters = f"ann={clients[0]},bob={clients[1]}"
    rows = [{"prompt": "Gold", "adapter": name} for name in ("ann", None, "bob")]
    file, out = tmp_path / "mixed.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ("--prompts", str(file), "--output", str(out), "--dtype", "float64")
    status, _, error = generate(*words, "--adapters", adapters)
    assert status == 0, error
    found = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    alone = []
    for more in (("--adapter", str(clients[0])), (), ("--adapter", str(clients[1]))):
        _, output, _ = generate("--prompt", "Gold", "--dtype", "float64", *more)
        alone.append(output.strip().removeprefix("Gold"))
    assert [text.rstrip() for text in found] == alone
    assert len(set(alone)) == 3
    file.write_text(json.dumps({"prompt": "Gold", "adapter": "an"}))
    status, _, error = generate(*words, "--adapters", adapters, "--overwrite")
    assert status == 1
    assert "adapter 'an' is not loaded; there are ann, bob; did you mean ann?" in error


def test_draws_repeat_with_their_seed(generate: Generate) -> None:
    words = ("--prompt", "Gold", "--temperature", "1.3", "--top_k", "50", "--top_p", "0.95")
    texts = [generate(*words, "--seed", seed)[1] for seed in ("3", "3", "4")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompts", "{}/promts.txt"), "no file .*promts.txt; did you mean prompts.txt"),
        (("--prompt", "x", "--model", "{}/modl"), "no such file or folder; did you mean .*model"),
        (("--prompt", "x", "--max_new_tokens", "999"), "beyond the model's 330 positions"),
        (("--prompt", "x", "--output", "{}"), "is a folder, not a file"),
        (("--prompt", "x", "--adapters", "a={}/none"), "adapter .*/none: no such file or folder"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_bad_input_is_one_line_and_status_1(
    generate: Generate, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    status, _, error = generate(*[word.format(tmp_path) for word in words])
    assert status == 1, error
    (line,) = error.strip().splitlines()
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "one of the arguments --prompt --prompts is required"),
        (("--prompt", "x", "--prompts", "y"), "not allowed with"),
        (("--prompt", "x", "--top_k", "3"), "--top_k has no effect without --temperature"),
        (("--prompt", "x", "--temperature", "0"), "--temperature: 0 is not above 0"),
        (("--prompt", "x", "--temperature", "1", "--seed", "-1"), "--seed: -1 is below 0"),
        (("--prompt", "x", "--adapters", "a"), "'a' is not of the form NAME=PATH"),
        (("--prompt", "x", "--adapters", "a=b,a=c"), "the name 'a' is given twice"),
        (("--prompt", "x", "--adapters", "a=b", "--adapter", "c"), "give one of them"),
        (("--prompt", "x", "--max_new_token", "3"), "did you mean --max_new_tokens"),
        (("--prompt", "x", "--overwrite"), "--overwrite has no effect without --output"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[-2:]),
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    generate: Generate, words: tuple[str, ...], message: str
) -> None:
    status, _, error = generate(*words)
    assert status == 2
    (line,) = error.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"promt": "b"}', 'p.jsonl:2: no text "prompt"; did you mean promt'),
        ('{"prompt": 3}', 'p.jsonl:1: no text "prompt"'),
        ('{"prompt": "a", "prompt": "b"}', "p.jsonl:1: key 'prompt' is there twice"),
        ('{"prompt": "a", "adapter": 3}', 'p.jsonl:1: "adapter" 3 is not a name'),
        ("no json", "p.jsonl:1: no JSON"),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', "p.jsonl:2: the line is blank"),
        ("\n \n", "p.jsonl:1: the line is blank"),
        ("", "p.jsonl holds no prompt"),
    ],
)
def test_a_wrong_file_of_prompts_is_named_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(file)


@pytest.mark.parametrize("content", ["a\n\nb\n", "a\n \t\nb", "a\n\n"])
def test_a_blank_prompt_is_refused_not_left_out(tmp_path: Path, content: str) -> None:
    file = tmp_path / "p.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"p\.txt:2: the line is blank, and each line is a prompt"):
        read_prompts(file)
    file.write_text("a\nb\n")
    assert [prompt.text for prompt in read_prompts(file)] == ["a", "b"]


def test_texts_that_are_there_are_replaced_only_on_request(
    generate: Generate, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    words = ("--prompt", "Gold", "--max_new_tokens", "2", "--output", str(out))
    status, _, error = generate(*words)
    assert status == 1
    assert "out.jsonl is there already; --overwrite replaces it" in error
    assert out.read_text() == "mine"
    status, _, error = generate(*words, "--overwrite")
    assert status == 0, error
    assert json.loads(out.read_text())["prompt"] == "Gold"


@pytest.mark.parametrize("command", ["generate", "label", "export"])
def test_help_is_answered_without_torch(command: str) -> None:
    script = (
        "import sys; from fingpt_lightning.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout


@pytest.mark.parametrize("module", ["deploy.labelling", "deploy.generation", "serving.app"])
def test_a_model_answers_without_what_training_and_figures_need(module: str) -> None:
    script = (
        f"import sys, fingpt_lightning.{module}\n"
        "found = {'lightning', 'torchmetrics', 'matplotlib'} & sys.modules.keys()\n"
        "assert not found, found"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
