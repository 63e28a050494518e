// ONNX Runtime: every Definition of the list as custom ops of domain `dit2deploy`, one for the CPU and one for the CUDA
// execution provider; no line per op.
#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "onnxruntime.h"
#include "op.h"

namespace d2d::ort {
namespace {

// Of the one ONNX Runtime that this process has: set once, before any session reads it.
const Api* api = nullptr;

// An error that ONNX Runtime shall show under its own code.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Takes a status of ONNX Runtime's own and carries on with it through our frames.
struct Foreign {
    Status* status;
};

void check(Status* status) {
    if (status) throw Foreign{status};
}

// Allocates nothing of its own: what it tells of may be that memory is out.
Status* failed(const char* op, Code code, const char* fault) {
    char text[1024];
    std::snprintf(text, sizeof text, "%s: %s", op, fault);
    return create_status(api, code, text);
}

// No exception may leave the library: each callback runs its body in here.
template <class F>
Status* guarded(const char* op, F&& body) {
    try {
        body();
        return nullptr;
    } catch (const Foreign& foreign) {
        return foreign.status;
    } catch (const Refused& error) {
        return failed(op, kInvalidArgument, error.what());
    } catch (const std::exception& error) {
        return failed(op, kFail, error.what());
    } catch (...) {
        return failed(op, kFail, "unknown exception");
    }
}

void refuse(const std::string& fault) {
    if (!fault.empty()) throw Refused(fault);
}

struct Op : CustomOp {
    const Definition* definition;
    bool on_gpu;
    DType stream;  // of its ports of activations
    std::string type_name;
};

struct Release {
    void operator()(Allocator* allocator) const { release_allocator(api, allocator); }
};

struct Node {
    const Definition* definition;
    Attributes attributes;
    std::unique_ptr<CpuKernel> kernel;              // none on a GPU, where nothing outlives a call
    std::unique_ptr<Allocator, Release> allocator;  // of the GPU's memory, where the op's plans can use some
};

// Memory of a node's stream while the node is enqueued: whoever gets it afterwards is behind the node on that stream. Under
// a CUDA graph it is what ONNX Runtime's own kernels take: the runs before the capture have made it.
class Scratch {
  public:
    Scratch(const KernelContext* context, Allocator* allocator, size_t bytes) : allocator_(allocator) {
        if (!bytes) return;
        const MemoryInfo* where = nullptr;
        check(allocator_info(api, allocator, &where));
        check(scratch_buffer(api, context, where, bytes, &data_));
    }
    ~Scratch() {
        Status* const failed = data_ ? allocator_free(api, allocator_, data_) : nullptr;
        if (failed) release_status(api, failed);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

  private:
    Allocator* allocator_;
    void* data_ = nullptr;
};

const Op& own(const CustomOp* op) { return *static_cast<const Op*>(op); }
const Definition& of(const CustomOp* op) { return *own(op).definition; }
int type_of(const CustomOp* op, const Port& port) {
    return static_cast<int>(port.dtype == DType::stream ? own(op).stream : port.dtype);
}

// ONNX Runtime answers a question for an attribute of another type as it answers for one that is not there.
void refuse_another_type(const KernelInfo* info, const Attribute& attribute) {
    const bool integer = attribute.type == Attribute::Type::integer;
    const auto there = [](Status* absent) {
        if (absent) release_status(api, absent);
        return !absent;
    };
    float real = 0;
    int64_t whole = 0;
    size_t size = 0;
    if (there(float_attribute(api, info, attribute.name, &real)) ||
        (integer ? there(text_attribute(api, info, attribute.name, nullptr, &size))
                 : there(integer_attribute(api, info, attribute.name, &whole))))
        throw Refused("attribute " + std::string(attribute.name) + " must be " +
                      (integer ? "an integer" : "a text"));
}

Attributes read_attributes(const Definition& definition, const KernelInfo* info) {
    Attributes values = defaults(definition);
    for (const Attribute& attribute : definition.attributes) {
        Status* absent = nullptr;
        if (attribute.type == Attribute::Type::integer) {
            int64_t value = 0;
            absent = integer_attribute(api, info, attribute.name, &value);
            if (!absent) values.integers[attribute.name] = value;
        } else {
            size_t size = 0;
            absent = text_attribute(api, info, attribute.name, nullptr, &size);
            if (!absent && size) {
                std::vector<char> text(size);
                check(text_attribute(api, info, attribute.name, text.data(), &size));
                values.texts[attribute.name] = text.data();
            }
        }
        if (absent) {
            release_status(api, absent);
            refuse_another_type(info, attribute);
        }
    }
    return values;
}

Tensor view(const Value* value, size_t port, const Port& expected, const Attributes& attributes) {
    if (!value) throw Refused("input " + std::to_string(port) + " (" + expected.name + ") is missing");
    ShapeInfo* info = nullptr;
    check(shape_info(api, value, &info));
    const std::unique_ptr<ShapeInfo, void (*)(ShapeInfo*)> owner(
        info, [](ShapeInfo* i) { release_shape_info(api, i); });
    Tensor tensor{};
    size_t rank = 0;
    int type = 0;
    check(dimension_count(api, info, &rank));
    check(element_type(api, info, &type));
    tensor.dtype = dtype_of(expected, attributes);
    if (type != static_cast<int>(tensor.dtype))
        throw Refused("input " + std::string(expected.name) + " has the element type " +
                      std::to_string(type));
    if (rank > kMaxRank) throw Refused("input " + std::string(expected.name) + " has too many dimensions");
    tensor.shape.rank = static_cast<int>(rank);
    check(dimensions(api, info, tensor.shape.dims, rank));
    check(tensor_data(api, value, &tensor.data));
    return tensor;
}

// Shapes of the inputs that are constants of the file: what is wrong with them stops the load.
std::vector<Shape> constant_shapes(const Definition& definition, const Attributes& attributes,
                                   const KernelInfo* info) {
    std::vector<Shape> shapes(definition.inputs.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
        int is_constant = 0;
        const Value* value = nullptr;
        check(constant_input(api, info, i, &is_constant, &value));
        if (is_constant && value)
            shapes[i] = view(value, i, definition.inputs[i], attributes).shape;
        else
            shapes[i].rank = -1;
    }
    return shapes;
}

// "", or what is wrong where an op of one type is given a node of another.
std::string check_type(const Op& op, const Attributes& attributes) {
    if (!has_stream(*op.definition) || attributes.integer(kStreamType.name) == static_cast<int>(op.stream))
        return "";
    return "dtype is " + std::to_string(attributes.integer(kStreamType.name)) +
           ", which is no type of ONNX Runtime's op " + op.type_name + " on this provider";
}

Status* create(const CustomOp* op, const Api*, const KernelInfo* info, void** kernel) {
    const Definition& definition = of(op);
    return guarded(definition.name, [&] {
        auto node = std::make_unique<Node>();
        node->definition = &definition;
        node->attributes = read_attributes(definition, info);
        refuse(check_attributes(definition, node->attributes));
        refuse(check_type(own(op), node->attributes));
        refuse(
            definition.check_shapes(node->attributes, constant_shapes(definition, node->attributes, info)));
        // Kernels are loaded here: the first computation may be one that a CUDA graph captures.
        if (own(op).on_gpu) {
            load_cuda_kernels();
            Allocator* allocator = nullptr;
            if (definition.workspace_cuda) check(provider_allocator(api, info, kDefaultMemory, &allocator));
            node->allocator.reset(allocator);
        } else {
            refuse(check_for_cpu(definition, node->attributes));
            node->kernel = definition.make_cpu(node->attributes, isa_in_use());
        }
        *kernel = node.release();
    });
}

// All tensors are on the GPU, and so is what comes before and after, on this stream. There are no tactics: ONNX Runtime
// times none.
void compute_on_gpu(const Node& node, const KernelContext* context, const std::vector<Tensor>& inputs,
                    const std::vector<Tensor>& outputs) {
    CUstream_st* stream = nullptr;
    check(gpu_stream(api, context, &stream));
    // A scratch buffer without a stream ends the process in ONNX Runtime 1.18, which reads through a null pointer.
    const size_t bytes = stream ? workspace_bytes(*node.definition, node.attributes, inputs, outputs) : 0;
    const Scratch workspace(context, node.allocator.get(), bytes);
    launch_cuda(node.definition->plan_cuda(node.attributes, inputs, outputs, {0, workspace.data()}), stream);
}

Status* compute(void* kernel, KernelContext* context) {
    const Node& node = *static_cast<Node*>(kernel);
    const Definition& definition = *node.definition;
    return guarded(definition.name, [&] {
        size_t count = 0;
        check(input_count(api, context, &count));
        if (count != definition.inputs.size())
            throw Refused("has " + std::to_string(count) + " inputs, expects " +
                          std::to_string(definition.inputs.size()));
        std::vector<Tensor> inputs(count);
        std::vector<Shape> shapes(count);
        for (size_t i = 0; i < count; ++i) {
            const Value* value = nullptr;
            check(input(api, context, i, &value));
            inputs[i] = view(value, i, definition.inputs[i], node.attributes);
            shapes[i] = inputs[i].shape;
        }
        refuse(definition.check_shapes(node.attributes, shapes));
        const std::vector<Shape> results = output_shapes(definition, node.attributes, shapes);
        std::vector<Tensor> outputs(results.size());
        for (size_t i = 0; i < results.size(); ++i) {
            Value* value = nullptr;
            check(output(api, context, i, results[i].dims, static_cast<size_t>(results[i].rank), &value));
            outputs[i] = {dtype_of(definition.outputs[i], node.attributes), results[i], nullptr};
            check(tensor_data(api, value, &outputs[i].data));
        }
        if (!node.kernel) return compute_on_gpu(node, context, inputs, outputs);
        const Parallel pool{
            [](void* of, size_t tasks, void (*task)(void*, size_t), void* user) {
                check(parallel_for(api, static_cast<const KernelContext*>(of), task, tasks, 0, user));
            },
            context};
        node.kernel->run(inputs.data(), outputs.data(), pool);
    });
}

Op make(const Definition& definition, bool on_gpu, DType stream) {
    Op op{};
    op.definition = &definition;
    op.on_gpu = on_gpu;
    op.stream = stream;
    op.type_name = std::string(definition.name) + (stream == DType::f16 ? "Float16" : "");
    op.name = [](const CustomOp* o) { return own(o).type_name.c_str(); };
    op.execution_provider = [](const CustomOp* o) {
        return own(o).on_gpu ? "CUDAExecutionProvider" : "CPUExecutionProvider";
    };
    op.input_type = [](const CustomOp* o, size_t i) { return type_of(o, of(o).inputs[i]); };
    op.input_type_count = [](const CustomOp* o) { return of(o).inputs.size(); };
    op.output_type = [](const CustomOp* o, size_t i) { return type_of(o, of(o).outputs[i]); };
    op.output_type_count = [](const CustomOp* o) { return of(o).outputs.size(); };
    op.kernel_destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    op.input_characteristic = op.output_characteristic =
        op.input_memory_type = [](const CustomOp*, size_t) { return 0; };
    op.variadic_input_min_arity = op.variadic_input_homogeneity = [](const CustomOp*) { return 0; };
    op.variadic_output_min_arity = op.variadic_output_homogeneity = [](const CustomOp*) { return 0; };
    op.create_kernel_v2 = create;
    op.kernel_compute_v2 = compute;
    op.start_version = [](const CustomOp* o) { return of(o).version; };
    op.end_version = [](const CustomOp*) { return INT_MAX; };
    return op;
}

// Ops and domain outlive every session: they are made once and never freed.
CustomOpDomain* domain() {
    static CustomOpDomain* whole = nullptr;
    if (!whole) {
        CustomOpDomain* made = nullptr;
        check(create_domain(api, "dit2deploy", &made));
        auto* ops = new std::vector<Op>();
        // Of one name, they may differ in their provider and types alone; where a session has no CUDA provider, those
        // for it are never made. Those of halves have a name of their own: ONNX Runtime tells the type of an output by the
        // types of the inputs, of which a GEMM without residual has no half.
        for (const Definition& definition : definitions()) {
            for (const bool on_gpu : {false, true}) ops->push_back(make(definition, on_gpu, DType::f32));
            if (has_stream(definition)) ops->push_back(make(definition, true, DType::f16));
        }
        for (const Op& op : *ops) check(add_op(api, made, &op));
        whole = made;
    }
    return whole;
}

}  // namespace
}  // namespace d2d::ort

extern "C" __attribute__((visibility("default"))) d2d::ort::Status* RegisterCustomOps(
    d2d::ort::SessionOptions* options, const d2d::ort::ApiBase* base) {
    using namespace d2d::ort;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const Api* const found = base->get(kApiVersion);
    if (!found || (api && api != found)) {
        char text[256];
        std::snprintf(text, sizeof text, "dit2deploy %s, found ONNX Runtime %s",
                      found ? "serves one ONNX Runtime a process: this is a second one"
                            : "needs ONNX Runtime 1.18 or newer",
                      base->version());
        return create_status(found ? found : base->get(1), kFail, text);
    }
    api = found;
    return guarded("dit2deploy", [&] {
        d2d::isa_in_use();  // a wrong DIT2DEPLOY_CPU is told here, once
        check(add_domain(api, options, domain()));
    });
}
