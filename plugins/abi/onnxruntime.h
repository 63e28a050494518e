// What we need of ONNX Runtime's C ABI, declared from facts: slot numbers of an append-only table and one
// record.
//
// Checked by tests on 1.18 (the API version asked for) and newer; no header of ONNX Runtime is needed or
// compatible.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace d2d::ort {

constexpr uint32_t kApiVersion = 18;  // ONNX Runtime 1.18, the oldest that has all slots below

struct Status;
struct Session;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct Allocator;
struct MemoryInfo;

enum Code : int { kFail = 1, kInvalidArgument = 2 };

// The table of functions; `call<Slot, Signature>` below gives a slot its type.
struct Api {
    void* slots[1];
};

struct ApiBase {
    const Api* (*get)(uint32_t version);
    const char* (*version)();
};

template <int Slot, class Signature>
struct Function;

template <int Slot, class R, class... A>
struct Function<Slot, R(A...)> {
    R operator()(const Api* api, A... arguments) const {
        return reinterpret_cast<R (*)(A...)>(api->slots[Slot])(arguments...);
    }
};

inline constexpr Function<0, Status*(Code, const char*)> create_status;
inline constexpr Function<26, Status*(const char*, CustomOpDomain**)> create_domain;
inline constexpr Function<27, Status*(CustomOpDomain*, const struct CustomOp*)> add_op;
inline constexpr Function<28, Status*(SessionOptions*, CustomOpDomain*)> add_domain;
inline constexpr Function<51, Status*(const Value*, void**)> tensor_data;
inline constexpr Function<60, Status*(const ShapeInfo*, int*)> element_type;
inline constexpr Function<61, Status*(const ShapeInfo*, size_t*)> dimension_count;
inline constexpr Function<62, Status*(const ShapeInfo*, int64_t*, size_t)> dimensions;
inline constexpr Function<65, Status*(const Value*, ShapeInfo**)> shape_info;
inline constexpr Function<76, Status*(Allocator*, void*)> allocator_free;
inline constexpr Function<77, Status*(const Allocator*, const MemoryInfo**)> allocator_info;
inline constexpr Function<85, Status*(const KernelInfo*, const char*, float*)> float_attribute;
inline constexpr Function<86, Status*(const KernelInfo*, const char*, int64_t*)> integer_attribute;
inline constexpr Function<87, Status*(const KernelInfo*, const char*, char*, size_t*)> text_attribute;
inline constexpr Function<88, Status*(const KernelContext*, size_t*)> input_count;
inline constexpr Function<90, Status*(const KernelContext*, size_t, const Value**)> input;
inline constexpr Function<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> output;
inline constexpr Function<93, void(Status*)> release_status;
inline constexpr Function<99, void(ShapeInfo*)> release_shape_info;
inline constexpr Function<132, void(Allocator*)> release_allocator;
// The handle of the CUDA stream that the node's provider computes on; null is the default stream.
inline constexpr Function<193, Status*(const KernelContext*, CUstream_st**)> gpu_stream;
inline constexpr Function<249, Status*(const KernelInfo*, size_t, int*, const Value**)> constant_input;
inline constexpr Function<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>
    parallel_for;

// Memory of the node's provider and stream, which the caller gives back to an allocator of the same.
inline constexpr Function<277, Status*(const KernelContext*, const MemoryInfo*, size_t, void**)>
    scratch_buffer;
inline constexpr Function<278, Status*(const KernelInfo*, int, Allocator**)> provider_allocator;
constexpr int kDefaultMemory = 0;

// One op, as ONNX Runtime reads it: a version and 25 functions. Those left null were checked to be optional.
struct CustomOp {
    uint32_t version = kApiVersion;
    void* create_kernel = nullptr;
    const char* (*name)(const CustomOp*) = nullptr;
    const char* (*execution_provider)(const CustomOp*) = nullptr;
    int (*input_type)(const CustomOp*, size_t) = nullptr;
    size_t (*input_type_count)(const CustomOp*) = nullptr;
    int (*output_type)(const CustomOp*, size_t) = nullptr;
    size_t (*output_type_count)(const CustomOp*) = nullptr;
    void* kernel_compute = nullptr;
    void (*kernel_destroy)(void*) = nullptr;
    int (*input_characteristic)(const CustomOp*, size_t) = nullptr;
    int (*output_characteristic)(const CustomOp*, size_t) = nullptr;
    int (*input_memory_type)(const CustomOp*, size_t) = nullptr;
    int (*variadic_input_min_arity)(const CustomOp*) = nullptr;
    int (*variadic_input_homogeneity)(const CustomOp*) = nullptr;
    int (*variadic_output_min_arity)(const CustomOp*) = nullptr;
    int (*variadic_output_homogeneity)(const CustomOp*) = nullptr;
    Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**) = nullptr;
    Status* (*kernel_compute_v2)(void*, KernelContext*) = nullptr;
    void* infer_output_shape = nullptr;  // null: ONNX Runtime 1.18..1.23 crash on some nodes with it
    int (*start_version)(const CustomOp*) = nullptr;
    int (*end_version)(const CustomOp*) = nullptr;
    void* may_inplace = nullptr;
    void* release_may_inplace = nullptr;
    void* alias_map = nullptr;
    void* release_alias_map = nullptr;
};
static_assert(sizeof(void*) == 8 && sizeof(CustomOp) == 26 * 8, "the record that ONNX Runtime expects");

}  // namespace d2d::ort
