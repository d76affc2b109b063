"""Atomic writes: either the old file or the new one."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from permjax.files import atomic_path

pytestmark = pytest.mark.fast


def test_the_file_appears_under_its_name_only_when_it_is_complete(tmp_path):
    target = tmp_path / "metrics.json"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")

    def write_half(error):
        with atomic_path(str(target)) as temporary:
            temporary.write_text("half")
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_old_file_is_replaced_whole(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("a long old text")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_a_file_swapped_in_by_the_writer_is_kept(tmp_path):
    target, own = tmp_path / "out", tmp_path / "own"
    with atomic_path(target) as temporary:
        own.write_text("written elsewhere")
        os.replace(own, temporary)
    assert target.read_text() == "written elsewhere"


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("x")
    assert calls == ["fsync", "replace", "fsync"]


def test_the_permissions_are_those_of_an_ordinary_new_file(tmp_path):
    ordinary, target = tmp_path / "ordinary", tmp_path / "atomic"
    old = os.umask(0o027)
    try:
        ordinary.write_text("x")
        with atomic_path(target) as temporary:
            temporary.write_text("x")
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode) == 0o640


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_path(tmp_path / "nowhere" / "x"):
        raise AssertionError("the block must not run")


KILLED = """
import os, signal, sys
from permjax.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
