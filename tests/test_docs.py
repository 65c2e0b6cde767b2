"""README and docs say what is so: commands, in blocks and in prose, and snippets are run (`pytest -m docs`).

That is in a fresh checkout, with the two-layer model of the tests, the demo's recipe included, so that all of it takes
minutes; `test_demo.py` runs the demo itself. What cannot run on a test machine stands in `NOT_RUN` or `INLINE_NOT_RUN`
with its reason. A command or block that fails, a language that nobody runs, a verb, option or message that the code
does not have: each fails a test.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkouts import copy_checkout
from conftest import raw_config
from doc_blocks import FENCE, PAGES, ROOT, Block, blocks
from tensorboard_server import serving

from qpruner.cli.main import main
from qpruner.config.schema import validate_config

RUN = ("bash", "python")
LANGUAGES = (*RUN, "yaml", "text")
"""`yaml` is checked as a part of a configuration, `text` is nothing to run."""

AWS = "needs an AWS account; tests/test_cluster_files.py checks the file against Ray's schema and AWS's client"
RECIPE = "needs an AWS account; tests/test_aws_recipe.py runs it against a stand-in of AWS"
MACHINES = "needs machines of one's own; tests/cluster/test_ray_up.py runs these scripts on hosts made of namespaces"
TESTS = "runs tests, which have their own command"
INDEX = "asks a package index; tests/test_launch.py has what setup.sh refuses"
HOURS = "takes hours; `test_files_that_commands_name_are_there` looks for the file"
NOT_RUN = {
    ("CONTRIBUTING.md", "bash launch/test.sh"): "runs this test",
    ("docs/first_run.md", "pip install ."): "asks a package index; tests/test_packaging.py installs a checkout",
    (
        "docs/watching.md",
        'pip install "qpruner[wandb,mlflow]"',
    ): "needs accounts; tests/search/test_trackers.py has both",
    ("docs/using.md", "qpruner push"): "needs an account of a hub; tests/export/test_push.py has one on loopback",
    ("docs/families.md", "@dataclass(frozen=True)"): "a part of phi3.py; `test_code_of_the_package_is_quoted`",
    ("docs/cluster.md", "bash launch/setup.sh cluster"): "asks a package index; tests/test_launch.py has its refusals",
    ("docs/cluster.md", "export AWS_DEFAULT_REGION=us-west-2"): RECIPE,
    ("docs/cluster.md", "sed -i.bak"): RECIPE,
    ("docs/cluster.md", "bash launch/up.sh cluster.yaml"): AWS,
    ("docs/cluster.md", "bash launch/down.sh cluster.yaml"): AWS,
    ("docs/cluster.md", "source aws_ids.sh"): RECIPE,
    (
        "docs/cluster.md",
        "cp tune_configs/smollm2_135m_p20.yaml",
    ): "asks a model hub; other pages check the demo's recipe",
    ("docs/cluster.md", "export HF_HOME=/shared/hf"): "needs a login node of SLURM and a model hub",
    ("docs/cluster.md", "bash launch/up.sh launch/cluster_onprem.yaml"): MACHINES,
    ("docs/cluster.md", "ray list nodes"): "needs a cluster; tests/faults/test_search_faults.py drains a node of one",
    ("docs/cluster.md", "sbatch"): "needs SLURM; tests/cluster/test_slurm.py runs the file under a real one",
}
"""Page and start of the first line -> why the block is not run here."""

PROGRAMS = re.compile(
    r"(qpruner|tensorboard|python|pytest|bash|pip|pipx|mkdocs|ray|aws|gcloud|hf|wandb|sbatch|srun|apt-get|ssh-[\w-]+|rm"
    r"|source|export|(launch|benchmarks)/\S+) "
)
"""What a command in prose begins with."""
PLACES = {
    "RUN ...": "runs/demo",
    "RUN": "runs/demo",
    "CONFIG": "my.yaml",
    "FILE": "plan.yaml",
    "TEXT": "ice",
    "FOLDER": "dense",
}
"""What stands for the words in capitals when a command in prose is run."""
INLINE_NOT_RUN = {
    "qpruner push": "needs an account of a hub; tests/export/test_push.py has one on loopback",
    "qpruner run my.yaml --address auto": MACHINES,
    "qpruner run CONFIG --address": MACHINES,
    "qpruner check CONFIG --address auto": MACHINES,
    "tensorboard --logdir mine/tensorboard": "the folder comes from a cluster; `runs/demo` is opened",
    "bash launch/setup.sh": INDEX,
    "bash launch/demo.sh": "tests/test_demo.py runs it",
    "pip install": INDEX,
    "bash launch/test.sh": TESTS,
    "pytest": TESTS,
    "python -m pytest": TESTS,
    "python benchmarks/": HOURS,
    "benchmarks/": HOURS,
    "bash launch/up.sh": MACHINES,
    "bash launch/submit.sh": MACHINES,
    "bash launch/fetch.sh": MACHINES,
    "launch/": MACHINES,
    "ray": MACHINES,
    "ssh-": MACHINES,
    "rm -r ~/qpruner": MACHINES,
    "source ": MACHINES,
    "export ": "sets a variable and runs nothing",
    "aws": RECIPE,
    "gcloud": "needs an account of Google's",
    "sbatch": "needs SLURM; tests/cluster/test_slurm.py runs the file under a real one",
    "apt-get": "installs programs of the system",
}
"""Start of a command in prose -> why it is not run here."""

BLOCKS = blocks()
CODE_SPAN = re.compile(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


def reason(block: Block) -> str | None:
    """Why a block is not run."""
    return next((why for (page, start), why in NOT_RUN.items() if _is(block, page, start)), None)


def _is(block: Block, page: str, start: str) -> bool:
    return block.language in RUN and block.page == page and block.first.startswith(start)


RUNNABLE = [block for block in BLOCKS if block.language in RUN and reason(block) is None]


def spans(page: Path) -> list[str]:
    """The code in a page's prose; a verb of ours that has something behind it is `qpruner`'s (`plan RUN`)."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = [" ".join(span.split()).removeprefix(".venv/bin/") for _, span in CODE_SPAN.findall(prose)]
    verb = re.compile(rf"({'|'.join(main.commands)}) [^=]*$")
    return [f"qpruner {span}" if verb.match(span) else span for span in found]


def inline_commands(page: Path) -> list[str]:
    """The commands among them: a program and more than words that name its part (`ray up` is a name)."""
    return [span for span in spans(page) if PROGRAMS.match(span) and not all(map(NAME.fullmatch, span.split()[1:]))]


NAME = re.compile(r"[a-z][a-z-]*")
INLINE = sorted({command for page in PAGES for command in inline_commands(page)})


def filled(command: str) -> str:
    """With something in place of the words in capitals."""
    return re.sub("|".join(map(re.escape, PLACES)), lambda found: PLACES[found[0]], command)


INLINE_RUNNABLE = sorted({filled(command) for command in INLINE if not command.startswith(tuple(INLINE_NOT_RUN))})


# ---- without running anything


def test_every_command_in_prose_is_run_or_says_why_not() -> None:
    unlike = [command for command in INLINE_RUNNABLE if not command.startswith(("qpruner ", "tensorboard ", "python "))]
    assert unlike == [], "only these are run: give its reason in INLINE_NOT_RUN"
    unfilled = [command for command in INLINE_RUNNABLE if re.search(r"\b[A-Z]{3,}\b|\.\.\.", command)]
    assert unfilled == [], "a word that PLACES does not have"
    unused = [start for start in INLINE_NOT_RUN if not any(command.startswith(start) for command in INLINE)]
    assert unused == [], "a reason for nothing"
    assert {"tensorboard --logdir runs/demo", "qpruner status runs/demo"} <= set(INLINE_RUNNABLE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_in_prose_is_overlooked(page: Path) -> None:
    """What has options is a command, of a program that PROGRAMS has."""
    with_options = {span for span in spans(page) if re.match(r"[a-z][\w./-]* (.* )?--?[a-z]", span)}
    assert sorted(with_options - set(INLINE)) == []


def test_files_that_commands_name_are_there() -> None:
    named = [word for command in INLINE for word in command.split() if re.match(r"(tests|benchmarks|launch)/\w+", word)]
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists() and not re.search("[A-Z]{3}", name)] == []


def test_every_block_is_run_or_says_why_not() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == [], "a language that no test runs"
    for page in PAGES:
        fences = len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE))
        mine = [block for block in BLOCKS if block.page == str(page.relative_to(ROOT))]
        assert fences == 2 * len(mine), f"{page}: a fence that is indented or not closed"
    matches = {key: sum(_is(block, *key) for block in BLOCKS) for key in NOT_RUN}
    assert {key: count for key, count in matches.items() if count != 1} == {}, "each reason is about one block"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in RUN], ids=str)
def test_the_syntax_is_right(block: Block) -> None:
    if block.language == "python":
        compile(block.text, str(block), "exec")
    else:
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr


def commands_in(page: Path) -> list[tuple[str, list[str]]]:
    """Every `qpruner VERB` in code on a page, with its long options."""
    bash = [block.text for block in BLOCKS if ROOT / block.page == page and block.language == "bash"]
    code = [re.sub(r"#.*", "", text) for text in bash]
    code += spans(page)
    found = re.findall(r"(?:^|[\s/(])qpruner ([a-z]\w*)([^\n|;&#]*)", "\n".join(code), re.MULTILINE)
    return [(verb, re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) for verb, rest in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_exist(page: Path) -> None:
    for verb, options in commands_in(page):
        assert verb in main.commands, f"{page.name}: `qpruner {verb}`"
        known = {name for parameter in main.commands[verb].params for name in parameter.opts} | {"--help"}
        assert set(options) <= known, f"{page.name}: `qpruner {verb} {' '.join(options)}`"


def test_what_is_looked_for_in_commands_is_found() -> None:
    """The test above would pass on pages in which it finds nothing."""
    verbs = {verb for page in PAGES for verb, _ in commands_in(page)}
    assert {"run", "check", "trials", "plan", "export", "status", "compare", "schema", "report"} <= verbs


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_parts_of_a_configuration_are_valid(block: Block) -> None:
    raw: dict[str, Any] = raw_config(Path("model"), Path("runs/x"))
    for section, keys in yaml.safe_load(block.text).items():
        raw[section] = raw.get(section, {}) | keys if isinstance(keys, dict) else keys
        if section == "prune" and "layer_rate" in keys and "rate" not in keys:
            del raw[section]["rate"]  # each says how much goes
    validate_config(raw)


def test_the_messages_that_troubleshooting_explains_are_the_code_s() -> None:
    """A row is found by its message; one that was reworded is found no more."""
    said = "\n".join(text for file in (ROOT / "qpruner").rglob("*.py") for text in strings(file))
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [span.strip() for row in rows for _, span in CODE_SPAN.findall(row) if " " in span.strip()]
    assert len(quoted) > 15
    parts = [part.strip(" `") for quote in quoted for part in re.split(r"\.\.\.|\bN\b", quote)]
    assert [part for part in parts if part not in said] == []


def strings(file: Path) -> list[str]:
    """The texts of a module, joined as Python joins them; what is filled in is left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    return [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside)
    ]


def test_code_of_the_package_is_quoted() -> None:
    """The families that families.md shows are those of the package, comments aside."""
    shown = [block for block in BLOCKS if block.page == "docs/families.md" and block.language == "python"]
    theirs = "\n".join(
        ast.unparse(_without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))
        for file in (ROOT / "qpruner/models/families").glob("*.py")
    )
    for block in shown:
        for statement in ast.parse(block.text).body:
            if not isinstance(statement, ast.ImportFrom):
                assert ast.unparse(_without_docstrings(statement)) in theirs, f"{block}: {block.first}"


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1 and isinstance(body[0], ast.Expr):
            del body[0]
    return tree


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_where_nobody_built_the_site(page: Path) -> None:
    """Who reads the repository follows them from file to file; MkDocs looks at their anchors (`test_docs_site.py`)."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


# ---- everything that can run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A fresh checkout with a `.venv` that has qpruner and its dependencies, and a `my.yaml`."""
    folder = copy_checkout(tmp_path_factory.mktemp("docs") / "qpruner")
    environment = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    subprocess.run([*pip, "install", *options, "--editable", folder], check=True, timeout=120)
    # What launch/setup.sh leaves where it has installed; without pip here it could not.
    asked = (folder / "pyproject.toml").read_bytes() + b"demo demo-model"
    (environment / "qpruner-installed-demo").write_text(hashlib.sha256(asked).hexdigest())
    for name, output in (("tune_configs/demo_smollm2_cpu.yaml", "runs/demo"), ("my.yaml", "runs/mine")):
        (folder / name).write_text(yaml.safe_dump(smallest_config(tiny_model, Path(output))))
    return folder


def smallest_config(model: Path, output: Path) -> dict[str, Any]:
    """What ends soonest: the three plans of two blocks inside the budget, none of them compared."""
    raw = raw_config(model, output)
    raw["sensitivity"] |= {"methods": ["fisher"]}
    raw["quantize"] |= {"group": "block"}
    raw["search"] |= {"steps": 2, "confirm": 1}
    raw["finetune"] = {"steps": 2, "compare": False}
    return raw


@pytest.fixture(scope="module")
def demo(checkout: Path) -> Path:
    """The checkout once the demo ran in it."""
    execute(checkout, "bash", "bash launch/demo.sh --quiet")
    return checkout


def newcomer(checkout: Path) -> dict[str, str]:
    """The environment of who works in the checkout."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_INDEX_URL")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    system = [place for place in os.environ["PATH"].split(":") if Path(place) != Path(sys.executable).parent]
    return environment | {
        "PATH": ":".join([str(checkout / ".venv" / "bin"), *system]),
        "PYTHON": sys.executable,
        "EDITOR": "cat",
        "HOME": str(checkout.parent),
    }


def execute(checkout: Path, language: str, text: str) -> None:
    """Run a block as a newcomer would: in the checkout, with its `.venv` on the path and nothing of ours."""
    environment = newcomer(checkout)
    command = ["bash", "-euo", "pipefail"] if language == "bash" else [str(checkout / ".venv/bin/python"), "-"]
    done = subprocess.run(
        command, input=text, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.docs
@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_block(block: Block, checkout: Path, request: pytest.FixtureRequest) -> None:
    if "runs/demo" in block.text:
        request.getfixturevalue("demo")
    if block.first.startswith("tensorboard "):
        shown(checkout, block.text)
    else:
        execute(checkout, block.language, block.text)


def shown(checkout: Path, command: str) -> None:
    """TensorBoard, from its start until it answers with the demo's trials and is ended."""
    words = shlex.split(command, comments=True)
    program = [str(checkout / ".venv/bin/python"), "-m", "tensorboard.main", *words[1:]]
    with serving(program, "trial-0000", checkout, newcomer(checkout)) as address:
        assert address.startswith("http://127.0.0.1:")


@pytest.mark.docs
@pytest.mark.parametrize("command", INLINE_RUNNABLE)
def test_command_in_prose(command: str, demo: Path) -> None:
    if command.startswith("tensorboard "):
        shown(demo, command)
        return
    if "plan.yaml" in command:
        execute(demo, "bash", "qpruner plan runs/demo > plan.yaml")
    if "export" in command:  # refuses to write over what a block before this wrote
        shutil.rmtree(demo / "runs/demo/export", ignore_errors=True)
    execute(demo, "bash", command)


FOLDERS = {
    "final": "runs/demo/final",
    "pruned": "runs/demo/prune",
    "merged": "runs/demo/export/merged",
    "peft": "runs/demo/export/peft/base",
}


@pytest.mark.docs
@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_only_our_import_loads_blocks_of_different_widths_and_mixed_bits(folder: str, demo: Path) -> None:
    """The columns of transformers in using.md, where blocks differ; `test_export.py` has those where they are alike."""
    for form in ("merged", "peft"):
        if not (demo / "runs/demo/export" / form).exists():
            execute(demo, "bash", f"qpruner export runs/demo --to {form}")
    load = f"""
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained("{folder}")
    """
    execute(demo, "python", f"import qpruner.hf\n{textwrap.dedent(load)}")
    with pytest.raises(AssertionError, match="Error"):
        execute(demo, "python", textwrap.dedent(load))
