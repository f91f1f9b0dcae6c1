"""The optimizers of the real bitsandbytes, asked from another process: it cannot share one with its stand-in.

``python optim_oracle.py REQUESTS ANSWERS``: both files of ``torch.save``. A request is a dict: ``cls`` and ``kwargs``
of an optimizer, ``params``, a list of lists of gradients, one a step, and a ``state_dict`` to load first or None. Its
answer has the ``params`` and the ``state_dict`` after those steps, or the ``error``. The request ``"signatures"`` is
answered by the constructors' arguments.
"""

import inspect
import sys

import torch


def signatures():
    import bitsandbytes as bnb

    classes = {name: value for name, value in vars(bnb.optim).items() if inspect.isclass(value)}
    return {
        name: [
            (p.name, None if p.default is p.empty else p.default) for p in inspect.signature(cls).parameters.values()
        ]
        for name, cls in classes.items()
        if name != "GlobalOptimManager"
    }


def train(cls, kwargs, params, gradients, state_dict):
    import bitsandbytes as bnb

    params = [torch.nn.Parameter(p.clone()) for p in params]
    try:
        optimizer = getattr(bnb.optim, cls)(params, **kwargs)
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"params": [p.detach() for p in params], "state_dict": optimizer.state_dict()}


def main(requests, answers):
    torch.set_num_threads(1)
    asked = torch.load(requests, weights_only=False)
    torch.save([signatures() if request == "signatures" else train(**request) for request in asked], answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
