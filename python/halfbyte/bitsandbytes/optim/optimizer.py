"""``bitsandbytes.optim.optimizer``: the base classes and the manager."""

from halfbyte.optim import GlobalOptimManager, MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit

from ..utils import sync_gpu

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit", "sync_gpu"]
