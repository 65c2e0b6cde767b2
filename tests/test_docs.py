"""README and docs are right: their commands and snippets run in a fresh checkout with a tiny model
(`pytest -m docs`).

`NOT_RUN` and `INLINE_NOT_RUN` give the reasons for the others. The fast tests compare verbs, keys,
messages and links with the code.
"""

import ast
import hashlib
import os
import re
import shlex
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from checkouts import copy_checkout, environment_with
from conftest import Raw, raw_config, run_program, with_keys
from doc_blocks import FENCE, PAGES, ROOT, Block, blocks
from tensorboard_server import serving

from qpruner.cli.main import main
from qpruner.config.load import validate_config

RUN = ("bash", "python")
LANGUAGES = (*RUN, "yaml", "text")
"""`yaml` is validated as part of a configuration; `text` is not run."""

AWS = (
    "needs an AWS account; "
    "tests/test_cluster_files.py checks the file against Ray's schema and AWS's client"
)
RECIPE = "needs an AWS account; tests/test_aws_recipe.py runs it against a stand-in of AWS"
MACHINES = (
    "needs machines of one's own; "
    "tests/cluster/test_ray_up.py runs these scripts on hosts made of namespaces"
)
SLURM = "needs SLURM; tests/cluster/test_slurm.py runs the file under a real one"
CLUSTER = "needs a cluster; tests/faults/test_search_faults.py drains a node of one"
INDEX = (
    "asks a package index; tests/test_packaging.py and tests/test_launch.py install from a checkout"
)
HUB = "asks a model hub, or needs an account of one; tests/export/test_push.py has one on loopback"
SERVERS = "needs the server; tests/export/test_servers.py runs it where it is installed"
TESTS = "runs tests, which have their own command"
HOURS = "takes hours; `test_files_that_commands_name_are_there` looks for the file"
NOT_RUN = {
    ("CONTRIBUTING.md", "bash launch/test.sh"): TESTS,
    ("docs/first_run.md", "pip install ."): INDEX,
    (
        "docs/watching.md",
        'pip install "qpruner[wandb,mlflow]"',
    ): "needs accounts; tests/**/test_trackers.py has both",
    ("docs/using.md", "qpruner push"): HUB,
    ("docs/serve.md", "llama-cli"): SERVERS,
    ("docs/serve.md", "ollama create"): SERVERS,
    ("docs/serve.md", "lms import"): SERVERS,
    ("docs/serve.md", "vllm serve"): SERVERS,
    (
        "docs/serve.md",
        "from transformers import",
    ): "loads blocks alike; tests/export/test_export.py loads both kinds",
    ("docs/cluster.md", "bash launch/setup.sh cluster"): INDEX,
    ("docs/cluster.md", "export AWS_DEFAULT_REGION=us-west-2"): RECIPE,
    ("docs/cluster.md", "sed -i.bak"): RECIPE,
    ("docs/cluster.md", "bash launch/up.sh cluster.yaml"): AWS,
    ("docs/cluster.md", "bash launch/down.sh cluster.yaml"): AWS,
    ("docs/cluster.md", "source aws_ids.sh"): RECIPE,
    ("docs/cluster.md", "cp tune_configs/smollm2_135m.yaml"): HUB,
    ("docs/cluster.md", "export HF_HOME=/shared/hf"): SLURM,
    ("docs/cluster.md", "bash launch/up.sh launch/cluster_onprem.yaml"): MACHINES,
    ("docs/cluster.md", "ray list nodes"): CLUSTER,
    ("docs/cluster.md", "sbatch"): SLURM,
}
"""Page and start of the first line -> the reason why the block is not run here."""
INLINE_NOT_RUN = {
    "qpruner run my.yaml --address auto": MACHINES,
    "qpruner check CONFIG --address auto": MACHINES,
    "tensorboard --logdir mine/tensorboard": (
        "the folder comes from a cluster; `runs/demo` is opened"
    ),
    "bash launch/setup.sh": INDEX,
    "bash launch/demo.sh": "tests/test_demo.py runs it",
    "pip install": INDEX,
    "pytest": TESTS,
    "python -m pytest": TESTS,
    "python docs/pictures.py": (
        "needs Chromium; tests/cli/test_terminal.py has its picture of the terminal"
    ),
    "python benchmarks/": HOURS,
    "benchmarks/": HOURS,
    "bash launch/": MACHINES,
    "launch/": MACHINES,
    "ray": MACHINES,
    "ssh-": MACHINES,
    "rm -r ~/qpruner": MACHINES,
    "source ": MACHINES,
    "export ": "sets a variable and runs nothing",
    "aws": RECIPE,
    "sbatch": SLURM,
    "apt-get": "installs programs of the system",
}
"""Start of a command in prose -> the reason why it is not run here."""
PROGRAMS = re.compile(
    r"(qpruner|tensorboard|python|pytest|bash|pip|pipx|mkdocs|ray|aws|gcloud|hf|wandb|sbatch|srun|apt-get|ssh-[\w-]+|rm"
    r"|source|export|(launch|benchmarks)/\S+) "
)
"""Programs that commands in prose start with."""
PLACES = {
    "RUN ...": "runs/demo",
    "RUN": "runs/demo",
    "CONFIG": "my.yaml",
    "VERB": "run",
    "FOLDER": "dense",
}
"""Replacements for words in capitals when a command in prose is run."""

BLOCKS = blocks()
CODE_SPAN = re.compile(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
PLAIN_WORD = re.compile(r"[a-z][a-z-]*")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def reason(block: Block) -> str | None:
    """Return the reason why a block is not run."""
    return next((why for key, why in NOT_RUN.items() if matches(block, *key)), None)


def matches(block: Block, page: str, start: str) -> bool:
    return block.language in RUN and block.page == page and block.first.startswith(start)


def spans(page: Path) -> list[str]:
    """Return the code in the prose of a page; `qpruner` is put before verbs with arguments (`plan
    RUN`)."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = [
        " ".join(span.split()).removeprefix(".venv/bin/") for _, span in CODE_SPAN.findall(prose)
    ]
    verb = re.compile(rf"({'|'.join(main.commands)}) [^=]*$")
    return [f"qpruner {span}" if verb.match(span) else span for span in found]


def inline_commands(page: Path) -> list[str]:
    """Return the commands in the prose of a page: a program with arguments, not just a name like
    `ray up`."""
    return [
        span
        for span in spans(page)
        if PROGRAMS.match(span) and not all(map(PLAIN_WORD.fullmatch, span.split()[1:]))
    ]


def filled(command: str) -> str:
    """Replace the words in capitals in a command."""
    return re.sub("|".join(map(re.escape, PLACES)), lambda found: PLACES[found[0]], command)


RUNNABLE = [block for block in BLOCKS if block.language in RUN and reason(block) is None]
INLINE = sorted({command for page in PAGES for command in inline_commands(page)})
INLINE_RUNNABLE = sorted(
    {filled(command) for command in INLINE if not command.startswith(tuple(INLINE_NOT_RUN))}
)


# ---- without running anything


def test_every_command_in_prose_runs_or_says_why_not() -> None:
    unlike = [
        command
        for command in INLINE_RUNNABLE
        if not command.startswith(("qpruner ", "tensorboard ", "python "))
    ]
    # A command of another program needs a reason in INLINE_NOT_RUN.
    assert unlike == []
    unfilled = [
        command for command in INLINE_RUNNABLE if re.search(r"\b[A-Z]{3,}\b|\.\.\.", command)
    ]
    # PLACES has every word in capitals.
    assert unfilled == []
    unused = [
        start
        for start in INLINE_NOT_RUN
        if not any(command.startswith(start) for command in INLINE)
    ]
    # Each reason is about something.
    assert unused == []
    assert "qpruner status runs/demo" in INLINE_RUNNABLE


def test_every_block_runs_or_says_why_not() -> None:
    # Tests run every language.
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []
    for page in PAGES:
        fences = len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE))
        mine = [block for block in BLOCKS if block.page == str(page.relative_to(ROOT))]
        assert fences == 2 * len(mine), f"{page}: a fence that is indented or not closed"
    counts = {key: sum(matches(block, *key) for block in BLOCKS) for key in NOT_RUN}
    # Each reason is about one block.
    assert {key: count for key, count in counts.items() if count != 1} == {}


@each_page
def test_no_command_in_prose_is_overlooked(page: Path) -> None:
    """Code with options is a command, so PROGRAMS must have its program."""
    with_options = {span for span in spans(page) if re.match(r"[a-z][\w./-]* (.* )?--?[a-z]", span)}
    assert sorted(with_options - set(INLINE)) == []


def test_files_that_commands_name_are_there() -> None:
    named = [
        word
        for command in INLINE
        for word in command.split()
        if re.match(r"(tests|benchmarks|launch)/\w+", word)
    ]
    assert len(named) > 15
    assert [
        name for name in named if not (ROOT / name).exists() and not re.search("[A-Z]{3}", name)
    ] == []


@pytest.mark.parametrize(
    "page", [ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md"], ids=lambda page: page.name
)
def test_paths_and_names_of_the_code_are_there(page: Path) -> None:
    """`ROOM/` and `ROOM/FILE.py` exist here or in the package; in `ROOM/FILE.py: NAME`, the file
    has the name."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    paths = re.findall(r"`(?:qpruner/)?((?:[a-z_]+/)+(?:[a-z_]+\.py)?)(?:: ([A-Za-z_.]+))?`", text)
    assert len(paths) > 10
    homes = (ROOT, ROOT / "qpruner", *(ROOT / "qpruner").iterdir())
    for path, name in paths:
        found = [home / path for home in homes if (home / path).exists()]
        assert found, f"{page.name}: {path}"
        assert not name or re.search(rf"\b{re.escape(name)}\b", found[0].read_text()), (
            f"{page.name}: {path}: {name}"
        )


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in RUN], ids=str)
def test_the_syntax_is_right(block: Block) -> None:
    if block.language == "python":
        compile(block.text, str(block), "exec")
    else:
        run_program("bash", "-n", text=block.text)


def commands_in(page: Path) -> list[tuple[str, list[str]]]:
    """Return every `qpruner VERB` in the code of a page, with its long options."""
    bash = [
        block.text for block in BLOCKS if ROOT / block.page == page and block.language == "bash"
    ]
    code = [*(re.sub(r"#.*", "", text) for text in bash), *spans(page)]
    found = re.findall(r"(?:^|[\s/(])qpruner ([a-z]\w*)([^\n|;&#]*)", "\n".join(code), re.MULTILINE)
    return [(verb, re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) for verb, rest in found]


@each_page
def test_verbs_and_options_exist(page: Path) -> None:
    for verb, options in commands_in(page):
        assert verb in main.commands, f"{page.name}: `qpruner {verb}`"
        known = {name for parameter in main.commands[verb].params for name in parameter.opts} | {
            "--help"
        }
        assert set(options) <= known, f"{page.name}: `qpruner {verb} {' '.join(options)}`"


@each_page
def test_keys_of_a_configuration_exist(page: Path) -> None:
    reference = (ROOT / "docs/configuration.md").read_text()
    keys = set(re.findall(r"^(?:- `|## )([a-z_.]+)", reference, re.MULTILINE))
    sections = "|".join({key.partition(".")[0] for key in keys if "." in key})
    found = re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)(?:: [^`]*)?`", page.read_text())
    assert set(found) - keys - {"prune.files.json"} == set()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_parts_of_a_configuration_are_valid(block: Block) -> None:
    raw: Raw = raw_config(Path("model"), Path("runs/x"))
    for section, keys in yaml.safe_load(block.text).items():
        raw[section] = raw.get(section, {}) | keys if isinstance(keys, dict) else keys
        if section == "prune" and {"layer_rate", "rates"} & set(keys) and "rate" not in keys:
            del raw[section]["rate"]  # only one rate is allowed
        if section == "quantize" and "formats" in keys:
            del raw[section]["bits"]  # as above
    validate_config(raw)


def test_messages_in_troubleshooting_exist_in_the_code() -> None:
    """Users search for a row by its message."""
    said = "\n".join(text for file in (ROOT / "qpruner").rglob("*.py") for text in strings(file))
    rows = re.findall(
        r"^\| (.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
    )
    quoted = [
        span.strip() for row in rows for _, span in CODE_SPAN.findall(row) if " " in span.strip()
    ]
    assert len(quoted) > 15
    parts = [part.strip(" `") for quote in quoted for part in re.split(r"\.\.\.|\bN\b", quote)]
    assert [part for part in parts if part not in said] == []


def strings(file: Path) -> list[str]:
    """Return the string literals of a module; in f-strings, the placeholders are left out."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    joined = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = [
        [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in values]
        for values in joined
    ]
    return [
        *map("".join, parts),
        *(str(node.value) for node in nodes if isinstance(node, ast.Constant)),
    ]


@each_page
def test_links_lead_to_files(page: Path) -> None:
    """This is for readers of the repository; MkDocs checks the anchors."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_site_builds_and_needs_no_other_host(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # a warning about the future of MkDocs
    assert "WARNING" not in run_program(*command, folder=ROOT, environment=quiet).stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text()
        )
        assert [place for place in loaded if re.match(r"(?:https?:)?//", place)] == [], page


# ---- running the commands


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A fresh checkout with a `my.yaml`, and a `.venv` with qpruner and its dependencies."""
    folder = copy_checkout(tmp_path_factory.mktemp("docs") / "qpruner")
    environment = environment_with(folder / ".venv", "--editable", folder)
    # launch/setup.sh writes this file after an installation, which it could not do here without
    # pip.
    asked = (folder / "pyproject.toml").read_bytes() + b"demo demo-model"
    (environment / "qpruner-installed-demo").write_text(hashlib.sha256(asked).hexdigest())
    for name, output in (
        ("tune_configs/demo_smollm2_cpu.yaml", "runs/demo"),
        ("my.yaml", "runs/mine"),
    ):
        (folder / name).write_text(yaml.safe_dump(smallest_config(tiny_model, Path(output))))
    return folder


def smallest_config(model: Path, output: Path) -> Raw:
    """Make the configuration of the shortest run: three plans of two blocks, and no comparison."""
    return with_keys(
        raw_config(model, output),
        sensitivity__methods=["fisher"],
        quantize__group="block",
        search__steps=2,
        search__confirm=1,
        finetune={"steps": 2, "compare": False},
    )


@pytest.fixture(scope="module")
def demo(checkout: Path) -> Path:
    """The checkout after a run of the demo."""
    execute(checkout, "bash", "bash launch/demo.sh --quiet")
    return checkout


def newcomer(checkout: Path) -> dict[str, str]:
    """Return the environment variables of a new user in the checkout."""
    places = os.environ["PATH"].split(":")
    system = [place for place in places if Path(place) != Path(sys.executable).parent]
    variables = os.environ | {
        "PYTHON": sys.executable,
        "EDITOR": "cat",
        "HOME": str(checkout.parent),
        "PATH": ":".join([str(checkout / ".venv" / "bin"), *system]),
    }
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "PIP_INDEX_URL"):
        variables.pop(name, None)
    return variables


def execute(checkout: Path, language: str, text: str) -> None:
    """Run a block in the checkout as a new user would, with only its `.venv` on the path."""
    shells = {"bash": ("bash", "-euo", "pipefail"), "python": (checkout / ".venv/bin/python", "-")}
    environment = newcomer(checkout)
    run_program(*shells[language], text=text, folder=checkout, environment=environment, minutes=15)


def show_tensorboard(checkout: Path, command: str) -> None:
    """Run TensorBoard until it lists the trials of the demo."""
    words = shlex.split(command, comments=True)
    program = [str(checkout / ".venv/bin/python"), "-m", "tensorboard.main", *words[1:]]
    with serving(program, "trial-0000", checkout, newcomer(checkout)) as address:
        assert address.startswith("http://127.0.0.1:")


@pytest.mark.docs
@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_block(block: Block, checkout: Path, request: pytest.FixtureRequest) -> None:
    if "runs/demo" in block.text:
        request.getfixturevalue("demo")
    server = re.compile("^tensorboard .*\n", re.MULTILINE)
    execute(checkout, block.language, server.sub("", block.text))
    for line in server.findall(block.text):
        show_tensorboard(checkout, line)


@pytest.mark.docs
@pytest.mark.parametrize("command", INLINE_RUNNABLE)
def test_command_in_prose(command: str, demo: Path) -> None:
    if command.startswith("tensorboard "):
        show_tensorboard(demo, command)
        return
    if "plan.yaml" in command:
        execute(demo, "bash", "qpruner plan runs/demo > plan.yaml")
    if "export" in command:  # it refuses to overwrite an earlier export
        shutil.rmtree(demo / "runs/demo/export", ignore_errors=True)
    execute(demo, "bash", command)


@pytest.mark.docs
@pytest.mark.parametrize("folder", ["final", "cuts/cut-20", "export/merged", "export/peft/base"])
def test_mixed_models_load_after_our_import_only(folder: str, demo: Path) -> None:
    """As docs/using.md says; a merged model whose blocks are alike, as of a winner that is not
    pruned, is plain."""
    for form in ("merged", "peft"):
        execute(
            demo, "bash", f"[ -d runs/demo/export/{form} ] || qpruner export runs/demo --to {form}"
        )
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f'AutoModelForCausalLM.from_pretrained("runs/demo/{folder}")'
    )
    execute(demo, "python", f"import qpruner.hf\n{load}")
    is_mixed = "per_layer_config" in (demo / f"runs/demo/{folder}/config.json").read_text()
    is_plain = folder == "export/merged" and not is_mixed
    with nullcontext() if is_plain else pytest.raises(AssertionError, match="Error"):
        execute(demo, "python", load)
