"""The training loop: epochs, batches, schedule, validation, checkpoints.

Everything random is a pure function of the seed and the position in the run: batches come from the
Rust loader, attack noise from here. A run may stop after any step. After resuming, its results are
the same bit for bit.

Shape suffixes: I images of a set, L MoE layers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advmoe.config import ModelConfig, TrainConfig, check, differences, from_dict, to_dict
from advmoe.data.loader import Batch
from advmoe.data.sets import Dataset
from advmoe.data.views import named
from advmoe.device import read
from advmoe.distributed import any_rank, collect, equalize, from_leader, together, world
from advmoe.errors import CheckpointError, CompilerError, ConfigError, DataError, NotFiniteError, TrainingError
from advmoe.evaluation.accuracy import evaluate
from advmoe.evaluation.examples import attack_some
from advmoe.models.compiled import CompiledNetwork
from advmoe.models.dispatch import computing
from advmoe.models.moe_conv import check_tiles
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.run_paths import RUN_FILE
from advmoe.seeding import generator_for, seeded
from advmoe.training.average import WeightAverage
from advmoe.training.checkpoint import Checkpoint, Progress, load_optimizer, load_weights, optimizer_state
from advmoe.training.epoch_sums import EpochSums
from advmoe.training.guard import MOST_IN_A_ROW, READ_EVERY, Watch
from advmoe.training.levels import IN_WORDS, Level, make_levels, set_rates
from advmoe.training.memory import check_memory, validation_batch
from advmoe.training.methods import doubts, resolve_method
from advmoe.training.observer import Observer, Unwatched
from advmoe.training.routing_history import RoutingHistory
from advmoe.training.run_folder import RunFolder
from advmoe.training.schedule import Schedule
from advmoe.training.selection import FEW_IMAGES, Selection, standard_error_at_half
from advmoe.training.split import split_dataset
from advmoe.training.start import has_other_classes, start_from, with_new_classifier
from advmoe.training.streams import Streams
from advmoe.training.union import size_of_union

COLLAPSED_LOAD = 0.99
"""A router counts as collapsed if one of its experts has this load."""
BALANCE = 0.01
"""Weight of the load-balance loss that is advised where routers collapse."""
LEFT_OUT = 1 / 8
"""A warning follows if a larger share of the training images fills no batch. Eight batches or more leave out less."""
PICTURES = 4
"""Validation images that TensorBoard shows, clean and attacked."""


def _reads_at_once(device: torch.device) -> bool:
    """Whether the host can read a value in every step without waiting for the device."""
    return device.type == "cpu"


def weights_of(model: RoutedNetwork) -> dict[str, torch.Tensor]:
    """A model's state dict on the CPU."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


class Trainer:
    """One run on one data set.

    Args:
        model_config: The model to train.
        config: The training configuration.
        dataset: Its training half is split into training and validation images.
        folder: Folder of the run.
        device: Device of the training.
        observer: Observer of the run.
        resume: Contents of the folder's `last.pt` to go on from, or None for a new run.
        initial: Checkpoint whose weights a new run starts from, or None for fresh ones. If its classes are
            others, the classifier is fresh.

    Raises:
        ConfigError: Settings that do not go together, a folder that holds another run, or a checkpoint of
            other classes for a method that trains no classifier.
        CheckpointError: The run to resume was started with other settings.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        dataset: Dataset,
        folder: RunFolder,
        *,
        device: torch.device,
        observer: Observer,
        resume: Checkpoint | None = None,
        initial: Checkpoint | None = None,
    ) -> None:
        self.method = resolve_method(config.method, model_config, has_init=config.init is not None)
        self.model_config = model_config
        self.config = config
        self.class_names = dataset.info.class_names
        self.folder = folder
        self.device = device
        self.observer = observer = observer if world().leads else Unwatched()
        dataset.info.check_image_size(model_config.image_size)
        self.split = split_dataset(dataset, config, image_size=model_config.image_size)
        if self.split.skipped:
            observer.warned(f"skipped validation images: {len(self.split.skipped)}{named(self.split.skipped)}")
        with seeded(config.seed):
            model = build_model(model_config)
        self.new_classifier = initial is not None and has_other_classes(
            initial, model_config.num_classes, self.class_names
        )
        """Whether the run starts from a checkpoint of other classes, so that its classifier starts anew."""
        if initial is not None:  # on the CPU, as the checkpoint and the random numbers are
            if self.new_classifier:
                check(
                    self.method.moves_experts,
                    f"the checkpoint has other classes than {dataset.info.name}, so its classifier has to be trained "
                    f"anew, and method {config.method} trains none; train on {dataset.info.name} first, for example "
                    "with method standard",
                    "init",
                )
                initial = with_new_classifier(initial, model_config.num_classes, self.class_names, seed=config.seed)
            start_from(model, initial, upcycling=config.upcycling, reinitialize=config.reinitialize, seed=config.seed)
        self.model: RoutedNetwork = model.to(device)
        self.levels = make_levels(self.method.levels, self.model, config, fresh=initial is None)
        self._check_dispatch()
        self._compiled = self._new_compiled()
        self.average = None if config.ema == 0 else WeightAverage(self.model, config.ema)
        self.streams = Streams(self.split, model_config, config, periods=self.method.periods(config), device=device)
        self.steps_per_epoch = self.streams.steps_per_epoch
        self._warn_of_rest()
        self.memory, doubt = together(lambda: check_memory(self.model, config, model_config.image_size))
        self.step = 0
        self.schedule = Schedule(self.method.phases, config.epochs, self.steps_per_epoch)
        self.selection = Selection()
        self.sums = self._new_sums()
        self.routing = RoutingHistory(self.model, len(self.split.train_indices))
        self.watch = Watch()
        self._collapsed: set[int] = set()
        self._metrics: dict[str, Any] = {}
        self._figures: dict[str, float] = {}
        self._stop = False
        settings = {"model": to_dict(model_config), "train": to_dict(config)}
        if resume is None:
            from_leader(lambda: folder.start(settings, self._checkpoint()))
        else:
            self._restore(resume)
            from_leader(lambda: folder.resume(settings, self.step // self.steps_per_epoch, self.step))
        # One seed gives the same weights on the same kind of processor only.
        for model in dict.fromkeys((self.model, self._validated())):
            equalize(list(model.state_dict().values()))
        if doubt is not None:
            observer.warned(doubt, batch_size=None, accumulate=None)
        for found in doubts(self.model, config):
            observer.warned(found.warning, **found.advice)
        if (images := len(self.split.validation)) < FEW_IMAGES:
            observer.warned(
                f"{images} validation images tell epochs apart poorly: the standard error of RA is up to "
                f"{standard_error_at_half(images):.1f} points; "
                "best.pt is a late epoch unless an earlier one is clearly better"
            )

    def request_stop(self) -> None:
        """Ask a running `fit` to save and return after the current step. Signal handlers may call it."""
        self._stop = True

    def fit(self) -> bool:
        """Train to the end, or until `request_stop`.

        Returns:
            Whether the run is complete.

        Raises:
            TrainingError: Too many losses in a row are not finite.
            DataError: An image cannot be decoded, and the config does not say to skip such.
            CompilerError: The compiler has failed (`compile`).
        """
        self.observer.started(self.schedule.epochs, self.steps_per_epoch, self.step)
        saved = began = time.monotonic()
        images_before = self.sums[-1].images
        for batches in self._batches():
            try:
                self._run_step(batches)
            except CompilerError:
                if self._stop:  # Ctrl-C ends a compiler's processes, too; half of the step may be done, so save nothing
                    return False
                raise
            epoch_done = self.step % self.steps_per_epoch == 0
            if epoch_done:
                seconds = time.monotonic() - began
                self._unite()
                self._finish_epoch((self.sums[-1].images - images_before) / seconds)
                saved, began, images_before = time.monotonic(), time.monotonic(), 0
            stop, due = any_rank(self._stop, time.monotonic() - saved > 60 * self.folder.minutes)
            if (stop or due) and not epoch_done:
                self._save()
                saved = time.monotonic()
            if stop and self.step < self.schedule.steps:
                return False
        return True

    def _batches(self) -> Iterator[list[Batch | None]]:
        """The batches of the remaining steps. The steps before an image that cannot be decoded are saved."""
        try:
            yield from self.streams.batches(self.step, self.schedule.epochs)
        except DataError:
            if self.step % self.steps_per_epoch:  # otherwise the end of the epoch has saved them
                self._save()
            raise

    def _run_step(self, batches: list[Batch | None]) -> None:
        last = batches[-1]
        assert last is not None
        levels = self._levels()
        noise = [
            generator_for(self.config.seed, self.step, level, device=self.device) for level in range(len(self.levels))
        ]
        for level in self.levels:
            set_rates(level.optimizer, lambda peak: self.schedule.rate(self.step, peak or self.config.lr))
        compiled = nullcontext() if self._compiled is None else self._compiled.running()
        with computing(self.config.dispatch), compiled:
            results = self.method.step(levels, batches, self.config, noise, self.step)
        of_last = results[-1]
        assert of_last is not None
        self.routing.add(self.step // self.steps_per_epoch + 1, last, of_last)
        self.step += 1
        if self.average is not None:
            self.average.update()
        for level, sums, batch, result in zip(levels, self.sums, batches, results, strict=True):
            if batch is not None:
                sums.note_missing(self.config.batch_size - size_of_union(batch))
            if result is not None:
                sums.add(result)
                self.watch.add(
                    self.step, level.name, result.indices, result.loss, result.finite, too_few=result.too_few
                )
        if _reads_at_once(self.device) or self.step % READ_EVERY == 0 or self.step % self.steps_per_epoch == 0:
            self._read()
        if world().leads:
            self.observer.stepped(self.step, size_of_union(last), self._figures)

    def _read(self) -> None:
        """Read the figures of the steps since the last reading. Only here does the host wait for the device."""
        self._look_at_skipped()
        *routes, sums = read([*self.routing.waiting, self.sums[-1].values])
        self.routing.take(routes)
        self._figures = self.sums[-1].summary(sums)

    def _look_at_skipped(self) -> None:
        """Log the updates that were skipped since the last time.

        Raises:
            TrainingError: Too many steps in a row were skipped.
        """
        found = self.watch.read()
        if found:
            from_leader(lambda: self.folder.note_skipped([update.as_dict() for update in found]))
            for update in found:
                why = f"was not finite (loss {update.loss:g})"
                if update.too_few:
                    why = f"had {len(update.images)} images that can be read, too few for BatchNorm,"
                self.observer.warned(
                    f"step {update.step}: the update of the {IN_WORDS[update.level]} {why} and was left out; "
                    f"{self.folder.skipped} lists its images"
                )
        for name, failed in self.watch.in_a_row.items():
            if failed >= min(MOST_IN_A_ROW, self.steps_per_epoch):
                if any(update.too_few for update in found if update.level == name):
                    raise TrainingError(
                        f"too few images can be read for {failed} updates of the {IN_WORDS[name]} in a row, up to step "
                        f"{self.step}, and none of them was made; {self.folder.last} is from before or in between: "
                        "restore the images, then resume the run",
                        "resume",
                    )
                raise TrainingError(
                    f"the loss or its gradients were not finite in {failed} updates of the {IN_WORDS[name]} in a row, "
                    f"up to step {self.step}, and none of them was made; {self.folder.last} is from before or in "
                    f"between, and {self.folder.skipped} lists the images: lower the learning rate in a new run",
                    "lr",
                )

    def _levels(self) -> list[Level]:
        """The levels as the phase of this step changes them. The first step of a phase starts the phase."""
        span = self.schedule.span(self.step)
        if self.step == span.first:
            for level in self.levels:
                level.optimizer.state.clear()
            if span.phase.begin is not None:
                span.phase.begin(self.model)
        part = span.phase.part
        return self.levels if part is None else [level.restricted(part) for level in self.levels]

    def _finish_epoch(self, images_per_second: float) -> None:
        epoch = self.step // self.steps_per_epoch
        share = math.ceil(len(self.split.validation) / world().size)
        try:
            validation = evaluate(
                self._validated(),
                self.split.validation,
                self.config.val_attack,
                batch_size=min(validation_batch(self.config.batch_size, self.model_config.image_size), max(1, share)),
                seed=self.config.seed,
            )
        except NotFiniteError as error:
            raise TrainingError(
                f"the training has diverged: after epoch {epoch} the network's logits or gradients are not finite; "
                f"{self.folder.last} is from before; lower the learning rate in a new run",
                "lr",
            ) from error
        skipped = collect(self.streams.take_skipped()) if self.config.skip_bad_images else []
        if not world().leads:
            self.sums = self._new_sums()
            self._save(best=False)
            return
        figures = validation.as_dict()
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "lr": float(self.levels[-1].optimizer.param_groups[0]["lr"]),
            "images_per_second": round(images_per_second, 2),
        }
        periods = self.method.periods(self.config)
        for level, sums, period in zip(self.levels, self.sums, periods, strict=True):
            prefix = "train" if level is self.levels[-1] else level.name
            record |= {f"{prefix}_{name}": round(value, 4) for name, value in sums.summary().items()}
            if sums.skipped:
                record[f"{prefix}_steps_skipped"] = sums.skipped
            if self.config.skip_bad_images and period:  # a level without batches of its own shares another's images
                record[f"{prefix}_skipped"] = sums.missing
        why = dict(sorted(chain.from_iterable(each.items() for each in skipped)))
        if missing := max(len(why), *(sums.missing for sums in self.sums)):  # a resumed run lacks reasons from before
            self.observer.warned(f"epoch {epoch}: skipped images: {missing}{named(list(why.values()))}")
        record |= {f"val_{name}": value for name, value in figures.items() if name not in {"attack", "seed", "images"}}
        record |= self.routing.figures(epoch)
        self._warn_of_collapse(epoch, record.get("router_load", []))
        final = self.schedule.is_final(self.step)
        best = final and self.selection.better(validation.right_I, validation.robust_I)
        self._metrics = record
        self.folder.log(record, self._pictures(epoch))
        self.sums = self._new_sums()
        self._save(best=best, epoch=epoch)
        self.observer.validated(record)

    def _pictures(self, epoch: int) -> dict[str, NDArray[np.uint8]]:
        """Some validation images, clean and attacked, in ever fewer epochs: 1, 2, 4, 8, ..., and the last one."""
        if epoch & (epoch - 1) and epoch != self.schedule.epochs:
            return {}
        rows = np.unique(np.linspace(0, len(self.split.validation) - 1, PICTURES).astype(np.int64))
        shown = attack_some(
            self._validated(), self.split.validation, rows, self.config.val_attack, seed=self.config.seed
        )
        reach = max(255 * self.config.val_attack.eps, 1e-6)
        difference = (127.5 + 127.5 * shown.difference / reach).clip(0, 255).astype(np.uint8)
        return {"examples/clean": shown.clean, "examples/attacked": shown.attacked, "examples/difference": difference}

    def _warn_of_rest(self) -> None:
        """Warn of many images that fill no batch."""
        images, size = len(self.split.train_indices), self.config.batch_size
        if images % size > LEFT_OUT * images:
            better = next(fewer for fewer in range(size, 0, -1) if images % fewer <= LEFT_OUT * images / 2)
            self.observer.warned(
                f"each epoch leaves out {images % size} of {images} training images, others every time, because they "
                f"fill no batch of {size}; smaller batches leave out fewer",
                batch_size=better,
            )

    def _warn_of_collapse(self, epoch: int, load_L: list[float]) -> None:
        """Warn, once for each layer, of a router that uses only one expert. The advice is given once."""
        if not self.model_config.several_experts:
            return
        first = not self._collapsed
        new = {layer: load for layer, load in enumerate(load_L) if load >= COLLAPSED_LOAD}
        new = {layer: load for layer, load in new.items() if layer not in self._collapsed}
        self._collapsed |= set(new)
        if new:
            shown = ", ".join(f"{layer} ({100 * load:.1f} %)" for layer, load in new.items())
            message = f"epoch {epoch}: routers send nearly every image to one expert, in MoE layer {shown}"
            if first:
                self.observer.warned(
                    f"{message}; such a layer is as good as one expert; if they stay like this, balance their load in "
                    "a new run",
                    balance=BALANCE,
                )
            else:
                self.observer.warned(message)

    def _new_sums(self) -> list[EpochSums]:
        return [EpochSums(routed=bool(self.model.expert_layouts), device=self.device) for _ in self.levels]

    def _check_dispatch(self) -> None:
        if self.config.dispatch == "auto":
            return
        check(self.device.type == "cuda", f"dispatch {self.config.dispatch} needs a GPU; leave it out", "dispatch")
        together(lambda: check_tiles(self.device))

    def _new_compiled(self) -> CompiledNetwork | None:
        way = self.config.compile
        if way == "off":
            return None
        check(
            way != "graphs" or self.device.type == "cuda", "compile graphs needs a GPU; use kernels or off", "compile"
        )
        check(
            world().size == 1,
            f"compile {way} works in one process, and there are {world().size}; leave it off",
            "compile",
        )
        return CompiledNetwork(self.model, graphs=way == "graphs")

    def _validated(self) -> RoutedNetwork:
        """The network that is validated and kept."""
        return self.model if self.average is None else self.average.network

    def _unite(self) -> None:
        """Send the ranks' records about their images to rank 0, the only one that writes."""
        for sums in self.sums:
            sums.unite()
        self.routing.unite()

    def _save(self, *, best: bool = False, epoch: int | None = None) -> None:
        self._read()
        self._unite()
        from_leader(lambda: self.folder.save(self._checkpoint(), self.routing, best=best, epoch=epoch))

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            model=self.model_config,
            weights=weights_of(self._validated()),
            training_weights=None if self.average is None else weights_of(self.model),
            class_names=self.class_names,
            train=to_dict(self.config),
            metrics=self._metrics,
            progress={
                "step": self.step,
                "selection": self.selection.state_dict(),
                "sums": [sums.state_dict() for sums in self.sums],
                "failed_in_a_row": [self.watch.in_a_row.get(level.name, 0) for level in self.levels],
                "images": self.split.digest,
            },
            optimizers=[optimizer_state(level.optimizer) for level in self.levels],
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.progress:
            raise CheckpointError(f"{self.folder.last} has no training state; resume needs the last.pt of a run")
        begun_with = from_dict(TrainConfig, checkpoint.train)
        if self.config.skip_bad_images:  # a run that such an image has stopped can go on without it
            begun_with = dataclasses.replace(begun_with, skip_bad_images=True)
        changed = differences(checkpoint.model, self.model_config) | differences(begun_with, self.config)
        instead = f"or begin a new run in another folder from {self.folder.last}"
        if changed:
            stored = (self.folder.path / RUN_FILE).is_file()
            alone = "give its folder alone to go on with its own settings, " if stored else ""
            raise CheckpointError(
                f"cannot resume {self.folder.path}: it was started with {', '.join(changed.values())}; "
                f"{alone}repeat the original options, {instead}",
                *(["resume"] if stored else []),
                "out",
                "init",
            )
        progress = from_dict(Progress, checkpoint.progress)
        if progress.images not in {"", self.split.digest}:
            raise CheckpointError(
                f"cannot resume {self.folder.path}: the data set has other images or labels than when the run was "
                f"started; restore them, {instead}",
                "init",
                "out",
            )
        failed = progress.failed_in_a_row or [progress.skipped_in_a_row] * len(self.levels)
        try:
            check(progress.step <= self.schedule.steps, f"it is at step {progress.step} of {self.schedule.steps}")
            for of_levels in (checkpoint.optimizers, progress.sums, failed):
                check(len(of_levels) == len(self.levels), "it has another number of levels")
            self._restore_weights(checkpoint, progress)
            for sums, state in zip(self.sums, progress.sums, strict=True):
                sums.load_state_dict(state)
            self.selection.load_state_dict(progress.selection)
        except (ConfigError, CheckpointError, ValueError) as error:
            raise CheckpointError(f"{self.folder.last} does not fit the run it belongs to: {error}") from error
        for level, state in zip(self.levels, checkpoint.optimizers, strict=True):
            load_optimizer(level.optimizer, state)
        self.step = progress.step
        self.watch.in_a_row = {level.name: number for level, number in zip(self.levels, failed, strict=True)}
        self._metrics = dict(checkpoint.metrics)
        if not world().leads:
            self.sums = self._new_sums()  # rank 0 has them all
        from_leader(lambda: self.routing.resume(self.folder.routes, (self.step - 1) // self.steps_per_epoch + 1))

    def _restore_weights(self, checkpoint: Checkpoint, progress: Progress) -> None:
        if self.average is None:
            load_weights(self.model, checkpoint.weights)
            return
        check(checkpoint.training_weights is not None, "it has no weights to go on training from")
        assert checkpoint.training_weights is not None
        load_weights(self.model, checkpoint.training_weights)
        load_weights(self.average.network, checkpoint.weights)
        self.average.updates = progress.step
