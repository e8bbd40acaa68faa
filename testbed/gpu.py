"""Trains the embedded model on a GPU within a given time: `python -m testbed.gpu --out DIR --seconds 330`.

It goes on from the embedded model (or another, `--model`): first the VAE's decoder, then UNet and text encoders, then
the ControlNet, while other processes draw scenes without end. The encoder stays as it is, so latents stay valid. The
model is written into the folder whenever a part is done (`model-NAME.tar.0`, ...), and a line of JSON every few
seconds into `log.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.parts.prompts import CONTEXT
from accdiff_lib.standalone.loading import Models, alphas_cumprod
from testbed import diffusion
from testbed.controlnet import DROPPED
from testbed.dataset import CELLS, PIXELS
from testbed.decoder import decoder_loss
from testbed.diffusion import ATTENTION, Batch, Networks, attention_loss, loss_weight, mixed, mixed_precision
from testbed.feed import Block, Feed
from testbed.saving import restored, save
from testbed.vae import levels

#: Largest learning rates; text encoders learn faster, because shape words are close together in them.
DECODER_RATE, RATE, TEXT_RATE, CONTROL_RATE = 1.5e-3, 1e-3, 2e-3, 6e-4
#: Steps between looks at the clock and at the feed: each look waits for the GPU.
LOOK = 16
#: Bytes of a part of the model's archive.
PART = 12 * 2**20


class Clock:
    """The time since the start, and the log."""

    def __init__(self, out: Path):
        self.begin, self._file = time.monotonic(), out / "log.jsonl"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def log(self, what: str, *, losses: Mapping[str, Tensor] | None = None, **values: Any) -> None:
        """Writes a line."""
        rounded = {name: round(float(value), 5) if isinstance(value, (float, Tensor)) else value
                   for name, value in {**values, **(losses or {})}.items()}
        line = json.dumps({"seconds": round(self.seconds, 1), "what": what, **rounded})
        print(line, flush=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Store:
    """All examples so far, on the device: as in `dataset.Shard`, edges as bits, and the pictures of some."""

    def __init__(self, feed: Feed, encoder: Any, capacity: int, pictures: int, device: torch.device):
        """`encoder` is the VAE that makes the latents; pictures are kept of `pictures` examples."""
        self._feed, self._encoder = feed, encoder
        self.latents = torch.empty(capacity, 4, PIXELS // 8, PIXELS // 8, dtype=torch.float16, device=device)
        self.tokens = torch.empty(capacity, CONTEXT, dtype=torch.int32, device=device)
        self.token_regions = torch.empty(capacity, CONTEXT, dtype=torch.uint8, device=device)
        self.cell_regions = torch.empty(capacity, CELLS, CELLS, dtype=torch.uint8, device=device)
        self.edges = torch.empty(capacity, PIXELS, PIXELS // 8, dtype=torch.uint8, device=device)
        self.pictures = torch.empty(pictures, PIXELS, PIXELS, 3, dtype=torch.uint8, device=device)
        #: How many examples and pictures there are, also as a tensor for graphs, which read it when they are played.
        self.count = self.pictured = 0
        self.filled = torch.zeros((), device=device)

    def refill(self, wait: bool = False) -> None:
        """Takes what the feed has ready, a few blocks at most."""
        if self.count < len(self.latents):
            for block in islice(self._feed.ready(wait), 4):
                self._add(block)
                if self.count == len(self.latents):
                    break

    @torch.no_grad()
    def _add(self, block: Block) -> None:
        size = min(len(block.tokens), len(self.latents) - self.count)
        place = slice(self.count, self.count + size)
        for name in ("tokens", "token_regions", "cell_regions", "edges"):
            getattr(self, name)[place].copy_(torch.from_numpy(getattr(block, name)[:size]))
        pictures = torch.from_numpy(block.pictures[:size]).to(self.latents.device)
        self.latents[place] = encode(self._encoder, pictures).mode().half()
        kept = min(size, len(self.pictures) - self.pictured)
        self.pictures[self.pictured:self.pictured + kept] = pictures[:kept]
        self.count, self.pictured = self.count + size, self.pictured + kept
        self.filled.fill_(self.count)


def encode(encoder: Any, pictures: Tensor) -> Any:
    """The distribution of the latents of pictures uint8 [B, 256, 256, 3]."""
    return encoder.encode(levels(pictures).to(encoder.dtype)).latent_dist


class Sampler:
    """Batches drawn on the device, by random numbers that a graph may draw again whenever it is played."""

    def __init__(self, store: Store, size: int, dropped: float, factor: float, empty: Tensor):
        self.store, self.size, self._dropped, self._factor, self._empty = store, size, dropped, factor, empty
        #: None for the device's own generator, which graphs know how to play.
        self.generator: torch.Generator | None = None
        device = store.latents.device
        self._alphas = alphas_cumprod({}).float().to(device)
        weight = loss_weight(self._alphas / (1 - self._alphas))
        # Halfway between all noise levels alike and each by its weight, which keeps the loss and lowers its variance.
        share = weight.sqrt() / weight.sqrt().sum()
        self._draws, self._weight = share.cumsum(0), weight / (share * len(share))

    def __call__(self) -> Batch:
        store, device, size = self.store, self.store.latents.device, self.size
        chance = torch.rand(3, size, generator=self.generator, device=device)
        rows = (chance[0] * store.filled).long().clamp(max=len(store.latents) - 1)
        t = torch.searchsorted(self._draws, chance[1]).clamp(max=len(self._draws) - 1)
        dropped = chance[2][:, None] < self._dropped
        latents = store.latents[rows].float() * self._factor
        noise = torch.randn(latents.shape, generator=self.generator, device=device)
        return Batch(mixed(latents, noise, self._alphas[t]), t,
                     torch.where(dropped, self._empty, store.tokens[rows].long()),
                     diffusion.random_sizes(size, self.generator, device), noise, self._weight[t],
                     store.token_regions[rows].masked_fill(dropped, 0), store.cell_regions[rows], rows)


class Trainer:
    """Steps of one part of the model; on a GPU captured once as a graph, because launching a step's thousands of small
    kernels one by one takes longer than they do."""

    def __init__(self, rates: list[tuple[nn.Module, float]], loss: Callable[[], dict[str, Tensor]], decay: float):
        """`rates` are modules and their largest learning rates; `loss` computes what to log and the "loss" itself."""
        self._loss = loss
        self.parameters = [weight for module, _ in rates for weight in module.parameters() if weight.requires_grad]
        device = self.parameters[0].device
        self._rates = [rate for _, rate in rates]
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in module.parameters() if weight.requires_grad],
             "lr": torch.zeros((), device=device)} for module, _ in rates]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-3, fused=True,
                                            capturable=device.type == "cuda")
        self._average = [weight.detach().clone() for weight in self.parameters]
        self._decay = decay
        self._log: dict[str, Tensor] = {}
        self._graph: Any = None
        self.steps = 0

    def set_rate(self, done: float) -> None:
        """Of the share of the time that is over: a short rise, then half a cosine down to nothing."""
        height = min(1.0, (self.steps + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done)))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"].fill_(rate * height)

    def _step(self) -> None:
        self._log = self._loss()
        self._optimizer.zero_grad(set_to_none=True)
        self._log["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [weight.detach() for weight in self.parameters], 1 - self._decay)
        self._log = {name: value.detach() for name, value in self._log.items()}

    def capture(self) -> None:
        """Makes the graph, after some steps as they are."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        self._log = {}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def train(self, until: float, clock: Clock, store: Store, name: str,
              halfway: Callable[[], None] | None = None) -> None:
        """Steps until the clock says so; calls `halfway` when half of the time is over."""
        begin, since, logged = clock.seconds, 0, clock.seconds
        while clock.seconds < until:
            self.set_rate((clock.seconds - begin) / (until - begin))
            for _ in range(LOOK if torch.cuda.is_available() else 1):
                if self._graph:
                    self._graph.replay()
                else:
                    self._step()
                self.steps += 1
            found = float(self._log["loss"])  # waits for the steps
            if not math.isfinite(found):
                raise FloatingPointError(f"{name}: the loss is {found} after {self.steps} steps")
            store.refill()
            if clock.seconds - logged > 5:
                clock.log(name, step=self.steps, rate=(self.steps - since) / (clock.seconds - logged),
                          examples=store.count, losses=self._log)
                since, logged = self.steps, clock.seconds
            if halfway is not None and clock.seconds > (begin + until) / 2:
                with self.averaged():
                    halfway()
                halfway = None
        clock.log(f"{name} done", step=self.steps, examples=store.count, losses=self._log)

    def averaged(self) -> Any:
        """A context with the averaged weights in place."""
        return _Swapped(self.parameters, self._average)

    def keep_average(self) -> None:
        """Leaves the averaged weights in place."""
        self.averaged().__enter__()


class _Swapped:
    """Two lists of weights that change places, and back again at the end."""

    def __init__(self, first: list[Any], second: list[Tensor]):
        self._pairs = list(zip(first, second, strict=True))

    @torch.no_grad()
    def __enter__(self) -> None:
        for first, second in self._pairs:
            kept = first.detach().clone()
            first.copy_(second)
            second.copy_(kept)

    def __exit__(self, *_: object) -> None:
        self.__enter__()


def decoder_trainer(model: Any, encoder: Any, store: Store, batch: int) -> Trainer:
    """Of the decoder of the VAE `model`, for latents of `encoder`."""
    model.requires_grad_(False)
    parts = [model.decoder.requires_grad_(True), model.post_quant_conv.requires_grad_(True)]
    device = store.latents.device

    def loss() -> dict[str, Tensor]:
        rows = (torch.rand(batch, device=device) * store.pictured).long()
        image = levels(store.pictures[rows])
        with torch.no_grad():
            latents = encoder.encode(image.to(encoder.dtype)).latent_dist.sample()
        with torch.autocast(device.type, torch.bfloat16):
            decoded = model.decode(latents.float()).sample
        return {"loss": decoder_loss(decoded.float(), image)}

    return Trainer([(part, DECODER_RATE) for part in parts], loss, 0.995)


def diffusion_trainer(networks: Networks, sampler: Sampler) -> Trainer:
    """Of UNet and text encoders."""
    mixed_precision(networks, sampler.store.latents.device.type)
    networks.train().requires_grad_(True)

    def loss() -> dict[str, Tensor]:
        batch = sampler()
        with torch.autocast(batch.t.device.type, torch.bfloat16):
            predicted, probabilities = networks(batch.noised, batch.t, batch.tokens, batch.sizes)
        looks = attention_loss(probabilities, batch.cell_regions, batch.token_regions)
        error = (batch.weight * batch.error(predicted)).mean()
        return {"loss": error + ATTENTION * looks, "error": error, "attention": looks}

    return Trainer([(networks.unet, RATE), (networks.text_1, TEXT_RATE), (networks.text_2, TEXT_RATE)], loss, 0.999)


def controlnet_trainer(networks: Networks, controlnet: Any, sampler: Sampler) -> Trainer:
    """Of the ControlNet, while all else stays as it is."""
    networks.requires_grad_(False)
    mixed_precision(controlnet, sampler.store.latents.device.type)
    controlnet.train().requires_grad_(True)
    bits = torch.arange(7, -1, -1, device=sampler.store.latents.device)

    def loss() -> dict[str, Tensor]:
        batch = sampler()
        packed = sampler.store.edges[batch.rows][..., None].int()
        edges = (packed >> bits & 1).flatten(2)[:, None].float().expand(-1, 3, -1, -1)
        with torch.autocast(batch.t.device.type, torch.bfloat16):
            with torch.no_grad():
                states, pooled = networks.encode(batch.tokens)
            inputs = {"encoder_hidden_states": states,
                      "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.sizes}}
            down, middle = controlnet(batch.noised, batch.t, controlnet_cond=edges, return_dict=False, **inputs)
            predicted = networks.unet(batch.noised, batch.t, down_block_additional_residuals=down,
                                      mid_block_additional_residual=middle, **inputs).sample
        return {"loss": (batch.weight * batch.error(predicted)).mean()}

    return Trainer([(controlnet, CONTROL_RATE)], loss, 0.998)


def capture(trainer: Trainer, sampler: Sampler, clock: Clock) -> None:
    """Makes the trainer's graph; where that fails, it goes on without, and with random numbers of its own, because
    the device's generator may still wait for the graph."""
    if not torch.cuda.is_available():
        return
    try:
        trainer.capture()
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, the time on the GPU is not to be lost
        clock.log("no graph", reason=repr(error)[:500])
        sampler.generator = torch.Generator(sampler.store.latents.device).manual_seed(1)
        return
    clock.log("graph captured", memory=torch.cuda.max_memory_allocated() / 1e9)


def write(models: Models, out: Path, name: str) -> None:
    """Writes the model as parts of an archive, and then removes the archives that were there before."""
    before = list(out.glob("model-*.tar.*"))
    with tempfile.TemporaryDirectory() as folder:
        copied = copy.copy(models)  # `save` changes precisions on the way
        copied.unet, copied.vae, copied.controlnet = (_plain(part) for part in (
            models.unet, models.vae, models.controlnet))
        copied.text_encoders = [_plain(part) for part in models.text_encoders]
        save(copied, Path(folder), dtype=torch.float16)
        Path(folder).chmod(0o755)
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.add(folder, ".")
    content = stream.getvalue()
    for number, begin in enumerate(range(0, len(content), PART)):
        temporary = out / "writing"
        temporary.write_bytes(content[begin:begin + PART])
        os.replace(temporary, out / f"model-{name}.tar.{number}")
    for file in before:
        file.unlink()


def unpack(folder: Path, out: Path) -> None:
    """Writes the model whose archive lies in `folder` as a diffusers folder."""
    parts = sorted(folder.glob("model-*.tar.*"))
    if not parts or len({file.stem for file in parts}) != 1:
        raise FileNotFoundError(f"{folder} must have the parts of one archive, and has {[file.name for file in parts]}")
    with tarfile.open(fileobj=io.BytesIO(b"".join(file.read_bytes() for file in parts))) as archive:
        archive.extractall(out, filter="data")


def _plain(module: Any) -> Any:
    """A copy of a network on the CPU, without what training put on it."""
    kind = type(module)
    with torch.random.fork_rng(devices=[]):
        fresh = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    fresh.load_state_dict(module.state_dict())
    return fresh


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m testbed.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and the log")
    parser.add_argument("--seconds", type=float, default=300.0, help="of all, from the start (default: %(default)s)")
    parser.add_argument("--shares", type=float, nargs=3, default=(0.19, 0.61, 0.2), metavar=("VAE", "UNET", "CONTROL"),
                        help="of the time that is left when training begins (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder of the model to go on from (default: the embedded one)")
    parser.add_argument("--series", type=int, default=0, help="another one has other examples (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="pictures a step (default: %(default)s)")
    parser.add_argument("--images", type=int, default=48, help="pictures a step of the VAE (default: %(default)s)")
    parser.add_argument("--capacity", type=int, default=200_000, help="examples (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=60_000, help="for the VAE (default: %(default)s)")
    parser.add_argument("--first", type=int, default=4000, help="examples to begin with (default: %(default)s)")
    parser.add_argument("--block", type=int, default=200, help="examples drawn at a time (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.out)
    feed = Feed(options.processes, options.block, series=options.series)
    try:
        _train(options, clock, feed)
    finally:
        feed.stop()


def _train(options: argparse.Namespace, clock: Clock, feed: Feed) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.series)
    torch.backends.cudnn.benchmark = True
    models: Any = restored(options.model, device)
    for module in models.modules():
        module.to(device)
    encoder = copy.deepcopy(models.vae).requires_grad_(False)
    encoder.to(torch.float16 if device.type == "cuda" else torch.float32)
    store = Store(feed, encoder, options.capacity, min(options.pictures, options.capacity), device)
    while store.count < min(options.first, options.capacity):
        store.refill(wait=True)
    clock.log("begin", examples=store.count)
    begin, total = clock.seconds, options.seconds - clock.seconds
    ends = [begin + total * sum(options.shares[:number]) for number in (1, 2, 3)]

    if options.shares[0]:
        trainer = decoder_trainer(models.vae, encoder, store, options.images)
        trainer.train(ends[0], clock, store, "decoder")
        trainer.keep_average()
        models.vae.requires_grad_(False)
        write(models, options.out, "decoder")
    store.pictures = store.pictures[:0].clone()  # their memory is free now
    store.pictured = 0

    networks = Networks()
    networks.unet, (networks.text_1, networks.text_2) = models.unet, models.text_encoders
    tokenizer = models.tokenizers[0]
    empty = torch.tensor([tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (CONTEXT - 1), device=device)
    factor = models.vae.config.scaling_factor
    sampler = Sampler(store, options.batch, diffusion.DROPPED, factor, empty)
    trainer = diffusion_trainer(networks, sampler)
    if options.shares[1]:
        capture(trainer, sampler, clock)
        trainer.train(ends[1], clock, store, "unet", halfway=lambda: write(models, options.out, "half"))
        trainer.keep_average()
        write(models, options.out, "unet")
    if options.shares[2]:
        sampler = Sampler(store, options.batch, DROPPED, factor, empty)
        trainer = controlnet_trainer(networks, models.controlnet, sampler)
        capture(trainer, sampler, clock)
        trainer.train(ends[2], clock, store, "controlnet")
        trainer.keep_average()
    write(models, options.out, "final")
    clock.log("written", examples=store.count)


if __name__ == "__main__":
    main()
