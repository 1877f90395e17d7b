from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.evaluation.token_tree import build_tree, num_common_tokens
from fingpt_lightning.tasks.encoding import Text

_CONTEXT = st.lists(st.integers(0, 2), min_size=1, max_size=5)
_ANSWER = st.lists(st.integers(0, 2), min_size=1, max_size=4)
_TEXTS = st.lists(
    st.tuples(_CONTEXT, _ANSWER).map(lambda parts: Text((*parts[0], *parts[1]), len(parts[0]))),
    min_size=1,
    max_size=6,
)


@given(texts=_TEXTS)
def test_each_distinct_beginning_is_run_once_and_each_answer_read_along_its_own_path(
    texts: list[Text],
) -> None:
    num_before = num_common_tokens([texts])
    tree = build_tree(texts, num_before)
    beginnings = {
        text.tokens[:length] for text in texts for length in range(num_before + 1, len(text.tokens))
    }
    shared = texts[0].tokens[:num_before]
    paths = [
        shared + tuple(tree.tokens[j] for j in range(i + 1) if i < tree.ends[j])
        for i in range(len(tree.tokens))
    ]
    assert len(paths) == len(beginnings)
    assert set(paths) == beginnings
    assert [len(path) - 1 for path in paths] == tree.positions
    for text, steps in zip(texts, tree.steps, strict=True):
        assert [paths[step.node] for step in steps] == [
            text.tokens[:place] for place in range(text.first_scored, len(text.tokens))
        ]
        assert [step.token for step in steps] == list(text.tokens[text.first_scored :])


@given(rows=st.lists(_TEXTS, min_size=1, max_size=4))
def test_what_all_texts_begin_with_leaves_each_a_token_before_its_answer(
    rows: list[list[Text]],
) -> None:
    num_common = num_common_tokens(rows)
    texts = [text for row in rows for text in row]
    assert len({text.tokens[:num_common] for text in texts}) == 1
    assert all(text.first_scored > num_common for text in texts)
    longer = {text.tokens[: num_common + 1] for text in texts}
    assert len(longer) > 1 or any(text.first_scored == num_common + 1 for text in texts)
