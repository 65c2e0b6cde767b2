"""Whether whole blocks go is measured: both cuts are made, and what loses less on rows of neither stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_decoders import PAD, VOCABULARY, samples_of, tiny

from qpruner.config.schema import PruneConfig
from qpruner.data.calibration import Samples
from qpruner.data.losses import LossResult, mean_loss
from qpruner.errors import TrainingDiverged, UserError
from qpruner.pruning.best_cut import Made, Tried, cuts_of, prune_best
from qpruner.pruning.prune import prune, settled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_BLOCKS = 12
"""So many that one block is less than a tenth of all parameters, the most that whole blocks may take."""
NARROW = {"rate": 0.2, "round_to": 1, "steps": 1}


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


@torch.no_grad()
def held_out_of(model: PreTrainedModel) -> Samples:
    """Rows whose labels are what the model predicts: the further a cut is from it, the more it loses on them."""
    ids = torch.randint(3, VOCABULARY, (256, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, :1], model(ids).logits[:, :-1].argmax(dim=-1)], dim=1)
    rows = [{"input_ids": some, "labels": its} for some, its in zip(ids.tolist(), labels.tolist(), strict=True)]
    return Samples(rows, PAD, 64)


def cuts(model: PreTrainedModel, **options: Any) -> list[PruneConfig]:
    return [cut.settings for cut in cuts_of(model.config, PruneConfig(**NARROW | options))]


def tried(make: Callable[[], PreTrainedModel], **options: Any) -> tuple[tuple[Tried, ...], list[Made]]:
    """What was compared, and every cut that was made."""
    made: list[Made] = []
    return prune_best(make, cuts(make(), **options), samples_of(), held_out_of(make()), made.append), made


def loss_of(cut: Made, held_out: Samples) -> LossResult:
    return mean_loss(cut.pruned.model, held_out.rows, PAD, held_out.batch_size)


@pytest.mark.parametrize(("make", "drops"), [(with_an_idle_block, True), (with_idle_channels, False)])
def test_the_cut_that_loses_less_on_held_out_rows_is_the_last_that_is_best(
    make: Callable[[], PreTrainedModel], drops: bool
) -> None:
    compared, made = tried(make, rate=0.5 if drops else 0.2)
    assert [bool(each.dropped_blocks) for each in compared] == [cut.settings.drops_blocks for cut in made]
    assert [cut.is_best for cut in made] == [True, drops], "they come without blocks first"
    assert [cut.pruned.dropped_blocks for cut in made] == [each.dropped_blocks for each in compared]
    losses = [loss_of(cut, held_out_of(make())) for cut in made]
    assert [each.loss for each in compared] == pytest.approx([loss.mean for loss in losses])
    apart = torch.tensor(losses[0].by_row) - torch.tensor(losses[1].by_row)
    behind = float(apart.std()) / len(apart) ** 0.5
    assert abs(losses[0].mean - losses[1].mean) > 5 * behind, "it is no matter of luck"
    assert [each.behind_stderr for each in compared] == pytest.approx([behind, 0] if drops else [0, behind], rel=1e-3)
    if drops:
        assert compared[1].dropped_blocks == (5,)


def test_each_cut_is_the_one_that_its_settings_make_alone() -> None:
    for cut in tried(with_an_idle_block)[1]:
        alone = prune(with_an_idle_block(), cut.settings, samples_of())
        assert alone.kept == cut.pruned.kept and alone.dropped_blocks == cut.pruned.dropped_blocks
        for one, other in zip(alone.model.parameters(), cut.pruned.model.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("make", [with_an_idle_block, with_idle_channels])
def test_there_is_never_more_than_one_model(make: Callable[[], PreTrainedModel]) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []

    def load() -> PreTrainedModel:
        gc.collect()
        assert all(model() is None for model in loaded)
        model = make()
        loaded.append(weakref.ref(model))
        return model

    prune_best(load, cuts(decoder()), samples_of(), held_out_of(decoder()), lambda cut: None)
    assert len(loaded) == 2


def test_one_cut_is_made_without_a_comparison() -> None:
    made: list[Made] = []
    loads: list[int] = []
    told: list[str] = []

    def load() -> PreTrainedModel:
        loads.append(1)
        return decoder()

    settings, nothing = cuts(decoder(), units=["attention", "mlp"]), Samples([], PAD, 8)
    found = prune_best(load, settings, samples_of(), nothing, made.append, told=lambda what, *_: told.append(what))
    assert found == () and len(made) == len(loads) == 1 and made[0].is_best and not made[0].pruned.dropped_blocks
    assert told and not any("whole blocks" in what or "validation" in what for what in told)


def test_what_is_told_says_which_cut_it_is_of() -> None:
    told: dict[str, None] = {}
    held_out = held_out_of(decoder())
    prune_best(
        decoder,
        cuts(decoder()),
        samples_of(),
        held_out,
        lambda cut: None,
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


@pytest.mark.parametrize("fails_first", [False, True])
def test_a_cut_that_cannot_be_made_leaves_the_other_and_no_model(fails_first: bool) -> None:
    """The block in front of those that go has a ridge of its own to invert: here channels that are all alike."""
    loaded: list[weakref.ref[PreTrainedModel]] = []

    def alike() -> PreTrainedModel:
        gc.collect()
        assert all(model() is None for model in loaded)
        model = with_an_idle_block()
        for linear in (model.model.layers[4].mlp.gate_proj, model.model.layers[4].mlp.up_proj):
            linear.weight.data[:] = linear.weight.data[:1]
        loaded.append(weakref.ref(model))
        return model

    made: list[PruneConfig] = []
    failed: list[tuple[PruneConfig, str]] = []
    works, fails = (each.model_copy(update={"ridge": 1e-30}) for each in cuts(decoder(), protected_layers=(4,)))
    fails = fails.model_copy(update={"protected_layers": ()})
    held_out = held_out_of(with_an_idle_block())
    found = prune_best(
        alike,
        [fails, works] if fails_first else [works, fails],
        samples_of(),
        held_out,
        lambda cut: made.append(cut.settings),
        failed=lambda which, error: failed.append((which, str(error))),
    )
    assert found == () and made == [works] and len(loaded) == 2
    ((which, why),) = failed
    assert which == fails and "raise `prune.ridge`" in why


def test_where_no_cut_can_be_made_the_first_says_why() -> None:
    def broken() -> PreTrainedModel:
        model = decoder()
        model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    made: list[Made] = []
    with pytest.raises(TrainingDiverged, match=r"weight model\.layers\.2\.mlp\.up_proj\.weight is NaN"):
        prune_best(broken, cuts(decoder()), samples_of(), held_out_of(decoder()), made.append)
    assert not made


@pytest.mark.parametrize("name", ["llama", "granite", "phi3", "opt", "gpt_neox"])
def test_where_least_squares_can_make_up_for_blocks_they_are_tried(name: str) -> None:
    model = decoder(name)
    without, beside = cuts_of(model.config, PruneConfig(**NARROW))
    solved = NARROW | {"compensation": "least_squares"}
    assert without.settings == PruneConfig(**solved) and without.expected.num_hidden_layers == NUM_BLOCKS
    assert beside.settings == PruneConfig(**solved, units=("block", "attention", "mlp"))
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
    model_config = decoder(name).config
    assert [cut.settings for cut in cuts_of(model_config, settings)] == [settled(model_config, settings)]


def test_blocks_that_are_too_large_for_their_share_are_not_tried() -> None:
    assert len(cuts_of(tiny(num_hidden_layers=3).config, PruneConfig(**NARROW))) == 1


def test_what_the_model_cannot_meet_is_an_error_all_the_same() -> None:
    with pytest.raises(UserError, match=r"prune\.last_layer"):
        cuts_of(decoder().config, PruneConfig(**NARROW, last_layer=NUM_BLOCKS))
