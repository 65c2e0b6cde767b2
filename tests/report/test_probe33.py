from conftest import command
from pathlib import Path
import yaml, json
def test_it(tiny_raw, tmp_path):
    tiny_raw["finetune"] = tiny_raw.get("finetune", {}) | {"compare": True}
    tiny_raw["search"]["max_trials"] = 12
    tiny_raw["output"] = "/tmp/probe33"
    f = Path("/tmp/probe33.yaml"); f.write_text(yaml.safe_dump(tiny_raw))
    import shutil; shutil.rmtree("/tmp/probe33", ignore_errors=True)
    done = command("run", f)
    Path("/tmp/probe33.txt").write_text(done.output)
