/* The C entry of the kernels: what Python's ctypes (dit2deploy/targets/kernel.py) and C programs call. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A dense row-major tensor; dtype is ONNX's number: 1 float32, 3 int8, 6 int32, 10 float16, 16 bfloat16. */
typedef struct {
    int32_t dtype;
    int32_t rank;
    const int64_t* dims;
    void* data;
} d2d_tensor;

typedef struct {
    const char* name;
    const char* text; /* NULL: an integer attribute */
    int64_t integer;
} d2d_attribute;

/* The list of ops as JSON: [{"name", "version", "inputs": [{"name","dtype"}], "outputs": [...],
   "attributes": [{"name","default"}], "shapes": [...], "tactics": [...]}]; the dtype "stream" is what a node's attribute
   `dtype` says, 1, 10 or 16, on a CPU 1 alone. A tactic is a kernel for a GPU that can be asked for by its number, from 1;
   0 is the op's own rule, which also computes the nodes that the tactic is no way to compute. Static storage. */
const char* d2d_describe(void);

/* Names of the instruction sets that run here, best last, separated by blanks; and the one in use. */
const char* d2d_isas(void);
const char* d2d_isa_in_use(void);

/* Runs one node on `threads` threads (1 = the caller's). `isa` NULL = the one in use; "cuda" = the first GPU,
   with tensors in host memory all the same; "cuda_on_host" = the CUDA source compiled for the host (only in
   the test library); `tactic` is theirs, otherwise 0. 0: ok. Otherwise d2d_last_error() tells why. */
int d2d_run(const char* op, const char* isa, int threads, int tactic, const d2d_attribute* attributes,
            size_t attribute_count, const d2d_tensor* inputs, size_t input_count, const d2d_tensor* outputs,
            size_t output_count);

/* Bytes of workspace with which d2d_enqueue can compute this node by any tactic: the addresses of its tensors count, their
   contents do not. */
int d2d_workspace(const char* op, const d2d_attribute* attributes, size_t attribute_count,
                  const d2d_tensor* inputs, size_t input_count, const d2d_tensor* outputs,
                  size_t output_count, size_t* bytes);

/* Enqueues one node on the GPU of the calling thread's current CUDA context, on `stream` (a CUstream or cudaStream_t;
   NULL: the default stream): tensors in device memory, and so is `workspace`, of d2d_workspace's bytes, which nothing else
   may use until the node is computed. NULL: none, and by a way that needs none. Returns without waiting; allocates nothing
   but what the first call in a context loads, which is no work for a stream that is being captured. */
int d2d_enqueue(const char* op, const d2d_attribute* attributes, size_t attribute_count,
                const d2d_tensor* inputs, size_t input_count, const d2d_tensor* outputs, size_t output_count,
                int tactic, void* workspace, void* stream);

/* Rewrites packed interchange words int32[n][words] of `format` into a kernels' layout: 1 for the CPU,
 * 2 for the GPU. The result is int32 with rows x *columns words; with `out` NULL only these are set. */
int d2d_relayout(const char* format, int64_t layout, int64_t n, int64_t k, const int32_t* words, int32_t* out,
                 int64_t* rows, int64_t* columns);

/* Of the calling thread; valid until its next d2d_ call. */
const char* d2d_last_error(void);

#ifdef __cplusplus
}
#endif
