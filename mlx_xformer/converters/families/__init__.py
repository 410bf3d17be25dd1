"""The converters of each family, in the module that has the family's name in models/."""

from importlib import import_module

from ...models.families import FAMILIES
from ..converter import Converter


def _find_converters() -> tuple[Converter, ...]:
    """CONVERTERS of every family's module.

    Of models.bert it is converters.families.bert, of models.guides.scratch converters.families.guides.scratch.
    """
    modules = []
    for config, _ in FAMILIES.values():
        names = config.__module__.partition(".models.")[2].split(".")
        modules.append(".".join(names[:2] if names[0] == "guides" else names[:1]))
    return tuple(
        converter
        for module in dict.fromkeys(modules)
        for converter in import_module(f".{module}", __package__).CONVERTERS
    )


CONVERTERS = _find_converters()
