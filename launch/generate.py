"""Prompts to pictures or videos, by a pipeline in diffusers' layout, with a distilled student in
its denoiser's place.

python -m launch.generate --pipeline=DIR --prompt=TEXT [--student=EXPORT] [--steps=4 | \\
    --times=1.0,0.75,0.5,0.25] [--ddim]
    [--guidance=1.0] [--negative=TEXT] [--n=1] [--seed=0] [--size=1024x1024] [--frames=1] [--fps=16]
    [--dtype=bfloat16] [--out=FILE]

Without --times, those of the scheduler's config at --steps, the student's where its folder has one.
Fresh noise between the times, as few-step students want it; with --ddim the predicted noise, as
many-step teachers do. Writes a PNG (pictures side by side), or an MP4 for each video.
"""

from pathlib import Path

from jaxdistill.core.types import Refused
from launch._command import arguments, decimal, main, output, whole

KNOWN = {
    "pipeline": "",
    "prompt": "",
    "student": "",
    "steps": "4",
    "times": "",
    "ddim": False,
    "guidance": "1.0",
    "negative": "",
    "n": "1",
    "seed": "0",
    "size": "1024x1024",
    "frames": "1",
    "fps": "16",
    "dtype": "bfloat16",
    "out": "generated",
}


def generate(argv: list[str]) -> None:
    values, _ = arguments(argv, KNOWN)
    for key in ("pipeline", "prompt"):
        if not values[key]:
            raise Refused(f"--{key} is needed")
    if values["dtype"] not in ("float32", "bfloat16"):
        raise Refused(f"--dtype={values['dtype']}: expected float32 or bfloat16")
    n = whole(values, "n", 1)
    frames = whole(values, "frames", 1)
    steps = whole(values, "steps", 1)
    fps = whole(values, "fps", 1, 1000)
    seed = whole(values, "seed", 0)
    guidance = decimal(values, "guidance", 0.0)
    size = _numbers(values, "size", "x", int)
    given = _numbers(values, "times", ",", float)
    if len(size) != 2 or min(size) < 1:
        raise Refused(f"--size={values['size']}: expected HEIGHTxWIDTH in pixels")
    if values["times"] and not given:
        raise Refused(f"--times={values['times']}: expected numbers like 1.0,0.5")
    out = output(values, "out", ("", ".png", ".mp4"))
    if out is None:
        raise Refused("--out=FILE: expected a name")
    if out.suffix and out.suffix != (wanted := ".mp4" if frames > 1 else ".png"):
        raise Refused(
            f"--out={out}: {'videos' if frames > 1 else 'pictures'} are written as {wanted}"
        )
    if frames > 1:
        _video_library()
    import jax

    from jaxdistill.interop import pipeline
    from jaxdistill.samplers.fewstep import falling

    if not falling(given, 1.0):
        raise Refused(
            f"--times={values['times']}: expected falling times above 0 and up to 1, as in"
            " 1.0,0.75,0.5,0.25"
        )
    made = pipeline.load(values["pipeline"], student=values["student"], dtype=values["dtype"])
    times = given or made.times(steps, size, frames)
    x = made(
        [values["prompt"]] * n,
        times,
        size=size,
        frames=frames,
        renoises=not values["ddim"],
        guidance=guidance,
        negative=values["negative"],
        key=jax.random.key(seed),
    )
    for file in write(out, x, fps):
        print(f"{len(times)} steps at {', '.join(f'{t:.3f}' for t in times)}: {file}")


def write(out: Path, x, fps: int) -> list[Path]:
    """Pictures [B H W 3] side by side in OUT.png, or videos [B F H W 3] each in OUT_<i>.mp4;
    returns the files.
    """
    import numpy as np
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    if x.ndim == 4 or x.shape[1] == 1:
        file = out.with_suffix(".png")
        Image.fromarray(np.concatenate(x.reshape(-1, *x.shape[-3:]), 1)).save(file)
        return [file]
    av = _video_library()
    files = []
    for i, frames in enumerate(x):
        files.append(out.with_name(f"{out.stem}_{i}.mp4" if len(x) > 1 else f"{out.stem}.mp4"))
        with av.open(str(files[-1]), "w") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.height, stream.width, stream.pix_fmt, stream.bit_rate = (
                *frames.shape[1:3],
                "yuv420p",
                8_000_000,
            )
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return files


def _video_library():
    try:
        import av
    except ImportError:
        raise Refused(
            "--frames: writing videos needs PyAV: pip install 'jaxdistill[video]'"
        ) from None
    return av


def _numbers(values: dict, key: str, separator: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in values[key].split(separator) if part)
    except ValueError:
        raise Refused(
            f"--{key}={values[key]}: expected {kind.__name__}s like {KNOWN[key] or '1.0,0.5'}"
        ) from None


if __name__ == "__main__":
    main(generate)
