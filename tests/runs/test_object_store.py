"""A run at a URI: folders are complete or missing on every machine. The S3 server is a real one on
loopback."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import flip_a_byte
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from object_store import Gate, Machine, Store, free_port
from plain_transformers import run_python
from test_run_dir import bank_record, folder_of, watched

from qpruner.cli.flow_verbs import where_next
from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs import logs
from qpruner.runs.events import Progress, StageFinished
from qpruner.runs.lock import NAME, hold_run
from qpruner.runs.logs import Uploader, logging_to
from qpruner.runs.records import BankRecord, SearchClock
from qpruner.runs.run_dir import LOG, RunDir
from qpruner.runs.storage import (
    base,
    display_name,
    exclusive,
    fetch,
    files_in,
    objects,
    published_folders,
    read_json,
    read_progress,
    storage_at,
    write_json,
    write_progress,
    writing_folder,
)
from qpruner.runs.storage.objects import mirror_of, objects_at


@pytest.fixture
def run(machine: Machine) -> RunDir:
    """A new run in the store, as a new machine sees it."""
    return machine("first")


UseProxy = Callable[[str, int], None]
"""Makes this process use a proxy at a port, which a variable of some name names."""


@pytest.fixture
def use_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[UseProxy]:
    """A function that makes this process use a proxy on loopback, which an environment variable
    names as many do."""

    def use(name: str, port: int) -> None:
        for each in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
            monkeypatch.delenv(each, raising=False)
            monkeypatch.delenv(each.lower(), raising=False)
        monkeypatch.setenv(name, f"127.0.0.1:{port}")
        objects.open_bucket.cache_clear()

    yield use
    objects.open_bucket.cache_clear()


def test_requests_go_through_the_proxy_of_the_environment(
    run: RunDir,
    store: Store,
    use_proxy: UseProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = run.root / "through.json"
    gate = Gate(store.port)
    use_proxy("HTTP_PROXY", gate.port)
    write_json(path, SearchClock(seconds=7.0))
    gate.shut()
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        storage_at(path).read()
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    objects.open_bucket.cache_clear()
    assert read_json(path, SearchClock) == SearchClock(seconds=7.0)


def test_https_is_tunnelled_through_its_own_proxy(use_proxy: UseProxy) -> None:
    asked = []

    def refuse() -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(2**16).partition(b"\r\n")[0].decode())
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, daemon=True).start()
        use_proxy("HTTPS_PROXY", listener.getsockname()[1])
        there = f"127.0.0.1:{free_port()}"
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            objects.open_bucket(
                "s3", "runs", f"endpoint_override={there}&region=us-east-1"
            ).get_file_info("runs/key")
    assert asked == [f"CONNECT {there} HTTP/1.1"]


def test_behind_a_proxy_the_region_must_be_given(
    use_proxy: UseProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_proxy("HTTPS_PROXY", free_port())
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"region of runs .*proxy.*set AWS_REGION"):
        objects.open_bucket("s3", "runs", "")


@pytest.mark.parametrize(("excluded", "through"), [("eu-central-1", False), ("us-east-1", True)])
def test_hosts_of_an_excluded_region_are_reached_directly(
    excluded: str,
    through: bool,
    use_proxy: UseProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As behind a proxy with an endpoint in the private network.

    This opens the bucket and asks it for nothing.
    """
    port = free_port()
    use_proxy("HTTPS_PROXY", port)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", f".{excluded}.amazonaws.com")
    opened = objects.open_bucket("s3", "runs", "region=eu-central-1")
    assert (str(port) in repr(opened.__reduce__())) == through


def go_through(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process reach the store at an address."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    objects.open_bucket.cache_clear()


def key_of(path: Path) -> str:
    there = objects_at(path)
    return there.key


# ---- names

FORM = "must be a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
OPTIONS = "a URI takes no options but endpoint_override, region, and scheme (http or https)"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://example.org/run", f"http://example.org/run {FORM}"),
        ("s3://bucket/a/../b", FORM),
        ("s3://bucket/" + "r" * 300, "must be shorter"),
        # A key may contain a slash; the rest of it then looks like the path of the URI.
        ("s3://AKIAKEY:HUSH/WORD@bucket/run", "credentials come from the environment"),
        ("s3://[AKIAKEY:HUSHWORD@bucket/run", FORM),
        (
            "s3://bucket/run?endpoint_override=http://AKIAKEY:HUSHWORD@store:9000",
            "credentials come from the",
        ),
        ("s3://bucket/run?access_key=AKIAKEY&secret_key=HUSHWORD", OPTIONS),
    ],
)
def test_other_uris_are_refused_and_keys_not_repeated(uri: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        mirror_of(uri)
    assert message in str(caught.value)
    assert not [word for word in ("HUSH", "WORD", "AKIAKEY") if word in str(caught.value)]


def test_a_path_finds_its_object_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "s3://bucket/team/run?endpoint_override=http://10.0.0.1:9000&region=eu-west-1"
    for cache in ("/home/anna/cache", "/home/bert/cache"):
        monkeypatch.setenv(objects.CACHE, cache)
        path = mirror_of(uri) / "records" / "prune.json"
        assert str(path).startswith(cache)
        assert display_name(path) == "s3://bucket/team/run/records/prune.json"
        assert RunDir(mirror_of(uri)).storage.address == uri
        # In quotes, because ? and & mean something to a shell.
        assert f"`qpruner plan '{uri}'`" in where_next(mirror_of(uri))
    assert "`qpruner plan s3://bucket/run`" in where_next(mirror_of("s3://bucket/run"))
    assert (
        display_name(Path("/shared/run"))
        == storage_at(Path("/shared/run")).address
        == "/shared/run"
    )
    assert objects_at(Path("/home/anna/cache/runs/x")) is None


# ---- files and folders


FETCH = """
import logging, sys
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import fetch
logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stdout)
for path in sorted(fetch(RunDir(sys.argv[1]).stage("prune")).iterdir()):
    print(path.read_text())
"""


@pytest.mark.parametrize("harm", [flip_a_byte, Path.unlink])
def test_a_damaged_copy_is_fetched_again(
    harm: Callable[[Path], object], run: RunDir, machine: Machine, tmp_path: Path
) -> None:
    """The next process that uses it downloads it, and later ones do not."""
    storage_at(run.stage("prune")).publish(folder_of(tmp_path, config="c", weights="w" * 1000))
    there = machine("second")
    weights = fetch(there.stage("prune")) / "weights"
    harm(weights)
    warning = (
        f"the copy {weights} on this machine is damaged; "
        f"downloading all of {there.place}/prune again"
    )
    for expected in ([warning, "c", "w" * 1000], ["c", "w" * 1000]):
        assert run_python(FETCH, there.place).splitlines() == expected


def test_a_copy_is_fetched_and_compared_once(run: RunDir, machine: Machine, tmp_path: Path) -> None:
    """Comparing a large model takes half a minute, and eight trials may start at once."""
    storage_at(run.stage("prune")).publish(
        folder_of(tmp_path, config="c", data__rows="r" * 100_000, data__empty="")
    )
    target = machine("second").stage("prune")
    pieces = []

    def num_pieces() -> int:
        """Fetch the folder, and return how many pieces were read."""
        pieces.clear()
        fetch(
            target,
            lambda: pieces.append(len(pieces)) if len(pieces) < 50 else pytest.fail("it waits"),
        )
        return len(pieces)

    with watched(tmp_path / "second") as calls:
        assert num_pieces() == 2
    assert target.is_relative_to(tmp_path / "second")
    assert (target / "data" / "rows").read_text() == "r" * 100_000
    assert (target / "data" / "empty").read_bytes() == b""
    assert files_in(target) == {"config": 1, "data/rows": 100_000, "data/empty": 0}
    named = calls.index("rename")
    # The files are durable before their list.
    assert {Path(call).name for call in calls[:named]} >= {"config", "data", "prune", "rows"}
    assert num_pieces() == 0
    base.verified.clear()  # as in another process
    with exclusive(target):  # comparing needs no lock
        assert num_pieces() == 2
        assert num_pieces() == 0


def test_waiting_for_a_folder_shows_progress(
    run: RunDir, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that waits or downloads must not look hung: here for another process, then for two
    files."""
    for name in ("PIECE_BYTES", "HASHED_BYTES"):
        monkeypatch.setattr(base, name, 2**16)
    pieces = {"one": 3, "other": 2}
    files = {name: "w" * (number * base.PIECE_BYTES - 1) for name, number in pieces.items()}
    storage_at(run.stage("prune")).publish(folder_of(tmp_path, **files))
    target = machine("second").stage("prune")
    heard = []
    another = ExitStack()
    another.enter_context(exclusive(target))

    def hear() -> None:
        heard.append(len(list(tmp_path.glob("second/scratch/*/prune/*"))))
        another.close()

    fetch(target, hear)
    assert heard[0] == 0
    assert len([number for number in heard if number]) >= sum(pieces.values())


def test_written_files_are_uploaded_and_not_downloaded(
    run: RunDir, store: Store, tmp_path: Path
) -> None:
    target = run.begin("prune")
    with writing_folder(target) as folder:
        folder.mkdir()
        (folder / "weights").write_text("w")
        assert not store.keys(key_of(target))
    run.commit("prune", target, bank_record())
    inode = (target / "weights").stat().st_ino
    assert (fetch(target) / "weights").stat().st_ino == inode
    assert set(store.keys(key_of(run.root))) == {
        "prune/weights",
        "prune.files.json",
        "records/prune.json",
    }
    assert run.begin("prune") == target
    # The old record goes before the old files.
    assert run.read_record("prune", BankRecord) is None
    entry = run.bank("base") / "nf4" / "q.safetensors"
    storage_at(entry).write(b"codes", durable=False)
    assert store.read(key_of(entry)) == b"codes"
    with pytest.raises(FileNotFoundError), writing_folder(target) as folder:
        (folder / "weights").read_text()
    # An unfinished folder replaces nothing.
    assert fetch(target).is_dir()


SEND = """
import sys
from pathlib import Path
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import storage_at
storage_at(RunDir(sys.argv[1]).stage("prune")).publish(Path(sys.argv[2]))
"""


def test_a_folder_uploaded_in_part_does_not_exist(
    machine: Machine, store: Store, tmp_path: Path
) -> None:
    """The small file arrives long before the large one."""
    there = machine("first")
    scratch = folder_of(tmp_path, small="s")
    (scratch / "large").write_bytes(bytes(96 * 2**20))
    with subprocess.Popen([sys.executable, "-c", SEND, there.place, str(scratch)]) as process:
        while not store.keys(key_of(there.root)):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert published_folders(there.root) == []
    with pytest.raises(CorruptFile, match="is missing or incomplete"):
        fetch(there.stage("prune"))
    storage_at(there.stage("prune")).publish(folder_of(tmp_path, after="1"))
    assert [path.name for path in fetch(there.stage("prune")).iterdir()] == ["after"]


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_changed_object_is_named(harm: str, run: RunDir, machine: Machine, store: Store) -> None:
    """By a download, and by a check on a machine whose own copy is intact."""
    with writing_folder(run.stage("prune")) as folder:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w" * 1000)
    path = run.stage("prune") / "weights"
    storage_at(path.parent).verify()
    store.damage(key_of(path)) if harm == "damaged" else store.delete(key_of(path))
    fetch(path.parent)
    place = run.place
    for is_fetched in (False, True):
        with pytest.raises(CorruptFile, match=f"{place}/prune/weights is {harm}") as caught:
            fetch(path.parent) if is_fetched else storage_at(path.parent).verify()
        assert caught.value.path == path
        path = machine("second").stage("prune") / "weights"
    # Nothing of it is taken for whole.
    assert not path.parent.exists()


# ---- a store that is away, or refuses


class Stores(BaseHTTPRequestHandler):
    """Answers as S3 and Google Cloud Storage do to a role that may use some objects, but not see
    the bucket."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        code = 200
        message = ""
        if "/b/" not in path:
            code = 403
            message = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        elif path.endswith("/b/runs") or "/b/secret" in path:
            code = 403
            message = "a@p.iam.gserviceaccount.com does not have storage.buckets.get access"
        elif "/b/runs/o" not in path:
            code = 404
            message = "The specified bucket does not exist."
        elif not path.endswith("/o"):
            code = 404
            message = "No such object: runs/mine"
        body = json.dumps(
            {"error": {"code": code, "message": message}}
            if message
            else {"kind": "storage#objects"}
        )
        data = (message if message.startswith("<") else body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://runs/mine", None),
        ("gs://secret/mine", "access is refused"),
        ("gs://other/mine", "there is no bucket other"),
        ("s3://runs/wrong-keys", "access is refused .*credentials come from the environment"),
    ],
)
def test_a_refusal_of_the_store_is_reported(
    uri: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client signs requests to Google itself, so any key works."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    as_text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {
        "type": "service_account",
        "client_email": "a@p.iam.gserviceaccount.com",
        "private_key_id": "k",
    }
    nowhere = {"token_uri": "http://127.0.0.1:9/", "private_key": as_text}
    (tmp_path / "key.json").write_text(json.dumps(account | nowhere))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    objects.open_bucket.cache_clear()
    with HTTPServer(("127.0.0.1", 0), Stores) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri += f"?scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
        try:
            if message is None:
                assert read_json(RunDir(uri).root / "run.json", SearchClock) is None
            else:
                with pytest.raises(UserError, match=f"`output`: .*{message}"):
                    RunDir(uri)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("how", ["unused-port", "unknown-host", "no-bucket"])
def test_an_unreachable_store_is_reported_within_seconds(
    how: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{run.place}-other"
    expected = "check the network and the endpoint"
    if how == "no-bucket":
        uri = "s3://no-such-bucket/run"
        expected = "there is no bucket no-such-bucket"
    else:
        go_through(
            f"127.0.0.1:{free_port()}" if how == "unused-port" else "nowhere.invalid:9000",
            monkeypatch,
        )
    started = time.monotonic()
    with pytest.raises(UserError, match=f"`output`.*{expected}"):
        RunDir(uri)
    assert time.monotonic() - started < 15


def test_a_store_away_for_a_while_is_waited_for(
    run: RunDir, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away for longer than one request lasts; both writing and reading wait for it."""
    path = run.root / "clock.json"
    gate = Gate(store.port)
    go_through(f"127.0.0.1:{gate.port}", monkeypatch)
    write_json(path, SearchClock(seconds=1.0))
    for action in (
        lambda: write_json(path, SearchClock(seconds=2.0)),
        lambda: read_json(path, SearchClock),
    ):
        gate.shut()
        threading.Timer(1.0, gate.open).start()
        started = time.monotonic()
        found = action()
        assert time.monotonic() - started > 0.9
    assert found == SearchClock(seconds=2.0)
    gate.shut()


def test_a_store_that_stays_away_is_reported_with_the_remedy(
    run: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_through(f"127.0.0.1:{free_port()}", monkeypatch)
    error = r"cannot be reached \(NETWORK.*\n.*bring the storage back"
    with pytest.raises(StorageError, match=f"{run.place}/clock.json {error}"):
        write_json(run.root / "clock.json", SearchClock(seconds=2.0), patience_seconds=0.4)
    assert not write_progress(run.root / "pulse.json", "fails at once")
    assert read_progress(run.root / "pulse.json") is None
    with (
        pytest.raises(StorageError, match=f"{run.place}/{NAME} {error}"),
        hold_run(run.root, print),
    ):
        pass
    (run.root / LOG).write_text("begun")
    uploader = Uploader(run.root, "tensorboard", LOG)
    uploader.listen(StageFinished("prune", 1.0, ""))
    uploader.close()
    assert caplog.text.count("could not be uploaded, which is tried again: ") == 2


def test_changed_files_are_uploaded(
    run: RunDir, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that only an earlier command wrote are deleted."""
    folder = run.root / "tensorboard"
    key = key_of(run.root)
    store.write(f"{key}/tensorboard/old", b"of an earlier command")
    uploader = Uploader(run.root, "tensorboard", LOG)
    folder.mkdir(parents=True)
    for text in ("one", "two"):
        (folder / "events").write_text(text)
        (run.root / LOG).write_text("begun")
        uploader.listen(StageFinished("prune", 1.0, ""))
        assert store.read(f"{key}/tensorboard/events") == text.encode()
        monkeypatch.setattr(logs, "SECONDS_BETWEEN", 0.0)
    (folder / "events").write_text("within a stage, when it is due")
    uploader.listen(Progress("finetune", 1, 2, "steps"))
    assert store.read(f"{key}/tensorboard/events").startswith(b"within")
    uploader.close()
    assert set(store.keys(key)) == {"tensorboard/events", LOG}


def test_a_log_continues_that_of_other_machines(machine: Machine) -> None:
    """Two commands on one machine may also log at once: the second is refused only after its log is
    open."""
    here = machine("first")
    logger = logging.getLogger("qpruner.test")
    log = here.root / LOG
    with logging_to(here.root):
        logger.info("begun")
        with logging_to(here.root):
            logger.info("not uploaded yet")
        storage_at(log).put(log)
        logger.info("killed before the upload")
    with logging_to(here.root):
        logger.info("again")
    text = log.read_text()
    assert [
        text.count(line) for line in ("begun", "not uploaded yet", "killed before", "again")
    ] == [1, 2, 1, 1]
    storage_at(log).put(log)
    there = machine("second").root / LOG
    with logging_to(there.parent):
        logger.info("elsewhere")
    assert there.read_text().startswith(text)
    storage_at(there).put(there)
    with logging_to(machine("first").root):
        assert "elsewhere" in log.read_text()
