import math
from pathlib import Path

import pytest
import torch

from fingpt_lightning.evaluation.calibration import calibrate, content_free_prompts
from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.tasks import find_task
from fingpt_lightning.tasks.chat import with_shots
from fingpt_lightning.tasks.examples import Shot
from tests.evaluation.plain import plain_scores
from tests.evaluation.tiny_language import examples_of, tiny_network, tiny_tokenizer


def test_the_row_is_emptied_and_its_question_stays(tmp_path: Path) -> None:
    post, news = examples_of(tmp_path, "fiqa_sa")
    for example, kind in ((post, "tweet"), (news, "news")):
        found = content_free_prompts(find_task("fiqa_sa"), example)
        asked = " {}? Please choose an answer from {{negative/neutral/positive}}.\nInput: {}"
        expected = [asked.format(kind, text) + "\nAnswer:" for text in ("N/A", "", "[MASK]")]
        assert list(found) == expected
    for example in examples_of(tmp_path, "headline"):
        question = example.text.partition("[")[2].rstrip("]")
        for prompt in content_free_prompts(find_task("headline"), example):
            assert prompt.startswith(f" {question} Please")
            assert "Gold" not in prompt


@pytest.mark.parametrize("name", ["fpb", "nwgi7", "fiqa_sa", "fpb after examples"])
def test_probabilities_are_divided_by_those_without_content(name: str, tmp_path: Path) -> None:
    network, tokenizer = tiny_network("llama").double(), tiny_tokenizer()
    name, _, after_examples = name.partition(" ")
    task, examples = find_task(name), examples_of(tmp_path, name)
    if after_examples:
        shots = [(Shot("Foo rose?", " yes"),), (Shot("Foo fell?", " no"),)]
        examples = [row._replace(shots=shots[i % 2]) for i, row in enumerate(examples)]
    predictions = score(network, tokenizer, examples, relative=True)
    found = calibrate(network, tokenizer, task, examples, predictions)
    for example, before, after in zip(examples, predictions, found, strict=True):
        emptied = [
            with_shots(example._replace(prompts=(prompt,)))
            for prompt in content_free_prompts(task, example)
        ]
        bias = torch.tensor(
            [plain_scores(network, tokenizer, empty)[0] for empty in emptied], dtype=torch.float64
        )
        bias = bias.softmax(1).mean(0)
        weighted = torch.tensor(before.scores, dtype=torch.float64).exp() / bias
        expected = (weighted / weighted.sum()).log().tolist()
        assert after.scores == pytest.approx(expected, abs=1e-9)
        assert after.choice == expected.index(max(expected))
        assert sum(map(math.exp, after.scores)) == pytest.approx(1)
    assert [p.scores for p in found] != [p.scores for p in predictions]


def test_only_labels_are_calibrated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task piqa is of kind choices"):
        calibrate(tiny_network("gpt2"), tiny_tokenizer(), find_task("piqa"), [], [])


def test_a_prompt_of_another_task_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1: its prompt is of no template of task headline"):
        content_free_prompts(find_task("headline"), examples_of(tmp_path, "fpb")[0])
