"""Text to pictures and videos by a pipeline folder of diffusers and a few-step sampler.

A pipeline has a text encoder, which makes the condition; a denoiser, which the sampler evaluates a
few times and which a distilled student may replace; and an autoencoder, which leads from latents
to pixels. The folder's networks are loaded here. Supported classes: Stable Diffusion XL, SANA,
Qwen-Image and Wan (2.1, and 2.2 with two experts).
"""

from __future__ import annotations

import dataclasses
import functools
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import interop
from jaxdistill.core.net import Net
from jaxdistill.core.tokenizer import stored_tokenizer
from jaxdistill.core.types import Array, Params, Refused, lookup, quoted
from jaxdistill.diffusion.denoiser import Denoiser, Velocity, by_time, guided
from jaxdistill.diffusion.process import DDPM, Flow, Process
from jaxdistill.interop.chain import PREDICTIONS, SCHEDULER
from jaxdistill.interop.safetensors import read_json
from jaxdistill.interop.settings import (
    FLAG,
    LENGTH,
    WORD,
    Kind,
    above,
    check,
    maybe,
    real,
    whole,
)
from jaxdistill.samplers import fewstep

# The prompt's frame in the released Qwen-Image pipeline. The text encoder reads all of it; the
# denoiser is not given the features of the first 34 tokens, which are the same for every prompt.
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_PREFIX = 34

# Schedulers of diffusers for rectified flow. Those that also serve other processes call the shift
# of their times `flow_shift`, the others call it `shift`.
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
)
# Schedulers of diffusers for DDPM
DDPM_SCHEDULERS = (
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
FRESH_NOISE = ""  # the solver of samplers.fewstep that renoises x0 with fresh noise

SHIFT = above(0, 1e6)
# What the keys of scheduler_config.json may hold; `_class_name` is also one of model_index.json.
SCHEDULER_KINDS: dict[str, Kind] = {
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
    """A pipeline folder and its loaded networks; made by `load`, called on prompts.

    There is one subclass per diffusers pipeline class. It has the names of the networks, and it
    turns a prompt into the denoiser's condition.
    """

    folder: Path
    index: dict[str, Any]  # the content of model_index.json
    # networks and their weights by diffusers' names
    parts: dict[str, tuple[Net, Params]]
    # the folder of the denoiser if it is not the pipeline's own
    student: str | Path = ""
    # compiled functions by key
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    # Names of the denoisers. If there are two, the first serves times >= boundary_ratio.
    denoisers = ("transformer",)
    # Names of the text encoders
    texts = ("text_encoder",)
    # The schedulers and kinds of prediction whose times and outputs are supported
    schedulers = FLOW_SCHEDULERS
    predictions = ("flow_prediction",)
    # The parameterisation of the denoiser's output
    param = Velocity(time_scale=1000.0)
    # The process that the denoiser was trained on; all times here are times of it
    process: ClassVar[Process] = Flow()

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
        """Pictures or videos for prompts, by the sampler of few-step students.

        At each time the denoiser predicts x0; the state of the next time is x0 with noise.

        Args:
            prompts: One text for each sample.
            times: Falling times of `self.process` at which the denoiser is evaluated.
            size: Height and width in pixels.
            frames: Length of a video; 1 for a picture.
            renoises: Whether the noise between two times is fresh, or the predicted one (DDIM).
            guidance: Scale w of null + w (cond - null); other than 1, twice the evaluations.
            negative: The prompt of the null condition.
            noise: The noise that the sampler starts from, of the shape `latents`, not scaled any
                more; None: unit Gaussian, drawn from `key`.
            key: For all draws; None: key 0.

        Returns:
            Pixels, uint8 [B H W 3], or [B F H W 3] of videos.

        Raises:
            Refused: A size or the noise does not fit the networks.
        """
        prompts = list(prompts)
        if key is None:
            key = jax.random.key(0)
        shape = self.latents(len(prompts), size, frames)
        noise = (
            jax.random.normal(key, shape) if noise is None else jnp.asarray(noise)
        )
        if noise.shape != shape:
            raise Refused(f"noise {list(noise.shape)}: expected {list(shape)}")
        cond, null = self._conditions(
            prompts, [negative] if guidance != 1.0 else [], size
        )
        times = jnp.asarray(times, jnp.float32)
        x0 = self.sample(cond, null, noise, times, key, renoises, guidance)
        return self.decode(x0)

    def _conditions(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """(condition, null condition), one sample per prompt.

        Null is None without negative prompts, of which there is at most one. Equal prompts are
        encoded once.
        """
        texts = list(dict.fromkeys(prompts))
        encoded = self.encode(texts, negatives, size)

        def take(places: list[int]) -> dict[str, Array]:
            return jax.tree.map(lambda array: array[np.array(places)], encoded)

        cond = take([texts.index(prompt) for prompt in prompts])
        # The one negative prompt comes after the texts.
        null = take([len(texts)] * len(prompts)) if negatives else None
        return cond, null

    def encode(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> dict[str, Array]:
        """The denoiser's condition for pictures of `size` (height, width).

        The batch has the prompts first, then the negative prompts.
        """
        raise NotImplementedError

    def latents(
        self, count: int, size: tuple[int, int], frames: int
    ) -> tuple[int, ...]:
        """The shape of `count` samples of the denoiser.

        Raises Refused if the size or the number of frames cannot be made by the networks.
        """
        if any(n % self.down for n in size):
            raise Refused(f"size={size}: expected multiples of {self.down}")
        if frames != 1:
            raise Refused(
                f"frames={frames}: {type(self).__name__} makes pictures, expected 1"
            )
        net, _ = self.vae
        return (
            count,
            size[0] // self.down,
            size[1] // self.down,
            net.config.latents,
        )

    def times(
        self, steps: int, size: tuple[int, int], frames: int = 1
    ) -> np.ndarray:
        """The times [steps] that the scheduler's config prescribes: evenly spaced, then shifted.

        Raises Refused if they are not falling within 0..1.
        """
        config = self.scheduler
        even = np.linspace(1, 1 / _positive(steps), steps)
        if config.get("use_dynamic_shifting"):
            tokens = (size[0] // self.down // 2) * (size[1] // self.down // 2)
            shift = np.exp(_log_shift(config, tokens))
        else:
            shift = config.get("shift", config.get("flow_shift") or 1.0)
        times = shift * even / (1 + (shift - 1) * even)
        end = config.get("shift_terminal")
        if end and steps > 1:  # a single time is 1: nothing to stretch (and 0/0)
            times = 1 - (1 - times) * (1 - end) / (1 - times[-1])
        return self._falling(times)

    def _falling(self, times: np.ndarray) -> np.ndarray:
        """Returns `times` unchanged. Raises Refused if they are not falling within 0..1."""
        falls = np.isfinite(times).all() and (np.diff(times) < 0).all()
        if not (falls and times[-1] >= 0 and times[0] <= 1):
            first = ", ".join(f"{t:.4g}" for t in times[:8])
            raise Refused(
                f"{self._scheduler_file}: {len(times)} steps have the times {first}, expected "
                "falling ones in 0..1"
            )
        return times

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config.

        Raises Refused if its class or its prediction is not supported, or if a value is not one
        that a scheduler can have.
        """
        file = self._scheduler_file
        config = read_json(file)
        check(config, file, SCHEDULER_KINDS)
        if "_class_name" in config:
            names = dict.fromkeys(self.schedulers)
            lookup(names, config["_class_name"], f"{file}: _class_name")
        if config.get("prediction_type") is not None:
            kinds = dict.fromkeys(self.predictions)
            lookup(kinds, config["prediction_type"], f"{file}: prediction_type")
        if config.get("base_image_seq_len", 256) == config.get(
            "max_image_seq_len", 4096
        ):
            raise Refused(
                f"{file}: base_image_seq_len and max_image_seq_len are equal, expected two lengths "
                "to interpolate between"
            )
        return config

    @property
    def _scheduler_file(self) -> Path:
        """The student's scheduler_config.json if it has one, else the pipeline's."""
        own = self.folder / SCHEDULER
        if self.student and (Path(self.student) / SCHEDULER).exists():
            return Path(self.student) / SCHEDULER
        return own

    @property
    def vae(self) -> tuple[Net, Params]:
        """The autoencoder and its weights."""
        return self.parts["vae"]

    @property
    def down(self) -> int:
        """Pixels along a side of a picture per latent."""
        net, _ = self.vae
        return net.config.down

    def run(
        self,
        name: str,
        *args: Any,
        method: str = "__call__",
        taps: tuple[int, ...] = (),
        **arrays: Any,
    ) -> Any:
        """Calls a method of one network, compiled once.

        Raises Refused if a text encoder is given a token that its vocabulary does not have.
        """
        net, params = self.parts[name]
        # A numpy array holds tokens; a jax array holds features, for `pool`.
        if name in self.texts and isinstance(args[0], np.ndarray):
            self._check_tokens(name, args[0])
        options = {"taps": taps} if taps else {}
        call = functools.partial(net.apply, method=method, **options)
        return self._compiled((name, method, taps), call)(params, *args, **arrays)

    def _check_tokens(self, name: str, tokens: np.ndarray) -> None:
        net, _ = self.parts[name]
        if tokens.size and tokens.max() >= net.config.vocab:
            raise Refused(
                f"{self.folder}: a tokenizer gives token {tokens.max()}, expected one below "
                f"{net.config.vocab}, the words of {name}"
            )

    def network(self, weights: Mapping[str, Params]) -> Callable:
        """The denoiser, `(x, t, cond) -> Pred` in `self.process`; of two, each serves its times.

        Args:
            weights: The weights of the denoisers by name.
        """
        # `wrap` makes a denoiser in a process of a network and its parameterisation.
        wrap = Denoiser(param=self.param, native=self.process).wrap
        experts = []
        for name, params in weights.items():
            net, _ = self.parts[name]
            experts.append(wrap(functools.partial(net.apply, params), self.process))
        if len(experts) == 1:
            return experts[0]
        boundary = float(self.index["boundary_ratio"])
        # All samples have the same time, so only one expert runs.
        return by_time(experts, (boundary,), shared=True)

    def sample(
        self,
        cond: dict[str, Array],
        null: dict[str, Array] | None,
        noise: Array,
        times: Array,
        key: Array,
        renoises: bool,
        guidance: float,
    ) -> Array:
        """The denoiser's x0 at the last of `times`; arguments as of `__call__`."""
        solver = FRESH_NOISE if renoises else "ddim"

        def run(weights, cond, null, noise, times, key):
            net = self.network(weights)

            def denoise(x, t):
                return guided(net, x, t, cond, null, guidance)

            last = len(times) - 1
            xt, t = fewstep.simulate(
                self.process, denoise, noise, times, key, last, solver
            )
            return denoise(xt, t).x0

        present = [name for name in self.denoisers if name in self.parts]
        weights = {name: self.parts[name][1] for name in present}
        program = self._compiled(("sample", renoises, guidance), run)
        return program(weights, cond, null, noise, times, key)

    def decode(self, x0: Array) -> np.ndarray:
        """Pixels of the denoiser's x0, uint8 [B (F) H W 3]."""
        net, params = self.vae

        def run(params, x0):
            latents = net.apply(params, x0, method="denormalise")
            x = net.apply(params, latents, method="decode")
            return jnp.round(jnp.clip(x / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

        return np.asarray(self._compiled("pixels", run)(params, x0))

    def _compiled(self, name: Any, function: Callable) -> Callable:
        """The program under this name; compiles `function` on the first call under it."""
        if name not in self._programs:
            self._programs[name] = jax.jit(function)
        return self._programs[name]


def _positive(steps: int) -> int:
    """Returns `steps` unchanged. Raises Refused if it is not a whole number of at least 1."""
    if (
        not isinstance(steps, int | np.integer)
        or isinstance(steps, bool)
        or steps < 1
    ):
        raise Refused(f"steps={steps}: expected a positive whole number")
    return steps


def _log_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm of the shift for a picture of `tokens` patches.

    It is a line through the logarithms of the shifts at two resolutions, as in diffusers'
    FlowMatchEulerDiscreteScheduler.
    """
    low = config.get("base_shift", 0.5)
    high = config.get("max_shift", 1.15)
    fewest = config.get("base_image_seq_len", 256)
    most = config.get("max_image_seq_len", 4096)
    slope = (high - low) / (most - fewest)
    return low + slope * (tokens - fewest)


@dataclasses.dataclass(frozen=True)
class StableDiffusionXL(Pipeline):
    """Two CLIP text towers side by side; DDPM, whose index i of 1000 is the time i / 999."""

    denoisers = ("unet",)
    texts = ("text_encoder", "text_encoder_2")
    schedulers = DDPM_SCHEDULERS
    predictions = tuple(PREDICTIONS)
    process = DDPM(scaled=True, beta_min=0.00085, beta_max=0.012)

    @property
    def param(self) -> Velocity:
        """The parameterisation of the denoiser's output, from the scheduler's config."""
        kind = self.scheduler.get("prediction_type") or "epsilon"
        return PREDICTIONS[kind](time_scale=999.0)

    def times(
        self, steps: int, size: tuple[int, int], frames: int = 1
    ) -> np.ndarray:
        """Evenly spaced indices down from the scheduler's last one ("trailing" in diffusers).

        The scheduler of a one-step student ends at the index that the student was trained at, so
        this index is its time.
        """
        count = self.scheduler.get("num_train_timesteps", 1000)
        numbers = np.round(np.arange(count, 0, -count / _positive(steps)))[:steps]
        return self._falling((numbers - 1) / 999)

    def encode(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> dict[str, Array]:
        """Features of the next to last layer of both towers, the second's pooled output, the size.

        An empty negative prompt is zeros if model_index.json says so
        (`force_zeros_for_empty_prompt`).
        """
        texts = [*prompts, *negatives]
        features = []
        for name, tokenizer in (
            ("text_encoder", "tokenizer"),
            ("text_encoder_2", "tokenizer_2"),
        ):
            net, _ = self.parts[name]
            tokens, _ = tokenize(
                self.folder / tokenizer, texts, net.config.max_length
            )
            states, (penultimate,) = self.run(
                name, tokens, taps=(net.config.depth - 2,)
            )
            features.append(penultimate)
        # `states` and `tokens` are those of the second tower, which the loop ends with.
        pooled = self.run("text_encoder_2", states, tokens, method="pool")
        zeros = self.index.get("force_zeros_for_empty_prompt")
        is_given = [True] * len(prompts) + [
            bool(text) or not zeros for text in negatives
        ]
        given = np.array(is_given)[:, None]
        height, width = size
        # the original size, the crop's top left corner, and the target size; each (height, width)
        sizes = jnp.float32([height, width, 0, 0, height, width])
        return {
            "text": jnp.concatenate(features, -1) * given[..., None],
            "pooled": pooled * given,
            "size": jnp.tile(sizes, (len(texts), 1)),
        }


@dataclasses.dataclass(frozen=True)
class Sana(Pipeline):
    """Gemma 2's features of the prompt.

    The released pipeline puts a long instruction before every prompt: give it as `instruction`.
    """

    instruction: str = ""

    length = 300  # tokens that the denoiser is given

    def encode(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> dict[str, Array]:
        """Features of `length` tokens of each text.

        The instruction is put before the prompts, not before negative prompts.
        """
        length = self.length
        if self.instruction:
            tokens, _ = tokenize(
                self.folder / "tokenizer", [self.instruction], None
            )
            # As in the released pipeline: minus 2, because the begin token and a blank are in both
            # counts.
            length = self.length + tokens.shape[1] - 2
        encoded = self._features(self.instruction, prompts, length)
        if not negatives:
            return encoded
        null = self._features("", negatives, self.length)
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), encoded, null)

    def _features(
        self, before: str, prompts: list[str], length: int
    ) -> dict[str, Array]:
        """Features of texts that begin with `before`, `self.length` tokens of each.

        Of the `length` tokens of a text, the first and the last self.length - 1 are kept.
        """
        texts = [before + prompt.lower().strip() for prompt in prompts]
        tokens, mask = tokenize(self.folder / "tokenizer", texts, length)
        kept = np.r_[0, np.arange(length - self.length + 1, length)]
        features = self.run("text_encoder", tokens, mask=mask)
        return {"text": features[:, kept], "mask": jnp.asarray(mask[:, kept])}


@dataclasses.dataclass(frozen=True)
class QwenImage(Pipeline):
    """Qwen2.5-VL's features of the prompt in a template."""

    def encode(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> dict[str, Array]:
        """Features of the tokens after the template's prefix.

        Features of padding are zero, and masked.
        """
        texts = [QWEN_TEMPLATE.format(prompt) for prompt in (*prompts, *negatives)]
        longest = 1024 + QWEN_PREFIX
        tokens, mask = tokenize(
            self.folder / "tokenizer", texts, longest, to_longest=True
        )
        features = self.run("text_encoder", tokens, mask=mask) * mask[..., None]
        return {
            "text": features[:, QWEN_PREFIX:],
            "mask": jnp.asarray(mask[:, QWEN_PREFIX:]),
        }

    def latents(
        self, count: int, size: tuple[int, int], frames: int
    ) -> tuple[int, ...]:
        """As in the base class, with sizes that the denoiser's patches of 2 x 2 latents fill."""
        if any(n % (2 * self.down) for n in size):
            raise Refused(f"size={size}: expected multiples of {2 * self.down}")
        return super().latents(count, size, frames)


@dataclasses.dataclass(frozen=True)
class Wan(Pipeline):
    """UMT5's features of the prompt; latents of videos.

    With two experts, the first serves times >= the boundary_ratio of model_index.json.
    """

    denoisers = ("transformer", "transformer_2")

    def encode(
        self, prompts: list[str], negatives: list[str], size: tuple[int, int]
    ) -> dict[str, Array]:
        """Features of 512 tokens, of texts without HTML's escapes and repeated blanks."""
        texts = []
        for prompt in (*prompts, *negatives):
            # twice, as in the released pipeline: "&amp;lt;" becomes "<"
            plain = html.unescape(html.unescape(prompt))
            texts.append(re.sub(r"\s+", " ", plain).strip())
        tokens, mask = tokenize(self.folder / "tokenizer", texts, 512)
        return {
            "text": self.run("text_encoder", tokens, mask=mask),
            "mask": jnp.asarray(mask),
        }

    def latents(
        self, count: int, size: tuple[int, int], frames: int
    ) -> tuple[int, ...]:
        """The shape of `count` videos: one latent frame for the first frame, and one for each
        further group of frames.
        """
        net, _ = self.vae
        # `temporal` has a flag per change of resolution: whether it halves the frames too.
        group = 2 ** sum(net.config.temporal)
        if frames % group != 1:
            raise Refused(
                f"frames={frames}: expected 1 more than a multiple of {group}"
            )
        picture = super().latents(count, size, 1)
        return (count, (frames - 1) // group + 1, *picture[1:])


PIPELINES: dict[str, type[Pipeline]] = {
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "SanaPipeline": Sana,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
}


def load(
    folder: str | Path, *, student: str | Path = "", dtype: str = "float32"
) -> Pipeline:
    """The pipeline in `folder`.

    Args:
        folder: A pipeline as diffusers stores it.
        student: An exported folder, loaded in place of the denoiser; one student serves all times.
        dtype: Of all weights.

    Raises:
        Refused: `folder` holds no pipeline, or its class is not supported; a part is missing, or
            `interop.load` refuses it; the student is a network of another kind.
    """
    folder = Path(folder)
    file = folder / "model_index.json"
    index = read_json(file)
    name = index.get("_class_name", "")
    check({"_class_name": name}, file, SCHEDULER_KINDS)
    kind = lookup(PIPELINES, name, f"{file}: class")
    if student:
        _check_student(student, folder / kind.denoisers[0])
    parts = _load_parts(kind, folder, index, student, dtype)
    for part in (*kind.texts, kind.denoisers[0], "vae"):
        if part not in parts:
            raise Refused(f"{file}: {part} is missing")
    made = kind(folder, index, parts, student)
    if all(part in parts for part in kind.denoisers) and len(kind.denoisers) > 1:
        boundary = {"boundary_ratio": index.get("boundary_ratio")}
        check(boundary, file, {"boundary_ratio": real(0, 1)})
    if made._scheduler_file.exists():
        _ = made.scheduler  # reading it checks it
    return made


def _check_student(student: str | Path, denoiser: Path) -> None:
    """Raises Refused if the student's network is of another class than the denoiser."""
    found = type(interop.describe(student))
    expected = type(interop.describe(denoiser))
    if found is not expected:
        raise Refused(
            f"student={student}: is a {found.__name__}, expected the {expected.__name__} of "
            f"{denoiser}"
        )


def _load_parts(
    kind: type[Pipeline],
    folder: Path,
    index: dict[str, Any],
    student: str | Path,
    dtype: str,
) -> dict[str, tuple[Net, Params]]:
    """The networks that model_index.json names. Raises Refused if an entry names no class."""
    first, *others = kind.denoisers
    parts = {}
    for name in (*kind.texts, first, *others, "vae"):
        # [null, null] means that the part is absent
        entry = index.get(name) or [None]
        if not isinstance(entry, list):
            raise Refused(
                f"{folder / 'model_index.json'}: {name} is {quoted(entry)}, expected a library and "
                "a class"
            )
        if entry[0] is None or (student and name in others):
            continue
        place = student if student and name == first else folder / name
        parts[name] = interop.load(place, dtype)
    return parts


def tokenize(
    folder: Path,
    texts: Sequence[str],
    length: int | None,
    *,
    to_longest: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as ids of a stored tokenizer, padded on the right.

    Args:
        folder: The tokenizer's.
        texts: B texts.
        length: T, at which texts are cut; None: they are not cut.
        to_longest: Whether texts are padded to the longest one instead of to `length`.

    Returns:
        Tokens int32 [B T] and a mask bool [B T], false on padding.

    Raises:
        Refused: The folder holds no tokenizer, or one that has no pad token.
    """
    given = _tokenizer(folder)(
        list(texts),
        padding="longest" if to_longest or length is None else "max_length",
        max_length=length,
        truncation=length is not None,
        return_attention_mask=True,
        return_tensors="np",
    )
    return given["input_ids"].astype(np.int32), given["attention_mask"].astype(bool)


@functools.cache
def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, loaded once."""
    found = stored_tokenizer(folder, padding_side="right")
    if found.pad_token_id is None:
        raise Refused(
            f"tokenizer={folder}: has no pad token, expected one for padding"
        )
    return found
