"""``fingpt generate``: prompts in, texts out."""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fingpt_lightning.deploy.generation import Completion, Prompt, complete
from fingpt_lightning.deploy.loading import load_with_adapters
from fingpt_lightning.deploy.sampling import sampling_of
from fingpt_lightning.files import (
    ROW_DECODER,
    DuplicateKeyError,
    not_utf8,
    refuse_existing,
    to_json,
    write_whole,
)
from fingpt_lightning.models.formats.tokenizer import chat_template_in_use
from fingpt_lightning.models.key_value_cache import cache_bytes_per_token
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.terminal.inputs import refuse_missing_prompts
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.progress import shown_progress


def run(options: argparse.Namespace) -> None:
    """Continues each prompt; the prompts are checked before the model is loaded.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: A prompt, a setting or the model is not valid.
        OSError: A path does not exist, or the output exists already.
    """
    keep_freed_memory()
    sampling = sampling_of(options)
    prompts = [Prompt(options.prompt)] if options.prompts is None else read_prompts(options.prompts)
    if options.output is not None:
        refuse_existing(options.output, "output", options.overwrite)
    model = load_with_adapters(options)
    texts = complete(
        model.network,
        model.tokenizer,
        prompts,
        options.max_new_tokens,
        sampling=sampling,
        batch_size=options.batch_size,
        bank=model.bank,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    done: dict[int, Completion] = {}
    started_s = time.perf_counter()
    with shown_progress("generating", len(prompts), "prompts") as show:
        for row, completion in texts:
            done[row] = completion
            show(len(done))
    seconds = time.perf_counter() - started_s
    in_order = [done[row] for row in range(len(prompts))]
    if options.output is None:
        gap = "" if chat_template_in_use(model.tokenizer) is None else "\n"
        for completion in in_order:
            text = Text(completion.prompt.text, "dim")
            console.print(text + Text(f"{gap}{completion.text}"), "\n")
    else:
        write_completions(options.output, in_order)
        console.print(f"{options.output}: {len(done)} texts")
    num_tokens = sum(completion.num_tokens for completion in in_order)
    speed = f"{num_tokens} tokens, {num_tokens / seconds:.1f} per second"
    cache = f"{cache_bytes_per_token(model.network):,} bytes of cache per token"
    if model.remark:
        Console(stderr=True, soft_wrap=True, highlight=False).print(model.remark, markup=False)
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"{model.loaded.description}: {speed}; {cache}",
        markup=False,
    )


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a text file, one per line, or of a ``.jsonl`` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is blank or wrong, or there is none; the message begins with file and
            line.
    """
    refuse_missing_prompts(file)
    prompts = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(file)) from error
    if not lines[-1]:  # the last line has an end
        del lines[-1]
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        if not line.strip():
            raise ValueError(f"{where}: the line is blank, and each line is a prompt")
        is_json = file.suffix.lower() == ".jsonl"
        prompts.append(_json_prompt(line, where) if is_json else Prompt(line))
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def write_completions(file: Path, completions: list[Completion]) -> None:
    """Writes one JSON object per text to a temporary file, which is then renamed."""
    lines = [
        to_json(
            {
                "prompt": completion.prompt.text,
                **({"adapter": name} if (name := completion.prompt.adapter) else {}),
                "text": completion.text,
                "num_tokens": completion.num_tokens,
                "has_ended": completion.has_ended,
            },
            ensure_ascii=False,
        )
        for completion in completions
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(f"{line}\n" for line in lines))


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        row = ROW_DECODER.decode(line)
    except DuplicateKeyError as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        known = nearest("prompt", row) if isinstance(row, dict) else ""
        raise ValueError(f'{where}: no text "prompt"{known}')
    adapter = row.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError(f'{where}: "adapter" {adapter!r} is not a name')
    return Prompt(row["prompt"], adapter or None)
