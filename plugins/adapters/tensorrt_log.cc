// TensorRT's logger, by the table of its virtual functions: where `findLogger` and `log` stand there moved between
// releases 10 and 11, so it is called in releases alone whose tables were read. Elsewhere, and where there is no logger (the
// lean runtimes have none, nor has TensorRT-RTX before its first builder), stderr.
#include "tensorrt_log.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace d2d::trt {
namespace {

constexpr int32_t kError = 1;  // ILogger::Severity

void* finder = nullptr;

void** table_of(void* object) { return *static_cast<void***>(object); }

// The place of both functions in the tables of the library that owns `table`; -1: not known. TensorRT's releases are
// major * 10000 + minor * 100 + patch, those of TensorRT-RTX the same of 1.x.
int place(void** table) {
    Dl_info info;
    if (!dladdr(table, &info) || !info.dli_fname) return -1;
    void* library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return -1;
    const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    const int32_t release = version ? version() : 0;
    dlclose(library);
    if (release >= 100000) return release < 110000 ? 0 : release < 120000 ? 4 : -1;
    if (release < 10400) return -1;
    return release < 10500 ? 0 : release < 10800 ? 4 : -1;
}

}  // namespace

void find_logger_by(void* object) noexcept { finder = object; }

void tell(const char* who, const char* fault) noexcept {
    char text[1024];  // nothing is allocated: what there is to tell may be that memory is out
    std::snprintf(text, sizeof text, "dit2deploy: %s: %s", who, fault);
    const int at = finder ? place(table_of(finder)) : -1;
    void* const logger = at < 0 ? nullptr : reinterpret_cast<void* (*)(void*)>(table_of(finder)[at])(finder);
    if (logger)
        reinterpret_cast<void (*)(void*, int32_t, const char*)>(table_of(logger)[at])(logger, kError, text);
    else
        std::fprintf(stderr, "%s\n", text);
}

}  // namespace d2d::trt
