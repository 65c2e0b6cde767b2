"""A run that trains scales, on tuned rounding, ends in one plain file.

Its weights are those that were scored, bit for bit.
"""

from pathlib import Path

import pytest
from conftest import raw_config, with_keys

from qpruner.config.load import validate_config
from qpruner.data.encoding import load_scored
from qpruner.data.losses import mean_loss
from qpruner.errors import UserError
from qpruner.export.forms import Form, export
from qpruner.export.gguf import llama_cpp
from qpruner.hf import load
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline.run import run
from qpruner.runs.records import CONFIRMATION, FinetuneRecord
from qpruner.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

SERVED: dict[Form, list[str]] = {"gguf": ["q4_0", "q4_1"], "vllm": ["w4", "w8"]}
EMBEDDINGS = {"gguf": "q8_0", "vllm": "w8"}
KEYS = {
    "training.method": "scales",
    "training.learning_rate": 0.02,
    "prune.rate": 0.0,
    "quantize.bits": None,
    "quantize.budget": {"gib": 0.001},
    "sensitivity.methods": ["first_order"],
    "search.max_trials": 3,
    "search.max_concurrent": 1,
    "finetune": {"steps": 8},
}


@pytest.mark.parametrize("form", SERVED)
def test_the_scored_weights_are_those_of_the_file(
    form: Form, tiny_model: Path, tmp_path: Path
) -> None:
    """The export compares all bytes, and the predictions of the server."""
    if form == "gguf":
        pytest.importorskip("gguf")
        pytest.importorskip("xllamacpp")
        llama_cpp.library_path()
    else:
        pytest.importorskip("compressed_tensors")
    formats = {"quantize.formats": SERVED[form], "quantize.embeddings": [EMBEDDINGS[form]]}
    own = {"quantize.rounding": "tuned", "quantize.tuning": {"iterations": 8}} | formats
    config = validate_config(with_keys(raw_config(tiny_model, tmp_path / "run"), **KEYS | own))
    run(config, lambda event: None, until="finetune")
    run_dir = RunDir(tmp_path / "run")
    record = run_dir.read_record("finetune", FinetuneRecord)
    assert record is not None
    winner = record.winner
    assert winner.method == "scales"

    [tuned] = run_dir.tuned.iterdir()
    assert (tuned / "tuned.json").exists()
    final = run_dir.root / "final"
    files = {path.name for path in final.iterdir()}
    assert not any("adapter" in name or "scale" in name for name in files)
    rows = load_scored(run_dir.stage("prepare") / "data", CONFIRMATION)
    pad_id = int(load_tokenizer(str(final)).pad_token_id)
    scored = mean_loss(load(final).eval(), rows, pad_id, config.evaluate.batch_size)
    assert winner.confirmation.by_row == tuple(round(loss, 4) for loss in scored.by_row)

    exported = export(run_dir, form, tmp_path / form)
    assert exported.agreement > 0.95
    assert not exported.recoded or form == "vllm", "vLLM gets embeddings unpacked"
    assert not [path for path in (tmp_path / form).rglob("*") if "adapter" in path.name]
    for without, instead in {f"{form}_merged": form, "peft": "merged"}.items():
        with pytest.raises(UserError, match=f"no adapter .* export {instead}"):
            export(run_dir, without, tmp_path / "other")  # type: ignore[arg-type]
