// How whole warps rotate and quantize rows in registers: shared by the CUDA kernels of this family.
//
// A warp holds 1536 values of a row, lane l values 128 j + 4 l .. + 3 for j = 0 .. 11: loads of 16 bytes a lane lie side by
// side, four codes are one store of 4 bytes. So of the stages of a transform, h = 1, 2 lie in a lane's piece, h = 4 .. 64
// are shuffles (lane XOR h / 4), and h = 128, 256 pair a lane's own pieces: blocks up to 512. Packed codes take a shuffle
// more for each piece (lane XOR 8), after which half of the lanes store both. Rows of more than 1536 values take several
// warps, which meet in shared memory for the row's statistic alone. One read, one write, no barrier where a
// row has one warp. Five shuffles an element: 32 lanes a clock and SM are 1.5e12 elements/s on an H200 (132 SMs, 1.8 GHz),
// 7.4 TB/s at 5 bytes an element, beyond its memory; 2.0e12 on an RTX 4090.
// The stages and their operands are the reference's, in its order: the same bits.
// Promise, checked by tools/cuda_statistics.py: nothing spills, and of blocks of 128 threads (rows of up to 6144 values)
// an SM holds as many warps at least, each with 6 KiB of loads under way; 4.8 TB/s * 0.7 us / 132 SMs are 25 KiB.
//   resident warps 12
#pragma once

#include "elements.h"
#include "gpu.h"
#include "row_scale.h"

namespace {

constexpr int kLanes = 32;
constexpr int kPieces = 12;                  // of a lane, four values each
constexpr int kSpan = 4 * kLanes * kPieces;  // values of a warp
constexpr int kMostWarps = 16;               // of a block of threads

struct WarpRow {
    int64_t row;               // beyond the last one it is the last one, and nothing is stored
    bool stored, begins;       // whether the warp is the row's first
    int k, lane, warp, warps;  // values and warps of the row; the warp within its block of threads
    int64_t in_row, mine;      // where the lane's first piece begins: in the row, and in the tensor
    int left, lane_left;       // values of the row from the warp's, and from the lane's first one

    // Which run of `rows` rows the row lies in. In 32 bits: a division of 64 is a call, whose registers a row needs.
    GPU_DEVICE int64_t run_of(int64_t rows) const { return (uint32_t)row / (uint32_t)rows; }
    // Whether piece j lies in the row: for some lane, and for this one.
    GPU_DEVICE bool any_has(int j) const { return 4 * kLanes * j < left; }
    GPU_DEVICE bool has(int j) const { return 4 * kLanes * j < lane_left; }
};

struct Values {
    float at[kPieces][4];
};

// Rows m of k values, `gpu::threads()` threads a block: warps_of(k) warps a row.
GPU_DEVICE WarpRow warp_row(int64_t m, int64_t k) {
    const int me = (int)gpu::thread(), warp = me / kLanes;
    const int warps = ((int)k + kSpan - 1) / kSpan, rows = (int)gpu::threads() / kLanes / warps;
    const int64_t row = gpu::block_x() * rows + warp / warps, known = row < m ? row : m - 1;
    const int lane = me % kLanes, first = warp % warps * kSpan, left = (int)k - first;
    const int64_t in_row = first + 4 * lane;
    return {known, row < m, first == 0,         (int)k, lane,           warp,
            warps, in_row,  known * k + in_row, left,   left - 4 * lane};
}

// The sum, or the largest, of the row's lanes, in all of them.
template <class T, class Combine>
GPU_DEVICE T of_row(const WarpRow& w, const gpu::Shared<T>& partial, T value, const Combine& combine) {
#pragma unroll
    for (int mask = kLanes / 2; mask; mask /= 2) value = combine(value, gpu::shuffle_xor(value, mask));
    if (w.warps == 1) return value;
    if (w.lane == 0) partial.store(w.warp, value);
    gpu::sync_block();
    const int first = w.warp / w.warps * w.warps;
    value = partial.load(first);
    for (int i = 1; i < w.warps; ++i) value = combine(value, partial.load(first + i));
    gpu::sync_block();
    return value;
}

GPU_DEVICE double sum_of_row(const WarpRow& w, const gpu::Shared<double>& partial, double value) {
    return of_row(w, partial, value, [](double a, double b) { return a + b; });
}

GPU_DEVICE void load_pieces(const WarpRow& w, const void* x, int64_t dtype, Values& v) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        const gpu::Float4 four = w.has(j) ? load_four(x, w.mine + 4 * kLanes * j, dtype) : gpu::Float4{};
        v.at[j][0] = four.x;
        v.at[j][1] = four.y;
        v.at[j][2] = four.z;
        v.at[j][3] = four.w;
    }
}

GPU_DEVICE void load_row(const WarpRow& w, const void* x, int64_t dtype, Values& v) {
    if (dtype == kFloat32)
        load_pieces(w, x, kFloat32, v);
    else
        load_pieces(w, x, dtype, v);
}

GPU_DEVICE void store_pieces(const WarpRow& w, const Values& v, void* y, int64_t dtype) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
        if (w.stored && w.has(j))
            store_four(y, w.mine + 4 * kLanes * j, dtype, {v.at[j][0], v.at[j][1], v.at[j][2], v.at[j][3]});
}

GPU_DEVICE void store_row(const WarpRow& w, const Values& v, void* y, int64_t dtype) {
    if (dtype == kFloat32)
        store_pieces(w, v, y, kFloat32);
    else
        store_pieces(w, v, y, dtype);
}

GPU_DEVICE void add_and_subtract(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

// The unnormalised transform of each block, a power of two up to 512.
GPU_DEVICE void rotate(const WarpRow& w, int64_t block, Values& v) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        if (block >= 2) {
            add_and_subtract(v.at[j][0], v.at[j][1]);
            add_and_subtract(v.at[j][2], v.at[j][3]);
        }
        if (block >= 4) {
            add_and_subtract(v.at[j][0], v.at[j][2]);
            add_and_subtract(v.at[j][1], v.at[j][3]);
        }
    }
#pragma unroll 1
    for (int mask = 1; mask < kLanes && 4 * mask < block; mask *= 2) {
        const float sign = w.lane & mask ? -1.0f : 1.0f;  // of the lane's own value: a + b below, a - b above
#pragma unroll
        for (int j = 0; j < kPieces; ++j)
            if (w.any_has(j))
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v.at[j][i] = gpu::multiply_add(sign, v.at[j][i], gpu::shuffle_xor(v.at[j][i], mask));
    }
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2)
        if (block > 4 * kLanes * apart)
#pragma unroll
            for (int j = 0; j < kPieces; ++j)
                if (!(j & apart))
#pragma unroll
                    for (int i = 0; i < 4; ++i) add_and_subtract(v.at[j][i], v.at[j + apart][i]);
}

struct WarpPlan {
    int64_t block;
    float limit;  // qmax of the row
    bool gaussian, mid_rise, packed;
};

// The largest magnitude as bits: they are ordered as magnitudes are, and NaN and inf come last.
GPU_DEVICE float peak_of_row(const WarpRow& w, const gpu::Shared<int>& partial, const Values& v) {
    int most = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int magnitude = gpu::bits_of(v.at[j][i]) & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
    return gpu::float_of(of_row(w, partial, most, [](int a, int b) { return a > b ? a : b; }));
}

// In float64: another order of the additions shows in the float32 result of next to no row,
// unless its large terms cancel.
GPU_DEVICE float root_mean_square_of_row(const WarpRow& w, const gpu::Shared<double>& partial,
                                         const Values& v) {
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += (double)v.at[j][i] * v.at[j][i];
    return (float)sqrt(sum_of_row(w, partial, sum) / (double)w.k);
}

// Codes and step of the row; its values are rotated in place.
GPU_DEVICE void quantize_values(const WarpRow& w, const WarpPlan& p, const gpu::Shared<double>& sums,
                                const gpu::Shared<int>& peaks, Values& v, int8_t* q, float* s) {
    rotate(w, p.block, v);
    const float statistic = p.gaussian ? root_mean_square_of_row(w, sums, v) : peak_of_row(w, peaks, v);
    const d2d::RowScale found =
        d2d::row_scale(statistic, p.limit, p.gaussian, p.mid_rise, 1.0f / sqrtf((float)p.block), p.packed);
    if (w.stored && w.begins && w.lane == 0) gpu::store(s + w.row, found.s);
    const float top = floorf(p.limit);
    // Packed, lanes l and l + 8 of 16 hold the lows and the highs of the same four bytes.
    const bool high = p.packed && w.lane & 8;
    const int64_t mine = p.packed ? (w.mine - 4 * w.lane) / 2 + w.lane / 16 * 32 + 4 * (w.lane % 8) : w.mine;
    const int apart = p.packed ? kLanes / 2 : kLanes;
    auto* to = reinterpret_cast<uint32_t*>(q + mine);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        if (!w.any_has(j)) continue;
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float scaled = v.at[j][i] * found.scale;
            const float wanted = p.mid_rise ? 2.0f * floorf(scaled) + 1.0f : scaled;
            const float code = fminf(fmaxf(wanted, -top), top);
            // The sum with 1.5 * 2^23 rounds half to even and leaves the integer in its low bits.
            codes |= ((uint32_t)gpu::bits_of(code + 12582912.0f) & 255u) << 8 * i;
        }
        codes = found.scale == 0.0f ? 0u : codes;
        if (p.packed)
            codes = (codes & 0x0F0F0F0Fu) | ((uint32_t)gpu::shuffle_xor((int)codes, 8) << 4 & 0xF0F0F0F0u);
        if (w.stored && w.has(j) && !high) gpu::store(to + apart * j, codes);
    }
}

}  // namespace
