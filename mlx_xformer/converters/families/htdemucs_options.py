"""The options of HTDemucs that the names and shapes of its tensors show.

Source: demucs/htdemucs.py, hdemucs.py and transformer.py of demucs 4.1.0. What is taken from the shapes is checked
afterwards, since the model that the options make must have every tensor with its shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from ...models.htdemucs import HTDemucsConfig
from ..stored import Tensors

_NORM_STARTS, _TRANSFORMER = HTDemucsConfig.norm_starts, "crosstransformer."


def infer_options(tensors: Tensors) -> dict[str, Any]:
    """The options that the tensors show. KeyError or the like if they are not a whole HTDemucs."""
    shapes = {name: x.shape for name, x in tensors.items()}
    width, _, kernel = shapes["encoder.0.conv.weight"][:3]
    width_time, audio_channels = shapes["tencoder.0.conv.weight"][:2]
    depth, stride = _count(shapes, "encoder."), kernel - 2 * (kernel // 4)
    options = {
        "audio_channels": audio_channels,
        "channels": width,
        "channels_time": None if width_time == width else width_time,
        "depth": depth,
        "kernel_size": kernel,
        "stride": stride,
        "rewrite": "encoder.0.rewrite.weight" in shapes,
        "norm_starts": _find_first_norm(shapes, depth),
        **_infer_dconv(shapes),
        **_infer_transformer(shapes),
    }
    if depth > 1:
        options["growth"] = _divide(shapes["encoder.1.conv.weight"][0], width)
    below = f"encoder.{_count(shapes, 'tencoder.')}.conv.weight"  # the first level that convolves over time
    if below in shapes:
        options["time_stride"] = shapes[below][2] // 2
    if options["rewrite"]:
        for option, side in (("context", "decoder"), ("context_enc", "encoder")):
            options[option] = shapes[f"{side}.0.rewrite.weight"][2] // 2
    if "freq_emb.embedding.weight" in shapes:
        options["nfft"] = 2 * stride * shapes["freq_emb.embedding.weight"][0]
    else:
        options["freq_emb"] = 0
    return options


def count_sources(tensors: Tensors) -> int:
    """The number of sources: the outermost decoder has the channels of all of them."""
    last = _count(tensors, "tdecoder.") - 1
    return tensors[f"tdecoder.{last}.conv_tr.weight"].shape[1] // tensors["tencoder.0.conv.weight"].shape[1]


def list_hidden(options: Mapping[str, Any]) -> list[str]:
    """The options that change the output of a model with these options, and that its tensors do not show."""
    config = HTDemucsConfig.from_dict({"sources": ["any"], "use_train_segment": False, **options})
    hidden = [] if config.freq_emb == 0 else ["freq_emb", "emb_scale"]
    hidden += ["dconv_depth"] if config.dconv_mode else []  # below 0, the layers are not dilated
    hidden += ["norm_groups"] if config.norm_starts < config.depth else []
    if config.t_layers:
        hidden += [] if config.t_emb == "scaled" else ["t_emb", "t_max_period", "t_sin_random_shift"]
        hidden += ["t_norm_in", "t_norm_in_group"] if config.t_norm_in else []
        hidden += [] if config.t_norm_out else ["t_norm_first"]
        hidden += ["t_group_norm", "t_gelu", "t_weight_pos_embed"]
    return [*hidden, "use_train_segment"]


def _infer_dconv(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The residual branches, which have int(channels / dconv_comp) channels."""
    inner = re.compile(r"(encoder|decoder)\.\d+\.dconv\.layers\.0\.0\.weight")
    branches = {name: shape for name, shape in shapes.items() if inner.fullmatch(name)}
    sides = {name.partition(".")[0] for name in branches}
    options: dict[str, Any] = {"dconv_mode": ("encoder" in sides) + 2 * ("decoder" in sides)}
    if branches:
        least = max(width / (hidden + 1) for hidden, width, _ in branches.values())
        most = min(width / hidden for hidden, width, _ in branches.values())
        whole = math.floor(most)
        options["dconv_comp"] = whole if whole > least else (least + most) / 2
        options["dconv_depth"] = _count(shapes, next(iter(branches)).removesuffix("0.0.weight"))
    return options


def _infer_transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    bottom = shapes.get("channel_upsampler.weight", (0,))[0]
    layers = _count(shapes, f"{_TRANSFORMER}layers.")
    if not layers:
        return {"bottom_channels": bottom, "t_layers": 0}
    first = f"{_TRANSFORMER}layers.0."
    hidden, width = shapes[f"{first}linear1.weight"]
    embedding = shapes.get(f"{_TRANSFORMER}position_embeddings.embedding.weight")
    scaled = {} if embedding is None else {"t_emb": "scaled", "t_max_positions": embedding[0]}
    return {
        "bottom_channels": bottom,
        "t_layers": layers,
        "t_hidden_scale": hidden / width,
        "t_norm_in": f"{_TRANSFORMER}norm_in.weight" in shapes,
        "t_norm_out": f"{first}norm_out.weight" in shapes,
        "t_layer_scale": f"{first}gamma_1.scale" in shapes,
        "t_cross_first": any(name.startswith(f"{first}cross_attn.") for name in shapes),
        **scaled,
    }


def _find_first_norm(shapes: Mapping[str, tuple[int, ...]], depth: int) -> int:
    """The first level with norms; without any, the option of released models or the depth."""
    normed = [level for level in range(depth) if f"encoder.{level}.norm1.weight" in shapes]
    return normed[0] if normed else max(_NORM_STARTS, depth)


def _divide(a: int, b: int) -> int | float:
    return a / b if a % b else a // b


def _count(names: Collection[str], start: str) -> int:
    """How many different numbers come after `start`."""
    pattern = re.compile(re.escape(start) + r"(\d+)\.")
    return len({found[1] for name in names if (found := pattern.match(name))})
