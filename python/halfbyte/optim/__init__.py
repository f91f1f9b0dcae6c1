"""8-bit, 32-bit and paged optimizers, with bitsandbytes' constructors, states and state dicts.

>>> import torch, halfbyte as hb
>>> model = torch.nn.Linear(128, 128)
>>> optimizer = hb.optim.AdamW8bit(model.parameters(), lr=1e-3)
>>> model(torch.randn(4, 128)).square().mean().backward()
>>> optimizer.step()
>>> optimizer.state[model.weight]["state1"].dtype
torch.uint8

Every optimizer comes as ``X``, whose `optim_bits` is 8 or 32, as ``X8bit`` and as ``X32bit``; Adam, AdamW, AdEMAMix and
Lion also as ``PagedX``, whose states the driver moves to the host when the GPU runs short. Options beyond those of
bitsandbytes (stochastic rounding, CUDA graphs, clipping in the step, and others) are keyword arguments of all of them:
:class:`Options`.
"""

from halfbyte.optim._options import Options
from halfbyte.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from halfbyte.optim.adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit
from halfbyte.optim.adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from halfbyte.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from halfbyte.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from halfbyte.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from halfbyte.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from halfbyte.optim.manager import GlobalOptimManager
from halfbyte.optim.optimizer import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit
from halfbyte.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from halfbyte.optim.sgd import SGD, SGD8bit, SGD32bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "MockArgs",
    "Optimizer1State",
    "Optimizer2State",
    "Optimizer8bit",
    "Options",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PytorchLARS",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
]
