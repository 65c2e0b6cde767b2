"""The heat map: what a person concludes from it about a block must be what was measured and cut there."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from qpruner.report.importance_map import NUM_COLUMNS, draw, load_importance, save_importance, write_pictures
from qpruner.runs.records import LayerWidths, PruneRecord


def layer(index: int, groups: int, channels: int, experts: int | None = None) -> LayerWidths:
    """A block of 4 groups, 200 channels and perhaps 8 experts that keeps the first of them."""
    return LayerWidths(
        layer=index,
        kept_kv_groups=tuple(range(groups)),
        kept_mlp_channels=tuple(range(channels)),
        kept_experts=None if experts is None else tuple(range(experts)),
        base_kv_groups=4,
        base_mlp_channels=200,
        base_experts=None if experts is None else 8,
        heads_per_group=2,
        base_parameters=1000,
        kept_parameters=10 * channels // 2,
    )


def record_of(*layers: LayerWidths) -> PruneRecord:
    return PruneRecord(
        digest="0" * 16,
        seconds=1.0,
        importance="taylor",
        selection="global",
        compensation="none",
        target="target 20.00% of all parameters",
        target_rate=0.2,
        achieved_rate=0.2,
        parameters_before=1000,
        parameters_after=800,
        bytes_before=2000,
        bytes_after=1600,
        peak_memory_bytes=1,
        memory_counter="rise of resident memory",
        dropped_blocks=(),
        layers=layers,
    )


@pytest.fixture
def scores() -> dict[str, Any]:
    """Blocks 0 and 2 were scored; block 1 was out of the range."""
    generator = np.random.default_rng(0)
    return {
        "0.attention": generator.gamma(2.0, 1.0, 4),
        "0.mlp": generator.gamma(2.0, 1.0, 200),
        "2.attention": generator.gamma(2.0, 9.0, 4),
        "2.mlp": generator.gamma(2.0, 9.0, 200),
    }


RECORD = record_of(layer(0, 3, 150), layer(1, 4, 200), layer(2, 2, 50))


def panels(figure: Any) -> list[Any]:
    """The axes without the colour bars: a map and its bars, kind by kind."""
    return [axis for axis in figure.axes if axis.get_title()]


def shown(axis: Any) -> Any:
    return np.ma.getdata(axis.images[0].get_array())


def bars(axis: Any) -> list[float]:
    return [patch.get_width() for patch in axis.patches]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    kinds = {"attention": torch.tensor([1.0, 2.5], dtype=torch.float64), "mlp": torch.rand(5, dtype=torch.float64)}
    save_importance(tmp_path, {3: kinds, 11: {"mlp": kinds["mlp"] * 2}}, {3: 0.25, 11: 0.5})
    read = load_importance(tmp_path)
    assert set(read) == {"3.attention", "3.mlp", "11.mlp", "block"}
    assert read["3.attention"].tolist() == [1.0, 2.5]
    assert read["11.mlp"].tolist() == (kinds["mlp"] * 2).tolist()
    assert read["block"].tolist() == [[3, 0.25], [11, 0.5]]


def test_where_nothing_was_scored_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert load_importance(tmp_path) == {}
    save_importance(tmp_path, {}, {})
    assert load_importance(tmp_path) == {}


def test_a_row_is_a_block_from_its_least_to_its_most_important_unit(scores: dict[str, Any]) -> None:
    attention, _, mlp, _ = panels(draw(RECORD, scores))
    assert (attention.get_title(), mlp.get_title()) == ("key/value groups", "MLP channels")
    assert shown(attention).shape == shown(mlp).shape == (3, NUM_COLUMNS)
    for index in (0, 2):
        ordered = np.sort(scores[f"{index}.attention"])
        np.testing.assert_allclose(shown(attention)[index], np.log10(np.repeat(ordered, NUM_COLUMNS // 4)))
        row = 10 ** shown(mlp)[index]
        assert (np.diff(row) >= 0).all()
        parts = np.array_split(np.sort(scores[f"{index}.mlp"]), NUM_COLUMNS)
        np.testing.assert_allclose(row, [part.mean() for part in parts])
    assert np.isnan(shown(attention)[1]).all() and np.isnan(shown(mlp)[1]).all(), "not scored is not unimportant"
    # The first block is on top.
    assert attention.get_ylim() == (2.5, -0.5)


def test_the_bars_are_the_kept_shares(scores: dict[str, Any]) -> None:
    _, groups, _, channels = panels(draw(RECORD, scores))
    assert bars(groups) == [0.75, 1.0, 0.5]
    assert bars(channels) == [0.75, 1.0, 0.25]
    assert groups.get_xlim() == channels.get_xlim() == (0.0, 1.0)


def test_units_of_no_importance_are_left_white(scores: dict[str, Any]) -> None:
    """log10 of zero would make every other colour the same."""
    scores["0.mlp"] = np.array([0.0] * 100 + [1.0] * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlp = panels(draw(RECORD, scores))[2]
    assert np.isnan(shown(mlp)[0][0])
    assert np.isfinite(shown(mlp)[0][-1])
    assert all(np.isfinite(mlp.images[0].get_clim()))


def test_experts_have_a_map_of_their_own(scores: dict[str, Any]) -> None:
    scores |= {"0.expert": np.arange(1.0, 9.0)}
    record = record_of(layer(0, 4, 200, experts=6), layer(1, 4, 200), layer(2, 4, 0, experts=0))
    every = panels(draw(record, scores))
    assert [axis.get_title() for axis in every] == [
        "key/value groups",
        "kept",
        "MLP channels",
        "kept",
        "experts",
        "kept",
    ]
    np.testing.assert_allclose(10 ** shown(every[4])[0], np.repeat(np.arange(1.0, 9.0), NUM_COLUMNS // 8))
    assert bars(every[5]) == [0.75, 1.0, 0.0], "a block without experts has lost none"


@pytest.mark.parametrize("scores", [{}, {"block": np.array([[0, 0.5], [1, 0.25], [2, 0.75]])}], ids=["off", "blocks"])
def test_without_scores_of_units_there_is_still_a_picture_of_what_was_kept(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    """`prune.rate: 0`, or whole blocks only."""
    record = record_of(layer(0, 4, 200), layer(1, 0, 0), layer(2, 4, 200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_pictures(tmp_path, record, scores)
        _, groups, _, channels, *_ = panels(draw(record, scores))
    assert bars(groups) == bars(channels) == [1.0, 0.0, 1.0]
    assert (tmp_path / "importance.png").stat().st_size > 1000


def test_the_picture_of_the_report_is_the_image_in_tensorboard(scores: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_pictures(tmp_path, RECORD, scores)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    (tag,) = events.Tags()["images"]
    assert tag == "prune/importance"
    (image,) = events.Images(tag)
    picture = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
    saved = matplotlib.image.imread(tmp_path / "importance.png")
    assert picture.shape[:2] == (image.height, image.width)
    np.testing.assert_array_equal(picture, saved)
    # Another model is another picture.
    other = tmp_path / "other"
    other.mkdir()
    write_pictures(other, record_of(layer(0, 1, 1)), {"0.mlp": scores["0.mlp"]})
    assert matplotlib.image.imread(other / "importance.png").shape != saved.shape


def test_many_blocks_make_a_taller_picture_not_thinner_rows(scores: dict[str, Any]) -> None:
    """Of 80 blocks every row must still be told from the next."""
    few, many = draw(RECORD, scores), draw(record_of(*[layer(index, 4, 200) for index in range(80)]), scores)
    assert many.get_size_inches()[1] > few.get_size_inches()[1] + 8


def test_blocks_that_went_whole_stand_out(scores: dict[str, Any]) -> None:
    """With `units: [block]` this panel is all there is to see of the choice."""
    record = record_of(layer(0, 4, 200), layer(1, 0, 0), layer(2, 4, 200)).model_copy(update={"dropped_blocks": (1,)})
    panel = draw(record, {**scores, "block": np.array([[0, 0.5], [1, 0.1], [2, 0.3]])}).axes
    bars = next(axis for axis in panel if axis.get_title() == "whole blocks").patches
    assert [bar.get_width() for bar in bars] == [0.5, 0.1, 0.3]
    assert bars[1].get_facecolor() != bars[0].get_facecolor() == bars[2].get_facecolor()
