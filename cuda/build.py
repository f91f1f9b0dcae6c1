"""Rebuild the PTX images from cuda/src with NVRTC from the package index; no CUDA toolkit is needed.

usage: python cuda/build.py            compile, write cuda/ptx/*.ptx, manifest.toml and images.rs
       python cuda/build.py --check    compile and assemble, write nothing, fail on any difference

Every image is compiled from the repository's root with relative names, so that the text is the same on every machine.
Its ``.version`` line is lowered to the oldest PTX that has all its instructions; an assembler of that level (ptxas
12.0) proves it. One of CUDA 13 assembles it for every GPU generation that it is to serve and counts registers and
spills, which may not grow beyond what the manifest says. The compilers go into ``.build/cuda`` at first use.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".build" / "cuda"
PTX = Path("cuda/ptx")

# Compilers by folder: the wheels that are unpacked into it.
WHEELS = {
    "nvrtc": ["nvidia-cuda-nvrtc-cu12==12.4.127"],
    "ptxas-12.0": ["nvidia-cuda-nvcc-cu12==12.0.140"],
    "ptxas-13.0": ["nvidia-cuda-nvcc==13.0.88"],
}
NVRTC = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
PTXAS = {"ptxas-12.0": "nvidia/cuda_nvcc/bin/ptxas", "ptxas-13.0": "nvidia/cu13/bin/ptxas"}

# The oldest driver branch that loads a PTX version.
DRIVERS = {"7.8": 520, "8.0": 525}


@dataclass(frozen=True)
class Family:
    """A source and the virtual architectures that it is compiled for; `90a` is for what runs on that one alone."""

    name: str
    source: str
    capabilities: tuple[str, ...]
    defines: dict[str, str] = field(default_factory=dict)
    ptx_version: str = "8.0"


FAMILIES = [
    Family("four_bit", "four_bit.cu", ("75", "80")),
    Family("four_bit_search", "four_bit_search.cu", ("75", "80")),
    Family("four_bit_simt", "four_bit_simt.cu", ("75", "80")),
    Family("eight_bit", "eight_bit.cu", ("75", "80")),
    Family("gate", "gate.cu", ("75", "90")),
]
ELEMENTS = {"bf16": "Bf16", "f16": "F16"}
FAMILIES += [
    Family(f"four_bit_mma_{name}_m{tokens}", "four_bit_mma.cu", targets, {"ELEMENT": element, "TOKENS": str(tokens)})
    for name, element in ELEMENTS.items()
    for tokens, targets in ((8, ("80",)), (16, ("80", "90")))
]
FAMILIES += [
    Family(
        f"four_bit_stream_{'nested_' * nested}{name}_m{tokens}",
        "four_bit_stream.cu",
        (arch,),
        {"ELEMENT": element, "NESTED": str(int(nested)), "TOKENS": str(tokens)},
    )
    for name, element in ELEMENTS.items()
    for nested in (False, True)
    for tokens, arch in ((8, "90"), (16, "90a"))
]
FAMILIES += [
    Family(
        f"four_bit_wgmma_{name}_m{tokens}", "four_bit_wgmma.cu", ("90a",), {"ELEMENT": element, "TOKENS": str(tokens)}
    )
    for name, element in ELEMENTS.items()
    for tokens in (32, 64)
]
FAMILIES += [
    Family(
        f"four_bit_large_{name}_{tokens}", "four_bit_large.cu", ("90a",), {"ELEMENT": element, "TOKENS": str(tokens)}
    )
    for name, element in ELEMENTS.items()
    for tokens in (128, 256)
]

FAMILIES += [Family("four_bit_experts", "four_bit_experts.cu", ("75", "80"))]
FAMILIES += [
    Family(
        f"four_bit_experts_{name}_{form}_{rows}",
        "four_bit_experts_mma.cu",
        ("80",),
        {"ELEMENT": element, "NESTED": str(nested), "CHUNK": chunk},
    )
    for name, element in ELEMENTS.items()
    for nested, form in enumerate(("plain", "nested"))
    for rows, chunk in (("few", "8"), ("many", "32"))
]

OUTPUTS = {**ELEMENTS, "f32": "F32", "i32": "I32"}
FAMILIES += [Family("int8_rows", "int8_rows.cu", ("75", "90")), Family("int8", "int8.cu", ("75", "80"))]
FAMILIES += [
    Family(f"int8_mma_{name}", "int8_mma.cu", ("75", "80"), {"ELEMENT": element}) for name, element in OUTPUTS.items()
]
# Tokens of a tile. What is not for speed does with fewer sizes.
INT8_TOKENS = {"bf16": (16, 32, 64, 128, 256), "f16": (16, 32, 64, 128, 256), "f32": (32, 128), "i32": (32, 128, 256)}
FAMILIES += [
    Family(f"int8_wgmma_{name}_{tokens}", "int8_wgmma.cu", ("90a",), {"ELEMENT": element, "TOKENS": str(tokens)})
    for name, element in OUTPUTS.items()
    for tokens in INT8_TOKENS[name]
]
FAMILIES += [
    Family(f"int8_stream_{name}", "int8_stream.cu", ("90",), {"ELEMENT": element})
    for name, element in OUTPUTS.items()
    if name != "i32"
]

RULES = {
    "adam": {"RULE": "Adam", "LIMITED": "1"},
    "ademamix": {"RULE": "AdEMAMix", "WITHOUT_EXTRAS": "1"},  # more text than an image should have
    "lion": {"RULE": "Lion"},
    "momentum": {"RULE": "Momentum", "LIMITED": "1"},
    "rmsprop": {"RULE": "RmsProp"},
    "adagrad": {"RULE": "Adagrad"},
}
FAMILIES += [Family("optim_group", "optim_group.cu", ("75", "80"))]
FAMILIES += [
    Family(f"optim_{name}", "optim.cu", ("75", "90"), {"ENTRY": name, **defines}) for name, defines in RULES.items()
]
EXTRAS = {"ENTRY": "ademamix", "RULE": "AdEMAMix", "ONLY_EXTRAS": "1"}
FAMILIES += [Family("optim_ademamix_extras", "optim.cu", ("75", "90"), EXTRAS)]

# GPUs that the image of a virtual architecture is assembled for: its own and those that would run it.
SERVES = {
    "75": ("75",),
    "80": ("80", "86", "89", "90", "100", "120"),
    "90": ("90", "100", "120"),
    "90a": ("90a",),
}


def install(tool: str) -> Path:
    """Unpack a compiler's wheels, once; the folder's name holds their versions."""
    wheels = WHEELS[tool]
    folder = TOOLS / "_".join(wheel.replace("==", "-") for wheel in wheels)
    if not folder.exists():
        staging = folder.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(staging), *wheels]
        subprocess.run(command, check=True)
        staging.rename(folder)
    return folder


class Nvrtc:
    """The few NVRTC calls that make PTX of a source."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(install("nvrtc") / NVRTC))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> int:
        return int(getattr(self.library, name)(*arguments))

    def compile(self, family: Family, capability: str) -> str:
        """PTX text of a family for compute_<capability>, its version lowered."""
        source = Path("cuda/src") / family.source
        program = ctypes.c_void_p()
        text = (ROOT / source).read_bytes()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, str(source).encode(), 0, None, None)
        options = [f"--gpu-architecture=compute_{capability}", "--std=c++17", "-default-device"]
        options += [f"-I{ROOT / 'cuda' / 'include'}", *(f"-D{key}={value}" for key, value in family.defines.items())]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = self._call("nvrtcCompileProgram", program, len(options), array)
        log = self._text(program, "Log")
        if status != 0 or "warning" in log:
            message = self.library.nvrtcGetErrorString(status).decode()
            raise SystemExit(f"{source} for compute_{capability}: {message}\n{log}")
        ptx = self._text(program, "PTX").rstrip("\0")
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        if str(ROOT) in ptx:
            raise SystemExit(f"{source}: a path of this machine got into the PTX")
        # A comment that counts the calls of everything that this process has compiled, in whatever order.
        ptx = re.sub(r" // callseq \d+(, \d+)?", "", ptx)
        # A hint of PTX 8.3 for tools that look for reads of memory that nobody wrote.
        ptx = re.sub(r'\t\.pragma "used_bytes_mask \d+";\n', "", ptx)
        return re.sub(r"(?m)^\.version .*$", f".version {family.ptx_version}", ptx, count=1)

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        prefix = "nvrtcGetProgramLog" if what == "Log" else "nvrtcGetPTX"
        self._call(prefix + "Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(prefix, program, buffer)
        return buffer.value.decode()


def sources(path: Path, seen: set[Path]) -> set[Path]:
    """A source and every header of ours that it includes, relative to the root."""
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'#include "([^"]+)"', (ROOT / path).read_text(encoding="utf-8")):
            sources(Path("cuda/include") / name, seen)
    return seen


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def entries(ptx: str) -> dict[str, int]:
    """Kernels of an image and their number of parameters."""
    found = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", ptx, flags=re.DOTALL)
    return {name: parameters.count(".param") for name, parameters in found}


def assemble(tool: str, ptx: str, sm: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spill stores of every kernel, as ptxas -v says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "image.ptx"
        source.write_text(ptx, encoding="utf-8")
        binary = install(tool) / PTXAS[tool]
        binary.chmod(0o755)
        command = [str(binary), "-v", f"-arch=sm_{sm}", "-o", f"{folder}/image.cubin", str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{tool} for sm_{sm}: {result.stdout}{result.stderr}")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {name: (int(used), int(spill)) for name, spill, used in re.findall(pattern, result.stderr, flags=re.DOTALL)}


def make(nvrtc: Nvrtc, family: Family, capability: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """One image: its PTX, and the most registers and spills of its kernels over the GPUs that it serves."""
    ptx = nvrtc.compile(family, capability)
    most: dict[str, tuple[int, int]] = {}
    for sm in SERVES[capability]:
        if int(sm.rstrip("a")) <= 90:
            assemble("ptxas-12.0", ptx, sm)
        for kernel, (used, spill) in assemble("ptxas-13.0", ptx, sm).items():
            before = most.get(kernel, (0, 0))
            most[kernel] = (max(used, before[0]), max(spill, before[1]))
    return ptx, most


def build() -> tuple[dict[str, str], dict[str, dict[str, tuple[int, int]]]]:
    """All generated files by name, and for each image the most registers and spills of its kernels over its GPUs."""
    nvrtc = Nvrtc()
    for tool in PTXAS:
        install(tool)
    files: dict[str, str] = {}
    resources: dict[str, dict[str, tuple[int, int]]] = {}
    manifest = [
        "# Written by cuda/build.py. Hashes are SHA-256; a kernel has [parameters, most registers, most spilled bytes]."
    ]
    manifest += [f'compiler = "{WHEELS["nvrtc"][0]}"', 'flags = "--std=c++17 -default-device"']
    images = []
    jobs = [(family, capability) for family in FAMILIES for capability in family.capabilities]
    # The compiler works outside of Python's lock, the assemblers in processes of their own.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda job: make(nvrtc, *job), jobs))
    for (family, capability), (ptx, most) in zip(jobs, made, strict=True):
        name = f"{family.name}.compute_{capability}.ptx"
        number, specific = int(capability.rstrip("a")), capability.endswith("a")
        files[name] = ptx
        resources[name] = most
        manifest += ["", "[[image]]", f'file = "{name}"', f'family = "{family.name}"', f"capability = {number}"]
        manifest += [f"specific = {'true' if specific else 'false'}"]
        manifest += [f'ptx_version = "{family.ptx_version}"', f"oldest_driver = {DRIVERS[family.ptx_version]}"]
        manifest += [f'sha256 = "{digest(ptx.encode())}"', "[image.sources]"]
        for path in sorted(sources(Path("cuda/src") / family.source, set())):
            manifest.append(f'"{path}" = "{digest((ROOT / path).read_bytes())}"')
        manifest.append("[image.kernels]")
        for kernel, parameters in sorted(entries(ptx).items()):
            manifest.append(f"{kernel} = [{parameters}, {most[kernel][0]}, {most[kernel][1]}]")
        images.append(
            "    Image {\n"
            f'        family: "{family.name}",\n'
            f"        capability: {number},\n"
            f"        specific: {'true' if specific else 'false'},\n"
            f'        ptx_version: "{family.ptx_version}",\n'
            f'        ptx: concat!(include_str!("{name}"), "\\0"),\n'
            "    },\n"
        )
    files["manifest.toml"] = "\n".join(manifest) + "\n"
    files["images.rs"] = (
        "// Written by cuda/build.py: every image under cuda/ptx.\n\n"
        "/// All images, families together, oldest architecture first.\n"
        "pub static IMAGES: &[Image] = &[\n" + "".join(images) + "];\n"
    )
    return files, resources


def committed_resources() -> dict[str, dict[str, list[int]]]:
    """What the manifest in the tree says of registers and spills."""
    path = ROOT / PTX / "manifest.toml"
    if not path.exists():
        return {}
    return {image["file"]: image["kernels"] for image in tomllib.loads(path.read_text(encoding="utf-8"))["image"]}


def main() -> None:
    """Build or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tree differs")
    arguments = parser.parse_args()
    before = committed_resources()
    files, resources = build()
    for image, kernels in resources.items():
        for kernel, (used, spill) in kernels.items():
            was = before.get(image, {}).get(kernel, [0, used, spill])[1:]
            note = "" if was == [used, spill] else f"  was {was}"
            print(f"{image:42} {kernel:36} {used:4} registers {spill:5} spilled{note}")
    folder = ROOT / PTX
    if arguments.check:
        committed = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
        stale = [name for name, text in files.items() if committed.get(name) != text]
        extra = sorted(set(committed) - set(files))
        if stale or extra:
            raise SystemExit(f"out of date: {stale}; not built from any source: {extra}. Run python cuda/build.py")
        print(f"{len(files)} files are as built, {sum(len(t) for t in files.values()) // 1024} KiB")
        return
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(files)} files, {sum(len(t) for t in files.values()) // 1024} KiB")


if __name__ == "__main__":
    main()
