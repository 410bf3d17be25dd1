"""HTDemucs: its layers with the model's own weights, on short random inputs, and the whole model on a short mix.

Axes: B batch, T frames or samples, F frequencies, C channels, E embed_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...models.htdemucs import Bag, HTDemucs, HTDemucsConfig, InferenceMode
from ...reference.models.htdemucs import htdemucs
from ...reference.models.htdemucs.layers import decoder_layer, encoder_layer
from ...reference.models.htdemucs.model import levels
from ...reference.models.htdemucs.transformer import cross_transformer, cross_transformer_layer
from ...reference.nn.layers import linear
from ..samples import Arrays, Case, Form, Options
from .common import layer_case

Shapes = Callable[[int], dict[str, tuple[int, ...]]]  # frames -> shape of each array
_FRAMES = (3, 7)


_SIZES: dict[str, Any] = {"sources": ("drums", "voice", "rest"), "samplerate": 8000, "segment": 1, "channels": 4}
_SIZES |= {"nfft": 256, "depth": 2, "dconv_mode": 3, "dconv_comp": 2, "bottom_channels": 12, "t_heads": 3}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "base": {"t_layers": 3},
    "branches merge": {"depth": 3, "channels": 3, "t_layers": 1, "norm_starts": 1, "norm_groups": 3},
    "post-norm, wide contexts": {
        **{"t_layers": 2, "t_norm_first": False, "t_group_norm": 2, "t_emb": "cape", "t_cross_first": True},
        **{"context": 2, "context_enc": 1, "audio_channels": 1, "bottom_channels": 0, "channels": 6, "t_gelu": False},
    },
}


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    return {name: HTDemucs(HTDemucsConfig(**{**_SIZES, **options})) for name, options in _EXAMPLES.items()}


def cases(model: HTDemucs | Bag) -> dict[str, Case]:
    """A case for every layer, for the whole, and where no branches merge for the waveform's branch alone; those of
    every member of a bag."""
    if isinstance(model, Bag):
        return {
            f"models.{index}.{name}": case
            for index, member in enumerate(model.models)
            for name, case in cases(member).items()
        }
    # Without padding to the segment that it was trained on, the whole model runs on as little as it is given.
    model.config = dataclasses.replace(model.config, use_train_segment=False)
    found: dict[str, Case] = {}
    frequencies = model.config.nfft // 2
    for index, level in enumerate(levels(model.config)):
        inner = 1 if level.merges or not level.freq else frequencies // level.stride
        found |= _level_cases(model, index, (frequencies, inner))
        frequencies = inner
    for name in (n for n in model if n.startswith("channel_")):
        found[name] = _linear(model[name])
    if model.config.t_layers:
        found |= _transformer_cases(model)
    found["model"] = _whole(model)
    if not any(level.merges for level in levels(model.config)):
        found["model, time only"] = _whole(model, time_only=True)
    return found


def _case(module: nn.Module, twin: Form, shapes: Shapes, call: Callable[..., Any] | None = None) -> Case:
    """A layer on inputs of these shapes, for a few frames and for more."""
    return layer_case(module, twin, [shapes(frames) for frames in _FRAMES], call=call)


def _linear(module: nn.Linear) -> Case:
    width = module.weight.shape[1]
    return _case(module, lambda p, x, _: linear(p, **x), lambda T: {"x": (1, T, width)})


def _common(config: Any, index: int, *, decoder: bool) -> dict[str, Any]:
    """What the layers of one level have in common in both branches, as the twin takes it."""
    return {
        "norm_groups": config.norm_groups if index >= config.norm_starts else None,
        "rewrite": config.rewrite,
        "context": config.context if decoder else config.context_enc,
        "dconv_depth": config.dconv_depth if config.dconv_mode & (2 if decoder else 1) else None,
    }


def _level_cases(model: HTDemucs, index: int, sizes: tuple[int, int]) -> dict[str, Case]:
    """The encoders and decoders of one depth; sizes: the frequencies outside and inside it."""
    config, level = model.config, levels(model.config)[index]
    place = config.depth - 1 - index
    plan = {"stride": level.stride, "padding": level.padding}
    cases = {
        f"encoder.{index}": _encoder(config, index, model.encoder[index], plan, sizes[0] if level.freq else None,
                                     inject=level.merges),
        f"decoder.{place}": _decoder(config, index, model.decoder[place], plan, sizes[1] if level.freq else None),
    }  # fmt: skip
    if level.freq:
        plan = {"stride": config.stride, "padding": config.kernel_size // 4}
        place -= config.depth - len(model.tencoder)
        cases[f"tencoder.{index}"] = _encoder(config, index, model.tencoder[index], plan, None, empty=level.merges)
        cases[f"tdecoder.{place}"] = _decoder(config, index, model.tdecoder[place], plan, None, empty=level.merges)
    return cases


def _encoder(
    config: Any,
    index: int,
    module: Any,
    plan: dict[str, int],
    frequencies: int | None,
    *,
    empty: bool = False,
    inject: bool = False,
) -> Case:
    """x (1, T, F, C), or (1, T, C) without frequencies, and what the other branch injects (1, T, O)."""
    O, _, C = module.conv.weight.shape
    options = {**plan, **_common(config, index, decoder=False), "empty": empty}
    lead = () if frequencies is None else (frequencies,)

    def shapes(T: int) -> dict[str, tuple[int, ...]]:
        T = T if lead else T * plan["stride"] + 1
        return {"x": (1, T, *lead, C), **({"inject": (1, T, O)} if inject else {})}

    return _case(module, lambda p, x, _: encoder_layer(p, **x, **options), shapes)


def _decoder(
    config: Any, index: int, module: Any, plan: dict[str, int], frequencies: int | None, *, empty: bool = False
) -> Case:
    """x and the skip, each (1, T, F, C) or (1, T, C), cut to T * stride where time is what is upsampled."""
    C = module.conv_tr.weight.shape[2]
    options = {**plan, **_common(config, index, decoder=True), "last": index == 0, "empty": empty}
    lead = () if frequencies is None else (frequencies,)

    def length(x: Any) -> int:
        return x.shape[1] if lead else x.shape[1] * plan["stride"] - plan["padding"]

    def twin(params: Arrays, arrays: Arrays, _: Options) -> Any:
        return decoder_layer(params, arrays["x"], arrays.get("skip"), length(arrays["x"]), **options)

    def call(module: Any, x: mx.array, skip: mx.array | None = None) -> Any:
        return module(x, skip, length(x))

    names = ("x",) if empty else ("x", "skip")
    return _case(module, twin, lambda T: dict.fromkeys(names, (1, T, *lead, C)), call)


def _transformer_cases(model: HTDemucs) -> dict[str, Case]:
    """Every layer of either branch, then all of them with positions and norms."""
    config, transformer = model.config, model.crosstransformer
    E = config.transformer_channels
    cases = {}
    for branch in ("layers", "layers_t"):
        for index, module in enumerate(transformer[branch]):

            def shapes(T: int, cross: bool = module.cross) -> dict[str, tuple[int, ...]]:
                return {"x": (1, 5 * T, E), **({"other": (1, 4 * T + 1, E)} if cross else {})}

            cases[f"crosstransformer.{branch}.{index}"] = _case(
                module, lambda p, x, _: cross_transformer_layer(p, config, *x.values()), shapes
            )
    cases["crosstransformer"] = _case(
        transformer,
        lambda p, x, _: cross_transformer(p, config, **x),
        lambda T: {"x": (1, T, 4, E), "xt": (1, 4 * T + 1, E)},
    )
    return cases


def _whole(model: HTDemucs, *, time_only: bool = False) -> Case:
    """A mix (1, C, samples) of a few frames."""
    config = model.config

    def shapes(T: int) -> dict[str, tuple[int, ...]]:
        return {"mix": (1, config.audio_channels, T * config.nfft // 4 + 101)}

    mode = InferenceMode.TIME_ONLY if time_only else InferenceMode.FULL
    return _case(
        model,
        lambda p, x, _: htdemucs(p, config, **x, time_only=time_only),
        shapes,
        lambda ready, mix: ready(mix, mode=mode),
    )
