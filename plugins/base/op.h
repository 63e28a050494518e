// What an op is: ports, attributes, shape rule and kernels, as one value that every adapter reads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu_features.h"

namespace d2d {

// The numbers of ONNX's TensorProto.DataType; `stream`, of a port alone: activations, of the type that the node's
// attribute `dtype` says.
enum class DType : int32_t { stream = 0, f32 = 1, i8 = 3, i32 = 6, f16 = 10, bf16 = 16 };

inline size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::i8: return 1;
        case DType::f16:
        case DType::bf16: return 2;
        default: return 4;
    }
}

constexpr int kMaxRank = 8;

struct Shape {
    int rank = 0;  // -1: nothing of the shape is known yet
    int64_t dims[kMaxRank] = {};

    int64_t last() const { return rank > 0 ? dims[rank - 1] : 1; }
    // Product of all dimensions but the last: the number of tokens M.
    int64_t rows() const {
        int64_t rows = 1;
        for (int i = 0; i + 1 < rank; ++i) rows *= dims[i];
        return rows;
    }
    int64_t count() const { return rank ? rows() * last() : 1; }
    bool is_known() const {
        for (int i = 0; i < rank; ++i)
            if (dims[i] < 0) return false;
        return rank >= 0;
    }
};

// A dense row-major view; owns nothing.
struct Tensor {
    DType dtype;
    Shape shape;
    void* data;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
    size_t bytes() const { return static_cast<size_t>(shape.count()) * size_of(dtype); }
};

struct Port {
    const char* name;
    DType dtype;
};

struct Attribute {
    enum class Type { integer, text };
    const char* name;
    Type type;
    int64_t integer_default;
    const char* text_default;
};

// Shape of an output: the dims of input `like`, its last dim replaced by dim `last_dim` of input
// `last_input`, or, where last_input < 0, by the constant `last_dim`; last_dim kKeepLast leaves it as it is. Of codes it is
// halved where the node packs them.
struct OutputRule {
    int like;
    int last_input;
    int64_t last_dim;
    bool is_codes = false;
};
constexpr int64_t kKeepLast = -1;

// Attribute values of one node, after defaults.
struct Attributes {
    std::map<std::string, int64_t> integers;
    std::map<std::string, std::string> texts;

    int64_t integer(const char* name) const { return integers.at(name); }
    const std::string& text(const char* name) const { return texts.at(name); }
};

// Hands out `tasks` indices to the runtime's own threads; returns when all are done. An exception of a task
// must not unwind a thread of the runtime: the first one is carried to the caller, the tasks after it are
// skipped.
struct Parallel {
    void (*for_each)(void* pool, size_t tasks, void (*task)(void* user, size_t index), void* user);
    void* pool;

    template <class F>
    void run(size_t tasks, const F& body) const {
        struct State {
            const F& body;
            std::atomic<bool> failed{false};
            std::exception_ptr error{};
        } state{body};
        for_each(
            pool, tasks,
            [](void* user, size_t index) {
                State& state = *static_cast<State*>(user);
                if (state.failed.load(std::memory_order_relaxed)) return;
                try {
                    state.body(index);
                } catch (...) {
                    if (!state.failed.exchange(true)) state.error = std::current_exception();
                }
            },
            &state);
        if (state.error) std::rethrow_exception(state.error);
    }
};

// One node on the CPU. Const after creation: a session may be run by several threads at once.
class CpuKernel {
  public:
    virtual ~CpuKernel() = default;
    virtual void run(const Tensor* inputs, const Tensor* outputs, const Parallel& parallel) const = 0;
};

// One CUDA kernel launch, described by numbers so that the driver API and the host emulator can both do it.
struct CudaLaunch {
    const char* function;  // name in the embedded module
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    std::vector<uint64_t> words;  // kernel parameters, each 8 bytes wide, in order
    bool on_wgmma = false;        // a kernel that 9.0 alone runs
};

// What a runtime brings to a plan beside the tensors.
struct CudaMeans {
    int tactic = 0;             // 0: the op's own rule; else a number of Definition::tactics, from 1
    void* workspace = nullptr;  // null, or of the bytes that Definition::workspace_cuda tells
};

// A kernel parameter as 8 bytes.
inline uint64_t word(int64_t value) { return static_cast<uint64_t>(value); }
inline uint64_t word(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }
inline uint64_t word(const Tensor& tensor) { return word(tensor.data); }
inline uint64_t word(DType dtype) { return static_cast<uint64_t>(dtype); }

struct Definition {
    const char* name;
    int version;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::vector<Attribute> attributes;
    std::vector<OutputRule> shapes;  // one an output

    // Text of what is wrong with attributes, or "" (called when a node is made).
    std::string (*check_attributes)(const Attributes&);
    // Text of what is wrong with the shapes of the inputs, or ""; a dim or a rank of -1 is not known yet.
    std::string (*check_shapes)(const Attributes&, const std::vector<Shape>&);
    // A kernel of the given instruction set; throws std::invalid_argument where there is none.
    std::unique_ptr<CpuKernel> (*make_cpu)(const Attributes&, Isa);
    // The launches that compute one node on the GPU, in order, on one stream. A tactic, or the lack of a workspace, changes
    // no bit of what they compute. Throws std::invalid_argument for what no launch can do.
    std::vector<CudaLaunch> (*plan_cuda)(const Attributes&, const std::vector<Tensor>& inputs,
                                         const std::vector<Tensor>& outputs, const CudaMeans&);

    // What plan_cuda can be asked for where there is a choice, by numbers from 1. Engines and timing caches hold the numbers:
    // names are added at the end, none is ever removed. The first one is the rule again: TensorRT times no 0 beside others,
    // and TensorRT-RTX, which times nothing where it has no GPU, takes the first one that it is offered.
    std::vector<const char*> tactics = {};
    // Whether a tactic is a way to compute a node of these shapes. Nodes of other shapes are computed by the op's rule.
    bool (*takes_tactic)(const Attributes&, const std::vector<Tensor>& inputs,
                         const std::vector<Tensor>& outputs, int tactic) = nullptr;
    // Bytes of workspace that a plan can use for a node of these shapes, by whatever tactic, and for one whose leading
    // dimensions are smaller; null: none.
    size_t (*workspace_cuda)(const Attributes&, const std::vector<Tensor>& inputs,
                             const std::vector<Tensor>& outputs) = nullptr;
};

// Text of what is wrong with a tactic's number, or "".
inline std::string check_tactic(const Definition& definition, int tactic) {
    const size_t known = definition.tactics.size();
    if (tactic >= 0 && static_cast<size_t>(tactic) <= known) return "";
    return "there is no tactic " + std::to_string(tactic) + ": known are 0, the op's rule, " +
           (known ? "and 1 to " + std::to_string(known) : "alone");
}

// As Definition::workspace_cuda says.
inline size_t workspace_bytes(const Definition& definition, const Attributes& attributes,
                              const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
    return definition.workspace_cuda ? definition.workspace_cuda(attributes, inputs, outputs) : 0;
}

// THE list (plugins/ops/ops.cc).
const std::vector<Definition>& definitions();

// The attribute that ops with ports of activations have: their type.
constexpr Attribute kStreamType{"dtype", Attribute::Type::integer, static_cast<int64_t>(DType::f32), nullptr};

// The attribute of ops that give or take codes of activations: 1 where two of them, of 4 bits each, share a byte. Of each run
// of 64 k's, byte i (0 .. 31) holds the code of k = i in its low half and that of k = i + 32 in its high one
// (dit2deploy/ops/packed_codes.py): so the tensor cores' fragments of layout 2 (fragments.h) meet them as they lie.
constexpr Attribute kPacked{"packed", Attribute::Type::integer, 0, nullptr};
constexpr int64_t kPackedRun = 64;

inline bool has_attribute(const Definition& definition, const char* name) {
    for (const Attribute& attribute : definition.attributes)
        if (!std::strcmp(attribute.name, name)) return true;
    return false;
}

inline bool has_stream(const Definition& definition) { return has_attribute(definition, kStreamType.name); }

inline bool is_packed(const Attributes& attributes) {
    const auto found = attributes.integers.find(kPacked.name);
    return found != attributes.integers.end() && found->second;
}

// Text of what is wrong with rows of k packed codes, or "".
inline std::string check_packed_columns(int64_t k) {
    if (k > 0 && k % kPackedRun == 0) return "";
    return "packed codes lie in runs of 64 columns: their number must be known and a multiple of it, got " +
           std::to_string(k);
}

// Of the elements of a port of a node.
inline DType dtype_of(const Port& port, const Attributes& attributes) {
    return port.dtype == DType::stream ? static_cast<DType>(attributes.integer(kStreamType.name))
                                       : port.dtype;
}

// Text of what is wrong with a node's attributes, or "".
inline std::string check_attributes(const Definition& definition, const Attributes& attributes) {
    if (has_stream(definition)) {
        const int64_t dtype = attributes.integer(kStreamType.name);
        const auto known = static_cast<DType>(dtype);
        if (known != DType::f32 && known != DType::f16 && known != DType::bf16)
            return "dtype must be 1 (float32), 10 (float16) or 16 (bfloat16), got " + std::to_string(dtype);
    }
    if (has_attribute(definition, kPacked.name)) {
        const int64_t packed = attributes.integer(kPacked.name);
        if (packed != 0 && packed != 1)
            return "packed must be 0 (a code a byte) or 1 (two codes a byte), got " + std::to_string(packed);
    }
    return definition.check_attributes(attributes);
}

// Text of what no CPU kernel computes in a node whose attributes are sound, or "".
inline std::string check_for_cpu(const Definition& definition, const Attributes& attributes) {
    if (has_stream(definition) && attributes.integer(kStreamType.name) != static_cast<int64_t>(DType::f32))
        return "the CPU kernels take float32 (dtype 1), this node is of dtype " +
               std::to_string(attributes.integer(kStreamType.name));
    if (is_packed(attributes)) return "the CPU kernels take a code a byte (packed 0), this node packs two";
    return "";
}

// Dims of the outputs by the rules; a dim of -1 is not known yet.
inline std::vector<Shape> output_shapes(const Definition& definition, const Attributes& attributes,
                                        const std::vector<Shape>& inputs) {
    std::vector<Shape> shapes;
    for (const OutputRule& rule : definition.shapes) {
        Shape shape = inputs[rule.like];
        int64_t& last = shape.dims[shape.rank - 1];
        if (rule.last_input >= 0)
            last = inputs[rule.last_input].dims[rule.last_dim];
        else if (rule.last_dim != kKeepLast)
            last = rule.last_dim;
        if (rule.is_codes && is_packed(attributes)) last /= 2;
        shapes.push_back(shape);
    }
    return shapes;
}

// What is wrong with a port that holds rows as long as those of `tensor`, R in all, one for each run of M / R of its rows
// (one a sample, one for all), or "".
inline std::string check_sample_rows(const std::string& name, const Shape& rows, const std::string& tensor,
                                     const Shape& shape) {
    if (rows.rank == 0) return name + " must have at least one dimension";
    if (!rows.is_known() || !shape.is_known()) return "";
    if (rows.last() != shape.last())
        return name + " must have the " + std::to_string(shape.last()) + " columns of " + tensor;
    if (shape.rows() > 0 && (rows.rows() < 1 || shape.rows() % rows.rows()))
        return name + " has " + std::to_string(rows.rows()) + " rows, which do not divide the " +
               std::to_string(shape.rows()) + " rows of " + tensor;
    return "";
}

// Attribute values before a node's own are read.
inline Attributes defaults(const Definition& definition) {
    Attributes values;
    for (const Attribute& attribute : definition.attributes) {
        if (attribute.type == Attribute::Type::integer)
            values.integers[attribute.name] = attribute.integer_default;
        else
            values.texts[attribute.name] = attribute.text_default;
    }
    return values;
}

}  // namespace d2d
