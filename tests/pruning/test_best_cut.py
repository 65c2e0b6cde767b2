"""Whether whole blocks go is measured: both cuts are made, and what loses less on rows of neither stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_decoders import PAD, rows_of, samples_of, tiny

from qpruner.calibration import mean_loss
from qpruner.config import PruneConfig
from qpruner.errors import UserError
from qpruner.pruning.best_cut import Tried, cuts_of, prune_best
from qpruner.pruning.prune import Pruned, prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_BLOCKS = 12
"""So many that one block is less than a tenth of all parameters, the most that whole blocks may take."""
HELD_OUT = rows_of((12, 9, 12, 7))
NARROW = {"rate": 0.2, "round_to": 1}


def decoder(name: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny(name, num_hidden_layers=NUM_BLOCKS, **options)


def with_an_idle_block() -> PreTrainedModel:
    """A block that adds nothing can go for nothing; every channel adds something."""
    model = decoder()
    for linear in (model.model.layers[5].self_attn.o_proj, model.model.layers[5].mlp.down_proj):
        linear.weight.data.zero_()
    return model


def with_idle_channels() -> PreTrainedModel:
    """Half the channels of every block add nothing; every block does."""
    model = decoder()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    return model


def cuts(model: PreTrainedModel, **options: Any) -> list[PruneConfig]:
    return [cut.settings for cut in cuts_of(model.config, PruneConfig(**NARROW, **options))]


def tried(make: Callable[[], PreTrainedModel]) -> tuple[tuple[Tried, ...], list[tuple[PruneConfig, Pruned]]]:
    """What was compared, and what was kept on the way."""
    kept: list[tuple[PruneConfig, Pruned]] = []
    settings = cuts(make())
    return prune_best(make, settings, samples_of(), HELD_OUT, lambda *better: kept.append(better)), kept


def test_the_cut_that_loses_less_on_held_out_rows_is_the_last_kept() -> None:
    for make, drops, kept_in_turn in ((with_an_idle_block, True, 2), (with_idle_channels, False, 1)):
        compared, kept = tried(make)
        assert len(compared) == 2 and len(kept) == kept_in_turn
        assert [bool(each.dropped_blocks) for each in compared] == [False, True]
        settings, pruned = kept[-1]
        assert settings.drops_blocks == bool(pruned.dropped_blocks) == drops
        best = min(compared, key=lambda each: each.loss)
        assert best.settings == settings and best.dropped_blocks == pruned.dropped_blocks
        assert mean_loss(pruned.model, HELD_OUT, PAD, 8).mean == pytest.approx(best.loss)
    assert tried(with_an_idle_block)[0][1].dropped_blocks == (5,)


def test_each_cut_is_the_one_that_its_settings_make_alone() -> None:
    for settings, pruned in tried(with_an_idle_block)[1]:
        alone = prune(with_an_idle_block(), settings, samples_of())
        assert alone.kept == pruned.kept and alone.dropped_blocks == pruned.dropped_blocks
        for one, other in zip(alone.model.parameters(), pruned.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_there_is_never_more_than_one_model() -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []

    def load() -> PreTrainedModel:
        gc.collect()
        assert all(model() is None for model in loaded)
        model = with_idle_channels()
        loaded.append(weakref.ref(model))
        return model

    prune_best(load, cuts(decoder()), samples_of(), HELD_OUT, lambda settings, pruned: None)
    assert len(loaded) == 2


def test_one_cut_is_made_without_a_comparison() -> None:
    kept: list[Pruned] = []
    loads: list[int] = []
    told: list[str] = []

    def load() -> PreTrainedModel:
        loads.append(1)
        return decoder()

    settings = cuts(decoder(), units=["attention", "mlp"])
    found = prune_best(
        load, settings, samples_of(), [], lambda _, pruned: kept.append(pruned), told=lambda what, *_: told.append(what)
    )
    assert found == () and len(kept) == len(loads) == 1 and kept[0].dropped_blocks == ()
    assert told and not any("whole blocks" in what or "validation" in what for what in told)


def test_what_is_told_says_which_cut_it_is_of() -> None:
    told: dict[str, None] = {}
    prune_best(
        decoder,
        cuts(decoder()),
        samples_of(),
        HELD_OUT,
        lambda *_: None,
        told=lambda what, *_: told.update({what: None}),
    )
    assert list(told) == [
        "importance, without whole blocks",
        "compensation, without whole blocks",
        "cutting, without whole blocks",
        "validation loss, without whole blocks",
        "importance of blocks, with whole blocks",
        "making up for blocks, with whole blocks",
        "importance, with whole blocks",
        "compensation, with whole blocks",
        "cutting, with whole blocks",
        "validation loss, with whole blocks",
    ]


@pytest.mark.parametrize("name", ["llama", "granite", "phi3", "opt", "gpt_neox"])
def test_where_least_squares_can_make_up_for_blocks_they_are_tried(name: str) -> None:
    model = decoder(name)
    without, beside = cuts_of(model.config, PruneConfig(**NARROW))
    assert without.settings == PruneConfig(**NARROW) and without.expected.num_hidden_layers == NUM_BLOCKS
    assert beside.settings == PruneConfig(**NARROW, units=("block", "attention", "mlp"))
    assert beside.expected.num_hidden_layers < NUM_BLOCKS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"units": ["attention", "mlp"]}),
        ("llama", {"units": ["mlp"]}),
        ("llama", {"units": ["block", "mlp"]}),
        ("llama", {"compensation": "none"}),
        ("llama", {"compensation": "bias"}),
        ("llama", {"importance": "random"}),
        ("llama", {"rate": None, "layer_rate": 0.2}),
        ("llama", {"rate": 0}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("mixtral", {"importance": "magnitude", "compensation": "none", "round_to": 8}),
    ],
    ids=str,
)
def test_where_they_are_named_or_nothing_makes_up_for_them_there_is_one_cut(name: str, options: dict[str, Any]) -> None:
    settings = PruneConfig(**{**NARROW, **options})
    assert [cut.settings for cut in cuts_of(decoder(name).config, settings)] == [settings]


def test_blocks_that_are_too_large_for_their_share_are_not_tried() -> None:
    assert len(cuts_of(tiny(num_hidden_layers=3).config, PruneConfig(**NARROW))) == 1


def test_what_the_model_cannot_meet_is_an_error_all_the_same() -> None:
    with pytest.raises(UserError, match=r"prune\.last_layer"):
        cuts_of(decoder().config, PruneConfig(**NARROW, last_layer=NUM_BLOCKS))
