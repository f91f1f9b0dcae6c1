"""Options of single parameters, kept for the whole process: :class:`GlobalOptimManager`.

The place is global because of who uses it: a layer says at its construction that its weight wants 32-bit state
(``StableEmbedding`` does), long before anyone makes an optimizer.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from halfbyte.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.nn import Module


class GlobalOptimManager:
    """Options of single parameters, for every optimizer of the process; see :meth:`get_instance`.

    Options are those of an optimizer's parameter group and of its construction: ``lr``, ``betas``, ``eps``,
    ``weight_decay``, ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and so on. They win over the group's.

    >>> import halfbyte as hb, torch
    >>> embedding, head = torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128)
    >>> manager = hb.optim.GlobalOptimManager.get_instance()
    >>> manager.override_config(embedding.weight, "optim_bits", 32)
    >>> optimizer = hb.optim.AdamW8bit([*embedding.parameters(), *head.parameters()])

    Raises
    ------
    RuntimeError
        If it is called: there is one instance, which :meth:`get_instance` returns.
    """

    _instance: ClassVar[GlobalOptimManager | None] = None

    pid2config: dict[int, dict[str, Any]]
    """Options of the living parameter with that ``id``; they go when it does, before another takes its address."""
    index2config: dict[tuple[int, int], dict[str, Any]]
    """Options of the parameter at (group, position), for a parameter that is replaced when its model is moved."""
    uses_config_override: bool
    optimizer: Any
    version: int
    """Grows with every change, so that optimizers need not compare options at every step."""

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: call GlobalOptimManager.get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """Return the one instance of the process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every option."""
        self.pid2config = {}
        self.index2config = {}
        self._modules: list[tuple[weakref.ref[Module], str, dict[str, Any]]] = []
        self._living: dict[int, weakref.ref[Tensor]] = {}
        self.uses_config_override = False
        self.optimizer = None
        self.version = getattr(self, "version", 0) + 1

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Bind options that are known by now to the positions of `params`.

        Needed only when the parameters that the optimizer will get are other objects than those that options were
        given for, as after ``param.to(device)``; options given for an object apply to it without this.

        Parameters
        ----------
        params
            What the optimizer is going to be made of: parameters, or groups (dicts with ``"params"``).
        """
        groups = list(params)
        if not groups:
            return
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            members = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
            for index, param in enumerate(members):
                config = self.pid2config.get(id(param))
                if config is not None:
                    self.index2config[group_index, index] = config
        self.version += 1

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Give options to one parameter or several.

        Parameters
        ----------
        parameters
            One tensor or an iterable of them.
        key, value
            One option.
        key_value_dict
            Several options; instead of `key` and `value`.

        Raises
        ------
        ArgumentError
            If options come both ways.
        """
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise ArgumentError("key_value_dict: expected None beside key and value, got options both ways")
            key_value_dict = {key: value}
        self.uses_config_override = True
        if key_value_dict is None:
            return
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            config = self.pid2config.get(id(param))
            if config is None:
                self.give(param, dict(key_value_dict))
            else:  # in place: positions share the dict
                config.update(key_value_dict)
        self.version += 1

    def register_module_override(self, module: Module, param_name: str, config: dict[str, Any]) -> None:
        """Give options to ``module.<param_name>``, whatever parameter is there when an optimizer makes its first step.

        Parameters
        ----------
        module, param_name
            Where the parameter will be.
        config
            Its options, as ``{"optim_bits": 32}``.
        """
        self._modules.append((weakref.ref(module), param_name, config))
        self.version += 1

    @property
    def module_weight_config_triple(self) -> list[tuple[Module, str, dict[str, Any]]]:
        """Module, name of its parameter and options, of every living module that has registered some."""
        living = ((module(), name, config) for module, name, config in self._modules)
        return [(module, name, config) for module, name, config in living if module is not None]

    def config_of(self, param: Tensor, group_index: int, index: int) -> dict[str, Any]:
        """Return the options of `param`, which stands at that place; those given for itself win over the place's."""
        return self.index2config.get((group_index, index), {}) | self.pid2config.get(id(param), {})

    def give(self, param: Tensor, config: dict[str, Any]) -> None:
        """Make `config` the options of `param`, for as long as it lives."""
        key = id(param)

        def forget(reference: weakref.ref[Tensor]) -> None:
            if self._living.get(key) is reference:
                del self._living[key]
                self.pid2config.pop(key, None)

        self._living[key] = weakref.ref(param, forget)
        self.pid2config[key] = config
