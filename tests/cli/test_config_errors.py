from pathlib import Path

import pytest

from fingpt_lightning.cli.config_errors import explain
from fingpt_lightning.terminal.messages import nearest

MODEL = {"model": "fingpt_lightning.modules.LowRankPretraining"}
UNION = (
    'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes:'
    " [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]\n  Errors:\n"
    "    - {}\n    - Expected a <class 'NoneType'>\n  Given value type: <class 'dict'>\n"
    "  Given value: {}"
)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            UNION.format("Option 'lerning_rate' is not accepted", "{'init_args': {}}"),
            "model has no setting 'lerning_rate'; did you mean learning_rate?",
        ),
        (
            UNION.format(
                'Parser key "rank":\n  Does not validate against any of the Union subtypes\n'
                "  Subtypes: [<class 'int'>, <class 'float'>, <class 'NoneType'>]\n  Errors:\n"
                "    - Expected a <class 'int'>\n  Given value type: <class 'str'>\n"
                "  Given value: many",
                "NestedArg(key='rank', val='many')",
            ),
            "model.rank: expected int, float or null, got 'many'",
        ),
        (
            UNION.format(
                "Parser key \"recompute\":\n  Expected a typing.Literal['none', 'block']."
                " Got value: blok",
                "NestedArg(key='recompute', val='blok')",
            ),
            "model.recompute: expected none or block, got 'blok'; did you mean block?",
        ),
        (
            UNION.format("layer: rank 99 is outside [1, 32]", "Namespace(rank=99)"),
            "layer: rank 99 is outside [1, 32]",
        ),
        (
            'Parser key "model":\n - Expected a dot import path string: LowRank',
            "model: 'LowRank' is not a class path such as"
            " fingpt_lightning.modules.LowRankPretraining",
        ),
        (
            "Problem with given class_path 'fingpt_lightning.modules.LowRankPretrainin': no",
            ": no class 'fingpt_lightning.modules.LowRankPretrainin'; did you mean"
            " LowRankPretraining?",
        ),
        (
            "Subcommand 'fit' does not accept option 'trainer.max_stps'",
            "no setting 'trainer.max_stps'; did you mean trainer.max_steps?",
        ),
        (
            "Subcommand 'fit' does not accept option 'trainr.logger.init_args.offline'",
            "no setting 'trainr.logger.init_args.offline'; did you mean trainer?",
        ),
        ("something\n  new", "something new"),
    ],
)
def test_a_message_becomes_one_line_that_helps(message: str, line: str) -> None:
    assert explain(message, ["--trainer.max_steps"], MODEL) == line


def test_the_line_of_the_config_or_of_its_block_is_named(tmp_path: Path) -> None:
    (tmp_path / "block.yaml").write_text("init_args:\n  rnk: 3\n")
    config = tmp_path / "config.yaml"
    config.write_text("seed_everything: 1\nmodel: block.yaml\ntrainer:\n  max_stps: 3\n")
    message = UNION.format("Option 'rnk' is not accepted", "{}")
    block = f"({tmp_path / 'block.yaml'} line 2)"
    for words in (["--config", str(config)], [f"--config={config}"]):
        assert explain(message, (), MODEL, words).endswith(block)
    message = "Subcommand 'fit' does not accept option 'trainer.max_stps'"
    assert explain(message, (), MODEL, ["-c", str(config)]).endswith(f"({config} line 4)")


def test_a_config_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("seed_everything: 1\nmodel: {rank: [}\n")
    message = 'Problems parsing config: while parsing a flow node in "<unicode string>", line 1'
    line = explain(message, words=["--config", str(config)])
    assert line.startswith(f"{config} line 2 is not YAML: ")


def test_nothing_near_is_no_hint() -> None:
    assert nearest("zzz", ["rank"]) == ""
