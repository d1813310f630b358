"""Run commands in processes of their own that start at once, to kill them or fill their disk."""

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
# A server that has everything imported and nothing computed: it forks fresh processes.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(MODULES.values()))


def run_command(name: str, words: list[str], log: str, largest: int | None, ranks: dict) -> None:
    """Run a command of the product in this process; its output goes to a file."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | ranks
    import torch

    from img_minimal import cli, rounds

    torch.set_num_threads(1)
    rounds.GATE_PROMPTS = 8  # 200 would take most of the time of a round
    with (
        open(log, "w", buffering=1) as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        if largest is not None:
            # A file that grows beyond ends in an error of the system, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.argv = [f"{name}.py", *words]
        try:
            cli.run(importlib.import_module(MODULES[name]).main)
        except Exception:
            traceback.print_exc()
            raise


class Command:
    """A running command; with `largest`, no file may grow beyond that many bytes."""

    def __init__(
        self,
        name: str,
        *arguments: object,
        largest: int | None = None,
        ranks: dict[str, str] | None = None,
    ):
        # A pipe and no file, for a full disk must not swallow the output.
        reading, self.writing = os.pipe()
        self.output: list[bytes] = []
        self.reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        words, log = [*map(str, arguments)], f"/proc/{os.getpid()}/fd/{self.writing}"
        settings = (name, words, log, largest, ranks or {})
        self.process = CONTEXT.Process(target=run_command, args=settings)
        self.process.start()
        self.reader.start()

    def _read(self, pipe: int) -> None:
        while data := os.read(pipe, 65_536):
            self.output.append(data)
        os.close(pipe)

    def end(self, seconds: float = 600) -> tuple[int, str]:
        """Wait for the end: exit code and output."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it hangs"
        os.close(self.writing)
        self.reader.join()
        return self.process.exitcode, b"".join(self.output).decode()

    def kill(self) -> bool:
        """Send SIGKILL; returns True if the command was still running."""
        running = self.process.is_alive()
        self.process.kill()
        self.end()
        return running


def finish(*commands: Command) -> None:
    """Wait until all commands have ended well."""
    for command in commands:
        code, output = command.end()
        assert code == 0, output


def rank_environments(world: int) -> list[dict[str, str]]:
    """Return the environment that torchrun would give to each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def survive(start: Callable[[], Command], kills: int, longest: float, seed: int) -> int:
    """Kill a command at random moments, then let it end; returns how many kills hit."""
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        command = start()
        time.sleep(rng.uniform(0.05, longest))
        hits += command.kill()
    finish(start())
    return hits


def content(folder: Path, *names: str) -> dict[str, bytes]:
    """Read files by patterns of names."""
    paths = [path for name in names for path in sorted(folder.glob(name))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
