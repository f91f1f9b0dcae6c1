"""Who answers for ``bitsandbytes``: every case in a process of its own, since it is decided once a process."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import halfbyte

PACKAGE_ROOT = Path(halfbyte.__file__).parents[1]
IMPORTABLE = PACKAGE_ROOT / "halfbyte" / "_importable"

PROBES = """
def probes():
    from accelerate.utils import is_4bit_bnb_available, is_bitsandbytes_multi_backend_available, is_bnb_available
    from peft.import_utils import is_bnb_4bit_available
    from peft.import_utils import is_bnb_available as peft_bnb
    from transformers.utils import is_bitsandbytes_available
    answers = {
        "transformers": is_bitsandbytes_available(),
        "accelerate": is_bnb_available(min_version="0.43.2") and is_4bit_bnb_available(),
        "peft": peft_bnb() and is_bnb_4bit_available(),
        "cpu training": is_bitsandbytes_multi_backend_available(),
    }
    return {who: bool(answer) for who, answer in answers.items()}
"""


def run(code, *, path=(), fails=False, cwd=None, **environment):
    """Run `code` in a fresh interpreter; what it assigns to `result` comes back."""
    code = f"import json, sys\n{PROBES}\n{textwrap.dedent(code)}\nprint('RESULT' + json.dumps(result))"
    env = {key: value for key, value in os.environ.items() if not key.startswith("HALFBYTE_")}
    env |= {"PYTHONPATH": os.pathsep.join([*map(str, path), str(PACKAGE_ROOT)])} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, timeout=300)
    if fails:
        assert done.returncode != 0
        return done.stderr
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.fixture
def real(tmp_path):
    """A folder with something installed as bitsandbytes 0.49.9."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("__version__ = '0.49.9'\nREAL = True\n")
    (tmp_path / "bitsandbytes-0.49.9.dist-info").mkdir()
    (tmp_path / "bitsandbytes-0.49.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.49.9\n"
    )
    return tmp_path


ALL = {"transformers": True, "accelerate": True, "peft": True, "cpu training": True}
NONE = dict.fromkeys(ALL, False)


def test_importing_halfbyte_makes_an_absent_bitsandbytes_available_and_loads_nothing():
    result = run("""
        import halfbyte
        heavy = {"bitsandbytes", "transformers", "peft", "accelerate", "rich"}
        eager = sorted({name.partition(".")[0] for name in sys.modules} & heavy)
        from importlib.metadata import version
        result = [eager, version("bitsandbytes"), "bitsandbytes" in sys.modules, probes()]
    """)
    assert result == [[], "0.50.2", False, ALL]


def test_it_serves_halfbytes_own_classes_under_the_names_of_bitsandbytes():
    result = run("""
        import halfbyte, bitsandbytes as bnb
        import bitsandbytes.nn.modules, bitsandbytes.functional
        result = [
            bnb.__name__, bnb.__version__, bnb.nn.__name__,
            bnb.nn.Linear4bit is halfbyte.nn.Linear4bit is bitsandbytes.nn.modules.Linear4bit,
            bnb.nn.Params4bit is halfbyte.nn.Params4bit,
            bnb.functional.QuantState is halfbyte.functional.QuantState,
            bnb.matmul_4bit is halfbyte.matmul_4bit,
            sorted(bnb.features), "cpu" in bnb.supported_torch_devices,
        ]
    """)
    assert result == ["bitsandbytes", "0.50.2", "bitsandbytes.nn", True, True, True, True, ["multi_backend"], True]


def test_without_halfbyte_nothing_is_there():
    assert run("result = probes()") == NONE


def test_the_environment_turns_it_off():
    assert run("import halfbyte\nresult = probes()", HALFBYTE_NO_DROPIN="1") == NONE
    assert run("import halfbyte\nresult = probes()", HALFBYTE_NO_DROPIN="0") == ALL
    assert run("import halfbyte\nhalfbyte.replace_bitsandbytes()\nresult = probes()", HALFBYTE_NO_DROPIN="1") == ALL


def test_importing_halfbyte_after_the_libraries_concluded_that_it_is_absent():
    result = run("""
        import transformers, peft, peft.helpers, accelerate
        import transformers.integrations.bitsandbytes as integration
        before = probes(), hasattr(integration, "bnb"), peft.helpers.bnb
        import halfbyte
        lazy = "bitsandbytes" in sys.modules
        after = probes()
        same = integration.bnb.nn.Linear4bit is peft.helpers.bnb.nn.Linear4bit is halfbyte.nn.Linear4bit
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        result = [before, lazy, after, same, AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__]
    """)
    assert result == [[NONE, False, None], False, ALL, True, "halfbyte.integrations.transformers.quantizer"]


def test_an_installed_bitsandbytes_is_left_alone(real):
    result = run(
        """
        import halfbyte, bitsandbytes
        from importlib.metadata import version
        from halfbyte import _dropin
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        result = [
            bitsandbytes.REAL, version("bitsandbytes"), _dropin.installed_version(), _dropin.is_active(),
            AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__,
        ]
        """,
        path=[real],
    )
    assert result == [True, "0.49.9", "0.49.9", False, "transformers.quantizers.quantizer_bnb_4bit"]


def test_an_installed_bitsandbytes_is_replaced_when_asked(real):
    result = run(
        """
        import halfbyte
        halfbyte.replace_bitsandbytes()
        halfbyte.replace_bitsandbytes()
        import bitsandbytes
        halfbyte.replace_bitsandbytes()
        from importlib.metadata import version
        from halfbyte import _dropin
        result = [
            bitsandbytes.nn.Linear4bit is halfbyte.nn.Linear4bit, version("bitsandbytes"), _dropin.installed_version(),
            sys.meta_path.count(_dropin._finder), probes(),
        ]
        """,
        path=[real],
    )
    assert result == [True, "0.50.2", "0.49.9", 1, ALL]


def test_one_that_is_imported_already_cannot_be_replaced(real):
    message = run("import bitsandbytes, halfbyte\nhalfbyte.replace_bitsandbytes()", path=[real], fails=True)
    assert "HalfbyteError: bitsandbytes is already imported from" in message
    assert "before anything imports bitsandbytes" in message


def test_a_folder_that_is_called_bitsandbytes_is_not_taken_for_it(tmp_path):
    (tmp_path / "bitsandbytes" / "docs").mkdir(parents=True)
    result = run("import halfbyte, bitsandbytes\nresult = bitsandbytes.__version__", cwd=tmp_path)
    assert result == "0.50.2"


def test_installing_twice_changes_nothing():
    result = run("""
        import halfbyte
        from halfbyte import _dropin
        before = list(sys.meta_path)
        result = [_dropin.install(), _dropin.install(), sys.meta_path == before, sys.meta_path[-1] is _dropin._finder]
    """)
    assert result == [True, True, True, True]


def test_what_lists_a_folder_or_another_name_is_told_nothing():
    result = run("""
        import halfbyte
        from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
        names = [d.name for d in distributions(path=sys.path)]
        everywhere = [d.name for d in distributions()].count("bitsandbytes")
        try:
            version("bitsandbytes-foundation")
        except PackageNotFoundError:
            unknown = True
        backends = [point.value for point in entry_points(group="bitsandbytes.backends")]
        result = ["bitsandbytes" in names, everywhere, unknown, backends]
    """)
    # Where halfbyte is installed, and not on the path alone, it has an entry point of its own.
    assert result[:3] == [False, 1, True]
    assert result[3] in ([], ["halfbyte_backend:register"])


def test_names_that_are_not_served_say_so_when_used_and_not_before():
    result = run("""
        import halfbyte, bitsandbytes as bnb, torch
        messages = []
        for use in (lambda: bnb.functional.igemm, lambda: bnb.research):
            try:
                use()
            except (halfbyte.errors.HalfbyteError, AttributeError) as error:
                messages.append(str(error))
        layer = bnb.nn.Linear4bit(64, 64)
        result = [messages, isinstance(layer, bnb.nn.Linear8bitLt), isinstance(layer.weight, bnb.nn.Int8Params)]
    """)
    assert len(result[0]) == 2
    assert all("served by halfbyte" in message for message in result[0])
    assert result[1:] == [False, False]


def test_python_dash_m_halfbyte_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "--version"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
        timeout=120,
    )
    assert done.stdout == f"halfbyte {halfbyte.__version__}\n"


def test_the_environment_replaces_an_installed_one(real):
    code = """
        import halfbyte, bitsandbytes
        from importlib.metadata import version
        result = [hasattr(bitsandbytes, "REAL"), version("bitsandbytes")]
    """
    assert run(code, path=[real], HALFBYTE_BITSANDBYTES="1") == [False, "0.50.2"]
    assert run(code, path=[real], HALFBYTE_BITSANDBYTES="1", HALFBYTE_NO_DROPIN="1") == [False, "0.50.2"]
    assert run(code, path=[real], HALFBYTE_BITSANDBYTES="0") == [True, "0.49.9"]


def test_the_environment_does_not_break_an_import_that_comes_too_late(real):
    result = run(
        """
        import warnings, bitsandbytes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import halfbyte
        result = [bitsandbytes.REAL, [str(w.message) for w in caught if "HALFBYTE_BITSANDBYTES" in str(w.message)]]
        """,
        path=[real],
        HALFBYTE_BITSANDBYTES="1",
    )
    assert result[0] is True
    assert len(result[1]) == 1


@pytest.mark.parametrize("first", ["bitsandbytes", "halfbyte"])
def test_a_folder_on_the_path_serves_processes_that_know_nothing_of_halfbyte(real, first):
    result = run(
        f"""
        import {first}
        import bitsandbytes as bnb, halfbyte
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
        from halfbyte import _dropin
        from importlib.metadata import version
        result = [
            bnb.nn.Linear4bit is halfbyte.nn.Linear4bit, bnb.__name__, bnb.__spec__.name, bnb.nn.__name__,
            bnb.__file__, sys.modules["bitsandbytes"] is bnb, version("bitsandbytes"), _dropin.is_active(),
            sys.meta_path.count(_dropin._finder),
        ]
        """,
        path=[IMPORTABLE, real],
    )
    file = str(PACKAGE_ROOT / "halfbyte/bitsandbytes/__init__.py")
    names = ["bitsandbytes", "bitsandbytes", "bitsandbytes.nn"]
    assert result == [True, *names, file, True, "0.50.2", True, 1]


def test_libraries_find_the_one_in_the_folder():
    assert run("result = probes()", path=[IMPORTABLE]) == ALL
    version = "import halfbyte\nfrom halfbyte import _dropin\nresult = _dropin.installed_version()"
    assert run(version, path=[IMPORTABLE]) is None


def test_the_folders_metadata_says_the_version_that_is_served():
    from halfbyte import _dropin

    (metadata,) = IMPORTABLE.glob("*.dist-info/METADATA")
    assert metadata.parent.name == f"bitsandbytes-{_dropin.SERVED_VERSION}.dist-info"
    assert metadata.read_text() == _dropin._Metadata().read_text("METADATA")


def test_the_folder_is_what_the_command_prints():
    def command(*arguments, path=PACKAGE_ROOT):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HALFBYTE_")}
        env["PYTHONPATH"] = str(path)
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=env, timeout=300)

    assert command("halfbyte.bitsandbytes", "path").stdout == f"{IMPORTABLE}\n"
    assert command("halfbyte.bitsandbytes", "somewhere").returncode == 1
    done = command("bitsandbytes", path=f"{IMPORTABLE}{os.pathsep}{PACKAGE_ROOT}")
    assert done.returncode == 0, done.stderr
    assert "bitsandbytes 0.50.2, served by halfbyte" in done.stdout
    assert done.stdout.endswith("SUCCESS!\n")


def test_torch_operations_are_made_by_importing_bitsandbytes_and_not_before():
    result = run("""
        import torch, halfbyte
        import halfbyte.bitsandbytes
        before = hasattr(torch.ops.bitsandbytes, "quantize_4bit")
        import bitsandbytes
        result = [before, hasattr(torch.ops.bitsandbytes, "quantize_4bit")]
    """)
    assert result == [False, True]


def test_the_bias_takes_on_the_inputs_dtype_as_in_bitsandbytes():
    code = """
        import torch, halfbyte
        {}
        layer = halfbyte.nn.Linear4bit(64, 8, compute_dtype=torch.float32).to("cpu")
        layer(torch.randn(2, 64, dtype=torch.half))
        result = str(layer.bias.dtype)
    """
    assert run(code.format("import bitsandbytes")) == "torch.float16"
    assert run(code.format("")) == "torch.float32"
