"""One row of each shipped task in every form in which it is shipped, and how it is read."""

from pathlib import Path

from fingpt_lightning.tasks import Task, find_task
from fingpt_lightning.tasks.examples import Example, Row, examples_of_row

SENTENCE = "Profit rose to EUR 13.1 mn ."
HEADLINE_ANSWERS = {
    "price_up": 1,
    "price_constant": 0,
    "price_down": 0,
    "asset_comparison": 0,
    "past_info": 1,
    "future_info": 0,
}
TOKENS = ["Silicon", "Valley", "Bank", "lends", "to", "Ann", "under", "GAAP"]
TAGS = ["I-ORG", "I-ORG", "I-ORG", "O", "O", "I-PER", "O", "I-MISC"]

_FOUR = ["heat", "light", "sound", "mass"]
_CALL = "Good morning.\nRevenue rose by 5 %.\nWe raise the outlook."
_TABLE = {"table": [["", "2019", "2018"], ["Revenue", "112", "105"]]}
_PAGE = {
    "pre_text": ["the following is taken from the report .", "it is in millions ."],
    "post_text": ["revenue grew ."],
    **_TABLE,
}
_QUESTION: Row = {
    "question": "What was the revenue in 2019?",
    "answer": ["112"],
    "answer_type": "span",
    "scale": "million",
}


def _flare(query: str, text: str, answer: str) -> Row:
    """A row as PIXIU and FinBen ship sets of labels."""
    choices = ["good", "bad"] if answer in ("good", "bad") else ["negative", "positive"]
    gold = choices.index(answer)
    return {"id": "x0", "query": query, "answer": answer, "text": text} | {
        "choices": choices,
        "gold": gold,
    }


_STOCK: Row = {
    "id": "s0",
    "query": "Will $ba rise or fall at 2020-11-02?\nContext: date,open\n2020-10-19,1.2\nAnswer:",
    "answer": "Fall",
    "text": "date,open",
    "choices": ["Rise", "Fall"],
    "gold": 1,
}

# One row a shape, in the order of the task's shapes; all rows of a task say the same.
ROWS: dict[str, list[Row]] = {
    "alpaca": [
        {"instruction": "Name a colour.", "input": "", "output": "Red."},
        {"instruction": "Name a colour.", "output": "Red."},
        *(
            {key: [{"role": "user", "content": "Name a colour."}, {"from": "gpt", "value": "Red."}]}
            for key in ("messages", "conversations", "conversation")
        ),
        {"context": "Name a colour.\n", "target": "Red."},
        {"prompt": "Name a colour.\n", "completion": "Red."},
        {"prompt": "Name a colour.\n", "response": "Red."},
        {"query": "Name a colour.\n", "answer": "Red."},
        {"question": "Name a colour.", "answer": "Red."},
    ],
    "arc_easy": [
        {"query": "Question: What is 1 kg?", "choices": _FOUR, "gold": 3},
        {
            "question": "What is 1 kg?",
            "choices": {"text": _FOUR, "label": ["1", "2", "3", "4"]},
            "answerKey": "4",
        },
    ],
    "boolq": [
        {"query": "Passage: Ice\nmelts.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "Ice\nmelts.", "question": "is it", "answer": True},
    ],
    "cfa": [
        {
            "query": "Read the question, and choose.\nQ: What is 1 kg?",
            "answer": "D",
            "text": "What is 1 kg?",
            "choices": _FOUR,
            "gold": 3,
        }
    ],
    "convfinqa": [
        {
            **_PAGE,
            "annotation": {
                "cur_dial": ["what was the revenue in 2019?", "and in 2018?"],
                "exe_ans": 105.0,
            },
        }
    ],
    "credit_german": [_flare("Text: checking account: none", "checking account: none", "bad")],
    "credit_australian": [_flare("Text: A1: 1.0", "A1: 1.0", "good")],
    "ectsum": [{"id": "ect0", "query": "q", "answer": "0\n1", "label": [0, 1, 1], "text": _CALL}],
    "edtsum": [{"id": "edt0", "query": "q", "answer": "Foo grows", "text": SENTENCE}],
    "fin_ner": [
        {"tokens": TOKENS, "tags": TAGS},
        {"text": " ".join(TOKENS), "answer": "Silicon Valley Bank, organization; Ann, person"},
    ],
    "fin_ner_types": [{"tokens": TOKENS, "tags": TAGS}],
    "finer139": [{"tokens": ["Debt", "of", "12.5"], "ner_tags": ["O", "O", "B-DebtFaceAmount"]}],
    "finer_ord": [
        {"token": TOKENS[:-1], "label": TAGS[:-1], "query": "q"},
        {"tokens": TOKENS[:-1], "tags": TAGS[:-1]},
    ],
    "finqa": [{**_PAGE, "qa": {"question": "how much did it grow?", "exe_ans": 0.06667}}],
    "fiqa_sa_pixiu": [
        _flare(
            "What is the sentiment of the following financial post: Positive, Negative, or"
            f" Neutral?\nText: {SENTENCE}\nAnswer:",
            SENTENCE,
            "positive",
        )
    ],
    "fnxl": [{"token": ["Debt", "of", "12.5"], "label": ["O", "O", "B-DebtFaceAmount"]}],
    "fiqa_sa": [
        {"text": SENTENCE, "kind": "post", "score": 0.1},
        {"sentence": SENTENCE, "format": "post", "sentiment_score": 0.1},
        {"sentence": SENTENCE, "type": "post", "score": 0.1},
        {
            "sentence": SENTENCE,
            "info": [{"target": "Foo", "sentiment_score": "0.100", "aspects": "[]"}],
            "file": "task1_post_ABSA_train.json",
        },
    ],
    "fomc": [{"sentence": SENTENCE, "label": 1}, {"text": SENTENCE, "label": "hawkish"}],
    "fpb": [
        {"text": SENTENCE, "label": "positive"},
        {"sentence": SENTENCE, "label": 2},
        {
            "context": "Instruction: What is the sentiment of this news? Please choose an answer "
            f"from {{negative/neutral/positive}}.\nInput: {SENTENCE}\nAnswer: ",
            "target": "positive",
        },
    ],
    "headline": [{"text": SENTENCE, **HEADLINE_ANSWERS}],
    "hellaswag": [
        {
            "activity_label": "Cooking",
            "ctx_a": "[header] How to fry an egg [title] Heat the pan.",
            "ctx_b": "then A cook",
            "endings": ["cracks  it.", "sings. [substeps]", "runs.", "sleeps."],
            "label": "0",
        }
    ],
    "lambada": [
        {"text": "He paid the bank its interest"},
        {"context": "He paid the bank its", "target": "interest"},
        {"instruction": "", "input": "He paid the bank its", "output": "interest"},
    ],
    "nwgi": [
        {"text": SENTENCE, "label7": "mildly positive"},
        {"news": SENTENCE, "label": "mildly positive"},
    ],
    "openbookqa": [
        {"query": "A stove gives", "choices": _FOUR, "gold": 0},
        {
            "question_stem": "A stove gives",
            "choices": {"text": _FOUR, "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
    ],
    "piqa": [
        {"query": "Question: dry paint\n", "choices": ["wait", "run"], "gold": 0},
        {"goal": "dry paint", "sol1": "wait", "sol2": "run", "label": 0},
    ],
    "stock_acl18": [_STOCK],
    "stock_bigdata22": [_STOCK],
    "stock_cikm18": [_STOCK],
    "tatqa": [
        {**_TABLE, "paragraphs": ["Profit rose.", "It was kept."], **_QUESTION},
        {
            "table": {"uid": "t", **_TABLE},
            "paragraphs": [
                {"uid": "a", "order": 1, "text": "Profit rose."},
                {"uid": "b", "order": 2, "text": "It was kept."},
            ],
            "questions": [{"uid": "q", "order": 1, "derivation": "", **_QUESTION}],
        },
    ],
    "tfns": [{"text": SENTENCE, "label": 1}],
    "winogrande": [
        {
            "context_options": ["Al paid Bo so Al", "Al paid Bo so Bo"],
            "continuation": "was rich.",
            "gold": 1,
        },
        {
            "sentence": "Al paid Bo so _ was rich.",
            "option1": "Al",
            "option2": "Bo",
            "answer": "2",
        },
    ],
}
# The layouts of FinGPT and FinLoRA and of Alpaca, whose rows are questions.
for _name, _target in {
    "fin_ner_types": "organization", "fiqa_sa": "positive", "fomc": "hawkish", "headline": "Yes",
    "fpb": "positive", "nwgi": "mildly positive", "tfns": "positive",
}.items():  # fmt: skip
    _task = find_task(_name)
    _example = next(filter(None, examples_of_row(_task, ROWS[_name][0], 1)))
    _context = f"{_task.instruction}{_example.prompts[0]} "
    if _name != "fpb":
        ROWS[_name].append({"context": _context, "target": _target})
    _instruction, _, _input = _context.partition("\nInput: ")
    ROWS[_name].append(
        {
            "instruction": _instruction.removeprefix("Instruction: "),
            "input": _input.removesuffix("\nAnswer: "),
            "output": _target,
        }
    )
ROWS["arc_challenge"] = ROWS["arc_easy"]
ROWS["fiqa_sa_fingpt"] = [ROWS["fiqa_sa"][place] for place in (0, 1, 2, 3, 4, 5)]
ROWS["nwgi7"] = ROWS["nwgi"]


def examples(task: str | Path | Task, row: Row) -> list[Example | None]:
    """The examples of one row, the first of its file."""
    return list(examples_of_row(task if isinstance(task, Task) else find_task(task), row, 1))


def only_example(task: str | Path | Task, row: Row) -> Example:
    """The one example of a row."""
    (example,) = examples(task, row)
    assert example is not None
    return example
