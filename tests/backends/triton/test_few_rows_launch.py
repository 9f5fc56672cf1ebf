"""The tiles of linear layers of a few rows, and what Triton compiles of them. Compiling is not running."""

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bench.project import machine_code  # noqa: E402
from zinit_kernels.backends.triton import configs, few_rows_launch  # noqa: E402
from zinit_kernels.backends.triton.few_rows import zinit_few_rows_kernel  # noqa: E402


def compiled(arch, dtype, form, tile, is_whole):
    """What Triton makes of the kernel for a chip."""
    absent = {
        "normed": ["residual_ptr"],
        "added": ["norm_ptr", "second_ptr", "third_ptr"],
        "gated": ["third_ptr", "residual_ptr"],
    }
    constants = {f"BLOCK_{name}": size for name, size in zip("MNK", tile, strict=False)}
    constants |= {
        "PARTS": tile.parts,
        "GATED": form == "gated",
        "WHOLE": is_whole,
        **dict.fromkeys(absent[form]),
    }
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(zinit_few_rows_kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name], attributes[i,] = dtype, [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name == "columns" and is_whole:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=zinit_few_rows_kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("form", ["normed", "added", "gated"])
def test_it_compiles_without_spills_and_fits_the_smallest_chip(arch, dtype, form):
    for num_rows, is_whole, size in ((1, True, 2048), (1, True, 12288), (17, False, 12288)):
        tile = few_rows_launch.tile_of(num_rows, size, 4 if dtype == "*fp32" else 2, arch, 132)
        found = compiled(arch, dtype, form, tile, is_whole)
        kinds = {one.kind for one in machine_code.disassemble(found.asm["cubin"]).instructions}
        assert not kinds & {"LDL", "STL"}, tile
        assert found.metadata.shared <= configs.SMALLEST_SHARED_MEMORY, tile
        if dtype == "*bf16" and is_whole:  # the weights come by asynchronous copies of 16 bytes
            assert "HMMA" in kinds and "cp.async.cg" in found.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_tile_holds_the_rows_and_fills_the_chip(arch, itemsize):
    for num_rows in (1, 2, 16, 17, 32):
        for size in (64, 2048, 12288, 128256):
            tile = few_rows_launch.tile_of(num_rows, size, itemsize, arch, 132)
            assert num_rows <= tile.block_m <= 32
            assert tile.block_n == 16 or size >= 0.75 * 132 * tile.block_n
