"""Pruned folders are read back by qpruner and plain transformers; folders of hub models."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Repository, serving
from plain_transformers import plain_transformers_answers, run_python
from tiny_families import (
    FAMILY_NAMES,
    HEADWISE,
    LAYERS,
    MODEL_NAMES,
    family_model,
    kept_of,
    logits_of,
    prompt,
)
from transformers import PreTrainedModel

from qpruner.config.schema import ModelConfig, PruneConfig
from qpruner.data.calibration import Samples
from qpruner.errors import CorruptFile, UserError
from qpruner.models.checkpoint import prepare_base, save_checkpoint
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pruning.prune import prune
from qpruner.pruning.surgery import cut, keep_blocks
from qpruner.pruning.units import Kept


def alike(name: str) -> Kept:
    """Keep the same units in every block, except heads that must differ in a plain checkpoint."""
    heads = {} if name in HEADWISE else {"attention": (0, 2)}
    return {index: heads | {"mlp": tuple(range(3, 27))} for index in range(LAYERS)}


def pruned(name: str, **options: Any) -> PreTrainedModel:
    settings = PruneConfig.model_validate(
        {"rate": 0.25, "importance": "magnitude", "round_to": 8} | options
    )
    samples = Samples([{"input_ids": row, "labels": row} for row in prompt().tolist()], 0, 2)
    return prune(family_model(name), settings, samples).model


GROUPED = tuple(name for name in FAMILY_NAMES if name not in HEADWISE)
HEADS_FIXED = (*HEADWISE, "phi-3, 128k")
"""Models whose plain checkpoint cannot have fewer heads."""


KINDS: dict[str, tuple[Sequence[str], Callable[[str], PreTrainedModel]]] = {
    "ragged/widths": (MODEL_NAMES, lambda name: cut(family_model(name), kept_of(name))),
    "ragged/depth": (
        FAMILY_NAMES,
        lambda name: keep_blocks(cut(family_model(name), kept_of(name)), (1, 2)),
    ),
    "ragged/alike": (("phi-3, 128k",), lambda name: cut(family_model(name), alike(name))),
    "plain/depth": (FAMILY_NAMES, lambda name: keep_blocks(family_model(name), (1, 2))),
    "plain/alike": (FAMILY_NAMES, lambda name: cut(family_model(name), alike(name))),
    "plain/uniform": (GROUPED, lambda name: pruned(name, uniform=True)),
    "plain/channels": (
        HEADS_FIXED,
        lambda name: pruned(name, rate=0.1, units=["mlp"], uniform=True),
    ),
}
"""Kinds of pruned models by folder: `ragged` needs `import qpruner.hf` to load, `plain` must load
without it."""
CUT_MODELS = tuple(f"{kind}/{name}" for kind, (names, _) in KINDS.items() for name in names)


@pytest.fixture(scope="module")
def cut_models() -> dict[str, PreTrainedModel]:
    return {f"{kind}/{name}": make(name) for kind, (names, make) in KINDS.items() for name in names}


@pytest.fixture(scope="module")
def root(
    cut_models: dict[str, PreTrainedModel],
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    root = tmp_path_factory.mktemp("pruned")
    tokenizer = load_tokenizer(str(tiny_model))
    for name, model in cut_models.items():
        save_checkpoint(model, tokenizer, root / name)
    return root


@pytest.fixture(scope="module")
def fresh(root: Path) -> dict[str, dict[str, Any]]:
    """Return what a new process computes from each folder: logits and generated tokens."""
    plain, ragged = (
        [name for name in CUT_MODELS if name.startswith(kind)] for kind in ("plain", "ragged")
    )
    folders = [root / name for name in plain], root, [root / name for name in ragged]
    return dict(
        zip((*plain, *ragged), plain_transformers_answers(prompt().tolist(), *folders), strict=True)
    )


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    return root / "ragged/widths/llama"


@pytest.mark.parametrize("name", CUT_MODELS)
def test_a_new_process_finds_the_same_model(
    name: str, fresh: dict[str, dict[str, Any]], cut_models: dict[str, PreTrainedModel]
) -> None:
    """A block at another position, or with other heads, must still find its own keys and values in
    the cache."""
    answer = fresh[name]
    assert torch.equal(torch.tensor(answer["logits"]), logits_of(cut_models[name]))
    cached = torch.tensor(answer["logits made"])
    uncached = torch.tensor(answer["logits made without cache"])
    assert cached.shape == (5, 2, 97)
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)
    assert answer["made"] == answer["made without cache"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_heads_that_do_not_divide_the_hidden_size_load(name: str, tmp_path: Path) -> None:
    """Some configs refuse this number of heads as a global key, so it is written per block."""
    groups = {"num_attention_heads": 10} | ({} if name in HEADWISE else {"num_key_value_heads": 5})
    stays = tuple(range(8)) if name in HEADWISE else (0, 1, 3, 4)
    kept = {index: units | {"attention": stays} for index, units in alike(name).items()}
    model = cut(family_model(name, **groups), kept)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_dense(str(tmp_path), "float32")), logits_of(model))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"num_key_value_heads": 2, "num_attention_heads": 4, "intermediate_size": 18}),
        ("opt", {"num_attention_heads": 4, "ffn_dim": 18}),
    ],
)
def test_the_widths_stand_under_the_standard_key(
    name: str, expected: dict[str, int], root: Path
) -> None:
    written = json.loads((root / "ragged/widths" / name / "config.json").read_text())
    assert written["model_type"] == name
    assert set(written["per_layer_config"]) == {"0", "2"}, "block 1 was not cut"
    assert written["per_layer_config"]["0"] == expected


def test_an_instruct_model_stops_where_it_did_before() -> None:
    """Chat models end a turn with a token that only generation_config.json names."""
    model = family_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    assert cut(model, kept_of("llama")).generation_config.eos_token_id == [2, 7]


def test_a_folder_of_shards_loads_like_one_file(
    cut_models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    model = cut_models["ragged/widths/qwen2"]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits_of(load_dense(str(tmp_path), "float32")), logits_of(model))
    min(shards).unlink()
    with pytest.raises(UserError, match=f"lacks 1 weight file: {min(shards).name}"):
        prepare_base(ModelConfig(source=str(tmp_path)), tmp_path / "unused")


def test_a_local_folder_is_used_where_it_is(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    for source in (str(llama), llama.name):
        base = prepare_base(ModelConfig(source=source), tmp_path / "model")
        assert base.path == str(llama)
        assert base.converted is False
    assert not (tmp_path / "model").exists()


def test_a_truncated_weight_file_is_named(llama: Path, tmp_path: Path) -> None:
    """An index beside a single complete file is ignored, as transformers does."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"one": "gone.safetensors"}}'
    )
    assert prepare_base(ModelConfig(source=str(folder)), tmp_path / "unused").path == str(folder)
    load_dense(str(folder), "float32")
    os.truncate(folder / "model.safetensors", 999)
    with pytest.raises(CorruptFile, match=r"model\.safetensors is missing or damaged"):
        load_dense(str(folder), "float32")


# ---- hub models


def of_hub(endpoint: str, home: Path, code: str) -> list[str]:
    program = (
        "import sys\nfrom pathlib import Path\nfrom qpruner.config.schema import ModelConfig\n"
        "from qpruner.errors import UserError\nfrom qpruner.models.checkpoint import prepare_base\n"
        "from qpruner.models.loading import load_model_config\n"
        "def report(*progress):  # writes whole lines, from several threads\n"
        "    sys.stdout.write(f'{progress}\\n')\n"
        f"try:\n    {code}\n    print('loaded')\nexcept UserError as error:\n    print(error)"
    )
    variables = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return run_python(program, **variables).strip().splitlines()


CONFIGURED = "load_model_config(ModelConfig(source='me/mine'))"
FETCHED = "prepare_base(ModelConfig(source='me/mine'), Path('unused'))"


@pytest.fixture
def files(llama: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in llama.iterdir()}


def test_a_model_of_a_hub_is_fetched_with_progress(files: dict[str, bytes], tmp_path: Path) -> None:
    """The config, once fetched, can be read while the hub is down."""
    files |= {"more.json": b" " * 8_000_000, "README.md": b"---\nlicense: mit\n---\n"}
    place = tmp_path / "model"
    prepare = f"prepare_base(ModelConfig(source='me/mine'), Path({str(place)!r}), True, report)"
    code = f"{CONFIGURED}; {prepare}"
    with serving() as hub:
        hub.repositories["me/mine"] = Repository(private=False, files=files)
        written = of_hub(hub.endpoint, tmp_path / "home", code)
    for name in ("model.safetensors", "README.md"):  # the model card names the license
        assert (place / name).read_bytes() == files[name]
    total = round(sum(map(len, files.values())) / 1e6)
    assert written[-2:] == [f"{('fetching MB', total, total)}", "loaded"]
    assert of_hub(hub.endpoint, tmp_path / "home", CONFIGURED) == ["loaded"]


@pytest.mark.parametrize(
    "code", [CONFIGURED, FETCHED], ids=["before anything is fetched", "after it was fetched"]
)
def test_a_hub_model_with_pickled_weights_only_is_refused(
    files: dict[str, bytes], tmp_path: Path, code: str
) -> None:
    files |= {
        "pytorch_model.bin": b"pickled",
        "onnx/model.safetensors": files.pop("model.safetensors"),
    }
    with serving() as hub:
        hub.repositories["me/mine"] = Repository(private=False, files=files)
        said = of_hub(hub.endpoint, tmp_path / "home", code)[-1]
    assert said.startswith("`model.source`: me/mine on the hub has no .safetensors weights")
    assert "`model.revision`" in said
    assert "save_pretrained" in said
    assert "safe_serialization=True" in said


@pytest.mark.parametrize(
    "fetched_before", [CONFIGURED, FETCHED], ids=["its config alone", "all but a file"]
)
def test_a_partly_cached_hub_model_is_named_as_such(
    files: dict[str, bytes], tmp_path: Path, fetched_before: str
) -> None:
    """`qpruner check` fetches the config only, and a node that runs the model may not reach the
    hub."""
    with serving() as hub:
        hub.repositories["me/mine"] = Repository(private=False, files=files)
        assert of_hub(hub.endpoint, tmp_path / "home", fetched_before) == ["loaded"]
    for weights in tmp_path.glob("home/hub/*/snapshots/*/model.safetensors"):
        weights.unlink()
    said = of_hub(hub.endpoint, tmp_path / "home", FETCHED)[-1]
    assert "the hub does not answer, and the cache of this machine lacks files of me/mine" in said
    assert "download it where the hub answers: `qpruner prepare CONFIG`" in said
    assert "`hf download me/mine`" in said
