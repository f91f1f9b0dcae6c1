"""``halfbyte bench`` on the CPU with tiny sizes, its table and plot, and README's figures."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import halfbyte
from halfbyte import cli
from halfbyte.cli.bench import clock, command, grouped, options, peers, record, table
from halfbyte.cli.bench.plan import Experts
from halfbyte.errors import HalfbyteError

ROOT = Path(__file__).parents[1]
TINY = ("--device", "cpu", "--quick", "--shapes", "64x128,96x64", "--ms", "1,3")


def bench(*arguments, **environment):
    env = os.environ | {"PYTHONPATH": str(Path(halfbyte.__file__).parents[1]), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", "bench", *map(str, arguments)],
        capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All operations, once: what was printed, the provenance, the figures."""
    file = tmp_path_factory.mktemp("bench") / "made" / "figures.jsonl"
    done = bench(*TINY, "--peers", "torch,halfbyte", "--json", file, "--commit", "abc123")
    assert done.returncode == 0, done.stderr
    return done, *record.read(file)


def test_every_operation_has_figures(everything):
    done, _, rows = everything
    assert done.stderr == ""
    measured = {row["op"] for row in rows if row["peer"] == "halfbyte"}
    missing = set(options.OPERATIONS) - measured
    assert missing <= {"experts"} if not hasattr(halfbyte, "matmul_4bit_experts") else not missing
    for row in rows:
        assert "error" not in row
        assert row["us"] > 0 and row["timing"] == "wall", row
        assert row["op"] not in {"matmul", "grad_input", "group"} or row["floor_us"] > 0, row


def test_products_are_measured_for_every_size_peer_and_form(everything):
    _, _, rows = everything
    for op in ("matmul", "grad_input"):
        found = [(r["n"], r["k"], r["m"], f"{r['peer']} {r['form']}") for r in rows if r["op"] == op]
        assert sorted(found) == sorted(
            (n, k, m, who)
            for n, k in ((64, 128), (96, 64))
            for m in (1, 3)
            for who in ("torch bf16", "halfbyte nf4", "halfbyte nf4 dq")
        )


def test_provenance_says_what_the_figures_belong_to(everything):
    _, facts, _ = everything
    assert facts["halfbyte"] == halfbyte.__version__
    assert facts["torch"] == torch.__version__
    assert facts["commit"] == "abc123"
    assert facts["device"] == "cpu" and facts["threads"] == 1 and facts["cpu"]
    assert facts["command"].startswith("halfbyte bench --device cpu --quick ")
    assert len(facts["date"]) == len("2026-01-01")
    assert {"bitsandbytes", "python", "simd"} <= set(facts)


def test_the_floor_is_bytes_or_arithmetic_at_the_measured_speeds(everything):
    _, _, rows = everything
    copy = next(row for row in rows if row["op"] == "copy")
    bytes_a_us = 4 * copy["elements"] / copy["us"]
    flops_a_us = max(2 * row["m"] ** 3 / row["us"] for row in rows if row["op"] == "dense")
    row = next(r for r in rows if r["op"] == "matmul" and r["form"] == "nf4 dq" and (r["n"], r["m"]) == (64, 3))
    # 64 × 128 weights: half a byte each, a byte a block of 64, fp32 for each 256 of those; bf16 rows in and out.
    nbytes = 64 * 128 / 2 + 128 + 4 + 2 * 3 * (64 + 128)
    assert row["floor_us"] == pytest.approx(max(nbytes / bytes_a_us, 2 * 3 * 64 * 128 / flops_a_us), rel=0.02, abs=1e-3)


def test_the_table_shows_the_figures(everything):
    done, facts, rows = everything
    assert done.stdout.strip() == table.render(facts, rows)
    lines = done.stdout.splitlines()
    heads = next(line for line in lines if line.startswith("| x · wᵀ, ms: N × K "))
    assert [cell.strip() for cell in heads.strip("|").split("|")][1:] == [
        "M", "floor", "torch bf16", "halfbyte nf4", "halfbyte nf4 dq", "torch ÷ halfbyte",
    ]  # fmt: skip
    line = next(line for line in lines[lines.index(heads) :] if line.startswith("| 96 × 64 ") and "|   3 |" in line)
    us = {r["form"]: r["us"] for r in rows if r["op"] == "matmul" and (r["n"], r["m"]) == (96, 3)}
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:6] == [table.number(us[form] / 1e3) for form in ("bf16", "nf4", "nf4 dq")]
    assert cells[6] == f"{us['bf16'] / min(us['nf4'], us['nf4 dq']):.2f}"
    for title in ("backward", "layers on one input", "quantize to NF4", "dequantize 8 bits", "eager call, ms"):
        assert f"| {title}" in done.stdout


def test_tables_of_a_gpu_have_microseconds_and_the_hosts_part():
    facts = {"device": "cuda", "gpu": "G", "driver": "1", "torch": "2", "halfbyte": "3", "date": "2026-01-01"}
    size = {"call": "layer", "m": 1, "n": 64, "k": 32}
    rows = [
        {"op": "copy", "peer": "torch", "form": "bf16", "us": 1.0, "gb_s": 4150.0},
        {"op": "dense", "peer": "torch", "form": "bf16", "us": 1.0, "tflop_s": 745.2},
        {"op": "eager", "peer": "halfbyte", "form": "nf4", "us": 9.25, "host_us": 5.5, **size},
        {"op": "eager", "peer": "bitsandbytes", "form": "nf4", "us": 18.5, "host_us": 18.0, **size},
        {"op": "eager", "peer": "bitsandbytes", "form": "nf4 dq", "error": "RuntimeError: no", **size},
    ]
    assert table.about(facts) == "G, driver 1; torch 2, halfbyte 3; 2026-01-01."
    assert "4.15 TB/s" in table.floor(facts, rows) and "745 TFLOP/s" in table.floor(facts, rows)
    (made,) = table.tables(facts, rows)
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()] == [
        ["eager call, µs (host's part)", "N × K", "M", "bitsandbytes nf4", "bitsandbytes nf4 dq", "halfbyte nf4",
         "bitsandbytes ÷ halfbyte"],
        ["-" * 28, "-" * 6 + ":", "--:", "-" * 15 + ":", "-" * 18 + ":", "-" * 11 + ":", "-" * 22 + ":"],
        ["layer", "64 × 32", "1", "18.5 (18.0)", "–", "9.25 (5.50)", "2.00"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (128.4, "128"), (31.25, "31.2"), (8.444, "8.44"), (0.01234, "0.0123")]
)
def test_numbers_have_as_many_figures_as_they_mean(value, text):
    assert table.number(value) == text


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    done = bench(*TINY, "--ops", "matmul", "--peers", "torch,halfbyte", "--plot", tmp_path / "new" / "time.png")
    assert done.returncode == 0, done.stderr
    png = (tmp_path / "new" / "time.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width > height > 300  # two panels beside each other


def test_a_plot_says_what_it_is_of(tmp_path):
    pytest.importorskip("matplotlib")
    from halfbyte.cli.bench import plot

    facts, rows = record.read(ROOT / "benches/results/h200.jsonl")
    plot.draw(facts, rows, tmp_path / "time.png", source="sha256:0123")
    assert b"Source\0sha256:0123" in (tmp_path / "time.png").read_bytes()
    with pytest.raises(HalfbyteError, match="no figures of matmul"):
        plot.draw(facts, [row for row in rows if row["op"] != "matmul"], tmp_path / "none.png")


def test_without_matplotlib_the_plot_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    file = tmp_path / "figures.jsonl"
    assert cli.main(["bench", *TINY, "--plot", str(tmp_path / "time.png"), "--json", str(file)]) == 1
    out = capsys.readouterr()
    assert out.err == "halfbyte: --plot needs matplotlib, which is not installed: pip install 'halfbyte[bench]'\n"
    assert out.out == "" and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64"], "expected outputs x inputs, as 4096x14336, got '64'"),
        (["--shapes", "64x0"], "expected a positive number, got '0'"),
        (["--ms", ","], "expected a list with commas, got nothing"),
        (["--ms", "1,-2"], "expected a positive number, got '-2'"),
        (["--ops", "matmul,sort"], "there is no 'sort', only matmul, "),
        (["--peers", "cublas"], "there is no 'cublas', only torch, bitsandbytes, halfbyte"),
    ],
)
def test_wrong_usage_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "mps"], "halfbyte runs on cpu and cuda, not on mps"),
        (["--device", "cpu", "--ops", "eager", "--plot", "x.png"], "draws matmul, which --ops leaves out"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(arguments, message, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_bitsandbytes_that_is_not_there_is_an_error_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(peers, "bitsandbytes", lambda: None)
    assert [peer.name for peer in peers.find(None)] == ["torch", "halfbyte"]
    with pytest.raises(HalfbyteError, match="there is no bitsandbytes here"):
        peers.find(("bitsandbytes", "halfbyte"))


def test_an_operation_that_fails_leaves_a_gap_and_exit_code_1(tmp_path, monkeypatch, capsys):
    def product(self, x, packed):
        if len(x) == 3:
            raise RuntimeError("three is\ntoo many")
        return x

    monkeypatch.setattr(peers.FourBit, "product", product)
    file = tmp_path / "figures.jsonl"
    assert cli.main(["bench", *TINY, "--ops", "matmul", "--peers", "halfbyte", "--json", str(file)]) == 1
    out = capsys.readouterr()
    assert out.err.count("no figure: halfbyte nf4") == 4
    assert "RuntimeError: three is\n" in out.err
    _, rows = record.read(file)
    assert {row["m"]: row.get("error") for row in rows if row["op"] == "matmul"} == {
        1: None,
        3: "RuntimeError: three is",
    }
    assert " – " in out.out


@pytest.mark.skipif(not os.environ.get("HALFBYTE_BITSANDBYTES_PATH"), reason="needs bitsandbytes")
def test_bitsandbytes_is_measured_where_it_is_installed():
    path = os.pathsep.join([str(Path(halfbyte.__file__).parents[1]), os.environ["HALFBYTE_BITSANDBYTES_PATH"]])
    done = bench(
        "--device", "cpu", "--quick", "--shapes", "64x64", "--ms", "2", "--ops", "matmul,grad_input,eager",
        "--peers", "bitsandbytes,halfbyte", PYTHONPATH=path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # What bitsandbytes says on processors with AVX-512 for bf16 is its own.
    assert [line for line in done.stderr.splitlines() if "kernels-community" not in line] == []
    assert "bitsandbytes 0.50.2" in done.stdout
    assert done.stdout.count("| bitsandbytes nf4 |") == 3
    assert "–" not in done.stdout.split("floor", 1)[1]


def test_torchs_experts_are_right():
    """A rival that computes something else would be no rival."""
    plan = SimpleNamespace(experts=Experts(experts=6, hidden=32, intermediate=48, active=2), device=torch.device("cpu"))
    gate_up, down = torch.randn(6, 96, 32).bfloat16() * 0.1, torch.randn(6, 32, 48).bfloat16() * 0.1
    x, weights = torch.randn(5, 32).bfloat16(), torch.rand(5, 2).bfloat16()
    chosen = grouped._choose(plan, 5)
    expected = torch.zeros(5, 32)
    for t in range(5):
        for e, weight in zip(chosen[t], weights[t].float(), strict=True):
            gate, up = (gate_up[e].float() @ x[t].float()).chunk(2)
            expected[t] += weight * (down[e].float() @ (torch.nn.functional.silu(gate) * up))
    made = grouped._dense_layer(plan, gate_up, down, x, chosen, weights)
    assert (made.float() - expected).abs().max() < 0.02 * expected.abs().max()

    begins = grouped._begins(plan, chosen)
    rows, (call,) = torch.randn(10, 32).bfloat16(), grouped._dense_experts(gate_up, torch.zeros(10, 32), [begins])
    made = call.func(rows, *call.args[1:], **call.keywords).float()
    owner = chosen.flatten().sort().values
    expected = torch.stack([gate_up[e].float() @ row.float() for e, row in zip(owner, rows, strict=True)])
    assert (made - expected).abs().max() < 0.01 * expected.abs().max()


def test_copies_leave_the_cache():
    assert clock.copies(33 << 20, 1) == 12  # 384 MiB
    assert clock.copies(1 << 20, 16) == 48
    assert clock.copies(1 << 30, 1) == 2
    assert clock.copies(1 << 20, 512) == 3


def test_wall_time_is_of_one_call():
    times = clock.wall_us([lambda: sum(range(100_000))], seconds=1.0)
    assert 100 < times < 100_000
    assert clock.wall_us([lambda: None], seconds=0.0) < 10


@pytest.mark.parametrize("milliseconds", [1, 40])
def test_wall_time_leaves_out_what_only_a_first_call_does(milliseconds):
    """As the backward pass, whose first call makes the forward pass."""

    class Call:
        made = False

        def __call__(self):
            time.sleep(milliseconds / 1000 if self.made else 0.2)
            self.made = True

    assert clock.wall_us([Call() for _ in range(10)], seconds=0.1) < 150_000


@pytest.mark.gpu
@pytest.mark.alone
def test_bench_on_a_gpu(tmp_path):
    file = tmp_path / "figures.jsonl"
    done = bench(
        "--device", "cuda", "--quick", "--shapes", "256x512", "--ms", "1,40", "--peers", "torch,halfbyte",
        "--json", file, "--ops", "matmul,grad_input,quantize_4bit,dequantize_blockwise,group,experts,eager",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts, rows = record.read(file)
    assert facts["gpu"] == torch.cuda.get_device_name(0) and facts["driver"]
    assert {(row["op"], row["timing"]) for row in rows} >= {
        ("matmul", "graph"), ("grad_input", "graph"), ("quantize_4bit", "stream"), ("eager", "eager"),
    }  # fmt: skip
    for row in rows:
        assert row["us"] > 0.5, row
        assert row["op"] != "eager" or 0 < row["host_us"] <= row["us"]


def load_table_script():
    spec = importlib.util.spec_from_file_location("benches_table", ROOT / "benches" / "table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_readme_has_the_figures_of_the_results():
    assert load_table_script().stale() == []


def test_readme_that_is_not_of_the_results_is_found(tmp_path, monkeypatch):
    script = load_table_script()
    text = script.README.read_text(encoding="utf-8")
    changed = tmp_path / "README.md"
    changed.write_text(text.replace("| 4096 × 4096 ", "| 4096 × 4097 ", 1), encoding="utf-8")
    monkeypatch.setattr(script, "README", changed)
    monkeypatch.setattr(script, "PLOT", tmp_path / script.PLOT.name)
    assert script.stale() == ["README.md", "h200.png"]


def test_results_of_something_else_are_refused(tmp_path):
    for text in ("", "{}\n", "not json\n", json.dumps({"provenance": 1}) + "\n"):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(HalfbyteError, match="not figures of `halfbyte bench`"):
            record.read(tmp_path / "x.jsonl")
