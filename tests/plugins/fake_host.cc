// A host that drives the plugins as TensorRT does, without TensorRT: prints the
// creators, exits with the first fault.
//
//   fake_host LIBRARY [gpu]       or, compiled together with the adapter and
//   -DLINKED: fake_host
//
// gpu: a GEMM is computed as well, by each tactic, on the emulated driver.
#include "fake_host.h"

#include <dlfcn.h>

#include <algorithm>

namespace {

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

// Two codes a byte: half as many columns of q, of runs of 64 that are known.
void shapes_of_packed_codes(IPluginV3 &quantize, IPluginV3 &product) {
  Builder builder;
  for (const int64_t columns : {128, 96, -1}) {
    DimsExprs in[] = {expressions(builder, {-1, 5, columns}),
                      expressions(builder, {1})},
              out[2]{};
    const bool right = columns == 128;
    CHECK((build_of(quantize).getOutputShapes(in, 2, nullptr, 0, out, 2,
                                              builder) == 0) == right);
    CHECK(!right || (out[0].d[1] == in[0].d[1] && out[0].d[2]->isConstant() &&
                     out[0].d[2]->getConstantValue() == 64));
  }
  for (const int64_t columns : {64, 48}) { // K 128 and 96, of 20 trits a word
    DimsExprs in[] = {expressions(builder, {-1, 5, columns}),
                      expressions(builder, {-1, 5, 1}),
                      expressions(builder, {40, (2 * columns + 19) / 20}),
                      expressions(builder, {40, 1}),
                      expressions(builder, {40})};
    DimsExprs out[1]{};
    CHECK((build_of(product).getOutputShapes(in, 5, nullptr, 0, out, 1,
                                             builder) == 0) == (columns == 64));
  }
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
  CHECK(build.getWorkspaceSize(in, 2, nullptr, 2) == 0);
  CHECK(build.getNbTactics() == 0);
}

// TernaryGemm of 34 outputs, K 2048, in the GPU's layout: dims of its inputs.
constexpr int64_t kOutputs = 34, kDepth = 2048;

std::vector<Shape> of_product(int64_t tokens) {
  return {{tokens, kDepth}, {tokens, 1}, {2, 4096}, {kOutputs, 1}, {kOutputs}};
}

std::vector<DynamicPluginTensorDesc> profile(int64_t least, int64_t usual,
                                             int64_t most) {
  std::vector<DynamicPluginTensorDesc> in(5);
  for (size_t i = 0; i < in.size(); ++i)
    in[i] = {{},
             dims_of(of_product(least)[i]),
             dims_of(of_product(most)[i]),
             dims_of(of_product(usual)[i])};
  return in;
}

std::vector<int32_t> valid_tactics(IPluginV3 &plugin) {
  std::vector<int32_t> found(
      static_cast<size_t>(build_of(plugin).getNbTactics()));
  CHECK(build_of(plugin).getValidTactics(found.data(), found.size()) == 0);
  return found;
}

// Of the profile that was configured last: the rule, 64x64, in slices of K,
// 128x128.
void offers_tactics(IPluginV3 &product) {
  using Tactics = std::vector<int32_t>;
  IPluginV3OneBuild &build = build_of(product);
  CHECK(valid_tactics(product).empty());
  CHECK(build.configurePlugin(profile(1, 70, 4096).data(), 5, nullptr, 1) == 0);
  // Those on wgmma where they are asked for, which timing caches must tell.
  const char *asked = std::getenv("DIT2DEPLOY_CUDA");
  const std::string kernels = asked ? asked : "mma";
  const Tactics all =
      kernels == "wgmma" ? Tactics{1, 2, 3, 4, 5, 6} : Tactics{1, 2, 3, 4};
  CHECK(valid_tactics(product) == all);
  const std::unique_ptr<IPluginV3> clone(product.clone());
  CHECK(valid_tactics(*clone) == all);
  CHECK(std::string(build_of(*clone).getTimingCacheID())
            .find("kernels=" + kernels + ";") == 0);
  int32_t room[8] = {};
  const auto count = static_cast<int32_t>(all.size());
  CHECK(build.getValidTactics(room, count - 1) != 0 && !room[0]);
  CHECK(build.getValidTactics(room, count + 1) != 0 && !room[0]);
  CHECK(build.getValidTactics(nullptr, count) != 0);
  // 141 tiles are too many for K to be split.
  CHECK(build.configurePlugin(profile(1, 9000, 9000).data(), 5, nullptr, 1) ==
        0);
  CHECK(build.getNbTactics() == count - 1 && valid_tactics(product)[2] == 4);
  CHECK(build.configurePlugin(profile(1, 16, 4096).data(), 5, nullptr, 1) == 0);
  CHECK(valid_tactics(product).empty());
}

void refuses_unknown_tactics(IPluginV3 &product, IPluginV3 &quantize) {
  IPluginV3OneRuntime &runtime = runtime_of(product);
  for (int32_t tactic = 0; tactic <= 6; ++tactic)
    CHECK(runtime.setTactic(tactic) == 0);
  for (const int32_t tactic : {-1, 7, INT32_MAX, INT32_MIN})
    CHECK(runtime.setTactic(tactic) != 0);
  CHECK(runtime_of(quantize).setTactic(0) == 0);
  CHECK(runtime_of(quantize).setTactic(1) != 0);
}

// Of int32 sums; a y of float32 has room for them itself.
void asks_for_workspace(IPluginV3 &halves, IPluginV3 &singles) {
  const auto in = profile(1, 70, 4096), few = profile(1, 2, 16);
  IPluginV3OneBuild &build = build_of(halves);
  CHECK(build.getWorkspaceSize(in.data(), 5, nullptr, 1) ==
        4 * 4096 * kOutputs);
  CHECK(build.getWorkspaceSize(few.data(), 5, nullptr, 1) == 0);
  CHECK(build.getWorkspaceSize(in.data(), 4, nullptr, 1) == 0);
  CHECK(build_of(singles).getWorkspaceSize(in.data(), 5, nullptr, 1) == 0);
}

#ifndef LINKED
// What TensorRT does with an engine: plugins of the tactic that it chose, one
// for each context. Kernels tell by their names that it was kept.
void computes_the_same_by_each_tactic(IPluginCreatorV3One &creator,
                                      const Fields &fields) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  CHECK(driver);
  const auto retain = reinterpret_cast<int (*)(void **, int)>(
      dlsym(driver, "cuDevicePrimaryCtxRetain"));
  const auto use =
      reinterpret_cast<int (*)(void *)>(dlsym(driver, "cuCtxSetCurrent"));
  const auto launched =
      reinterpret_cast<const char *(*)()>(dlsym(driver, "d2d_last_launched"));
  void *context = nullptr;
  CHECK(retain && use && launched && retain(&context, 0) == 0);
  CHECK(use(context) == 0);

  constexpr int64_t m = 70;
  std::vector<int8_t> q(m * kDepth);
  for (size_t i = 0; i < q.size(); ++i)
    q[i] = static_cast<int8_t>(i * 31 % 255 - 127);
  std::vector<float> s(m, 0.01f), ws(kOutputs, 0.1f), bias(kOutputs, 1);
  std::vector<int32_t> w(2 * 4096);
  for (size_t i = 0; i < w.size(); ++i)
    w[i] = static_cast<int32_t>(i * 2654435761u & 0x55555555u);
  const void *inputs[] = {q.data(), s.data(), w.data(), ws.data(), bias.data()};
  const DataType types[] = {DataType::kINT8, DataType::kFLOAT, DataType::kINT32,
                            DataType::kFLOAT, DataType::kFLOAT};
  std::vector<PluginTensorDesc> in;
  for (size_t i = 0; i < 5; ++i)
    in.push_back(tensor(of_product(m)[i], types[i]));
  const PluginTensorDesc out = tensor({m, kOutputs}, DataType::kHALF);
  const char *const kernels[] = {"ternary_gemm_64x64", "ternary_gemm_64x64",
                                 "ternary_gemm_64x64", "gemm_finish",
                                 "ternary_gemm_128x128"};
  std::vector<uint16_t> want;
  for (int32_t tactic = 0; tactic <= 4; ++tactic) {
    std::unique_ptr<IPluginV3> plugin = create(creator, fields);
    const size_t bytes = build_of(*plugin).getWorkspaceSize(
        profile(1, m, m).data(), 5, nullptr, 1);
    CHECK(bytes == 4 * m * kOutputs);
    CHECK(runtime_of(*plugin).setTactic(tactic) == 0);
    CHECK(runtime_of(*plugin).setTactic(9) != 0); // changes nothing
    plugin.reset(runtime_of(*plugin).attachToContext(nullptr));
    plugin.reset(plugin->clone());
    std::vector<uint16_t> y(m * kOutputs, 0x7E00);
    std::vector<char> workspace(bytes + 1, 'x');
    void *outputs[] = {y.data()};
    IPluginV3OneRuntime &runtime = runtime_of(*plugin);
    CHECK(runtime.onShapeChange(in.data(), 5, &out, 1) == 0);
    CHECK(runtime.enqueue(in.data(), &out, inputs, outputs, workspace.data(),
                          nullptr) == 0);
    CHECK(std::string(launched()) == kernels[tactic]);
    CHECK(workspace[bytes] == 'x');
    if (want.empty())
      want = y;
    CHECK(y == want);
  }
  CHECK(std::count(want.begin(), want.end(), want[0]) < m * kOutputs);
}
#endif

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
  CHECK(argc == 2 || (argc == 3 && !std::strcmp(argv[2], "gpu")));
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
  const int32_t one = 1;
  const PluginField packed("packed", &one, PluginFieldType::kINT32, 1);
  CHECK(!create(*gemm, {packed})); // of 8 bits, the default
  Fields narrow = of_gemm;
  narrow.push_back(packed);
  shapes_of_packed_codes(*create(*hadamard, {packed}), *create(*gemm, narrow));
  const std::map<int32_t, DataType> halves = {{10, DataType::kHALF},
                                              {16, DataType::kBF16}};
  for (const auto &[number, half] : halves) {
    const PluginField dtype("dtype", &number, PluginFieldType::kINT32, 1);
    formats_of_hadamard_quantize(*create(*hadamard, {dtype}), half);
    types_of_gated_gemm(
        *create(*creator_of(all, count, "TernaryGemmResidual"), {dtype}), half);
  }
  const int32_t of_gpu = 2, half = 10;
  const Fields of_single = {{"layout", &of_gpu, PluginFieldType::kINT32, 1}};
  Fields of_half = of_single;
  of_half.emplace_back("dtype", &half, PluginFieldType::kINT32, 1);
  offers_tactics(*create(*gemm, of_half));
  refuses_unknown_tactics(*create(*gemm, of_half), *quantize);
  asks_for_workspace(*create(*gemm, of_half), *create(*gemm, of_single));
#ifndef LINKED
  if (argc == 3)
    computes_the_same_by_each_tactic(*gemm, of_half);
#endif
  return 0;
}
