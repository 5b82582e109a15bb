"""The package indexes of the thin wheels, used as users do: served over HTTP to pip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import index

TAG = "py3-none-any"  # the index does not look at it, and so pip takes them on every machine


def make_wheel(directory: Path, version: str, python: str = ">=3.10", project: str = "fused_conv_bn") -> Path:
    dist_info = f"{project}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\nRequires-Python: {python}\n"
    files = {"METADATA": metadata, "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {TAG}\n"}
    path = directory / f"{project}-{version}-{TAG}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{dist_info}/{name}", text)
        archive.writestr(f"{dist_info}/RECORD", "".join(f"{dist_info}/{name},,\n" for name in [*files, "RECORD"]))
    return path


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """Indexes of two flavours and several versions, on a static host. Yields its address."""
    (tmp_path / "wheels").mkdir()
    for version in ("0.9.0", "0.10.0", "0.2.0"):
        make_wheel(tmp_path / "wheels", f"{version}+cpu")
    make_wheel(tmp_path / "wheels", "0.11.0+cpu", python=">=3.99,<4")
    make_wheel(tmp_path / "wheels", "0.12.0+cu130")
    for version in ("0.13.0", "0.13.0+partial"):
        make_wheel(tmp_path / "wheels", version)
    make_wheel(tmp_path / "wheels", "0.13.0+cpu", project="other")
    index.build(tmp_path / "wheels", tmp_path / "out")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(tmp_path / "out")))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pip_download(url: str, to: Path) -> subprocess.CompletedProcess[str]:
    """With none of this machine's settings."""
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith("PIP_")}
    env |= {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "localhost", "no_proxy": "localhost"}
    command = ["pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--retries=0"]
    command += [f"--index-url={url}/", f"--dest={to}", "fused_conv_bn"]
    return subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("flavour", "version"), [("cpu", "0.10.0"), ("cu130", "0.12.0")])
def test_pip_finds_the_newest_that_fits(flavour: str, version: str, host: str, tmp_path: Path) -> None:
    result = pip_download(f"{host}/{flavour}", tmp_path / "got")
    assert result.returncode == 0, result.stderr
    (got,) = (tmp_path / "got").iterdir()
    assert got.name == f"fused_conv_bn-{version}+{flavour}-{TAG}.whl"
    assert got.read_bytes() == (tmp_path / "wheels" / got.name).read_bytes()


def test_pip_refuses_a_changed_wheel(host: str, tmp_path: Path) -> None:
    served = tmp_path / "out" / "cu130" / "fused-conv-bn" / f"fused_conv_bn-0.12.0+cu130-{TAG}.whl"
    served.write_bytes(served.read_bytes() + b"\0")
    result = pip_download(f"{host}/cu130", tmp_path / "got")
    assert result.returncode != 0 and "DO NOT MATCH THE HASHES" in result.stderr


def test_pages(host: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cpu", "cu130"]
    assert 'href="fused-conv-bn/"' in (out / "cpu" / "index.html").read_text()
    text = (out / "cpu" / "fused-conv-bn" / "index.html").read_text()
    assert re.findall(r">fused_conv_bn-([\d.]+)\+cpu-", text) == ["0.2.0", "0.9.0", "0.10.0", "0.11.0"]
    assert f'href="fused_conv_bn-0.2.0%2Bcpu-{TAG}.whl#sha256=' in text
    assert 'data-requires-python="&gt;=3.99,&lt;4"' in text


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path, "1.0")
    with pytest.raises(SystemExit, match=r"no wheel of fused-conv-bn with local version cpu, cu124, cu130: make them"):
        index.build(tmp_path, tmp_path / "out")
    assert "left out: fused_conv_bn-1.0-py3-none-any.whl is not a wheel of" in capsys.readouterr().out
    (tmp_path / "wrong.whl").touch()
    with pytest.raises(SystemExit, match=r"wrong\.whl is not named as a wheel has to be"):
        index.build(tmp_path, tmp_path / "out")
