// A host that drives the plugins as TensorRT does, without TensorRT: prints the
// creators, exits with the first fault.
//
//   fake_host LIBRARY       or, compiled together with the adapter and
//   -DLINKED: fake_host
#include <dlfcn.h>

#include <algorithm>
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

// Originals are deleted as soon as they are cloned, and engines make plugins
// from what others serialized.
void lives_on_after_its_original(IPluginCreatorV3One &creator,
                                 const Fields &fields) {
  std::unique_ptr<IPluginV3> original = create(creator, fields);
  CHECK(original);
  const auto expected = values(runtime_of(*original).getFieldsToSerialize());
  std::unique_ptr<IPluginV3> clone(original->clone());
  original.reset();
  std::vector<std::unique_ptr<char[]>> rubbish;
  for (int i = 0; i < 64; ++i) {
    rubbish.emplace_back(new char[200]);
    std::memset(rubbish.back().get(), 0x5A, 200);
  }
  CHECK(values(runtime_of(*clone).getFieldsToSerialize()) == expected);
  const auto *core =
      capability<IPluginV3OneCore>(*clone, PluginCapabilityType::kCORE);
  CHECK(std::string(core->getPluginName()) == creator.getPluginName());
  CHECK(std::string(core->getPluginVersion()) == "1" &&
        std::string(core->getPluginNamespace()) == "dit2deploy");
  const std::string timing = build_of(*clone).getTimingCacheID();
  for (const auto &[name, value] : expected)
    CHECK(timing.find(name + "=" + value) != std::string::npos);

  const PluginFieldCollection *written =
      runtime_of(*clone).getFieldsToSerialize();
  Fields turned(written->fields, written->fields + written->nbFields);
  std::reverse(turned.begin(), turned.end());
  const PluginFieldCollection reversed{written->nbFields, turned.data()};
  std::unique_ptr<IPluginV3> again(
      creator.createPlugin("node", &reversed, TensorRTPhase::kRUNTIME));
  clone.reset();
  CHECK(again && values(runtime_of(*again).getFieldsToSerialize()) == expected);
  std::unique_ptr<IPluginV3> attached(
      runtime_of(*again).attachToContext(nullptr));
  CHECK(attached && attached != again);
  again.reset();
  CHECK(values(runtime_of(*attached).getFieldsToSerialize()) == expected);
}

void refuses_bad_attributes(IPluginCreatorV3One &hadamard,
                            IPluginCreatorV3One &gemm) {
  const int32_t three = 3, nine = 9, one = 1;
  const float real = 16.0f;
  using Type = PluginFieldType;
  CHECK(!create(hadamard, {{"block", &three, Type::kINT32, 1}}));
  CHECK(!create(hadamard, {{"block", &real, Type::kFLOAT32, 1}}));
  CHECK(!create(hadamard, {{"block", &one, Type::kINT32, 2}}));
  CHECK(!create(hadamard, {{"block", nullptr, Type::kINT32, 1}}));
  CHECK(!create(hadamard, {{"clip", "middle", Type::kCHAR, 7}}));
  CHECK(!create(hadamard, {{"clip", &one, Type::kINT32, 1}}));
  CHECK(!create(hadamard, {{"grid", "odd", Type::kCHAR, 3}}));
  CHECK(!create(gemm, {{"bits", &nine, Type::kINT32, 1}}));
  CHECK(!create(gemm, {{"layout", &three, Type::kINT32, 1}}));
  CHECK(!create(gemm, {{"dtype", &three, Type::kINT32, 1}}));
  CHECK(create(gemm, {{"something", &nine, Type::kINT32, 1},
                      {nullptr, nullptr, Type::kUNKNOWN, 0}}));
  std::unique_ptr<IPluginV3> bare(
      hadamard.createPlugin("node", nullptr, TensorRTPhase::kBUILD));
  CHECK(bare);
  auto written = values(runtime_of(*bare).getFieldsToSerialize());
  CHECK(written["clip"] == "absmax" && written["grid"] == "mid-tread");
}

void shapes_and_types_of_hadamard_quantize(IPluginV3 &plugin) {
  Builder builder;
  IPluginV3OneBuild &build = build_of(plugin);
  DimsExprs in[] = {expressions(builder, {-1, 5, 48}),
                    expressions(builder, {1})},
            out[2]{};
  CHECK(build.getNbOutputs() == 2);
  CHECK(build.getOutputShapes(in, 2, nullptr, 0, out, 2, builder) == 0);
  CHECK(out[0].nbDims == 3 && out[1].nbDims == 3);
  for (int i = 0; i < 3; ++i)
    CHECK(out[0].d[i] == in[0].d[i]);
  CHECK(out[1].d[0] == in[0].d[0] && out[1].d[1] == in[0].d[1]);
  CHECK(out[1].d[2]->isConstant() && out[1].d[2]->getConstantValue() == 1);
  CHECK(build.getOutputShapes(in, 1, nullptr, 0, out, 2, builder) != 0);
  in[0] = expressions(builder, {-1, 5, 40}); // 16 does not divide 40
  CHECK(build.getOutputShapes(in, 2, nullptr, 0, out, 2, builder) != 0);

  const DataType good[] = {DataType::kFLOAT, DataType::kFLOAT},
                 bad[] = {DataType::kHALF, DataType::kFLOAT};
  DataType types[2];
  CHECK(build.getOutputDataTypes(types, 2, good, 2) == 0);
  CHECK(types[0] == DataType::kINT8 && types[1] == DataType::kFLOAT);
  CHECK(build.getOutputDataTypes(types, 2, bad, 2) != 0);
}

void shapes_of_ternary_gemm(IPluginV3 &plugin) {
  Builder builder;
  IPluginV3OneBuild &build = build_of(plugin);
  DimsExprs in[] = {expressions(builder, {-1, 5, 48}),
                    expressions(builder, {-1, 5, 1}),
                    expressions(builder, {40, 3}),
                    expressions(builder, {40, 1}), expressions(builder, {40})};
  DimsExprs out[1]{};
  CHECK(build.getNbOutputs() == 1);
  CHECK(build.getOutputShapes(in, 5, nullptr, 0, out, 1, builder) == 0);
  CHECK(out[0].nbDims == 3 && out[0].d[0] == in[0].d[0] &&
        out[0].d[1] == in[0].d[1] && out[0].d[2] == in[3].d[0]);
  in[2] = expressions(builder, {40, 4});
  CHECK(build.getOutputShapes(in, 5, nullptr, 0, out, 1, builder) != 0);
}

// Of x, as its attribute `dtype` says; all else keeps its type.
void formats_of_hadamard_quantize(IPluginV3 &plugin, DataType of_x) {
  IPluginV3OneBuild &build = build_of(plugin);
  const DataType types[] = {of_x, DataType::kFLOAT, DataType::kINT8,
                            DataType::kFLOAT};
  for (int32_t position = 0; position < 4; ++position)
    for (int32_t format = 0; format <= 12; ++format)
      for (int32_t type = 0; type <= 9; ++type) {
        DynamicPluginTensorDesc tensors[4]{};
        tensors[position].desc = tensor({1, 5, 48}, static_cast<DataType>(type),
                                        static_cast<TensorFormat>(format));
        const bool right =
            format == 0 && static_cast<DataType>(type) == types[position];
        CHECK(build.supportsFormatCombination(position, tensors, 2, 2) ==
              right);
      }
}

// Of activations: y, residual and gate.
void types_of_gated_gemm(IPluginV3 &plugin, DataType half) {
  IPluginV3OneBuild &build = build_of(plugin);
  const DataType single = DataType::kFLOAT;
  DataType given[] =
      {DataType::kINT8, single, DataType::kINT32, single, single, half, half},
           type = single;
  CHECK(build.getOutputDataTypes(&type, 1, given, 7) == 0 && type == half);
  given[6] = single;
  CHECK(build.getOutputDataTypes(&type, 1, given, 7) != 0);
}

void configures_within_a_profile(IPluginV3 &plugin) {
  IPluginV3OneBuild &build = build_of(plugin);
  DynamicPluginTensorDesc in[2]{};
  in[0] = {tensor({-1, 5, 48}, DataType::kFLOAT), dims_of({1, 5, 48}),
           dims_of({16, 5, 48}), dims_of({2, 5, 48})};
  in[1] = {tensor({1}, DataType::kFLOAT), dims_of({1}), dims_of({1}),
           dims_of({1})};
  CHECK(build.configurePlugin(in, 2, nullptr, 2) == 0);
  CHECK(build.configurePlugin(in, 1, nullptr, 2) != 0);
  in[0].max = dims_of({16, 5, 40});
  CHECK(build.configurePlugin(in, 2, nullptr, 2) != 0);
  CHECK(build.getWorkspaceSize(nullptr, 0, nullptr, 0) == 0);
}

// No driver, or no context that is current: an error either way.
void fails_softly_without_a_gpu(IPluginV3 &plugin) {
  IPluginV3OneRuntime &runtime = runtime_of(plugin);
  std::vector<float> x(2 * 5 * 48), qmax{7.0f}, s(2 * 5);
  std::vector<int8_t> q(x.size());
  const PluginTensorDesc in[] = {tensor({2, 5, 48}, DataType::kFLOAT),
                                 tensor({1}, DataType::kFLOAT)};
  const PluginTensorDesc out[] = {tensor({2, 5, 48}, DataType::kINT8),
                                  tensor({2, 5, 1}, DataType::kFLOAT)};
  const void *inputs[] = {x.data(), qmax.data()};
  void *outputs[] = {q.data(), s.data()};
  CHECK(runtime.onShapeChange(in, 1, out, 2) != 0);
  CHECK(runtime.onShapeChange(in, 2, out, 2) != 0);
  CHECK(runtime.enqueue(in, out, inputs, outputs, nullptr, nullptr) != 0);
}

} // namespace

#ifdef LINKED
extern "C" IPluginCreatorInterface *const *getCreators(int32_t &count);
extern "C" void setLoggerFinder(ILoggerFinder *);
#endif

int main(int argc, char **argv) {
#ifdef LINKED
  CHECK(argc == 1 && argv);
#else
  CHECK(argc == 2);
  void *library = dlopen(argv[1], RTLD_NOW);
  if (!library)
    std::printf("%s\n", dlerror());
  CHECK(library);
  auto getCreators =
      reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(
          dlsym(library, "getCreators"));
  auto setLoggerFinder = reinterpret_cast<void (*)(ILoggerFinder *)>(
      dlsym(library, "setLoggerFinder"));
  CHECK(getCreators && setLoggerFinder);
#endif
  setLoggerFinder(nullptr);
  int32_t count = 0;
  IPluginCreatorInterface *const *all = getCreators(count);
  const int32_t number = 4, columns = 16;
  const Fields of_gemm = {{"bits", &number, PluginFieldType::kINT32, 1}};
  const Fields of_hadamard = {{"clip", "gaussian", PluginFieldType::kCHAR, 9},
                              {"grid", "mid-rise", PluginFieldType::kCHAR, 9},
                              {"block", &columns, PluginFieldType::kINT32, 1}};
  for (int32_t i = 0; i < count; ++i) {
    auto *creator = static_cast<IPluginCreatorV3One *>(all[i]);
    current = creator->getPluginName();
    CHECK(std::string(creator->getInterfaceInfo().kind) ==
          "PLUGIN CREATOR_V3ONE");
    CHECK(creator->getAPILanguage() == APILanguage::kCPP);
    std::printf("%s %s %s", current, creator->getPluginVersion(),
                creator->getPluginNamespace());
    const PluginFieldCollection *names = creator->getFieldNames();
    for (int32_t f = 0; f < names->nbFields; ++f)
      std::printf(" %s", names->fields[f].name);
    std::printf("\n");
    lives_on_after_its_original(*creator, i == 0 ? of_hadamard : of_gemm);
  }
  IPluginCreatorV3One *hadamard = creator_of(all, count, "HadamardQuantize");
  IPluginCreatorV3One *gemm = creator_of(all, count, "TernaryGemm");
  CHECK(hadamard && gemm);
  refuses_bad_attributes(*hadamard, *gemm);
  const std::unique_ptr<IPluginV3> quantize = create(*hadamard, of_hadamard),
                                   product = create(*gemm, of_gemm);
  current = "HadamardQuantize";
  shapes_and_types_of_hadamard_quantize(*quantize);
  formats_of_hadamard_quantize(*quantize, DataType::kFLOAT);
  configures_within_a_profile(*quantize);
  fails_softly_without_a_gpu(*quantize);
  current = "TernaryGemm";
  shapes_of_ternary_gemm(*product);
  const std::map<int32_t, DataType> halves = {{10, DataType::kHALF},
                                              {16, DataType::kBF16}};
  for (const auto &[number, half] : halves) {
    const PluginField dtype("dtype", &number, PluginFieldType::kINT32, 1);
    formats_of_hadamard_quantize(*create(*hadamard, {dtype}), half);
    types_of_gated_gemm(
        *create(*creator_of(all, count, "TernaryGemmResidual"), {dtype}), half);
  }
  return 0;
}
