"""SNOOPI (arXiv:2412.02687) of Stable Diffusion 1.5 at 512 pixels: one step, from prompts alone,
with NASA-T.

    python -m launch.train --config=configs/recipes/snoopi.py --workdir=DIR \\
        --config.data.path=PROMPTS \\
        --config.roles.teacher.init=SD15/unet --config.roles.decoder.init=SD15/vae
        --config.roles.judge.init=CLIP

Variants: `:pgsb` is PG-SB, the paper's first version, without negative prompts; `:sd21` is NASA-T
of Stable Diffusion 2.1. SD15 is the published model's folder, CLIP ViT-L/14's (which CLIP the paper
takes is uncertain; both embeddings are of one). PROMPTS is a folder of *.arrayrecord
(`data.arrayrecord:GroupedRecords`) with the states of the text encoder, cond/text [77, 768] ([77,
1024] for 2.1), null_cond/text the same of the empty prompt, and for NASA-T negative_cond/text of a
negative one, and text_embed [768], CLIP's embedding of the prompt; there are no images. The paper:
3.3 M prompts of JourneyDB and LAION, 10 k negative prompts, batch 64, 60 k updates (40 k for 2.1),
scale ~ U(.5, 4), alpha ~ U(0, 1), adapters of rank 64 and "scaling 128" (read as alpha) at 1e-3,
the student at 1e-6. HPSv2 of SD 1.5: 27.02 with PG-SB, 27.46 with NASA-T and NASA at inference
(alpha .1), teacher 26.47; of 2.1: 27.35, 27.93 (alpha .2), 27.17. COCO FID of PG-SB: 10.08 and
8.91.
"""

from configs.recipes.swiftbrush import COMMON, PROCESS, SD21, distil
from jaxdistill.core.build import Role
from jaxdistill.core.types import lookup
from jaxdistill.methods.distribution.snoopi import ClippedNasaT, ClippedPGSB
from jaxdistill.models.autoencoders.vae import VAE
from jaxdistill.models.vision.clip import ClipVisionProjected

SD15 = dict(**COMMON, heads=(8, 8, 8, 8), text_dim=768, matrices=False)
RECORD = {
    f"{group}/text": "normal 77 768"
    for group in ("cond", "null_cond", "negative_cond")
} | {"text_embed": "normal 768"}
VARIANTS = {
    "": (ClippedNasaT, SD15, 60_000),
    "pgsb": (ClippedPGSB, SD15, 60_000),
    "sd21": (ClippedNasaT, SD21, 40_000),
}
SD_VAE = dict(
    size=512,
    widths=(128, 256, 512, 512),
    layers=2,
    groups=32,
    scale=0.18215,
    dtype="bfloat16",
    remat="full",
)
CLIP_L = dict(
    size=224,
    patch=14,
    dim=1024,
    mlp=4096,
    heads=16,
    depth=24,
    projection=768,
    dtype="bfloat16",
    remat="full",
)


def get_config(variant=""):
    method, unet, steps = lookup(VARIANTS, variant, "variant")
    return distil(
        method(
            process=PROCESS,
            shape=(64, 64, 4),
            clip_steps=steps,
        ),
        unet,
        128.0,
        steps,
        decoder=Role(model=VAE(**SD_VAE), param_dtype="bfloat16"),
        judge=Role(model=ClipVisionProjected(**CLIP_L), param_dtype="bfloat16"),
    )
