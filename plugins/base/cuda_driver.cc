// The few calls of the driver API that a launch needs, and the kernels of each context.
#include "cuda_driver.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda_choice.h"

#ifdef D2D_CUDA_KERNELS
#include "cuda_kernels.h"
#endif

namespace d2d {
namespace {

constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kMostDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr unsigned kSharedWithoutAsking = 48 << 10;
constexpr int kErrorLog = 5, kErrorLogBytes = 6;  // CU_JIT_ERROR_LOG_BUFFER, .._SIZE_BYTES
// CUDA_ERROR_INVALID_IMAGE, .._NO_BINARY_FOR_GPU, .._UNSUPPORTED_PTX_VERSION, which is said of machine code too
constexpr int kInvalidImage = 200, kNoBinaryForGpu = 209, kNewerToolchain = 222;

using Context = void*;
using Module = void*;
using Function = void*;

struct Driver {
    int (*context)(Context*);
    int (*context_device)(int*);
    int (*attribute)(int*, int, int);
    int (*load_module)(Module*, const void*, unsigned, int*, void**);
    int (*get_function)(Function*, Module, const char*);
    int (*set_attribute)(Function, int, int);
    int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  CUstream_st*, void**, void**);
    int (*error_text)(int, const char**);
    int (*init)(unsigned);
    int (*device)(int*, int);
    int (*primary_context)(Context*, int);
    int (*set_context)(Context);
    int (*allocate)(uint64_t*, size_t);
    int (*free)(uint64_t);
    int (*to_device)(uint64_t, const void*, size_t);
    int (*to_host)(void*, uint64_t, size_t);
    int (*synchronize)();
};

template <class F>
void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function)
        throw std::runtime_error(std::string("libcuda.so.1 has no ") + name + ": update the NVIDIA driver");
}

const Driver& driver() {
    static const Driver loaded = [] {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library)
            throw std::runtime_error("libcuda.so.1 is not there: this needs an NVIDIA GPU and its driver");
        Driver found{};
        find(library, "cuCtxGetCurrent", found.context);
        find(library, "cuCtxGetDevice", found.context_device);
        find(library, "cuDeviceGetAttribute", found.attribute);
        find(library, "cuModuleLoadDataEx", found.load_module);
        find(library, "cuModuleGetFunction", found.get_function);
        find(library, "cuFuncSetAttribute", found.set_attribute);
        find(library, "cuLaunchKernel", found.launch);
        find(library, "cuGetErrorString", found.error_text);
        find(library, "cuInit", found.init);
        find(library, "cuDeviceGet", found.device);
        find(library, "cuDevicePrimaryCtxRetain", found.primary_context);
        find(library, "cuCtxSetCurrent", found.set_context);
        find(library, "cuMemAlloc_v2", found.allocate);  // the unsuffixed names take 32-bit sizes
        find(library, "cuMemFree_v2", found.free);
        find(library, "cuMemcpyHtoD_v2", found.to_device);
        find(library, "cuMemcpyDtoH_v2", found.to_host);
        find(library, "cuCtxSynchronize", found.synchronize);
        return found;
    }();
    return loaded;
}

std::string text_of(int status) {
    const char* text = nullptr;
    driver().error_text(status, &text);
    return text ? text : "unknown CUDA error";
}

void check(int status, const char* what) {
    if (status) throw std::runtime_error(std::string(what) + ": " + text_of(status));
}

using Functions = std::map<std::string, Function>;

// An image that this driver does not know.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Machine code, or PTX that the driver compiles: what its compiler says of it is part of the error.
[[maybe_unused]] Module load_image(const unsigned char* image) {
    char log[2048] = {};
    int options[] = {kErrorLog, kErrorLogBytes};
    void* values[] = {log, reinterpret_cast<void*>(sizeof(log) - 1)};
    Module module = nullptr;
    const int status = driver().load_module(&module, image, 2, options, values);
    if (!status) return module;
    const std::string fault = "loading the CUDA kernels" +
                              (log[0] ? " (" + std::string(log) + ")" : std::string()) + ": " +
                              text_of(status);
    if (status == kInvalidImage || status == kNoBinaryForGpu || status == kNewerToolchain)
        throw Refused(fault);
    throw std::runtime_error(fault);
}

#ifdef D2D_CUDA_KERNELS
// Machine code runs within its major version, on its own minor version and later ones, but not between Tegra (8.7: the
// Orin) and other GPUs; PTX runs on every later GPU. (CUDA C++ Programming Guide, "Binary Compatibility".)
bool runs(const CudaImage& image, int here) {
    constexpr int tegra = 87;
    if (image.for_one_gpu) return image.capability == here;
    if (!image.is_machine_code) return image.capability <= here;
    if (image.capability == tegra || here == tegra) return image.capability == here;
    return image.capability <= here && image.capability / 10 == here / 10;
}

// In tenths.
int capability_here() {
    int device = 0, major = 0, minor = 0;
    check(driver().context_device(&device), "asking for the GPU of the context");
    check(driver().attribute(&major, kCapabilityMajor, device), "asking for the compute capability");
    check(driver().attribute(&minor, kCapabilityMinor, device), "asking for the compute capability");
    return 10 * major + minor;
}

std::string dotted(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// The images of one kind for this GPU, those for it alone or the best of the others; none where there is no such.
std::vector<const CudaImage*> images_for(int here, bool for_one_gpu, bool is_machine_code) {
    std::vector<const CudaImage*> found;
    for (const CudaImage& image : kCudaImages) {
        if (image.for_one_gpu != for_one_gpu || image.is_machine_code != is_machine_code ||
            !runs(image, here))
            continue;
        if (!found.empty() && image.capability > found[0]->capability) found.clear();
        if (found.empty() || image.capability == found[0]->capability) found.push_back(&image);
    }
    return found;
}

Functions functions_of(const std::vector<const CudaImage*>& images) {
    Functions functions;
    for (const CudaImage* image : images) {
        const Module module = load_image(d2d_cuda_bytes + image->at);
        std::istringstream names(image->kernels);
        for (std::string name; names >> name;)
            check(driver().get_function(&functions[name], module, name.c_str()), name.c_str());
    }
    return functions;
}
#endif

Functions load([[maybe_unused]] bool wgmma) {
#ifndef D2D_CUDA_KERNELS
    throw std::runtime_error(
        "this library was built without CUDA kernels: install nvidia-cuda-nvrtc-cu12 and build anew");
#else
    const int here = capability_here();
    const auto code = images_for(here, wgmma, true), ptx = images_for(here, wgmma, false);
    if (code.empty() && ptx.empty())
        throw std::runtime_error(
            wgmma ? "DIT2DEPLOY_CUDA=wgmma needs compute capability 9.0, this GPU has " + dotted(here) +
                        ": unset it"
                  : "the CUDA kernels need compute capability 7.5 or later, this GPU has " + dotted(here));
    if (ptx.empty()) return functions_of(code);
    try {
        if (!code.empty()) return functions_of(code);
    } catch (const Refused& refused) {
        std::fprintf(
            stderr,
            "dit2deploy: %s. A newer NVIDIA driver takes the machine code for compute capability %s; "
            "this one compiles PTX, at first use.\n",
            refused.what(), dotted(code[0]->capability).c_str());
    }
    return functions_of(ptx);
#endif
}

// Of the current context: the kernels on wgmma, or the others. Modules are never unloaded: at the end of the process the
// driver may be gone before us.
const Functions& functions_here(bool wgmma) {
    static std::mutex mutex;
    static auto* contexts = new std::map<std::pair<Context, bool>, Functions>();
    Context here = nullptr;
    check(driver().context(&here), "asking for the CUDA context");
    if (!here) throw std::runtime_error("no CUDA context is current");
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = contexts->find({here, wgmma});
    return found != contexts->end() ? found->second : (*contexts)[{here, wgmma}] = load(wgmma);
}

void launch_one(const CudaLaunch& launch, const Functions& functions, CUstream_st* stream) {
    std::vector<void*> parameters;
    for (const uint64_t& word : launch.words) parameters.push_back(const_cast<uint64_t*>(&word));
    const char* name = launch.function;
    const Function function = functions.at(name);
    if (launch.shared_bytes > kSharedWithoutAsking)
        check(driver().set_attribute(function, kMostDynamicShared, static_cast<int>(launch.shared_bytes)),
              name);
    check(driver().launch(function, launch.grid[0], launch.grid[1], launch.grid[2], launch.block[0],
                          launch.block[1], launch.block[2], launch.shared_bytes, stream, parameters.data(),
                          nullptr),
          name);
}

}  // namespace

void load_cuda_kernels() {
    functions_here(false);
    if (wgmma_is_asked_for()) functions_here(true);
}

void launch_cuda(const std::vector<CudaLaunch>& launches, CUstream_st* stream) {
    for (const CudaLaunch& launch : launches) launch_one(launch, functions_here(launch.on_wgmma), stream);
}

namespace {

// A copy of a host tensor on the device, freed with the object.
class DeviceTensor {
  public:
    explicit DeviceTensor(const Tensor& host) : host_(host), size_(host.bytes()) {
        check(driver().allocate(&address_, size_ ? size_ : 1), "allocating on the GPU");
    }
    ~DeviceTensor() { driver().free(address_); }
    DeviceTensor(const DeviceTensor&) = delete;
    DeviceTensor& operator=(const DeviceTensor&) = delete;

    Tensor view() const { return {host_.dtype, host_.shape, reinterpret_cast<void*>(address_)}; }
    void upload() const {
        if (size_) check(driver().to_device(address_, host_.data, size_), "copying to the GPU");
    }
    void download() const {
        if (size_) check(driver().to_host(host_.data, address_, size_), "copying from the GPU");
    }

  private:
    Tensor host_;
    size_t size_;
    uint64_t address_ = 0;
};

std::vector<std::unique_ptr<DeviceTensor>> on_device(const std::vector<Tensor>& tensors) {
    std::vector<std::unique_ptr<DeviceTensor>> copies;
    for (const Tensor& tensor : tensors) copies.push_back(std::make_unique<DeviceTensor>(tensor));
    return copies;
}

std::vector<Tensor> views(const std::vector<std::unique_ptr<DeviceTensor>>& copies) {
    std::vector<Tensor> tensors;
    for (const auto& copy : copies) tensors.push_back(copy->view());
    return tensors;
}

// The thread's current context, or the primary one of the first GPU, which is then retained once and for all.
void use_a_context() {
    Context context = nullptr;
    check(driver().init(0), "starting the CUDA driver");
    check(driver().context(&context), "asking for the CUDA context");
    if (context) return;
    static const Context first = [] {
        int device = 0;
        Context primary = nullptr;
        check(driver().device(&device, 0), "asking for the first GPU");
        check(driver().primary_context(&primary, device), "opening the first GPU");
        return primary;
    }();
    check(driver().set_context(first), "using the first GPU");
}

}  // namespace

void run_on_gpu(const Definition& definition, const Attributes& attributes, const std::vector<Tensor>& inputs,
                const std::vector<Tensor>& outputs, int tactic) {
    use_a_context();
    const auto from = on_device(inputs), to = on_device(outputs);
    const auto bytes = static_cast<int64_t>(workspace_bytes(definition, attributes, views(from), views(to)));
    const DeviceTensor workspace({DType::i8, {1, {bytes}}, nullptr});
    const CudaMeans means{tactic, bytes ? workspace.view().data : nullptr};
    for (const auto& tensor : from) tensor->upload();
    launch_cuda(definition.plan_cuda(attributes, views(from), views(to), means), nullptr);
    check(driver().synchronize(), "waiting for the GPU");
    for (const auto& tensor : to) tensor->download();
}

}  // namespace d2d
