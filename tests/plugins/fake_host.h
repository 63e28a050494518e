// What fake_host.cc drives the plugins with: shapes, expressions of dimensions,
// fields; CHECK.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tensorrt.h"

using namespace nvinfer1;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::printf("line %d, %s: %s\n", __LINE__, current, #condition);         \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)

namespace {

const char *current = "start"; // the plugin looked at

struct Dimension : apiv::VDimensionExpr {
  int64_t value;
  explicit Dimension(int64_t v) : value(v) {}
  bool isConstant() const override { return value >= 0; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
};

// -1: not known while the network is made.
struct Expression : IDimensionExpr {
  Dimension dimension;
  explicit Expression(int64_t value) : dimension(value) { mImpl = &dimension; }
  ~Expression() noexcept override = default;
};

struct Builder : IExprBuilder {
  struct Implementation : apiv::VExprBuilder {
    std::vector<std::unique_ptr<Expression>> made;
    IDimensionExpr const *constant(int64_t value) override {
      made.push_back(std::make_unique<Expression>(value));
      return made.back().get();
    }
    IDimensionExpr const *operation(DimensionOperation, IDimensionExpr const &,
                                    IDimensionExpr const &) override {
      return nullptr;
    }
    IDimensionExpr const *declareSizeTensor(int32_t, IDimensionExpr const &,
                                            IDimensionExpr const &) override {
      return nullptr;
    }
  } implementation;
  Builder() { mImpl = &implementation; }
  ~Builder() noexcept override = default;
};

using Shape = std::vector<int64_t>;

DimsExprs expressions(Builder &builder, const Shape &shape) {
  DimsExprs dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i)
    dims.d[i] = builder.implementation.constant(shape[i]);
  return dims;
}

Dims dims_of(const Shape &shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i)
    dims.d[i] = shape[i];
  return dims;
}

PluginTensorDesc tensor(const Shape &shape, DataType type,
                        TensorFormat format = TensorFormat::kLINEAR) {
  return {dims_of(shape), type, format, 1.0f};
}

IPluginCreatorV3One *creator_of(IPluginCreatorInterface *const *all,
                                int32_t count, const std::string &name) {
  for (int32_t i = 0; i < count; ++i) {
    auto *creator = static_cast<IPluginCreatorV3One *>(all[i]);
    if (name == creator->getPluginName())
      return creator;
  }
  return nullptr;
}

template <class T> T *capability(IPluginV3 &plugin, PluginCapabilityType type) {
  return static_cast<T *>(plugin.getCapabilityInterface(type));
}

IPluginV3OneBuild &build_of(IPluginV3 &plugin) {
  return *capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime &runtime_of(IPluginV3 &plugin) {
  return *capability<IPluginV3OneRuntime>(plugin,
                                          PluginCapabilityType::kRUNTIME);
}

using Fields = std::vector<PluginField>;

std::unique_ptr<IPluginV3> create(IPluginCreatorV3One &creator,
                                  const Fields &fields) {
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                         fields.data()};
  return std::unique_ptr<IPluginV3>(
      creator.createPlugin("node", &collection, TensorRTPhase::kBUILD));
}

std::map<std::string, std::string> values(const PluginFieldCollection *fields) {
  std::map<std::string, std::string> found;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField &field = fields->fields[i];
    const auto *data = static_cast<const char *>(field.data);
    const bool integer = field.type == PluginFieldType::kINT32;
    found[field.name] =
        integer ? std::to_string(*static_cast<const int32_t *>(field.data))
                : std::string(data, strnlen(data, field.length));
  }
  return found;
}

} // namespace
