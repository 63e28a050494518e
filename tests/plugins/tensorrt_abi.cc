// Prints what a plugin library takes for granted of TensorRT's ABI, by our
// declarations or, with -DOFFICIAL, by the SDK's headers: places in tables of
// virtual functions, sizes, offsets, numbers, names. Both must print the same.
#ifdef OFFICIAL
#include "NvInferRuntime.h"
#else
#include "tensorrt.h"
#endif
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <typeinfo>

using namespace nvinfer1;

// A pointer to a virtual function is 1 + 8 * its place (x86-64), or 8 * its
// place with 1 beside it (ARM).
template <class Member> long place(Member member) {
  long words[2];
  static_assert(sizeof member == sizeof words,
                "pointers to members are two words");
  std::memcpy(words, &member, sizeof words);
#if defined(__aarch64__)
  return words[0] / 8;
#else
  return (words[0] - 1) / 8;
#endif
}

// The cast spells the signature out: another one does not compile.
#define PLACE(C, Result, f, ...)                                               \
  std::printf(#C "::" #f " %ld\n",                                             \
              place(static_cast<Result(C::*) __VA_ARGS__>(&C::f)))
#define SIZE(T) std::printf("sizeof " #T " %zu\n", sizeof(T))
#define OFFSET(T, field) std::printf(#T "." #field " %zu\n", offsetof(T, field))
#define NUMBER(value)                                                          \
  std::printf(#value " %lld of %zu bytes\n", static_cast<long long>(value),    \
              sizeof(value))
#define NAME(T) std::printf("%s\n", typeid(T).name())

using Desc = PluginTensorDesc;
using DynamicDesc = DynamicPluginTensorDesc;
using Text = char const *;

int main() {
  PLACE(IVersionedInterface, APILanguage, getAPILanguage, () const noexcept);
  PLACE(IVersionedInterface, InterfaceInfo, getInterfaceInfo,
        () const noexcept);
  PLACE(apiv::VDimensionExpr, bool, isConstant, () const);
  PLACE(apiv::VDimensionExpr, int64_t, getConstantValue, () const);
  PLACE(apiv::VExprBuilder, IDimensionExpr const *, constant, (int64_t));
  PLACE(IPluginV3, IPluginCapability *, getCapabilityInterface,
        (PluginCapabilityType) noexcept);
  PLACE(IPluginV3, IPluginV3 *, clone, () noexcept);
  PLACE(IPluginV3OneCore, Text, getPluginName, () const noexcept);
  PLACE(IPluginV3OneCore, Text, getPluginVersion, () const noexcept);
  PLACE(IPluginV3OneCore, Text, getPluginNamespace, () const noexcept);
  PLACE(IPluginV3OneBuild, int32_t, configurePlugin,
        (DynamicDesc const *, int32_t, DynamicDesc const *, int32_t) noexcept);
  PLACE(IPluginV3OneBuild, int32_t, getOutputDataTypes,
        (DataType *, int32_t, DataType const *, int32_t) const noexcept);
  PLACE(IPluginV3OneBuild, int32_t, getOutputShapes,
        (DimsExprs const *, int32_t, DimsExprs const *, int32_t, DimsExprs *,
         int32_t, IExprBuilder &) noexcept);
  PLACE(IPluginV3OneBuild, bool, supportsFormatCombination,
        (int32_t, DynamicDesc const *, int32_t, int32_t) noexcept);
  PLACE(IPluginV3OneBuild, int32_t, getNbOutputs, () const noexcept);
  PLACE(IPluginV3OneBuild, size_t, getWorkspaceSize,
        (DynamicDesc const *, int32_t, DynamicDesc const *, int32_t)
            const noexcept);
  PLACE(IPluginV3OneBuild, int32_t, getValidTactics,
        (int32_t *, int32_t) noexcept);
  PLACE(IPluginV3OneBuild, int32_t, getNbTactics, () noexcept);
  PLACE(IPluginV3OneBuild, Text, getTimingCacheID, () noexcept);
  PLACE(IPluginV3OneBuild, int32_t, getFormatCombinationLimit, () noexcept);
  PLACE(IPluginV3OneBuild, Text, getMetadataString, () noexcept);
  PLACE(IPluginV3OneRuntime, int32_t, setTactic, (int32_t) noexcept);
  PLACE(IPluginV3OneRuntime, int32_t, onShapeChange,
        (Desc const *, int32_t, Desc const *, int32_t) noexcept);
  PLACE(IPluginV3OneRuntime, int32_t, enqueue,
        (Desc const *, Desc const *, void const *const *, void *const *, void *,
         cudaStream_t) noexcept);
  PLACE(IPluginV3OneRuntime, IPluginV3 *, attachToContext,
        (IPluginResourceContext *) noexcept);
  PLACE(IPluginV3OneRuntime, PluginFieldCollection const *,
        getFieldsToSerialize, () noexcept);
  PLACE(IPluginCreatorV3One, IPluginV3 *, createPlugin,
        (Text, PluginFieldCollection const *, TensorRTPhase) noexcept);
  PLACE(IPluginCreatorV3One, PluginFieldCollection const *, getFieldNames,
        () noexcept);
  PLACE(IPluginCreatorV3One, Text, getPluginName, () const noexcept);
  PLACE(IPluginCreatorV3One, Text, getPluginVersion, () const noexcept);
  PLACE(IPluginCreatorV3One, Text, getPluginNamespace, () const noexcept);
  SIZE(Dims);
  SIZE(Desc);
  SIZE(DynamicDesc);
  SIZE(PluginField);
  SIZE(PluginFieldCollection);
  SIZE(InterfaceInfo);
  SIZE(DimsExprs);
  SIZE(IDimensionExpr);
  SIZE(IExprBuilder);
  OFFSET(Dims, nbDims);
  OFFSET(Dims, d);
  OFFSET(Desc, dims);
  OFFSET(Desc, type);
  OFFSET(Desc, format);
  OFFSET(DynamicDesc, desc);
  OFFSET(DynamicDesc, min);
  OFFSET(DynamicDesc, max);
  OFFSET(DynamicDesc, opt);
  OFFSET(PluginField, name);
  OFFSET(PluginField, data);
  OFFSET(PluginField, type);
  OFFSET(PluginField, length);
  OFFSET(PluginFieldCollection, nbFields);
  OFFSET(PluginFieldCollection, fields);
  OFFSET(InterfaceInfo, kind);
  OFFSET(InterfaceInfo, major);
  OFFSET(InterfaceInfo, minor);
  OFFSET(DimsExprs, nbDims);
  OFFSET(DimsExprs, d);
  NUMBER(DataType::kFLOAT);
  NUMBER(DataType::kHALF);
  NUMBER(DataType::kINT8);
  NUMBER(DataType::kINT32);
  NUMBER(DataType::kBF16);
  NUMBER(TensorFormat::kLINEAR);
  NUMBER(PluginFieldType::kINT32);
  NUMBER(PluginFieldType::kCHAR);
  NUMBER(TensorRTPhase::kBUILD);
  NUMBER(TensorRTPhase::kRUNTIME);
  NUMBER(PluginCapabilityType::kCORE);
  NUMBER(PluginCapabilityType::kBUILD);
  NUMBER(PluginCapabilityType::kRUNTIME);
  NUMBER(APILanguage::kCPP);
  NAME(IPluginV3);
  NAME(IPluginV3OneCore);
  NAME(IPluginV3OneBuild);
  NAME(IPluginV3OneRuntime);
  NAME(IPluginCreatorV3One);
}
