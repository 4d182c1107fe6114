"""int8 in the engine: sums are exact on every path, rows are quantized as said, and the function is kept."""

import shutil
import subprocess
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

from deploy.engine_file import PROGRAM as FAR_RUN
from deploy.engine_file import ROOT, to_bytes, why_no_program
from deploy.fuse import fuse
from deploy.packed import PRODUCTS, STEPS, PackedModel, natural_form
from models.kernels import cpu
from tests.test_engine import MODELS, images_for, micro, relative_error, vit
from utils.errors import FarError

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")

# Products of random and of extreme numbers by the engine's tiles, beside int64; rows quantized, beside float64.
PROGRAM = r"""
#include <cstdio>
#include <random>
#include "rows.h"
#include "recurrence.h"

std::mt19937 numbers(0);
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(numbers); }

// Extremes in one of three: all sums as large as they can be.
int number(int kind, int64_t k) { return kind == 0 ? below(255) - 127 : kind == 1 ? 127 : k % 2 ? 127 : -127; }

bool exact(int64_t rows, int64_t k, int64_t n, int of_a, int of_w) {
  const int64_t depth = padded(k), width = padded(n), G = GROUP<q8>, ld = depth + 8;
  std::vector<int> a(rows * k), w(n * k);
  for (int64_t i = 0; i < rows * k; ++i) a[i] = number(of_a, i);
  for (int64_t i = 0; i < n * k; ++i) w[i] = number(of_w, i % k);
  std::vector<q8> packed((width + P) * depth), read(rows * ld);
  std::vector<float> line(depth), one(rows, 1.0f), scales(width, 1.0f), bias(width, 0.0f), out(rows * width);
  std::vector<int32_t> starts(width);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) {
      packed[i / P * P * depth + (j / G * P + i % P) * G + j % G] = q8(w[i * k + j]);
      starts[i] -= SHIFT * w[i * k + j];
    }
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(a.begin() + r * k, k, line.begin());
    for (int64_t j = 0; j < depth; j += V) store(&read[r * ld + j], load(&line[j]));
  }
  const Weights<q8> m{packed.data(), bias.data(), depth, width, depth * P, scales.data(), (float*)starts.data()};
  multiply(Rows<q8>{read.data(), ld, one.data()}, rows, m, out.data(), width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i) {
      int64_t sum = 0;
      for (int64_t j = 0; i < n && j < k; ++j) sum += int64_t{a[r * k + j]} * w[i * k + j];
      if (out[r * width + i] != float(sum)) return false;
    }
  return true;
}

int value(q8 x) { return sizeof(q8) == 1 ? int(uint8_t(x) ^ (SHIFT ? 0 : 128)) - 128 : int(x); }

bool quantized(float largest) {
  const int64_t width = 4 * GRAIN;
  std::vector<float> x(width), scale(1);
  std::vector<q8> q(width);
  for (float& y : x) y = largest * (below(2001) - 1000) / 1000;
  x[below(width)] = -largest;
  quantize_rows(x.data(), width, 1, width, q.data(), width, scale.data());
  if (largest != largest || largest > 1e38f) return scale[0] != scale[0];
  if (std::abs(scale[0] * 127.0 - largest) > 1e-6 * largest) return false;
  for (int64_t i = 0; i < width; ++i)
    if (std::abs(value(q[i]) - (largest ? x[i] * 127.0 / largest : 0.0)) > 0.5001) return false;
  return true;
}

int main() {
  for (int64_t rows : {1, 2, 3, 9, 40})
    for (int64_t k : {1, 2, 31, 100, 770})
      for (int64_t n : {1, 25, 100})
        for (int kinds = 0; kinds < 9; ++kinds)
          if (!exact(rows, k, n, kinds % 3, kinds / 3))
            return std::printf("%d rows, %d x %d, kinds %d\n", int(rows), int(k), int(n), kinds), 1;
  if (!exact(2, 1 << 17, 3, 1, 1) || !exact(2, 1 << 17, 3, 1, 2)) return std::puts("the deepest"), 1;
  for (float largest : {0.0f, 1e-30f, 1e-3f, 1.0f, 3e5f, 1e30f, INFINITY, NAN})
    if (!quantized(largest)) return std::printf("rows up to %g\n", largest), 1;
  return std::printf("V %d, %d bits, shifted by %d\n", V, int(8 * sizeof(q8)), SHIFT), 0;
}
"""
AVX512 = "-D__AVX512F__ -D__AVX512BW__"  # in place of the compiler's, with SIMDe's functions
CROSS = ["aarch64-linux-gnu-g++", "-static"]  # zig's would first compile all of its C++ library, for minutes
DOTPROD = "-march=armv8.2-a+dotprod"
PATHS = {  # compiler, flags, emulator; what it says
    "this machine": (["c++", "-march=native"], [], ""),
    "AVX2": (["c++", "-mavx2", "-mfma"], [], "V 8, 16 bits, shifted by 0"),
    "portable": (["c++"], [], "V 8, 16 bits, shifted by 0"),
    "NEON": (CROSS, ["qemu-aarch64"], "V 8, 16 bits, shifted by 0"),
    "NEON dotprod": ([*CROSS, DOTPROD], ["qemu-aarch64"], "V 8, 8 bits, shifted by 0"),
    "AVX512": (["c++", *AVX512.split()], ["SIMDe"], "V 16, 16 bits, shifted by 0"),
    "AVX512_VNNI": (["c++", *AVX512.split(), "-D__AVX512VNNI__"], ["SIMDe"], "V 16, 8 bits, shifted by 128"),
    "AVX_VNNI": (["c++", "-D__AVX2__", "-D__AVXVNNI__"], ["SIMDe"], "V 8, 8 bits, shifted by 128"),
}
# The few functions that the engine names, by SIMDe, which asks the compiler's macros what there is.
SIMDE = r"""
#pragma once
#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVX512BW__")
#pragma push_macro("__AVX512VNNI__")
#pragma push_macro("__AVX2__")
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512VNNI__
#undef __AVX2__
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#pragma pop_macro("__AVX512F__")
#pragma pop_macro("__AVX512BW__")
#pragma pop_macro("__AVX512VNNI__")
#pragma pop_macro("__AVX2__")
#undef _mm512_madd_epi16
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) { return simde_mm512_madd_epi16(a, b); }
inline __m512 _mm512_rcp14_ps(__m512 x) { return 1 / x; }
template <class Line, class T>
inline Line narrowed(__m512i x) {
  int from[16];
  T to[16];
  Line line;
  __builtin_memcpy(from, &x, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = T(from[i]);
  __builtin_memcpy(&line, to, sizeof line);
  return line;
}
inline __m128i _mm512_cvtepi32_epi8(__m512i x) { return narrowed<__m128i, signed char>(x); }
inline __m256i _mm512_cvtepi32_epi16(__m512i x) { return narrowed<__m256i, short>(x); }
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
"""


def built(path: str, folder: Path, *sources: Path | str) -> list[Path | str]:
    """The command that runs a program made for a path; skips where this machine cannot make it."""
    compiler, emulator, _ = PATHS[path]
    if emulator == ["SIMDe"]:
        (folder / "immintrin.h").write_text(SIMDE)
        emulator = []
    if emulator and not all(map(shutil.which, (*emulator, compiler[0]))):
        pytest.skip(f"no {emulator[0]} or {compiler[0]}")
    flags = ["-std=c++20", "-O1", "-w", "-pthread", "-DFAR_THREADS", "-I", folder, "-I", cpu.SOURCES]
    command = [*compiler, *flags, *sources, "-o", folder / "program"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "simde" in done.stderr and "No such file" in done.stderr:
        pytest.skip("no SIMDe here")
    assert done.returncode == 0, done.stderr
    return [*emulator, folder / "program"]


def far_run_on_aarch64() -> list[Path | str]:
    """The command that runs far-run, made by the Makefile for aarch64 with dot products, in an emulator."""
    if not all(map(shutil.which, ("qemu-aarch64", CROSS[0]))):
        pytest.skip(f"no qemu-aarch64 or {CROSS[0]}")
    folder = ROOT / "runtime/build/test"
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"TARGET": "aarch64-linux-musl", "RUNTIME": folder.relative_to(ROOT), "RUNTIME_CXX": " ".join(CROSS)}
    flags |= {"RUNTIME_AR": "aarch64-linux-gnu-ar", "RUNTIME_FLAGS": f"-std=c++20 -O1 {DOTPROD} -pthread -DFAR_THREADS"}
    command = ["make", "-s", "-C", ROOT, "runtime", *(f"{name}={value}" for name, value in flags.items())]
    with filelock.FileLock(folder / "lock"):  # two test processes share the checkout
        assert subprocess.run(command, check=False).returncode == 0
    return ["qemu-aarch64", folder / "far-run"]


@pytest.mark.parametrize("path", PATHS)
def test_sums_are_exact(path, tmp_path):
    (tmp_path / "check.cpp").write_text(PROGRAM)
    done = subprocess.run(built(path, tmp_path, tmp_path / "check.cpp"), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(PATHS[path][2]), done.stdout


@needs_kernel
@pytest.mark.parametrize("path", ["NEON dotprod", "AVX512_VNNI"])
def test_the_whole_engine_computes_the_same(path, tmp_path):
    """In other numbers of units a vector, with rows shifted: cells, attention, slabs of an MLP."""
    if path == "NEON dotprod":
        program = far_run_on_aarch64()
    else:  # what reads pictures is compiled already, and has no vectors
        if why_no_program():
            pytest.skip("far-run cannot be built")
        sources = [ROOT / "runtime/far.cpp", cpu.SOURCES / "model.cpp", FAR_RUN.with_name("far_run.o")]
        program = built(path, tmp_path, *sources)
    for name in ("ragged", "few units, pruned MLPs", "mingru"):
        model = MODELS[name]()
        images = images_for(model, 3)
        (tmp_path / "images.f32").write_bytes(images.numpy().tobytes())
        (tmp_path / "model.far").write_bytes(to_bytes(natural_form(model, torch.int8), {"data": {}, "classes": None}))
        words = ["--raw", tmp_path / "model.far", tmp_path / "images.f32"]
        done = subprocess.run([*program, *words], capture_output=True, check=True)
        got = torch.from_numpy(np.frombuffer(done.stdout, "<f4").copy()).view(3, -1)
        expected = PackedModel(model, torch.int8)(images)
        assert (got - expected).norm() < 5e-3 * expected.norm()


@needs_kernel
@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_kept(name):
    model = MODELS[name]()
    images = images_for(model, 5)
    got = PackedModel(model, torch.int8)(images)
    assert 1e-4 < relative_error(model, got, images) < 0.03
    assert relative_error(model, PackedModel(model, torch.int8, PRODUCTS)(images), images) < 0.015


@needs_kernel
def test_a_heads_scale_is_of_its_own_units():
    model = vit(256, 16, (0,), {"0": [[16, 7], [13, 16]] * 8}, "mingru", depth=1)
    attn, images = model.blocks[0].attn, images_for(model, 3)
    expected = PackedModel(model, torch.int8)(images)
    for cells, proj in [*zip(attn.lstm, attn.head_proj, strict=True)][1::2]:  # the same function by larger states
        for cell in cells:
            cell.weight_ih[cell.units :] *= 1024
            cell.bias_ih[cell.units :] *= 1024
        proj.weight /= 1024
    torch.testing.assert_close(PackedModel(model, torch.int8)(images), expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("rep_by", ["multi-lstm", "mingru"])
@pytest.mark.parametrize("keep", [(), ("embed", "w_hh")])
def test_batches_and_threads_are_equal_to_the_bit(rep_by, keep):
    model = micro((0, 1, 2), rep_by=rep_by)
    engine, images = PackedModel(model, torch.int8, keep), images_for(model, 13)
    expected = torch.cat([engine(image) for image in images.split(1)])
    for threads, batch in ((1, 2), (1, 13), (2, 1), (2, 5), (3, 13)):
        torch.set_num_threads(threads)
        got = torch.cat([engine(part) for part in images.split(batch)])
        assert torch.equal(got, expected) if not keep else torch.allclose(got, expected, rtol=0, atol=0.02)


@needs_kernel
@pytest.mark.parametrize("name", ["ragged", "tiny", "layer scale", "mingru"])
def test_every_kind_of_product_may_stay_float32(name):
    model = MODELS[name]()
    images = images_for(model, 4)
    plain = PackedModel(model, torch.int8)(images)
    for product in PRODUCTS:
        got = PackedModel(model, torch.int8, (product,))(images)
        assert relative_error(model, got, images) < 0.03
        if product in ("embed", "fc1", "fc2", "head"):
            assert not torch.equal(got, plain)
    with pytest.raises(FarError, match="no products of the engine: fc3; it has embed, before"):
        PackedModel(model, torch.int8, ("fc3",))


def test_weights_are_rounded_to_their_outputs_scale():
    model = vit(60, 3, replaced=(), depth=1, num_classes=7)
    model.head.weight[3] = 0
    model.head.weight[4] = 1e-42  # a scale that float32 hardly holds
    plan, vectors, products = natural_form(model, torch.int8)
    depth, width, weights, vectors_at, kept = plan[21:26].tolist()
    assert (depth, width, kept, products.dtype) == (60, 7, 0, torch.int8)
    bias, scales = vectors[vectors_at : vectors_at + 14].view(2, 7)
    w = products[weights : weights + 7 * 60].view(7, 60).float()
    assert torch.equal(bias, model.head.bias) and w[[0, 1, 2, 5, 6]].abs().amax(1).eq(STEPS).all()
    assert ((w * scales[:, None] - model.head.weight).abs() <= 0.5001 * scales[:, None] + 1e-40).all()


@needs_kernel
@pytest.mark.parametrize("rep_by", ["multi-lstm", "mingru"])
@pytest.mark.parametrize(("precision", "keep"), [(torch.float32, ()), (torch.int8, ("embed", "w_hh", "out"))])
def test_a_damaged_plan_is_refused_and_never_followed(precision, keep, rep_by):
    engine = PackedModel(micro(rep_by=rep_by), precision, keep)
    images, sound = torch.randn(1, 3, 32, 32), engine.plan.clone()
    for place in range(len(sound)):
        for value in (-1, 2, 2**40):
            engine.plan.copy_(sound)
            engine.plan[place] = value
            try:
                engine(images)  # what a small number in its place may be: another place for weights
            except (RuntimeError, FarError) as error:
                assert any(word in str(error) for word in ("fuse", "images", "bfloat16"))
            else:
                assert value == 2


@needs_kernel
def test_cells_of_one_block_keep_w_hh_alike_or_are_refused():
    """They are walked together, by the first one's precision."""
    engine, images = PackedModel(micro(), torch.int8), torch.randn(1, 3, 32, 32)
    first, count = engine.plan[26 + 6 : 26 + 8].tolist()
    for cell in range(count):
        engine.plan[first + 8 * cell + 7] = 1
    for cell in range(count):
        engine.plan[first + 8 * cell + 7] = 0
        with pytest.raises(RuntimeError, match="fuse"):
            engine(images)
        engine.plan[first + 8 * cell + 7] = 1


@needs_kernel
def test_fuse_takes_its_name_and_runs_on_every_cpu(monkeypatch):
    model, images = micro(), torch.randn(2, 3, 32, 32)
    expected = PackedModel(model, torch.int8)(images)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    for precision in ("int8", torch.int8):
        assert torch.equal(fuse(model, precision)(images), expected)
    assert not torch.equal(fuse(model, "int8", keep={"head"})(images), expected)


@needs_kernel
def test_fuse_says_where_int8_falls_short_and_which_product_is_to_blame(caplog):
    model = micro()
    images = images_for(model, 64)
    fuse(model, "int8", images=images)  # all of one class, by far
    assert not caplog.records
    for block in model.blocks:  # a channel that no weight reads makes the steps of all others coarse
        block.norm2.bias[0] = 1e4
        block.mlp.fc1.weight[:, 0] = 0
    model.head.bias -= model(images).mean(0)  # many classes, by little
    fuse(model, "int8", images=images)
    assert "of the answers on 64 images" in caplog.text and "with keep={'fc1'}, in float32" in caplog.text
