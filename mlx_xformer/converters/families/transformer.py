"""torch.nn.Transformer, TransformerEncoder, TransformerDecoder and single layers of them, into and out of Transformer.

Source: torch.nn.modules.transformer (PyTorch 2.13). Its state dicts have neither the number of heads nor the place of
the norms nor the activation: these are settings. All biases must be there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...models.transformer import TransformerConfig
from ..converter import Converter
from ..formats import config_keys
from ..rules import Rule
from ..stored import Tensors

_LEAF = "{leaf:weight|bias}"
_SETTINGS = ("num_heads", "norm_first", "activation", "norm_eps", "dropout")


def layer_rules(theirs: str, ours: str, *, cross: bool) -> list[Rule]:
    """A layer whose names begin with `theirs` becomes one of models.transformer whose names begin with `ours`."""
    names = {"self_attn": "self_attn"} | ({"multihead_attn": "cross_attn"} if cross else {})
    table = []
    for name, own in names.items():
        packed = tuple(f"{ours}{own}.{x}_proj.{_LEAF}" for x in "qkv")
        table.append(Rule(f"{theirs}{name}.in_proj_{_LEAF}", packed))
        table.append(Rule(f"{theirs}{name}.out_proj.{_LEAF}", f"{ours}{own}.out_proj.{_LEAF}"))
    norms = {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3"} if cross else {"norm1": "norm1", "norm2": "norm3"}
    table += [Rule(f"{theirs}{name}.{_LEAF}", f"{ours}{own}.{_LEAF}") for name, own in norms.items()]
    linear = "{linear:linear1|linear2}."
    return [*table, Rule(f"{theirs}{linear}{_LEAF}", f"{ours}mlp.{linear}{_LEAF}")]


def stack_rules(theirs: str, ours: str, *, cross: bool) -> list[Rule]:
    """A stack of such layers, and the norm after it."""
    norm = Rule(f"{theirs}norm.{_LEAF}", f"{ours}norm.{_LEAF}")
    return [*layer_rules(f"{theirs}layers.{{i}}.", f"{ours}layers.{{i}}.", cross=cross), norm]


@dataclass(frozen=True, eq=False)
class TorchModule:
    """One of PyTorch's modules.

    Attributes:
        name: Of the converter.
        klass: The module's class.
        sides: The stacks that it has, and how the names of their tensors begin.
        single: Whether each stack is one layer.
    """

    name: str
    klass: str
    sides: dict[str, str]
    single: bool = False

    def detect(self, tensors: Tensors) -> str | None:
        """Why the tensors are this module's, by the packed projections of its first layers; None if they are not."""
        own = {side: f"{prefix}{'' if self.single else 'layers.0.'}" for side, prefix in self.sides.items()}
        marks = {f"{start}self_attn.in_proj_weight" for start in own.values()}
        marks |= {f"{own['decoder']}multihead_attn.in_proj_weight"} if "decoder" in own else set()
        marks |= {f"{start}linear1.weight" for start in own.values()}
        starts = tuple(own.values()) if self.single else tuple(self.sides.values())
        other = {name for name in tensors if not name.startswith(starts) or self._foreign(name)}
        if not marks <= tensors.keys() or other:
            return None
        return f"the tensors have the names of {self.klass}, such as {sorted(marks)[0]}"

    def _foreign(self, name: str) -> bool:
        """Whether a name belongs to another module, such as cross-attention to no encoder."""
        if self.single and name.startswith("layers."):
            return True
        if "decoder" not in self.sides and ".multihead_attn." in f".{name}":
            return True
        return len(self.sides) == 1 and name.startswith(("encoder.", "decoder."))

    def config(self, values: Mapping[str, Any], tensors: Tensors) -> TransformerConfig:
        """The configuration: sizes from the shapes, the rest from the settings."""
        config_keys.check_settings(values, _SETTINGS, [])
        if "num_heads" not in values:
            raise ValueError("num_heads must be set, as the shapes do not tell it (--set num_heads=8)")
        starts = {side: prefix if self.single else f"{prefix}layers." for side, prefix in self.sides.items()}
        first = next(iter(starts.values())) + ("" if self.single else "0.")
        counts = {side: 1 if self.single else _count(tensors, start) for side, start in starts.items()}
        norms = {f"{prefix}norm.weight" in tensors for prefix in self.sides.values()}
        if len(norms) > 1:
            raise ValueError("encoder.norm and decoder.norm must be there both or not at all, got one")
        return TransformerConfig(
            vocab_size=None,
            embed_dim=config_keys.read_size(tensors, f"{first}self_attn.in_proj_weight", 1),
            hidden_dim=config_keys.read_size(tensors, f"{first}linear1.weight", 0),
            num_encoder_layers=counts.get("encoder", 0),
            num_decoder_layers=counts.get("decoder", 0),
            final_norm=norms == {True} and not self.single,
            **{"dropout": 0.1, **values},
        )

    def rules(self, config: TransformerConfig, names: Collection[str] = ()) -> list[Rule]:
        """The table from PyTorch's names."""
        table = []
        for side, prefix in self.sides.items():
            cross = side == "decoder"
            if self.single:
                table += layer_rules(prefix, f"{side}.layers.0.", cross=cross)
            else:
                table += stack_rules(prefix, f"{side}.", cross=cross)
        return table

    def original(self, config: TransformerConfig) -> dict[str, Any]:
        """The settings that mean the configuration."""
        return {name: getattr(config, name) for name in _SETTINGS}


def _count(tensors: Tensors, start: str) -> int:
    """How many layers have names that begin so."""
    found = {name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)}
    return len(found)


MODULES = (
    TorchModule("torch_transformer", "torch.nn.Transformer", {"encoder": "encoder.", "decoder": "decoder."}),
    TorchModule("torch_encoder", "torch.nn.TransformerEncoder", {"encoder": ""}),
    TorchModule("torch_decoder", "torch.nn.TransformerDecoder", {"decoder": ""}),
    TorchModule("torch_encoder_layer", "torch.nn.TransformerEncoderLayer", {"encoder": ""}, single=True),
    TorchModule("torch_decoder_layer", "torch.nn.TransformerDecoderLayer", {"decoder": ""}, single=True),
)

CONVERTERS = tuple(Converter(m.name, "transformer", m.config, m.rules, m.original, detect=m.detect) for m in MODULES)
