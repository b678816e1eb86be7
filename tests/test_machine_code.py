"""docs/machine-code.md says what the kernels compile to with every version of Triton, and what follows from it."""

import os
from pathlib import Path

import pytest

from tengrad_triton.kernels import SPECS
from tengrad_triton.kernels.spec import HAS_TRITON

if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton

from perf.machine_code import environments, page, results, roofline
from perf.machine_code.compiler import resources
from perf.machine_code.configurations import configurations
from perf.machine_code.gpus import ARCHITECTURES, RATES
from perf.machine_code.instructions import count_amdgcn, count_sass
from perf.machine_code.resources import Resources, faults

ROOT = Path(__file__).parent.parent
AGAIN = "run `python -m perf.machine_code --triton`, then `python -m perf.machine_code --page`"


# Of the tile for many samples, which an H200 needs half the time of the others for. No version of torch has Triton 3.9.
KNOWN_FAULTS = {
    "3.9.0": [
        "range_gram deep fp32 SUM_TILE=32 PRECISION=ieee BLOCK_N=128 BLOCK_K=16 warps=8 stages=4 on sm_90 spills 8 "
        "bytes of a thread"
    ]
}


def test_the_page_is_what_the_results_say():
    written = (ROOT / "docs" / "machine-code.md").read_text()
    assert written == page.page(results.kept(), roofline.predictions()), AGAIN


@pytest.mark.parametrize("version", environments.VERSIONS)
def test_results_have_every_configuration_without_faults(version):
    kept = results.kept()[version]
    for target, architecture in ARCHITECTURES.items():
        assert kept[target].keys() == configurations(architecture).keys(), AGAIN
    assert faults(kept) == KNOWN_FAULTS.get(version, [])


def test_results_are_what_the_installed_triton_compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if triton.__version__ not in results.kept():
        pytest.skip(f"nothing is kept of triton {triton.__version__}")
    kept = results.kept()[triton.__version__]
    for kernel, target in (("add_partial_sums", "sm_90"), ("sum_products", "sm_100"), ("solve", "gfx942")):
        name = next(name for name in kept[target] if name.startswith(f"{kernel} default"))
        assert resources(name, target) == kept[target][name], AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("version", environments.VERSIONS)
def test_results_are_what_each_version_compiles(version, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    try:
        environments.run_with(version, ["--out", str(tmp_path)])
    except environments.UnavailableError as error:
        pytest.skip(str(error))
    compiled_by, found = results.read(tmp_path / f"{version}.json")
    assert compiled_by == version
    assert faults(found) == KNOWN_FAULTS.get(version, [])
    assert found == results.kept()[version], AGAIN


def test_what_is_wrong_with_a_kernel_is_named():
    good = Resources(32, 0, 1024, 128, [], {"STG.32": 1})
    bad = {
        "spills 8 bytes": Resources(128, 8, 0, 128, [], {"STG.32": 1}),
        "spills 0 bytes": Resources(128, 0, 0, 128, [], {"STG.32": 1, "LDL": 1}),
        "takes 300000 bytes of shared memory": Resources(32, 0, 300000, 128, [], {"STG.32": 1}),
        "is empty": Resources(32, 0, 0, 128, [], {"FFMA": 1}),
    }
    found = faults({"sm_90": {"good": good, **bad}})
    for name, fault in zip(bad, found, strict=True):
        assert fault.startswith(f"{name} on sm_90 {name}")


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.64 [R7], desc[UR4][R4.64], P1 ;
        /*0050*/             @UP0  HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0070*/                   FFMA R4, R5, R6, R7 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   NOP;
"""
AMDGCN = """
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tv_mfma_f32_32x32x8_f16 v[0:15], v[2:3], v[4:5], v[0:15]
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[2:3], v[4:5], a[0:3]
\ts_barrier
\tglobal_store_short v[0:1], v2, off
"""


def test_instructions_are_counted_by_kind():
    assert count_sass(SASS) == {
        **{"ALL": 10, "BAR": 1, "FFMA": 1, "HGMMA.TF32": 1, "HMMA.F16": 1},
        **{"LDG.128": 1, "LDG.16": 1, "LDG.32": 1, "LDGSTS.64": 1, "STG.64": 1},
    }
    expected = {"ALL": 5, "BAR": 1, "LDG.128": 1, "MFMA.BF16": 1, "MFMA.F16": 1, "STG.16": 1}
    assert count_amdgcn(AMDGCN) == expected


# Registers of a thread, bytes of shared memory, threads of a program, and percent of a core's warps.
OCCUPANCY = [
    ("sm_90", 32, 0, 256, 100),
    ("sm_90", 33, 0, 256, 75),  # registers come in eights: 40 leave room for 6 programs of 8 warps
    ("sm_90", 128, 0, 256, 25),
    ("sm_90", 168, 32 << 10, 128, 18.75),
    ("sm_90", 32, 96 << 10, 256, 25),  # 228 KiB hold two programs of 97
    ("sm_80", 32, 96 << 10, 256, 12.5),  # 164 KiB hold one
    ("sm_90", 255, 0, 512, 0),  # more than a core has
    ("gfx942", 64, 0, 256, 100),
    ("gfx942", 128, 0, 256, 50),
    ("gfx942", 32, 32 << 10, 256, 25),
]


@pytest.mark.parametrize(("target", "registers", "shared", "threads", "percent"), OCCUPANCY)
def test_occupancy_is_the_makers(target, registers, shared, threads, percent):
    assert ARCHITECTURES[target].occupancy(registers, shared, threads) == percent / 100


def test_every_op_has_a_prediction_for_every_device():
    of_ops = {(p.kernel, p.device) for p in roofline.predictions()}
    assert of_ops == {(spec.name, device) for spec in SPECS for device in RATES}
    assert all(0 < p.seconds < 0.01 for p in roofline.predictions())


def test_a_prediction_is_the_longer_of_both_rooflines():
    # J of 128 × 147456 float32, read once; then V, and what is written.
    moved = 4 * (128 * 147456 + 147456 + 128)
    assert roofline.predicted_seconds("project_rows", "3C1F convolution", "H200") == moved / 4.8e12
    # 128 work items of 3 tiles on and below the diagonal: 384 programs on 132 cores take as long as 396.
    flops = 2 * 128**2 * 147456
    least = 3 / 4 * flops / 67e12 * 396 / 384
    assert roofline.predicted_seconds("gram_rows", "3C1F convolution", "H100") == pytest.approx(least)
    # TF32 on tensor cores takes three products, each at 494.5 TFLOP/s.
    least = 3 * 3 / 4 * flops / 494.5e12 * 396 / 384
    assert roofline.predicted_seconds("gram_rows", "3C1F convolution", "H100", "tf32x3") == pytest.approx(least)
    assert roofline.predicted_seconds("gram", "no such size", "H100") is None


ARITHMETIC = [
    (["f32"], {"FFMA": 1024}, ("FFMA", 1)),
    (["f32 tf32x3"], {"FFMA": 3, "HGMMA.TF32": 12}, ("TF32", 3)),
    (["f32 bf16x3"], {"HGMMA.BF16": 12}, ("BF16", 3)),
    (["bf16"], {"HMMA.BF16": 4}, ("BF16", 1)),
    ([], {"FFMA": 32}, ("FFMA", 1)),
]


@pytest.mark.parametrize(("dots", "kinds", "arithmetic"), ARITHMETIC)
def test_arithmetic_is_what_the_code_uses(dots, kinds, arithmetic):
    assert roofline.arithmetic_of(Resources(64, 0, 0, 128, dots, kinds)) == arithmetic
