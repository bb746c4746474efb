"""Downloads from a server on this machine that can be cut, lie, refuse or know no ranges."""

import hashlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import download_pretrained
from tools.download_pretrained import WEIGHTS, Weights
from utils.download import download, file_sha256
from utils.errors import InputError

CONTENT = bytes(range(1, 251)) * 4000  # 1 MB that does not begin like a page
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SCRIPT = Path(download_pretrained.__file__)


class Handler(BaseHTTPRequestHandler):
    """Serves server.content in the way that the test set."""

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = self._start()
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            shown = start + server.shift
            self.send_header("Content-Range", f"bytes {shown}-{len(server.content) - 1}/*")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.date:
            self.send_header("Last-Modified", server.date)
        self.send_header("Content-Type", server.content_type)
        if server.has_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : server.cuts.pop(0) if server.cuts else None])

    def _start(self) -> int:
        mark = self.headers.get("If-Range")
        is_same = mark is not None and mark in (self.server.etag, self.server.date)
        if not (self.server.knows_ranges and is_same and self.headers.get("Range")):
            return 0
        return int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    server.content, server.content_type = CONTENT, "application/octet-stream"
    server.etag, server.date, server.has_length, server.knows_ranges = '"1"', None, True, True
    server.cuts = []  # absolute byte at which each coming answer ends
    server.statuses = []  # what the coming answers are instead of the file
    server.shift = 0  # error of the place that Content-Range tells
    server.ranges = []  # Range header of each request so far
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pretrained" / "weights.pth"


def fetch(server, path, **changes):
    return download(server.url, path, **{"wait_s": 0.0, "tries": 3, **changes})


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


class TestDownload:
    def test_whole_file(self, server, path):
        seen = []
        digest = fetch(server, path, on_progress=lambda *sizes: seen.append(sizes))
        assert digest == SHA256 == file_sha256(path)
        assert path.read_bytes() == CONTENT and files(path) == ["weights.pth"]
        assert seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 1
        assert [size for size, _ in seen] == sorted(size for size, _ in seen)

    @pytest.mark.parametrize(
        ("etag", "date"),
        [('"1"', None), ('W/"1"', "Mon, 01 Jan 2024 00:00:00 GMT"), (None, "yesterday")],
        ids=["strong etag", "weak etag and date", "date"],
    )
    def test_cut_transfer_goes_on(self, server, path, etag, date):
        server.etag, server.date = etag, date
        server.cuts = [300_000, 300_100]
        assert fetch(server, path) == SHA256
        assert server.ranges == [None, "bytes=300000-", "bytes=300100-"]
        assert path.read_bytes() == CONTENT and files(path) == ["weights.pth"]

    def test_next_run_goes_on(self, server, path):
        server.cuts = [400_000]
        with pytest.raises(InputError, match=r"400,000 of 1,000,000 .* goes on at byte 400,000"):
            fetch(server, path, tries=1)
        assert files(path) == ["weights.pth.part", "weights.pth.part.tag"]
        seen = []
        assert fetch(server, path, on_progress=lambda *sizes: seen.append(sizes)) == SHA256
        assert server.ranges[-1] == "bytes=400000-"
        assert seen[0][0] > 400_000 and seen[-1] == (len(CONTENT), len(CONTENT))

    def test_changed_file_starts_over(self, server, path):
        server.cuts = [400_000]
        with pytest.raises(InputError):
            fetch(server, path, tries=1)
        server.content, server.etag = CONTENT[::-1], '"2"'
        fetch(server, path)
        assert path.read_bytes() == CONTENT[::-1]

    def test_part_without_a_tag_starts_over(self, server, path):
        path.parent.mkdir()
        path.with_name("weights.pth.part").write_bytes(b"x" * 500)
        assert fetch(server, path) == SHA256
        assert server.ranges == [None]

    @pytest.mark.parametrize("has_mark", [True, False])
    def test_server_without_ranges_starts_over(self, server, path, has_mark):
        server.knows_ranges = False
        server.etag = server.etag if has_mark else None
        server.cuts = [300_000]
        assert fetch(server, path) == SHA256
        assert server.ranges == [None, "bytes=300000-" if has_mark else None]
        assert path.read_bytes() == CONTENT

    def test_wrong_place_is_not_appended(self, server, path):
        server.cuts, server.shift = [300_000], 7
        assert fetch(server, path) == SHA256
        assert server.ranges == [None, "bytes=300000-", None]

    def test_part_as_long_as_the_file_starts_over(self, server, path):
        path.parent.mkdir()
        path.with_name("weights.pth.part").write_bytes(b"x" * len(CONTENT))
        path.with_name("weights.pth.part.tag").write_text('"1"')
        assert fetch(server, path) == SHA256
        assert server.ranges == [f"bytes={len(CONTENT)}-", None]

    def test_steady_progress_needs_no_further_tries(self, server, path):
        server.cuts = [100_000 * (i + 1) for i in range(9)]
        assert fetch(server, path, tries=2) == SHA256
        assert len(server.ranges) == 10

    def test_no_progress_ends(self, server, path):
        server.knows_ranges = False
        server.cuts = [300_000] * 9
        with pytest.raises(InputError, match="300,000 of 1,000,000 bytes"):
            fetch(server, path)
        assert len(server.ranges) == 3
        assert not path.exists()

    def test_busy_server_is_asked_again(self, server, path, caplog):
        server.statuses = [503, 429]
        assert fetch(server, path) == SHA256
        assert [record.getMessage()[:40] for record in caplog.records] == [
            "weights.pth: the server answered 503 Ser",
            "weights.pth: the server answered 429 Too",
        ]

    def test_missing_file_is_not_asked_again(self, server, path):
        server.statuses = [404, 404]
        with pytest.raises(InputError, match="answered 404"):
            fetch(server, path)
        assert len(server.ranges) == 1 and files(path) == []

    def test_no_server(self, server, path):
        with pytest.raises(InputError, match="no connection"):
            download("http://127.0.0.1:9/weights.pth", path, tries=2, wait_s=0)
        assert not path.exists()

    @pytest.mark.parametrize("url", ["weights.pth", "file:///etc/hosts", "http://a b/c", "http://"])
    def test_no_address(self, path, url):
        with pytest.raises(InputError, match="no address|no connection"):
            download(url, path, tries=1)

    @pytest.mark.parametrize(
        ("content", "content_type"),
        [(b"\n <!DOCTYPE html><html>", "application/octet-stream"), (CONTENT, "text/html")],
        ids=["content", "type"],
    )
    def test_page_is_refused_and_the_part_kept(self, server, path, content, content_type):
        server.cuts = [400_000]
        with pytest.raises(InputError):
            fetch(server, path, tries=1)
        server.content, server.content_type, server.etag = content, content_type, '"login"'
        with pytest.raises(InputError, match="web page instead of the file"):
            fetch(server, path)
        assert not path.exists()
        assert path.with_name("weights.pth.part").stat().st_size == 400_000

    def test_wrong_checksum_leaves_nothing(self, server, path):
        with pytest.raises(InputError, match=f"SHA-256 {SHA256} instead of {'0' * 64}"):
            fetch(server, path, sha256="0" * 64)
        assert files(path) == []

    def test_empty_answer(self, server, path):
        server.cuts = [0, 0, 0]
        with pytest.raises(InputError, match="no content"):
            fetch(server, path)
        assert files(path) == []

    def test_unknown_length_needs_a_checksum(self, server, path):
        server.has_length = False
        with pytest.raises(InputError, match="does not tell the file's length"):
            fetch(server, path)
        assert files(path) == []
        assert fetch(server, path, sha256=SHA256) == SHA256

    def test_too_little_room_is_said_before(self, server, path, monkeypatch):
        usage = shutil.disk_usage("/")._replace(free=999_999)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match="1 MB free and 1 MB are needed"):
            fetch(server, path)
        assert files(path) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_full_disk(self, server, path):
        path.parent.mkdir()
        path.with_name("weights.pth.part").symlink_to("/dev/full")
        with pytest.raises(InputError, match="cannot be written: No space left"):
            fetch(server, path)
        assert not path.exists()


@pytest.fixture
def small_weights(server, monkeypatch) -> None:
    """Both files are served from this machine: one with a published checksum, one without."""
    monkeypatch.setitem(WEIGHTS, "clip", Weights(server.url, "ViT-B-32.pt", SHA256))
    monkeypatch.setitem(WEIGHTS, "vmamba", Weights(server.url, "vmamba.pth", None))


def run(tmp_path: Path, *arguments: str) -> None:
    download_pretrained.main([*arguments, "--out", str(tmp_path / "out")])


@pytest.mark.usefixtures("small_weights")
class TestCommand:
    def test_all(self, tmp_path, capsys):
        run(tmp_path, "all")
        names = sorted(p.name for p in (tmp_path / "out").iterdir())
        assert names == ["ViT-B-32.pt", "vmamba.pth", "vmamba.pth.sha256"]
        printed = capsys.readouterr().out
        assert printed.count(SHA256) == 2
        assert "published checksum" in printed and "checked from now on" in printed

    def test_present_file_is_checked_and_not_fetched(self, tmp_path, server, capsys):
        run(tmp_path, "all")
        run(tmp_path, "all")
        assert len(server.ranges) == 2
        assert capsys.readouterr().out.count("was there already") == 2

    @pytest.mark.parametrize(("what", "name"), [("clip", "ViT-B-32.pt"), ("vmamba", "vmamba.pth")])
    def test_damaged_file_is_named_and_stays(self, tmp_path, what, name):
        run(tmp_path, what)
        damaged = tmp_path / "out" / name
        damaged.write_bytes(CONTENT[:-1])
        with pytest.raises(InputError, match=f"instead of {SHA256}; delete it"):
            run(tmp_path, what)
        assert damaged.read_bytes() == CONTENT[:-1]

    def test_noted_checksum_holds_for_a_new_download(self, tmp_path, server):
        run(tmp_path, "vmamba")
        (tmp_path / "out" / "vmamba.pth").unlink()
        server.content = CONTENT[::-1]
        with pytest.raises(InputError, match=f"instead of {SHA256}"):
            run(tmp_path, "vmamba")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["vmamba.pth.sha256"]

    def test_note_can_be_read_by_sha256sum(self, tmp_path):
        run(tmp_path, "vmamba")
        note = tmp_path / "out" / "vmamba.pth.sha256"
        assert note.read_text() == f"{SHA256}  vmamba.pth\n"
        note.write_text("nothing\n")
        with pytest.raises(InputError, match="does not begin with a SHA-256"):
            run(tmp_path, "vmamba")

    def test_file_put_there_by_hand_is_noted(self, tmp_path, server):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "vmamba.pth").write_bytes(CONTENT)
        run(tmp_path, "vmamba")
        assert server.ranges == []
        assert SHA256 in (tmp_path / "out" / "vmamba.pth.sha256").read_text()

    def test_page_put_there_by_hand_is_refused(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "vmamba.pth").write_bytes(b"<html>log in</html>")
        with pytest.raises(InputError, match="is a web page"):
            run(tmp_path, "vmamba")

    def test_mirror_must_hold_the_same_file(self, tmp_path, server, monkeypatch):
        monkeypatch.setitem(WEIGHTS, "clip", Weights("http://127.0.0.1:9/", "ViT-B-32.pt", SHA256))
        run(tmp_path, "clip", "--url", server.url)
        assert (tmp_path / "out" / "ViT-B-32.pt").read_bytes() == CONTENT
        with pytest.raises(InputError, match="--url is the address of one file"):
            run(tmp_path, "all", "--url", server.url)


def test_published_addresses():
    """The folder of OpenAI's file is named after its checksum."""
    clip = WEIGHTS["clip"]
    assert f"/{clip.sha256}/{clip.file}" in clip.url and len(clip.sha256) == 64
    assert WEIGHTS["vmamba"].url.endswith(f"/%23v2cls/{WEIGHTS['vmamba'].file}")


def test_started_as_a_program(server, tmp_path):
    """Bad input is one line and exit code 2; what was begun is taken up again."""
    command = [sys.executable, str(SCRIPT), "clip", "--out", str(tmp_path), "--url", server.url]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {server.url} has the SHA-256 ")
    assert list(tmp_path.iterdir()) == []
    result = subprocess.run([*command, "--nothing"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
