"""Tilings of int8_linear that were measured, by GPU family; configs.pick prefers them to its model.

One NVIDIA H200, 2026-11-27, Triton 3.6, float16 results, linears of ViT-B and ViT-L at 1, 8, 32 and
128 images: the fastest legal of up to 18 configs, in CUDA graphs, each call with other weights, as
lraee.diagnostics.tuning measures, but without zero point, bias and residual: those of a
tower take more registers, so that other configs may win there. The model's own choices took 1.00 to
1.38 times as long.
"""

Row = tuple[int, tuple[int, int, int, int, int, int]]
"""Largest M, and block_m, block_n, block_k, num_warps, num_stages, split_k from the M before on."""

ANY_M = 1 << 31

MEASURED: dict[int, dict[tuple[int, int], tuple[Row, ...]]] = {
    90: {
        (2304, 768): (
            (64, (64, 32, 128, 4, 3, 1)),  # 3.3 us at M = 50
            (256, (32, 128, 256, 4, 4, 1)),  # 4.8 us at 197
            (1024, (64, 128, 256, 8, 3, 1)),  # 5.2 us at 400
            (4096, (64, 256, 64, 8, 4, 1)),  # 11.2 us at 1,600
            (ANY_M, (128, 128, 128, 8, 3, 1)),  # 44.7 us at 6,304
        ),
        (768, 768): (
            (64, (16, 32, 256, 4, 3, 1)),  # 2.7 us at M = 50
            (256, (64, 32, 128, 4, 3, 1)),  # 3.7 us at 197
            (1024, (64, 64, 256, 4, 4, 1)),  # 3.9 us at 400
            (4096, (64, 64, 128, 4, 4, 1)),  # 6.1 us at 1,600
            (ANY_M, (128, 128, 128, 8, 3, 1)),  # 20.8 us at 6,304
        ),
        (3072, 768): (
            (64, (64, 32, 256, 4, 3, 1)),  # 3.7 us at M = 50
            (256, (64, 128, 256, 8, 3, 1)),  # 5.1 us at 197
            (1024, (64, 64, 128, 4, 4, 1)),  # 6.0 us at 400
            (4096, (128, 64, 128, 4, 3, 1)),  # 13.6 us at 1,600
            (ANY_M, (128, 128, 128, 8, 3, 1)),  # 59.8 us at 6,304
        ),
        (768, 3072): (
            (64, (64, 32, 128, 4, 4, 4)),  # 5.3 us at M = 50
            (256, (64, 64, 128, 4, 4, 2)),  # 8.5 us at 197
            (1024, (64, 64, 256, 4, 4, 1)),  # 7.7 us at 400
            (ANY_M, (128, 128, 128, 8, 4, 1)),  # 16.9 us at 1,600, 50.2 at 6,304
        ),
        (3072, 1024): (
            (512, (64, 128, 256, 8, 4, 1)),  # 5.9 us at M = 257
            (4096, (64, 256, 128, 8, 3, 1)),  # 24.3 us at 2,056
            (ANY_M, (64, 256, 64, 8, 4, 1)),  # 73.9 us at 8,224
        ),
        (1024, 1024): (
            (512, (64, 64, 128, 4, 3, 1)),  # 4.3 us at M = 257
            (4096, (64, 128, 64, 4, 4, 1)),  # 8.7 us at 2,056
            (ANY_M, (128, 128, 128, 8, 4, 1)),  # 36.1 us at 8,224
        ),
        (4096, 1024): (
            (512, (64, 64, 128, 4, 4, 1)),  # 7.0 us at M = 257
            (ANY_M, (64, 256, 64, 8, 4, 1)),  # 26.1 us at 2,056, 98.1 at 8,224
        ),
        (1024, 4096): (
            (512, (64, 128, 256, 8, 3, 2)),  # 11.5 us at M = 257
            (4096, (64, 256, 128, 8, 4, 1)),  # 22.3 us at 2,056
            (ANY_M, (128, 128, 128, 8, 4, 1)),  # 82.8 us at 8,224
        ),
    },
}  # fmt: skip
