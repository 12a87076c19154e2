"""What the keys of a model's config.json may hold: one check for all families, before anything is
computed from the values.

Types are taken literally: 64.0 and "64" are no whole numbers, true is no number. The bounds are far
beyond every published model, and low enough that an absurd size allocates nothing and starts no
long loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused, quoted


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value may be."""

    words: str  # for messages
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    """A whole number, both bounds included."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda v: type(v) is int and low <= v <= high,
    )


def real(low: float, high: float) -> Kind:
    """A number, both bounds included; infinities and NaN lie outside of all bounds."""
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda v: type(v) in (int, float) and low <= v <= high,
    )


def above(low: float, high: float) -> Kind:
    """As `real`, without the lower bound itself."""
    return Kind(
        f"a number above {low:g}, to {high:g}",
        lambda v: type(v) in (int, float) and low < v <= high,
    )


def either(*kinds: Kind) -> Kind:
    """A value of any of the kinds."""
    return Kind(
        " or ".join(kind.words for kind in kinds),
        lambda v: any(kind.holds(v) for kind in kinds),
    )


def several(kind: Kind, least: int = 0, most: int = 16) -> Kind:
    """A list of `least` to `most` values, mostly one for each level of resolution."""
    count = f"{least}" if least == most else f"{least} to {most}"

    def holds(value: Any) -> bool:
        if not isinstance(value, list) or not least <= len(value) <= most:
            return False
        return all(kind.holds(element) for element in value)

    return Kind(f"a list of {count}, each {kind.words}", holds)


def maybe(kind: Kind) -> Kind:
    """A value of the kind, or null."""
    return either(kind, Kind("null", lambda v: v is None))


FLAG = Kind("true or false", lambda v: type(v) is bool)
WORD = Kind("text", lambda v: isinstance(v, str))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
WIDTH = whole(1, 2**20)  # channels, or hidden units
DEPTH = whole(1, 1000)  # layers that are stacked
BLOCKS = whole(1, 64)  # layers of a level of resolution, each a module of its own
COUNT = whole(1, 2**24)  # words or classes
LENGTH = whole(1, 2**31 - 1)  # tokens
SIDE = whole(1, 2**14)  # pixels or latents
PATCH = whole(1, 1024)
TOKEN = whole(-1, 2**31 - 1)  # an id; -1: none, in old files
EPS = real(0, 1)

# Null stands for a missing key, which is refused where it is read (interop/keys.py)
KINDS: dict[str, Kind] = {
    # transformers: language models
    "vocab_size": COUNT,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": maybe(WIDTH),
    "num_key_value_heads": maybe(WIDTH),
    "head_dim": maybe(WIDTH),
    "max_position_embeddings": LENGTH,
    "type_vocab_size": WIDTH,
    "rms_norm_eps": EPS,
    "layer_norm_eps": EPS,
    "layer_norm_epsilon": EPS,
    "hidden_act": WORD,
    "hidden_activation": WORD,
    "tie_word_embeddings": FLAG,
    "bos_token_id": maybe(TOKEN),
    "eos_token_id": maybe(either(TOKEN, several(TOKEN, 0, 64))),
    "pad_token_id": maybe(TOKEN),
    "decoder_start_token_id": maybe(TOKEN),
    "id2label": OBJECT,
    "use_parallel_residual": FLAG,
    "sliding_window": maybe(LENGTH),
    "query_pre_attn_scalar": above(0, 1e9),
    "layer_types": maybe(several(WORD, 0, 1000)),
    "attn_logit_softcapping": maybe(above(0, 1e9)),
    "final_logit_softcapping": maybe(above(0, 1e9)),
    "rope_theta": above(0, 1e15),
    "rotary_emb_base": above(0, 1e15),
    "rotary_pct": above(0, 1),
    "partial_rotary_factor": above(0, 1),
    "rope_scaling": maybe(OBJECT),
    "rope_parameters": maybe(OBJECT),
    "factor": above(0, 1e9),
    "low_freq_factor": above(0, 1e9),
    "high_freq_factor": above(0, 1e9),
    "original_max_position_embeddings": LENGTH,
    "text_config": maybe(OBJECT),
    "vision_config": maybe(OBJECT),
    # T5
    "d_model": WIDTH,
    "d_ff": WIDTH,
    "d_kv": WIDTH,
    "num_heads": WIDTH,
    "num_decoder_layers": maybe(DEPTH),
    "relative_attention_num_buckets": WIDTH,
    "relative_attention_max_distance": LENGTH,
    "feed_forward_proj": WORD,
    "scale_decoder_outputs": FLAG,
    # CLIP, ViT, SAM
    "image_size": SIDE,
    "num_channels": WIDTH,
    "projection_dim": WIDTH,
    "qkv_bias": FLAG,
    "pooler_output_size": maybe(WIDTH),
    "mlp_dim": maybe(WIDTH),
    "mlp_ratio": above(0, 1000),
    "window_size": whole(0, 2**14),
    "global_attn_indexes": several(whole(0, 999), 0, 1000),
    "output_channels": WIDTH,
    # diffusers: denoisers
    "attention_head_dim": WIDTH,
    "in_channels": WIDTH,
    "out_channels": maybe(WIDTH),
    "sample_size": maybe(SIDE),
    "num_embeds_ada_norm": maybe(COUNT),
    "num_cross_attention_heads": WIDTH,
    "cross_attention_head_dim": WIDTH,
    "caption_channels": WIDTH,
    "norm_eps": EPS,
    "qk_norm": maybe(WORD),
    "interpolation_scale": maybe(above(0, 1e6)),
    "guidance_embeds": FLAG,
    "guidance_embeds_scale": real(0, 1e6),
    "timestep_scale": above(0, 1e6),
    "axes_dims_rope": several(WIDTH, 1),
    "joint_attention_dim": WIDTH,
    "zero_cond_t": FLAG,
    "ffn_dim": WIDTH,
    "text_dim": WIDTH,
    "freq_dim": WIDTH,
    "eps": EPS,
    "image_dim": maybe(WIDTH),
    "added_kv_proj_dim": maybe(WIDTH),
    "pos_embed_seq_len": maybe(LENGTH),
    "patch_size": maybe(PATCH),
    "num_layers": DEPTH,
    "block_out_channels": several(WIDTH, 1),
    "down_block_types": several(WORD, 1),
    "up_block_types": several(WORD, 1),
    "layers_per_block": BLOCKS,
    "transformer_layers_per_block": either(BLOCKS, several(BLOCKS, 1)),
    "projection_class_embeddings_input_dim": maybe(WIDTH),
    "addition_time_embed_dim": maybe(WIDTH),
    "time_cond_proj_dim": maybe(WIDTH),
    "norm_num_groups": WIDTH,
    "use_linear_projection": FLAG,
    "mid_block_type": maybe(WORD),
    "addition_embed_type": maybe(WORD),
    # diffusers: autoencoders
    "latent_channels": WIDTH,
    "mid_block_add_attention": FLAG,
    "use_quant_conv": FLAG,
    "use_post_quant_conv": FLAG,
    "scaling_factor": above(0, 1e6),
    "shift_factor": maybe(real(-1e6, 1e6)),
    "z_dim": WIDTH,
    "base_dim": WIDTH,
    "decoder_base_dim": maybe(WIDTH),
    "dim_mult": several(WIDTH, 1),
    "num_res_blocks": BLOCKS,
    "temperal_downsample": several(FLAG),
    "input_channels": WIDTH,
    "latents_mean": maybe(several(real(-1e6, 1e6), 1, 2**12)),
    "latents_std": maybe(several(above(0, 1e6), 1, 2**12)),
    "encoder_block_out_channels": several(WIDTH, 1),
    "decoder_block_out_channels": several(WIDTH, 1),
    "encoder_layers_per_block": several(whole(0, 64), 1),
    "decoder_layers_per_block": several(whole(0, 64), 1),
    "encoder_block_types": either(WORD, several(WORD, 1)),
    "decoder_block_types": either(WORD, several(WORD, 1)),
    "encoder_qkv_multiscales": several(several(whole(1, 63)), 1),
    "decoder_qkv_multiscales": several(several(whole(1, 63)), 1),
    "decoder_norm_types": either(WORD, several(WORD, 1)),
    "decoder_act_fns": either(WORD, several(WORD, 1)),
    "downsample_block_type": WORD,
    "upsample_block_type": WORD,
    "encoder_out_shortcut": FLAG,
    "decoder_in_shortcut": FLAG,
    "decoder_conv_act_fn": WORD,
    # EDM, LPIPS
    "img_resolution": SIDE,
    "label_dim": whole(0, 2**24),
    "augment_dim": whole(0, 2**20),
    "model_channels": WIDTH,
    "channel_mult": several(WIDTH, 1),
    "channel_mult_emb": WIDTH,
    "channel_mult_noise": WIDTH,
    "num_blocks": BLOCKS,
    "attn_resolutions": several(SIDE),
    "channels_per_head": WIDTH,
    "resample_filter": several(above(0, 1e6), 2),
    "encoder_type": WORD,
    "embedding_type": WORD,
    "widths": several(WIDTH, 1),
    "layers": several(BLOCKS, 1),
}


def check(
    config: Mapping[str, Any],
    file: Path,
    own: Mapping[str, Kind] = {},
    prefix: str = "",
) -> None:
    """Raises Refused, naming file, key and value, where a key holds something else than its kind.

    Args:
        config: The content of `file`, or an object inside it.
        file: For messages.
        own: Kinds of keys that hold something else in this family than elsewhere.
        prefix: What stands before the keys in messages, those of the objects around `config`.
    """
    for key, value in config.items():
        kind = own.get(key) or KINDS.get(key)
        if kind is None:
            continue
        if not kind.holds(value):
            raise Refused(
                f"{file}: {prefix}{key}={quoted(value)} is not supported, expected {kind.words}"
            )
        if isinstance(value, dict) and kind is not OBJECT:
            check(value, file, own, f"{prefix}{key}.")


TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_fields(config: Any, file: Path) -> None:
    """Raises Refused where a field of our dataclass of sizes has another type than it declares."""
    for field in dataclasses.fields(config):
        expected = TYPES.get(field.type, ())
        if str(field.type).startswith("tuple"):
            expected = (tuple,)
        value = getattr(config, field.name)
        if expected and type(value) not in expected:
            raise Refused(
                f"{file}: {type(config).__name__}.{field.name}={quoted(value)}: expected "
                f"{field.type}"
            )
