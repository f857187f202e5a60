"""SGLangEngine on two ranks against two real servers, behind proxies that spoil answers."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM

from apo_megatron.config import RolloutConfig
from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.errors import RolloutError
from apo_megatron.parallel.collectives import all_reduce_max, broadcast_from_main
from apo_megatron.parallel.world import World, join_cpu_world
from apo_megatron.rollout.engine import Probe, SampleRequest, SamplingParams
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.model_limits import ModelLimits
from apo_megatron.rollout.server_sources import FileServers, ListedServers
from apo_megatron.rollout.sglang import SGLangEngine
from apo_megatron.rollout.sglang_client import ServerError, SGLangClient
from apo_megatron.rollout.sglang_update import WeightUpdater
from apo_megatron.types import Completion, Prompt
from tests.fault_proxy import FaultProxy
from tests.sglang_models import MAX_POSITIONS, VOCAB_SIZE
from tests.tiny_models import EOS_TOKEN_ID

SAMPLING = SamplingParams(
    num_samples=4,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_new_tokens=12,
    stop_token_ids=(EOS_TOKEN_ID, 7),
    seed=5,
)


class FolderTransport:
    """Weights from folders on this machine: what an engine does around a push does not depend on them."""

    def __init__(self, loop: EventLoopThread, world: World) -> None:
        self.folder = ""
        self.other_folder: dict[str, str] = {}  # server name -> what it gets instead
        self.refusing: set[str] = set()
        self._loop, self._world = loop, world

    def push(self, source: Any, servers: Sequence[SGLangClient], label: str) -> dict[str, str]:
        """Rank 0 tells the servers; the others follow."""
        problems = {}
        for server in servers:
            folder = self.other_folder.get(server.name, self.folder)
            body = {"model_path": folder, "weight_version": label, "flush_cache": False}
            if server.name in self.refusing:
                problems[server.name] = f"server {server.name}: refuses weights"
            elif self._world.is_main:
                try:
                    self._loop.run(server.post("/update_weights_from_disk", body, timeout=60))
                except ServerError as error:
                    problems[server.name] = str(error)
        return broadcast_from_main(problems, self._world)

    def close(self) -> None:
        pass


class WatchedList(ListedServers):
    """Remembers which servers the engine wanted to be restarted."""

    def __init__(self, urls: Sequence[str]) -> None:
        super().__init__(urls)
        self.restarted: list[str] = []

    def restart(self, name: str, reason: str) -> None:
        self.restarted.append(name)


class Scene:
    """An engine on this rank and what it is tried with; rank 0 has the proxies."""

    def __init__(self, payload: dict[str, Any], world: World, through_proxies: bool = True) -> None:
        self.world, self.payload = world, payload
        self.proxies: list[FaultProxy] = []
        urls = list(payload["urls"])
        if world.is_main and through_proxies:
            self.proxies = [FaultProxy(url) for url in urls]
            urls = [proxy.url for proxy in self.proxies]
        self.source = WatchedList(urls) if world.is_main else None
        self.notes: list[str] = []
        loop = EventLoopThread()
        self.transport = FolderTransport(loop, world)
        self.transport.folder = payload["served"]
        tokenizer = load_tokenizer(payload["served"])
        cfg = SGLangConfig(
            health_interval=1.0,
            health_timeout=payload.get("health_timeout", 60.0),
            update_timeout=60.0,
            unavailable_timeout=payload.get("unavailable_timeout", 300.0),
        )
        self.engine = SGLangEngine(
            RolloutConfig(engine="sglang", sglang=cfg),
            ModelLimits(VOCAB_SIZE, MAX_POSITIONS, eos_token_ids=frozenset()),
            lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True),
            world,
            loop,
            WeightUpdater(world, loop, self.transport, max_canary_gap=0.01),
            self.source,
            api_key=None,
            note=self.notes.append,
        )
        self.version = -1

    def update(self, probe: Probe | None = None) -> dict[str, float]:
        self.version += 1
        return self.engine.update_weights(ANY_SOURCE, self.version, probe)

    def prompts(self, count: int) -> list[Prompt]:
        """Other ones on each rank."""
        return [
            Prompt(f"{self.world.rank}-{i}", "", np.array([20 + i, 30 + self.world.rank, 5], np.int32))
            for i in range(count)
        ]

    def generate(self, count: int, sampling: SamplingParams = SAMPLING) -> list[str]:
        """What is wrong with the completions of ``count`` prompts."""
        told = [0, 0]

        def progress(num_samples: int, num_tokens: int) -> None:
            told[0] += num_samples
            told[1] += num_tokens

        found = self.engine.generate(self.prompts(count), sampling, progress)
        wrong = [
            f"{c.finish_reason} {c.versions} {len(c.token_ids)}"
            for completions in found
            for c in completions
            if not self.is_whole(c, sampling)
        ]
        counts = [len(completions) for completions in found]
        num_tokens = sum(len(c.token_ids) for completions in found for c in completions)
        if counts != [sampling.num_samples] * count or told != [sum(counts), num_tokens]:
            wrong.append(f"counts {counts}, progress {told}, tokens {num_tokens}")
        return wrong

    def is_whole(self, completion: Completion, sampling: SamplingParams) -> bool:
        num_tokens = len(completion.token_ids)
        body = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        ends = num_tokens > 0 and completion.token_ids[-1] in sampling.stop_token_ids
        return (
            completion.finish_reason == ("stop" if ends else "length")
            and (ends or num_tokens == sampling.max_new_tokens)
            and len(completion.log_probs) == num_tokens
            and completion.versions == ((self.version, num_tokens),)
            and completion.text.split() == [f"w{i}" for i in body.tolist() if i > EOS_TOKEN_ID]
        )

    def recover_until(self, is_done: Callable[[], bool], seconds: float = 240.0) -> bool:
        """Recover until rank 0 says that it is done."""
        deadline = time.monotonic() + seconds
        while True:
            self.engine.recover(ANY_SOURCE)
            state = broadcast_from_main((is_done(), time.monotonic() > deadline), self.world)
            if any(state):
                return state[0]
            time.sleep(0.2)

    def num_usable(self) -> int:
        return len(self.engine._loop.run(self.engine._servers.usable()))

    def error(self, action: Callable[[], object]) -> str:
        try:
            action()
        except RolloutError as error:
            return str(error)
        return ""

    def close(self) -> None:
        self.engine.close()
        for proxy in self.proxies:
            proxy.close()


ANY_SOURCE: Any = object()  # FolderTransport does not read it


@torch.inference_mode()
def probe_of(folder: str) -> Probe:
    """What a model says about three sequences, computed here."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = [np.arange(4, 4 + n, dtype=np.int32) for n in (2, 9, 40)]
    log_probs = []
    for tokens in sequences:
        ids = torch.from_numpy(tokens.astype(np.int64))
        rows = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
        log_probs.append(rows[:-1].gather(-1, ids[1:, None]).squeeze(-1).numpy())
    return Probe(tuple(sequences), tuple(log_probs))


def requests(payload: dict[str, Any]) -> dict[str, Any]:
    """Two ranks: faults, stale servers, stops, refusals."""
    scene = Scene(payload, join_cpu_world())
    result: dict[str, Any] = {"before": scene.error(lambda: scene.generate(1))}
    result["metrics"] = scene.update(probe_of(payload["served"]))
    result["plain"] = scene.generate(12)
    faults = ["500", "400", "garbage", "other json", "half a body", "no answer"]
    for proxy in scene.proxies:
        proxy.faults.extend(cast(Any, faults))
    result["faults"] = scene.generate(24)
    result["faults left"] = sum(len(proxy.faults) for proxy in scene.proxies)
    result["refused"] = _refused(scene)
    result["stale"] = _stale(scene)
    result["stopped"] = _stopped(scene)
    result["asleep"] = _asleep(payload, scene)
    result["wrong weights"] = _wrong_weights(payload, scene)
    scene.close()
    return result


def _refused(scene: Scene) -> dict[str, Any]:
    """What must not be sent."""
    num_sent = [len(proxy.heads) for proxy in scene.proxies]
    prompt = Prompt("p", "", np.array([4, VOCAB_SIZE], np.int32))
    long = replace(SAMPLING, max_new_tokens=MAX_POSITIONS)
    stops = replace(SAMPLING, stop_token_ids=(-1,))
    found = {
        "token": scene.error(lambda: scene.engine.generate([prompt], SAMPLING)),
        "length": scene.error(lambda: scene.generate(1, long)),
        "stop": scene.error(lambda: scene.generate(1, stops)),
    }
    generates = [
        head
        for proxy, count in zip(scene.proxies, num_sent, strict=True)
        for head in proxy.heads[count:]
        if "/generate" in head
    ]
    return {**found, "sent": len(generates)}


def _stale(scene: Scene) -> dict[str, Any]:
    """One server gets weights of another run, behind the engine's back; then one refuses an update."""
    if scene.world.is_main:
        name = scene.proxies[0].url
        client = scene.engine._servers[name]
        body = {"model_path": scene.payload["other"], "weight_version": "another-0"}
        scene.engine._loop.run(client.post("/update_weights_from_disk", body, timeout=60))
    broadcast_from_main(None, scene.world)
    found: dict[str, Any] = {"generate": scene.generate(24)}
    found["usable"] = broadcast_from_main(scene.num_usable(), scene.world)
    found["looks"] = scene.engine.recover(None)
    found["recovered"] = scene.recover_until(lambda: scene.num_usable() == 2)
    found["after"] = scene.generate(8)
    scene.transport.refusing = {broadcast_from_main([p.url for p in scene.proxies], scene.world)[1]}
    found["metrics"] = scene.update()
    found["left out"] = scene.generate(8)
    scene.transport.refusing = set()
    found["taken in"] = scene.recover_until(lambda: scene.num_usable() == 2)
    return found


def _stopped(scene: Scene) -> dict[str, Any]:
    """Completions are cut, and go on with newer weights; an update stops what runs."""
    long = replace(SAMPLING, max_new_tokens=5000, stop_token_ids=())
    prompts = scene.prompts(6)
    begun: list[tuple[Prompt, Completion]] = []
    seconds_before = 1.0
    while len(begun) < 2:  # a busy machine draws the first token late
        generation = scene.engine.start([SampleRequest(prompt, 3) for prompt in prompts], long)
        time.sleep(seconds_before)
        generation.stop()
        began = time.monotonic()
        in_time = generation.wait(30.0)
        seconds = time.monotonic() - began
        cut = [(p, c) for p, group in zip(prompts, generation.results(), strict=True) for c in group]
        begun = [(p, c) for p, c in cut if len(c.token_ids)][:2]
        seconds_before *= 2
    before = scene.version
    scene.update()
    short = replace(long, max_new_tokens=max(len(c.token_ids) for _, c in begun) + 5)
    generation = scene.engine.start([SampleRequest(p, 1, begun=c) for p, c in begun], short)
    finished = generation.wait(60.0)
    continued = [group[0] for group in generation.results()]
    goes_on = all(
        c.token_ids[: len(b.token_ids)].tolist() == b.token_ids.tolist()
        and len(c.log_probs) == len(c.token_ids)
        and c.versions == ((before, len(b.token_ids)), (scene.version, len(c.token_ids) - len(b.token_ids)))
        and len(c.text.split()) >= len(b.text.split())
        for (_, b), c in zip(begun, continued, strict=True)
    )
    running = scene.engine.start([SampleRequest(prompt, 2) for prompt in prompts], long)
    scene.update()
    ended = {c.finish_reason for group in running.results() for c in group} if running.wait(0) else set()
    return {
        "in time": in_time,
        "seconds": seconds,
        "cut": {c.finish_reason for _, c in cut},
        "finished": finished,
        "goes on": goes_on,
        "by update": sorted(ended),
    }


def _asleep(payload: dict[str, Any], scene: Scene) -> dict[str, Any]:
    """Colocated servers give up their memory, and take it back for an update."""
    engine = scene.engine
    cfg = engine._cfg
    engine._cfg = cfg.model_copy(update={"sglang": cfg.sglang.model_copy(update={"colocated": True})})
    engine.sleep()
    refused = scene.error(lambda: scene.generate(1))
    metrics = scene.update(probe_of(payload["served"]))
    engine._cfg = cfg
    return {"refused": refused, "metrics": metrics, "generate": scene.generate(4)}


def _wrong_weights(payload: dict[str, Any], scene: Scene) -> dict[str, Any]:
    """The servers agree with each other, but not with the actor; then not with each other."""
    scene.transport.folder = payload["other"]
    canary = scene.error(lambda: scene.update(probe_of(payload["served"])))
    generates = scene.error(lambda: scene.generate(1))
    second = broadcast_from_main([proxy.url for proxy in scene.proxies], scene.world)[1]
    scene.transport.other_folder = {second: payload["served"]}
    return {"canary": canary, "generates": generates, "checksum": scene.error(scene.update)}


def lost_servers(payload: dict[str, Any]) -> dict[str, Any]:
    """Two ranks, servers that are killed and stopped; whoever keeps them starts them again."""
    scene = Scene(payload, join_cpu_world(), through_proxies=False)
    metrics = scene.update(probe_of(payload["served"]))
    many = replace(SAMPLING, max_new_tokens=100, stop_token_ids=())
    result: dict[str, Any] = {"metrics": metrics}

    def disturb(number: signal.Signals, servers: Sequence[int]) -> list[str]:
        """Completions while a signal hits servers."""
        requests = [SampleRequest(prompt, 4) for prompt in scene.prompts(6)]
        generation = scene.engine.start(requests, many)
        time.sleep(0.3)
        if scene.world.is_main:
            for index in servers:
                signal_server(payload["urls"][index], number)
        while not _all_done(generation.wait(0.2), scene.world):
            scene.engine.recover(ANY_SOURCE)
        completions = [c for group in generation.results() for c in group]
        return [str(c) for c in completions if not scene.is_whole(c, many)]

    result["killed"] = disturb(signal.SIGKILL, [0])
    result["back"] = scene.recover_until(lambda: scene.num_usable() == 2)
    result["both killed"] = disturb(signal.SIGKILL, [0, 1])
    result["both back"] = scene.recover_until(lambda: scene.num_usable() == 2)
    result["hung"] = disturb(signal.SIGSTOP, [1])
    if scene.world.is_main:
        result["restarted"] = set(scene.source.restarted) == {payload["urls"][1]} if scene.source else False
        signal_server(payload["urls"][1], signal.SIGCONT)
    result["awake"] = scene.recover_until(lambda: scene.num_usable() == 2)
    result["at last"] = scene.generate(8)
    scene.close()
    return result


def _all_done(is_done: bool, world: World) -> bool:
    return -all_reduce_max(-int(is_done), world) == 1


def signal_server(url: str, number: signal.Signals) -> None:
    """Hit the server that listens at ``url``, and its processes."""
    port = int(url.rsplit(":", 1)[1])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            process = psutil.Process(connection.pid)
            for member in [*process.children(recursive=True), process]:
                member.send_signal(number)


def listed(payload: dict[str, Any]) -> dict[str, Any]:
    """A file of servers that appears late, and a list that is none."""
    world = join_cpu_world()
    path = Path(payload["file"])
    scene = Scene(payload, world, through_proxies=False)
    if world.is_main:
        source = FileServers(str(path))
        scene.engine._source = source
        none_yet = source.addresses()
        path.write_text("")
        assert source.addresses() == none_yet == {}
        path.write_text(json.dumps([{"name": "one", "url": payload["urls"][0]}]))
    metrics = scene.update()
    result: dict[str, Any] = {"metrics": metrics, "generate": scene.generate(4)}
    if world.is_main:
        entries = [{"name": f"n{i}", "url": url} for i, url in enumerate(payload["urls"])]
        path.write_text(json.dumps(entries))
    result["both"] = scene.recover_until(lambda: scene.num_usable() == 2)
    result["with both"] = scene.generate(4)
    if world.is_main:
        path.write_text('{"name": 3}')
    result["broken"] = scene.error(lambda: scene.engine.recover(ANY_SOURCE))
    scene.close()
    return result
