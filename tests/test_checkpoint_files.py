"""The folder of checkpoints: complete or not there, which ones stay, and messages for what cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from apo_megatron.actor.checkpoint_files import CheckpointFolder
from apo_megatron.actor.checkpoint_state import FORMAT_VERSION, CheckpointState
from apo_megatron.errors import CheckpointError
from apo_megatron.files import write_atomically


def _state(step: int, **metrics: float | None) -> CheckpointState:
    return CheckpointState(
        step=step,
        policy_version=step,
        consecutive_skips=0,
        scheduler={},
        parts={},
        reference=None,
        metrics=dict(metrics),
        settings={},
        layout={},
        files={},
    )


def _save(files: CheckpointFolder, step: int, **metrics: float | None) -> Path:
    partial = files.begin(step)
    (partial / "__0_0.distcp").write_bytes(b"12345")
    (partial / "hf").mkdir()
    (partial / "hf" / "config.json").write_text("{}")
    return files.complete(partial, _state(step, **metrics))


def _steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_appears_complete_and_latest_names_it(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path / "checkpoints")
    assert files.latest() is None
    folder = _save(files, 4, reward=0.5)
    assert files.latest() == folder == tmp_path / "checkpoints" / "step_000004"
    state = files.read(folder)
    assert (state.step, state.metrics) == (4, {"reward": 0.5})
    assert state.files == {"__0_0.distcp": 5, "hf/config.json": 2}
    unfinished = files.begin(8)
    assert files.latest() == folder
    assert files.begin(8) != unfinished and not unfinished.exists()


def test_a_newer_checkpoint_than_latest_is_replaced(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    for step in (1, 2):
        _save(files, step, reward=0.0)
    (tmp_path / "latest").write_text("step_000001\n")  # by hand, to go on from there
    assert files.read(_save(files, 2, reward=1.0)).metrics == {"reward": 1.0}
    assert _steps(tmp_path) == ["latest", "step_000001", "step_000002"]
    with pytest.raises(AssertionError):
        files.begin(2)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path, keep_last=2, keep_best=2, best_metric="eval/pass_at_8")
    foreign = tmp_path / "step_000000"
    foreign.mkdir()
    for step, score in enumerate((0.3, 0.9, None, 0.5, 0.5, 0.1, None), 1):
        _save(files, step, **{"eval/pass_at_8": score})
    kept = ["step_000002", "step_000005", "step_000006", "step_000007"]  # of equal ones the later
    assert _steps(tmp_path) == ["latest", foreign.name, *kept]


def test_newer_checkpoints_of_a_run_that_was_given_up_do_not_count(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path, keep_last=2, keep_best=1, best_metric="reward")
    _save(CheckpointFolder(tmp_path), 200, reward=0.1)
    _save(CheckpointFolder(tmp_path), 230, reward=0.8)
    _save(CheckpointFolder(tmp_path), 300, reward=0.9)
    (tmp_path / "latest").write_text("step_000200")  # by hand
    for step, reward in ((210, 0.7), (220, 0.5), (230, 0.2), (240, 0.3)):
        _save(files, step, reward=reward)
    assert _steps(tmp_path) == ["latest", "step_000210", "step_000230", "step_000240", "step_000300"]


def test_no_checkpoint_is_removed_for_one_that_is_saved_beside_them(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path, keep_last=1)
    _save(files, 1)
    files.complete(files.begin(2), _state(2), keep_all=True)
    assert _steps(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_without_limits_all_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(CheckpointFolder(tmp_path), step)
    assert len(_steps(tmp_path)) == 4


@pytest.mark.parametrize("content", ["", "../elsewhere", "step_000001/../../x", "/tmp", "step_1"])
def test_latest_names_only_checkpoints(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match="expected a name such as step_000010"):
        CheckpointFolder(tmp_path).latest()


def test_a_latest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(b"step_\xff")
    with pytest.raises(CheckpointError, match="expected a name such as step_000010"):
        CheckpointFolder(tmp_path).latest()


def test_latest_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = MagicMock()
    monkeypatch.setattr(os, "fsync", calls.fsync)
    monkeypatch.setattr(os, "replace", calls.replace)
    write_atomically(tmp_path / "latest", "step_000001")
    assert [name for name, _, _ in calls.mock_calls] == ["fsync", "replace"]


def test_latest_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_000010\n")
    with pytest.raises(CheckpointError, match="names step_000010, which is not there"):
        CheckpointFolder(tmp_path).latest()


def _edit(folder: Path, **values: object) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    damages = {
        "__0_0.distcp: 3 bytes found, 5 bytes expected": lambda f: (f / "__0_0.distcp").write_bytes(b"123"),
        "config.json: missing, 2 bytes expected": lambda f: (f / "hf" / "config.json").unlink(),
        "state.json: missing, so .* is not a training checkpoint": lambda f: (f / "state.json").unlink(),
        "state.json: damaged": lambda f: (f / "state.json").write_text("{"),
        f"format_version {FORMAT_VERSION + 1} found, {FORMAT_VERSION} expected: .* newer version": lambda f: (
            _edit(f, format_version=FORMAT_VERSION + 1)
        ),
        "format_version None found": lambda f: (f / "state.json").write_text('{"step": 3}'),
        "state.json: damaged .step: .* valid integer, found 'x'": lambda f: _edit(f, step="x"),
        "state.json: damaged .files: .* an object": lambda f: _edit(f, files=[]),
        "state.json: damaged .settings: .* found 'None'": lambda f: _edit(f, settings=None),
        r"fields missing or unknown: surplus\)": lambda f: _edit(f, surplus=1),
    }
    for step, (message, damage) in enumerate(damages.items(), 1):
        folder = _save(files, step)
        damage(folder)
        with pytest.raises(CheckpointError, match=message):
            files.read(folder)
