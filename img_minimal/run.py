"""Keep a training run: its folder, log, checkpoints, Ctrl-C, and the processes that share it.

    with Ranks() as ranks:
        run = Run("outputs/train", settings, resume=False, ranks=ranks)
        for step, batch in zip(run.steps(parts, last, save_every), batches):
            ...                                   # forward, loss, backward
            row = run.log(batches.where, loss=loss)
            optimizer.step()

Every decision about how a run goes on (a refresh, a stop, a non-finite loss, a user error) is taken
by all ranks together: ranks that decide for themselves drift apart or wait for each other for ever.
"""

import copy
import json
import math
import os
import shlex
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from img_minimal.cli import AnyPath, UserError, check, remove, warn, writable_folder
from img_minimal.files import replacing, write_whole
from img_minimal.hub.weights import opening

# No number depends on these.
MAY_CHANGE_ON_RESUME = (
    "resume overwrite output_dir cache_dir cache_gb save_every eval_prompts rounds"
).split()
WARN_IF_CHANGED = {
    "compute": "numbers will differ in rounding",
    "steps": "the learning rate's decay follows the number of steps",
}
# Made by a run beside its log and checkpoint: what an overwritten run must not leave.
RESULTS = ("aligner.safetensors", "mllm", "rounds", "curves.png", "samples.png", "rounds.png")
MEETING = 25.0  # seconds that processes look for each other, and then wait for all to be there
# Words in the RuntimeErrors of gloo and NCCL after another process was lost.
LOST_PEER = ("onnection", "gloo", "NCCL", "peer", "ncclSystemError")


class Ranks:
    """The processes that torchrun started; a single one without it."""

    def __init__(self) -> None:
        """Raises UserError if WORLD_SIZE and RANK do not fit; RANK alone means nothing."""
        world = os.environ.get("WORLD_SIZE") or "1"
        rank = "0" if world == "1" else os.environ.get("RANK", "")
        fits = world.isdecimal() and rank.isdecimal() and int(rank) < int(world)
        check(
            fits,
            f"WORLD_SIZE is {world!r} and RANK is {rank!r}; start with torchrun, or unset them",
        )
        self.world, self.rank = int(world), int(rank)
        self.main = self.rank == 0  # prints, validates, saves and draws
        self.share = self.rank, self.world

    def __enter__(self) -> Self:
        """Meet the other ranks. Raises UserError if they are not all there within a minute."""
        try:
            if self.world > 1:
                self._meet()
        except Exception as error:  # of sockets, names, numbers and time
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"rank {self.rank} of {self.world} does not meet the others ({reason}); start all "
                "with torchrun, or check WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT"
            ) from None
        return self

    def _meet(self) -> None:
        """Wait for all ranks, each of which must be there once, and join them."""
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
            backend = "nccl"
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # all will come, if from a slow disk
        patience = timedelta(seconds=600 if by_torchrun else MEETING)
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
        check(store.add(f"rank {self.rank}", 1) == 1, f"another process has RANK {self.rank}, too")
        store.wait([f"rank {k}" for k in range(self.world)], patience)
        store.set_timeout(dist.default_pg_timeout)  # later, ranks may wait long for each other
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.world == 1:
            return
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER):
            print(
                f"error: rank {self.rank}: another process of this run ended, and its own message "
                "says why; go on with the same command and --resume",
                file=sys.stderr,
            )
            # Not an exception: gloo's threads wait for the lost peer and keep the process alive.
            os._exit(2)
        dist.destroy_process_group()

    def again(self) -> str:
        """Return the command line that resumes this run, quoted for a shell."""
        start = "python"
        if here := os.environ.get("LOCAL_WORLD_SIZE"):  # set by torchrun
            start = f"torchrun --nproc_per_node={here}"
        words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        return f"{start} {shlex.join(words)} --resume"

    def split(self, number: int, flag: str) -> int:
        """Return this rank's part of a number. Raises UserError if it does not divide."""
        check(
            number % self.world == 0,
            f"{flag} is {number}, which {self.world} processes cannot share; choose a multiple",
        )
        return number // self.world

    def mean(self, values: Tensor) -> Tensor:
        """Average over all ranks; NaN on one rank is NaN on all."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def gather(self, value: Any) -> list[Any]:
        """Collect every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave this block on all ranks, or raise one rank's UserError on all of them."""
        error = None
        try:
            yield
        except (UserError, OSError, SafetensorError) as caught:
            error = caught
        messages = self.gather(error and " ".join(str(error).split()))
        for rank, message in enumerate(messages):
            if message is not None:
                raise error or UserError(f"rank {rank}: {message}")

    def parallel(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that `backward` averages gradients over the ranks."""
        return nn.parallel.DistributedDataParallel(module) if self.world > 1 else module


class Run:
    """A run folder with config.json, metrics.jsonl and checkpoint.pt, locked while it is open.

    `saved` is the checkpoint to resume from, or None; `stopped` is True after Ctrl-C.
    """

    def __init__(
        self,
        path: AnyPath,
        settings: dict,
        *,
        resume: bool = False,
        overwrite: bool = False,
        ranks: Ranks | None = None,
    ):
        """Create or reopen the folder, before any work is done.

        Raises UserError if another process writes there, if the folder holds a run and neither
        `resume` nor `overwrite` is given, if there is nothing to resume, or if `settings` would
        change the numbers of a resumed run.
        """
        self.path, self.ranks = writable_folder(path), ranks or Ranks()
        self.settings = portable(settings)
        self.checkpoint = self.path / "checkpoint.pt"
        self.metrics = self.path / "metrics.jsonl"
        self.stopped = self.interrupted = False
        self.saved = None
        if resume:
            self.saved = load_checkpoint(self.checkpoint)
            check_same_settings(self.saved["settings"], self.settings, self.saved["step"])
        if self.ranks.main:
            made = self.checkpoint.exists() or (self.path / "aligner.safetensors").exists()
            check(
                resume or overwrite or not made,
                f"{path} holds a run; go on with --resume, or choose --overwrite or another "
                "--output-dir",
            )
            self.lock = lock_folder(self.path)  # last: an error above would keep it locked

    def inside(self, folder: Path) -> "Run":
        """Open a subfolder as a run of its own, under the same lock and settings; resume it."""
        inner = copy.copy(self)
        inner.path = writable_folder(folder)
        inner.checkpoint, inner.metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
        inner.saved = load_checkpoint(inner.checkpoint) if inner.checkpoint.exists() else None
        return inner

    def steps(
        self,
        parts: dict[str, Any],
        last: int,
        save_every: int,
        measure: Callable[[], dict] = dict,
    ) -> Iterator[int]:
        """Yield every step up to `last`; the loop's body has to call `log`.

        After each step its row is written. A checkpoint of `parts` (objects with a state_dict;
        "data" is the position in the data) is saved every `save_every` steps, at the end, and on
        Ctrl-C or SIGTERM; the row then also holds what `measure` returns.
        """
        first, self.stopped, self.interrupted = self.restore(parts, last), False, False
        handlers = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            progress = tqdm(range(first, last), desc="train", initial=first, total=last)
            with progress as bar, self.metrics.open("a") as log:
                for step in bar:
                    self.step = step
                    yield step
                    done = step + 1
                    self.stopped = self.row.pop("stopping") > 0
                    saving = done % save_every == 0 or done == last or self.stopped
                    positions = self.ranks.gather(parts["data"].state_dict()) if saving else []
                    if self.ranks.main:
                        row = {"step": done} | self.row | (measure() if saving else {})
                        log.write(json.dumps(row) + "\n")
                    if self.ranks.main and saving:
                        log.flush()  # rows before the checkpoint, so that a kill leaves no hole
                        state = {name: part.state_dict() for name, part in parts.items()}
                        state |= {"data": positions, "step": done, "logged": log.tell()}
                        self.save(state)
                    bar.set_postfix(loss=f"{self.row['loss']:.4f}", refresh=False)
                    if self.stopped:
                        self.stopped = done < last
                        return
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True

    def log(self, samples: str, **metrics: Tensor) -> dict[str, float]:
        """Average the metrics of this step over the ranks, in one transfer, as the row to write.

        Call it before the weights change. Raises UserError, naming step and samples, if the loss,
        the gradient or another metric is not finite; the last checkpoint stays as it is.
        """
        metrics["stopping"] = metrics["loss"].new_tensor(float(self.interrupted))
        stacked = torch.stack([value.detach().float() for value in metrics.values()])
        self.row = dict(zip(metrics, self.ranks.mean(stacked).tolist()))
        for name, value in self.row.items():
            check(
                math.isfinite(value),
                f"the {name.replace('_', ' ')} of step {self.step} is {value} ({samples}); the "
                f"last checkpoint is kept in {self.path}. Lower --lr, or check these samples",
            )
        return self.row

    def restore(self, parts: dict[str, Any], last: int) -> int:
        """Load the checkpoint into `parts`, truncate the log to match, and return the next step.

        Whenever this is interrupted, the folder holds the old run, no run, or the new one.
        """
        step, logged = 0, 0
        if self.saved:
            step, logged = self.saved["step"], self.saved["logged"]
            with opening(self.checkpoint, "checkpoint of this run"):
                for name, part in parts.items():
                    state = self.saved[name]
                    if name == "data":
                        if step == last:
                            continue
                        state = self._position(part.shared, state)
                    part.load_state_dict(state)
                torch.set_rng_state(self.saved["rng"])
        if not self.ranks.main:
            return step
        if not self.saved:
            # An overwritten run must not be resumed by mistake, nor leave results of its own.
            self.checkpoint.unlink(missing_ok=True)
            for name in RESULTS if (self.path / "config.json").exists() else ():
                remove(self.path / name)
        self.metrics.touch()
        size = self.metrics.stat().st_size
        if size < logged:
            warn(f"{self.metrics} has lost rows; curves and log begin later")
        os.truncate(self.metrics, min(logged, size))
        write_whole(self.path / "config.json", json.dumps(self.settings, indent=1))
        return step

    def _position(self, shared: bool, positions: list[dict]) -> dict:
        """Return this rank's position in the data; ranks either share one or each have their own.

        Raises UserError if the run began with another number of ranks that each read own files.
        """
        before, now = len(positions), self.ranks.world
        check(
            shared or before == now,
            f"the run began with {before} processes, each with files of its own, and this one has "
            f"{now}: resume with torchrun --nproc_per_node={before}, or keep features with "
            "--cache-dir from the start",
        )
        return positions[0 if shared else self.ranks.rank]

    def save(self, state: dict) -> None:
        """Write a checkpoint atomically. Raises UserError if it cannot be written."""
        state |= {"rng": torch.get_rng_state(), "settings": self.settings}
        try:
            with replacing(self.checkpoint) as partial:
                torch.save(state, partial)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.checkpoint}: cannot be written ({reason}); an older one is still whole: "
                "free some space and --resume"
            ) from None


def lock_folder(folder: Path) -> IO:
    """Lock a folder as long as the returned file is open, and clear it of unfinished files.

    Warns where there are no locks. Raises UserError, naming the process, if another one holds it.
    """
    lock = (folder / ".lock").open("a+")
    try:
        import fcntl  # not on Windows

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for debris in folder.glob(".*.partial"):  # nobody else writes there
            remove(debris)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read()
        lock.close()
        raise UserError(
            f"{folder}: {holder} writes there now; stop it, or choose another --output-dir"
        ) from None
    except (ImportError, OSError) as error:
        warn(f"{folder}: cannot be locked ({error}); start no second run there")
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    return lock


def portable(settings: dict) -> dict:
    """Make paths into this package independent of where it lies, so that a checkout may move."""
    package = json.dumps(str(Path(__file__).parent))[1:-1]
    return json.loads(json.dumps(settings).replace(package, "img_minimal"))


def check_same_settings(before: dict, now: dict, done: int) -> None:
    """Raise UserError if resuming after `done` steps with other settings would change numbers.

    Warns about the rest.
    """
    for name, value in now.items():
        known = before.get(name, value)  # a setting that is new since then had today's default
        if isinstance(value, dict) and isinstance(known, dict):
            check_same_settings(known, value, done)
        elif (
            name in WARN_IF_CHANGED
            and known != value
            and (name == "compute" or value >= min(known, done))
        ):
            warn(f"the run began with {name} {known}, now {value}: {WARN_IF_CHANGED[name]}")
        else:
            check(
                known == value or name in MAY_CHANGE_ON_RESUME,
                f"cannot resume with {name} {value!r}: the run began with {known!r}, {done} steps "
                "are done; repeat its options (config.json in the run folder), or choose another "
                "--output-dir",
            )


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint to the CPU. Raises UserError if it is missing, damaged or holds code."""
    advice = "start without --resume"
    check(path.is_file(), f"{path}: no checkpoint to resume from; {advice}, or check --output-dir")
    with opening(path, f"checkpoint; {advice}, or restore a copy"):
        with zipfile.ZipFile(path) as file:
            flipped = file.testzip()  # torch writes checksums and does not verify them
        check(flipped is None, f"{path}: damaged at {flipped}; {advice}, or restore a copy")
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if not {"settings", "step", "logged"} <= saved.keys():
            raise KeyError("settings")
    return saved
