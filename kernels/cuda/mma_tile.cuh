// The loop of gemm_tensor.cu and conv2d_tensor.cu, and what a warp multiplies in it on tensor cores: fp16 or bf16, sums
// in fp32.
#pragma once

#include "narrow.cuh"

// `sum` (16 M x 8 N numbers, as mma_16x8x16 hands them to the lanes) += A (16 M x DEPTH) B (DEPTH x 8 N): tiles in
// shared memory, rows PITCH numbers apart. A TURNED one lies with its rows along the depth, and is transposed on its
// way to the registers: of the four matrices that `ldmatrix` brings, two are along the rows of A, then two along the
// depth.
template <int M, int N, int DEPTH, int PITCH_A, int PITCH_B, bool TURNED>
__device__ __forceinline__ void multiply_warp(const narrow* a, const narrow* b, int lane, float (*sum)[N][4]) {
    a += TURNED ? (lane / 16 * 8 + lane % 8) * PITCH_A + lane / 8 % 2 * 8 : lane % 16 * PITCH_A + lane / 16 * 8;
    b += lane % 16 * PITCH_B + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < DEPTH; d += 16) {
        uint32_t of_a[M][4], of_b[N / 2][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            if (TURNED) ldmatrix_x4_trans(of_a[i], a + d * PITCH_A + i * 16);
            else ldmatrix_x4(of_a[i], a + i * 16 * PITCH_A + d);
        }
#pragma unroll
        for (int j = 0; j < N / 2; j++) ldmatrix_x4_trans(of_b[j], b + d * PITCH_B + j * 16);
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int j = 0; j < N; j++) mma_16x8x16<narrow>(sum[i][j], of_a[i], of_b[j / 2] + j % 2 * 2);
    }
}

// For each step `use(stage)`, which multiplies the pair of tiles that `fetch(step, stage)` has asked for: COUNT - 1
// steps before, as there is room for COUNT pairs.
template <int COUNT, typename Fetch, typename Use>
__device__ __forceinline__ void pipelined(int steps, Fetch fetch, Use use) {
    for (int s = 0; s < COUNT - 1; s++) {
        if (s < steps) fetch(s, s);
        cp_commit();  // a group for each step, empty ones too: so that counting groups counts steps
    }
    for (int step = 0; step < steps; step++) {
        cp_wait<COUNT - 2>();
        __syncthreads();  // all have their part of this step's tiles; and all are done with those of the step before
        if (step + COUNT - 1 < steps) fetch(step + COUNT - 1, (step + COUNT - 1) % COUNT);
        cp_commit();
        use(step % COUNT);
    }
}
