// The few calls of the driver API that a launch needs, and the kernels of each context.
#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#ifdef D2D_CUDA_KERNELS
#include "cuda_kernels.h"
#endif

namespace d2d {
namespace {

using Context = void*;
using Module = void*;
using Function = void*;

// Names without suffix are the right ones for all of these.
struct Driver {
    int (*context)(Context*);
    int (*load_module)(Module*, const void*);
    int (*get_function)(Function*, Module, const char*);
    int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  CUstream_st*, void**, void**);
    int (*error_text)(int, const char**);
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
        find(library, "cuModuleLoadData", found.load_module);
        find(library, "cuModuleGetFunction", found.get_function);
        find(library, "cuLaunchKernel", found.launch);
        find(library, "cuGetErrorString", found.error_text);
        return found;
    }();
    return loaded;
}

void check(int status, const char* what) {
    if (!status) return;
    const char* text = nullptr;
    driver().error_text(status, &text);
    throw std::runtime_error(std::string(what) + ": " + (text ? text : "unknown CUDA error"));
}

using Functions = std::map<std::string, Function>;

constexpr const char* kNames[] = {"hadamard_quantize", "ternary_gemm", "int3_gemm", "int4_gemm", "int8_gemm"};

Functions load() {
#ifndef D2D_CUDA_KERNELS
    throw std::runtime_error(
        "this library was built without CUDA kernels: install nvidia-cuda-nvrtc-cu12 and build anew");
#else
    Functions functions;
    for (const unsigned char* ptx : kCudaModules) {
        Module module = nullptr;
        check(driver().load_module(&module, ptx), "loading the CUDA kernels");
        for (const char* name : kNames) {
            Function function = nullptr;
            if (!driver().get_function(&function, module, name)) functions[name] = function;
        }
    }
    for (const char* name : kNames)
        if (!functions.count(name)) throw std::runtime_error(std::string("the CUDA kernels lack ") + name);
    return functions;
#endif
}

// Modules are never unloaded: at the end of the process the driver may be gone before us.
const Functions& functions_here() {
    static std::mutex mutex;
    static auto* contexts = new std::map<Context, Functions>();
    Context here = nullptr;
    check(driver().context(&here), "asking for the CUDA context");
    if (!here) throw std::runtime_error("no CUDA context is current");
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = contexts->find(here);
    return found != contexts->end() ? found->second : (*contexts)[here] = load();
}

}  // namespace

void load_cuda_kernels() { functions_here(); }

void launch_cuda(const std::vector<CudaLaunch>& launches, CUstream_st* stream) {
    const Functions& functions = functions_here();
    for (const CudaLaunch& launch : launches) {
        void* parameters[16];
        if (launch.words.size() > 16) throw std::runtime_error("too many kernel parameters");
        for (size_t i = 0; i < launch.words.size(); ++i)
            parameters[i] = const_cast<uint64_t*>(&launch.words[i]);
        check(driver().launch(functions.at(launch.function), launch.grid[0], launch.grid[1], launch.grid[2],
                              launch.block[0], launch.block[1], launch.block[2], launch.shared_bytes, stream,
                              parameters, nullptr),
              launch.function);
    }
}

}  // namespace d2d
