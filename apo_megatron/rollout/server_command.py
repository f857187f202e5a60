"""How SGLang is called: the command line and the environment of one server."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

from apo_megatron.config.model import ModelConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import ConfigError
from apo_megatron.parallel.server_devices import without_trainer

_MODULE = "sglang.launch_server"
# SGLang takes its key from its arguments, which every user of the machine can list. So with a key it is
# started by these lines, which take the key from the environment to where only the process itself sees it.
_START_WITH_KEY = (
    "import os, runpy, sys; "
    "sys.argv += ['--api-key', os.environ[{variable!r}]]; "
    f"runpy.run_module({_MODULE!r}, run_name='__main__', alter_sys=True)"
)
# What a bearer token may consist of (RFC 6750). A log never spells it in another way, so it is found there.
_KEY = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_CPU_ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "20000", "--max-running-requests", "64"),
    "--skip-server-warmup",  # it compiles kernels, and there are none
    "--sleep-on-idle",  # the scheduler would take a core, from the trainer, to look for requests
)
_CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# These have fields of their own, or are chosen by the one who starts the server.
_NOT_IN_SERVER_ARGS = ("--api-key", "--host", "--port", "--model-path", "--model", "--served-model-name")


def read_api_key(cfg: SGLangConfig) -> str | None:
    """The servers' API key; None where the environment variable is not set, or empty.

    Raises ConfigError for one that cannot be sent as a bearer token.
    """
    key = os.environ.get(cfg.api_key_variable, "")
    if key and not _KEY.fullmatch(key):
        raise ConfigError(
            f"rollout.sglang.api_key_variable={cfg.api_key_variable}: the key in this environment variable "
            "has characters that a bearer token cannot have: use letters, digits and -._~+/"
        )
    return key or None


class ServerCommand:
    """What is the same at every start of every server."""

    def __init__(self, cfg: SGLangConfig, model: ModelConfig, on_cpu: bool) -> None:
        """Raises ConfigError for settings with which no server can start."""
        python = shutil.which(cfg.python)
        if python is None:
            raise ConfigError(
                f"rollout.sglang.python={cfg.python}: no such program. Name the interpreter of the "
                "environment that has sglang (`make sglang-cpu` builds one for CPUs: .venv-sglang/bin/python)"
            )
        forbidden = sorted(set(_NOT_IN_SERVER_ARGS) & {word.split("=")[0] for word in cfg.server_args})
        if forbidden:
            raise ConfigError(
                f"rollout.sglang.server_args has {', '.join(forbidden)}, which the run sets itself: use "
                "rollout.sglang.host, model.hf_path, and the variable of api_key_variable for the key"
            )
        self.api_key = read_api_key(cfg)
        # Asked to end, SGLang frees what the kernel does not (shared memory of communication between GPUs).
        self.ends_when_asked = not on_cpu
        self._cfg, self._on_cpu = cfg, on_cpu
        self._python = os.path.abspath(python)  # not resolved: a link into a virtual environment is the point
        folder = Path(model.hf_path)
        self._is_local = folder.is_dir()
        self.model = str(folder.resolve()) if self._is_local else model.hf_path
        self._dtype = model.dtype

    def words(self, port: int, served_model_name: str) -> list[str]:
        """The command line. It never holds the API key."""
        start = ["-m", _MODULE]
        if self.api_key is not None:
            start = ["-c", _START_WITH_KEY.format(variable=self._cfg.api_key_variable)]
        return [
            *(self._python, *start, "--model-path", self.model, "--served-model-name", served_model_name),
            *("--host", self._cfg.host, "--port", str(port), "--dtype", self._dtype),
            *("--tp-size", str(self._cfg.tensor_parallel_size), "--skip-tokenizer-init"),
            *("--log-level-http", "warning"),  # not a line for each request
            *(_CPU_ARGUMENTS if self._on_cpu else ()),
            *(("--enable-memory-saver",) if self._cfg.colocated and not self._on_cpu else ()),
            *self._cfg.server_args,
        ]

    def environment(self, devices: dict[str, str]) -> dict[str, str]:
        """All variables, with those that choose its ``devices``."""
        inherited = without_trainer(os.environ)
        inherited.setdefault("PYTHONUNBUFFERED", "1")  # a log ends with what was printed last
        if self._is_local:
            inherited.setdefault("HF_HUB_OFFLINE", "1")  # on a node without network each look costs minutes
        return {**inherited, **(_CPU_ENVIRONMENT if self._on_cpu else {}), **devices}


def hold_port(host: str) -> socket.socket:
    """A free port of ``host``, chosen by the kernel and kept: ``getsockname()[1]``.

    The socket is bound but does not listen. As long as it is open the kernel gives the port to nobody who
    asks for any port or connects, while a server that asks for this one (with SO_REUSEADDR, as servers do)
    may listen on it, again after each restart.

    Raises ConfigError where ``host`` is no address of this machine.
    """
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
    except OSError as error:
        holder.close()
        raise ConfigError(
            f"rollout.sglang.host={host}: cannot bind to it ({error.strerror or error}): name an address of "
            "this machine, or 0.0.0.0 for all of them"
        ) from error
    return holder
