"""What the host does on CUDA, case by case, in a process that ``cuda/emulation/driver.cpp`` is the driver of.

usage: LD_LIBRARY_PATH=FOLDER python tests/driver_cases.py FOLDER/libcuda.so.1 CASE
"""

import ctypes
import io
import random
import sys

import torch

from halfbyte import optim

BF16 = torch.bfloat16
LARGE = 1 << 20
WORDS = 12  # of an entry of the table, beside the gradients' addresses; the tenth says what kind it is
TILED, PAGED, GROUP_HAS_TILES = 1 << 8, 1 << 9, 1 << 33
DIRECT, TILES, PAGED_TILES = 0, TILED, TILED | PAGED  # the ways that a parameter may go

driver = ctypes.CDLL(sys.argv[1])
for count in (driver.driver_request, driver.driver_questions, driver.driver_counts, driver.driver_fetches):
    count.restype = ctypes.c_uint64
driver.driver_leave.argtypes = [ctypes.c_size_t]
driver.driver_manage.argtypes = [ctypes.c_uint64, ctypes.c_uint64]


def pass_for_a_gpus() -> None:
    """Have the core take CPU tensors for those of GPU 0."""
    name = b"dlpack_exchange_api"
    get, new = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    driver.driver_exchange.restype, driver.driver_exchange.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    table = driver.driver_exchange(get(torch.Tensor.__dlpack_c_exchange_api__, name))
    pass_for_a_gpus.kept = name  # the capsule keeps its address
    torch.Tensor.__dlpack_c_exchange_api__ = new(table, name, None)
    empty = torch.empty
    torch.empty = lambda *size, device=None, **options: empty(*size, **options)


def parameters(*sizes: int, dtype: torch.dtype = BF16) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def table(count: int) -> list[int]:
    """What has been sent of the last group that was stepped."""
    assert driver.driver_request(1) & 0xFFFFFFFF == count
    return list((ctypes.c_uint64 * (count * 14 + 1)).from_address(driver.driver_request(0)))


def ways(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[int]:
    """Step, and tell which way each parameter goes."""
    optimizer.step()
    count = len(params)
    words = table(count)
    found = [words[count + i * WORDS + 9] & (TILED | PAGED) for i in range(count)]
    if any(found):
        assert driver.driver_request(1) & GROUP_HAS_TILES
    return found


def manage(tensor: torch.Tensor) -> None:
    """Have the driver call the tensor's memory managed, and none other."""
    begin = tensor.data_ptr()
    driver.driver_manage(begin, begin + tensor.numel() * tensor.element_size())


def tiles() -> None:
    """Tiles are for large 16-bit parameters that can be copied in bulk, all of it."""
    params = parameters(LARGE, 5000, LARGE - 256, LARGE + 100)
    optimizer = optim.AdamW8bit(params, min_8bit_size=1)
    assert ways(params, optimizer) == [TILES, DIRECT, DIRECT, TILES]
    params[0].grad = torch.zeros(LARGE + 1, dtype=BF16)[1:]
    assert ways(params, optimizer) == [DIRECT, DIRECT, DIRECT, TILES]
    params[0].grad = torch.zeros(LARGE, dtype=BF16)
    assert ways(params, optimizer) == [TILES, DIRECT, DIRECT, TILES]
    params[3].grad = None
    assert ways(params, optimizer)[:3] == [TILES, DIRECT, DIRECT]
    wide = parameters(LARGE, dtype=torch.float32)
    assert ways(wide, optim.AdamW8bit(wide)) == [DIRECT]


def managed() -> None:
    """Memory that the driver may move is not copied in bulk; states and scales there are copied by lanes."""
    params = parameters(LARGE, LARGE)
    optimizer = optim.AdamW8bit(params)
    assert ways(params, optimizer) == [TILES, TILES]
    grad = params[0].grad
    manage(moved := torch.zeros_like(grad))
    params[0].grad = moved
    assert ways(params, optimizer) == [DIRECT, TILES]
    params[0].grad = grad
    assert ways(params, optimizer) == [TILES, TILES]
    for key in ("state1", "state2", "absmax1", "absmax2"):
        state = optimizer.state[params[1]]
        state[key] = state[key].clone()
        manage(state[key])
        assert ways(params, optimizer) == [TILES, PAGED_TILES], key
    params[1].grad = torch.zeros(LARGE + 1, dtype=BF16)[1:]
    assert ways(params, optimizer) == [TILES, DIRECT]
    params[1].grad = grad
    assert ways(params, optimizer) == [TILES, PAGED_TILES]
    state["state1"] = state["state1"].clone()  # everything is looked at again
    driver.driver_manage(0, 0)
    assert ways(params, optimizer) == [TILES, TILES]
    manage(params[0])
    fresh = optim.AdamW8bit(params)
    assert ways(params, fresh) == [DIRECT, TILES]


def paged() -> None:
    """Paged states of large parameters are copied by lanes, without asking where they lie; others go as ever."""
    params = parameters(LARGE, 200_000, LARGE)
    optimizer = optim.AdamW8bit(params)
    assert ways(params, optimizer) == [TILES, DIRECT, TILES]
    for param in params:  # as `get_paged` marks its tensors
        state = optimizer.state[param]
        for key in ("state1", "state2"):
            state[key] = state[key].clone()
            state[key].is_paged = True
    before = driver.driver_questions()
    assert ways(params, optimizer) == [PAGED_TILES, DIRECT, PAGED_TILES]
    assert driver.driver_questions() - before == 2 * 2, "parameter and gradient"
    before = driver.driver_questions()
    assert ways(params, optimizer) == [PAGED_TILES, DIRECT, PAGED_TILES]
    assert driver.driver_questions() == before
    manage(params[2].grad)
    fresh = optim.AdamW8bit(params)
    fresh.load_state_dict(optimizer.state_dict())
    for param in params:
        for key in ("state1", "state2"):
            fresh.state[param][key].is_paged = True
    assert ways(params, fresh) == [PAGED_TILES, DIRECT, DIRECT]


def kept() -> None:
    """A table that is brought up to date, whatever has changed, is that of a new plan."""
    rng = random.Random(0)
    params = parameters(300, 5000, LARGE, 70_000, LARGE + 256)
    optimizer = optim.AdamW8bit(params, min_8bit_size=4096)
    for _ in range(40):
        for param in params:
            change = rng.randrange(4)
            if change == 0:
                param.grad = torch.zeros_like(param)
            elif change == 1:
                param.grad = torch.zeros(param.numel() + 1, dtype=BF16)[1:]
            elif change == 2 and optimizer.state[param]:
                state = optimizer.state[param]
                state["state1"] = state["state1"].clone()
        optimizer.step()
        before = table(len(params))
        optimizer._plans = None
        optimizer.step()
        assert table(len(params)) == before


def asked() -> None:
    """Once it is known where states lie, a step with gradients where they were asks nothing; after a resumption too."""
    params = parameters(300, LARGE, 5000, LARGE)
    optimizer = optim.AdamW8bit(params)
    file = io.BytesIO()
    for resumed in (False, True):
        if resumed:
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = optim.AdamW8bit(params)
            optimizer.load_state_dict(torch.load(file))
        before = driver.driver_questions()
        optimizer.step()
        assert driver.driver_questions() - before == 2 * (1 + 5), "parameter, states and scales, gradient"
        for _ in range(3):
            before = driver.driver_questions()
            optimizer.step()
            assert driver.driver_questions() == before


def short() -> None:
    """Where states are paged, the driver says now and then what memory is left; if it is little, they are fetched."""
    params = parameters(200_000, 300_000)
    optimizer = optim.AdamW8bit(params)
    optimizer.step()
    assert driver.driver_counts() == 0, "no state is paged"
    for param in params:
        for key in ("state1", "state2"):
            optimizer.state[param][key] = optimizer.state[param][key].clone()
            optimizer.state[param][key].is_paged = True
    asked = driver.driver_counts()
    for _ in range(16):
        optimizer.step()
    assert (driver.driver_counts() - asked, driver.driver_fetches()) == (1, 0)
    driver.driver_leave(1 << 30)
    for step in range(1, 4):
        optimizer.step()
        assert driver.driver_counts() - asked == 1 + step
        assert driver.driver_fetches() == step * 2 * len(params)
    driver.driver_leave(1 << 36)
    for _ in range(12):
        optimizer.step()
    assert driver.driver_counts() - asked == 1 + 3 + 1
    assert driver.driver_fetches() == 3 * 2 * len(params)


if __name__ == "__main__":
    pass_for_a_gpus()
    {case.__name__: case for case in (tiles, managed, paged, kept, asked, short)}[sys.argv[2]]()
