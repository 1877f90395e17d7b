"""Chat templates of the kinds that instruct models ship, and a tokenizer with their tokens."""

from functools import cache

from transformers import PreTrainedTokenizerFast

from fingpt_lightning.models.formats.tokenizer import use_chat_template
from tests.evaluation.tiny_language import tiny_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's and Qwen's form."""
TRIMMED = (
    "{{ '<begin>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|tail|>\n\n'"
    " + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
"""Llama 3's form."""
BRACKETS = (
    "{{ '<begin>' }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system turn') }}{% elif (m['role'] == 'user') != (loop.index0 % 2 == 0)"
    " %}{{ raise_exception('turns must alternate') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '<end>' }}"
    "{% endif %}{% endfor %}"
)
"""Mistral's form: the answer begins with a blank, and nothing asks for it."""
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Without special tokens."""
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""One that says itself which tokens are the assistant's."""
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen3's form: only the last answer is preceded by thoughts."""
ENDED = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""One whose tokens every small tokenizer has."""
TEMPLATES = {
    "chatml": CHATML, "trimmed": TRIMMED, "brackets": BRACKETS, "plain": PLAIN, "marked": MARKED,
    "forgetful": FORGETFUL,
}  # fmt: skip
_TOKENS = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>", "[INST]", "[/INST]"]


@cache
def _backend() -> str:
    tokenizer = tiny_tokenizer("<begin>")
    tokenizer.add_special_tokens({"additional_special_tokens": _TOKENS})
    return tokenizer.backend_tokenizer.to_str()


def chat_tokenizer(template: str | None, eos_token: str = "<end>") -> PreTrainedTokenizerFast:
    """A tokenizer whose texts begin with a token, with a template in use or none."""
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()), eos_token=eos_token
    )
    if template is not None:
        use_chat_template(tokenizer, template)
    return tokenizer
