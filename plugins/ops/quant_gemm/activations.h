// Activations before the products: rows padded or widened, their sums, the largest code of a call.
//
// In an anonymous namespace, for the reason that epilogue.h gives.
#pragma once

#include <atomic>
#include <cstring>
#include <thread>

#include "epilogue.h"
#include "quant_gemm.h"

namespace d2d {
namespace {

constexpr int64_t kTokensAPart = 16;          // of a task that prepares activations
constexpr int64_t kFewActivations = 1 << 16;  // prepared before other threads would be awake
constexpr int kLargestCode = 128;

// What the work is split for. A runtime does not tell how many threads its pool has: one that was given fewer gets
// smaller tasks than it needs.
inline int64_t cores() {
    static const int64_t count = std::thread::hardware_concurrency();
    return count;
}

// fill(m) for every token, on the threads of the node where that is worth waking them.
template <class F>
void for_tokens(const GemmProblem& p, const Parallel& parallel, const F& fill) {
    const auto part = [&](size_t index) {
        const int64_t first = static_cast<int64_t>(index) * kTokensAPart;
        for (int64_t m = first; m < least(p.m, first + kTokensAPart); ++m) fill(m);
    };
    const auto parts = static_cast<size_t>((p.m + kTokensAPart - 1) / kTokensAPart);
    if (p.m * p.k < kFewActivations)
        for (size_t index = 0; index < parts; ++index) part(index);
    else
        parallel.run(parts, part);
}

// max |q| of a call, 0 .. 128: how far sums can grow. The attribute `bits` is an upper bound of it only: a
// policy that changes bits from step to step hands narrower codes to the same node.
inline int largest_code(const GemmProblem& p, const Parallel& parallel) {
    std::atomic<int> largest{0};
    for_tokens(p, parallel, [&](int64_t m) {
        const int8_t* q = p.q + m * p.k;
        uint8_t row = 0;
        for (int64_t k = 0; k < p.k; ++k) {
            const auto size = static_cast<uint8_t>(q[k] < 0 ? -q[k] : q[k]);
            row = size > row ? size : row;
        }
        int seen = largest.load(std::memory_order_relaxed);
        while (seen < row && !largest.compare_exchange_weak(seen, row, std::memory_order_relaxed)) {
        }
    });
    return largest.load();
}

// Activations as the micro-kernel reads them, `quad` bytes for 4 neighbouring k's, K padded with zeros to
// whole quads: int8 as they are, or, beside weights of int16, int16 in the order k0 k2 k1 k3 (see
// unpack_wide).
struct Panel {
    const int8_t* rows;
    int64_t stride;
    int64_t quad;
};

inline void widen(const int8_t* q, int64_t quads, int16_t* to) {
    for (int64_t i = 0; i < quads; ++i) {
        to[4 * i] = q[4 * i];
        to[4 * i + 1] = q[4 * i + 2];
        to[4 * i + 2] = q[4 * i + 1];
        to[4 * i + 3] = q[4 * i + 3];
    }
}

inline void fill_row(const int8_t* q, int64_t k, int64_t quads, bool wide, int8_t* to) {
    if (wide) {
        auto* words = reinterpret_cast<int16_t*>(to);
        int8_t last[4] = {};
        std::memcpy(last, q + k / 4 * 4, static_cast<size_t>(k % 4));
        widen(q, k / 4, words);
        if (k % 4) widen(last, 1, words + 4 * (quads - 1));
    } else {
        std::memcpy(to, q, static_cast<size_t>(k));
        std::memset(to + k, 0, static_cast<size_t>(4 * quads - k));
    }
}

// The sum of `count` codes: in int16 over stretches that it holds, which is four times the work of a vector
// in int32.
inline int32_t sum_of(const int8_t* q, int64_t count) {
    constexpr int64_t kStretch = 128;
    int32_t sum = 0;
    int64_t k = 0;
    for (; k + kStretch <= count; k += kStretch) {
        int16_t part = 0;
        for (int64_t i = 0; i < kStretch; ++i) part = static_cast<int16_t>(part + q[k + i]);
        sum += part;
    }
    for (; k < count; ++k) sum += q[k];
    return sum;
}

}  // namespace
}  // namespace d2d
