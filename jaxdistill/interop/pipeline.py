"""Prompts to pictures and videos: a folder that diffusers calls a pipeline, its networks loaded
here, a few-step sampler.

A text encoder makes the condition, the denoiser (or a distilled student in its place) goes through
a few times, the autoencoder makes pixels. Classes: Stable Diffusion XL, SANA, Qwen-Image and Wan
(2.1, and 2.2 with two experts).
"""

from __future__ import annotations

import dataclasses
import functools
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import interop
from jaxdistill.core.net import Net
from jaxdistill.core.tokenizer import stored_tokenizer
from jaxdistill.core.types import Array, Params, Refused, lookup
from jaxdistill.diffusion.denoiser import Denoiser, Velocity, by_time, guided
from jaxdistill.diffusion.process import DDPM, Flow, Process
from jaxdistill.interop.chain import PREDICTIONS, SCHEDULER
from jaxdistill.interop.safetensors import read_json, shown
from jaxdistill.interop.settings import FLAG, LENGTH, WORD, Kind, above, check, maybe, real, whole
from jaxdistill.samplers import fewstep

QWEN_TEMPLATE = (  # of the released pipeline; its first 34 tokens are not given to the denoiser
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_PREFIX = 34

# of rectified flows; with `flow_shift` in place of `shift`, those of other processes that have it
FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
)
DIFFUSIONS = (  # of DDPM's times
    "DDPMScheduler",
    "DDIMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
)
SHIFT = above(0, 1e6)
SETTINGS: dict[str, Kind] = {  # of scheduler_config.json
    "_class_name": WORD,
    "prediction_type": maybe(WORD),
    "shift": SHIFT,
    "flow_shift": maybe(SHIFT),
    "use_dynamic_shifting": FLAG,
    "shift_terminal": maybe(real(0, 0.999)),
    "base_shift": real(-100, 100),
    "max_shift": real(-100, 100),
    "base_image_seq_len": LENGTH,
    "max_image_seq_len": LENGTH,
    "num_train_timesteps": whole(1, 1000),
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """`parts` are networks and their weights by diffusers' names of them; made by `load`."""

    folder: Path
    index: dict[str, Any]  # model_index.json
    parts: dict[str, tuple[Net, Params]]
    student: str | Path = ""  # the folder that the denoiser comes from, where it is another
    _programs: dict[Any, Any] = dataclasses.field(
        default_factory=dict, repr=False
    )  # compiled functions by what they do

    denoisers = ("transformer",)
    texts = ("text_encoder",)
    schedulers = FLOWS  # diffusers' classes that go through such times
    predictions = ("flow_prediction",)
    param = Velocity(time_scale=1000.0)  # how the denoiser is read
    process: ClassVar[Process] = Flow()  # what it was trained on, and what times mean

    def encode(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> dict[str, Array]:
        """The denoiser's condition, batched over prompts and behind them negative prompts, for
        pictures of `size` (height, width).
        """
        raise NotImplementedError

    def latents(self, count: int, size: tuple[int, int], frames: int) -> tuple[int, ...]:
        """The shape of `count` samples of the denoiser. Raises Refused where the size does not
        divide.
        """
        if any(n % self.down for n in size):
            raise Refused(f"size={size}: expected multiples of {self.down}")
        if frames != 1:
            raise Refused(f"frames={frames}: {type(self).__name__} makes pictures, expected 1")
        return (count, size[0] // self.down, size[1] // self.down, self.vae[0].config.latents)

    def times(self, steps: int, size: tuple[int, int], frames: int = 1) -> np.ndarray:
        """Where the sampler asks the denoiser [steps], falling: even steps of the flow, shifted as
        the scheduler's config says.
        """
        config = self.scheduler
        even = np.linspace(1, 1 / _count(steps), steps)
        shift = config.get("shift", config.get("flow_shift") or 1.0)
        if config.get("use_dynamic_shifting"):
            shift = np.exp(
                _dynamic(config, size[0] // self.down // 2 * (size[1] // self.down // 2))
            )
        times = shift * even / (1 + (shift - 1) * even)
        if (
            end := config.get("shift_terminal")
        ) and steps > 1:  # one step is at 1, which no stretch moves
            times = 1 - (1 - times) * (1 - end) / (1 - times[-1])
        return self._falling(times)

    def _falling(self, times: np.ndarray) -> np.ndarray:
        """`times` again. Raises Refused where they do not fall in 0..1, so that no sampler could
        step from one to the next.
        """
        if not (
            np.isfinite(times).all()
            and (np.diff(times) < 0).all()
            and times[-1] >= 0
            and times[0] <= 1
        ):
            first = ", ".join(f"{t:.4g}" for t in times[:8])
            raise Refused(
                f"{self._scheduler_file}: {len(times)} steps have the times {first}, expected falling ones in 0..1"
            )
        return times

    def network(self, weights: dict[str, Params]):
        """`(x, t, cond) -> Pred` in `self.process`, of denoisers' weights by name."""
        wrap = Denoiser(param=self.param, native=self.process).wrap
        calls = [
            wrap(functools.partial(self.parts[name][0].apply, w), self.process)
            for name, w in weights.items()
        ]
        return (
            calls[0]
            if len(calls) == 1
            else by_time(calls, (float(self.index["boundary_ratio"]),), shared=True)
        )

    def run(
        self,
        name: str,
        *args: Any,
        method: str = "__call__",
        taps: tuple[int, ...] = (),
        **arrays: Any,
    ) -> Any:
        """A method of a part, compiled once."""
        net, params = self.parts[name]
        if (
            name in self.texts
            and isinstance(args[0], np.ndarray)
            and args[0].size
            and args[0].max() >= net.config.vocab
        ):
            raise Refused(
                f"{self.folder}: a tokenizer gives token {args[0].max()}, expected one below {net.config.vocab}, the words of {name}"
            )
        call = functools.partial(net.apply, method=method, **({"taps": taps} if taps else {}))
        return self._program((name, method, taps), call)(params, *args, **arrays)

    def sample(
        self, cond, null, noise: Array, times: Array, key: Array, renoises: bool, guidance: float
    ) -> Array:
        """x0 at the end of the chain, compiled once for each kind of it."""

        def run(weights, cond, null, noise, times, key):
            net = self.network(weights)
            call = lambda x, t: guided(net, x, t, cond, null, guidance)
            xt, t = fewstep.simulate(
                self.process, call, noise, times, key, len(times) - 1, "" if renoises else "ddim"
            )
            return call(xt, t).x0

        weights = {name: self.parts[name][1] for name in self.denoisers if name in self.parts}
        return self._program(("sample", renoises, guidance), run)(
            weights, cond, null, noise, times, key
        )

    def decode(self, x0: Array) -> np.ndarray:
        """Pixels of a denoiser's x0, uint8 [B (F) H W 3]."""
        net, params = self.vae

        def run(params, x0):
            x = net.apply(params, net.apply(params, x0, method="denormalise"), method="decode")
            return jnp.round(jnp.clip(x / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

        return np.asarray(self._program("pixels", run)(params, x0))

    def _program(self, key: Any, function: Callable) -> Callable:
        if key not in self._programs:
            self._programs[key] = jax.jit(function)
        return self._programs[key]

    @property
    def _scheduler_file(self) -> Path:
        """scheduler_config.json, of the student where it has its own."""
        files = [Path(folder) / SCHEDULER for folder in (self.student, self.folder) if folder]
        return next((file for file in files if file.exists()), files[-1])

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config. Raises Refused where it is of no class that gives these times, or
        of values that none has.
        """
        config = read_json(self._scheduler_file)
        file = self._scheduler_file
        check(config, file, SETTINGS)
        if "_class_name" in config:
            lookup(dict.fromkeys(self.schedulers), config["_class_name"], f"{file}: _class_name")
        if config.get("prediction_type") is not None:
            lookup(
                dict.fromkeys(self.predictions),
                config["prediction_type"],
                f"{file}: prediction_type",
            )
        if config.get("base_image_seq_len", 256) == config.get("max_image_seq_len", 4096):
            raise Refused(
                f"{file}: base_image_seq_len and max_image_seq_len are equal, expected two lengths to go between"
            )
        return config

    @property
    def down(self) -> int:
        """Pixels a side of a latent."""
        return self.vae[0].config.down

    @property
    def vae(self) -> tuple[Net, Params]:
        return self.parts["vae"]

    def __call__(
        self,
        prompts: Sequence[str],
        times: Sequence[float],
        *,
        size: tuple[int, int],
        frames: int = 1,
        renoises: bool = True,
        guidance: float = 1.0,
        negative: str = "",
        noise: Array | None = None,
        key: Array | None = None,
    ) -> np.ndarray:
        """Pixels uint8 [B H W 3], or [B F H W 3] of videos, one for each prompt.

        The chain of few-step students (samplers/fewstep.py): x0 at each of `times` of
        `self.process`, then fresh noise (`renoises`) or its own predicted noise (DDIM). `noise`,
        unit Gaussian of shape `latents` and drawn from `key` where not given, is the first state as
        it stands, as in diffusers. With `guidance` w above 1, twice the evaluations: null + w (cond
        - null), null from the `negative` prompt. Raises Refused where sizes do not fit.
        """
        key = jax.random.key(0) if key is None else key
        prompts = list(prompts)
        shape = self.latents(len(prompts), size, frames)
        noise = jax.random.normal(key, shape) if noise is None else jnp.asarray(noise)
        if noise.shape != shape:
            raise Refused(f"noise {list(noise.shape)}: expected {list(shape)}")
        texts = list(dict.fromkeys(prompts))
        negatives = [negative] if guidance != 1.0 else []
        both = self.encode(texts, negatives, size)  # each text once
        rows = lambda index: jax.tree.map(lambda c: c[np.array(index)], both)
        cond = rows([texts.index(p) for p in prompts])
        null = rows([len(texts)] * len(prompts)) if negatives else None
        return self.decode(
            self.sample(cond, null, noise, jnp.asarray(times, jnp.float32), key, renoises, guidance)
        )


def _count(steps: int) -> int:
    """`steps` again. Raises Refused below 1."""
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
        raise Refused(f"steps={steps}: expected a positive whole number")
    return steps


def _dynamic(config: dict[str, Any], tokens: int) -> float:
    """log of the shift for a number of tokens: linear between two resolutions, as
    FlowMatchEulerDiscreteScheduler's config says.
    """
    get = lambda key, default: config.get(key, default)
    slope = (get("max_shift", 1.15) - get("base_shift", 0.5)) / (
        get("max_image_seq_len", 4096) - get("base_image_seq_len", 256)
    )
    return get("base_shift", 0.5) + slope * (tokens - get("base_image_seq_len", 256))


@dataclasses.dataclass(frozen=True)
class StableDiffusionXL(Pipeline):
    """Two CLIP text towers side by side; times are those of DDPM in 0..1, index 999 t."""

    schedulers = DIFFUSIONS
    predictions = tuple(PREDICTIONS)
    denoisers = ("unet",)
    texts = ("text_encoder", "text_encoder_2")
    process = DDPM(scaled=True, beta_min=0.00085, beta_max=0.012)

    @property
    def param(self) -> Velocity:
        return PREDICTIONS[self.scheduler.get("prediction_type") or "epsilon"](time_scale=999.0)

    def times(self, steps, size, frames=1):
        """Even steps from the last index down ("trailing"), which of a one-step student is its
        time.
        """
        count = self.scheduler.get("num_train_timesteps", 1000)
        return self._falling(
            (np.round(np.arange(count, 0, -count / _count(steps)))[:steps] - 1) / 999
        )

    def encode(self, prompts, negatives, size):
        parts = []
        both = [*prompts, *negatives]
        for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            config = self.parts[name][0].config
            tokens, _ = tokenize(self.folder / tokenizer, both, config.max_length)
            states, features = self.run(name, tokens, taps=(config.depth - 2,))
            parts.append(features[0])
        pooled = self.run(name, states, tokens, method="pool")
        zeros = self.index.get("force_zeros_for_empty_prompt")
        given = np.array([True] * len(prompts) + [bool(p) or not zeros for p in negatives])[:, None]
        sizes = jnp.tile(jnp.float32([*size, 0, 0, *size]), (len(both), 1))
        return {
            "text": jnp.concatenate(parts, -1) * given[..., None],
            "pooled": pooled * given,
            "size": sizes,
        }


@dataclasses.dataclass(frozen=True)
class Sana(Pipeline):
    """Gemma 2's states of the prompt. The released pipeline has a long instruction before every
    prompt: give it as `instruction`.
    """

    instruction: str = ""

    length = 300

    def encode(self, prompts, negatives, size):
        folder = self.folder / "tokenizer"
        extra = (
            tokenize(folder, [self.instruction], None)[0].shape[1] - 2 if self.instruction else 0
        )
        rows = [self._states(folder, self.instruction, prompts, self.length + extra)]
        rows += [self._states(folder, "", negatives, self.length)] if negatives else []
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)

    def _states(
        self, folder: Path, before: str, prompts: list[str], length: int
    ) -> dict[str, Array]:
        """Of the first token and the last ones, `self.length` in all."""
        tokens, mask = tokenize(folder, [before + p.lower().strip() for p in prompts], length)
        kept = np.r_[0, np.arange(length - self.length + 1, length)]
        return {
            "text": self.run("text_encoder", tokens, mask=mask)[:, kept],
            "mask": jnp.asarray(mask[:, kept]),
        }


@dataclasses.dataclass(frozen=True)
class QwenImage(Pipeline):
    """Qwen2.5-VL's states of the prompt in a template, padding set to zero and masked."""

    def encode(self, prompts, negatives, size):
        texts = [QWEN_TEMPLATE.format(p) for p in (*prompts, *negatives)]
        tokens, mask = tokenize(self.folder / "tokenizer", texts, 1024 + QWEN_PREFIX, longest=True)
        states = self.run("text_encoder", tokens, mask=mask) * mask[..., None]
        return {"text": states[:, QWEN_PREFIX:], "mask": jnp.asarray(mask[:, QWEN_PREFIX:])}

    def latents(self, count, size, frames):
        if any(n % (2 * self.down) for n in size):
            raise Refused(f"size={size}: expected multiples of {2 * self.down}")
        return super().latents(count, size, frames)


@dataclasses.dataclass(frozen=True)
class Wan(Pipeline):
    """UMT5's states of the prompt; latents of videos. With two experts, the first serves times from
    boundary_ratio on.
    """

    denoisers = ("transformer", "transformer_2")

    def encode(self, prompts, negatives, size):
        clean = [
            re.sub(r"\s+", " ", html.unescape(html.unescape(p))).strip()
            for p in (*prompts, *negatives)
        ]
        tokens, mask = tokenize(self.folder / "tokenizer", clean, 512)
        return {"text": self.run("text_encoder", tokens, mask=mask), "mask": jnp.asarray(mask)}

    def latents(self, count, size, frames):
        step = 2 ** sum(self.vae[0].config.temporal)
        if frames % step != 1:
            raise Refused(f"frames={frames}: expected 1 more than a multiple of {step}")
        shape = super().latents(count, size, 1)
        return (count, (frames - 1) // step + 1, *shape[1:])


PIPELINES: dict[str, type[Pipeline]] = {
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "SanaPipeline": Sana,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
}


def load(folder: str | Path, *, student: str | Path = "", dtype: str = "float32") -> Pipeline:
    """The pipeline in `folder`, weights in `dtype`; with `student`, an exported folder in place of
    the denoiser.

    Raises Refused where there is no pipeline, one of another class, or a part that `interop.load`
    refuses.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    check({"_class_name": index.get("_class_name", "")}, folder / "model_index.json", SETTINGS)
    cls = lookup(PIPELINES, index.get("_class_name", ""), f"{folder / 'model_index.json'}: class")
    if student and (found := type(interop.describe(student))) is not (
        kind := type(interop.describe(folder / cls.denoisers[0]))
    ):
        raise Refused(
            f"student={student}: is a {found.__name__}, expected the {kind.__name__} of {folder / cls.denoisers[0]}"
        )
    parts = {}
    for name in (*cls.texts, *cls.denoisers, "vae"):
        given = index.get(name) or [None]
        if not isinstance(given, list):
            raise Refused(
                f"{folder / 'model_index.json'}: {name} is {shown(repr(given))}, expected a library and a class"
            )
        if given[0] is not None:
            replaced = student and name == cls.denoisers[0]
            parts[name] = interop.load(student if replaced else folder / name, dtype)
    if student and len(cls.denoisers) > 1:
        parts.pop(cls.denoisers[1], None)  # one student serves all times
    if missing := [name for name in (*cls.texts, cls.denoisers[0], "vae") if name not in parts]:
        raise Refused(f"{folder / 'model_index.json'}: {missing[0]} is missing")
    found = cls(folder, index, parts, student)
    if len(found.denoisers) > 1 and found.denoisers[1] in parts:
        check(
            {"boundary_ratio": index.get("boundary_ratio")},
            folder / "model_index.json",
            {"boundary_ratio": real(0, 1)},
        )
    if found._scheduler_file.exists():
        found.scheduler  # noqa: B018 - is checked when it is read
    return found


def tokenize(
    folder: Path, texts: Sequence[str], length: int | None, *, longest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B L], mask bool [B L]) of a stored tokenizer, padded on the right to `length`
    or the longest, cut at it.

    Raises Refused where the folder holds none, or one that does not pad.
    """
    given = _tokenizer(folder)(
        list(texts),
        padding="longest" if longest or length is None else "max_length",
        max_length=length,
        truncation=length is not None,
        return_attention_mask=True,
        return_tensors="np",
    )
    return given["input_ids"].astype(np.int32), given["attention_mask"].astype(bool)


@functools.cache
def _tokenizer(folder: Path):
    found = stored_tokenizer(folder, padding_side="right")
    if found.pad_token_id is None:
        raise Refused(f"tokenizer={folder}: has no pad token, which fills the prompts up")
    return found
