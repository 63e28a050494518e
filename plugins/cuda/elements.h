// Elements of the tensors of activations that kernels read and write: float32, float16 or bfloat16. Halves are widened
// where they are read; where they are written, float32 is rounded once, to nearest even.
//
// The type is a parameter of the kernels, one for a launch: the branches on it part no warp, and there is one set of
// kernels. Where loads shall be under way together, the branch goes around their loop, which is there twice then: with the
// constant kFloat32, and for halves.
#pragma once

#include "gpu.h"

namespace {

constexpr int64_t kFloat32 = 1, kFloat16 = 10, kBfloat16 = 16;  // of DType in op.h

GPU_DEVICE const void* element(const void* tensor, int64_t i, int64_t dtype) {
    return static_cast<const char*>(tensor) + i * (dtype == kFloat32 ? 4 : 2);
}
GPU_DEVICE void* element(void* tensor, int64_t i, int64_t dtype) {
    return static_cast<char*>(tensor) + i * (dtype == kFloat32 ? 4 : 2);
}

// Of two halves, the first one in the low bits.
GPU_DEVICE gpu::Float2 widened(uint32_t pair, int64_t dtype) {
    if (dtype == kBfloat16)
        return {gpu::float_of((int)(pair << 16)), gpu::float_of((int)(pair & 0xffff0000u))};
    return {gpu::of_float16((uint16_t)pair), gpu::of_float16((uint16_t)(pair >> 16))};
}

GPU_DEVICE uint32_t bfloat16_of(float value) {
    const uint32_t bits = (uint32_t)gpu::bits_of(value);
    return value != value ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

GPU_DEVICE uint32_t rounded(const gpu::Float2& v, int64_t dtype) {
#ifdef GPU_ROUNDS_TO_BFLOAT16
    return dtype == kBfloat16 ? gpu::to_bfloat16(v.x, v.y) : gpu::to_float16(v.x, v.y);
#else
    return dtype == kBfloat16 ? bfloat16_of(v.x) | bfloat16_of(v.y) << 16 : gpu::to_float16(v.x, v.y);
#endif
}

GPU_DEVICE float load_element(const void* tensor, int64_t i, int64_t dtype) {
    const void* from = element(tensor, i, dtype);
    if (dtype == kFloat32) return gpu::load(static_cast<const float*>(from));
    return widened(gpu::load(static_cast<const uint16_t*>(from)), dtype).x;
}

GPU_DEVICE void store_element(void* tensor, int64_t i, int64_t dtype, float value) {
    void* to = element(tensor, i, dtype);
    if (dtype == kFloat32)
        gpu::store(static_cast<float*>(to), value);
    else
        gpu::store(static_cast<uint16_t*>(to), (uint16_t)rounded({value, 0.0f}, dtype));
}

// Two elements from i on, aligned together.
GPU_DEVICE gpu::Float2 load_pair(const void* tensor, int64_t i, int64_t dtype) {
    const void* from = element(tensor, i, dtype);
    if (dtype == kFloat32) return gpu::load(static_cast<const gpu::Float2*>(from));
    return widened(gpu::load(static_cast<const uint32_t*>(from)), dtype);
}

GPU_DEVICE void store_pair(void* tensor, int64_t i, int64_t dtype, const gpu::Float2& v) {
    void* to = element(tensor, i, dtype);
    if (dtype == kFloat32)
        gpu::store(static_cast<gpu::Float2*>(to), v);
    else
        gpu::store(static_cast<uint32_t*>(to), rounded(v, dtype));
}

// Four elements from i on, aligned together.
GPU_DEVICE gpu::Float4 load_four(const void* tensor, int64_t i, int64_t dtype) {
    const void* from = element(tensor, i, dtype);
    if (dtype == kFloat32) return gpu::load(static_cast<const gpu::Float4*>(from));
    const gpu::Vec8 pairs = gpu::load(static_cast<const gpu::Vec8*>(from));
    const gpu::Float2 low = widened(pairs.x, dtype), high = widened(pairs.y, dtype);
    return {low.x, low.y, high.x, high.y};
}

GPU_DEVICE void store_four(void* tensor, int64_t i, int64_t dtype, const gpu::Float4& v) {
    void* to = element(tensor, i, dtype);
    if (dtype == kFloat32)
        gpu::store(static_cast<gpu::Float4*>(to), v);
    else
        gpu::store(static_cast<gpu::Vec8*>(to),
                   gpu::Vec8{rounded({v.x, v.y}, dtype), rounded({v.z, v.w}, dtype)});
}

}  // namespace
