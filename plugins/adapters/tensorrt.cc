// TensorRT and TensorRT-RTX: every Definition of the list as a plugin of namespace "dit2deploy"; no line per
// op.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef D2D_TENSORRT_SDK
#include "NvInferRuntime.h"
#else
#include "tensorrt.h"
#endif
#include "cuda_choice.h"
#include "cuda_driver.h"
#include "op.h"
#include "tensorrt_log.h"

namespace d2d::trt {
namespace {

using namespace nvinfer1;

constexpr const char* kNamespace = "dit2deploy";

// Nothing may be thrown across: the body runs in here; 0 is success, 1 a fault that was told. `who`: op and layer.
template <class F>
int32_t guarded(const std::string& who, F&& body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        tell(who.c_str(), error.what());
    } catch (...) {
        tell(who.c_str(), "unknown exception");
    }
    return 1;
}

void refuse(const std::string& fault) {
    if (!fault.empty()) throw std::invalid_argument(fault);
}

DataType type_of(DType dtype) {
    switch (dtype) {
        case DType::i8: return DataType::kINT8;
        case DType::i32: return DataType::kINT32;
        case DType::f16: return DataType::kHALF;
        case DType::bf16: return DataType::kBF16;
        default: return DataType::kFLOAT;
    }
}

PluginFieldType field_type(const Attribute& attribute) {
    return attribute.type == Attribute::Type::integer ? PluginFieldType::kINT32 : PluginFieldType::kCHAR;
}

Shape shape_of(const Dims& dims) {
    Shape shape;
    shape.rank = dims.nbDims;
    for (int i = 0; i < dims.nbDims; ++i) shape.dims[i] = dims.d[i];
    return shape;
}

// -1 where a dimension is not known while the network is made.
Shape shape_of(const DimsExprs& dims) {
    Shape shape;
    shape.rank = dims.nbDims;
    for (int i = 0; i < dims.nbDims; ++i)
        shape.dims[i] = dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1;
    return shape;
}

// Fields by name, in any order; those that are no attribute of the op are TensorRT's business.
Attributes read(const Definition& definition, const PluginFieldCollection* fields) {
    Attributes values = defaults(definition);
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        for (const Attribute& attribute : definition.attributes) {
            if (!field.name || std::strcmp(field.name, attribute.name)) continue;
            if (field.type != field_type(attribute) || !field.data || field.length < 1)
                throw std::invalid_argument(std::string("attribute ") + attribute.name + " has a wrong type");
            if (attribute.type == Attribute::Type::integer) {
                if (field.length != 1)
                    throw std::invalid_argument(std::string(attribute.name) + " must be one integer");
                values.integers[attribute.name] = *static_cast<const int32_t*>(field.data);
            } else {
                // ONNX strings arrive with their terminating zero counted.
                const char* text = static_cast<const char*>(field.data);
                values.texts[attribute.name] =
                    std::string(text, strnlen(text, static_cast<size_t>(field.length)));
            }
        }
    }
    return values;
}

class Plugin : public IPluginV3,
               public IPluginV3OneCore,
               public IPluginV3OneBuild,
               public IPluginV3OneRuntime {
  public:
    // `kernels`: those that tactics choose among, as far as they are not always the same; `who`: what its faults are told of.
    Plugin(const Definition& definition, Attributes attributes, std::string kernels, std::string who)
        : definition_(definition),
          who_(std::move(who)),
          attributes_(std::move(attributes)),
          kernels_(std::move(kernels)),
          timing_id_("kernels=" + kernels_ + ";") {
        for (const Attribute& attribute : definition_.attributes) {
            if (attribute.type == Attribute::Type::integer)
                integers_.push_back(static_cast<int32_t>(attributes_.integer(attribute.name)));
            timing_id_ += std::string(attribute.name) + "=" +
                          (attribute.type == Attribute::Type::integer
                               ? std::to_string(attributes_.integer(attribute.name))
                               : attributes_.text(attribute.name)) +
                          ";";
        }
        // Pointers into this very object: a clone makes its own.
        size_t next = 0;
        for (const Attribute& attribute : definition_.attributes) {
            if (attribute.type == Attribute::Type::integer) {
                fields_.emplace_back(attribute.name, &integers_[next++], PluginFieldType::kINT32, 1);
            } else {
                const std::string& text = attributes_.text(attribute.name);
                fields_.emplace_back(attribute.name, text.c_str(), PluginFieldType::kCHAR,
                                     static_cast<int32_t>(text.size() + 1));
            }
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    Plugin(const Plugin&) = delete;
    Plugin& operator=(const Plugin&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        }
        return nullptr;
    }

    // TensorRT dereferences what comes back without a look, so running out of memory here ends the process
    // either way.
    IPluginV3* clone() noexcept override {
        auto* made = new Plugin(definition_, attributes_, kernels_, who_);
        made->tactic_ = tactic_;
        made->valid_tactics_ = valid_tactics_;
        return made;
    }

    const char* getPluginName() const noexcept override { return definition_.name; }
    const char* getPluginVersion() const noexcept override { return version_.c_str(); }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                            int32_t) noexcept override {
        return guarded(who_, [&] {
            std::vector<Shape> least, most;
            for (int32_t i = 0; i < inputs; ++i) {
                least.push_back(shape_of(in[i].min));
                most.push_back(shape_of(in[i].max));
            }
            check_count(inputs);
            refuse(definition_.check_shapes(attributes_, least));
            refuse(definition_.check_shapes(attributes_, most));
            // What the kernels cannot do is told while the engine is built, not when it first runs.
            const Planned largest(*this, in, inputs, &DynamicPluginTensorDesc::max);
            definition_.plan_cuda(attributes_, largest.from, largest.to, {});
            // TensorRT times tactics at the shapes that the profile was made for, and gives the fastest one all shapes.
            const Planned usual(*this, in, inputs, &DynamicPluginTensorDesc::opt);
            valid_tactics_.clear();
            for (int32_t tactic = 1; tactic <= static_cast<int32_t>(definition_.tactics.size()); ++tactic)
                if (definition_.takes_tactic(attributes_, usual.from, usual.to, tactic))
                    valid_tactics_.push_back(tactic);
        });
    }

    // Of the profile that was configured last. None: TensorRT takes tactic 0.
    int32_t getNbTactics() noexcept override { return static_cast<int32_t>(valid_tactics_.size()); }

    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
        return guarded(who_, [&] {
            if (static_cast<size_t>(count) != valid_tactics_.size())
                throw std::invalid_argument("has " + std::to_string(valid_tactics_.size()) +
                                            " tactics, was asked for " + std::to_string(count));
            if (count && !tactics) throw std::invalid_argument("there is no room for the tactics");
            std::copy(valid_tactics_.begin(), valid_tactics_.end(), tactics);
        });
    }

    // Before it times a tactic, and of an engine's plugins the one that it chose, which it keeps in the engine itself.
    int32_t setTactic(int32_t tactic) noexcept override {
        return guarded(who_, [&] {
            refuse(check_tactic(definition_, tactic));
            tactic_ = tactic;
        });
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                            int32_t) const noexcept override {
        size_t bytes = 0;
        guarded(who_, [&] {
            check_count(inputs);
            const Planned largest(*this, in, inputs, &DynamicPluginTensorDesc::max);
            bytes = workspace_bytes(definition_, attributes_, largest.from, largest.to);
        });
        return bytes;
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType* given,
                               int32_t inputs) const noexcept override {
        return guarded(who_, [&] {
            check_count(inputs);
            for (int32_t i = 0; i < inputs; ++i)
                if (given[i] != type_of(dtype_of(definition_.inputs[i], attributes_)))
                    throw std::invalid_argument(std::string("input ") + definition_.inputs[i].name +
                                                " has a wrong type");
            for (int32_t i = 0; i < outputs; ++i)
                types[i] = type_of(dtype_of(definition_.outputs[i], attributes_));
        });
    }

    int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                            int32_t outputs, IExprBuilder& builder) noexcept override {
        return guarded(who_, [&] {
            check_count(inputs);
            std::vector<Shape> known;
            for (int32_t i = 0; i < inputs; ++i) known.push_back(shape_of(in[i]));
            refuse(definition_.check_shapes(attributes_, known));
            for (int32_t i = 0; i < outputs; ++i) {
                const OutputRule& rule = definition_.shapes[i];
                out[i] = in[rule.like];
                const IDimensionExpr*& last = out[i].d[out[i].nbDims - 1];
                if (rule.last_input >= 0)
                    last = in[rule.last_input].d[rule.last_dim];
                else if (rule.last_dim != kKeepLast)
                    last = builder.constant(rule.last_dim);
                // Packed codes have a number of columns that is known: check_shapes says so.
                if (rule.is_codes && is_packed(attributes_))
                    last = builder.constant(last->getConstantValue() / 2);
            }
        });
    }

    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                   int32_t) noexcept override {
        const std::vector<Port>& ports = position < inputs ? definition_.inputs : definition_.outputs;
        const size_t index = static_cast<size_t>(position < inputs ? position : position - inputs);
        const PluginTensorDesc& tensor = tensors[position].desc;
        return index < ports.size() && tensor.format == TensorFormat::kLINEAR &&
               tensor.type == type_of(dtype_of(ports[index], attributes_));
    }

    int32_t getNbOutputs() const noexcept override {
        return static_cast<int32_t>(definition_.outputs.size());
    }
    const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

    int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*,
                          int32_t) noexcept override {
        return guarded(who_, [&] {
            check_count(inputs);
            std::vector<Shape> shapes;
            for (int32_t i = 0; i < inputs; ++i) shapes.push_back(shape_of(in[i].dims));
            refuse(definition_.check_shapes(attributes_, shapes));
            load_cuda_kernels();  // not in the first enqueue: that may run while a CUDA graph is captured
        });
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return guarded(who_, [&] {
            std::vector<Tensor> from, to;
            for (size_t i = 0; i < definition_.inputs.size(); ++i)
                from.push_back({dtype_of(definition_.inputs[i], attributes_), shape_of(in[i].dims),
                                const_cast<void*>(inputs[i])});
            for (size_t i = 0; i < definition_.outputs.size(); ++i)
                to.push_back(
                    {dtype_of(definition_.outputs[i], attributes_), shape_of(out[i].dims), outputs[i]});
            launch_cuda(definition_.plan_cuda(attributes_, from, to, {tactic_, workspace}), stream);
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    // Never null: TensorRT would write an engine without attributes and say nothing.
    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

  private:
    // The tensors of a node by the shapes of a profile, which lie nowhere yet.
    struct Planned {
        std::vector<Tensor> from, to;

        Planned(const Plugin& plugin, const DynamicPluginTensorDesc* in, int32_t inputs,
                Dims DynamicPluginTensorDesc::* which) {
            std::vector<Shape> shapes;
            for (int32_t i = 0; i < inputs; ++i) shapes.push_back(shape_of(in[i].*which));
            const std::vector<Shape> results = output_shapes(plugin.definition_, plugin.attributes_, shapes);
            for (size_t i = 0; i < shapes.size(); ++i)
                from.push_back(
                    {dtype_of(plugin.definition_.inputs[i], plugin.attributes_), shapes[i], nullptr});
            for (size_t i = 0; i < results.size(); ++i)
                to.push_back(
                    {dtype_of(plugin.definition_.outputs[i], plugin.attributes_), results[i], nullptr});
        }
    };

    void check_count(int32_t inputs) const {
        if (static_cast<size_t>(inputs) != definition_.inputs.size())
            throw std::invalid_argument("expects " + std::to_string(definition_.inputs.size()) +
                                        " inputs, got " + std::to_string(inputs));
    }

    const Definition& definition_;
    const std::string who_;
    const Attributes attributes_;
    const std::string version_ = std::to_string(definition_.version);
    std::vector<int32_t> integers_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
    const std::string kernels_;
    std::string timing_id_;
    int tactic_ = 0;
    std::vector<int32_t> valid_tactics_;
};

class Creator : public IPluginCreatorV3One {
  public:
    explicit Creator(const Definition& definition) : definition_(definition) {
        for (const Attribute& attribute : definition.attributes)
            fields_.emplace_back(attribute.name, nullptr, field_type(attribute), 1);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    // `layer`: the name of the node, which is what a fault is to be found by.
    IPluginV3* createPlugin(const char* layer, const PluginFieldCollection* fields,
                            TensorRTPhase) noexcept override {
        std::unique_ptr<Plugin> plugin;
        const std::string who = std::string(definition_.name) + " " + (layer ? layer : "");
        guarded(who, [&] {
            Attributes attributes = read(definition_, fields);
            refuse(check_attributes(definition_, attributes));
            plugin = std::make_unique<Plugin>(definition_, std::move(attributes),
                                              wgmma_is_asked_for() ? "wgmma" : "mma", who);
        });
        return plugin.release();
    }

    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return definition_.name; }
    const char* getPluginVersion() const noexcept override { return version_.c_str(); }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const Definition& definition_;
    const std::string version_ = std::to_string(definition_.version);
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace d2d::trt

// Both symbols are what IPluginRegistry::loadLibrary looks for.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
    // Made once, never freed: the registry keeps the pointers as long as the process lives.
    static const auto* creators = [] {
        auto* list = new std::vector<nvinfer1::IPluginCreatorInterface*>();
        for (const d2d::Definition& definition : d2d::definitions())
            list->push_back(new d2d::trt::Creator(definition));
        return list;
    }();
    count = static_cast<int32_t>(creators->size());
    return creators->data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    d2d::trt::find_logger_by(finder);
}
