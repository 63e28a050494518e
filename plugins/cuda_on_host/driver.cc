// libcuda.so.1 for machines without a GPU: the calls of base/cuda_driver.cc and of dit2deploy/targets/cuda.py, over the
// emulator.
//
// A module is the PTX or the machine code that it was loaded with, machine code of a GPU that runs it, and a function what
// that says of a kernel: a launch is refused where its parameters are not 8 bytes wide each, or its block has more threads
// than the kernel allows. Then the kernel of that name runs on the emulator before the launch returns. Device memory is
// host memory; where a launch names none that cuMemAlloc gave, all memory counts as the launch's. On a stream that is
// captured a launch is written down, parameters and all, and nothing runs; what a GPU refuses in that time is refused.
#include <elf.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"

#define D2D_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kInvalidValue = 1, kInvalidContext = 201, kNoBinaryForGpu = 209, kNewerToolchain = 222,
              kNotFound = 500, kLaunchFailed = 719, kNotWhileCapturing = 900;
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;
constexpr int kMostDynamicShared = 8;  // of a function's attributes
constexpr unsigned kMostThreads = 1024, kMostBlocks = 65535;

struct Function {
    std::string name;
    size_t parameters;
    unsigned threads;                    // of a block at most
    unsigned dynamic_shared = 48 << 10;  // bytes that a launch may ask for
};

struct Launch {
    const Function* function;
    gpu::host::Grid grid;
    std::vector<uint64_t> words;
};
using Graph = std::vector<Launch>;

struct Module {
    const char* image;  // of the caller, who keeps it
    std::map<std::string, Function> functions;
};

thread_local void* current = nullptr;
thread_local std::string last_error = "no error";
void* last_stream = nullptr;
std::string loaded;         // the modules' targets, once each
std::string last_launched;  // kernel
std::map<uint64_t, size_t> allocations;
std::map<void*, Graph> captured;  // by their streams
int primary;                      // its address is the handle of the one context

int fail(int status, const std::string& text) {
    last_error = text;
    return status;
}

// 0, or the error of what waits or allocates while a stream is captured.
int refuse_in_a_capture() {
    return captured.empty() ? 0 : fail(kNotWhileCapturing, "not permitted while a stream is captured");
}

int run(const Launch& launch) {
    gpu::host::Grid grid = launch.grid;
    bool allocated = false;
    for (const uint64_t word : launch.words) allocated = allocated || allocations.count(word);
    if (allocated)
        for (const auto& [address, bytes] : allocations)
            grid.memory.push_back({reinterpret_cast<const void*>(address), bytes});
    else
        grid.memory.push_back({nullptr, SIZE_MAX});
    try {
        gpu::host::launch(launch.function->name, grid, launch.words);
    } catch (const std::exception& error) {
        return fail(kLaunchFailed, error.what());
    }
    return 0;
}

size_t count(const std::string& text, const std::string& part) {
    size_t found = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
    return found;
}

// What a module says of a kernel.
struct Kernel {
    bool found = false;
    size_t parameters = 0, wide = 0;  // 8 bytes wide
    unsigned threads = kMostThreads;
};

Kernel in_ptx(const std::string& ptx, const std::string& name) {
    const size_t begin = ptx.find(".entry " + name + "(");
    if (begin == std::string::npos) return {};
    const size_t end = ptx.find(')', begin), body = ptx.find('{', end);
    const std::string parameters = ptx.substr(begin, end - begin), bounds = ptx.substr(end, body - end);
    Kernel kernel{true, count(parameters, ".param "), count(parameters, ".param .u64 ")};
    const size_t bound = bounds.find(".maxntid ");
    if (bound != std::string::npos)
        kernel.threads = static_cast<unsigned>(std::atoi(bounds.c_str() + bound + 9));
    return kernel;
}

template <class T>
T at(const char* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof(value));
    return value;
}

// Section .nv.info.NAME: attributes of a byte of format, a byte of kind and two of size or value. Kinds as cuobjdump -elf
// names them: 5 EIATTR_MAX_THREADS, 0x17 EIATTR_KPARAM_INFO (size from bit 18 of its third word).
Kernel in_machine_code(const char* image, const std::string& name) {
    const auto header = at<Elf64_Ehdr>(image);
    const auto section = [&](unsigned i) {
        return at<Elf64_Shdr>(image + header.e_shoff + i * sizeof(Elf64_Shdr));
    };
    const char* names = image + section(header.e_shstrndx).sh_offset;
    Kernel kernel;
    for (unsigned i = 0; i < header.e_shnum; ++i) {
        const Elf64_Shdr info = section(i);
        if (names + info.sh_name != ".nv.info." + name) continue;
        kernel.found = true;
        const char *place = image + info.sh_offset, *end = place + info.sh_size;
        while (place < end) {
            const bool sized = place[0] == 4;
            if (sized && place[1] == 0x17) {
                ++kernel.parameters;
                kernel.wide += at<uint32_t>(place + 12) >> 18 == 8;
            } else if (sized && place[1] == 5) {
                kernel.threads = at<uint32_t>(place + 4);
            }
            place += 4 + (sized ? at<uint16_t>(place + 2) : 0);
        }
    }
    return kernel;
}

bool is_machine_code(const char* image) { return !std::memcmp(image, ELFMAG, SELFMAG); }

// The capability that a module was compiled for: the version 8 of machine code has it in the second byte of its flags.
int target_of(const char* image) {
    if (!is_machine_code(image)) return std::atoi(std::strstr(image, ".target sm_") + 11);
    const auto header = at<Elf64_Ehdr>(image);
    return header.e_flags >> (header.e_ident[EI_ABIVERSION] < 8 ? 0 : 8) & 255;
}

}  // namespace

D2D_EXPORT int cuInit(unsigned) { return 0; }
D2D_EXPORT int cuDeviceGet(int* device, int index) { return *device = index, index ? kInvalidValue : 0; }
D2D_EXPORT int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &primary, 0; }
D2D_EXPORT int cuCtxSetCurrent(void* context) { return current = context, 0; }
D2D_EXPORT int cuCtxGetCurrent(void** context) { return *context = current, 0; }
D2D_EXPORT int cuCtxGetDevice(int* device) { return *device = 0, current ? 0 : kInvalidContext; }
D2D_EXPORT int cuCtxSynchronize() { return current ? refuse_in_a_capture() : kInvalidContext; }
D2D_EXPORT int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "a host"), 0; }
D2D_EXPORT int cuDeviceGetCount(int* devices) { return *devices = 1, 0; }
D2D_EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
D2D_EXPORT int cuStreamCreate(void** stream, unsigned) { return *stream = new char, 0; }
D2D_EXPORT int cuStreamDestroy_v2(void* stream) { return delete static_cast<char*>(stream), 0; }
D2D_EXPORT int cuStreamSynchronize(void*) { return refuse_in_a_capture(); }

D2D_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    if (attribute != kCapabilityMajor && attribute != kCapabilityMinor)
        return fail(kInvalidValue, "only the compute capability is known here");
    const int capability = gpu::host::capability();
    *value = attribute == kCapabilityMajor ? capability / 10 : capability % 10;
    return 0;
}

D2D_EXPORT int cuGetErrorString(int, const char** text) { return *text = last_error.c_str(), 0; }

D2D_EXPORT int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    if (!current) return fail(kInvalidContext, "no context is current");
    if (const int status = refuse_in_a_capture()) return status;
    const char* bytes = static_cast<const char*>(image);
    const int target = target_of(bytes), here = gpu::host::capability();
    constexpr int tegra = 87;  // neither takes others' machine code nor gives them its own
    const bool is_foreign =
        target / 10 != here / 10 || (target != here && (target == tegra || here == tegra));
    if (target > here || (is_machine_code(bytes) && is_foreign))
        return fail(kNoBinaryForGpu, "the module is for another GPU");
    const std::string name = (is_machine_code(bytes) ? "sm_" : "compute_") + std::to_string(target);
    const char* refused = std::getenv("D2D_HOST_REFUSES");  // a target that this driver is too old for
    if (refused && name == refused)
        return fail(kNewerToolchain, "the provided PTX was compiled with an unsupported toolchain");
    if (loaded.find(name + " ") == std::string::npos) loaded += name + " ";
    *module = new Module{bytes, {}};  // never unloaded
    return 0;
}

D2D_EXPORT int cuModuleGetFunction(void** function, void* handle, const char* name) {
    auto& module = *static_cast<Module*>(handle);
    const Kernel kernel =
        is_machine_code(module.image) ? in_machine_code(module.image, name) : in_ptx(module.image, name);
    if (!kernel.found) return fail(kNotFound, std::string("the module has no ") + name);
    if (kernel.parameters != kernel.wide)
        return fail(kInvalidValue, std::string(name) + " has a parameter that is not 8 bytes wide");
    *function = &(module.functions[name] = {name, kernel.parameters, kernel.threads});
    return 0;
}

D2D_EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != kMostDynamicShared)
        return fail(kInvalidValue, "only dynamic shared memory is known here");
    static_cast<Function*>(function)->dynamic_shared = static_cast<unsigned>(value);
    return 0;
}

D2D_EXPORT int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                              unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                              void* stream, void** parameters, void**) {
    const auto& function = *static_cast<const Function*>(handle);
    if (!grid_x || !grid_y || !grid_z || grid_y > kMostBlocks || grid_z > kMostBlocks)
        return fail(kInvalidValue, "the grid is not one that a GPU takes");
    if (block_x * block_y * block_z > function.threads)
        return fail(kInvalidValue, "the block has more threads than " + function.name + " allows");
    if (shared_bytes > function.dynamic_shared)
        return fail(kInvalidValue, function.name + " was not allowed so much shared memory");
    static unsigned launches = 0;
    Launch launch{&function,
                  {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, launches++ % 3, {}},
                  {}};
    for (size_t i = 0; i < function.parameters; ++i)
        launch.words.push_back(*static_cast<const uint64_t*>(parameters[i]));
    last_stream = stream;
    last_launched = function.name;
    const auto capture = captured.find(stream);
    if (capture == captured.end()) return run(launch);
    capture->second.push_back(launch);
    return 0;
}

D2D_EXPORT int cuStreamBeginCapture_v2(void* stream, int) {
    if (!stream || captured.count(stream)) return fail(kNotWhileCapturing, "this stream cannot be captured");
    captured[stream];
    return 0;
}

D2D_EXPORT int cuStreamEndCapture(void* stream, void** graph) {
    const auto capture = captured.find(stream);
    if (capture == captured.end()) return fail(kInvalidValue, "the stream is not captured");
    *graph = new Graph(std::move(capture->second));
    captured.erase(capture);
    return 0;
}

D2D_EXPORT int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph*>(graph));
    return 0;
}

D2D_EXPORT int cuGraphLaunch(void* executable, void*) {
    for (const Launch& launch : *static_cast<Graph*>(executable))
        if (const int status = run(launch)) return status;
    return 0;
}

D2D_EXPORT int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), 0; }
D2D_EXPORT int cuGraphExecDestroy(void* executable) { return delete static_cast<Graph*>(executable), 0; }

D2D_EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (const int status = refuse_in_a_capture()) return status;
    *address = reinterpret_cast<uint64_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    allocations[*address] = bytes;
    return 0;
}

D2D_EXPORT int cuMemFree_v2(uint64_t address) {
    allocations.erase(address);
    std::free(reinterpret_cast<void*>(address));
    return 0;
}

D2D_EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    if (const int status = refuse_in_a_capture()) return status;
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
}

D2D_EXPORT int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    if (const int status = refuse_in_a_capture()) return status;
    return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), 0;
}

// For tests: the stream of the last launch.
D2D_EXPORT void* d2d_last_stream() { return last_stream; }

// For tests: what the modules were compiled for.
D2D_EXPORT const char* d2d_loaded() { return loaded.c_str(); }
D2D_EXPORT const char* d2d_last_launched() { return last_launched.c_str(); }
