"""The answers of llama.cpp from a GGUF file, computed in a process of its own.

Axes: N prompts, V vocabulary.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

_TIMEOUT_S = 600


def next_token_logprobs(
    file: Path, prompts: Sequence[str], vocab_size: int
) -> Float[Tensor, "N V"]:
    """The log-probabilities of the token after each prompt, by llama.cpp's tokenizer and network.

    Args:
        file: Path of the GGUF file.
        prompts: Texts of the prompts.
        vocab_size: V.

    Raises:
        RuntimeError: xllamacpp, which brings llama.cpp, is not installed or cannot read the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(file), str(answers), str(vocab_size)],
            input=json.dumps(list(prompts)),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if re.match(r"\w*Error", line)]
            raise RuntimeError(f"{file}: llama.cpp: {said[-1] if said else done.returncode}")
        return load_file(answers)["logprobs"]


def main() -> None:
    """Reads texts from standard input and writes their log-probabilities."""
    import xllamacpp  # brings llama.cpp; an extra, and it starts native threads

    file, answers, vocab_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = torch.get_num_threads()
    # By default it rounds cache and attention to 16 bits, which does not come from the file.
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = off
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.port = 0  # it listens in any case: on loopback, on a port that is free
    server = xllamacpp.Server(parameters)
    rows = []
    for prompt in json.load(sys.stdin):
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": 1,
                # Half a character or the end of text would be answered without probabilities;
                # they are those before this.
                "logit_bias": [["a", 1000.0]],
                "n_probs": vocab_size,
                "temperature": 0.0,
                "cache_prompt": False,
            }
        )
        if "choices" not in answer:
            raise RuntimeError(json.dumps(answer))
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = torch.full((vocab_size,), float("nan"))
        for token in likeliest:
            row[token["id"]] = token["logprob"]
        rows.append(row)
    save_file({"logprobs": torch.stack(rows)}, answers)


if __name__ == "__main__":
    main()
