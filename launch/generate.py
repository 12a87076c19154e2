"""Generates pictures or videos from a prompt, by a pipeline in diffusers' layout and a student.

python -m launch.generate --pipeline=DIR --prompt=TEXT [--student=EXPORT] \\
    [--steps=4 | --times=1.0,0.75,0.5,0.25] [--ddim] [--guidance=1.0] [--negative=TEXT] \\
    [--n=1] [--seed=0] [--size=1024x1024] [--frames=1] [--fps=16] [--dtype=bfloat16] [--out=FILE]

The student, an exported folder, takes the place of the pipeline's denoiser. Without --times, those
of the scheduler's config at --steps are used; a scheduler in the student's folder goes first.
Between the times fresh noise is added, for few-step students; with --ddim the predicted noise, for
many-step teachers. Writes a PNG (pictures side by side), or an MP4 for each video.
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
    kind, suffix = ("videos", ".mp4") if frames > 1 else ("pictures", ".png")
    if out.suffix not in ("", suffix):
        raise Refused(f"--out={out}: {kind} are written as {suffix}")
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
    made = pipeline.load(
        values["pipeline"], student=values["student"], dtype=values["dtype"]
    )
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
    shown = ", ".join(f"{t:.3f}" for t in times)
    for file in write(out, x, fps):
        print(f"{len(times)} steps at {shown}: {file}")


def write(out: Path, x, fps: int) -> list[Path]:
    """Writes pictures or videos.

    Args:
        out: The file's name; its suffix is replaced.
        x: Pictures, uint8 [B H W 3], written side by side in one PNG; or videos, uint8
            [B F H W 3], each in an MP4 (OUT_<i>.mp4 where there are several).
        fps: Frames a second.

    Returns:
        The files.
    """
    import numpy as np
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    if x.ndim == 4 or x.shape[1] == 1:
        file = out.with_suffix(".png")
        pictures = x.reshape(-1, *x.shape[-3:])
        Image.fromarray(np.concatenate(pictures, 1)).save(file)
        return [file]
    files = []
    for i, frames in enumerate(x):
        name = f"{out.stem}_{i}.mp4" if len(x) > 1 else f"{out.stem}.mp4"
        file = out.with_name(name)
        files.append(file)
        _write_video(file, frames, fps)
    return files


def _write_video(file: Path, frames, fps: int) -> None:
    """Writes frames, uint8 [F H W 3], as MP4."""
    av = _video_library()
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height = frames.shape[1]
        stream.width = frames.shape[2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _video_library():
    """PyAV. Raises Refused where it is not installed."""
    try:
        import av
    except ImportError:
        raise Refused(
            "--frames: writing videos needs PyAV: pip install 'jaxdistill[video]'"
        ) from None
    return av


def _numbers(values: dict, key: str, separator: str, kind: type) -> tuple:
    """An argument as numbers of one type. Raises Refused."""
    text = values[key]
    try:
        return tuple(kind(part) for part in text.split(separator) if part)
    except ValueError:
        example = KNOWN[key] or "1.0,0.5"
        raise Refused(
            f"--{key}={text}: expected {kind.__name__}s like {example}"
        ) from None


if __name__ == "__main__":
    main(generate)
