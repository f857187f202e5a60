"""A proxy before a real server, which answers some of the /generate requests itself: wrongly."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

from apo_megatron.rollout.event_loop import EventLoopThread

Fault = Literal["500", "400", "garbage", "other json", "half a body", "no answer", "hang"]


def _http(status: str, body: bytes, missing: int = 0) -> bytes:
    """An HTTP answer that promises ``missing`` more bytes than it has."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) + missing}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


_ANSWERS: dict[Fault, bytes] = {
    "500": _http("500 Internal Server Error", b"oops"),
    "400": _http("400 Bad Request", b"oops"),
    "garbage": _http("200 OK", b"\x00\xff garbage"),
    "other json": _http("200 OK", b'[{"meta_info": {}}]'),
    "half a body": _http("200 OK", b'[{"output_ids": [4, 4', missing=5000),
    "no answer": b"",
}


class FaultProxy:
    """Listens on loopback and forwards to ``target``; each of ``faults`` spoils one /generate request."""

    def __init__(self, target: str) -> None:
        self.faults: deque[Fault] = deque()
        self.heads: list[str] = []  # request line and headers of every request
        self._target = urlsplit(target)
        self._loop = EventLoopThread("fault-proxy")
        self._server = self._loop.run(self._listen())
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # one side has gone
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        length = next((int(x.split(":")[1]) for x in lines if x.lower().startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        self.heads.append(lines[0] + "\n" + "\n".join(lines[1:]))
        if lines[0].startswith("POST /generate") and self.faults:
            fault = self.faults.popleft()
            if fault == "hang":
                await reader.read()  # until the client goes
                return
            writer.write(_ANSWERS[fault])
            await writer.drain()
            return
        kept = [x for x in lines[:-2] if not x.lower().startswith("connection:")]
        server_reader, server_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        try:
            server_writer.write("\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1") + body)
            client_has_gone = asyncio.ensure_future(reader.read())
            answered = asyncio.ensure_future(_copy(server_reader, writer))
            await asyncio.wait({client_has_gone, answered}, return_when=asyncio.FIRST_COMPLETED)
            client_has_gone.cancel()
            answered.cancel()
        finally:
            server_writer.close()

    def close(self) -> None:
        self._loop.run(_close(self._server))
        self._loop.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def _close(server: asyncio.Server) -> None:
    server.close()
