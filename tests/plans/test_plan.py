"""Sizes of plans, and plan files."""

from pathlib import Path

import pytest
from made_layouts import LEVELS, layout_of

from qpruner.errors import PlanRefused
from qpruner.plans.plan import PrecisionPlan, read_plan
from qpruner.quantization.formats import format_of


def test_plan_bytes_are_groups_and_fixed_bytes() -> None:
    layout = layout_of([(77, 64), (96, 77)], rest=12345)
    plan = PrecisionPlan(("layers.0", "layers.1"), ("nf4", "int8"))
    first = format_of("nf4").packed_bytes(77, 64, 2)
    second = format_of("int8").packed_bytes(96, 77, 2)
    assert layout.plan_bytes(plan) == first + second + 12345 + 6172
    bits = (77 * 64 * 4 + 96 * 77 * 8) / (77 * 64 + 96 * 77)
    assert layout.mean_bits(plan) == pytest.approx(bits)


OFFERED = {"cut-20": {"embeddings": ("int8",), "layers.0": LEVELS}}


@pytest.mark.parametrize("text", ["48F", "8", "4" * 40])
def test_a_plan_round_trips_through_a_dict(text: str) -> None:
    letters = {"4": "nf4", "8": "int8", "F": "bf16"}
    names = tuple(f"layers.{index:02d}.mlp" for index in range(len(text)))
    plan = PrecisionPlan(names, tuple(letters[letter] for letter in text))
    again = PrecisionPlan.from_dict(plan.as_dict())
    assert again == plan
    assert hash(again) == hash(plan)
    assert PrecisionPlan.from_dict(plan.as_dict(), "cut-20") != plan
    assert str(plan) == text


def test_a_plan_in_a_notebook_can_be_read() -> None:
    """Letters are black on light colours and white on dark ones; names cannot break out of the
    page."""
    plan = PrecisionPlan(("a", "b", '"><script>'), ("nf4", "int8", "bf16"))
    page = plan._repr_html_()
    assert [part[:4] for part in page.split(";color:")[1:]] == ["#000", "#fff", "#fff"]
    assert "a: nf4" in page
    assert "<script>" not in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embeddings: 8", "1 of 2 groups are missing: layers.0"),
        ("{embeddings: nf4, layers.0: nf4}", r"`embeddings` must be int8 .*got 'nf4'"),
        ("{embeddings: 8, layers.0: 16}", r"`layers.0` must be one of nf4, int8 .*got 16"),
        ("{embeddings: 8, layers.0: true}", "got True"),
        ("{embeddings: 8, layers.0: '4'}", "got '4'"),
        ("{embeddings: 8, layers.0: [nf4]}", r"got \['nf4'\]"),
        ("{embeddings: 8, layers.1: 4}", "did you mean `layers.0`"),
        ("{cut: base, plan: {embeddings: 8, layers.0: 4}}", "got base: `cut: NAME`, of cut-20"),
        ("[4, 8]", "must map every group to its format, got list"),
    ],
)
def test_a_plan_file_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(PlanRefused, match=message):
        read_plan(file, OFFERED, "cut-20")


@pytest.mark.parametrize(
    "text", ['{"plan": {"layers.0": 4, "embeddings": "int8"}}', "layers.0: nf4"]
)
def test_a_plan_file_need_not_name_groups_without_a_choice(text: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    assert str(read_plan(file, OFFERED, "cut-20")) == "84"
