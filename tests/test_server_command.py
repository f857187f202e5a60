"""How servers are called: arguments, environment, key, ports, GPUs. Nothing is started."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from apo_megatron.config import ModelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import ConfigError
from apo_megatron.parallel.server_devices import devices_for_servers
from apo_megatron.rollout.server_command import ServerCommand, hold_port

KEY = "a-secret-Key_1"


def command(tmp_path: Path, on_cpu: bool = True, **settings: object) -> ServerCommand:
    cfg = SGLangConfig.model_validate({"python": sys.executable, **settings})
    return ServerCommand(cfg, ModelConfig(hf_path=str(tmp_path), dtype="float32"), on_cpu)


def value_after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_the_command_line_says_what_the_config_says(tmp_path: Path) -> None:
    words = command(tmp_path, tensor_parallel_size=2, server_args=("--max-total-tokens", "99")).words(
        1234, "me"
    )
    assert words[0] == sys.executable  # not resolved: .venv/bin/python is a link
    assert value_after(words, "--model-path") == str(tmp_path)
    assert value_after(words, "--port") == "1234"
    assert value_after(words, "--served-model-name") == "me"
    assert value_after(words, "--tp-size") == "2"
    assert value_after(words, "--dtype") == "float32"
    assert value_after(words, "--host") == "127.0.0.1"
    assert words[-2:] == ["--max-total-tokens", "99"]  # last, so that it wins
    assert value_after(words, "--device") == "cpu"
    assert "--device" not in command(tmp_path, on_cpu=False).words(1234, "me")


def test_memory_saver_where_gpus_are_shared(tmp_path: Path) -> None:
    assert "--enable-memory-saver" in command(tmp_path, on_cpu=False, colocated=True).words(1, "me")
    assert "--enable-memory-saver" not in command(tmp_path, on_cpu=False).words(1, "me")


def test_a_model_of_the_hub_keeps_its_name_and_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cfg = SGLangConfig(python=sys.executable)
    of_the_hub = ServerCommand(cfg, ModelConfig(hf_path="Qwen/Qwen3-8B"), on_cpu=True)
    assert value_after(of_the_hub.words(1, "me"), "--model-path") == "Qwen/Qwen3-8B"
    assert "HF_HUB_OFFLINE" not in of_the_hub.environment({})
    assert command(tmp_path).environment({})["HF_HUB_OFFLINE"] == "1"


def test_the_environment_has_nothing_of_the_trainers_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torchrun's variables SGLang would wait for the trainer's store instead of opening its own."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HTTPS_PROXY", "kept")
    environment = command(tmp_path).environment({"VISIBLE": "3"})
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & set(environment)
    assert environment["HTTPS_PROXY"] == "kept"
    assert environment["VISIBLE"] == "3"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"


def test_the_key_is_in_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    with_key = command(tmp_path)
    assert with_key.api_key == KEY
    assert KEY not in " ".join(with_key.words(1, "me"))
    monkeypatch.setenv("SGLANG_API_KEY", "")
    assert command(tmp_path).api_key is None


@pytest.mark.parametrize("key", ["two words", "quote'd", "back\\slash", "ümlaut", "line\nbreak"])
def test_a_key_that_no_header_can_carry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", key)
    with pytest.raises(ConfigError, match="SGLANG_API_KEY") as caught:
        command(tmp_path)
    assert key not in str(caught.value)


@pytest.mark.parametrize("words", [("--api-key", "x"), ("--port=1",), ("--model", "m")])
def test_arguments_with_a_field_of_their_own_are_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"server_args has {words[0].split('=')[0]}, "):
        command(tmp_path, server_args=words)


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="rollout.sglang.python=no_such_python: no such program.*make sglang-cpu"
    ):
        command(tmp_path, python="no_such_python")


def test_a_held_port_is_free_for_a_server_only() -> None:
    with hold_port("127.0.0.1") as holder:
        port = holder.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for _ in range(2):  # a restarted one too
            with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
                pass
    with socket.socket() as other:  # and for everybody afterwards
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="rollout.sglang.host=192.0.2.1: cannot bind"):
        hold_port("192.0.2.1")


def test_servers_take_the_gpus_after_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "CUDA_VISIBLE_DEVICES"
    monkeypatch.setenv(variable, "2,3,4,5,6,7")
    assert devices_for_servers(2, 2, num_trainer_gpus=2, colocated=False) == [
        {variable: "4,5"},
        {variable: "6,7"},
    ]
    assert devices_for_servers(3, 2, num_trainer_gpus=6, colocated=True) == [
        {variable: "2,3"},
        {variable: "4,5"},
        {variable: "6,7"},
    ]
    with pytest.raises(
        ConfigError, match=r"num_servers=2 x tensor_parallel_size=2 GPUs beside the trainer's 3"
    ):
        devices_for_servers(2, 2, num_trainer_gpus=3, colocated=False)
