"""Commands of the product in processes of their own that start at once, to be killed, or to run out of disk."""

import contextlib
import importlib
import io
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

MODULES = {"sample": "sample", "train": "train", "evaluate": "img_minimal.evaluate.__main__"}
# A server that has everything imported and has computed nothing yet: what it forks is a fresh process.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(MODULES.values()))


def _main(name: str, arguments: list[str], said: Connection, largest: int | None) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    import torch

    torch.set_num_threads(1)
    from img_minimal.runtime import cli

    if largest is not None:  # any file that grows beyond ends in an error of the system, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = [f"{name}.py", *arguments]
    words, code = io.StringIO(), 0
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        try:
            cli.run(importlib.import_module(MODULES[name]).main)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:  # noqa: BLE001 - what the test is about
            traceback.print_exc()
            code = 1
    said.send((code, words.getvalue()))


class Command:
    """A running command."""

    def __init__(self, name: str, *arguments: object, largest: int | None = None):
        self.out, said = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_main, args=(name, [*map(str, arguments)], said, largest))
        self.process.start()
        said.close()

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code, and all that it said."""
        assert self.out.poll(seconds), "it hangs"
        result = self.out.recv()
        self.process.join()
        return result

    def kill(self) -> bool:
        """SIGKILL; was it still running?"""
        running = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return running


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
