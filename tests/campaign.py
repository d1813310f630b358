"""Commands of the product in processes of their own that start at once, to be killed, or to run out of disk."""

import contextlib
import importlib
import multiprocessing
import os
import random
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MODULES = {"sample": "sample", "train": "train", "evaluate": "img_minimal.evaluate.__main__"}
# A server that has everything imported and has computed nothing yet: what it forks is a fresh process.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(MODULES.values()))


def _main(name: str, arguments: list[str], log: str, largest: int | None, environment: dict) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | environment
    import torch

    torch.set_num_threads(1)
    from img_minimal.runtime import cli

    with open(log, "w", buffering=1) as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if largest is not None:  # any file that grows beyond ends in an error of the system, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.argv = [f"{name}.py", *arguments]
        try:
            cli.run(importlib.import_module(MODULES[name]).main)
        except Exception:  # what the test is about
            traceback.print_exc()
            raise


class Command:
    """A running command."""

    def __init__(
        self, name: str, *arguments: object, largest: int | None = None, environment: dict[str, str] | None = None
    ):
        reading, writing = os.pipe()  # no file, for a full disk must not swallow what is said of it
        self.said: list[bytes] = []
        self.reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        words = [*map(str, arguments)]
        path = f"/proc/{os.getpid()}/fd/{writing}"
        self.process = CONTEXT.Process(target=_main, args=(name, words, path, largest, environment or {}))
        self.process.start()
        self.reader.start()
        self.writing = writing

    def _read(self, pipe: int) -> None:
        while data := os.read(pipe, 65_536):
            self.said.append(data)
        os.close(pipe)

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code, and all that it said."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it hangs"
        os.close(self.writing)
        self.reader.join()
        return self.process.exitcode, b"".join(self.said).decode()

    def kill(self) -> bool:
        """SIGKILL; was it still running?"""
        running = self.process.is_alive()
        self.process.kill()
        self.end()
        return running


def torchrun(world: int, name: str, *arguments: object) -> list[Command]:
    """The processes that torchrun would start, each with the environment that it would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [Command(name, *arguments, environment=shared | mine) for mine in own]


def survive(start: Callable[[], Command], kills: int, longest: float, seed: int) -> int:
    """Start a command again and again, kill it at random moments, then let it end. Returns how many kills hit."""
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        command = start()
        time.sleep(rng.uniform(0.05, longest))
        hits += command.kill()
    code, said = start().end()
    assert code == 0, said
    return hits


def content(folder: Path, *names: str) -> dict[str, bytes]:
    """The bytes of files, by name."""
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}
