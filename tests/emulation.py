"""Kernels on a CPU: builds programs of cuda/emulation around unchanged kernels, and runs them."""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "cuda"
EMULATION = CUDA / "emulation"
BUILT = ROOT / ".build" / "emulation"

COMPILER = os.environ.get("CXX", "g++")
STANDARD = "-std=c++20"

STATIC = re.compile(r"(?<!extern )__shared__ (?:__align__\((\d+)\) )?(\w+) (\w+)(?:\[(.+)\])?;")
DYNAMIC = re.compile(r" *extern __shared__ (?:__align__\((\d+)\) )?u8 dynamic\[\];.*\n")


@cache
def why_not() -> str | None:
    """What keeps programs from being built here: no compiler, or one without C++ 20 or 16-bit floats."""
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    command = [COMPILER, STANDARD, "-fsyntax-only", "-x", "c++", "-"]
    program = "#include <ucontext.h>\n#include <vector>\n_Float16 h; void f(std::vector<int> v) { std::erase(v, 1); }"
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    return f"{COMPILER} is too old" if done.returncode else None


def for_the_machine(source: str) -> str:
    """A kernel's source with its shared memory asked of the machine: no array of C++ is one a block."""
    index = iter(range(1000))

    def static(match):
        alignment, kind, name, count = match.groups()
        size = f"u32(({count or 1}) * sizeof({kind}))"
        array = f"static_cast<{kind}*>(machine::static_array({next(index)}, {size}, {alignment or f'alignof({kind})'}))"
        return f"{kind}* const {name} = {array};" if count else f"{kind}& {name} = *{array};"

    # Dynamic shared memory begins behind what is static, and so has to be asked for last.
    dynamic = DYNAMIC.search(source)
    if dynamic:
        last = max([dynamic.end(), *(source.index("\n", match.end()) + 1 for match in STATIC.finditer(source))])
        asked = f"    u8* const dynamic = machine::dynamic_array({dynamic[1] or 16});\n"
        source = source[: dynamic.start()] + source[dynamic.end() : last] + asked + source[last:]
    return STATIC.sub(static, source)


def build(source: str, which: str, defines: dict[str, str], changes=(), program: str = "products.cpp") -> Path:
    """`program` for kernel `source` of cuda/src, ``which`` being MMA, STREAM, WGMMA, LARGE or INT8.

    ``changes`` are pairs of what stands in the source, or in a header that it includes, and what is to stand there.
    Programs are kept by what they are made from.
    """
    texts, todo = {}, [source]
    while todo:
        name = todo.pop()
        if name in texts or (EMULATION / "include" / name).exists():
            continue
        text = (CUDA / ("src" if name.endswith(".cu") else "include") / name).read_text(encoding="utf-8")
        texts[name] = text
        todo += re.findall(r'#include "(\w+\.cuh)"', text)
    for old, new in changes:
        (place,) = [name for name, text in texts.items() if text.count(old) == 1]
        texts[place] = texts[place].replace(old, new)
    texts = {name: for_the_machine(text) for name, text in sorted(texts.items())}
    flags = [STANDARD, "-O1", "-w", "-fno-strict-aliasing", f"-D{which}"]
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    own = sorted([*EMULATION.glob("*.*"), *(EMULATION / "include").iterdir()])
    made_from = [program, *flags, *texts.items(), *(path.read_text(encoding="utf-8") for path in own)]
    folder = BUILT / hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    built = folder / "product"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        paths = [f"-I{folder}", f"-I{EMULATION / 'include'}", f"-I{EMULATION}", f'-DKERNEL_SOURCE="{source}"']
        sources = [EMULATION / program, EMULATION / "machine.cpp"]
        building = folder / f"building-{os.getpid()}"
        subprocess.run([COMPILER, *flags, *paths, *sources, "-o", building], check=True)
        building.rename(built)
    return built


def failures(program: Path, launches: list[dict]) -> list[str]:
    """What the program says of those launches that do not come out right."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda launch: run(program, **launch), launches))
    return [said for right, said in done if not right]


def run(program: Path, **settings) -> tuple[bool, str]:
    """Whether a product comes out right, and what the program says."""
    values = {name: ",".join(map(str, v)) if isinstance(v, list) else int(v) for name, v in settings.items()}
    arguments = [f"{name}={value}" for name, value in values.items()]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=500, check=False)
    return done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
