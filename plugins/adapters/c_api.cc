// The C entry: describes the ops, runs or enqueues one node, rewrites weights into the kernels' layout. Validates
// everything.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dit2deploy.h"
#include "layout.h"
#include "op.h"
#ifdef D2D_HOST_CUDA
#include "run_on_host.h"
#endif
#ifdef D2D_WITH_CUDA
#include "cuda_driver.h"
#endif

#define D2D_EXPORT extern "C" __attribute__((visibility("default")))

namespace d2d {
namespace {

thread_local std::string last_error;

template <class F>
int guarded(F&& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        last_error = error.what();
    } catch (...) {
        last_error = "unknown exception";
    }
    return 1;
}

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument(text); }

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::f32: return "f32";
        case DType::i8: return "i8";
        case DType::i32: return "i32";
        case DType::f16: return "f16";
        case DType::bf16: return "bf16";
        case DType::stream: return "stream";
    }
    return "?";
}

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

template <class T, class F>
std::string list(const std::vector<T>& items, F&& print) {
    std::string text;
    for (const T& item : items) text += (text.empty() ? "" : ", ") + print(item);
    return "[" + text + "]";
}

std::string describe(const Definition& definition) {
    const auto port = [](const Port& p) {
        return "{\"name\": " + quoted(p.name) + ", \"dtype\": " + quoted(dtype_name(p.dtype)) + "}";
    };
    const auto attribute = [](const Attribute& a) {
        const bool integer = a.type == Attribute::Type::integer;
        return "{\"name\": " + quoted(a.name) +
               ", \"default\": " + (integer ? std::to_string(a.integer_default) : quoted(a.text_default)) +
               "}";
    };
    const auto rule = [](const OutputRule& r) {
        return "{\"like\": " + std::to_string(r.like) + ", \"last_input\": " + std::to_string(r.last_input) +
               ", \"last_dim\": " + std::to_string(r.last_dim) +
               ", \"is_codes\": " + (r.is_codes ? "true" : "false") + "}";
    };
    return "{\"name\": " + quoted(definition.name) + ", \"version\": " + std::to_string(definition.version) +
           ", \"inputs\": " + list(definition.inputs, port) +
           ", \"outputs\": " + list(definition.outputs, port) +
           ", \"attributes\": " + list(definition.attributes, attribute) +
           ", \"shapes\": " + list(definition.shapes, rule) +
           ", \"tactics\": " + list(definition.tactics, quoted) + "}";
}

const Definition& find(const char* op) {
    for (const Definition& definition : definitions())
        if (op && !std::strcmp(definition.name, op)) return definition;
    refuse(std::string("there is no op ") + (op ? op : "NULL"));
}

Attributes read(const Definition& definition, const d2d_attribute* given, size_t count) {
    Attributes values = defaults(definition);
    if (count && !given) refuse("the attributes are NULL");
    for (size_t i = 0; i < count; ++i) {
        const std::string name = given[i].name ? given[i].name : "";
        if (given[i].text && values.texts.count(name))
            values.texts[name] = given[i].text;
        else if (!given[i].text && values.integers.count(name))
            values.integers[name] = given[i].integer;
        else
            refuse(std::string(definition.name) + " has no such attribute: " + name);
    }
    return values;
}

std::vector<Tensor> read(const std::vector<Port>& ports, const Attributes& attributes,
                         const d2d_tensor* given, size_t count) {
    if (count != ports.size())
        refuse("expects " + std::to_string(ports.size()) + " tensors, got " + std::to_string(count));
    if (count && !given) refuse("the tensors are NULL");
    std::vector<Tensor> tensors;
    for (size_t i = 0; i < count; ++i) {
        const DType dtype = dtype_of(ports[i], attributes);
        if (given[i].dtype != static_cast<int32_t>(dtype))
            refuse(std::string(ports[i].name) + " must be " + dtype_name(dtype));
        if (given[i].rank < 0 || given[i].rank > kMaxRank)
            refuse(std::string(ports[i].name) + " has a wrong rank");
        if (given[i].rank && !given[i].dims) refuse(std::string(ports[i].name) + " has no dims");
        Tensor tensor{dtype, {}, given[i].data};
        tensor.shape.rank = given[i].rank;
        for (int d = 0; d < given[i].rank; ++d) {
            if (given[i].dims[d] < 0) refuse(std::string(ports[i].name) + " has a negative dimension");
            tensor.shape.dims[d] = given[i].dims[d];
        }
        if (!tensor.data && tensor.shape.count()) refuse(std::string(ports[i].name) + " is NULL");
        tensors.push_back(tensor);
    }
    return tensors;
}

bool same(const Shape& a, const Shape& b) {
    return a.rank == b.rank && !std::memcmp(a.dims, b.dims, sizeof(a.dims[0]) * a.rank);
}

// A node as it was given, checked but for what its kernels refuse.
struct Node {
    const Definition& definition;
    Attributes attributes;
    std::vector<Tensor> inputs, outputs;
};

Node read_node(const char* op, const d2d_attribute* attributes, size_t attribute_count,
               const d2d_tensor* inputs, size_t input_count, const d2d_tensor* outputs, size_t output_count) {
    const Definition& definition = find(op);
    const Attributes values = read(definition, attributes, attribute_count);
    std::string fault = check_attributes(definition, values);
    if (!fault.empty()) refuse(std::string(definition.name) + ": " + fault);
    Node node{definition, values, read(definition.inputs, values, inputs, input_count),
              read(definition.outputs, values, outputs, output_count)};
    std::vector<Shape> shapes;
    for (const Tensor& tensor : node.inputs) shapes.push_back(tensor.shape);
    fault = definition.check_shapes(node.attributes, shapes);
    if (!fault.empty()) refuse(std::string(definition.name) + ": " + fault);
    const std::vector<Shape> expected = output_shapes(definition, values, shapes);
    for (size_t i = 0; i < node.outputs.size(); ++i)
        if (!same(node.outputs[i].shape, expected[i]))
            refuse(std::string(definition.outputs[i].name) + " has a wrong shape");
    return node;
}

void check(const Node& node, int tactic) {
    const std::string fault = check_tactic(node.definition, tactic);
    if (!fault.empty()) refuse(std::string(node.definition.name) + ": " + fault);
}

#ifdef D2D_HOST_CUDA
void run_emulated(const Node& node, int tactic) {
    std::vector<char> workspace(workspace_bytes(node.definition, node.attributes, node.inputs, node.outputs),
                                '\x5A');
    const CudaMeans means{tactic, workspace.empty() ? nullptr : workspace.data()};
    std::vector<Tensor> written = node.outputs;
    written.push_back({DType::i8, {1, {static_cast<int64_t>(workspace.size())}}, workspace.data()});
    run_on_host(node.definition.plan_cuda(node.attributes, node.inputs, node.outputs, means), node.inputs,
                written);
}
#endif

// Threads that live for one call: for tests and benchmarks of raw kernels. Runtimes bring their own pool.
Parallel threads(int& count) {
    return {[](void* pool, size_t tasks, void (*task)(void*, size_t), void* user) {
                std::atomic<size_t> next{0};
                const auto work = [&] {
                    for (size_t i; (i = next.fetch_add(1)) < tasks;) task(user, i);
                };
                std::vector<std::thread> others;
                const size_t wanted = std::min(tasks, static_cast<size_t>(*static_cast<int*>(pool)));
                try {
                    others.reserve(wanted);
                    while (others.size() + 1 < wanted) others.emplace_back(work);
                } catch (const std::exception&) {
                    // The system gives no more threads (or memory for them): those that run do all the tasks.
                }
                work();
                for (std::thread& other : others) other.join();
            },
            &count};
}

}  // namespace
}  // namespace d2d

using namespace d2d;

D2D_EXPORT const char* d2d_describe(void) {
    static const std::string text = list(definitions(), describe);
    return text.c_str();
}

D2D_EXPORT const char* d2d_isas(void) {
    static const std::string text = [] {
        std::string names;
        for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512_vnni, Isa::neon})
            if (isa_runs_here(isa)) names += (names.empty() ? "" : " ") + std::string(isa_name(isa));
        return names;
    }();
    return text.c_str();
}

D2D_EXPORT const char* d2d_isa_in_use(void) {
    const char* name = nullptr;
    return guarded([&] { name = isa_name(isa_in_use()); }) ? nullptr : name;
}

D2D_EXPORT int d2d_run(const char* op, const char* isa, int thread_count, int tactic,
                       const d2d_attribute* attributes, size_t attribute_count, const d2d_tensor* inputs,
                       size_t input_count, const d2d_tensor* outputs, size_t output_count) {
    return guarded([&] {
        const Node node =
            read_node(op, attributes, attribute_count, inputs, input_count, outputs, output_count);
        check(node, tactic);
#ifdef D2D_HOST_CUDA
        if (isa && !std::strcmp(isa, "cuda_on_host")) return run_emulated(node, tactic);
#endif
#ifdef D2D_WITH_CUDA
        if (isa && !std::strcmp(isa, "cuda"))
            return run_on_gpu(node.definition, node.attributes, node.inputs, node.outputs, tactic);
#endif
        if (tactic) refuse("tactics are of GPUs: the CPU kernels take 0 alone");
        const Isa chosen = isa ? isa_from_name(isa) : isa_in_use();
        if (!isa_runs_here(chosen)) refuse(std::string(isa_name(chosen)) + " does not run on this CPU");
        if (thread_count < 1) refuse("threads must be at least 1");
        const std::string fault = check_for_cpu(node.definition, node.attributes);
        if (!fault.empty()) refuse(fault);
        node.definition.make_cpu(node.attributes, chosen)
            ->run(node.inputs.data(), node.outputs.data(), threads(thread_count));
    });
}

D2D_EXPORT int d2d_workspace(const char* op, const d2d_attribute* attributes, size_t attribute_count,
                             const d2d_tensor* inputs, size_t input_count, const d2d_tensor* outputs,
                             size_t output_count, size_t* bytes) {
    return guarded([&] {
        if (!bytes) refuse("bytes must not be NULL");
        const Node node =
            read_node(op, attributes, attribute_count, inputs, input_count, outputs, output_count);
        *bytes = workspace_bytes(node.definition, node.attributes, node.inputs, node.outputs);
    });
}

D2D_EXPORT int d2d_enqueue(const char* op, const d2d_attribute* attributes, size_t attribute_count,
                           const d2d_tensor* inputs, size_t input_count, const d2d_tensor* outputs,
                           size_t output_count, int tactic, [[maybe_unused]] void* workspace,
                           [[maybe_unused]] void* stream) {
    return guarded([&] {
        const Node node =
            read_node(op, attributes, attribute_count, inputs, input_count, outputs, output_count);
        check(node, tactic);
#ifdef D2D_WITH_CUDA
        launch_cuda(
            node.definition.plan_cuda(node.attributes, node.inputs, node.outputs, {tactic, workspace}),
            static_cast<CUstream_st*>(stream));
#else
        refuse(std::string(node.definition.name) + ": this library holds no CUDA driver's calls");
#endif
    });
}

D2D_EXPORT int d2d_relayout(const char* format, int64_t layout, int64_t n, int64_t k, const int32_t* words,
                            int32_t* out, int64_t* rows, int64_t* columns) {
    return guarded([&] {
        const FormatSpec* spec = format ? find_format(format) : nullptr;
        if (!spec) refuse(std::string("there is no weight format ") + (format ? format : "NULL"));
        if (layout != kCpuOrder && layout != kFragmentOrder)
            refuse("layout must be " + std::to_string(kCpuOrder) + " (CPU kernels) or " +
                   std::to_string(kFragmentOrder) + " (GPU kernels)");
        if (n < 1 || k < 1 || n > INT32_MAX || k > INT32_MAX) refuse("n and k must be from 1 to 2**31 - 1");
        if (!rows || !columns) refuse("rows and columns must not be NULL");
        if (out && !words) refuse("words is NULL");
        const LayoutShape shape = layout_shape(*spec, layout, n, k);
        *rows = shape.rows;
        *columns = shape.columns;
        if (out) to_layout(*spec, layout, n, k, words, out);
    });
}

#ifdef D2D_HOST_CUDA
// For tests: the kernels that nothing launched yet.
D2D_EXPORT const char* d2d_never_launched(void) {
    static std::string names;
    return (names = gpu::host::never_launched()).c_str();
}
#endif

D2D_EXPORT const char* d2d_last_error(void) { return last_error.c_str(); }
