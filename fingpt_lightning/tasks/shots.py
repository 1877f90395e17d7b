"""Examples with their answers before each question (few-shot prompts)."""

import random
from collections.abc import Sequence

from fingpt_lightning.tasks.examples import Example, Shot


def with_examples_before(
    examples: Sequence[Example], pool: Sequence[Example], number: int, seed: int
) -> list[Example]:
    """Puts the same examples before all questions, but never a question itself.

    As what all prompts begin with is run once, examples that are the same cost next to nothing.

    Args:
        examples: Questions.
        pool: Examples to draw from; those without a known answer are passed over.
        number: Number of examples before each question.
        seed: Seed of the draw, which depends on nothing else.

    Raises:
        ValueError: The pool has too few other examples for a question.
    """
    known = [example for example in pool if example.gold is not None]
    random.Random(seed).shuffle(known)
    made = []
    for example in examples:
        shots: list[Shot] = []
        for other in known:
            if len(shots) == number:
                break
            if other.text != example.text and other.prompts != example.prompts:
                shots.append(_shot(other))
        if len(shots) < number:
            raise ValueError(
                f"num_fewshot {number} is above the {len(shots)} other rows of train with an answer"
            )
        made.append(example._replace(shots=tuple(shots)))
    return made


def _shot(example: Example) -> Shot:
    gold = example.gold
    assert gold is not None
    prompt = example.prompts[gold if len(example.prompts) > 1 else 0]
    return Shot(example.prefix + prompt, example.choices[gold])
