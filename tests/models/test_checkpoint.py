"""Pruned folders are read back by qpruner and plain transformers; folders of hub models."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    units = {"mlp": tuple(range(3, 27))}
    if name not in HEADWISE:
        units["attention"] = (0, 2)
    return {index: dict(units) for index in range(LAYERS)}


def pruned(name: str, **options: Any) -> PreTrainedModel:
    recipe = {"rate": 0.25, "importance": "magnitude", "round_to": 8, "uniform": True}
    rows = [{"input_ids": row, "labels": row} for row in prompt().tolist()]
    settings = PruneConfig.model_validate(recipe | options)
    return prune(family_model(name), settings, Samples(rows, 0, 2)).model


def ragged(name: str) -> PreTrainedModel:
    return cut(family_model(name), kept_of(name))


GROUPED = tuple(name for name in FAMILY_NAMES if name not in HEADWISE)
HEADS_FIXED = (*HEADWISE, "phi-3, 128k")
"""Models whose plain checkpoint cannot have fewer heads."""


KINDS: dict[str, tuple[Sequence[str], Callable[[str], PreTrainedModel]]] = {
    "ragged/widths": (MODEL_NAMES, ragged),
    "ragged/depth": (FAMILY_NAMES, lambda name: keep_blocks(ragged(name), (1, 2))),
    "ragged/alike": (("phi-3, 128k",), lambda name: cut(family_model(name), alike(name))),
    "plain/depth": (FAMILY_NAMES, lambda name: keep_blocks(family_model(name), (1, 2))),
    "plain/alike": (FAMILY_NAMES, lambda name: cut(family_model(name), alike(name))),
    "plain/uniform": (GROUPED, pruned),
    "plain/channels": (HEADS_FIXED, lambda name: pruned(name, rate=0.1, units=["mlp"])),
}
"""Kinds of pruned models by folder: `ragged` needs `import qpruner.hf` to load, `plain` must load
without it."""
CUT_MODELS = {f"{kind}/{name}": kind for kind, (names, _) in KINDS.items() for name in names}


@pytest.fixture(scope="module")
def cut_models() -> dict[str, PreTrainedModel]:
    return {path: KINDS[kind][1](Path(path).name) for path, kind in CUT_MODELS.items()}


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
    ragged = [name for name in CUT_MODELS if name.startswith("ragged")]
    plain = [name for name in CUT_MODELS if name.startswith("plain")]
    answers = plain_transformers_answers(
        prompt().tolist(),
        [root / name for name in plain],
        root,
        [root / name for name in ragged],
    )
    return dict(zip((*plain, *ragged), answers, strict=True))


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
    assert cached.shape == (3, 2, 97)
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)
    assert answer["made"] == answer["made without cache"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_heads_that_do_not_divide_the_hidden_size_load(name: str, tmp_path: Path) -> None:
    """Some configs refuse this number of heads as a global key, so it is written per block."""
    heads = {"num_attention_heads": 10}
    stays: tuple[int, ...] = tuple(range(8))
    if name not in HEADWISE:
        heads["num_key_value_heads"] = 5
        stays = (0, 1, 3, 4)
    kept = {index: units | {"attention": stays} for index, units in alike(name).items()}
    model = cut(family_model(name, **heads), kept)
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
    first, *others = sorted(tmp_path.glob("*.safetensors"))
    assert len(others) > 1
    assert torch.equal(logits_of(load_dense(str(tmp_path), "float32")), logits_of(model))
    first.unlink()
    with pytest.raises(UserError, match=f"lacks 1 weight file: {first.name}"):
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
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"one": "gone.safetensors"}}')
    assert prepare_base(ModelConfig(source=str(folder)), tmp_path / "unused").path == str(folder)
    load_dense(str(folder), "float32")
    os.truncate(folder / "model.safetensors", 999)
    with pytest.raises(CorruptFile, match=r"model\.safetensors is missing or damaged"):
        load_dense(str(folder), "float32")


# ---- hub models


PROGRAM = """
import sys
from pathlib import Path
from qpruner.config.schema import ModelConfig
from qpruner.errors import UserError
from qpruner.models.checkpoint import prepare_base
from qpruner.models.loading import load_model_config

def report(*progress):  # writes whole lines, from several threads
    sys.stdout.write(f"{progress}\\n")

config = ModelConfig(source="me/mine")
try:
    exec(sys.argv[1])
    print("loaded")
except UserError as error:
    print(error)
"""


@dataclass
class Fetcher:
    """Runs code in new processes, with a cache of models in a folder."""

    files: dict[str, bytes]
    home: Path

    def of_hub(self, code: str) -> str:
        """Return the last line that code writes while a hub has the files."""
        with serving() as hub:
            hub.repositories["me/mine"] = Repository(private=False, files=self.files)
            return self.lines(code, hub.endpoint)[-1]

    def lines(self, code: str, endpoint: str = "http://127.0.0.1:9") -> list[str]:
        variables = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        return run_python(PROGRAM, code, **variables).strip().splitlines()


CONFIGURED = "load_model_config(config)"
FETCHED = "prepare_base(config, Path('unused'))"


@pytest.fixture
def fetcher(llama: Path, tmp_path: Path) -> Fetcher:
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    return Fetcher(files, tmp_path / "home")


def test_a_model_of_a_hub_is_fetched_with_progress(fetcher: Fetcher, tmp_path: Path) -> None:
    """The config, once fetched, can be read while the hub is down."""
    files = fetcher.files
    files |= {"more.json": b" " * 8_000_000, "README.md": b"---\nlicense: mit\n---\n"}
    place = tmp_path / "model"
    prepare = f"prepare_base(config, Path({str(place)!r}), True, report)"
    with serving() as hub:
        hub.repositories["me/mine"] = Repository(private=False, files=files)
        lines = fetcher.lines(f"{CONFIGURED}; {prepare}", hub.endpoint)
    for name in ("model.safetensors", "README.md"):  # the model card names the license
        assert (place / name).read_bytes() == files[name]
    total = round(sum(map(len, files.values())) / 1e6)
    assert lines[-2:] == [str(("fetching MB", total, total)), "loaded"]
    assert fetcher.lines(CONFIGURED) == ["loaded"]


@pytest.mark.parametrize(
    "code", [CONFIGURED, FETCHED], ids=["before anything is fetched", "after it was fetched"]
)
def test_a_hub_model_with_pickled_weights_only_is_refused(fetcher: Fetcher, code: str) -> None:
    fetcher.files["pytorch_model.bin"] = b"pickled"
    fetcher.files["onnx/model.safetensors"] = fetcher.files.pop("model.safetensors")
    message = fetcher.of_hub(code)
    for part in (
        "`model.source`: me/mine on the hub has no .safetensors weights",
        "`model.revision`",
        "save_pretrained",
        "safe_serialization=True",
    ):
        assert part in message


@pytest.mark.parametrize("code", [CONFIGURED, FETCHED], ids=["its config alone", "all but a file"])
def test_a_partly_cached_hub_model_is_named_as_such(fetcher: Fetcher, code: str) -> None:
    """`qpruner check` fetches the config only, and a node that runs the model may not reach the
    hub."""
    assert fetcher.of_hub(code) == "loaded"
    for weights in fetcher.home.glob("hub/*/snapshots/*/model.safetensors"):
        weights.unlink()
    message = fetcher.lines(FETCHED)[-1]
    assert "the hub does not answer" in message
    assert "lacks files of me/mine" in message
    assert "`qpruner prepare CONFIG`" in message
    assert "`hf download me/mine`" in message
