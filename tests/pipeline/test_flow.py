"""The flow is one tuple of stages, and no other list of stages exists."""

import ast
from pathlib import Path

import pytest
from conftest import raw_config, with_keys
from made_run import STATE

import qpruner
from qpruner import api
from qpruner.cli.main import VERBS
from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline.flow import STAGES, names_of, stages_until, wanted_stages
from qpruner.runs.records import Results, RunState

PACKAGE = Path(qpruner.__file__).parent
NAMES = [stage.name for stage in STAGES]


def named_in(node: ast.AST) -> set[str]:
    """Return the names of stages in a literal or a comparison."""
    match node:
        case (
            ast.Tuple(elts=parts)
            | ast.List(elts=parts)
            | ast.Set(elts=parts)
            | ast.Dict(keys=parts)
        ):
            pass
        case ast.Compare() | ast.BoolOp():
            parts = list(ast.walk(node))
        case _:
            return set()
    return {part.value for part in parts if isinstance(part, ast.Constant) and part.value in NAMES}


def test_there_is_no_second_list_of_stages() -> None:
    assert len(named_in(ast.parse("a = {'prune': 1, 'bank': 2}").body[0].value)) == 2  # type: ignore[attr-defined]
    for path in PACKAGE.rglob("*.py"):
        assert all(len(named_in(node)) <= 2 for node in ast.walk(ast.parse(path.read_text()))), path


def test_records_are_in_the_order_of_the_flow() -> None:
    assert [stage.name for stage in STAGES if stage.record] == list(Results.model_fields)
    assert [*Results.model_fields, "report"] == NAMES
    kinds = {stage.name: stage.record for stage in STAGES if stage.record}
    assert {name: Results.model_fields[name].annotation for name in kinds} == {
        name: kind | None for name, kind in kinds.items()
    }


def test_verbs_are_the_stages() -> None:
    names = [stage.name for stage in STAGES if stage.record and stage.help]
    assert list(VERBS) == ["run", *names]


def test_each_stage_is_in_the_module_of_its_name() -> None:
    assert [stage.__module__ for stage in STAGES] == [f"qpruner.pipeline.{name}" for name in NAMES]


def test_until_ends_with_its_stage() -> None:
    raw = raw_config(Path("model"), Path("run"))
    wanted = {"finetune.compare": True, "serve.to": ["gguf"], "training.learning_rate": "auto"}
    most = validate_config(with_keys(raw, **wanted))
    unwanted = {"finetune.compare": False, "serve.to": [], "training.learning_rate": 1e-3}
    least = validate_config(with_keys(raw, **unwanted))
    for name in NAMES:
        assert stages_until(name)[-1].name == name
        assert wanted_stages(most, name) == stages_until(name)
    assert set(NAMES) - set(names_of(wanted_stages(least))) == {
        "pilot",
        "comparison",
        "serve",
    }


def test_the_stages_of_a_state_without_them_are_those_that_began() -> None:
    """An earlier version did not record which stages a command runs."""
    fields = STATE.model_dump(exclude={"flow", "asked"})
    fields["stages"] = {"prepare": {"state": "done", "started": 0.0}}
    assert RunState.model_validate(fields).asked == ("prepare",)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"`until` must be one of prepare, prune, .*, report, got 'finetun'"
    ):
        api.run("my.yaml", until="finetun")
    with pytest.raises(
        UserError, match="`config` must be the path of a YAML file, got dict: keys are overrides"
    ):
        api.run({"output": "runs/mine"})  # type: ignore[arg-type]
